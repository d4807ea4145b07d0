"""Folds one chunk of the vocabulary's logits into running statistics of each token's distribution.

The online log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3) over chunks of the vocabulary, with
the sums that entropy and the other per-token outputs need, leaving ``exp(z - max)`` behind for the gradient's product.

Shape legend: N = tokens, C = vocabulary entries of this chunk.
"""

from dataclasses import dataclass

import torch

from hf_fastpeft.ops._backend import Impl, launch_op, on_device, tl, triton, use_triton

__all__ = ["VocabStats", "fold", "fold_torch", "lift_of"]

BLOCK = 2048


def lift_of(dtype: torch.dtype) -> float:
    """The factor of :func:`fold`'s first result, whose largest value is otherwise 1.

    float16 ends at 6e-8 below 1, where a sure token has the rest of its vocabulary, but at 65504 above.
    """
    return 2.0**15 if dtype == torch.float16 else 1.0


@dataclass(slots=True)
class VocabStats:
    """Running statistics of N tokens, all float32 (float64 for it) except ``argmax`` (int64); written in place.

    Attributes:
        maximum: largest logit so far.
        rest: sum of ``exp(z - maximum)`` over all but the target, so that ``1 - p`` of a sure token keeps its digits.
        weighted: sum of ``z exp(z - maximum)``, for the entropy.
        squares: sum of ``exp(z - maximum)^2``.
        logits: sum of ``z``.
        target: the target's logit, once its chunk was seen.
        argmax: vocabulary index of the first largest logit.
    """

    maximum: torch.Tensor
    rest: torch.Tensor
    weighted: torch.Tensor
    squares: torch.Tensor
    logits: torch.Tensor
    target: torch.Tensor
    argmax: torch.Tensor

    @classmethod
    def empty(cls, n: int, dtype: torch.dtype, device: torch.device) -> "VocabStats":
        """Statistics of nothing seen yet."""

        def zeros(kind: torch.dtype) -> torch.Tensor:
            return torch.zeros(n, dtype=kind, device=device)

        lowest = torch.full((n,), float("-inf"), dtype=dtype, device=device)
        rest, weighted, squares, logits, target = (zeros(dtype) for _ in range(5))
        return cls(lowest, rest, weighted, squares, logits, target, zeros(torch.int64))

    def rows(self, start: int, end: int) -> "VocabStats":
        """Views of some tokens."""
        return VocabStats(*(getattr(self, name)[start:end] for name in self.__slots__))


