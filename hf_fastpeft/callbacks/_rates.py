"""At which learning rate the optimizer has just moved each gate: that of the parameter group which holds it.

Groups differ: LoRA+ gives one-dimensional parameters a multiple of A's rate, users give gates their own, and a group
may be added, emptied or replaced in the run. So every step looks where each gate lies.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["GateRates"]

Rate = float | torch.Tensor


@dataclass
class GateRates:
    """Where an optimizer holds the gates of one adapter.

    Attributes:
        asked: who asks, for errors: the callback.
        gates: the parameters.
        paths: their layers, in the same order.
        places: of each gate, the index of its group and its place in it.
    """

    asked: str
    gates: list[nn.Parameter]
    paths: list[str]
    places: list[tuple[int, int]] = field(default_factory=list)

    def find(self, optimizer: Any) -> dict[int, list[nn.Parameter]]:
        """Index of each group that holds gates -> those gates.

        Raises:
            RuntimeError: the optimizer has no parameter groups, or holds a gate in none of them.
        """
        groups = getattr(optimizer, "param_groups", None)
        if groups is None:
            raise RuntimeError(
                f"{self.asked}: {_name(optimizer)} has no param_groups, so nothing tells at which learning rate it "
                "moves the gates; possible: a torch.optim.Optimizer."
            )
        if not self.places or not all(
            _lies_at(groups, p, gate) for p, gate in zip(self.places, self.gates, strict=True)
        ):
            self._locate(groups)
        found: dict[int, list[nn.Parameter]] = {}
        for (index, _), gate in zip(self.places, self.gates, strict=True):
            found.setdefault(index, []).append(gate)
        return found

    def rates(self, optimizer: Any) -> list[tuple[Rate, list[nn.Parameter]]]:
        """Learning rates of the last step, each with the gates that it moved: those that require a gradient.

        Raises:
            RuntimeError: as ``find``; a group's learning rate is not what its parameters are moved by.
        """
        rates = [(self._rate(optimizer, index), gates) for index, gates in self.find(optimizer).items()]
        return [(rate, moved) for rate, gates in rates if (moved := [g for g in gates if g.requires_grad])]

    def _locate(self, groups: list[dict[str, Any]]) -> None:
        places = {id(p): (i, j) for i, group in enumerate(groups) for j, p in enumerate(group["params"])}
        missing = [path for path, gate in zip(self.paths, self.gates, strict=True) if id(gate) not in places]
        if missing:
            raise RuntimeError(
                f"{self.asked}: the optimizer does not hold the gates of {len(missing)} layers, {missing[0]!r} first, "
                "so they are not trained and cannot be pruned; create it from the parameters of the model with its "
                "adapters in place."
            )
        self.places = [places[id(gate)] for gate in self.gates]

    def _rate(self, optimizer: Any, index: int) -> Rate:
        group = optimizer.param_groups[index]
        rate: Rate | None = group.get("lr")
        if rate is None or "d" in group:
            found = f"lr={rate!r}" + (f" and its own factor d={group['d']!r}" if "d" in group else "")
            raise RuntimeError(
                f"{self.asked}: {_name(optimizer)} moves the gates by steps of its own (parameter group {index} has "
                f"{found}), and sparse_lambda acts in units of the learning rate; possible: an optimizer whose steps "
                "are its learning rate's (for Adafactor relative_step=False), or target_r without reassign_ranks."
            )
        return rate


def _lies_at(groups: list[dict[str, Any]], place: tuple[int, int], gate: nn.Parameter) -> bool:
    index, at = place
    if index >= len(groups):
        return False
    params = groups[index]["params"]
    return at < len(params) and params[at] is gate


def _name(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__  # not accelerate's wrapper
