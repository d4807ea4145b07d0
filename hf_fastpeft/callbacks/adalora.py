"""Allocates ranks in a Trainer run: for PEFT's AdaLoRA and for this package's adaptive LoRA (arXiv 2303.10512)."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from hf_fastpeft.callbacks._gates import checkpoint_file, refuse_engines, refuse_merged, restore_float32
from hf_fastpeft.errors import AdapterError
from hf_fastpeft.tuners.adalora.adapter import (
    AllocatedAdapter,
    active_adapters,
    cut_layers,
    freeze_ranknum,
    has_layers,
    patterns_of,
    refuse_cut_layers,
    refuse_shards,
    take_over,
)
from hf_fastpeft.tuners.adalora.allocate import add_orthogonality_gradient_
from hf_fastpeft.tuners.adalora.reader import allocated
from hf_fastpeft.tuners.adalora.schedule import Schedule

__all__ = ["STATE_FILE", "AdaLoraCallback"]

STATE_FILE = "adalora_state.safetensors"
_STATE_FORMAT = "1"


class AdaLoraCallback(TrainerCallback):
    """Allocates the ranks of the active AdaLoRA or adaptive LoRA adapters of the model that a Trainer trains.

    Pass it to the trainer's constructor: ``Trainer(..., callbacks=[AdaLoraCallback()])``. It takes PEFT's
    ``AdaLoraConfig`` (whose ``total_step`` may be any number: the trainer's ``max_steps`` takes its place, in the
    configuration too) and ``hf_fastpeft.AdaptiveLoraConfig``.

    After each optimizer step that was not skipped it scores the components by the step's gradients and the values
    after it, as AdaLoRA's authors do, and switches off those beyond the budget; from the end of the schedule on the
    pattern is fixed. Before the step it adds the gradient of the orthogonality term, once, whatever the accumulation,
    the trainer's loss or the number of processes. It adds it after clipping, so it takes no part in the logged
    gradient norm and is not shortened itself; its norm over all N matrices is at most ``2 orth_reg_weight s /
    sqrt(N)``, s the largest singular value among them. The losses that a trainer logs are the task's, in training and
    evaluation.

    Checkpoints hold the full tensors, and ``adalora_state.safetensors`` with the allocator's state: a resumed run
    equals a straight one bit for bit. When training ends, ``rank_pattern`` of PEFT's configuration is set, with which
    PEFT saves only the ranks that are left; adaptive LoRA is cut by ``hf_fastpeft.export_to_lora``.

    Attributes:
        history: ``(step, {layer path: ranks kept by the last allocation})`` at every logging step. Training logs and
            ``trainer.state.log_history`` get ``adalora/kept_rank``, the mean over layers.

    Raises:
        ValueError: on train begin, a schedule or target that the run or the layers do not allow.
        RuntimeError: on train begin, under DeepSpeed, whose engine has cleared the gradients; under FSDP1, which
            flattens the factors; with a schedule-free optimizer; for merged or sharded (FSDP2) adapters; in training,
            where no gradients are left after the optimizer's step.
        AdapterError: on train begin, ranks of PEFT's adapter are cut already, or the checkpoint's state is unreadable.
    """

    def __init__(self) -> None:
        self.history: list[tuple[int, dict[str, int]]] = []
        self._adapters: list[AllocatedAdapter] = []
        self._tuners: list[Any] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # TRL has by now cast what trains to bfloat16; the optimizer is created later and sees float32 gates.
        if model is None:
            return
        for adapter in active_adapters(model):
            if adapter.runtime is not None:
                restore_float32(adapter.gates, optimizer=None)
                continue
            freeze_ranknum(adapter)
            if not cut_layers(adapter):
                adapter.config.rank_pattern = (
                    None  # of an earlier run; a checkpoint's full tensors must find full ones
                )
        take_over(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self._release()
        self.history = []
        if has_layers(model):
            refuse_engines("AdaLoraCallback", args, model, optimizer, possible="DDP")
        self._adapters = active_adapters(model)
        if not self._adapters:
            warnings.warn(
                "AdaLoraCallback: the model has no trainable AdaLoRA or adaptive LoRA layer, so no ranks are "
                "allocated. Give the trainer an AdaLoraConfig or AdaptiveLoraConfig, activate the adapter, or drop "
                "the callback.",
                UserWarning,
                stacklevel=2,
            )
            return
        for adapter in self._adapters:
            refuse_merged("AdaLoraCallback", zip((t.path for t in adapter.triplets), adapter.layers, strict=True))
            refuse_shards(adapter)
            if adapter.runtime is None:
                refuse_cut_layers(adapter)
                freeze_ranknum(adapter)
                adapter.config.total_step = state.max_steps
                adapter.config.rank_pattern = None
            else:
                restore_float32(adapter.gates, optimizer)
            adapter.begin(state.max_steps)
        if state.global_step > 0:
            self._load_state(args, state)
        self._tuners = take_over(model)
        self._mark(True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if not self._adapters:
            return
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and scaler.is_enabled() and not (args.max_grad_norm and args.max_grad_norm > 0):
            # Clipping would have done it; gradients are compared and added to in their own units.
            scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
        for adapter in self._adapters:
            if adapter.config.orth_reg_weight > 0:
                add_orthogonality_gradient_(adapter.allocator.groups, adapter.config.orth_reg_weight)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if getattr(optimizer, "step_was_skipped", False):
            return
        for adapter in self._adapters:
            adapter.after_step(state.global_step + 1)  # the trainer counts the step after this event

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for adapter in self._adapters:  # the optimizer skipped the step at which the pattern was due
            if not adapter.frozen and state.global_step >= adapter.schedule.freeze:
                adapter.freeze()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self._adapters or not ("loss" in logs or "train_runtime" in logs):
            return
        kept: dict[str, int] = {}
        for adapter in self._adapters:
            prefix = "" if len(self._adapters) == 1 else f"{adapter.name}/"
            kept |= {prefix + path: n for path, n in adapter.allocator.kept().items()}
        if not self.history or self.history[-1][0] != state.global_step:
            self.history.append((state.global_step, kept))
        values = {"adalora/kept_rank": sum(kept.values()) / len(kept)}
        logs.update(values)
        # Trainer.log files a copy of the logs before it calls callbacks.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not (self._adapters and state.is_world_process_zero and folder.is_dir()):
            return
        tensors = {
            f"{a.name}.{key}": tensor.contiguous()
            for a in self._adapters
            for key, tensor in a.allocator.state_dict().items()
        }
        content = {
            "step": state.global_step,
            "history": self.history,
            "adapters": {
                a.name: {"layers": a.allocator.paths, "schedule": _as_list(a.schedule), "frozen": a.frozen}
                for a in self._adapters
            },
        }
        metadata = {"format": _STATE_FORMAT, "content": json.dumps(content)}
        save_file(tensors, folder / STATE_FILE, metadata=metadata)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        tuners = {id(layer): tuner for tuner in self._tuners for layer in tuner.modules()}
        for adapter in self._adapters:
            patterns = patterns_of(adapter)
            left = sum(map(sum, patterns))
            if left > adapter.target:
                warnings.warn(
                    f"AdaLoraCallback: adapter {adapter.name!r} ends with {left} ranks over {len(patterns)} layers, "
                    f"of a target of {adapter.target}: the run ended, or load_best_model_at_end went back, to before "
                    f"step {adapter.schedule.freeze}, at which ranks are fixed. All {left} are kept.",
                    UserWarning,
                    stacklevel=2,
                )
            if adapter.runtime is None and all(id(layer) in tuners for layer in adapter.layers):
                names = {id(m): path for tuner in self._tuners for path, m in tuner.model.named_modules()}
                # A layer that lost all ranks keeps one, with its gate at zero: PEFT saves and loads empty factors, but
                # warns of a broken file.
                adapter.config.rank_pattern = {
                    f"{names[id(layer)]}.lora_E.{adapter.name}": pattern if any(pattern) else [True, *pattern[1:]]
                    for layer, pattern in zip(adapter.layers, patterns, strict=True)
                }
        self._release()

    def _mark(self, active: bool) -> None:
        for tuner in self._tuners:
            tuner.allocated_by_callback = active
        for adapter in self._adapters:
            if adapter.runtime is not None:
                adapter.runtime.pruned_by_callback = active
            elif active:
                allocated.update((layer, True) for layer in adapter.layers)

    def _release(self) -> None:
        self._mark(False)
        self._adapters, self._tuners = [], []

    def _load_state(self, args: Any, state: Any) -> None:
        """Allocators and history as the checkpoint has them; the adapter's tensors are loaded by now."""
        file = checkpoint_file(args, state, STATE_FILE)
        if file is None:
            late = [adapter for adapter in self._adapters if state.global_step >= adapter.schedule.freeze]
            for adapter in late:  # past the last allocation the gates say everything
                adapter.allocator.keep_nonzero()
                adapter.frozen = True
            if len(late) == len(self._adapters):
                return
            warnings.warn(
                f"AdaLoraCallback: no {STATE_FILE} in the checkpoint of step {state.global_step}: scores start from "
                "nothing, so the run is not the one that was interrupted.",
                UserWarning,
                stacklevel=3,
            )
            return
        content, tensors = _read_state(file, state.global_step)
        for adapter in self._adapters:
            saved = content["adapters"].get(adapter.name)
            if saved is None or saved["layers"] != adapter.allocator.paths:
                found = "not in it" if saved is None else f"over {len(saved['layers'])} other layers in it"
                raise AdapterError(f"resume from {str(file)!r}: adapter {adapter.name!r} is {found}")
            prefix = f"{adapter.name}."
            try:
                adapter.allocator.load_state_dict(
                    {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
                )
            except ValueError as error:
                raise AdapterError(f"resume from {str(file)!r}: adapter {adapter.name!r}: {error}") from error
            adapter.frozen = bool(saved["frozen"])
            if saved["schedule"] != _as_list(adapter.schedule):
                warnings.warn(
                    f"AdaLoraCallback: adapter {adapter.name!r} had (tinit, freeze, delta_t) = "
                    f"{tuple(saved['schedule'])} before and has {tuple(_as_list(adapter.schedule))} now: the number "
                    "of steps or the configuration changed, so the run is not the one that was interrupted.",
                    UserWarning,
                    stacklevel=3,
                )
        self.history = [(int(step), dict(kept)) for step, kept in content["history"]]


def _as_list(schedule: Schedule) -> list[int]:
    return [schedule.tinit, schedule.freeze, schedule.delta_t]


def _read_state(file: Path, step: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # not a dict
        content = json.loads(metadata["content"])
        found = (metadata["format"], content["step"])
        for adapter in content["adapters"].values():
            adapter["layers"], adapter["schedule"], adapter["frozen"]
        iter(content["history"])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"resume from {str(file)!r}: not an AdaLoRA state file ({error!r})") from error
    if found != (_STATE_FORMAT, step):
        raise AdapterError(
            f"resume from {str(file)!r}: found format and step {found}; possible: {(_STATE_FORMAT, step)}. The folder "
            "mixes files of different checkpoints."
        )
    return content, tensors
