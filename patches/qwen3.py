"""Qwen 3 (transformers ``model_type="qwen3"``), the dense models."""

from typing import ClassVar

from transformers.models.qwen3 import modeling_qwen3 as stock

from hf_fastpeft.causal_lm import FastCausalLM
from hf_fastpeft.families import Family
from hf_fastpeft.layers import FastAttention, FastBackbone, FastDecoderLayer, FastMLP, FastRMSNorm

__all__ = [
    "FAMILY",
    "FastQwen3Attention",
    "FastQwen3DecoderLayer",
    "FastQwen3ForCausalLM",
    "FastQwen3MLP",
    "FastQwen3Model",
    "FastQwen3RMSNorm",
]


class FastQwen3RMSNorm(FastRMSNorm, stock.Qwen3RMSNorm):
    """``Qwen3RMSNorm`` with the fused norm."""


class FastQwen3MLP(FastMLP, stock.Qwen3MLP):
    """``Qwen3MLP`` as one block."""


class FastQwen3Attention(FastAttention, stock.Qwen3Attention):
    """``Qwen3Attention`` with fused projections around Hugging Face's attention call."""

    qk_norms = ("q_norm", "k_norm")
    attention_options: ClassVar[dict[str, str]] = {"sliding_window": "sliding_window"}
    eager_attention = staticmethod(stock.eager_attention_forward)
    stock_rotary = staticmethod(stock.apply_rotary_pos_emb)


class FastQwen3DecoderLayer(FastDecoderLayer, stock.Qwen3DecoderLayer):
    """``Qwen3DecoderLayer`` with norms and residuals inside the blocks."""


class FastQwen3Model(FastBackbone, stock.Qwen3Model):
    """``Qwen3Model``, which refreshes what its blocks share."""


class FastQwen3ForCausalLM(FastCausalLM, stock.Qwen3ForCausalLM):
    """``Qwen3ForCausalLM`` with the fused head."""


FAMILY = Family(
    "qwen3",
    (
        FastQwen3RMSNorm,
        FastQwen3Attention,
        FastQwen3MLP,
        FastQwen3DecoderLayer,
        FastQwen3Model,
        FastQwen3ForCausalLM,
    ),
    covers="Qwen 3",
)
