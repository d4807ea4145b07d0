"""Weights of linears over one input, next to each other in memory so that one product reads them all.

Each weight stays a parameter of its module and has, for all who look, memory of its own: a storage that begins with
its first element and ends with its last. Only the addresses tell that these storages are parts of one buffer. So
state dicts, savers that look for shared memory, merging and optimizers write and read what they would without us. The
parts are made through DLPack, which gives a part of a tensor's memory a storage of its own that keeps all of it alive.

What moves a parameter elsewhere (``model.to``, sharding) merely ends the neighbourhood: the blocks look at where the
weights lie, multiply one by one where they are apart, and :class:`Placement` puts them together again where it may.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.dlpack import from_dlpack

from hf_fastpeft.lowrank import is_plain

__all__ = [
    "Placement",
    "adjacent",
    "is_sharded",
    "is_stacked",
    "owns_storage",
    "several_processes",
    "span",
    "stack_weights",
    "unstack_weights",
    "weights_of",
]

DEVICES = ("cpu", "cuda")  # where a part of a tensor's memory can get a storage of its own
USERS = 2  # of a storage that one tensor has, while we hold the storage itself to ask
# start address of a buffer -> its storage, and its end; as long as one of its parts is in use
_buffers: dict[int, tuple[StorageWeakRef, int]] = {}


def weights_of(owner: nn.Module, names: Iterable[str]) -> list[nn.Parameter] | None:
    """The base weights of the named linears under any adapter layer; None where one is not a plain linear's."""
    weights = []
    for name in names:
        linear = getattr(owner, name, None)
        while isinstance(linear, nn.Module) and "base_layer" in linear._modules:
            linear = linear._modules["base_layer"]
        weight = linear._parameters.get("weight") if type(linear) is nn.Linear else None
        if weight is None:
            return None
        weights.append(weight)
    return weights


def several_processes() -> bool:
    """Whether this process may share its parameters with others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(root: nn.Module) -> bool:
    """Whether a wrapper takes parameters at or below ``root`` away and brings them back: FSDP 1 and 2, ZeRO-3.

    Not so DistributedDataParallel, which looks at gradients. Walks all modules, which takes 0.3 ms a thousand of them
    on one CPU core, but only where there are several processes.
    """
    if not several_processes():
        return False
    pending = [root]
    for module in pending:  # grows on the way
        state = module.__dict__
        if "_is_fsdp_managed_module" in state:  # what both FSDPs leave for torch.compile to see
            return True
        if any(hasattr(parameter, "ds_id") for parameter in state["_parameters"].values()):
            return True
        pending += [child for child in state["_modules"].values() if child is not None]
    return False


def stack_weights(weights: Sequence[nn.Parameter]) -> bool:
    """Move ``weights``, each ``(out_features, in_features)``, into one buffer in this order.

    Returns:
        False if they must stay where they are.
    """
    first = weights[0]
    if len(weights) < 2 or any(not _movable(weight, first) for weight in weights):
        return False
    rows = [weight.shape[0] for weight in weights]
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.cat([weight.data for weight in weights])
        parts = torch.split(buffer, rows)
        if not isinstance(buffer, FakeTensor):  # a trace has no memory that a saver could ask for
            parts = tuple(from_dlpack(part) for part in parts)
            for address in [address for address in _buffers if not _is_alive(address)]:
                del _buffers[address]
            start, storage = buffer.data_ptr(), buffer.untyped_storage()
            _buffers[start] = StorageWeakRef(storage), start + storage.nbytes()  # type: ignore[no-untyped-call]
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part
    return True


def _is_alive(address: int) -> bool:
    return address in _buffers and not _buffers[address][0].expired()  # type: ignore[no-untyped-call]


def is_stacked(weight: torch.Tensor) -> bool:
    """Whether the weight lies in a buffer, whatever lies beside it now."""
    if isinstance(weight, FakeTensor) or weight.is_meta:
        return False
    place = weight.data_ptr()
    return any(start <= place < end and _is_alive(start) for start, (_, end) in _buffers.items())


def _movable(weight: nn.Parameter, first: nn.Parameter) -> bool:
    return (
        isinstance(weight, nn.Parameter)
        and is_plain(weight)
        and weight.device.type in DEVICES
        and weight.numel() > 0
        and weight.is_contiguous()
        and not weight.is_inference()
        and not hasattr(weight, "ds_id")  # partitioned by DeepSpeed
        and (weight.dtype, weight.device, weight.shape[1]) == (first.dtype, first.device, first.shape[1])
    )


def unstack_weights(weights: Iterable[nn.Parameter]) -> None:
    """Give each weight that lies in a buffer memory outside of it again; not where another tensor shares its storage.

    That one would no longer follow the weight, which has a storage of its own in the buffer, too.
    """
    with torch.inference_mode(False), torch.no_grad():
        for weight in weights:
            if is_stacked(weight) and not _is_aliased(weight):
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)


def owns_storage(weight: torch.Tensor) -> bool:
    """Whether the weight fills its storage to the last byte."""
    return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


def _is_aliased(weight: torch.Tensor) -> bool:
    """Whether another tensor lies in the weight's storage: a view, a state dict that somebody keeps."""
    if isinstance(weight, FakeTensor) or weight.is_meta:
        return False
    storage = weight.untyped_storage()
    return bool(torch._C._storage_Use_Count(storage._cdata) > USERS)


