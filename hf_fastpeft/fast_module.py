"""What every patched module has: its own memory of options and calls, and the question whether it may fuse now."""

from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hf_fastpeft.blocks.adapters import SideCache
from hf_fastpeft.blocks.bundle import Bundle
from hf_fastpeft.hooks import foreign_code
from hf_fastpeft.ops._backend import Impl
from hf_fastpeft.routing import Routing
from hf_fastpeft.watch import Glance, Watch

__all__ = ["COMPILED", "FastModule", "Readings", "Site"]

INFERENCE = "inference (stock numerics and caches)"
COMPILED = "inside torch.compile"
EXPORTED = "inside torch.export"
REPLICA = "a replica of DataParallel"
# modes that keep operators' results or their arguments, which the blocks then write to
MODES = {
    "torch.autograd.graph": "allow_mutation_on_saved_tensors",
    "torch.utils.checkpoint": "selective activation checkpointing",
}
TRANSFORMED = "torch.func or forward-mode differentiation"


class Readings(dict[str, tuple[dict[str, Any], Watch, tuple[Bundle, ...]]]):
    """Of each block of a module: the module's children, by whose dictionary it is known from a shallow copy, the watch
    over what was read last, and that. A deep copy of the module starts without."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Readings":
        return Readings()

    def __reduce__(self) -> tuple[type["Readings"], tuple[()]]:
        return Readings, ()


@dataclass(slots=True)
class Origin:
    """What ``patch_model`` found in a model; one for all sites of it.

    Attributes:
        model_type: architecture the model was recognised as.
        skipped: module path -> why it was left alone.
        unmatched: names of the family's classes that no module of the model has.
    """

    model_type: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()


@dataclass(slots=True)
class Site:
    """What a patched module remembers: its options and what happened to each of its blocks so far.

    A call inside a compiled graph counts once, when it is traced: a counter in traced code would be guarded on.
    """

    impl: Impl
    adapters: SideCache = field(default_factory=SideCache)  # these three are one for all sites of a model
    routing: Routing = field(default_factory=Routing)
    origin: Origin = field(default_factory=Origin)
    readings: Readings = field(default_factory=Readings)
    fused: Counter[str] = field(default_factory=Counter)
    stock: Counter[tuple[str, str]] = field(default_factory=Counter)  # (block, reason) -> calls

    def fuse(self, block: str) -> None:
        """Count one fused call of ``block``."""
        if torch.compiler.is_compiling():
            self._fuse_traced(block)
        else:
            self.fused[block] += 1

    def fall_back(self, block: str, reason: str) -> None:
        """Count one call of ``block`` that ran stock."""
        if reason is INFERENCE:  # the model may not be trained any more: keep none of it alive
            self.readings.clear()
        if torch.compiler.is_compiling():
            self._fall_back_traced(block, reason)
        else:
            self.stock[block, reason] += 1

    @torch.compiler.assume_constant_result
    def _fuse_traced(self, block: str) -> None:
        self.fused[block] += 1

    @torch.compiler.assume_constant_result
    def _fall_back_traced(self, block: str, reason: str) -> None:
        self.stock[block, reason] += 1


def _mode_obstacle() -> str | None:
    """What goes on around this call that the blocks do not go along with."""
    if torch._C._is_tracing():
        return "inside torch.jit.trace"
    if not torch._C._len_torch_dispatch_stack():
        return None
    for mode in _get_current_dispatch_mode_stack():
        if type(mode).__module__ in MODES:
            return f"inside {MODES[type(mode).__module__]}"
        if isinstance(mode, FakeTensorMode) and mode.allow_non_fake_inputs:
            return "inside a FakeTensorMode over real weights"
    return None


def _new_instance(module: str, name: str) -> "FastModule":
    cls = getattr(import_module(module), name)
    instance = cls.__new__(cls)
    assert isinstance(instance, FastModule)
    return instance


class FastModule(nn.Module):
    """Base of the mixins. Subclasses name the blocks they can fuse and say, for each, what stands in the way now."""

    _fastpeft: Site
    _importable: ClassVar[tuple[str, str]]
    blocks: ClassVar[tuple[str, ...]] = ()
    # the kernels hub re-patches modules whose class inherits a layer name; our forward is the one that was asked for
    kernel_condition = staticmethod(lambda module: False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A family's class carries the stock names and module: transformers and FSDP choose layers by them, PEFT
        writes them into the adapter's config."""
        super().__init_subclass__(**kwargs)
        stock = cls.stock_class()
        if stock in cls.__bases__:  # not for classes that FSDP or a parametrization derive from ours
            cls._importable = (cls.__module__, cls.__qualname__)
            cls.__name__, cls.__qualname__, cls.__module__ = stock.__name__, stock.__qualname__, stock.__module__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled and copied by where the class really is."""
        state = getattr(self, "__getstate__", self.__dict__.copy)  # Python 3.10 has no default __getstate__
        return _new_instance, self._importable, state()

    @classmethod
    def stock_class(cls) -> type[nn.Module] | None:
        """The Hugging Face class under the mixin, or None for the mixin itself."""
        below = [base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, FastModule)]
        return below[0] if below and below[0] is not nn.Module else None

    @classmethod
    def foreign_arguments(cls) -> str | None:
        """Why this class does not understand what its stock class's forward is called with; None if it does."""
        return None

    @classmethod
    def tolerates(cls, forward: Any) -> bool:
        """Whether a module with this foreign instance ``forward`` can be patched all the same."""
        return False

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Moves and casts: nothing of the old memory is to be kept."""
        self._fastpeft.readings.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def obstacle(self, block: str) -> str | None:
        """Why ``block`` would run stock in the adapters' and dropouts' present state; None if it would be fused."""
        found = self._read(block, Watch())
        return found if isinstance(found, str) else None

    def _read(self, block: str, watch: Watch) -> tuple[Bundle, ...] | str:
        """The stacks of linears that ``block`` multiplies with, or why it must run stock.

        This module's own dictionary is not for the watch, which it keeps: that would be a cycle.
        """
        raise NotImplementedError

    def _bundles(self, block: str) -> tuple[Bundle, ...] | str:
        """:meth:`_read`, again only after something that it looked at has changed."""
        if torch.compiler.is_compiling():
            return self._read(block, Glance())
        readings = self._fastpeft.readings
        known = readings.get(block)
        if known is not None and known[0] is self.__dict__["_modules"] and known[1].same():
            return known[2]
        watch = Watch()
        found = self._read(block, watch)
        if isinstance(found, str) and self._unmerge_disabled():
            watch = Watch()
            found = self._read(block, watch)
        if isinstance(found, str) or watch.volatile:
            readings.pop(block, None)
        else:
            readings[block] = self.__dict__["_modules"], watch, found
        return found

    def _unmerge_disabled(self) -> bool:
        """Unmerge linears whose adapters are merged and disabled, as PEFT does when it runs them.

        Left to the stock forward, a recomputation would find another state than the forward did.
        """
        names = [name for group in getattr(self, "linears", {}).values() for name in group]
        layers = [getattr(self, name, None) for name in names]
        found = [m for m in layers if isinstance(m, BaseTunerLayer) and m.disable_adapters and m.merged]
        if found and foreign_code([m for m in layers if isinstance(m, nn.Module)], Watch()):
            return False  # it may see the weights before PEFT's turn
        for layer in found:
            layer.unmerge()
        return bool(found)

    def _may_fuse(self) -> str | None:
        """What rules out every block of this call, before any layer is read."""
        if torch.compiler.is_exporting():
            return EXPORTED
        if "_is_replica" in self.__dict__:
            return REPLICA
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return TRANSFORMED
        if _has_any_global_hook():  # type: ignore[no-untyped-call]
            return "global module hooks"
        if not torch.is_grad_enabled() and not self.training:
            return INFERENCE
        return None if torch.compiler.is_compiling() else _mode_obstacle()
