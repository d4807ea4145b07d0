"""What each key becomes: arguments of TRL's SFTConfig, PEFT's configs, ``from_pretrained`` and the environment.

`assignments` is the one table: the runner builds its objects from it and ``hf-fastpeft explain`` prints it.
"""

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hf_fastpeft.config.methods import METHODS, OPTIONS
from hf_fastpeft.config.schema import RunConfig

__all__ = ["Assignment", "adapter_config", "arguments", "assignments", "planned_steps", "quantization_config"]

_INITIAL_OVER_TARGET = 1.5  # arXiv 2303.10512, appendix
_ENOUGH_STEPS = 1_000_000  # for checks before the number of steps is known
WARMUP_SHARE, WARMUP_MAX_STEPS = 0.03, 100
# Tracker keys -> the environment variable its Trainer integration reads.
_ENVIRONMENT = {
    "wandb_project": "WANDB_PROJECT",
    "wandb_entity": "WANDB_ENTITY",
    "wandb_run_id": "WANDB_RUN_ID",
    "wandb_watch": "WANDB_WATCH",
    "wandb_log_model": "WANDB_LOG_MODEL",
    "wandb_mode": "WANDB_MODE",
    "mlflow_tracking_uri": "MLFLOW_TRACKING_URI",
    "mlflow_experiment_name": "MLFLOW_EXPERIMENT_NAME",
}


@dataclass(frozen=True)
class Assignment:
    """``key`` of the YAML sets ``argument`` of ``target`` to ``value``."""

    key: str
    target: str
    argument: str
    value: Any


def assignments(config: RunConfig, *, total_steps: int | None = None) -> list[Assignment]:
    """Every argument a run sets, with the key it comes from.

    Args:
        config: the run.
        total_steps: optimizer steps of the run, for the default warm-up; None leaves that default in words.
    """
    rows = [
        ("model_type", "transformers", "model_class", config.model_type),
        ("tokenizer_type", "transformers", "tokenizer_class", config.tokenizer_type),
        ("revision_of_model", "from_pretrained", "revision", config.revision_of_model),
        ("trust_remote_code", "from_pretrained", "trust_remote_code", config.trust_remote_code or None),
        ("attn_implementation", "from_pretrained", "attn_implementation", _attention(config)),
        ("bf16", "from_pretrained", "dtype", _weight_dtype(config)),
        *_adapter_rows(config, total_steps or config.max_steps),
        ("micro_batch_size", "SFTConfig", "per_device_train_batch_size", config.micro_batch_size),
        (
            "eval_batch_size",
            "SFTConfig",
            "per_device_eval_batch_size",
            config.eval_batch_size or config.micro_batch_size,
        ),
        (
            "gradient_accumulation_steps",
            "SFTConfig",
            "gradient_accumulation_steps",
            config.gradient_accumulation_steps,
        ),
        ("num_epochs", "SFTConfig", "num_train_epochs", config.num_epochs),
        ("max_steps", "SFTConfig", "max_steps", config.max_steps or -1),
        ("optimizer", "SFTConfig", "optim", config.optimizer),
        ("lr_scheduler", "SFTConfig", "lr_scheduler_type", config.lr_scheduler),
        ("learning_rate", "SFTConfig", "learning_rate", config.learning_rate),
        _warmup(config, total_steps),
        ("weight_decay", "SFTConfig", "weight_decay", config.weight_decay),
        ("max_grad_norm", "SFTConfig", "max_grad_norm", config.max_grad_norm),
        ("adam_beta1", "SFTConfig", "adam_beta1", config.adam_beta1),
        ("adam_beta2", "SFTConfig", "adam_beta2", config.adam_beta2),
        ("adam_epsilon", "SFTConfig", "adam_epsilon", config.adam_epsilon),
        ("bf16", "SFTConfig", "bf16", _bf16(config)),
        ("fp16", "SFTConfig", "fp16", _fp16(config)),
        ("tf32", "SFTConfig", "tf32", _tf32(config)),
        ("gradient_checkpointing", "SFTConfig", _checkpointing(), config.gradient_checkpointing),
        (
            "gradient_checkpointing_kwargs",
            "SFTConfig",
            f"{_checkpointing()}_kwargs",
            config.gradient_checkpointing_kwargs,
        ),
        ("sequence_len", "SFTConfig", "max_length", config.sequence_len),
        ("sample_packing", "SFTConfig", "packing", config.sample_packing),
        ("eval_sample_packing", "SFTConfig", "eval_packing", config.eval_sample_packing),
        (
            "group_by_length",
            "SFTConfig",
            "train_sampling_strategy",
            "group_by_length" if config.group_by_length else "random",
        ),
        ("logging_steps", "SFTConfig", "logging_steps", config.logging_steps),
        *_interval("eval", config.eval_steps, config.evals_per_epoch, config.num_epochs),
        *_interval("save", config.save_steps, config.saves_per_epoch, config.num_epochs),
        ("save_total_limit", "SFTConfig", "save_total_limit", config.save_total_limit),
        ("output_dir", "SFTConfig", "output_dir", config.output_dir),
        ("seed", "SFTConfig", "seed", config.seed),
        *_tracker_rows(config),
        ("fastpeft.patch", "patch_model", "impl", config.fastpeft.impl if config.fastpeft.patch else None),
    ]
    return [Assignment(*row) for row in rows if row[3] is not None]


