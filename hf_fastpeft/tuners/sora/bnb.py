"""SoRA over bitsandbytes' quantised linears; imported only where PEFT found one, so the package stays optional."""

from typing import Any

from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

from hf_fastpeft.tuners.sora.layer import SoraLayer

__all__ = ["SoraLinear4bit", "SoraLinear8bitLt"]


class SoraLinear4bit(SoraLayer, Linear4bit):
    """SoRA over ``bitsandbytes.nn.Linear4bit``."""

    # bitsandbytes 0.50 repacks a CPU weight at the first forward in evaluation mode, and PEFT's merge dequantises the
    # packed bytes as if they were not (relative error 1.4). Building the state dict puts the layout back.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight, which is quantised anew."""
        self.get_base_layer().state_dict()
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self, *args: Any, **kwargs: Any) -> None:
        """Take merged adapters out of the base weight, which is quantised anew."""
        self.get_base_layer().state_dict()
        super().unmerge(*args, **kwargs)


class SoraLinear8bitLt(SoraLayer, Linear8bitLt):
    """SoRA over ``bitsandbytes.nn.Linear8bitLt``."""
