"""Llama (transformers ``model_type="llama"``): Llama 1 to 3.x, SmolLM2, TinyLlama and others of its architecture."""

from transformers.models.llama import modeling_llama as stock

from hf_fastpeft.causal_lm import FastCausalLM
from hf_fastpeft.families import Family
from hf_fastpeft.layers import FastAttention, FastBackbone, FastDecoderLayer, FastMLP, FastRMSNorm

__all__ = [
    "FAMILY",
    "FastLlamaAttention",
    "FastLlamaDecoderLayer",
    "FastLlamaForCausalLM",
    "FastLlamaMLP",
    "FastLlamaModel",
    "FastLlamaRMSNorm",
]


class FastLlamaRMSNorm(FastRMSNorm, stock.LlamaRMSNorm):
    """``LlamaRMSNorm`` with the fused norm."""


class FastLlamaMLP(FastMLP, stock.LlamaMLP):
    """``LlamaMLP`` as one block."""


class FastLlamaAttention(FastAttention, stock.LlamaAttention):
    """``LlamaAttention`` with fused projections around Hugging Face's attention call."""

    eager_attention = staticmethod(stock.eager_attention_forward)
    stock_rotary = staticmethod(stock.apply_rotary_pos_emb)


class FastLlamaDecoderLayer(FastDecoderLayer, stock.LlamaDecoderLayer):
    """``LlamaDecoderLayer`` with norms and residuals inside the blocks."""


class FastLlamaModel(FastBackbone, stock.LlamaModel):
    """``LlamaModel``, which refreshes what its blocks share."""


class FastLlamaForCausalLM(FastCausalLM, stock.LlamaForCausalLM):
    """``LlamaForCausalLM`` with the fused head."""


FAMILY = Family(
    "llama",
    (
        FastLlamaRMSNorm,
        FastLlamaAttention,
        FastLlamaMLP,
        FastLlamaDecoderLayer,
        FastLlamaModel,
        FastLlamaForCausalLM,
    ),
    covers="Llama 1 to 3.x, SmolLM2, TinyLlama",
)
