"""Changes of state by other code: hooks, replaced modules, tied and resized embeddings, other attention functions."""

import copy
import gc
import re
from random import Random
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from walks.steps import owner_of, parameters, step
from walks.twins import Twins, base_of
from walks.views import LOWEST_VOCAB

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
IN_PLACE = "walks_in_place"
LAYERS = 2
OUTSIDE = {"embed_tokens": (-1, 0), "rotary_emb": (-1, 0), "lm_head": (LAYERS, 0), ".norm": (LAYERS, 0)}
# of a layer's modules, in which order a forward comes to them; the first whose name is in a path counts
ORDER = {"input_layernorm": 0, "o_proj": 2, "self_attn": 1, "post_attention": 3, "pre_feedforward": 4}
ORDER |= {
    "resid_attn_dropout": 2,
    "resid_mlp_dropout": 8,
    "act_fn": 6,
    "activation_fn": 6,
    "down_proj": 7,
    "post_feedforward": 8,
    "mlp": 5,
}


def _in_place(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """sdpa on queries and values that it changes where they lie."""
    return sdpa_attention_forward(module, q.mul_(1.1), k, v.add_(0.1), *args, **kwargs)


AttentionInterface.register(IN_PLACE, _in_place)
AttentionMaskInterface.register(IN_PLACE, sdpa_mask)


class Hook:
    """A hook of ours, told by its class; the same on both twins, and inert on their copies."""

    def __init__(self, act: Any = None) -> None:
        self.act, self.calls = act, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook()

    def __call__(self, module: Any, *args: Any) -> None:
        if self.act is not None:
            self.act(self)


def writes(twins: Twins) -> bool:
    """Whether a hook of ours writes to parameters."""
    hooks = (hook for m in twins.stock.modules() for name in HOOKS for hook in m.__dict__[name].values())
    return twins.steps_inside or any(isinstance(hook, Hook) and hook.act is not None for hook in hooks)


def _hookable(twins: Twins, rng: Random) -> str:
    modules = dict(twins.stock.named_modules())
    inside = [path for path in modules if ".layers." in path]
    return rng.choice(inside if rng.random() < 0.8 else [path for path in modules if path])


def _attach(module: nn.Module, kind: str, hook: Hook) -> None:
    getattr(module, f"register_{kind}")(hook)


def _place(path: str, *, after: bool = False) -> tuple[int, int]:
    """When a forward comes to a module, or leaves it: the layer, the place in it."""
    layer = re.search(r"layers\.(\d+)", path)
    if layer is None:
        leaf = next((place for name, place in OUTSIDE.items() if name in path), None)
        return leaf or ((LAYERS, 0) if after else (-1, 0))
    if after and path.endswith(layer[0]):
        return int(layer[1]), len(ORDER)
    if after and path.endswith(("self_attn", "mlp")):
        return int(layer[1]), ORDER["o_proj" if path.endswith("self_attn") else "down_proj"]
    return int(layer[1]), next((place for name, place in ORDER.items() if name in path), -1)


@step
def hook_that_reads(twins: Twins, rng: Random) -> str | None:
    kinds = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
    path, kind = _hookable(twins, rng), rng.choice(kinds)
    twins.both(lambda model: _attach(model.get_submodule(path), kind, Hook()), what="hook")
    return f"{kind} on {path}"


@step
def hook_that_writes(twins: Twins, rng: Random) -> str | None:
    """Every forward gives an adapter other values, from inside some module's forward.

    It is one that comes later: what stock's backward makes of one that was used before depends on what it saves.
    """
    path, kind = _hookable(twins, rng), rng.choice(["forward_hook", "forward_pre_hook"])
    path = path.split(".lora_")[0].split(".base_layer")[0]
    place = _place(path, after=kind == "forward_hook")
    targets = [name for name, _ in twins.stock.named_parameters() if ".lora_B" in name and _place(name) > place]
    if not targets:
        return None
    target = rng.choice(targets)
    silent = rng.random() < 0.4

    def attach(model: Any) -> None:
        written = dict(model.named_parameters())[target]
        start = written.detach().clone()

        def act(hook: Hook) -> None:
            if torch._C._current_graph_task_id() != -1:  # a recomputation finds what its forward left
                return
            hook.calls += 1
            values = (start * (1 + 0.2 * (hook.calls % 4))).to(written.dtype)
            if written.shape == values.shape:
                with torch.no_grad():
                    (written.data if silent else written).copy_(values)

        _attach(model.get_submodule(path), kind, Hook(act))

    twins.both(attach, what="hook")
    return f"{kind} on {path} writes {target}{' through .data' if silent else ''}"


@step
def hook_on_gradients(twins: Twins, rng: Random) -> str | None:
    """Gradients scaled on their way, or an optimizer that steps inside the backward."""
    names, steps_inside = parameters(twins, rng, "lora_", "norm", "proj", count=3), rng.random() < 0.5
    if steps_inside and twins.method == "adalora":  # whose gradients come in two parts: with its penalty's two steps
        names = [name for name in names if ".lora_" not in name]

    def scaled(g: torch.Tensor) -> torch.Tensor:
        return g * 0.5

    @torch.no_grad()
    def step_inside(p: torch.Tensor) -> None:
        if p.dtype == torch.float64 and p.grad is not None:  # the twins' roundings to float32 would add up
            p.add_(p.grad.nan_to_num(), alpha=-0.01)

    def attach(model: Any) -> None:
        named = dict(model.named_parameters())
        for p in [named[name] for name in names if named[name].requires_grad]:
            hook = p.register_post_accumulate_grad_hook(step_inside) if steps_inside else p.register_hook(scaled)
            twins.handles.append(hook)

    twins.steps_inside |= steps_inside
    twins.both(attach, what="hook on gradients")
    return f"{'steps' if steps_inside else 'scales'} {names}"


@step
def global_hook(twins: Twins, rng: Random) -> str | None:
    twins.handles.append(nn.modules.module.register_module_forward_hook(Hook()))
    return "reads"


@step
def remove_hooks(twins: Twins, rng: Random) -> str | None:
    found = len(twins.handles)
    twins.remove_handles()
    for model in twins.models:
        for module in model.modules():
            for name in HOOKS:
                hooks = module.__dict__[name]
                for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                    del hooks[key]
                    found += 1
            if not module._backward_hooks and not module._backward_pre_hooks:
                module._is_full_backward_hook = None
    return "all" if found else None


@step
def replace_module(twins: Twins, rng: Random) -> str | None:
    """By a copy of itself, or by another kind; a layer by its neighbour."""
    layer, kind = rng.randrange(2), rng.randrange(7)
    name = rng.choice(["input_layernorm", "post_attention_layernorm", "mlp", "self_attn.o_proj", "mlp.down_proj"])

    def replace(model: Any) -> None:
        layers = base_of(model).model.layers
        chosen = layers[layer]
        if kind == 0:
            _replace(chosen, name, copy.deepcopy(chosen.get_submodule(name)))
        elif kind == 1:
            act = "act_fn" if hasattr(chosen.mlp, "act_fn") else "activation_fn"
            setattr(chosen.mlp, act, nn.GELU() if isinstance(getattr(chosen.mlp, act), nn.SiLU) else nn.SiLU())
        elif kind == 2:
            layers[0], layers[1] = layers[1], layers[0]
            for i in range(2):
                layers[i].self_attn.layer_idx = i
        elif kind == 3:
            head = base_of(model).lm_head
            new = nn.Linear(head.in_features, head.out_features, bias=False, dtype=head.weight.dtype)
            new.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
            base_of(model).lm_head = new
        elif kind == 4:
            chosen.input_layernorm = nn.Identity()
        elif kind == 5:
            down = chosen.mlp.down_proj
            chosen.mlp.down_proj = nn.Sequential(down, nn.Identity())
        else:
            base_of(model).model.norm = copy.deepcopy(base_of(model).model.norm)

    kinds = (
        "copy of",
        "activation",
        "layers swapped",
        "new head",
        "no norm",
        "wrapped down_proj",
        "copy of last norm",
    )
    twins.both(replace, what=f"replace: {kinds[kind]}")
    return f"{kinds[kind]} {name if kind == 0 else ''} in layer {layer}"


def _replace(root: nn.Module, path: str, new: nn.Module) -> None:
    owner, name = owner_of(root, path)
    setattr(owner, name, new)


@step
def replace_parameter(twins: Twins, rng: Random) -> str | None:
    names, grad = parameters(twins, rng, "proj", "norm", "lora_", count=2), rng.random() < 0.5

    def replace(model: Any) -> None:
        for name in names:
            owner, last = owner_of(model, name)
            old = owner._parameters[last] if last in getattr(owner, "_parameters", {}) else owner[last]
            new = nn.Parameter(old.detach() * 1.05, requires_grad=grad)
            if isinstance(owner, nn.ParameterDict):
                owner[last] = new
            else:
                setattr(owner, last, new)

    twins.both(replace, what="replace parameter")
    return str(names)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


@step
def weight_by_other_code(twins: Twins, rng: Random) -> str | None:
    """A linear whose weight is computed: parametrized, or pruned by a hook; or no more."""
    linears = [path for path, m in twins.stock.named_modules() if isinstance(m, nn.Linear) and ".layers." in path]
    path, pruned = rng.choice(linears), rng.random() < 0.5

    def change(model: Any) -> str:
        linear = model.get_submodule(path)
        if parametrize.is_parametrized(linear):
            parametrize.remove_parametrizations(linear, "weight")
            return "parametrization removed"
        if prune.is_pruned(linear):
            prune.remove(linear, "weight")
            return "pruned for good"
        if pruned:
            prune.l1_unstructured(linear, "weight", 0.3)
        else:
            parametrize.register_parametrization(linear, "weight", Doubled())
        return "pruned" if pruned else "parametrized"

    done = twins.both(change, what="weight by other code")
    return f"{path} {done[0] if done else 'refused by both'}"


@step
def resize_embeddings(twins: Twins, rng: Random) -> str | None:
    size = rng.randint(LOWEST_VOCAB, 140)
    gc.collect()  # a graph in some cycle would still expect gradients of the old size
    twins.both(lambda model: type(base_of(model).resize_token_embeddings(size)).__name__, what="resize")
    return str(size)


@step
def tie(twins: Twins, rng: Random) -> str | None:
    tied = rng.random() < 0.5

    def change(model: Any) -> None:
        base = base_of(model)
        embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
        if tied:
            head.weight = embeddings.weight
        else:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)

    twins.both(change, what="tie")
    return "tied" if tied else "untied"


@step
def hotswap(twins: Twins, rng: Random) -> str | None:
    """Other values for an adapter, by PEFT's own utility."""
    if not twins.is_peft or twins.method == "adalora":
        return None
    name, factor = rng.choice(twins.names), rng.choice([0.5, 1.5])

    def swap(model: Any) -> None:
        state = get_peft_model_state_dict(model, adapter_name=name)
        state = {key: tensor * factor for key, tensor in state.items()}
        hotswap_adapter_from_state_dict(model, state, name, model.peft_config[name])

    twins.both(swap, what="hotswap")
    return f"{name} times {factor}"


@step
def attention_function(twins: Twins, rng: Random) -> str | None:
    name = rng.choice(["sdpa", IN_PLACE])
    twins.both(lambda model: base_of(model).set_attn_implementation(name), what="attention function")
    return name
