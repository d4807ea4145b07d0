"""Layers of adaptive LoRA: gated LoRA with AdaLoRA's start (Zhang et al. 2023, arXiv 2303.10512, section 3.1).

    y = x Wᵀ + scaling * ((dropout(x) Aᵀ) * g) Bᵀ        g starts at 0, A and B at N(0, 0.02²)

With g instead of B at zero every component has a direction from the start, and one that was switched off keeps it.
"""

from typing import cast

import torch
from peft.tuners import lora
from torch import nn

from hf_fastpeft.tuners._gated import GatedLayer, GateRuntime
from hf_fastpeft.tuners.adalora.config import AdaptiveLoraConfig

__all__ = ["AdaptiveLoraLayer", "AdaptiveLoraLinear", "AdaptiveLoraRuntime"]

_INIT_STD = 0.02  # AdaLoRA's authors; the paper says Gaussian


class AdaptiveLoraRuntime(GateRuntime):
    """What the gates of one adapter in one model share."""

    method = "adaptive LoRA"
    missing = (
        "ranks are not being allocated: the model is in training and no AdaLoraCallback acts on it. "
        "Pass callbacks=[hf_fastpeft.AdaLoraCallback()] to the trainer."
    )

    @property
    def scale(self) -> float:
        """1: what is trained is the gate."""
        return 1.0

    def start(self, r: int) -> torch.Tensor:
        """Zeros; ones with ``init_lora_weights=False``."""
        return torch.ones(r) if self.config.init_lora_weights is False else torch.zeros(r)


class AdaptiveLoraLayer(GatedLayer):
    """Mixin over a PEFT LoRA layer of a linear module; the PEFT class comes second in the bases."""

    config_class = AdaptiveLoraConfig
    runtime_class = AdaptiveLoraRuntime

    def add_gate(self, adapter_name: str, runtime: GateRuntime) -> None:
        """Put a gate behind the A projection of an adapter that PEFT has just created, and start A and B anew."""
        init = runtime.config.init_lora_weights
        for factors in (self.lora_A, self.lora_B):
            weight = cast(nn.Linear, factors[adapter_name]).weight
            if init is True:
                nn.init.normal_(weight, std=_INIT_STD)
            elif init == "orthogonal" and not weight.is_meta:
                full = torch.empty_like(weight, dtype=torch.float32)
                weight.data.copy_(nn.init.orthogonal_(full))
        super().add_gate(adapter_name, runtime)


class AdaptiveLoraLinear(AdaptiveLoraLayer, lora.Linear):
    """Adaptive LoRA over ``torch.nn.Linear`` or ``transformers.pytorch_utils.Conv1D``."""
