"""The adapters and biases of a stack of linears, laid out for its products.

PEFT casts each A and B on every call. Here a stack's own copies stand side by side in the dtype of its products, and
those of a whole model are refreshed in as many launches as those of one layer.

Shape legend: I = in_features, O = out_features of the whole stack, R = its ranks.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from hf_fastpeft.lowrank import LowRank

__all__ = [
    "Fill",
    "Side",
    "Stack",
    "adds_bias",
    "fill_biases",
    "line_up",
    "make_bias",
    "make_side",
    "own_bias",
    "slices",
]

Stack = Sequence[LowRank]


def slices(stack: Stack) -> list[tuple[slice, slice]]:
    """Of each linear: its columns of the results, its ranks."""
    found, row, rank = [], 0, 0
    for low in stack:
        found.append((slice(row, row + low.weight.shape[0]), slice(rank, rank + low.rank)))
        row, rank = row + low.weight.shape[0], rank + low.rank
    return found


@dataclass(slots=True, frozen=True)
class Side:
    """A stack's adapters side by side, in the dtype of the low-rank products.

    Attributes:
        A_RI: every A under the one before, each row times its gate.
        B_OR: every B, as blocks on the diagonal; times the scaling where that is not ``alpha``.
        alpha: the scaling that all share, 1 where B carries it.
        gate_R: the gates in at least float32, ones for linears without; None where no linear has one.
    """

    A_RI: torch.Tensor
    B_OR: torch.Tensor
    alpha: float
    gate_R: torch.Tensor | None


def make_side(stack: Stack, dtype: torch.dtype, *, fill: bool = True) -> Side | None:
    """Lay out the adapters of ``stack``; None without any. Without ``fill`` their values are left out."""
    adapted = [low for low in stack if low.A is not None]
    if not adapted:
        return None
    weight, scalings = stack[0].weight, {low.scaling for low in adapted}
    rows, R = sum(low.weight.shape[0] for low in stack), sum(low.rank for low in stack)
    gate_R = None
    if any(low.gate is not None for low in adapted):
        gate_R = weight.new_ones(R, dtype=torch.promote_types(dtype, torch.float32))
    side = Side(
        weight.new_empty(R, weight.shape[1], dtype=dtype),
        # one B fills all of it
        weight.new_empty(rows, R, dtype=dtype) if len(stack) == 1 else weight.new_zeros(rows, R, dtype=dtype),
        adapted[0].scaling if len(scalings) == 1 else 1.0,
        gate_R,
    )
    if fill:
        Fill([(side, stack)]).run()
    return side


_Lists = tuple[list[torch.Tensor], list[torch.Tensor]]  # slots, values


class Fill:
    """The copies that write the present values into sides, few launches for all of them; each value is rounded once.

    It knows the parameters, not their values, and can be run again.
    """

    def __init__(self, sides: Iterable[tuple[Side, Stack]]) -> None:
        self._gates: list[torch.Tensor] = []
        self._gate_slots: list[torch.Tensor] = []
        self._gate_scales: list[float] = []
        groups: defaultdict[tuple[object, ...], list[_Write]] = defaultdict(list)
        for side, stack in sides:
            for i, (low, (rows, ranks)) in enumerate(zip(stack, slices(stack), strict=True)):
                if low.A is None or low.B is None:
                    continue
                gate = None
                if low.gate is not None and side.gate_R is not None:
                    gate = side.gate_R[ranks].unsqueeze(1)
                    self._gates.append(low.gate)
                    self._gate_slots.append(side.gate_R[ranks].view(low.gate.shape))
                    self._gate_scales.append(low.gate_scale)
                factor = None if low.scaling == side.alpha else low.scaling
                for which, write in (
                    ("A", _Write(side.A_RI[ranks], low.A, gate)),
                    ("B", _Write(side.B_OR[rows, ranks], low.B, factor)),
                ):
                    groups[which, i, write.group].append(write)
        # products into slots that do not lie evenly; by whether the factors are gates
        self._apart: dict[bool, list[_Write]] = {True: [], False: []}
        self._batches: list[_Batch] = []
        for writes in groups.values():
            batch = _batch(writes)
            if batch is None:
                self._apart[isinstance(writes[0].factor, torch.Tensor)] += writes
            else:
                self._batches.append(batch)
        # apart, since strides that differ would send a whole list down torch's path of one launch a tensor
        self._alike: _Lists = [], []
        self._other: _Lists = [], []
        for batch in self._batches:
            for slot, value in batch.copies:
                slots, values = self._alike if slot.stride() == value.stride() else self._other
                slots.append(slot)
                values.append(value)

    @torch.no_grad()
    def run(self) -> None:
        """Write the values that the parameters have now."""
        if self._gates:
            torch._foreach_copy_(self._gate_slots, self._gates)
            torch._foreach_mul_(self._gate_slots, self._gate_scales)
        for slots, values in (self._alike, self._other):
            if slots:
                torch._foreach_copy_(slots, values)
        for writes in self._apart.values():
            if writes:
                slots, values, factors = (list(column) for column in zip(*writes, strict=True))
                torch._foreach_copy_(slots, torch._foreach_mul(values, factors))
        for batch in self._batches:
            batch.finish()


class _Write(NamedTuple):
    """``slot = value * factor``; a factor that is a tensor ``(rank, 1)``."""

    slot: torch.Tensor
    value: torch.Tensor
    factor: torch.Tensor | float | None

    @property
    def group(self) -> tuple[object, ...]:
        """What writes have in common that lie in one buffer and can be done together."""
        slot, factor = self.slot, self.factor
        kind = type(factor) if isinstance(factor, torch.Tensor) else factor
        place = slot.untyped_storage()._cdata, slot.shape, slot.stride(), slot.dtype
        return (*place, self.value.dtype, kind)


@dataclass(slots=True)
class _Batch:
    """Writes of one kind: copies first, then one product or copy of all of them into their places.

    Attributes:
        copies: (slot, value) pairs.
        source: what the copies wrote to; None where they have already done all.
        factor: of the source; a tensor with a factor for each row, a number, or None.
        blocks: the places.
    """

    copies: list[tuple[torch.Tensor, torch.Tensor]]
    source: torch.Tensor | None = None
    factor: torch.Tensor | float | None = None
    blocks: torch.Tensor | None = None

    def finish(self) -> None:
        """What the copies leave to do."""
        if self.source is None or self.blocks is None:
            return
        if self.factor is None:
            self.blocks.copy_(self.source)
        else:
            torch.mul(self.source, self.factor, out=self.blocks)


def _batch(writes: list[_Write]) -> _Batch | None:
    """The writes of one group; None where they are products into slots that do not lie evenly."""
    first = writes[0]
    values = [write.value for write in writes]
    blocks = None
    if first.factor is not None or not first.slot.is_contiguous():
        blocks = _evenly_spaced([write.slot for write in writes])
    if blocks is None:
        copies = [(write.slot, write.value) for write in writes]
        return _Batch(copies) if first.factor is None else None
    dtype = (first.slot if first.factor is None else first.value).dtype
    source = torch.empty(blocks.shape, dtype=dtype, device=blocks.device)
    factor = first.factor
    if isinstance(factor, torch.Tensor):
        factor = _evenly_spaced([write.factor for write in writes if isinstance(write.factor, torch.Tensor)])
    return _Batch(list(zip(source, values, strict=True)), source, factor, blocks)


def _evenly_spaced(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Parts of one buffer as one view ``(n, ...)``; None where they are alone or lie elsewhere."""
    first = parts[0]
    steps = {after.storage_offset() - before.storage_offset() for before, after in pairwise(parts)}
    if len(steps) != 1 or any(p.untyped_storage()._cdata != first.untyped_storage()._cdata for p in parts):
        return None
    return first.as_strided((len(parts), *first.shape), (steps.pop(), *first.stride()))


