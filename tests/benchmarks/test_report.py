"""The report is made of result files alone and labels what was not timed; the GPU check survives what fails."""

import json
import subprocess
import sys

import pytest

from benchmarks import ROOT, gpu_check, report

MACHINE = {"device": "Made-up GPU", "threads": 1, "commit": "abc", "versions": {"torch": "9.9"}, "device_type": "cuda"}


def timed(variant, batch, median_ms, gigabytes, **more):
    return {
        "variant": variant,
        "status": "timed",
        "setting": {"batch": batch},
        "setting_name": f"batch {batch}",
        "ends": variant == "stock+checkpointing",
        "repeat": False,
        "median_ms": median_ms,
        "spread": 0.01,
        "tokens_per_s": 1e6 / median_ms,
        "model_tflops_per_s": 300.0,
        "peak_allocated_bytes": gigabytes * 1e9,
        "launches": 10,
        **more,
    }


@pytest.fixture
def results(tmp_path):
    runs = [
        timed("stock+checkpointing", 4, 200.0, 20),
        timed("ours", 4, 100.0, 10),
        {"variant": "unsloth", "status": "skipped", "reason": "unsloth is not installed", "setting": {"batch": 4}}
        | {"setting_name": "batch 4", "ends": False, "repeat": False},
    ]
    step = {
        "kind": "step",
        "complete": False,
        "command": "run me",
        "machine": MACHINE,
        "drift_allowed": 0.03,
        "runs": runs,
    }
    layer = {"launches_forward": 9, "launches_backward": 8, "elementwise_bytes_per_token": 2e6}
    layer |= {"alive_bytes_per_token": 3e3, "gemm_flops_per_4nd": 1.01}
    budget = {"kind": "budget (traced)", "settings": {"model": "toy"}, "layers": {"stock": layer, "patched": layer}}
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "step-qwen-batches-cuda.json").write_text(json.dumps(step))
    (folder / "budget-toy.json").write_text(json.dumps(budget))
    return folder


def test_report_fills_the_readme_between_its_markers(results, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"head\n{report.BEGIN}\nold\n{report.END}\ntail\n")
    for _ in range(2):  # running it again changes nothing
        monkeypatch.setattr(sys, "argv", ["report", "--results", str(results), "--readme", str(readme)])
        report.main()
    text = readme.read_text()
    assert text.startswith("head\n")
    assert text.endswith("tail\n")
    assert "old" not in text
    assert text.count("traced, not a speed") == 1
    assert "| 4 | ours | 0.100 | 2.00 x | 10.0 | -50% |" in text
    assert "unsloth is not installed" in text
    assert "cut off" in text
    assert "(results/budget.png)" in text
    assert (results / "budget.png").stat().st_size > 1000


def test_committed_results_make_a_report():
    text = report.build(report.load(ROOT / "benchmarks" / "results"), [])
    assert "qwen2-7b | stock | 94 + 130" in text


def test_gpu_check_part_that_fails_or_hangs_is_reported(tmp_path):
    fails = gpu_check.Part(("benchmarks.step", "--suite", "unknown"), 60)
    row = gpu_check.run_part("fails", fails, tmp_path, gpu=True, limit_s=60)
    assert row["status"].startswith("failed")
    assert "invalid choice" in row["detail"]
    hangs = gpu_check.Part(("timeit", "-n", "1", "__import__('time').sleep(60)"), 1)
    assert gpu_check.run_part("hangs", hangs, tmp_path, gpu=True, limit_s=60)["status"] == "timed out"
    lacks = gpu_check.Part(("x",), 1, needs=("no_such_module",))
    assert "no_such_module" in gpu_check.run_part("lacks", lacks, tmp_path, gpu=True, limit_s=60)["detail"]


def test_patches_are_found_in_a_checkout_that_is_not_installed(tmp_path):
    """As on a machine with nothing installed: the editable install's finders are taken out first."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "import benchmarks, hf_fastpeft.patches.llama as m; print(m.FAMILY.model_type, m.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["llama", "hf_fastpeft.patches.llama"], done.stderr
