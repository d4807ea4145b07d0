"""One trainable adapter whose ranks a callback allocates: where its layers are, and what happens after each step."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn

from hf_fastpeft.errors import AdapterError
from hf_fastpeft.tuners._gated import GatedLinear, GateRuntime
from hf_fastpeft.tuners.adalora.allocate import RankAllocator, Triplet
from hf_fastpeft.tuners.adalora.layer import AdaptiveLoraLayer
from hf_fastpeft.tuners.adalora.model import TaskLossAdaLoraModel
from hf_fastpeft.tuners.adalora.schedule import Schedule

__all__ = [
    "AllocatedAdapter",
    "active_adapters",
    "cut_layers",
    "freeze_ranknum",
    "has_layers",
    "patterns_of",
    "refuse_cut_layers",
    "refuse_shards",
    "take_over",
    "triplets_of",
]

_PREFIX = "base_model.model."


@dataclass
class AllocatedAdapter:
    """One active adapter: its layers in the model's order, what allocates their ranks, and when.

    Attributes:
        runtime: of adaptive LoRA; None for PEFT's AdaLoRA.
        target: ranks of all layers together at the end.
        frozen: the final pattern has been chosen.
    """

    name: str
    config: Any
    runtime: GateRuntime | None
    layers: list[Any] = field(default_factory=list)
    triplets: list[Triplet] = field(default_factory=list)
    schedule: Schedule = field(default_factory=lambda: Schedule(0, 1, 1))
    target: int = 0
    frozen: bool = False
    _allocator: RankAllocator | None = None

    @property
    def gates(self) -> list[Any]:
        return [t.E for t in self.triplets]

    @property
    def constant(self) -> bool:
        return self.runtime is not None and self.config.budget == "constant"

    @property
    def allocator(self) -> RankAllocator:
        assert self._allocator is not None
        return self._allocator

    def begin(self, max_steps: int) -> None:
        """Set up for a run of ``max_steps`` steps."""
        config, total = self.config, sum(t.E.numel() for t in self.triplets)
        self.target = max(round(config.target_r * len(self.triplets)), 1)
        if self.target > total:
            raise ValueError(
                f"AdaLoraCallback: adapter {self.name!r}: target_r={config.target_r!r} over {len(self.triplets)} "
                f"layers are {self.target} ranks, and the layers have {total}; possible: a target_r of at most "
                f"{total / len(self.triplets):g}, or a larger init_r"
            )
        self.schedule = _schedule_of_peft(config, max_steps) if self.runtime is None else config.schedule(max_steps)
        self._allocator = RankAllocator(
            self.triplets,
            scorer="sensitivity" if self.runtime is None else config.scorer,
            beta1=config.beta1,
            beta2=config.beta2,
            start=self.target if self.constant else None,
        )

    def after_step(self, step: int) -> None:
        """What follows optimizer step ``step``, counted from 1, while its gradients are still there."""
        if self.frozen:
            self.allocator.hold_()
            return
        self.allocator.observe()
        if step >= self.schedule.freeze:
            self.freeze()
        elif self.constant:
            if self.schedule.allocates(step):
                count = round(self.config.regrow_ratio * self.target * self.schedule.left(step))
                self.allocator.move_(count, self.target)
            self.allocator.hold_()
        elif self.schedule.allocates(step):
            start = self.allocator.total
            self.allocator.keep_(self.schedule.budget(step, start=start, target=self.target))

    def freeze(self) -> None:
        """Choose the final pattern."""
        self.frozen = True
        if self.constant:
            self.allocator.hold_()
        else:
            self.allocator.keep_(self.target)


def _schedule_of_peft(config: Any, max_steps: int) -> Schedule:
    if config.tinit + config.tfinal >= max_steps or config.deltaT < 1:
        raise ValueError(
            f"AdaLoraConfig: tinit={config.tinit!r}, tfinal={config.tfinal!r}, deltaT={config.deltaT!r} in a run of "
            f"{max_steps} steps: none is left to allocate ranks in; possible: a sum of tinit and tfinal below "
            f"{max_steps}, and deltaT from 1"
        )
    return Schedule(config.tinit, max_steps - config.tfinal, config.deltaT)


def has_layers(model: nn.Module) -> bool:
    return any(isinstance(layer, (AdaLoraLayer, AdaptiveLoraLayer)) for layer in model.modules())


def active_adapters(model: nn.Module) -> list[AllocatedAdapter]:
    found: dict[str, AllocatedAdapter] = {}
    # By class over all modules: transformers' add_adapter gives no PeftModel to ask.
    for path, layer in model.named_modules():
        if not isinstance(layer, (AdaLoraLayer, AdaptiveLoraLayer)):
            continue
        for name, triplet, runtime in triplets_of(path.removeprefix(_PREFIX), layer):
            if not triplet.E.requires_grad:
                continue
            config = model.peft_config[name] if runtime is None else runtime.config  # type: ignore[index]
            adapter = found.setdefault(name, AllocatedAdapter(name, config, runtime))
            adapter.layers.append(layer)
            adapter.triplets.append(triplet)
    return list(found.values())


def triplets_of(path: str, layer: Any) -> Iterator[tuple[str, Triplet, GateRuntime | None]]:
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        A, B = layer.lora_A[name], layer.lora_B[name]
        if isinstance(A, GatedLinear):
            scaling = layer.scaling[name] * A.gate.scale
            yield name, Triplet(path, A.weight, B.weight, A.gate.weight, scaling), A.gate.runtime
        elif A.shape[0]:
            yield name, Triplet(path, A, B, layer.lora_E[name], 1.0), None


def take_over(model: nn.Module) -> list[Any]:
    """PEFT's tuners in the model, whose loss is the task's from now on."""
    tuners = [m for m in model.modules() if isinstance(m, AdaLoraModel)]
    for tuner in tuners:
        if type(tuner) is AdaLoraModel:
            tuner.__class__ = TaskLossAdaLoraModel
    return [tuner for tuner in tuners if isinstance(tuner, TaskLossAdaLoraModel)]


def freeze_ranknum(adapter: AllocatedAdapter) -> None:
    """Stop PEFT 0.21 from training ``ranknum``.

    Moving it to the base's device or dtype makes a new Parameter, which requires a gradient: on a GPU or a
    half-precision base the optimizer would change the scaling, and no checkpoint would have it.
    """
    for layer in adapter.layers:
        layer.ranknum[adapter.name].requires_grad_(False)


def cut_layers(adapter: AllocatedAdapter) -> list[str]:
    return [t.path for t in adapter.triplets if t.E.numel() != adapter.config.init_r]


def refuse_cut_layers(adapter: AllocatedAdapter) -> None:
    cut = cut_layers(adapter)
    if cut:
        raise AdapterError(
            f"AdaLoraCallback: {len(cut)} layers of adapter {adapter.name!r} do not have init_r="
            f"{adapter.config.init_r!r} ranks, {cut[0]!r} first: they were cut when the adapter was saved. Possible: "
            "train it further without this callback, at the ranks it has, or start from a training checkpoint."
        )


def refuse_shards(adapter: AllocatedAdapter) -> None:
    if any(hasattr(p, "to_local") for t in adapter.triplets for p in (t.A, t.B, t.E)):
        raise RuntimeError(
            f"AdaLoraCallback: adapter {adapter.name!r} is sharded (FSDP2): products of whole factors and ranks of "
            "different layers cannot be compared across shards; possible: DDP, or FSDP with the adapter left out."
        )


def patterns_of(adapter: AllocatedAdapter) -> list[list[bool]]:
    """Of each layer, which gates are not zero; one host synchronisation."""
    device = adapter.gates[0].device
    flat = torch.cat([(E.detach() != 0).flatten().to(device, non_blocking=True) for E in adapter.gates]).tolist()
    sizes, patterns = [E.numel() for E in adapter.gates], []
    for size in sizes:
        patterns.append(flat[:size])
        flat = flat[size:]
    return patterns
