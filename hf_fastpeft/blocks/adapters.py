"""The adapters and biases of a stack of linears laid out for its products, and a cache of them for a whole model.

PEFT casts each A and B on every call. Here the copies of all stacks that were used lately are refreshed together,
when the first block of a forward asks for its own. Their age is counted in forwards of the model, never read off
``tensor._version``, which fused optimizers do not bump. Within a forward and its backward, recomputation included,
copies are shared; a block called on its own gets fresh ones.

Shape legend: I = in_features, O = out_features of the whole stack, R = its ranks.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakMethod

import torch
from torch import nn

from hf_fastpeft.border import Border, Placement
from hf_fastpeft.lowrank import LowRank
from hf_fastpeft.stacking import weights_of

__all__ = ["Side", "SideCache", "Stack", "make_bias", "make_side", "slices"]

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


def make_side(stack: Stack, dtype: torch.dtype, border: Border | None = None) -> Side | None:
    """Lay out the adapters of ``stack``, in ``border`` where one is given; None without any."""
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
    _fill([(side, stack)])
    return side


@torch.no_grad()
def _fill(sides: list[tuple[Side, Stack]]) -> None:
    """Write the present values into all sides, each kind of copy in one call; each value is rounded once."""
    slots: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    gates, gate_slots, gate_scales, gated_A, gated_slots = [], [], [], [], []
    scaled_B, scalings, scaled_slots = [], [], []
    for side, stack in sides:
        for low, (rows, ranks) in zip(stack, slices(stack), strict=True):
            if low.A is None or low.B is None:
                continue
            if low.scaling == side.alpha:
                values.append(low.B)
                slots.append(side.B_OR[rows, ranks])
            else:
                scaled_B.append(low.B)
                scalings.append(low.scaling)
                scaled_slots.append(side.B_OR[rows, ranks])
            if low.gate is None or side.gate_R is None:
                values.append(low.A)
                slots.append(side.A_RI[ranks])
            else:
                gates.append(low.gate.flatten())
                gate_slots.append(side.gate_R[ranks])
                gate_scales.append(low.gate_scale)
                gated_A.append(low.A)
                gated_slots.append(side.A_RI[ranks])
    if gates:
        torch._foreach_copy_(gate_slots, gates)
        torch._foreach_mul_(gate_slots, gate_scales)
        values += torch._foreach_mul(gated_A, [gate_R.unsqueeze(1) for gate_R in gate_slots])
        slots += gated_slots
    if scaled_B:
        values += torch._foreach_mul(scaled_B, scalings)
        slots += scaled_slots
    # strides that differ would send the whole list down torch's path of one launch a tensor
    for alike in (True, False):
        pairs = [(s, v) for s, v in zip(slots, values, strict=True) if (s.stride() == v.stride()) is alike]
        if pairs:
            torch._foreach_copy_([slot for slot, _ in pairs], [value for _, value in pairs])


def make_bias(stack: Stack, dtype: torch.dtype, zeros: int = 0) -> torch.Tensor | None:
    """All that the linears add to each row, ``(O,)`` in ``dtype`` with ``zeros`` behind; None if that is nothing."""
    if all(low.bias is None and low.lora_bias is None for low in stack):
        return None
    (first, *others) = stack
    if not others and not zeros and first.lora_bias is None and first.bias is not None and first.bias.dtype == dtype:
        return first.bias.detach()
    rows = sum(low.weight.shape[0] for low in stack)
    bias_O = first.weight.new_zeros(rows + zeros, dtype=dtype)
    _fill_biases([(bias_O, stack)])
    return bias_O


@torch.no_grad()
def _fill_biases(biases: list[tuple[torch.Tensor, Stack]]) -> None:
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


@dataclass(slots=True)
class _Entry(Generic[T]):
    laid_out: T
    stack: Stack  # keeps the tensors alive whose identities are the key
    filled: int
    used: int


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
        self._sides: dict[tuple[object, ...], _Entry[Side]] = {}
        self._biases: dict[tuple[object, ...], _Entry[torch.Tensor]] = {}
        if placement is not None:
            placement.on_drop = WeakMethod(self._forget)

    def __deepcopy__(self, memo: dict[int, object]) -> "SideCache":
        """A copied model starts with an empty cache: the copies belong to the original's parameters."""
        placement = None if self.placement is None else Placement(self.placement.bordered)
        return memo.setdefault(id(self), SideCache(placement))  # type: ignore[return-value]

    def __reduce__(self) -> tuple[type["SideCache"], tuple[()]]:
        return SideCache, ()  # unpickled weights stay where they are: which of them are tied was not written

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward of the model: what was copied before is old inside."""
        outer, self._inside = self._inside, True
        self.forwards += not outer
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

    def border(self, stack: Stack, dtype: torch.dtype, side_dtype: torch.dtype) -> Border | None:
        """The border around ``stack`` in which its adapters lie; None where it is to multiply with them apart."""
        if self.placement is None or not self.placement.bordered:
            return None
        if not self._shares():
            self.placement.refuse(stack, "a block called outside a forward of a patched model")
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

    def side(self, stack: Stack, dtype: torch.dtype, border: Border | None = None) -> Side | None:
        """The adapters of ``stack`` in ``dtype``, in ``border`` where it is theirs; None without any."""
        if all(low.A is None for low in stack):
            return None
        if not self._shares():
            return make_side(stack, dtype)
        key = border, *_key(stack, dtype)
        entry = self._sides.get(key)
        if entry is None:
            side = make_side(stack, dtype, border)
            assert side is not None
            entry = self._sides[key] = _Entry(side, stack, self.forwards, self.forwards)
        return self._fresh(entry)

    def bias(self, stack: Stack, dtype: torch.dtype, zeros: int = 0) -> torch.Tensor | None:
        """What :func:`make_bias` gives, laid out once a forward."""
        if all(low.bias is None and low.lora_bias is None for low in stack):
            return None
        if len(stack) == 1 or not self._shares():
            return make_bias(stack, dtype, zeros)
        ids = ((id(low.bias), id(low.lora_bias), low.scaling, low.weight.shape[0]) for low in stack)
        key = dtype, zeros, stack[0].weight.device, *ids
        entry = self._biases.get(key)
        if entry is None:
            bias_O = make_bias(stack, dtype, zeros)
            assert bias_O is not None
            entry = self._biases[key] = _Entry(bias_O, stack, self.forwards, self.forwards)
        return self._fresh(entry)

    def _fresh(self, entry: _Entry[T]) -> T:
        entry.used = self.forwards
        if entry.filled != self.forwards:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                self._fill_one(entry)  # other layers' parameters may be sharded away at this moment
            else:
                self._refresh()
        return entry.laid_out

    def _fill_one(self, entry: _Entry[T]) -> None:
        if isinstance(entry.laid_out, Side):
            _fill([(entry.laid_out, entry.stack)])
        else:
            _fill_biases([(entry.laid_out, entry.stack)])
        entry.filled = self.forwards

    def release(self, owner: nn.Module, stacks: Iterable[Sequence[str]]) -> None:
        """Take the weights of these linears out of their borders until the next fused call."""
        if self.placement is not None and self.placement.bordered:
            for names in stacks:
                self.placement.release(weights_of(owner, names) or ())

    def _refresh(self) -> None:
        known = len(self._sides)
        self._sides = {key: e for key, e in self._sides.items() if self.forwards - e.used < KEPT}
        if self.placement is not None and len(self._sides) < known:
            self.placement.prune()
        self._biases = {key: e for key, e in self._biases.items() if self.forwards - e.used < KEPT}
        if self._sides:
            _fill([(entry.laid_out, entry.stack) for entry in self._sides.values()])
        if self._biases:
            _fill_biases([(entry.laid_out, entry.stack) for entry in self._biases.values()])
        for side in self._sides.values():
            side.filled = self.forwards
        for bias in self._biases.values():
            bias.filled = self.forwards

    def _forget(self, border: Border) -> None:
        self._sides = {key: e for key, e in self._sides.items() if key[0] is not border}


def _key(stack: Stack, dtype: torch.dtype) -> tuple[object, ...]:
    """What identifies the layout of a stack's adapters."""
    adapters = ((id(low.A), id(low.B), id(low.gate), low.rank, low.scaling, low.gate_scale) for low in stack)
    return dtype, stack[0].weight.device, *adapters
