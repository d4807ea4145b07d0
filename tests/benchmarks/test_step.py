"""The step benchmark sees what it must see: wrong gradients are refused, slowdowns show, nothing finished is lost."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gate, machine, step, worker
from benchmarks.models import METHODS, SHAPES
from benchmarks.suites import SUITES, TOY, Setting, Suite
from benchmarks.variants import VARIANTS, Prepared, Skipped, _patch, prepare, stock_loss

DEVICE = machine.device_name()
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # other libraries' warnings are not what is tested here
]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Here and in processes started here: tiny work waits a time slice for other threads on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_planted_wrong_gradient_is_refused_and_not_timed():
    result = worker.measure("planted-wrong", TOY, steps=1, warmup=0)
    assert result["status"] == "refused"
    assert "o_proj.lora_A" in result["reason"]
    assert "median_ms" not in result


def test_planted_wrong_gradient_is_refused_in_half_precision():
    verdict = gate.check("planted-wrong", replace(TOY, dtype="bfloat16"), DEVICE)
    assert not verdict.passed
    assert verdict.worst == "o_proj.lora_A"


def test_reference_from_another_process_is_the_same():
    setting = replace(TOY, dtype="bfloat16")
    here, there = gate.reference(setting, DEVICE), gate.reference_elsewhere(setting)
    assert there.bounds == pytest.approx(here.bounds, rel=0.1)
    torch.testing.assert_close(there.want, here.want, rtol=1e-3, atol=1e-5)


def test_planted_slowdown_is_found():
    stock, slow = (worker.measure(v, TOY, steps=5, warmup=2) for v in ("stock", "planted-slow"))
    assert stock["status"] == slow["status"] == "timed"
    assert slow["median_ms"] - stock["median_ms"] == pytest.approx(30, abs=15)
    assert stock["launches"] == slow["launches"] > 100


@pytest.mark.parametrize("variant", ["trl", "stock+checkpointing", "ours", "ours-trl", "ours+checkpointing"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_passes_what_is_right(variant, dtype):
    verdict = gate.check(variant, replace(TOY, dtype=dtype, batch=3, sampled=True), DEVICE)
    assert verdict.passed, verdict


@pytest.mark.parametrize("change", [{"method": "sora"}, {"method": "dora"}, {"method": "adalora"}, {"dropout": 0.05}])
def test_every_method_trains(change):
    result = worker.measure("ours", replace(TOY, **change), steps=1, warmup=1)
    assert result["status"] == "timed", result
    assert result["report"]["model_type"] == "llama"


def test_what_cannot_run_here_is_skipped_with_the_reason():
    with pytest.raises(Skipped, match="unsloth"):
        prepare("unsloth", SHAPES["toy"], replace(TOY, method="dora"), DEVICE)
    with pytest.raises(Skipped, match="no patch for model_type 'made-up'"):
        _patch(Prepared(SimpleNamespace(config=SimpleNamespace(model_type="made-up")), stock_loss))


def test_model_flops_by_hand():
    """toy: a layer has 64 x (2 x 64 + 2 x 32 + 3 x 176) weights, the head 64 x 512."""
    layer = 64 * (2 * 64 + 2 * 32 + 3 * 176)
    rows = [32, 16]
    want = 4 * 48 * (2 * layer + 64 * 512) + 2 * 6 * (32 * 32 + 16 * 16) * 64
    assert worker.model_flops(TOY, rows) == want


def test_suites_name_known_models_and_variants():
    for suite in SUITES.values():
        assert set(suite.variants) <= set(VARIANTS)
        for setting in suite.settings:
            assert setting.model in SHAPES
            assert setting.method in METHODS
            assert setting.name


def test_suite_runs_in_processes_of_its_own(tmp_path):
    out = tmp_path / "step.json"
    result = step.run_suite(Suite((TOY,), ("ours",), steps=2, warmup=1, threads=1), out, name="toy")
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    first, again = result["runs"]
    assert (first["status"], again["status"]) == ("timed", "timed"), result["runs"]
    assert first["drift"] == again["drift"] == step.drift_of(result["runs"])
    assert first["report"]["blocks"]["mlp"]["fused"] == 2
    assert first["gate"]["passed"]
    assert result["machine"]["versions"]["torch"] == torch.__version__
    assert "ours" in step.table(result)


def timed(median_ms):
    return {"status": "timed", "median_ms": median_ms, "tokens_per_s": 1.0, "spread": 0.0, "wall_s": 1.0} | {
        "fraction_of_matmul_peak": 0.0,
        "model_tflops_per_s": 1.0,
    }


def planned(monkeypatch, times):
    """Replace the processes by these results, in order; an exception is raised."""
    queue = list(times)

    def run(variant, setting, suite):
        found = queue.pop(0)
        if isinstance(found, BaseException):
            raise found
        return {"variant": variant, "setting": {}, **found}

    monkeypatch.setattr(step, "_run", run)


def test_a_suite_that_is_cut_off_keeps_what_it_finished(tmp_path, monkeypatch):
    planned(monkeypatch, [timed(100.0), timed(50.0), KeyboardInterrupt()])
    out = tmp_path / "step.json"
    with pytest.raises(KeyboardInterrupt):
        step.run_suite(Suite((TOY,), ("stock", "ours")), out, name="cut")
    kept = json.loads(out.read_text())
    assert [run["median_ms"] for run in kept["runs"]] == [100.0, 50.0]
    assert kept["complete"] is False


def test_a_drifting_machine_gives_no_result(tmp_path, monkeypatch):
    planned(monkeypatch, [timed(100.0), timed(50.0), timed(140.0)])
    result = step.run_suite(Suite((TOY,), ("stock", "ours")), tmp_path / "step.json", name="drift")
    assert all(run["discarded"] for run in result["runs"])
    assert "no result" in step.table(result)
    planned(monkeypatch, [timed(100.0), timed(50.0), timed(101.0)])
    result = step.run_suite(Suite((TOY,), ("stock", "ours")), tmp_path / "step.json", name="quiet")
    assert not any(run["discarded"] for run in result["runs"])
    assert result["runs"][0]["drift"] == pytest.approx(0.01)


def test_nothing_is_started_when_time_is_up(tmp_path, monkeypatch):
    planned(monkeypatch, [])
    result = step.run_suite(Suite((TOY,), ("stock",)), tmp_path / "step.json", name="late", limit_s=-1.0)
    assert [run["status"] for run in result["runs"]] == ["not started"]


def test_setting_names_tell_settings_apart():
    settings = [s for suite in SUITES.values() for s in suite.settings]
    assert len({s.name for s in settings}) == len(set(settings))
    assert Setting("toy", 1, 8).name == "toy, B1 S8, lora r16, bfloat16"