def adjacent(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One view ``(O, I)`` over weights that lie behind each other in memory with rows of one length.

    None where they lie otherwise.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    if isinstance(first, FakeTensor):
        return _adjacent_views(weights)
    end, width = first.data_ptr(), first.shape[1]
    if not _is_alive(end):
        return None
    for weight in weights:
        if weight.data_ptr() != end or weight.dtype != first.dtype or weight.shape[1] != width:
            return None
        if not weight.is_contiguous():
            return None
        end += weight.numel() * weight.element_size()
    return span(weights)


def _adjacent_views(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    first = weights[0]
    storage, stride, end = first.untyped_storage()._cdata, first.stride(), first.storage_offset()
    for weight in weights:
        behind = weight.untyped_storage()._cdata == storage and weight.storage_offset() == end
        if not behind or weight.stride() != stride or weight.dtype != first.dtype:
            return None
        end += weight.shape[0] * stride[0]
    return span(weights)


def span(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The view ``(O, I)`` over weights that are known to be :func:`adjacent`."""
    first = weights[0]
    shape = sum(weight.shape[0] for weight in weights), first.shape[1]
    if isinstance(first, FakeTensor):
        return first.detach().as_strided(shape, first.stride())
    storage = torch.UntypedStorage._new_with_weak_ptr(_buffers[first.data_ptr()][0].cdata)
    assert storage is not None
    with torch.no_grad():
        return first.new_empty(0).set_(storage, 0, shape, first.stride())


class Placement:
    """Where the weights of one model's stacks lie: puts together again what was moved apart.

    That happens at a fused call; a stack that must stay where it is is asked about again when it has moved. A weight
    that belongs to several stacks goes into the first.
    """

    def __init__(self) -> None:
        self._tried: dict[tuple[int, ...], tuple[int, ...]] = {}  # stack -> where it lay when it could not be stacked
        self._stacks: dict[int, tuple[int, ...]] = {}  # of each weight that was moved

    def __reduce__(self) -> tuple[type["Placement"], tuple[()]]:
        """Copied and pickled weights have memory of their own."""
        return Placement, ()

    def stack(self, weights: Sequence[nn.Parameter]) -> bool:
        """:func:`stack_weights`, but not where others would notice."""
        ids = tuple(map(id, weights))
        if any(self._fixed(weight, ids) for weight in weights) or any(map(_is_aliased, weights)):
            return False
        if not stack_weights(weights):
            return False
        for weight in weights:
            self._stacks[id(weight)] = ids
        return True

    def restack(self, weights: Sequence[torch.Tensor]) -> bool:
        """Move weights that lie apart behind each other, as ``patch_model`` did before the model was moved."""
        if any(type(weight) is not nn.Parameter for weight in weights):  # nor a trace's FakeTensor
            return False
        if not self.is_undecided(weights) or _not_now(weights) or any(map(_is_aliased, weights)):
            return False
        done = not any(weight.requires_grad for weight in weights) and self.stack(weights)  # type: ignore[arg-type]
        self._tried[tuple(map(id, weights))] = tuple(weight.data_ptr() for weight in weights)
        return done

    def is_undecided(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether these weights, where they lie now, were not yet found to be fixed there."""
        return self._tried.get(tuple(map(id, weights))) != tuple(weight.data_ptr() for weight in weights)

    def _fixed(self, weight: torch.Tensor, stack: tuple[int, ...]) -> bool:
        """Whether this weight must stay where it is, as others know its memory or it belongs elsewhere."""
        if hasattr(weight, "ds_id") or (is_stacked(weight) and self._stacks.get(id(weight)) != stack):
            return True
        if isinstance(weight, FakeTensor) or weight.is_meta:
            return False
        in_shared_memory = not weight.is_cuda and weight.is_shared()  # type: ignore[no-untyped-call]
        return in_shared_memory or not owns_storage(weight)


def _not_now(weights: Sequence[torch.Tensor]) -> bool:
    """Whether nothing may be moved in this call: inside torch.compile, a mode, inference mode or a graph's capture."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or torch._C._len_torch_dispatch_stack():
        return True
    return weights[0].is_cuda and torch.cuda.is_current_stream_capturing()
