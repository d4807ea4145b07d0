"""Gemma 3 with images (transformers ``model_type="gemma3"``): its language model; the vision tower stays stock."""

from typing import Any

from transformers.models.gemma3 import modeling_gemma3 as stock

from hf_fastpeft.blocks.lm_head import HeadOptions
from hf_fastpeft.causal_lm import FastCausalLM
from hf_fastpeft.families import Family

from . import gemma3_text

__all__ = ["FAMILY", "FastGemma3ForConditionalGeneration"]


class FastGemma3ForConditionalGeneration(FastCausalLM, stock.Gemma3ForConditionalGeneration):
    """``Gemma3ForConditionalGeneration`` with the fused head for calls without images."""

    def head_options(self) -> HeadOptions:
        """No soft-capping: stock reads ``final_logit_softcapping`` in the text model's head only."""
        return HeadOptions()

    def _call_obstacle(self, given: dict[str, Any]) -> str | None:
        if given.get("pixel_values") is not None or given.get("mm_encoder_outputs"):
            return "images: their hidden states are part of the output"
        return super()._call_obstacle(given)


FAMILY = Family(
    "gemma3",
    (
        gemma3_text.FastGemma3RMSNorm,
        gemma3_text.FastGemma3Attention,
        gemma3_text.FastGemma3MLP,
        gemma3_text.FastGemma3DecoderLayer,
        gemma3_text.FastGemma3TextModel,
        FastGemma3ForConditionalGeneration,
    ),
    covers="Gemma 3 4B, 12B, 27B",
    notes="vision tower stock; head fused without images",
)