def fold_torch(
    z: torch.Tensor, targets: torch.Tensor, start: int, stats: VocabStats, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`fold`; in the dtype of the statistics."""
    z_NC = z.to(stats.rest.dtype)
    slope_NC = None
    if softcap is not None:
        tanh_NC = torch.tanh(z_NC * (scale / softcap))
        z_NC, slope_NC = softcap * tanh_NC, 1 - tanh_NC.square()
    elif scale != 1.0:
        z_NC = z_NC * scale
    local_N = targets - start
    here_N = (local_N >= 0) & (local_N < z.shape[1])
    index_N1 = local_N.clamp(0, z.shape[1] - 1).unsqueeze(1)
    stats.target.copy_(torch.where(here_N, z_NC.gather(1, index_N1).squeeze(1), stats.target))
    chunk_max_N, chunk_argmax_N = z_NC.max(1)
    stats.argmax.copy_(torch.where(chunk_max_N > stats.maximum, chunk_argmax_N + start, stats.argmax))
    new_max_N = torch.maximum(stats.maximum, chunk_max_N)
    finite_N = torch.where(new_max_N == -torch.inf, 0.0, new_max_N)  # a tile of nothing but -inf counts nothing
    rescale_N = torch.exp(stats.maximum - finite_N)
    e_NC = (z_NC - finite_N.unsqueeze(1)).exp_()
    stats.maximum.copy_(new_max_N)
    stats.weighted.mul_(rescale_N).add_((e_NC * z_NC).sum(1))
    stats.squares.mul_(rescale_N.square()).add_(torch.linalg.vector_norm(e_NC, dim=1).square_())
    stats.logits.add_(z_NC.sum(1))
    e_NC.scatter_(1, index_N1, torch.where(here_N.unsqueeze(1), 0.0, e_NC.gather(1, index_N1)))
    stats.rest.mul_(rescale_N).add_(e_NC.sum(1))
    if slope_NC is not None:
        e_NC.mul_(slope_NC)
    lift = lift_of(z.dtype)
    return (e_NC if lift == 1.0 else e_NC.mul_(lift)).to(z.dtype), rescale_N


if triton is not None:

    @triton.jit
    def _fold_kernel(
        z, z_row, targets, maximum, rest, weighted, squares, logits, target, argmax, rescale,
        start, C, scale, softcap,
        HAS_SOFTCAP: tl.constexpr, LIFT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        scale_f32 = tl.cast(scale, tl.float32)
        cap_f32 = tl.cast(softcap, tl.float32)
        at = z + row * z_row
        local = tl.load(targets + row) - start
        old_max = tl.load(maximum + row)
        best = old_max
        best_at = tl.load(argmax + row)
        for first in range(0, C, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            x = tl.load(at + cols, mask=cols < C, other=0.0).to(tl.float32) * scale_f32
            if HAS_SOFTCAP:  # tanh(x) = 2 sigmoid(2 x) - 1
                x = cap_f32 * (2 * tl.sigmoid(2 * x / cap_f32) - 1)
            x = tl.where(cols < C, x, float("-inf"))
            top = tl.max(x, axis=0)
            top_at = tl.min(tl.where(x == top, cols, C), axis=0) + start  # the first, as argmax has it
            best_at = tl.where(top > best, top_at.to(tl.int64), best_at)
            best = tl.maximum(best, top)
        base = tl.where(best == float("-inf"), 0.0, best)  # nothing but -inf counts nothing
        r = tl.exp(old_max - base)
        s = tl.load(rest + row) * r
        ws = tl.load(weighted + row) * r
        sq = tl.load(squares + row) * r * r
        zs = tl.load(logits + row)
        t = tl.load(target + row)
        for first in range(0, C, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            inside = cols < C
            x = tl.load(at + cols, mask=inside, other=0.0).to(tl.float32) * scale_f32
            slope = tl.full((BLOCK,), 1.0, tl.float32)
            if HAS_SOFTCAP:
                tanh = 2 * tl.sigmoid(2 * x / cap_f32) - 1
                slope = 1 - tanh * tanh
                x = cap_f32 * tanh
            e = tl.where(inside, tl.exp(x - base), 0.0)
            ws += tl.sum(e * x, axis=0)
            sq += tl.sum(e * e, axis=0)
            zs += tl.sum(tl.where(inside, x, 0.0), axis=0)
            is_target = inside & (cols == local)
            t += tl.sum(tl.where(is_target, x, 0.0), axis=0)
            e = tl.where(is_target, 0.0, e)
            s += tl.sum(e, axis=0)
            tl.store(at + cols, e * slope * LIFT, mask=inside)
        tl.store(maximum + row, best)
        tl.store(argmax + row, best_at)
        tl.store(rest + row, s)
        tl.store(weighted + row, ws)
        tl.store(squares + row, sq)
        tl.store(logits + row, zs)
        tl.store(target + row, t)
        tl.store(rescale + row, r)


@launch_op(
    "fold(Tensor(a!) z, Tensor targets, Tensor(b!) maximum, Tensor(c!) rest, Tensor(d!) weighted, Tensor(e!) squares, "
    "Tensor(f!) logits, Tensor(g!) target, Tensor(h!) argmax, int start, float scale, float? softcap) -> Tensor",
    lambda z, targets, maximum, *_: torch.empty_like(maximum),
)
def _launch(
    z: torch.Tensor,
    targets: torch.Tensor,
    maximum: torch.Tensor,
    rest: torch.Tensor,
    weighted: torch.Tensor,
    squares: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    argmax: torch.Tensor,
    start: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Folds ``z`` in place; returns the rescaling of each row."""
    rescale_N = torch.empty_like(maximum)
    with on_device(z):
        _fold_kernel[(z.shape[0],)](
            z, z.stride(0), targets, maximum, rest, weighted, squares, logits, target, argmax, rescale_N,
            start, z.shape[1], scale, softcap or 1.0,
            HAS_SOFTCAP=softcap is not None, LIFT=lift_of(z.dtype), BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return rescale_N


def fold(
    z: torch.Tensor,
    targets: torch.Tensor,
    start: int,
    stats: VocabStats,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold a chunk of logits into ``stats``.

    Args:
        z: raw products ``(N, C)``, rows contiguous; may be overwritten with the first result.
        targets: vocabulary index of each token's target, ``(N,)`` int64.
        start: vocabulary index of the chunk's first column.
        stats: updated in place.
        scale: factor of the products before the soft cap.
        softcap: ``c`` in ``c tanh(z / c)`` (Gemma 2, arXiv 2408.00118, section 2), or None.
        impl: implementation.

    Returns:
        ``exp(z - maximum) * dz/dproduct`` without ``scale``, times :func:`lift_of` the dtype, zero at the target,
        ``(N, C)`` in the dtype of ``z``; and the factor ``(N,)`` by which anything summed relative to the old maximum
        must be multiplied.
    """
    if not use_triton(impl, z) or not z.shape[0]:
        return fold_torch(z, targets, start, stats, scale, softcap)
    rescale_N = _launch(
        z, targets, stats.maximum, stats.rest, stats.weighted, stats.squares, stats.logits, stats.target,
        stats.argmax, start, scale, softcap,
    )  # fmt: skip
    return z, rescale_N
