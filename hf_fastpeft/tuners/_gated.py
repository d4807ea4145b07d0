"""What gated methods share: a LoRA layer whose A projection ends in a gate per rank, and the tuner that makes it.

    y = x Wᵀ + scaling * ((dropout(x) Aᵀ) * g) Bᵀ        g = scale * gamma, gamma trained in float32

The gate lives inside ``lora_A[adapter]``: every PEFT backend computes ``lora_B(lora_A(dropout(x)))``, so only the
delta weight needs overriding. Shapes: A (r, in), B (out, r), gamma and g (r,). A method supplies a configuration, a
``GateRuntime`` and layer classes.
"""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_fastpeft.errors import AdapterError
from hf_fastpeft.tuners._factors import GatedFactors, Scalings

__all__ = [
    "Gate",
    "GateRuntime",
    "GatedLayer",
    "GatedLinear",
    "GatedModel",
    "Repacked4bit",
    "full_tensor",
    "kept_ranks",
    "unpack_4bit",
]

HALF = (torch.float16, torch.bfloat16)
_PEFT_PREFIX = "base_model.model."
_GATE_KEY = ".gate.weight"


@dataclass
class GateRuntime(ABC):
    """What the gates of one adapter in one model share: their configuration, and whether a callback acts on them."""

    method: ClassVar[str]  # as people write it
    missing: ClassVar[str]  # what does not happen, and which callback it takes

    config: Any
    pruned_by_callback: bool = False
    has_warned: bool = False

    @property
    @abstractmethod
    def scale(self) -> float:
        """Fixed factor of the gates."""

    @abstractmethod
    def start(self, r: int) -> torch.Tensor:
        """Effective gates at the start, shape ``(r,)``, float32."""

    def warn(self) -> None:
        """Say once per adapter and model that gates train but nothing prunes them."""
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(f"{self.method}: {self.missing}", UserWarning, stacklevel=2)


class Gate(nn.Module):
    """One gate per rank, ``g = scale * weight``; the weight is float32 whatever the dtype of A, B and the model.

    In bfloat16 a gate at 1.0 cannot move by less than 0.004: an optimizer's step of 2e-4 and the pressure on it, half
    as large, would both be lost, and no gate would ever leave its start. So ``autocast_adapter_dtype=False`` and
    ``model.to(dtype)`` act on A and B only, where PEFT's LoRA takes whatever dtype it is given. r numbers a layer.
    """

    def __init__(self, r: int, runtime: GateRuntime) -> None:
        super().__init__()
        self.scale = float(runtime.scale)
        self.runtime = runtime
        self.weight = nn.Parameter(runtime.start(r) / self.scale)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Gate":
        def keep_float32(t: torch.Tensor) -> torch.Tensor:
            new = fn(t)
            return t.to(device=new.device, dtype=torch.float32) if new.dtype in HALF else new

        return cast("Gate", super()._apply(keep_float32, recurse))  # type: ignore[no-untyped-call]  # nn.Module

    def forward(self) -> torch.Tensor:
        """Effective gate ``g``, shape ``(r,)``, float32 or wider."""
        return self.weight.to(_at_least_float32(self.weight.dtype)) * self.scale

    def extra_repr(self) -> str:
        return f"r={self.weight.numel()}, scale={self.scale}"


