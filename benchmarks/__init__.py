"""Measurements of this repository: budgets traced without a GPU, side-by-side steps with one.

Importing this package makes ``hf_fastpeft.patches`` importable from a plain checkout, where it lies in ``./patches``
and only an installation maps it into the package.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class _CheckoutPatches:
    """Finder of last resort: an installed ``hf_fastpeft`` is found before it is asked."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "hf_fastpeft.patches":
            return None
        folder = ROOT / "patches"
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


if not any(getattr(finder, "__name__", "") == "_CheckoutPatches" for finder in sys.meta_path):
    sys.meta_path.append(_CheckoutPatches)
