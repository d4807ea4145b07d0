"""What a training step's logits would have been, for the few who read them.

They come from the forward's hidden states and the head's weight of then. A step that left positions out has no hidden
states of them: its backbone runs once more, which is right only as long as nothing has changed since; where something
has, reading them is an error and never another step's logits.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_fastpeft.blocks.lm_head import HeadOptions
from hf_fastpeft.blocks.projection import Draw
from hf_fastpeft.fast_module import FastModule
from hf_fastpeft.hooks import foreign_code
from hf_fastpeft.lazy_output import LazyLogits
from hf_fastpeft.lowrank import compute_dtype
from hf_fastpeft.routing import Routing
from hf_fastpeft.watch import Watch

__all__ = ["SecondForward", "lazy_logits"]

LEFT_OUT = "logits: this training step computed the labelled positions only, and "
READ_EARLIER = "; read them before that, or patch_model(routing=False)"


class SecondForward:
    """The backbone's forward of now, once more and unrouted, with the same random numbers.

    It makes a cache of its own where the first one did: transformers looks for packed rows only without a cache.
    """

    def __init__(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], on: torch.Tensor, routing: Routing
    ) -> None:
        self.backbone, self.args, self.kwargs, self.routing = backbone, args, kwargs, routing
        self.draw, self.backwards = Draw(on), routing.backwards
        kind = on.device.type
        self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self._state: list[Any] = []

    def note(self) -> None:
        """Remember, after the first forward, what it has read."""
        self._state = self._now()

    def _now(self) -> list[Any]:
        """What the layers multiplied with, by identity and version: readings, their tensors, and the inputs."""
        state: list[Any] = [self.backbone.training]
        tensors = [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, torch.Tensor)]
        for layer in self.backbone.layers:  # type: ignore[union-attr]
            for module in (layer.self_attn, layer.mlp):
                if not isinstance(module, FastModule):
                    continue
                for name, linears in getattr(module, "linears", {}).items():
                    known = module._fastpeft.readings.get(name)
                    if known is None or not known[1].same():
                        state.append(_adapters_of(module, linears))
                        continue
                    state.append(id(known[1]))
                    tensors += [tensor for bundle in known[2] for tensor in bundle.flat if tensor is not None]
        return [*state, *((id(t), t._version) for t in tensors if not t.is_inference())]

    def __call__(self) -> torch.Tensor:
        # an optimizer may have moved the parameters since, and not all bump their versions
        if self.backwards != self.routing.backwards:
            raise RuntimeError(f"{LEFT_OUT}a backward has run since{READ_EARLIER}")
        if self._now() != self._state:
            raise RuntimeError(f"{LEFT_OUT}adapters, weights or inputs have changed since{READ_EARLIER}")
        if reason := foreign_code(list(self.backbone.children()), Watch()):
            raise RuntimeError(f"{LEFT_OUT}{reason}, which would run once more; patch_model(routing=False) keeps all")
        self.routing.warn_of_second_forward()
        with self.draw, torch.enable_grad(), torch.autocast(*self.autocast):
            hidden_BSH: torch.Tensor = self.backbone(*self.args, **self.kwargs).last_hidden_state
        return hidden_BSH


def _adapters_of(module: nn.Module, names: tuple[str, ...]) -> list[Any]:
    """The state of linears that run stock, as far as it is cheap to know."""
    layers = [getattr(module, name) for name in names]
    return [
        (id(m), m.disable_adapters, tuple(m.active_adapters), tuple(m.merged_adapters), tuple(m.scaling.items()))
        if isinstance(m, BaseTunerLayer) and hasattr(m, "scaling")
        else id(m)
        for m in layers
    ]


def lazy_logits(
    model: Any,
    hidden_BSH: torch.Tensor | None,
    again: SecondForward | None,
    rows_NH: torch.Tensor,
    options: HeadOptions,
) -> LazyLogits:
    """What stock would have returned, under the autocast of now.

    Args:
        model: the CausalLM.
        hidden_BSH: the backbone's results; None where positions were left out.
        again: what gives them then.
        rows_NH: the labelled ones among them, through which the loss's backward goes.
        options: how products become logits.
    """
    head = model.get_output_embeddings()
    # as they are now: later hooks, moves and replaced parameters are not for this step
    weight_VH, bias_V = head.weight.detach(), None if head.bias is None else head.bias.detach()
    kind, versions = weight_VH.device.type, [t._version for t in (weight_VH, bias_V) if t is not None]
    enabled, autocast_dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    given: list[torch.Tensor] = []

    def compute() -> torch.Tensor:
        if [t._version for t in (weight_VH, bias_V) if t is not None] != versions:
            raise RuntimeError("logits: the head's weight was written to since this forward; read them before that")
        assert hidden_BSH is not None or again is not None
        hidden = again() if hidden_BSH is None else hidden_BSH  # type: ignore[misc]
        with torch.enable_grad(), torch.autocast(kind, autocast_dtype, enabled):
            logits = nn.functional.linear(hidden.to(weight_VH.device), weight_VH, bias_V)
            if options.scale != 1.0:
                logits = logits * options.scale
            if options.softcap is not None:
                logits = torch.tanh(logits / options.softcap) * options.softcap
        given.append(logits)
        return logits

    routing = model._fastpeft.routing

    def begin(_: torch.Tensor) -> None:
        routing.backwards += again is not None
        if any(logits._backward_hooks or logits.retains_grad for logits in given):
            raise RuntimeError(
                "hf_fastpeft: outputs.logits has a hook or retains its gradient, and the loss was computed without "
                "them; call the model with logits_to_keep or without labels, or hf_fastpeft.restore(model)"
            )

    if rows_NH.requires_grad:
        rows_NH.register_hook(begin)  # type: ignore[no-untyped-call]
    return LazyLogits(compute, compute_dtype(rows_NH, head.weight) or rows_NH.dtype)
