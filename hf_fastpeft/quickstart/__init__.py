"""Sources that need no download: a model and a data set already on this machine, named ``builtin:<name>``.

A run's YAML says ``base_model: builtin:smollm2-135m-instruct`` or ``path: builtin:stdlib-docstrings``.
"""

from hf_fastpeft.quickstart.data import DATASETS, load_builtin_rows
from hf_fastpeft.quickstart.model import MODELS, ensure_model

__all__ = ["BUILTIN", "DATASETS", "MODELS", "builtin_name", "ensure_model", "load_builtin_rows"]

BUILTIN = "builtin:"


def builtin_name(path: str) -> str | None:
    """The name behind ``builtin:<name>``, or None where ``path`` is an ordinary path or repository."""
    return path.removeprefix(BUILTIN) if path.startswith(BUILTIN) else None
