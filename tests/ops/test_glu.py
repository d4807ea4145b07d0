import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.operators import DEVICE, compare
from transformers.activations import ACT2FN

from hf_fastpeft.ops import geglu, geglu_torch, swiglu, swiglu_torch
from hf_fastpeft.ops.glu import BLOCK, glu_bwd, glu_fwd

LEADING = st.lists(st.integers(0, 5), min_size=0, max_size=2).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
OPERATORS = {  # activation -> (ours, reference)
    "silu": (swiglu, swiglu_torch),
    "gelu": tuple(functools.partial(f, approximate="none") for f in (geglu, geglu_torch)),
    "gelu_tanh": (geglu, geglu_torch),
}
pytestmark = pytest.mark.usefixtures("poison_empty")
each_activation = pytest.mark.parametrize("activation", OPERATORS)
each_impl = pytest.mark.parametrize("impl", ["torch", "triton"])


def inputs(shape, dtype, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).mul(s).to(DEVICE, dtype) for s in (scale, 1.0, 1.0)]


def columns(N, D, dtype, count):
    """A buffer full of sevens and ``count`` slices of its columns, with a gap after each."""
    buffer = torch.full((N, count * (D + 3)), 7.0, dtype=dtype, device=DEVICE)
    return buffer, [buffer[:, i * (D + 3) :][:, :D] for i in range(count)]


@settings(max_examples=15, deadline=None)
@given(
    leading=LEADING,
    D=st.sampled_from([0, 1, 3, 67]),
    dtype=DTYPES,
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
@each_impl
@each_activation
def test_against_float64(activation, impl, leading, D, dtype, seed, scale):
    gate, up, d_out = inputs((*leading, D), dtype, seed, scale)
    ours, reference = OPERATORS[activation]
    # the activation has a minimum: its slope is a difference
    terms = {"d_gate": (up.double() * d_out.double()).norm().item()}
    compare(("out", "d_gate", "d_up"), lambda a, b: ours(a, b, impl=impl), reference, [gate, up], [d_out], terms)


@pytest.mark.parametrize(("N", "D"), [(3, 20), (2, BLOCK + 6), (0, 20), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_impl
@each_activation
def test_slices_of_wider_buffers_equal_copies_and_leave_the_rest_alone(activation, impl, dtype, N, D):
    copies = inputs((N, D), dtype, 0)
    buffer, (gate, up, d_out) = columns(N, D, dtype, 3)
    for part, copy in zip((gate, up, d_out), copies, strict=True):
        part.copy_(copy)
    before = buffer.clone()
    written, (out, d_gate, d_up, rebuilt) = columns(N, D, dtype, 4)
    assert glu_fwd(gate, up, activation, impl, out) is out
    glu_bwd(d_out, gate, up, d_gate, d_up, activation, impl, out=rebuilt)
    assert torch.equal(buffer, before)
    wanted = [glu_fwd(*copies[:2], activation, impl), *(torch.empty_like(copies[0]) for _ in range(2))]
    glu_bwd(copies[2], *copies[:2], *wanted[1:], activation, impl)
    for got, want in zip((out, d_gate, d_up, rebuilt), (*wanted, wanted[0]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        got.fill_(7.0)
    assert (written == 7).all()
    assert wanted[0].is_contiguous()


@each_activation
def test_many_rows_of_a_slice_equal_their_copy(activation):
    """Large tensors take torch's vectorised and threaded paths."""
    (copy, up, d_out), (_, (gate, d_gate, d_up)) = (
        inputs((300, 70), torch.float32, 0),
        columns(300, 70, torch.float32, 3),
    )
    gate.copy_(copy)
    torch.testing.assert_close(glu_fwd(gate, up, activation, "torch"), glu_fwd(copy, up, activation, "torch"))
    want = torch.empty_like(copy), torch.empty_like(copy)
    glu_bwd(d_out, gate, up, d_gate, d_up, activation, "torch")
    glu_bwd(d_out, copy, up, *want, activation, "torch")
    torch.testing.assert_close((d_gate, d_up), want)


@each_activation
def test_gradcheck(activation):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, reference = OPERATORS[activation]
    assert torch.autograd.gradcheck(reference, (gate, up))
    assert torch.autograd.gradcheck(lambda a, b: ours(a, b, impl="torch"), (gate, up))


@pytest.mark.parametrize(("approximate", "name"), [("none", "gelu"), ("tanh", "gelu_pytorch_tanh")])
def test_reference_is_transformers(approximate, name):
    gate, up, _ = inputs((4, 9), torch.bfloat16, 0)
    assert torch.equal(geglu_torch(gate, up, approximate=approximate), ACT2FN[name](gate) * up)


@each_impl
def test_non_contiguous_input_equals_its_copy(impl):
    x = torch.randn(7, 12, device=DEVICE)
    gate, up = x.t()[::2], x.t()[1::2]
    want = swiglu(gate.contiguous(), up.contiguous(), impl=impl)
    torch.testing.assert_close(swiglu(gate, up, impl=impl), want, rtol=0, atol=0)
    torch.testing.assert_close(swiglu(gate[0, 0], up[0, 0], impl=impl), want[0, 0], rtol=0, atol=0)


@each_impl
@each_activation
def test_retained_graph_gives_the_same_gradients_twice(activation, impl):
    gate, up, d_out = inputs((3, 20), torch.float32, 0)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    out = OPERATORS[activation][0](gate, up, impl=impl)
    first = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
    second = torch.autograd.grad(out, leaves, d_out)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_errors_name_what_was_found():
    for ours in (swiglu, geglu):
        with pytest.raises(ValueError, match=ours.__name__ + r": gate \(2, 3\) torch.float32 cpu, up \(2, 4\)"):
            ours(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="geglu: approximate='erf'; possible: 'none', 'tanh'"):
        geglu(torch.zeros(2, 3), torch.zeros(2, 3), approximate="erf")
    with pytest.raises(ValueError, match="got 'cuda'; possible: 'auto', 'triton', 'torch'"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 3), impl="cuda")
    with pytest.raises(RuntimeError, match=r"tensor: torch\.float64 on"):
        swiglu(torch.zeros(2, 3).double(), torch.zeros(2, 3).double(), impl="triton")
