"""The adapters and biases of a stack of linears laid out for its products, and a cache of them for a whole model.

PEFT casts each A and B on every call. Here the copies of all stacks that were used lately are refreshed together,
when the first block of a forward asks for its own. Their age is counted in forwards of the model, never read off
``tensor._version``, which fused optimizers do not bump. Within a forward and its backward, recomputation included,
copies are shared; a block called on its own gets fresh ones.

Shape legend: I = in_features, O = out_features of the whole stack, R = its ranks.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakMethod

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from hf_fastpeft.border import Border, Placement
from hf_fastpeft.lowrank import LowRank
from hf_fastpeft.stacking import is_sharded, several_processes, weights_of

__all__ = ["Copies", "Side", "SideCache", "Stack", "make_bias", "make_side", "slices"]

Stack = Sequence[LowRank]

KEPT = 8  # forwards after which the copies of a stack that nobody asked for are dropped


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


def make_side(stack: Stack, dtype: torch.dtype, border: Border | None = None, *, fill: bool = True) -> Side | None:
    """Lay out the adapters of ``stack``, in ``border`` where one is given; None without any.

    Without ``fill`` their values are left out.
    """
    adapted = [low for low in stack if low.A is not None]
    if not adapted:
        return None
    weight, scalings = stack[0].weight, {low.scaling for low in adapted}
    rows, R = sum(low.weight.shape[0] for low in stack), sum(low.rank for low in stack)
    gate_R = None
    if any(low.gate is not None for low in adapted):
        gate_R = weight.new_ones(R, dtype=torch.promote_types(dtype, torch.float32))
    if border is not None:
        border.A_RI.zero_()
        border.B_OR.zero_()
        border.memory[border.out_features :, border.in_features :].zero_()
        side = border.side = Side(border.A_RI[:R], border.B_OR[:, :R], 1.0, gate_R)
    else:
        side = Side(
            weight.new_empty(R, weight.shape[1], dtype=dtype),
            # one B fills all of it
            weight.new_empty(rows, R, dtype=dtype) if len(stack) == 1 else weight.new_zeros(rows, R, dtype=dtype),
            adapted[0].scaling if len(scalings) == 1 else 1.0,
            gate_R,
        )
    if fill:
        _Fill([(side, stack)]).run()
    return side


_Lists = tuple[list[torch.Tensor], list[torch.Tensor]]  # slots, values


class _Fill:
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
        self._batches = [batch for writes in groups.values() for batch in _batches(writes)]
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
        source: what the copies wrote to, or the one value itself; None where they have already done all.
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


def _batches(writes: list[_Write]) -> list[_Batch]:
    """The writes of one group as one batch where their slots are evenly spaced, else one by one."""
    first = writes[0]
    slots = [write.slot for write in writes]
    if first.factor is None and first.slot.is_contiguous():
        return [_Batch([(write.slot, write.value) for write in writes])]
    blocks = _evenly_spaced(slots)
    if blocks is None:
        return [
            _Batch([(slot, value)]) if factor is None else _Batch([], value, factor, slot)
            for slot, value, factor in writes
        ]
    dtype = (first.slot if first.factor is None else first.value).dtype
    source = torch.empty(blocks.shape, dtype=dtype, device=blocks.device)
    factor = first.factor
    if isinstance(factor, torch.Tensor):
        factor = _evenly_spaced([write.factor for write in writes if isinstance(write.factor, torch.Tensor)])
    return [_Batch(list(zip(source, [write.value for write in writes], strict=True)), source, factor, blocks)]


def _evenly_spaced(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Parts of one buffer as one view ``(n, ...)``; None where they are alone or lie elsewhere."""
    first = parts[0]
    steps = {after.storage_offset() - before.storage_offset() for before, after in pairwise(parts)}
    if len(steps) != 1 or any(p.untyped_storage()._cdata != first.untyped_storage()._cdata for p in parts):
        return None
    return first.as_strided((len(parts), *first.shape), (steps.pop(), *first.stride()))


def _line_up(sides: Iterable[Side]) -> None:
    """Put sides of one shape behind each other in memory, so that a few launches fill all of them."""
    groups: defaultdict[tuple[object, ...], list[Side]] = defaultdict(list)
    for side in sides:
        A, B = side.A_RI, side.B_OR
        if A.is_contiguous() and B.is_contiguous() and not isinstance(A, FakeTensor):  # not in a border, nor a trace
            groups[A.shape, B.shape, A.dtype, A.device, side.gate_R is None].append(side)
    for alike in groups.values():
        for name in ("A_RI", "B_OR") if alike[0].gate_R is None else ("A_RI", "B_OR", "gate_R"):
            parts = [getattr(side, name) for side in alike]
            if len(parts) > 1:
                for part, place in zip(parts, torch.stack(parts), strict=True):
                    part.data = place