def arguments(config: RunConfig, target: str, *, total_steps: int | None = None) -> dict[str, Any]:
    """Keyword arguments of one target of `assignments`."""
    return {a.argument: a.value for a in assignments(config, total_steps=total_steps) if a.target == target}


def planned_steps(config: RunConfig, rows: int, world_size: int = 1) -> int:
    """Optimizer steps of a run over ``rows`` unpacked rows, by Trainer's own rounding."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(rows / (config.micro_batch_size * world_size))
    return max(1, math.ceil(config.num_epochs * math.ceil(batches / config.gradient_accumulation_steps)))


def adapter_config(config: RunConfig, model: Any, *, total_steps: int | None = None) -> Any:
    """The PEFT config of a run, or None where every weight is trained.

    Args:
        config: the run.
        model: its base model; None for a check of the values alone.
        total_steps: optimizer steps of the run, which AdaLoRA asks for before `AdaLoraCallback` knows them.
    """
    if config.adapter == "none":
        return None
    method = METHODS[config.adapter]
    values = arguments(config, method.config, total_steps=total_steps or config.max_steps or _ENOUGH_STEPS)
    if config.lora_target_linear and config.lora_target_modules is not None:
        values["target_modules"] = sorted({*values["target_modules"], *_linear_names(model)})
    if "eva_config" in values:
        from peft import EvaConfig

        values["eva_config"] = EvaConfig(**values["eva_config"])
    if "tokenizer_name_or_path" in values and model is not None:
        values["tokenizer_name_or_path"] = model.name_or_path  # of a built-in model, the folder it is in
    return getattr(import_module(method.module), method.config)(**values)


def quantization_config(config: RunConfig) -> Any:
    """A BitsAndBytesConfig, or None for a model that is not quantised."""
    values = arguments(config, "BitsAndBytesConfig")
    if not values:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**values)


def _adapter_rows(config: RunConfig, total_steps: int | None) -> list[tuple[str, str, str, Any]]:
    rows: list[tuple[str, str, str, Any]] = []
    if config.load_in_4bit:
        dtype = _weight_dtype(config)
        rows += [
            ("load_in_4bit", "BitsAndBytesConfig", "load_in_4bit", True),
            ("load_in_4bit", "BitsAndBytesConfig", "bnb_4bit_quant_type", "nf4"),
            ("load_in_4bit", "BitsAndBytesConfig", "bnb_4bit_use_double_quant", True),
            ("load_in_4bit", "BitsAndBytesConfig", "bnb_4bit_compute_dtype", dtype),
            ("load_in_4bit", "BitsAndBytesConfig", "bnb_4bit_quant_storage", "bfloat16"),
        ]
    if config.load_in_8bit:
        rows.append(("load_in_8bit", "BitsAndBytesConfig", "load_in_8bit", True))
    if config.adapter == "none":
        return rows
    method = METHODS[config.adapter]
    for key, argument in method.keys.items():
        value = getattr(config, key)
        if (argument is not None and value is not False) or key == "peft_init_lora_weights":
            rows.append((key, method.config, str(argument), value))
    if config.lora_target_linear and config.lora_target_modules is None:
        rows.append(("lora_target_linear", method.config, "target_modules", "all-linear"))
    rows.append(("adapter", method.config, "task_type", "CAUSAL_LM"))
    # Stored with the adapter, so that it is loaded onto the same revision.
    rows.append(("revision_of_model", method.config, "revision", config.revision_of_model))
    rows += _option_rows(config, method.config, total_steps)
    if config.loraplus_lr_ratio is not None:
        target = "create_loraplus_optimizer"
        rows += [
            ("loraplus_lr_ratio", target, "loraplus_lr_ratio", config.loraplus_lr_ratio),
            ("loraplus_lr_embedding", target, "loraplus_lr_embedding", config.loraplus_lr_embedding),
        ]
    if method.callbacks:
        rows.append(("adapter", "SFTTrainer", "callbacks", list(method.callbacks)))
    return rows


def _option_rows(config: RunConfig, target: str, total_steps: int | None) -> list[tuple[str, str, str, Any]]:
    """The method's own section of ``fastpeft:``, and what it needs that no key gives."""
    name = config.adapter
    rows: list[tuple[str, str, str, Any]] = []
    if config.peft_init_lora_weights == "eva":
        rows.append(("fastpeft.eva", target, "eva_config", config.fastpeft.eva.model_dump(exclude_none=True)))
    if name not in OPTIONS:
        return rows
    section = getattr(config.fastpeft, name)
    for key, value in section.model_dump(exclude_none=True).items():
        argument = "deltaT" if (name, key) == ("adalora", "delta_t") else key
        if name == "adalora" and isinstance(value, float) and key in ("tinit", "tfinal"):
            value = f"{value:.0%} of the steps" if total_steps is None else round(value * total_steps)
        rows.append((f"fastpeft.{name}.{key}", target, argument, value))
    if name in ("adalora", "adaptive_lora") and section.target_r is None:
        rows.append(("lora_r", target, "target_r", max(1, round(config.lora_r / _INITIAL_OVER_TARGET))))
    if name == "adalora":
        rows.append(("max_steps", target, "total_step", total_steps or config.max_steps or "all steps of the run"))
    if name == "prompt" and section.prompt_tuning_init == "TEXT":
        rows.append(("base_model", target, "tokenizer_name_or_path", config.base_model))
        revision = config.revision_of_model
        rows.append(("revision_of_model", target, "tokenizer_kwargs", {"revision": revision} if revision else None))
    return rows


