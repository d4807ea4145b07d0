"""Fused, exact, reversible fine-tuning for stock Trainer, TRL and PEFT.

Importing registers this package's adapter methods with PEFT and does nothing else; names below load on first use.
"""

from importlib import import_module
from typing import Any

from hf_fastpeft import tuners as _tuners  # registers the methods with PEFT
from hf_fastpeft._version import __version__

_tuners.register()

_EXPORTS = {
    "AdaLoraCallback": "hf_fastpeft.callbacks.adalora",
    "AdaptiveLoraConfig": "hf_fastpeft.tuners.adalora",
    "BottleneckAdapterConfig": "hf_fastpeft.tuners.bottleneck",
    "FastPeftCallback": "hf_fastpeft.callbacks.fastpeft",
    "Patched": "hf_fastpeft.patching",
    "RunConfig": "hf_fastpeft.config",
    "SoraCallback": "hf_fastpeft.callbacks.sora",
    "SoraConfig": "hf_fastpeft.tuners.sora",
    "allocate_ranks": "hf_fastpeft.allocation",
    "export_to_lora": "hf_fastpeft.export",
    "load_adapter": "hf_fastpeft.loading",
    "patch_model": "hf_fastpeft.patching",
    "patched": "hf_fastpeft.patching",
    "plot_ranks": "hf_fastpeft.run.plots",
    "register_family": "hf_fastpeft.families",
    "restore": "hf_fastpeft.patching",
    "train": "hf_fastpeft.run",
    "verify": "hf_fastpeft.verification",
}

__all__ = [
    "AdaLoraCallback",
    "AdaptiveLoraConfig",
    "BottleneckAdapterConfig",
    "FastPeftCallback",
    "Patched",
    "RunConfig",
    "SoraCallback",
    "SoraConfig",
    "__version__",
    "allocate_ranks",
    "export_to_lora",
    "load_adapter",
    "patch_model",
    "patched",
    "plot_ranks",
    "register_family",
    "restore",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hf_fastpeft' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
