"""Adaptive LoRA over bitsandbytes' quantised linears; imported only where PEFT found one."""

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from hf_fastpeft.tuners._gated import Repacked4bit
from hf_fastpeft.tuners.adalora.layer import AdaptiveLoraLayer

__all__ = ["AdaptiveLoraLinear4bit", "AdaptiveLoraLinear8bitLt"]


class AdaptiveLoraLinear4bit(AdaptiveLoraLayer, Repacked4bit, Linear4bit):
    """Adaptive LoRA over ``bitsandbytes.nn.Linear4bit``."""


class AdaptiveLoraLinear8bitLt(AdaptiveLoraLayer, Linear8bitLt):
    """Adaptive LoRA over ``bitsandbytes.nn.Linear8bitLt``."""
