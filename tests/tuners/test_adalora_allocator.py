"""Which ranks are kept, against the papers' formulas and PEFT's own allocator, and what choosing them costs."""

import pytest
import torch
from adalora import grown, random_gradients, svd, triplets_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from tiny import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fastpeft.tuners.adalora import RankAllocator, Triplet
from hf_fastpeft.tuners.adalora.allocate import add_orthogonality_gradient_

pytestmark = [
    # PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT takes AdaLoRA's rank_pattern for LoRA's, of another form, and says that it matches nothing
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]


def test_sensitivity_is_the_papers_elementwise_formula():
    model, _ = grown()
    triplets = triplets_of(model)
    allocator = RankAllocator(triplets, beta1=0.7, beta2=0.9)
    want = [[(torch.zeros_like(p), torch.zeros_like(p)) for p in (t.A, t.B, t.E)] for t in triplets]
    for seed in range(3):
        random_gradients(model, seed)
        allocator.observe()
        for t, states in zip(triplets, want, strict=True):
            for i, p in enumerate((t.A, t.B, t.E)):
                average, deviation = states[i]
                now = (p * p.grad).abs().detach()
                average = 0.7 * average + 0.3 * now  # eq. 9
                states[i] = average, 0.9 * deviation + 0.1 * (now - average).abs()  # eq. 10
    scores = []
    for states in want:
        a, b, e = (average * deviation for average, deviation in states)  # eq. 11
        scores.append(e.flatten() + a.mean(1) + b.mean(0))  # eq. 12
    torch.testing.assert_close(allocator.scores(), torch.cat(scores), rtol=1e-12, atol=0)


def test_the_same_ranks_as_pefts_allocator():
    model, made = grown()
    made.total_step, tuner = 100, model.base_model
    peft, ours = PeftAllocator(tuner.model, made, "default"), RankAllocator(triplets_of(model))
    for step in range(1, 5):
        random_gradients(model, step)
        ours.observe()
        peft.update_ipt(tuner.model)
    expected = peft.mask_to_budget(tuner.model, 31)
    ours.keep_(31)
    kept = ours.kept()
    assert sum(kept.values()) == 31
    for path, n in kept.items():
        assert sum(expected[f"{path.removeprefix('base_model.model.')}.lora_E.default"]) == n


@given(seed=st.integers(0, 50), scale=st.floats(0.1, 10))
@settings(max_examples=20)
def test_magnitude_is_the_norm_of_a_ranks_weight_change(seed, scale):
    generator = torch.Generator().manual_seed(seed)

    def triplet(r, n_in, n_out):
        parts = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((r, n_in), (n_out, r), (r,))]
        return Triplet("x", *parts, scale)

    triplets = [triplet(3, 5, 4), triplet(2, 5, 4), triplet(3, 5, 4)]
    want = [
        torch.linalg.matrix_norm(scale * t.E[i] * torch.outer(t.B[:, i], t.A[i]))
        for t in triplets
        for i in range(len(t.E))
    ]
    allocator = RankAllocator(triplets, scorer="magnitude")
    torch.testing.assert_close(allocator.scores(), torch.stack(want))
    assert not any(group.average for group in allocator.groups)  # no state


@given(
    scores=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    budget=st.integers(0, 12),
)
def test_exactly_the_budget_is_kept_also_of_equal_scores(scores, budget):
    gates = torch.tensor(scores, dtype=torch.float32)
    ones = torch.ones(len(scores), 1)
    allocator = RankAllocator([Triplet("x", ones, ones.T, gates, 1.0)], scorer="magnitude")
    budget = min(budget, len(scores))
    allocator.keep_(budget)
    assert allocator.kept() == {"x": budget}
    want = sorted(scores, reverse=True)[:budget]
    assert sorted(gates[gates != 0].tolist(), reverse=True) == [s for s in want if s]


def test_ranks_move_to_where_the_gradient_is():
    a, gates = torch.eye(4), [torch.tensor([3.0, 1.0, 0, 0]), torch.tensor([4.0, 2.0, 0, 0])]
    for gate in gates:
        gate.requires_grad_(True)
    layers = [Triplet(name, a, a, gate, 1.0) for name, gate in zip("pq", gates, strict=True)]
    allocator = RankAllocator(layers, scorer="magnitude", start=4)
    gates[0].grad, gates[1].grad = torch.tensor([0, 0, 0.1, 0.2]), torch.tensor([0, 9.0, 0.5, -0.6])
    allocator.observe()
    allocator.move_(2, 4)
    assert [g.keep_LR.tolist() for g in allocator.groups] == [[[True, False, False, False], [True, False, True, True]]]
    assert gates[0].tolist() == [3, 0, 0, 0]
    assert gates[1].tolist() == [4, 0, 0, 0]  # what came back starts at zero
    allocator.move_(0, 4)
    assert allocator.kept() == {"p": 1, "q": 3}


def test_half_precision_is_scored_in_float32():
    exact, rough = grown()[0], grown(dtype=torch.bfloat16)[0]
    allocators = [RankAllocator(triplets_of(m)) for m in (exact, rough)]
    for seed in range(2):
        for model, allocator in zip((exact, rough), allocators, strict=True):
            random_gradients(model, seed)
            allocator.observe()
    got, want = allocators[1].scores(), allocators[0].scores()
    assert got.dtype == torch.float32
    assert ((got - want).norm() / want.norm()).item() < 0.02  # inputs are bfloat16, the products are not


class CountOps(TorchDispatchMode):
    """Operators that run under it, and those among them that wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")

    def __init__(self):
        super().__init__()
        self.ops, self.waits = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        self.waits += func.__name__.split(".")[0] in self.WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("moves", [False, True])
def test_a_mask_step_is_a_few_operators_a_shape_and_waits_for_nothing(moves, monkeypatch):
    waits = []
    for name in ("tolist", "item", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, *a, m=method, **k: waits.append(1) or m(t, *a, **k))
    counts = {}
    for num_layers in (2, 6):
        model = get_peft_model(tiny_llama(num_hidden_layers=num_layers), svd(target_modules="all-linear"))
        random_gradients(model, 0)
        triplets = triplets_of(model)
        allocator = RankAllocator(triplets, start=2 * len(triplets) if moves else None)
        waits.clear()
        with CountOps() as count, torch.no_grad():
            add_orthogonality_gradient_(allocator.groups, 0.5)
            allocator.observe()
            if moves:
                allocator.move_(5, 2 * len(triplets))
            else:
                allocator.keep_(40)
            allocator.hold_()
        assert count.waits == len(waits) == 0
        counts[num_layers] = count.ops
        assert len(allocator.groups) == 4  # q and o; k and v; gate and up; down
        assert count.ops <= 60 * len(allocator.groups)
    assert counts[2] == counts[6]  # nothing per layer
    waits.clear()
    assert len(allocator.kept()) == 42
    assert sum(waits) == 1  # what a log costs
