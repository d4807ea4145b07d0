"""Every error this package raises on purpose. Each message says what was asked, what was found, what is possible."""

__all__ = [
    "AdapterError",
    "AlreadyPatchedError",
    "ConfigError",
    "DataError",
    "FastPeftError",
    "MissingPackageError",
    "NotPatchedError",
    "NothingToPatchError",
    "RunExistsError",
    "UnknownFamilyError",
]


class FastPeftError(Exception):
    """Base of all errors raised by ``hf_fastpeft``."""


class UnknownFamilyError(FastPeftError, ValueError):
    """No patch is registered for the model's ``config.model_type``."""


class AlreadyPatchedError(FastPeftError, RuntimeError):
    """The model already carries our classes; restore it first."""


class NothingToPatchError(FastPeftError, ValueError):
    """The model's family is known but none of its blocks could be swapped."""


class NotPatchedError(FastPeftError, ValueError):
    """The model has none of our classes."""


class AdapterError(FastPeftError, ValueError):
    """An adapter folder or an adapter's state cannot be used as asked."""


class ConfigError(FastPeftError, ValueError):
    """One or more mistakes in a run's configuration, all reported together."""


class DataError(FastPeftError, ValueError):
    """A data set is missing, empty or malformed."""


class MissingPackageError(FastPeftError, ImportError):
    """An optional package is needed for what was asked; the message names the install command."""


class RunExistsError(FastPeftError, FileExistsError):
    """The output folder already holds a run; nothing is overwritten silently."""
