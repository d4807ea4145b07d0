"""Gated activations ``activation(gate) * up``: SwiGLU and GEGLU (Shazeer 2020, arXiv 2002.05202, eq. 6).

Each activation is ``g * share(g)``: silu's share is the logistic function, gelu's the normal distribution (Hendrycks
and Gimpel 2016, arXiv 1606.08415, eq. 1 and 2), its tanh approximation a logistic function of a cubic.
Shape legend: N = all leading dimensions, D = intermediate_size.
"""

from typing import Literal

import torch
import torch.nn.functional as F

from hf_fastpeft.ops._backend import Impl, first_derivative_only, launch_op, on_device, tl, triton, use_triton

__all__ = ["Activation", "geglu", "geglu_torch", "glu_bwd", "glu_fwd", "swiglu", "swiglu_torch"]

Activation = Literal["silu", "gelu", "gelu_tanh"]
BLOCK = 1024  # elements of one row in one program


def swiglu_torch(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Reference in plain torch, in the dtype of its inputs; in float64 it is the ground truth of the tests."""
    return F.silu(gate) * up


def geglu_torch(
    gate: torch.Tensor, up: torch.Tensor, *, approximate: Literal["none", "tanh"] = "tanh"
) -> torch.Tensor:
    """Reference in plain torch, in the dtype of its inputs; in float64 it is the ground truth of the tests."""
    return F.gelu(gate, approximate=approximate) * up


if triton is not None:

    @triton.jit
    def _share(g, ACTIVATION: tl.constexpr):
        """``s(g)`` of ``activation(g) = g * s(g)``, and its slope ``s'(g)``."""
        if ACTIVATION == "gelu":
            share = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)  # 1 / sqrt(2)
            slope = 0.3989422804014327 * tl.exp(-0.5 * g * g)  # 1 / sqrt(2 pi)
        elif ACTIVATION == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2 z), z = sqrt(2 / pi) (g + 0.044715 g^3)
            share = tl.sigmoid(1.5957691216057308 * g * (1 + 0.044715 * g * g))
            slope = share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * g * g)
        else:
            share = tl.sigmoid(g)
            slope = share * (1 - share)
        return share, slope

    @triton.jit
    def _glu_fwd_kernel(
        gate, up, out, gate_row, up_row, out_row, D, n_blocks, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64) // n_blocks
        cols = (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)
        mask = cols < D
        g = tl.load(gate + row * gate_row + cols, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_row + cols, mask=mask, other=0.0).to(tl.float32)
        share, _ = _share(g, ACTIVATION)
        tl.store(out + row * out_row + cols, g * share * u, mask=mask)

    @triton.jit
    def _glu_bwd_kernel(
        d_out, gate, up, d_gate, d_up, out, d_out_row, gate_row, up_row, d_gate_row, d_up_row, out_row, D, n_blocks,
        ACTIVATION: tl.constexpr, WITH_OUT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) // n_blocks
        cols = (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)
        mask = cols < D
        d = tl.load(d_out + row * d_out_row + cols, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gate + row * gate_row + cols, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_row + cols, mask=mask, other=0.0).to(tl.float32)
        share, slope = _share(g, ACTIVATION)
        if WITH_OUT:
            tl.store(out + row * out_row + cols, g * share * u, mask=mask)
        # recomputed from the inputs, so that the forward keeps nothing else
        tl.store(d_gate + row * d_gate_row + cols, d * u * (share + g * slope), mask=mask)
        tl.store(d_up + row * d_up_row + cols, d * g * share, mask=mask)


