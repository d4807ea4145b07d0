"""The README's Python snippets run, with a tiny model in the place of the hub's, and its commands exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_tokenizer
from typer.testing import CliRunner

from hf_fastpeft.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory as a reader has it: a model and train.jsonl."""
    folder = tmp_path_factory.mktemp("readme")
    tiny_llama(vocab_size=128).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(32)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_python_snippets_run_in_order(folder):
    snippets = blocks("python")
    assert len(snippets) >= 4
    for number, snippet in enumerate(snippets):
        script = folder / f"snippet_{number}.py"
        script.write_text(snippet.replace(HUB_MODEL, str(folder / "model")).replace("max_steps=20", "max_steps=10"))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
        done = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{snippet}\n{done.stderr[-3000:]}"
    assert (folder / "outputs/sora/lora/adapter_model.safetensors").is_file()


def test_commands_exist():
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    makefile = (ROOT / "Makefile").read_text()
    for line in filter(None, lines):
        program, *arguments = shlex.split(line)
        if program == "make":
            assert f"\n{arguments[0]}:" in makefile
        elif program == "hf-fastpeft":
            shown = CliRunner().invoke(app, [arguments[0], "--help"])
            assert shown.exit_code == 0, line
        else:
            pytest.fail(f"unknown command in the README: {line}")


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
