"""Phi 3 (transformers ``model_type="phi3"``): Phi 3, 3.5 and 4, whose weights are stacked as stored."""

from typing import ClassVar

from transformers.models.phi3 import modeling_phi3 as stock

from hf_fastpeft.causal_lm import FastCausalLM
from hf_fastpeft.families import Family
from hf_fastpeft.layers import FastAttention, FastBackbone, FastDecoderLayer, FastMLP, FastRMSNorm

__all__ = [
    "FAMILY",
    "FastPhi3Attention",
    "FastPhi3DecoderLayer",
    "FastPhi3ForCausalLM",
    "FastPhi3MLP",
    "FastPhi3Model",
    "FastPhi3RMSNorm",
]


class FastPhi3RMSNorm(FastRMSNorm, stock.Phi3RMSNorm):
    """``Phi3RMSNorm`` with the fused norm."""


class FastPhi3MLP(FastMLP, stock.Phi3MLP):
    """``Phi3MLP`` as one block."""

    linears: ClassVar[dict[str, tuple[str, ...]]] = {"mlp": ("gate_up_proj",), "mlp_down": ("down_proj",)}
    activation_name = "activation_fn"


class FastPhi3Attention(FastAttention, stock.Phi3Attention):
    """``Phi3Attention`` with fused projections around Hugging Face's attention call."""

    linears: ClassVar[dict[str, tuple[str, ...]]] = {"attention_in": ("qkv_proj",), "attention_out": ("o_proj",)}
    attention_options: ClassVar[dict[str, str]] = {"sliding_window": "config.sliding_window"}
    eager_attention = staticmethod(stock.eager_attention_forward)
    stock_rotary = staticmethod(stock.apply_rotary_pos_emb)


class FastPhi3DecoderLayer(FastDecoderLayer, stock.Phi3DecoderLayer):
    """``Phi3DecoderLayer`` with norms and residuals inside the blocks."""

    after_attention = ("resid_attn_dropout",)
    after_mlp = ("resid_mlp_dropout",)


class FastPhi3Model(FastBackbone, stock.Phi3Model):
    """``Phi3Model``, which refreshes what its blocks share."""


class FastPhi3ForCausalLM(FastCausalLM, stock.Phi3ForCausalLM):
    """``Phi3ForCausalLM`` with the fused head."""


FAMILY = Family(
    "phi3",
    (
        FastPhi3RMSNorm,
        FastPhi3Attention,
        FastPhi3MLP,
        FastPhi3DecoderLayer,
        FastPhi3Model,
        FastPhi3ForCausalLM,
    ),
    covers="Phi 3, Phi 3.5, Phi 4",
)
