"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4), Llama's and Gemma's.

Llama rounds the normalised row before the weight; Gemma's weight is an offset from one, and it rounds once.
Shape legend: N = all leading dimensions, D = hidden_size.
"""

from typing import NamedTuple

import torch

from hf_fastpeft.ops._backend import Impl, first_derivative_only, launch_op, on_device, tl, triton, use_triton

__all__ = ["Norm", "rms_norm", "rms_norm_bwd", "rms_norm_fwd", "rms_norm_torch"]

MAX_BLOCK = 65536  # elements of one row held by one program; wider rows run in torch
ELEMENTS_PER_PROGRAM = 8192  # short rows share a program


class Norm(NamedTuple):
    """Parameters of one norm.

    Attributes:
        weight: shape ``(D,)``.
        eps: added to the mean square before the root.
        unit_offset: ``x_hat * (1 + weight)`` rounded once, as Gemma does; else Llama's ``weight * round(x_hat)``.
    """

    weight: torch.Tensor
    eps: float
    unit_offset: bool = False


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False) -> torch.Tensor:
    """Reference in plain torch: statistics in at least float32, the row rounded to ``x.dtype`` before the weight, or
    after it where ``unit_offset``.

    In float64 it is the ground truth of the tests.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    rstd = torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        return (x_wide * rstd * (1 + weight.to(wide))).to(x.dtype)
    return weight * (x_wide * rstd).to(x.dtype)


