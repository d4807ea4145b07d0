"""Changes of state that a walk is made of: adapters, modes, values in place, optimizers.

Each step changes both twins alike and says what it did, or returns None where there is nothing to do it to.
"""

import copy
import gc
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from walks.twins import Twins, base_of, config_of, fill, fill_and_wrap

from hf_fastpeft import patch_model, restore

Step = Callable[[Twins, Random], str | None]
STEPS: dict[str, Step] = {}


def step(change: Step) -> Step:
    STEPS[change.__name__] = change
    return change


def adapted(model: Any) -> dict[str, Any]:
    """Path -> PEFT layer with an adapter."""
    return {path: m for path, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}


def parameters(twins: Twins, rng: Random, *kinds: str, count: int = 1) -> list[str]:
    """Names of some parameters whose name has one of ``kinds`` in it."""
    names = [name for name, _ in twins.stock.named_parameters() if not kinds or any(kind in name for kind in kinds)]
    return rng.sample(names, min(count, len(names)))


def owner_of(model: nn.Module, name: str) -> tuple[Any, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


# --- adapters


@step
def add_adapter(twins: Twins, rng: Random) -> str | None:
    if not twins.is_peft or len(twins.names) > 3:
        return None
    name, seed = f"a{twins.adapters}", rng.randrange(1000)
    twins.adapters += 1
    method = twins.method if twins.method != "dora" else rng.choice(["lora", "dora"])
    inference = {"inference_mode": True} if twins.method == "adalora" else {}
    config = config_of(method, twins.family, rng, **inference)

    def add(model: Any) -> None:
        model.add_adapter(name, copy.deepcopy(config))
        fill(model, name, seed)

    twins.both(add, what="add_adapter")
    return f"{name}: r={getattr(config, 'init_r', config.r)} {config.target_modules} dropout={config.lora_dropout}"


@step
def delete_adapter(twins: Twins, rng: Random) -> str | None:
    if len(twins.names) < 2:
        return None
    name = rng.choice(twins.names)
    twins.both(lambda model: model.delete_adapter(name), what="delete_adapter")
    return name


@step
def set_adapter(twins: Twins, rng: Random) -> str | None:
    if not twins.is_peft:
        return None
    name = rng.choice(twins.names)
    twins.both(lambda model: model.set_adapter(name), what="set_adapter")
    return name


@step
def set_several(twins: Twins, rng: Random) -> str | None:
    if len(twins.names) < 2:
        return None
    names = rng.sample(twins.names, rng.randint(0, 2))
    twins.both(lambda model: model.base_model.set_adapter(names), what="set several")
    return str(names)


@step
def switch_adapters(twins: Twins, rng: Random) -> str | None:
    if not twins.is_peft:
        return None
    on = rng.random() < 0.6
    name = "enable_adapter_layers" if on else "disable_adapter_layers"
    twins.both(lambda model: getattr(model.base_model, name)(), what=name)
    return name


@step
def merge(twins: Twins, rng: Random) -> str | None:
    if not twins.is_peft:
        return None
    safe, names = rng.random() < 0.3, rng.choice([None, None, [rng.choice(twins.names)]])
    twins.both(lambda model: model.merge_adapter(adapter_names=names, safe_merge=safe), what="merge")
    return f"{names or 'active'}{', safely' if safe else ''}"


@step
def unmerge(twins: Twins, rng: Random) -> str | None:
    if not any(layer.merged for layer in adapted(twins.stock).values()):
        return None
    twins.both(lambda model: model.unmerge_adapter(), what="unmerge")
    return "all"


@step
def unload_and_wrap_again(twins: Twins, rng: Random) -> str | None:
    if not twins.is_peft:
        return None
    config, keep = config_of(twins.method, twins.family, rng), rng.random() < 0.5

    def unload(model: Any) -> Any:
        base = model.merge_and_unload() if keep else model.unload()
        return fill_and_wrap(base, copy.deepcopy(config), 3)

    twins.both(unload, what="unload", replace=True)
    return f"{'merged' if keep else 'dropped'}, then r={getattr(config, 'init_r', config.r)} {config.target_modules}"


@step
def weigh_adapters(twins: Twins, rng: Random) -> str | None:
    if len(twins.names) < 2:
        return None
    names, name, kind = rng.sample(twins.names, 2), f"a{twins.adapters}", rng.choice(["cat", "linear"])
    twins.adapters += 1
    twins.both(lambda model: model.add_weighted_adapter(names, [0.6, -0.3], name, kind), what="add_weighted_adapter")
    return f"{names} -> {name}, {kind}"


@step
def scale(twins: Twins, rng: Random) -> str | None:
    if not twins.names:
        return None
    name, how, value = rng.choice(twins.names), rng.randrange(4), rng.choice([0.0, 0.5, 1.7])
    layers = sorted(adapted(twins.stock))
    paths = rng.sample(layers, min(len(layers), 2))

    def change(model: Any) -> None:
        for path in paths:
            layer = adapted(model)[path]
            if how == 0 and name in layer.scaling:
                layer.scaling[name] *= value
            elif how == 1:
                layer.set_scale(name, value)
            elif how == 2:
                layer.scale_layer(value or 2.0)
            elif how == 3:
                layer.unscale_layer(rng_scale)

    rng_scale = rng.choice([None, 2.0])
    twins.both(change, what="scale")
    return f"{name} in {paths}: {('scaling *=', 'set_scale', 'scale_layer', 'unscale_layer')[how]} {value}"


@step
def dropout(twins: Twins, rng: Random) -> str | None:
    paths = sorted(adapted(twins.stock))
    if not paths:
        return None
    path, p, how = rng.choice(paths), rng.choice([0.0, 0.3]), rng.randrange(3)

    def change(model: Any) -> None:
        layers = adapted(model)
        for layer in layers.values() if how == 0 else [layers[path]]:
            for name, module in list(layer.lora_dropout.items()):
                if how == 2 or isinstance(module, nn.Identity):
                    layer.lora_dropout[name] = nn.Dropout(p) if p else nn.Identity()
                else:
                    module.p = p

    twins.both(change, what="dropout")
    return f"{p} on {'all' if how == 0 else path}{', as a new module' if how == 2 else ''}"


@step
def attention_dropout(twins: Twins, rng: Random) -> str | None:
    p = rng.choice([0.0, 0.2])

    def change(model: Any) -> None:
        for layer in base_of(model).model.layers:
            layer.self_attn.attention_dropout = p

    twins.both(change, what="attention_dropout")
    return str(p)


# --- modes


@step
def train_or_eval(twins: Twins, rng: Random) -> str | None:
    training = rng.random() < 0.7
    modules = [path for path, _ in twins.stock.named_modules()]
    path = "" if rng.random() < 0.6 else rng.choice(modules)
    twins.both(lambda model: model.get_submodule(path).train(training), what="train") if path else [
        model.train(training) for model in twins.models
    ]
    return f"{path or 'all'}.train({training})"


@step
def all_train(twins: Twins, rng: Random) -> str | None:
    for model in twins.models:
        model.train()
    return "all"


@step
def requires_grad(twins: Twins, rng: Random) -> str | None:
    kinds = rng.choice([("lora_",), ("norm",), ("base_layer", "proj"), ("embed", "lm_head"), ("bias",), ()])
    names, on = parameters(twins, rng, *kinds, count=rng.choice([1, 3, 100])), rng.random() < 0.6

    def change(model: Any) -> None:
        named = dict(model.named_parameters())
        for name in names:
            named[name].requires_grad_(on)

    twins.both(change, what="requires_grad")
    return f"{on} for {names[:3]}{' ...' if len(names) > 3 else ''}"


@step
def move(twins: Twins, rng: Random) -> str | None:
    """To float32 or back to float64."""
    to = torch.float32 if twins.dtype == torch.float64 and rng.random() < 0.5 else torch.float64
    twins.align()
    twins.both(lambda model: model.to(to), what="move", replace=True)
    return str(to)


@step
def back_to_float64(twins: Twins, rng: Random) -> str | None:
    if twins.dtype == torch.float64:
        return None
    twins.both(lambda model: model.double(), what="move", replace=True)
    return ""


@step
def checkpointing(twins: Twins, rng: Random) -> str | None:
    kind = rng.choice([None, True, False])

    def change(model: Any) -> None:
        if kind is None:
            model.gradient_checkpointing_disable()
        else:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": kind})

    twins.both(change, what="checkpointing")
    return "off" if kind is None else f"use_reentrant={kind}"


@step
def deep_copy(twins: Twins, rng: Random) -> str | None:
    """The originals are overwritten: a copy that reads them shows it."""

    def copied(model: Any) -> Any:
        new = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.fill_(7.0)
        return new

    twins.optimizers.clear()
    twins.both(copied, what="deepcopy", replace=True)
    return "overwritten originals"


@step
def restore_and_patch(twins: Twins, rng: Random) -> str | None:
    stay = rng.random() < 0.2
    if twins.patched:
        restore(twins.fast)
        twins.patched = False
        if stay:
            return "restored only"
    options = rng.choice([{}, {}, {"routing": False}, {"impl": "torch"}])
    patch_model(twins.fast, **options)
    twins.patched = True
    return f"patched again {options or ''}"


# --- values


@step
def take_state(twins: Twins, rng: Random) -> str | None:
    found = twins.both(lambda model: {name: t.clone() for name, t in model.state_dict().items()}, what="state_dict")
    twins.saved = found or []
    return "kept"


@step
def load_state(twins: Twins, rng: Random) -> str | None:
    if not twins.saved:
        return None
    assign, crossed = rng.random() < 0.3, rng.random() < 0.5
    first = twins.saved[0]
    if assign:  # the tensors themselves: each twin takes its own
        first, second = ({name: t.clone() for name, t in first.items()} for _ in range(2))
    else:
        second = first if crossed else twins.saved[1]

    def load(model: Any) -> None:
        model.load_state_dict(first if model is twins.stock else second, strict=False, assign=assign)

    twins.both(load, what="load_state_dict")
    return f"assign={assign}"


def _numpy(p: nn.Parameter, values: torch.Tensor) -> None:
    p.detach().numpy()[...] = values.numpy()  # no version is bumped


def _new_data(p: nn.Parameter, values: torch.Tensor) -> None:
    p.data = values.clone()


def _swap(p: nn.Parameter, values: torch.Tensor) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(values.clone(), requires_grad=p.requires_grad))


