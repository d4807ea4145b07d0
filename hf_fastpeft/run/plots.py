"""Pictures of a run, drawn without a display: the loss curve, and where pruning left rank."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_loss", "plot_ranks", "rank_grid"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.(.+)$")
_BLUE, _ORANGE, _GREY = "#2563a8", "#d1661b", "#8a8f98"
# Up to this many cells the kept rank is also written into each.
_MAX_WRITTEN_CELLS = 300


def plot_loss(history: Sequence[Mapping[str, Any]], path: Path, *, title: str, before: float | None = None) -> None:
    """Training loss by step, its moving average, and the validation losses.

    Args:
        history: Trainer's log: entries with ``step`` and ``loss`` or ``eval_loss``.
        path: PNG to write.
        title: what was trained.
        before: validation loss of the untrained model, drawn at step 0.
    """
    steps = [entry["step"] for entry in history if "loss" in entry]
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    scored = {int(entry["step"]): float(entry["eval_loss"]) for entry in history if "eval_loss" in entry}
    if before is not None:
        scored[0] = before
    figure, axes = _figure(1, (8.0, 4.6))
    (axis,) = axes
    axis.plot(steps, losses, color=_GREY, linewidth=1, alpha=0.7, label="training, each step")
    if len(losses) > 5:
        axis.plot(steps, _smooth(losses), color=_BLUE, linewidth=2, label="training, moving average")
    if scored:
        x = sorted(scored)
        axis.plot(x, [scored[s] for s in x], color=_ORANGE, marker="o", linewidth=1.5, label="validation")
        for step in {x[0], x[-1]}:
            axis.annotate(
                f"{scored[step]:.2f}",
                (step, scored[step]),
                xytext=(0, 8),
                textcoords="offset points",
                color=_ORANGE,
                ha="left" if step == x[0] else "right",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
                zorder=5,
            )
    axis.set(xlabel="optimizer step", ylabel="cross-entropy (nats per learned token)", title=f"Loss: {title}")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_ranks(
    kept: Mapping[str, tuple[int, int]],
    history: Sequence[tuple[int, Mapping[str, int]]],
    path: Path,
    *,
    title: str,
) -> None:
    """Kept rank of every module as layers by projections, and the total over the run.

    Args:
        kept: module -> (ranks kept, ranks at the start).
        history: (step, module -> ranks kept) over the run; may be empty.
        path: PNG to write.
        title: what was trained.
    """
    layers, projections, grid = rank_grid({name: now for name, (now, _) in kept.items()})
    top = max(start for _, start in kept.values())
    height = max(4.0, 1.6 + 0.24 * len(layers))
    figure, axes = _figure(2, (5.0 + 0.75 * len(projections), height), widths=(0.75 * len(projections), 3.6))
    left, right = axes
    image = left.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=top)
    left.set_xticks(range(len(projections)), projections, rotation=35, ha="right")
    left.set_yticks(range(len(layers)), layers)
    left.tick_params(axis="y", labelsize=8)
    left.set(ylabel="layer", title=f"Ranks kept per module (start: {top})")
    if len(layers) * len(projections) <= _MAX_WRITTEN_CELLS:
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if value == value:  # not NaN: the module has an adapter
                    ink = "black" if value > 0.6 * top else "white"
                    left.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=left, label="rank", shrink=min(1.0, 5 / height))
    total = sum(start for _, start in kept.values())
    points = [(step, sum(ranks.values())) for step, ranks in history]
    right.plot([s for s, _ in points], [v for _, v in points], color=_BLUE, linewidth=2)
    right.axhline(total, color=_GREY, linestyle="--", linewidth=1)
    right.annotate(
        f"start: {total}",
        (0.02, total),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        color=_GREY,
        fontsize=9,
    )
    now = sum(value for value, _ in kept.values())
    right.set(xlabel="optimizer step", ylabel="ranks over all modules", title=f"Kept in total: {now} of {total}")
    right.set_ylim(0, total * 1.08)
    right.grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def rank_grid(kept: Mapping[str, int]) -> tuple[list[str], list[str], list[list[float]]]:
    """Layers, projections and their kept ranks as a table; NaN where a layer lacks a projection.

    Modules outside a numbered layer share one last row, under their own full names.
    """
    cells: dict[tuple[int, str], int] = {}
    for name, value in kept.items():
        match = _LAYER.search(name)
        layer, projection = (int(match[1]), match[2].rpartition(".")[2]) if match else (-1, name)
        cells[layer, projection] = value
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer < 0, layer))
    projections = list(dict.fromkeys(projection for _, projection in cells))
    grid = [[float(cells.get((layer, name), float("nan"))) for name in projections] for layer in layers]
    return [str(layer) if layer >= 0 else "other" for layer in layers], projections, grid


def _figure(
    columns: int, size: tuple[float, float], *, widths: Sequence[float] | None = None
) -> tuple[Any, list[Any]]:
    # Figure without pyplot: no global state, no display, nothing to close.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False, width_ratios=widths)
    return figure, list(axes[0])


def _smooth(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """Exponential moving average, corrected for its start at zero (Adam's correction)."""
    smoothed, total = [], 0.0
    for step, value in enumerate(values, start=1):
        total = weight * total + (1 - weight) * value
        smoothed.append(total / (1 - weight**step))
    return smoothed