class GatedLinear(nn.Module):
    """``(x Aᵀ) * g``, without bias; takes over the weight of the ``nn.Linear`` that PEFT made.

    Not an ``nn.Linear``: whatever replaces those by others would lose the gates.
    """

    weight: nn.Parameter
    gate: Gate

    def __init__(self, linear: nn.Linear, runtime: GateRuntime) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = cast(nn.Parameter, linear.weight)
        self.register_parameter("bias", None)
        self.gate = Gate(linear.out_features, runtime)

    def warn_if_never_pruned(self) -> None:
        """Called by every forward in training, this one's and the fused blocks'."""
        runtime = self.gate.runtime
        if (
            self.training
            and not runtime.pruned_by_callback
            and not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and self.gate.weight.requires_grad
        ):
            runtime.warn()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.warn_if_never_pruned()
        p = F.linear(input, self.weight)
        g: torch.Tensor = self.gate()  # through __call__: wrappers such as FSDP gather the weight there
        return p * g.to(p.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class GatedLayer:
    """Mixin over a PEFT LoRA layer of a linear module; the PEFT class comes second in the bases."""

    config_class: ClassVar[type]
    runtime_class: ClassVar[type[GateRuntime]]

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    scaling: dict[str, float]
    fan_in_fan_out: bool

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter; called by PEFT for each adapter of the layer."""
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"add adapter {adapter_name!r} of type {type(config).__name__}: the layer holds "
                f"{self.runtime_class.method} adapters; one PEFT method per model is possible. Use "
                f"{self.config_class.__name__}, or load the model anew."
            )
        replaced = self.lora_A.pop(adapter_name) if adapter_name in self.lora_A else None
        try:
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[misc]
        except BaseException:
            if replaced is not None:
                self.lora_A[adapter_name] = replaced
            raise
        self.add_gate(adapter_name, self.runtime_class(config))

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        """None: no LoRA variant has a gated form, and the configuration has refused them."""

    def add_gate(self, adapter_name: str, runtime: GateRuntime) -> None:
        """Put a gate behind the A projection of an adapter that PEFT has just created."""
        layer: Any = self
        if not isinstance(self.lora_A, GatedFactors):
            self.lora_A, self.scaling = GatedFactors(dict(self.lora_A.items())), Scalings(self.scaling)
        self.lora_A[adapter_name] = GatedLinear(cast(nn.Linear, self.lora_A[adapter_name]), runtime)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_adapter(layer.active_adapters, inference_mode=runtime.config.inference_mode)

    def gate_values(self, adapter_name: str = "default") -> torch.Tensor:
        """Effective gates ``g`` of an adapter: float32, shape ``(r,)``, detached."""
        g: torch.Tensor = self._gated(adapter_name).gate()
        return g.detach().float()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Weight change of an adapter, shape of the base weight, dtype of B; products at least in float32."""
        a, b = self._gated(adapter), cast(nn.Linear, self.lora_B[adapter])
        dtype = _at_least_float32(b.weight.dtype)
        g: torch.Tensor = a.gate()
        delta = (b.weight.to(dtype) * (g.to(b.weight.device, dtype) * self.scaling[adapter])) @ a.weight.to(dtype)
        return (delta.T if self.fan_in_fan_out else delta).to(b.weight.dtype)

    def _gated(self, adapter_name: str) -> GatedLinear:
        if adapter_name not in self.lora_A:
            raise KeyError(f"adapter {adapter_name!r}: not in this layer; found: {sorted(self.lora_A.keys())}")
        return cast(GatedLinear, self.lora_A[adapter_name])


class Repacked4bit:
    """Mixin before PEFT's ``Linear4bit``: training and merging find the weight in the layout they expect.

    See :func:`unpack_4bit`; PEFT's merge dequantises packed bytes as if they were not (relative error 1.4).
    """

    def train(self, mode: bool = True) -> Any:
        """``nn.Module.train``, after which the weight can be trained through."""
        if mode:
            unpack_4bit(cast(nn.Module, self))
        return super().train(mode)  # type: ignore[misc]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight, which is quantised anew."""
        unpack_4bit(cast(nn.Module, self))
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def unmerge(self, *args: Any, **kwargs: Any) -> None:
        """Take merged adapters out of the base weight, which is quantised anew."""
        unpack_4bit(cast(nn.Module, self))
        super().unmerge(*args, **kwargs)  # type: ignore[misc]


def unpack_4bit(model: nn.Module) -> None:
    """Put 4-bit weights that bitsandbytes packed for a CPU back into the layout for training and merging.

    bitsandbytes 0.50 packs a weight at its first forward in evaluation mode, on a CPU with AVX512-BF16. A product with
    a packed weight has no gradient, so what is trained in front of it gets a wrong one, with a warning only. Scales
    come back rounded to bfloat16.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # undoes it


class GatedModel(lora.LoraModel):
    """PEFT's LoRA tuner with gated layers, found through PEFT's own dispatch; made by ``peft.get_peft_model``."""

    layer_class: ClassVar[type[GatedLayer]]  # base of all layers of the method

    @classmethod
    def layer_over(cls, peft_class: str) -> type[nn.Module] | None:
        """The method's layer in place of PEFT's class of that name: Linear, Linear4bit or Linear8bitLt."""
        raise NotImplementedError

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        method = self.layer_class.runtime_class.method
        if adapter_name == "gate":
            raise ValueError(f"adapter_name='gate': {method}'s own tensors carry that name; choose another")
        if isinstance(target, BaseTunerLayer) and not isinstance(target, self.layer_class):
            raise TypeError(
                f"add {method} adapter {adapter_name!r} to {current_key!r}: the module is already a "
                f"{type(target).__module__}.{type(target).__qualname__}; one PEFT method per model is possible. "
                "Load the model anew."
            )
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        gated = getattr(parent, target_name).lora_A[adapter_name]
        if isinstance(gated, GatedLinear):
            gated.gate.runtime = self._runtime(adapter_name, lora_config)

    def _runtime(self, adapter_name: str, config: Any) -> GateRuntime:
        # One per adapter of this model; a config may serve several models, so it cannot hold the state itself.
        runtimes: dict[str, GateRuntime] = self.__dict__.setdefault("_gate_runtimes", {})
        if adapter_name not in runtimes or runtimes[adapter_name].config is not config:
            runtimes[adapter_name] = self.layer_class.runtime_class(config)
        return runtimes[adapter_name]

    @classmethod
    def _create_new_module(cls, lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        refusal = TypeError(
            f"{cls.layer_class.runtime_class.method} on {kwargs.get('target_name')!r}: the module is a "
            f"{type(base).__module__}.{type(base).__qualname__}; possible: torch.nn.Linear, transformers Conv1D, and "
            "bitsandbytes Linear4bit and Linear8bitLt. Leave it out with target_modules or exclude_modules."
        )
        if isinstance(base, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)):
            raise refusal
        plain = copy.copy(lora_config)
        plain.__class__ = LoraConfig  # PEFT's layers refuse the method's own
        module = lora.LoraModel._create_new_module(plain, adapter_name, target, **kwargs)
        known = type(module) is lora.Linear or type(module).__module__ == "peft.tuners.lora.bnb"
        layer_cls = cls.layer_over(type(module).__name__) if known else None
        if layer_cls is None:
            raise refusal
        # PEFT's dispatch picked and built the layer with all its arguments; only its class and its gate are ours.
        module.__class__ = layer_cls
        module.add_gate(adapter_name, cls.layer_class.runtime_class(lora_config))
        return module  # type: ignore[no-any-return]

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible: PEFT weighs A and B, of one adapter too, and starts the new adapter's gates afresh."""
        raise AdapterError(
            f"add_weighted_adapter: PEFT computes the new adapter from A and B alone, also from a single adapter, and "
            f"knows no gates of {self.layer_class.runtime_class.method}. Write each adapter with "
            "hf_fastpeft.export_to_lora, where gates are part of A, and combine the plain LoRA adapters; to weigh a "
            "single adapter, set_scale of its layers."
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        own: dict[str, torch.Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        # PEFT writes the config right after it asked for the tensors: the one place where both are at hand.
        suffix = f".lora_A.{adapter_name}{_GATE_KEY}"
        kept = {
            key.removeprefix(_PEFT_PREFIX).removesuffix(suffix): int(torch.count_nonzero(tensor))
            for key, tensor in own.items()
            if key.endswith(suffix) and not tensor.is_meta
        }
        config.kept_ranks = kept or None
        return own

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        suffix = f".lora_A.{adapter_name}{_GATE_KEY}"
        if key.endswith(suffix):
            return key.removesuffix(suffix) + f".lora_A{_GATE_KEY}"
        return super()._remove_adapter_name_from_key(key, adapter_name)  # type: ignore[no-any-return]

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise AdapterError(
            f"path_initial_model_for_weight_conversion: {cls.layer_class.runtime_class.method} never changes the base "
            "weights, so there is nothing to convert; leave the argument out, or use hf_fastpeft.export_to_lora."
        )


def kept_ranks(model: nn.Module, adapter_name: str = "default") -> dict[str, tuple[int, int]]:
    """Ranks left in each gated layer (SoRA, adaptive LoRA).

    Args:
        model: a ``PeftModel``, a transformers model after ``add_adapter``, or any module that holds gated layers.
        adapter_name: the adapter to count.

    Returns:
        Path of each layer in ``model`` -> (gates that are not zero, gates in all); empty if there is none.
        One host synchronisation.
    """
    paths, counts, totals = [], [], []
    for path, module in model.named_modules():
        if isinstance(module, GatedLayer) and adapter_name in module.lora_A:
            weight = full_tensor(module._gated(adapter_name).gate.weight.detach())
            paths.append(path)
            counts.append(torch.count_nonzero(weight))
            totals.append(weight.numel())
    if not paths:
        return {}
    device = counts[0].device
    kept = torch.stack([count.to(device, non_blocking=True) for count in counts]).tolist()
    return {path: (n, total) for path, n, total in zip(paths, kept, totals, strict=True)}


def full_tensor(t: torch.Tensor) -> torch.Tensor:
    """``t`` itself, or all of it where it is one shard of a distributed tensor."""
    return cast(torch.Tensor, t.full_tensor()) if hasattr(t, "full_tensor") else t


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
