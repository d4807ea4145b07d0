"""A hint that bitsandbytes prints when it is imported, kept for those whom it concerns.

PEFT imports bitsandbytes wherever it is installed, and on CPUs with bfloat16 instructions that logs a warning about an
optional kernel for 4-bit layers, whether or not there will be any.
"""

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["repeat_hints", "without_hints"]

_LOGGER = "bitsandbytes.backends.cpu.ops"
_HINT = "Failed to load CPU gemm_4bit_forward"
_held: list[logging.LogRecord] = []


@contextlib.contextmanager
def without_hints() -> Iterator[None]:
    """Holds the hint back while bitsandbytes is imported."""

    def hold(record: logging.LogRecord) -> bool:
        is_hint = str(record.msg).startswith(_HINT)
        if is_hint:
            _held.append(record)
        return not is_hint

    logger = logging.getLogger(_LOGGER)
    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)


def repeat_hints() -> None:
    """Logs what was held back, once: 4-bit layers are in use."""
    while _held:
        logging.getLogger(_LOGGER).handle(_held.pop(0))
