"""``patch_model``: swap the blocks of one model for fused ones, reversibly, and tell what was done.

Only that model's instances change: each matched module gets ``module.__class__ = Fast...``, a static subclass of its
own class. No class, module global or source of any library is touched. Both directions are all or nothing: what fails
half way leaves the model as it was.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any, TypeVar

from torch import nn

from hf_fastpeft.blocks.adapters import SideCache
from hf_fastpeft.errors import AlreadyPatchedError, NothingToPatchError, NotPatchedError
from hf_fastpeft.families import load_family
from hf_fastpeft.fast_module import FastModule, Origin, Site
from hf_fastpeft.ops._backend import IMPLS, Impl, use_triton
from hf_fastpeft.report import describe, report_text
from hf_fastpeft.routing import Routing
from hf_fastpeft.stacking import Placement, unstack_weights, weights_of

__all__ = ["Patched", "patch_model", "patched", "refuse_others", "restore", "stock_forwards"]

ModelT = TypeVar("ModelT", bound=nn.Module)

WRAPPERS = {
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DistributedDataParallel (in a Trainer, FastPeftCallback patches at the right moment)",
    "FSDPModule": "fully_shard",
    "FullyShardedDataParallel": "FSDP",
    "OptimizedModule": "torch.compile",
}
STATE = ("_fastpeft", "_old_forward", "forward")  # what patching changes of a module's own attributes


def patch_model(
    model: ModelT,
    *,
    impl: Impl = "auto",
    only: str | Collection[str] | None = None,
    routing: bool = True,
) -> ModelT:
    """Swap the blocks of this model for fused ones.

    Works on a transformers model before or after PEFT wrapped it, and on a ``PeftModel``. State-dict keys, parameters,
    what savers write and hooks stay as they are. What a fused block cannot do exactly in the model's current state
    runs the stock code, per call, and the report says why.

    Args:
        model: a model whose ``config.model_type`` has a registered family.
        impl: ``"auto"`` takes Triton on CUDA tensors and torch elsewhere; ``"triton"`` insists; ``"torch"`` never
            takes it.
        only: stock class name or names to patch (for example ``"LlamaMLP"``); all of the family's by default.
        routing: leave padding, and in the last layer positions without a label, out of training steps whose caller
            wants nothing but the loss: TRL's and Trainer's (:mod:`hf_fastpeft.routing`).

    Returns:
        The model itself, as it was passed in. :func:`patched` gives the report, :func:`restore` undoes it.

    Raises:
        UnknownFamilyError: no family for this ``model_type``.
        AlreadyPatchedError: the model carries our classes already.
        NothingToPatchError: no module to fuse, a name in ``only`` that the family does not have, or a wrapped model.
        RuntimeError: ``impl="triton"`` where Triton cannot run.
        TypeError: not a model.
        ValueError: unknown ``impl``.
    """
    refuse_others("patch_model", model)
    if impl not in IMPLS:
        raise ValueError(f"patch_model: impl={impl!r}; possible: {', '.join(map(repr, IMPLS))}")
    _refuse_wrapped(model)
    already = sum(isinstance(module, FastModule) for module in model.modules())
    if already:
        raise AlreadyPatchedError(
            f"patch_model: {already} modules of this model are patched already; hf_fastpeft.restore(model) undoes it"
        )
    family = load_family(model)
    swaps = family.swaps
    if only is not None:
        only = {only} if isinstance(only, str) else only
        known = {stock.__name__ for stock in swaps}
        if (unknown := set(only) - known) or not only:
            raise NothingToPatchError(f"patch_model: only={sorted(unknown)}; possible: {sorted(known)}")
        swaps = {stock: fast for stock, fast in swaps.items() if stock.__name__ in only}
    matched = [(path, module) for path, module in model.named_modules() if type(module) in swaps]
    if not any(hasattr(swaps[type(module)], "linears") for _, module in matched) and only is None:
        raise NothingToPatchError(
            f"patch_model: {type(model).__name__} has no {' or '.join(s.__name__ for s in swaps)} with linears to "
            f"fuse; found: {', '.join(sorted({type(module).__name__ for _, module in matched})) or 'none of them'}"
        )
    if impl == "triton":
        for parameter in model.parameters():
            use_triton(impl, parameter)
            break
    found = {type(module) for _, module in matched}
    origin = Origin(family.model_type, unmatched=tuple(stock.__name__ for stock in swaps if stock not in found))
    chosen = []
    for path, module in matched:
        reason = _held_by_others(module, swaps[type(module)])
        if reason is None:
            chosen.append((module, swaps[type(module)]))
        else:
            origin.skipped[path] = reason
    for path, module in model.named_modules():
        derived = next((stock for stock in swaps if isinstance(module, stock) and type(module) is not stock), None)
        if derived is not None:
            origin.skipped[path] = f"{type(module).__name__} derives from {derived.__name__}"
    _patch(chosen, impl, Routing(routing), origin)
    return model


def _patch(chosen: list[tuple[nn.Module, type[FastModule]]], impl: Impl, routing: Routing, origin: Origin) -> None:
    placement = Placement()
    adapters = SideCache(placement)
    try:
        with _all_or_nothing(module for module, _ in chosen):
            for module, fast in chosen:
                module._fastpeft = Site(impl, adapters, routing, origin)  # type: ignore[assignment]
                _set_class(module, fast)
                for weights in _stacks_of(module):
                    placement.stack(weights)
    except BaseException:
        for module, fast in chosen:
            for weights in _stacks_of(module, fast):
                unstack_weights(weights)
        raise


def _stacks_of(module: nn.Module, fast: type[FastModule] | None = None) -> list[list[nn.Parameter]]:
    """The weights that a fast module, or one that would be of class ``fast``, multiplies with together."""
    linears = getattr(fast or module, "linears", {})
    return [weights for names in linears.values() if (weights := weights_of(module, names)) is not None]


def refuse_others(asked: str, model: Any) -> None:
    """Names, classes, configurations and trainers stand for models in other calls."""
    if isinstance(model, nn.Module):
        return
    found = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    hint = "; pass trainer.model" if isinstance(getattr(model, "model", None), nn.Module) else ""
    raise TypeError(f"{asked}: found {found}; a loaded model is needed (a transformers model or a PeftModel){hint}")


def _refuse_wrapped(model: nn.Module) -> None:
    for module in model.modules():
        name = next((base.__name__ for base in type(module).__mro__ if base.__name__ in WRAPPERS), None)
        if name is not None:
            raise NothingToPatchError(
                f"patch_model: the model is already wrapped ({name}); patch it before {WRAPPERS[name]}"
            )


def _held_by_others(module: nn.Module, fast: type[FastModule]) -> str | None:
    """Why the module must be left alone: another library holds its forward. None if it may be swapped."""
    stock = type(module)
    if reason := fast.foreign_arguments():
        return reason
    hooked, own = module.__dict__.get("_old_forward"), module.__dict__.get("forward")
    if hooked is not None:  # accelerate keeps the bound stock forward here, and its hook in ``forward``
        mine = getattr(hooked, "__func__", None) is stock.forward
        return None if mine else "accelerate hook over a foreign forward"
    if own is None or getattr(own, "__func__", None) is stock.forward or fast.tolerates(own):
        return None
    return "foreign forward on this instance (another library patched it)"


def _set_class(module: nn.Module, to: type[nn.Module]) -> None:
    """``module.__class__ = to``, with the bound forwards that accelerate keeps on the instance following along."""
    before, state = type(module), module.__dict__
    module.__class__ = to
    if getattr(state.get("_old_forward"), "__func__", None) is before.forward:
        state["_old_forward"] = MethodType(to.forward, module)
    if getattr(state.get("forward"), "__func__", None) is before.forward:
        del state["forward"]  # left behind when accelerate's hook was removed; it would shadow the class


@contextmanager
def _all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gives these modules the class and attributes they have now back, if what runs inside fails."""
    before = [(m, type(m), {name: m.__dict__[name] for name in STATE if name in m.__dict__}) for m in modules]
    try:
        yield
    except BaseException:
        for module, kind, state in before:
            module.__class__ = kind
            for name in STATE:
                module.__dict__.pop(name, None)
            module.__dict__.update(state)
        raise


