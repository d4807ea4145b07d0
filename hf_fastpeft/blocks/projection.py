"""Several linears with low-rank adapters over one input: forward and hand-written gradients, no autograd.

For each linear i of the stack, with P = drop_i(x) (g_i A_i)ᵀ and the results side by side in one tensor:

    z_i = x W_iᵀ + b_i + s_i (P_i B_iᵀ + c_i)
    U_i = s_i dz_i B_i
    dx = sum_i dz_i W_i + drop_i(U_i (g_i A_i));  dB_i = s_i dz_iᵀ P_i;  dc_i = s_i sum_t dz_i
    G_i = U_iᵀ drop_i(x);  dA_i = g_i G_i;  dg_i = rowsum(A_i * G_i);  dW_i = dz_iᵀ x;  db_i = sum_t dz_i

The gate is folded into A, where it costs one small product a forward, so a gated adapter runs the same products over
the tokens as a plain one. Base products run in one dtype, low-rank products in another where PEFT would run them wider:
a float32 adapter on a half-precision base without autocast. x is read once for all low-rank products, and nothing of
the size of a weight is formed for an adapter's gradient.

Shape legend: T = tokens, I = in_features, O = out_features of the whole stack, R = its ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_fastpeft.blocks.adapters import Side, SideCache, Stack, make_side, slices
from hf_fastpeft.lowrank import TENSORS_PER_LINEAR
from hf_fastpeft.ops._backend import Impl, use_triton
from hf_fastpeft.ops.mm_wide import mm_wide

__all__ = ["Draw", "Needs", "Plan", "add_weight_grads", "make_plan", "needs_input", "project", "project_bwd"]

Needs = Sequence[bool]  # one per tensor of the stack, in the order of LowRank.tensors
Grads = list[torch.Tensor | None]

WIDEST_BLOCK_DIAGONAL = 256  # ranks; beyond, the zeros off the diagonal cost more than the launches they save


class Plan(NamedTuple):
    """The part of a stack's call that autograd does not see.

    Attributes:
        dtype: of the base products and the results.
        side_dtype: of the low-rank products.
        impl: implementation of the operators around the products.
        lean: one product over the stack's adapters rather than one for each: fewer launches, more FLOPs.
        factors: (scaling, gate_scale, dropout) of each linear.
        side: the adapters, None without any.
        weight: all weights as one ``(O, I)`` view where they lie one behind the other in memory.
        bias: all that is added to each row, ``(O,)`` in ``dtype``; None without.
    """

    dtype: torch.dtype
    side_dtype: torch.dtype
    impl: Impl
    lean: bool
    factors: tuple[tuple[float, float, float], ...]
    side: Side | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def dropped(self) -> bool:
        """Whether any linear drops elements of its adapter's input."""
        return self.side is not None and any(p > 0 for _, _, p in self.factors)


def make_plan(stack: Stack, dtype: torch.dtype, impl: Impl, x: torch.Tensor, adapters: SideCache | None) -> Plan:
    """The plan of a call on ``x``; the adapters come laid out from the cache where there is one."""
    side_dtype = _side_dtype(stack, dtype)
    return Plan(
        dtype,
        side_dtype,
        impl,
        use_triton(impl, x),
        tuple((low.scaling, low.gate_scale, low.dropout) for low in stack),
        make_side(stack, side_dtype) if adapters is None else adapters.side(stack, side_dtype),
        _adjacent([low.weight for low in stack]),
        _biases(stack, dtype),
    )


def _side_dtype(stack: Stack, dtype: torch.dtype) -> torch.dtype:
    """Where PEFT multiplies with the adapter: autocast's dtype where it is on, else the adapter's if that is wider."""
    if torch.is_autocast_enabled(stack[0].weight.device.type) and dtype != torch.float64:
        return dtype
    for low in stack:
        if low.A is not None:
            dtype = torch.promote_types(dtype, low.A.dtype)
    return dtype


