"""Which positions go through a training forward: real tokens only, and in the last layer only those that are scored.

Padding is removed between the embedding and the head: the real tokens of a batch run through norms, projections and
MLPs as one row, and are spread over their places just for Hugging Face's attention call, whose masks, kernels and
caches see the batch as it came. Behind the last layer's attention only the positions whose labels count go on: of the
others that layer needs keys and values alone. Both are exact: a padded position's hidden state reaches no real one and
no loss, and stock gives it a gradient of zero.

The head makes a :class:`Route` and hands it through the backbone's ``**kwargs`` to the decoder layers, which take it
out again. Finding the positions waits for the device once a step, as the head's own choice of rows does without it.

Shape legend: B = batch, S = seq_len, P = B * S, T = real tokens (P where padding stays), N = scored positions,
D = head_dim, H = heads or hidden_size.
"""

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from hf_fastpeft.hooks import HOOKS, hooked
from hf_fastpeft.ops._backend import first_derivative_only
from hf_fastpeft.watch import Watch

__all__ = ["Plan", "Route", "Routing", "notices_rows", "plan_route", "take"]

# The share of rows that must go before a layer's three scatters and one gather, about 2 % of its memory traffic and
# none of its products, are worth it.
WORTH = 0.05
MOST_TABLES = 4  # cos and sin of two kinds of layers; FSDP2's mixed precision casts a new copy for every layer


class _Take(torch.autograd.Function):
    """``x[index]`` along the first dimension; ``index`` names no row twice. Saves: the index."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.rows = x.shape[0]
        ctx.save_for_backward(index)
        return x.index_select(0, index)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        return _into_zeros(d_out, index, ctx.rows), None


class _Spread(torch.autograd.Function):
    """Rows at their places among ``rows`` rows of zeros. Saves: the index."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
        ctx.save_for_backward(index)
        return _into_zeros(x, index, rows)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return d_out.index_select(0, index), None, None


