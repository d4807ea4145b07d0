"""``verify``: does the patched model compute what stock computes, on the user's own batch?

One forward-backward through the fused blocks and one through the stock modules of the same model, from the same random
state; loss and every gradient are compared. Both differ from the exact result by rounding, in half precision so much
that a third run in float32 of a copy of the model measures stock's own error, and the fused path must stay within a
factor of it. In float32 a copy in float64 does so where the direct comparison is not enough: stock's log-softmax over
logits of 30 is off by 1e-5 in one direction, which the fused head is not.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_fastpeft.fast_module import FastModule
from hf_fastpeft.patching import patch_model, refuse_others, restore, stock_forwards

__all__ = ["Comparison", "Verification", "verify"]

# relative difference of two float32 (float64) runs whose additions are ordered differently, over a 30-layer model
DIRECT_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
FACTOR = 2.0  # of stock's own rounding error, in half precision
GROUP_MINIMUM = 4096  # gradients smaller than this are compared per kind, not one by one: their error is luck


@dataclass(frozen=True)
class Comparison:
    """One compared quantity.

    Attributes:
        name: ``loss``, or a parameter's name.
        error: relative difference of fused from stock, or from the float32 reference where there is one.
        bound: largest error accepted.
    """

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """False for NaN as well."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Verification:
    """Result of :func:`verify`; ``str()`` is a table."""

    comparisons: tuple[Comparison, ...]
    fused_calls: int
    stock_reasons: dict[str, int]
    reference: str

    @property
    def passed(self) -> bool:
        """Every comparison passed and at least one block ran fused."""
        return self.fused_calls > 0 and all(c.passed for c in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        worst = sorted(self.comparisons[1:], key=lambda c: c.error / c.bound if c.passed else float("inf"))[::-1]
        rows = [*self.comparisons[:1], *worst[:8]]
        width = max(len(c.name) for c in rows)
        lines = [f"{'quantity':<{width}}  {'rel. error':>10}  {'bound':>8}"]
        lines += [
            f"{c.name:<{width}}  {c.error:>10.2e}  {c.bound:>8.1e}  {'ok' if c.passed else 'FAIL'}" for c in rows
        ]
        if len(worst) > 8:
            failed = sum(not c.passed for c in self.comparisons)
            lines.append(f"... {len(self.comparisons)} quantities compared, {failed} failed; the worst are shown")
        lines += [f"ran stock: {why} ({n} calls)" for why, n in self.stock_reasons.items()]
        if not self.fused_calls:
            lines.append("nothing ran fused: there is nothing to verify")
        verdict = "passed" if self.passed else "FAILED"
        lines.append(f"verify {verdict}: {self.fused_calls} fused block calls against {self.reference}")
        return "\n".join(lines)


def _step(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Loss and gradients by name, on the CPU in float64; the model's own ``.grad`` are left as they were."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)  # the same dropout masks in every run
        loss = model(**batch).loss
        if loss is None:
            raise ValueError("verify: the model returned no loss; the batch needs labels")
        grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    found = {name: g.detach().double().cpu() for (name, _), g in zip(named, grads, strict=True) if g is not None}
    return {"loss": loss.detach().double().cpu().reshape(1), **found}


def _group(name: str, size: int) -> str:
    """Small gradients are pooled by their last two name parts, over all layers."""
    return name if size >= GROUP_MINIMUM or name == "loss" else "*." + ".".join(name.split(".")[-3:])


def _errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative error a group; infinite where one side has a gradient that the other lacks."""
    difference: dict[str, torch.Tensor] = {}
    size: dict[str, torch.Tensor] = {}
    for name in sorted(got.keys() | want.keys()):
        if name not in got or name not in want:
            difference[name], size[name] = torch.tensor(float("inf")), torch.tensor(1.0)
            continue
        group = _group(name, want[name].numel())
        difference[group] = difference.get(group, torch.zeros(())) + (got[name] - want[name]).square().sum()
        size[group] = size.get(group, torch.zeros(())) + want[name].square().sum()
    return {g: (difference[g].sqrt() / size[g].sqrt().clamp_min(1e-30)).item() for g in difference}


def _is_packed(p: torch.Tensor) -> bool:
    """4-bit weights, whose dtype (bitsandbytes' ``quant_storage``) says nothing about the arithmetic."""
    return hasattr(p, "quant_state")


def _causal_lm_loss_in_float64(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """``ForCausalLMLoss`` without its rounding."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    total = nn.functional.cross_entropy(
        logits.double().view(-1, vocab_size), shift_labels.flatten(), ignore_index=ignore_index, reduction="sum"
    )
    return total / ((shift_labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


def _exact_step(model: nn.Module, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """:func:`_step` of a copy that computes in ``dtype``, with the same packed weights."""
    exact = copy.deepcopy(model)
    for module in exact.modules():
        if hasattr(module, "compute_dtype"):  # of bitsandbytes' Linear4bit
            module.compute_dtype = dtype  # type: ignore[assignment]  # no tensor
        if dtype == torch.float64 and getattr(module, "loss_function", None) is ForCausalLMLoss:
            module.loss_function = _causal_lm_loss_in_float64  # type: ignore[assignment]  # stock's rounds to float32
    for t in [*exact.parameters(), *exact.buffers()]:
        if t.is_floating_point() and not _is_packed(t):
            t.data = t.data.to(dtype)
    floats = {k: v.to(dtype) for k, v in batch.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return _step(exact, {**batch, **floats})


def verify(model: nn.Module, batch: Mapping[str, Any]) -> Verification:
    """Compare the patched model with stock on one batch: loss and every gradient.

    Neither parameters nor ``.grad`` change. A model that is not patched is patched for the comparison and restored.
    Runs in the model's current mode (``train()`` or ``eval()``) with gradients on, from one random state, so dropout
    draws the same masks. In half precision a float32 copy of the model is needed, and in float32 a float64 copy where
    the two differ by more than rounding usually gives: twice its memory again.

    Args:
        model: a transformers model or PeftModel with something to train.
        batch: what the model's forward takes, with ``labels``; tensors on the model's device.

    Returns:
        A :class:`Verification`: ``.passed``, ``.to_json()``, and a table as ``str()``.

    Raises:
        TypeError: not a model, or the batch is no mapping.
        ValueError: no trainable parameter, or no finite loss from this batch.
        FastPeftError: the model cannot be patched; see :func:`hf_fastpeft.patch_model`.
    """
    refuse_others("verify", model)
    if not isinstance(batch, Mapping):
        raise TypeError(f"verify: batch is a {type(batch).__name__}; a mapping is needed, with input_ids and labels")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("verify: the model has no trainable parameter; add an adapter or unfreeze something")
    patched_here = not any(isinstance(m, FastModule) for m in model.modules())
    if patched_here:
        patch_model(model)
    try:
        fast_modules = [m for m in model.modules() if isinstance(m, FastModule)]
        before = [(sum(m._fastpeft.fused.values()), dict(m._fastpeft.stock)) for m in fast_modules]
        got = _step(model, batch)
        fused_calls, reasons = 0, dict[str, int]()
        for module, (fused, stock) in zip(fast_modules, before, strict=True):
            fused_calls += sum(module._fastpeft.fused.values()) - fused
            for (block, why), n in module._fastpeft.stock.items():
                calls = n - stock.get((block, why), 0)
                if calls:
                    reasons[f"{block}: {why}"] = reasons.get(f"{block}: {why}", 0) + calls
        with stock_forwards(fast_modules):
            want = _step(model, batch)
            if not torch.isfinite(want["loss"]).all():
                raise ValueError(
                    f"verify: stock's own loss is {want['loss'].item()}; the batch needs a label to learn"
                )
            dtypes = {p.dtype for p in model.parameters() if not _is_packed(p)}
            device = next(model.parameters()).device.type
            half = bool(dtypes & {torch.float16, torch.bfloat16}) or torch.is_autocast_enabled(device)
            if not half:
                tolerance = DIRECT_TOLERANCE[torch.float32 if torch.float32 in dtypes else torch.float64]
                compared = [Comparison(n, e, tolerance) for n, e in _errors(got, want).items()]
                reference = "stock"
                if torch.float32 in dtypes and not all(c.passed for c in compared):
                    exact = _exact_step(model, batch, torch.float64)
                    own, stocks = _errors(got, exact), _errors(want, exact)
                    compared = [Comparison(n, e, max(FACTOR * stocks.get(n, 0.0), tolerance)) for n, e in own.items()]
                    reference = f"{FACTOR:g} times stock's own error or {tolerance:g}, both against float64"
            else:
                with torch.autocast(device, enabled=False):
                    exact = _exact_step(model, batch, torch.float32)
                own, stocks = _errors(got, exact), _errors(want, exact)
                # the loss is one number, whose rounding error can be zero by luck: bounded by the dtype's own step
                floor = torch.finfo(torch.bfloat16 if torch.bfloat16 in dtypes else torch.float16).eps
                compared = [
                    Comparison(n, e, FACTOR * stocks.get(n, 0.0) + (floor if n == "loss" else floor / 8))
                    for n, e in own.items()
                ]
                reference = f"{FACTOR:g} times stock's own error, both against float32"
    finally:
        if patched_here:
            restore(model)
    compared.sort(key=lambda c: c.name != "loss")
    return Verification(tuple(compared), fused_calls, reasons, reference)
