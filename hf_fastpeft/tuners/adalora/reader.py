"""How the fused blocks read PEFT's own ``SVDLinear``; ours are gated layers like SoRA's.

    y = x Wᵀ + b + s ((drop(x) Aᵀ) * E) Bᵀ        PEFT's: s = lora_alpha / (ranknum + 1e-5)

Shapes: A (r, in), B (out, r), E (r, 1).
"""

import warnings
from typing import Any

import torch
from peft.tuners.adalora import SVDLinear
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from hf_fastpeft.lowrank import LowRank, intercepted, is_plain, read_linear

__all__ = ["allocated", "read_svd_linear", "register_readers"]

_EPSILON = 1e-5  # PEFT's, beside ranknum

# ranknum is a tensor on the layer's device, so reading it would make every call wait for a GPU. Its value is kept per
# tensor object, with the version and dtype it was read at: `copy_`, `fill_` and loading a state dict raise the
# version, `Module.to` changes the dtype, a resize makes a new tensor. A write past autograd (`ranknum.data.fill_`) to
# a tensor that was read before is not seen; PEFT does that to new tensors only.
_DIVISORS: Any = WeakTensorKeyDictionary()


# Layers of PEFT's that a callback has acted on. They know neither their model nor their configuration, so one that has
# none is told of once a process.
allocated: Any = WeakIdKeyDictionary()
_warned: set[str] = set()


def read_svd_linear(layer: Any) -> LowRank | str:
    """The record of PEFT's ``SVDLinear`` in its current state, or the reason why it must run stock."""
    modules = layer.__dict__["_modules"]
    if layer.merged_adapters:
        return "adapter merged"
    if reason := intercepted(layer):
        return reason
    base = modules["base_layer"]
    if type(base) is not nn.Linear:
        return f"base layer is {type(base).__name__}"
    plain = read_linear(base)
    if isinstance(plain, str) or layer.disable_adapters:
        return plain  # stock with disabled adapters is its base layer
    if layer.fan_in_fan_out or not layer.cast_input_dtype_enabled:
        return "fan_in_fan_out or input casting switched off"
    factors = modules["lora_A"].__dict__["_parameters"]
    active = [name for name in layer.active_adapters if name in factors]
    if not active:
        return plain
    if len(active) > 1:
        return f"{len(active)} active adapters"
    name = active[0]
    dropout = modules["lora_dropout"].__dict__["_modules"][name]
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"lora_dropout is {type(dropout).__name__}"
    if reason := intercepted(dropout):
        return reason
    A, B, E = factors[name], layer.lora_B[name], layer.lora_E[name]
    if not (is_plain(A) and is_plain(B) and is_plain(E)):
        return f"lora_A, lora_B, lora_E are {type(A).__name__}, {type(B).__name__}, {type(E).__name__}"
    if A.is_meta or B.is_meta or E.is_meta:
        return "adapter is on the meta device"
    if not A.shape[0]:
        return plain  # all ranks are cut
    if not A.dtype == B.dtype == E.dtype:
        return f"lora_A, lora_B, lora_E are {A.dtype}, {B.dtype}, {E.dtype}"
    ranknum = layer.ranknum[name]
    if ranknum.requires_grad and torch.is_grad_enabled():
        return (
            "ranknum is being trained (PEFT 0.21, where the base is not float32 on the CPU; AdaLoraCallback stops it)"
        )
    alpha, divisor = layer.scaling[name], _divisor(ranknum)
    if not isinstance(alpha, (int, float)) or isinstance(divisor, str):
        return divisor if isinstance(divisor, str) else "scaling is a tensor"
    if (
        layer.training
        and E.requires_grad
        and not _warned
        and layer not in allocated
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    ):
        _warn_of_no_callback()
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return LowRank(plain.weight, plain.bias, A, B, E, None, alpha / divisor, 1.0, p)


def _warn_of_no_callback() -> None:
    message = (
        "AdaLoRA: ranks are not being allocated: the model is in training and no AdaLoraCallback acts on it. "
        "Pass callbacks=[hf_fastpeft.AdaLoraCallback()] to the trainer."
    )
    _warned.add(message)
    warnings.warn(message, UserWarning, stacklevel=3)


@torch.no_grad()
def _divisor(ranknum: torch.Tensor) -> float | str:
    """``ranknum + 1e-5`` in the dtype of ``ranknum``, as the layer adds it; read from the device at most once."""
    if isinstance(ranknum, FakeTensor) or ranknum.is_meta:
        return "ranknum has no value (trace or meta device)"
    version = None if ranknum.is_inference() else ranknum._version
    known = _DIVISORS.get(ranknum)
    if known is not None and known[:2] == (version, ranknum.dtype):
        return known[2]  # type: ignore[no-any-return]  # a float, set below
    value = float((ranknum.detach() + _EPSILON).item())
    if version is not None:
        _DIVISORS[ranknum] = (version, ranknum.dtype, value)
    return value


def register_readers() -> None:
    """Teach the fused blocks this folder's layers."""
    from hf_fastpeft.lowrank import register_reader
    from hf_fastpeft.tuners._gated_reader import read_gated_layer
    from hf_fastpeft.tuners.adalora.layer import AdaptiveLoraLinear

    register_reader(SVDLinear, read_svd_linear)
    register_reader(AdaptiveLoraLinear, read_gated_layer)
