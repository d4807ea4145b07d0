"""Ranks chosen before training from gradients of the frozen weights, as a plain LoRA configuration (GoRA-style).

    importance  I_i = mean over steps n, over elements, of |W_i * dL_n/dW_i|
    rank        r_i = about t * I_i / sqrt(in_i + out_i), see :mod:`hf_fastpeft.rank_budget`

Source: He et al. 2025, "GoRA", arXiv 2502.12171. It takes |W * mean_n G_n|, which needs a copy of every gradient; the
mean of |W * G_n| needs one float a module. GoRA's initialisation of B is not part of this.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_fastpeft.errors import AdapterError, DataError
from hf_fastpeft.families import bare_model
from hf_fastpeft.fast_module import FastModule
from hf_fastpeft.patching import stock_forwards
from hf_fastpeft.rank_budget import ranks_under_budget

__all__ = ["allocate_ranks", "measure_importance"]

LossFn = Callable[[nn.Module, Any], torch.Tensor]
_QUANTISED = ("Params4bit", "Int8Params")  # bitsandbytes
_BLOCK_ELEMENTS = 1 << 22  # of a weight scored at a time: 16 MiB of scratch a float32 temporary
_OWN_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")


def allocate_ranks(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    budget: int | None = None,
    mean_rank: float | None = None,
    n_steps: int = 16,
    min_rank: int | None = None,
    max_rank: int | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    scaling: float = 1.0,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    **lora_options: Any,
) -> LoraConfig:
    """A ``LoraConfig`` whose ranks follow the importance of the frozen weights, under a parameter budget.

    Every rank is its share rounded down or up, and ``sum r * (in + out)`` never exceeds the budget. Keys of
    ``rank_pattern`` are anchored full module paths, which PEFT matches to exactly one module of this model. A fixed
    ``seed`` and the same batches give the same configuration. Cost and state: as `measure_importance`.

    Args:
        model: a model, or a ``PeftModel`` (see `measure_importance`); the result fits its base model.
        dataloader: batches for the model, at least ``n_steps``.
        budget: parameters of all A and B together. Either this or ``mean_rank``.
        mean_rank: as many parameters as LoRA with this rank on every target.
        n_steps: gradient steps (batches) to average over.
        min_rank: lowest rank; 0 leaves unimportant modules out. Default half the mean rank, at least 1 (GoRA: 4 of 8).
        max_rank: highest rank, and never above a weight's smaller side. Default four times the mean rank (GoRA).
        target_modules: as in ``LoraConfig``; ``"all-linear"`` leaves out the output and classification heads.
        scaling: factor of every adapter's output, ``alpha / r`` (``alpha / sqrt(r)`` with rsLoRA), the same at every
            rank through ``alpha_pattern``. Servers that read one ``alpha / r`` for all modules get it right.
        lora_alpha: one alpha for all modules instead: the factor then depends on the rank.
        use_rslora: divide alpha by ``sqrt(r)``.
        loss_fn: ``(model, batch) -> loss``; default ``model(**batch).loss``.
        seed: of dropout and shuffling inside.
        lora_options: other fields of ``LoraConfig``, for example ``task_type``, ``lora_dropout``.

    Returns:
        The configuration; ``r`` is the largest rank.

    Raises:
        ValueError: a value out of range, or a budget that no ranks in ``[min_rank, max_rank]`` can meet.
        AdapterError: no target, or targets that are not linear, sharded, offloaded, or quantised by something else
            than bitsandbytes.
        DataError: too few batches, or a loss that reaches no target or is not finite.

    Source: He et al. 2025, arXiv 2502.12171; the head of this file has the formula and what differs.
    """
    if reserved := sorted(set(lora_options) & set(_OWN_FIELDS)):
        raise ValueError(f"allocate_ranks: {', '.join(reserved)}: decided here; possible: other fields of LoraConfig")
    if lora_alpha is None and not (isinstance(scaling, (int, float)) and 0 < scaling < math.inf):
        raise ValueError(f"allocate_ranks: scaling={scaling!r}; possible: a number above 0")
    base = _base_model(model)
    targets = _find_targets(base, target_modules, lora_options)
    shapes = {path: _features(linear) for path, linear in targets.items()}
    budget, low, high = _limits(shapes, budget, mean_rank, min_rank, max_rank)
    importance = _measure(model, targets, dataloader, n_steps=n_steps, loss_fn=loss_fn, seed=seed)
    ranks = ranks_under_budget(importance, shapes, budget=budget, min_rank=low, max_rank=high)
    return _config(base, ranks, scaling, lora_alpha, use_rslora, lora_options)


def measure_importance(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    n_steps: int = 16,
    target_modules: str | Sequence[str] = "all-linear",
    loss_fn: LossFn | None = None,
    seed: int = 0,
    **lora_options: Any,
) -> dict[str, float]:
    """Module path -> mean of ``|W * dL/dW|`` over steps and elements.

    Runs the model as it is now: active adapters take part (leave them out with ``model.disable_adapter()``), patched
    blocks run their stock forward, evaluation mode unless gradient checkpointing is on, which works in training mode
    only. ``requires_grad``, training modes, gradients and torch's random state are restored, also after an error.

    Only target weights get gradients. Each is scored and dropped as soon as it is whole, so memory above that of
    training activations is one weight's gradient and 32 MiB of scratch; scores stay on their device until the end. A
    weight quantised by bitsandbytes has no gradient of its own: output gradient times input of each call, against the
    dequantised weight, which is one more weight in memory; the calls of a module that runs twice in a step add up.
    With ``torch.distributed`` running, importance is the mean over processes.

    Gradients of float16 weights may underflow: scale the loss in ``loss_fn``, ranks depend on ratios only.

    Args and Raises: as `allocate_ranks`.
    """
    targets = _find_targets(_base_model(model), target_modules, lora_options)
    return _measure(model, targets, dataloader, n_steps=n_steps, loss_fn=loss_fn, seed=seed)


def _limits(
    shapes: Mapping[str, tuple[int, int]],
    budget: int | None,
    mean_rank: float | None,
    min_rank: int | None,
    max_rank: int | None,
) -> tuple[int, int, int]:
    """Budget in parameters, lowest and highest rank; every mistake in one message."""
    per_rank = sum(sum(shape) for shape in shapes.values())
    if (budget is None) == (mean_rank is None):
        raise ValueError(f"allocate_ranks: budget={budget!r}, mean_rank={mean_rank!r}; possible: exactly one of them")
    asked, value = ("budget", budget) if mean_rank is None else ("mean_rank", mean_rank)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"allocate_ranks: {asked}={value!r}; possible: a number above 0")
    parameters = math.floor(Fraction(value) * per_rank) if asked == "mean_rank" else math.floor(value)
    mean = parameters / per_rank
    low = max(1, math.floor(mean / 2)) if min_rank is None else min_rank
    high = max(low, math.ceil(4 * mean)) if max_rank is None else max_rank
    wrong = [
        f"{name}={limit!r}: possible: an integer from {least}"
        for name, limit, least in (("min_rank", low, 0), ("max_rank", high, 1))
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < least
    ]
    if not wrong and low > high:
        wrong.append(f"min_rank={low!r}: above max_rank={high!r}")
    if not wrong:
        at_least, at_most = (sum(min(r, *shape) * sum(shape) for shape in shapes.values()) for r in (low, high))
        if not at_least <= parameters <= at_most:
            wrong.append(
                f"{asked}={value!r} is {parameters} parameters; possible with ranks {low} to {high} on {len(shapes)} "
                f"modules: {at_least} to {at_most}"
            )
    if wrong:
        raise ValueError("allocate_ranks: " + "; ".join(wrong))
    return parameters, low, high


def _base_model(model: nn.Module) -> nn.Module:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise AdapterError(f"allocate_ranks: a {type(model).__name__} averages gradients by itself; pass model.module")
    return bare_model(model)


def _linears(module: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Path in the bare model -> module; adapter layers are looked through, what they and PEFT's copies add is not."""
    seen = set() if seen is None else seen
    while isinstance(module, BaseTunerLayer) and module.get_base_layer() is not module:
        module = module.get_base_layer()
    if id(module) in seen or isinstance(module, (AuxiliaryTrainingWrapper, BaseTunerLayer)):
        return
    seen.add(id(module))
    yield path, module
    for name, child in module.named_children():
        yield from _linears(child, f"{path}.{name}" if path else name, seen)


