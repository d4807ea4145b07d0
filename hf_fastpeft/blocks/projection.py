"""Several linears with low-rank adapters over one input: forward and hand-written gradients, no autograd.

For each linear i of the stack, with P = drop_i(x) (g_i A_i)ᵀ and the results side by side in one tensor:

    z_i = x W_iᵀ + b_i + s_i (P_i B_iᵀ + c_i)
    U_i = s_i dz_i B_i
    dx = sum_i dz_i W_i + drop_i(U_i (g_i A_i));  dB_i = s_i dz_iᵀ P_i;  dc_i = s_i sum_t dz_i
    G_i = U_iᵀ drop_i(x);  dA_i = g_i G_i;  dg_i = rowsum(A_i * G_i);  dW_i = dz_iᵀ x;  db_i = sum_t dz_i

The gate is folded into A, where it costs one small product a forward, so a gated adapter runs the same products over
the tokens as a plain one. Base products run in one dtype, low-rank products in another where PEFT would run them
wider: a float32 adapter on a half-precision base without autocast. x is read once for all low-rank products, and
nothing of the size of a weight is formed for an adapter's gradient.

Shape legend: T = tokens, I = in_features, O = out_features of the whole stack, R = its ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hf_fastpeft.blocks.adapters import Copies, SideCache
from hf_fastpeft.blocks.layout import Side, Stack, make_bias, make_side, slices
from hf_fastpeft.lowrank import TENSORS_PER_LINEAR
from hf_fastpeft.ops._backend import Impl, use_triton
from hf_fastpeft.ops.mm_wide import mm_wide
from hf_fastpeft.stacking import adjacent

__all__ = [
    "Draw",
    "Needs",
    "Plan",
    "add_weight_grads",
    "make_plan",
    "needs_input",
    "project",
    "project_bwd",
    "side_dtype_of",
]

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
        where: of each linear: its columns of the results, its ranks.
        copies: those in ``side`` and ``bias`` that a later call may use again; None where there is no later call.
    """

    dtype: torch.dtype
    side_dtype: torch.dtype
    impl: Impl
    lean: bool
    factors: tuple[tuple[float, float, float], ...]
    side: Side | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    where: list[tuple[slice, slice]]
    copies: Copies | None = None

    @property
    def dropped(self) -> bool:
        """Whether any linear drops elements of its adapter's input."""
        return self.side is not None and any(p > 0 for _, _, p in self.factors)


def make_plan(
    stack: Stack,
    dtype: torch.dtype,
    impl: Impl,
    x: torch.Tensor,
    adapters: SideCache | None,
    side_dtype: torch.dtype | None = None,
) -> Plan:
    """The plan of a call on ``x``; the adapters come laid out from the cache where there is one.

    ``side_dtype`` was read from the state of autocast where it is given.
    """
    side_dtype = side_dtype_of(stack, dtype) if side_dtype is None else side_dtype
    weights = [low.weight for low in stack]
    weight = adjacent(weights)
    if weight is None and adapters is not None and adapters.restack(weights):
        weight = adjacent(weights)
    if adapters is None:
        side, bias, copies = make_side(stack, side_dtype), make_bias(stack, dtype), None
    else:
        side, bias, copies = adapters.lay_out(stack, dtype, side_dtype)
    return Plan(
        dtype,
        side_dtype,
        impl,
        use_triton(impl, x),
        tuple((low.scaling, low.gate_scale, low.dropout) for low in stack),
        side,
        weight,
        bias,
        slices(stack),
        copies,
    )


def side_dtype_of(stack: Stack, dtype: torch.dtype) -> torch.dtype:
    """Where PEFT multiplies with the adapter: autocast's dtype where it is on, else the adapter's if that is wider."""
    if torch.is_autocast_enabled(stack[0].weight.device.type) and dtype != torch.float64:
        return dtype
    for low in stack:
        if low.A is not None:
            dtype = torch.promote_types(dtype, low.A.dtype)
    return dtype


