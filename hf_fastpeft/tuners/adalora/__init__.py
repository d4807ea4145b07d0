"""Adaptive rank allocation: support for PEFT's AdaLoRA and a method of our own (arXiv 2303.10512)."""

from importlib import import_module
from typing import Any

from hf_fastpeft.tuners.adalora.allocate import RankAllocator, Triplet
from hf_fastpeft.tuners.adalora.config import AdaptiveLoraConfig
from hf_fastpeft.tuners.adalora.layer import AdaptiveLoraLayer, AdaptiveLoraLinear
from hf_fastpeft.tuners.adalora.model import AdaptiveLoraModel, TaskLossAdaLoraModel
from hf_fastpeft.tuners.adalora.schedule import Schedule

__all__ = [
    "AdaptiveLoraConfig",
    "AdaptiveLoraLayer",
    "AdaptiveLoraLinear",
    "AdaptiveLoraLinear4bit",
    "AdaptiveLoraLinear8bitLt",
    "AdaptiveLoraModel",
    "RankAllocator",
    "Schedule",
    "TaskLossAdaLoraModel",
    "Triplet",
]


def __getattr__(name: str) -> Any:
    if name in ("AdaptiveLoraLinear4bit", "AdaptiveLoraLinear8bitLt"):  # need bitsandbytes
        return getattr(import_module("hf_fastpeft.tuners.adalora.bnb"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
