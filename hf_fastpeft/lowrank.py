"""One record for a linear layer and its adapter, read from any adapter layer at call time.

    y = x Wᵀ + b + s (((drop(x) Aᵀ) * g) Bᵀ + c)

with ``g = gate_scale * gate`` (all ones where a method has no gate) and ``c`` the bias of B (``lora_bias``). LoRA (Hu
et al. 2021, arXiv 2106.09685) and rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) differ in ``s``; SoRA (Ding et al.
2023, arXiv 2311.11696) adds the gate.

A reader returns the record, or the reason, in words for the report, why this module's current state cannot be
expressed by it; the caller then runs the stock module. Adapters may be added, merged, disabled, resized or reloaded
between two calls: readers look at modules through a :class:`~hf_fastpeft.watch.Watch`, which knows when to read again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from hf_fastpeft.hooks import intercepted
from hf_fastpeft.watch import Watch

__all__ = [
    "TENSORS_PER_LINEAR",
    "LowRank",
    "compute_dtype",
    "is_plain",
    "read",
    "read_base",
    "read_lora_layer",
    "register_reader",
]

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


Reader = Callable[[Any, Watch], "LowRank | str"]
READERS: dict[type, Reader] = {}


def register_reader(layer_class: type, reader: Reader) -> None:
    """Teach the fused blocks to read ``layer_class``; matched by exact type, subclasses are not.

    The reader looks at its layer through the :class:`~hf_fastpeft.watch.Watch` it is given: what it returns is kept
    until something of what it saw there changes.
    """
    READERS[layer_class] = reader


def read(module: nn.Module, watch: Watch | None = None) -> LowRank | str:
    """The record of ``module`` in its current state, or the reason why it must run stock."""
    watch = Watch() if watch is None else watch
    reader = READERS.get(watch.kind(module))
    if reader is None:
        kind = type(module)
        return f"unknown layer type {kind.__module__}.{kind.__qualname__}"
    record = reader(module, watch)
    if not isinstance(record, str):
        for tensor in record.tensors:
            if tensor is not None:
                watch.data(tensor, rows=tensor is record.weight)
    return record


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


def read_linear(module: nn.Module, watch: Watch) -> LowRank | str:
    """Reader of a plain ``nn.Linear``: trainable or frozen, with or without bias."""
    weight = watch.parameter(module, "weight")
    if weight is None:  # functional_call and sharding put plain tensors on the module
        weight, watch.volatile = module.weight, True
    if not is_plain(weight):
        return f"weight is a {type(weight).__name__}"
    if weight.is_meta:
        return "weight is on the meta device (offloaded)"
    if weight.dtype not in FLOATS:
        return f"weight is {weight.dtype}"
    bias = watch.parameter(module, "bias")
    if bias is None and module.bias is not None:
        bias, watch.volatile = module.bias, True
    return intercepted(module, watch) or LowRank(weight, bias)


class Active(NamedTuple):
    """A PEFT layer's one active adapter: its name and the probability of its dropout."""

    name: str
    dropout: float


def read_base(layer: Any, watch: Watch, factors: str = "_modules") -> tuple[LowRank, Active | None] | str:
    """Of a PEFT layer over a plain linear: that linear's record, and the adapter to add if there is any.

    Args:
        layer: a PEFT ``LoraLayer``.
        watch: what looks.
        factors: where ``lora_A`` has what it has of each adapter, ``"_modules"`` or ``"_parameters"``.
    """
    if watch.is_set(layer, "merged_adapters"):
        return "adapter merged"
    if reason := intercepted(layer, watch):
        return reason
    base = watch.child(layer, "base_layer")
    if watch.kind(base) is not nn.Linear:
        return f"base layer is {type(base).__name__}"
    plain = read_linear(base, watch)
    if isinstance(plain, str):
        return plain
    watch.attribute(layer, "_disable_adapters")
    if layer.disable_adapters:
        return plain, None  # stock with disabled adapters is its base layer
    for flag in ("fan_in_fan_out", "cast_input_dtype_enabled"):
        watch.attribute(layer, flag)
    if layer.fan_in_fan_out or not layer.cast_input_dtype_enabled:
        return "fan_in_fan_out or input casting switched off"
    names = watch.attribute(layer, "_active_adapter")
    if isinstance(names, list):
        watch.contents(names)
    lora_A = watch.child(layer, "lora_A")
    active = [name for name in layer.active_adapters if watch.entry(lora_A, factors, name) is not None]
    if not active:
        return plain, None
    if len(active) > 1:
        return f"{len(active)} active adapters"
    (name,) = active
    dropout = watch.child(watch.child(layer, "lora_dropout"), name)
    if watch.kind(dropout) not in (nn.Identity, nn.Dropout):
        return f"lora_dropout is {type(dropout).__name__}"
    if reason := intercepted(dropout, watch):
        return reason
    p, training = watch.attribute(dropout, "p"), watch.attribute(dropout, "training")
    return plain, Active(name, p if training and p is not None else 0.0)


def read_lora_layer(layer: Any, watch: Watch, factor_class: type[nn.Module] = nn.Linear) -> LowRank | str:
    """Reader of a LoRA-family layer over a plain linear.

    Args:
        layer: a PEFT ``LoraLayer``.
        watch: what looks.
        factor_class: exact class that ``lora_A``'s entry must have; ``lora_B``'s is ``nn.Linear``.
    """
    found = read_base(layer, watch)
    if isinstance(found, str):
        return found
    plain, active = found
    if active is None:
        return plain
    name = active.name
    variant = watch.entry(layer, "lora_variant", name)
    if variant is not None:
        return f"LoRA variant {type(variant).__name__}"
    A, B = (watch.child(watch.child(layer, factors), name) for factors in ("lora_A", "lora_B"))
    scaling = watch.entry(layer, "scaling", name)
    if watch.kind(A) is not factor_class or watch.kind(B) is not nn.Linear:
        return f"lora_A is {type(A).__name__}, lora_B is {type(B).__name__}"
    if reason := intercepted(A, watch) or intercepted(B, watch):
        return reason
    if not isinstance(scaling, (int, float)):
        return "scaling is a tensor"
    A_weight, B_weight = watch.parameter(A, "weight"), watch.parameter(B, "weight")
    if A_weight is None or B_weight is None:
        A_weight, B_weight, watch.volatile = A.weight, B.weight, True
    if not (is_plain(A_weight) and is_plain(B_weight)):
        return f"lora_A, lora_B are {type(A_weight).__name__}, {type(B_weight).__name__}"
    watch.parameter(B, "bias")
    return LowRank(plain.weight, plain.bias, A_weight, B_weight, None, B.bias, float(scaling), 1.0, active.dropout)


register_reader(nn.Linear, read_linear)
register_reader(LoraLinear, read_lora_layer)
