"""Rotary position embedding of queries and keys in one launch (Su et al. 2021, arXiv 2104.09864, eq. 34).

Hugging Face's half-split layout: ``out = x * cos + rotate_half(x) * sin``.
Shape legend: B = batch, S = seq_len, H = heads (Q of queries, K of keys), D = head_dim, E = D / 2.
"""

import torch

from hf_fastpeft.ops._backend import Impl, launch_op, on_device, tl, triton, use_triton

__all__ = ["rope", "rope_torch", "rotate"]


def rope_torch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference in plain torch: ``q``, ``k`` ``(B, H, S, D)``, ``cos``, ``sin`` ``(B or 1, S, D)``."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turn(q), turn(k)


if triton is not None:

    @triton.jit
    def _turn(
        x, out, x_b, x_s, x_h, x_d, o_b, o_s, o_h, o_d, b, s, c1, c2, s1, s2, H, E,
        BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        """All heads of one position: ``(x1, x2) -> (x1 c1 - x2 s1, x2 c2 + x1 s2)``; ``out`` may be ``x``."""
        h = tl.arange(0, BLOCK_H).to(tl.int64)
        e = tl.arange(0, BLOCK_E).to(tl.int64)
        mask = (h < H)[:, None] & (e < E)[None, :]
        at = x + b * x_b + s * x_s + h[:, None] * x_h + e[None, :] * x_d
        x1 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(at + E * x_d, mask=mask, other=0.0).to(tl.float32)
        to = out + b * o_b + s * o_s + h[:, None] * o_h + e[None, :] * o_d
        tl.store(to, x1 * c1[None, :] - x2 * s1[None, :], mask=mask)
        tl.store(to + E * o_d, x2 * c2[None, :] + x1 * s2[None, :], mask=mask)

    @triton.jit
    def _rotate_kernel(
        q, q_out, q_b, q_s, q_h, q_d, qo_b, qo_s, qo_h, qo_d,
        k, k_out, k_b, k_s, k_h, k_d, ko_b, ko_s, ko_h, ko_d,
        cos, sin, c_b, c_s, c_d, S, HQ, HK, E,
        INVERSE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        position = tl.program_id(0).to(tl.int64)
        b = position // S
        s = position % S
        e = tl.arange(0, BLOCK_E).to(tl.int64)
        row = b * c_b + s * c_s + e * c_d
        c1 = tl.load(cos + row, mask=e < E, other=0.0).to(tl.float32)
        c2 = tl.load(cos + row + E * c_d, mask=e < E, other=0.0).to(tl.float32)
        s1 = tl.load(sin + row, mask=e < E, other=0.0).to(tl.float32)
        s2 = tl.load(sin + row + E * c_d, mask=e < E, other=0.0).to(tl.float32)
        if INVERSE:  # the transposed rotation: each half takes the other half's sine, negated
            swap = s1
            s1 = -s2
            s2 = -swap
        _turn(
            q, q_out, q_b, q_s, q_h, q_d, qo_b, qo_s, qo_h, qo_d, b, s, c1, c2, s1, s2, HQ, E,
            BLOCK_H=BLOCK_Q, BLOCK_E=BLOCK_E,
        )  # fmt: skip
        _turn(
            k, k_out, k_b, k_s, k_h, k_d, ko_b, ko_s, ko_h, ko_d, b, s, c1, c2, s1, s2, HK, E,
            BLOCK_H=BLOCK_K, BLOCK_E=BLOCK_E,
        )  # fmt: skip


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    inverse: bool,
) -> None:
    B, HQ, S, D = q.shape
    HK, E = k.shape[1], D // 2
    if not q.numel():
        return
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    row_stride = 0 if cos.shape[0] == 1 else cos.stride(0)

    def strides(t: torch.Tensor) -> tuple[int, int, int, int]:
        b, h, s, d = t.stride()
        return b, s, h, d

    with on_device(q):
        _rotate_kernel[(B * S,)](
            q, q_out, *strides(q), *strides(q_out), k, k_out, *strides(k), *strides(k_out),
            cos, sin, row_stride, cos.stride(1), cos.stride(2), S, HQ, HK, E, INVERSE=inverse,
            BLOCK_Q=triton.next_power_of_2(HQ), BLOCK_K=triton.next_power_of_2(HK),
            BLOCK_E=triton.next_power_of_2(E),
        )  # fmt: skip


@launch_op(
    "rotate_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool inverse) -> ()",
    lambda q, k, cos, sin, inverse: None,
)
def _launch_in_place(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> None:
    _launch(q, k, cos, sin, q, k, inverse)


@launch_op(
    "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor(a!) q_out, Tensor(b!) k_out, bool inverse) -> ()",
    lambda q, k, cos, sin, q_out, k_out, inverse: None,
)
def _launch_into(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    inverse: bool,
) -> None:
    _launch(q, k, cos, sin, q_out, k_out, inverse)


def _turn_torch(
    x: torch.Tensor, out: torch.Tensor, halves: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    c1, c2, s1, s2 = halves
    wide = x.to(c1.dtype)
    E = x.shape[-1] // 2
    x1, x2 = wide[..., :E], wide[..., E:]
    if out is wide:  # x2 is needed until the second half is done
        from_first = x1 * s2
        x1.mul_(c1).addcmul_(x2, s1, value=-1)
        x2.mul_(c2).add_(from_first)
    elif out.dtype == wide.dtype:
        torch.mul(x1, c1, out=out[..., :E]).addcmul_(x2, s1, value=-1)
        torch.mul(x2, c2, out=out[..., E:]).addcmul_(x1, s2)
    else:
        out[..., :E] = x1 * c1 - x2 * s1
        out[..., E:] = x2 * c2 + x1 * s2


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
) -> None:
    """Rotate ``q`` and ``k`` into ``q_out`` and ``k_out``, without autograd.

    Args:
        q: shape ``(B, Q, S, D)``, any strides.
        k: shape ``(B, K, S, D)``, any strides.
        cos: shape ``(B or 1, S, D)``, any floating dtype; the two halves may differ.
        sin: shape of ``cos``.
        q_out: shape of ``q``, any strides; may be ``q`` itself (in place).
        k_out: shape of ``k``, any strides; may be ``k`` itself.
        impl: implementation.
        inverse: apply the transposed rotation, which is the gradient.
    """
    if not use_triton(impl, q):
        E = q.shape[-1] // 2
        # float64 stays float64; narrower inputs turn in float32 and round once
        wide = torch.promote_types(q.dtype, torch.float32)
        cos_B1SD, sin_B1SD = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
        c1, c2 = cos_B1SD[..., :E], cos_B1SD[..., E:]
        s1, s2 = sin_B1SD[..., :E], sin_B1SD[..., E:]
        halves = (c1, c2, -s2, -s1) if inverse else (c1, c2, s1, s2)
        _turn_torch(q, q_out, halves)
        _turn_torch(k, k_out, halves)
    elif q_out is q and k_out is k:
        _launch_in_place(q, k, cos, sin, inverse)
    else:
        _launch_into(q, k, cos, sin, q_out, k_out, inverse)


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
    @torch.autograd.function.once_differentiable
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
        cos: shape ``(batch or 1, seq_len, head_dim)``, any floating dtype; no gradient flows into it.
        sin: shape of ``cos``.
        impl: ``"auto"`` takes Triton on CUDA tensors and torch elsewhere.

    Returns:
        New tensors of the shapes and dtype of ``q`` and ``k``. Computes in float32 (float64 for it), rounds once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or head_dim is odd.
        RuntimeError: ``impl="triton"`` where Triton cannot run.

    Source: Su et al. 2021, "RoFormer", eq. 34, arXiv 2104.09864; half-split layout as in Hugging Face's Llama.
    """
    fits = (
        q.ndim == k.ndim == 4
        and (q.shape[0], *q.shape[2:], q.dtype, q.device) == (k.shape[0], *k.shape[2:], k.dtype, k.device)
        and cos.shape == sin.shape
        and cos.shape in ((q.shape[0], *q.shape[2:]), (1, *q.shape[2:]))
        and q.shape[-1] % 2 == 0
    )
    if not fits:
        raise ValueError(
            f"rope: q {tuple(q.shape)} {q.dtype} {q.device}, k {tuple(k.shape)} {k.dtype} {k.device}, "
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}; needs (batch, heads, seq_len, head_dim) with one "
            f"batch, seq_len, even head_dim, dtype and device, and cos and sin of (batch or 1, seq_len, head_dim)"
        )
    return _RoPE.apply(q, k, cos, sin, impl)  # type: ignore[no-any-return,no-untyped-call]
