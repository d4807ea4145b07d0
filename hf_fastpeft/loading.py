"""Loads a saved adapter, of any method PEFT or this package knows, onto its base model."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from hf_fastpeft.errors import AdapterError

__all__ = ["load_adapter"]

_CONFIG_FILE = "adapter_config.json"
_WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def load_adapter(
    path: str | Path, model: nn.Module | None = None, *, base_kwargs: dict[str, Any] | None = None, **kwargs: Any
) -> PeftModel:
    """A base model with the adapter of a folder on it.

    Args:
        path: folder with ``adapter_config.json`` and the adapter's weights.
        model: base model to put the adapter on; None loads the one that the adapter's config names.
        base_kwargs: arguments of the base model's ``from_pretrained``, such as ``dtype`` or ``num_labels``.
        **kwargs: arguments of ``peft.PeftModel.from_pretrained``, such as ``is_trainable`` or ``adapter_name``.

    Returns:
        The ``PeftModel``; in evaluation mode unless ``is_trainable=True``.

    Raises:
        AdapterError: the folder, its config or its weights are missing; its method is not known here; its base model
            is not named or cannot be loaded.
    """
    folder = Path(path)
    config = _read_config(folder)
    if not any((folder / name).is_file() for name in _WEIGHT_FILES):
        raise AdapterError(
            f"load_adapter {str(folder)!r}: no adapter weights; looked for {', '.join(_WEIGHT_FILES)}; "
            f"found: {_listing(folder)}"
        )
    if model is None:
        model = _load_base(folder, config, base_kwargs or {})
    elif base_kwargs is not None:
        raise AdapterError(
            f"load_adapter {str(folder)!r}: got both model and base_kwargs; base_kwargs only acts where the base "
            "model is loaded here. Leave one of them out."
        )
    return PeftModel.from_pretrained(model, str(folder), **kwargs)


def _read_config(folder: Path) -> dict[str, Any]:
    asked = f"load_adapter {str(folder)!r}"
    if not folder.is_dir():
        raise AdapterError(
            f"{asked}: no such folder. A local folder is needed; for an adapter on the Hub download it first with "
            "huggingface_hub.snapshot_download."
        )
    file = folder / _CONFIG_FILE
    if not file.is_file():
        raise AdapterError(f"{asked}: no {_CONFIG_FILE}; found: {_listing(folder)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{asked}: {_CONFIG_FILE} is not JSON: {error}") from error
    known = sorted(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in known:
        raise AdapterError(
            f"{asked}: {_CONFIG_FILE} has peft_type={kind!r}; known: {', '.join(known)}. A method of another package "
            "needs that package imported first."
        )
    return dict(config)


def _load_base(folder: Path, config: dict[str, Any], base_kwargs: dict[str, Any]) -> nn.Module:
    asked = f"load_adapter {str(folder)!r}"
    base = config.get("base_model_name_or_path")
    if not base:
        raise AdapterError(f"{asked}: its config names no base model (base_model_name_or_path={base!r}); pass model=")
    try:
        model: nn.Module = _base_class(asked, config).from_pretrained(
            base, **{"revision": config.get("revision") or "main", **base_kwargs}
        )
    except OSError as error:  # what transformers raises for a model that is neither on disk nor on the Hub
        raise AdapterError(
            f"{asked}: its base model {base!r} cannot be loaded ({str(error).splitlines()[0]}); pass model=, or set "
            "base_model_name_or_path in the adapter's config to where it is"
        ) from error
    return model


def _base_class(asked: str, config: dict[str, Any]) -> Any:
    task, mapping = config.get("task_type"), config.get("auto_mapping") or {}
    if task in _AUTO_CLASSES:
        return getattr(transformers, _AUTO_CLASSES[task])
    name, library = mapping.get("base_model_class"), str(mapping.get("parent_library") or "")
    # A config file may name any module; only transformers' own classes are imported on its word.
    if name and library.split(".")[0] == "transformers":
        return getattr(import_module(library), name)
    raise AdapterError(
        f"{asked}: cannot tell the class of its base model (task_type={task!r}, auto_mapping={mapping!r}); possible "
        f"task types: {', '.join(_AUTO_CLASSES)}. Pass model=."
    )


def _listing(folder: Path) -> str:
    return ", ".join(sorted(entry.name for entry in folder.iterdir())) or "an empty folder"
