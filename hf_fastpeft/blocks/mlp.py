"""The gated MLP as one autograd Function: norm, gate, up and down projections with their adapters, residual.

The product of activation and up projection is not kept: the backward rebuilds it in the pass that computes the
activation's gradient. Shape legend: T = tokens, I = hidden_size, F = intermediate_size, R = ranks.
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
from hf_fastpeft.lowrank import TENSORS_PER_LINEAR
from hf_fastpeft.ops._backend import Impl, first_derivative_only
from hf_fastpeft.ops.glu import Activation, glu_bwd, glu_fwd
from hf_fastpeft.ops.rms_norm import Norm

__all__ = ["mlp"]

FIRST = 5  # arguments of _MLP before the linears' tensors


class _Layout(NamedTuple):
    """What :class:`_MLP` must know beyond its linears."""

    activation: Activation
    norm: tuple[float, bool] | None
    residual: bool


class _MLP(torch.autograd.Function):
    """Saves: h, the norm's weight and rstd (without a norm: x in the compute dtype, where a gradient reads it), the
    gate and up projections, P of both stages and the linears' own tensors."""

    @staticmethod
    def forward(
        ctx, h: torch.Tensor, norm_weight: torch.Tensor | None, layout: _Layout, plan: Plan, down_plan: Plan, *tensors
    ) -> torch.Tensor:
        first = len(plan.factors) * TENSORS_PER_LINEAR
        h_TI = tokens(h)
        x_TI, rstd_T1 = norm_fwd(h_TI, norm_weight, layout.norm, plan)
        ctx.draw = draw_of(plan, x_TI)
        z_TF, P_TR = project(x_TI, rebuild(plan, tensors[:first]), plan)
        gate_TF, up_TF = z_TF.chunk(2, dim=1)
        hidden_TF = torch.empty_like(gate_TF, memory_format=torch.contiguous_format)
        glu_fwd(gate_TF, up_TF, layout.activation, plan.impl, hidden_TF)
        ctx.down_draw = draw_of(down_plan, hidden_TF)
        out_TI, P_down_TR = project_onto(
            hidden_TF, h if layout.residual else None, rebuild(down_plan, tensors[first:]), down_plan
        )
        ctx.layout, ctx.plans, ctx.first, ctx.h_shape, ctx.h_dtype = layout, (plan, down_plan), first, h.shape, h.dtype
        kept_TI: torch.Tensor | None = h_TI
        if layout.norm is None:
            kept_TI = x_TI if needs_input(ctx.needs_input_grad[FIRST : FIRST + first]) else None
        ctx.save_for_backward(kept_TI, norm_weight, rstd_T1, z_TF, P_TR, P_down_TR, *tensors)
        return out_TI

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_out: torch.Tensor) -> tuple[Any, ...]:
        h_TI, norm_weight, rstd_T1, z_TF, P_TR, P_down_TR, *tensors = ctx.saved_tensors
        layout, (plan, down_plan), first = ctx.layout, ctx.plans, ctx.first
        stack, down = rebuild(plan, tensors[:first]), rebuild(down_plan, tensors[first:])
        needs, down_needs = ctx.needs_input_grad[FIRST : FIRST + first], ctx.needs_input_grad[FIRST + first :]
        d_out_TI = tokens(d_out, plan.dtype)
        d_hidden_TF, U_TR, down_grads = project_bwd(
            d_out_TI, P_down_TR, down, down_plan, down_needs, need_dx=True, draw=ctx.down_draw
        )
        assert d_hidden_TF is not None
        gate_TF, up_TF = z_TF.chunk(2, dim=1)
        with_hidden = needs_input(down_needs)
        hidden_TF = torch.empty_like(d_hidden_TF) if with_hidden else None
        d_z_TF = torch.empty_like(z_TF)
        d_gate_TF, d_up_TF = d_z_TF.chunk(2, dim=1)
        glu_bwd(d_hidden_TF, gate_TF, up_TF, d_gate_TF, d_up_TF, layout.activation, plan.impl, out=hidden_TF)
        add_weight_grads(down_grads, d_out_TI, hidden_TF, U_TR, down, down_plan, down_needs, ctx.down_draw)
        del d_hidden_TF, hidden_TF, U_TR  # two of the largest tensors of a layer, and what may be a view of the first
        need_dx = any(ctx.needs_input_grad[:2])
        d_x_TI, U_TR, grads = project_bwd(d_z_TF, P_TR, stack, plan, needs, need_dx=need_dx, draw=ctx.draw)
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
                d_residual=d_out if layout.residual else None,
                with_x=needs_input(needs),
            )
        add_weight_grads(grads, d_z_TF, x_TI, U_TR, stack, plan, needs, ctx.draw)
        d_h = None if d_h_TI is None else d_h_TI.view(ctx.h_shape).to(ctx.h_dtype)
        return d_h, d_norm, None, None, None, *grads, *down_grads


def mlp(
    h: torch.Tensor,
    stack: Bundle,
    down: Bundle,
    *,
    dtype: torch.dtype,
    activation: Activation = "silu",
    norm: Norm | None = None,
    residual: bool = False,
    impl: Impl = "auto",
    adapters: SideCache | None = None,
) -> torch.Tensor:
    """``down(act(gate(x)) * up(x))`` with ``x = norm(h)``, plus ``h`` where ``residual`` is asked for.

    Args:
        h: hidden states, ``(..., hidden_size)``; normalised already where ``norm`` is None.
        stack: the gate and up projections, or one linear that holds them in this order.
        down: the down projection alone.
        dtype: compute dtype of the products.
        activation: of the gate.
        norm: the norm before the projections.
        residual: add ``h``; needs ``norm``.
        impl: implementation of the operators.
        adapters: where the linears' adapters are laid out already, if anywhere.

    Returns:
        Tensor of the shape of ``h`` (of down's out_features in the last dimension), in ``dtype``, promoted with that
        of ``h`` where it is added.
    """
    assert norm is not None or not residual
    layout = _Layout(activation, kind_of(norm), residual)
    plan = stack.plan(dtype, impl, h, adapters)
    down_plan = down.plan(dtype, impl, h, adapters)
    out_TI = _MLP.apply(  # type: ignore[no-untyped-call]
        h, None if norm is None else norm.weight, layout, plan, down_plan, *stack.flat, *down.flat
    )
    return out_TI.view(*h.shape[:-1], -1)  # type: ignore[no-any-return]  # outside: its owner may write to it
