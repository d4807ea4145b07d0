"""Elementwise operators, one file each: torch reference, Triton kernels, autograd Function, public function."""

from hf_fastpeft.ops.rms_norm import rms_norm, rms_norm_torch
from hf_fastpeft.ops.rope import rope, rope_torch
from hf_fastpeft.ops.swiglu import swiglu, swiglu_torch

__all__ = ["rms_norm", "rms_norm_torch", "rope", "rope_torch", "swiglu", "swiglu_torch"]
