"""What a reader of modules looked at, so that its result can be kept for as long as none of it changed.

A cache with a list of its own of what invalidates it forgets something sooner or later. Here readers look through the
watch, so that it holds exactly what they looked at.
"""

from collections.abc import Sized
from operator import is_
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Glance", "Watch"]


class Watch:
    """Looks things up in modules and remembers what it saw.

    Attributes:
        volatile: what was read depends on something that is not watched; :meth:`same` is then False.
    """

    __slots__ = (
        "_copies",
        "_data",
        "_empty",
        "_held",
        "_keys",
        "_kinds",
        "_lists",
        "_mappings",
        "_objects",
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
        self._empty: list[Sized] = []
        self._lists: list[list[Any]] = []
        self._copies: list[list[Any]] = []
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._data: list[tuple[torch.Tensor, int, bool]] = []
        self._held: list[torch.Tensor] = []

    def item(self, mapping: dict[Any, Any], key: Any) -> Any:
        """``mapping[key]``, None where there is none; watched is which object it is."""
        value = mapping.get(key)
        self._mappings.append(mapping)
        self._keys.append(key)
        self._values.append(value)
        return value

    def attribute(self, module: nn.Module, name: str) -> Any:
        """An attribute in the module's own dictionary: a flag or a plain object, no parameter or child."""
        return self.item(module.__dict__, name)

    def child(self, module: nn.Module, name: str) -> Any:
        """A child module, or None."""
        return self.item(module.__dict__["_modules"], name)

    def parameter(self, module: nn.Module, name: str) -> Any:
        """A parameter, or None; for where its memory lies see :meth:`data`."""
        return self.item(module.__dict__["_parameters"], name)

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

    def is_empty(self, container: Sized) -> bool:
        """Whether a container is empty; watched where it is."""
        if len(container):
            self.volatile = True
            return False
        self._empty.append(container)
        return True

    def version(self, tensor: torch.Tensor) -> int | None:
        """The version that writes in place raise; None for tensors made in inference mode, which have none."""
        if tensor.is_inference():
            self.volatile = True
            return None
        self._versions.append((tensor, tensor._version))
        return tensor._version

    def data(self, tensor: torch.Tensor) -> None:
        """Watch where a tensor's memory lies (and with it dtype and shape), and whether it wants a gradient."""
        if isinstance(tensor, FakeTensor):  # has no memory
            self.volatile = True
            return
        self._data.append((tensor, tensor.data_ptr(), tensor.requires_grad))
        self._held.append(tensor.detach())  # while this lives, nothing else can come to lie there

    def same(self) -> bool:
        """Whether all that was looked at is as it was."""
        if self.volatile or any(self._empty) or self._lists != self._copies:
            return False
        if not all(map(is_, map(dict.get, self._mappings, self._keys), self._values)):
            return False
        if not all(map(is_, map(type, self._objects), self._kinds)):
            return False
        for tensor, place, wants_grad in self._data:
            if tensor.data_ptr() != place or tensor.requires_grad is not wants_grad:
                return False
        return all(tensor._version == version for tensor, version in self._versions)


class Glance(Watch):
    """Looks and remembers nothing: for ``torch.compile``, which guards itself what it reads while it traces."""

    __slots__ = ()

    def __init__(self) -> None:
        self.volatile = True

    def item(self, mapping: dict[Any, Any], key: Any) -> Any:
        return mapping.get(key)

    def kind(self, module: nn.Module) -> type:
        return type(module)

    def contents(self, values: list[Any]) -> list[Any]:
        return values

    def is_empty(self, container: Sized) -> bool:
        return not len(container)

    def version(self, tensor: torch.Tensor) -> int | None:
        return None

    def data(self, tensor: torch.Tensor) -> None:
        pass
