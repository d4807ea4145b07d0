"""All tolerances of the suite. The error of a fused path is bounded by plain torch's own error at that dtype."""

import torch

FLOAT64_REL = 1e-10  # patched against stock in float64: only the order of additions differs


def rel_err(got: torch.Tensor, want: torch.Tensor) -> float:
    """``||got - want|| / ||want||`` in float64."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def assert_no_worse(
    name: str,
    got: torch.Tensor,
    same_dtype: torch.Tensor,
    ref64: torch.Tensor,
    factor: float = 2.0,
    terms: float = 0.0,
) -> None:
    """``got`` is finite and at most ``factor`` times as far from ``ref64`` as plain torch at its dtype, plus eps.

    ``terms`` is the norm of the terms whose difference the result is, where they cancel: each is rounded a few times.
    The rounding errors of many numbers average; of a handful plain torch's can be zero by luck, so few get more room.
    """
    assert torch.isfinite(got).all(), f"{name}: non-finite values"
    err, base = rel_err(got, ref64), rel_err(same_dtype, ref64)
    cancelled = 4 * terms / ref64.double().norm().clamp_min(1e-30).item()
    floor = torch.finfo(got.dtype).eps * max(1.0, 4 / max(got.numel(), 1) ** 0.5, cancelled)
    assert err <= factor * base + floor, (
        f"{name}: relative error {err:.2e}; plain torch at {got.dtype} has {base:.2e}, eps {floor:.1e}"
    )
