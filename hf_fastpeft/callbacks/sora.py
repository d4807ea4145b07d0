"""Prunes SoRA's gates in a Trainer run, after the optimizer's step (arXiv 2311.11696, section 3.2)."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback

from hf_fastpeft.callbacks._decay import DecayExemption
from hf_fastpeft.callbacks._gates import checkpoint_file, refuse_engines, refuse_merged, restore_float32
from hf_fastpeft.callbacks._rates import GateRates
from hf_fastpeft.errors import AdapterError
from hf_fastpeft.tuners.sora.layer import GatedLinear, SoraLayer, SoraRuntime
from hf_fastpeft.tuners.sora.prune import PruneWindow, keep_largest_, lambda_share, rank_budget, soft_threshold_

__all__ = ["STATE_FILE", "SoraCallback"]

STATE_FILE = "sora_state.json"
_STATE_FORMAT = 1
_MAX_SCHEDULE_SAMPLES = 2000


@dataclass
class _Adapter:
    """The gates of one active adapter, in the order of the model's modules."""

    name: str
    runtime: SoraRuntime
    paths: list[str] = field(default_factory=list)
    gates: list[nn.Parameter] = field(default_factory=list)
    matrices: list[nn.Parameter] = field(default_factory=list)
    window: PruneWindow = field(default_factory=lambda: PruneWindow(0, 0))
    alive: list[torch.Tensor] | None = None  # set when the settling phase begins

    @cached_property
    def rates(self) -> GateRates:
        return GateRates("SoraCallback", self.gates, self.paths)

    def local_gates(self) -> list[torch.Tensor]:
        return [_local(gate) for gate in self.gates]

    @property
    def target(self) -> int | None:
        target_r = self.runtime.config.target_r
        return None if target_r is None else max(round(target_r * len(self.gates)), 1)

    @property
    def protected(self) -> int:
        """Ranks that ``min_rank`` keeps."""
        return sum(min(self.runtime.config.min_rank, gate.numel()) for gate in self.gates)

    @property
    def under_pressure(self) -> bool:
        """Whether ``sparse_lambda`` acts."""
        return self.target is None or self.runtime.config.reassign_ranks

    def share(self, step: int) -> float:
        """Of ``sparse_lambda`` at a step of the window."""
        config = self.runtime.config
        return lambda_share(step, self.window, config.lambda_schedule, stages=config.lambda_stages)


