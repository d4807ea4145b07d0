"""Adapter methods that register with PEFT."""


def register() -> None:
    """Register every method of this package with PEFT; calling it again changes nothing."""
