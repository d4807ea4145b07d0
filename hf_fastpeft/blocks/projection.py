"""Several linears with low-rank adapters over one input: forward and hand-written gradients, no autograd.

For each linear i of the stack, with P = x Aᵀ and S = P * g over the ranks of all linears side by side:

    z_i = x W_iᵀ + b_i + S_i (s_i B_i)ᵀ
    U_i = dz_i (s_i B_i);  V = U * g
    dx = sum_i dz_i W_i + V A;  dA = Vᵀ x;  dB_i = s_i dz_iᵀ S_i
    dg = sum_t P * U;  dW_i = dz_iᵀ x;  db_i = sum_t dz_i

Base products run in one dtype, low-rank products in another where PEFT would run them wider: a float32 adapter on a
half-precision base without autocast. x is read once for all low-rank products, and nothing of the size of a weight is
formed for an adapter's gradient.
Shape legend: T = tokens, I = in_features, O = out_features, R = ranks of the whole stack.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_fastpeft.lowrank import TENSORS_PER_LINEAR, LowRank

__all__ = ["Needs", "Stack", "add_weight_grads", "needs_input", "project", "project_bwd"]

Stack = Sequence[LowRank]
Needs = Sequence[bool]  # one per tensor of the stack, in the order of LowRank.tensors
Grads = list[torch.Tensor | None]


@dataclass(slots=True)
class _Adapters:
    """The stack's adapters side by side, in the dtype of the low-rank products."""

    A_RI: torch.Tensor
    g_R: torch.Tensor | None  # None where every gate is one
    slices: list[slice | None]  # ranks of linear i, None without an adapter


def _adapters(stack: Stack, dtype: torch.dtype) -> _Adapters | None:
    adapted = [low for low in stack if low.A is not None]
    if not adapted:
        return None
    slices: list[slice | None] = []
    start = 0
    for low in stack:
        rank = 0 if low.A is None else low.A.shape[0]
        slices.append(slice(start, start + rank) if rank else None)
        start += rank
    factors = [low.A.to(dtype) for low in adapted if low.A is not None]
    gates = None
    if any(low.gate is not None for low in adapted):
        gates = torch.cat(
            [
                (low.gate * low.gate_scale).to(dtype)  # rounded once
                if low.gate is not None
                else torch.ones(low.A.shape[0], dtype=dtype, device=low.weight.device)
                for low in adapted
                if low.A is not None
            ]
        )
    return _Adapters(torch.cat(factors) if len(factors) > 1 else factors[0], gates, slices)


