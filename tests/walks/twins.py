"""A patched model and its stock twin: do the same to both, and say where what comes of it differs.

Float64 is exact here: norms and loss, which transformers rounds to float32, are computed in float64 on both sides.
"""

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from adapters import twin
from numerics import FLOAT64_REL
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from test_families import tiny
from test_head import loss_in_float64
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from hf_fastpeft import SoraConfig, causal_lm, patch_model
from hf_fastpeft.families import FAMILIES as PATCHES
from hf_fastpeft.layers import FastRMSNorm
from hf_fastpeft.ops.rms_norm import rms_norm_torch

FAMILIES = ["gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"]
METHODS = ["adalora", "dora", "lora", "sora"]
# Float32 is passed through only: rounding errors of both sides, not what a stale or missing term would make of it.
FLOAT32_REL = 1e-3
# what a patched model says: of a method that is used without its callback, of logits that cost a second forward
ADVICE = ("ranks are not being allocated", "gates are not being pruned", "step that left positions out was read")
NOISE = 1e-4  # a gradient this much smaller than all of them together is judged as if it were this large


class Difference(AssertionError):
    """The patched model did something else than its twin."""


@dataclass
class Outcome:
    """What one side did: the value or the error, the warnings, and where it left the random numbers."""

    value: Any = None
    error: Exception | None = None
    warned: set[tuple[str, str]] = field(default_factory=set)
    drawn: torch.Tensor | None = None

    def told(self) -> str:
        return "no error" if self.error is None else "".join(traceback.format_exception(self.error))


def base_of(model: nn.Module) -> Any:
    """The transformers model."""
    return model.base_model.model if isinstance(model, PeftModel) else model  # get_base_model() wants its adapter


def config_of(method: str, family: str, rng: Random, **settings: Any) -> Any:
    """A configuration of the method: rank, scaling, dropout and targets as they come."""
    inward = ["qkv_proj"] if family == "phi3" else ["q_proj", "k_proj", "v_proj"]
    feed = ["gate_up_proj"] if family == "phi3" else ["gate_proj", "up_proj"]
    every = [*inward, "o_proj", *feed, "down_proj"]
    targets = rng.choice([every, every, [inward[0], inward[-1]], [inward[-1], "down_proj"], ["o_proj", feed[0]]])
    common = {
        "lora_alpha": rng.randint(1, 9),
        "lora_dropout": rng.choice([0.0, 0.0, 0.25]),
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        **settings,
    }
    rank = rng.randint(1, 6)
    if method == "adalora":
        return AdaLoraConfig(init_r=rank + 1, target_r=1, tinit=0, tfinal=2, deltaT=1, total_step=40, **common)
    if method == "sora":
        return SoraConfig(r=rank + 1, gate_scale=rng.choice([1.0, 5.0]), **common)
    if method == "lora":
        common["lora_bias"] = rng.random() < 0.2
    if method in ("lora", "dora"):
        common["bias"] = rng.choice(["none"] * 4 + ["all", "lora_only"])
    if rng.random() < 0.2:
        more = {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm", "input_layernorm"]}
        some = {"layers_to_transform": [1]}, {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 3}}
        heads = {"target_modules": [*targets, "lm_head"]}, {"target_modules": [*targets, "embed_tokens"]}
        chosen = rng.choice([*more, *some, *heads])
        if method != "adalora" or "modules_to_save" in chosen:
            common.update(chosen)
        if "embed_tokens" in common["target_modules"]:
            common.pop("lora_bias", None)  # PEFT has none for embeddings
    return LoraConfig(r=rank, use_rslora=rng.random() < 0.3, use_dora=method == "dora", **common)


@torch.no_grad()
def fill(model: nn.Module, adapter: str, seed: int) -> None:
    """Values with which this adapter is not the identity."""
    g = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if "ranknum" in path:
            parameter.requires_grad_(False)  # PEFT 0.21 leaves it to be trained where the model is not float32
        if f".{adapter}." not in f"{path}." or ".lora_" not in path:
            continue
        noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(parameter.dtype)
        if any(part in path for part in ("lora_B", "lora_E", "bias")):
            parameter.copy_(0.2 * noise)
        elif "gate" in path or "magnitude" in path:
            parameter.mul_(1 + 0.2 * noise)


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    if x.dtype == torch.float64:
        return rms_norm_torch(x, self.weight, eps, unit_offset=hasattr(self, "eps"))
    return type(self)._rounded_forward(self, x)  # type: ignore[no-any-return]


