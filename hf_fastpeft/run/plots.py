"""Pictures of a run, drawn without a display: the loss curve, and where pruning left rank."""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_fastpeft.errors import MissingPackageError

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
    figure = _empty((8.0, 4.6))
    axis = figure.subplots()
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
    ranks: nn.Module | Mapping[str, tuple[int, int]],
    history: Sequence[tuple[int, Mapping[str, int]]] | Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str = "",
    adapter_name: str = "default",
) -> None:
    """Draw what an adaptive-rank method left: kept rank by layer and projection, and how the ranks went over the run.

    Args:
        ranks: model with a SoRA, adaptive LoRA or AdaLoRA adapter; or module -> (ranks kept, ranks at the start).
        history: ``history`` of ``SoraCallback`` or ``AdaLoraCallback`` for all panels; ``trainer.state.log_history``
            for the total only; empty for the last ranks alone.
        path: PNG to write.
        title: what was trained.
        adapter_name: the adapter of a model.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: the model has no such adapter.
    """
    kept = _ranks_of(ranks, adapter_name) if isinstance(ranks, nn.Module) else ranks
    layers, projections, grid = rank_grid({name: now for name, (now, _) in kept.items()})
    top = max(start for _, start in kept.values())
    total = sum(start for _, start in kept.values())
    now = sum(value for value, _ in kept.values())
    by_module = _by_module(history, adapter_name)
    totals = {step: sum(values.values()) for step, values in by_module.items()} or _totals(history, len(kept))

    width, height = 0.62 * len(projections) + 2.2, max(4.2, 1.8 + 0.24 * len(layers))
    panels: list[list[str]] = [["modules"], ["modules"]]
    widths = [width]
    if len(by_module) > 1:
        panels = [["modules", "layers", "total"], ["modules", "layers", "projections"]]
        widths += [3.6, 4.4]
    elif totals:
        panels = [[*row, "total"] for row in panels]
        widths += [4.4]
    figure = _empty((sum(widths), height))
    axes = figure.subplot_mosaic(panels, width_ratios=widths)
    colours = {"cmap": "viridis", "vmin": 0, "vmax": top}
    image = axes["modules"].imshow(grid, aspect="auto", **colours)
    _label_modules(axes["modules"], layers, projections, grid, top)
    beside = [axes[name] for name in ("modules", "layers") if name in axes]
    figure.colorbar(image, ax=beside, label="rank", aspect=40).locator = _whole()
    if "layers" in axes:
        _draw_layers(axes["layers"], layers, by_module, colours)
        _draw_projections(axes["projections"], by_module, top)
    if "total" in axes:
        _draw_total(axes["total"], totals, now, total)
    for name in set(axes) - {"modules"}:
        axes[name].xaxis.set_major_locator(_whole())
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _label_modules(axis: Any, layers: list[str], projections: list[str], grid: list[list[float]], top: int) -> None:
    axis.set_facecolor("#e8e8e8")  # a layer without that projection
    axis.set_xticks(range(len(projections)), projections, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(layers)), layers)
    axis.tick_params(axis="y", labelsize=8)
    axis.set(ylabel="layer", title=f"Ranks left per module (of {top})")
    if len(layers) * len(projections) > _MAX_WRITTEN_CELLS:
        return
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if value == value:  # not NaN: the module has an adapter
                ink = "black" if value > 0.6 * top else "white"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink)


def _draw_total(axis: Any, totals: Mapping[int, int], now: int, total: int) -> None:
    axis.plot(list(totals), list(totals.values()), color=_BLUE, linewidth=2)
    axis.axhline(total, color=_GREY, linestyle="--", linewidth=1)
    axis.annotate(
        f"all: {total}",
        (0.98, total),
        xycoords=("axes fraction", "data"),
        xytext=(0, -4),
        textcoords="offset points",
        color=_GREY,
        fontsize=9,
        ha="right",
        va="top",
    )
    axis.set(xlabel="optimizer step", ylabel="ranks", title=f"In total: {now} of {total} left")
    axis.set_ylim(0, total * 1.05)
    axis.grid(alpha=0.25)


