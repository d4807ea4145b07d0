"""Mixtral (transformers ``model_type="mixtral"``), all but its experts."""

from typing import ClassVar

import torch
from transformers.models.mixtral import modeling_mixtral as stock

from hf_fastpeft.experts import FastMoeCausalLM, StockExperts
from hf_fastpeft.families import Family
from hf_fastpeft.layers import FastAttention, FastBackbone, FastDecoderLayer, FastRMSNorm

__all__ = [
    "FAMILY",
    "FastMixtralAttention",
    "FastMixtralDecoderLayer",
    "FastMixtralForCausalLM",
    "FastMixtralModel",
    "FastMixtralRMSNorm",
    "FastMixtralSparseMoeBlock",
]


class FastMixtralRMSNorm(FastRMSNorm, stock.MixtralRMSNorm):
    """``MixtralRMSNorm`` with the fused norm."""


class FastMixtralSparseMoeBlock(StockExperts, stock.MixtralSparseMoeBlock):
    """``MixtralSparseMoeBlock``, which stays stock."""

    jitter_noise: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # stock's noise is written into its input, which the fused norm's output does not allow
        noisy = self.training and self.jitter_noise > 0
        return super().forward(hidden_states.clone() if noisy else hidden_states)


class FastMixtralAttention(FastAttention, stock.MixtralAttention):
    """``MixtralAttention`` with fused projections around Hugging Face's attention call."""

    attention_options: ClassVar[dict[str, str]] = {"sliding_window": "config.sliding_window"}
    eager_attention = staticmethod(stock.eager_attention_forward)
    stock_rotary = staticmethod(stock.apply_rotary_pos_emb)


class FastMixtralDecoderLayer(FastDecoderLayer, stock.MixtralDecoderLayer):
    """``MixtralDecoderLayer`` with norms and residuals inside the blocks."""


class FastMixtralModel(FastBackbone, stock.MixtralModel):
    """``MixtralModel``, which refreshes what its blocks share."""


class FastMixtralForCausalLM(FastMoeCausalLM, stock.MixtralForCausalLM):
    """``MixtralForCausalLM`` with the fused head."""


FAMILY = Family(
    "mixtral",
    (
        FastMixtralRMSNorm,
        FastMixtralAttention,
        FastMixtralSparseMoeBlock,
        FastMixtralDecoderLayer,
        FastMixtralModel,
        FastMixtralForCausalLM,
    ),
    covers="Mixtral 8x7B, 8x22B",
)
