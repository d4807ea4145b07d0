"""A walk: state changes drawn from a seed, and after each of them a look at both twins.

``pytest tests/test_walk.py --walk 17`` walks once more what seed 17 gave and, where it fails, looks for the steps that
are enough for it; ``--walk 17:3,8`` takes only steps 3 and 8.
"""

import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from walks import foreign, saving, training  # their steps
from walks.steps import STEPS
from walks.twins import FAMILIES, METHODS, Difference, Twins, float64_is_exact
from walks.views import VIEWS, draw_batch, second_derivative

__all__ = ["LENGTH", "Walk", "foreign", "saving", "shrink", "training", "walk"]

LENGTH = 30  # steps that did something
SECOND = "second_derivative"
# left out where hooks write to parameters: what stock's gradients then are depends on what it saves, and a second
# derivative that is refused leaves the parameters of one twin where they were
OVERLAPPING = ("two_forwards_one_backward", "inside_checkpoint", "two_backwards", SECOND)
RARE = {"save_and_load": 2, "optimize": 2, "write": 2, "hook_that_writes": 2, "all_train": 2, "add_adapter": 2}


@dataclass
class Walk:
    """What was walked, the difference it ended with, how often it looked and how often both twins raised then."""

    seed: int
    family: str
    method: str
    steps: dict[int, str] = field(default_factory=dict)
    failed: str | None = None
    looks: int = 0
    refused: int = 0

    def told(self) -> str:
        """For people, with the command that walks it again."""
        lines = [f"seed {self.seed}: {self.family}, {self.method}: {self.failed or 'no difference'}"]
        lines += [f"  {index}: {what}" for index, what in self.steps.items()]
        chosen = ",".join(map(str, self.steps))
        return "\n".join([*lines, f"  again: pytest tests/test_walk.py --walk {self.seed}:{chosen}"])


def walk(
    seed: int,
    only: Collection[int] | None = None,
    *,
    length: int = LENGTH,
    avoid: Collection[str] = (),
    family: str | None = None,
    method: str | None = None,
) -> Walk:
    """Walk until a difference or to the end.

    Args:
        seed: what everything is drawn from.
        only: places in the row of steps to take; all by default. The other steps and looks stay what they are.
        length: number of steps that did something.
        avoid: steps and views that are left out.
        family: in place of the seed's; the first 24 seeds have each family with each method.
        method: in place of the seed's.
    """
    rng, (method_of, family_of) = Random(seed), divmod(seed, len(FAMILIES))
    done = Walk(seed, family or FAMILIES[family_of], method or METHODS[method_of % len(METHODS)])
    weighted = [name for name in STEPS for _ in range(RARE.get(name, 1))]
    views = [*VIEWS, SECOND]
    with tempfile.TemporaryDirectory() as folder, float64_is_exact(done.family):
        twins = Twins(done.family, done.method, Random(f"{seed} twins"), Path(folder))
        try:
            _look(twins, Random(f"{seed} first"), "train")
            for index in range(10 * length):
                name, seen, tag = rng.choice(weighted), rng.choice(views), f"{seed}:{index}"
                if name in avoid or (only is not None and index not in only):
                    continue
                twins.draws = 1000 * index
                done.steps[index] = name  # known even where it raises
                what = STEPS[name](twins, Random(tag))
                if what is None:
                    del done.steps[index]
                    continue
                done.steps[index] = f"{name} ({what}); {seen}"
                twins.compare_state(name)
                for look in dict.fromkeys([seen, "train"]):
                    if look not in avoid and not (look in OVERLAPPING and foreign.writes(twins)):
                        done.looks += 1
                        done.refused += not _look(twins, Random(f"{tag} {look}"), look)
                if len(done.steps) == length:
                    break
        except Difference as difference:
            done.failed = str(difference)
        finally:
            twins.remove_handles()
    return done


def _look(twins: Twins, rng: Random, name: str) -> bool:
    """Compare what a view gives; False where both raised."""
    batch, tag = draw_batch(rng), rng.random()
    if name == SECOND:
        second_derivative(twins, batch)
        return True
    return twins.both(lambda model: VIEWS[name](model, batch, Random(tag)), what=name) is not None


def shrink(found: Walk, **options: object) -> Walk:
    """The same difference, or another, from as few of its steps as leaving them out one by one gives."""
    shortest = found
    for index in reversed(found.steps):
        shorter = walk(found.seed, [i for i in shortest.steps if i != index], **options)  # type: ignore[arg-type]
        if shorter.failed is not None:
            shortest = shorter
    return shortest
