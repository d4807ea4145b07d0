"""SwiGLU activation: ``silu(gate) * up`` (Shazeer 2020, arXiv 2002.05202, eq. 6).

Shape legend: N = all leading dimensions, D = intermediate_size.
"""

import torch
import torch.nn.functional as F

from hf_fastpeft.ops._backend import Impl, launch_op, on_device, tl, triton, use_triton

__all__ = ["swiglu", "swiglu_bwd", "swiglu_fwd", "swiglu_torch"]

BLOCK = 1024


def swiglu_torch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Reference in plain torch, in the dtype of its inputs; in float64 it is the ground truth of the tests."""
    return F.silu(gate) * up


if triton is not None:

    @triton.jit
    def _swiglu_fwd_kernel(gate, up, out, n_elements, BLOCK: tl.constexpr):
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < n_elements
        g = tl.load(gate + offs, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + offs, g * tl.sigmoid(g) * u, mask=mask)

    @triton.jit
    def _swiglu_bwd_kernel(
        d_out, gate, up, out, d_gate, d_up, n_elements, WITH_OUT: tl.constexpr, BLOCK: tl.constexpr
    ):
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < n_elements
        d = tl.load(d_out + offs, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gate + offs, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + offs, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
        if WITH_OUT:
            tl.store(out + offs, g * s * u, mask=mask)
        # d/dg [g * s(g)] = s + g * s * (1 - s), recomputed so that the forward keeps only its inputs
        tl.store(d_gate + offs, d * u * (s + g * s * (1 - s)), mask=mask)
        tl.store(d_up + offs, d * g * s, mask=mask)


@launch_op("swiglu_fwd(Tensor gate, Tensor up) -> Tensor", lambda gate, up: torch.empty_like(gate))
def _launch_fwd(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out_ND = torch.empty_like(gate)
    n = out_ND.numel()
    if n:
        with on_device(gate):
            _swiglu_fwd_kernel[(triton.cdiv(n, BLOCK),)](gate, up, out_ND, n, BLOCK=BLOCK)
    return out_ND


@launch_op(
    "swiglu_bwd(Tensor d_out, Tensor gate, Tensor up, Tensor(a!)? out) -> (Tensor, Tensor)",
    lambda d_out, gate, up, out: (torch.empty_like(gate), torch.empty_like(gate)),
)
def _launch_bwd(
    d_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    d_gate_ND, d_up_ND = torch.empty_like(gate), torch.empty_like(gate)
    n = gate.numel()
    if n:
        with on_device(gate):
            _swiglu_bwd_kernel[(triton.cdiv(n, BLOCK),)](
                d_out, gate, up, out, d_gate_ND, d_up_ND, n, WITH_OUT=out is not None, BLOCK=BLOCK
            )
    return d_gate_ND, d_up_ND


def swiglu_fwd(gate: torch.Tensor, up: torch.Tensor, impl: Impl) -> torch.Tensor:
    """``silu(gate) * up`` without autograd; contiguous inputs of one shape, dtype and device."""
    if not use_triton(impl, gate):
        return F.silu(gate).mul_(up)
    return _launch_fwd(gate, up)  # type: ignore[no-any-return]


def swiglu_bwd(
    d_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, impl: Impl, *, with_out: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients ``(d_gate, d_up)`` in one pass, and the forward's output rebuilt in it when ``with_out``.

    All inputs contiguous, of one shape, dtype and device; none is written to.
    """
    if not use_triton(impl, gate):
        act_ND = F.silu(gate)
        out_ND = act_ND * up if with_out else None
        d_gate_ND = torch.ops.aten.silu_backward(d_out * up, gate)
        return out_ND, d_gate_ND, act_ND.mul_(d_out)
    out_ND = torch.empty_like(gate) if with_out else None
    d_gate_ND, d_up_ND = _launch_bwd(d_out, gate, up, out_ND)
    return out_ND, d_gate_ND, d_up_ND


class _SwiGLU(torch.autograd.Function):
    """Saves its two inputs."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor, impl: Impl) -> torch.Tensor:
        gate_ND, up_ND = gate.contiguous(), up.contiguous()
        ctx.impl = impl
        ctx.save_for_backward(gate_ND, up_ND)
        return swiglu_fwd(gate_ND, up_ND, impl)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate_ND, up_ND = ctx.saved_tensors
        _, d_gate_ND, d_up_ND = swiglu_bwd(d_out.contiguous(), gate_ND, up_ND, ctx.impl, with_out=False)
        return d_gate_ND, d_up_ND, None


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: Impl = "auto") -> torch.Tensor:
    """Gated activation of a SwiGLU MLP.

    Args:
        gate: gate projection, shape ``(..., intermediate_size)``; float16, bfloat16 or float32 for Triton, any
            floating dtype for torch. Any strides.
        up: up projection; shape, dtype and device of ``gate``.
        impl: ``"auto"`` takes Triton on CUDA tensors and torch elsewhere.

    Returns:
        Tensor of the shape and dtype of ``gate``. Triton computes in float32 and rounds once, on the store.

    Raises:
        ValueError: ``gate`` and ``up`` differ in shape, dtype or device.
        RuntimeError: ``impl="triton"`` where Triton cannot run.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", eq. 6, arXiv 2002.05202.
    """
    if (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        raise ValueError(
            f"swiglu: gate {tuple(gate.shape)} {gate.dtype} {gate.device}, up {tuple(up.shape)} {up.dtype} "
            f"{up.device}; shape, dtype and device must agree"
        )
    return _SwiGLU.apply(gate, up, impl)  # type: ignore[no-any-return,no-untyped-call]
