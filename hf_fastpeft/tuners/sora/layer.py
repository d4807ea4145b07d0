"""SoRA's layers: a LoRA layer whose A projection ends in a gate per rank (Ding et al. 2023, arXiv 2311.11696, eq. 4).

    y = x Wᵀ + scaling * ((dropout(x) Aᵀ) * g) Bᵀ        g = scale * gamma, gamma trained in float32

The gate lives inside ``lora_A[adapter]``: every PEFT backend computes ``lora_B(lora_A(dropout(x)))``, so only the
delta weight needs overriding. Shapes: A (r, in), B (out, r), gamma and g (r,).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import nn

from hf_fastpeft.tuners.sora.config import SoraConfig

__all__ = ["GatedLinear", "SoraGate", "SoraLayer", "SoraLinear", "SoraRuntime", "kept_ranks"]

_HALF = (torch.float16, torch.bfloat16)


@dataclass
class SoraRuntime:
    """What the gates of one adapter in one model share: their configuration, and whether a callback prunes them."""

    config: SoraConfig
    pruned_by_callback: bool = False
    has_warned: bool = False

    def warn(self) -> None:
        """Say once per adapter and model that gates train but nothing prunes them."""
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(
                "SoRA: gates are not being pruned: the model is in training and no SoraCallback acts on it. "
                "Pass callbacks=[hf_fastpeft.SoraCallback()] to the trainer.",
                UserWarning,
                stacklevel=2,
            )


class SoraGate(nn.Module):
    """One gate per rank, ``g = scale * weight``; the weight stays float32 in a half-precision model.

    In bfloat16 a gate at 1.0 cannot move by less than 0.004 and would never leave its start.
    """

    def __init__(self, r: int, runtime: SoraRuntime) -> None:
        super().__init__()
        self.scale = float(runtime.config.gate_scale)
        self.runtime = runtime
        start = torch.ones(r) if runtime.config.gate_init == "ones" else torch.randn(r)
        self.weight = nn.Parameter(start / self.scale)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "SoraGate":
        def keep_float32(t: torch.Tensor) -> torch.Tensor:
            new = fn(t)
            return t.to(device=new.device, dtype=torch.float32) if new.dtype in _HALF else new

        return cast("SoraGate", super()._apply(keep_float32, recurse))  # type: ignore[no-untyped-call]  # nn.Module

    def forward(self) -> torch.Tensor:
        """Effective gate ``g``, shape ``(r,)``, float32 or wider."""
        return self.weight.to(_at_least_float32(self.weight.dtype)) * self.scale

    def extra_repr(self) -> str:
        return f"r={self.weight.numel()}, scale={self.scale}"


class GatedLinear(nn.Linear):
    """``(x Aᵀ) * g``, without bias; takes over the weight of the ``nn.Linear`` that PEFT made."""

    gate: SoraGate

    def __init__(self, linear: nn.Linear, runtime: SoraRuntime) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", None)
        self.gate = SoraGate(linear.out_features, runtime)

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


class SoraLayer:
    """Mixin over a PEFT LoRA layer of a linear module; the PEFT class comes second in the bases."""

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    scaling: dict[str, float]
    fan_in_fan_out: bool

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter; called by PEFT for each adapter of the layer."""
        if not isinstance(config, SoraConfig):
            raise TypeError(
                f"add adapter {adapter_name!r} of type {type(config).__name__}: the layer holds SoRA adapters; one "
                "PEFT method per model is possible. Use SoraConfig, or load the model anew."
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[misc]
        self.add_gate(adapter_name, SoraRuntime(config))

    def add_gate(self, adapter_name: str, runtime: SoraRuntime) -> None:
        """Put a gate behind the A projection of an adapter that PEFT has just created."""
        layer: Any = self
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


class SoraLinear(SoraLayer, lora.Linear):
    """SoRA over ``torch.nn.Linear`` or ``transformers.pytorch_utils.Conv1D``."""


def kept_ranks(model: nn.Module, adapter_name: str = "default") -> dict[str, tuple[int, int]]:
    """Ranks left in each SoRA layer.

    Args:
        model: a ``PeftModel``, a transformers model after ``add_adapter``, or any module that holds SoRA layers.
        adapter_name: the adapter to count.

    Returns:
        Path of each layer in ``model`` -> (gates that are not zero, gates in all); empty if there is none.
        One host synchronisation.
    """
    paths, counts, totals = [], [], []
    for path, module in model.named_modules():
        if isinstance(module, SoraLayer) and adapter_name in module.lora_A:
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
