"""The command line: exit codes, one clean message for a mistake, and each command on tiny inputs."""

import json
import os
import subprocess
import sys

import pytest
import tiny
from typer.testing import CliRunner

from hf_fastpeft import cli
from hf_fastpeft.errors import FastPeftError

# PEFT 0.21 reads the old name of a property of transformers 5.23 (peft_model.py, PeftModel.__init__).
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.tiny_llama().save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    rows = "".join(json.dumps(row) + "\n" for row in tiny.tiny_dataset(8))
    (folder / "rows.jsonl").write_text(rows)
    text = f"""\
base_model: {folder / "model"}
datasets: [{{path: {folder / "rows.jsonl"}}}]
adapter: lora
lora_target_linear: true
liger_rope: true
max_steps: 2
micro_batch_size: 2
output_dir: {folder / "out"}
fastpeft: {{plots: false}}
"""
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_train_then_export(run_file, tmp_path):
    out = tmp_path / "out"
    done = call(
        "train", run_file, "--set", f"output_dir={out}", "--set", "adapter=sora", "--set", "fastpeft.sora.target_r=4"
    )
    assert done.exit_code == 0, done.output
    assert "liger_rope: patch_model does that here" in done.output
    assert "load_adapter" in done.output
    exported = call("export", out / "adapter", tmp_path / "plain")
    assert exported.exit_code == 0, exported.output
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_explain_shows_what_each_key_becomes(run_file):
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["explain", str(run_file), "--set", "warmup_steps=3"])
    assert shown.exit_code == 0, shown.output
    for part in ("per_device_train_batch_size", "LoraConfig(target_modules)", "'all-linear'", "patch_model(impl)"):
        assert part in shown.output


def test_info_names_versions_families_and_sources():
    shown = call("info")
    assert shown.exit_code == 0, shown.output
    for part in ("hf_fastpeft", "torch", "llama", "smollm2-135m-instruct", "stdlib-docstrings"):
        assert part in shown.output


@pytest.mark.parametrize("adapter", ["lora", "sora", "adalora", "adaptive_lora"])
def test_verify_compares_a_run_with_stock(run_file, adapter):
    checked = call("verify", run_file, "--set", f"adapter={adapter}")
    assert checked.exit_code == 0, checked.output


def test_verify_fails_with_its_own_exit_code(run_file, monkeypatch):
    from hf_fastpeft import verification

    class Failed:
        passed = False

        def __str__(self):
            return "gradients differ"

    monkeypatch.setattr(verification, "verify", lambda model, batch: Failed())
    checked = call("verify", run_file)
    assert checked.exit_code == 1
    assert "gradients differ" in checked.output


def test_overwrite_and_resume_exclude_each_other(run_file):
    assert isinstance(call("train", run_file, "--overwrite", "--resume").exception, FastPeftError)


def test_an_interrupted_run_exits_with_130(run_file, monkeypatch):
    from pathlib import Path

    from hf_fastpeft.run import runner

    stopped = runner.RunResult(Path("x"), interrupted=True)
    monkeypatch.setattr(runner, "train", lambda *args, **kwargs: stopped)
    assert call("train", run_file).exit_code == 130


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["hf-fastpeft", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_a_mistake_is_one_message_and_exit_code_2(tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad.yaml"
    bad.write_text("base_model: m\nadaptr: lora\n")
    assert main(monkeypatch, "train", bad) == 2
    shown = capsys.readouterr()
    assert "adaptr: unknown key; did you mean 'adapter'?" in shown.err
    assert "datasets: missing" in shown.err
    assert "Traceback" not in shown.err + shown.out


def test_ctrl_c_outside_training_exits_with_130(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupt)
    assert main(monkeypatch) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_installed_command_runs(tmp_path):
    script = [sys.executable, "-c", "from hf_fastpeft.cli import main; main()"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*script, "train", "none.yaml"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2
    assert "error: none.yaml: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
