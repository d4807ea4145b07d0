"""Rows of a ``datasets`` entry as they are stored: local JSON, CSV, Parquet, Arrow or text, the hub, or built in."""

import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_fastpeft.config.schema import DatasetConfig
from hf_fastpeft.errors import DataError
from hf_fastpeft.quickstart import builtin_name, load_builtin_rows

__all__ = ["read_rows"]

Row = tuple[str, Any]
"""Where it is (file and line, or data set and row), and what it holds."""

# `ds_type` -> suffixes of its files. What has another suffix is read as JSON, as Axolotl does.
_SUFFIXES = {
    "json": (".jsonl", ".json"),
    "csv": (".csv",),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "text": (".txt",),
}
# Keys that name the columns of one `type`.
_COLUMNS = {
    "alpaca": ("field_instruction", "field_input", "field_output"),
    "chat_template": ("field_messages", "message_field_role", "message_field_content", "roles_to_train"),
    "completion": ("field",),
    "prompt_completion": ("field_prompt", "field_completion", "message_field_role", "message_field_content"),
}


def read_rows(entry: DatasetConfig) -> tuple[Iterable[Row], list[str]]:
    """Rows of one entry, and notices about keys that have no effect on such a source.

    Raises:
        DataError: the source is missing, empty or malformed, or has no such split.
    """
    columns = {key for keys in _COLUMNS.values() for key in keys}
    name = builtin_name(entry.path)
    if name is not None:
        rows = ((f"{entry.path}[{i}]", row) for i, row in enumerate(load_builtin_rows(name, entry.split)))
        return rows, _idle(entry, {"type", "name", "data_files", "ds_type", *columns}, "a built-in data set")
    others = columns - set(_COLUMNS[entry.type])
    if (files := _local_files(entry)) is None:
        notices = _idle(entry, {"ds_type"}, "a hub data set")
        return _hub_rows(entry), notices + _idle(entry, others, f"type: {entry.type}")
    idle = {"name"} | ({"data_files"} if Path(entry.path).is_file() else set())
    notices = _idle(entry, idle, "local files") + _idle(entry, others, f"type: {entry.type}")
    kind = entry.ds_type or (entry.path if entry.path in _SUFFIXES and not Path(entry.path).exists() else None)
    return _cut([row for file in files for row in _read_file(file, kind)], entry), notices


def _idle(entry: DatasetConfig, keys: set[str], what: str) -> list[str]:
    given = ", ".join(sorted(keys & entry.model_fields_set))
    return [f"datasets: {entry.path}: {given}: without effect with {what}"] if given else []


def _local_files(entry: DatasetConfig) -> list[Path] | None:
    """Files to read, or None where ``path`` names a hub data set."""
    path = Path(entry.path)
    given = [entry.data_files] if isinstance(entry.data_files, str) else entry.data_files or []
    if path.is_file():
        return [path]
    if path.is_dir() or (given and entry.path in _SUFFIXES):
        base = path if path.is_dir() else Path()
        files = [base / name for name in given] or _files_in(base, entry)
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise DataError(f"datasets: {entry.path}: no such file: {', '.join(missing)}")
        return files
    # "owner/name" could be a hub data set; everything else that looks like a file must be one.
    known = {suffix for suffixes in _SUFFIXES.values() for suffix in suffixes}
    if path.suffix in known or path.is_absolute() or entry.path.startswith(("./", "../")):
        raise DataError(f"datasets: {entry.path}: no such file or folder (looked from {Path.cwd()})")
    return None


def _files_in(folder: Path, entry: DatasetConfig) -> list[Path]:
    """All files of ``ds_type``, by default of the first type that the folder holds; of text only if asked for."""
    kinds = [entry.ds_type] if entry.ds_type else [kind for kind in _SUFFIXES if kind != "text"]
    for kind in kinds:
        if files := sorted(file for suffix in _SUFFIXES[kind] for file in folder.glob(f"*{suffix}")):
            return files
    *most, last = [suffix for kind in kinds for suffix in _SUFFIXES[kind]]
    wanted = f"{', '.join(most)} or {last}" if most else last
    raise DataError(f"datasets: {folder}: holds no {wanted} file; name one in data_files, or its format in ds_type")


def _read_file(file: Path, kind: str | None) -> Iterable[Row]:
    kind = kind or next((kind for kind, suffixes in _SUFFIXES.items() if file.suffix in suffixes), "json")
    if kind == "json":
        return _read_json(file)
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(kind, data_files=[glob.escape(str(file))], split="train")
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise DataError(f"datasets: {file}: cannot be read as {kind}: {reason}") from error
    return ((f"{file}[{i}]", row) for i, row in enumerate(rows))


def _read_json(file: Path) -> Iterator[Row]:
    """Rows of a JSON array, or of JSONL: one object a line, blank lines skipped."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"datasets: {file}: cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        try:
            array = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"datasets: {file}:{error.lineno}: not valid JSON: {error.msg}") from error
        yield from ((f"{file}[{i}]", row) for i, row in enumerate(array))
        return
    # Not splitlines(): a JSON string may hold U+2028, which is no end of line here.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{file}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"datasets: {file}:{number}: not valid JSON: {error.msg} at column {error.colno}"
                ) from error


def _cut(rows: list[Row], entry: DatasetConfig) -> list[Row]:
    """The part of the rows of local files that ``split`` names, in the syntax of `datasets`."""
    if entry.split == "train":
        return rows
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(entry.split).to_absolute({"train": len(rows)})
    except (AssertionError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"datasets: {entry.path}: split: {entry.split!r}: {reason}; local files are the one split 'train', which "
            "may be cut: train[:10%]"
        ) from error
    return [row for part in parts for row in rows[part.from_ : part.to]]


def _hub_rows(entry: DatasetConfig) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset(entry.path, name=entry.name, split=entry.split, data_files=entry.data_files)
    except (OSError, ValueError) as error:  # not found, offline, or no such split or configuration
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"datasets: {entry.path}: neither a local file nor a readable hub data set: {reason}"
        ) from error
    return ((f"{entry.path}[{i}]", row) for i, row in enumerate(rows))