def _draw_layers(axis: Any, layers: list[str], by_module: Mapping[int, Mapping[str, int]], colours: Any) -> None:
    """Mean rank of each layer by step; a value holds until the next step that was logged."""
    columns = [[_mean(row) for row in rank_grid(values)[2]] for values in by_module.values()]
    steps = list(by_module)
    edges = [*steps, 2 * steps[-1] - steps[-2]]
    rows = list(zip(*columns, strict=True))
    axis.pcolormesh(edges, [i - 0.5 for i in range(len(layers) + 1)], rows, **colours)
    axis.set_ylim(len(layers) - 0.5, -0.5)
    axis.set_yticks(range(len(layers)), layers)
    axis.tick_params(axis="y", labelsize=8)
    axis.set(xlabel="optimizer step", title="Mean rank of each layer, by step")


def _draw_projections(axis: Any, by_module: Mapping[int, Mapping[str, int]], top: int) -> None:
    """Mean rank of each kind of projection by step."""
    lines: dict[str, list[float]] = {}
    for values in by_module.values():
        _, names, grid = rank_grid(values)
        for name, column in zip(names, zip(*grid, strict=True), strict=True):
            lines.setdefault(name, []).append(_mean(column))
    for i, (name, means) in enumerate(lines.items()):
        style = ("-", "--")[i // 10 % 2]  # there are ten colours
        axis.plot(list(by_module), means, label=name, linewidth=1.6, color=f"C{i % 10}", linestyle=style)
    axis.set(xlabel="optimizer step", ylabel="rank", title="Mean rank of each projection")
    axis.set_ylim(0, top * 1.05)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _mean(values: Sequence[float]) -> float:
    """Of those that are not NaN."""
    found = [value for value in values if value == value]
    return sum(found) / len(found)


def _ranks_of(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, int]]:
    from peft.tuners.adalora import AdaLoraLayer

    from hf_fastpeft.tuners._gated import kept_ranks

    found = kept_ranks(model, adapter_name)
    for name, layer in model.named_modules():
        if isinstance(layer, AdaLoraLayer) and adapter_name in layer.lora_E:
            gate = layer.lora_E[adapter_name].detach()
            found[name] = (int(gate.count_nonzero()), gate.numel())
    if not found:
        raise ValueError(
            f"plot_ranks: adapter {adapter_name!r}: found no layer of {type(model).__name__} whose ranks adapt; "
            "possible: SoRA, adaptive LoRA or AdaLoRA adapters, or module -> (ranks kept, ranks at the start)"
        )
    return found


def _by_module(history: Sequence[Any], adapter_name: str) -> dict[int, dict[str, int]]:
    """Step -> module -> rank, of a callback's history; empty for a trainer's log."""
    prefix = f"{adapter_name}/"  # where several adapters trained
    return {
        step: {
            path.removeprefix(prefix): n for path, n in values.items() if "/" not in path or path.startswith(prefix)
        }
        for step, values in (entry for entry in history if not isinstance(entry, Mapping))
    }


def _totals(log_history: Sequence[Any], num_modules: int) -> dict[int, int]:
    """Step -> ranks over all modules, from the mean that the callbacks log."""
    return {
        int(entry["step"]): round(float(entry[key]) * num_modules)
        for entry in log_history
        for key in ("sora/kept_rank", "adalora/kept_rank")
        if key in entry
    }


def rank_grid(kept: Mapping[str, int]) -> tuple[list[str], list[str], list[list[float]]]:
    """Layers, projections and their kept ranks as a table; NaN where a layer lacks a projection.

    Modules outside a numbered layer share one last row, under their own full names.
    """
    cells: dict[tuple[int, str], int] = {}
    for path, value in kept.items():
        name = path.removeprefix("base_model.model.")
        match = _LAYER.search(name)
        layer, projection = (int(match[1]), match[2].rpartition(".")[2]) if match else (-1, name)
        cells[layer, projection] = value
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer < 0, layer))
    projections = list(dict.fromkeys(projection for _, projection in cells))
    grid = [[float(cells.get((layer, name), float("nan"))) for name in projections] for layer in layers]
    return [str(layer) if layer >= 0 else "other" for layer in layers], projections, grid


def _empty(size: tuple[float, float]) -> Any:
    # Figure without pyplot: no global state, no display, nothing to close.
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("pictures need matplotlib, which is not installed; run `pip install matplotlib`")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _whole() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)  # there is no step 1.5 and no rank 2.5


def _smooth(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """Exponential moving average, corrected for its start at zero (Adam's correction)."""
    smoothed, total = [], 0.0
    for step, value in enumerate(values, start=1):
        total = weight * total + (1 - weight) * value
        smoothed.append(total / (1 - weight**step))
    return smoothed
