"""Rows of an intent data set: read from JSON lines, cut to confusable classes, split; and what predictions score.

Legend: N rows, C classes, R resamples, S seeds.
"""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Split", "confusable", "group_files", "load", "macro", "paired_interval"]

Row = tuple[str, str]  # text, label


@dataclass(frozen=True)
class Split:
    """Class names; rows as (text, class): ``fit`` trains, ``dev`` chooses learning rates, ``test`` is the result."""

    classes: tuple[str, ...]
    fit: list[tuple[str, int]]
    dev: list[tuple[str, int]]
    test: list[tuple[str, int]]


def group_files(paths: Iterable[Path]) -> dict[str, tuple[Path, Path]]:
    """Name -> (training file, test file), from ``NAME_train.jsonl`` with ``NAME_test.jsonl`` or ``NAME_valid.jsonl``.

    Raises:
        ValueError: a file of another name, or half a pair.
    """
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in paths:
        name, _, part = path.stem.rpartition("_")
        if not name or part not in ("train", "test", "valid"):
            raise ValueError(f"--data {path}: possible names: NAME_train.jsonl, NAME_test.jsonl, NAME_valid.jsonl")
        found[name]["train" if part == "train" else "test"] = path
    if lonely := sorted(name for name, parts in found.items() if len(parts) < 2):
        raise ValueError(f"--data: {lonely[0]} needs both {lonely[0]}_train.jsonl and {lonely[0]}_test.jsonl")
    return {name: (parts["train"], parts["test"]) for name, parts in found.items()}


def read(path: Path) -> list[Row]:
    """Rows of a file of ``{"text": ..., "label": ...}`` lines, other keys ignored."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if not isinstance(row, dict) or not {"text", "label"} <= row.keys():
            raise ValueError(f"{path}:{number}: a row needs 'text' and 'label'; found {line[:80]!r}")
        rows.append((str(row["text"]), str(row["label"])))
    return rows


def fingerprint(path: Path) -> str:
    """SHA-256 of the file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def confusable(rows: Sequence[Row], num_classes: int) -> list[str]:
    """The classes that share their words: greedily grown from the most similar pair.

    Similarity of two classes: cosine of their tf-idf centroids over lower-case words, from these rows alone; each
    class added has the largest mean similarity to those chosen. Sorted by name.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for text, label in rows:
        counts[label].update(re.findall(r"[a-z']+", text.lower()))
    labels = sorted(counts)
    if num_classes >= len(labels):
        return labels
    words = {word: i for i, word in enumerate(sorted({w for count in counts.values() for w in count}))}
    table_CW = torch.zeros(len(labels), len(words), dtype=torch.float64)
    for c, label in enumerate(labels):
        for word, n in counts[label].items():
            table_CW[c, words[word]] = n
    rarity_W = (len(labels) / (table_CW > 0).sum(0)).log()
    centroids_CW = torch.nn.functional.normalize(table_CW / table_CW.sum(1, keepdim=True) * rarity_W, dim=1)
    alike_CC = (centroids_CW @ centroids_CW.T).fill_diagonal_(-1)
    chosen = list(divmod(int(alike_CC.argmax()), len(labels)))
    while len(chosen) < num_classes:
        mean_C = alike_CC[:, chosen].mean(1)
        mean_C[chosen] = -1
        chosen.append(int(mean_C.argmax()))
    return sorted(labels[c] for c in chosen)


def load(
    train: Path, test: Path, *, num_classes: int | None, fit_per_class: int | None, dev_per_class: int, seed: int = 0
) -> Split:
    """Split of one data set. ``fit`` and ``dev`` are disjoint rows of the training file, drawn once for all runs.

    Args:
        train: training file.
        test: test file; all its rows of the chosen classes.
        num_classes: confusable ones of all; None takes every class.
        fit_per_class: rows a class, all that ``dev`` leaves for None.
        dev_per_class: rows a class.
        seed: of the draw.
    """
    rows = read(train)
    classes = confusable(rows, num_classes or len(rows))
    by_class: dict[str, list[str]] = {label: [] for label in classes}
    for text, label in rows:
        if label in by_class:
            by_class[label].append(text)
    generator = random.Random(seed)
    fit, dev = [], []
    for c, label in enumerate(classes):
        texts = by_class[label]
        generator.shuffle(texts)
        held_out = min(dev_per_class, len(texts) // 4)
        end = None if fit_per_class is None else held_out + fit_per_class
        dev += [(text, c) for text in texts[:held_out]]
        fit += [(text, c) for text in texts[held_out:end]]
    index = {label: c for c, label in enumerate(classes)}
    return Split(tuple(classes), fit, dev, [(text, index[label]) for text, label in read(test) if label in index])


def macro(
    gold_N: torch.Tensor, predicted_N: torch.Tensor, num_classes: int, weights_RN: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Macro precision, recall and F1, each ``(R,)``, rows counted ``weights_RN`` times (once each for None).

    A class that is never predicted has precision 0, one without rows recall 0, as has F1 then.
    """
    gold_NC = torch.nn.functional.one_hot(gold_N, num_classes).double()
    predicted_NC = torch.nn.functional.one_hot(predicted_N, num_classes).double()
    weights_RN = torch.ones(1, len(gold_N), dtype=torch.float64) if weights_RN is None else weights_RN
    hits_RC = weights_RN @ (gold_NC * predicted_NC)
    precision_RC = hits_RC / (weights_RN @ predicted_NC).clamp_min(1)
    recall_RC = hits_RC / (weights_RN @ gold_NC).clamp_min(1)
    f1_RC = 2 * hits_RC / (weights_RN @ (gold_NC + predicted_NC)).clamp_min(1)
    return precision_RC.mean(1), recall_RC.mean(1), f1_RC.mean(1)


def paired_interval(
    gold_N: torch.Tensor,
    ours_SN: torch.Tensor,
    theirs_SN: torch.Tensor,
    num_classes: int,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of macro-F1(ours) - macro-F1(theirs), each the mean over seeds.

    Every resample draws the same test rows and the same seeds for both, with replacement: the interval covers which
    rows were tested and, as far as few seeds can tell, how training varies. Resampling S seeds shows (S - 1) / S of
    their variance, so their part is widened by the root of S / (S - 1). Source: Efron & Tibshirani 1993, chapter 13.
    """
    generator = torch.Generator().manual_seed(seed)
    n, seeds = len(gold_N), len(ours_SN)
    picks = torch.randint(n, (resamples, n), generator=generator)
    weights_RN = torch.zeros(resamples, n, dtype=torch.float64)
    weights_RN.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    ours, theirs = (
        torch.stack([macro(gold_N, predicted, num_classes, weights_RN)[2] for predicted in runs], 1)
        for runs in (ours_SN, theirs_SN)
    )
    chosen = torch.randint(seeds, (resamples, seeds), generator=generator)
    difference_RS = ours - theirs
    every_R = difference_RS.mean(1)
    widened = (seeds / max(seeds - 1, 1)) ** 0.5
    differences = every_R + widened * (difference_RS.gather(1, chosen).mean(1) - every_R)
    low, high = differences.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
