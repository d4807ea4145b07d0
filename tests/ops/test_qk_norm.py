import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.operators import DEVICE, compare, run
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from hf_fastpeft.ops import Norm
from hf_fastpeft.ops.qk_norm import norm_rotate, norm_rotate_bwd, norm_rotate_torch

EPS = 1e-2  # large enough to tell the keys' from the queries', which is half of it
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
pytestmark = pytest.mark.usefixtures("poison_empty")
each_impl = pytest.mark.parametrize("impl", ["torch", "triton"])
each_order = pytest.mark.parametrize("unit_offset", [False, True])


def inputs(B, HQ, HK, S, D, dtype, seed=0, table_batch=1, halves_equal=True):
    """``q, k`` as views of the projections' results, the weights, the tables, and gradients of ``q, k``."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, S, H, D, generator=g).to(DEVICE, dtype).transpose(1, 2) for H in (HQ, HK))
    d_q, d_k = (torch.randn(B, H, S, D, generator=g).to(DEVICE, dtype) for H in (HQ, HK))
    q_weight, k_weight = (torch.randn(D, generator=g).to(DEVICE, dtype) for _ in range(2))
    angle = torch.randn(table_batch, S, D // 2 if halves_equal else D, generator=g)
    angle = torch.cat((angle, angle), -1) if halves_equal else angle
    return q, k, q_weight, k_weight, angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype), d_q, d_k


class _NormRotate(torch.autograd.Function):
    """As a block uses the two launches."""

    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, unit_offset, impl):
        norms = Norm(q_weight, EPS, unit_offset), Norm(k_weight, 2 * EPS, unit_offset)
        q_out, k_out = torch.empty_like(q), torch.empty_like(k)
        rstds = norm_rotate(q, k, *norms, cos, sin, q_out, k_out, impl)
        ctx.unit_offset, ctx.impl = unit_offset, impl
        ctx.save_for_backward(q, k, *rstds, q_weight, k_weight, cos, sin)
        return q_out, k_out

    @staticmethod
    def backward(ctx, d_q, d_k):
        q, k, q_rstd, k_rstd, q_weight, k_weight, cos, sin = ctx.saved_tensors
        norms = Norm(q_weight, EPS, ctx.unit_offset), Norm(k_weight, 2 * EPS, ctx.unit_offset)
        d_q_in, d_k_in = torch.empty_like(q), torch.empty_like(k)
        d_weights = norm_rotate_bwd(
            d_q, d_k, q, k, q_rstd, k_rstd, *norms, cos, sin, d_q_in, d_k_in, ctx.impl, with_dw=True
        )
        return d_q_in, d_k_in, *d_weights, None, None, None, None


def ours(cos, sin, unit_offset, impl):
    return lambda *leaves: _NormRotate.apply(*leaves, cos, sin, unit_offset, impl)


def reference(cos, sin, unit_offset):
    def fn(q, k, q_weight, k_weight):
        norms = Norm(q_weight, EPS, unit_offset), Norm(k_weight, 2 * EPS, unit_offset)
        return norm_rotate_torch(q, k, *norms, cos.to(q.dtype), sin.to(q.dtype))

    return fn


@settings(max_examples=20, deadline=None)
@given(
    B=st.integers(1, 2),
    HK=st.integers(1, 3),
    group=st.integers(1, 3),
    S=st.integers(0, 4),
    D=st.sampled_from([4, 6, 64, 80]),
    dtype=DTYPES,
    per_row=st.booleans(),
    halves_equal=st.booleans(),
    seed=st.integers(0, 2**16),
)
@each_order
@each_impl
def test_against_float64(impl, unit_offset, B, HK, group, S, D, dtype, per_row, halves_equal, seed):
    shape = (B, HK * group, HK, S, D)
    *leaves, cos, sin, d_q, d_k = inputs(*shape, dtype, seed, B if per_row else 1, halves_equal)
    terms = {}  # the gradients' parts along q and k cancel
    for name, x, weight, d in zip(("d_q", "d_k"), leaves[:2], leaves[2:], (d_q, d_k), strict=True):
        rstd = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
        terms[name] = ((weight.double() + unit_offset).abs().max() * (d.double() * rstd).norm()).item()
    compare(
        ("q", "k", "d_q", "d_k", "d_q_weight", "d_k_weight"),
        ours(cos, sin, unit_offset, impl),
        reference(cos, sin, unit_offset),
        leaves,
        [d_q, d_k],
        terms,
    )


@each_order
def test_gradcheck(unit_offset):
    *leaves, cos, sin, _, _ = inputs(1, 2, 1, 3, 4, torch.float64, halves_equal=False)
    leaves = [t.detach().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(reference(cos, sin, unit_offset), leaves)
    assert torch.autograd.gradcheck(ours(cos, sin, unit_offset, "torch"), leaves)


@pytest.mark.parametrize(("unit_offset", "stock_norm"), [(False, Qwen3RMSNorm), (True, Gemma3RMSNorm)])
def test_reference_is_transformers(unit_offset, stock_norm):
    q, k, q_weight, k_weight, cos, sin, *_ = inputs(2, 4, 2, 5, 8, torch.bfloat16)
    stock = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        norm = stock_norm(8, eps=EPS).to(DEVICE, torch.bfloat16)
        with torch.no_grad():
            norm.weight.copy_(weight)
            stock.append(norm(x.transpose(1, 2)).transpose(1, 2))
    norms = Norm(q_weight, EPS, unit_offset), Norm(k_weight, EPS, unit_offset)
    want = apply_rotary_pos_emb(*stock, cos, sin)
    for got, w in zip(norm_rotate_torch(q, k, *norms, cos, sin), want, strict=True):
        assert torch.equal(got, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("S", [0, 1, 3])
@each_impl
def test_views_of_one_buffer_and_v_beside_them(impl, S, dtype):
    """q, k and v as columns of one product's result, their gradients as columns of another."""
    B, HQ, HK, D = 2, 3, 2, 8
    _, _, q_weight, k_weight, cos, sin, d_q, d_k = inputs(B, HQ, HK, S, D, dtype)
    norms = Norm(q_weight, EPS), Norm(k_weight, 2 * EPS)

    def heads(buffer):
        parts = buffer[..., 3:-2].unflatten(-1, (HQ + 2 * HK, D)).transpose(1, 2)
        return parts.split([HQ, HK, HK], dim=1)

    width = (HQ + 2 * HK) * D + 5
    source = torch.randn(B, S, width, device=DEVICE).to(dtype)
    made, gathered = (torch.full((B, S, width), 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
    before = source.clone()
    q, k, v = heads(source)
    q_out, k_out, _ = heads(made)
    d_q_in, d_k_in, v_out = heads(gathered)
    rstds = norm_rotate(q, k, *norms, cos, sin, q_out, k_out, impl)
    assert [r.shape for r in rstds] == [(B, HQ, S, 1), (B, HK, S, 1)]
    assert {r.dtype for r in rstds} == {torch.float32}
    arguments = (d_q, d_k, q, k, *rstds, *norms, cos, sin, d_q_in, d_k_in, impl)
    assert norm_rotate_bwd(*arguments, with_dw=False, v=v, v_out=v_out) == (None, None)
    leaves = [q.contiguous(), k.contiguous(), q_weight, k_weight]
    wanted = run(ours(cos, sin, False, impl), leaves, [d_q, d_k])
    for got, want in zip((q_out, k_out, d_q_in, d_k_in), wanted, strict=False):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
    assert torch.equal(v_out, v)
    assert torch.equal(source, before)
    assert (made[..., -2 - HK * D :] == 7).all()
    for buffer in (made, gathered):
        assert (buffer[..., :3] == 7).all()
        assert (buffer[..., -2:] == 7).all()


@each_impl
def test_retained_graph_gives_the_same_gradients_twice(impl):
    *leaves, cos, sin, d_q, d_k = inputs(1, 2, 1, 3, 8, torch.float32)
    leaves = [t.detach().requires_grad_() for t in leaves]
    outs = ours(cos, sin, True, impl)(*leaves)
    first = torch.autograd.grad(outs, leaves, (d_q, d_k), retain_graph=True)
    second = torch.autograd.grad(outs, leaves, (d_q, d_k))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