def project(
    x_TI: torch.Tensor, stack: Stack, side_dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """All ``z_i`` as fresh ``(T, O)`` tensors in the dtype of ``x_TI``, and ``P`` ``(T, R)`` in ``side_dtype``.

    ``P`` is None without adapters. Base products round before the low-rank term is added, as PEFT's do.
    """
    dtype = x_TI.dtype
    outs = [
        x_TI @ low.weight.to(dtype).t()
        if low.bias is None
        else torch.addmm(low.bias.to(dtype), x_TI, low.weight.to(dtype).t())
        for low in stack
    ]
    side = _adapters(stack, side_dtype)
    if side is None:
        return outs, None
    P_TR = x_TI.to(side_dtype) @ side.A_RI.t()
    S_TR = P_TR if side.g_R is None else P_TR * side.g_R
    for i, (low, ranks) in enumerate(zip(stack, side.slices, strict=True)):
        if ranks is not None:
            assert low.B is not None
            outs[i] = _add_product(outs[i], S_TR[:, ranks], low.B.to(side_dtype).t(), low.scaling)
    return outs, P_TR


def _add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """``out + scale * left @ right`` in the dtype of ``out``, through the factors' where that is wider.

    The scale goes into the product's epilogue: multiplied into a half-precision factor it would round it.
    """
    if out.dtype == left.dtype:
        return out.addmm_(left, right, alpha=scale)
    return out.to(left.dtype).addmm_(left, right, alpha=scale).to(out.dtype)


def needs_input(needs: Needs) -> bool:
    """Whether a gradient of the stack (of a weight or an A) reads ``x``."""
    return any(needs[0::TENSORS_PER_LINEAR]) or any(needs[2::TENSORS_PER_LINEAR])


def project_bwd(
    d_outs: Sequence[torch.Tensor], P_TR: torch.Tensor | None, stack: Stack, needs: Needs, *, need_dx: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, Grads]:
    """First half of the gradient of :func:`project`: all that does not read ``x``.

    Args:
        d_outs: gradient of each ``z_i``, ``(T, O)`` in the compute dtype; not written to.
        P_TR: as returned by :func:`project`.
        stack: the linears.
        needs: which of the stack's tensors want a gradient.
        need_dx: whether ``x`` wants one.

    Returns:
        ``d_x`` (fresh, compute dtype), ``V`` for :func:`add_weight_grads`, and one gradient a tensor of the stack,
        each in its tensor's dtype; those of weights and A are still None.
    """
    dtype = d_outs[0].dtype
    side_dtype = dtype if P_TR is None else P_TR.dtype
    side = _adapters(stack, side_dtype)
    grads: Grads = [None] * (len(stack) * TENSORS_PER_LINEAR)
    d_x_TI: torch.Tensor | None = None
    U_TR = None if P_TR is None else torch.empty_like(P_TR)
    S_TR = P_TR if side is None or side.g_R is None or P_TR is None else P_TR * side.g_R
    for i, (d_TO, low) in enumerate(zip(d_outs, stack, strict=True)):
        at = i * TENSORS_PER_LINEAR
        if need_dx:
            weight_OI = low.weight.to(dtype)
            d_x_TI = d_TO @ weight_OI if d_x_TI is None else d_x_TI.addmm_(d_TO, weight_OI)
        if needs[at + 1]:
            assert low.bias is not None
            grads[at + 1] = d_TO.sum(0).to(low.bias.dtype)
        ranks = None if side is None else side.slices[i]
        if ranks is not None:
            assert U_TR is not None and S_TR is not None and low.B is not None
            d_side_TO = d_TO.to(side_dtype)
            # beta=0 ignores what the fresh buffer holds, NaN included
            U_TR[:, ranks].addmm_(d_side_TO, low.B.to(side_dtype), beta=0, alpha=low.scaling)
            if needs[at + 3]:
                d_B = (d_side_TO.t() @ S_TR[:, ranks]).to(low.B.dtype)
                grads[at + 3] = d_B if low.scaling == 1.0 else d_B.mul_(low.scaling)
    if side is None or U_TR is None or P_TR is None:
        return d_x_TI, None, grads
    if any(needs[4::TENSORS_PER_LINEAR]):
        d_g_R = (P_TR * U_TR).sum(0, dtype=torch.promote_types(side_dtype, torch.float32))
        for i, (low, ranks) in enumerate(zip(stack, side.slices, strict=True)):
            if needs[i * TENSORS_PER_LINEAR + 4] and low.gate is not None:
                grads[i * TENSORS_PER_LINEAR + 4] = (d_g_R[ranks] * low.gate_scale).to(low.gate.dtype)
    V_TR = U_TR if side.g_R is None else U_TR.mul_(side.g_R)
    if d_x_TI is not None:
        d_x_TI = _add_product(d_x_TI, V_TR, side.A_RI)
    return d_x_TI, V_TR, grads


def add_weight_grads(
    grads: Grads,
    d_outs: Sequence[torch.Tensor],
    x_TI: torch.Tensor | None,
    V_TR: torch.Tensor | None,
    stack: Stack,
    needs: Needs,
) -> None:
    """Second half: fill in the gradients that read ``x`` (the weights' and the A's).

    ``x_TI`` may be None where :func:`needs_input` is False; it must be in the compute dtype.
    """
    d_A_RI = None
    if any(needs[2::TENSORS_PER_LINEAR]):
        assert V_TR is not None and x_TI is not None
        d_A_RI = V_TR.t() @ x_TI.to(V_TR.dtype)
    start = 0
    for i, (d_TO, low) in enumerate(zip(d_outs, stack, strict=True)):
        at = i * TENSORS_PER_LINEAR
        if needs[at]:
            assert x_TI is not None
            grads[at] = (d_TO.t() @ x_TI).to(low.weight.dtype)
        if low.A is not None:
            rank = low.A.shape[0]
            if needs[at + 2]:
                assert d_A_RI is not None
                grads[at + 2] = d_A_RI[start : start + rank].to(low.A.dtype)
            start += rank
