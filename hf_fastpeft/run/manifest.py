"""Which files in its folder a run wrote: ``run_files.json``, the only files that ``--overwrite`` deletes.

Paths are relative to the folder. What is about to be written is listed before it is (``unfinished``), so that a run
that was killed can be overwritten, too. Symbolic links are never followed: what they lead to is not the run's.
"""

import contextlib
import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from hf_fastpeft.errors import ConfigError

__all__ = ["MANIFEST_FILE", "Manifest", "is_saved_name", "write_json"]

MANIFEST_FILE = "run_files.json"
_WRITTEN_BY = "hf_fastpeft"
_LISTS = ("files", "folders", "unfinished")
# Names under which transformers, PEFT, TRL and this package save models, tokenizers and checkpoints.
_SAVED = re.compile(
    r"""README\.md | (adapter_|generation_|processor_|preprocessor_|tokenizer_)?config\.json
    | (adapter_model|model|pytorch_model|optimizer|scheduler|scaler|rng_state|training_args)
      ([_.-][\w.-]*)?\.(safetensors|bin|pt|pth|index\.json)
    | \w+_state\.(json|safetensors) | tokenizer\.(json|model) | vocab\.(json|txt) | merges\.txt | spiece\.model
    | special_tokens_map\.json | added_tokens\.json | chat_template\.\w+ | events\.out\.tfevents\..*""",
    re.VERBOSE,
)
_Stamp = tuple[int, int, int]


def is_saved_name(name: str) -> bool:
    """Whether saving a model, a tokenizer or a checkpoint writes files of this name."""
    return _SAVED.fullmatch(name) is not None


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader never sees half a file."""
    partial = _partial(path)
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


class Manifest:
    """The files and folders of a run.

    Attributes:
        folder: the run's folder; itself it may be a symbolic link.
        files: files that the run wrote.
        folders: folders that it made.
        unfinished: files and folders that it was about to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: set[str] = set()
        self.folders: set[str] = set()
        self.unfinished: set[str] = set()
        self._before: dict[str, dict[str, _Stamp]] = {}

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest in a folder, or None where there is none.

        Raises:
            ConfigError: it is damaged, is of another program or lists something outside the folder.
        """
        path = folder / MANIFEST_FILE
        if not path.exists() and not path.is_symlink():
            return None
        manifest = cls(folder)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["written_by"] != _WRITTEN_BY:
                raise ValueError(f"written by {content['written_by']!r}")
            for key in _LISTS:
                setattr(manifest, key, {_checked(name) for name in content[key]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ConfigError(
                f"output_dir: {path}: cannot be read as the list of a run's files ({reason}), so nothing there is "
                "deleted or replaced; name another folder, or move that file away"
            ) from error
        return manifest

    def save(self) -> None:
        """Writes the manifest into its folder; a name whose file is gone is dropped."""
        self.files = {name for name in self.files if (self.folder / name).exists()}
        self.folders = {name for name in self.folders if (self.folder / name).is_dir()}
        lists = {key: sorted(getattr(self, key)) for key in _LISTS}
        write_json(self.folder / MANIFEST_FILE, {"written_by": _WRITTEN_BY, **lists})

    def present(self) -> set[str]:
        """The run's files that are there, as far as they can be reached without a symbolic link."""
        found = {name for name in self.files if self._is_file(name)}
        for name in self.unfinished:
            if self._is_file(name):
                found.add(name)
            elif (path := self._plain(name)) is not None and path.is_dir():
                found |= {file for file in _files_below(self.folder, name) if is_saved_name(PurePosixPath(file).name)}
        return found

    def delete(self) -> None:
        """Deletes the run's files, then those of its folders that are empty.

        Raises:
            ConfigError: a file cannot be deleted.
        """
        folders = {*self.folders, *self.unfinished}
        for name in sorted(self.present()):
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"output_dir: {self.folder / name}: cannot be deleted: {error.strerror or error}"
                ) from error
            folders |= {str(parent) for parent in PurePosixPath(name).parents if parent.parts}
        for name in sorted(folders, key=lambda name: len(PurePosixPath(name).parts), reverse=True):
            path = self._plain(name)
            if path is not None and path.is_dir():
                with contextlib.suppress(OSError):  # it holds files of others
                    path.rmdir()
        self.unfinished.clear()

    def begin(self, *names: str) -> None:
        """Lists files and folders before they are written."""
        for name in names:
            self._before[name] = self._stamps(name)
            if name in self._before[name] and name not in self.files:
                continue  # somebody else's file, until it is seen to be replaced
            self.unfinished |= {name, _partial(Path(name)).as_posix()} if name.endswith(".json") else {name}
        self._before.setdefault("", {}).update(self._stamps(""))
        self.save()

    def finish(self, *names: str) -> None:
        """Lists what was written since `begin`: every file that is new or has changed."""
        for name in ("", *names):
            if name in self._before:
                before = self._before.pop(name)
                self.files |= {file for file, stamp in self._stamps(name).items() if before.get(file) != stamp}
            if name:
                self.unfinished -= {name, _partial(Path(name)).as_posix()}
        self.folders |= {str(parent) for file in self.files for parent in PurePosixPath(file).parents if parent.parts}
        self.save()

    def _stamps(self, name: str) -> dict[str, _Stamp]:
        """Identity of a file, or of all files below a folder; of "", of what is saved in the run's folder itself."""
        if name == "":  # a run that pushes to the hub saves there, too
            files = [path.name for path in self.folder.iterdir() if is_saved_name(path.name)]
        else:
            files = [name] if self._is_file(name) else _files_below(self.folder, name) if self._plain(name) else []
        found = {}
        for file in files:
            if self._is_file(file):
                stat = (self.folder / file).stat()
                found[file] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        return found

    def _plain(self, name: str) -> Path | None:
        """The path of a name, or None where a symbolic link is on the way."""
        path = self.folder
        for part in PurePosixPath(name).parts:
            path = path / part
            if path.is_symlink():
                return None
        return path

    def _is_file(self, name: str) -> bool:
        path = self._plain(name)
        return path is not None and path.is_file()


def _files_below(folder: Path, name: str) -> list[str]:
    """Regular files in a folder and its subfolders, relative to ``folder``; behind symbolic links nothing."""
    found: list[str] = []
    pending = [folder / name] if (folder / name).is_dir() else []
    while pending:
        for path in pending.pop().iterdir():
            if path.is_symlink():
                continue
            if path.is_dir():
                pending.append(path)
            else:
                found.append(path.relative_to(folder).as_posix())
    return found


def _checked(name: Any) -> str:
    """A path that stays in the folder, as it is written on any system."""
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is no path")
    path = PurePosixPath(name)
    outside = path.is_absolute() or PureWindowsPath(name).drive or ".." in re.split(r"[/\\]", name)
    if outside or not path.parts:
        raise ValueError(f"{name!r} is not inside the folder")
    return path.as_posix()
