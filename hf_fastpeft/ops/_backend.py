"""Which implementation an operator runs: Triton on CUDA tensors, torch elsewhere; and how a launch can be traced."""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations may have no Triton
    triton = tl = None

__all__ = [
    "IMPLS",
    "TWICE",
    "Impl",
    "define_op",
    "first_derivative_only",
    "launch_op",
    "on_device",
    "tl",
    "triton",
    "use_triton",
]

Impl = Literal["auto", "triton", "torch"]
IMPLS: tuple[Impl, ...] = ("auto", "triton", "torch")
# Triton reads its switch when a kernel is decorated, at import of the operator files; read it at the same moment.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# torch.ops.hf_fastpeft: one operator a launch
_LIBRARY = torch.library.Library("hf_fastpeft", "DEF")  # type: ignore[no-untyped-call]


def use_triton(impl: Impl, x: torch.Tensor) -> bool:
    """Whether ``x`` is to be processed by a Triton kernel.

    Args:
        impl: ``"auto"`` takes Triton on CUDA tensors of a kernel dtype and torch elsewhere. ``"triton"`` insists; on
            CPU tensors it runs only under Triton's interpreter (``TRITON_INTERPRET=1``). ``"torch"`` never does.
        x: the tensor whose device and dtype decide.

    Raises:
        RuntimeError: ``impl="triton"`` where Triton cannot run.
        ValueError: ``impl`` is none of the three.
    """
    if impl == "torch":
        return False
    supported = triton is not None and x.dtype in KERNEL_DTYPES
    if impl == "auto":
        return supported and x.is_cuda
    if impl != "triton":
        raise ValueError(f"impl: got {impl!r}; possible: {', '.join(map(repr, IMPLS))}")
    if supported and (x.is_cuda or INTERPRETED):
        return True
    raise RuntimeError(
        f"impl='triton' needs Triton and a float16, bfloat16 or float32 CUDA tensor; Triton installed: "
        f"{triton is not None}, tensor: {x.dtype} on {x.device}. Pass impl='auto' to run torch here."
    )


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Context in which Triton launches on the device of ``x`` rather than on the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


TWICE = (
    "hf_fastpeft: a gradient of the fused blocks is asked for with create_graph=True, and they have no second "
    "derivative; run the step on stock modules: hf_fastpeft.restore(model), and patch_model(model) afterwards"
)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a Function's ``backward`` that computes without a graph: an error where a graph is wanted.

    torch's own ``once_differentiable`` raises only where a gradient that came in carries a graph. At the end of a
    model none does, and the second derivative would be lost without a word.

    Raises:
        RuntimeError: grad mode is on in the backward, as it is under ``create_graph=True``.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *d_outs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        return backward(ctx, *d_outs)

    return call


def define_op(
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A new operator of ``torch.ops.hf_fastpeft``, as ``torch.library`` has it; its gradient where both are given."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"hf_fastpeft::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"hf_fastpeft::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.hf_fastpeft, name).default  # type: ignore[no-any-return]


def launch_op(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that makes a function around one Triton launch an operator of ``torch.ops.hf_fastpeft``.

    Tracers (FakeTensor, ``torch.compile``, any dispatch mode) then see one operator with known results, where the
    launch itself would fail on tensors without memory. Autograd is the caller's: the operator has no gradient.

    Args:
        schema: ``name(arguments) -> results`` in the notation of ``torch.library``.
        fake: same arguments; returns empty tensors of the results' shapes, strides, dtypes and devices.

    Returns:
        A decorator. What it returns calls the function directly unless something is tracing: the dispatcher costs
        5.2 us a call (``torch.library.custom_op`` 28.7), the check 0.3 (torch 2.13).
    """

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        operator = define_op(schema, launch, fake)

        @functools.wraps(launch)
        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
                return operator(*args)
            return launch(*args)

        return call

    return register
