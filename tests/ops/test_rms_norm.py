import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_no_worse
from ops.operators import DEVICE, compare, run
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_fastpeft.ops import rms_norm, rms_norm_torch
from hf_fastpeft.ops.rms_norm import rms_norm_bwd, rms_norm_fwd

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
    unit_offset=st.booleans(),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_against_float64(impl, leading, D, dtype, float32_weight, unit_offset, seed, scale):
    x, weight, d_out = inputs((*leading, D), dtype, torch.float32 if float32_weight else dtype, seed, scale)
    # d_x is the part of w * d_out * rstd orthogonal to x: in a row of two or three numbers little of it is left
    rstd = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
    compare(
        ("out", "d_x", "d_weight"),
        lambda a, b: rms_norm(a, b, EPS, unit_offset=unit_offset, impl=impl),
        lambda a, b: rms_norm_torch(a, b, EPS, unit_offset=unit_offset),
        [x, weight],
        [d_out],
        terms={"d_x": ((weight.double() + unit_offset) * d_out.double() * rstd).norm().item()},
    )


@settings(max_examples=15, deadline=None)
@given(
    N=st.integers(0, 19),
    D=st.sampled_from([2, 3, 64, 100]),
    dtype=DTYPES,
    float32_weight=st.booleans(),
    unit_offset=st.booleans(),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_backward_adds_the_residual_and_rebuilds_the_forward(impl, N, D, dtype, float32_weight, unit_offset, seed):
    x, weight, d_out = inputs((N, D), dtype, torch.float32 if float32_weight else dtype, seed)
    d_residual = inputs((N, D), dtype, dtype, seed + 1)[0]

    def around(a, b):
        return rms_norm_torch(a, b, EPS, unit_offset=unit_offset), a * 1

    given_tensors = [x, weight, d_out, d_residual]
    copies = [t.clone() for t in given_tensors]
    want = run(around, [x.double(), weight.double()], [d_out.double(), d_residual.double()])
    base = run(around, [x, weight], [d_out, d_residual])
    out, rstd = rms_norm_fwd(x, weight, EPS, impl, unit_offset=unit_offset)
    rebuilt = torch.empty_like(out)
    options = {"unit_offset": unit_offset, "d_residual": d_residual, "out": rebuilt}
    d_x, d_weight = rms_norm_bwd(d_out.to(out.dtype), x, weight, rstd, impl, with_dw=True, **options)
    assert torch.equal(rebuilt, out)
    terms = ((weight.double() + unit_offset) * d_out.double() * rstd).norm() + d_residual.double().norm()
    assert_no_worse("d_x", d_x, base[2], want[2], terms=terms.item())
    assert_no_worse("d_weight", d_weight, base[3], want[3])
    assert all(torch.equal(t, copy) for t, copy in zip(given_tensors, copies, strict=True))
    without, none = rms_norm_bwd(d_out.to(out.dtype), x, weight, rstd, impl, with_dw=False, **options)
    assert torch.equal(without, d_x)
    assert none is None


@pytest.mark.parametrize("unit_offset", [False, True])
def test_float64_backward_is_autograds(unit_offset):
    x, weight, d_out = inputs((4, 10), torch.float64, torch.float64, 0)
    d_residual, rebuilt = torch.randn_like(x), torch.empty_like(x)
    out, rstd = rms_norm_fwd(x, weight, EPS, "auto", unit_offset=unit_offset)
    got = rms_norm_bwd(
        d_out, x, weight, rstd, "auto", with_dw=True, unit_offset=unit_offset, d_residual=d_residual, out=rebuilt
    )
    want, d_x, d_weight = run(lambda a, b: rms_norm_torch(a, b, EPS, unit_offset=unit_offset), [x, weight], [d_out])
    for g, w in zip((rebuilt, out, *got), (want, want, d_x + d_residual, d_weight), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rows_of_a_wider_buffer_take_the_same_bits(impl, dtype, unit_offset):
    x, weight, _ = inputs((7, 20), dtype, dtype, 0)
    want, rstd = rms_norm_fwd(x, weight, EPS, impl, unit_offset=unit_offset)
    buffer = torch.full((7, 32), 5.0, device=DEVICE, dtype=dtype)
    got, again = rms_norm_fwd(x, weight, EPS, impl, unit_offset=unit_offset, out=buffer[:, :20])
    assert torch.equal(got, want)
    assert torch.equal(buffer[:, :20], want)
    assert torch.equal(again, rstd)
    assert (buffer[:, 20:] == 5).all()


def test_reference_is_llamas():
    stock = LlamaRMSNorm(64, eps=EPS).to(torch.bfloat16)
    x, weight, _ = inputs((5, 64), torch.bfloat16, torch.bfloat16, 0)
    with torch.no_grad():
        stock.weight.copy_(weight)
        assert torch.equal(stock(x.cpu()), rms_norm_torch(x, weight, EPS).cpu())


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_unit_offset_is_gemmas(impl, weight_dtype):
    stock = Gemma3RMSNorm(64, eps=EPS).to(weight_dtype)
    x, weight, _ = inputs((5, 64), torch.bfloat16, weight_dtype, 0)
    with torch.no_grad():
        stock.weight.copy_(weight)
        want = stock(x.cpu())
        assert torch.equal(want, rms_norm_torch(x.cpu(), weight.cpu(), EPS, unit_offset=True))
        got = rms_norm(x, weight, EPS, unit_offset=True, impl=impl)
    # one rounding each; the statistics' last bit may tip it
    torch.testing.assert_close(got.cpu(), want, rtol=2**-7, atol=0)
    assert (got.cpu() != want).sum() <= 3


@pytest.mark.parametrize("unit_offset", [False, True])
def test_gradcheck(unit_offset):
    x, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm_torch(a, b, EPS, unit_offset=unit_offset), (x, weight))
    assert torch.autograd.gradcheck(
        lambda a, b: rms_norm(a, b, EPS, unit_offset=unit_offset, impl="torch"), (x, weight)
    )


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_retained_graph_gives_the_same_gradients_twice(impl):
    x, weight, d_out = inputs((3, 20), torch.float32, torch.float32, 0)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    out = rms_norm(x, weight, EPS, unit_offset=True, impl=impl)
    first = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
    second = torch.autograd.grad(out, leaves, d_out)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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
