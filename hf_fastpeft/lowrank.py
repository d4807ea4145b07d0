"""One record for a linear layer and its adapter, read from any adapter layer at call time.

    y = x Wᵀ + b + s (((drop(x) Aᵀ) * g) Bᵀ + c)

with ``g = gate_scale * gate`` (all ones where a method has no gate) and ``c`` the bias of B (``lora_bias``). LoRA (Hu
et al. 2021, arXiv 2106.09685) and rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) differ in ``s``; SoRA (Ding et al.
2023, arXiv 2311.11696) adds the gate.

A reader returns the record, or the reason, in words for the report, why this module's current state cannot be
expressed by it; the caller then runs the stock module. Readers hold no state: adapters may be added, merged, disabled,
resized or reloaded between two calls.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["LowRank", "compute_dtype", "intercepted", "is_plain", "read", "read_lora_layer", "register_reader"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TENSORS_PER_LINEAR = 6


class LowRank(NamedTuple):
    """A linear layer with at most one low-rank adapter.

    Attributes:
        weight: ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        A: ``(rank, in_features)`` or None without an adapter.
        B: ``(out_features, rank)`` or None without an adapter.
        gate: ``rank`` elements of any shape, or None: the trainable gate before ``gate_scale``.
        lora_bias: the ``c`` of the formula, ``(out_features,)`` or None.
        scaling: the ``s`` of the formula.
        gate_scale: fixed factor of the gate.
        dropout: probability with which an element of the adapter's input is dropped; 0 outside training.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    lora_bias: torch.Tensor | None = None
    scaling: float = 1.0
    gate_scale: float = 1.0
    dropout: float = 0.0

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors in the order an autograd Function takes them."""
        return self.weight, self.bias, self.A, self.B, self.gate, self.lora_bias

    @property
    def rank(self) -> int:
        """0 without an adapter."""
        return 0 if self.A is None else self.A.shape[0]


Reader = Callable[[Any], "LowRank | str"]
READERS: dict[type, Reader] = {}


def register_reader(layer_class: type, reader: Reader) -> None:
    """Teach the fused blocks to read ``layer_class``; matched by exact type, subclasses are not."""
    READERS[layer_class] = reader


# What follows runs for every linear of every call, so it reads modules through their dictionaries: nn.Module's own
# attribute look-up tries the class first and then these same dictionaries.


def read(module: nn.Module) -> LowRank | str:
    """The record of ``module`` in its current state, or the reason why it must run stock."""
    reader = READERS.get(type(module))
    if reader is None:
        kind = type(module)
        return f"unknown layer type {kind.__module__}.{kind.__qualname__}"
    return reader(module)


def intercepted(module: nn.Module) -> str | None:
    """Why bypassing ``module.forward`` would skip somebody else's code, or None. Global hooks are the caller's."""
    state = module.__dict__
    if "forward" in state:
        return f"{type(module).__name__} has a forward of its own (hook or foreign patch)"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return f"hooks on {type(module).__name__}"
    return None


def compute_dtype(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype | None:
    """The dtype stock would multiply in: autocast's where it applies, else that of both; None if they differ."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype(kind)
    return weight.dtype if weight.dtype == x.dtype else None


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a product with ``weight`` is a plain product.

    Exact types: a DTensor, a quantised parameter or another subclass means something else. A FakeTensor stands for a
    plain one in a trace.
    """
    return type(weight) in (nn.Parameter, torch.Tensor, FakeTensor)


def read_linear(module: nn.Module) -> LowRank | str:
    """Reader of a plain ``nn.Linear``: trainable or frozen, with or without bias."""
    parameters = module.__dict__["_parameters"]
    weight = parameters.get("weight")
    if weight is None:  # functional_call and sharding put plain tensors on the module
        weight = module.weight
    if not is_plain(weight):
        return f"weight is a {type(weight).__name__}"
    if weight.is_meta:
        return "weight is on the meta device (offloaded)"
    if weight.dtype not in FLOATS:
        return f"weight is {weight.dtype}"
    return intercepted(module) or LowRank(weight, module.bias)  # type: ignore[arg-type]


def read_lora_layer(layer: Any, factor_class: type[nn.Module]) -> LowRank | str:
    """Reader of a LoRA-family layer over a plain linear.

    Args:
        layer: a PEFT ``LoraLayer``.
        factor_class: exact class that ``lora_A``'s entry must have; ``lora_B``'s is ``nn.Linear``.
    """
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
    factors = modules["lora_A"].__dict__["_modules"]
    active = [name for name in layer.active_adapters if name in factors]
    if not active:
        return plain
    if len(active) > 1:
        return f"{len(active)} active adapters"
    name = active[0]
    if name in layer.lora_variant:
        return f"LoRA variant {type(layer.lora_variant[name]).__name__}"
    dropout = modules["lora_dropout"].__dict__["_modules"][name]
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return f"lora_dropout is {type(dropout).__name__}"
    A, B, scaling = factors[name], modules["lora_B"].__dict__["_modules"][name], layer.scaling[name]
    if type(A) is not factor_class or type(B) is not nn.Linear:
        return f"lora_A is {type(A).__name__}, lora_B is {type(B).__name__}"
    if reason := intercepted(A) or intercepted(B) or intercepted(dropout):
        return reason
    if not isinstance(scaling, (int, float)):
        return "scaling is a tensor"
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    return LowRank(plain.weight, plain.bias, A.weight, B.weight, None, B.bias, float(scaling), 1.0, p)  # type: ignore[arg-type]


register_reader(nn.Linear, read_linear)
register_reader(LoraLinear, lambda layer: read_lora_layer(layer, nn.Linear))
