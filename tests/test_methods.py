"""Every method of ``adapter:``: its example runs at toy size, patched as stock, and what it cannot do it says."""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from rich.console import Console
from typer.testing import CliRunner

import hf_fastpeft
from hf_fastpeft import cli
from hf_fastpeft.config import load_config, parse_config
from hf_fastpeft.config.mapping import adapter_config, arguments
from hf_fastpeft.config.methods import METHODS, SHORTHANDS
from hf_fastpeft.errors import AdapterError, ConfigError
from hf_fastpeft.run import methods
from hf_fastpeft.run.runner import model_and_batch, train

pytestmark = [
    # PEFT 0.21 reads the old name of a property of transformers 5.23 (peft_model.py, PeftModel.__init__).
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT 0.21 on loading its own AdaLoRA folders.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    # bitsandbytes 0.50 on a CPU, in evaluation.
    pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered:UserWarning"),
]

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(file.stem for file in EXAMPLES.glob("*.yaml") if file.stem != "quickstart")
BASE = "base_model: model\ndatasets: [{path: rows.jsonl}]\n"
# What a model of hidden size 32 and a run of two steps need smaller.
TOY = {
    "eva": ["lora_r=4"],
    "rslora": ["lora_r=4"],
    "adalora": ["lora_r=4", "fastpeft.adalora.target_r=2", "fastpeft.adalora.tinit=0", "fastpeft.adalora.tfinal=0"],
    "adaptive_lora": [
        "lora_r=4", "fastpeft.adaptive_lora.target_r=2", "fastpeft.adaptive_lora.tinit=0",
        "fastpeft.adaptive_lora.tfinal=0",
    ],
    "sora": ["fastpeft.sora.warmup_ratio=0", "fastpeft.sora.settle_ratio=0"],
    "prompt": ["fastpeft.prompt.prompt_tuning_init_text=w1 w2 w3"],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with a tiny model, its tokenizer and rows."""
    folder = tmp_path_factory.mktemp("methods")
    # bitsandbytes on a CPU takes whole blocks of 64 weights
    tiny.tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.tiny_dataset(16)))
    return folder


def toy(name, base, out, *more):
    """The example's own file, on the tiny model and two steps."""
    changes = [
        f"base_model={base / 'model'}", f"datasets=[{{path: {base / 'rows.jsonl'}}}]", "test_datasets=[]",
        "val_set_size=4", "max_steps=2", "micro_batch_size=4", "eval_batch_size=4", "sequence_len=64",
        "learning_rate=1e-2", "warmup_ratio=0", f"output_dir={out}", "fastpeft.samples=1", "fastpeft.sample_tokens=2",
        "fastpeft.plots=false",
    ]  # fmt: skip
    return load_config(EXAMPLES / f"{name}.yaml", overrides=[*changes, *TOY.get(name, ()), *more]).config


def run(config, tmp_path):
    with (tmp_path / "console.txt").open("a") as file:
        return train(config, console=Console(file=file, width=200))


def rows(config):
    batch = [{"input_ids": [8, 9, 10, 11, 12], "labels": [-100, -100, 10, 11, 12]}] * 2
    return {k: v for k, v in methods.padded(batch, 0).items()}


def test_every_method_has_an_example():
    assert set(NAMES) == {*METHODS, *SHORTHANDS}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_patched_as_stock_and_loads_again(name, base, tmp_path):
    torch.manual_seed(0)
    patched = run(toy(name, base, tmp_path / "patched"), tmp_path)
    torch.manual_seed(0)
    stock = run(toy(name, base, tmp_path / "stock", "fastpeft.patch=false"), tmp_path)
    assert patched.patch is not None
    assert stock.patch is None
    # TRL casts the adapters of quantised models to bfloat16, of which one ulp is 0.8 %
    tolerance = 2e-2 if name == "qlora" else 1e-3
    assert patched.loss_before == pytest.approx(stock.loss_before, rel=1e-4)
    assert patched.loss_after == pytest.approx(stock.loss_after, rel=1e-4)
    assert patched.loss_after != patched.loss_before
    for key in ("loss", "grad_norm"):
        found, want = ([step[key] for step in result.history if key in step] for result in (patched, stock))
        assert len(want) == 2
        assert found == pytest.approx(want, rel=tolerance)
        assert min(want) > 0
    if name == "full":
        return
    with torch.no_grad():
        logits = [
            hf_fastpeft.load_adapter(folder)(torch.arange(8, 16)[None]).logits
            for folder in (patched.adapter_dir, patched.lora_dir)
            if folder is not None
        ]
    assert torch.isfinite(logits[0]).all()
    if patched.lora_dir is not None:  # plain LoRA on the unchanged base: the same function
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
