import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.operators import DEVICE, compare
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_fastpeft.ops import rope, rope_torch
from hf_fastpeft.ops.rope import rotate

pytestmark = pytest.mark.usefixtures("poison_empty")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def inputs(B, HQ, HK, S, D, dtype, seed=0, table_batch=1, halves_equal=True):
    g = torch.Generator().manual_seed(seed)
    q, d_q = (torch.randn(B, HQ, S, D, generator=g).to(DEVICE, dtype) for _ in range(2))
    k, d_k = (torch.randn(B, HK, S, D, generator=g).to(DEVICE, dtype) for _ in range(2))
    angle = torch.randn(table_batch, S, D // 2 if halves_equal else D, generator=g)
    angle = torch.cat((angle, angle), -1) if halves_equal else angle
    return q, k, angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype), d_q, d_k


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3),
    HK=st.integers(1, 3),
    group=st.integers(1, 3),
    S=st.integers(0, 5),
    D=st.sampled_from([2, 6, 64, 80]),
    dtype=DTYPES,
    per_row=st.booleans(),
    halves_equal=st.booleans(),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_against_float64(impl, B, HK, group, S, D, dtype, per_row, halves_equal, seed):
    q, k, cos, sin, d_q, d_k = inputs(B, HK * group, HK, S, D, dtype, seed, B if per_row else 1, halves_equal)
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


@pytest.mark.parametrize("halves_equal", [True, False])
def test_gradcheck(halves_equal):
    q, k, cos, sin, *_ = inputs(1, 2, 1, 3, 4, torch.float64, halves_equal=halves_equal)
    q.requires_grad_()
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rope(a, b, cos, sin, impl="torch"), (q, k))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inverse", [False, True])
def test_in_place_equals_out_of_place_on_transposed_views(impl, dtype, inverse):
    q, k, cos, sin, *_ = inputs(2, 4, 2, 5, 8, dtype)
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    rotate(q, k, cos, sin, q_out, k_out, impl, inverse=inverse)
    rotate(q, k, cos, sin, q, k, impl, inverse=inverse)
    torch.testing.assert_close(q, q_out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k, k_out, rtol=1e-6, atol=1e-6)


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
    with pytest.raises(ValueError, match="even head_dim"):
        rope(q[..., :7], k[..., :7], cos[..., :7], sin[..., :7])
