"""A product of half-precision matrices in float32: gradients of float32 parameters, rounded once."""

import torch

from hf_fastpeft.ops._backend import launch_op

__all__ = ["mm_wide"]

HALVES = (torch.float16, torch.bfloat16)


def _result(left: torch.Tensor, right: torch.Tensor, alpha: float) -> torch.Tensor:
    wide = torch.promote_types(left.dtype, torch.float32)
    return torch.empty(left.shape[0], right.shape[1], dtype=wide, device=left.device)


@launch_op("mm_wide(Tensor left, Tensor right, float alpha) -> Tensor", _result)
def _launch(left: torch.Tensor, right: torch.Tensor, alpha: float) -> torch.Tensor:
    out = _result(left, right, alpha)
    # beta=0 ignores what the fresh buffer holds, NaN included
    if left.dtype not in HALVES:
        return out.addmm_(left, right, beta=0, alpha=alpha)
    if left.is_cuda:
        return torch.addmm(out, left, right, out_dtype=out.dtype, beta=0, alpha=alpha, out=out)
    return torch.mul(left @ right, alpha, out=out)


def mm_wide(left: torch.Tensor, right: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """``alpha * left @ right`` in at least float32, any strides; float64 for it. Without autograd.

    On CUDA the products of half-precision factors are never rounded to their dtype; a CPU has no such product and
    rounds once more.
    """
    return _launch(left, right, alpha)  # type: ignore[no-any-return]
