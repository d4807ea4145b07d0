"""Queries and keys normalised over head_dim and rotated in one launch each way, as Qwen3 and Gemma 3 have them.

RMSNorm (Henry et al. 2020, arXiv 2010.04245, on why queries and keys; see ``rms_norm.py``), then ``rope.py``. What
lies between the two is neither stored nor rounded; the backward reads the projections' results again.
Shape legend: B = batch, S = seq_len, H = heads (Q of queries, K of keys), D = head_dim, E = D / 2.
"""

import torch

from hf_fastpeft.ops._backend import Impl, launch_op, on_device, tl, triton, use_triton
from hf_fastpeft.ops.rms_norm import Norm, rms_norm_torch
from hf_fastpeft.ops.rope import halves_torch, rope_torch, strides, table, turn_torch

__all__ = ["norm_rotate", "norm_rotate_bwd", "norm_rotate_torch"]


def norm_rotate_torch(
    q: torch.Tensor, k: torch.Tensor, q_norm: Norm, k_norm: Norm, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference in plain torch: ``q``, ``k`` ``(B, H, S, D)``, ``cos``, ``sin`` ``(B or 1, S, D)``.

    In float64 it is the ground truth of the tests.
    """
    q = rms_norm_torch(q, q_norm.weight, q_norm.eps, unit_offset=q_norm.unit_offset)
    k = rms_norm_torch(k, k_norm.weight, k_norm.eps, unit_offset=k_norm.unit_offset)
    return rope_torch(q, k, cos, sin)


if triton is not None:
    from hf_fastpeft.ops.rope import _copy, _heads, _load_halves, _load_table, _store_halves, _turn

    @triton.jit
    def _load_weights(weight, E, UNIT_OFFSET: tl.constexpr, BLOCK_E: tl.constexpr):
        e = tl.arange(0, BLOCK_E)
        w1 = tl.load(weight + e, mask=e < E, other=0.0).to(tl.float32)
        w2 = tl.load(weight + E + e, mask=e < E, other=0.0).to(tl.float32)
        if UNIT_OFFSET:
            w1 += 1.0
            w2 += 1.0
        return w1, w2

    @triton.jit
    def _fwd(
        x, x_strides, weight, eps, out, out_strides, rstd, rstd_strides, b, s, c1, c2, s1, s2, H, E,
        UNIT_OFFSET: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        """All heads of one position."""
        x1, x2 = _load_halves(x, x_strides, b, s, H, E, BLOCK_H, BLOCK_E)
        w1, w2 = _load_weights(weight, E, UNIT_OFFSET, BLOCK_E)
        square = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
        r = tl.rsqrt(square / (2 * E) + tl.cast(eps, tl.float32))[:, None]
        x1, x2 = _turn(x1 * r * w1[None, :], x2 * r * w2[None, :], c1, c2, s1, s2)
        _store_halves(out, out_strides, b, s, x1, x2, H, E, BLOCK_H, BLOCK_E)
        offs, mask = _heads(rstd_strides, b, s, H, 0, 1, BLOCK_H, 1)
        tl.store(rstd + offs, r, mask=mask)

    @triton.jit
    def _bwd(
        d_out, d_strides, x, x_strides, rstd, rstd_strides, weight, d_x, dx_strides, partial,
        b, s, c1, c2, s1, s2, H, E,
        UNIT_OFFSET: tl.constexpr, WITH_DW: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        """All heads of one position; ``partial`` takes the sum over them of the weight's gradient."""
        d1, d2 = _load_halves(d_out, d_strides, b, s, H, E, BLOCK_H, BLOCK_E)
        d1, d2 = _turn(d1, d2, c1, c2, s1, s2)
        x1, x2 = _load_halves(x, x_strides, b, s, H, E, BLOCK_H, BLOCK_E)
        offs, mask = _heads(rstd_strides, b, s, H, 0, 1, BLOCK_H, 1)
        r = tl.load(rstd + offs, mask=mask, other=0.0)
        x1 = x1 * r
        x2 = x2 * r
        if WITH_DW:
            e = tl.arange(0, BLOCK_E)
            tl.store(partial + e, tl.sum(d1 * x1, axis=0), mask=e < E)
            tl.store(partial + E + e, tl.sum(d2 * x2, axis=0), mask=e < E)
        w1, w2 = _load_weights(weight, E, UNIT_OFFSET, BLOCK_E)
        d1 = d1 * w1[None, :]
        d2 = d2 * w2[None, :]
        mean = ((tl.sum(d1 * x1, axis=1) + tl.sum(d2 * x2, axis=1)) / (2 * E))[:, None]
        d1 = r * (d1 - x1 * mean)
        d2 = r * (d2 - x2 * mean)
        _store_halves(d_x, dx_strides, b, s, d1, d2, H, E, BLOCK_H, BLOCK_E)

    @triton.jit
    def _norm_rotate_kernel(
        q, q_strides, q_weight, q_eps, q_out, qo_strides, q_rstd, qr_strides,
        k, k_strides, k_weight, k_eps, k_out, ko_strides, k_rstd, kr_strides,
        cos, sin, table_strides, S, HQ, HK, E,
        UNIT_OFFSET: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    ):  # fmt: skip
        position = tl.program_id(0).to(tl.int64)
        b = position // S
        s = position % S
        c1, c2, s1, s2 = _load_table(cos, sin, table_strides, b, s, E, False, BLOCK_E)
        _fwd(
            q, q_strides, q_weight, q_eps, q_out, qo_strides, q_rstd, qr_strides, b, s, c1, c2, s1, s2, HQ, E,
            UNIT_OFFSET, BLOCK_Q, BLOCK_E,
        )  # fmt: skip
        _fwd(
            k, k_strides, k_weight, k_eps, k_out, ko_strides, k_rstd, kr_strides, b, s, c1, c2, s1, s2, HK, E,
            UNIT_OFFSET, BLOCK_K, BLOCK_E,
        )  # fmt: skip

    @triton.jit
    def _norm_rotate_bwd_kernel(
        d_q, dq_strides, q, q_strides, q_rstd, qr_strides, q_weight, d_q_in, dqi_strides,
        d_k, dk_strides, k, k_strides, k_rstd, kr_strides, k_weight, d_k_in, dki_strides,
        cos, sin, table_strides, partial, v, v_strides, v_out, vo_strides, S, HQ, HK, E,
        UNIT_OFFSET: tl.constexpr, WITH_DW: tl.constexpr, WITH_V: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        position = tl.program_id(0).to(tl.int64)
        b = position // S
        s = position % S
        c1, c2, s1, s2 = _load_table(cos, sin, table_strides, b, s, E, True, BLOCK_E)
        q_partial = partial
        k_partial = partial
        if WITH_DW:  # (B * S, 2, D)
            q_partial = partial + position * 4 * E
            k_partial = q_partial + 2 * E
        _bwd(
            d_q, dq_strides, q, q_strides, q_rstd, qr_strides, q_weight, d_q_in, dqi_strides, q_partial,
            b, s, c1, c2, s1, s2, HQ, E, UNIT_OFFSET, WITH_DW, BLOCK_Q, BLOCK_E,
        )  # fmt: skip
        _bwd(
            d_k, dk_strides, k, k_strides, k_rstd, kr_strides, k_weight, d_k_in, dki_strides, k_partial,
            b, s, c1, c2, s1, s2, HK, E, UNIT_OFFSET, WITH_DW, BLOCK_K, BLOCK_E,
        )  # fmt: skip
        if WITH_V:
            _copy(v, v_strides, v_out, vo_strides, b, s, HK, 0, 2 * E, BLOCK_K, BLOCK_D)


def _blocks(q: torch.Tensor, k: torch.Tensor) -> dict[str, int]:
    block_q, block_e = triton.next_power_of_2(q.shape[1]), triton.next_power_of_2(q.shape[-1] // 2)
    return {
        "BLOCK_Q": block_q,
        "BLOCK_K": triton.next_power_of_2(k.shape[1]),
        "BLOCK_E": block_e,
        "num_warps": min(16, max(4, block_q * block_e // 256)),  # the backward holds four halves of all heads
    }


def _fwd_results(q: torch.Tensor, k: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    """``(q_rstd, k_rstd)`` ``(B, H, S, 1)``, in memory ``(B, S, H)``: a program writes all heads of one position."""
    B, HQ, S, _D = q.shape
    q_rstd, k_rstd = (torch.empty(B, S, H, 1, dtype=torch.float32, device=q.device) for H in (HQ, k.shape[1]))
    return q_rstd.transpose(1, 2), k_rstd.transpose(1, 2)


@launch_op(
    "norm_rotate(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float q_eps, float k_eps, bool unit_offset, "
    "Tensor cos, Tensor sin, Tensor(a!) q_out, Tensor(b!) k_out) -> (Tensor, Tensor)",
    _fwd_results,
)
def _launch_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    q_eps: float,
    k_eps: float,
    unit_offset: bool,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, HQ, S, D = q.shape
    q_rstd, k_rstd = _fwd_results(q, k)
    if q.numel():
        cos, sin, table_strides = table(cos, sin)
        with on_device(q):
            _norm_rotate_kernel[(B * S,)](
                q, q.stride(), q_weight, q_eps, q_out, q_out.stride(), q_rstd, q_rstd.stride(),
                k, k.stride(), k_weight, k_eps, k_out, k_out.stride(), k_rstd, k_rstd.stride(),
                cos, sin, table_strides, S, HQ, k.shape[1], D // 2, UNIT_OFFSET=unit_offset, **_blocks(q, k),
            )  # fmt: skip
    return q_rstd, k_rstd


@launch_op(
    "norm_rotate_bwd(Tensor d_q, Tensor d_k, Tensor q, Tensor k, Tensor q_rstd, Tensor k_rstd, Tensor q_weight, "
    "Tensor k_weight, bool unit_offset, Tensor cos, Tensor sin, Tensor(a!) d_q_in, Tensor(b!) d_k_in, "
    "Tensor(c!)? partial, Tensor? v, Tensor(d!)? v_out) -> ()",
    lambda *_: None,
)
def _launch_bwd(
    d_q: torch.Tensor,
    d_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_rstd: torch.Tensor,
    k_rstd: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    unit_offset: bool,
    cos: torch.Tensor,
    sin: torch.Tensor,
    d_q_in: torch.Tensor,
    d_k_in: torch.Tensor,
    partial: torch.Tensor | None,
    v: torch.Tensor | None,
    v_out: torch.Tensor | None,
) -> None:
    """``partial`` ``(B * S, 2, D)`` takes each position's part of the weights' gradients."""
    B, HQ, S, D = q.shape
    if not q.numel():
        return
    cos, sin, table_strides = table(cos, sin)
    with on_device(q):
        _norm_rotate_bwd_kernel[(B * S,)](
            d_q, d_q.stride(), q, q.stride(), q_rstd, q_rstd.stride(), q_weight, d_q_in, d_q_in.stride(),
            d_k, d_k.stride(), k, k.stride(), k_rstd, k_rstd.stride(), k_weight, d_k_in, d_k_in.stride(),
            cos, sin, table_strides, partial, v, strides(v), v_out, strides(v_out), S, HQ, k.shape[1], D // 2,
            UNIT_OFFSET=unit_offset, WITH_DW=partial is not None, WITH_V=v is not None,
            BLOCK_D=triton.next_power_of_2(D), **_blocks(q, k),
        )  # fmt: skip


def norm_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    q_norm: Norm,
    k_norm: Norm,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    impl: Impl,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise and rotate ``q`` and ``k`` into ``q_out`` and ``k_out``, without autograd; rounds once, at the end.

    Args:
        q: shape ``(B, Q, S, D)``, any strides; not written to.
        k: shape ``(B, K, S, D)``, any strides; not written to.
        q_norm: of the queries, weight ``(D,)``.
        k_norm: of the keys; ``unit_offset`` of ``q_norm``.
        cos: shape ``(B or 1, S, D)``, any floating dtype.
        sin: shape of ``cos``.
        q_out: shape of ``q``, any strides.
        k_out: shape of ``k``, any strides.
        impl: implementation.

    Returns:
        ``(q_rstd, k_rstd)``, reciprocal root mean squares ``(B, heads, S, 1)`` in float32 (float64 for it).
    """
    assert q_norm.unit_offset == k_norm.unit_offset and cos.shape[-1] == q.shape[-1]
    if use_triton(impl, q):
        return _launch_fwd(  # type: ignore[no-any-return]
            q, k, q_norm.weight, k_norm.weight, q_norm.eps, k_norm.eps, q_norm.unit_offset, cos, sin, q_out, k_out
        )
    wide = torch.promote_types(q.dtype, torch.float32)
    halves = halves_torch(cos, sin, wide, inverse=False)
    rstds = []
    for x, norm, out in ((q, q_norm, q_out), (k, k_norm, k_out)):
        x_wide = x.to(wide)
        rstd = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rstds.append(rstd.add_(norm.eps).rsqrt_())
        turn_torch((x_wide * rstd).mul_(_factor(norm, wide)), out, halves)
    return rstds[0], rstds[1]


def _factor(norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    weight = norm.weight.to(dtype)
    return weight + 1 if norm.unit_offset else weight


def norm_rotate_bwd(
    d_q: torch.Tensor,
    d_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_rstd: torch.Tensor,
    k_rstd: torch.Tensor,
    q_norm: Norm,
    k_norm: Norm,
    cos: torch.Tensor,
    sin: torch.Tensor,
    d_q_in: torch.Tensor,
    d_k_in: torch.Tensor,
    impl: Impl,
    *,
    with_dw: bool,
    v: torch.Tensor | None = None,
    v_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of :func:`norm_rotate` in one launch; no input is written to.

    Args:
        d_q: gradient of ``q_out``, any strides.
        d_k: gradient of ``k_out``, any strides.
        q: as in the forward.
        k: as in the forward.
        q_rstd: first result of the forward.
        k_rstd: second result of the forward.
        q_norm: as in the forward.
        k_norm: as in the forward.
        cos: as in the forward.
        sin: as in the forward.
        d_q_in: filled with the gradient of ``q``; its shape, any strides.
        d_k_in: filled with the gradient of ``k``; its shape, any strides.
        impl: implementation.
        with_dw: compute the weights' gradients.
        v: shape ``(B, K, S, D)``, any strides; copied in the same launch.
        v_out: shape of ``v``, any strides; given with ``v``.

    Returns:
        ``(d_q_weight, d_k_weight)``, each ``(D,)`` in its weight's dtype, or None twice.
    """
    B, _, S, D = q.shape
    if use_triton(impl, q):
        partial_P2D = torch.empty(B * S, 2, D, dtype=torch.float32, device=q.device) if with_dw else None
        _launch_bwd(
            d_q, d_k, q, k, q_rstd, k_rstd, q_norm.weight, k_norm.weight, q_norm.unit_offset, cos, sin, d_q_in, d_k_in,
            partial_P2D, v, v_out,
        )  # fmt: skip
        if partial_P2D is None:
            return None, None
        d_weight_2D = partial_P2D.sum(0)
        return d_weight_2D[0].to(q_norm.weight.dtype), d_weight_2D[1].to(k_norm.weight.dtype)
    wide = q_rstd.dtype
    halves = halves_torch(cos, sin, wide, inverse=True)
    d_weights: list[torch.Tensor | None] = []
    for d, x, rstd, norm, d_in in ((d_q, q, q_rstd, q_norm, d_q_in), (d_k, k, k_rstd, k_norm, d_k_in)):
        d_normed = torch.empty(d.shape, dtype=wide, device=d.device)
        turn_torch(d, d_normed, halves)
        x_hat = x.to(wide) * rstd
        d_weights.append((d_normed * x_hat).sum((0, 1, 2)).to(norm.weight.dtype) if with_dw else None)
        wd = d_normed.mul_(_factor(norm, wide))
        # d_x = rstd * (wd - x_hat * mean(wd * x_hat))
        wd.addcmul_(x_hat, (wd * x_hat).sum(-1, keepdim=True), value=-1.0 / D)
        torch.mul(wd, rstd, out=d_in)
    if v is not None and v_out is not None:
        v_out.copy_(v)
    return d_weights[0], d_weights[1]