if triton is not None:

    @triton.jit
    def _load_weight(weight, cols, D, UNIT_OFFSET: tl.constexpr):
        w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
        if UNIT_OFFSET:
            w += 1.0
        return w

    @triton.jit
    def _weighted(x, r, w, UNIT_OFFSET: tl.constexpr):
        """The output from raw ``x``: one function for both passes, so that what the backward rebuilds has its bits."""
        x_hat = x.to(tl.float32) * r[:, None]
        if not UNIT_OFFSET:  # Llama rounds before the weight
            x_hat = x_hat.to(x.dtype).to(tl.float32)
        return x_hat * w[None, :]

    @triton.jit
    def _rms_norm_fwd_kernel(
        x, weight, out, rstd, out_row, n_rows, D, eps,
        UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        cols = tl.arange(0, BLOCK)
        mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
        offs = rows[:, None] * D + cols[None, :]
        x_raw = tl.load(x + offs, mask=mask, other=0.0)
        x_f32 = x_raw.to(tl.float32)
        r = tl.rsqrt(tl.sum(x_f32 * x_f32, axis=1) / D + tl.cast(eps, tl.float32))
        w = _load_weight(weight, cols, D, UNIT_OFFSET)
        tl.store(out + rows[:, None] * out_row + cols[None, :], _weighted(x_raw, r, w, UNIT_OFFSET), mask=mask)
        tl.store(rstd + rows, r, mask=rows < n_rows)

    @triton.jit
    def _rms_norm_bwd_kernel(
        d_out, x, weight, rstd, d_residual, d_x, d_weight, out, n_rows, D,
        UNIT_OFFSET: tl.constexpr, WITH_RESIDUAL: tl.constexpr, WITH_DW: tl.constexpr, WITH_OUT: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        cols = tl.arange(0, BLOCK)
        mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
        offs = rows[:, None] * D + cols[None, :]
        r = tl.load(rstd + rows, mask=rows < n_rows, other=0.0)
        x_raw = tl.load(x + offs, mask=mask, other=0.0)
        w = _load_weight(weight, cols, D, UNIT_OFFSET)
        if WITH_OUT:
            tl.store(out + offs, _weighted(x_raw, r, w, UNIT_OFFSET), mask=mask)
        x_hat = x_raw.to(tl.float32) * r[:, None]
        d = tl.load(d_out + offs, mask=mask, other=0.0).to(tl.float32)
        wd = d * w[None, :]
        dx = r[:, None] * (wd - x_hat * (tl.sum(wd * x_hat, axis=1) / D)[:, None])
        if WITH_RESIDUAL:
            dx += tl.load(d_residual + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_x + offs, dx, mask=mask)
        if WITH_DW:  # one partial row a program, summed by the caller
            partial = tl.program_id(0).to(tl.int64) * D + cols
            tl.store(d_weight + partial, tl.sum(d * x_hat, axis=0), mask=cols < D)


def _launch(D: int, n_rows: int) -> tuple[tuple[int], dict[str, int]]:
    block = triton.next_power_of_2(D)
    rows = max(1, min(16, ELEMENTS_PER_PROGRAM // block))
    return (triton.cdiv(n_rows, rows),), {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def _fits(impl: Impl, x: torch.Tensor) -> bool:
    return use_triton(impl, x) and x.shape[-1] <= MAX_BLOCK


def _out_dtype(x: torch.Tensor, weight: torch.Tensor, unit_offset: bool) -> torch.dtype:
    return x.dtype if unit_offset else torch.promote_types(x.dtype, weight.dtype)


def _fwd_results(
    x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    N, D = x.shape
    out_ND = torch.empty(N, D, dtype=_out_dtype(x, weight, unit_offset), device=x.device)
    return out_ND, _rstd(x)


def _rstd(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


@launch_op("rms_norm_fwd(Tensor x, Tensor weight, float eps, bool unit_offset) -> (Tensor, Tensor)", _fwd_results)
def _launch_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    out_ND, rstd_N1 = _fwd_results(x, weight, eps, unit_offset)
    _fwd(x, weight, out_ND, rstd_N1, eps, unit_offset)
    return out_ND, rstd_N1


@launch_op("rms_norm_into(Tensor x, Tensor weight, Tensor(a!) out, float eps, bool unit_offset) -> Tensor", _rstd)
def _launch_fwd_into(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, unit_offset: bool
) -> torch.Tensor:
    rstd_N1 = _rstd(x)
    _fwd(x, weight, out, rstd_N1, eps, unit_offset)
    return rstd_N1


def _fwd(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, rstd: torch.Tensor, eps: float, unit_offset: bool
) -> None:
    N, D = x.shape
    if N:
        grid, meta = _launch(D, N)
        with on_device(x):
            _rms_norm_fwd_kernel[grid](
                x, weight, out, rstd, out.stride(0), N, D, eps, UNIT_OFFSET=unit_offset, **meta
            )  # fmt: skip


@launch_op(
    "rms_norm_bwd(Tensor d_out, Tensor x, Tensor weight, Tensor rstd, Tensor? d_residual, Tensor(a!)? partial, "
    "Tensor(b!)? out, bool unit_offset) -> Tensor",
    lambda d_out, x, *_: torch.empty_like(x),
)
def _launch_bwd(
    d_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    d_residual: torch.Tensor | None,
    partial: torch.Tensor | None,
    out: torch.Tensor | None,
    unit_offset: bool,
) -> torch.Tensor:
    """``d_x``; ``partial`` takes one row of the weight's gradient a program."""
    N, D = x.shape
    d_x_ND = torch.empty_like(x)
    if N:
        grid, meta = _launch(D, N)
        with on_device(x):
            _rms_norm_bwd_kernel[grid](
                d_out, x, weight, rstd, d_residual, d_x_ND, partial, out, N, D,
                UNIT_OFFSET=unit_offset, WITH_RESIDUAL=d_residual is not None, WITH_DW=partial is not None,
                WITH_OUT=out is not None, **meta,
            )  # fmt: skip
    return d_x_ND


def _weighted_torch(
    x_wide: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dtype: torch.dtype,
    unit_offset: bool,
    out: torch.Tensor,
) -> torch.Tensor:
    """Fill ``out`` with the norm of ``x``, which was of ``dtype``; the same operations, hence bits, in both passes."""
    x_hat_ND = torch.mul(x_wide, rstd, out=out if out.dtype == rstd.dtype else None)
    if unit_offset:
        return torch.mul(x_hat_ND, weight.to(rstd.dtype) + 1, out=out)
    return torch.mul(x_hat_ND.to(dtype), weight, out=out)


def rms_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    impl: Impl,
    *,
    unit_offset: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, rstd)`` without autograd; ``x`` contiguous ``(N, D)``, ``rstd`` float32 (float64 for it) ``(N, 1)``.

    ``out`` is filled and returned where it is given: of the result's dtype, unit inner stride, any row stride.
    """
    N, D = x.shape
    if not _fits(impl, x):
        x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # the norm reads x once and needs no squared copy of it
        rstd_N1 = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_().div_(D).add_(eps).rsqrt_()
        if out is None:
            out = torch.empty(N, D, dtype=_out_dtype(x, weight, unit_offset), device=x.device)
        return _weighted_torch(x_wide, rstd_N1, weight, x.dtype, unit_offset, out), rstd_N1
    if out is not None:
        return out, _launch_fwd_into(x, weight, out, eps, unit_offset)
    return _launch_fwd(x, weight, eps, unit_offset)  # type: ignore[no-any-return]


def rms_norm_bwd(
    d_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    impl: Impl,
    *,
    with_dw: bool,
    unit_offset: bool = False,
    d_residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of :func:`rms_norm_fwd` in one launch; contiguous ``(N, D)`` tensors, no input written to.

    The rounding of the forward passes gradients straight through, as autograd has it for a cast.

    Args:
        d_out: gradient of the forward's output.
        x: input of the forward.
        weight: shape ``(D,)``.
        rstd: second result of the forward.
        impl: implementation.
        with_dw: compute the weight's gradient.
        unit_offset: as in the forward.
        d_residual: gradient of ``x`` along the path around the norm, added before the one rounding.
        out: filled with the forward's output, bit for bit; of its dtype.

    Returns:
        ``(d_x, d_weight or None)``.
    """
    N, D = x.shape
    if not _fits(impl, x):
        x_wide, d_wide, w_wide = x.to(rstd.dtype), d_out.to(rstd.dtype), weight.to(rstd.dtype)
        wd_ND = d_wide * (w_wide + 1 if unit_offset else w_wide)
        d_weight_D = None
        if with_dw:
            d_weight_D = (d_wide * x_wide).mul_(rstd).sum(0).to(weight.dtype)
        if out is not None:
            _weighted_torch(x_wide, rstd, weight, x.dtype, unit_offset, out)
        # d_x = rstd * (wd - x_hat * mean(wd * x_hat)), with x_hat = x * rstd
        dot_N1 = (wd_ND * x_wide).sum(-1, keepdim=True)
        wd_ND.addcmul_(x_wide, dot_N1.mul_(rstd).mul_(rstd), value=-1.0 / D)
        if d_residual is None:
            wd_ND.mul_(rstd)
        else:
            torch.addcmul(d_residual.to(rstd.dtype), wd_ND, rstd, out=wd_ND)
        return wd_ND.to(x.dtype), d_weight_D
    partial_PD = None
    if with_dw:  # no program, no row: the sum over none is zero
        partial_PD = torch.empty(_launch(D, N)[0][0], D, dtype=torch.float32, device=x.device)
    d_x_ND = _launch_bwd(d_out, x, weight, rstd, d_residual, partial_PD, out, unit_offset)
    return d_x_ND, None if partial_PD is None else partial_PD.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """Saves x, the weight and one float a row."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float, unit_offset: bool, impl: Impl) -> torch.Tensor:
        x_ND = x.contiguous()
        out_ND, rstd_N1 = rms_norm_fwd(x_ND, weight, eps, impl, unit_offset=unit_offset)
        ctx.unit_offset, ctx.impl = unit_offset, impl
        ctx.save_for_backward(x_ND, weight, rstd_N1)
        return out_ND

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None, None]:
        x_ND, weight, rstd_N1 = ctx.saved_tensors
        d_x_ND, d_weight_D = rms_norm_bwd(
            d_out.contiguous(),
            x_ND,
            weight,
            rstd_N1,
            ctx.impl,
            with_dw=ctx.needs_input_grad[1],
            unit_offset=ctx.unit_offset,
        )
        return d_x_ND, d_weight_D, None, None, None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False, impl: Impl = "auto"
) -> torch.Tensor:
    """Root-mean-square normalisation over the last dimension, times ``weight``.

    Args:
        x: shape ``(..., hidden_size)``; float16, bfloat16 or float32 for Triton, any floating dtype for torch.
        weight: shape ``(hidden_size,)``, device of ``x``; trainable or frozen.
        eps: added to the mean square before the root.
        unit_offset: ``weight`` is the offset from a factor of one, as in Gemma.
        impl: ``"auto"`` takes Triton on CUDA tensors and torch elsewhere.

    Returns:
        Tensor of the shape of ``x``, dtype ``torch.promote_types(x.dtype, weight.dtype)``. Statistics in float32
        (float64 for float64 inputs); rounded to ``x.dtype`` before the weight, as Llama does. With ``unit_offset``
        of the dtype of ``x``, rounded once, as Gemma does.

    Raises:
        ValueError: shapes or devices do not fit.
        RuntimeError: ``impl="triton"`` where Triton cannot run.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4, arXiv 1910.07467.
    """
    if x.ndim == 0 or weight.shape != x.shape[-1:] or weight.device != x.device:
        raise ValueError(
            f"rms_norm: x {tuple(x.shape)} {x.device}, weight {tuple(weight.shape)} {weight.device}; "
            f"weight must be one vector of x's last dimension on its device"
        )
    # a view made outside the Function may be written to by its owner
    out_ND = _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps, unit_offset, impl)  # type: ignore[no-untyped-call]
    return out_ND.view(x.shape)  # type: ignore[no-any-return]
