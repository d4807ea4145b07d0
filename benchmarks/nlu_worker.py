"""All runs of one method on one data set in a process of its own, so that its peak memory is its own.

    python -m benchmarks.nlu_worker REQUEST.json

Started by :mod:`benchmarks.nlu`; prints one ``RESULT {json}`` line a finished run, or one with ``skipped``.
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from benchmarks import machine, nlu_data
from benchmarks.nlu_methods import METHODS, MODELS, Method, Skipped, head_parameters, kept_parameters, load_from

__all__ = ["MARK", "main", "next_rate", "runs"]

MARK = "RESULT "
SWEEP_SEED = 0
Record = dict[str, Any]


class StepClock(TrainerCallback):
    """Processor and wall seconds of every step."""

    def __init__(self) -> None:
        self.cpu_s: list[float] = []
        self.wall_s: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cpu_s.append(time.process_time() - self._started[0])
        self.wall_s.append(time.perf_counter() - self._started[1])


class HeadRateTrainer(Trainer):
    """Trainer whose classification head, drawn anew each run, has a learning rate of its own.

    A pretrained body and a fresh head want rates that differ by orders of magnitude; with one for both, methods are
    ranked by how high a rate they survive.
    """

    def __init__(self, *args: Any, head_rate: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head_rate = head_rate

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the head taken out of its groups into groups at ``head_rate``."""
        optimizer = super().create_optimizer(model)
        head = {id(p) for p in head_parameters(self.model)}
        for group in list(optimizer.param_groups):
            of_head = [p for p in group["params"] if id(p) in head]
            group["params"] = [p for p in group["params"] if id(p) not in head]
            optimizer.add_param_group({**group, "params": of_head, "lr": self.head_rate})
        return optimizer


def encode(tokenizer: PreTrainedTokenizerBase, rows: list[tuple[str, int]], max_length: int) -> list[dict[str, Any]]:
    """Rows as the collator takes them."""
    encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)
    keys = ("input_ids", "attention_mask")
    return [{**{k: encoded[k][i] for k in keys}, "labels": label} for i, (_, label) in enumerate(rows)]


def train(
    method: Method,
    load: Callable[..., torch.nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    *,
    rate: float,
    seed: int,
) -> tuple[torch.nn.Module, Record]:
    """One training run from fresh weights: the model, and its costs.

    ``rate`` is swept: the body's for a method with a body to train, whose head has ``settings["head_rate"]``.
    """
    set_seed(seed)
    prepared = method.build(load, settings["steps"])
    model, clock = prepared.model, StepClock()
    head = sum(p.numel() for p in head_parameters(model))
    before = sum(p.numel() for p in model.parameters() if p.requires_grad) - head
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings["steps"],
            per_device_train_batch_size=settings["batch"],
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, settings["steps"] // 10),
            weight_decay=0.01,
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = HeadRateTrainer(
            head_rate=settings["head_rate"] if before else rate,
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[*prepared.callbacks, clock],
        )
        loss = trainer.train().training_loss
    timed = slice(min(2, settings["steps"] - 1), None)
    return model, {
        "rate": rate,
        "seed": seed,
        "training_loss": loss,
        "head": head,
        "trainable": before,
        "trainable_after": kept_parameters(model) - head,
        "footprint_bytes": model.get_memory_footprint(),
        "cpu_s_per_step": median(clock.cpu_s[timed]),
        "wall_s_per_step": median(clock.wall_s[timed]),
        "peak_bytes": (
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else machine.peak_resident_bytes()
        ),
    }


@torch.no_grad()
def predict(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], batch: int
) -> torch.Tensor:
    """Class of each row, ``(N,)``; sorted by length inside, so that little is padded."""
    model.eval()
    collate = DataCollatorWithPadding(tokenizer)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    predicted = torch.zeros(len(rows), dtype=torch.int64)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        inputs = collate([rows[i] for i in part])
        inputs.pop("labels")
        predicted[part] = model(**inputs.to(device)).logits.argmax(-1).cpu()
    return predicted


def next_rate(tried: dict[float, float], grid: list[float], extensions: int) -> float | None:
    """Learning rate to try next: the grid, then beyond it while its best lies on an edge; None when done.

    Args:
        tried: learning rate -> macro-F1 on held-out training rows.
        grid: learning rates that are always tried.
        extensions: most rates beyond the grid.
    """
    if missing := [rate for rate in grid if rate not in tried]:
        return missing[0]
    best = best_rate(tried)
    if len(tried) < len(grid) + extensions and best in (min(tried), max(tried)):
        beyond = best / 3 if best == min(tried) else best * 3
        return float(f"{beyond:.2g}")
    return None


def best_rate(tried: dict[float, float]) -> float:
    """The rate with the highest macro-F1; the lowest such rate on a tie."""
    return min(tried, key=lambda rate: (-tried[rate], rate))


def runs(request: dict[str, Any]) -> Iterator[Record]:
    """Learning rates first, then the seeds at the best one; what ``request["done"]`` holds is not run again."""
    settings, method = request["settings"], METHODS[request["method"]]
    folder = Path(settings["model_folder"]) if settings.get("model_folder") else MODELS[settings["model"]].folder()
    data = nlu_data.load(*map(Path, request["files"]), **settings["split"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    load = load_from(folder, len(data.classes))
    fit, dev, test = (encode(tokenizer, rows, settings["max_length"]) for rows in (data.fit, data.dev, data.test))
    fresh = True

    def run(phase: str, rate: float, seed: int, rows: list[dict[str, Any]], gold: list[int]) -> Record:
        nonlocal fresh
        model, record = train(method, load, tokenizer, fit, settings, rate=rate, seed=seed)
        if not fresh:  # the process' peak is a run's own only in the first
            del record["peak_bytes"]
        fresh = False
        predicted = predict(model, tokenizer, rows, 4 * settings["batch"])
        scores = (value.item() for value in nlu_data.macro(torch.tensor(gold), predicted, len(data.classes)))
        record |= {"phase": phase, **dict(zip(("precision", "recall", "f1"), scores, strict=True))}
        if phase == "test":
            record["predicted"] = " ".join(map(str, predicted.tolist()))
        return record

    tried = {r["rate"]: r["f1"] for r in request["done"] if r["phase"] == "sweep"}
    factor = 1.0 if settings["model"] not in MODELS else MODELS[settings["model"]].rate_factor
    grid = [float(f"{rate * factor:.2g}") for rate in method.rates]
    while (rate := next_rate(tried, grid, settings["extensions"])) is not None:
        record = run("sweep", rate, SWEEP_SEED, dev, [c for _, c in data.dev])
        tried[rate] = record["f1"]
        yield record
    seeds = {r["seed"] for r in request["done"] if r["phase"] == "test"}
    for seed in settings["seeds"]:
        if seed not in seeds:
            yield run("test", best_rate(tried), seed, test, [c for _, c in data.test])


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    machine.steady_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        for record in runs(request):
            print(f"{MARK}{json.dumps(record)}", flush=True)
    except Skipped as reason:
        print(f"{MARK}{json.dumps({'phase': 'skipped', 'reason': str(reason)})}", flush=True)


if __name__ == "__main__":
    main()
