"""How SoRA's gates are pruned: proximal step (arXiv 2311.11696, eq. 6), its schedule, and rank budget.

`soft_threshold_` by ``t``, then `keep_largest_` to ``k`` ranks, is the proximal operator of both together:

    argmin_x  |x - g|² / 2 + t |x|_1   over all x with at most k entries that are not zero

Everything runs on the gates' device with a fixed number of operations a step and no host synchronisation.
"""

import math
from dataclasses import dataclass

import torch

from hf_fastpeft.tuners.sora.config import SoraConfig

__all__ = ["PruneWindow", "keep_largest_", "lambda_share", "rank_budget", "soft_threshold_"]

Gates = list[torch.Tensor]


@dataclass(frozen=True)
class PruneWindow:
    """Steps in which gates are pruned: ``first <= step < end``, steps counted from 0."""

    first: int
    end: int

    @classmethod
    def of(cls, config: SoraConfig, max_steps: int) -> "PruneWindow":
        """The window that a configuration gives for a run of ``max_steps`` optimizer steps."""
        first = math.floor(config.warmup_ratio * max_steps)
        return cls(first, max_steps - math.floor(config.settle_ratio * max_steps))


def rank_budget(step: int, window: PruneWindow, *, total: int, target: int) -> int:
    """Ranks allowed after ``step``: ``total`` before the window, then a cubic fall, ``target`` from its last step on.

    Never rises with ``step``. Source: AdaLoRA, arXiv 2303.10512, eq. 13.
    """
    if step < window.first:
        return total
    steps = window.end - window.first
    if step >= window.end - 1 or steps <= 1:
        return target
    left = 1 - (step - window.first + 1) / steps
    return target + math.ceil((total - target) * left**3)


def lambda_share(step: int, window: PruneWindow, schedule: str, *, stages: int = 1) -> float:
    """Share of ``sparse_lambda`` that acts at ``step``; never falls, and is 1 at the last step of the window.

    With ``u = (step - first + 1) / (end - first)``, which goes up to 1 in the window:

        constant   1
        linear     u
        cosine     (1 - cos(pi u)) / 2
        cubic      1 - (1 - u)³              rises as the cubic rank budget falls (arXiv 2303.10512, eq. 13)
        stages     ceil(stages u) / stages   equal steps upwards (arXiv 2311.11696, the sparsifying scheduler)

    Args:
        step: counted from 0, inside the window.
        window: the steps in which gates are pruned.
        schedule: one of the names above.
        stages: of ``"stages"``, at least 1.
    """
    done, steps = step - window.first + 1, window.end - window.first
    u = done / steps
    if schedule == "linear":
        return u
    if schedule == "cosine":
        return (1 - math.cos(math.pi * u)) / 2
    if schedule == "cubic":
        return 1 - (1 - u) ** 3
    if schedule == "stages":
        return -(-stages * done // steps) / stages  # integers: a stage never starts late by rounding
    return 1.0


def soft_threshold_(gates: Gates, threshold: float | torch.Tensor, *, min_rank: int = 0) -> None:
    """``sign(g) * max(|g| - threshold, 0)``, in place: the proximal operator of ``threshold * |g|``.

    Args:
        gates: one tensor of shape ``(r,)`` per layer.
        threshold: not negative; a tensor (a learning rate kept on the device) is never read by the host.
        min_rank: the largest gates of each layer that may not become zero; such a gate keeps its value instead.
    """
    if not gates:
        return
    kept = torch._foreach_mul(gates, 1.0) if min_rank else gates
    if isinstance(threshold, torch.Tensor):
        for gate in gates:
            gate.sub_(gate.clamp(-threshold.to(gate), threshold.to(gate)))
    else:
        # g - clamp(g, -t, t) is exactly 0 inside the threshold, and g -+ t outside of it.
        inside = torch._foreach_clamp_max(gates, threshold)
        torch._foreach_clamp_min_(inside, -threshold)
        torch._foreach_sub_(gates, inside)
    if min_rank:
        masks = _largest(list(kept), min_rank)
        for gate, before, mask in zip(gates, kept, masks, strict=True):
            gate.copy_(torch.where(mask & (gate == 0), before, gate))


def keep_largest_(gates: Gates, budget: int, *, min_rank: int = 0) -> None:
    """Zero all but the ``budget`` largest ``|g|`` over all layers together, in place.

    Of equal values the later ones stay, so the result depends on nothing but the values.

    Args:
        gates: one tensor of shape ``(r,)`` per layer.
        budget: ranks to keep; raised to what ``min_rank`` protects.
        min_rank: the largest gates of each layer that stay whatever the budget.
    """
    sizes = [gate.numel() for gate in gates]
    budget = max(budget, sum(min(min_rank, size) for size in sizes))
    num_zeroed = sum(sizes) - budget
    if num_zeroed <= 0:
        return
    device = gates[0].device
    flat = torch.cat([gate.abs().to(device, non_blocking=True) for gate in gates])
    if min_rank:
        masks = [mask.to(device, non_blocking=True) for mask in _largest(gates, min_rank)]
        flat = flat.masked_fill(torch.cat(masks), math.inf)
    keep = torch.ones_like(flat)
    keep.index_fill_(0, torch.argsort(flat, stable=True)[:num_zeroed], 0.0)
    torch._foreach_mul_(gates, [k.to(g.device) for k, g in zip(torch.split(keep, sizes), gates, strict=True)])


def _largest(gates: Gates, count: int) -> Gates:
    """Mask of the ``count`` largest ``|g|`` of each layer; layers of one shape and device are sorted together."""
    masks: dict[int, torch.Tensor] = {}
    groups: dict[tuple[torch.device, int], list[int]] = {}
    for i, gate in enumerate(gates):
        groups.setdefault((gate.device, gate.numel()), []).append(i)
    for members in groups.values():
        rows = torch.stack([gates[i].abs() for i in members])
        top = torch.argsort(rows, dim=1, descending=True, stable=True)[:, :count]
        chosen = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, top, True)
        masks.update(zip(members, chosen.unbind(), strict=True))
    return [masks[i] for i in range(len(gates))]
