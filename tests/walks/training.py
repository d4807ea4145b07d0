"""Changes of state by training: optimizers of every implementation, and the ranks that adaptive methods cut."""

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import nn
from walks.steps import step
from walks.twins import Twins
from walks.views import draw_batch

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda ps: torch.optim.SGD(ps, 0.02, momentum=0.9, foreach=False),
    "SGD foreach": lambda ps: torch.optim.SGD(ps, 0.02, foreach=True),
    "SGD fused": lambda ps: torch.optim.SGD(ps, 0.02, momentum=0.9, fused=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, 1e-3, foreach=False),
    "AdamW foreach": lambda ps: torch.optim.AdamW(ps, 1e-3, foreach=True),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, 1e-3, fused=True),
    "Adam amsgrad fused": lambda ps: torch.optim.Adam(ps, 1e-3, fused=True, amsgrad=True),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, 1e-2, eps=1e-6, foreach=False),
    "Adagrad foreach": lambda ps: torch.optim.Adagrad(ps, 1e-2, eps=1e-6, foreach=True),
    "Adagrad fused": lambda ps: torch.optim.Adagrad(ps, 1e-2, eps=1e-6, fused=True),
    "RMSprop foreach": lambda ps: torch.optim.RMSprop(ps, 1e-3, eps=1e-6, foreach=True),
    "Adamax": lambda ps: torch.optim.Adamax(ps, 1e-3, eps=1e-6),
    "NAdam": lambda ps: torch.optim.NAdam(ps, 1e-3),
    "RAdam": lambda ps: torch.optim.RAdam(ps, 1e-3),
    "Adadelta": lambda ps: torch.optim.Adadelta(ps, 1e-1),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, 1e-3),
}


@step
def optimize(twins: Twins, rng: Random) -> str | None:
    """A few steps of some optimizer; kept for later, or one that was."""
    if twins.dtype != torch.float64:
        return None
    kept = bool(twins.optimizers) and rng.random() < 0.5
    kind, batches = rng.choice([*OPTIMIZERS]), [draw_batch(rng) for _ in range(rng.randint(1, 3))]
    for batch in batches:
        batch["labels"] = batch["input_ids"]  # a mean over no label is NaN
    if not kept:
        trained = [[p for p in model.parameters() if p.requires_grad] for model in twins.models]
        if not trained[0]:
            return None
        twins.optimizers = [OPTIMIZERS[kind](list(ps)) for ps in trained]
    to_none = rng.random() < 0.7

    def train(model: Any) -> list[torch.Tensor]:
        optimizer, losses = twins.optimizers[0 if model is twins.stock else 1], []
        for batch in batches:
            optimizer.zero_grad(set_to_none=to_none)
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    kind = type(twins.optimizers[0]).__name__ if kept else kind
    twins.both(train, what=f"optimizer {kind}")
    twins.compare_state(f"optimizer {kind}")
    twins.align()
    return f"{len(batches)} steps of {kind}{' (kept)' if kept else ''}"


@step
def allocate_ranks(twins: Twins, rng: Random) -> str | None:
    """AdaLoRA's masks, from the gradients of the last backward; SoRA's gates at zero."""
    if twins.dtype != torch.float64 or not twins.is_peft or twins.method not in ("adalora", "sora"):
        return None
    at, name = rng.randint(1, 39), rng.choice(twins.names)

    @torch.no_grad()
    def allocate(model: Any) -> None:
        if twins.method == "adalora":
            model.base_model.update_and_allocate(at)
        else:
            for path, p in model.named_parameters():
                if "gate" in path and f".{name}." in path:
                    p.data[: len(p) // 2] = 0

    twins.both(allocate, what="allocate ranks")
    return f"step {at}" if twins.method == "adalora" else f"half of {name}'s gates"
