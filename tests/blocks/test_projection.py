"""The stacked projections against autograd of the formula, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FLOAT64_REL, rel_err

from hf_fastpeft.blocks.projection import add_weight_grads, needs_input, project, project_bwd
from hf_fastpeft.lowrank import LowRank


def formula(x, stack):
    outs = []
    for low in stack:
        z = x @ low.weight.t() + (0 if low.bias is None else low.bias)
        if low.A is not None:
            gate = 1.0 if low.gate is None else low.gate * low.gate_scale
            z = z + ((x @ low.A.t()) * gate) @ (low.scaling * low.B).t()
        outs.append(z)
    return outs


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
        stack.append(
            LowRank(
                tensor(out_features, in_features),
                tensor(out_features) if draw(st.booleans()) else None,
                tensor(rank, in_features) if rank else None,
                tensor(out_features, rank) if rank else None,
                tensor(rank) if rank and draw(st.booleans()) else None,
                draw(st.sampled_from([1.0, 0.5, 1.7])),
                draw(st.sampled_from([1.0, 50.0])),
            )
        )
    tokens = draw(st.integers(1, 6))
    x = torch.randn(tokens, in_features, dtype=torch.float64, generator=g).requires_grad_(draw(st.booleans()))
    d_outs = [torch.randn(tokens, low.weight.shape[0], dtype=torch.float64, generator=g) for low in stack]
    return x, stack, d_outs


@settings(max_examples=150, deadline=None)
@given(stacks())
def test_outputs_and_every_gradient_equal_the_formulas(case):
    x, stack, d_outs = case
    tensors = [t for low in stack for t in low.tensors]
    needs = [t is not None and t.requires_grad for t in tensors]
    outs, P = project(x.detach(), stack, torch.float64)
    want = formula(x, stack)
    for got, expected in zip(outs, want, strict=True):
        assert rel_err(got, expected.detach()) < FLOAT64_REL

    kept_x = x.detach() if needs_input(needs) else None
    with torch.no_grad():
        d_x, V, grads = project_bwd(d_outs, P, stack, needs, need_dx=x.requires_grad)
        add_weight_grads(grads, d_outs, kept_x, V, stack, needs)
    leaves = [t for t in [x, *tensors] if t is not None and t.requires_grad]
    if not leaves:
        assert d_x is None
        return
    total = sum((z * d).sum() for z, d in zip(want, d_outs, strict=True))
    expected = iter(torch.autograd.grad(total, leaves))
    for name, leaf, got in zip(["x", *map(str, range(len(tensors)))], [x, *tensors], [d_x, *grads], strict=True):
        if leaf is not None and leaf.requires_grad:
            w = next(expected)
            assert (got - w).norm() <= FLOAT64_REL * max(1.0, w.norm().item()), name
        else:
            assert got is None


@pytest.mark.parametrize("rank", [1, 16])
def test_a_stack_reads_x_once_for_all_its_adapters(rank):
    """Two products of the input's size per stage: one for all A, none per module."""
    x = torch.randn(8, 6)
    low = [LowRank(torch.randn(4, 6), None, torch.randn(rank, 6), torch.randn(4, rank)) for _ in range(3)]
    with torch.profiler.profile() as profile:
        project(x, low, torch.float32)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::mm"] == 4  # three base products and one for the stacked A
    assert calls["aten::addmm_"] == 3
