"""Writes an adapter as plain LoRA: a folder that PEFT, vLLM and others load without this package.

    A' = g[kept] * A[kept]      B' = s * B[:, kept]      alpha = r

The gate ``g`` is SoRA's, adaptive LoRA's or the E of PEFT's AdaLoRA. Servers read one ``alpha / r`` for every module
and know no gate, so ``s`` goes into B and the gate into A; then ``alpha / r`` is 1 at every rank. Shapes: A (r, in),
B (out, r), g (r,); s a number.
"""

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from hf_fastpeft.errors import AdapterError, RunExistsError
from hf_fastpeft.families import bare_model
from hf_fastpeft.tuners._gated import GatedLinear, full_tensor

__all__ = ["export_to_lora"]

_PREFIX = "base_model.model."
_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")
_CARD_FILE = "README.md"
_CARD_MARK = "library_name: peft"  # in the card of every adapter that PEFT or this package saved
_METHODS = ("LORA", "ADALORA", "ADAPTIVE_LORA", "SORA")
_ADALORA_KINDS = ("SVDLinear", "SVDLinear4bit", "SVDLinear8bitLt", "SVDQuantLinear")  # linear; not SVDConv2d
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_CARD = """---
library_name: peft
---

Plain LoRA adapter, written by `hf_fastpeft.export_to_lora` from a {method} adapter: ranks {ranks} over {modules}
modules. The scaling is part of the weights, so `lora_alpha / r` is 1 for every module.
"""

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def export_to_lora(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> Path:
    """Write an adapter as a plain LoRA folder with the same outputs.

    Ranks whose gate is zero are left out, modules that have none left too; if nothing is left at all, every module
    gets rank 1 of zeros. Modules listed in ``modules_to_save`` go along unchanged. The model is not changed.

    Args:
        model: ``PeftModel``, or a transformers model after ``add_adapter``, with a LoRA, rsLoRA, AdaLoRA, SoRA or
            adaptive LoRA adapter.
        path: folder to write; made if missing.
        adapter_name: the adapter to write.
        dtype: of the written factors; float32 keeps the export exact to rounding.
        overwrite: replace the adapter's files in a folder that is not empty; other files in it stay, and so does a
            README.md that is no adapter's card.

    Returns:
        ``path``.

    Raises:
        AdapterError: no such adapter, or plain LoRA cannot express it; the message names the layers or the setting.
        RunExistsError: the folder is not empty and ``overwrite`` is False.
    """
    config = _exportable_config(model, adapter_name)
    factors = _read_factors(model, adapter_name)
    kept = {name: pair for name, pair in factors.items() if pair[0].shape[0]}
    if not kept:
        kept = {name: (a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1)) for name, (a, b) in factors.items()}
    tensors = {}
    for name, (a, b) in kept.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.to("cpu", dtype).contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.to("cpu", dtype).contiguous()
    tensors |= _other_tensors(model, adapter_name, set(factors))
    plain = _plain_config(model, config, {name: a.shape[0] for name, (a, _) in kept.items()})

    folder = Path(path)
    _prepare_folder(folder, overwrite)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    plain.save_pretrained(str(folder))
    ranks = sorted({a.shape[0] for a, _ in kept.values()})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    card = _CARD.format(method=config.peft_type.value, ranks=span, modules=len(kept))
    if not (folder / _CARD_FILE).exists():
        (folder / _CARD_FILE).write_text(card, encoding="utf-8")
    return folder


def _exportable_config(model: nn.Module, adapter_name: str) -> Any:
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", None) or {}
    asked = f"export_to_lora: adapter {adapter_name!r}"
    if adapter_name not in configs:
        raise AdapterError(f"{asked}: not in the model; found: {', '.join(map(repr, sorted(configs))) or 'none'}")
    config: Any = configs[adapter_name]
    if config.peft_type.value not in _METHODS:
        others = _instead(model, config, adapter_name)
        raise AdapterError(f"{asked} is of type {config.peft_type.value}; possible: {', '.join(_METHODS)}. {others}")
    variants = [
        f.name
        for f in LoraConfig.__dataclass_fields__.values()
        if f.metadata.get("is_lora_variant") and getattr(config, f.name)
    ]
    if variants:
        raise AdapterError(f"{asked}: plain LoRA cannot express {', '.join(variants)}")
    if config.bias != "none" or config.lora_bias:
        raise AdapterError(
            f"{asked}: bias={config.bias!r}, lora_bias={config.lora_bias!r}: servers read no biases; possible: "
            "bias='none', lora_bias=False"
        )
    if str(config.init_lora_weights).lower().startswith(_BASE_CHANGING_INITS):
        raise AdapterError(
            f"{asked}: init_lora_weights={config.init_lora_weights!r} changed the base weights, and this adapter fits "
            "only those; save with path_initial_model_for_weight_conversion of PEFT instead"
        )
    return config


def _instead(model: nn.Module, config: Any, adapter_name: str) -> str:
    """Why an adapter of another method is no LoRA, and what is possible with it."""
    if config.is_prompt_learning:
        return "Virtual tokens are not a change of weights, so no LoRA equals them."
    if config.peft_type.value == "BOTTLENECK":
        return (
            "A bottleneck's nonlinearity is not a change of weights, so no LoRA equals it; keep what save_pretrained "
            "writes and read it with hf_fastpeft.load_adapter."
        )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if all(layer.supports_lora_conversion(adapter_name) for layer in layers):
        return "peft.convert_to_lora approximates it."
    return "merge_and_unload puts it into the base weights."


