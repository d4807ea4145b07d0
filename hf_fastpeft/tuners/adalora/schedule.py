"""When adaptive-rank methods act, and how many ranks are allowed: AdaLoRA's phases (arXiv 2303.10512, section 3.3).

Steps count from 1, as optimizer steps that have been done: warm-up up to ``tinit``, allocation every ``delta_t``
steps, and from ``freeze`` on one fixed pattern.
"""

from dataclasses import dataclass

__all__ = ["Schedule", "in_steps"]


def in_steps(value: int | float, total: int) -> int:
    """A length given in steps (an int) or as a fraction of the run (a float)."""
    return value if isinstance(value, int) else round(value * total)


@dataclass(frozen=True)
class Schedule:
    """Phases of one run.

    Attributes:
        tinit: last step of the warm-up, in which all ranks of the start stay.
        freeze: step at which the final pattern is chosen; it is held from then on.
        delta_t: steps between two allocations.
    """

    tinit: int
    freeze: int
    delta_t: int

    def allocates(self, step: int) -> bool:
        """Whether ranks are allocated anew after ``step``; at ``freeze`` they are chosen for good."""
        return self.tinit < step < self.freeze and step % self.delta_t == 0

    def left(self, step: int) -> float:
        """``(1 - progress)³`` of the allocation phase: 1 up to ``tinit``, 0 from ``freeze`` on. Eq. 13."""
        if step <= self.tinit:
            return 1.0
        return max(0.0, 1 - (step - self.tinit) / (self.freeze - self.tinit)) ** 3

    def budget(self, step: int, *, start: int, target: int) -> int:
        """Ranks allowed after ``step``, from ``start`` down to ``target``; never rises with ``step``. Eq. 13."""
        return target + int((start - target) * self.left(step))
