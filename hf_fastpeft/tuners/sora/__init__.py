"""SoRA: LoRA with a trainable, pruned gate per rank (Ding et al. 2023, arXiv 2311.11696)."""

from importlib import import_module
from typing import Any

from hf_fastpeft.tuners.sora.config import SoraConfig
from hf_fastpeft.tuners.sora.layer import GatedLinear, SoraGate, SoraLayer, SoraLinear, kept_ranks
from hf_fastpeft.tuners.sora.model import SoraModel

__all__ = [
    "GatedLinear",
    "SoraConfig",
    "SoraGate",
    "SoraLayer",
    "SoraLinear",
    "SoraLinear4bit",
    "SoraLinear8bitLt",
    "SoraModel",
    "kept_ranks",
]


def __getattr__(name: str) -> Any:
    if name in ("SoraLinear4bit", "SoraLinear8bitLt"):  # need bitsandbytes
        return getattr(import_module("hf_fastpeft.tuners.sora.bnb"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