class Draw:
    """Dropout that can be drawn again: a place in the random generator's sequence instead of masks.

    What is drawn inside ``with draw`` is what was drawn behind this place; the generator then goes on as if nothing
    had happened. On a CPU the place is a copy of the generator's state, 5 kB. On CUDA it is two integers of the host,
    seed and offset, whose reading and setting waits for nothing; neither is possible while a CUDA graph is captured.

    The masks of a stack are those of PEFT's ``nn.Dropout`` modules called in its order: on a CPU always; on CUDA where
    these would be given tensors of ``Plan.side_dtype``. PyTorch hands out its numbers there by the width of a vector
    load, so under autocast, where PEFT's dropout sees the adapter's float32 and ours the half, other elements may be
    dropped than by stock, as many and as independent. Forward and backward of a block always drop the same.

    The CPU's way runs in the tests, CUDA's there with a stand-in for the generator.
    """

    __slots__ = ("_generator", "_now", "_then")

    def __init__(self, x: torch.Tensor) -> None:
        self._generator = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator
        self._then = _place(self._generator)

    def __enter__(self) -> None:
        self._now = _place(self._generator)
        _go_to(self._generator, self._then)

    def __exit__(self, *_: object) -> None:
        _go_to(self._generator, self._now)


def _place(generator: torch.Generator) -> torch.Tensor | tuple[int, int]:
    if generator.device.type == "cpu":
        return generator.get_state()
    return generator.initial_seed(), generator.get_offset()


def _go_to(generator: torch.Generator, place: torch.Tensor | tuple[int, int]) -> None:
    if isinstance(place, torch.Tensor):
        generator.set_state(place)
        return
    seed, offset = place
    if seed != generator.initial_seed():
        generator.manual_seed(seed)
    generator.set_offset(offset)  # a multiple of 4, as every offset that a generator has


