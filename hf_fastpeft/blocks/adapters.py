"""The adapters of a stack of linears laid out for its products, and a cache of them for a whole model.

PEFT casts each A and B on every call. Here the copies of all stacks that were used lately are refreshed together, by a
handful of launches, when the first block of a forward asks for its own. Their age is counted in forwards of the model,
never read off ``tensor._version``, which fused optimizers do not bump. Within a forward and its backward, recomputation
included, copies are shared; a block called on its own gets fresh ones.

Shape legend: I = in_features, O = out_features of the whole stack, R = its ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hf_fastpeft.lowrank import LowRank

__all__ = ["Side", "SideCache", "Stack", "make_side", "slices"]

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
        B_OR: every B, as blocks on the diagonal; those whose linears have scalings of their own are multiplied by them.
        alpha: the scaling that all share, 1 where B carries it.
        gate_R: the gates in at least float32, ones for linears without; None where no linear has one.
    """

    A_RI: torch.Tensor
    B_OR: torch.Tensor
    alpha: float
    gate_R: torch.Tensor | None


def make_side(stack: Stack, dtype: torch.dtype) -> Side | None:
    """Lay out the adapters of ``stack``; None without any."""
    adapted = [low for low in stack if low.A is not None]
    if not adapted:
        return None
    weight, scalings = stack[0].weight, {low.scaling for low in adapted}
    O, R = sum(low.weight.shape[0] for low in stack), sum(low.rank for low in stack)
    gate_R = None
    if any(low.gate is not None for low in adapted):
        gate_R = weight.new_ones(R, dtype=torch.promote_types(dtype, torch.float32))
    side = Side(
        weight.new_empty(R, weight.shape[1], dtype=dtype),
        # one B fills all of it
        weight.new_empty(O, R, dtype=dtype) if len(stack) == 1 else weight.new_zeros(O, R, dtype=dtype),
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
    for side, stack in sides:
        for low, (rows, ranks) in zip(stack, slices(stack), strict=True):
            if low.A is None or low.B is None:
                continue
            values.append(low.B if low.scaling == side.alpha else low.B * low.scaling)
            slots.append(side.B_OR[rows, ranks])
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
    torch._foreach_copy_(slots, values)


@dataclass(slots=True)
class _Entry:
    side: Side
    stack: Stack  # keeps the tensors alive whose identities are the key
    filled: int
    used: int


class SideCache:
    """Copies of one model's adapters.

    Attributes:
        forwards: number of forwards of the model so far.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self._inside = False
        self._entries: dict[tuple[object, ...], _Entry] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> "SideCache":
        """A copied model starts with an empty cache: the copies belong to the original's parameters."""
        return memo.setdefault(id(self), SideCache())  # type: ignore[return-value]

    def __reduce__(self) -> tuple[type["SideCache"], tuple[()]]:
        return SideCache, ()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward of the model: what was copied before is old inside."""
        outer, self._inside = self._inside, True
        self.forwards += not outer
        try:
            yield
        finally:
            self._inside = outer

    def side(self, stack: Stack, dtype: torch.dtype) -> Side | None:
        """The adapters of ``stack`` in ``dtype``; None without any."""
        if all(low.A is None for low in stack):
            return None
        # a recomputation runs inside a backward, after the model's forward
        if not self._inside and torch._C._current_graph_task_id() == -1:
            return make_side(stack, dtype)
        key = dtype, *((id(low.A), id(low.B), id(low.gate), low.scaling, low.gate_scale) for low in stack)
        entry = self._entries.get(key)
        if entry is None:
            side = make_side(stack, dtype)
            assert side is not None
            self._entries[key] = _Entry(side, stack, self.forwards, self.forwards)
            return side
        if entry.filled != self.forwards:
            entry.used = self.forwards
            self._refresh()
        entry.used = self.forwards
        return entry.side

    def _refresh(self) -> None:
        self._entries = {key: e for key, e in self._entries.items() if self.forwards - e.used < KEPT}
        entries = list(self._entries.values())
        _fill([(entry.side, entry.stack) for entry in entries])
        for entry in entries:
            entry.filled = self.forwards
