"""What the blocks' autograd Functions share: packing a stack into flat arguments and back."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_fastpeft.blocks.projection import Stack
from hf_fastpeft.lowrank import TENSORS_PER_LINEAR, LowRank
from hf_fastpeft.ops._backend import Impl

__all__ = ["Plan", "flatten", "rebuild", "side_dtype", "tokens"]


class Plan(NamedTuple):
    """The part of a call that is not tensors."""

    dtype: torch.dtype  # of the base products and the results
    side_dtype: torch.dtype  # of the low-rank products
    impl: Impl
    factors: tuple[tuple[float, float], ...]  # (scaling, gate_scale) of each linear


def flatten(stack: Stack, dtype: torch.dtype, impl: Impl) -> tuple[Plan, list[torch.Tensor | None]]:
    """``(plan, tensors)``: what a Function takes instead of the records."""
    plan = Plan(dtype, side_dtype(stack, dtype), impl, tuple((low.scaling, low.gate_scale) for low in stack))
    return plan, [tensor for low in stack for tensor in low.tensors]


def side_dtype(stack: Stack, dtype: torch.dtype) -> torch.dtype:
    """Where PEFT multiplies with the adapter: autocast's dtype where it is on, else the adapter's if that is wider."""
    if torch.is_autocast_enabled(stack[0].weight.device.type) and dtype != torch.float64:
        return dtype
    for low in stack:
        if low.A is not None:
            dtype = torch.promote_types(dtype, low.A.dtype)
    return dtype


def rebuild(plan: Plan, tensors: Sequence[torch.Tensor | None]) -> list[LowRank]:
    """The records again, from a Function's arguments or its saved tensors."""
    stack = []
    for i, (scaling, gate_scale) in enumerate(plan.factors):
        weight, bias, A, B, gate = tensors[i * TENSORS_PER_LINEAR : (i + 1) * TENSORS_PER_LINEAR]
        assert weight is not None
        stack.append(LowRank(weight, bias, A, B, gate, scaling, gate_scale))
    return stack


def tokens(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` ``(..., I)`` as contiguous rows ``(T, I)`` in ``dtype``; a view where it can be."""
    return x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
