"""Qwen 3 with experts (transformers ``model_type="qwen3_moe"``), all but these."""

from typing import ClassVar

from transformers.models.qwen3_moe import modeling_qwen3_moe as stock

from hf_fastpeft.experts import FastMoeCausalLM, StockExperts
from hf_fastpeft.families import Family
from hf_fastpeft.layers import FastAttention, FastBackbone, FastDecoderLayer, FastMLP, FastRMSNorm

__all__ = [
    "FAMILY",
    "FastQwen3MoeAttention",
    "FastQwen3MoeDecoderLayer",
    "FastQwen3MoeForCausalLM",
    "FastQwen3MoeMLP",
    "FastQwen3MoeModel",
    "FastQwen3MoeRMSNorm",
    "FastQwen3MoeSparseMoeBlock",
]


class FastQwen3MoeRMSNorm(FastRMSNorm, stock.Qwen3MoeRMSNorm):
    """``Qwen3MoeRMSNorm`` with the fused norm."""


class FastQwen3MoeMLP(FastMLP, stock.Qwen3MoeMLP):
    """``Qwen3MoeMLP`` as one block."""


class FastQwen3MoeSparseMoeBlock(StockExperts, stock.Qwen3MoeSparseMoeBlock):
    """``Qwen3MoeSparseMoeBlock``, which stays stock."""


class FastQwen3MoeAttention(FastAttention, stock.Qwen3MoeAttention):
    """``Qwen3MoeAttention`` with fused projections around Hugging Face's attention call."""

    qk_norms = ("q_norm", "k_norm")
    attention_options: ClassVar[dict[str, str]] = {"sliding_window": "sliding_window"}
    eager_attention = staticmethod(stock.eager_attention_forward)
    stock_rotary = staticmethod(stock.apply_rotary_pos_emb)


class FastQwen3MoeDecoderLayer(FastDecoderLayer, stock.Qwen3MoeDecoderLayer):
    """``Qwen3MoeDecoderLayer`` with norms and residuals inside the blocks."""


class FastQwen3MoeModel(FastBackbone, stock.Qwen3MoeModel):
    """``Qwen3MoeModel``, which refreshes what its blocks share."""


class FastQwen3MoeForCausalLM(FastMoeCausalLM, stock.Qwen3MoeForCausalLM):
    """``Qwen3MoeForCausalLM`` with the fused head."""


FAMILY = Family(
    "qwen3_moe",
    (
        FastQwen3MoeRMSNorm,
        FastQwen3MoeAttention,
        FastQwen3MoeMLP,
        FastQwen3MoeSparseMoeBlock,
        FastQwen3MoeDecoderLayer,
        FastQwen3MoeModel,
        FastQwen3MoeForCausalLM,
    ),
    covers="Qwen 3 30B-A3B, 235B-A22B",
)
