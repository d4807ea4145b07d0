"""What each method of ``adapter:`` can do, declared once; ``tests/test_method_table.py`` runs every entry."""

from dataclasses import dataclass
from typing import Literal

from hf_fastpeft.config.methods import METHODS, SHORTHANDS

__all__ = ["FACTS", "Facts", "methods_table"]

BLOCKS = ("attention_in", "attention_out", "mlp", "rms_norm", "lm_head")
Weights = Literal["float", "4-bit", "8-bit"]


@dataclass(frozen=True)
class Facts:
    """One method, as its file in ``examples/`` sets it up.

    Attributes:
        trained: parameters that it trains in SmolLM2-135M.
        bases: base weights that it trains on.
        merges: base weights that it merges into.
        lora: how it becomes a plain LoRA folder: ``is one``; ``export_to_lora``; ``written by the run`` beside the
            adapter; ``no``.
        stock: blocks of a patched Llama that stay stock on float weights.
        fsdp2: ``FSDP2``, with what is refused there; empty where all of it is.
    """

    trained: int
    bases: tuple[Weights, ...] = ("float", "4-bit", "8-bit")
    merges: tuple[Weights, ...] = ("float", "4-bit", "8-bit")
    lora: Literal["is one", "export_to_lora", "written by the run", "no"] = "export_to_lora"
    stock: tuple[str, ...] = ()
    fsdp2: str = "FSDP2"


_LAYERS = ("attention_in", "attention_out", "mlp")
FACTS: dict[str, Facts] = {
    "lora": Facts(2_442_240, lora="is one"),
    "qlora": Facts(2_442_240, ("4-bit",), ("4-bit",), "is one", _LAYERS),
    "sora": Facts(2_443_920, fsdp2="FSDP2 without `target_r` and `min_rank`"),
    "adalora": Facts(3_665_880, merges=("float",), fsdp2=""),
    "adaptive_lora": Facts(3_665_880, fsdp2=""),
    "bottleneck": Facts(2_248_320, merges=(), lora="no"),
    "ia3": Facts(57_600, merges=("float",), lora="no", stock=("attention_in", "mlp")),
    "prefix": Facts(184_320, merges=(), lora="no"),
    "prompt": Facts(9_216, merges=(), lora="no"),
    "ptuning": Facts(173_888, merges=(), lora="no"),
    "full": Facts(134_515_008, ("float",), (), "no", ("lm_head",)),
    "rslora": Facts(9_768_960),
    "dora": Facts(2_597_760, ("float", "4-bit"), ("float", "4-bit"), "no", _LAYERS),
    "loraplus": Facts(2_442_240, lora="is one"),
    "pissa": Facts(2_442_240, ("float",), ("float",), "written by the run"),
    "eva": Facts(2_442_240),
}


def methods_table() -> str:
    """The methods of ``adapter:`` as a Markdown table."""
    rows = [
        ("`adapter`", "class", "trained", "base weights", "merges into", "plain LoRA", "fused", "distributed"),
        ("---",) * 8,
        *(_row(name, FACTS[name]) for name in (*METHODS, *SHORTHANDS)),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(name: str, facts: Facts) -> tuple[str, ...]:
    adapter = name if name in METHODS else SHORTHANDS[name]["adapter"]
    callbacks = METHODS[adapter].callbacks if adapter in METHODS else ()
    fused = [block for block in BLOCKS if block not in facts.stock]
    return (
        f"`{name}`",
        " + ".join(f"`{cls}`" for cls in (METHODS[adapter].config, *callbacks)) if adapter in METHODS else "",
        f"{facts.trained:,}",
        ", ".join(facts.bases),
        ", ".join(facts.merges) or "no",
        f"`{facts.lora}`" if facts.lora == "export_to_lora" else facts.lora,
        "all" if not facts.stock else ", ".join(fused),
        ", ".join(filter(None, ("DDP", facts.fsdp2))),
    )
