"""How the fused blocks read PEFT's own ``SVDLinear``; ours are gated layers like SoRA's.

    y = x Wᵀ + b + s ((drop(x) Aᵀ) * E) Bᵀ        PEFT's: s = lora_alpha / (ranknum + 1e-5)

Shapes: A (r, in), B (out, r), E (r, 1).
"""

import warnings
from typing import Any

import torch
from peft.tuners.adalora import SVDLinear
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from hf_fastpeft.lowrank import LowRank, is_plain, read_base
from hf_fastpeft.watch import Watch, waits

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


def read_svd_linear(layer: Any, watch: Watch) -> LowRank | str:
    """The record of PEFT's ``SVDLinear`` in its current state, or the reason why it must run stock."""
    if torch.compiler.is_compiling():  # a graph would break where the divisor is read from the device
        return "AdaLoRA inside torch.compile"
    found = read_base(layer, watch, "_parameters")
    if isinstance(found, str):
        return found
    plain, active = found
    if active is None:
        return plain
    name = active.name
    A, B, E, ranknum = (
        watch.parameter(watch.child(layer, part), name) for part in ("lora_A", "lora_B", "lora_E", "ranknum")
    )
    if not (is_plain(A) and is_plain(B) and is_plain(E)):
        return f"lora_A, lora_B, lora_E are {type(A).__name__}, {type(B).__name__}, {type(E).__name__}"
    if A.is_meta or B.is_meta or E.is_meta:
        return "adapter is on the meta device"
    if ranknum.requires_grad:  # optimizers may write to it and leave no version
        return "ranknum is being trained (PEFT 0.21, base not float32 on the CPU; AdaLoraCallback stops it)"
    if not A.shape[0]:
        return plain  # all ranks are cut
    if not A.dtype == B.dtype == E.dtype:
        return f"lora_A, lora_B, lora_E are {A.dtype}, {B.dtype}, {E.dtype}"
    alpha, divisor = watch.entry(layer, "scaling", name), _divisor(ranknum)
    if not isinstance(alpha, (int, float)) or isinstance(divisor, str):
        return divisor if isinstance(divisor, str) else "scaling is a tensor"
    watch.version(ranknum)
    watch.data(ranknum)
    watch.number(ranknum)
    if not _warned and layer not in allocated:
        if layer.training and E.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _warn_of_no_callback()
        watch.volatile = True  # until a callback is there or has been asked for
    return LowRank(plain.weight, plain.bias, A, B, E, None, alpha / divisor, 1.0, active.dropout)


def _warn_of_no_callback() -> None:
    message = (
        "AdaLoRA: ranks are not being allocated: the model is in training and no AdaLoraCallback acts on it. "
        "Pass callbacks=[hf_fastpeft.AdaLoraCallback()] to the trainer."
    )
    _warned.add(message)
    warnings.warn(message, UserWarning, stacklevel=3)


@torch.no_grad()
def _divisor(ranknum: torch.Tensor) -> float | str:
    """``ranknum + 1e-5`` in the dtype of ``ranknum``, as the layer adds it; read from a GPU once a version."""
    if isinstance(ranknum, FakeTensor) or ranknum.is_meta:
        return "ranknum has no value (trace or meta device)"
    version = None if ranknum.is_inference() else ranknum._version
    known = _DIVISORS.get(ranknum)
    if known is not None and known[:2] == (version, ranknum.dtype) and waits(ranknum):
        return known[2]  # type: ignore[no-any-return]  # a float, set below
    value = float((ranknum.detach() + _EPSILON).item())
    if version is not None and waits(ranknum):
        _DIVISORS[ranknum] = (version, ranknum.dtype, value)
    return value


def register_readers() -> None:
    """Teach the fused blocks this folder's layers."""
    from hf_fastpeft.lowrank import register_reader
    from hf_fastpeft.tuners._gated_reader import read_gated_layer
    from hf_fastpeft.tuners.adalora.layer import AdaptiveLoraLinear

    register_reader(SVDLinear, read_svd_linear)
    register_reader(AdaptiveLoraLinear, read_gated_layer)
