import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.operators import DEVICE, compare
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_fastpeft.ops import rms_norm, rms_norm_torch

EPS = 1e-5
LEADING = st.lists(st.integers(0, 9), min_size=0, max_size=2).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
pytestmark = pytest.mark.usefixtures("poison_empty")


def inputs(shape, dtype, weight_dtype, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g).mul(scale).to(DEVICE, dtype)
    weight = torch.randn(shape[-1], generator=g).to(DEVICE, weight_dtype)
    return x, weight, torch.randn(shape, generator=g).to(DEVICE, dtype)


@settings(max_examples=30, deadline=None)
@given(
    leading=LEADING,
    D=st.sampled_from([2, 3, 64, 100]),
    dtype=DTYPES,
    float32_weight=st.booleans(),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_against_float64(impl, leading, D, dtype, float32_weight, seed, scale):
    x, weight, d_out = inputs((*leading, D), dtype, torch.float32 if float32_weight else dtype, seed, scale)
    # d_x is the part of w * d_out * rstd orthogonal to x: in a row of two or three numbers little of it is left
    rstd = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
    compare(
        ("out", "d_x", "d_weight"),
        lambda a, b: rms_norm(a, b, EPS, impl=impl),
        lambda a, b: rms_norm_torch(a, b, EPS),
        [x, weight],
        [d_out],
        terms={"d_x": (weight.double() * d_out.double() * rstd).norm().item()},
    )


def test_reference_is_llamas():
    stock = LlamaRMSNorm(64, eps=EPS).to(torch.bfloat16)
    x, weight, _ = inputs((5, 64), torch.bfloat16, torch.bfloat16, 0)
    with torch.no_grad():
        stock.weight.copy_(weight)
        assert torch.equal(stock(x.cpu()), rms_norm_torch(x, weight, EPS).cpu())


def test_gradcheck():
    x, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm_torch(a, b, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, EPS, impl="torch"), (x, weight))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_non_contiguous_input_equals_its_copy(impl):
    x = torch.randn(12, 7, device=DEVICE).t()
    weight = torch.randn(12, device=DEVICE)
    want = rms_norm(x.contiguous(), weight, EPS, impl=impl)
    assert torch.equal(rms_norm(x, weight, EPS, impl=impl), want)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_column_is_its_sign_and_has_no_gradient(impl):
    """Its true gradient is ``rstd * eps / (x^2 + eps)``, about zero: a relative error would say nothing."""
    x = torch.tensor([[3.0], [-20.0]], device=DEVICE, requires_grad=True)
    out = rms_norm(x, torch.tensor([2.0], device=DEVICE), EPS, impl=impl)
    torch.testing.assert_close(out.cpu(), torch.tensor([[2.0], [-2.0]]))
    (d_x,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(d_x.cpu(), torch.zeros(2, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_nan_is_not_hidden(impl):
    x = torch.ones(2, 8, device=DEVICE)
    x[1, 3] = float("nan")
    out = rms_norm(x, torch.ones(8, device=DEVICE), EPS, impl=impl)
    assert torch.isfinite(out[0]).all()
    assert torch.isnan(out[1]).all()


def test_error_names_both_shapes():
    with pytest.raises(ValueError, match=r"x \(2, 3\) cpu, weight \(4,\)"):
        rms_norm(torch.zeros(2, 3), torch.zeros(4), EPS)
