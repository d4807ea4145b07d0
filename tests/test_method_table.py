"""The README's table of methods: every cell is derived by running the method as its example sets it up."""

import json
import re
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import tiny
import torch
from peft import get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import hf_fastpeft
from benchmarks.models import SHAPES, build_model
from hf_fastpeft import AdaLoraCallback
from hf_fastpeft.config import load_config
from hf_fastpeft.config.mapping import adapter_config
from hf_fastpeft.config.method_table import BLOCKS, FACTS, methods_table
from hf_fastpeft.config.methods import BASE_CHANGING, METHODS, SHORTHANDS
from hf_fastpeft.errors import AdapterError, ConfigError
from hf_fastpeft.run.runner import model_and_batch
from hf_fastpeft.tuners._gated import unpack_4bit

pytestmark = [
    # PEFT 0.21 reads the old name of a property of transformers 5.23 (peft_model.py, PeftModel.__init__).
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(gates are not being pruned|ranks are not being allocated):UserWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    # PEFT on every merge into 4- or 8-bit weights
    pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear may get different generations:UserWarning"),
]

ROOT = Path(__file__).parents[1]
NAMES = (*METHODS, *SHORTHANDS)
# What a model of hidden size 64 needs smaller, and what a model without values cannot start from.
TOY = {
    "rslora": ["lora_r=4"],
    "adalora": ["lora_r=4", "fastpeft.adalora.target_r=2"],
    "adaptive_lora": ["lora_r=4", "fastpeft.adaptive_lora.target_r=2"],
    "prompt": ["fastpeft.prompt.prompt_tuning_init_text=w1 w2 w3"],
}
ON_META = {
    "pissa": ["peft_init_lora_weights=true"],
    "prompt": ["fastpeft.prompt.prompt_tuning_init=RANDOM", "fastpeft.prompt.prompt_tuning_init_text=null"],
}


def example(name, *changes):
    return load_config(ROOT / "examples" / f"{name}.yaml", overrides=list(changes)).config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with a tiny model, its tokenizer and rows."""
    folder = tmp_path_factory.mktemp("table")
    # bitsandbytes on a CPU takes whole blocks of 64 weights
    tiny.tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.tiny_dataset(16)))
    return folder


def toy(name, folder, *changes):
    """The example's model, tiny, with an adapter that does something and no dropout; a batch; base weights."""
    changes = [
        f"base_model={folder / 'model'}", f"datasets=[{{path: {folder / 'rows.jsonl'}}}]", "test_datasets=[]",
        *TOY.get(name, ()), *changes,
    ]  # fmt: skip
    torch.manual_seed(0)
    model, batch = model_and_batch(example(name, *changes), 2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, batch


def on(weights):
    """Changes of an example for these base weights."""
    return [f"load_in_{bits}bit={str(weights == f'{bits}-bit').lower()}" for bits in (4, 8)]


@torch.no_grad()
def logits(model, batch):
    return model(input_ids=batch["input_ids"]).logits


def test_the_readme_shows_the_table():
    shown = re.search(r"<!-- methods -->\n(.*?)<!-- /methods -->", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == methods_table()
    assert set(FACTS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_trained_parameters_of_smollm2(name):
    config = example(name, *ON_META.get(name, ()))
    model = build_model(SHAPES["smollm2-135m"], dtype=torch.float32, device="meta")
    if config.adapter != "none":
        model = get_peft_model(model, adapter_config(config, model, total_steps=50), low_cpu_mem_usage=True)
    if "AdaLoraCallback" in METHODS.get(config.adapter, METHODS["lora"]).callbacks:
        AdaLoraCallback().on_init_end(None, None, None, model=model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == FACTS[name].trained


@pytest.mark.parametrize("name", NAMES)
def test_fused_blocks(name, base):
    model, batch = toy(name, base)
    if name == "adalora":
        AdaLoraCallback().on_init_end(None, None, None, model=model)
    handle = hf_fastpeft.patched(hf_fastpeft.patch_model(model))
    model(**batch).loss.backward()
    blocks = handle.to_json()["blocks"]
    assert set(blocks) == set(BLOCKS)
    assert {block for block, row in blocks.items() if row["calls_stock"]} == set(FACTS[name].stock)
    assert all(row["calls_fused"] for block, row in blocks.items() if block not in FACTS[name].stock)


def two_steps(model, batch):
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n}
    for _ in range(2):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        assert loss.isfinite()
        assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} >= trained


# PEFT 0.21 hands prefixes over by the name that transformers 5.24 deprecates
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("weights", ["float", "4-bit", "8-bit"])
@pytest.mark.parametrize("name", NAMES)
def test_base_weights_and_merging(name, weights, base):
    facts = FACTS[name]
    if weights not in facts.bases:
        # the configuration says so; for DoRA over 8-bit weights on a CPU it is PEFT 0.21 that breaks
        with pytest.raises(AttributeError if name == "dora" else ConfigError):
            two_steps(*toy(name, base, *on(weights)))
        return
    model, batch = toy(name, base, *on(weights))
    two_steps(model, batch)
    if not hasattr(model, "merge_and_unload"):
        assert not facts.merges
        return
    adapted = logits(model, batch)
    if weights not in facts.merges:
        with pytest.raises((AdapterError, AttributeError, NotImplementedError, ValueError)):
            model.merge_and_unload()
        return
    layers = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)
    }
    want = {path: weight_with_adapter(layer) for path, layer in layers.items()}
    merged = model.merge_and_unload()
    for path, weight in want.items():
        error = (dense(merged.get_submodule(path)) - weight).abs()
        assert (error <= ROUNDING[weights](weight)).all(), path
    if weights == "float":
        torch.testing.assert_close(logits(merged, batch), adapted, rtol=1e-4, atol=1e-5)


