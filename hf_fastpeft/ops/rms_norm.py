"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4) with Llama's rounding order.

Shape legend: N = all leading dimensions, D = hidden_size.
"""

import torch

from hf_fastpeft.ops._backend import Impl, launch_op, on_device, tl, triton, use_triton

__all__ = ["rms_norm", "rms_norm_bwd", "rms_norm_fwd", "rms_norm_torch"]

MAX_BLOCK = 65536  # elements of one row held by one program; wider rows run in torch
ELEMENTS_PER_PROGRAM = 8192  # short rows share a program


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Reference in plain torch: statistics in at least float32, the row rounded to ``x.dtype`` before the weight.

    In float64 it is the ground truth of the tests.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    rstd = torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x_wide * rstd).to(x.dtype)


if triton is not None:

    @triton.jit
    def _rms_norm_fwd_kernel(x, weight, out, rstd, n_rows, D, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        cols = tl.arange(0, BLOCK)
        mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
        offs = rows[:, None] * D + cols[None, :]
        x_raw = tl.load(x + offs, mask=mask, other=0.0)
        x_f32 = x_raw.to(tl.float32)
        r = tl.rsqrt(tl.sum(x_f32 * x_f32, axis=1) / D + tl.cast(eps, tl.float32))
        w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
        x_hat = (x_f32 * r[:, None]).to(x_raw.dtype).to(tl.float32)  # Llama rounds before the weight
        tl.store(out + offs, x_hat * w[None, :], mask=mask)
        tl.store(rstd + rows, r, mask=rows < n_rows)

    @triton.jit
    def _rms_norm_bwd_kernel(
        d_out,
        x,
        weight,
        rstd,
        d_x,
        d_weight,
        n_rows,
        D,
        WITH_DW: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        cols = tl.arange(0, BLOCK)
        mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
        offs = rows[:, None] * D + cols[None, :]
        r = tl.load(rstd + rows, mask=rows < n_rows, other=0.0)[:, None]
        x_hat = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32) * r
        d = tl.load(d_out + offs, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
        wd = d * w[None, :]
        tl.store(d_x + offs, r * (wd - x_hat * (tl.sum(wd * x_hat, axis=1) / D)[:, None]), mask=mask)
        if WITH_DW:  # one partial row a program, summed by the caller
            partial = tl.program_id(0).to(tl.int64) * D + cols
            tl.store(d_weight + partial, tl.sum(d * x_hat, axis=0), mask=cols < D)


def _launch(D: int, n_rows: int) -> tuple[tuple[int], dict[str, int]]:
    block = triton.next_power_of_2(D)
    rows = max(1, min(16, ELEMENTS_PER_PROGRAM // block))
    return (triton.cdiv(n_rows, rows),), {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def _fits(impl: Impl, x: torch.Tensor) -> bool:
    return use_triton(impl, x) and x.shape[-1] <= MAX_BLOCK


def _fwd_results(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    N, D = x.shape
    out_ND = torch.empty(N, D, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    return out_ND, torch.empty(N, 1, dtype=torch.float32, device=x.device)


@launch_op("rms_norm_fwd(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _fwd_results)
def _launch_fwd(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    N, D = x.shape
    out_ND, rstd_N1 = _fwd_results(x, weight, eps)
    if N:
        grid, meta = _launch(D, N)
        with on_device(x):
            _rms_norm_fwd_kernel[grid](x, weight, out_ND, rstd_N1, N, D, eps, **meta)
    return out_ND, rstd_N1


@launch_op(
    "rms_norm_bwd(Tensor d_out, Tensor x, Tensor weight, Tensor rstd, Tensor(a!)? partial) -> Tensor",
    lambda d_out, x, weight, rstd, partial: torch.empty_like(x),
)
def _launch_bwd(
    d_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, partial: torch.Tensor | None
) -> torch.Tensor:
    """``d_x``; ``partial`` takes one row of the weight's gradient a program."""
    N, D = x.shape
    d_x_ND = torch.empty_like(x)
    if N:
        grid, meta = _launch(D, N)
        with on_device(x):
            _rms_norm_bwd_kernel[grid](
                d_out, x, weight, rstd, d_x_ND, partial, N, D, WITH_DW=partial is not None, **meta
            )
    return d_x_ND


