"""``patch_model``: swap the blocks of one model for fused ones, reversibly, and tell what was done.

Only that model's instances change: each matched module gets ``module.__class__ = Fast...``, a static subclass of its
own class. No class, module global or source of any library is touched.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from types import MethodType, TracebackType
from typing import Any

from peft import PeftModel
from torch import nn

from hf_fastpeft.blocks.adapters import SideCache
from hf_fastpeft.border import Placement, tied_weights
from hf_fastpeft.causal_lm import FastCausalLM
from hf_fastpeft.errors import AlreadyPatchedError, NothingToPatchError, UnknownFamilyError
from hf_fastpeft.fast_module import FastModule, Site
from hf_fastpeft.layers import FastDecoderLayer
from hf_fastpeft.ops._backend import IMPLS, Impl, use_triton
from hf_fastpeft.routing import Routing
from hf_fastpeft.stacking import weights_of

__all__ = ["FAMILIES", "Family", "Patched", "families_table", "patch_model", "register_family", "stock_forwards"]

# model_type -> module that defines FAMILY; families load when a model asks for them
FAMILIES: dict[str, str] = {
    "gemma2": "hf_fastpeft.patches.gemma2",
    "gemma3": "hf_fastpeft.patches.gemma3",
    "gemma3_text": "hf_fastpeft.patches.gemma3_text",
    "llama": "hf_fastpeft.patches.llama",
    "mistral": "hf_fastpeft.patches.mistral",
    "mixtral": "hf_fastpeft.patches.mixtral",
    "phi3": "hf_fastpeft.patches.phi3",
    "qwen2": "hf_fastpeft.patches.qwen2",
    "qwen3": "hf_fastpeft.patches.qwen3",
    "qwen3_moe": "hf_fastpeft.patches.qwen3_moe",
}


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture: its ``model_type`` and the fast classes that stand in for its modules.

    ``covers`` and ``notes`` are for readers: the models it includes, and what its classes do not say.
    """

    model_type: str
    fast_classes: tuple[type[FastModule], ...]
    covers: str = ""
    notes: str = ""

    @property
    def swaps(self) -> dict[type[nn.Module], type[FastModule]]:
        """Stock class -> fast class; matched by exact type."""
        return {stock: fast for fast in self.fast_classes if (stock := fast.stock_class()) is not None}


def register_family(model_type: str, module: str) -> None:
    """Make ``patch_model`` know another architecture.

    Args:
        model_type: the value of ``config.model_type``.
        module: importable module that defines ``FAMILY``, a :class:`Family`.
    """
    FAMILIES[model_type] = module


