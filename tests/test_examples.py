"""Every example runs, at toy size, as a person would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_llama, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
TOY = [
    "--use_peft", "--lora_r", "4", "--lora_dropout", "0", "--lora_target_modules", "all-linear", "--max_steps", "2",
    "--per_device_train_batch_size", "2", "--use_cpu", "--bf16", "False", "--report_to", "none",
]  # fmt: skip


@pytest.fixture
def model_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(script, tmp_path, model_folder, rows):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    command = [sys.executable, EXAMPLES / script, "--model_name_or_path", model_folder, "--dataset_name", data]
    return subprocess.run(
        [str(part) for part in [*command, "--output_dir", tmp_path / "out", *TOY]],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_sft(tmp_path, model_folder):
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(8)]
    done = run("sft_trl.py", tmp_path, model_folder, rows)
    assert done.returncode == 0, done.stderr
    assert "mlp                  2      2      0" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_dpo(tmp_path, model_folder):
    rows = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2}", "rejected": f" w{i + 30}"} for i in range(8)]
    done = run("dpo_trl.py", tmp_path, model_folder, rows)
    assert done.returncode == 0, done.stderr
    assert "lm_head" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
