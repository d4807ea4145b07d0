"""Fine-tuning methods side by side on intent classification: scores, parameters, memory and time, on real rows.

    python -m benchmarks.nlu --data DIR/banking77_train.jsonl DIR/banking77_test.jsonl [--model minilm|smollm2]
    python -m benchmarks.nlu --full --data DIR/{banking77,clinc150,snips}_*.jsonl

Without ``--full``: the ten classes of each data set that share the most words, 40 training rows a class, 5 seeds;
about 20 minutes on two idle cores with MiniLM. Each method first tries its learning rates on held-out training rows
(one seed; the grid grows where its best lies on an edge), then trains with every seed and is tested once each. The
classification head, drawn anew each run, has one learning rate for all methods; "head only" sweeps it. One process a
method; results are written after every run, and the same command goes on where it was cut off. The data is yours:
rows of ``text`` and ``label``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT, machine, nlu_data
from benchmarks.nlu_methods import METHODS, MODELS
from benchmarks.nlu_worker import MARK

__all__ = ["main", "run", "settings_of", "summarise", "table"]

REFERENCE = "lora-r8"
# What is asked of a run that is cut off comes first; the table keeps the order of METHODS.
ORDER = (
    *(REFERENCE, "sora-r5", "adaptive", "adaptive-r7", "lora-r5", "sora", "adalora"),
    *("full", "head", "dora", "qlora", "prefix", "bottleneck"),
)
COLUMNS = (
    "method",
    "lr",
    "macro precision",
    "recall",
    "F1 ± sd",
    "F1 - LoRA r=8 [95 %]",
    "trained → kept",
    "of LoRA r=8",
    "head",
    "weights MB",
    "peak MB",
    "CPU s/step",
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A target: ``method`` loses at most ``margin`` macro-F1 to ``against`` and keeps ``share`` of its parameters."""

    text: str
    method: str
    against: str
    margin: float
    share: float


CLAIMS = (
    Claim("SoRA r=8 to 5 within 0.005 of LoRA r=8, <= 70 % of its parameters", "sora-r5", REFERENCE, 0.005, 0.7),
    Claim("SoRA r=8 to 5 at least at LoRA r=5, no more parameters", "sora-r5", "lora-r5", 0, 1),
    Claim("AdaLoRA r=12 to 8 (ours) at least at LoRA r=8, no more parameters", "adaptive", REFERENCE, 0, 1),
    Claim("AdaLoRA r=12 to 7 (ours) at least at LoRA r=8, no more parameters", "adaptive-r7", REFERENCE, 0, 1),
)


def settings_of(full: bool, model: str) -> dict[str, Any]:
    """Everything that a result depends on besides data and method."""
    return {
        "model": model,
        "head_rate": MODELS[model].head_rate,
        "steps": 1000 if full else 75,
        "batch": 16,
        "max_length": 64 if full else 32,
        "extensions": 4,
        "seeds": [1, 2, 3, 4, 5],
        "split": {
            "num_classes": None if full else 10,
            "fit_per_class": None if full else 40,
            "dev_per_class": 20,
        },
    }


