"""Per-token log-probabilities through a frozen output head, with the gradient taken in the forward.

For a frozen head, d log p_target / d h = (1 - p_t) (W_t - sum_{j != t} p_j W_j / (1 - p_t)) depends on its own row
only: it is built beside the log-sum-exp, in the same pass over the vocabulary, and the backward scales rows. That is
two products of vocabulary size instead of three (logits, logits again, gradient), and no (tokens, vocabulary) tensor.
The rows are kept without the factor (1 - p_t), which goes into the backward's: float16, before any loss scale, would
keep little of a sure token's row.

Shape legend: N = tokens with a label, H = hidden_size, V = vocab_size, C = columns of one chunk.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from hf_fastpeft.ops._backend import Impl, first_derivative_only
from hf_fastpeft.ops.vocab_fold import VocabStats, fold, lift_of

__all__ = ["HeadOptions", "TokenStats", "lm_head_log_probs"]

# tokens and vocabulary entries of one tile: a large product on a GPU, about the cache on a CPU
TILES = {"cuda": (4096, 32768), "cpu": (1024, 2048)}


class HeadOptions(NamedTuple):
    """How products become logits: ``z = softcap(product * scale) / temperature``."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class TokenStats(NamedTuple):
    """Per-token results, each ``(N,)`` float32 (float64 for it); gradients flow through the first two."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    log_sum_sq_probs: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor  # bool


def _fold_scales(options: HeadOptions) -> tuple[float, float | None]:
    """``(scale, softcap)`` that give ``z`` in one step: the temperature divides both."""
    if options.softcap is None:
        return options.scale / options.temperature, None
    return options.scale / options.temperature, options.softcap / options.temperature


def _accumulate(acc: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``acc += left @ right`` in the accumulator's float32: sums of rounded chunks would bias the gradient."""
    if acc.dtype == left.dtype:
        acc.addmm_(left, right)
    elif acc.is_cuda:
        torch.addmm(acc, left, right, out_dtype=acc.dtype, out=acc)
    else:
        acc.addmm_(left.to(acc.dtype), right.to(acc.dtype))


Tile = tuple[int, torch.Tensor, torch.Tensor | None]


def _tiles(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, n: int
) -> tuple[Iterator[Tile], list[tuple[int, int]]]:
    """``((first column, weight tile, bias tile), ...), ((first token, end), ...)``; each tile is cast once."""
    tokens, entries = TILES.get(weight.device.type, TILES["cuda"])
    starts = range(0, weight.shape[0], entries)
    columns = (
        (i, weight[i : i + entries].to(dtype), None if bias is None else bias[i : i + entries].to(dtype))
        for i in starts
    )
    return columns, [(first, min(first + tokens, n)) for first in range(0, n, tokens)]


