"""Elementwise operators, one file each: torch reference, Triton kernels, autograd Function, public function."""

from hf_fastpeft.ops.glu import geglu, geglu_torch, swiglu, swiglu_torch
from hf_fastpeft.ops.rms_norm import Norm, rms_norm, rms_norm_torch
from hf_fastpeft.ops.rope import rope, rope_torch

__all__ = [
    "Norm",
    "geglu",
    "geglu_torch",
    "rms_norm",
    "rms_norm_torch",
    "rope",
    "rope_torch",
    "swiglu",
    "swiglu_torch",
]
