"""Tuners: ours of adaptive LoRA, and PEFT's of AdaLoRA with the loss it should report."""

from typing import Any

from peft.tuners.adalora import AdaLoraModel
from torch import nn

from hf_fastpeft.tuners._gated import GatedModel
from hf_fastpeft.tuners.adalora.layer import AdaptiveLoraLayer, AdaptiveLoraLinear

__all__ = ["AdaptiveLoraModel", "TaskLossAdaLoraModel"]


class AdaptiveLoraModel(GatedModel):
    """Wraps the target modules of a model in adaptive LoRA layers; made by ``peft.get_peft_model``."""

    layer_class = AdaptiveLoraLayer

    @classmethod
    def layer_over(cls, peft_class: str) -> type[nn.Module] | None:
        """The layer in place of PEFT's class of that name."""
        if peft_class == "Linear":
            return AdaptiveLoraLinear
        from hf_fastpeft.tuners.adalora import bnb

        found: type[nn.Module] | None = getattr(bnb, f"AdaptiveLora{peft_class}", None)
        return found


class TaskLossAdaLoraModel(AdaLoraModel):
    """PEFT's tuner as ``AdaLoraCallback`` leaves it: the model's loss is the task's.

    PEFT adds its regulariser to ``outputs.loss``: also in evaluation, once per micro-batch whatever the accumulation,
    and not at all where a trainer computes its loss from the logits; and it computes it with two products a matrix on
    every forward. In evaluation, and in training while a callback adds its gradient, it is left out.
    """

    allocated_by_callback = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's outputs."""
        if self.allocated_by_callback or not self.training:
            return self.model.forward(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def update_and_allocate(self, global_step: int) -> None:
        """PEFT's own allocation; refused beside a callback's."""
        if self.allocated_by_callback:
            raise RuntimeError(
                f"update_and_allocate(global_step={global_step!r}): AdaLoraCallback already allocates the ranks of "
                "this model; drop one of the two."
            )
        super().update_and_allocate(global_step)
