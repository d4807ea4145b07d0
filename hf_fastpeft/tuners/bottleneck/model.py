"""The tuner of bottleneck adapters: puts them on modules that PEFT's own matching finds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn

from hf_fastpeft.errors import AdapterError
from hf_fastpeft.tuners.bottleneck.config import BottleneckAdapterConfig
from hf_fastpeft.tuners.bottleneck.layer import NOT_MERGEABLE, BottleneckLayer
from hf_fastpeft.tuners.bottleneck.targets import DEFAULT_TARGETS, LINEAR_TARGETS, refusal, widths

__all__ = ["BottleneckModel"]


class BottleneckModel(BaseTuner):
    """Wraps the target modules of a model in bottleneck layers; made by ``peft.get_peft_model``."""

    prefix: str = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = DEFAULT_TARGETS

    def _prepare_adapter_config(
        self, peft_config: BottleneckAdapterConfig, model_config: dict[str, Any]
    ) -> BottleneckAdapterConfig:
        if peft_config.target_modules is None:
            kind = model_config.get("model_type")
            asked = f"BottleneckAdapterConfig: target_modules=None for model_type={kind!r}"
            if kind not in DEFAULT_TARGETS:
                raise ValueError(
                    f"{asked}: no default; known: {', '.join(sorted(DEFAULT_TARGETS))}. Name the modules whose output "
                    "goes into a residual, such as ['self_attn', 'mlp'] or ['output.dense']."
                )
            if peft_config.mode == "parallel" and kind in LINEAR_TARGETS:
                raise ValueError(
                    f"{asked}, mode='parallel': its attention and feed-forward are not one module each before their "
                    f"residual; possible: mode='sequential' (on {', '.join(DEFAULT_TARGETS[kind])}), or target_modules"
                )
            peft_config.target_modules = list(DEFAULT_TARGETS[kind])
        return peft_config

    def _prepare_model(self, peft_config: BottleneckAdapterConfig, model: nn.Module) -> None:
        """Refuse targets inside a wrapped module: PEFT passes over them without a word."""
        wrapped = [path for path, module in model.named_modules() if isinstance(module, BottleneckLayer)]
        for path, _ in model.named_modules():
            outer = next((w for w in wrapped if path.startswith(f"{w}.base_layer.")), None)
            plain = path.replace(".base_layer", "")
            if outer is not None and check_target_module_exists(peft_config, plain):
                raise _inside(plain, outer)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Ours are in ``refusal``, with the reason."""

    def _create_and_replace(
        self,
        peft_config: BottleneckAdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.add_adapter(adapter_name, peft_config)
            return
        for outer in _ancestors(current_key):
            if isinstance(self.model.get_submodule(outer), BottleneckLayer):
                raise _inside(current_key, outer)
        asked = f"bottleneck adapter {adapter_name!r} on {current_key!r}"
        if reason := refusal(target, parent):
            raise TypeError(
                f"{asked}: {reason}; possible: one PEFT method per model, on linears, and on blocks that return a "
                "tensor or a tuple that starts with one. Leave it out with target_modules or exclude_modules."
            )
        found = widths(target, self.model, peft_config.hidden_size)
        if isinstance(found, str):
            raise ValueError(f"{asked}: {found}; possible: hidden_size=... in the configuration")
        layer = BottleneckLayer(target, *found, current_key)
        layer.training = target.training
        layer.add_adapter(adapter_name, peft_config)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also hands over a weight, which a block does not have
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> NoReturn:
        raise AdapterError(f"merge bottleneck adapters {list(self.peft_config)}: {NOT_MERGEABLE}")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops the argument in silence for methods that do not read it
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={kwargs['adapter_names']!r}: bottleneck adapters act on whole batches; possible: "
                "set_adapter and one batch per adapter"
            )
        yield


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _inside(path: str, outer: str) -> ValueError:
    return ValueError(
        f"bottleneck adapter on {path!r}: it lies inside {outer!r}, which carries an adapter itself, and PEFT neither "
        "loads nor unloads nested ones; possible: one of the two in target_modules"
    )
