import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.operators import DEVICE, compare

from hf_fastpeft.ops import swiglu, swiglu_torch

SHAPES = st.lists(st.integers(0, 67), min_size=1, max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
pytestmark = pytest.mark.usefixtures("poison_empty")


def inputs(shape, dtype, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).mul(s).to(DEVICE, dtype) for s in (scale, 1.0, 1.0)]


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, dtype=DTYPES, seed=st.integers(0, 2**16), scale=st.sampled_from([1e-3, 1.0, 30.0]))
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_against_float64(impl, shape, dtype, seed, scale):
    gate, up, d_out = inputs(shape, dtype, seed, scale)
    terms = {"d_gate": (up.double() * d_out.double()).norm().item()}  # silu has a minimum: its slope is a difference
    compare(("out", "d_gate", "d_up"), lambda a, b: swiglu(a, b, impl=impl), swiglu_torch, [gate, up], [d_out], terms)


def test_reference_gradcheck():
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu_torch, (gate, up))
    assert torch.autograd.gradcheck(lambda a, b: swiglu(a, b, impl="torch"), (gate, up))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_non_contiguous_input_equals_its_copy(impl):
    x = torch.randn(7, 12, device=DEVICE)
    gate, up = x.t()[::2], x.t()[1::2]
    want = swiglu(gate.contiguous(), up.contiguous(), impl=impl)
    torch.testing.assert_close(swiglu(gate, up, impl=impl), want, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_retained_graph_gives_the_same_gradient_twice(impl):
    gate, up, d_out = inputs((3, 20), torch.float32, 0)
    gate.requires_grad_()
    out = swiglu(gate, up, impl=impl)
    (first,) = torch.autograd.grad(out, gate, d_out, retain_graph=True)
    (second,) = torch.autograd.grad(out, gate, d_out)
    assert torch.equal(first, second)


def test_errors_name_what_was_found():
    with pytest.raises(ValueError, match=r"gate \(2, 3\) torch.float32 cpu, up \(2, 4\)"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="got 'cuda'; possible: 'auto', 'triton', 'torch'"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 3), impl="cuda")
    with pytest.raises(RuntimeError, match=r"tensor: torch\.float64 on"):
        swiglu(torch.zeros(2, 3).double(), torch.zeros(2, 3).double(), impl="triton")
