"""Counts what a piece of torch code would launch, move and multiply; works on FakeTensors, which hold no memory.

A launch is an operator that would start at least one kernel on a GPU: views, metadata and allocations are not
counted, an attention or reduction counts once whatever its library splits it into. Elementwise bytes are the inputs
read plus the outputs written by launches that are neither a matrix product nor attention, each tensor once a launch.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["COSTS", "FlashAttention", "LaunchCounter", "Phase", "saved_storages"]

FREE = {
    "aten._unsafe_view",
    "aten.empty",
    "aten.empty_like",
    "aten.empty_strided",
    "aten.lift_fresh",
    "aten.new_empty",
    "aten.new_empty_strided",
    "aten.is_same_size",
    "aten.sym_size",
    "prim.device",
}
PRODUCTS = {
    "aten.mm",
    "aten.addmm",
    "aten.addmm_",
    "aten.bmm",
    "aten.baddbmm",
    "aten.baddbmm_",
    "aten._addmm_activation",
    "hf_fastpeft.mm_wide",
}
ATTENTION = {
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_backward",
}


def nbytes(t: torch.Tensor) -> int:
    """Bytes of memory behind ``t``: an expanded dimension counts once."""
    n = t.element_size()
    for size, stride in zip(t.shape, t.stride(), strict=True):
        n *= size if stride else min(size, 1)
    return n


def _moved(*tensors: torch.Tensor | None) -> int:
    return sum(nbytes(t) for t in tensors if t is not None)


# Bytes that one launch of ours moves, from its arguments and results: (arguments) -> bytes without the results.
# A tensor the kernel reads and overwrites counts twice, one it only fills counts once.
COSTS: dict[str, Callable[..., int]] = {
    "rms_norm_fwd": lambda x, weight, eps, unit_offset: _moved(x, weight),
    "rms_norm_into": lambda x, weight, out, eps, unit_offset: _moved(x, weight, out),
    "rms_norm_bwd": lambda d_out, x, weight, rstd, d_residual, partial, out, unit_offset: _moved(
        d_out, x, weight, rstd, d_residual, partial, out
    ),
    "glu_fwd": lambda gate, up, out, activation: _moved(gate, up, out),
    "glu_bwd": lambda d_out, gate, up, d_gate, d_up, out, activation: _moved(d_out, gate, up, d_gate, d_up, out),
    # in place, the dimensions that do not turn are not touched
    "rotate_": lambda q, k, cos, sin, v, v_out, inverse: (
        2 * _moved(q[..., : cos.shape[-1]], k[..., : cos.shape[-1]]) + _moved(cos, sin, v, v_out)
    ),
    "rotate": lambda q, k, cos, sin, q_out, k_out, v, v_out, inverse: _moved(q, k, cos, sin, q_out, k_out, v, v_out),
    "norm_rotate": lambda q, k, q_weight, k_weight, q_eps, k_eps, unit_offset, *rest: _moved(
        q, k, q_weight, k_weight, *rest
    ),
    "norm_rotate_bwd": lambda *args: _moved(*(t for t in args if isinstance(t, torch.Tensor))),
    # the logits are read twice (maximum first, sums second) and overwritten; the statistics of a token are noise
    "fold": lambda z, *_: 3 * nbytes(z),
}


@dataclass
class Phase:
    """What one part of a step did."""

    launches: int = 0
    elementwise_bytes: int = 0
    gemm_flops: int = 0
    operators: Counter[str] = field(default_factory=Counter)


def _name(func: Any) -> str:
    return f"{func.namespace}.{func._opname}"


def _is_view(func: Any) -> bool:
    infos = [r.alias_info for r in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _flops(name: str, args: tuple[Any, ...]) -> int:
    left, right = args[1:3] if "add" in name else args[:2]
    batch = left.shape[0] if left.ndim == 3 else 1
    return int(2 * batch * left.shape[-2] * left.shape[-1] * right.shape[-1])


class LaunchCounter(TorchDispatchMode):
    """Dispatch mode that counts into ``phases[phase]``; enter it after FakeTensorMode.

    Attributes:
        phase: name of the phase that is running, set by the caller.
        phases: counts by phase.
        largest: shape and bytes of the largest tensor written, and of the largest without a vocabulary dimension.
    """

    def __init__(self, vocab: int | None = None) -> None:
        super().__init__()
        self.vocab = vocab
        self.phase = "forward"
        self.phases: dict[str, Phase] = {}
        self.largest: dict[str, tuple[int, tuple[int, ...], str]] = {}
        self._made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = _name(func)
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if _is_view(func):
            return out
        for t in outputs:
            self._made.append((StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()))
            self._note_size(t)
        touched = outputs or [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        if name in FREE or not any(t.numel() for t in touched):
            return out
        phase = self.phases.setdefault(self.phase, Phase())
        phase.launches += 1
        phase.operators[name] += 1
        if name in PRODUCTS:
            phase.gemm_flops += _flops(name, args)
        elif name not in ATTENTION:
            phase.elementwise_bytes += self._bytes(func, name, args, kwargs, outputs)
        return out

    def _note_size(self, t: torch.Tensor) -> None:
        found = (nbytes(t), tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for key in ("step",) if self.vocab in t.shape else ("step", "layers"):
            self.largest[key] = max(self.largest.get(key, (0, (), "")), found)

    @staticmethod
    def _bytes(func: Any, name: str, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> int:
        if func.namespace == "hf_fastpeft":
            return COSTS[func._opname](*args) + _moved(*outputs)
        schema = func._schema.arguments
        named = {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
        written = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
        overwritten = name in ("aten.copy_", "aten.fill_", "aten.zero_", "aten.normal_") or "out" in written
        # an in-place operator reads what it writes, a copy or fill does not
        reads = [
            t
            for key, value in named.items()
            if not (key in written and overwritten)
            for t in tree_leaves(value)
            if isinstance(t, torch.Tensor)
        ]
        if name in ("aten.gather", "aten.index_select", "aten.embedding", "aten.slice_backward"):
            reads = [outputs[0] if name != "aten.slice_backward" else reads[0]]
        return _moved(*reads) + _moved(*outputs)

    def alive_bytes(self) -> int:
        """Bytes of all storages made so far that something still holds."""
        return sum({ref.cdata: size for ref, size in self._made if not ref.expired()}.values())


class FlashAttention(TorchFunctionMode):
    """Sends ``scaled_dot_product_attention`` to the flash operator, which a GPU would pick, on any device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            mask = kwargs.get("attn_mask")
            assert mask is None, f"flash attention takes no mask, got {tuple(mask.shape)}"
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False), scale=kwargs["scale"]
            )[0]
        return func(*args, **kwargs)


@contextmanager
def saved_storages(exclude: set[int]) -> Iterator[dict[int, int]]:
    """Collects ``storage -> bytes`` of everything autograd saves inside.

    Args:
        exclude: keys of storages not to count (parameters and buffers); see :func:`storage_key`.
    """
    found: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        key = storage_key(t)
        if key not in exclude:
            found[key] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def storage_key(t: torch.Tensor) -> int:
    """Identity of the memory behind ``t``, also where it has none."""
    return t.untyped_storage()._cdata
