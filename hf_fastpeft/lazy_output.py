"""A CausalLM's output whose logits are computed when somebody reads them.

Whoever reads a value gets a tensor, by attribute, key, position, iteration or unpacking. Callers that only hand the
output on are told apart by their code and get the recipe instead: accelerate, which rebuilds the mapping to convert
half precision to float32, and torch's DDP and FSDP, which look for tensors that a backward starts from.
"""

import functools
import sys
from collections.abc import Callable, ItemsView, ValuesView
from dataclasses import dataclass, fields
from types import FrameType, new_class
from typing import Any, get_args

import accelerate.utils.operations
import torch
from transformers.utils import ModelOutput

__all__ = ["LazyLogits", "OutputWithLazyLogits", "lazy_output_class", "output_class_of"]


PASSED = (
    __name__,
    "dataclasses",
    "torch.utils._pytree",
    "transformers.utils.generic",
)  # between an output and who reads it
WRAPPERS = ("torch.distributed.", "torch.nn.parallel.")


class LazyLogits:
    """Stands for the logits in an output's mapping until they are read.

    Looks like a tensor as far as ``accelerate`` asks when it converts a half-precision output to float32.
    """

    def __init__(self, compute: Callable[[], torch.Tensor], dtype: torch.dtype) -> None:
        self.compute, self.dtype = compute, dtype

    def float(self) -> "LazyLogits":
        """The same in float32, as lazily."""
        return LazyLogits(lambda: self.compute().float(), torch.float32)


class OutputWithLazyLogits(ModelOutput):
    """Mixin over a stock output class; its instances are that class's, their logits in the autograd graph."""

    @property
    def logits(self) -> torch.Tensor | None:
        """``(batch, seq_len, vocab_size)``, in the dtype that stock's would have."""
        value = self.__dict__.get("logits")
        if isinstance(value, LazyLogits) and not _is_handed_on():
            value = self.logits = value.compute()
        return value

    @logits.setter
    def logits(self, value: Any) -> None:
        self.__dict__["logits"] = value

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, str):
            value = super().get(k)
            if value is None:
                return super().__getitem__(k)  # its KeyError
            return self.logits if isinstance(value, LazyLogits) else value
        keys = list(self.keys())[k]  # only what was asked for: outputs[0] is the loss
        return self[keys] if isinstance(keys, str) else tuple(self[key] for key in keys)

    def get(self, key: str, default: Any = None) -> Any:
        """As a dictionary's."""
        value = super().get(key, default)
        return self.logits if isinstance(value, LazyLogits) else value

    def items(self) -> ItemsView[str, Any]:
        """As a dictionary's."""
        _ = self.logits
        return super().items()  # type: ignore[no-any-return]

    def values(self) -> ValuesView[Any]:
        """As a dictionary's."""
        _ = self.logits
        return super().values()  # type: ignore[no-any-return]

    def __reduce__(self) -> Any:
        """A pickle or copy carries the tensors, and is of the stock class."""
        (stock,) = (base for base in type(self).__bases__ if base is not OutputWithLazyLogits)
        return _rebuild, (stock, {field.name: getattr(self, field.name) for field in fields(self)})


def _rebuild(stock: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    return stock(**values)


def _is_handed_on() -> bool:
    """Whether whoever asks for the logits reads no value of them."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller.f_globals.get("__name__") in PASSED:
        caller = caller.f_back
    if caller is not None and caller.f_code is accelerate.utils.operations.recursively_apply.__code__:
        return str(getattr(caller.f_locals.get("func"), "__qualname__", "")).startswith("convert_to_fp32.")
    return caller is not None and str(caller.f_globals.get("__name__")).startswith(WRAPPERS)


@functools.cache
def lazy_output_class(stock: type[ModelOutput]) -> type[OutputWithLazyLogits]:
    """The subclass of a stock output class whose logits are computed when they are read."""
    name = f"{stock.__name__}WithLazyLogits"
    made = new_class(name, (OutputWithLazyLogits, stock), exec_body=lambda body: body.update(__module__=__name__))
    return dataclass(made)


@functools.cache
def output_class_of(forward: Callable[..., Any]) -> type[ModelOutput] | None:
    """The output class that a stock forward is annotated with; None unless it is one with a loss and logits."""
    annotation = getattr(forward, "__annotations__", {}).get("return")
    found = [a for a in get_args(annotation) or (annotation,) if isinstance(a, type) and issubclass(a, ModelOutput)]
    if len(found) != 1 or not {"loss", "logits"} <= {field.name for field in fields(found[0])}:
        return None
    return found[0]