def families_table() -> str:
    """The registered families as a Markdown table: what each fuses, read off its classes."""
    rows = [
        ("family", "`model_type`", "norm", "q/k norm", "attention in", "attention out", "MLP", "head", "notes"),
        ("---",) * 9,
        *(_family_row(import_module(module).FAMILY) for _, module in sorted(FAMILIES.items())),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _family_row(family: Family) -> tuple[str, ...]:
    fast: dict[str, list[Any]] = {}
    for cls in family.fast_classes:
        for block in cls.blocks:
            fast.setdefault(block, []).append(cls)
    (norm,), (attention,) = fast["rms_norm"], fast["attention_in"]
    (layer,) = (cls for cls in family.fast_classes if issubclass(cls, FastDecoderLayer))
    mlps = [_short(*cls.linears.values()) if hasattr(cls, "linears") else "experts stock" for cls in fast["mlp"]]
    between = ", ".join(layer.after_attention + layer.after_mlp)
    options = ", ".join(attention.attention_options).replace("_", " ")
    notes = [options, between and f"{between} before the residuals", family.notes]
    return (
        family.covers,
        f"`{family.model_type}`",
        "RMSNorm, 1 + weight" if norm.unit_offset else "RMSNorm",
        "no" if attention.qk_norms is None else "yes",
        f"{_short(attention.linears['attention_in'])}, rotary",
        _short(attention.linears["attention_out"]),
        "; ".join(mlps),
        "yes" if "lm_head" in fast else "stock",
        "; ".join(filter(None, notes)),
    )


def _short(*groups: tuple[str, ...]) -> str:
    return ", ".join(name.removesuffix("_proj") for group in groups for name in group)


def _load_family(model: nn.Module) -> Family:
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise UnknownFamilyError(
            f"patch_model: no patch for model_type={model_type!r} ({type(model).__name__}); known: "
            f"{', '.join(sorted(FAMILIES))}. Register one with hf_fastpeft.register_family."
        )
    family = import_module(FAMILIES[model_type]).FAMILY
    assert isinstance(family, Family)
    return family


def _refuse_wrapped(model: nn.Module) -> None:
    for module in model.modules():
        name = next((base.__name__ for base in type(module).__mro__ if base.__name__ in WRAPPERS), None)
        if name is not None:
            raise NothingToPatchError(
                f"patch_model: the model is already wrapped ({name}); patch it before {WRAPPERS[name]}"
            )


WRAPPERS = {
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DistributedDataParallel (in a Trainer, FastPeftCallback patches at the right moment)",
    "FSDPModule": "fully_shard",
    "FullyShardedDataParallel": "FSDP",
    "OptimizedModule": "torch.compile",
}


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
    if getattr(state.get("_old_forward"), "__func__", None) is before.forward:
        state["_old_forward"] = MethodType(to.forward, module)
    if getattr(state.get("forward"), "__func__", None) is before.forward:
        del state["forward"]  # left behind when accelerate's hook was removed; it would shadow the class
    module.__class__ = to


@dataclass
class Patched:
    """What ``patch_model`` did to one model; also a context manager that restores on exit.

    Attributes:
        model: the patched model itself (the object that was passed in).
        family: architecture the model was recognised as.
        impl: implementation asked for.
        skipped: module path -> why it was left alone.
        unmatched: names of the family's classes that no module of this model has.
    """

    model: nn.Module
    family: Family
    impl: Impl
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    _placement: Placement = field(default_factory=Placement)
    _last_report: dict[str, Any] | None = None  # what there was to tell when the model was restored

    def modules(self) -> Iterator[tuple[str, FastModule]]:
        """Path and module of everything patched and not yet restored."""
        for path, module in self.model.named_modules():
            if isinstance(module, FastModule):
                yield path, module

    def restore(self) -> nn.Module:
        """Give every module its stock class back; returns the model. Restoring twice changes nothing.

        Raises:
            RuntimeError: somebody derived a class from ours since (``fully_shard``, a parametrization); nothing is
                changed then.
        """
        modules = list(self.modules())
        _refuse_derived(modules)
        if modules:
            self._last_report = self.to_json()
        for _, module in modules:
            del module._fastpeft
            _set_class(module, _stock_of(module))
        self._placement.restore()
        return self.model

    def stack(self, module: FastModule) -> None:
        """Move the weights that a patched module multiplies together behind each other."""
        for names in getattr(module, "linears", {}).values():
            weights = weights_of(module, names)
            if weights is not None:
                self._placement.stack(weights)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready report: per block the modules fused now, those that are not and why, and the calls so far."""
        modules = list(self.modules())
        if not modules and self._last_report is not None:
            return {**self._last_report, "restored": True}
        blocks: dict[str, dict[str, Any]] = {}
        for _, module in modules:
            site = module._fastpeft
            for name in module.blocks:
                row = blocks.setdefault(
                    name,
                    {"modules": 0, "fused": 0, "stock": Counter(), "calls_fused": 0, "calls_stock": Counter()},
                )
                row["modules"] += 1
                reason = module.obstacle(name)
                if reason is None:
                    row["fused"] += 1
                else:
                    row["stock"][reason] += 1
                row["calls_fused"] += site.fused[name]
                row["calls_stock"].update({why: n for (block, why), n in site.stock.items() if block == name})
        for row in blocks.values():
            row["stock"], row["calls_stock"] = dict(row["stock"]), dict(row["calls_stock"])
        return {
            "model": type(_bare(self.model)).__name__,
            "model_type": self.family.model_type,
            "impl": self.impl,
            "blocks": blocks,
            "routing": _routing_of(modules),
            "bordered": self._placement.to_json(),
            "skipped": dict(self.skipped),
            "unmatched": list(self.unmatched),
            "restored": False,
        }

    def report(self) -> str:
        """The same as a table for people: what would be fused in training now, and what was called so far."""
        data = self.to_json()
        lines = [
            f"hf_fastpeft: {data['model']} ({data['model_type']}), impl={self.impl}"
            + (", restored; as it was before" if data["restored"] else ""),
            f"{'block':<14} {'modules':>7} {'fused':>6} {'stock':>6}   calls fused/stock",
        ]
        for name, row in data["blocks"].items():
            calls = f"{row['calls_fused']}/{sum(row['calls_stock'].values())}"
            lines.append(f"{name:<14} {row['modules']:>7} {row['fused']:>6} {sum(row['stock'].values()):>6}   {calls}")
            lines += [f"    stock now: {why} ({n} modules)" for why, n in row["stock"].items()]
            past = {why: n for why, n in row["calls_stock"].items() if why not in row["stock"]}
            lines += [f"    ran stock: {why} ({n} calls)" for why, n in past.items()]
        lines += _routing_lines(data["routing"])
        if data["bordered"] is not None:
            lines.append(f"bordered weights: {data['bordered']['stacks']} stacks so far")
            lines += [f"    adapters apart: {why} ({n} stacks)" for why, n in data["bordered"]["apart"].items()]
        lines += [f"left alone: {path}: {why}" for path, why in self.skipped.items()]
        lines += [f"no module of class {name}" for name in self.unmatched]
        return "\n".join(lines)

    def __enter__(self) -> "Patched":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def _routing_of(modules: Iterable[tuple[str, FastModule]]) -> dict[str, Any] | None:
    """What the model's head did about padding and positions without a label; None without a fused head."""
    for _, module in modules:
        if isinstance(module, FastCausalLM):
            return {**module._fastpeft.routing.to_json(), "obstacle": module.routing_obstacle()}
    return None


def _routing_lines(data: dict[str, Any] | None) -> list[str]:
    if data is None:
        return []
    padding, last = data["padding"], data["last_layer"]
    lines = [
        f"padding removed in {padding['calls']} calls ({padding['of'] - padding['rows']} of {padding['of']} tokens)",
        f"last layer ran on labelled positions in {last['calls']} calls ({last['rows']} of {last['of']} tokens)",
    ]
    if data["obstacle"] is not None:
        lines.append(f"    every position now: {data['obstacle']}")
    past = {why: n for why, n in data["unrouted"].items() if why != data["obstacle"]}
    return lines + [f"    every position: {why} ({n} calls)" for why, n in past.items()]


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
    try:
        for module, _ in swapped:
            _set_class(module, _stock_of(module))
        yield
    finally:
        for module, fast in swapped:
            _set_class(module, fast)


def _bare(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def patch_model(
    model: nn.Module,
    *,
    impl: Impl = "auto",
    only: str | Collection[str] | None = None,
    routing: bool = True,
    bordered: bool = False,
) -> Patched:
    """Swap the blocks of this model for fused ones.

    Works on a transformers model before or after PEFT wrapped it, and on a ``PeftModel``. Nothing is copied or moved;
    state-dict keys, parameters and hooks stay as they are. What a fused block cannot do exactly in the model's current
    state runs the stock code, per call, and the report says why.

    Args:
        model: a model whose ``config.model_type`` has a registered family.
        impl: ``"auto"`` takes Triton on CUDA tensors and torch elsewhere; ``"triton"`` insists; ``"torch"`` never
            takes it.
        only: stock class name or names to patch (for example ``"LlamaMLP"``); all of the family's by default.
        routing: leave padding, and in the last layer positions without a label, out of training steps whose loss the
            fused head computes (:mod:`hf_fastpeft.routing`).
        bordered: keep each stack's frozen weights and its adapters in one matrix where that is exact, so that one
            product does for both (:mod:`hf_fastpeft.border`). Not where FSDP or ZeRO-3 shard them.

    Returns:
        A :class:`Patched`: ``.report()``, ``.to_json()``, ``.restore()``; as a context manager it restores on exit.

    Raises:
        UnknownFamilyError: no family for this ``model_type``.
        AlreadyPatchedError: the model carries our classes already.
        NothingToPatchError: no module to fuse, a name in ``only`` that the family does not have, or a wrapped model.
        RuntimeError: ``impl="triton"`` where Triton cannot run.
        ValueError: unknown ``impl``.
    """
    if impl not in IMPLS:
        raise ValueError(f"patch_model: impl={impl!r}; possible: {', '.join(map(repr, IMPLS))}")
    _refuse_wrapped(model)
    family = _load_family(model)
    swaps = family.swaps
    if only is not None:
        only = {only} if isinstance(only, str) else only
        known = {stock.__name__ for stock in swaps}
        if unknown := set(only) - known:
            raise NothingToPatchError(f"patch_model: only={sorted(unknown)}; possible: {sorted(known)}")
        swaps = {stock: fast for stock, fast in swaps.items() if stock.__name__ in only}
    already = sum(isinstance(module, FastModule) for module in model.modules())
    if already:
        raise AlreadyPatchedError(
            f"patch_model: {already} modules of this model are patched already; call .restore() on the first result"
        )
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
    placement = Placement(bordered, tied_weights(model))
    patched = Patched(model, family, impl, _placement=placement)
    adapters, routes = SideCache(placement), Routing(routing)
    found = set()
    for path, module in matched:
        stock = type(module)
        found.add(stock)
        reason = _held_by_others(module, swaps[stock])
        if reason is None:
            module._fastpeft = Site(impl, adapters, routes)
            _set_class(module, swaps[stock])
            patched.stack(module)
        else:
            patched.skipped[path] = reason
    for path, module in model.named_modules():
        derived = next((stock for stock in swaps if isinstance(module, stock) and type(module) is not stock), None)
        if derived is not None and not isinstance(module, FastModule):
            patched.skipped[path] = f"{type(module).__name__} derives from {derived.__name__}"
    patched.unmatched = tuple(stock.__name__ for stock in swaps if stock not in found)
    return patched
