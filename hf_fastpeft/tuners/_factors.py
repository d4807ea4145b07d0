"""What a gated layer keeps by adapter name: its A projections and scalings, which nobody exchanges unnoticed.

PEFT and other libraries rebuild linears where they find them: ``prepare_model_for_compiled_hotswap`` pads A and B to
one rank in new ``nn.Linear`` modules, converters of low-precision training replace every ``nn.Linear``. A plain
linear in place of a gated one drops the gates from the outputs. So ``GatedLinear`` is no ``nn.Linear``, and the two
containers here refuse what would come in its place, whoever tries.
"""

from typing import Any

import torch
from torch import nn

from hf_fastpeft.errors import AdapterError

__all__ = ["GatedFactors", "Scalings"]


class GatedFactors(nn.ModuleDict):
    """``lora_A`` of a gated layer: a module with gates makes room only for another one, or for a wrapper around it."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """``nn.Module.add_module``, and what ``self[name] = module`` runs."""
        self._refuse_plain(name, module)
        super().add_module(name, module)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._refuse_plain(name, value)
        super().__setattr__(name, value)

    def _refuse_plain(self, name: str, module: nn.Module | None) -> None:
        found = self._modules.get(name)
        if found is None or not hasattr(found, "gate") or module is None or hasattr(module, "gate"):
            return
        if any(part is found for part in module.modules()):  # FSDP and the like wrap a module where it is
            return
        raise AdapterError(
            f"replace lora_A[{name!r}], which carries gates, by a {type(module).__module__}."
            f"{type(module).__qualname__}: the gates would be lost, and with them the adapter's outputs; possible: "
            "write the adapter with hf_fastpeft.export_to_lora and convert, pad or swap the plain LoRA adapter."
        )


class Scalings(dict[str, float]):
    """``scaling`` of a gated layer: numbers only, so that preparing it for hot-swapping fails before it begins."""

    def __setitem__(self, name: str, value: float) -> None:
        if isinstance(value, torch.Tensor):
            raise AdapterError(
                f"scaling of adapter {name!r} as a tensor, which prepares a LoRA layer for hot-swapping: PEFT pads "
                "and swaps A and B and knows no gates; possible: load_adapter and set_adapter, or "
                "hf_fastpeft.export_to_lora and hot-swapping of the plain LoRA adapter."
            )
        super().__setitem__(name, value)
