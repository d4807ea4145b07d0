"""Mixtures of experts: the block itself stays stock and says so; its model's head is fused like any other's."""

from typing import Any

import torch

from hf_fastpeft.causal_lm import FastCausalLM
from hf_fastpeft.fast_module import FastModule
from hf_fastpeft.lazy_output import OutputWithLazyLogits

__all__ = ["FastMoeCausalLM", "StockExperts"]

EXPERTS = "mixture of experts"


class StockExperts(FastModule):
    """A router with its experts, counted in the report where other layers have their MLP; it runs stock.

    The experts are one parameter each for all of them, whose tokens the router chooses: nothing for ``mlp`` to read.
    """

    blocks = ("mlp",)

    def obstacle(self, block: str) -> str | None:
        return EXPERTS

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(self, StockExperts):  # restored, while others hold this forward
            return type(self).forward(self, *args, **kwargs)
        self._fastpeft.fall_back("mlp", self._may_fuse() or EXPERTS)
        return super().forward(*args, **kwargs)  # type: ignore[no-any-return]


class FastMoeCausalLM(FastCausalLM):
    """A CausalLM over experts. Asked for router logits, which add to the loss, it runs stock."""

    def _fused_loss(self, given: dict[str, Any]) -> OutputWithLazyLogits:
        return super()._fused_loss({**given, "output_router_logits": False})  # None asks the config, which says no
