"""A whole training run from one configuration: data, model, trainer, pictures and report."""

from hf_fastpeft.run.result import RunResult
from hf_fastpeft.run.runner import train

__all__ = ["RunResult", "train"]
