"""One measurement in a process of its own: gate, then timed training steps of one variant at one setting.

    python -m benchmarks.worker REQUEST.json RESULT.json

Started by :mod:`benchmarks.step`. The result has a ``status``: ``timed``, ``refused`` (the gate found a wrong loss or
gradient), ``skipped`` (cannot run here) or ``out of memory``, with the reason.
"""

import gc
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

if "unsloth" in Path(sys.argv[-1]).name and importlib.util.find_spec("unsloth") is not None:
    import unsloth  # noqa: F401  # must come before transformers

import torch
from torch import nn

from benchmarks import gate, machine
from benchmarks.models import SHAPES, token_batch
from benchmarks.suites import Setting
from benchmarks.trace import LaunchCounter
from benchmarks.variants import Prepared, Skipped, prepare

__all__ = ["measure", "model_flops"]


def model_flops(setting: Setting, rows: list[int]) -> float:
    """Useful FLOPs of one step with a frozen base: products with weights twice, causal attention three times.

    ``4 N`` a token for forward and gradient of the input, ``6 S^2 q`` a row and layer for attention, ``4 d V`` a token
    for the head; recomputation, padding and the adapter are nobody's achievement and do not count.
    """
    shape = SHAPES[setting.model]
    layers = setting.layers or shape.layers
    tokens = sum(rows)
    attention = 6 * sum(n * n for n in rows) * shape.heads * shape.head_dim
    return 4 * tokens * (layers * shape.params() + shape.hidden * shape.vocab) + layers * attention


class Trainee:
    """A prepared variant with its optimizer and batch; :meth:`step` is one training step."""

    def __init__(self, prepared: Prepared, setting: Setting, device: str) -> None:
        self.prepared, self.setting, self.device = prepared, setting, device
        self.batch = token_batch(
            SHAPES[setting.model].vocab,
            setting.batch,
            setting.seq_len,
            masked=setting.masked,
            sampled=setting.sampled,
            device=device,
        )
        self.trained = [p for p in prepared.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=device == "cuda")

    def step(self) -> torch.Tensor:
        """Forward, backward, clipping, optimizer."""
        with gate.autocast(self.setting, self.device):
            loss = self.prepared.loss(self.prepared.model, self.batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _timed(trainee: Trainee, steps: int) -> list[float]:
    """Milliseconds of each step: device events on a GPU, the clock elsewhere."""
    if trainee.device == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            trainee.step()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        trainee.step()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def _launches(trainee: Trainee) -> dict[str, Any]:
    """Kernels of one step as the profiler saw them; without a GPU, operators that would launch one."""
    if trainee.device == "cuda":
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            trainee.step()
            torch.cuda.synchronize()
        kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())
        return {"launches": kernels, "launches_by": "profiler"}
    with LaunchCounter() as counter:
        trainee.step()
    return {"launches": counter.phases["forward"].launches, "launches_by": "dispatch"}


def _memory(device: str) -> dict[str, int]:
    if device == "cuda":
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return {"peak_resident_bytes": machine.peak_resident_bytes()}


def measure(variant: str, setting: Setting, *, steps: int, warmup: int) -> dict[str, Any]:
    """Gate and timing of one variant; see the file's head for the statuses."""
    device = machine.device_name()
    torch.backends.cuda.matmul.allow_tf32 = False
    verdict = gate.check(variant, setting, device)
    result: dict[str, Any] = {"gate": asdict(verdict)}
    if not verdict.passed:
        reason = f"{verdict.worst}: relative error {verdict.error:.2e}, bound {verdict.bound:.1e}"
        return result | {"status": "refused", "reason": reason}
    # what the gate compiled and cached is for other shapes
    if "compile" in variant:
        torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainee = Trainee(prepare(variant, SHAPES[setting.model], setting, device), setting, device)
    for _ in range(warmup):
        loss = trainee.step()
    times = _timed(trainee, steps)
    memory = _memory(device)
    launches = {} if "compile" in variant and device == "cpu" else _launches(trainee)
    rows = trainee.batch["attention_mask"].sum(1).tolist()
    flops, median_s = model_flops(setting, rows), statistics.median(times) / 1e3
    dtype = getattr(torch, setting.dtype)
    report, loss_value = trainee.prepared.report(), loss.item()
    del trainee
    gc.collect()
    peak = machine.matmul_flops_per_s(device, dtype)
    return result | {
        "status": "timed",
        "step_ms": times,
        "median_ms": median_s * 1e3,
        "spread": (max(times) - min(times)) / (median_s * 1e3),
        "loss": loss_value,
        "tokens": sum(rows),
        "tokens_per_s": sum(rows) / median_s,
        "model_tflops_per_s": flops / median_s / 1e12,
        "matmul_tflops_per_s": peak / 1e12,
        "fraction_of_matmul_peak": flops / median_s / peak,
        **memory,
        **launches,
        "report": report,
    }


def main() -> None:
    request_path, result_path = Path(sys.argv[1]), Path(sys.argv[2])
    request = json.loads(request_path.read_text())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    try:
        setting = Setting(**request["setting"])
        result = measure(request["variant"], setting, steps=request["steps"], warmup=request["warmup"])
    except Skipped as why:
        result = {"status": "skipped", "reason": str(why)}
    except torch.OutOfMemoryError as why:
        result = {"status": "out of memory", "reason": str(why).partition("\n")[0]}
    result_path.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
