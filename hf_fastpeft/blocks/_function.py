"""What the blocks' autograd Functions share: stacks from flat arguments, and the norm before
them."""

from collections.abc import Sequence

import torch

from hf_fastpeft.blocks.layout import Stack
from hf_fastpeft.blocks.projection import Draw, Plan, project
from hf_fastpeft.lowrank import TENSORS_PER_LINEAR, LowRank
from hf_fastpeft.ops.rms_norm import Norm, rms_norm_bwd, rms_norm_fwd

__all__ = ["draw_of", "kind_of", "norm_bwd", "norm_fwd", "project_onto", "rebuild", "tokens"]


def rebuild(plan: Plan, tensors: Sequence[torch.Tensor | None]) -> list[LowRank]:
    """The records again, from a Function's arguments or its saved tensors."""
    stack = []
    for i, factors in enumerate(plan.factors):
        weight, *others = tensors[i * TENSORS_PER_LINEAR : (i + 1) * TENSORS_PER_LINEAR]
        assert weight is not None
        stack.append(LowRank(weight, *others, *factors))  # type: ignore[call-arg,arg-type]
    return stack


def tokens(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``x`` ``(..., I)`` as contiguous rows ``(T, I)`` in ``dtype``; a view where it can be."""
    rows = x.reshape(-1, x.shape[-1])
    return (rows if dtype is None else rows.to(dtype)).contiguous()


def draw_of(plan: Plan, x: torch.Tensor) -> Draw | None:
    """The random generator's place before the dropout of a stack; None without dropout."""
    return Draw(x) if plan.dropped else None


def norm_fwd(
    h_TI: torch.Tensor, weight: torch.Tensor | None, norm: tuple[float, bool] | None, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(x, rstd)``: the stack's input in its compute dtype; ``h`` itself without a norm."""
    if norm is None or weight is None:
        return h_TI.to(plan.dtype), None
    eps, unit_offset = norm
    x_TI, rstd_T1 = rms_norm_fwd(h_TI, weight, eps, plan.impl, unit_offset=unit_offset)
    return x_TI.to(plan.dtype), rstd_T1


def _norm_dtype(h_TI: torch.Tensor, weight: torch.Tensor, unit_offset: bool) -> torch.dtype:
    return h_TI.dtype if unit_offset else torch.promote_types(h_TI.dtype, weight.dtype)


def norm_bwd(
    d_x_TI: torch.Tensor | None,
    h_TI: torch.Tensor,
    weight: torch.Tensor,
    rstd_T1: torch.Tensor,
    norm: tuple[float, bool],
    plan: Plan,
    *,
    with_dw: bool,
    d_residual: torch.Tensor | None,
    with_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """``(d_h, d_weight, x)`` from the gradient of ``x``, in one pass over ``h``; ``x`` is rebuilt where it is wanted.

    Without ``d_x`` there is only ``x`` to rebuild.
    """
    _, unit_offset = norm
    if d_x_TI is None:
        x_TI = norm_fwd(h_TI, weight, norm, plan)[0] if with_x else None
        return None, None, x_TI
    x_TI = None
    if with_x:
        x_TI = torch.empty_like(h_TI, dtype=_norm_dtype(h_TI, weight, unit_offset))
    d_h_TI, d_weight_I = rms_norm_bwd(
        d_x_TI,
        h_TI,
        weight,
        rstd_T1,
        plan.impl,
        with_dw=with_dw,
        unit_offset=unit_offset,
        d_residual=None if d_residual is None else tokens(d_residual),
        out=x_TI,
    )
    return d_h_TI, d_weight_I, None if x_TI is None else x_TI.to(plan.dtype)


def kind_of(norm: Norm | None) -> tuple[float, bool] | None:
    """A norm without its weight: ``(eps, unit_offset)``."""
    return None if norm is None else (norm.eps, norm.unit_offset)


def project_onto(
    x_TI: torch.Tensor, residual: torch.Tensor | None, stack: Stack, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`project` with the residual, in the dtype that their sum has."""
    if residual is None:
        return project(x_TI, stack, plan)
    residual_TO = tokens(residual)
    if residual.dtype == plan.dtype:
        return project(x_TI, stack, plan, residual_TO)
    out_TO, P_TR = project(x_TI, stack, plan)
    return residual_TO + out_TO, P_TR