def _into_zeros(x: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of ``x``, each at most once: ``x[index]``."""
    return _Take.apply(x, index)  # type: ignore[no-any-return,no-untyped-call]


class Route:
    """The way of one forward's tokens through the decoder layers.

    Attributes:
        shape: (B, S).
        real_T: places of the real tokens among all P; None where padding stays.
        scored_N: of the positions that go on behind the last layer's attention, their rows among the T; None for all.
        last: the attention module of the last layer.
        taken: whether a decoder layer has taken this way; a backbone that hands no kwargs on leaves it False.
    """

    def __init__(
        self, shape: tuple[int, int], real_T: torch.Tensor | None, scored_N: torch.Tensor | None, last: nn.Module
    ) -> None:
        self.shape, self.real_T, self.scored_N, self.last = shape, real_T, scored_N, last
        self.taken = False
        # places of the scored positions among all P
        self._places_N = scored_N if real_T is None or scored_N is None else real_T.index_select(0, scored_N)
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def enter(self, h: torch.Tensor) -> torch.Tensor:
        """A layer's input: the real tokens as one row ``(1, T, H)``, if it has the whole batch ``(B, S, H)``."""
        self.taken = True
        if self.real_T is None or tuple(h.shape[:2]) != self.shape:  # fewer than B * S tokens have another shape
            return h
        return take(h.flatten(0, 1), self.real_T).unsqueeze(0)

    def table(self, positions: torch.Tensor) -> torch.Tensor:
        """A rotary table ``(B or 1, S, D)`` for the tokens that :meth:`enter` gives; each is gathered once."""
        if self.real_T is None:
            return positions
        found = self._tables.get(id(positions))
        if found is None:
            rows = positions.flatten(0, 1)
            places = self.real_T if positions.shape[0] == self.shape[0] else self.real_T % self.shape[1]
            found = positions, rows.index_select(0, places).unsqueeze(0)  # the first keeps its id taken
            if len(self._tables) < MOST_TABLES:
                self._tables[id(positions)] = found
        return found[1]

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys or values ``(1, H, T, D)`` at their places, ``(B, H, S, D)``: zeros where there is padding.

        A transposed view of ``(B, S, H, D)``, as stock's are.
        """
        if self.real_T is None:
            return x
        B, S = self.shape
        rows = _Spread.apply(x.transpose(1, 2)[0], self.real_T, B * S)  # type: ignore[no-untyped-call]
        return rows.view(B, S, *rows.shape[1:]).transpose(1, 2)  # type: ignore[no-any-return]

    def leave(self, x: torch.Tensor, attention: nn.Module) -> torch.Tensor:
        """What goes on of the attention's output ``(B, S, H)``: ``(1, T, H)``, in the last layer ``(1, N, H)``."""
        places = self._places_N if attention is self.last and self.scored_N is not None else self.real_T
        return x if places is None else take(x.flatten(0, 1), places).unsqueeze(0)

    def narrow(self, h: torch.Tensor, attention: nn.Module) -> torch.Tensor:
        """The layer's input on the way around its attention: as many rows of it as :meth:`leave` lets go on."""
        if self.scored_N is None or attention is not self.last:
            return h
        return take(h.flatten(0, 1), self.scored_N).unsqueeze(0)


@dataclass(slots=True)
class Routing:
    """Whether a model's forwards may be routed, and what came of it so far; one for all sites of a model.

    Attributes:
        enabled: the user's switch.
        backwards: backwards of routed forwards with lazy logits so far.
        second_forwards: of these forwards, those that ran once more as somebody read the logits.
        calls: forwards "padding", "last_layer"; the rows that went through, and those that stock would have computed,
            as "padding_rows", "padding_of", "last_layer_rows", "last_layer_of".
        unrouted: reason -> forwards that ran as they came.
    """

    enabled: bool = True
    backwards: int = 0
    second_forwards: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    unrouted: Counter[str] = field(default_factory=Counter)

    def count(self, part: str, rows: int, of: int) -> None:
        """One forward in which ``rows`` of ``of`` rows went through ``part``."""
        self.calls.update({part: 1, f"{part}_rows": rows, f"{part}_of": of})

    def warn_of_second_forward(self) -> None:
        """Count one; the first says what it costs."""
        self.second_forwards += 1
        if self.second_forwards == 1:
            warnings.warn(
                "outputs.logits of a training step that left positions out was read: the model's forward runs once "
                "more for it. patch_model(routing=False) keeps all positions",
                stacklevel=2,
            )

    def to_json(self) -> dict[str, Any]:
        """Per part the forwards and rows, and why the others ran as they came."""
        parts = {
            part: {"calls": self.calls[part], "rows": self.calls[f"{part}_rows"], "of": self.calls[f"{part}_of"]}
            for part in ("padding", "last_layer")
        }
        return {
            "enabled": self.enabled,
            **parts,
            "second_forwards": self.second_forwards,
            "unrouted": dict(self.unrouted),
        }


def notices_rows(root: nn.Module | None, watch: Watch) -> str | None:
    """Why some module at or below ``root`` would notice that it gets other rows than stock: hooks, foreign forwards,
    active dropout, whose masks would be others."""
    pending = [] if root is None else [root]
    for module in pending:  # grows on the way; 1 ms a thousand modules on one CPU core, the watch's look 0.15
        taken = [watch.is_set(module, name) for name in ("forward", *HOOKS)]
        if any(taken) and (reason := hooked(module)):
            return reason
        if isinstance(module, _DropoutNd):
            p, training = watch.attribute(module, "p"), watch.attribute(module, "training")
            if training and p > 0:
                return "dropout in the layers (its masks would not be stock's)"
        pending += watch.children(module)
    return None


class Plan(NamedTuple):
    """What :func:`plan_route` found: the route if there is one, and the scored positions among the rows that the
    backbone then returns, or among all P if it does not take the route."""

    route: Route | None
    rows_N: torch.Tensor | None  # None: the backbone returns exactly the scored rows
    places_N: torch.Tensor


def plan_route(
    shape: tuple[int, int],
    scored_P: torch.Tensor,
    attention_mask: torch.Tensor | None,
    last: nn.Module,
    routing: Routing,
) -> Plan:
    """The route of a forward over ``shape`` (B, S), counted; one wait for the device.

    Padding stays where less than 5 % of the positions are padding, where one of it is scored, and where
    ``attention_mask`` is none of ``shape``; it then goes on as ever.

    Args:
        shape: (B, S).
        scored_P: bool, whether a position's output counts.
        attention_mask: nonzero for real tokens.
        last: the attention module of the last layer.
        routing: where this is counted.
    """
    P = scored_P.numel()
    real_P = None
    if attention_mask is not None and tuple(attention_mask.shape) == shape:
        real_P = (attention_mask != 0).to(scored_P.device).flatten()
        counts = torch.stack([scored_P, real_P, scored_P & ~real_P]).sum(1).tolist()
        N, T, outside = counts
        reason = _padding_stays(P, T, outside)
    else:
        N, T = int(scored_P.sum()), P
        reason = "no attention mask" if attention_mask is None else f"attention mask of {attention_mask.dim()} dims"
        if attention_mask is not None and attention_mask.dim() == 2:
            reason = "attention mask of another length than the tokens"
    places_N, rows_N, real_T = _positions(scored_P, N), None, None
    if reason is None and real_P is not None:
        real_T = _positions(real_P, T)
        rows_N = (real_P.cumsum(0) - 1).index_select(0, places_N)
        routing.count("padding", T, P)
    else:
        T, rows_N = P, places_N
        routing.unrouted[f"padding: {reason}"] += 1
    if 0 < N <= (1 - WORTH) * T:
        routing.count("last_layer", N, T)
        return Plan(Route(shape, real_T, rows_N, last), None, places_N)
    routing.unrouted["last layer: " + ("no labels" if N == 0 else "nearly every position has a label")] += 1
    return Plan(None if real_T is None else Route(shape, real_T, None, last), rows_N, places_N)


def _padding_stays(P: int, T: int, outside: int) -> str | None:
    if outside > 0:
        return "labels on padding"
    if T == 0:
        return "no real token"
    return None if P - T >= WORTH * P else "less than 5 % of the positions"


def _positions(chosen_P: torch.Tensor, count: int) -> torch.Tensor:
    """Where ``chosen_P`` is set, in order: ``nonzero`` of a known size, without waiting for the device."""
    slots_P = torch.where(chosen_P, chosen_P.cumsum(0) - 1, count)  # the others share one slot behind
    found = torch.empty(count + 1, dtype=torch.int64, device=chosen_P.device)
    return found.scatter_(0, slots_P, torch.arange(chosen_P.numel(), device=chosen_P.device))[:count]