def _launch(gate: torch.Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, blocks of a row and the block: one axis, as the second of a grid ends at 65535 programs."""
    N, D = gate.shape
    block = min(BLOCK, triton.next_power_of_2(D))
    n_blocks = triton.cdiv(D, block)
    return (N * n_blocks,), n_blocks, {"BLOCK": block}


@launch_op(
    "glu_fwd(Tensor gate, Tensor up, Tensor(a!) out, str activation) -> ()", lambda gate, up, out, activation: None
)
def _launch_fwd(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, activation: Activation) -> None:
    if gate.numel():
        grid, n_blocks, meta = _launch(gate)
        with on_device(gate):
            _glu_fwd_kernel[grid](
                gate, up, out, gate.stride(0), up.stride(0), out.stride(0), gate.shape[1], n_blocks,
                ACTIVATION=activation, **meta,
            )  # fmt: skip


@launch_op(
    "glu_bwd(Tensor d_out, Tensor gate, Tensor up, Tensor(a!) d_gate, Tensor(b!) d_up, Tensor(c!)? out, "
    "str activation) -> ()",
    lambda d_out, gate, up, d_gate, d_up, out, activation: None,
)
def _launch_bwd(
    d_out: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
    out: torch.Tensor | None,
    activation: Activation,
) -> None:
    if gate.numel():
        grid, n_blocks, meta = _launch(gate)
        with on_device(gate):
            _glu_bwd_kernel[grid](
                d_out, gate, up, d_gate, d_up, out, d_out.stride(0), gate.stride(0), up.stride(0), d_gate.stride(0),
                d_up.stride(0), None if out is None else out.stride(0), gate.shape[1], n_blocks,
                ACTIVATION=activation, WITH_OUT=out is not None, **meta,
            )  # fmt: skip


def _approximate(activation: Activation) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


def _activate_torch(gate: torch.Tensor, activation: Activation, out: torch.Tensor) -> torch.Tensor:
    if activation == "silu":
        return torch.ops.aten.silu.out(gate, out=out)  # type: ignore[no-any-return]
    return torch.ops.aten.gelu.out(gate, approximate=_approximate(activation), out=out)  # type: ignore[no-any-return]


def glu_fwd(
    gate: torch.Tensor, up: torch.Tensor, activation: Activation, impl: Impl, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``activation(gate) * up`` without autograd.

    Args:
        gate: shape ``(N, D)``, unit inner stride, any row stride: a slice of a wider buffer's columns will do.
        up: as ``gate``, with its own row stride.
        activation: of the gate.
        impl: implementation.
        out: as ``gate``; filled and returned. A new contiguous tensor where None.
    """
    if out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if use_triton(impl, gate):
        _launch_fwd(gate, up, out, activation)
        return out
    return _activate_torch(gate, activation, out).mul_(up)


def glu_bwd(
    d_out: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
    activation: Activation,
    impl: Impl,
    *,
    out: torch.Tensor | None = None,
) -> None:
    """Gradients of :func:`glu_fwd` in one pass, and its output rebuilt in it.

    All tensors ``(N, D)`` of one dtype with unit inner stride and any row stride; no input is written to.

    Args:
        d_out: gradient of the forward's output.
        gate: input of the forward.
        up: input of the forward.
        d_gate: filled with the gradient of ``gate``.
        d_up: filled with the gradient of ``up``.
        activation: of the gate.
        impl: implementation.
        out: filled with the forward's output, or None.
    """
    if use_triton(impl, gate):
        _launch_bwd(d_out, gate, up, d_gate, d_up, out, activation)
        return
    _activate_torch(gate, activation, d_up)  # until its own turn: no temporary is needed
    if out is not None:
        torch.mul(d_up, up, out=out)
    d_up.mul_(d_out)
    torch.mul(d_out, up, out=d_gate)
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    else:
        torch.ops.aten.gelu_backward.grad_input(d_gate, gate, approximate=_approximate(activation), grad_input=d_gate)


def _rows(t: torch.Tensor) -> torch.Tensor:
    """``t`` ``(..., D)`` as rows ``(N, D)`` with unit inner stride; a view where it can be."""
    t_ND = t.reshape(t.shape[:-1].numel(), t.shape[-1:].numel())
    return t_ND if t_ND.stride(1) == 1 else t_ND.contiguous()


class _GLU(torch.autograd.Function):
    """Saves its two inputs."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor, activation: Activation, impl: Impl) -> torch.Tensor:
        gate_ND, up_ND = _rows(gate), _rows(up)
        ctx.activation, ctx.impl = activation, impl
        ctx.save_for_backward(gate_ND, up_ND)
        return glu_fwd(gate_ND, up_ND, activation, impl).view(gate.shape)

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        gate_ND, up_ND = ctx.saved_tensors
        d_gate_ND, d_up_ND = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate_ND, up_ND))
        glu_bwd(_rows(d_out), gate_ND, up_ND, d_gate_ND, d_up_ND, ctx.activation, ctx.impl)
        return d_gate_ND.view(d_out.shape), d_up_ND.view(d_out.shape), None, None


def _glu(name: str, gate: torch.Tensor, up: torch.Tensor, activation: Activation, impl: Impl) -> torch.Tensor:
    if (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        raise ValueError(
            f"{name}: gate {tuple(gate.shape)} {gate.dtype} {gate.device}, up {tuple(up.shape)} {up.dtype} "
            f"{up.device}; shape, dtype and device must agree"
        )
    return _GLU.apply(gate, up, activation, impl)  # type: ignore[no-any-return,no-untyped-call]


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: Impl = "auto") -> torch.Tensor:
    """Gated activation of a SwiGLU MLP, ``silu(gate) * up``.

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
    return _glu("swiglu", gate, up, "silu", impl)


def geglu(
    gate: torch.Tensor, up: torch.Tensor, *, approximate: Literal["none", "tanh"] = "tanh", impl: Impl = "auto"
) -> torch.Tensor:
    """Gated activation of a GEGLU MLP, ``gelu(gate) * up``; contract of :func:`swiglu`.

    Args:
        gate: gate projection, shape ``(..., intermediate_size)``.
        up: up projection; shape, dtype and device of ``gate``.
        approximate: ``"none"`` is the exact gelu, ``"tanh"`` its approximation, which Gemma uses.
        impl: ``"auto"`` takes Triton on CUDA tensors and torch elsewhere.

    Returns:
        Tensor of the shape and dtype of ``gate``. Triton computes in float32 and rounds once, on the store.

    Raises:
        ValueError: ``gate`` and ``up`` differ in shape, dtype or device, or ``approximate`` is neither.
        RuntimeError: ``impl="triton"`` where Triton cannot run.

    Source: Shazeer 2020, eq. 6, arXiv 2002.05202; Hendrycks and Gimpel 2016, "GELUs", eq. 2, arXiv 1606.08415.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate={approximate!r}; possible: 'none', 'tanh'")
    return _glu("geglu", gate, up, "gelu" if approximate == "none" else "gelu_tanh", impl)
