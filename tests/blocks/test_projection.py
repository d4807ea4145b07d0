"""The stacked projections against autograd of the formula, in float64."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FLOAT64_REL, rel_err
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fastpeft.blocks._function import draw_of
from hf_fastpeft.blocks.adapters import KEPT, SideCache
from hf_fastpeft.blocks.layout import make_side
from hf_fastpeft.blocks.projection import Draw, add_weight_grads, make_plan, needs_input, project, project_bwd
from hf_fastpeft.lowrank import TENSORS_PER_LINEAR, LowRank
from hf_fastpeft.stacking import adjacent, stack_weights, unstack_weights


def formula(x, stack, masks=None):
    outs = []
    for i, low in enumerate(stack):
        z = x @ low.weight.t() + (0 if low.bias is None else low.bias)
        if low.A is not None:
            gate = 1.0 if low.gate is None else low.gate.flatten() * low.gate_scale
            dropped = x if masks is None or masks[i] is None else x * masks[i]
            delta = ((dropped @ low.A.t()) * gate) @ low.B.t() + (0 if low.lora_bias is None else low.lora_bias)
            z = z + low.scaling * delta
        outs.append(z)
    return torch.cat(outs, 1)


def drawn_masks(x, stack):
    """What ``nn.Dropout`` modules called one after the other multiply with."""
    ones = torch.ones_like(x)
    return [torch.nn.functional.dropout(ones, low.dropout) if low.dropout else None for low in stack]


@st.composite
def stacks(draw):
    in_features = draw(st.integers(1, 9))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensor(*shape):
        trained = draw(st.booleans())
        return torch.randn(*shape, dtype=torch.float64, generator=g).requires_grad_(trained)

    stack = []
    for _ in range(draw(st.integers(1, 3))):
        out_features, rank = draw(st.integers(1, 7)), draw(st.sampled_from([0, 1, 3, 16]))
        gate_shape = draw(st.sampled_from([None, (rank,), (rank, 1)]))
        stack.append(
            LowRank(
                tensor(out_features, in_features),
                tensor(out_features) if draw(st.booleans()) else None,
                tensor(rank, in_features) if rank else None,
                tensor(out_features, rank) if rank else None,
                tensor(*gate_shape) if rank and gate_shape else None,
                tensor(out_features) if rank and draw(st.booleans()) else None,
                draw(st.sampled_from([1.0, 0.5, 1.7])),
                draw(st.sampled_from([1.0, 50.0])),
                draw(st.sampled_from([0.0, 0.0, 0.3])) if rank else 0.0,
            )
        )
    tokens = draw(st.integers(1, 6))
    x = torch.randn(tokens, in_features, dtype=torch.float64, generator=g).requires_grad_(draw(st.booleans()))
    d_z = torch.randn(tokens, sum(low.weight.shape[0] for low in stack), dtype=torch.float64, generator=g)
    residual = torch.randn(d_z.shape, dtype=torch.float64, generator=g) if draw(st.booleans()) else None
    return x, stack, d_z, residual, draw(st.booleans()), draw(st.booleans())


@settings(max_examples=200, deadline=None)
@given(stacks())
def test_outputs_and_every_gradient_equal_the_formulas(case):
    x, stack, d_z, residual, adjacent, lean = case
    tensors = [t for low in stack for t in low.tensors]
    needs = [t is not None and t.requires_grad for t in tensors]
    if adjacent:
        parameters = [torch.nn.Parameter(low.weight.detach(), low.weight.requires_grad) for low in stack]
        assert stack_weights(parameters) == (len(stack) > 1)
        stack = [low._replace(weight=weight) for low, weight in zip(stack, parameters, strict=True)]
        tensors[::TENSORS_PER_LINEAR] = parameters
    plan = make_plan(stack, torch.float64, "torch", x, None)._replace(lean=lean)
    assert (plan.weight is not None) == (adjacent or len(stack) == 1)
    torch.manual_seed(5)
    draw = Draw(x) if plan.dropped else None
    with torch.no_grad():
        z, P = project(x, stack, plan, residual)
        after = torch.get_rng_state()
        d_x, U, grads = project_bwd(d_z, P, stack, plan, needs, need_dx=x.requires_grad, draw=draw)
        kept_x = x.detach() if needs_input(needs) else None
        add_weight_grads(grads, d_z, kept_x, U, stack, plan, needs, draw)
    assert torch.equal(torch.get_rng_state(), after)  # drawing again is nobody else's business

    torch.manual_seed(5)
    want = formula(x, stack, drawn_masks(x, stack)) + (0 if residual is None else residual)
    assert torch.equal(torch.get_rng_state(), after)
    assert rel_err(z, want.detach()) < FLOAT64_REL
    leaves = [t for t in [x, *tensors] if t is not None and t.requires_grad]
    if not leaves:
        assert d_x is None
        return
    expected = iter(torch.autograd.grad(want, leaves, d_z))
    for name, leaf, got in zip(["x", *map(str, range(len(tensors)))], [x, *tensors], [d_x, *grads], strict=True):
        if leaf is not None and leaf.requires_grad:
            w = next(expected)
            assert got.shape == w.shape
            assert (got - w).norm() <= FLOAT64_REL * max(1.0, w.norm().item()), name
        else:
            assert got is None


@pytest.mark.parametrize(("lean", "additions"), [(False, 3), (True, 1)])
def test_a_stack_reads_x_twice(lean, additions):
    """Once for all its weights, where they lie behind each other, and once for all its adapters."""
    x = torch.randn(8, 6)
    weights = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    stack_weights(weights)
    stack = [LowRank(w, None, torch.randn(2, 6), torch.randn(4, 2)) for w in weights]
    plan = make_plan(stack, torch.float32, "torch", x, None)._replace(lean=lean)
    with torch.no_grad(), torch.profiler.profile() as profile:
        project(x, stack, plan)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::mm"] == 2
    assert calls["aten::addmm_"] == additions


def test_stacked_weights_keep_values_and_identity_and_come_apart_again():
    weights = [torch.nn.Parameter(torch.randn(n, 6)) for n in (3, 1, 4)]
    values = [w.detach().clone() for w in weights]
    assert stack_weights(weights)
    assert torch.equal(adjacent(weights), torch.cat(values))
    unstack_weights(weights)
    assert adjacent(weights) is None
    assert all(torch.equal(w, v) for w, v in zip(weights, values, strict=True))
    other = torch.nn.Parameter(torch.randn(2, 6, dtype=torch.float64))
    assert not stack_weights([weights[0], other])
    assert not stack_weights(weights[:1])


class Operations(TorchDispatchMode):
    """Names of the operations that run inside."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def example_stack(gate=True):
    def parameter(*shape):
        return torch.nn.Parameter(torch.randn(*shape))

    return [
        LowRank(parameter(4, 6), None, parameter(2, 6), parameter(4, 2), parameter(2) if gate else None, None, s, 3.0)
        for s in (0.5, 1.7)
    ]


