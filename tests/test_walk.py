"""Random walks through states: a patched model and its stock twin agree after every change.

The default run takes each family with each method once; ``--walks 500`` takes more, ``--walk 17`` one again.
"""

import pytest
from peft.tuners.lora.layer import Linear as LoraLinear
from walks.walk import LENGTH, Walk, shrink, walk

from hf_fastpeft import lowrank
from hf_fastpeft.blocks.adapters import SideCache
from hf_fastpeft.watch import Watch

LLAMA_LORA = (13, 37, 61, 85)  # walks that end without a difference, see the first test


def pytest_generate_tests(metafunc):
    if "chosen" in metafunc.fixturenames:
        again = metafunc.config.getoption("--walk")
        seeds = [again] if again else [str(i) for i in range(metafunc.config.getoption("--walks"))]
        metafunc.parametrize("chosen", seeds)


def test_a_walk_ends_without_a_difference(chosen):
    seed, _, steps = chosen.partition(":")
    found = walk(int(seed), [int(i) for i in steps.split(",")] if steps else None)
    if found.failed is not None:
        shorter = shrink(found)
        pytest.fail(f"{found.told()}\nenough for a difference:\n{shorter.told()}", pytrace=False)


def test_a_walk_mostly_sees_what_a_model_gives():
    """And not the exceptions that both twins raise alike."""
    walks = [walk(seed, length=LENGTH // 3) for seed in (0, 7, 14, 21)]  # each method
    assert sum(w.looks for w in walks) > LENGTH
    assert sum(w.refused for w in walks) < 0.2 * sum(w.looks for w in walks)


def without_refresh(monkeypatch):
    """Copies of adapters stay as they were first made."""
    monkeypatch.setattr(SideCache, "_freshen", lambda self, copy: None)


def without_scaling(monkeypatch):
    """The reader forgets alpha / r."""
    read = lowrank.READERS[LoraLinear]

    def reader(layer, watch):
        record = read(layer, watch)
        return record if isinstance(record, str) else record._replace(scaling=1.0)

    monkeypatch.setitem(lowrank.READERS, LoraLinear, reader)


def without_looking_again(monkeypatch):
    """What was read of a module once is taken for good."""
    monkeypatch.setattr(Watch, "same", lambda self: True)


def without_dropout(monkeypatch):
    """The reader takes every adapter's dropout for zero."""
    read = lowrank.READERS[LoraLinear]

    def reader(layer, watch):
        record = read(layer, watch)
        return record if isinstance(record, str) else record._replace(dropout=0.0)

    monkeypatch.setitem(lowrank.READERS, LoraLinear, reader)


@pytest.mark.parametrize("plant", [without_refresh, without_scaling, without_looking_again, without_dropout])
def test_the_walk_notices_a_planted_fault(plant, monkeypatch):
    plant(monkeypatch)
    assert any(walk(seed).failed is not None for seed in LLAMA_LORA)


def test_a_walk_is_told_with_the_command_that_walks_it_again():
    told = Walk(7, "llama", "lora", {2: "merge (active); train", 5: "unmerge (all); train"}, "train loss: off").told()
    assert "seed 7: llama, lora: train loss: off" in told
    assert "2: merge (active); train" in told
    assert "pytest tests/test_walk.py --walk 7:2,5" in told


def test_a_walk_is_the_same_each_time_and_without_some_of_its_steps():
    first, again = walk(3, length=4), walk(3, length=4)
    assert first == again
    kept = [*first.steps][1::2]
    assert walk(3, kept).steps.keys() <= set(kept)
