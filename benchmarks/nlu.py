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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import ROOT, machine, nlu_data
from benchmarks.nlu_methods import METHODS, MODELS
from benchmarks.nlu_table import REFERENCE, Record, summarise, table
from benchmarks.nlu_worker import MARK

__all__ = ["main", "run", "settings_of"]

# What is asked of a run that is cut off comes first; the table keeps the order of METHODS.
ORDER = (
    *(REFERENCE, "sora-r5", "adaptive", "adaptive-r7", "lora-r5", "sora", "sora-slow", "adalora"),
    *("full", "head", "dora", "qlora", "prefix", "bottleneck"),
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