def side_of(cache, stack, dtype):
    side, _, _ = cache.lay_out(stack, dtype, dtype)
    return side


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_refreshed_side_equals_a_fresh_one(dtype):
    """Optimizers may write without a trace in the tensor's version: the next forward of the model sees the values."""
    stack, cache = example_stack(), SideCache()
    with cache.forward():
        first = side_of(cache, stack, dtype)
        assert side_of(cache, stack, dtype) is first
    with torch.no_grad():
        for low in stack:
            for t in (low.A, low.B, low.gate):
                t.data.mul_(1.5)  # does not count as a change
    with cache.forward():
        again = side_of(cache, stack, dtype)
    assert again is first
    fresh = make_side(stack, dtype)
    for got, want in zip((again.A_RI, again.B_OR, again.gate_R), (fresh.A_RI, fresh.B_OR, fresh.gate_R), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [False, True])
def test_all_sides_of_a_model_are_refreshed_in_few_launches(gate, dtype):
    """As many for eight layers as for two, whatever is scaled, gated or a strided block; each value rounded once."""
    launches = []
    for layers in (2, 8):
        stacks, cache = [example_stack(gate) for _ in range(layers)], SideCache()
        for stack in stacks:
            stack[0] = stack[0]._replace(scaling=1.7) if not gate else stack[0]
        for _ in range(2):  # made, then lined up
            with cache.forward():
                sides = [side_of(cache, stack, dtype) for stack in stacks]
        for stack in stacks:
            for t in (low_t for low in stack for low_t in (low.A, low.B, low.gate) if low_t is not None):
                t.data.mul_(1.5)
        with cache.forward(), Operations() as operations:
            again = [side_of(cache, stack, dtype) for stack in stacks]
        assert all(a is b for a, b in zip(again, sides, strict=True))
        for side, stack in zip(sides, stacks, strict=True):
            fresh = make_side(stack, dtype)
            assert torch.equal(side.A_RI, fresh.A_RI)
            assert torch.equal(side.B_OR, fresh.B_OR)
            assert gate is (side.gate_R is not None)
            assert not gate or torch.equal(side.gate_R, fresh.gate_R)
        launches.append([name for name in operations.names if "detach" not in name])
    assert launches[0] == launches[1]
    assert len(launches[0]) <= 8


