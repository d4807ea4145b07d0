"""The gate before the clock: a variant whose loss or adapter gradients are wrong is not timed.

Two layers of the setting's model at full width (a small vocabulary), without dropout, one forward-backward each of
the variant and of stock. In half precision both differ from the exact result by rounding; a float32 run of the same
weights measures stock's own error, and the variant must stay within twice of it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import ROOT
from benchmarks.machine import device_name
from benchmarks.models import SHAPES, Shape, token_batch
from benchmarks.suites import Setting
from benchmarks.variants import Prepared, prepare

__all__ = ["Reference", "Verdict", "autocast", "check", "reference", "reference_elsewhere"]

# relative difference of two float32 runs whose additions are ordered differently (float32 sums on a GPU: no TF32)
FLOAT32_TOLERANCE = 1e-3
FACTOR = 2.0  # of stock's own rounding error, in half precision
TOKENS = 128  # longest row of the gate's batch
VOCAB = 1024


@dataclass(frozen=True)
class Verdict:
    """Result of the gate.

    Attributes:
        passed: every quantity within its bound.
        worst: the quantity closest to (or furthest over) its bound.
        error: its relative error.
        bound: the largest that is accepted.
    """

    passed: bool
    worst: str
    error: float
    bound: float


def autocast(setting: Setting, device: str) -> Any:
    """Mixed precision as Trainer sets it up: bfloat16 autocast over a half-precision base, none over float32."""
    half = setting.dtype != "float32"
    return torch.autocast(device, dtype=getattr(torch, setting.dtype) if half else torch.bfloat16, enabled=half)


def _gradients(
    prepared: Prepared, batch: dict[str, torch.Tensor], context: Callable[[], Any]
) -> dict[str, torch.Tensor]:
    """Loss and gradients pooled over layers and by kind (``q_proj.lora_A``), float64 on the CPU."""
    model: nn.Module = prepared.model
    with context():
        loss = prepared.loss(model, batch)
    loss.backward()
    pooled: dict[str, list[torch.Tensor]] = {"loss": [loss.detach().double().cpu().reshape(1)]}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            kind = ".".join(part for part in name.split(".")[-5:] if part not in ("weight", "default", "mlp"))
            kind = kind.removeprefix("self_attn.")
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            pooled.setdefault(kind, []).append(gradient.double().cpu().flatten())
    return {kind: torch.cat(parts) for kind, parts in pooled.items()}


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item() if got.shape == want.shape else float("inf")


@dataclass(frozen=True)
class Reference:
    """What is right, and how far from it a variant may be; by kind of gradient."""

    want: dict[str, torch.Tensor]
    bounds: dict[str, float]


def _case(setting: Setting) -> tuple[Shape, Setting]:
    shape = replace(SHAPES[setting.model], vocab=min(VOCAB, SHAPES[setting.model].vocab))
    return shape, replace(
        setting, layers=2, dropout=0.0, batch=min(setting.batch, 2), seq_len=min(setting.seq_len, TOKENS)
    )


def _run(variant: str, setting: Setting, device: str, *, exact: bool = False) -> dict[str, torch.Tensor]:
    shape, small = _case(setting)
    batch = token_batch(
        shape.vocab, small.batch, small.seq_len, masked=small.masked, sampled=small.sampled, device=device
    )
    prepared = prepare(variant, shape, small, device)
    if not exact:
        return _gradients(prepared, batch, lambda: autocast(small, device))
    prepared.model.float()  # the same weights, rounded ones
    for module in prepared.model.modules():
        if hasattr(module, "compute_dtype"):  # 4-bit layers
            module.compute_dtype = torch.float32
    return _gradients(prepared, batch, nullcontext)


def reference(setting: Setting, device: str) -> Reference:
    """Stock's loss and gradients; in half precision those of float32, with stock's own error as the measure."""
    want = _run("stock", setting, device)
    if setting.dtype == "float32":
        return Reference(want, dict.fromkeys(want, FLOAT32_TOLERANCE))
    exact = _run("stock", setting, device, exact=True)
    floor = torch.finfo(getattr(torch, setting.dtype)).eps
    bounds = {
        kind: FACTOR * _relative(want[kind], exact[kind]) + (floor if kind == "loss" else floor / 8) for kind in want
    }
    return Reference(exact, bounds)


def reference_elsewhere(setting: Setting) -> Reference:
    """:func:`reference` from a process of its own, for a variant whose import already changes stock."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reference.pt"
        command = [sys.executable, "-m", "benchmarks.gate", json.dumps(asdict(setting)), str(path)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return Reference(**torch.load(path, weights_only=True))


def check(variant: str, setting: Setting, device: str) -> Verdict:
    """Compare two layers of ``variant`` with stock; frees what it made."""
    # stock comes first: some peers patch globals when they are applied, one when it is imported
    right = reference_elsewhere(setting) if "unsloth" in variant else reference(setting, device)
    want, bounds = right.want, right.bounds
    got = _run(variant, setting, device)
    errors = {kind: _relative(got[kind], want[kind]) if kind in got else float("inf") for kind in want}
    worst = max(errors, key=lambda kind: errors[kind] / bounds[kind] if errors[kind] == errors[kind] else float("inf"))
    passed = got.keys() == want.keys() and all(errors[kind] <= bounds[kind] for kind in want)
    return Verdict(passed, worst, errors[worst], bounds[worst])


if __name__ == "__main__":
    torch.save(asdict(reference(Setting(**json.loads(sys.argv[1])), device_name())), sys.argv[2])