def run(
    settings: dict[str, Any],
    files: dict[str, tuple[Path, Path]],
    out: Path,
    *,
    methods: Sequence[str] = tuple(METHODS),
    jobs: int = 2,
    command: str = "",
    restart: bool = False,
    limit_s: float = float("inf"),
) -> dict[str, Any]:
    """Run what ``out`` does not hold yet and keep it up to date after every run.

    Args:
        settings: of `settings_of`.
        files: data set -> (training file, test file).
        out: JSON file.
        methods: keys of ``METHODS``.
        jobs: methods at a time, one process with one thread each.
        command: for the record.
        restart: forget what ``out`` holds.
        limit_s: end processes that still run after this long; what they finished stays.

    Raises:
        ValueError: ``out`` holds results of other settings or files, and ``restart`` is False.
    """
    asked = {
        "settings": settings,
        "data": {name: {part.name: nlu_data.fingerprint(part) for part in pair} for name, pair in files.items()},
    }
    result = {
        "kind": "nlu",
        "command": command,
        "machine": {**machine.describe(), "threads": 1},
        "later_commits": [],
        "complete": False,
        **asked,
        "rates": {name: METHODS[name].rates for name in methods},
        "rows": {},
        "gold": {},
        "runs": {name: {} for name in files},
        "summary": {},
    }
    if out.exists() and not restart:
        held = json.loads(out.read_text())
        if any(held.get(key) != value for key, value in json.loads(json.dumps(asked)).items()):
            raise ValueError(
                f"{out} holds results of other settings or data; --restart replaces them, --out leaves them"
            )
        commit = result["machine"]["commit"]
        if commit not in (held["machine"]["commit"], *held["later_commits"]):
            held["later_commits"].append(commit)
        result = {**result, **held, "complete": False, "rates": {**held["rates"], **result["rates"]}}
    for name, pair in files.items():
        split = nlu_data.load(*pair, **settings["split"])
        result["gold"][name] = " ".join(str(c) for _, c in split.test)
        result["rows"][name] = {
            "classes": list(split.classes),
            **{part: len(getattr(split, part)) for part in ("fit", "dev", "test")},
        }
    out.parent.mkdir(parents=True, exist_ok=True)
    lock, deadline = threading.Lock(), time.perf_counter() + limit_s

    def keep(dataset: str, method: str, record: Record) -> None:
        with lock:
            held = result["runs"][dataset].setdefault(method, [])
            held[:] = [r for r in held if r["phase"] not in ("skipped", "failed")] + [record]
            _replace(out, result)
            print(f"{dataset} {_line(method, record)}", flush=True)

    def one(job: tuple[str, str]) -> None:
        dataset, method = job
        done = [r for r in result["runs"][dataset].get(method, []) if r["phase"] in ("sweep", "test")]
        if {r["seed"] for r in done if r["phase"] == "test"} >= set(settings["seeds"]):
            return
        request = {"settings": settings, "method": method, "done": done}
        request["files"] = [str(path.resolve()) for path in files[dataset]]
        failure = _process(request, lambda record: keep(dataset, method, record), deadline)
        if failure:
            keep(dataset, method, {"phase": "failed", "reason": failure})
        with lock:
            result["summary"][dataset] = summarise(result, dataset)
            _replace(out, result)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [(dataset, method) for dataset in files for method in sorted(methods, key=ORDER.index)]))
    finished = [
        sum(r["phase"] == "test" for r in result["runs"][dataset].get(method, [])) == len(settings["seeds"])
        or any(r["phase"] == "skipped" for r in result["runs"][dataset].get(method, []))
        for dataset in files
        for method in methods
    ]
    result["complete"] = all(finished)
    _replace(out, result)
    return result


def _process(request: dict[str, Any], keep: Any, deadline: float) -> str | None:
    """One worker; its results go to ``keep`` as they come. Why it failed, or None."""
    left = deadline - time.perf_counter()
    if left <= 0:
        return "not started: time is up"
    with tempfile.TemporaryDirectory() as folder:
        asked, said = Path(folder, "request.json"), Path(folder, "stderr")
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", "benchmarks.nlu_worker", str(asked)]
        threads = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with (
            said.open("w") as stderr,
            subprocess.Popen(
                command, cwd=ROOT, env={**threads, **os.environ}, stdout=subprocess.PIPE, stderr=stderr, text=True
            ) as process,
        ):
            timer = threading.Timer(min(left, threading.TIMEOUT_MAX), process.kill)
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    keep(json.loads(line.removeprefix(MARK)))
            code = process.wait()
            timer.cancel()
        if code == 0:
            return None
        if time.perf_counter() >= deadline:
            return "cut off: time is up"
        return f"exit {code}: {said.read_text().strip()[-400:]}"


