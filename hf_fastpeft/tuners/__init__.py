"""Adapter methods that register with PEFT."""

from typing import Any

__all__ = ["methods", "register"]


def methods() -> dict[str, tuple[Any, Any]]:
    """Every method of this package: ``peft_type`` -> (configuration class, tuner class)."""
    from hf_fastpeft.tuners.adalora import AdaptiveLoraConfig, AdaptiveLoraModel
    from hf_fastpeft.tuners.bottleneck import BottleneckAdapterConfig, BottleneckModel
    from hf_fastpeft.tuners.sora import SoraConfig, SoraModel

    return {
        "ADAPTIVE_LORA": (AdaptiveLoraConfig, AdaptiveLoraModel),
        "BOTTLENECK": (BottleneckAdapterConfig, BottleneckModel),
        "SORA": (SoraConfig, SoraModel),
    }


def register() -> None:
    """Register every method with PEFT and its layers with the fused blocks; calling it again changes nothing."""
    from hf_fastpeft.tuners._bitsandbytes import without_hints

    with without_hints():  # PEFT is imported here
        _register()


def _register() -> None:
    from hf_fastpeft.lowrank import register_reader
    from hf_fastpeft.tuners._gated_reader import read_gated_layer
    from hf_fastpeft.tuners._peft import add_peft_type, register_method
    from hf_fastpeft.tuners.adalora.reader import register_readers
    from hf_fastpeft.tuners.sora.layer import SoraLinear

    for name, (config_cls, model_cls) in methods().items():
        register_method(add_peft_type(name), config_cls, model_cls)
    register_reader(SoraLinear, read_gated_layer)
    register_readers()
