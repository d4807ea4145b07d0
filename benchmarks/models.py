"""Model shapes, and models made of them with random weights: nothing is downloaded."""

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from hf_fastpeft import SoraConfig

__all__ = [
    "METHODS",
    "SHAPES",
    "Shape",
    "add_adapter",
    "build_model",
    "model_config",
    "set_adapter_weights",
    "token_batch",
]


@dataclass(frozen=True)
class Shape:
    """What a model's cost depends on; the numbers of its published ``config.json``."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int = 128
    rope_theta: float = 10_000.0
    tied: bool = False

    def params(self) -> int:
        """Weights of one decoder layer's linears: the N of ``4 N D``."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden * (2 * q + 2 * kv + 3 * self.intermediate)


SHAPES = {
    "qwen2-7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 152064, rope_theta=1e6),
    "llama-3-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128256, rope_theta=5e5),
    "mistral-7b": Shape("mistral", 4096, 14336, 32, 32, 8, 32768, rope_theta=1e6),
    "qwen3-8b": Shape("qwen3", 4096, 12288, 36, 32, 8, 151936, rope_theta=1e6),
    "llama-3.2-1b": Shape("llama", 2048, 8192, 16, 32, 8, 128256, head_dim=64, rope_theta=5e5, tied=True),
    "smollm2-135m": Shape("llama", 576, 1536, 30, 9, 3, 49152, head_dim=64, rope_theta=1e5, tied=True),
    # for tests: too small to say anything about speed
    "toy": Shape("llama", 64, 176, 2, 4, 2, 512, head_dim=16),
}

METHODS: dict[str, Any] = {
    "lora": LoraConfig,
    "dora": lambda **kw: LoraConfig(use_dora=True, **kw),
    "sora": SoraConfig,
    # AdaLoRA as PEFT has it: starts from 1.5 times the rank; its schedule is not stepped here
    "adalora": lambda r, **kw: AdaLoraConfig(init_r=math.ceil(1.5 * r), target_r=r, total_step=10_000, **kw),
}


def model_config(shape: Shape, layers: int | None = None, attention: str = "sdpa") -> PretrainedConfig:
    """Hugging Face configuration of ``shape``, optionally with fewer layers."""
    config = AutoConfig.for_model(
        shape.model_type,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers if layers is None else layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied,
        use_cache=False,
        # the models' own ids lie outside a reduced vocabulary
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    if hasattr(config, "sliding_window"):
        config.sliding_window = None
    config._attn_implementation = attention
    return config


def build_model(
    shape: Shape,
    *,
    layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    four_bit: bool = False,
) -> nn.Module:
    """Base model with random weights, the same on every call and process."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config(shape, layers), dtype=dtype)
    return _quantised(model, dtype) if four_bit else model


def _quantised(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Every linear but the head as NF4 with nested absmax, what ``BitsAndBytesConfig`` makes of a checkpoint."""
    import bitsandbytes as bnb

    for path, linear in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]:
        parent, _, name = path.rpartition(".")
        device = linear.weight.device
        quantised = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="cpu",
        )
        quantised.weight = bnb.nn.Params4bit(
            linear.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        if linear.bias is not None:
            quantised.bias = nn.Parameter(linear.bias.data.cpu(), requires_grad=False)
        setattr(model.get_submodule(parent), name, quantised.to(device))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT and Trainer look for it
    return model


def add_adapter(model: nn.Module, method: str, r: int, dropout: float = 0.0) -> PeftModel:
    """PEFT adapter on every linear but the head, its parameters float32; B is not zero, so that A has a gradient."""
    config = METHODS[method](r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules="all-linear")
    config.task_type = "CAUSAL_LM"
    adapted = get_peft_model(model, config)
    set_adapter_weights(adapted)
    return adapted.train()


def set_adapter_weights(model: nn.Module) -> None:
    """The same values for the same parameter names, whoever made the adapter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                # names end alike whatever a library wraps around the model
                seed = zlib.crc32(name[name.find("layers.") :].encode())
                values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.copy_(values * (0.02 if "lora_B" in name else parameter.shape[-1] ** -0.5))
            elif "lora_E" in name:
                parameter.fill_(1.0)


def token_batch(
    vocab: int, batch: int, seq_len: int, *, masked: float = 0.0, sampled: bool = False, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Random tokens with labels.

    Args:
        vocab: vocabulary size.
        batch: rows.
        seq_len: longest row.
        masked: share of each row, from its start, that has no label (a prompt).
        sampled: rows of length ``seq_len / 8 .. seq_len`` padded on the right, the first of them full; else all full.
        device: of the tensors.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (batch, seq_len), generator=generator)
    lengths = torch.full((batch,), seq_len)
    if sampled:
        lengths[1:] = torch.randint(max(seq_len // 8, 1), seq_len + 1, (batch - 1,), generator=generator)
    position = torch.arange(seq_len)
    inside = position < lengths[:, None]
    labelled = inside & (position >= (lengths[:, None] * masked).long())
    tensors = {
        "input_ids": ids.where(inside, torch.tensor(0)),
        "attention_mask": inside.long(),
        "labels": ids.where(labelled, torch.tensor(-100)),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}