def _find_targets(base: nn.Module, asked: str | Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    config = LoraConfig(target_modules=asked, **options)
    everything = isinstance(asked, str) and asked.lower() == "all-linear"
    heads = {id(getattr(base, name, None)) for name in SEQ_CLS_HEAD_NAMES}
    output_embeddings: Any = getattr(base, "get_output_embeddings", lambda: None)
    heads.add(id(output_embeddings()))
    if everything:  # what PEFT still leaves out, whatever the name
        config.target_modules = r"(?s).+"
    targets, refused = {}, []
    for path, module in _linears(base):
        is_linear = isinstance(module, (nn.Linear, Conv1D))
        if (everything and (not is_linear or id(module) in heads)) or not path:
            continue
        if not check_target_module_exists(config, path):  # falsy for an excluded one too
            continue
        reason = _unsupported(module) if is_linear else f"a {type(module).__name__}, not a linear"
        if reason is None:
            targets[path] = module
        else:
            refused.append(f"{path}: {reason}")
    if refused:
        raise AdapterError(
            f"allocate_ranks: target_modules={asked!r}: {len(refused)} modules have no gradient to measure: "
            f"{'; '.join(refused[:5])}; possible: whole linear layers, plain or quantised by bitsandbytes"
        )
    if not targets:
        raise AdapterError(f"allocate_ranks: target_modules={asked!r}: no such linear in {type(base).__name__}")
    return targets


def _is_quantised(linear: Any) -> bool:
    return type(linear.weight).__name__ in _QUANTISED


def _dequantised(linear: Any) -> torch.Tensor:
    """Weight of a bitsandbytes layer, (out, in), without touching the layer: PEFT's helper replaces it on a CPU."""
    weight = linear.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
    scale = weight.SCB if linear.state.SCB is None else linear.state.SCB  # the first forward moves it
    return weight.data * (scale.to(weight.device) / 127)[:, None]  # type: ignore[no-any-return]


def _unsupported(linear: Any) -> str | None:
    weight = getattr(linear, "weight", None)
    if _is_quantised(linear):
        packed = getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)
        return "bitsandbytes packed its weight for inference on a CPU; load the model again" if packed else None
    if type(weight) is not nn.Parameter or hasattr(weight, "ds_id"):
        return f"its weight is a {type(weight).__name__} (sharded or quantised)"
    if weight.is_meta:
        return "its weight is offloaded (meta device)"
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or weight.dim() != 2:
        return f"its weight is {weight.dtype} of shape {tuple(weight.shape)}"
    if getattr(weight, "_post_accumulate_grad_hooks", None):
        return "its weight has a hook that runs after each gradient (an optimizer inside backward?)"
    return None