def _replace(path: Path, result: dict[str, Any]) -> None:
    """Never half a file, whenever the process is cut off."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)


def _line(method: str, record: Record) -> str:
    if "reason" in record:
        return f"{method:12} {record['phase']}: {record['reason']}"
    return (
        f"{method:12} {record['phase']:5} lr {record['rate']:<8g} seed {record['seed']} macro-F1 {record['f1']:.3f} "
        f"{record['cpu_s_per_step']:.3f} s/step"
    )


def _classes(text: str) -> torch.Tensor:
    return torch.tensor([int(c) for c in text.split()])


def _tests(result: dict[str, Any], dataset: str, method: str) -> dict[int, Record]:
    """Seed -> test."""
    return {r["seed"]: r for r in result["runs"][dataset].get(method, []) if r["phase"] == "test"}


def difference(result: dict[str, Any], dataset: str, method: str, against: str) -> Record | None:
    """Mean macro-F1 of ``method`` - that of ``against`` over the seeds both have, with its interval; None for none."""
    ours, theirs = (_tests(result, dataset, m) for m in (method, against))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    ours_SN, theirs_SN = (
        torch.stack([_classes(tests[seed]["predicted"]) for seed in seeds]) for tests in (ours, theirs)
    )
    gold, num_classes = _classes(result["gold"][dataset]), len(result["rows"][dataset]["classes"])
    return {
        "seeds": seeds,
        "difference": statistics.mean(ours[seed]["f1"] - theirs[seed]["f1"] for seed in seeds),
        "interval": nlu_data.paired_interval(gold, ours_SN, theirs_SN, num_classes),
    }


def summarise(result: dict[str, Any], dataset: str) -> dict[str, Any]:
    """Figures of each method: means and spreads over seeds, the difference to LoRA r=8 with its interval, costs."""
    rows = {}
    for method in result["runs"][dataset]:
        tests = _tests(result, dataset, method)
        if not tests:
            continue
        every = [r for r in result["runs"][dataset][method] if "rate" in r]
        row: dict[str, Any] = {"seeds": sorted(tests), "rate": next(iter(tests.values()))["rate"]}
        for score in ("precision", "recall", "f1"):
            values = [r[score] for r in tests.values()]
            row[score] = statistics.mean(values)
            row[f"{score}_sd"] = statistics.stdev(values) if len(values) > 1 else None
        for cost in ("cpu_s_per_step", "wall_s_per_step", "trainable_after"):
            row[cost] = statistics.median(r[cost] for r in tests.values())
        row |= {key: every[0][key] for key in ("head", "trainable", "footprint_bytes")}
        row["peak_bytes"] = max((r["peak_bytes"] for r in every if "peak_bytes" in r), default=None)
        swept = {r["rate"]: r["f1"] for r in every if r["phase"] == "sweep"}
        row["sweep"] = {f"{rate:g}": swept[rate] for rate in sorted(swept)}
        row["rate_on_edge"] = row["rate"] in (min(swept), max(swept)) if swept else None
        if method != REFERENCE and (found := difference(result, dataset, method, REFERENCE)):
            row |= {key: found[key] for key in ("difference", "interval")}
        rows[method] = row
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown: a block a data set, how the figures came about, and what they do and do not show."""
    settings = result["settings"]
    lines: list[str] = []
    for dataset, rows in result["summary"].items():
        size = result["rows"][dataset]
        lines += [
            (
                f"\n**{dataset}, {settings['model']}**: {len(size['classes'])} intents, {size['fit']} training rows, "
                f"{settings['steps']} steps of {settings['batch']}, {size['test']} test rows, "
                f"{len(settings['seeds'])} seeds\n"
            ),
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
        ]
        for method in METHODS:
            runs = result["runs"][dataset].get(method, [])
            if method in rows:
                lines.append(_row(METHODS[method].title, rows[method], rows.get(REFERENCE), len(settings["seeds"])))
            elif stopped := next((r for r in runs if "reason" in r), None):
                reason = " ".join(stopped["reason"].split()).replace("|", "/")
                lines.append(
                    f"| {METHODS[method].title} | {stopped['phase']}: {reason[:160]} |{' |' * (len(COLUMNS) - 2)}"
                )
        claims = [f"- {_verdict(result, dataset, claim)}" for claim in CLAIMS if claim.method in rows]
        lines += ["", *claims, "", *_words(rows, size, settings)]
    return "\n".join(lines)


def _row(title: str, row: dict[str, Any], reference: dict[str, Any] | None, num_seeds: int) -> str:
    spread = "" if row["f1_sd"] is None else f" ± {row['f1_sd']:.3f}"
    fewer = "" if len(row["seeds"]) == num_seeds else f" ({len(row['seeds'])} seeds)"
    versus = ""
    if "difference" in row:
        versus = f"{row['difference']:+.3f} [{row['interval'][0]:+.3f}, {row['interval'][1]:+.3f}]"
    pruned = "" if row["trainable_after"] == row["trainable"] else f" → {row['trainable_after']:,.0f}"
    share = "" if reference is None else f"{row['trainable_after'] / reference['trainable_after']:.0%}"
    edge = " (edge)" if row["rate_on_edge"] else ""
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
    return (
        f"| {title} | {row['rate']:g}{edge} | {row['precision']:.3f} | {row['recall']:.3f} "
        f"| {row['f1']:.3f}{spread}{fewer} | {versus} | {row['trainable']:,}{pruned} | {share} | {row['head']:,} "
        f"| {row['footprint_bytes'] / 1e6:.0f} | {peak} | {row['cpu_s_per_step']:.3f} |"
    )


