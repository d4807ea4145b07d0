"""The only file that touches PEFT's registries: adds a method to PEFT from outside, idempotently.

PEFT 0.21 has no entry point for third-party methods: a name must be a member of ``PeftType`` before
``register_peft_method`` accepts it. So the enum is extended in place. Where an enum offers none of the private fields
that takes, a ``str`` subclass with ``value`` and ``name`` stands in and goes into PEFT's mappings directly.
"""

import enum
from typing import Any

from peft import mapping
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

__all__ = ["NamedType", "add_peft_type", "register_method"]

_ENUM_FIELDS = ("_member_map_", "_member_names_", "_value2member_map_")


class NamedType(str):
    """Stand-in for an enum member: transformers reads ``peft_type.value``, which a bare ``str`` does not have."""

    __slots__ = ()

    @property
    def value(self) -> str:
        return str(self)

    @property
    def name(self) -> str:
        return str(self)


def add_peft_type(name: str, enum_cls: Any = PeftType) -> Any:
    """Member ``name`` of PEFT's enum of methods, added when it is not there yet.

    Args:
        name: upper-case name, as written to ``adapter_config.json``.
        enum_cls: the enum to extend.

    Returns:
        The enum member, or a ``NamedType`` where the enum cannot be extended.
    """
    if not all(hasattr(enum_cls, field) for field in _ENUM_FIELDS):
        return NamedType(name)
    if name in enum_cls._member_map_:
        return enum_cls._member_map_[name]
    member = str.__new__(enum_cls, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_cls
    member._sort_order_ = len(enum_cls._member_names_)
    if isinstance(enum_cls, enum.EnumMeta):
        type.__setattr__(enum_cls, name, member)  # Enum's own __setattr__ refuses members
    enum_cls._member_map_[name] = member
    enum_cls._value2member_map_[name] = member
    enum_cls._member_names_.append(name)
    return member


def register_method(peft_type: Any, config_cls: type, model_cls: type) -> None:
    """Make PEFT know a method; doing it again changes nothing.

    The prefix of a method's parameters is ``model_cls.prefix``. A method that subclasses LoRA shares ``lora_``: PEFT
    derives what to save from the layers, and uses the prefix only to recognise adapter parameters by name.

    Args:
        peft_type: what ``add_peft_type`` returned.
        config_cls: configuration class; its ``peft_type`` is ``peft_type``.
        model_cls: tuner class with a ``prefix``.

    Raises:
        RuntimeError: PEFT, or another package, already has a method of that name.
    """
    found = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if found is not None:
        if (found.__module__, found.__qualname__) == (config_cls.__module__, config_cls.__qualname__):
            return
        raise RuntimeError(
            f"register {peft_type.value!r} with PEFT: the name is taken by {found.__module__}.{found.__qualname__}; "
            "nothing was overwritten. Uninstall one of the two packages or load them in separate processes."
        )
    prefix: str = model_cls.prefix  # type: ignore[attr-defined]  # every PEFT tuner has one
    if isinstance(peft_type, NamedType):
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix
        return
    register_peft_method(name=peft_type.value.lower(), config_cls=config_cls, model_cls=model_cls, prefix=prefix)