def _loss(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    loss = loss_in_float64 if logits.dtype == torch.float64 else ForCausalLMLoss
    return loss(logits, *args, **kwargs)


@contextmanager
def float64_is_exact(family: str) -> Iterator[None]:
    """Inside, stock's norms and loss, and those in the blocks, compute float64 in float64."""
    with pytest.MonkeyPatch.context() as change:
        for fast in import_module(PATCHES[family]).FAMILY.fast_classes:
            if issubclass(fast, FastRMSNorm):
                stock = fast.stock_class()
                change.setattr(stock, "_rounded_forward", stock.forward, raising=False)
                change.setattr(stock, "forward", _norm)
        rounded = FastRMSNorm.obstacle
        change.setattr(
            FastRMSNorm,
            "obstacle",
            lambda self, block: reason if "float64" not in str(reason := rounded(self, block)) else None,
        )
        change.setitem(LOSS_MAPPING, "ForCausalLM", _loss)
        change.setattr(causal_lm, "ForCausalLMLoss", _loss)
        change.setattr(causal_lm, "_loss_is_rounded", lambda dtype: False)
        yield


class Twins:
    """Both models, and what is to be known of them.

    Attributes:
        models: stock and patched.
        patched: whether the second is patched now.
        adapters: number of adapters added so far; each gets its own name.
        steps_inside: whether an optimizer steps inside the backward.
        optimizers: kept ones, of both.
        saved: state dicts of both, taken earlier.
        handles: of hooks on parameters, and of global ones.
    """

    def __init__(self, family: str, method: str, rng: Random, folder: Path) -> None:
        self.family, self.method, self.folder = family, method, folder
        self.adapters, self.patched, self.steps_inside = 1, True, False
        self.optimizers: list[Any] = []
        self.saved: list[dict[str, torch.Tensor]] = []
        self.handles: list[Any] = []
        self.draws = 0
        overrides = {"tie_word_embeddings": rng.random() < 0.3}
        if family in ("llama", "qwen3"):
            overrides["attention_bias"] = rng.random() < 0.5
        stock = tiny(family, torch.float64, **overrides)
        first = config_of(method, family, rng)
        before = rng.random() < 0.3
        fast = twin(stock)
        if before:
            patch_model(fast)
        self.models: list[Any] = [stock, fast]
        wrapped = self.both(lambda model: fill_and_wrap(model, first, rng_seed=1), replace=True)
        assert wrapped is not None, f"PEFT refuses {first}"
        if not before:
            patch_model(self.models[1])
        for model in self.models:
            model.train()

    @property
    def stock(self) -> Any:
        return self.models[0]

    @property
    def fast(self) -> Any:
        return self.models[1]

    @property
    def is_peft(self) -> bool:
        return isinstance(self.stock, PeftModel)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.stock.parameters()).dtype  # type: ignore[no-any-return]

    @property
    def names(self) -> list[str]:
        """Adapters that there are."""
        return list(self.stock.peft_config) if self.is_peft else []

    def both(self, do: Callable[[Any], Any], *, what: str = "", replace: bool = False) -> list[Any] | None:
        """``do`` with either model, from the same random numbers; its values compared.

        Returns:
            Both values; None where both raised.
        """
        self.draws += 1
        stock, fast = (self._attempt(do, model) for model in self.models)
        if type(stock.error).__name__ != type(fast.error).__name__:
            raise Difference(f"{what}: stock: {stock.told()}\npatched: {fast.told()}")
        if stock.warned != fast.warned:
            raise Difference(f"{what}: stock warned {stock.warned}, patched {fast.warned}")
        if stock.error is not None:
            return None
        assert stock.drawn is not None
        assert fast.drawn is not None
        if not torch.equal(stock.drawn, fast.drawn):
            raise Difference(f"{what}: other random numbers were drawn")
        if replace:
            self.models = [stock.value, fast.value]
        else:
            self.compare(stock.value, fast.value, what)
        return [stock.value, fast.value]

    def _attempt(self, do: Callable[[Any], Any], model: Any) -> Outcome:
        torch.manual_seed(self.draws)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                outcome = Outcome(do(model))
            except Difference:
                raise
            except Exception as error:  # what both raise is no difference
                outcome = Outcome(error=error)
        outcome.drawn = torch.get_rng_state()
        outcome.warned = {
            (w.category.__name__, str(w.message)[:80])
            for w in caught
            if not any(advice in str(w.message) for advice in ADVICE)
        }
        return outcome

    def remove_handles(self) -> None:
        """Take hooks on parameters and global ones away."""
        self.steps_inside = False
        while self.handles:
            self.handles.pop().remove()

    def compare(self, want: Any, got: Any, what: str, floor: float = 0.0) -> None:
        """Raise where two values differ by more than the order of additions."""
        if isinstance(want, torch.Tensor) or isinstance(got, torch.Tensor):
            if why := _tensors_differ(want, got, FLOAT64_REL if self.dtype == torch.float64 else FLOAT32_REL, floor):
                raise Difference(f"{what}: {why}")
        elif isinstance(want, dict):
            if list(want) != list(got):
                odd = sorted(map(str, set(want) ^ set(got)))
                raise Difference(f"{what}: keys differ: {odd or 'in their order'}")
            sizes = [t.detach().double().norm().square() for t in want.values() if _is_float(t)]
            whole = float(torch.stack(sizes).sum().sqrt().nan_to_num()) if sizes else 0.0
            for key in want:
                self.compare(want[key], got[key], f"{what} {key}", NOISE * max(whole, 1e-3))
        elif isinstance(want, (list, tuple)):
            if len(want) != len(got):
                raise Difference(f"{what}: {len(want)} values, patched {len(got)}")
            for i, pair in enumerate(zip(want, got, strict=True)):
                self.compare(*pair, f"{what}[{i}]", floor)
        elif isinstance(want, (str, int, float, bool, bytes, type(None))) and want != got:
            raise Difference(f"{what}: stock {want!r:.200}, patched {got!r:.200}")

    def compare_state(self, what: str) -> None:
        """Names, shapes, flags and values of all parameters and buffers."""

        def state(model: Any) -> dict[str, Any]:
            parameters = {
                name: (p.requires_grad, str(p.dtype), tuple(p.shape), p.is_leaf)
                for name, p in model.named_parameters(remove_duplicate=False)
            }
            flags = [module.training for module in model.modules()]
            return {"parameters": parameters, "training": flags}

        self.compare(*map(state, self.models), f"{what}: state")  # type: ignore[call-arg]
        tensors = [
            {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
            for model in self.models
        ]
        for name, want in tensors[0].items():
            self.compare(want, tensors[1][name], f"{what}: value of {name}", NOISE)
            if want.is_contiguous() and not tensors[1][name].is_contiguous():
                raise Difference(f"{what}: {name} is not contiguous any more")

    @torch.no_grad()
    def align(self) -> None:
        """Take the last digits by which the twins' parameters may differ away, without a trace in any version."""
        for want, got in zip(self.stock.parameters(), self.fast.parameters(), strict=True):
            got.data.copy_(want.data)


def fill_and_wrap(model: nn.Module, config: Any, rng_seed: int) -> PeftModel:
    """A PEFT model over ``model`` whose adapter acts."""
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    fill(wrapped, "default", rng_seed)
    return wrapped


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _tensors_differ(want: Any, got: Any, tol: float, floor: float) -> str | None:
    if not (isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor)):
        return f"stock gives a {type(want).__name__}, patched a {type(got).__name__}"
    if (want.shape, want.dtype, want.requires_grad) != (got.shape, got.dtype, got.requires_grad):
        kinds = [(tuple(t.shape), str(t.dtype), t.requires_grad) for t in (want, got)]
        return f"stock {kinds[0]}, patched {kinds[1]}"
    want, got = want.detach(), got.detach()
    if not want.is_floating_point():
        return None if torch.equal(want, got) else "values differ"
    want, got = want.double(), got.double()
    finite = want.isfinite()
    if not torch.equal(want[~finite].nan_to_num(7.0), got[~finite].nan_to_num(7.0)):
        return "not finite in other places"
    error, size = (got[finite] - want[finite]).norm().item(), want[finite].norm().item()
    if not error <= tol * max(size, floor):
        return f"off by {error:.1e} at a size of {size:.1e} (all together {floor / NOISE:.1e})"
    return None
