"""What a run tells: an introduction, the result on the console, ``report.json`` and two pictures."""

import importlib.metadata
import importlib.util
import platform
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_fastpeft.config.schema import RunConfig
from hf_fastpeft.run.folder import PICTURES, REPORT_FILE
from hf_fastpeft.run.manifest import write_json
from hf_fastpeft.run.result import RunResult

__all__ = ["describe_ranks", "finish", "introduce", "loading_code", "versions"]

_PACKAGES = ("hf_fastpeft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "triton", "bitsandbytes")


def versions() -> dict[str, str]:
    """Python and the packages a run depends on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def introduce(console: Console, config: RunConfig, trainer: Any, notices: list[str], checkpoint: Path | None) -> None:
    """A few lines before training: what is trained, on what, for how long."""
    for notice in notices:
        _say(console, f"note: {notice}")
    model = trainer.model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    _say(console, f"{config.base_model}, adapter {config.method}: {trainable:,} of {total:,} parameters are trained")
    held_out = len(trainer.eval_dataset) if trainer.eval_dataset is not None else 0
    device = torch.device(trainer.args.device)
    _say(console, f"{len(trainer.train_dataset):,} training rows, {held_out:,} validation rows, on {device}")
    if checkpoint is not None:
        _say(console, f"resuming from {checkpoint}")


def finish(console: Console, config: RunConfig, result: RunResult) -> None:
    """Writes report and pictures, then prints losses, answers, ranks, files and how to load the adapter."""
    if result.interrupted:
        _interrupted(console, result)
        return
    pictures = _pictures(console, config, result)
    write_json(result.output_dir / REPORT_FILE, _content(config, result))
    _samples(console, result)
    if result.patch_text:
        _say(console, result.patch_text)
    if result.loss_before is not None and result.loss_after is not None:
        _say(
            console, f"validation loss {result.loss_before:.3f} -> {result.loss_after:.3f} after {result.steps} steps"
        )
    if result.kept_ranks:
        _say(console, describe_ranks(result.kept_ranks))
    spent = ", ".join(f"{phase} {value:.0f} s" for phase, value in result.seconds.items() if value >= 0.5)
    if spent:
        _say(console, f"time: {spent}")
    files = [path.name + ("/" if path.is_dir() else "") for path in (result.adapter_dir, result.lora_dir) if path]
    _say(console, f"written to {result.output_dir}: {', '.join([*files, REPORT_FILE, *pictures])}")
    _say(console, "\nLoad it in Python:\n")
    for line in loading_code(config, result):
        _say(console, f"    {line}")


def loading_code(config: RunConfig, result: RunResult) -> list[str]:
    """Three lines of Python that load what the run saved, ready to generate."""
    folder = str(result.adapter_dir)
    if config.adapter == "none":
        return [
            f"from transformers import AutoTokenizer, {config.model_type}",
            f"model = {config.model_type}.from_pretrained({folder!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
        ]
    base = ""
    if config.model_type != "AutoModelForCausalLM":
        revision = f", revision={config.revision_of_model!r}" if config.revision_of_model else ""
        base = f", transformers.{config.model_type}.from_pretrained({result.base!r}{revision})"
    return [
        "import hf_fastpeft, transformers",
        f"model = hf_fastpeft.load_adapter({folder!r}{base})",
        f"tokenizer = transformers.AutoTokenizer.from_pretrained({folder!r})",
    ]


def describe_ranks(kept: dict[str, tuple[int, int]]) -> str:
    """One sentence about what pruning left."""
    now, start = sum(k for k, _ in kept.values()), sum(r for _, r in kept.values())
    empty = sum(k == 0 for k, _ in kept.values())
    text = f"ranks kept: {now} of {start} over {len(kept)} modules, {now / len(kept):.2f} on average"
    return text + (f"; {empty} modules need no adapter at all" if empty else "")


def _interrupted(console: Console, result: RunResult) -> None:
    if result.checkpoint is None:
        _say(
            console,
            f"Interrupted after {result.steps} steps, before a checkpoint was written; start again with --overwrite",
        )
        return
    _say(
        console,
        f"Interrupted after {result.steps} steps; {result.checkpoint} holds everything. Continue with the same "
        "command and --resume, or from Python with",
    )
    _say(console, f"    resume_from_checkpoint: {shlex.quote(str(result.checkpoint))}")


def _pictures(console: Console, config: RunConfig, result: RunResult) -> list[str]:
    if not config.fastpeft.plots:
        return []
    if importlib.util.find_spec("matplotlib") is None:
        _say(console, "note: no pictures, because matplotlib is not installed; run `pip install matplotlib`")
        return []
    from hf_fastpeft.run.plots import plot_loss, plot_ranks

    title = f"{Path(config.base_model).name.removeprefix('builtin:')}, {config.method}"
    loss, ranks = PICTURES
    plot_loss(result.history, result.output_dir / loss, title=title, before=result.loss_before)
    if not result.kept_ranks:
        return [loss]
    plot_ranks(result.kept_ranks, result.rank_history, result.output_dir / ranks, title=title)
    return [loss, ranks]


def _content(config: RunConfig, result: RunResult) -> dict[str, Any]:
    return {
        "config": config.model_dump(),
        "versions": versions(),
        "steps": result.steps,
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
        "seconds": {phase: round(value, 2) for phase, value in result.seconds.items()},
        "kept_ranks": {name: {"kept": kept, "start": start} for name, (kept, start) in result.kept_ranks.items()},
        "rank_history": [{"step": step, "kept": sum(ranks.values())} for step, ranks in result.rank_history],
        "samples": [asdict(sample) for sample in result.samples],
        "history": result.history,
        "patch": result.patch,
    }


def _samples(console: Console, result: RunResult) -> None:
    if not result.samples:
        return
    table = Table(title="Held-out prompts, greedy answers", show_lines=True)
    for heading in ("prompt", "before", "after", "reference"):
        table.add_column(heading, overflow="fold", ratio=1)
    for sample in result.samples:
        table.add_row(*(escape(text) for text in (sample.prompt, sample.before, sample.after, sample.reference)))
    console.print(table)


def _say(console: Console, text: str) -> None:
    # Paths and answers hold brackets, which rich would read as markup; and a path must stay in one piece.
    console.print(text, markup=False, highlight=False, soft_wrap=True)
