"""Qwen 2 (transformers ``model_type="qwen2"``): Qwen 2 and 2.5, QwQ and the models distilled into them."""

from typing import ClassVar

from transformers.models.qwen2 import modeling_qwen2 as stock

from hf_fastpeft.causal_lm import FastCausalLM
from hf_fastpeft.families import Family
from hf_fastpeft.layers import FastAttention, FastBackbone, FastDecoderLayer, FastMLP, FastRMSNorm

__all__ = [
    "FAMILY",
    "FastQwen2Attention",
    "FastQwen2DecoderLayer",
    "FastQwen2ForCausalLM",
    "FastQwen2MLP",
    "FastQwen2Model",
    "FastQwen2RMSNorm",
]


class FastQwen2RMSNorm(FastRMSNorm, stock.Qwen2RMSNorm):
    """``Qwen2RMSNorm`` with the fused norm."""


class FastQwen2MLP(FastMLP, stock.Qwen2MLP):
    """``Qwen2MLP`` as one block."""


class FastQwen2Attention(FastAttention, stock.Qwen2Attention):
    """``Qwen2Attention`` with fused projections around Hugging Face's attention call."""

    attention_options: ClassVar[dict[str, str]] = {"sliding_window": "sliding_window"}
    eager_attention = staticmethod(stock.eager_attention_forward)
    stock_rotary = staticmethod(stock.apply_rotary_pos_emb)


class FastQwen2DecoderLayer(FastDecoderLayer, stock.Qwen2DecoderLayer):
    """``Qwen2DecoderLayer`` with norms and residuals inside the blocks."""


class FastQwen2Model(FastBackbone, stock.Qwen2Model):
    """``Qwen2Model``, which refreshes what its blocks share."""


class FastQwen2ForCausalLM(FastCausalLM, stock.Qwen2ForCausalLM):
    """``Qwen2ForCausalLM`` with the fused head."""


FAMILY = Family(
    "qwen2",
    (
        FastQwen2RMSNorm,
        FastQwen2Attention,
        FastQwen2MLP,
        FastQwen2DecoderLayer,
        FastQwen2Model,
        FastQwen2ForCausalLM,
    ),
    covers="Qwen 2, Qwen 2.5, QwQ",
)