def _linear_names(model: Any) -> set[str]:
    """Last name parts of all linear layers, 4- and 8-bit ones included, but not of the output embedding."""
    from torch import nn

    head = model.get_output_embeddings()
    found = {
        name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head
    }
    if not found:
        raise ValueError(
            f"lora_target_linear: {type(model).__name__} has no linear layer besides its output embedding"
        )
    return found


def _interval(kind: str, steps: int | None, per_epoch: int | None, epochs: float) -> list[tuple[str, str, str, Any]]:
    """``eval_steps`` or ``evals_per_epoch`` (and the same for saving) as Trainer's strategy and steps."""
    if steps is not None:
        key = f"{kind}_steps"
        return [(key, "SFTConfig", f"{kind}_strategy", "steps"), (key, "SFTConfig", f"{kind}_steps", steps)]
    key = f"{kind}s_per_epoch"
    if not per_epoch:
        return [(key, "SFTConfig", f"{kind}_strategy", "no")]
    if per_epoch * epochs <= 1:
        # A ratio of 1.0 would be read as "every step".
        return [(key, "SFTConfig", f"{kind}_strategy", "epoch")]
    share = 1 / (per_epoch * epochs)
    return [(key, "SFTConfig", f"{kind}_strategy", "steps"), (key, "SFTConfig", f"{kind}_steps", share)]