def _features(linear: Any) -> tuple[int, int]:
    """(in_features, out_features); a quantised weight is packed, so by the layer's attributes."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    rows, columns = linear.weight.shape  # Conv1D: (in, out)
    return int(rows), int(columns)


class _Scores:
    """Sum of importance per weight, one tensor a device: no host synchronisation until `read`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sums: dict[torch.device, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, index: int, weight: torch.Tensor, grad: torch.Tensor) -> None:
        """Adds ``mean |weight * grad|``, both (rows, columns), in float32 or wider, a block of rows at a time."""
        rows = max(1, _BLOCK_ELEMENTS // max(weight.shape[1], 1))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if weight.device not in self.sums:
            wide = torch.float32 if weight.device.type == "mps" else torch.float64
            self.sums[weight.device] = torch.zeros(self.size, dtype=wide, device=weight.device)
        into = self.sums[weight.device][index]
        for w, g in zip(torch.split(weight, rows), torch.split(grad, rows), strict=True):
            into.add_((w.to(dtype) * g).abs_().sum() / weight.numel())

    def read(self) -> list[float]:
        total = torch.zeros(self.size, dtype=torch.float64)
        for sums in self.sums.values():
            total += sums.cpu()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = next(iter(self.sums), torch.device("cpu"))
            total = total.to(device, torch.float32 if device.type == "mps" else torch.float64)
            torch.distributed.all_reduce(total)
            total /= torch.distributed.get_world_size()
        return total.tolist()


def _measure(
    model: nn.Module,
    targets: Mapping[str, Any],
    dataloader: Iterable[Any],
    *,
    n_steps: int,
    loss_fn: LossFn | None,
    seed: int,
) -> dict[str, float]:
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(f"allocate_ranks: n_steps={n_steps!r}; possible: an integer from 1")
    plain = {id(m.weight): m.weight for m in targets.values() if not _is_quantised(m)}
    slots = list(plain) + [id(m) for m in targets.values() if _is_quantised(m)]  # tied weights share one
    index = {key: i for i, key in enumerate(slots)}
    scores = _Scores(len(slots))
    fast = [m for m in model.modules() if isinstance(m, FastModule)]
    with ExitStack() as stack:
        stack.enter_context(stock_forwards(fast))
        stack.enter_context(_differentiating(model, list(plain.values()), seed))
        for key, weight in plain.items():
            stack.callback(weight.register_post_accumulate_grad_hook(_score_and_drop(scores, index[key])).remove)
        for module in targets.values():
            if _is_quantised(module):
                hook = _score_product(scores, index[id(module)])
                stack.callback(module.register_forward_hook(hook).remove)
        loss = _backward(model, dataloader, n_steps, loss_fn or _default_loss)
    sums = scores.read()
    importance = {
        path: sums[index[id(m) if _is_quantised(m) else id(m.weight)]] / n_steps for path, m in targets.items()
    }
    _judge(importance, loss.item())
    return importance


@contextmanager
def _differentiating(model: nn.Module, weights: Sequence[torch.Tensor], seed: int) -> Iterator[None]:
    """Inside, only ``weights`` take gradients and the random state is ``seed``'s; outside all is as before."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    grads = [(w, w.grad) for w in weights]
    devices = sorted({p.device.index or 0 for p, _ in flags if p.device.type == "cuda"})
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        for w in weights:
            w.grad = None
            w.requires_grad_(True)
        model.train(any(getattr(m, "gradient_checkpointing", False) for m, _ in modes))
        for m, _ in modes:  # in evaluation on a CPU bitsandbytes would pack the weights, for good
            m.training |= isinstance(m, nn.Linear) and _is_quantised(m)
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            # not torch.manual_seed: it would also set devices that are not restored here
            for generator in (torch.default_generator, *(torch.cuda.default_generators[d] for d in devices)):
                generator.manual_seed(seed)
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for m, mode in modes:
            m.training = mode
        for w, grad in grads:
            w.grad = grad


def _score_and_drop(scores: _Scores, index: int) -> Callable[[torch.Tensor], None]:
    def hook(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        scores.add(index, weight, weight.grad)
        weight.grad = None

    return hook


def _score_product(scores: _Scores, index: int) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], None]:
    """Forward hook of a quantised linear: once the output's gradient is known, ``W * (dYᵀ X)``."""

    def forward_hook(module: nn.Module, inputs: tuple[Any, ...], out: torch.Tensor) -> None:
        if not torch.is_grad_enabled():  # the first pass of a checkpointed block
            return
        if not out.requires_grad:  # the first linear: nothing before it trains
            out.requires_grad_(True)
        x = inputs[0].detach()

        def backward_hook(d_out: torch.Tensor) -> None:
            d_out = d_out.detach().flatten(0, -2)
            grad = d_out.mT @ x.flatten(0, -2).to(d_out.dtype)
            scores.add(index, _dequantised(module), grad)

        out.register_hook(backward_hook)  # type: ignore[no-untyped-call]

    return forward_hook


def _default_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    if not isinstance(batch, Mapping):
        raise DataError(f"allocate_ranks: a batch is a {type(batch).__name__}; possible: a mapping, or give loss_fn")
    device = next(model.parameters()).device
    inputs = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
    loss = getattr(model(**inputs), "loss", None)
    if loss is None:
        raise DataError(f"allocate_ranks: no loss from a batch with {sorted(batch)}; add labels, or give loss_fn")
    return loss  # type: ignore[no-any-return]


def _backward(model: nn.Module, dataloader: Iterable[Any], n_steps: int, loss_fn: LossFn) -> torch.Tensor:
    """Runs the steps; the sum of their losses, not yet read by the host."""
    batches = iter(dataloader)
    missing = object()
    total = torch.zeros(())
    for step in range(n_steps):
        batch = next(batches, missing)
        if batch is missing:
            raise DataError(f"allocate_ranks: n_steps={n_steps}: the dataloader ended after {step} batches")
        loss = loss_fn(model, batch)
        if not loss.requires_grad:
            raise DataError("allocate_ranks: the loss does not depend on any target weight")
        loss.backward()  # type: ignore[no-untyped-call]
        total = loss.detach() + total.to(loss.device)
    return total


def _judge(importance: Mapping[str, float], loss: float) -> None:
    wrong = [path for path, value in importance.items() if not math.isfinite(value)]
    if wrong or not math.isfinite(loss):
        raise DataError(
            f"allocate_ranks: the losses sum to {loss!r}, and importance of {len(wrong)} of {len(importance)} modules "
            "is not finite; each batch needs a label to learn, and float16 may overflow"
        )
    dead = [path for path, value in importance.items() if value == 0]
    if len(dead) == len(importance):
        raise DataError("allocate_ranks: every gradient was zero or reached no target weight; check labels and loss")
    if dead:
        warnings.warn(
            f"allocate_ranks: {len(dead)} modules got no gradient and so min_rank, {dead[0]!r} first (experts that no "
            "token reached, or parts that the loss does not use): take more steps, or leave them out.",
            UserWarning,
            stacklevel=4,
        )


def _config(
    base: nn.Module,
    ranks: Mapping[str, int],
    scaling: float,
    lora_alpha: float | None,
    use_rslora: bool,
    options: Mapping[str, Any],
) -> LoraConfig:
    kept = {path: rank for path, rank in ranks.items() if rank}
    top = max(kept.values())

    def alpha(rank: int) -> float:
        value = scaling * (math.sqrt(rank) if use_rslora else rank) if lora_alpha is None else lora_alpha
        return int(value) if value == int(value) else value

    # PEFT matches (.*\.)?(key)$, so a bare path would also match a longer one that ends with it
    keys = {path: f"^{re.escape(path)}" for path in kept}
    config = LoraConfig(
        **{name: value for name, value in options.items() if name != "exclude_modules"},
        r=top,
        lora_alpha=alpha(top),
        target_modules=list(kept),
        rank_pattern={keys[path]: rank for path, rank in kept.items()},
        alpha_pattern={keys[path]: alpha(rank) for path, rank in kept.items()} if lora_alpha is None else {},
        use_rslora=use_rslora,
    )
    others = [path for path, _ in _linears(base) if path not in kept]
    caught = [p for p in others if check_target_module_exists(config, p)]
    if caught:  # target_modules match by suffix, exclude_modules as a whole
        config.exclude_modules = "|".join(map(re.escape, caught))
    return config