class SoraCallback(TrainerCallback):
    """Prunes the active SoRA adapters of the model that a Trainer trains.

    Pass it to the trainer's constructor: ``Trainer(..., callbacks=[SoraCallback()])``. Its settings are those of each
    adapter's ``SoraConfig``. Each step it takes the learning rate that the optimizer has just used for each gate
    (its parameter group's, whichever that is) and lowers the gate by ``lr * sparse_lambda`` (in units of ``gamma``;
    ``lambda_schedule`` lets it grow), or zeroes the smallest ones of all layers down to the rank budget if
    ``target_r`` is given, or does both with ``reassign_ranks``. Steps that the optimizer skipped, steps outside the
    pruning window and steps in which the adapter is switched off change nothing; in the settling phase zero gates are
    held at zero. Weight decay never reaches the gates.

    A resumed run equals a straight one bit for bit. Checkpoints carry ``sora_state.json`` (window and history).

    Attributes:
        history: ``(step, {layer path: ranks left})`` at every logging step. Training logs and
            ``trainer.state.log_history`` get ``sora/kept_rank``, the mean over layers.

    Raises:
        ValueError: on train begin, a schedule or target that the run or the layers do not allow.
        RuntimeError: on train begin, under DeepSpeed, whose optimizer keeps its own copy of the gates; under FSDP1,
            which flattens them; with a schedule-free optimizer; for gates that the optimizer does not hold, or moves
            by steps other than its learning rate's; for merged adapters; for sharded gates (FSDP2) with ``target_r``
            or ``min_rank``.
        AdapterError: on train begin, the checkpoint's ``sora_state.json`` cannot be read.
    """

    def __init__(self) -> None:
        self.history: list[tuple[int, dict[str, int]]] = []
        self._adapters: list[_Adapter] = []
        self._exemption: DecayExemption | None = None
        self._saw_init = False

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # TRL has by now cast what trains to bfloat16; the optimizer is created later and sees float32 gates.
        self._saw_init = True
        for adapter in _active_adapters(model) if model is not None else []:
            restore_float32(adapter.gates, optimizer=None)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        self._release()
        self.history = []
        if any(True for _ in _sora_layers(model)):
            possible = "DDP, or FSDP2 with target_r=None and min_rank=0"
            refuse_engines("SoraCallback", args, model, optimizer, possible=possible)
        self._adapters = _active_adapters(model)
        if not self._adapters:
            warnings.warn(
                "SoraCallback: the model has no trainable SoRA layer, so nothing is pruned. Give the trainer a "
                "SoraConfig, activate the adapter, or drop the callback.",
                UserWarning,
                stacklevel=2,
            )
            return
        refuse_merged("SoraCallback", _sora_layers(model))
        for adapter in self._adapters:
            restore_float32(adapter.gates, optimizer)
            _refuse_shards(adapter)
            adapter.window = PruneWindow.of(adapter.runtime.config, state.max_steps)
            _refuse_settings(adapter)
            adapter.rates.find(optimizer)
            if adapter.under_pressure:
                adapter.rates.rates(optimizer)
                if state.global_step == 0:
                    _warn_about_schedule(adapter, optimizer, lr_scheduler)
            adapter.runtime.pruned_by_callback = True
        gates = [gate for adapter in self._adapters for gate in adapter.gates]
        self._exemption = DecayExemption.install(optimizer, gates)
        if state.global_step > 0:
            self._load_state(args, state)
            if not self._saw_init and any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
                warnings.warn(
                    "SoraCallback: on a quantised model the checkpoint was loaded into bfloat16 gates, which lose "
                    "digits. Pass the callback to the trainer's constructor instead of add_callback.",
                    UserWarning,
                    stacklevel=2,
                )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for adapter in self._adapters:
            pruned = adapter.window.first < adapter.window.end
            if adapter.alive is None and pruned and state.global_step >= adapter.window.end:
                adapter.alive = [(gate != 0).to(gate.dtype) for gate in adapter.local_gates()]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if getattr(optimizer, "step_was_skipped", False):
            return
        for adapter in self._adapters:
            _prune(adapter, state.global_step, optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self._adapters or not ("loss" in logs or "train_runtime" in logs):
            return
        kept = _count(self._adapters)
        if not self.history or self.history[-1][0] != state.global_step:
            self.history.append((state.global_step, kept))
        values = {"sora/kept_rank": sum(kept.values()) / len(kept)}
        logs.update(values)
        # Trainer.log files a copy of the logs before it calls callbacks.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._adapters and state.is_world_process_zero and folder.is_dir():
            content = {
                "format": _STATE_FORMAT,
                "step": state.global_step,
                "windows": {a.name: [a.window.first, a.window.end] for a in self._adapters},
                "history": self.history,
            }
            (folder / STATE_FILE).write_text(json.dumps(content), encoding="utf-8")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for adapter in self._adapters:
            if adapter.target is None:
                continue
            left = sum(_count([adapter]).values())
            if left > max(adapter.target, adapter.protected):
                warnings.warn(
                    f"SoraCallback: adapter {adapter.name!r} ends with {left} ranks over {len(adapter.gates)} layers, "
                    f"of a target of {adapter.target}: the run ended, or load_best_model_at_end went back, to before "
                    f"step {adapter.window.end}, at which pruning ends. All {left} are kept.",
                    UserWarning,
                    stacklevel=2,
                )
        self._release()

    def _release(self) -> None:
        if self._exemption is not None:
            self._exemption.remove()
            self._exemption = None
        for adapter in self._adapters:
            adapter.runtime.pruned_by_callback = False
        self._adapters = []

    def _load_state(self, args: Any, state: Any) -> None:
        """History and window of the checkpoint; the gates themselves are in the adapter's own file."""
        file = checkpoint_file(args, state, STATE_FILE)
        if file is None:
            return
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            found = (content["format"], content["step"])
            history = [(int(step), {str(k): int(v) for k, v in kept.items()}) for step, kept in content["history"]]
            windows = {name: PruneWindow(*window) for name, window in content["windows"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"resume from {str(file)!r}: not a SoRA state file ({error!r})") from error
        if found != (_STATE_FORMAT, state.global_step):
            raise AdapterError(
                f"resume from {str(file)!r}: found format and step {found}; possible: "
                f"{(_STATE_FORMAT, state.global_step)}. The folder mixes files of different checkpoints."
            )
        for adapter in self._adapters:
            before = windows.get(adapter.name, adapter.window)
            if before != adapter.window:
                warnings.warn(
                    f"SoraCallback: adapter {adapter.name!r} was pruned in steps {before.first} to {before.end} "
                    f"before, and now in {adapter.window.first} to {adapter.window.end}: the number of steps or the "
                    "ratios changed, so the run is not the one that was interrupted.",
                    UserWarning,
                    stacklevel=2,
                )
        self.history = history


def _prune(adapter: _Adapter, step: int, optimizer: Any) -> None:
    if not any(gate.requires_grad for gate in adapter.gates):  # another adapter is active, or this one is disabled
        return
    if adapter.alive is not None:
        torch._foreach_mul_(adapter.local_gates(), adapter.alive)
        return
    if not adapter.window.first <= step < adapter.window.end:
        return
    config = adapter.runtime.config
    if adapter.under_pressure:
        pressure = config.sparse_lambda * adapter.share(step)
        for rate, members in adapter.rates.rates(optimizer):
            soft_threshold_([_local(gate) for gate in members], rate * pressure, min_rank=config.min_rank)
    if adapter.target is not None:
        gates = adapter.local_gates()
        total = sum(gate.numel() for gate in gates)
        budget = rank_budget(step, adapter.window, total=total, target=adapter.target)
        keep_largest_(gates, budget, min_rank=config.min_rank)


def _active_adapters(model: nn.Module) -> list[_Adapter]:
    found: dict[str, _Adapter] = {}
    for path, layer in _sora_layers(model):
        active: list[str] = layer.active_adapters  # type: ignore[attr-defined]  # from PEFT's layer
        for name in active:
            gated = dict(layer.lora_A.items()).get(name)
            if not isinstance(gated, GatedLinear) or not gated.gate.weight.requires_grad:
                continue
            adapter = found.setdefault(name, _Adapter(name, cast(SoraRuntime, gated.gate.runtime)))
            adapter.paths.append(path.removeprefix("base_model.model."))
            adapter.gates.append(gated.gate.weight)
            adapter.matrices += [gated.weight, layer.lora_B[name].weight]  # type: ignore[list-item]  # nn.Linear
    return list(found.values())


def _sora_layers(model: nn.Module) -> Iterator[tuple[str, SoraLayer]]:
    # By class over all modules: transformers' add_adapter gives no PeftModel to ask.
    for path, module in model.named_modules():
        if isinstance(module, SoraLayer):
            yield path, module


def _local(t: torch.Tensor) -> torch.Tensor:
    shard: torch.Tensor = t.to_local() if hasattr(t, "to_local") else t.data
    return shard


def _count(adapters: list[_Adapter]) -> dict[str, int]:
    """Ranks left per layer; one host synchronisation."""
    names, counts = [], []
    for adapter in adapters:
        for path, gate in zip(adapter.paths, adapter.gates, strict=True):
            whole = gate.full_tensor() if hasattr(gate, "full_tensor") else gate
            names.append(path if len(adapters) == 1 else f"{adapter.name}/{path}")
            counts.append(torch.count_nonzero(whole.detach()).to(adapters[0].gates[0].device, non_blocking=True))
    return dict(zip(names, torch.stack(counts).tolist(), strict=True))


def _refuse_shards(adapter: _Adapter) -> None:
    config = adapter.runtime.config
    sharded = any(hasattr(gate, "to_local") for gate in adapter.gates)
    if sharded and (config.target_r is not None or config.min_rank):
        raise RuntimeError(
            f"SoraCallback: the gates of adapter {adapter.name!r} are sharded (FSDP2) with "
            f"target_r={config.target_r!r}, min_rank={config.min_rank!r}: ranks cannot be compared across shards; "
            "possible: sparse_lambda with target_r=None and min_rank=0, or DDP."
        )


def _refuse_settings(adapter: _Adapter) -> None:
    """Settings that only the run and the layers show to be wrong."""
    config, window = adapter.runtime.config, adapter.window
    asked = f"SoraCallback: adapter {adapter.name!r}"
    num_steps = window.end - window.first
    if adapter.under_pressure and config.lambda_schedule == "stages" and config.lambda_stages > num_steps:
        raise ValueError(
            f"{asked}: lambda_stages={config.lambda_stages!r}: the run prunes in {num_steps} steps, {window.first} to "
            f"{window.end}; possible: at most {num_steps} stages, or a longer run"
        )
    total = sum(gate.numel() for gate in adapter.gates)
    if adapter.target is not None and adapter.target > total:
        raise ValueError(
            f"{asked}: target_r={config.target_r!r} over {len(adapter.gates)} layers are {adapter.target} ranks, and "
            f"the layers have {total}; possible: a target_r of at most {total / len(adapter.gates):g}, or a larger r"
        )


def _warn_about_schedule(adapter: _Adapter, optimizer: Any, lr_scheduler: Any) -> None:
    """Tell a run that cannot prune, or that must prune everything, before it starts."""
    config = adapter.runtime.config
    matrices = {id(p) for p in adapter.matrices}
    decayed = [group for group in optimizer.param_groups if group.get("weight_decay", 0.0)]
    if not any(id(p) in matrices for group in decayed for p in group["params"]):
        warnings.warn(
            "SoraCallback: no weight decay on A and B: they can grow while their gates shrink, which evades the "
            "pruning. Set weight_decay in the training arguments (0.01 to 0.1); it does not act on the gates.",
            UserWarning,
            stacklevel=3,
        )
    groups = adapter.rates.find(optimizer)
    sums = [_sum_lr(lr_scheduler, index, adapter) for index in groups]
    known = [pair for pair in sums if pair is not None]
    if len(known) < len(sums):
        return
    # of each group: how far its gates can fall, how far they must, and its smallest and largest gate
    falls = []
    for (sum_lr, weighed), gates in zip(known, groups.values(), strict=True):
        sizes = torch.cat([_local(gate).abs().to("cpu") for gate in gates]) * config.gate_scale
        if not len(sizes):  # FSDP2: all of them lie on other processes
            return
        reach = config.sparse_lambda * config.gate_scale * weighed
        # Adam raises a gate by lr a step at most, and the pressure lowers it by lr * sparse_lambda * share.
        falls.append((reach, reach - config.gate_scale * sum_lr, sizes.min().item(), sizes.max().item()))
    sum_lr = max(sum_lr for sum_lr, _ in known)
    asked = (
        f"sparse_lambda={config.sparse_lambda:g}, gate_scale={config.gate_scale:g}, "
        f"lambda_schedule={config.lambda_schedule!r} and a learning rate that sums to {sum_lr:.3g} over steps "
        f"{adapter.window.first} to {adapter.window.end}"
    )
    aim, instead = ("prune", ", or set target_r.") if adapter.target is None else ("free a rank", ".")
    if all(reach < smallest for reach, _, smallest, _ in falls):
        reach, _, smallest, _ = max(falls, key=lambda fall: fall[0] / fall[2])
        warnings.warn(
            f"SoraCallback: this schedule cannot {aim}: {asked} lower a gate by {reach:.3g} at most, and the smallest "
            f"is {smallest:.3g}. Raise gate_scale, sparse_lambda (up to 1) or the steps{instead}",
            UserWarning,
            stacklevel=3,
        )
    elif all(least >= largest for _, least, _, largest in falls):
        warnings.warn(
            f"SoraCallback: this schedule must prune every rank: {asked} lower each gate faster than Adam can raise "
            f"it. Lower sparse_lambda below 1{instead}",
            UserWarning,
            stacklevel=3,
        )


def _sum_lr(lr_scheduler: Any, index: int, adapter: _Adapter) -> tuple[float, float] | None:
    """Learning rate of a parameter group summed over the window, as it is and times the share of the pressure.

    None where the schedule is not known ahead.
    """
    lambdas = getattr(lr_scheduler, "lr_lambdas", None)
    if not lambdas or index >= len(lambdas):
        return None
    steps = range(adapter.window.first, adapter.window.end)
    sampled = steps[:: max(1, len(steps) // _MAX_SCHEDULE_SAMPLES)]
    rates = [float(lr_scheduler.base_lrs[index]) * float(lambdas[index](step)) for step in sampled]
    weighed = [rate * adapter.share(step) for rate, step in zip(rates, sampled, strict=True)]
    return sum(rates) / len(sampled) * len(steps), sum(weighed) / len(sampled) * len(steps)
