"""Configuration of SoRA, sparse low-rank adaptation (Ding et al. 2023, arXiv 2311.11696)."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from peft import LoraConfig

from hf_fastpeft.tuners import _config
from hf_fastpeft.tuners._config import NOT_PLAIN_LORA, is_int, write_card, wrong_lora_settings
from hf_fastpeft.tuners._peft import add_peft_type

__all__ = ["SoraConfig"]

_INITS = (True, False, "gaussian", "orthogonal")
_SCHEDULES = ("constant", "linear", "cosine", "cubic", "stages")


@dataclass
class SoraConfig(LoraConfig):
    """LoRA whose ranks carry a trainable gate, pruned by a proximal step after the optimizer's step.

    Needs ``hf_fastpeft.SoraCallback`` in the trainer: without it gates train and none is pruned. Every other field is
    ``peft.LoraConfig``'s; ``r`` is the rank to start from, so take it larger than the rank you want to keep.

    Args:
        sparse_lambda: pressure on the gates, in units of the learning rate; each step moves a gate towards zero by
            ``lr * sparse_lambda * gate_scale``. Under Adam, whose own step is at most about ``lr``, values in (0, 1)
            select: near 0 nothing dies, at 1 and above everything does. Default 0.5 (ours: the paper gives a raw
            threshold, which a decaying learning rate turns into a cliff). Unused with ``target_r``, unless
            ``reassign_ranks`` is set.
        lambda_schedule: how the pressure grows to ``sparse_lambda`` over the pruning window: ``"constant"`` (default:
            all of it from the start), ``"linear"``, ``"cosine"``, ``"cubic"`` (fast, then flat), or ``"stages"``
            (equal steps; the paper's sparsifying scheduler, which shows what each sparsity costs: log and evaluate
            in every stage). Formulas: ``hf_fastpeft.tuners.sora.prune.lambda_share``.
        lambda_stages: number of stages of ``lambda_schedule="stages"``, each of the same length. Default 4 (ours).
        gate_scale: fixed factor ``s`` in ``g = s * gamma``, of which ``gamma`` is trained. Under Adam it acts as a
            learning rate ``s`` times larger for the gates, without which no usual schedule moves them far enough.
            Default 50 (ours), for learning rates around 1e-4; at 1e-3 and above take less: 5 to 10 lost less in the
            intent benchmark, where 50 diverged at 1e-2.
        gate_init: ``"ones"`` starts as LoRA does (default, ours); ``"randn"`` draws ``g`` from N(0, 1) (paper).
        warmup_ratio: fraction of all steps before the first pruning: gates have no gradient while B is zero.
        settle_ratio: fraction of all steps, at the end, without pruning; ranks that are gone by then stay gone.
        target_r: mean rank kept per layer at the end of pruning; ranks then compete over all layers by ``|g|`` for a
            budget that falls from all ranks to this one (cubic schedule of AdaLoRA, arXiv 2303.10512, eq. 13).
            None: ``sparse_lambda`` alone decides how many are left.
        reassign_ranks: with ``target_r``: ``sparse_lambda`` acts as well, and frees ranks below the budget where the
            loss does not hold them; in their place come those pruned gates, of any layer, that the loss pulls away
            from zero more steadily than ``sparse_lambda`` pushes back. So ranks move between layers until pruning
            stops, and at most ``target_r`` on average are left. A rank comes back with the A and B that it had, its
            gate growing from zero by the optimizer's steps, so outputs never jump. The aim, not the mechanism, of
            L1RA (arXiv 2509.04884).
        min_rank: ranks per layer that are never pruned, the largest ``|g|`` of each layer.
        kept_ranks: layer path -> ranks left; written when the adapter is saved, never read.

    Raises:
        ValueError: a value out of range, or a LoRA variant that has no gated form; all mistakes in one message.
    """

    sparse_lambda: float = field(default=0.5, metadata={"help": "pressure on the gates in units of the lr; (0, 1)"})
    lambda_schedule: Literal["constant", "linear", "cosine", "cubic", "stages"] = field(
        default="constant", metadata={"help": "how the pressure grows to sparse_lambda while ranks are pruned"}
    )
    lambda_stages: int = field(default=4, metadata={"help": "stages of lambda_schedule='stages'"})
    gate_scale: float = field(
        default=50.0, metadata={"help": "fixed factor between the gate and what is trained", **NOT_PLAIN_LORA}
    )
    gate_init: Literal["ones", "randn"] = field(default="ones", metadata={"help": "'ones' or 'randn'"})
    warmup_ratio: float = field(default=0.1, metadata={"help": "fraction of steps before pruning starts"})
    settle_ratio: float = field(default=0.1, metadata={"help": "fraction of steps at the end without pruning"})
    target_r: float | None = field(default=None, metadata={"help": "mean kept rank aimed at; None: sparse_lambda"})
    reassign_ranks: bool = field(default=False, metadata={"help": "freed ranks go to other layers; with target_r"})
    min_rank: int = field(default=0, metadata={"help": "ranks of each layer that are never pruned"})
    kept_ranks: dict[str, int] | None = field(default=None, metadata={"help": "ranks left; written at save"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("SORA")
        wrong = [*self._wrong_values(), *wrong_lora_settings(self, _INITS)]
        if wrong:
            raise ValueError("SoraConfig: " + "; ".join(wrong))

    def _wrong_values(self) -> list[str]:
        wrong: list[str] = []
        check = partial(_config.check, self, wrong)
        ranks = [self.r, *(self.rank_pattern or {}).values()]
        check("r", lambda v: is_int(v) and v > 0, "possible: an integer above 0")
        check("rank_pattern", lambda v: all(is_int(n) and n > 0 for n in (v or {}).values()), "ranks are above 0")
        check("sparse_lambda", lambda v: 0 <= v < math.inf, "possible: a number from 0, useful in (0, 1)")
        check("lambda_schedule", lambda v: v in _SCHEDULES, f"possible: {', '.join(map(repr, _SCHEDULES))}")
        check("lambda_stages", lambda v: is_int(v) and v > 0, "possible: an integer above 0")
        check("reassign_ranks", lambda v: isinstance(v, bool), "possible: True, False")
        check("gate_scale", lambda v: 0 < v < math.inf, "possible: a number above 0")
        check("gate_init", lambda v: v in ("ones", "randn"), "possible: 'ones', 'randn'")
        check("warmup_ratio", lambda v: 0 <= v < 1, "possible: a fraction in [0, 1)")
        check("settle_ratio", lambda v: 0 <= v < 1, "possible: a fraction in [0, 1)")
        if not wrong and self.warmup_ratio + self.settle_ratio >= 1:
            wrong.append(
                f"warmup_ratio={self.warmup_ratio!r} and settle_ratio={self.settle_ratio!r}: no step is left to prune "
                "in; their sum must be below 1"
            )
        if not wrong:
            top = max(ranks)
            check("min_rank", lambda v: is_int(v) and 0 <= v <= top, f"possible: an integer from 0 to r={top}")
        if not wrong and self.target_r is not None:
            check("target_r", lambda v: 0 < v <= top, f"possible: a number above 0, at most r={top}, or None")
        if not wrong and self.target_r is not None and self.min_rank > self.target_r:
            wrong.append(f"min_rank={self.min_rank!r}: above target_r={self.target_r!r}")
        if not wrong and self.reassign_ranks and self.target_r is None:
            wrong.append("reassign_ranks=True, target_r=None: there is no budget to reassign within; give target_r")
        if not wrong and self.lambda_schedule != "constant" and self.target_r is not None and not self.reassign_ranks:
            wrong.append(
                f"lambda_schedule={self.lambda_schedule!r}: no sparse_lambda acts with target_r={self.target_r!r}, "
                "whose budget has a schedule of its own; possible: 'constant', target_r=None, or reassign_ranks=True"
            )
        return wrong

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and say in the folder's model card what loading the adapter takes."""
        super().save_pretrained(save_directory, **kwargs)
        write_card(save_directory, "SoRA", "SORA")
