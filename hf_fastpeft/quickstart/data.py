"""Instruction data made from Python's own standard library: a function's signature in, its summary out.

Sources are read as text and parsed with ``ast``; nothing is imported or run. Whole modules are held out by a hash of
their name, so a module is never in both splits and another Python version does not reshuffle what they share.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from hf_fastpeft.errors import DataError

__all__ = ["DATASETS", "load_builtin_rows", "stdlib_docstrings"]

SYSTEM = "Describe the Python function in one sentence."
VALIDATION_PERCENT = 8
SUMMARY_CHARS = (20, 120)
MAX_SIGNATURE_CHARS = 160
# Tests, vendored code and demos: not the library's own prose.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}

Message = dict[str, str]
Row = dict[str, list[Message]]


def load_builtin_rows(name: str, split: str) -> list[Row]:
    """Rows of a built-in data set, each ``{"prompt": [messages], "completion": [message]}``.

    Raises:
        DataError: no such data set or split.
    """
    if name not in DATASETS:
        raise DataError(f"builtin:{name}: no such built-in data set; known: {', '.join(sorted(DATASETS))}")
    if split not in ("train", "validation"):
        raise DataError(f"builtin:{name}: split {split!r} does not exist; it has: train, validation")
    return DATASETS[name](split)


def stdlib_docstrings(split: str, *, root: Path | None = None) -> list[Row]:
    """One row for each public, documented function of the standard library, ordered by its full name.

    Args:
        split: ``"train"`` or ``"validation"`` (whole modules, about 8 % of them).
        root: folder to read instead of this interpreter's standard library.
    """
    folder = root or Path(sysconfig.get_path("stdlib"))
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts) or any(p.startswith("_") and p != "__init__" for p in parts):
            continue
        module = ".".join(p for p in parts if p != "__init__")
        if module and _is_validation(module) == (split == "validation"):
            found.update(_functions(path, module))
    rows: list[Row] = []
    seen: set[str] = set()
    for name in sorted(found):
        signature, summary = found[name]
        # Overloads and mirrored classes repeat a sentence; one of each keeps the answer a function of its prompt.
        if summary in seen:
            continue
        seen.add(summary)
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": signature}]
        rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": summary}]})
    return rows


def _is_validation(module: str) -> bool:
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < VALIDATION_PERCENT


def _functions(path: Path, module: str) -> dict[str, tuple[str, str]]:
    """Full name -> (signature, summary) of every usable function in one file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in the library's own strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return {}  # not readable as Python, so not a source of rows
    found: dict[str, tuple[str, str]] = {}
    for name, node in _public_functions(tree, module):
        summary = _summary(node)
        signature = _signature(node, name)
        if summary is not None and len(signature) <= MAX_SIGNATURE_CHARS:
            found[name] = (signature, summary)
    return found


def _public_functions(
    node: ast.Module | ast.ClassDef, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            name = f"{prefix}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from _public_functions(child, name)
            else:
                yield name, child


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    return f"{keyword} {name}({ast.unparse(node.args)}){returns}"


def _summary(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """First paragraph of the docstring as one line; None where it is not one plain sentence."""
    doc = ast.get_docstring(node)
    if not doc:
        return None
    summary = " ".join(doc.split("\n\n", 1)[0].split())
    low, high = SUMMARY_CHARS
    plain = summary.isascii() and summary[:1].isupper() and summary.endswith(".")
    if not plain or not low <= len(summary) <= high or ">>>" in summary or "->" in summary:
        return None
    return summary


DATASETS = {"stdlib-docstrings": stdlib_docstrings}