def line_up(sides: Iterable[Side]) -> None:
    """Put sides of one shape behind each other in memory, so that a few launches fill all of them."""
    groups: defaultdict[tuple[object, ...], list[Side]] = defaultdict(list)
    for side in sides:
        A, B = side.A_RI, side.B_OR
        if A.is_contiguous() and B.is_contiguous() and not isinstance(A, FakeTensor):  # nor in a trace
            groups[A.shape, B.shape, A.dtype, A.device, side.gate_R is None].append(side)
    for alike in groups.values():
        for name in ("A_RI", "B_OR") if alike[0].gate_R is None else ("A_RI", "B_OR", "gate_R"):
            parts = [getattr(side, name) for side in alike]
            if len(parts) > 1:
                memory = parts[0].new_empty((len(parts), *parts[0].shape))  # stack() would ask autocast
                for part, place in zip(parts, memory, strict=True):
                    part.data = place.copy_(part)


def make_bias(stack: Stack, dtype: torch.dtype) -> torch.Tensor | None:
    """All that the linears add to each row, ``(O,)`` in ``dtype``; None if that is nothing."""
    if not adds_bias(stack):
        return None
    own = own_bias(stack, dtype)
    if own is not None:
        return own
    bias_O = stack[0].weight.new_zeros(sum(low.weight.shape[0] for low in stack), dtype=dtype)
    fill_biases([(bias_O, stack)])
    return bias_O


def adds_bias(stack: Stack) -> bool:
    return any(low.bias is not None or low.lora_bias is not None for low in stack)


def own_bias(stack: Stack, dtype: torch.dtype) -> torch.Tensor | None:
    """The one bias itself, where nothing need be done to it."""
    (first, *others) = stack
    if others or first.lora_bias is not None or first.bias is None or first.bias.dtype != dtype:
        return None
    return first.bias.detach()


@torch.no_grad()
def fill_biases(biases: Iterable[tuple[torch.Tensor, Stack]]) -> None:
    slots, values = [], []
    for bias_O, stack in biases:
        for low, (rows, _) in zip(stack, slices(stack), strict=True):
            value = low.bias
            if low.lora_bias is not None:
                scaled = low.lora_bias * low.scaling
                value = scaled if value is None else value + scaled
            if value is not None:
                slots.append(bias_O[rows])
                values.append(value)
    torch._foreach_copy_(slots, values)
