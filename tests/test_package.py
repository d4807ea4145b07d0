"""The package's surface: public names, the packaged folders, what importing does."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hf_fastpeft

ROOT = Path(__file__).parents[1]


def test_every_package_folder_is_packaged():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "hf_fastpeft").rglob("__init__.py")} | {
        "hf_fastpeft.patches"
    }
    assert listed == found


def test_patches_refuses_its_repository_name():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import patches"
    run = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert run.returncode != 0
    assert "import `hf_fastpeft.patches`" in run.stderr


@pytest.mark.parametrize("name", hf_fastpeft.__all__)
def test_public_name_loads(name):
    assert getattr(hf_fastpeft, name) is not None
    assert name in dir(hf_fastpeft)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_fastpeft.nothing  # noqa: B018
