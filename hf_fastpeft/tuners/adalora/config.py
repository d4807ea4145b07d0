"""Configuration of adaptive LoRA: AdaLoRA's rank allocation (arXiv 2303.10512) on gated LoRA layers."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from peft import LoraConfig

from hf_fastpeft.tuners import _config
from hf_fastpeft.tuners._config import NOT_PLAIN_LORA, is_int, write_card, wrong_lora_settings
from hf_fastpeft.tuners._peft import add_peft_type
from hf_fastpeft.tuners.adalora.schedule import Schedule, in_steps

__all__ = ["AdaptiveLoraConfig"]

_INITS = (True, False, "orthogonal")
_DEFAULT_R = 8  # LoraConfig's


@dataclass
class AdaptiveLoraConfig(LoraConfig):
    """LoRA whose ranks are shared out over the layers while it trains; each rank is a triplet (row of A, gate, column
    of B) that an allocator scores and keeps or switches off.

    Needs ``hf_fastpeft.AdaLoraCallback`` in the trainer: without it no rank is ever switched off. Works where LoRA
    does: on ``nn.Linear``, ``Conv1D`` and bitsandbytes layers; merges, reloads and exports. Gates start at zero and A
    and B at N(0, 0.02²) (AdaLoRA's authors), or orthonormal with ``init_lora_weights="orthogonal"`` (ours).

    Args:
        init_r: ranks of the tensors of each layer; overrides ``r``. Default 12 (1.5 ``target_r``, paper, appendix).
        target_r: mean rank kept per layer at the end.
        scorer: ``"sensitivity"``: smoothed ``|w dL/dw|`` and its spread (paper, eq. 9 to 11; keeps two float32 copies
            of the adapter). ``"magnitude"``: Frobenius norm of the rank's weight change (arXiv 2405.17357; no copies).
        budget: ``"decay"`` starts with all ranks and falls to ``target_r`` cubically (paper, eq. 13; ranks that are
            off may return until the pattern is frozen). ``"constant"`` starts with ``target_r`` ranks per layer and
            moves ranks between layers at that total (after ElaLoRA, arXiv 2504.00254), up to ``init_r`` in one layer.
        tinit: warm-up before the first allocation: steps (an int) or a fraction of the run (a float).
        tfinal: end of the run with a frozen pattern: steps (an int) or a fraction of the run (a float).
        delta_t: steps between two allocations.
        beta1: smoothing of the sensitivity, in (0, 1). Default 0.85 (paper).
        beta2: smoothing of its spread, in (0, 1). Default 0.85 (paper).
        orth_reg_weight: weight of the orthogonality term on A and B; 0 switches it off. Default 0.5 (PEFT).
        regrow_ratio: of ``budget="constant"``: share of the ranks that the first allocation moves; falls to 0 like the
            decaying budget. Default 0.2 (ours).
        total_step: optimizer steps of the schedule; None takes the trainer's.
        kept_ranks: layer path -> ranks left; written when the adapter is saved, never read.

    Raises:
        ValueError: a value out of range, or a LoRA variant that has no gated form; all mistakes in one message.
    """

    init_r: int = field(default=12, metadata={"help": "ranks of each layer's tensors", **NOT_PLAIN_LORA})
    target_r: float = field(default=8, metadata={"help": "mean rank kept per layer at the end"})
    scorer: Literal["sensitivity", "magnitude"] = field(default="sensitivity", metadata={"help": "how ranks compete"})
    budget: Literal["decay", "constant"] = field(default="decay", metadata={"help": "how the total rank runs"})
    tinit: int | float = field(default=0.1, metadata={"help": "warm-up: steps (int) or fraction (float)"})
    tfinal: int | float = field(default=0.2, metadata={"help": "frozen pattern: steps (int) or fraction (float)"})
    delta_t: int = field(default=10, metadata={"help": "steps between two allocations"})
    beta1: float = field(default=0.85, metadata={"help": "smoothing of the sensitivity"})
    beta2: float = field(default=0.85, metadata={"help": "smoothing of its spread"})
    orth_reg_weight: float = field(default=0.5, metadata={"help": "weight of the orthogonality term"})
    regrow_ratio: float = field(default=0.2, metadata={"help": "share of ranks moved first; budget='constant'"})
    total_step: int | None = field(default=None, metadata={"help": "steps of the schedule; None: the trainer's"})
    kept_ranks: dict[str, int] | None = field(default=None, metadata={"help": "ranks left; written at save"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("ADAPTIVE_LORA")
        wrong = [*self._wrong_values(), *wrong_lora_settings(self, _INITS)]
        if wrong:
            raise ValueError("AdaptiveLoraConfig: " + "; ".join(wrong))
        self.r = self.init_r

    def schedule(self, max_steps: int) -> Schedule:
        """The phases in a run of ``max_steps`` optimizer steps.

        Raises:
            ValueError: the schedule is longer than the run, or leaves no step to allocate in.
        """
        total = self.total_step or max_steps
        if total > max_steps:
            raise ValueError(
                f"AdaptiveLoraConfig: total_step={total!r}: the run has {max_steps} steps, so ranks would never reach "
                f"target_r={self.target_r!r}; possible: at most {max_steps}, or None for the trainer's"
            )
        tinit, freeze = in_steps(self.tinit, total), total - in_steps(self.tfinal, total)
        if tinit >= freeze:
            raise ValueError(
                f"AdaptiveLoraConfig: tinit={self.tinit!r}, tfinal={self.tfinal!r}: {tinit} and {total - freeze} of "
                f"{total} steps leave none to allocate ranks in; possible: a sum below {total} steps, or fractions"
            )
        return Schedule(tinit, freeze, self.delta_t)

    def _wrong_values(self) -> list[str]:
        wrong: list[str] = []
        check = partial(_config.check, self, wrong)
        length = "possible: steps (an int from 0) or a fraction of the run (a float in [0, 1))"

        check("init_r", lambda v: is_int(v) and v > 0, "possible: an integer above 0")
        check("rank_pattern", lambda v: all(is_int(n) and n > 0 for n in (v or {}).values()), "ranks are above 0")
        check("scorer", lambda v: v in ("sensitivity", "magnitude"), "possible: 'sensitivity', 'magnitude'")
        check("budget", lambda v: v in ("decay", "constant"), "possible: 'decay', 'constant'")
        check("tinit", _is_length, length)
        check("tfinal", _is_length, length)
        check("delta_t", lambda v: is_int(v) and v > 0, "possible: an integer above 0")
        check("beta1", lambda v: 0 < v < 1, "possible: a number in (0, 1)")
        check("beta2", lambda v: 0 < v < 1, "possible: a number in (0, 1)")
        check("orth_reg_weight", lambda v: 0 <= v < float("inf"), "possible: a number from 0")
        check("regrow_ratio", lambda v: 0 < v <= 1, "possible: a number in (0, 1]")
        check("total_step", lambda v: v is None or (is_int(v) and v > 0), "possible: an integer above 0, or None")
        if not wrong and self.r not in (_DEFAULT_R, self.init_r):
            wrong.append(f"r={self.r!r}: the ranks to start from are init_r={self.init_r!r}; leave r out")
        if not wrong:
            top = max([self.init_r, *(self.rank_pattern or {}).values()])
            check(
                "target_r",
                lambda v: 0 < v < top,
                f"with init_r={self.init_r} and budget={self.budget!r} no rank could be given to one layer rather "
                f"than another; possible: a number above 0 and below {top}",
            )
        if not wrong and isinstance(self.tinit, float) and isinstance(self.tfinal, float):
            both = self.tinit + self.tfinal
            if both >= 1:
                wrong.append(f"tinit={self.tinit!r}, tfinal={self.tfinal!r}: their sum {both:g} must be below 1")
        return wrong

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and say in the folder's model card what loading the adapter takes."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(save_directory, "adaptive LoRA", "ADAPTIVE_LORA")


def _is_length(value: Any) -> bool:
    return (is_int(value) and value >= 0) or (isinstance(value, float) and 0 <= value < 1)
