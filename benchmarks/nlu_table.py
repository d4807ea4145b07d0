"""Figures, verdicts and Markdown of what :mod:`benchmarks.nlu` has recorded. Legend: N rows, S seeds."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import nlu_data
from benchmarks.nlu_methods import METHODS

__all__ = ["CLAIMS", "REFERENCE", "Claim", "Record", "difference", "summarise", "table", "verdict"]

Record = dict[str, Any]

REFERENCE = "lora-r8"
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


@dataclass(frozen=True)
class Claim:
    """A target: ``method`` loses at most ``margin`` macro-F1 to ``against`` and keeps ``share`` of its parameters."""

    method: str
    against: str
    margin: float
    share: float

    def __str__(self) -> str:
        ours, theirs = METHODS[self.method].title, METHODS[self.against].title
        loss = f"within {self.margin:g} of" if self.margin else "at least at"
        return f"{ours} {loss} {theirs} with {self.share:.0%} of its parameters or less"


CLAIMS = (
    Claim("sora-r5", REFERENCE, 0.005, 0.7),
    Claim("sora-slow", REFERENCE, 0.005, 0.7),
    Claim("sora-r5", "lora-r5", 0, 1),
    Claim("sora-slow", "lora-r5", 0, 1),
    Claim("adaptive", REFERENCE, 0, 1),
    Claim("adaptive-r7", REFERENCE, 0, 1),
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
        claims = [f"- {verdict(result, dataset, claim)}" for claim in CLAIMS if claim.method in rows]
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


def verdict(result: dict[str, Any], dataset: str, claim: Claim) -> str:
    """One target: what was found, and whether mean, interval and parameters meet it."""
    found = difference(result, dataset, claim.method, claim.against)
    if found is None or found["seeds"] != sorted(result["settings"]["seeds"]):
        return f"{claim}: no verdict, seeds are missing."
    rows = result["summary"][dataset]
    share = rows[claim.method]["trainable_after"] / rows[claim.against]["trainable_after"]
    mean, (low, high) = found["difference"], found["interval"]
    if low >= -claim.margin:
        score = "met"
    elif high < -claim.margin:
        score = "missed"
    else:
        score = f"{'met' if mean >= -claim.margin else 'missed'} by the mean, not resolved by the interval"
    kept = "met" if share <= claim.share else "missed"
    return f"{claim}: F1 {mean:+.3f} [{low:+.3f}, {high:+.3f}], {score}; {share:.1%} of the parameters, {kept}."


def _words(rows: dict[str, Any], size: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What the intervals resolve, and where the learning rates come from."""
    above, below, unclear, early = [], [], [], []
    for method, row in rows.items():
        if "interval" in row:
            low, high = row["interval"]
            whole = len(row["seeds"]) == len(rows[REFERENCE]["seeds"]) == len(settings["seeds"])
            group = (above if low > 0 else below if high < 0 else unclear) if whole else early
            group.append(METHODS[method].title)
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