def _transposed(p: nn.Parameter, values: torch.Tensor) -> None:
    p.data = values.t().contiguous().t() if values.dim() == 2 else values.clone()


WRITES: dict[str, Callable[[nn.Parameter, torch.Tensor], Any]] = {
    "data": _new_data,
    "data of other strides": _transposed,
    "data.copy_": lambda p, values: p.data.copy_(values),
    "no_grad copy_": lambda p, values: p.copy_(values),
    "no_grad add_": lambda p, values: p.add_(values - p),
    "detach().copy_": lambda p, values: p.detach().copy_(values),
    "numpy": _numpy,
    "swap_tensors": _swap,
    "set_": lambda p, values: p.data.set_(values.clone()),
    "foreach": lambda p, values: torch._foreach_copy_([p], [values]),
}


@step
def write(twins: Twins, rng: Random) -> str | None:
    kinds = rng.choice([("lora_",), ("lora_B", "lora_E"), ("norm",), ("proj",), ("embed", "lm_head"), ("bias",), ()])
    names, how, seed = (
        parameters(twins, rng, *kinds, count=rng.randint(1, 4)),
        rng.choice([*WRITES]),
        rng.randrange(99),
    )
    if not names:
        return None

    if how == "swap_tensors":
        gc.collect()  # it refuses what a graph in some cycle still holds

    @torch.no_grad()
    def change(model: Any) -> None:
        g, named = torch.Generator().manual_seed(seed), dict(model.named_parameters())
        for name in names:
            p = named[name]
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            WRITES[how](p, (p.double() + 0.1 * noise).to(p.dtype))

    twins.both(change, what=f"write {how}")
    return f"{how}: {names}"


@step
def wrap_a_bare_model(twins: Twins, rng: Random) -> str | None:
    if twins.is_peft:
        return None
    config = config_of(twins.method, twins.family, rng)
    twins.both(lambda model: get_peft_model(model, copy.deepcopy(config)), what="wrap", replace=True)
    return "again"
