"""The command line ``hf-fastpeft``. Mistakes of the user print one message and end with exit code 2, no traceback."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_fastpeft.errors import ConfigError, FastPeftError

__all__ = ["app", "main"]

EXIT_ERROR, EXIT_MISTAKE, EXIT_INTERRUPTED = 1, 2, 130
_TELEMETRY = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")  # what huggingface_hub reads

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune with stock Trainer, TRL and PEFT: fused, and with ranks that adapt.",
)


def _expanded(path: Path) -> Path:
    from hf_fastpeft.config.schema import expand_home

    try:
        return Path(expand_home(str(path)))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


RunFile = Annotated[Path, typer.Argument(metavar="RUN.YAML", help="Axolotl-style configuration of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace one key, e.g. fastpeft.sora.target_r=4. Repeatable."),
]


def main() -> None:
    """Entry point of ``hf-fastpeft``."""
    _disable_telemetry()
    try:
        app()
    except FastPeftError as error:
        _fail(str(error))
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        _fail("interrupted")
        sys.exit(EXIT_INTERRUPTED)


def _disable_telemetry() -> None:
    """Nothing is sent when TRL makes a trainer, unless the environment says something else."""
    if any(name in os.environ for name in _TELEMETRY):
        return
    os.environ[_TELEMETRY[0]] = "1"  # of processes that this one starts
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # was read from the environment when this package was imported


@app.command()
def train(
    run: RunFile,
    overwrite: Annotated[bool, typer.Option(help="Replace what an earlier run left in output_dir.")] = False,
    resume: Annotated[bool, typer.Option(help="Continue from the latest checkpoint in output_dir.")] = False,
    overrides: Overrides = None,
) -> None:
    """Train, and write adapter, plain-LoRA export, report and pictures to output_dir."""
    if overwrite and resume:
        raise ConfigError("train: --overwrite together with --resume; keep one of them")
    from hf_fastpeft.run.runner import train as run_training

    extra = ["auto_resume_from_checkpoints=true"] if resume else []
    config, console = _load(run, [*(overrides or []), *extra])
    result = run_training(config, overwrite=overwrite, console=console)
    if result.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


@app.command()
def explain(run: RunFile, overrides: Overrides = None) -> None:
    """Show what each key becomes: the arguments of TRL, PEFT and Trainer. Loads no weights."""
    from rich.table import Table

    from hf_fastpeft.config.mapping import assignments

    config, console = _load(run, overrides or [])
    data = Table("source", "type", "split", title="Data")
    for entry in [*config.datasets, *config.test_datasets]:
        data.add_row(entry.path, entry.type, entry.split)
    table = Table(title=str(run))
    for heading in ("key", "becomes", "value"):
        table.add_column(heading, overflow="fold")  # a cut argument name cannot be looked up
    for item in assignments(config):
        table.add_row(item.key, f"{item.target}({item.argument})", repr(item.value))
    console.print(data, table)


@app.command()
def verify(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN.YAML]", help="Check this run's model and data.")] = None,
    model: Annotated[
        str, typer.Option(help="Model to check where no run is given.")
    ] = "builtin:smollm2-135m-instruct",
    adapter: Annotated[str, typer.Option(help="Its adapter, as in a run; see `info`.")] = "lora",
    rows: Annotated[int, typer.Option(help="Training rows in the batch.", min=1)] = 2,
    overrides: Overrides = None,
) -> None:
    """Compare loss and every gradient of the patched model with the stock one, on a batch of the run's own data."""
    from hf_fastpeft.config import parse_config
    from hf_fastpeft.run.runner import model_and_batch
    from hf_fastpeft.verification import verify as compare

    if run is not None:
        config, console = _load(run, overrides or [])
    else:
        import json

        from hf_fastpeft.config.methods import METHODS

        no_linears = ["full", "none", *(name for name, m in METHODS.items() if "lora_target_linear" not in m.keys)]
        text = json.dumps(
            {
                "base_model": model,
                "adapter": adapter,
                "lora_target_linear": adapter not in no_linears,
                "datasets": [{"path": "builtin:stdlib-docstrings"}],
            }
        )
        config, console = parse_config(text, name="verify", overrides=overrides or []).config, _console()
    wrapped, batch = model_and_batch(config, rows, notify=console.print)
    with warnings.catch_warnings():
        # True, and of no interest here: no step is taken, so there is nothing to prune.
        warnings.filterwarnings("ignore", message="SoRA: gates are not being pruned")
        warnings.filterwarnings("ignore", message="(AdaLoRA|adaptive LoRA): ranks are not being allocated")
        outcome = compare(wrapped, batch)
    console.print(str(outcome), markup=False, highlight=False, soft_wrap=True)
    if not outcome.passed:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def export(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER_DIR", help="Folder of a saved adapter.", callback=_expanded)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the plain-LoRA adapter.", callback=_expanded)],
    overwrite: Annotated[bool, typer.Option(help="Replace an adapter that OUT already holds.")] = False,
) -> None:
    """Write an adapter as plain LoRA, for servers that know no other method."""
    from hf_fastpeft.export import export_to_lora
    from hf_fastpeft.loading import load_adapter

    if adapter.resolve() == out.resolve():
        raise ConfigError(f"export: {out}: is the adapter's own folder, which it would replace; name another")
    export_to_lora(load_adapter(adapter), out, overwrite=overwrite)
    _console().print(f"{adapter} written to {out} as plain LoRA", markup=False, highlight=False, soft_wrap=True)


@app.command()
def info() -> None:
    """Show versions, devices, model families that can be patched, adapter methods and built-in sources."""
    import torch
    from rich.table import Table

    from hf_fastpeft import quickstart
    from hf_fastpeft.config.methods import METHODS, SHORTHANDS
    from hf_fastpeft.families import FAMILIES
    from hf_fastpeft.run.report import versions

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows: dict[str, Any] = {
        **versions(),
        "devices": devices or f"CPU, {torch.get_num_threads()} threads",
        "patched families": sorted(FAMILIES),
        "adapter methods": [*METHODS, *SHORTHANDS, "none (every weight)"],
        "built-in models": sorted(quickstart.MODELS),
        "built-in data": sorted(quickstart.DATASETS),
    }
    table = Table("what", "found")
    for key, value in rows.items():
        table.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    _console().print(table)


def _load(run: Path, overrides: list[str]) -> tuple[Any, Any]:
    from hf_fastpeft.config import load_config

    console = _console()
    loaded = load_config(run, overrides=overrides)
    for notice in loaded.notices:
        console.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)
    return loaded.config, console


def _console() -> Any:
    from rich.console import Console

    return Console()


def _fail(message: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
