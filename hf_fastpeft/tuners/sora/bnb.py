"""SoRA over bitsandbytes' quantised linears; imported only where PEFT found one, so the package stays optional."""

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from hf_fastpeft.tuners._gated import Repacked4bit
from hf_fastpeft.tuners.sora.layer import SoraLayer

__all__ = ["SoraLinear4bit", "SoraLinear8bitLt"]


class SoraLinear4bit(SoraLayer, Repacked4bit, Linear4bit):
    """SoRA over ``bitsandbytes.nn.Linear4bit``."""


class SoraLinear8bitLt(SoraLayer, Linear8bitLt):
    """SoRA over ``bitsandbytes.nn.Linear8bitLt``."""
