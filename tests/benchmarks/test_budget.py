"""Traced costs of a decoder layer as upper bounds, so that they only go down; and the tracer on known operators."""

import json
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import budget
from benchmarks.trace import COSTS, PRODUCTS, LaunchCounter, saved_storages

# (model, variant): launches forward and backward, MB and KB a token, GEMM FLOPs over 4ND.
# Lower them with the change that lowers the figure; raising one is a regression.
BOUNDS = {
    ("llama-3-8b", "patched"): (17, 28, 0.423, 94.7, 1.0121),
    ("llama-3.2-1b", "patched"): (17, 28, 0.2304, 51.7, 1.0234),
    ("qwen2-7b", "patched"): (17, 28, 0.482, 106.9, 1.0126),
    ("mistral-7b", "patched"): (17, 28, 0.423, 94.7, 1.0121),
    ("qwen3-8b", "patched"): (17, 28, 0.397, 96.9, 1.0126),
}


@pytest.mark.parametrize(("model", "variant"), BOUNDS)
def test_patched_layer_stays_within_its_budget(model, variant):
    launches_fwd, launches_bwd, elementwise_mb, saved_kb, gemm = BOUNDS[model, variant]
    b = budget.layer_budget(model, variant)
    assert not b.stock_blocks, "a block ran stock inside the patched model"
    assert b.launches_forward <= launches_fwd
    assert b.launches_backward <= launches_bwd
    assert b.elementwise_bytes_per_token <= elementwise_mb * 1e6
    assert b.saved_bytes_per_token <= b.alive_bytes_per_token <= saved_kb * 1e3
    assert 1 <= b.gemm_flops_per_4nd <= gemm


@pytest.mark.parametrize(
    ("variant", "launches", "gemm"), [("stock", (94, 130), 1), ("stock, checkpointing", (94, 220), 1.5)]
)
def test_stock_qwen2_7b_costs_what_it_is_known_to_cost(variant, launches, gemm):
    """94: nine for each adapted linear, 16 for norms, 10 for the rotation, 2 activation, attention, 2 residuals."""
    b = budget.layer_budget("qwen2-7b", variant)
    assert (b.launches_forward, b.launches_backward) == launches
    assert b.gemm_flops_per_4nd == pytest.approx(gemm, rel=0.01)
    if variant == "stock":
        assert b.elementwise_bytes_per_token == pytest.approx(3.67e6, rel=0.01)
        assert b.saved_bytes_per_token == pytest.approx(240e3, rel=0.01)
    else:
        assert b.alive_bytes_per_token == pytest.approx(2 * 3584, rel=0.05)


def test_counter_on_known_operators():
    with FakeTensorMode():
        a, b = torch.empty(64, 32), torch.empty(32, 16)
        with LaunchCounter() as counter:
            out = a @ b.t().contiguous().t()  # one copy, one product; the views are free
            out.mul_(2.0)
            torch.empty_like(out).copy_(out)
    phase = counter.phases["forward"]
    assert phase.operators == {"aten.clone": 1, "aten.mm": 1, "aten.mul_": 1, "aten.copy_": 1}
    assert phase.gemm_flops == 2 * 64 * 32 * 16
    assert phase.elementwise_bytes == 4 * (2 * 32 * 16 + 2 * 64 * 16 + 2 * 64 * 16)


def test_saved_bytes_count_a_storage_once_and_no_parameters():
    weight = torch.nn.Parameter(torch.ones(8))
    x = torch.ones(4, 8, requires_grad=True)
    with saved_storages({weight.untyped_storage()._cdata}) as saved:
        y = x * weight  # saves x (and the parameter)
        y[:2].square().sum() + y[2:].square().sum()  # saves two views of y
    assert sorted(saved.values()) == [4 * 8 * 4, 4 * 8 * 4]


def test_every_launch_of_ours_has_a_cost():
    operators = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "hf_fastpeft::" in name}
    # a whole block inside torch.compile, launches and products
    operators -= {name for name in operators if name.endswith(("_forward", "_backward"))}
    products = {name.partition(".")[2] for name in PRODUCTS if name.startswith("hf_fastpeft.")}
    assert operators == set(COSTS) | products


def test_command_writes_json(tmp_path, monkeypatch, capsys):
    out = tmp_path / "budget.json"
    monkeypatch.setattr(sys, "argv", ["budget", "--model", "toy", "--seq-len", "64", "--json", str(out)])
    budget.main()
    assert "nothing was timed" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert set(result["layers"]) == set(budget.VARIANTS)
    assert result["kind"] == "budget (traced)"