@dataclass
class Patched:
    """What ``patch_model`` did to a model; also a context manager that restores on exit.

    Attributes:
        model: the patched model.
    """

    model: nn.Module
    _last_report: dict[str, Any] | None = None  # what there was to tell when the model was restored

    def modules(self) -> Iterator[tuple[str, FastModule]]:
        """Path and module of everything patched and not yet restored."""
        for path, module in self.model.named_modules():
            if isinstance(module, FastModule):
                yield path, module

    def restore(self) -> nn.Module:
        """:func:`restore`, after which the report still tells what was."""
        if any(True for _ in self.modules()):
            self._last_report = self.to_json()
        return restore(self.model)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready report: per block the modules fused now, those that are not and why, and the calls so far."""
        modules = [module for _, module in self.modules()]
        if modules:
            return describe(self.model, modules)
        if self._last_report is None:
            raise _not_patched("report", self.model)
        return {**self._last_report, "restored": True}

    def report(self) -> str:
        """The same as a table for people: what would be fused in training now, and what was called so far."""
        return report_text(self.to_json())

    def __enter__(self) -> "Patched":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restores. Where that fails and an exception is on its way already, the latter goes on with a note."""
        try:
            self.restore()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"hf_fastpeft: the model stays patched: {failure}")


def patched(model: nn.Module) -> Patched:
    """The handle of a patched model: its report, and a context manager that restores it on exit.

    Args:
        model: what :func:`patch_model` was given, a copy of it, or a model that holds it (a ``PeftModel``, a wrapper).

    Raises:
        NotPatchedError: no module of the model is patched.
        TypeError: not a model.
    """
    refuse_others("patched", model)
    if not any(isinstance(module, FastModule) for module in model.modules()):
        raise _not_patched("patched", model)
    return Patched(model)


