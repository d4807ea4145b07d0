"""The SwiGLU MLP as one autograd Function: gate, up and down projections with their adapters.

The product of activation and up projection is not kept: the backward rebuilds it in the pass that computes the
activation's gradient. Shape legend: T = tokens, I = hidden_size, F = intermediate_size, R = ranks.
"""

from typing import Any

import torch

from hf_fastpeft.blocks._function import Plan, flatten, rebuild, tokens
from hf_fastpeft.blocks.projection import Stack, add_weight_grads, needs_input, project, project_bwd
from hf_fastpeft.lowrank import TENSORS_PER_LINEAR
from hf_fastpeft.ops._backend import Impl
from hf_fastpeft.ops.swiglu import swiglu_bwd, swiglu_fwd

__all__ = ["mlp"]

HEAD = 2 * TENSORS_PER_LINEAR  # tensors of gate and up, before those of down


class _MLP(torch.autograd.Function):
    """Saves: x (compute dtype; only where a weight or an A is trained), the gate and up projections, P of both
    stages and the linears' own tensors."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, plan: Plan, *tensors) -> torch.Tensor:
        stack = rebuild(plan, tensors)
        x_TI = tokens(x, plan.dtype)
        (gate_TF, up_TF), P_TR = project(x_TI, stack[:2], plan.side_dtype)
        hidden_TF = swiglu_fwd(gate_TF, up_TF, plan.impl)
        (out_TI,), P_down_TR = project(hidden_TF, stack[2:], plan.side_dtype)
        ctx.plan, ctx.x_shape, ctx.x_dtype = plan, x.shape, x.dtype
        keep_x = needs_input(ctx.needs_input_grad[2 : 2 + HEAD])
        ctx.save_for_backward(x_TI if keep_x else None, gate_TF, up_TF, P_TR, P_down_TR, *tensors)
        return out_TI.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: torch.Tensor) -> tuple[Any, ...]:
        x_TI, gate_TF, up_TF, P_TR, P_down_TR, *tensors = ctx.saved_tensors
        stack = rebuild(ctx.plan, tensors)
        need_dx, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        d_outs = [tokens(d_out, ctx.plan.dtype)]
        d_hidden_TF, V_TR, down_grads = project_bwd(d_outs, P_down_TR, stack[2:], needs[HEAD:], need_dx=True)
        assert d_hidden_TF is not None
        hidden_TF, d_gate_TF, d_up_TF = swiglu_bwd(
            d_hidden_TF, gate_TF, up_TF, ctx.plan.impl, with_out=needs_input(needs[HEAD:])
        )
        add_weight_grads(down_grads, d_outs, hidden_TF, V_TR, stack[2:], needs[HEAD:])
        del d_hidden_TF, hidden_TF  # two of the largest tensors of a layer
        d_outs = [d_gate_TF, d_up_TF]
        d_x_TI, V_TR, grads = project_bwd(d_outs, P_TR, stack[:2], needs[:HEAD], need_dx=need_dx)
        add_weight_grads(grads, d_outs, x_TI, V_TR, stack[:2], needs[:HEAD])
        d_x = None if d_x_TI is None else d_x_TI.view(ctx.x_shape).to(ctx.x_dtype)
        return d_x, None, *grads, *down_grads


def mlp(x: torch.Tensor, stack: Stack, *, dtype: torch.dtype, impl: Impl = "auto") -> torch.Tensor:
    """``down(silu(gate(x)) * up(x))``.

    Args:
        x: normalised hidden states, ``(..., hidden_size)``.
        stack: the gate, up and down projections.
        dtype: compute dtype of the products, dtype of the result.
        impl: implementation of the activation.

    Returns:
        Tensor of the shape of ``x`` (of down's out_features in the last dimension).
    """
    plan, tensors = flatten(stack, dtype, impl)
    return _MLP.apply(x, plan, *tensors)  # type: ignore[no-any-return,no-untyped-call]
