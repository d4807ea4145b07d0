"""Whole training steps, side by side: ours, stock and peers at the same settings.

    python -m benchmarks.step --suite core|full|methods|qwen-batches|cpu|toy|self-check [--out benchmarks/results]
    python -m benchmarks.step --suite core --only ours,compile --model llama-3-8b

Every (variant, setting) runs in a process of its own, in the order A B C ... A'; a setting whose first variant differs
from itself by more than the drift allowed is marked, and its figures are no result. Each process checks loss and
adapter gradients before it times anything (:mod:`benchmarks.gate`). The JSON is rewritten after every run, so a suite
that is cut off keeps what it finished.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import ROOT, machine
from benchmarks.suites import SUITES, Setting, Suite
from benchmarks.variants import VARIANTS

__all__ = ["drift_of", "main", "run_suite", "summary", "table"]

DRIFT = {"cuda": 0.03, "cpu": 0.15}  # a shared CPU is never as quiet


def _run(variant: str, setting: Setting, suite: Suite) -> dict[str, Any]:
    """One process; what it says, or how it ended."""
    request = {"variant": variant, "setting": asdict(setting), "steps": suite.steps, "warmup": suite.warmup}
    request["threads"] = suite.threads
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        asked, said = Path(folder, f"request-{variant}.json"), Path(folder, f"result-{variant}.json")
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", "benchmarks.worker", str(asked), str(said)]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={"HF_HUB_OFFLINE": "1", **os.environ},
                capture_output=True,
                text=True,
                timeout=suite.limit_s,
                check=False,
            )
            if said.exists():
                result = json.loads(said.read_text())
            else:
                result = {"status": "failed", "reason": f"exit {done.returncode}: {done.stderr.strip()[-500:]}"}
        except subprocess.TimeoutExpired:
            result = {"status": "timed out", "reason": f"over {suite.limit_s:g} s"}
    return {"variant": variant, "setting": asdict(setting), "wall_s": time.perf_counter() - started, **result}


def drift_of(runs: Iterable[dict[str, Any]]) -> float | None:
    """Relative difference of the two runs of the first variant, None unless both were timed."""
    by_repeat = {run["repeat"]: run["median_ms"] for run in runs if run["status"] == "timed" and run["ends"]}
    if set(by_repeat) != {False, True}:
        return None
    return float(abs(by_repeat[True] - by_repeat[False]) / by_repeat[False])


def run_suite(
    suite: Suite, out: Path, *, name: str, variants: tuple[str, ...] | None = None, limit_s: float = float("inf")
) -> dict[str, Any]:
    """Run all of ``suite`` and keep ``out`` up to date after every process.

    Args:
        suite: settings and variants.
        out: JSON file, replaced.
        name: of the suite, for the record.
        variants: instead of the suite's.
        limit_s: start no process after this long.
    """
    chosen = variants or suite.variants
    device = machine.describe()
    device["threads"] = suite.threads or device["threads"]
    result: dict[str, Any] = {
        "kind": "step",
        "suite": name,
        "command": f"python -m benchmarks.step --suite {name}",
        "machine": device,
        "drift_allowed": DRIFT[device["device_type"]],
        "complete": False,
        "runs": [],
    }
    started = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    for setting in suite.settings:
        print(f"\n{setting.name}", flush=True)
        mine: list[dict[str, Any]] = []
        for i, variant in enumerate((*chosen, chosen[0])):
            repeat = i == len(chosen)
            if repeat and mine[0]["status"] != "timed":
                continue
            if time.perf_counter() - started > limit_s:
                run = {"variant": variant, "setting": asdict(setting), "status": "not started", "reason": "time is up"}
            else:
                run = _run(variant, setting, suite)
            run |= {"setting_name": setting.name, "ends": variant == chosen[0], "repeat": repeat}
            mine.append(run)
            result["runs"].append(run)
            drift = drift_of(mine)
            if drift is not None:
                for other in mine:
                    other["drift"], other["discarded"] = drift, drift > result["drift_allowed"]
            _replace(out, result)
            print(f"  {summary(run)}", flush=True)
    result["complete"] = all(run["status"] != "not started" for run in result["runs"])
    _replace(out, result)
    return result


def _replace(path: Path, result: dict[str, Any]) -> None:
    """Never half a file, whenever the process is cut off."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)


def summary(run: dict[str, Any]) -> str:
    """One line for people."""
    label = run["variant"] + (" again" if run.get("repeat") else "")
    if run["status"] != "timed":
        return f"{label:24} {run['status']}: {run['reason']}"
    memory = run.get("peak_allocated_bytes", run.get("peak_resident_bytes", 0))
    return (
        f"{label:24} {run['median_ms']:9.1f} ms  {run['tokens_per_s']:9.0f} tokens/s  {memory / 1e9:6.2f} GB  "
        f"spread {run['spread']:.1%}  {run['fraction_of_matmul_peak']:.0%} of matmul peak"
    )


def table(result: dict[str, Any]) -> str:
    """Markdown: one block a setting, times relative to its first variant."""
    lines: list[str] = []
    for setting in dict.fromkeys(run["setting_name"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["setting_name"] == setting]
        first = next((run["median_ms"] for run in runs if run["status"] == "timed" and run["ends"]), None)
        drift = drift_of(runs)
        note = "no repeat: no result" if drift is None else f"drift {drift:.1%}"
        if drift is not None and drift > result["drift_allowed"]:
            note += f", over {result['drift_allowed']:.0%}: no result"
        lines += [
            f"\n**{setting}** ({note})\n",
            "| variant | ms/step | speed, first = 1 | spread | tokens/s | TFLOP/s | peak GB | launches |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for run in runs:
            if run.get("repeat"):
                continue
            if run["status"] != "timed":
                lines.append(f"| {run['variant']} | {run['status']}: {run['reason']} | | | | | | |")
                continue
            memory = run.get("peak_allocated_bytes", run.get("peak_resident_bytes", 0))
            ratio = f"{first / run['median_ms']:.2f}" if first else ""
            lines.append(
                f"| {run['variant']} | {run['median_ms']:.1f} | {ratio} | {run['spread']:.1%} "
                f"| {run['tokens_per_s']:.0f} | {run['model_tflops_per_s']:.3g} | {memory / 1e9:.2f} "
                f"| {run.get('launches', '')} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=[*SUITES], default="core")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON")
    parser.add_argument("--only", help="comma-separated variants instead of the suite's")
    parser.add_argument("--model", help="only the settings of this model")
    parser.add_argument("--steps", type=int, help="timed steps instead of the suite's")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing is started")
    options = parser.parse_args()
    suite = SUITES[options.suite]
    settings = tuple(s for s in suite.settings if options.model in (None, s.model))
    variants = tuple(options.only.split(",")) if options.only else None
    if unknown := set(variants or ()) - set(VARIANTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; possible: {', '.join(VARIANTS)}")
    suite = replace(suite, settings=settings, steps=options.steps or suite.steps)
    out = options.out / f"step-{options.suite}-{machine.device_name()}.json"
    result = run_suite(suite, out, name=options.suite, variants=variants, limit_s=options.limit)
    print(table(result))
    print(f"\n{result['machine']['device']}; raw results: {out}")


if __name__ == "__main__":
    main()
