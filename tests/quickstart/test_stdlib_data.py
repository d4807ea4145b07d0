"""Rows made from library source files: what is taken, what is left, and that the order never changes."""

import shutil

import pytest

from hf_fastpeft.errors import DataError
from hf_fastpeft.quickstart import load_builtin_rows
from hf_fastpeft.quickstart.data import SYSTEM, stdlib_docstrings

MODULE = '''
"""Module."""
def plain(a, b=1, *, c: int = 2) -> str:
    """Return the one thing that is asked for.

    Not this paragraph.
    """
async def waits(x):
    """Wait until something has happened
    at last."""
def _private(a):
    """Return something that nobody may see."""
def undocumented(a):
    return a
def fragment(a):
    """returns something without a capital"""
def short(a):
    """Too short."""
def doctest(a):
    """Show >>> an example that is no sentence."""
def repeats(a):
    """Return the one thing that is asked for."""
class Box:
    def open(self):
        """Open the box and look what is inside."""
    class _Hidden:
        def f(self):
            """Return something that nobody may see at all."""
'''


@pytest.fixture
def library(tmp_path):
    for name in ("alpha.py", "pkg/__init__.py", "pkg/beta.py", "test/gamma.py", "_inner.py", "broken.py"):
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("def (" if name == "broken.py" else MODULE.replace("one thing", f"one thing of {name}"))
    return tmp_path / "lib"


def rows_of(library):
    return stdlib_docstrings("train", root=library) + stdlib_docstrings("validation", root=library)


def test_public_documented_functions_become_conversations(library):
    pairs = {row["prompt"][1]["content"]: row["completion"][0]["content"] for row in rows_of(library)}
    assert (
        pairs["def alpha.plain(a, b=1, *, c: int=2) -> str"] == "Return the one thing of alpha.py that is asked for."
    )
    assert pairs["async def alpha.waits(x)"] == "Wait until something has happened at last."
    assert pairs["def alpha.Box.open(self)"] == "Open the box and look what is inside."
    row = rows_of(library)[0]
    assert [m["role"] for m in row["prompt"] + row["completion"]] == ["system", "user", "assistant"]
    assert row["prompt"][0]["content"] == SYSTEM


def test_what_is_no_public_sentence_is_left_out(library):
    prompts = " ".join(row["prompt"][1]["content"] for row in rows_of(library))
    for name in ("_private", "undocumented", "fragment", "short", "doctest", "repeats", "_Hidden", "gamma", "_inner"):
        assert name not in prompts


def test_the_rows_do_not_depend_on_the_order_of_files(library, tmp_path):
    copy = tmp_path / "copy"
    for path in sorted(library.rglob("*.py"), reverse=True):
        target = copy / path.relative_to(library)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    assert rows_of(copy) == rows_of(library)


def test_the_standard_library_gives_thousands_of_rows_and_keeps_modules_apart():
    train, validation = (load_builtin_rows("stdlib-docstrings", split) for split in ("train", "validation"))
    assert len(train) > 1500
    assert 50 < len(validation) < len(train) / 4
    prompts = [row["prompt"][1]["content"] for row in train]
    assert len(set(prompts)) == len(prompts)
    assert not set(prompts) & {row["prompt"][1]["content"] for row in validation}
    assert train == load_builtin_rows("stdlib-docstrings", "train")


def test_unknown_names_and_splits_are_told():
    with pytest.raises(DataError, match="known: stdlib-docstrings"):
        load_builtin_rows("nothing", "train")
    with pytest.raises(DataError, match="it has: train, validation"):
        load_builtin_rows("stdlib-docstrings", "test")
