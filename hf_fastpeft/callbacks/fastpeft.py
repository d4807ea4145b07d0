"""``patch_model`` from a Trainer's callback list, for scripts in which the trainer loads the model itself."""

import warnings
from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fastpeft.errors import NothingToPatchError
from hf_fastpeft.fast_module import FastModule
from hf_fastpeft.ops._backend import Impl
from hf_fastpeft.patching import Patched, patch_model, patched

__all__ = ["FastPeftCallback"]


class FastPeftCallback(TrainerCallback):
    """Patches the trainer's model once, when the trainer's constructor ends: after PEFT wrapped it, before accelerate.
    Where the model came later (``model_init``), when training begins.

    A model that the script patched itself is left as it is. Works in every Trainer and TRL trainer::

        trainer = SFTTrainer("HuggingFaceTB/SmolLM2-135M", ..., callbacks=[FastPeftCallback()])

    Attributes:
        patched: what was done, once it was; None before, and where the script had patched the model itself.
    """

    def __init__(
        self,
        *,
        impl: Impl = "auto",
        only: Collection[str] | None = None,
        routing: bool = True,
    ) -> None:
        """Takes the options of :func:`hf_fastpeft.patch_model`."""
        self.impl = impl
        self.only = only
        self.routing = routing
        self.patched: Patched | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Patch ``kwargs["model"]``."""
        self._patch(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Patch a model that came later: from ``model_init``, or this callback was added after the constructor."""
        try:
            self._patch(kwargs["model"])
        except NothingToPatchError as error:
            warnings.warn(f"FastPeftCallback: {error}; pass it to the trainer's constructor", stacklevel=2)

    def _patch(self, model: nn.Module) -> None:
        if not any(isinstance(module, FastModule) for module in model.modules()):
            self.patched = patched(patch_model(model, impl=self.impl, only=self.only, routing=self.routing))