def make_bias(stack: Stack, dtype: torch.dtype, zeros: int = 0) -> torch.Tensor | None:
    """All that the linears add to each row, ``(O,)`` in ``dtype`` with ``zeros`` behind; None if that is nothing."""
    if not _adds(stack):
        return None
    own = _own_bias(stack, dtype, zeros)
    if own is not None:
        return own
    rows = sum(low.weight.shape[0] for low in stack)
    bias_O = stack[0].weight.new_zeros(rows + zeros, dtype=dtype)
    _fill_biases([(bias_O, stack)])
    return bias_O


def _adds(stack: Stack) -> bool:
    return any(low.bias is not None or low.lora_bias is not None for low in stack)


def _own_bias(stack: Stack, dtype: torch.dtype, zeros: int) -> torch.Tensor | None:
    """The one bias itself, where nothing need be done to it."""
    (first, *others) = stack
    if others or zeros or first.lora_bias is not None or first.bias is None or first.bias.dtype != dtype:
        return None
    return first.bias.detach()


@torch.no_grad()
def _fill_biases(biases: Iterable[tuple[torch.Tensor, Stack]]) -> None:
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
    """

    laid_out: T
    stack: Stack
    shapes: list[torch.Size]
    filled: int
    used: int

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
        self._inside = self._bare = False
        self._whole = True  # in the last forward: no parameter was sharded away
        self._sides: dict[tuple[object, ...], Copy[Side]] = {}
        self._biases: dict[tuple[object, ...], Copy[torch.Tensor]] = {}
        self._fill: _Fill | None = None  # of all sides; None since they are others
        if placement is not None:
            placement.on_drop = WeakMethod(self._forget)

    def __deepcopy__(self, memo: dict[int, object]) -> "SideCache":
        """A copied model starts with an empty cache: the copies belong to the original's parameters."""
        placement = None if self.placement is None else Placement(self.placement.bordered)
        return memo.setdefault(id(self), SideCache(placement))  # type: ignore[return-value]

    def __reduce__(self) -> tuple[type["SideCache"], tuple[()]]:
        return SideCache, ()  # unpickled weights stay where they are: which of them are tied was not written

    @contextmanager
    def forward(self, model: nn.Module | None = None) -> Iterator[None]:
        """Around a forward of ``model``: what was copied before is old inside."""
        outer, self._inside = self._inside, True
        if not outer:
            self.forwards += 1
            self._whole = model is None or not is_sharded(model)
            if not self._whole:  # FSDP 1 has new tensors in every forward, and nobody refreshes all copies
                self._prune()
        self._bare = False
        try:
            yield
        finally:
            self._inside = outer

    def _shares(self) -> bool:
        """Whether what was laid out in this forward is what a block is to multiply with now.

        A recomputation runs inside a backward, after the model's forward; not so where a block was called on its own
        since: its recomputation belongs to no forward of the model.
        """
        if torch.is_inference_mode_enabled():  # what is made here could not be refreshed
            return False
        if self._inside:
            return True
        if torch._C._current_graph_task_id() == -1:
            self._bare = True
            return False
        return self.forwards > 0 and not self._bare

    @property
    def borders(self) -> bool:
        """Whether borders are wanted."""
        return self.placement is not None and self.placement.bordered

    def restack(self, weights: Sequence[torch.Tensor]) -> bool:
        """Move weights that lie apart behind each other, where they may be moved."""
        if self.placement is None or not (self._whole if self._shares() else not several_processes()):
            return False
        return self.placement.restack(weights)

    def border(self, stack: Stack, dtype: torch.dtype, side_dtype: torch.dtype) -> Border | None:
        """The border around ``stack`` in which its adapters lie; None where it is to multiply with them apart."""
        if self.placement is None or not self.borders:
            return None
        if not self._shares():
            self.placement.refuse(stack, "a block called outside a forward of a patched model")
            return None
        if not self._whole:
            self.placement.refuse(stack, "weights sharded between processes")
            return None
        border = self.placement.border(stack, dtype, side_dtype)
        if border is None:
            return None
        owner = _key(stack, side_dtype)
        if border.owner != owner:
            entry = self._sides.get((border, *border.owner)) if border.owner is not None else None
            if entry is not None and self.forwards - entry.used < KEPT:
                self.placement.refuse(stack, "another adapter lies in the border")
                return None
            self._forget(border)
            border = self.placement.hand_over(border, stack, owner)
        return border

    def lay_out(
        self, stack: Stack, dtype: torch.dtype, side_dtype: torch.dtype, border: Border | None = None, zeros: int = 0
    ) -> tuple[Side | None, torch.Tensor | None, Copies | None]:
        """A stack's adapters in ``side_dtype``, in ``border`` where it is theirs, and what :func:`make_bias` gives.

        Third come the copies among them, for :meth:`renew`; None where they are for this call alone.
        """
        if not self._shares():
            return make_side(stack, side_dtype), make_bias(stack, dtype, zeros), None
        side = self._side(stack, side_dtype, border)
        bias = self._bias(stack, dtype, zeros)
        copies = tuple(copy for copy in (side, bias) if isinstance(copy, Copy))
        for copy in copies:
            self._freshen(copy)
        return (
            None if side is None else side.laid_out,
            bias.laid_out if isinstance(bias, Copy) else bias,
            copies,
        )

    def renew(self, copies: Copies | None, side: Side | None, border: Border | None) -> bool:
        """Whether what :meth:`lay_out` gave in an earlier call holds for this one, the modules being the same.

        The copies are then fresh.
        """
        if copies is None or (border is not None and border.side is not side) or not self._shares():
            return False
        for copy in copies:
            self._freshen(copy)
            if copy.filled != self.forwards:  # dropped since
                return False
        return True

    def _side(self, stack: Stack, dtype: torch.dtype, border: Border | None) -> Copy[Side] | None:
        if all(low.A is None for low in stack):
            return None
        key = border, *_key(stack, dtype)
        if key not in self._sides:
            side = make_side(stack, dtype, border)
            assert side is not None
            self._sides[key] = self._copy(side, stack)
            self._fill = None
        return self._sides[key]

    def _bias(self, stack: Stack, dtype: torch.dtype, zeros: int) -> Copy[torch.Tensor] | torch.Tensor | None:
        own = _own_bias(stack, dtype, zeros)
        if own is not None or not _adds(stack):
            return own
        ids = ((id(low.bias), id(low.lora_bias), low.scaling, low.weight.shape[0]) for low in stack)
        key = dtype, zeros, stack[0].weight.device, *ids
        if key not in self._biases:
            bias_O = make_bias(stack, dtype, zeros)
            assert bias_O is not None
            self._biases[key] = self._copy(bias_O, stack)
        return self._biases[key]

    def _copy(self, laid_out: T, stack: Stack) -> Copy[T]:
        records = tuple(stack)  # a Bundle that keeps its plan would be kept by it, in a cycle
        return Copy(laid_out, records, _shapes(stack), self.forwards, self.forwards)

    def _freshen(self, copy: Copy[Any]) -> None:
        copy.used = self.forwards
        if copy.filled == self.forwards:
            return
        if self._whole:
            self._refresh()
        else:
            self._fill_one(copy)  # other layers' parameters may be sharded away at this moment

    def _fill_one(self, copy: Copy[Any]) -> None:
        if isinstance(copy.laid_out, Side):
            _Fill([(copy.laid_out, copy.stack)]).run()
        else:
            _fill_biases([(copy.laid_out, copy.stack)])
        copy.filled = self.forwards

    def _refresh(self) -> None:
        """Write all copies that :meth:`_prune` leaves."""
        self._prune()
        if self._fill is None:
            _line_up(copy.laid_out for copy in self._sides.values())
            self._fill = _Fill((copy.laid_out, copy.stack) for copy in self._sides.values())
        self._fill.run()
        if self._biases:
            _fill_biases((copy.laid_out, copy.stack) for copy in self._biases.values())
        written: list[Copy[Any]] = [*self._sides.values(), *self._biases.values()]
        for copy in written:
            copy.filled = self.forwards

    def _prune(self) -> None:
        """Drop copies that were not used lately, and those whose parameters were resized."""
        sides = {key: copy for key, copy in self._sides.items() if self._wanted(copy)}
        if len(sides) < len(self._sides):
            self._sides, self._fill = sides, None
            if self.placement is not None:
                self.placement.prune()
        self._biases = {key: copy for key, copy in self._biases.items() if self._wanted(copy)}

    def _wanted(self, copy: Copy[Any]) -> bool:
        return self.forwards - copy.used < KEPT and copy.fits()

    def release(self, owner: nn.Module, stacks: Iterable[Sequence[str]]) -> None:
        """Take the weights of these linears out of their borders until the next fused call."""
        if self.placement is not None and self.placement.bordered:
            for names in stacks:
                self.placement.release(weights_of(owner, names) or ())

    def _forget(self, border: Border) -> None:
        self._sides = {key: copy for key, copy in self._sides.items() if key[0] is not border}
        self._fill = None


def _key(stack: Stack, dtype: torch.dtype) -> tuple[object, ...]:
    """What identifies the layout of a stack's adapters."""
    adapters = ((id(low.A), id(low.B), id(low.gate), low.rank, low.scaling, low.gate_scale) for low in stack)
    return dtype, stack[0].weight.device, *adapters
