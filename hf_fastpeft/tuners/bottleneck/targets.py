"""Which modules bottleneck adapters go on by default, how wide a module is, and which cannot carry one."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["DEFAULT_TARGETS", "LINEAR_TARGETS", "refusal", "widths"]

# Modules that span a sub-layer from behind its norm to before its residual: both forms have their place there.
_BLOCKS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("self_attn", "mlp"): (
        "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite", "llama", "mistral", "mixtral",
        "nemotron", "olmo", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm",
        "starcoder2",
    ),
    ("attn", "mlp"): ("gpt2", "modernbert"),
    ("attention", "mlp"): ("gpt_neox",),
    ("attention", "ffn"): ("distilbert",),
    ("self_attention", "mlp"): ("falcon",),
}  # fmt: skip
# Their blocks add the residual themselves, so the adapter goes on the linear before it: Houlsby's place, but that a
# dropout between the linear and the residual comes after the adapter. No module has the parallel form's place.
_LINEARS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("output.dense",): ("bert", "deberta", "deberta-v2", "electra", "roberta", "xlm-roberta"),
    ("self_attention.dense", "mlp.dense_4h_to_h"): ("bloom",),
    ("self_attn", "fc2"): ("opt",),
    ("SelfAttention.o", "EncDecAttention.o", "wo"): ("mt5", "t5"),
}
LINEAR_TARGETS: dict[str, tuple[str, ...]] = {kind: names for names, kinds in _LINEARS.items() for kind in kinds}
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    **{kind: names for names, kinds in _BLOCKS.items() for kind in kinds},
    **LINEAR_TARGETS,
}
_NO_FORWARD = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_FEATURES_NOT_LAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def refusal(module: nn.Module, parent: nn.Module) -> str | None:
    """Why the module can carry no adapter, or None; wrapping it would be silently wrong or never called."""
    if isinstance(module, _NO_FORWARD):
        return "it is only a container and is never called"
    if isinstance(module, _FEATURES_NOT_LAST):
        return "its features are not in the last dimension"
    if isinstance(module, nn.MultiheadAttention) or isinstance(
        parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    ):
        return "torch's fused encoder layer reads its weights without calling it"
    if "mamba" in type(parent).__name__.lower():
        return f"the fused kernel of {type(parent).__name__} reads its weights without calling it"
    inside = next((name for name, m in module.named_modules() if isinstance(m, BaseTunerLayer)), None)
    if inside is not None:
        what = type(module.get_submodule(inside))
        return f"{inside or 'the module'!r} is already a {what.__module__}.{what.__qualname__}"
    return None


def widths(module: nn.Module, model: nn.Module, hidden_size: int | None) -> tuple[int | None, int] | str:
    """Features that the module takes (None: token ids) and gives, or why they cannot be told.

    A linear says so itself. A block is as wide as ``hidden_size`` where given, else as its own or the model's config
    says, which one of its linears must confirm.
    """
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Embedding):
        return None, module.embedding_dim
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(d_in, int) and isinstance(d_out, int):
        return d_in, d_out
    if hidden_size is not None:
        return hidden_size, hidden_size
    config = getattr(module, "config", None) or getattr(model, "config", None)
    found = _hidden_size(config)
    if found is None:
        return f"a {type(module).__name__} is not a linear, and no config has its hidden_size"
    given = {_out_features(m) for m in module.modules()} - {None}
    if given and found not in given:
        return f"the config has hidden_size={found}, and its linears give {sorted(given)}"  # type: ignore[type-var]
    return found, found


def _hidden_size(config: Any) -> int | None:
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = getattr(config, "hidden_size", None)
    return found if isinstance(found, int) else None


def _out_features(module: nn.Module) -> int | None:
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1])
    found = getattr(module, "out_features", None)
    return found if isinstance(found, int) else None
