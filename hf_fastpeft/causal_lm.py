"""The CausalLM's head under TRL: its fused-head contract served with the gradient taken in the forward.

TRL's trainers put a forward of their own on the CausalLM instance, after the trainer's constructor has run our
callbacks, and call it with ``fused_lm_head=True``. The fast class therefore looks at the instance's ``forward`` each
time it is asked for: TRL's is served by our block where the head is frozen and plain, everything else is left alone.
Neither the instance's attribute nor TRL's module is written to, and ``restore()`` leaves TRL's own forward in place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_fastpeft.blocks.lm_head import HeadOptions, lm_head_log_probs
from hf_fastpeft.layers import COMPILED, FastModule
from hf_fastpeft.lowrank import compute_dtype, read

__all__ = ["FastCausalLM"]

NO_HEAD = "plain forward: real logits"
# what TRL's forward closes over; another version with other names keeps its own head
CLOSED_OVER = {
    "backbone_attr",
    "cast_lm_head_to_fp32",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
    "temperature",
    "text_config",
}


def _trl_options(forward: Any) -> dict[str, Any] | None:
    """The arguments of TRL's ``add_fused_lm_head`` that this bound forward was made with; None if it is not TRL's."""
    function = getattr(forward, "__func__", None)
    if function is None or function.__globals__.get("__name__") != "trl.trainer.utils":
        return None
    names = function.__code__.co_freevars
    if not set(names) >= CLOSED_OVER:
        return None
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__, strict=True)}


class _ForwardOf:
    """Data descriptor: what ``model.forward`` is, given what other libraries put on the instance."""

    @torch.compiler.disable  # a lookup, not a computation; traced, it recurses (torch 2.13)
    def __get__(self, model: Any, owner: type[FastModule]) -> Callable[..., Any]:
        stock: Callable[..., Any] = (owner.stock_class() or nn.Module).forward
        if model is None:
            return stock
        own: Callable[..., Any] | None = model.__dict__.get("forward")
        if own is None:
            return stock.__get__(model)  # type: ignore[no-any-return]
        options = _trl_options(own)
        if options is None:
            return own
        wrapped = partial(_serve_trl, model, own, options)
        wrapped.__wrapped__ = own  # type: ignore[attr-defined]  # generate() reads the signature
        return wrapped

    def __set__(self, model: Any, value: Any) -> None:
        model.__dict__["forward"] = value

    def __delete__(self, model: Any) -> None:
        model.__dict__.pop("forward")


class FastCausalLM(FastModule):
    """A CausalLM whose TRL head takes its gradient in the forward; without TRL it is stock."""

    blocks = ("lm_head",)
    forward = _ForwardOf()

    @classmethod
    def tolerates(cls, forward: Any) -> bool:
        """TRL's forward may be there already."""
        return _trl_options(forward) is not None

    def obstacle(self, block: str) -> str | None:
        forward = self.__dict__.get("forward")
        while forward is not None:  # accelerate wraps it for autocast when the CausalLM is the trained model itself
            options = _trl_options(forward)
            if options is not None:
                return _head_obstacle(self, options)
            forward = getattr(forward, "__wrapped__", None)
        return NO_HEAD


def _head_obstacle(model: Any, options: dict[str, Any]) -> str | None:
    if options["cast_lm_head_to_fp32"]:
        return "head in float32 outside autocast (cast_lm_head_to_fp32)"
    if getattr(options["text_config"], "output_router_logits", False):
        return "router logits"
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"head is {type(head).__name__}"
    record = read(head)
    if isinstance(record, str):
        return record
    if record.weight.requires_grad or (record.bias is not None and record.bias.requires_grad):
        return "the head is trained"
    return None


def _serve_trl(model: Any, own: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """TRL's ``forward(fused_lm_head=True)``: its outputs, from our block where that is exact."""
    if not kwargs.get("fused_lm_head", False):
        return own(*args, **kwargs)
    site = model.__dict__.get("_fastpeft")
    if site is None:  # restored, while accelerate's autocast wrapper still holds this forward
        return own(*args, **kwargs)
    reason = COMPILED if torch.compiler.is_compiling() else _head_obstacle(model, options)
    if reason is None and kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
        reason = "no labels"
    if reason is not None:
        site.fall_back("lm_head", reason)
        return own(*args, **kwargs)
    kwargs.pop("fused_lm_head")
    labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    num_items_in_batch = kwargs.pop("num_items_in_batch", None)
    hidden_BSH = getattr(model, options["backbone_attr"])(*args, **{**kwargs, "use_cache": False}).last_hidden_state
    if shift_labels is None:
        hidden_BSH, labels_BS = hidden_BSH[:, :-1], labels[:, 1:]
    else:
        labels_BS = shift_labels
    head = model.get_output_embeddings()
    hidden_BSH, labels_BS = hidden_BSH.to(head.weight.device), labels_BS.to(head.weight.device)
    mask_BS = labels_BS != -100
    dtype = compute_dtype(hidden_BSH, head.weight) or hidden_BSH.dtype
    stats = lm_head_log_probs(
        hidden_BSH[mask_BS],  # rows without a label cost nothing
        head.weight,
        head.bias,
        labels_BS[mask_BS],
        dtype=dtype,
        options=HeadOptions(options["logit_scale"], options["final_logit_softcapping"], float(options["temperature"])),
        impl=site.impl,
    )
    site.fused["lm_head"] += 1
    wanted = {"log_probs", *options["outputs"]}
    # masked_scatter keeps the result connected to the model even when no label is left
    fields = {
        name: value.new_zeros(mask_BS.shape).masked_scatter(mask_BS, value) if name in wanted else None
        for name, value in stats._asdict().items()
    }
    loss = -stats.log_probs.sum() / (mask_BS.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    output_class = own.__func__.__globals__["FusedCausalLMOutput"]  # type: ignore[attr-defined]
    return output_class(loss=loss, label_mask=mask_BS, aux_loss=None, **fields)
