"""What a run leaves behind, as the runner fills it in and the report reads it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["RunResult", "Sample"]


@dataclass
class Sample:
    """A held-out prompt, the answer the data gives, and the model's greedy answers before and after training."""

    prompt: str
    reference: str
    before: str = ""
    after: str = ""


@dataclass
class RunResult:
    """What a run did and where it left its files.

    Attributes:
        output_dir: the run's folder.
        interrupted: stopped by Ctrl-C; ``checkpoint`` continues it.
        checkpoint: the latest checkpoint, if one was written.
        adapter_dir: the adapter in its own format (the whole model where ``adapter`` is none).
        lora_dir: the same adapter as plain LoRA, where the two differ.
        base: folder or repository that the base model was loaded from.
        loss_before: validation loss of the untrained model, in nats per learned token.
        loss_after: validation loss at the end.
        kept_ranks: module -> (ranks kept, ranks at the start); empty for methods that keep all.
        patch: report of `patch_model`, None where patching was off.
        seconds: wall clock by phase.
        history: Trainer's log.
        rank_history: ``(step, module -> ranks kept)`` at every logging step.
    """

    output_dir: Path
    interrupted: bool = False
    checkpoint: Path | None = None
    adapter_dir: Path | None = None
    lora_dir: Path | None = None
    base: str = ""
    steps: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    samples: list[Sample] = field(default_factory=list)
    kept_ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    patch: dict[str, Any] | None = None
    patch_text: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    rank_history: list[tuple[int, dict[str, int]]] = field(default_factory=list)
