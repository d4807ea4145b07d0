"""Gemma 2 (transformers ``model_type="gemma2"``): norms on both sides of each half, soft-capped logits."""

from typing import ClassVar

from transformers.models.gemma2 import modeling_gemma2 as stock

from hf_fastpeft.causal_lm import FastCausalLM
from hf_fastpeft.families import Family
from hf_fastpeft.layers import FastAttention, FastBackbone, FastDecoderLayer, FastMLP, FastRMSNorm

__all__ = [
    "FAMILY",
    "FastGemma2Attention",
    "FastGemma2DecoderLayer",
    "FastGemma2ForCausalLM",
    "FastGemma2MLP",
    "FastGemma2Model",
    "FastGemma2RMSNorm",
]


class FastGemma2RMSNorm(FastRMSNorm, stock.Gemma2RMSNorm):
    """``Gemma2RMSNorm`` with the fused norm."""

    eps_name = "eps"
    unit_offset = True


class FastGemma2MLP(FastMLP, stock.Gemma2MLP):
    """``Gemma2MLP`` as one block."""


class FastGemma2Attention(FastAttention, stock.Gemma2Attention):
    """``Gemma2Attention`` with fused projections around Hugging Face's attention call."""

    attention_options: ClassVar[dict[str, str]] = {
        "sliding_window": "sliding_window",
        "softcap": "attn_logit_softcapping",
    }
    eager_attention = staticmethod(stock.eager_attention_forward)
    stock_rotary = staticmethod(stock.apply_rotary_pos_emb)


class FastGemma2DecoderLayer(FastDecoderLayer, stock.Gemma2DecoderLayer):
    """``Gemma2DecoderLayer`` with norms and residuals inside the blocks."""

    mlp_norm = "pre_feedforward_layernorm"
    after_attention = ("post_attention_layernorm",)
    after_mlp = ("post_feedforward_layernorm",)


class FastGemma2Model(FastBackbone, stock.Gemma2Model):
    """``Gemma2Model``, which refreshes what its blocks share."""


class FastGemma2ForCausalLM(FastCausalLM, stock.Gemma2ForCausalLM):
    """``Gemma2ForCausalLM`` with the fused head."""


FAMILY = Family(
    "gemma2",
    (
        FastGemma2RMSNorm,
        FastGemma2Attention,
        FastGemma2MLP,
        FastGemma2DecoderLayer,
        FastGemma2Model,
        FastGemma2ForCausalLM,
    ),
    covers="Gemma 2",
)
