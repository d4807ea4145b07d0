"""Rotary position embedding of queries and keys in one launch (Su et al. 2021, arXiv 2104.09864, eq. 34).

Hugging Face's half-split layout: ``out = x * cos + rotate_half(x) * sin``. A table narrower than a head turns the
head's first dimensions and lets the rest pass (partial rotary, as in Phi).
Shape legend: B = batch, S = seq_len, H = heads (Q of queries, K of keys), D = head_dim, R = rotary_dim, E = R / 2.
"""

import torch

from hf_fastpeft.ops._backend import Impl, first_derivative_only, launch_op, on_device, tl, triton, use_triton

__all__ = ["rope", "rope_torch", "rotate"]


def rope_torch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference in plain torch: ``q``, ``k`` ``(B, H, S, D)``, ``cos``, ``sin`` ``(B or 1, S, R)``."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    R = cos.shape[-1]

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x[..., :R].chunk(2, dim=-1)
        turned = x[..., :R] * cos + torch.cat((-second, first), dim=-1) * sin
        return turned if x.shape[-1] == R else torch.cat((turned, x[..., R:]), dim=-1)

    return turn(q), turn(k)


if triton is not None:
    # strides are those of (B, H, S, D), or (B, S, R) for the tables

    @triton.jit
    def _load_table(cos, sin, strides, b, s, E, INVERSE: tl.constexpr, BLOCK_E: tl.constexpr):
        """``(c1, c2, s1, s2)``: cosines and sines of both halves of one position."""
        e = tl.arange(0, BLOCK_E).to(tl.int64)
        first = b * strides[0] + s * strides[1] + e * strides[2]
        second = first + E * strides[2]
        c1 = tl.load(cos + first, mask=e < E, other=0.0).to(tl.float32)
        c2 = tl.load(cos + second, mask=e < E, other=0.0).to(tl.float32)
        s1 = tl.load(sin + first, mask=e < E, other=0.0).to(tl.float32)
        s2 = tl.load(sin + second, mask=e < E, other=0.0).to(tl.float32)
        if INVERSE:  # the transposed rotation: each half takes the other half's sine, negated
            swap = s1
            s1 = -s2
            s2 = -swap
        return c1, c2, s1, s2

    @triton.jit
    def _heads(strides, b, s, H, first, end, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
        """Offsets of the dimensions ``[first, end)`` of all heads at one position, and their mask."""
        h = tl.arange(0, BLOCK_H).to(tl.int64)
        d = first + tl.arange(0, BLOCK_D).to(tl.int64)
        offs = b * strides[0] + h[:, None] * strides[1] + s * strides[2] + d[None, :] * strides[3]
        return offs, (h < H)[:, None] & (d < end)[None, :]

    @triton.jit
    def _load_halves(x, strides, b, s, H, E, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr):
        offs, mask = _heads(strides, b, s, H, 0, E, BLOCK_H, BLOCK_E)
        x1 = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32)
        return x1, tl.load(x + offs + E * strides[3], mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _store_halves(out, strides, b, s, x1, x2, H, E, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr):
        offs, mask = _heads(strides, b, s, H, 0, E, BLOCK_H, BLOCK_E)
        tl.store(out + offs, x1, mask=mask)
        tl.store(out + offs + E * strides[3], x2, mask=mask)

    @triton.jit
    def _turn(x1, x2, c1, c2, s1, s2):
        return x1 * c1[None, :] - x2 * s1[None, :], x2 * c2[None, :] + x1 * s2[None, :]

    @triton.jit
    def _copy(
        x, x_strides, out, out_strides, b, s, H, first, end, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
    ):  # fmt: skip
        offs, mask = _heads(x_strides, b, s, H, first, end, BLOCK_H, BLOCK_D)
        to, _ = _heads(out_strides, b, s, H, first, end, BLOCK_H, BLOCK_D)
        tl.store(out + to, tl.load(x + offs, mask=mask, other=0.0), mask=mask)

    @triton.jit
    def _rotate_kernel(
        q, q_strides, q_out, qo_strides, k, k_strides, k_out, ko_strides, v, v_strides, v_out, vo_strides,
        cos, sin, table_strides, S, HQ, HK, D, E,
        INVERSE: tl.constexpr, WITH_V: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
        BLOCK_REST: tl.constexpr,
    ):  # fmt: skip
        position = tl.program_id(0).to(tl.int64)
        b = position // S
        s = position % S
        c1, c2, s1, s2 = _load_table(cos, sin, table_strides, b, s, E, INVERSE, BLOCK_E)
        x1, x2 = _load_halves(q, q_strides, b, s, HQ, E, BLOCK_Q, BLOCK_E)
        x1, x2 = _turn(x1, x2, c1, c2, s1, s2)
        _store_halves(q_out, qo_strides, b, s, x1, x2, HQ, E, BLOCK_Q, BLOCK_E)
        x1, x2 = _load_halves(k, k_strides, b, s, HK, E, BLOCK_K, BLOCK_E)
        x1, x2 = _turn(x1, x2, c1, c2, s1, s2)
        _store_halves(k_out, ko_strides, b, s, x1, x2, HK, E, BLOCK_K, BLOCK_E)
        if BLOCK_REST > 0:
            _copy(q, q_strides, q_out, qo_strides, b, s, HQ, 2 * E, D, BLOCK_Q, BLOCK_REST)
            _copy(k, k_strides, k_out, ko_strides, b, s, HK, 2 * E, D, BLOCK_K, BLOCK_REST)
        if WITH_V:
            _copy(v, v_strides, v_out, vo_strides, b, s, HK, 0, D, BLOCK_K, BLOCK_D)


def table(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
    """``(cos, sin, strides)`` as the kernels take them: common strides, that of the batch zero where it is shared."""
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, (0 if cos.shape[0] == 1 else cos.stride(0), *cos.stride()[1:])


def strides(t: torch.Tensor | None) -> tuple[int, ...] | None:
    """Strides of a tensor that may be missing."""
    return None if t is None else t.stride()


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    v: torch.Tensor | None,
    v_out: torch.Tensor | None,
    inverse: bool,
) -> None:
    B, HQ, S, D = q.shape
    HK, E = k.shape[1], cos.shape[-1] // 2
    if not q.numel():
        return
    rest = D - 2 * E if q_out is not q else 0
    cos, sin, table_strides = table(cos, sin)
    with on_device(q):
        _rotate_kernel[(B * S,)](
            q, q.stride(), q_out, q_out.stride(), k, k.stride(), k_out, k_out.stride(),
            v, strides(v), v_out, strides(v_out), cos, sin, table_strides, S, HQ, HK, D, E,
            INVERSE=inverse, WITH_V=v is not None,
            BLOCK_Q=triton.next_power_of_2(HQ), BLOCK_K=triton.next_power_of_2(HK),
            BLOCK_D=triton.next_power_of_2(D), BLOCK_E=triton.next_power_of_2(E),
            BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        )  # fmt: skip


@launch_op(
    "rotate_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? v, Tensor(c!)? v_out, bool inverse) -> ()",
    lambda q, k, cos, sin, v, v_out, inverse: None,
)
def _launch_in_place(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    v: torch.Tensor | None,
    v_out: torch.Tensor | None,
    inverse: bool,
) -> None:
    _launch(q, k, cos, sin, q, k, v, v_out, inverse)


@launch_op(
    "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor(a!) q_out, Tensor(b!) k_out, Tensor? v, "
    "Tensor(c!)? v_out, bool inverse) -> ()",
    lambda q, k, cos, sin, q_out, k_out, v, v_out, inverse: None,
)
def _launch_into(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    v: torch.Tensor | None,
    v_out: torch.Tensor | None,
    inverse: bool,
) -> None:
    _launch(q, k, cos, sin, q_out, k_out, v, v_out, inverse)


def halves_torch(
    cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(c1, c2, s1, s2)`` of shape ``(B or 1, 1, S, E)``, as :func:`turn_torch` takes them."""
    E = cos.shape[-1] // 2
    cos_B1SR, sin_B1SR = cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)
    c1, c2 = cos_B1SR[..., :E], cos_B1SR[..., E:]
    s1, s2 = sin_B1SR[..., :E], sin_B1SR[..., E:]
    return (c1, c2, -s2, -s1) if inverse else (c1, c2, s1, s2)


def turn_torch(
    x: torch.Tensor, out: torch.Tensor, halves: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    """Rotate ``x`` into ``out``, which may be ``x``; computes in the dtype of ``halves`` and rounds once."""
    c1, c2, s1, s2 = halves
    E = c1.shape[-1]
    x1, x2 = x[..., :E].to(c1.dtype), x[..., E : 2 * E].to(c1.dtype)
    out1, out2 = out[..., :E], out[..., E : 2 * E]
    if out is x and x.dtype == c1.dtype:  # x2 is needed until the second half is done
        from_first = x1 * s2
        x1.mul_(c1).addcmul_(x2, s1, value=-1)
        x2.mul_(c2).add_(from_first)
    elif out.dtype == c1.dtype:
        torch.mul(x1, c1, out=out1).addcmul_(x2, s1, value=-1)
        torch.mul(x2, c2, out=out2).addcmul_(x1, s2)
    else:
        out1.copy_(x1 * c1 - x2 * s1)
        out2.copy_(x2 * c2 + x1 * s2)
    if out is not x and x.shape[-1] > 2 * E:
        out[..., 2 * E :] = x[..., 2 * E :]


def rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    impl: Impl,
    *,
    inverse: bool = False,
    v: torch.Tensor | None = None,
    v_out: torch.Tensor | None = None,
) -> None:
    """Rotate ``q`` and ``k`` into ``q_out`` and ``k_out``, without autograd.

    Args:
        q: shape ``(B, Q, S, D)``, any strides.
        k: shape ``(B, K, S, D)``, any strides.
        cos: shape ``(B or 1, S, R)``, any floating dtype; the two halves may differ. Dimensions from the ``R``-th on
            pass through: copied, or left alone in place.
        sin: shape of ``cos``.
        q_out: shape of ``q``, any strides; may be ``q`` itself (in place, then ``k_out`` must be ``k``).
        k_out: shape of ``k``, any strides; may be ``k`` itself.
        impl: implementation.
        inverse: apply the transposed rotation, which is the gradient.
        v: shape ``(B, K, S, D)``, any strides; copied in the same launch, where the backward gathers three gradients
            in one buffer.
        v_out: shape of ``v``, any strides; given with ``v``.
    """
    if not use_triton(impl, q):
        # float64 stays float64; narrower inputs turn in float32 and round once
        halves = halves_torch(cos, sin, torch.promote_types(q.dtype, torch.float32), inverse)
        turn_torch(q, q_out, halves)
        turn_torch(k, k_out, halves)
        if v is not None and v_out is not None:
            v_out.copy_(v)
    elif q_out is q and k_out is k:
        _launch_in_place(q, k, cos, sin, v, v_out, inverse)
    else:
        _launch_into(q, k, cos, sin, q_out, k_out, v, v_out, inverse)


class _RoPE(torch.autograd.Function):
    """Saves cos and sin only."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, impl: Impl) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.impl = impl
        ctx.save_for_backward(cos, sin)
        q_out, k_out = torch.empty_like(q), torch.empty_like(k)
        rotate(q, k, cos, sin, q_out, k_out, impl)
        return q_out, k_out

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_q, d_k):
        cos, sin = ctx.saved_tensors
        d_q_in, d_k_in = torch.empty_like(d_q), torch.empty_like(d_k)
        rotate(d_q, d_k, cos, sin, d_q_in, d_k_in, ctx.impl, inverse=True)
        return d_q_in, d_k_in, None, None, None


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, impl: Impl = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with their rotary position embedding.

    Args:
        q: shape ``(batch, num_heads, seq_len, head_dim)``, any strides; float16, bfloat16 or float32 for Triton.
        k: shape ``(batch, num_kv_heads, seq_len, head_dim)``; dtype and device of ``q``.
        cos: shape ``(batch or 1, seq_len, rotary_dim)``, any floating dtype; no gradient flows into it. Where
            rotary_dim is less than head_dim, the other dimensions pass through.
        sin: shape of ``cos``.
        impl: ``"auto"`` takes Triton on CUDA tensors and torch elsewhere.

    Returns:
        New tensors of the shapes and dtype of ``q`` and ``k``. Computes in float32 (float64 for it), rounds once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or rotary_dim is odd or exceeds head_dim.
        RuntimeError: ``impl="triton"`` where Triton cannot run.

    Source: Su et al. 2021, "RoFormer", eq. 34, arXiv 2104.09864; half-split layout as in Hugging Face's Llama.
    """
    fits = (
        q.ndim == k.ndim == 4
        and (q.shape[0], *q.shape[2:], q.dtype, q.device) == (k.shape[0], *k.shape[2:], k.dtype, k.device)
        and cos.shape == sin.shape
        and cos.shape[:-1] in ((q.shape[0], q.shape[2]), (1, q.shape[2]))
        and cos.shape[-1] in range(2, q.shape[-1] + 1, 2)
    )
    if not fits:
        raise ValueError(
            f"rope: q {tuple(q.shape)} {q.dtype} {q.device}, k {tuple(k.shape)} {k.dtype} {k.device}, "
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; needs (batch, heads, seq_len, head_dim) with one "
            f"batch, seq_len, head_dim, dtype and device, and cos and sin of (batch or 1, seq_len, rotary_dim), "
            f"rotary_dim even and at most head_dim"
        )
    return _RoPE.apply(q, k, cos, sin, impl)  # type: ignore[no-any-return,no-untyped-call]
