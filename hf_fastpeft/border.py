"""Bordered weights: a stack's frozen weights and its adapters in one matrix, so that one product does for both.

    [x | P] [[W, sB], [A, 0]]ᵀ = [x Wᵀ + s P Bᵀ | P]    with P = x Aᵀ in the tail of the rows of x
    [dz | U] [W ; A]           = dz W + U A             with U = s dz B in the tail of the rows of dz

The weight of each linear is a view of the border with a longer row, so Hugging Face and PEFT go on reading and merging
it. The sum over both terms is rounded once, and the results are neither read nor written a second time for the
adapter's sake. What lays a weight elsewhere (``model.to``, ``copy.deepcopy``, a checked merge) takes it out of the
border; the next fused call makes a new one. A state dict takes all weights out, since savers want whole memory.

Only stacks whose input a kernel of ours writes are bordered: q/k/v, gate/up and down. That of o comes from the
attention call.

Shape legend: I = in_features, O = out_features of the whole stack, R = its ranks, rounded up to ALIGNED.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from hf_fastpeft.lowrank import LowRank, is_plain
from hf_fastpeft.stacking import adjacent, owns_storage, stack_weights, unstack_weights

__all__ = ["Border", "Placement", "border_obstacle", "room_for", "tied_weights"]

# Beyond, the products' own FLOPs outweigh what a border saves. A border of R ranks adds the zero block and a second
# P, 2 R (I + R) FLOPs a token, and the zeros off B's diagonal, up to 2 O R; it saves reading and writing the O results
# again, 4 O bytes. At 200 to 300 FLOPs a byte (A100, H100 in bf16) both are equal at R of about 200 to 400.
WIDEST_BORDER = 128
ALIGNED = 8  # ranks: 16 bytes of a half, without which cuBLAS leaves its fast kernels; the added ones are zeros
ROW = 64  # elements a row of the border and of x is a multiple of: a cache line of halves

Stack = Sequence[LowRank]


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def border_obstacle(stack: Stack, dtype: torch.dtype, side_dtype: torch.dtype) -> str | None:
    """Why a call of ``stack`` in these dtypes must multiply with its adapters apart; None if it need not.

    Whether the weights may be moved at all is for :class:`Placement`, which also knows who else lies in the border.
    """
    adapted = [low for low in stack if low.A is not None]
    if not adapted:
        return "no adapter"
    for low in stack:
        if low.dropout > 0:
            return "dropout: every linear multiplies another input"
        if low.weight.requires_grad or not isinstance(low.weight, nn.Parameter) or not is_plain(low.weight):
            return "weight is not a plain frozen parameter"
        if not low.weight.dtype == dtype == side_dtype:
            return f"weight in {low.weight.dtype}, products in {dtype}, adapters' products in {side_dtype}"
    ranks = sum(low.rank for low in adapted)
    if ranks > WIDEST_BORDER:
        return f"{ranks} ranks: beyond {WIDEST_BORDER} separate products are faster"
    if dtype in (torch.float16, torch.bfloat16):
        for low in adapted:
            if low.B is not None and low.B.dtype == dtype and not _is_power_of_two(low.scaling):
                return f"scaling {low.scaling:g}, no power of two, would round a B in {dtype}"
    return None


def _is_power_of_two(scaling: float) -> bool:
    return scaling != 0 and abs(scaling).hex().split("p")[0] == "0x1.0000000000000"


def _ids(weights: Iterable[torch.Tensor]) -> tuple[int, ...]:
    return tuple(map(id, weights))


def room_for(shape: Sequence[int], border: "Border | None", dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor of ``shape`` ``(rows, columns)``; with a border ``(rows, columns + R)``."""
    rows, columns = shape
    if border is None:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    columns += border.R
    return torch.empty(rows, _up(columns, ROW), dtype=dtype, device=device)[:, :columns]


