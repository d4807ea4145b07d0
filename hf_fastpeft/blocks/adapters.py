"""A cache of the laid out adapters and biases of a whole model.

The copies of all stacks that were used lately are refreshed together, when the first block of a forward asks for its
own. Their age is counted in forwards of the model, never read off ``tensor._version``, which fused optimizers do not
bump. Within a forward and its backward, recomputation included, copies are shared; a block called on its own gets
fresh ones.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from hf_fastpeft.blocks.layout import (
    Fill,
    Side,
    Stack,
    adds_bias,
    fill_biases,
    line_up,
    make_bias,
    make_side,
    own_bias,
)
from hf_fastpeft.stacking import Placement, is_sharded, several_processes

__all__ = ["Copies", "SideCache"]

KEPT = 8  # forwards after which the copies of a stack that nobody asked for are dropped

T = TypeVar("T", Side, torch.Tensor)


@dataclass(slots=True, eq=False)
class Copy(Generic[T]):
    """Laid out copies of a stack's adapters or biases.

    Attributes:
        laid_out: the copies.
        stack: what they were made from; keeps the tensors alive whose identities are the key.
        shapes: of its tensors.
        filled: the forward in which they were written last.
        used: the forward in which somebody asked for them last.
        dropped: whether the cache has given them up; whoever has them still asks anew.
    """

    laid_out: T
    stack: Stack
    shapes: list[torch.Size]
    filled: int
    used: int
    dropped: bool = False

    def fits(self) -> bool:
        """Whether the tensors still have the shapes that were laid out."""
        return _shapes(self.stack) == self.shapes


def _shapes(stack: Stack) -> list[torch.Size]:
    return [tensor.shape for low in stack for tensor in low.tensors[1:] if tensor is not None]


Copies = tuple[Copy[Any], ...]


class SideCache:
    """Copies of one model's adapters.

    Attributes:
        forwards: number of forwards of the model so far.
        placement: where the model's weights lie and may be moved; None where they stay.
    """

    def __init__(self, placement: Placement | None = None) -> None:
        self.forwards = 0
        self.placement = placement
        self._thread = threading.local()  # .inside: a forward of the model runs in this thread
        self._bare = False
        self._whole = True  # in the last forward: no parameter was sharded away
        self._hooked = False  # in it: :meth:`distrust`
        self._sides: dict[tuple[object, ...], Copy[Side]] = {}
        self._biases: dict[tuple[object, ...], Copy[torch.Tensor]] = {}
        self._fill: Fill | None = None  # of all sides; None since they are others

    def __deepcopy__(self, memo: dict[int, object]) -> "SideCache":
        """A copied model starts with an empty cache: the copies belong to the original's parameters."""
        placement = None if self.placement is None else Placement()
        return memo.setdefault(id(self), SideCache(placement))  # type: ignore[return-value]

    def __reduce__(self) -> tuple[type["SideCache"], tuple[Any, ...]]:
        return SideCache, (Placement(),) if self.placement is not None else ()

    @contextmanager
    def forward(self, model: nn.Module | None = None) -> Iterator[None]:
        """Around a forward of ``model``: what was copied before is old inside."""
        outer, self._thread.inside = self.is_inside, True
        if not outer:
            self.forwards += 1
            self._whole = model is None or not is_sharded(model)
            if not self._whole or self._fill is None or self.forwards % KEPT == 0:
                self._prune()  # where nothing is ever refreshed: new tensors in every forward, or no training
        self._bare = self._hooked = False
        try:
            yield
        finally:
            self._thread.inside = outer

    @property
    def is_inside(self) -> bool:
        """Whether a forward of the model runs in this thread."""
        return getattr(self._thread, "inside", False)

    def distrust(self) -> None:
        """Somebody's code runs in the midst of this forward and may write to adapters: copies are made at each use."""
        self._hooked = True

    def _shares(self) -> bool:
        """Whether what was laid out in this forward is what a block is to multiply with now.

        A recomputation runs inside a backward, after the model's forward; not so where a block was called on its own
        since: its recomputation belongs to no forward of the model.
        """
        if torch.is_inference_mode_enabled():  # what is made here could not be refreshed
            return False
        if self.is_inside:
            return True
        if torch._C._current_graph_task_id() == -1:
            self._bare = True
            return False
        return self.forwards > 0 and not self._bare

    def restack(self, weights: Sequence[torch.Tensor]) -> bool:
        """Move weights that lie apart behind each other, where they may be moved."""
        if self.placement is None or not (self._whole if self._shares() else not several_processes()):
            return False
        return self.placement.restack(weights)

    def may_restack(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether weights that lie apart could be moved together by a later call."""
        return self.placement is not None and self.placement.is_undecided(weights)

    def lay_out(
        self, stack: Stack, dtype: torch.dtype, side_dtype: torch.dtype
    ) -> tuple[Side | None, torch.Tensor | None, Copies | None]:
        """A stack's adapters in ``side_dtype``, and what :func:`make_bias` gives.

        Third come the copies among them, for :meth:`renew`; None where they are for this call alone.
        """
        computed = any(t is not None and t.grad_fn is not None for low in stack for t in low.tensors[1:])
        if computed or not self._shares():  # computed anew for each call, and with a graph behind it
            return make_side(stack, side_dtype), make_bias(stack, dtype), None
        side = self._side(stack, side_dtype)
        bias = self._bias(stack, dtype)
        copies = tuple(copy for copy in (side, bias) if isinstance(copy, Copy))
        self._freshen(copies)
        return (
            None if side is None else side.laid_out,
            bias.laid_out if isinstance(bias, Copy) else bias,
            copies,
        )

    def renew(self, copies: Copies | None) -> bool:
        """Whether what :meth:`lay_out` gave in an earlier call holds for this one, the modules being the same.

        The copies are then fresh.
        """
        if copies is None or any(copy.dropped for copy in copies) or not self._shares():
            return False
        self._freshen(copies)
        return True

    def _side(self, stack: Stack, dtype: torch.dtype) -> Copy[Side] | None:
        if all(low.A is None for low in stack):
            return None
        key = _key(stack, dtype)
        if key not in self._sides:
            side = make_side(stack, dtype)
            assert side is not None
            self._fill = None
            self._sides[key] = self._copy(side, stack)
        return self._sides[key]

    def _bias(self, stack: Stack, dtype: torch.dtype) -> Copy[torch.Tensor] | torch.Tensor | None:
        own = own_bias(stack, dtype)
        if own is not None or not adds_bias(stack):
            return own
        ids = ((id(low.bias), id(low.lora_bias), low.scaling, low.weight.shape[0]) for low in stack)
        key = dtype, stack[0].weight.device, *ids
        if key not in self._biases:
            bias_O = make_bias(stack, dtype)
            assert bias_O is not None
            self._fill = None
            self._biases[key] = self._copy(bias_O, stack)
        return self._biases[key]

    def _copy(self, laid_out: T, stack: Stack) -> Copy[T]:
        # no Bundle, which keeps its plan and with it this copy, and no weight: it may be replaced and is to go then
        records = tuple(low._replace(weight=low.weight.detach().to("meta")) for low in stack)
        return Copy(laid_out, records, _shapes(stack), self.forwards, self.forwards)

    def _freshen(self, copies: Copies) -> None:
        """Have these copies hold the present values."""
        for copy in copies:  # all, before a refresh drops what nobody asks for
            copy.used = self.forwards
        for copy in copies:
            if copy.filled == self.forwards and not self._hooked:
                continue
            if self._whole and not self._hooked:
                self._refresh()
            if copy.filled != self.forwards or self._hooked:
                # other layers' parameters may be sharded away at this moment
                self._fill_one(copy)

    def _fill_one(self, copy: Copy[Any]) -> None:
        if isinstance(copy.laid_out, Side):
            Fill([(copy.laid_out, copy.stack)]).run()
        else:
            fill_biases([(copy.laid_out, copy.stack)])
        copy.filled = self.forwards

    def _refresh(self) -> None:
        """Write all copies that :meth:`_prune` leaves."""
        self._prune()
        if self._fill is None:
            line_up(copy.laid_out for copy in self._sides.values())
            self._fill = Fill((copy.laid_out, copy.stack) for copy in self._sides.values())
        self._fill.run()
        if self._biases:
            fill_biases((copy.laid_out, copy.stack) for copy in self._biases.values())
        written: list[Copy[Any]] = [*self._sides.values(), *self._biases.values()]
        for copy in written:
            copy.filled = self.forwards

    def _prune(self) -> None:
        """Drop copies that were not used lately, and those whose parameters were resized."""
        entries: list[dict[tuple[object, ...], Any]] = [self._sides, self._biases]
        for known in entries:
            for key in [key for key, copy in known.items() if not self._wanted(copy)]:
                known.pop(key).dropped = True
                self._fill = None

    def _wanted(self, copy: Copy[Any]) -> bool:
        return self.forwards - copy.used < KEPT and copy.fits()


def _key(stack: Stack, dtype: torch.dtype) -> tuple[object, ...]:
    """What identifies the layout of a stack's adapters."""
    adapters = ((id(low.A), id(low.B), id(low.gate), low.rank, low.scaling, low.gate_scale) for low in stack)
    return dtype, stack[0].weight.device, *adapters
