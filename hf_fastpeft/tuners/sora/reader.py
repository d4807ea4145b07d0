"""How the fused blocks read a SoRA layer: a LoRA layer's record with the gate of its one active adapter."""

from typing import Any

from hf_fastpeft.lowrank import LowRank, intercepted, read_lora_layer
from hf_fastpeft.tuners.sora.layer import GatedLinear

__all__ = ["read_sora_layer"]


def read_sora_layer(layer: Any) -> LowRank | str:
    """The record of a ``SoraLinear`` in its current state, or the reason why it must run stock."""
    record = read_lora_layer(layer, GatedLinear)
    if isinstance(record, str) or record.A is None:
        return record
    (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
    gated: GatedLinear = layer.lora_A[name]
    if reason := intercepted(gated.gate):
        return reason
    gated.warn_if_never_pruned()
    return record._replace(gate=gated.gate.weight, gate_scale=gated.gate.scale)
