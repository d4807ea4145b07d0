"""The output folder of a run: what it may hold before, which files a run writes, where to resume."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from hf_fastpeft.config.schema import RunConfig
from hf_fastpeft.errors import ConfigError, RunExistsError

__all__ = ["RUN_FILE", "latest_checkpoint", "prepare_folder", "read_json", "write_json"]

# Written when training starts: the mark of a run, and what its resumption needs to know.
RUN_FILE = "run.json"
_WRITTEN = (RUN_FILE, "report.json", "loss.png", "ranks.png", "README.md", "adapter", "lora", "model")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def prepare_folder(config: RunConfig, *, overwrite: bool = False) -> Path | None:
    """Makes the output folder usable, before any slow work.

    Args:
        config: the run; ``output_dir``, ``resume_from_checkpoint`` and ``auto_resume_from_checkpoints`` are read.
        overwrite: delete what an earlier run wrote there, and only that.

    Returns:
        The checkpoint to resume from, or None for a fresh run.

    Raises:
        ConfigError: the folder cannot be written, or the checkpoint to resume from does not exist.
        RunExistsError: the folder holds something and neither resuming nor overwriting was asked for.
    """
    folder = Path(config.output_dir)
    checkpoint = _checkpoint(config, folder)
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if found and overwrite and checkpoint is None:
        for path in list(folder.iterdir()):
            if path.name in _WRITTEN or _CHECKPOINT.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif found and checkpoint is None:
        what = "a run" if RUN_FILE in found or latest_checkpoint(folder) else "files"
        shown = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        raise RunExistsError(
            f"output_dir: {folder}: already holds {what} ({shown}); continue it with --resume, replace it with "
            "--overwrite, or name another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"output_dir: {folder}: cannot be written: {error.strerror or error}") from error
    return checkpoint


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    steps = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / "trainer_state.json").is_file()
    }
    return steps[max(steps)] if steps else None


def _checkpoint(config: RunConfig, folder: Path) -> Path | None:
    if config.resume_from_checkpoint is not None:
        path = Path(config.resume_from_checkpoint)
        if not (path / "trainer_state.json").is_file():
            latest = latest_checkpoint(folder)
            hint = f"; the latest one here is {latest}" if latest else ""
            raise ConfigError(f"resume_from_checkpoint: {path}: holds no checkpoint (no trainer_state.json){hint}")
        return path
    return latest_checkpoint(folder) if config.auto_resume_from_checkpoints else None


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one where there is no such file."""
    with contextlib.suppress(FileNotFoundError):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    return {}
