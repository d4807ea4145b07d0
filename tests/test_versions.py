"""The versions in ``pyproject.toml``: the installed ones are among them, ``make test-oldest`` takes the lowest."""

import tomllib
from importlib.metadata import metadata, version

import pytest
from lower_bounds import PYPROJECT, lower_bounds, requirements
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

TESTED = ("test", "gpu", "quickstart", "plot")  # the extras that the tests need


def test_lower_bounds_are_what_the_requirements_begin_with():
    lines = ["torch>=2.11,<3", "PyYAML>=6.0.1", "rich >= 13.8 , <16", "some[extra]>=1"]
    assert lower_bounds(lines) == ["torch==2.11", "PyYAML==6.0.1", "rich==13.8", "some==1"]


@pytest.mark.parametrize(
    "line", ["torch", "torch<3", "torch==2.11", "torch<3,>=2.11", "torch @ https://example.org/a"]
)
def test_a_requirement_that_does_not_begin_with_one_is_refused(line):
    with pytest.raises(ValueError, match=r"has no lower bound; write it as 'name>=1.2,<2'"):
        lower_bounds([line])


def test_every_requirement_has_a_lower_bound_and_none_is_forgotten():
    pinned = lower_bounds(requirements())
    assert {"torch", "peft", "triton", "gguf", "pytest", "ruff"} <= {line.split("==")[0] for line in pinned}
    assert not any(p.startswith("hf_fastpeft") for p in pinned)
    assert len(requirements(("plot",))) < len(requirements(TESTED)) < len(requirements())


@pytest.mark.parametrize("line", requirements(TESTED))
def test_what_is_installed_is_within_the_bounds(line):
    requirement = Requirement(line)
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_the_lowest_python_can_install_every_requirement():
    asked = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["requires-python"]
    lowest = asked.removeprefix(">=")
    names = [Requirement(line).name for line in requirements(TESTED)]
    refused = [n for n in names if not SpecifierSet(metadata(n)["Requires-Python"] or "").contains(lowest)]
    assert refused == []
