"""SoRA's tuner: PEFT's LoRA tuner with gated layers, found through PEFT's own dispatch."""

from torch import nn

from hf_fastpeft.tuners._gated import GatedModel
from hf_fastpeft.tuners.sora.layer import SoraLayer, SoraLinear

__all__ = ["SoraModel"]


class SoraModel(GatedModel):
    """Wraps the target modules of a model in SoRA layers; made by ``peft.get_peft_model``."""

    layer_class = SoraLayer

    @classmethod
    def layer_over(cls, peft_class: str) -> type[nn.Module] | None:
        """SoRA's layer in place of PEFT's class of that name."""
        if peft_class == "Linear":
            return SoraLinear
        from hf_fastpeft.tuners.sora import bnb

        found: type[nn.Module] | None = getattr(bnb, f"Sora{peft_class}", None)
        return found
