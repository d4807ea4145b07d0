"""The model families that can be patched: the fast classes that stand in for Hugging Face's, and what they fuse."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from hf_fastpeft.errors import UnknownFamilyError
from hf_fastpeft.fast_module import FastModule
from hf_fastpeft.layers import FastDecoderLayer

__all__ = ["FAMILIES", "Family", "bare_model", "families_table", "load_family", "register_family"]

# model_type -> module that defines FAMILY; families load when a model asks for them
FAMILIES: dict[str, str] = {
    "gemma2": "hf_fastpeft.patches.gemma2",
    "gemma3": "hf_fastpeft.patches.gemma3",
    "gemma3_text": "hf_fastpeft.patches.gemma3_text",
    "llama": "hf_fastpeft.patches.llama",
    "mistral": "hf_fastpeft.patches.mistral",
    "mixtral": "hf_fastpeft.patches.mixtral",
    "phi3": "hf_fastpeft.patches.phi3",
    "qwen2": "hf_fastpeft.patches.qwen2",
    "qwen3": "hf_fastpeft.patches.qwen3",
    "qwen3_moe": "hf_fastpeft.patches.qwen3_moe",
}


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture: its ``model_type`` and the fast classes that stand in for its modules.

    ``covers`` and ``notes`` are for readers: the models it includes, and what its classes do not say.
    """

    model_type: str
    fast_classes: tuple[type[FastModule], ...]
    covers: str = ""
    notes: str = ""

    @property
    def swaps(self) -> dict[type[nn.Module], type[FastModule]]:
        """Stock class -> fast class; matched by exact type."""
        return {stock: fast for fast in self.fast_classes if (stock := fast.stock_class()) is not None}


def register_family(model_type: str, module: str) -> None:
    """Make ``patch_model`` know another architecture.

    Args:
        model_type: the value of ``config.model_type``.
        module: importable module that defines ``FAMILY``, a :class:`Family`.
    """
    FAMILIES[model_type] = module


def families_table() -> str:
    """The registered families as a Markdown table: what each fuses, read off its classes."""
    rows = [
        ("family", "`model_type`", "norm", "q/k norm", "attention in", "attention out", "MLP", "head", "notes"),
        ("---",) * 9,
        *(_family_row(import_module(module).FAMILY) for _, module in sorted(FAMILIES.items())),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _family_row(family: Family) -> tuple[str, ...]:
    fast: dict[str, list[Any]] = {}
    for cls in family.fast_classes:
        for block in cls.blocks:
            fast.setdefault(block, []).append(cls)
    (norm,), (attention,) = fast["rms_norm"], fast["attention_in"]
    (layer,) = (cls for cls in family.fast_classes if issubclass(cls, FastDecoderLayer))
    mlps = [_short(*cls.linears.values()) if hasattr(cls, "linears") else "experts stock" for cls in fast["mlp"]]
    between = ", ".join(layer.after_attention + layer.after_mlp)
    options = ", ".join(attention.attention_options).replace("_", " ")
    notes = [options, between and f"{between} before the residuals", family.notes]
    return (
        family.covers,
        f"`{family.model_type}`",
        "RMSNorm, 1 + weight" if norm.unit_offset else "RMSNorm",
        "no" if attention.qk_norms is None else "yes",
        f"{_short(attention.linears['attention_in'])}, rotary",
        _short(attention.linears["attention_out"]),
        "; ".join(mlps),
        "yes" if "lm_head" in fast else "stock",
        "; ".join(filter(None, notes)),
    )


def _short(*groups: tuple[str, ...]) -> str:
    return ", ".join(name.removesuffix("_proj") for group in groups for name in group)


def bare_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a ``PeftModel``, or the model itself.

    Not through ``get_base_model()``, which fails where the active adapter was deleted.
    """
    if not isinstance(model, PeftModel):
        return model
    inner = model.base_model
    return inner.model if isinstance(inner, BaseTuner) else inner  # type: ignore[no-any-return]  # prompt methods: none


def load_family(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnknownFamilyError: its ``config.model_type`` is not registered.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise UnknownFamilyError(
            f"patch_model: no patch for model_type={model_type!r} ({type(model).__name__}); known: "
            f"{', '.join(sorted(FAMILIES))}. Register one with hf_fastpeft.register_family."
        )
    family = import_module(FAMILIES[model_type]).FAMILY
    assert isinstance(family, Family)
    return family