def _products(h_NH: torch.Tensor, weight_CH: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    return h_NH @ weight_CH.t() if bias_C is None else torch.addmm(bias_C, h_NH, weight_CH.t())


class _LMHead(torch.autograd.Function):
    """Saves the gradient rows and their factors; the hidden states too where the entropy may carry a gradient."""

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight,
        bias,
        targets: torch.Tensor,
        options: HeadOptions,
        dtype: torch.dtype,
        impl,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        N, H = hidden.shape
        wide = torch.promote_types(dtype, torch.float32)
        stats = VocabStats.empty(N, wide, hidden.device)
        need_grad = ctx.needs_input_grad[0]
        others_NH = torch.zeros(N, H, dtype=wide, device=hidden.device) if need_grad else None
        scale, softcap = _fold_scales(options)
        h_NH = hidden.to(dtype)
        columns, rows = _tiles(weight, bias, dtype, N)
        for start, weight_CH, bias_C in columns:
            for first, last in rows:
                z_NC = _products(h_NH[first:last], weight_CH, bias_C)
                e_NC, rescale_N = fold(
                    z_NC, targets[first:last], start, stats.rows(first, last), scale=scale, softcap=softcap, impl=impl
                )
                if others_NH is not None:
                    part = others_NH[first:last].mul_(rescale_N.unsqueeze(1))
                    _accumulate(part, e_NC, weight_CH)
        below_N = stats.target - stats.maximum  # the target's logit under the largest one
        log_total_N = torch.log1p(stats.rest + torch.expm1(below_N))
        total_N, log_z_N = stats.rest + below_N.exp(), stats.maximum + log_total_N
        log_probs_N = below_N - log_total_N
        entropy_N = log_z_N - stats.weighted / total_N
        is_top1_N = stats.argmax == targets
        if others_NH is None:
            weight[:, :1].index_select(0, targets)  # stock's IndexError for a target outside the vocabulary
        gradient_NH = unsure_N = None
        if others_NH is not None:
            unsure_N = stats.rest * (scale / total_N)
            rest_N = stats.rest.clamp_min(torch.finfo(wide).tiny)  # zero where the other logits are out of range
            target_NH = weight.index_select(0, targets).to(wide)  # unlike weight[targets], refuses a negative label
            if softcap is not None:
                target_NH.mul_((1 - (stats.target / softcap).square()).unsqueeze(1))
            others_NH.mul_((-1 / lift_of(dtype) / rest_N).unsqueeze(1))
            gradient_NH = others_NH.add_(target_NH).to(hidden.dtype)
        ctx.options, ctx.dtype = options, dtype
        squares_N = stats.squares.log() - 2 * log_total_N
        mean_N = stats.logits / weight.shape[0]
        if entropy_gradient:
            ctx.save_for_backward(gradient_NH, unsure_N, hidden, weight, bias, log_z_N, entropy_N)
            ctx.mark_non_differentiable(squares_N, mean_N, is_top1_N)
        else:
            ctx.save_for_backward(gradient_NH, unsure_N)
            ctx.mark_non_differentiable(entropy_N, squares_N, mean_N, is_top1_N)
        return log_probs_N, entropy_N, squares_N, mean_N, is_top1_N

    @staticmethod
    @first_derivative_only
    def backward(ctx, d_log_probs, d_entropy, *_) -> tuple[Any, ...]:
        gradient_NH, unsure_N, *others = ctx.saved_tensors
        d_hidden_NH = None
        if gradient_NH is not None and d_log_probs is not None:
            d_hidden_NH = (gradient_NH * (unsure_N * d_log_probs).unsqueeze(1)).to(gradient_NH.dtype)
        if gradient_NH is not None and d_entropy is not None:
            extra_NH = _entropy_bwd(d_entropy, *others, options=ctx.options, dtype=ctx.dtype)
            d_hidden_NH = extra_NH if d_hidden_NH is None else d_hidden_NH + extra_NH
        return d_hidden_NH, None, None, None, None, None, None, None


def _entropy_bwd(
    d_entropy_N, hidden, weight, bias, log_z_N, entropy_N, *, options: HeadOptions, dtype: torch.dtype
) -> torch.Tensor:
    """d entropy / d z_j = -p_j (log p_j + entropy): the logits once more, and a third product."""
    wide = log_z_N.dtype
    d_hidden_NH = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    scale, softcap = _fold_scales(options)
    h_NH = hidden.to(dtype)
    columns, rows = _tiles(weight, bias, dtype, hidden.shape[0])
    for _, weight_CH, bias_C in columns:
        for first, last in rows:
            z_NC = _products(h_NH[first:last], weight_CH, bias_C).to(wide) * scale
            slope = torch.full((), scale, dtype=wide, device=hidden.device)
            if softcap is not None:
                tanh_NC = torch.tanh(z_NC / softcap)
                z_NC, slope = softcap * tanh_NC, scale * (1 - tanh_NC.square())
            log_p_NC = z_NC - log_z_N[first:last].unsqueeze(1)
            d_z_NC = -log_p_NC.exp() * (log_p_NC + entropy_N[first:last].unsqueeze(1)) * slope
            d_z_NC.mul_(d_entropy_N[first:last].unsqueeze(1))
            _accumulate(d_hidden_NH[first:last], d_z_NC.to(dtype), weight_CH)
    return d_hidden_NH.to(hidden.dtype)


def lm_head_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    dtype: torch.dtype,
    options: HeadOptions | None = None,
    impl: Impl = "auto",
    entropy_gradient: bool = True,
) -> TokenStats:
    """Log-probability of each token's target, and what trainers log beside it.

    Args:
        hidden: ``(N, hidden_size)``, rows that have a label.
        weight: frozen head, ``(vocab_size, hidden_size)``.
        bias: frozen, ``(vocab_size,)`` or None.
        targets: ``(N,)`` int64, in ``[0, vocab_size)``.
        dtype: compute dtype of the products; sums are kept in float32 (float64 for it).
        options: scaling, soft cap and temperature of the logits; none by default.
        impl: implementation of the fold over the vocabulary.
        entropy_gradient: whether the entropy may carry a gradient; without it ``hidden`` is not kept.

    Returns:
        :class:`TokenStats`. Gradients flow into ``hidden`` through ``log_probs`` (ready since the forward) and
        ``entropy`` (recomputed, three products in all).

    Raises:
        IndexError: a target outside the vocabulary.
        ValueError: weight or bias wants a gradient, which this block does not compute.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("lm_head_log_probs: the head is trained; this block is for a frozen head")
    options = options or HeadOptions()
    return TokenStats(*_LMHead.apply(hidden, weight, bias, targets, options, dtype, impl, entropy_gradient))  # type: ignore[no-untyped-call]
