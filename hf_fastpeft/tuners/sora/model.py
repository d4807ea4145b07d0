"""SoRA's tuner: PEFT's LoRA tuner with gated layers, found through PEFT's own dispatch."""

from typing import Any, NoReturn

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_fastpeft.errors import AdapterError
from hf_fastpeft.tuners.sora.config import SoraConfig
from hf_fastpeft.tuners.sora.layer import GatedLinear, SoraLayer, SoraLinear, SoraRuntime

__all__ = ["SoraModel"]

_PEFT_PREFIX = "base_model.model."
_GATE_KEY = ".gate.weight"


class SoraModel(lora.LoraModel):
    """Wraps the target modules of a model in SoRA layers; made by ``peft.get_peft_model``."""

    def _create_and_replace(
        self,
        lora_config: SoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if adapter_name == "gate":
            raise ValueError("adapter_name='gate': SoRA's own tensors carry that name; choose another")
        if isinstance(target, BaseTunerLayer) and not isinstance(target, SoraLayer):
            raise TypeError(
                f"add SoRA adapter {adapter_name!r} to {current_key!r}: the module is already a "
                f"{type(target).__module__}.{type(target).__qualname__}; one PEFT method per model is possible. "
                "Load the model anew."
            )
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        gated = getattr(parent, target_name).lora_A[adapter_name]
        if isinstance(gated, GatedLinear):
            gated.gate.runtime = self._runtime(adapter_name, lora_config)

    def _runtime(self, adapter_name: str, config: SoraConfig) -> SoraRuntime:
        # One per adapter of this model; a config may serve several models, so it cannot hold the state itself.
        runtimes: dict[str, SoraRuntime] = self.__dict__.setdefault("_sora_runtimes", {})
        if adapter_name not in runtimes or runtimes[adapter_name].config is not config:
            runtimes[adapter_name] = SoraRuntime(config)
        return runtimes[adapter_name]

    @staticmethod
    def _create_new_module(lora_config: SoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        refusal = TypeError(
            f"SoRA on {kwargs.get('target_name')!r}: the module is a {type(base).__module__}."
            f"{type(base).__qualname__}; possible: torch.nn.Linear, transformers Conv1D, and bitsandbytes Linear4bit "
            "and Linear8bitLt. Leave it out with target_modules or exclude_modules."
        )
        if isinstance(base, (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)):
            raise refusal
        module = lora.LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        layer_cls = _gated_class(module)
        if layer_cls is None:
            raise refusal
        # PEFT's dispatch picked and built the layer with all its arguments; only its class and its gate are ours.
        module.__class__ = layer_cls
        module.add_gate(adapter_name, SoraRuntime(lora_config))
        return module  # type: ignore[no-any-return]

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible: a combination of A and B matrices has no gates of its own."""
        raise AdapterError(
            "add_weighted_adapter: gates of several SoRA adapters cannot be combined. Write each with "
            "hf_fastpeft.export_to_lora and combine the plain LoRA adapters."
        )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SoraConfig,
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
            "path_initial_model_for_weight_conversion: SoRA never changes the base weights, so there is nothing to "
            "convert; leave the argument out, or use hf_fastpeft.export_to_lora."
        )


def _gated_class(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is lora.Linear:
        return SoraLinear
    if type(module).__module__ != "peft.tuners.lora.bnb":
        return None
    from hf_fastpeft.tuners.sora import bnb

    gated: dict[str, type[nn.Module]] = {"Linear4bit": bnb.SoraLinear4bit, "Linear8bitLt": bnb.SoraLinear8bitLt}
    return gated.get(type(module).__name__)
