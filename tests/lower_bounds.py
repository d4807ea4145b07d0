"""The lower bounds of ``pyproject.toml`` as pip constraints: ``python tests/lower_bounds.py > constraints.txt``.

``make test-oldest`` installs by them, so that a bound is a version with which the tests were run.
"""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?P<extras>\[[^\]]*\])?(?P<bounds>.*)")


def requirements(extras: tuple[str, ...] | None = None) -> list[str]:
    """The project's requirements and those of these extras (of all by default), without the project itself."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    groups = [project["dependencies"], *(optional[name] for name in (optional if extras is None else extras))]
    return [line for group in groups for line in group if not line.startswith(f"{project['name']}[")]


def lower_bounds(lines: list[str]) -> list[str]:
    """``name>=1.2,<2`` as ``name==1.2``.

    Raises:
        ValueError: a requirement without a lower bound.
    """
    found = []
    for line in lines:
        parsed = REQUIREMENT.fullmatch(line)
        lowest = parsed and re.match(r">=\s*([^,;\s]+)", parsed["bounds"].strip())
        if not lowest:
            raise ValueError(f"lower_bounds: {line!r} has no lower bound; write it as 'name>=1.2,<2'")
        found.append(f"{parsed['name']}=={lowest[1]}")
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(lower_bounds(requirements())) + "\n")
