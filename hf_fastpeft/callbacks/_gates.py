"""What the callbacks of adaptive-rank methods share: the run they are in, the gates' dtype, their state file."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_fastpeft.tuners._gated import HALF

__all__ = ["checkpoint_file", "refuse_engines", "restore_float32"]


def refuse_engines(callback: str, args: Any, model: nn.Module, optimizer: Any, *, possible: str) -> None:
    """Refuse what keeps parameters where no callback can change one of them.

    DeepSpeed, at every stage: accelerate runs the engine's step inside ``backward`` and clears the gradients there,
    and the next step writes the parameters anew from the engine's float32 copy. FSDP1, at every sharding strategy and
    with original parameters too: each process has a piece of one flat parameter, in which a layer's gate may be whole,
    cut or missing.

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
    # By name: a torch built without torch.distributed has no such class.
    if any(base.__name__ == "FullyShardedDataParallel" for m in model.modules() for base in type(m).__mro__):
        raise RuntimeError(
            f"{callback} under FSDP1 (FullyShardedDataParallel): it flattens the parameters and gives each process a "
            f"piece of them, so gates and factors cannot be told apart; possible: {possible}."
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