def test_a_block_called_outside_a_forward_gets_its_own_copies():
    stack, cache = example_stack(), SideCache()
    with cache.forward():
        shared = side_of(cache, stack, torch.float32)
    assert side_of(cache, stack, torch.float32) is not shared


def test_replaced_parameters_are_seen_within_a_forward():
    stack, cache = example_stack(), SideCache()
    with cache.forward():
        before = side_of(cache, stack, torch.float32)
        stack[0] = stack[0]._replace(A=torch.nn.Parameter(torch.randn(5, 6)), B=torch.nn.Parameter(torch.randn(4, 5)),
                                     gate=None)  # fmt: skip
        after = side_of(cache, stack, torch.float32)
    assert before.A_RI.shape == (4, 6)
    assert after.A_RI.shape == (7, 6)


def test_copies_nobody_asks_for_are_dropped():
    stack, cache = example_stack(), SideCache()
    for wanted in (stack, *[example_stack(gate=False)] * 12):
        with cache.forward():
            side_of(cache, wanted, torch.float32)
    assert len(cache._sides) == 1


def test_copies_of_sharded_parameters_are_dropped(monkeypatch):
    """FSDP 1 puts new tensors on the modules in every forward."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model, cache = torch.nn.Module(), SideCache()
    model._is_fsdp_managed_module = True
    for _ in range(3 * KEPT):
        with cache.forward(model):
            side_of(cache, example_stack(), torch.float32)
    assert len(cache._sides) == KEPT


class OffsetGenerator:
    """Stands for a CUDA generator: each call's numbers follow from seed and offset, and move the offset by four."""

    device = torch.device("cuda", 1)

    def __init__(self, seed):
        self.seed, self.offset = seed, 0

    def initial_seed(self):
        return self.seed

    def manual_seed(self, seed):
        self.seed, self.offset = seed, 0

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        assert offset % 4 == 0  # or CUDA's refuses
        self.offset = offset

    def numbers(self):
        self.offset += 4
        return self.seed, self.offset


@pytest.mark.parametrize("reseeded", [False, True])
def test_cuda_draws_again_by_seed_and_offset(monkeypatch, reseeded):
    """Without the generator's state, which the stand-in does not have."""
    generator = OffsetGenerator(2**64 - 1)
    monkeypatch.setattr(torch.cuda, "default_generators", (None, generator))
    generator.numbers()
    draw = Draw(SimpleNamespace(is_cuda=True, device=generator.device))
    drawn = [generator.numbers() for _ in range(3)]
    if reseeded:
        generator.manual_seed(3)
    generator.numbers()
    before = generator.seed, generator.offset
    for _ in range(2):
        with draw:
            assert [generator.numbers() for _ in range(3)] == drawn
        assert (generator.seed, generator.offset) == before


@pytest.mark.parametrize("reseeded", [False, True])
def test_a_cpu_draws_again_by_its_state(reseeded):
    def numbers():
        return torch.rand(3), torch.randn(17)  # the second leaves half a pair behind

    torch.manual_seed(7)
    numbers()
    draw = Draw(torch.empty(0))
    drawn = numbers()
    if reseeded:
        torch.manual_seed(3)
    before = torch.get_rng_state()
    with draw:
        assert all(map(torch.equal, numbers(), drawn))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_place_is_kept_only_where_something_is_dropped(p):
    x = torch.randn(4, 6)
    stack = [low._replace(dropout=p) for low in example_stack()]
    assert (draw_of(make_plan(stack, torch.float32, "torch", x, None), x) is not None) == (p > 0)
