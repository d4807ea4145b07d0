import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.operators import DEVICE, compare
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial_rotary_pos_emb

from hf_fastpeft.ops import rope, rope_torch
from hf_fastpeft.ops.rope import rotate

pytestmark = pytest.mark.usefixtures("poison_empty")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def inputs(B, HQ, HK, S, D, dtype, seed=0, table_batch=1, halves_equal=True, rotary_dim=None):
    R = rotary_dim or D
    g = torch.Generator().manual_seed(seed)
    q, d_q = (torch.randn(B, HQ, S, D, generator=g).to(DEVICE, dtype) for _ in range(2))
    k, d_k = (torch.randn(B, HK, S, D, generator=g).to(DEVICE, dtype) for _ in range(2))
    angle = torch.randn(table_batch, S, R // 2 if halves_equal else R, generator=g)
    angle = torch.cat((angle, angle), -1) if halves_equal else angle
    return q, k, angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype), d_q, d_k


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    HK=st.integers(1, 3),
    group=st.integers(1, 3),
    S=st.integers(0, 5),
    dims=st.sampled_from([(2, 2), (6, 6), (64, 64), (80, 80), (5, 4), (24, 18), (32, 8)]),
    dtype=DTYPES,
    per_row=st.booleans(),
    halves_equal=st.booleans(),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_against_float64(impl, B, HK, group, S, dims, dtype, per_row, halves_equal, seed):
    D, rotary_dim = dims
    table_batch = B if per_row else 1
    q, k, cos, sin, d_q, d_k = inputs(B, HK * group, HK, S, D, dtype, seed, table_batch, halves_equal, rotary_dim)
    compare(
        ("q", "k", "d_q", "d_k"),
        lambda a, b: rope(a, b, cos, sin, impl=impl),
        lambda a, b: rope_torch(a, b, cos.to(a.dtype), sin.to(a.dtype)),
        [q, k],
        [d_q, d_k],
    )


def test_reference_is_llamas():
    q, k, cos, sin, *_ = inputs(2, 4, 2, 5, 8, torch.bfloat16)
    for got, want in zip(rope_torch(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_partial_rotary_is_phis(impl):
    q, k, cos, sin, *_ = inputs(2, 4, 2, 5, 16, torch.bfloat16, rotary_dim=12)
    want = apply_partial_rotary_pos_emb(q, k, cos, sin)
    for got, w in zip(rope_torch(q, k, cos, sin), want, strict=True):
        assert torch.equal(got, w)
    for got, w, x in zip(rope(q, k, cos, sin, impl=impl), want, (q, k), strict=True):
        torch.testing.assert_close(got, w, rtol=2**-6, atol=2**-6)
        assert torch.equal(got[..., 12:], x[..., 12:])


@pytest.mark.parametrize("rotary_dim", [8, 6])
@pytest.mark.parametrize("halves_equal", [True, False])
def test_gradcheck(halves_equal, rotary_dim):
    q, k, cos, sin, *_ = inputs(1, 2, 1, 3, 8, torch.float64, halves_equal=halves_equal, rotary_dim=rotary_dim)
    q.requires_grad_()
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rope(a, b, cos, sin, impl="torch"), (q, k))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 6])
def test_in_place_equals_out_of_place_on_transposed_views(impl, dtype, inverse, rotary_dim):
    q, k, cos, sin, *_ = inputs(2, 4, 2, 5, 8, dtype, rotary_dim=rotary_dim)
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    rotate(q, k, cos, sin, q_out, k_out, impl, inverse=inverse)
    rotate(q, k, cos, sin, q, k, impl, inverse=inverse)
    torch.testing.assert_close(q, q_out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k, k_out, rtol=1e-6, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(B=st.integers(1, 2), S=st.integers(0, 4), rotary_dim=st.sampled_from([8, 6]), dtype=DTYPES, out_dtype=DTYPES)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gathers_three_gradients_in_one_buffer(impl, B, S, rotary_dim, dtype, out_dtype):
    """Between the columns of others, which stay as they are."""
    HQ, HK, D = 3, 2, 8
    q, k, cos, sin, *_ = inputs(B, HQ, HK, S, D, dtype, rotary_dim=rotary_dim)
    v = torch.randn(B, S, D, HK, device=DEVICE).to(dtype).permute(0, 3, 1, 2)
    given_tensors = [q, k, v]
    copies = [t.clone() for t in given_tensors]
    buffer = torch.full((B, S, HQ * D + 2 * HK * D + 5), 7.0, dtype=out_dtype, device=DEVICE)
    columns = buffer[..., 3:-2].split([HQ * D, HK * D, HK * D], dim=-1)
    q_out, k_out, v_out = (
        part.view(B, S, -1, D).transpose(1, 2) if S else part.new_empty(B, part.shape[-1] // D, 0, D)
        for part in columns
    )
    rotate(q, k, cos, sin, q_out, k_out, impl, inverse=True, v=v, v_out=v_out)
    q_want, k_want = torch.empty_like(q, dtype=out_dtype), torch.empty_like(k, dtype=out_dtype)
    rotate(q, k, cos, sin, q_want, k_want, impl, inverse=True)
    for got, want in zip((q_out, k_out, v_out), (q_want, k_want, v.to(out_dtype)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert (buffer[..., :3] == 7).all()
    assert (buffer[..., -2:] == 7).all()
    assert all(torch.equal(t, copy) for t, copy in zip(given_tensors, copies, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_in_place_copies_v_as_well(impl):
    q, k, cos, sin, *_ = inputs(1, 2, 1, 4, 8, torch.float32)
    v, v_out = torch.randn_like(k), torch.empty_like(k)
    rotate(q, k, cos, sin, q, k, impl, v=v, v_out=v_out)
    assert torch.equal(v_out, v)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_retained_graph_gives_the_same_gradients_twice(impl):
    q, k, cos, sin, d_q, d_k = inputs(1, 2, 1, 4, 8, torch.float32, rotary_dim=6)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    outs = rope(q, k, cos, sin, impl=impl)
    first = torch.autograd.grad(outs, leaves, (d_q, d_k), retain_graph=True)
    second = torch.autograd.grad(outs, leaves, (d_q, d_k))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_float32_table_with_bfloat16_heads_rounds_once():
    """Autocast over a float32 model: stock promotes to float32 and rounds when attention casts."""
    q, k, cos, sin, *_ = inputs(1, 2, 1, 4, 8, torch.float32)
    q, k = q.bfloat16(), k.bfloat16()
    for got, want in zip(rope(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, want.bfloat16(), rtol=0, atol=0)


def test_error_names_the_shapes():
    q, k, cos, sin, *_ = inputs(1, 2, 1, 4, 8, torch.float32)
    with pytest.raises(ValueError, match=r"cos \(1, 3, 8\)"):
        rope(q, k, cos[:, :3], sin[:, :3])
    with pytest.raises(ValueError, match="rotary_dim even and at most head_dim"):
        rope(q[..., :7], k[..., :7], cos[..., :7], sin[..., :7])
    with pytest.raises(ValueError, match=r"k \(1, 1, 4, 6\)"):
        rope(q[..., :6], k[..., :6], cos, sin)
