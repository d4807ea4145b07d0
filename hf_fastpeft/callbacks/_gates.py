"""What the callbacks of adaptive-rank methods share: the run they are in, the gates' dtype, their state file."""

from pathlib import Path
from typing import Any

import torch

from hf_fastpeft.tuners._gated import HALF

__all__ = ["checkpoint_file", "restore_float32", "uses_deepspeed"]


def uses_deepspeed(args: Any, optimizer: Any) -> bool:
    """Whether DeepSpeed's engine takes the steps."""
    return bool(getattr(args, "deepspeed", None)) or "DeepSpeed" in type(optimizer).__name__


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