def _adjacent(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One view over weights that lie behind each other in one storage, as :mod:`hf_fastpeft.stacking` puts them."""
    first = weights[0]
    if len(weights) == 1:
        return first
    storage, end = first.untyped_storage()._cdata, first.storage_offset()
    for weight in weights:
        behind = weight.untyped_storage()._cdata == storage and weight.storage_offset() == end
        if not behind or not weight.is_contiguous() or weight.dtype != first.dtype:
            return None
        end += weight.numel()
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _biases(stack: Stack, dtype: torch.dtype) -> torch.Tensor | None:
    if all(low.bias is None and low.lora_bias is None for low in stack):
        return None
    parts = []
    for low in stack:
        bias = low.weight.new_zeros(low.weight.shape[0], dtype=dtype) if low.bias is None else low.bias.detach()
        if low.lora_bias is not None:
            bias = torch.add(bias, low.lora_bias.detach(), alpha=low.scaling)
        parts.append(bias.to(dtype))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class Draw:
    """Dropout that can be drawn again: the state of the random generator instead of masks.

    The masks are those that PEFT's ``nn.Dropout`` modules would draw, called in the order of the stack.
    """

    __slots__ = ("_now", "device", "state")

    def __init__(self, x: torch.Tensor) -> None:
        self.device = x.device
        self.state = torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()

    def __enter__(self) -> None:
        self._now = Draw(torch.empty(0, device=self.device))
        self.restore()

    def __exit__(self, *_: object) -> None:
        self._now.restore()

    def restore(self) -> None:
        """Set the generator to this state."""
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.state, self.device)
        else:
            torch.set_rng_state(self.state)


def project(
    x_TI: torch.Tensor, stack: Stack, plan: Plan, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All ``z_i`` side by side, fresh ``(T, O)`` in ``plan.dtype``, and ``P`` ``(T, R)`` in ``plan.side_dtype``.

    ``P`` is None without adapters. ``residual`` ``(T, O)`` in ``plan.dtype`` is added in the products' epilogue.
    """
    z_TO = _base(x_TI, stack, plan, residual)
    side = plan.side
    if side is None:
        return z_TO, None
    x_side_TI = x_TI.to(plan.side_dtype)
    if plan.dropped:
        P_TR = x_side_TI.new_empty(x_side_TI.shape[0], side.A_RI.shape[0])
        for (_, _, p), (_, ranks) in zip(plan.factors, slices(stack), strict=True):
            if ranks.start < ranks.stop:
                dropped_TI = torch.native_dropout(x_side_TI, p, True)[0] if p > 0 else x_side_TI
                torch.mm(dropped_TI, side.A_RI[ranks].t(), out=P_TR[:, ranks])
    else:
        P_TR = x_side_TI @ side.A_RI.t()
    for rows, ranks in _blocks(stack, plan, side):
        _add_product(z_TO[:, rows], P_TR[:, ranks], side.B_OR[rows, ranks].t(), side.alpha)
    return z_TO, P_TR


def _base(x_TI: torch.Tensor, stack: Stack, plan: Plan, residual: torch.Tensor | None) -> torch.Tensor:
    if plan.weight is not None:
        weight_IO = plan.weight.to(plan.dtype).t()
        if residual is not None:
            z_TO = torch.addmm(residual, x_TI, weight_IO)
            return z_TO if plan.bias is None else z_TO.add_(plan.bias)
        return x_TI @ weight_IO if plan.bias is None else torch.addmm(plan.bias, x_TI, weight_IO)
    z_TO = x_TI.new_empty(x_TI.shape[0], sum(low.weight.shape[0] for low in stack))
    for low, (rows, _) in zip(stack, slices(stack), strict=True):
        torch.mm(x_TI, low.weight.to(plan.dtype).t(), out=z_TO[:, rows])
    for added in (plan.bias, residual):
        if added is not None:
            z_TO.add_(added)
    return z_TO


def _blocks(stack: Stack, plan: Plan, side: Side) -> list[tuple[slice, slice]]:
    """The blocks of ``B`` that are multiplied with at a time: all at once, zeros and all, or each on its own."""
    O, R = side.B_OR.shape
    if plan.lean and R <= WIDEST_BLOCK_DIAGONAL:
        return [(slice(0, O), slice(0, R))]
    return [(rows, ranks) for rows, ranks in slices(stack) if ranks.start < ranks.stop]


def _add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    """``out += scale * left @ right``, through the factors' dtype where that is wider than that of ``out``.

    The scale goes into the product's epilogue: multiplied into a half-precision factor it would round it.
    """
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    else:
        out.copy_(out.to(left.dtype).addmm_(left, right, alpha=scale))


def needs_input(needs: Needs) -> bool:
    """Whether a gradient of the stack (of a weight, an A or a gate) reads ``x``."""
    return any(any(needs[i::TENSORS_PER_LINEAR]) for i in (0, 2, 4))


def project_bwd(
    d_z_TO: torch.Tensor,
    P_TR: torch.Tensor | None,
    stack: Stack,
    plan: Plan,
    needs: Needs,
    *,
    need_dx: bool,
    draw: Draw | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, Grads]:
    """First half of the gradient of :func:`project`: all that does not read ``x``.

    Args:
        d_z_TO: gradient of the results in ``plan.dtype``; not written to.
        P_TR: as returned by :func:`project`.
        stack: the linears.
        plan: of the forward.
        needs: which of the stack's tensors want a gradient.
        need_dx: whether ``x`` wants one.
        draw: the forward's dropout, where it had any.

    Returns:
        ``d_x`` (fresh, compute dtype), ``U`` for :func:`add_weight_grads`, and one gradient a tensor of the stack,
        each in its tensor's dtype; those of weights, A and gates are still None.
    """
    grads: Grads = [None] * (len(stack) * TENSORS_PER_LINEAR)
    where = slices(stack)
    d_x_TI = _base_bwd(d_z_TO, stack, plan) if need_dx else None
    for i, (low, (rows, _)) in enumerate(zip(stack, where, strict=True)):
        at = i * TENSORS_PER_LINEAR
        if needs[at + 1] or needs[at + 5]:
            total_O = d_z_TO[:, rows].sum(0, dtype=torch.promote_types(plan.dtype, torch.float32))
            if needs[at + 1] and low.bias is not None:
                grads[at + 1] = total_O.to(low.bias.dtype)
            if needs[at + 5] and low.lora_bias is not None:
                grads[at + 5] = (total_O * low.scaling).to(low.lora_bias.dtype)
    side = plan.side
    if side is None or P_TR is None:
        return d_x_TI, None, grads
    d_side_TO = d_z_TO.to(plan.side_dtype)
    U_TR = torch.empty_like(P_TR)
    for rows, ranks in _blocks(stack, plan, side):
        # beta=0 ignores what the fresh buffer holds, NaN included
        U_TR[:, ranks].addmm_(d_side_TO[:, rows], side.B_OR[rows, ranks], beta=0, alpha=side.alpha)
    for i, (low, (rows, ranks)) in enumerate(zip(stack, where, strict=True)):
        at = i * TENSORS_PER_LINEAR + 3
        if needs[at] and low.B is not None:
            grads[at] = mm_wide(d_side_TO[:, rows].t(), P_TR[:, ranks], low.scaling).to(low.B.dtype)
    if d_x_TI is not None:
        if draw is None:
            _add_product(d_x_TI, U_TR, side.A_RI)
        else:
            _add_dropped(d_x_TI, U_TR, stack, plan, side, draw)
    return d_x_TI, U_TR, grads


def _base_bwd(d_z_TO: torch.Tensor, stack: Stack, plan: Plan) -> torch.Tensor:
    if plan.weight is not None:
        return d_z_TO @ plan.weight.to(plan.dtype)
    d_x_TI: torch.Tensor | None = None
    for low, (rows, _) in zip(stack, slices(stack), strict=True):
        weight_OI = low.weight.to(plan.dtype)
        d_TO = d_z_TO[:, rows]
        d_x_TI = d_TO @ weight_OI if d_x_TI is None else d_x_TI.addmm_(d_TO, weight_OI)
    assert d_x_TI is not None
    return d_x_TI


def _add_dropped(d_x_TI: torch.Tensor, U_TR: torch.Tensor, stack: Stack, plan: Plan, side: Side, draw: Draw) -> None:
    with draw:
        for (_, _, p), (_, ranks) in zip(plan.factors, slices(stack), strict=True):
            if ranks.start < ranks.stop:
                part_TI = U_TR[:, ranks] @ side.A_RI[ranks]
                d_x_TI.add_(torch.native_dropout(part_TI, p, True)[0] if p > 0 else part_TI)


def add_weight_grads(
    grads: Grads,
    d_z_TO: torch.Tensor,
    x_TI: torch.Tensor | None,
    U_TR: torch.Tensor | None,
    stack: Stack,
    plan: Plan,
    needs: Needs,
    draw: Draw | None = None,
) -> None:
    """Second half: fill in the gradients that read ``x`` (the weights', the A's and the gates').

    ``x_TI`` may be None where :func:`needs_input` is False; it must be in the compute dtype.
    """
    if not needs_input(needs):
        return
    assert x_TI is not None
    where = slices(stack)
    for i, (low, (rows, _)) in enumerate(zip(stack, where, strict=True)):
        if needs[i * TENSORS_PER_LINEAR]:
            grads[i * TENSORS_PER_LINEAR] = mm_wide(d_z_TO[:, rows].t(), x_TI).to(low.weight.dtype)
    side = plan.side
    if side is None or U_TR is None or not (any(needs[2::TENSORS_PER_LINEAR]) or any(needs[4::TENSORS_PER_LINEAR])):
        return
    x_side_TI = x_TI.to(plan.side_dtype)
    if draw is None:
        G_RI = mm_wide(U_TR.t(), x_side_TI)
    else:
        G_RI = _dropped_products(x_side_TI, U_TR, stack, plan, draw)
    d_A_RI = G_RI if side.gate_R is None else G_RI * side.gate_R.unsqueeze(1)
    for i, (low, (_, ranks)) in enumerate(zip(stack, where, strict=True)):
        at = i * TENSORS_PER_LINEAR
        if needs[at + 2] and low.A is not None:
            grads[at + 2] = d_A_RI[ranks].to(low.A.dtype)
        if needs[at + 4] and low.A is not None and low.gate is not None:
            d_gate_R = torch.linalg.vecdot(low.A.to(G_RI.dtype), G_RI[ranks])
            grads[at + 4] = (d_gate_R * low.gate_scale).to(low.gate.dtype).view(low.gate.shape)


def _dropped_products(x_TI: torch.Tensor, U_TR: torch.Tensor, stack: Stack, plan: Plan, draw: Draw) -> torch.Tensor:
    parts = []
    with draw:
        for (_, _, p), (_, ranks) in zip(plan.factors, slices(stack), strict=True):
            if ranks.start < ranks.stop:
                dropped_TI = torch.native_dropout(x_TI, p, True)[0] if p > 0 else x_TI
                parts.append(mm_wide(U_TR[:, ranks].t(), dropped_TI))
    return torch.cat(parts)
