"""The CausalLM's loss from its labels without logits: a frozen head whose gradient is taken in the forward.

Two callers. A plain ``model(..., labels=...)`` in training (``transformers.Trainer``, custom loops) gets stock's loss
and an output whose logits are computed if somebody asks for them. TRL's trainers put a forward of their own on the
CausalLM instance, after the trainer's constructor has run our callbacks, and call it with ``fused_lm_head=True``: its
contract is served by the same block. The fast class therefore looks at the instance's ``forward`` each time it is
asked for, and leaves any other than TRL's alone. Neither the instance's attribute nor TRL's module is written to, and
``restore()`` leaves TRL's own forward in place.

Both may tell the layers which positions count (:mod:`hf_fastpeft.routing`); that depends on the caller alone, never on
what happened before. TRL's output has no logits. A Trainer, known by its ``num_items_in_batch``, wants the loss; where
it reads the logits all the same they come from a second forward. Every other caller's forward keeps all positions.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import MethodType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_fastpeft.blocks.bundle import Bundle
from hf_fastpeft.blocks.lm_head import HeadOptions, TokenStats, lm_head_log_probs
from hf_fastpeft.fast_module import COMPILED, FastModule
from hf_fastpeft.hooks import foreign_code, hooked
from hf_fastpeft.layers import CACHE_NAMES, FastAttention, FastBackbone, FastDecoderLayer
from hf_fastpeft.lazy_logits import SecondForward, lazy_logits
from hf_fastpeft.lazy_output import OutputWithLazyLogits, lazy_output_class, output_class_of
from hf_fastpeft.lowrank import LowRank, compute_dtype, read
from hf_fastpeft.routing import Plan, notices_rows, plan_route, take
from hf_fastpeft.watch import Watch

__all__ = ["FastCausalLM"]

IGNORED = -100
# the cache as an argument and in outputs: transformers 5.24 renamed it
CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"
ROWS = "rows"  # what :meth:`FastCausalLM._read` is asked for
NOT_TRAINING = "not training: real logits"
NO_LABELS = "no labels: real logits"
OTHER_SHAPE = "labels of another shape than the tokens"
FSDP1 = "FSDP 1 (it reads every field of an output)"
CALLER = "the caller may read the logits: it gives no num_items_in_batch, as Trainer does"
FOREIGN = "foreign forward on this instance (another library patched it)"
# how families other than ours scale their logits; what each means is the family's to say, in head_options
SCALES = ("lm_head_multiplier", "logit_scale", "logits_scaling", "output_multiplier")
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


def _forward_over(stock: Any) -> Callable[..., Any]:
    """The forward of a patched CausalLM over that of this stock class."""
    signature = inspect.signature(stock.forward)
    defaults = {
        name: parameter.default
        for name, parameter in list(signature.parameters.items())[1:]
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # the class is stock's again after restore(), while others may hold this function
        if torch.compiler.is_compiling() or not isinstance(self, FastCausalLM):
            return stock.forward(self, *args, **kwargs)
        given = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        given = _with_cache_by_name(given)
        reason = self._call_obstacle(given)
        if reason is not None or len(args) > len(defaults) or not kwargs.keys().isdisjoint([*defaults][: len(args)]):
            self._fastpeft.fall_back("lm_head", reason or "arguments that stock refuses")
            return stock.forward(self, *args, **kwargs)
        return self._fused_loss(given)

    # Trainer and generate() decide by the signature; accelerate unwraps along __wrapped__ and must stop here
    del forward.__wrapped__
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _with_cache_by_name(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments in which the cache has this release's name; the one before, which PEFT 0.21 uses, is deprecated."""
    if CACHE != "cache" or "past_key_values" not in given or given.get(CACHE) is not None:
        return given
    others = {name: value for name, value in given.items() if name != "past_key_values"}
    return {**others, CACHE: given["past_key_values"]}


