"""Mistral (transformers ``model_type="mistral"``): the dense text models of Mistral AI."""

from typing import ClassVar

from transformers.models.mistral import modeling_mistral as stock

from hf_fastpeft.causal_lm import FastCausalLM
from hf_fastpeft.families import Family
from hf_fastpeft.layers import FastAttention, FastBackbone, FastDecoderLayer, FastMLP, FastRMSNorm

__all__ = [
    "FAMILY",
    "FastMistralAttention",
    "FastMistralDecoderLayer",
    "FastMistralForCausalLM",
    "FastMistralMLP",
    "FastMistralModel",
    "FastMistralRMSNorm",
]


class FastMistralRMSNorm(FastRMSNorm, stock.MistralRMSNorm):
    """``MistralRMSNorm`` with the fused norm."""


class FastMistralMLP(FastMLP, stock.MistralMLP):
    """``MistralMLP`` as one block."""


class FastMistralAttention(FastAttention, stock.MistralAttention):
    """``MistralAttention`` with fused projections around Hugging Face's attention call."""

    attention_options: ClassVar[dict[str, str]] = {"sliding_window": "config.sliding_window"}
    eager_attention = staticmethod(stock.eager_attention_forward)
    stock_rotary = staticmethod(stock.apply_rotary_pos_emb)


class FastMistralDecoderLayer(FastDecoderLayer, stock.MistralDecoderLayer):
    """``MistralDecoderLayer`` with norms and residuals inside the blocks."""


class FastMistralModel(FastBackbone, stock.MistralModel):
    """``MistralModel``, which refreshes what its blocks share."""


class FastMistralForCausalLM(FastCausalLM, stock.MistralForCausalLM):
    """``MistralForCausalLM`` with the fused head."""


FAMILY = Family(
    "mistral",
    (
        FastMistralRMSNorm,
        FastMistralAttention,
        FastMistralMLP,
        FastMistralDecoderLayer,
        FastMistralModel,
        FastMistralForCausalLM,
    ),
    covers="Mistral 7B, Nemo, Small",
)
