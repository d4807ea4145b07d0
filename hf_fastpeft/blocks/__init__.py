"""Blocks of a decoder layer: hand-written forward and backward over the operators, with explicit save lists."""

from hf_fastpeft.blocks.attention import attention_in, attention_out
from hf_fastpeft.blocks.mlp import mlp

__all__ = ["attention_in", "attention_out", "mlp"]
