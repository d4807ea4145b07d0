"""The two blocks around the attention call: projections with rotary embedding before it, one projection after.

Shape legend: B = batch, S = seq_len, T = B * S, H = heads, D = head_dim, R = ranks of the block's linears.
"""

from typing import Any

import torch

from hf_fastpeft.blocks._function import Plan, flatten, rebuild, tokens
from hf_fastpeft.blocks.projection import Stack, add_weight_grads, needs_input, project, project_bwd
from hf_fastpeft.lowrank import LowRank
from hf_fastpeft.ops._backend import Impl
from hf_fastpeft.ops.rope import rotate

__all__ = ["attention_in", "attention_out"]


class _AttentionIn(torch.autograd.Function):
    """Saves: x (compute dtype; only where a weight or an A is trained), P, cos, sin and the linears' own tensors."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, head_dim: int, plan: Plan, *tensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        stack = rebuild(plan, tensors)
        x_TI = tokens(x, plan.dtype)
        outs, P_TR = project(x_TI, stack, plan.side_dtype)
        # (T, H * D) -> (B, H, S, D) as a view, the layout Hugging Face hands to attention
        q, k, v = (out.view(*x.shape[:-1], -1, head_dim).transpose(1, 2) for out in outs)
        rotate(q, k, cos, sin, q, k, plan.impl)  # in place: nobody else has seen these two
        ctx.plan, ctx.x_shape, ctx.x_dtype = plan, x.shape, x.dtype
        keep_x = needs_input(ctx.needs_input_grad[5:])
        ctx.save_for_backward(x_TI if keep_x else None, P_TR, cos, sin, *tensors)
        return q, k, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_q: torch.Tensor, d_k: torch.Tensor, d_v: torch.Tensor) -> tuple[Any, ...]:
        x_TI, P_TR, cos, sin, *tensors = ctx.saved_tensors
        B, S = ctx.x_shape[:2]

        def fresh(like: torch.Tensor) -> torch.Tensor:
            """(B, H, S, D) whose memory is (T, H * D), so that it becomes the products' operand without a copy."""
            shape = (B, S, like.shape[1], like.shape[3])
            return torch.empty(shape, dtype=ctx.plan.dtype, device=like.device).transpose(1, 2)

        d_q_in, d_k_in = fresh(d_q), fresh(d_k)
        rotate(d_q, d_k, cos, sin, d_q_in, d_k_in, ctx.plan.impl, inverse=True)
        d_outs = [d.transpose(1, 2).reshape(B * S, -1).to(ctx.plan.dtype) for d in (d_q_in, d_k_in, d_v)]
        stack, needs = rebuild(ctx.plan, tensors), ctx.needs_input_grad[5:]
        d_x_TI, V_TR, grads = project_bwd(d_outs, P_TR, stack, needs, need_dx=ctx.needs_input_grad[0])
        add_weight_grads(grads, d_outs, x_TI, V_TR, stack, needs)
        d_x = None if d_x_TI is None else d_x_TI.view(ctx.x_shape).to(ctx.x_dtype)
        return d_x, None, None, None, None, *grads


class _AttentionOut(torch.autograd.Function):
    """Saves: x (compute dtype; only where a weight or an A is trained), P and the linear's own tensors."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, plan: Plan, *tensors) -> torch.Tensor:
        x_TI = tokens(x, plan.dtype)
        (out_TO,), P_TR = project(x_TI, rebuild(plan, tensors), plan.side_dtype)
        ctx.plan, ctx.x_shape, ctx.x_dtype = plan, x.shape, x.dtype
        ctx.save_for_backward(x_TI if needs_input(ctx.needs_input_grad[2:]) else None, P_TR, *tensors)
        return out_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: torch.Tensor) -> tuple[Any, ...]:
        x_TI, P_TR, *tensors = ctx.saved_tensors
        d_outs = [tokens(d_out, ctx.plan.dtype)]
        stack, needs = rebuild(ctx.plan, tensors), ctx.needs_input_grad[2:]
        d_x_TI, V_TR, grads = project_bwd(d_outs, P_TR, stack, needs, need_dx=ctx.needs_input_grad[0])
        add_weight_grads(grads, d_outs, x_TI, V_TR, stack, needs)
        d_x = None if d_x_TI is None else d_x_TI.view(ctx.x_shape).to(ctx.x_dtype)
        return d_x, None, *grads


def attention_in(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    stack: Stack,
    *,
    head_dim: int,
    dtype: torch.dtype,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of an attention layer, queries and keys rotated.

    Args:
        x: normalised hidden states, ``(batch, seq_len, hidden_size)``.
        cos: rotary table, ``(batch or 1, seq_len, head_dim)``.
        sin: shape of ``cos``.
        stack: the q, k and v projections.
        head_dim: size of one head.
        dtype: compute dtype of the products, dtype of the results.
        impl: implementation of the rotation.

    Returns:
        ``(q, k, v)``, each ``(batch, its heads, seq_len, head_dim)`` as a transposed view, in ``dtype``.
    """
    plan, tensors = flatten(stack, dtype, impl)
    return _AttentionIn.apply(x, cos, sin, head_dim, plan, *tensors)  # type: ignore[no-any-return,no-untyped-call]


def attention_out(x: torch.Tensor, linear: LowRank, *, dtype: torch.dtype) -> torch.Tensor:
    """The projection after attention: ``x`` ``(..., in_features)`` to ``(..., out_features)`` in ``dtype``."""
    plan, tensors = flatten([linear], dtype, "auto")
    return _AttentionOut.apply(x, plan, *tensors)  # type: ignore[no-any-return,no-untyped-call]
