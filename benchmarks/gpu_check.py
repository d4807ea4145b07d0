"""Everything that needs a GPU, in one command: tests of the compiled kernels, rates, operators, the core suite.

    python -m benchmarks.gpu_check OUT_FOLDER [--only tests,rates] [--limit 1500]

Runs from a plain checkout with a Python that has torch, Triton, transformers, PEFT and accelerate; nothing is
installed or downloaded. What is missing is skipped by name. Each part has its own time limit and leaves its log and
JSON in OUT_FOLDER as it goes; the table of parts comes last. Without a GPU the parts run at toy size, as a rehearsal.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ROOT

__all__ = ["PARTS", "Part", "main", "run_part"]

REQUIRED = ("torch", "triton", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        command: arguments after ``python -m``; ``{out}`` is the folder.
        limit_s: seconds until it is stopped.
        needs: modules without which it is skipped.
        gpu_only: skipped in a rehearsal.
        toy: arguments instead of ``command`` in a rehearsal.
    """

    command: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()
    gpu_only: bool = False
    toy: tuple[str, ...] | None = None


# the plugin makes hf_fastpeft.patches importable from the checkout, inside pytest too; another environment's
# deprecations are not what is checked
PYTEST = ("pytest", "-p", "benchmarks", "-p", "no:cacheprovider", "-q", "--tb=short", "-W", "default")
STEP = ("benchmarks.step", "--out", "{out}", "--suite")
PARTS = {
    # operators and blocks choose their device themselves: on a GPU these compile the kernels the CPU interprets
    "kernels": Part((*PYTEST, "tests/ops", "tests/benchmarks/test_launch_ops.py"), 300, ("pytest", "hypothesis")),
    "gpu-tests": Part((*PYTEST, "-m", "gpu", "tests"), 300, ("pytest", "hypothesis", "trl"), gpu_only=True),
    "rates": Part(("benchmarks.rates", "--json", "{out}/rates.json"), 180),
    "ops": Part(("benchmarks.ops", "--json", "{out}/ops.json"), 180),
    "core": Part((*STEP, "core", "--limit", "560"), 900, toy=(*STEP, "toy")),
}


def run_part(name: str, part: Part, out: Path, *, gpu: bool, limit_s: float) -> dict[str, Any]:
    """Run one part with its log in ``out``; never raises for what the part does."""
    missing = [module for module in part.needs if importlib.util.find_spec(module) is None]
    if missing:
        return {"part": name, "status": "skipped", "detail": f"not installed: {', '.join(missing)}", "seconds": 0.0}
    if part.gpu_only and not gpu:
        return {"part": name, "status": "skipped", "detail": "needs a GPU", "seconds": 0.0}
    if limit_s <= 0:
        return {"part": name, "status": "skipped", "detail": "time is up", "seconds": 0.0}
    arguments = part.toy if part.toy and not gpu else part.command
    command = [sys.executable, "-m", *(argument.format(out=out) for argument in arguments)]
    environment = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    log, started = out / f"{name}.log", time.perf_counter()
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(min(part.limit_s, limit_s))
            status = "passed" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and the worker it started, which holds the GPU
            process.wait()
            status = "timed out"
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    detail = lines[-1][:100] if lines else ""
    return {"part": name, "status": status, "detail": detail, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for logs and JSON")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--limit", type=float, default=1700.0, help="seconds for all parts together")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; possible: {', '.join(PARTS)}")
    missing = [module for module in REQUIRED if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(f"gpu_check needs {', '.join(missing)}; put wheels on PYTHONPATH or use another Python")
    from benchmarks import machine

    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    where = machine.describe()
    gpu = where["device_type"] == "cuda"
    print(f"{where['device']}; {where['versions']}" + ("" if gpu else "; no GPU: toy sizes, a rehearsal"), flush=True)
    found: list[dict[str, Any]] = []
    started = time.perf_counter()
    for name in chosen:
        print(f"{name} ...", flush=True)
        left = options.limit - (time.perf_counter() - started)
        found.append(run_part(name, PARTS[name], out, gpu=gpu, limit_s=left))
        (out / "gpu_check.json").write_text(
            json.dumps({"kind": "gpu-check", "machine": where, "parts": found}, indent=1) + "\n"
        )
    print(f"\n{'part':12} {'status':18} {'s':>6}  last line")
    for row in found:
        print(f"{row['part']:12} {row['status']:18} {row['seconds']:6.0f}  {row['detail']}")
    raise SystemExit(any(row["status"].startswith(("failed", "timed out")) for row in found))


if __name__ == "__main__":
    main()