@dataclass(slots=True, eq=False)
class Border:
    """``[[W, sB], [A, 0]]`` of one stack.

    Attributes:
        memory: all of it, ``(O + R, I + R)``.
        out_features: of the whole stack.
        in_features: of each linear.
        owner: what identifies the adapters that lie in it now; None as long as there are none.
        side: their layout, a :class:`hf_fastpeft.blocks.layout.Side`. A call that was planned with another finds its
            adapters overwritten.
    """

    memory: torch.Tensor
    out_features: int
    in_features: int
    owner: Any = None
    side: Any = None

    @classmethod
    def around(cls, weights: Sequence[nn.Parameter], ranks: int) -> "Border":
        """Move ``weights`` into a new one with room for ``ranks``."""
        first, R = weights[0], _up(ranks, ALIGNED)
        rows, columns = sum(weight.shape[0] for weight in weights), first.shape[1]
        with torch.no_grad():
            memory = first.data.new_empty(rows + R, _up(columns + R, ROW))[:, : columns + R]
            for weight, row in _with_rows(weights):
                weight.data = memory[row : row + weight.shape[0], :columns].copy_(weight.data)
        return cls(memory, rows, columns)

    @property
    def R(self) -> int:
        return self.memory.shape[0] - self.out_features

    @property
    def weight_OI(self) -> torch.Tensor:
        return self.memory[: self.out_features, : self.in_features]

    @property
    def A_RI(self) -> torch.Tensor:
        return self.memory[self.out_features :, : self.in_features]

    @property
    def B_OR(self) -> torch.Tensor:
        """Every B times its scaling, as blocks on the diagonal."""
        return self.memory[: self.out_features, self.in_features :]

    @property
    def upper(self) -> torch.Tensor:
        """``[W | sB]``, ``(O, I + R)``."""
        return self.memory[: self.out_features]

    @property
    def left(self) -> torch.Tensor:
        """``[W ; A]``, ``(O + R, I)``."""
        return self.memory[:, : self.in_features]

    def holds(self, weight: torch.Tensor, row: int) -> bool:
        """Whether ``weight`` lies in it from ``row`` on."""
        return (
            weight.untyped_storage()._cdata == self.memory.untyped_storage()._cdata
            and weight.storage_offset() == row * self.memory.stride(0)
            and weight.stride() == self.memory.stride()
        )


def tied_weights(model: nn.Module) -> frozenset[int]:
    """Identities of the parameters whose memory has several names; ask before anything is stacked."""
    names = list(model.named_parameters(remove_duplicate=False))
    places = Counter(parameter.untyped_storage()._cdata for _, parameter in names)
    return frozenset(id(parameter) for _, parameter in names if places[parameter.untyped_storage()._cdata] > 1)


