"""Which implementation an operator runs: Triton on CUDA tensors, torch elsewhere."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU-only installations may have no Triton
    triton = tl = None

__all__ = ["IMPLS", "Impl", "on_device", "tl", "triton", "use_triton"]

Impl = Literal["auto", "triton", "torch"]
IMPLS: tuple[Impl, ...] = ("auto", "triton", "torch")
# Triton reads its switch when a kernel is decorated, at import of the operator files; read it at the same moment.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