# Largest error of one rounding: half the widest gap between two values, times what a block or row is scaled by.
# 4-bit: NF4's values -1 and -0.6962 (Dettmers et al. 2023, arXiv 2305.14314, appendix E), whose blocks' scales are
# rounded themselves. 8-bit: whole numbers to 127 a row, of a weight rounded to float16.
ROUNDING = {
    "float": lambda weight: 1e-6 * weight.abs().amax(),
    "4-bit": lambda weight: (
        0.55 * (1 - 0.6962) * weight.view(-1, 64).abs().amax(1, keepdim=True).expand(-1, 64).reshape(weight.shape)
    ),
    "8-bit": lambda weight: (0.5 / 127 + 2**-11) * weight.abs().amax(1, keepdim=True),
}


def dense(linear):
    """The weight as it is multiplied with."""
    weight = linear.weight.detach()
    if isinstance(linear, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight, linear.weight.quant_state).float()
    if isinstance(linear, bnb.nn.Linear8bitLt):
        scale = linear.weight.SCB if linear.state.SCB is None else linear.state.SCB
        return weight.float() * scale[:, None] / 127
    return weight


@torch.no_grad()
def weight_with_adapter(layer):
    """The weight that has the adapter's outputs: W + delta; DoRA (arXiv 2402.09353, eq. 5) scales its rows."""
    weight = dense(layer.get_base_layer())
    if isinstance(layer, IA3Layer):
        return weight * layer.ia3_l["default"]
    weight = weight + layer.get_delta_weight("default").float()
    if "default" in (getattr(layer, "lora_magnitude_vector", None) or {}):
        weight = weight * (layer.lora_magnitude_vector["default"].weight / weight.norm(dim=1))[:, None]
    return weight


