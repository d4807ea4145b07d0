"""How the fused blocks read a gated layer (SoRA, adaptive LoRA): a LoRA record with its one active adapter's gate."""

from typing import Any

from hf_fastpeft.hooks import intercepted
from hf_fastpeft.lowrank import LowRank, read_lora_layer
from hf_fastpeft.tuners._gated import GatedLinear
from hf_fastpeft.watch import Watch

__all__ = ["read_gated_layer"]


def read_gated_layer(layer: Any, watch: Watch) -> LowRank | str:
    """The record of a layer whose A is a ``GatedLinear``, in its current state, or why it must run stock."""
    record = read_lora_layer(layer, watch, GatedLinear)
    if isinstance(record, str) or record.A is None:
        return record
    (name,) = (name for name in layer.active_adapters if name in layer.lora_A)
    gated: GatedLinear = layer.lora_A[name]
    gate = watch.child(gated, "gate")
    if reason := intercepted(gate, watch):
        return reason
    if not gate.runtime.pruned_by_callback and not gate.runtime.has_warned:
        gated.warn_if_never_pruned()
        watch.volatile = True  # until a callback is there or has been asked for
    weight = watch.parameter(gate, "weight")
    if weight is None:
        weight, watch.volatile = gate.weight, True
    return record._replace(gate=weight, gate_scale=watch.attribute(gate, "scale"))
