"""Keeps weight decay off chosen parameters of an existing optimizer, without a lasting change to its groups.

Groups moved for good would shift parameter order in ``optimizer.state_dict()`` and break resuming, which loads the
checkpoint before any callback can act. So the parameters sit in a group of their own only while ``step`` runs.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["DecayExemption"]


@dataclass
class _Split:
    group: dict[str, Any]
    everything: list[nn.Parameter]
    decayed: list[nn.Parameter]
    exempt: list[nn.Parameter]


@dataclass
class DecayExemption:
    """Hooks around ``optimizer.step`` under which chosen parameters have ``weight_decay=0``."""

    optimizer: Any
    splits: list[_Split]
    num_groups: int
    handles: list[Any] = field(default_factory=list)

    @classmethod
    def install(cls, optimizer: Any, params: list[nn.Parameter]) -> "DecayExemption | None":
        """Exempt ``params``; None where no weight decay reaches them.

        Raises:
            RuntimeError: the optimizer decays them and is no ``torch.optim.Optimizer``, so it has no step hooks.
        """
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        chosen = {id(p) for p in params}
        splits = []
        for group in inner.param_groups:
            exempt = [p for p in group["params"] if id(p) in chosen]
            if exempt and group.get("weight_decay", 0.0) != 0.0:
                decayed = [p for p in group["params"] if id(p) not in chosen]
                splits.append(_Split(group, group["params"], decayed, exempt))
        if not splits:
            return None
        if not hasattr(inner, "register_step_pre_hook"):
            raise RuntimeError(
                f"SoraCallback: {type(inner).__name__} decays the gates and has no step hooks; possible: a "
                "torch.optim.Optimizer, or weight_decay=0."
            )
        exemption = cls(inner, splits, len(inner.param_groups))
        exemption.handles = [
            inner.register_step_pre_hook(exemption._split),
            inner.register_step_post_hook(exemption._join),
        ]
        return exemption

    def remove(self) -> None:
        """Take the hooks off; the optimizer is as it was before ``install``."""
        self._join()
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _split(self, *_: Any) -> None:
        self._join()  # a step that raised has left its split behind
        for split in self.splits:
            split.group["params"] = split.decayed
            self.optimizer.param_groups.append({**split.group, "params": split.exempt, "weight_decay": 0.0})

    def _join(self, *_: Any) -> None:
        del self.optimizer.param_groups[self.num_groups :]
        for split in self.splits:
            split.group["params"] = split.everything
