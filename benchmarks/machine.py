"""What a figure was measured on, and the two ceilings it is compared with."""

import importlib
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT

__all__ = [
    "describe",
    "device_name",
    "matmul_flops_per_s",
    "peak_resident_bytes",
    "seconds_per_call",
    "steady_threads",
    "synchronize",
]

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "liger_kernel",
    "unsloth",
)


def device_name() -> str:
    """``"cuda"`` where there is one, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return getattr(importlib.import_module(package), "__version__", "?") if _found(package) else None


def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def describe() -> dict[str, Any]:
    """Device, threads, versions and the commit of this checkout."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_model(),
        "device_type": device_name(),
        "device_memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
    }


def steady_threads() -> None:
    """Without a GPU, one thread: on a busy machine small work waits a time slice for the other threads to arrive."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_resident_bytes() -> int:
    """Peak resident memory of this process; not ``ru_maxrss``, which a child inherits through fork."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def seconds_per_call(run: Callable[[], Any], *, budget_s: float = 0.3, repeats: int = 5) -> float:
    """Median over ``repeats`` of the mean time of a call, device events on a GPU; about ``budget_s`` in all."""
    run()
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    calls = max(1, min(1000, int(budget_s / repeats / max(time.perf_counter() - started, 1e-7))))
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / calls)
        else:
            started = time.perf_counter()
            for _ in range(calls):
                run()
            times.append((time.perf_counter() - started) / calls)
    return sorted(times)[repeats // 2]


def matmul_flops_per_s(device: str, dtype: torch.dtype, size: int | None = None) -> float:
    """Measured rate of a large square product: the ceiling for model FLOP/s."""
    n = size or (8192 if device == "cuda" else 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / seconds_per_call(lambda: torch.mm(a, b, out=out))
