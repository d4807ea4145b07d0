"""A stack of linears as it was read, with what is worth keeping from call to call: its flat tensors and its plan."""

from collections.abc import Iterable
from typing import Any

import torch

from hf_fastpeft.blocks.adapters import SideCache
from hf_fastpeft.blocks.projection import Plan, make_plan
from hf_fastpeft.lowrank import LowRank, compute_dtype
from hf_fastpeft.ops._backend import Impl
from hf_fastpeft.stacking import span

__all__ = ["Bundle"]


class Bundle(tuple[LowRank, ...]):
    """Records of linears over one input. Whoever keeps it watches that their modules stay as they are.

    Attributes:
        flat: their tensors, as a Function takes them.
        weights: of each of them.
    """

    flat: tuple[torch.Tensor | None, ...]
    weights: tuple[torch.Tensor, ...]
    _dtypes: list[torch.Tensor]  # a weight of each dtype
    _planned: tuple[Any, Plan, bool] | None  # what was asked, the plan, whether its weight is a view over all

    def __new__(cls, stack: Iterable[LowRank]) -> "Bundle":
        bundle = super().__new__(cls, stack)
        bundle.flat = tuple(tensor for low in bundle for tensor in low.tensors)
        bundle.weights = tuple(low.weight for low in bundle)
        bundle._dtypes = list({weight.dtype: weight for weight in bundle.weights}.values())
        bundle._planned = None
        return bundle

    def dtype_for(self, x: torch.Tensor) -> torch.dtype | None:
        """The dtype stock would multiply ``x`` with these weights in; None where there is no such one."""
        found = {compute_dtype(x, weight) for weight in self._dtypes}
        return found.pop() if len(found) == 1 else None

    def plan(self, dtype: torch.dtype, impl: Impl, x: torch.Tensor, adapters: SideCache | None) -> Plan:
        """The plan of a call on ``x``: that of the last call, its copies renewed, where it would come out the same."""
        asked = dtype, impl, x.dtype, x.device, torch.is_autocast_enabled(x.device.type)
        if self._planned is not None and adapters is not None:
            before, plan, stacked = self._planned
            if before == asked and adapters.renew(plan.copies):
                return plan._replace(weight=span(self.weights)) if stacked else plan
        plan = make_plan(self, dtype, impl, x, adapters)
        if plan.copies is None or (
            adapters is not None and plan.weight is None and adapters.may_restack(self.weights)
        ):
            self._planned = None
        elif len(self) > 1 and plan.weight is not None:
            # a view would keep the weights' memory after they were moved
            self._planned = asked, plan._replace(weight=None), True
        else:
            self._planned = asked, plan, False
        return plan
