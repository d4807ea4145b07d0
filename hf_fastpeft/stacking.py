"""Weights of linears over one input, moved behind each other in memory so that one product reads them all.

Each weight stays a parameter of its module, now a view of the common buffer: state dicts, saving, merging and
optimizers go on as before. What moves a parameter elsewhere (``model.to``, sharding) merely ends the neighbourhood:
the blocks look at where the weights lie on every call and multiply one by one where they are apart.
:mod:`hf_fastpeft.border` stacks them again where it may.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from hf_fastpeft.lowrank import is_plain

__all__ = [
    "adjacent",
    "is_sharded",
    "owns_storage",
    "several_processes",
    "span",
    "stack_weights",
    "unstack_weights",
    "weights_of",
]


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
    with torch.no_grad():
        buffer = torch.cat([weight.data for weight in weights])
        for weight, part in zip(weights, torch.split(buffer, rows), strict=True):
            weight.data = part
    return True


def _movable(weight: nn.Parameter, first: nn.Parameter) -> bool:
    return (
        isinstance(weight, nn.Parameter)
        and is_plain(weight)
        and not weight.is_meta
        and not hasattr(weight, "ds_id")  # partitioned by DeepSpeed
        and (weight.dtype, weight.device, weight.shape[1]) == (first.dtype, first.device, first.shape[1])
    )


def unstack_weights(weights: Iterable[nn.Parameter]) -> None:
    """Give each weight contiguous memory of its own again."""
    for weight in weights:
        if not owns_storage(weight):
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)


def owns_storage(*weights: torch.Tensor) -> bool:
    """Whether the weights, all in the storage of the first, fill it to the last byte."""
    return weights[0].untyped_storage().nbytes() == sum(weight.numel() * weight.element_size() for weight in weights)


def adjacent(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One view ``(O, I)`` over weights that lie behind each other in one storage with rows of one length.

    None where they lie otherwise.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    storage, stride, end = first.untyped_storage()._cdata, first.stride(), first.storage_offset()
    if stride[1] != 1:
        return None
    for weight in weights:
        behind = weight.untyped_storage()._cdata == storage and weight.storage_offset() == end
        if not behind or weight.stride() != stride or weight.dtype != first.dtype:
            return None
        end += weight.shape[0] * stride[0]
    return span(weights)


def span(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The view ``(O, I)`` over weights that are known to be :func:`adjacent`."""
    first = weights[0]
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), first.stride())
