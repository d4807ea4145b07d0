"""The two blocks around the attention call: norm, projections and rotary embedding before it, one projection after.

Shape legend: B = batch, S = seq_len, T = B * S, I = hidden_size, H = heads, D = head_dim, O = (H + 2 kv heads) * D,
R = ranks of the block's linears.
"""

from typing import Any, NamedTuple

import torch

from hf_fastpeft.blocks._function import (
    draw_of,
    kind_of,
    norm_bwd,
    norm_fwd,
    project_onto,
    rebuild,
    tokens,
)
from hf_fastpeft.blocks.adapters import SideCache
from hf_fastpeft.blocks.bundle import Bundle
from hf_fastpeft.blocks.projection import Plan, add_weight_grads, needs_input, project, project_bwd
from hf_fastpeft.ops._backend import Impl, first_derivative_only
from hf_fastpeft.ops.qk_norm import norm_rotate, norm_rotate_bwd
from hf_fastpeft.ops.rms_norm import Norm
from hf_fastpeft.ops.rope import rotate

__all__ = ["attention_in", "attention_out"]

FIRST = 8  # arguments of _AttentionIn before the stack's tensors


class _Layout(NamedTuple):
    """What :class:`_AttentionIn` must know beyond its stack; a norm without its weight is (eps, unit_offset)."""

    head_dim: int
    heads: tuple[int, int]  # of the queries, of the keys
    norm: tuple[float, bool] | None
    qk_norm: tuple[tuple[float, bool], ...] | None
    residual: bool
    apart: bool = False  # queries, keys and values in memory of their own, as the results of an operator must be

    def split(self, z_TO: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values ``(B, H, S, D)`` as views of the products' results."""
        Q, K = self.heads
        z_BSHD = z_TO.view(batch, -1, z_TO.shape[-1] // self.head_dim, self.head_dim)
        return tuple(part.transpose(1, 2) for part in torch.split(z_BSHD, [Q, K, K], dim=2))


class _AttentionIn(torch.autograd.Function):
    """Saves: h, the norm's weight and rstd (without a norm: x in the compute dtype, where a gradient reads it), P,
    cos, sin and the linears' own tensors; with a norm of q and k also the products before it and its rstd."""

    @staticmethod
    def forward(
        ctx,
        h: torch.Tensor,
        norm_weight: torch.Tensor | None,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layout: _Layout,
        plan: Plan,
        *tensors,
    ) -> tuple[torch.Tensor, ...]:
        stack = rebuild(plan, tensors)
        h_TI = tokens(h)
        x_TI, rstd_T1 = norm_fwd(h_TI, norm_weight, layout.norm, plan)
        ctx.draw = draw_of(plan, x_TI)
        z_TO, P_TR = project(x_TI, stack, plan)
        q, k, v = layout.split(z_TO, h.shape[0])
        before: tuple[torch.Tensor | None, ...] = None, None, None
        if layout.qk_norm is None and not layout.apart:
            rotate(q, k, cos, sin, q, k, plan.impl)  # in place: nobody else has seen these two
        else:
            q_in, k_in, v_in = q, k, v
            q, k = (torch.empty_like(t.transpose(1, 2)).transpose(1, 2) for t in (q, k))
            if layout.apart:
                v = torch.empty_like(v.transpose(1, 2)).transpose(1, 2)
            if layout.qk_norm is None:
                rotate(q_in, k_in, cos, sin, q, k, plan.impl, v=v_in, v_out=v)
            else:
                q_norm, k_norm = _norms(layout, q_weight, k_weight)
                rstds = norm_rotate(q_in, k_in, q_norm, k_norm, cos, sin, q, k, plan.impl)
                before = z_TO, *rstds
                if layout.apart:
                    v.copy_(v_in)
        ctx.layout, ctx.plan, ctx.h_shape, ctx.h_dtype = layout, plan, h.shape, h.dtype
        kept_TI: torch.Tensor | None = h_TI
        if layout.norm is None:
            kept_TI = x_TI if needs_input(ctx.needs_input_grad[FIRST:]) else None
        ctx.save_for_backward(kept_TI, norm_weight, rstd_T1, q_weight, k_weight, *before, P_TR, cos, sin, *tensors)
        # the same memory without autograd's notion of a view: an attention function may work in place on each
        q, k, v = q.data, k.data, v.data
        return (q, k, v, h) if layout.residual else (q, k, v)

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_q: torch.Tensor, d_k: torch.Tensor, d_v: torch.Tensor, d_residual=None) -> tuple[Any, ...]:
        h_TI, norm_weight, rstd_T1, q_weight, k_weight, z_TO, q_rstd, k_rstd, P_TR, cos, sin, *tensors = (
            ctx.saved_tensors
        )
        layout, plan, needs = ctx.layout, ctx.plan, ctx.needs_input_grad[FIRST:]
        stack = rebuild(plan, tensors)
        B, Q, S, D = d_q.shape
        columns = (Q + 2 * d_k.shape[1]) * D
        d_z_TO = torch.empty(B * S, columns, dtype=plan.dtype, device=d_q.device)
        d_q_in, d_k_in, d_v_in = layout.split(d_z_TO, B)
        d_q_weight = d_k_weight = None
        if layout.qk_norm is None:
            rotate(d_q, d_k, cos, sin, d_q_in, d_k_in, plan.impl, inverse=True, v=d_v, v_out=d_v_in)
        else:
            q_in, k_in, _ = layout.split(z_TO, B)
            q_norm, k_norm = _norms(layout, q_weight, k_weight)
            d_q_weight, d_k_weight = norm_rotate_bwd(
                d_q,
                d_k,
                q_in,
                k_in,
                q_rstd,
                k_rstd,
                q_norm,
                k_norm,
                cos,
                sin,
                d_q_in,
                d_k_in,
                plan.impl,
                with_dw=any(ctx.needs_input_grad[2:4]),
                v=d_v,
                v_out=d_v_in,
            )
        need_dx = any(ctx.needs_input_grad[:2])
        d_x_TI, U_TR, grads = project_bwd(d_z_TO, P_TR, stack, plan, needs, need_dx=need_dx, draw=ctx.draw)
        d_h_TI, d_norm, x_TI = d_x_TI, None, h_TI
        if layout.norm is not None:
            d_h_TI, d_norm, x_TI = norm_bwd(
                d_x_TI,
                h_TI,
                norm_weight,
                rstd_T1,
                layout.norm,
                plan,
                with_dw=ctx.needs_input_grad[1],
                d_residual=d_residual,
                with_x=needs_input(needs),
            )
        add_weight_grads(grads, d_z_TO, x_TI, U_TR, stack, plan, needs, ctx.draw)
        d_h = None if d_h_TI is None else d_h_TI.view(ctx.h_shape).to(ctx.h_dtype)
        return d_h, d_norm, d_q_weight, d_k_weight, None, None, None, None, *grads


def _norms(layout: _Layout, *weights: torch.Tensor | None) -> tuple[Norm, ...]:
    assert layout.qk_norm is not None
    return tuple(Norm(w, *rest) for w, rest in zip(weights, layout.qk_norm, strict=True) if w is not None)


class _AttentionOut(torch.autograd.Function):
    """Saves: x (compute dtype; only where a gradient reads it), P and the linear's own tensors."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, residual: torch.Tensor | None, plan: Plan, *tensors) -> torch.Tensor:
        x_TI = tokens(x, plan.dtype)
        ctx.draw = draw_of(plan, x_TI)
        out_TO, P_TR = project_onto(x_TI, residual, rebuild(plan, tensors), plan)
        ctx.plan, ctx.x_shape, ctx.x_dtype = plan, x.shape, x.dtype
        ctx.out_shape = None if residual is None else residual.shape
        ctx.save_for_backward(x_TI if needs_input(ctx.needs_input_grad[3:]) else None, P_TR, *tensors)
        return out_TO

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_out: torch.Tensor) -> tuple[Any, ...]:
        x_TI, P_TR, *tensors = ctx.saved_tensors
        d_z_TO = tokens(d_out, ctx.plan.dtype)
        stack, needs = rebuild(ctx.plan, tensors), ctx.needs_input_grad[3:]
        d_x_TI, U_TR, grads = project_bwd(
            d_z_TO, P_TR, stack, ctx.plan, needs, need_dx=ctx.needs_input_grad[0], draw=ctx.draw
        )
        add_weight_grads(grads, d_z_TO, x_TI, U_TR, stack, ctx.plan, needs, ctx.draw)
        d_x = None if d_x_TI is None else d_x_TI.view(ctx.x_shape).to(ctx.x_dtype)
        return d_x, d_out.view(ctx.out_shape) if ctx.needs_input_grad[1] else None, None, *grads


def attention_in(
    h: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    stack: Bundle,
    *,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    norm: Norm | None = None,
    qk_norm: tuple[Norm, Norm] | None = None,
    residual: bool = False,
    impl: Impl = "auto",
    adapters: SideCache | None = None,
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of an attention layer, queries and keys rotated.

    Args:
        h: hidden states, ``(batch, seq_len, hidden_size)``; normalised already where ``norm`` is None.
        cos: rotary table, ``(batch or 1, seq_len, head_dim)``; narrower where only the first dimensions turn.
        sin: shape of ``cos``.
        stack: the q, k and v projections, or one linear that holds them in this order.
        heads: number of query heads and of key heads.
        head_dim: size of one head.
        dtype: compute dtype of the products, dtype of the results.
        norm: the norm before the projections.
        qk_norm: the norms of queries and keys over ``head_dim``, before they turn.
        residual: also return ``h`` itself, for the way around the layer: both ways' gradients then meet in the norm's.
        impl: implementation of the operators.
        adapters: where the linears' adapters are laid out already, if anywhere.

    Returns:
        ``(q, k, v)`` or ``(q, k, v, h)``, the first three ``(batch, heads, seq_len, head_dim)`` as transposed views,
        in ``dtype``.
    """
    layout = _Layout(
        head_dim,
        heads,
        kind_of(norm),
        None if qk_norm is None else tuple((n.eps, n.unit_offset) for n in qk_norm),
        residual,
    )
    q_weight, k_weight = (None, None) if qk_norm is None else (qk_norm[0].weight, qk_norm[1].weight)
    return _AttentionIn.apply(  # type: ignore[no-any-return,no-untyped-call]
        h,
        None if norm is None else norm.weight,
        q_weight,
        k_weight,
        cos,
        sin,
        layout,
        stack.plan(dtype, impl, h, adapters),
        *stack.flat,
    )


def attention_out(
    x: torch.Tensor,
    linear: Bundle,
    *,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    impl: Impl = "auto",
    adapters: SideCache | None = None,
) -> torch.Tensor:
    """The one projection after attention: ``x`` ``(..., in_features)`` to ``(..., out_features)``.

    ``residual``, of the result's shape, is added where it is given. The result is in ``dtype``, promoted with the
    residual's.
    """
    plan = linear.plan(dtype, impl, x, adapters)
    out_TO = _AttentionOut.apply(x, residual, plan, *linear.flat)  # type: ignore[no-untyped-call]
    return out_TO.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]  # outside: its owner may write to it