class Placement:
    """Where the weights of one model's stacks lie: stacks again what was moved apart, and borders what may be.

    Both happen at a fused call, the only moment at which ranks, dtypes and devices are known; a stack that must stay
    where it is is asked about again when it moved.

    Attributes:
        bordered: whether borders are wanted.
        reasons: per stack, by the identities of its weights, why its last call was not bordered; None if it was.
        on_drop: gives what is to be called with a border that is given up; a weak reference, or None.
    """

    def __init__(self, bordered: bool = False, tied: frozenset[int] = frozenset()) -> None:
        self.bordered = bordered
        self.reasons: dict[tuple[int, ...], str | None] = {}
        self.on_drop: Callable[[], Callable[[Border], None] | None] = lambda: None
        self._tied = tied
        self._borders: dict[tuple[int, ...], Border] = {}
        self._tried: dict[tuple[int, ...], tuple[int, ...]] = {}  # stack -> where it lay when it could not be stacked
        self._moved: WeakValueDictionary[int, nn.Parameter] = WeakValueDictionary()

    def _drop(self, border: "Border") -> None:
        told = self.on_drop()
        if told is not None:
            told(border)

    def stack(self, weights: Sequence[nn.Parameter]) -> bool:
        """:func:`stack_weights`, to be undone by :meth:`restore`."""
        if not stack_weights(weights):
            return False
        self._note(weights)
        return True

    def restack(self, weights: Sequence[torch.Tensor]) -> bool:
        """Move weights that lie apart behind each other, as ``patch_model`` did before the model was moved."""
        if any(type(weight) is not nn.Parameter for weight in weights):  # nor a trace's FakeTensor
            return False
        ids, places = _ids(weights), tuple(weight.data_ptr() for weight in weights)
        if self._tried.get(ids) == places:
            return False
        if any(w.requires_grad for w in weights) or self._fixed(weights) or _not_now(weights):
            self._tried[ids] = places
            return False
        done = self.stack(weights)  # type: ignore[arg-type]
        self._tried[ids] = tuple(weight.data_ptr() for weight in weights)
        return done

    def border(self, stack: Stack, dtype: torch.dtype, side_dtype: torch.dtype) -> Border | None:
        """The border around the weights of ``stack``, whoever's adapters are in it; made where there is none."""
        weights = [low.weight for low in stack]
        ids = _ids(weights)
        found = self._borders.get(ids)
        reason = border_obstacle(stack, dtype, side_dtype)
        if reason is None and not (found is not None and _all_held(weights, found)):
            reason = self._fixed(weights, found) or _not_now(weights)
            if reason is None:
                found = self._make(weights, sum(low.rank for low in stack))
        self.reasons[ids] = reason
        return found if reason is None else None

    def hand_over(self, border: Border, stack: Stack, owner: Any) -> Border:
        """Give the border to other adapters of its stack; a new one where they need another number of ranks."""
        ranks = sum(low.rank for low in stack)
        if _up(ranks, ALIGNED) != border.R:
            border = self._make([low.weight for low in stack], ranks)
        border.owner = owner
        return border

    def refuse(self, stack: Stack, reason: str) -> None:
        """Note why this call of ``stack`` is not bordered."""
        self.reasons[_ids(low.weight for low in stack)] = reason

    def release(self, weights: Sequence[nn.Parameter]) -> None:
        """Take weights out of their border, into memory of their own, until the next fused call."""
        border = self._borders.pop(_ids(weights), None)
        if border is not None:
            unstack_weights(weights)
            self._drop(border)

    def restore(self) -> None:
        """Give every weight that was moved here memory of its own for good."""
        unstack_weights(self._moved.values())
        for border in self._borders.values():
            self._drop(border)
        self._borders.clear()
        self._moved.clear()

    def prune(self) -> None:
        """Give up the borders of parameters that are gone."""
        for ids in [ids for ids in self._borders if not all(i in self._moved for i in ids)]:
            self.reasons.pop(ids, None)
            self._drop(self._borders.pop(ids))

    def to_json(self) -> dict[str, Any] | None:
        """Bordered stacks so far and why others are not; None where borders are not wanted."""
        if not self.bordered:
            return None
        apart = Counter(reason for reason in self.reasons.values() if reason is not None)
        return {"stacks": sum(reason is None for reason in self.reasons.values()), "apart": dict(apart)}

    def _make(self, weights: Sequence[torch.Tensor], ranks: int) -> Border:
        old = self._borders.pop(_ids(weights), None)
        if old is not None:
            self._drop(old)
        self._note(weights)
        border = self._borders[_ids(weights)] = Border.around(weights, ranks)  # type: ignore[arg-type]
        return border

    def _note(self, weights: Sequence[torch.Tensor]) -> None:
        for weight in weights:
            assert isinstance(weight, nn.Parameter)
            self._moved[id(weight)] = weight

    def _fixed(self, weights: Sequence[torch.Tensor], border: Border | None = None) -> str | None:
        """Why these weights must stay where they are for good."""
        if any(id(weight) in self._tied for weight in weights):
            return "tied weights"
        if any(hasattr(weight, "ds_id") for weight in weights):
            return "weights partitioned by DeepSpeed"
        real = (weight for weight in weights if type(weight) is nn.Parameter and not weight.is_cuda)
        if any(weight.is_shared() for weight in real):  # type: ignore[no-untyped-call]
            return "weights in memory shared between processes"
        first = weights[0]
        if any((w.device, w.shape[1:]) != (first.device, first.shape[1:]) for w in weights):
            return "weights on several devices"
        alone = all(map(owns_storage, weights)) or (adjacent(weights) is not None and owns_storage(*weights))
        held = border is not None and all(owns_storage(w) or border.holds(w, r) for w, r in _with_rows(weights))
        return None if alone or held else "weights in memory that holds something else"


def _with_rows(weights: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
    found, row = [], 0
    for weight in weights:
        found.append((weight, row))
        row += weight.shape[0]
    return found


def _all_held(weights: Sequence[torch.Tensor], border: Border) -> bool:
    return all(border.holds(weight, row) for weight, row in _with_rows(weights))


def _not_now(weights: Sequence[torch.Tensor]) -> str | None:
    """Why nothing may be moved in this call."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return "inside torch.compile or inference mode"
    if any(isinstance(weight, FakeTensor) for weight in weights):  # a trace without memory, all of it
        return None
    if torch._C._len_torch_dispatch_stack():
        return "inside a dispatch mode"
    capturing = weights[0].is_cuda and torch.cuda.is_current_stream_capturing()
    return "inside a CUDA graph's capture" if capturing else None