def _warmup(config: RunConfig, total_steps: int | None) -> tuple[str, str, str, Any]:
    if config.warmup_steps is not None:
        return "warmup_steps", "SFTConfig", "warmup_steps", config.warmup_steps
    if config.warmup_ratio is not None:
        # Trainer reads a number below 1 as a share of the steps.
        return "warmup_ratio", "SFTConfig", "warmup_steps", config.warmup_ratio
    value: Any = f"min({WARMUP_SHARE:.0%} of the steps, {WARMUP_MAX_STEPS})"
    if total_steps is not None:
        value = min(round(WARMUP_SHARE * total_steps), WARMUP_MAX_STEPS)
    return "warmup_ratio", "SFTConfig", "warmup_steps", value


def _tracker_rows(config: RunConfig) -> list[tuple[str, str, str, Any]]:
    """Trackers are on only where a key asks for one."""
    report_to: list[str] = []
    if config.use_wandb or (config.use_wandb is None and config.wandb_project):
        report_to.append("wandb")
    if config.use_mlflow or (config.use_mlflow is None and config.mlflow_experiment_name):
        report_to.append("mlflow")
    if config.use_tensorboard:
        report_to.append("tensorboard")
    if config.trackio_project_name:
        report_to.append("trackio")
    rows: list[tuple[str, str, str, Any]] = [("use_wandb ...", "SFTConfig", "report_to", report_to)]
    rows += [
        (key, "environment", variable, getattr(config, key))
        for key, variable in _ENVIRONMENT.items()
        if key.split("_")[0] in report_to
    ]
    run_name = config.wandb_name or config.mlflow_run_name or config.trackio_run_name
    rows += [
        ("wandb_name", "SFTConfig", "run_name", run_name),
        ("trackio_project_name", "SFTConfig", "project", config.trackio_project_name),
        ("trackio_space_id", "SFTConfig", "trackio_space_id", config.trackio_space_id),
        ("hub_model_id", "SFTConfig", "hub_model_id", config.hub_model_id),
        ("hub_model_id", "SFTConfig", "push_to_hub", True if config.hub_model_id else None),
    ]
    return rows


def _checkpointing() -> str:
    from transformers import TrainingArguments

    # TODO: drop the old name at transformers>=6; 5.23 warns about it.
    fields = TrainingArguments.__dataclass_fields__
    return "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"


def _attention(config: RunConfig) -> str | None:
    legacy = {
        "flash_attention_2": config.flash_attention,
        "sdpa": config.sdp_attention,
        "eager": config.eager_attention,
    }
    return config.attn_implementation or next((name for name, asked in legacy.items() if asked), None)


def _bf16(config: RunConfig) -> bool:
    import torch

    if config.bf16 != "auto":
        return config.bf16
    return config.fp16 is not True and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _fp16(config: RunConfig) -> bool:
    import torch

    return config.fp16 if config.fp16 != "auto" else torch.cuda.is_available() and not _bf16(config)


def _tf32(config: RunConfig) -> bool | None:
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
        return None  # Trainer refuses the setting where the device has no TF32
    return config.tf32 is not False


def _weight_dtype(config: RunConfig) -> str:
    # fp16 trains float32 weights under autocast: float16 weights cannot take the gradient scaler's steps.
    return "bfloat16" if _bf16(config) and config.adapter != "none" else "float32"
