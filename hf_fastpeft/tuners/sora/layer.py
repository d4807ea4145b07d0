"""SoRA's layers: a LoRA layer whose A projection ends in a gate per rank (Ding et al. 2023, arXiv 2311.11696, eq. 4).

y = x Wᵀ + scaling * ((dropout(x) Aᵀ) * g) Bᵀ        g = scale * gamma, gamma trained in float32
"""

import torch
from peft.tuners import lora

from hf_fastpeft.tuners._gated import Gate, GatedLayer, GatedLinear, GateRuntime, full_tensor, kept_ranks
from hf_fastpeft.tuners.sora.config import SoraConfig

__all__ = ["GatedLinear", "SoraGate", "SoraLayer", "SoraLinear", "SoraRuntime", "full_tensor", "kept_ranks"]

SoraGate = Gate


class SoraRuntime(GateRuntime):
    """What the gates of one SoRA adapter in one model share."""

    method = "SoRA"
    missing = (
        "gates are not being pruned: the model is in training and no SoraCallback acts on it. "
        "Pass callbacks=[hf_fastpeft.SoraCallback()] to the trainer."
    )

    @property
    def scale(self) -> float:
        """``gate_scale`` of the configuration."""
        return float(self.config.gate_scale)

    def start(self, r: int) -> torch.Tensor:
        """Ones, or a draw from N(0, 1), as ``gate_init`` says."""
        return torch.ones(r) if self.config.gate_init == "ones" else torch.randn(r)


class SoraLayer(GatedLayer):
    """Mixin over a PEFT LoRA layer of a linear module; the PEFT class comes second in the bases."""

    config_class = SoraConfig
    runtime_class = SoraRuntime


class SoraLinear(SoraLayer, lora.Linear):
    """SoRA over ``torch.nn.Linear`` or ``transformers.pytorch_utils.Conv1D``."""