def _not_patched(asked: str, model: nn.Module) -> NotPatchedError:
    return NotPatchedError(
        f"{asked}: no module of this {type(model).__name__} is patched; call patch_model(model) first"
    )


def restore(model: ModelT) -> ModelT:
    """Give every module of the model its stock class back; the model computes and holds what it would have without us.

    Needs no handle. A model that is not patched is left as it is.

    Returns:
        The model itself.

    Raises:
        RuntimeError: somebody derived a class from ours since (``fully_shard``, a parametrization), or a forward of
            the model is running (a hook called this); nothing is changed then.
        TypeError: not a model.
    """
    refuse_others("restore", model)
    fast = [(path, module) for path, module in model.named_modules() if isinstance(module, FastModule)]
    _refuse_derived(fast)
    if any(module._fastpeft.adapters.is_inside for _, module in fast):
        raise RuntimeError("restore: a forward of this model is running; restore it between steps")
    for _, module in fast:
        for weights in _stacks_of(module):
            unstack_weights(weights)
    with _all_or_nothing(module for _, module in fast):
        for _, module in fast:
            del module._fastpeft
            _set_class(module, _stock_of(module))
    return model


def _stock_of(module: FastModule) -> type[nn.Module]:
    stock = type(module).stock_class()
    assert stock is not None
    return stock


def _refuse_derived(modules: Iterable[tuple[str, FastModule]]) -> None:
    """A class made from ours by somebody else must be unmade by them: setting ours would lose what it does."""
    for path, module in modules:
        if "_importable" not in vars(type(module)):
            raise RuntimeError(
                f"{path} is now a {type(module).__name__}, a class that another library derived from the patched one "
                f"(fully_shard, parametrizations); undo that first, or leave the model patched"
            )


@contextmanager
def stock_forwards(modules: Iterable[FastModule]) -> Iterator[None]:
    """Inside, these modules run their stock forward; their records stay."""
    swapped = [(module, type(module)) for module in modules]
    _refuse_derived([(type(module).__name__, module) for module, _ in swapped])
    with _all_or_nothing(module for module, _ in swapped):
        for module, _ in swapped:
            _set_class(module, _stock_of(module))
    try:
        yield
    finally:
        for module, fast in swapped:
            _set_class(module, fast)