def _read_factors(model: nn.Module, adapter_name: str) -> Factors:
    """Path of each adapted module in the base model -> (A', B'), float32 or wider."""
    factors, refused = {}, []
    for path, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        name = path.removeprefix(_PREFIX)
        owned = {n for n in layer.adapter_layer_names if adapter_name in (getattr(layer, n, None) or {})}
        if not owned:
            continue
        if type(layer).__name__ in _ADALORA_KINDS and isinstance(layer, AdaLoraLayer):
            factors[name] = _fold_adalora(layer, adapter_name)
            continue
        a = layer.lora_A[adapter_name] if "lora_A" in owned else None
        plain = owned == {"lora_A", "lora_B"} and adapter_name not in layer.lora_variant
        if (
            not plain
            or not isinstance(a, (nn.Linear, GatedLinear))
            or isinstance(layer, (lora.ParamWrapper, AdaLoraLayer))
        ):
            refused.append(f"{name} ({type(layer).__module__}.{type(layer).__name__})")
            continue
        factors[name] = _fold(a, layer.lora_B[adapter_name], layer.scaling[adapter_name])
    if refused:
        raise AdapterError(
            f"export_to_lora: adapter {adapter_name!r}: only linear LoRA, AdaLoRA and SoRA layers can be written; "
            f"found {len(refused)} others: {', '.join(refused[:5])}"
        )
    if not factors:
        raise AdapterError(f"export_to_lora: adapter {adapter_name!r} has no layer in the model")
    return factors


@torch.no_grad()
def _fold(a: nn.Linear | GatedLinear, b: nn.Linear, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    weight_a, weight_b = full_tensor(a.weight.detach()), full_tensor(b.weight.detach())
    dtype = torch.promote_types(weight_a.dtype, torch.float32)
    weight_a, weight_b = weight_a.to(dtype), weight_b.to(dtype) * scaling
    if not isinstance(a, GatedLinear):
        return weight_a, weight_b
    gate = full_tensor(a.gate.weight.detach()).to(weight_a.device, dtype) * a.gate.scale
    return _cut(weight_a, weight_b, gate)


@torch.no_grad()
def _fold_adalora(layer: Any, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a layer of PEFT's AdaLoRA, which multiplies by ``lora_alpha / (ranknum + 1e-5)``."""
    weight_a, weight_b, gate = (getattr(layer, n)[adapter_name].detach() for n in ("lora_A", "lora_B", "lora_E"))
    dtype = torch.promote_types(weight_a.dtype, torch.float32)
    scaling = layer.scaling[adapter_name] / (layer.ranknum[adapter_name] + 1e-5).to(weight_b.device, dtype)
    return _cut(weight_a.to(dtype), weight_b.to(dtype) * scaling, gate.flatten().to(dtype))


def _cut(weight_a: torch.Tensor, weight_b: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kept = gate.nonzero().squeeze(1)
    return weight_a[kept] * gate[kept, None], weight_b[:, kept.to(weight_b.device)]


def _other_tensors(model: nn.Module, adapter_name: str, adapted: set[str]) -> dict[str, torch.Tensor]:
    """What PEFT saves beside the factors: modules_to_save, trained tokens, resized embeddings."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=adapter_name)
    others = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name.partition(".lora_")[0] not in adapted:
            others[_PREFIX + name] = tensor.detach().to("cpu").contiguous().clone()
    return others


def _plain_config(model: nn.Module, config: Any, ranks: dict[str, int]) -> LoraConfig:
    top = max(ranks.values())
    smaller = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != top}
    return LoraConfig(
        r=top,
        lora_alpha=top,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        target_modules=_target_modules(model, ranks),
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        layer_replication=config.layer_replication,
        fan_in_fan_out=config.fan_in_fan_out,
        lora_dropout=config.lora_dropout,
        base_model_name_or_path=config.base_model_name_or_path
        or getattr(bare_model(model), "name_or_path", None)
        or None,
        revision=config.revision,
        task_type=config.task_type,
        auto_mapping=_auto_mapping(model, config),
        inference_mode=True,
    )


def _target_modules(model: nn.Module, ranks: dict[str, int]) -> list[str] | str:
    """Full paths; as a regular expression where a path also ends the path of a module that is left out."""
    paths = sorted(ranks)
    names = {path.removeprefix(_PREFIX) for path, _ in model.named_modules()}
    if any(name not in ranks and name.endswith(tuple(f".{path}" for path in paths)) for name in names):
        return "|".join(re.escape(path) for path in paths)
    return paths


def _auto_mapping(model: nn.Module, config: Any) -> dict[str, str] | None:
    if config.task_type is not None or config.auto_mapping:
        return config.auto_mapping  # type: ignore[no-any-return]  # from PEFT's config
    base = type(bare_model(model))
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def _prepare_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunExistsError(f"export_to_lora {str(folder)!r}: is a file; a folder is needed")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise RunExistsError(
                f"export_to_lora {str(folder)!r}: the folder is not empty; choose another or pass overwrite=True"
            )
        card = folder / _CARD_FILE
        is_card = card.is_file() and _CARD_MARK in card.read_text(encoding="utf-8", errors="replace")
        for name in (*_FILES, *([_CARD_FILE] if is_card else [])):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