def project(
    x_TI: torch.Tensor, stack: Stack, plan: Plan, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All ``z_i`` side by side, fresh ``(T, O)`` in ``plan.dtype``, and ``P`` ``(T, R)`` in ``plan.side_dtype``.

    ``P`` is None without adapters. ``residual`` ``(T, O)`` in ``plan.dtype`` is added in the products' epilogue.
    """
    side = plan.side
    z_TO = _base(x_TI, stack, plan, residual)
    if side is None:
        return z_TO, None
    x_side_TI = x_TI.to(plan.side_dtype)
    if plan.dropped:
        P_TR = x_side_TI.new_empty(x_side_TI.shape[0], side.A_RI.shape[0])
        for (_, _, p), (_, ranks) in zip(plan.factors, plan.where, strict=True):
            if ranks.start < ranks.stop:
                dropped_TI = torch.native_dropout(x_side_TI, p, True)[0] if p > 0 else x_side_TI
                torch.mm(dropped_TI, side.A_RI[ranks].t(), out=P_TR[:, ranks])
    else:
        P_TR = x_side_TI @ side.A_RI.t()
    for rows, ranks in _blocks(plan, side):
        _add_product(z_TO[:, rows], P_TR[:, ranks], side.B_OR[rows, ranks].t(), side.alpha)
    return z_TO, P_TR


def _base(x_TI: torch.Tensor, stack: Stack, plan: Plan, residual: torch.Tensor | None) -> torch.Tensor:
    if plan.weight is not None:
        weight_IO = plan.weight.to(plan.dtype).t()
        bias_O = plan.bias
        if residual is not None:
            z_TO = torch.addmm(residual, x_TI, weight_IO)
            return z_TO if bias_O is None else z_TO.add_(bias_O)
        return x_TI @ weight_IO if bias_O is None else torch.addmm(bias_O, x_TI, weight_IO)
    z_TO = x_TI.new_empty(x_TI.shape[0], sum(low.weight.shape[0] for low in stack))
    for low, (rows, _) in zip(stack, plan.where, strict=True):
        torch.mm(x_TI, low.weight.to(plan.dtype).t(), out=z_TO[:, rows])
    for added in (plan.bias, residual):
        if added is not None:
            z_TO.add_(added)
    return z_TO


def _blocks(plan: Plan, side: Side) -> list[tuple[slice, slice]]:
    """The blocks of ``B`` that are multiplied with at a time: all at once, zeros and all, or each on its own."""
    rows, R = side.B_OR.shape
    if plan.lean and R <= WIDEST_BLOCK_DIAGONAL:
        return [(slice(0, rows), slice(0, R))]
    return [(rows, ranks) for rows, ranks in plan.where if ranks.start < ranks.stop]


def _add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    """``out += scale * left @ right``, through the factors' dtype where that is wider than that of ``out``.

    The scale goes into the product's epilogue: multiplied into a half-precision factor it would round it.
    """
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=scale)
    else:
        out.copy_(out.to(left.dtype).addmm_(left, right, alpha=scale))


def needs_input(needs: Needs) -> bool:
    """Whether a gradient of the stack reads ``x``: of a weight, an A or a gate."""
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
    d_x_TI, U_TR = _products_bwd(d_z_TO, stack, plan, draw, need_dx=need_dx)
    for i, (low, (rows, _)) in enumerate(zip(stack, plan.where, strict=True)):
        at = i * TENSORS_PER_LINEAR
        if needs[at + 1] or needs[at + 5]:
            total_O = d_z_TO[:, rows].sum(0, dtype=torch.promote_types(plan.dtype, torch.float32))
            if needs[at + 1] and low.bias is not None:
                grads[at + 1] = total_O.to(low.bias.dtype)
            if needs[at + 5] and low.lora_bias is not None:
                grads[at + 5] = (total_O * low.scaling).to(low.lora_bias.dtype)
    if P_TR is not None:
        _add_B_grads(grads, d_z_TO.to(plan.side_dtype), P_TR, stack, plan, needs)
    return d_x_TI, U_TR, grads


def _products_bwd(
    d_z_TO: torch.Tensor, stack: Stack, plan: Plan, draw: Draw | None, *, need_dx: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``(d_x, U)`` from products with the weights and with the adapters."""
    side = plan.side
    d_x_TI = _base_bwd(d_z_TO, stack, plan) if need_dx else None
    if side is None:
        return d_x_TI, None
    d_side_TO = d_z_TO.to(plan.side_dtype)
    U_TR = d_side_TO.new_empty(d_side_TO.shape[0], side.A_RI.shape[0])
    for rows, ranks in _blocks(plan, side):
        # beta=0 ignores what the fresh buffer holds, NaN included
        U_TR[:, ranks].addmm_(d_side_TO[:, rows], side.B_OR[rows, ranks], beta=0, alpha=side.alpha)
    if d_x_TI is not None:
        if draw is None:
            _add_product(d_x_TI, U_TR, side.A_RI)
        else:
            _add_dropped(d_x_TI, U_TR, stack, plan, side, draw)
    return d_x_TI, U_TR


def _add_B_grads(
    grads: Grads, d_side_TO: torch.Tensor, P_TR: torch.Tensor, stack: Stack, plan: Plan, needs: Needs
) -> None:
    for i, (low, (rows, ranks)) in enumerate(zip(stack, plan.where, strict=True)):
        at = i * TENSORS_PER_LINEAR + 3
        if needs[at] and low.B is not None:
            grads[at] = mm_wide(d_side_TO[:, rows].t(), P_TR[:, ranks], low.scaling).to(low.B.dtype)


def _base_bwd(d_z_TO: torch.Tensor, stack: Stack, plan: Plan) -> torch.Tensor:
    if plan.weight is not None:
        return d_z_TO @ plan.weight.to(plan.dtype)
    d_x_TI: torch.Tensor | None = None
    for low, (rows, _) in zip(stack, plan.where, strict=True):
        weight_OI = low.weight.to(plan.dtype)
        d_TO = d_z_TO[:, rows]
        d_x_TI = d_TO @ weight_OI if d_x_TI is None else d_x_TI.addmm_(d_TO, weight_OI)
    assert d_x_TI is not None
    return d_x_TI


def _add_dropped(d_x_TI: torch.Tensor, U_TR: torch.Tensor, stack: Stack, plan: Plan, side: Side, draw: Draw) -> None:
    with draw:
        for (_, _, p), (_, ranks) in zip(plan.factors, plan.where, strict=True):
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
    """Second half: fill in the gradients that read ``x``: the weights', the A's and the gates'.

    ``x_TI`` may be None where :func:`needs_input` is False; it must be in the compute dtype.
    """
    if not needs_input(needs):
        return
    assert x_TI is not None
    for i, (low, (rows, _)) in enumerate(zip(stack, plan.where, strict=True)):
        if needs[i * TENSORS_PER_LINEAR]:
            grads[i * TENSORS_PER_LINEAR] = mm_wide(d_z_TO[:, rows].t(), x_TI).to(low.weight.dtype)
    side = plan.side
    if side is None or U_TR is None:
        return
    x_side_TI = x_TI.to(plan.side_dtype)
    if not (any(needs[2::TENSORS_PER_LINEAR]) or any(needs[4::TENSORS_PER_LINEAR])):
        return
    G_RI = mm_wide(U_TR.t(), x_side_TI) if draw is None else _dropped_products(x_side_TI, U_TR, stack, plan, draw)
    _add_gate_grads(grads, G_RI, stack, plan, needs)
    d_A_RI = G_RI if side.gate_R is None else G_RI.mul_(side.gate_R.unsqueeze(1))
    for i, (low, (_, ranks)) in enumerate(zip(stack, plan.where, strict=True)):
        at = i * TENSORS_PER_LINEAR
        if needs[at + 2] and low.A is not None:
            grads[at + 2] = d_A_RI[ranks].to(low.A.dtype)


def _add_gate_grads(grads: Grads, G_RI: torch.Tensor, stack: Stack, plan: Plan, needs: Needs) -> None:
    """The gates' gradients of a whole stack in one product, ``(1, I)`` by ``(I, 1)`` for every rank."""
    if not any(needs[4::TENSORS_PER_LINEAR]):
        return
    factors = [low.A for low in stack if low.A is not None]
    factors = [A.to(G_RI.dtype) for A in factors]  # before cat(), which refuses the other half under autocast
    A_RI = factors[0] if len(factors) == 1 else torch.cat(factors)
    scales = {low.gate_scale for low in stack if low.gate is not None}
    alpha = scales.pop() if len(scales) == 1 else 1.0
    # beta=0 ignores what the fresh elements hold, NaN included; written in place, as autocast would round the factors
    products_R11 = G_RI.new_empty(G_RI.shape[0], 1, 1)
    d_gates_R = products_R11.baddbmm_(A_RI.unsqueeze(1), G_RI.unsqueeze(2), beta=0, alpha=alpha).flatten()
    for i, (low, (_, ranks)) in enumerate(zip(stack, plan.where, strict=True)):
        at = i * TENSORS_PER_LINEAR + 4
        if needs[at] and low.gate is not None:
            d_gate_R = d_gates_R[ranks] if low.gate_scale == alpha else d_gates_R[ranks] * low.gate_scale
            grads[at] = d_gate_R.to(low.gate.dtype).view(low.gate.shape)


def _dropped_products(x_TI: torch.Tensor, U_TR: torch.Tensor, stack: Stack, plan: Plan, draw: Draw) -> torch.Tensor:
    parts = []
    with draw:
        for (_, _, p), (_, ranks) in zip(plan.factors, plan.where, strict=True):
            if ranks.start < ranks.stop:
                dropped_TI = torch.native_dropout(x_TI, p, True)[0] if p > 0 else x_TI
                parts.append(mm_wide(U_TR[:, ranks].t(), dropped_TI))
    return torch.cat(parts)
