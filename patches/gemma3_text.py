"""Gemma 3 (transformers ``model_type="gemma3_text"``), the text models and the text part of the others."""

from typing import ClassVar

from transformers.models.gemma3 import modeling_gemma3 as stock

from hf_fastpeft.causal_lm import FastCausalLM
from hf_fastpeft.families import Family
from hf_fastpeft.layers import FastAttention, FastBackbone, FastDecoderLayer, FastMLP, FastRMSNorm

__all__ = [
    "FAMILY",
    "FastGemma3Attention",
    "FastGemma3DecoderLayer",
    "FastGemma3ForCausalLM",
    "FastGemma3MLP",
    "FastGemma3RMSNorm",
    "FastGemma3TextModel",
]


class FastGemma3RMSNorm(FastRMSNorm, stock.Gemma3RMSNorm):
    """``Gemma3RMSNorm`` with the fused norm."""

    eps_name = "eps"
    unit_offset = True


class FastGemma3MLP(FastMLP, stock.Gemma3MLP):
    """``Gemma3MLP`` as one block."""


class FastGemma3Attention(FastAttention, stock.Gemma3Attention):
    """``Gemma3Attention`` with fused projections around Hugging Face's attention call."""

    qk_norms = ("q_norm", "k_norm")
    attention_options: ClassVar[dict[str, str]] = {"sliding_window": "sliding_window"}
    eager_attention = staticmethod(stock.eager_attention_forward)
    stock_rotary = staticmethod(stock.apply_rotary_pos_emb)


class FastGemma3DecoderLayer(FastDecoderLayer, stock.Gemma3DecoderLayer):
    """``Gemma3DecoderLayer`` with norms and residuals inside the blocks."""

    mlp_norm = "pre_feedforward_layernorm"
    after_attention = ("post_attention_layernorm",)
    after_mlp = ("post_feedforward_layernorm",)


class FastGemma3TextModel(FastBackbone, stock.Gemma3TextModel):
    """``Gemma3TextModel``, which refreshes what its blocks share."""


class FastGemma3ForCausalLM(FastCausalLM, stock.Gemma3ForCausalLM):
    """``Gemma3ForCausalLM`` with the fused head."""


FAMILY = Family(
    "gemma3_text",
    (
        FastGemma3RMSNorm,
        FastGemma3Attention,
        FastGemma3MLP,
        FastGemma3DecoderLayer,
        FastGemma3TextModel,
        FastGemma3ForCausalLM,
    ),
    covers="Gemma 3 270M, 1B",
)
