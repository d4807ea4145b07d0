"""What the callbacks of adaptive-rank methods share: the run they are in, the gates' dtype, their state file."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_fastpeft.tuners._gated import HALF

__all__ = ["checkpoint_file", "refuse_engines", "refuse_merged", "restore_float32"]


def refuse_engines(callback: str, args: Any, model: nn.Module, optimizer: Any, *, possible: str) -> None:
    """Refuse what keeps parameters where no callback can change one of them.

    DeepSpeed, at every stage: accelerate runs the engine's step inside ``backward`` and clears the gradients there,
    and the next step writes the parameters anew from the engine's float32 copy. FSDP1, at every sharding strategy and
    with original parameters too: each process has a piece of one flat parameter, in which a layer's gate may be whole,
    cut or missing. Schedule-free optimizers: what they evaluate and save is an average computed from a copy of the
    parameters that no callback reaches, in which ranks that were switched off come back.

    Raises:
        RuntimeError: the run uses one of them.
    """
    if getattr(args, "deepspeed", None) or "DeepSpeed" in type(optimizer).__name__:
        asked = getattr(args, "deepspeed", None)
        found = type(optimizer).__name__ if not asked else f"deepspeed={asked!r}"
        raise RuntimeError(
            f"{callback} under DeepSpeed ({found}): its engine steps inside backward, clears the gradients before any "
            "callback and overwrites the gates from its own float32 copy, so no rank could be scored or stay pruned; "
            f"possible: {possible}."
        )
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has both methods whatever it wraps
    if callable(getattr(inner, "train", None)) and callable(getattr(inner, "eval", None)):
        raise RuntimeError(
            f"{callback} with {type(inner).__name__}: an optimizer with train() and eval() averages the gates from "
            "copies of its own, so no rank would stay pruned; possible: an optimizer that keeps one set of parameters."
        )
    # By name: a torch built without torch.distributed has no such class.
    if any(base.__name__ == "FullyShardedDataParallel" for m in model.modules() for base in type(m).__mro__):
        raise RuntimeError(
            f"{callback} under FSDP1 (FullyShardedDataParallel): it flattens the parameters and gives each process a "
            f"piece of them, so gates and factors cannot be told apart; possible: {possible}."
        )


def refuse_merged(callback: str, layers: Iterable[tuple[str, Any]]) -> None:
    """Refuse layers, given by path, whose base weight holds a merged adapter.

    Raises:
        RuntimeError: there is one.
    """
    for path, layer in layers:
        if layer.merged_adapters:
            raise RuntimeError(
                f"{callback}: {path!r} has adapters {list(layer.merged_adapters)} merged into its weight: its forward "
                "leaves the gates out, so they would be pruned without a gradient, and unmerging would subtract "
                "another weight than was added; possible: model.unmerge_adapter() before training."
            )


def restore_float32(gates: list[Any], optimizer: Any) -> None:
    """Gates and their optimizer state back in float32, in the same Parameter objects."""
    for gate in (gate for gate in gates if gate.dtype in HALF):
        gate.data = gate.data.float()
        state = optimizer.state.get(gate, {}) if optimizer is not None else {}
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dtype in HALF:
                state[key] = value.float()


def checkpoint_file(args: Any, state: Any, name: str) -> Path | None:
    """File ``name`` of the checkpoint that the run resumes from; None where there is none."""
    asked = getattr(args, "resume_from_checkpoint", None)
    folders = [Path(asked)] if isinstance(asked, str) else []
    folders.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
