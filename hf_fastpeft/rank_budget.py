"""Integer ranks under a parameter budget, from importance: shares that are clamped, filled up and rounded together.

    share   r_i = clamp(t * I_i / sqrt(in_i + out_i), min_rank, max_rank)  with t such that  sum_i r_i c_i = budget
    cost    c_i = in_i + out_i parameters a rank

Source: He et al. 2025, "GoRA", arXiv 2502.12171, whose shares these are; it rounds each by itself, so its total
drifts; here the total is a bound.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import torch

__all__ = ["ranks_under_budget"]

_OPEN_CANDIDATES = 64  # rounded together, see _round_up


def ranks_under_budget(
    importance: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    *,
    budget: int,
    min_rank: int,
    max_rank: int,
) -> dict[str, int]:
    """Integer ranks with ``sum r * (in + out) <= budget``, as close to it as rounding shares can come.

    Shares are exact fractions. All are rounded down; then those are rounded up that fill the budget best, among equals
    the ones with the largest remainders (exact over the 64 candidates around the boundary; larger remainders go up
    before). No share that was rounded down could be rounded up within the rest.

    Args:
        importance: module -> importance, finite and not negative; 0 gives ``min_rank``.
        shapes: module -> (in_features, out_features).
        budget: parameters.
        min_rank: lower limit, capped at the module's smaller side.
        max_rank: upper limit, capped in the same way.

    Raises:
        ValueError: the budget is below all modules at ``min_rank``, or importance is not finite or negative.
    """
    if wrong := [path for path, value in importance.items() if not 0 <= value < math.inf]:
        raise ValueError(f"ranks_under_budget: importance of {wrong[0]!r} is {importance[wrong[0]]!r}")
    costs = {path: sum(shapes[path]) for path in importance}
    low = {path: min(min_rank, *shapes[path]) for path in importance}
    high = {path: min(max_rank, *shapes[path]) for path in importance}
    least = sum(low[path] * cost for path, cost in costs.items())
    if budget < least:
        raise ValueError(f"ranks_under_budget: budget={budget!r} is below min_rank={min_rank!r} everywhere: {least}")
    weights = {path: Fraction(importance[path]) / Fraction(math.sqrt(cost)) for path, cost in costs.items()}

    def clamp(path: str, t: Fraction) -> Fraction:
        return min(max(t * weights[path], Fraction(low[path])), Fraction(high[path]))

    t = _water_level(weights, costs, low, high, budget)
    shares = {path: clamp(path, t) for path in importance}
    ranks = {path: math.floor(share) for path, share in shares.items()}
    remainders = {path: share - ranks[path] for path, share in shares.items() if share > ranks[path]}
    left = budget - sum(ranks[path] * cost for path, cost in costs.items())
    for path in _round_up(remainders, costs, left):
        ranks[path] += 1
    return ranks


def _water_level(
    weights: Mapping[str, Fraction],
    costs: Mapping[str, int],
    low: Mapping[str, int],
    high: Mapping[str, int],
    budget: int,
) -> Fraction:
    """The largest useful ``t`` with ``sum clamp(t * weight) * cost <= budget``; the sum is piecewise linear in t."""

    def total(t: Fraction) -> Fraction:
        spent = (min(max(t * weights[p], Fraction(low[p])), Fraction(high[p])) * cost for p, cost in costs.items())
        return sum(spent, Fraction(0))

    live = [path for path, weight in weights.items() if weight]
    knots = sorted({Fraction(0), *(Fraction(limit[path]) / weights[path] for path in live for limit in (low, high))})
    first, last = 0, len(knots) - 1
    if total(knots[last]) <= budget:
        return knots[last]
    while last - first > 1:  # total(first) <= budget < total(last)
        middle = (first + last) // 2
        first, last = (middle, last) if total(knots[middle]) <= budget else (first, middle)
    spent, beyond = total(knots[first]), total(knots[last])
    return knots[first] + (knots[last] - knots[first]) * (budget - spent) / (beyond - spent)


def _round_up(remainders: Mapping[str, Fraction], costs: Mapping[str, int], left: int) -> list[str]:
    """Modules whose share is rounded up: the best fill of ``left`` parameters."""
    order = sorted(remainders, key=lambda path: -remainders[path])  # stable: ties in the model's order
    boundary, spent = 0, 0
    while boundary < len(order) and spent + costs[order[boundary]] <= left:
        spent += costs[order[boundary]]
        boundary += 1
    start = max(0, min(boundary - _OPEN_CANDIDATES // 2, len(order) - _OPEN_CANDIDATES))
    chosen = order[:start]
    left -= sum(costs[path] for path in chosen)
    candidates = order[start : start + _OPEN_CANDIDATES]
    unit = math.gcd(*(costs[path] for path in candidates)) if candidates else 1
    sizes = [costs[path] // unit for path in candidates]
    room = min(left // unit, sum(sizes))
    # best[w]: largest sum of remainders of candidates that cost exactly w units; -inf where none does
    best = torch.full((room + 1,), -math.inf, dtype=torch.float64)
    best[0] = 0
    taken = []
    for path, size in zip(candidates, sizes, strict=True):
        with_it = torch.full_like(best, -math.inf)
        if size <= room:
            with_it[size:] = best[: room + 1 - size] + float(remainders[path])
        taken.append(with_it > best)
        best = torch.maximum(best, with_it)
    fill = int(best.isfinite().nonzero().max())
    for path, size, take in reversed(list(zip(candidates, sizes, taken, strict=True))):
        if take[fill]:
            chosen.append(path)
            fill -= size
            left -= costs[path]
    for path in order:
        if path not in chosen and costs[path] <= left:
            chosen.append(path)
            left -= costs[path]
    return chosen