class _ForwardOf:
    """Data descriptor: what ``model.forward`` is, given what other libraries put on the instance."""

    def __get__(self, model: Any, owner: Any) -> Callable[..., Any]:
        fast: Callable[..., Any] = getattr(owner, "_over_stock", nn.Module.forward)
        if model is None:
            return fast
        own: Callable[..., Any] | None = model.__dict__.get("forward")
        if torch.compiler.is_compiling():  # it cannot trace the making of a bound method (torch 2.13)
            return functools.partial(fast, model) if own is None else own
        if own is None:
            return MethodType(fast, model)
        options = _trl_options(own)
        if options is None:
            return own
        wrapped = functools.partial(_serve_trl, model, own, options)
        wrapped.__wrapped__ = own  # type: ignore[attr-defined]  # generate() reads the signature
        return wrapped

    def __set__(self, model: Any, value: Any) -> None:
        model.__dict__["forward"] = value

    def __delete__(self, model: Any) -> None:
        model.__dict__.pop("forward")


class FastCausalLM(FastModule):
    """A CausalLM that computes its loss without logits in training, for Trainer's own forward and for TRL's."""

    blocks = ("lm_head",)
    forward = _ForwardOf()
    _over_stock: ClassVar[Callable[..., Any]]
    config: Any
    base_model_prefix: str
    get_output_embeddings: Callable[[], nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """One forward a class, so that others may compare it by identity."""
        super().__init_subclass__(**kwargs)
        stock = cls.stock_class()
        if stock in cls.__bases__:
            cls._over_stock = staticmethod(_forward_over(stock))

    @classmethod
    def tolerates(cls, forward: Any) -> bool:
        """TRL's forward may be there already."""
        return _trl_options(forward) is not None

    def head_options(self) -> HeadOptions | str:
        """What the family does to the head's products, or why that cannot be fused; from the config by default."""
        config = self.config.get_text_config()
        for name in SCALES:
            if getattr(config, name, None) not in (None, 1):
                return f"config.{name}={getattr(config, name)!r}"
        return HeadOptions(softcap=getattr(config, "final_logit_softcapping", None))

    def obstacle(self, block: str) -> str | None:
        forwards = list(_forwards_on(self))
        for forward in forwards:
            options = _trl_options(forward)
            if options is not None:
                return _trl_obstacle(self, options)
        fast = type(self).forward
        if forwards and not any(getattr(forward, "__func__", forward) is fast for forward in forwards):
            return FOREIGN
        return self._loss_obstacle()

    def _read(self, block: str, watch: Watch) -> tuple[Bundle, ...] | str:
        """For :data:`ROWS`: which module of the backbone notices that rows are left out."""
        assert block == ROWS
        backbone = getattr(self, self.base_model_prefix)
        roots = backbone.layers, getattr(backbone, "norm", None)
        return next((reason for root in roots if (reason := notices_rows(root, watch))), ())

    def routing_obstacle(self) -> str | None:
        """Why no training call would leave positions out now."""
        return _route_obstacle(self, getattr(self, self.base_model_prefix))

    def _loss_obstacle(self) -> str | None:
        """Why a training call with labels would run stock, whatever the call."""
        stock: Any = type(self).stock_class()
        if stock.forward.__module__ != stock.__module__:
            return f"{stock.__name__}.forward was replaced by {stock.forward.__module__}"
        if self.loss_function is not ForCausalLMLoss:
            return f"loss function {getattr(self.loss_function, '__name__', self.loss_function)}"
        config = self.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            return "router logits"
        low = _frozen_head(self)
        if isinstance(low, str):
            return low
        # during a forward FSDP 1 keeps views of its flat parameter on the modules, FSDP 2 parameters
        if "_is_fsdp_managed_module" in self.__dict__ and not isinstance(low.weight, nn.Parameter):
            return FSDP1
        if low.weight.shape[0] != config.vocab_size:
            return f"head has {low.weight.shape[0]} rows, config.vocab_size is {config.vocab_size}"
        if _loss_is_rounded(low.weight.dtype):
            return "float64 model (stock computes the loss in float32)"
        if output_class_of(stock.forward) is None:
            return f"{stock.__name__}.forward does not say what output it gives"
        options = self.head_options()
        return options if isinstance(options, str) else None

    def _call_obstacle(self, given: dict[str, Any]) -> str | None:
        """Why this call must run stock."""
        reason = self._may_fuse()
        if reason is not None:
            return reason
        if not self.training or not torch.is_grad_enabled():
            return NOT_TRAINING
        labels, shift_labels = given.get("labels"), given.get("shift_labels")
        if labels is None:  # stock has no loss either, whatever shift_labels are
            return NO_LABELS
        targets = labels if shift_labels is None else shift_labels
        if getattr(targets, "dtype", None) != torch.int64:
            return f"labels are {getattr(targets, 'dtype', type(targets).__name__)}"
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None or targets.numel() != tokens.shape[:2].numel():
            return OTHER_SHAPE
        keep = given.get("logits_to_keep", 0)
        if not isinstance(keep, int) or keep != 0:
            return "logits_to_keep"
        if any(name in given for name in CACHE_NAMES if name != CACHE):
            return "a cache by another release's name"
        return_dict = given.get("return_dict")
        if not (self.config.return_dict if return_dict is None else return_dict):
            return "return_dict=False"
        if given.get("output_router_logits"):
            return "router logits"
        return self._loss_obstacle()

    def _fused_loss(self, given: dict[str, Any]) -> OutputWithLazyLogits:
        """Stock's output for these arguments, the logits left for later."""
        for name in ("logits_to_keep", "return_dict"):
            given.pop(name, None)
        targets_BS = _targets(given.pop("labels"), given.get("shift_labels"), given.get("ignore_index", IGNORED))
        mask_BS = targets_BS != given.get("ignore_index", IGNORED)
        backbone, num_items = getattr(self, self.base_model_prefix), given.get("num_items_in_batch")
        # other people's code could give a second forward, for logits that are read, another state
        unsure = CALLER if num_items is None else _foreign_code(backbone)
        rows_NH, places_N, outputs, again = _labelled_rows(self, backbone, (), given, mask_BS, unsure)
        options = self.head_options()
        assert isinstance(options, HeadOptions)
        stats = _token_stats(self, rows_NH, _chosen(targets_BS, places_N), options, entropy_gradient=False)
        if isinstance(num_items, torch.Tensor):
            num_items = num_items.to(stats.log_probs.device)
        loss = -stats.log_probs.mean() if num_items is None else -stats.log_probs.sum() / num_items
        stock_class: Any = type(self).stock_class()
        stock = output_class_of(stock_class.forward)
        assert stock is not None
        others = {field.name: getattr(outputs, field.name, None) for field in fields(stock)}
        lazy = lazy_logits(self, outputs.last_hidden_state, again, rows_NH, options)
        return lazy_output_class(stock)(  # type: ignore[arg-type]
            **{**others, "loss": loss, "logits": lazy}
        )


def _foreign_code(backbone: nn.Module) -> str | None:
    if isinstance(backbone, FastBackbone):
        return backbone.foreign_code()
    return foreign_code(list(backbone.children()), Watch())


def _forwards_on(model: nn.Module) -> Iterator[Any]:
    """Forwards that other libraries put on the instance, each with those under it."""
    for name in ("forward", "_old_forward"):  # accelerate's hooks keep what was there in the second
        forward = model.__dict__.get(name)
        while forward is not None:
            yield forward
            forward = getattr(forward, "__wrapped__", None)


def _frozen_head(model: Any) -> LowRank | str:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return "adapter on the head" if hasattr(head, "lora_A") else f"head is {type(head).__name__}"
    record = read(head)
    if isinstance(record, str):
        return record
    if record.weight.requires_grad or (record.bias is not None and record.bias.requires_grad):
        return "the head is trained"
    return record


def _loss_is_rounded(dtype: torch.dtype) -> bool:
    """Stock's loss rounds a float64 model's logits to float32: only its own rounding is equal to the last digits."""
    return dtype == torch.float64


def _targets(labels: torch.Tensor, shift_labels: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """The label each position predicts, ``(batch, seq_len)``; the last position predicts nothing."""
    if shift_labels is not None:
        return shift_labels
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


class _Labelled(NamedTuple):
    """Hidden states ``(N, hidden_size)`` of the masked positions, their places among all, the backbone's outputs, and,
    if these lack ``last_hidden_state``, a forward that has it."""

    rows_NH: torch.Tensor
    places_N: torch.Tensor
    outputs: Any
    again: SecondForward | None


def _labelled_rows(
    model: "FastCausalLM",
    backbone: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    mask_BS: torch.Tensor,
    unsure: str | None = None,
) -> _Labelled:
    """Run the backbone; positions without a label cost nothing in the head, and little in routed layers.

    Finding the rows is the one wait for the device in a step. ``unsure`` is the caller's reason not to route.
    """
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    mask_P = mask_BS.reshape(-1) if tokens is None else mask_BS.reshape(-1).to(tokens.device)
    routing = model._fastpeft.routing
    reason = _unroutable(model, args, kwargs) or unsure or _route_obstacle(model, backbone)
    if reason is None and (tokens is None or tokens.shape[:2].numel() != mask_P.numel()):
        reason = OTHER_SHAPE
    if reason is None and tokens is not None:
        last = backbone.layers[-1].self_attn  # type: ignore[index,union-attr]
        plan = plan_route(tuple(tokens.shape[:2]), mask_P, kwargs.get("attention_mask"), last, routing)
    else:
        routing.unrouted[str(reason)] += 1
        places_N = mask_P.nonzero().squeeze(1)
        plan = Plan(None, places_N, places_N)
    again = None
    if plan.route is None:
        outputs = backbone(*args, **kwargs)
    else:
        again = SecondForward(backbone, args, kwargs, mask_P, routing)
        outputs = backbone(*args, **kwargs, fastpeft_route=plan.route)
        again.note()
    rows_N = plan.rows_N
    if plan.route is not None and not plan.route.taken:  # a backbone that keeps its kwargs for itself
        rows_N, again = plan.places_N, None
    hidden_RH = outputs.last_hidden_state.flatten(0, -2)
    rows_NH = hidden_RH if rows_N is None else take(hidden_RH, rows_N.to(hidden_RH.device))
    if again is not None:
        outputs.last_hidden_state = None
    return _Labelled(rows_NH, plan.places_N, outputs, again)


def _route_obstacle(model: "FastCausalLM", backbone: nn.Module) -> str | None:
    """Why the layers must see every position, whatever the call."""
    if not model._fastpeft.routing.enabled:
        return "switched off (routing=False)"
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != getattr(model.config, "num_hidden_layers", None):
        return f"{type(backbone).__name__} without its layers"
    for layer in layers:
        if not isinstance(layer, FastDecoderLayer):
            return f"{type(layer).__name__} is not patched"
        if layer._compiled_call_impl is not None:  # a number of positions of its own in every step
            return f"{type(layer).__name__} is compiled"
        if not isinstance(layer.self_attn, FastAttention):
            return f"{type(layer.self_attn).__name__} is not patched"
        if layer.training != model.training or layer.self_attn.training != model.training:
            return "some layers train, others do not"
    if len({id(layer.self_attn) for layer in layers}) < len(layers):
        return "a layer occurs twice"
    if getattr(model.config, "router_jitter_noise", 0):
        return "router jitter"
    found = hooked(backbone) or model._bundles(ROWS)
    return found if isinstance(found, str) else None


def _unroutable(model: "FastCausalLM", args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why this call's layers must see every position."""
    if reason := model._may_fuse():
        return reason
    if not model.training:
        return "not training"
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        asked = kwargs.get(name, getattr(model.config, name, False))
        if asked is not None and asked is not False:  # 0 asks for the first layer's (transformers 5.24)
            return name
    if any(kwargs.get(name) is not None for name in CACHE_NAMES):
        return "a cache given"
    return "positional arguments" if len(args) > 1 else None


def _chosen(targets_BS: torch.Tensor, places_N: torch.Tensor) -> torch.Tensor:
    return targets_BS.reshape(-1).index_select(0, places_N.to(targets_BS.device))


def _token_stats(
    model: Any, rows_NH: torch.Tensor, targets_N: torch.Tensor, options: HeadOptions, *, entropy_gradient: bool
) -> TokenStats:
    """The block on the model's head, counted."""
    head = model.get_output_embeddings()
    rows_NH, targets_N = rows_NH.to(head.weight.device), targets_N.to(head.weight.device)
    stats = lm_head_log_probs(
        rows_NH,
        head.weight,
        head.bias,
        targets_N,
        dtype=compute_dtype(rows_NH, head.weight) or rows_NH.dtype,
        options=options,
        impl=model._fastpeft.impl,
        entropy_gradient=entropy_gradient,
    )
    model._fastpeft.fused["lm_head"] += 1
    return stats


def _trl_obstacle(model: Any, options: dict[str, Any]) -> str | None:
    if options["cast_lm_head_to_fp32"]:
        return "head in float32 outside autocast (cast_lm_head_to_fp32)"
    if getattr(options["text_config"], "output_router_logits", False):
        return "router logits"
    low = _frozen_head(model)
    return low if isinstance(low, str) else None


def _trl_label_obstacle(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    labels, tokens = kwargs.get("shift_labels"), args[0] if args else kwargs.get("input_ids")
    labels = kwargs.get("labels") if labels is None else labels
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if labels is None:
        return "no labels"
    return OTHER_SHAPE if tokens is None or labels.shape != tokens.shape[:2] else None


def _serve_trl(model: Any, own: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """TRL's ``forward(fused_lm_head=True)``: its outputs, from our block where that is exact."""
    # the class is stock's again after restore(), while accelerate's autocast wrapper holds this forward
    if not kwargs.get("fused_lm_head", False) or not isinstance(model, FastCausalLM):
        return own(*args, **kwargs)
    reason = COMPILED if torch.compiler.is_compiling() else _trl_obstacle(model, options)
    if reason is None:
        reason = _trl_label_obstacle(args, kwargs)
    if reason is not None:
        if reason is not COMPILED:
            model._fastpeft.fall_back("lm_head", reason)
        return own(*args, **kwargs)
    kwargs = _with_cache_by_name(kwargs)
    kwargs.pop("fused_lm_head")
    labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    num_items_in_batch = kwargs.pop("num_items_in_batch", None)
    targets_BS = _targets(labels, shift_labels, IGNORED)
    mask_BS = targets_BS != IGNORED
    backbone = getattr(model, options["backbone_attr"])
    rows_NH, places_N, *_ = _labelled_rows(model, backbone, args, {**kwargs, "use_cache": False}, mask_BS)
    head_options = HeadOptions(
        options["logit_scale"], options["final_logit_softcapping"], float(options["temperature"])
    )
    stats = _token_stats(model, rows_NH, _chosen(targets_BS, places_N), head_options, entropy_gradient=True)
    mask_BS = (mask_BS[:, :-1] if shift_labels is None else mask_BS).to(stats.log_probs.device)
    wanted = {"log_probs", *options["outputs"]}
    places_N = places_N.to(mask_BS.device)
    if shift_labels is None:  # a row is one shorter than those that the places were counted in
        places_N = places_N - places_N.div(targets_BS.shape[1], rounding_mode="floor")
    # index_copy keeps the result connected to the model even when no label is left; the backward of masked_scatter
    # waits for the device
    fields = {
        name: value.new_zeros(mask_BS.numel()).index_copy(0, places_N, value).view_as(mask_BS)
        if name in wanted
        else None
        for name, value in stats._asdict().items()
    }
    loss = -stats.log_probs.sum() / (mask_BS.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    output_class = own.__func__.__globals__["FusedCausalLMOutput"]  # type: ignore[attr-defined]
    return output_class(loss=loss, label_mask=mask_BS, aux_loss=None, **fields)