@pytest.mark.parametrize("name", ["sora", "adaptive_lora", "lora"])
def test_4_bit_weights_through_training_evaluation_and_training(name, base):
    """bitsandbytes 0.50 packs 4-bit weights at the first evaluation on a CPU, and products with them have no gradient.

    SoRA and adaptive LoRA put them back themselves, ``unpack_4bit`` does it for PEFT's layers. Scales come back
    rounded to bfloat16.
    """
    model, batch = toy(name, base, *on("4-bit"))
    trained = [p for p in model.parameters() if p.requires_grad]
    model(**batch).loss.backward()
    before = [p.grad.clone() for p in trained]
    layers = {path: m for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    want = {path: weight_with_adapter(layer) for path, layer in layers.items()}
    adapted = logits(model, batch)
    assert (logits(model.eval(), batch) - adapted).norm() < 2**-6 * adapted.norm()  # the packed product is bfloat16's
    model.train().zero_grad()
    if name == "lora":
        unpack_4bit(model)
    model(**batch).loss.backward()
    after, before = (torch.cat([g.flatten() for g in grads]) for grads in ([p.grad for p in trained], before))
    assert (after - before).norm() < 2**-6 * before.norm()
    logits(model.eval(), batch)
    if name == "lora":
        unpack_4bit(model)
    merged = model.merge_and_unload()
    for path, weight in want.items():
        error = (dense(merged.get_submodule(path.removeprefix("base_model.model."))) - weight).abs()
        assert (error <= (1 + 2**-8) * ROUNDING["4-bit"](weight)).all(), path


@pytest.mark.parametrize("name", NAMES)
def test_plain_lora(name, base, tmp_path):
    model, batch = toy(name, base)
    lora = FACTS[name].lora
    config = getattr(model, "peft_config", {}).get("default")
    if lora == "is one":
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert saved["peft_type"] == "LORA"
        assert saved["init_lora_weights"] is True
        assert not any(saved[key] for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"))
    elif lora == "export_to_lora":
        hf_fastpeft.export_to_lora(model, tmp_path)
        want = logits(model.eval(), batch)
        got = logits(hf_fastpeft.load_adapter(tmp_path).eval(), batch)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(AdapterError):
            hf_fastpeft.export_to_lora(model, tmp_path)
        # tests/test_methods.py trains and loads what such a run writes
        assert (lora == "written by the run") == (getattr(config, "init_lora_weights", None) in BASE_CHANGING)


TWO_PROCESSES = """
import copy, sys
rank, folder = int(sys.argv[1]), sys.argv[2]
sys.path[:0] = sys.argv[3:]
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from test_method_table import FACTS, NAMES, toy
from hf_fastpeft import patch_model
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
ids = torch.randint(8, 120, (4, 9), generator=torch.Generator().manual_seed(0))

def gradients(model):
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}

def ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)

def fsdp2(model):
    for layer in (model.get_base_model() if hasattr(model, "get_base_model") else model).model.layers:
        fully_shard(layer)
    return fully_shard(model)

for name in NAMES:
    model, _ = toy(name, Path(folder))
    alone = copy.deepcopy(model)
    alone(input_ids=ids, labels=ids).loss.backward()
    want = gradients(alone)
    for wrap in (ddp, fsdp2) if FACTS[name].fsdp2 else (ddp,):
        for patched in (False, True):
            copied = copy.deepcopy(model)
            if patched:
                patch_model(copied)
            rows = ids[2 * rank : 2 * rank + 2]
            wrapped = wrap(copied)
            wrapped(input_ids=rows, labels=rows).loss.backward()
            got = gradients(copied)
            assert got.keys() == want.keys()
            for key in want:
                error = (got[key] - want[key]).norm() / want[key].norm()
                assert error < 1e-5, (name, wrap.__name__, patched, key, float(error))
dist.barrier()  # who is ahead may not leave while the other still talks to it
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_have_the_gradient_of_both_their_rows(base, tmp_path):
    """DDP, and FSDP2 where the table has it, stock and patched."""
    paths = [str(ROOT / "tests"), str(ROOT)]
    folder = tmp_path / "two"
    folder.mkdir()
    for entry in base.iterdir():
        (folder / entry.name).symlink_to(entry)
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TWO_PROCESSES, str(rank), str(folder), *paths],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(error[-2000:] for error in errors)
