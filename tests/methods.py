"""Every adapter method as the tests see it: a tiny configuration, its formula in float64, and what it refuses to do.

The registry is ``hf_fastpeft.tuners.methods()``, with PEFT's LoRA as the control. A method that is not in ``_KNOWN``
is expected to do everything, and its configuration class to have a ``tiny()`` classmethod.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig

import hf_fastpeft
from hf_fastpeft import tuners
from hf_fastpeft.errors import AdapterError

Tensors = dict[str, torch.Tensor]
Adapted = dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]  # path -> (input, output) -> output

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Refusal:
    """A check that the method does not pass by design: what it raises, and why, as its documentation says."""

    error: type[Exception]
    match: str
    reason: str


@dataclass(frozen=True)
class Method:
    """One row of facts.

    Attributes:
        name: ``peft_type``.
        config: its tiny configuration; takes other settings by keyword.
        formula: saved tensors and configuration -> what the adapter does to each module it is on, in float64.
        callbacks: what a Trainer needs.
        training: settings of the configuration for a run of few steps.
        refuses: check -> what happens instead.
    """

    name: str
    config: Callable[..., Any]
    formula: Callable[[Tensors, Any], Adapted] | None = None
    callbacks: Callable[[], list[Any]] = list
    training: Mapping[str, Any] = field(default_factory=dict)
    refuses: Mapping[str, Refusal] = field(default_factory=dict)


def _low_rank(tensors: Tensors, config: Any) -> Adapted:
    """h + alpha / r * ((x Aᵀ) * g) Bᵀ; g: one in LoRA, gate_scale * gamma in SoRA, gamma in adaptive LoRA."""

    def adapter(path: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        a, b = (tensors[f"{PREFIX}{path}.lora_{part}.weight"].double() for part in "AB")
        gate = tensors.get(f"{PREFIX}{path}.lora_A.gate.weight")
        g = torch.ones(len(a)).double() if gate is None else gate.double() * getattr(config, "gate_scale", 1.0)
        return lambda x, h: h + config.lora_alpha / config.r * ((x @ a.T) * g) @ b.T

    return {path: adapter(path) for path in _paths(tensors, ".lora_A.weight")}


def _bottleneck(tensors: Tensors, config: Any) -> Adapted:
    """h + s * gelu(h Wdᵀ + bd) Wuᵀ + s * bu."""

    def adapter(path: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        down, d_bias, up, u_bias = (
            tensors[f"{PREFIX}{path}.bottleneck_{part}"].double()
            for part in ("down.weight", "down.bias", "up.weight", "up.bias")
        )
        return lambda x, h: h + config.scaling * (F.gelu(h @ down.T + d_bias) @ up.T + u_bias)

    assert (config.mode, config.nonlinearity, config.layer_norm) == ("sequential", "gelu", False)
    return {path: adapter(path) for path in _paths(tensors, ".bottleneck_down.weight")}


def _paths(tensors: Tensors, suffix: str) -> list[str]:
    return [key.removeprefix(PREFIX).removesuffix(suffix) for key in tensors if key.endswith(suffix)]


def _adaptive_tiny(config_cls: Any) -> Callable[..., Any]:
    tiny = _low_rank_tiny(config_cls)

    def config(r: int = 4, **settings: Any) -> Any:
        return tiny(r=8, init_r=r, target_r=r / 2, **settings)  # r is LoraConfig's default, and init_r counts

    return config


def _low_rank_tiny(config_cls: Any) -> Callable[..., Any]:
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return lambda **settings: config_cls(**{**defaults, **settings})


_NOT_LINEAR = Refusal(AdapterError, "not linear in its input", "a nonlinearity has no equal among the base weights")
_CLOSED_LIST = "PEFT's PeftMixedModel is a closed list of methods"


def _not_mixed(name: str) -> Refusal:
    return Refusal(ValueError, f"'{name}' is not compatible with the `PeftMixedModel`", _CLOSED_LIST)


_KNOWN: dict[str, Callable[[Any], Method]] = {
    "LORA": lambda cls: Method("LORA", _low_rank_tiny(cls), _low_rank),
    "SORA": lambda cls: Method(
        "SORA",
        _low_rank_tiny(cls),
        _low_rank,
        callbacks=lambda: [hf_fastpeft.SoraCallback()],
        training={"target_r": 2, "warmup_ratio": 0.0, "settle_ratio": 0.0},
        refuses={"mixed_model": _not_mixed("SORA")},
    ),
    "ADAPTIVE_LORA": lambda cls: Method(
        "ADAPTIVE_LORA",
        _adaptive_tiny(cls),
        _low_rank,
        callbacks=lambda: [hf_fastpeft.AdaLoraCallback()],
        training={"tinit": 0, "tfinal": 0, "delta_t": 1},
        refuses={"mixed_model": _not_mixed("ADAPTIVE_LORA")},
    ),
    "BOTTLENECK": lambda cls: Method(
        "BOTTLENECK",
        cls.tiny,
        _bottleneck,
        refuses={
            "merge_and_unmerge": _NOT_LINEAR,
            "merge_and_unload": _NOT_LINEAR,
            "export_to_lora": Refusal(AdapterError, "is of type BOTTLENECK; possible: ", _NOT_LINEAR.reason),
            "mixed_batch": Refusal(ValueError, "bottleneck adapters act on whole batches", "one adapter per batch"),
            "mixed_model": _not_mixed("BOTTLENECK"),
        },
    ),
}


def _described(name: str, config_cls: Any) -> Method:
    if name in _KNOWN:
        return _KNOWN[name](config_cls)

    def config(**settings: Any) -> Any:
        assert hasattr(config_cls, "tiny"), (
            f"{name}: give {config_cls.__name__} a tiny(), or describe it in {__file__}"
        )
        return config_cls.tiny(**settings)

    return Method(name, config, refuses={"mixed_model": _not_mixed(name)})


METHODS = {
    name: _described(name, config_cls)
    for name, config_cls in {"LORA": LoraConfig, **{n: classes[0] for n, classes in tuners.methods().items()}}.items()
}


def reference_llama(weights: Tensors, ids: torch.Tensor, config: Any, adapted: Adapted) -> torch.Tensor:
    """Logits ``(batch, seq_len, vocab_size)`` of a Llama in float64, written from its equations, with adapters.

    RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021, eq. 34, halves instead of pairs), grouped
    queries (Ainslie et al. 2023), SwiGLU (Shazeer 2020, eq. 6). Transformers' own Llama rounds its norms to float32.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    B, S = ids.shape
    angles = torch.arange(S).double()[:, None] * theta ** (-torch.arange(0, D, 2).double() / D)
    cos, sin = angles.cos(), angles.sin()

    def through(path: str, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        h = compute(x)
        return adapted[path](x, h) if path in adapted else h

    def linear(path: str, x: torch.Tensor) -> torch.Tensor:
        return through(path, lambda x: x @ w[f"{path}.weight"].T, x)

    def norm(path: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{path}.weight"]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def attention(path: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (linear(f"{path}.{n}_proj", x).view(B, S, -1, D).transpose(1, 2) for n in "qkv")
        k, v = (rotate(k).repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1))
        scores = rotate(q) @ k.transpose(-1, -2) / D**0.5
        scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf)
        return linear(f"{path}.o_proj", (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, -1))

    def mlp(path: str, x: torch.Tensor) -> torch.Tensor:
        gate = linear(f"{path}.gate_proj", x)
        return linear(f"{path}.down_proj", gate * gate.sigmoid() * linear(f"{path}.up_proj", x))

    x = w["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for block, before, compute in (
            (f"{layer}.self_attn", f"{layer}.input_layernorm", attention),
            (f"{layer}.mlp", f"{layer}.post_attention_layernorm", mlp),
        ):
            x = x + through(block, lambda z, compute=compute, block=block: compute(block, z), norm(before, x))
    return linear("lm_head", norm("model.norm", x))
