"""Probes run at toy size; an operator whose results are wrong is not timed."""

from dataclasses import replace

import pytest
import torch

from benchmarks import ops, rates
from benchmarks.machine import device_name

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("probe", rates.PROBES)
def test_probe_gives_rates_or_says_why_not(probe):
    machine = rates.Machine(device_name(), torch.float32, 64, 1e-4)
    found = rates.measure([probe], machine, lambda line: None)
    assert found["rates"] or found["skipped"][probe]
    for rate in found["rates"]:
        assert rate["value"] > 0 or rate["unit"].startswith("refused")


@pytest.mark.parametrize("impl", ["ours", "torch", "liger"])
@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_operator_is_right_and_timed(operator, impl):
    measured = ops.measure(operator, impl, ceilings=(1e10, 1e11), tokens=8, budget_s=1e-4)
    if impl == "liger" and device_name() == "cpu":
        assert (measured.status, measured.reason) == ("skipped", "Liger's kernels need a GPU")
        return
    assert measured.status == "timed", measured.reason
    assert measured.both_ms > 0


def test_operator_with_a_wrong_gradient_is_not_timed(monkeypatch):
    right = ops.OPERATORS["swiglu"]
    wrong = replace(right, ours=lambda gate, up: right.ours(gate, up.detach() + 0.01 * (up - up.detach())))
    monkeypatch.setitem(ops.OPERATORS, "swiglu", wrong)
    measured = ops.measure("swiglu", "ours", ceilings=(1e10, 1e11), tokens=8)
    assert measured.status == "refused"
    assert measured.reason.startswith("result 2")  # the gradient of up
    assert measured.forward_ms == 0.0
