"""The contestants: each turns a setting into a model with an adapter and a function that gives the loss of a batch.

A variant is prepared in a process of its own, so those that patch globals or must be imported first may do so.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.models import Shape, add_adapter, build_model, set_adapter_weights
from benchmarks.suites import Setting

__all__ = ["VARIANTS", "Prepared", "Skipped", "prepare", "stock_loss"]

Batch = dict[str, torch.Tensor]


class Skipped(Exception):
    """This variant cannot run here; the message says why."""


@dataclass
class Prepared:
    """A model in training mode, its loss, and what the variant can say about itself after it ran."""

    model: nn.Module
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    report: Callable[[], dict[str, Any] | None] = lambda: None


def stock_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What ``Trainer`` does: the model's own loss over the batch's labelled tokens."""
    return model(**batch, num_items_in_batch=_labelled(batch)).loss  # type: ignore[no-any-return]


def _trl_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What ``SFTTrainer`` 1.16 does: per-token log-probabilities from the fused head."""
    outputs = model(**batch, use_cache=False, fused_lm_head=True)
    return -outputs.log_probs.sum() / _labelled(batch).clamp(min=1)  # type: ignore[no-any-return]


def _labelled(batch: Batch) -> torch.Tensor:
    return (batch["labels"][:, 1:] != -100).sum()


def _base(shape: Shape, setting: Setting, device: str) -> nn.Module:
    dtype = getattr(torch, setting.dtype)
    return build_model(shape, layers=setting.layers, dtype=dtype, device=device, four_bit=setting.four_bit)


def _adapted(base: nn.Module, setting: Setting) -> nn.Module:
    return add_adapter(base, setting.method, setting.r, setting.dropout)


def _stock(shape: Shape, setting: Setting, device: str) -> Prepared:
    return Prepared(_adapted(_base(shape, setting, device), setting), stock_loss)


def _trl(shape: Shape, setting: Setting, device: str) -> Prepared:
    from trl.trainer.utils import add_fused_lm_head

    base = _base(shape, setting, device)
    add_fused_lm_head(base)
    return Prepared(_adapted(base, setting), _trl_loss)


def _ours(shape: Shape, setting: Setting, device: str) -> Prepared:
    return _patch(_stock(shape, setting, device))


def _ours_trl(shape: Shape, setting: Setting, device: str) -> Prepared:
    return _patch(_trl(shape, setting, device))


def _patch(prepared: Prepared) -> Prepared:
    from hf_fastpeft import patch_model, patched
    from hf_fastpeft.families import FAMILIES

    model_type = prepared.model.config.model_type  # type: ignore[union-attr]
    if model_type not in FAMILIES:
        raise Skipped(f"hf_fastpeft has no patch for model_type {model_type!r} yet")
    prepared.report = patched(patch_model(prepared.model)).to_json
    return prepared


def _compile(shape: Shape, setting: Setting, device: str) -> Prepared:
    prepared = _stock(shape, setting, device)
    for layer in prepared.model.get_base_model().model.layers:  # type: ignore[operator]
        layer.compile(dynamic=False)
    return prepared


def _liger(shape: Shape, setting: Setting, device: str) -> Prepared:
    if importlib.util.find_spec("liger_kernel") is None:
        raise Skipped("liger-kernel is not installed")
    if device == "cpu":
        raise Skipped("Liger's kernels need a GPU")
    from liger_kernel.transformers import monkey_patch

    apply = getattr(monkey_patch, f"apply_liger_kernel_to_{shape.model_type}", None)
    if apply is None:
        raise Skipped(f"Liger has no kernels for {shape.model_type}")
    base = _base(shape, setting, device)
    apply(model=base)
    return Prepared(_adapted(base, setting), stock_loss)


def _unsloth(shape: Shape, setting: Setting, device: str, checkpointing: bool | str = False) -> Prepared:
    if importlib.util.find_spec("unsloth") is None:
        raise Skipped("unsloth is not installed")
    if setting.method != "lora":
        raise Skipped(f"unsloth has no {setting.method}")
    import unsloth

    with tempfile.TemporaryDirectory() as folder:
        plain = Setting(**{**setting.__dict__, "four_bit": False})
        _base(shape, plain, "cpu").save_pretrained(folder)  # type: ignore[operator]
        try:
            model, _ = unsloth.FastLanguageModel.from_pretrained(
                folder,
                max_seq_length=setting.seq_len,
                dtype=getattr(torch, setting.dtype),
                load_in_4bit=setting.four_bit,
                local_files_only=True,
            )
            model = unsloth.FastLanguageModel.get_peft_model(
                model,
                r=setting.r,
                lora_alpha=2 * setting.r,
                lora_dropout=setting.dropout,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                use_gradient_checkpointing=checkpointing,
            )
        except (OSError, RuntimeError, ValueError, ImportError, NotImplementedError, AttributeError) as error:
            raise Skipped(f"unsloth does not start: {type(error).__name__}: {error}") from error
    set_adapter_weights(model)
    return Prepared(model.train(), stock_loss)


def _planted_slow(shape: Shape, setting: Setting, device: str) -> Prepared:
    """Stock that dawdles for 30 ms a step."""
    prepared = _stock(shape, setting, device)
    prepared.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
    return prepared


def _planted_wrong(shape: Shape, setting: Setting, device: str) -> Prepared:
    """Stock with one wrong gradient, by five per cent."""
    prepared = _stock(shape, setting, device)
    name, parameter = next((n, p) for n, p in prepared.model.named_parameters() if "o_proj.lora_A" in n)
    assert parameter.requires_grad, name
    parameter.register_hook(lambda gradient: gradient * 1.05)
    return prepared


def _checkpointed(make: Callable[[Shape, Setting, str], Prepared]) -> Callable[[Shape, Setting, str], Prepared]:
    """The same with gradient checkpointing as Trainer switches it on."""

    def prepare(shape: Shape, setting: Setting, device: str) -> Prepared:
        prepared = make(shape, setting, device)
        prepared.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        prepared.model.enable_input_require_grads()  # type: ignore[operator]
        return prepared

    return prepare


VARIANTS: dict[str, Callable[[Shape, Setting, str], Prepared]] = {
    "trl": _checkpointed(_trl),  # SFTTrainer's defaults: fused head, checkpointing
    "stock": _stock,
    "stock+checkpointing": _checkpointed(_stock),  # Trainer with gradient_checkpointing=True
    "compile": _compile,
    "compile+checkpointing": _checkpointed(_compile),
    "liger": _liger,
    "liger+checkpointing": _checkpointed(_liger),
    "unsloth": lambda *a: _unsloth(*a, checkpointing=False),
    "unsloth+checkpointing": lambda *a: _unsloth(*a, checkpointing="unsloth"),
    "ours": _ours,
    "ours+checkpointing": _checkpointed(_ours),
    "ours-trl": _ours_trl,  # inside SFTTrainer, without checkpointing
    "planted-slow": _planted_slow,
    "planted-wrong": _planted_wrong,
}


def prepare(variant: str, shape: Shape, setting: Setting, device: str) -> Prepared:
    """The model of ``variant``, ready to train.

    Raises:
        Skipped: it cannot run here.
    """
    return VARIANTS[variant](shape, setting, device)