def rms_norm_fwd(x: torch.Tensor, weight: torch.Tensor, eps: float, impl: Impl) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, rstd)`` without autograd; ``x`` contiguous ``(N, D)``, ``rstd`` float32 (float64 for it) ``(N, 1)``."""
    D = x.shape[-1]
    if not _fits(impl, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        x_wide = x.to(wide)
        # the norm reads x once and needs no squared copy of it
        rstd_N1 = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_().div_(D).add_(eps).rsqrt_()
        x_hat_ND = x_wide * rstd_N1
        if x.dtype == wide == weight.dtype:
            return x_hat_ND.mul_(weight), rstd_N1
        return x_hat_ND.to(x.dtype) * weight, rstd_N1
    return _launch_fwd(x, weight, eps)  # type: ignore[no-any-return]


def rms_norm_bwd(
    d_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, impl: Impl, *, with_dw: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(d_x, d_weight or None)``; contiguous ``(N, D)`` inputs, none written to. The rounding of the forward passes
    gradients straight through, as autograd has it for a cast."""
    N, D = x.shape
    if not _fits(impl, x):
        x_wide, d_wide = x.to(rstd.dtype), d_out.to(rstd.dtype)
        wd_ND = d_wide * weight.to(rstd.dtype)
        d_weight_D = None
        if with_dw:
            d_weight_D = (d_wide * x_wide).mul_(rstd).sum(0).to(weight.dtype)
        # d_x = rstd * (wd - x_hat * mean(wd * x_hat)), with x_hat = x * rstd
        dot_N1 = (wd_ND * x_wide).sum(-1, keepdim=True)
        d_x_ND = wd_ND.addcmul_(x_wide, dot_N1.mul_(rstd).mul_(rstd), value=-1.0 / D).mul_(rstd)
        return d_x_ND.to(x.dtype), d_weight_D
    partial_PD = None
    if with_dw:  # no program, no row: the sum over none is zero
        partial_PD = torch.empty(_launch(D, N)[0][0], D, dtype=torch.float32, device=x.device)
    d_x_ND = _launch_bwd(d_out, x, weight, rstd, partial_PD)
    return d_x_ND, None if partial_PD is None else partial_PD.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """Saves x, the weight and one float a row."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float, impl: Impl) -> torch.Tensor:
        x_ND = x.reshape(-1, x.shape[-1]).contiguous()
        out_ND, rstd_N1 = rms_norm_fwd(x_ND, weight, eps, impl)
        ctx.impl = impl
        ctx.save_for_backward(x_ND, weight, rstd_N1)
        return out_ND.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        x_ND, weight, rstd_N1 = ctx.saved_tensors
        d_out_ND = d_out.reshape(x_ND.shape).contiguous()
        d_x_ND, d_weight_D = rms_norm_bwd(d_out_ND, x_ND, weight, rstd_N1, ctx.impl, with_dw=ctx.needs_input_grad[1])
        return d_x_ND.view(d_out.shape), d_weight_D, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, impl: Impl = "auto") -> torch.Tensor:
    """Root-mean-square normalisation over the last dimension, times ``weight``.

    Args:
        x: shape ``(..., hidden_size)``; float16, bfloat16 or float32 for Triton, any floating dtype for torch.
        weight: shape ``(hidden_size,)``, device of ``x``; trainable or frozen.
        eps: added to the mean square before the root.
        impl: ``"auto"`` takes Triton on CUDA tensors and torch elsewhere.

    Returns:
        Tensor of the shape of ``x``, dtype ``torch.promote_types(x.dtype, weight.dtype)``. Statistics in float32
        (float64 for float64 inputs); rounded to ``x.dtype`` before the weight, as Llama does.

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
    return _RMSNorm.apply(x, weight, eps, impl)  # type: ignore[no-any-return,no-untyped-call]