def _verdict(result: dict[str, Any], dataset: str, claim: Claim) -> str:
    """One target: what was found, and whether mean, interval and parameters meet it."""
    found = difference(result, dataset, claim.method, claim.against)
    if found is None or found["seeds"] != sorted(result["settings"]["seeds"]):
        return f"{claim.text}: no verdict, seeds are missing."
    rows = result["summary"][dataset]
    share = rows[claim.method]["trainable_after"] / rows[claim.against]["trainable_after"]
    mean, (low, high) = found["difference"], found["interval"]
    if low >= -claim.margin:
        score = "met"
    elif high < -claim.margin:
        score = "missed"
    else:
        score = f"{'met' if mean >= -claim.margin else 'missed'} by the mean, not resolved by the interval"
    kept = f"{share:.1%} of the parameters, {'met' if share <= claim.share else f'{claim.share:.0%} missed'}"
    return f"{claim.text}: F1 {mean:+.3f} [{low:+.3f}, {high:+.3f}], {score}; {kept}."


def _words(rows: dict[str, Any], size: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What the intervals resolve, and where the learning rates come from."""
    above, below, unclear, early = [], [], [], []
    for method, row in rows.items():
        if "interval" in row:
            low, high = row["interval"]
            whole = len(row["seeds"]) == len(rows[REFERENCE]["seeds"]) == len(settings["seeds"])
            verdict = (above if low > 0 else below if high < 0 else unclear) if whole else early
            verdict.append(METHODS[method].title)
    found = [("resolved above", above), ("resolved below", below), ("not resolved (the interval holds 0)", unclear)]
    found += [("no verdict (seeds are missing)", early)] if early else []
    parts = [f"{what}: {', '.join(names) or 'none'}" for what, names in found]
    sweeps = "; ".join(
        f"{METHODS[method].title} " + ", ".join(f"{rate}: {f1:.3f}" for rate, f1 in row["sweep"].items())
        for method, row in rows.items()
    )
    return [
        f"Against LoRA r=8: {'; '.join(parts)}.",
        "",
        (
            f"Learning rates: AdamW, linear with 10 % warm-up; the head at {settings['head_rate']:g} in every row but "
            f"head only; all else swept: macro-F1 on {size['dev']} held-out training rows, one seed, best taken, "
            f"lowest on a tie (edge: the best of what was tried lies on its edge). {sweeps}."
        ),
        "",
        (
            "Trained and kept parameters are those of the body or adapter; the head, the same in all rows, stands "
            "beside. Peak: resident memory of the method's fresh process, libraries included. Intervals: paired "
            "bootstrap over test rows and seeds."
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nlu", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="NAME_train.jsonl, NAME_test.jsonl, ...")
    parser.add_argument("--model", choices=[*MODELS], default="minilm")
    parser.add_argument("--full", action="store_true", help="all classes and rows, 1000 steps, 5 seeds")
    parser.add_argument("--only", help=f"comma-separated methods of {','.join(METHODS)}")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON")
    parser.add_argument("--restart", action="store_true", help="forget what the JSON holds")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which processes are ended")
    options = parser.parse_args(arguments)
    methods = options.only.split(",") if options.only else list(METHODS)
    if unknown := set(methods) - set(METHODS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; possible: {', '.join(METHODS)}")
    if missing := [path for path in options.data if not path.is_file()]:
        parser.error(f"--data: no file {missing[0]}")
    size = "full" if options.full else "quick"
    names = " ".join(f"DIR/{path.name}" for path in options.data)
    flags = f"{' --full' if options.full else ''} --model {options.model}"
    try:
        files = nlu_data.group_files(options.data)
        out = options.out / f"nlu-{size}-{options.model}.json"
        result = run(
            settings_of(options.full, options.model),
            files,
            out,
            methods=methods,
            jobs=options.jobs,
            command=f"python -m benchmarks.nlu{flags} --data {names}",
            restart=options.restart,
            limit_s=options.limit,
        )
    except ValueError as error:
        parser.error(str(error))
    print(table(result))
    print(f"\n{result['machine']['device']}; raw results: {out}")


if __name__ == "__main__":
    main()
