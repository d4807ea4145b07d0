"""How the fused blocks read a gated layer (SoRA, adaptive LoRA): a LoRA record with its one active adapter's gate."""

from typing import Any

from hf_fastpeft.lowrank import LowRank, intercepted, read_lora_layer
from hf_fastpeft.tuners._gated import GatedLinear

__all__ = ["read_gated_layer"]


def read_gated_layer(layer: Any) -> LowRank | str:
    """The record of a layer whose A is a ``GatedLinear``, in its current state, or why it must run stock."""
    record = read_lora_layer(layer, GatedLinear)
    if isinstance(record, str) or record.A is None:
        return record
    (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
    gated: GatedLinear = layer.lora_A[name]
    if reason := intercepted(gated.gate):
        return reason
    gated.warn_if_never_pruned()
    return record._replace(gate=gated.gate.weight, gate_scale=gated.gate.scale)
