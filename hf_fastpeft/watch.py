"""What a reader of modules looked at, so that its result can be kept for as long as none of it changed.

A cache with a list of its own of what invalidates it forgets something sooner or later. Here readers look through the
watch, so that it holds exactly what they looked at.
"""

from operator import eq, is_
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Glance", "Watch", "waits"]


def waits(tensor: torch.Tensor) -> bool:
    """Whether reading the tensor's value waits for a device."""
    return tensor.device.type != "cpu"


class Watch:
    """Looks things up in modules and remembers what it saw.

    Attributes:
        volatile: what was read depends on something that is not watched; :meth:`same` is then False.
    """

    __slots__ = (
        "_copies",
        "_data",
        "_keys",
        "_kinds",
        "_lists",
        "_mappings",
        "_names",
        "_numbers",
        "_objects",
        "_rows",
        "_seen",
        "_sized",
        "_sizes",
        "_states",
        "_values",
        "_versions",
        "volatile",
    )

    def __init__(self) -> None:
        self.volatile = False
        # parallel lists: `same` then runs in C, at about 40 ns an entry
        self._mappings: list[dict[Any, Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._objects: list[object] = []
        self._kinds: list[type] = []
        self._states: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._sized: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        self._lists: list[list[Any]] = []
        self._copies: list[list[Any]] = []
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._data: list[tuple[torch.Tensor, int, bool, StorageWeakRef]] = []
        self._rows: list[tuple[torch.Tensor, torch.Size, tuple[int, ...]]] = []
        self._numbers: list[tuple[torch.Tensor, float]] = []
        self._seen: set[tuple[int, str]] = set()

    def item(self, mapping: dict[Any, Any], key: Any) -> Any:
        """``mapping[key]``, or None; that it is this dictionary is for the caller to watch."""
        value = mapping.get(key)
        self._mappings.append(mapping)
        self._keys.append(key)
        self._values.append(value)
        return value

    def attribute(self, module: nn.Module, name: str) -> Any:
        """An attribute in the module's own dictionary, None where there is none; watched is which object it is."""
        return self.item(module.__dict__, name)

    def entry(self, module: nn.Module, name: str, key: Any) -> Any:
        """``module.name[key]`` of a dictionary among the module's own attributes, or None."""
        place = id(module), name
        if place not in self._seen:
            self._seen.add(place)
            self.attribute(module, name)
        return self.item(module.__dict__[name], key)

    def child(self, module: nn.Module, name: str) -> Any:
        """A child module, or None."""
        return self.entry(module, "_modules", name)

    def children(self, module: nn.Module) -> list[nn.Module]:
        """All child modules; watched is which there are."""
        self.attribute(module, "_modules")
        return self.members(module.__dict__["_modules"])

    def members(self, mapping: dict[str, nn.Module | None]) -> list[nn.Module]:
        """All modules in a dictionary of children; watched is which there are."""
        self._sized.append(mapping)
        self._sizes.append(len(mapping))
        return [child for child in [self.item(mapping, name) for name in mapping] if child is not None]

    def parameter(self, module: nn.Module, name: str) -> Any:
        """A parameter, or None; for where its memory lies see :meth:`data`."""
        return self.entry(module, "_parameters", name)

    def kind(self, module: nn.Module) -> type:
        """Exact type; others change it in place (``fully_shard``, parametrizations, ``patch_model``)."""
        kind = type(module)
        self._objects.append(module)
        self._kinds.append(kind)
        return kind

    def contents(self, values: list[Any]) -> list[Any]:
        """A list whose elements count."""
        self._lists.append(values)
        self._copies.append(list(values))
        return values

    def is_set(self, module: nn.Module, name: str) -> bool:
        """Whether an attribute is anything else than absent, None, False or an empty container; watched where not."""
        if module.__dict__.get(name):
            self.volatile = True
            return True
        self._states.append(module.__dict__)
        self._names.append(name)
        return False

    def version(self, tensor: torch.Tensor) -> int | None:
        """The version that writes in place raise; None for tensors made in inference mode, which have none."""
        if tensor.is_inference():
            self.volatile = True
            return None
        self._versions.append((tensor, tensor._version))
        return tensor._version

    def number(self, tensor: torch.Tensor) -> None:
        """The value of a tensor with one element, where reading does not wait: writes may leave no version."""
        if not waits(tensor) and not isinstance(tensor, FakeTensor):
            self._numbers.append((tensor, tensor.item()))

    def data(self, tensor: torch.Tensor, *, rows: bool = False) -> None:
        """Watch where a tensor's memory lies, whether it wants a gradient and, with ``rows``, shape and strides.

        The memory itself is not kept alive. What is computed anew for every call is not worth watching.
        """
        if isinstance(tensor, FakeTensor) or tensor.grad_fn is not None:
            self.volatile = True
            return
        place = tensor.data_ptr(), tensor.requires_grad, StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._data.append((tensor, *place))
        if rows:
            self._rows.append((tensor, tensor.shape, tensor.stride()))

    def same(self) -> bool:
        """Whether all that was looked at is as it was."""
        if self.volatile or any(map(dict.get, self._states, self._names)) or self._lists != self._copies:
            return False
        if not all(map(eq, map(len, self._sized), self._sizes)):
            return False
        if not all(map(is_, map(dict.get, self._mappings, self._keys), self._values)):
            return False
        if not all(map(is_, map(type, self._objects), self._kinds)):
            return False
        for tensor, place, wants_grad, storage in self._data:
            # other memory can come to lie in the same place only after the old has gone
            if tensor.data_ptr() != place or tensor.requires_grad is not wants_grad:
                return False
            if storage.expired():  # type: ignore[no-untyped-call]
                return False
        for tensor, shape, stride in self._rows:
            if tensor.shape != shape or tensor.stride() != stride:
                return False
        if any(tensor.item() != value for tensor, value in self._numbers):
            return False
        return all(tensor._version == version for tensor, version in self._versions)


class Glance(Watch):
    """Looks and remembers nothing: for ``torch.compile``, which guards itself what it reads while it traces."""

    __slots__ = ()

    def __init__(self) -> None:
        self.volatile = True

    def item(self, mapping: dict[Any, Any], key: Any) -> Any:
        return mapping.get(key)

    def attribute(self, module: nn.Module, name: str) -> Any:
        return module.__dict__.get(name)

    def entry(self, module: nn.Module, name: str, key: Any) -> Any:
        return module.__dict__[name].get(key)

    def kind(self, module: nn.Module) -> type:
        return type(module)

    def contents(self, values: list[Any]) -> list[Any]:
        return values

    def is_set(self, module: nn.Module, name: str) -> bool:
        return bool(module.__dict__.get(name))

    def version(self, tensor: torch.Tensor) -> int | None:
        return None

    def number(self, tensor: torch.Tensor) -> None:
        pass

    def data(self, tensor: torch.Tensor, *, rows: bool = False) -> None:
        pass
