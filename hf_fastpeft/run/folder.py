"""The output folder of a run: what it may hold before, which files the run writes there, where to resume."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import TrainerCallback

from hf_fastpeft.config.methods import BASE_CHANGING, METHODS
from hf_fastpeft.config.schema import RunConfig
from hf_fastpeft.errors import ConfigError, RunExistsError
from hf_fastpeft.run.manifest import MANIFEST_FILE, Manifest, is_saved_name

__all__ = [
    "PICTURES",
    "REPORT_FILE",
    "RUN_FILE",
    "FolderCallback",
    "OutputFolder",
    "latest_checkpoint",
    "read_json",
]

# Written when training starts: the mark of a run, and what its resumption needs to know.
RUN_FILE = "run.json"
REPORT_FILE = "report.json"
PICTURES = ("loss.png", "ranks.png")
# TRL's model card, written with every checkpoint.
CARD_FILE = "README.md"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class OutputFolder:
    """``output_dir`` of one run; nothing is deleted or written in it before `start`.

    Attributes:
        path: the folder.
        checkpoint: the checkpoint to resume from, or None for a fresh run.

    Args:
        config: the run; ``output_dir``, ``resume_from_checkpoint`` and ``auto_resume_from_checkpoints`` are read.
        overwrite: `start` deletes what the manifest of an earlier run there lists, and only that.

    Raises:
        ConfigError: the folder cannot be written, its manifest is damaged, or the checkpoint to resume from does not
            exist.
        RunExistsError: the folder holds something and neither resuming nor overwriting was asked for; there is
            something to overwrite, but no manifest; or the run would replace a file that no run wrote.
    """

    def __init__(self, config: RunConfig, *, overwrite: bool = False) -> None:
        self.path = Path(config.output_dir)
        try:
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"output_dir: {self.path}: is a file; a folder is needed")
            self._manifest = Manifest.read(self.path)
            self.checkpoint = _checkpoint(config, self.path)
            self._overwrite = overwrite and self.checkpoint is None
            self._refuse_existing(config)
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except (OSError, RuntimeError) as error:  # RuntimeError: symbolic links in a circle, before Python 3.13
            if isinstance(error, RunExistsError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"output_dir: {self.path}: cannot be written: {reason}") from error
        self._started = False

    def _refuse_existing(self, config: RunConfig) -> None:
        ours = self._manifest.present() if self._manifest is not None else set()
        there = _everything(self.path)
        found = sorted({PurePosixPath(name).parts[0] for name in there})
        shown = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        if found and self.checkpoint is None and not (self._overwrite and self._manifest is not None):
            what = "a run" if self._manifest is not None else "files"
            ways = ["continue it with --resume"] if latest_checkpoint(self.path) else []
            ways += ["replace it with --overwrite"] if self._manifest is not None else []
            # Without its list nothing tells a run's files from others.
            unlisted = f" and no {MANIFEST_FILE}, which says what --overwrite may delete" if self._overwrite else ""
            raise RunExistsError(
                f"output_dir: {self.path}: already holds {what} ({shown}){unlisted}; "
                f"{', '.join([*ways, 'move it away'])}, or name another folder"
            )
        foreign = sorted(name for name in there - ours if not _is_plain_folder(self.path / name))
        self._foreign_card = CARD_FILE in foreign
        resumed = _CHECKPOINT.fullmatch(self.checkpoint.name) if self.checkpoint is not None else None
        replaced = [name for name in foreign if _is_written(name, config, after=int(resumed[1]) if resumed else -1)]
        if replaced:
            raise RunExistsError(
                f"output_dir: {self.path}: this run would replace what no run wrote: {', '.join(replaced[:4])}"
                f"{', ...' if len(replaced) > 4 else ''}; move it away or name another folder"
            )
        rotated = [name for name in foreign if _CHECKPOINT.fullmatch(PurePosixPath(name).parts[0])]
        if rotated and config.save_total_limit is not None:
            raise RunExistsError(
                f"save_total_limit: {config.save_total_limit}: deletes whole checkpoints, and in {self.path} also "
                f"what no run wrote: {', '.join(rotated[:4])}; move it away, or remove save_total_limit"
            )

    def start(self) -> None:
        """Deletes what an earlier run wrote, where that was asked for, and begins the list of this run's files.

        Raises:
            ConfigError: a file cannot be deleted.
        """
        self._manifest = self._manifest or Manifest(self.path)
        if self._overwrite:
            self._manifest.delete()
        self._manifest.save()
        self._started = True

    def begin(self, *names: str) -> None:
        """Lists files and folders that are about to be written; only in the process that called `start`."""
        if self._started and self._manifest is not None:
            self._manifest.begin(*names)

    def finish(self, *names: str) -> None:
        """Lists what was written since `begin`."""
        if self._started and self._manifest is not None:
            self._manifest.finish(*names)

    @contextlib.contextmanager
    def writing(self, *names: str) -> Iterator[None]:
        """`begin` and `finish` around a block that writes these files and folders."""
        self.begin(*names)
        try:
            yield
        finally:
            self.finish(*names)

    def keep_card(self, trainer: Any) -> None:
        """Leaves a README.md that no run wrote as it is, where TRL would put its model card."""
        if self._foreign_card:
            trainer.create_model_card = lambda *args, **kwargs: None


class FolderCallback(TrainerCallback):
    """Lists the files of each checkpoint."""

    def __init__(self, folder: OutputFolder) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self.folder.begin(f"checkpoint-{state.global_step}", CARD_FILE)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.folder.finish(f"checkpoint-{state.global_step}", CARD_FILE)


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


def _everything(folder: Path) -> set[str]:
    """Files, symbolic links and empty folders below a folder, but not its manifest."""
    found = set()
    for top, folders, files in os.walk(folder):
        shown = [name for name in folders if (Path(top) / name).is_symlink() or not any((Path(top) / name).iterdir())]
        found |= {(Path(top) / name).relative_to(folder).as_posix() for name in (*files, *shown)}
    return found - {MANIFEST_FILE, f".{MANIFEST_FILE}.partial"}


def _is_written(name: str, config: RunConfig, *, after: int) -> bool:
    """Whether a run writes to this path; its checkpoints come after the step ``after``."""
    path = PurePosixPath(name)
    top = path.parts[0]
    if len(path.parts) == 1 and top in (RUN_FILE, REPORT_FILE, *(PICTURES if config.fastpeft.plots else ())):
        return True
    if len(path.parts) == 1 and config.hub_model_id is not None and top != CARD_FILE and is_saved_name(top):
        return True  # what is pushed is saved beside the checkpoints first
    if match := _CHECKPOINT.fullmatch(top):
        written = int(match[1]) > after
    else:
        written = top == ("model" if config.adapter == "none" else "adapter") or (top == "lora" and _has_lora(config))
    # The name of a folder to write stands here alone where that is a file or a symbolic link.
    return written and (is_saved_name(path.name) or len(path.parts) == 1)


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _has_lora(config: RunConfig) -> bool:
    """Whether plain LoRA is written beside the adapter."""
    method = METHODS.get(config.adapter)
    return config.peft_init_lora_weights in BASE_CHANGING or (method is not None and bool(method.callbacks))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one where there is no such file."""
    with contextlib.suppress(FileNotFoundError):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    return {}
