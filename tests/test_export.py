"""Export to plain LoRA: the same outputs where this package is never imported, and in a server's reader."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoKrConfig, LoraConfig, PeftModel, convert_to_lora, get_peft_model
from peft.tuners.adalora.layer import AdaLoraLayer
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_fastpeft import AdaLoraCallback, AdaptiveLoraConfig, BottleneckAdapterConfig, SoraCallback
from hf_fastpeft.errors import AdapterError, RunExistsError
from hf_fastpeft.export import export_to_lora
from hf_fastpeft.tuners._gated import GatedLayer
from hf_fastpeft.tuners.sora import SoraConfig, SoraLayer

# PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))
MODULES = ["q_proj", "v_proj", "down_proj"]


def adapted(cls=SoraConfig, **settings):
    torch.manual_seed(0)
    made = cls(**{"r": 4, "target_modules": MODULES, "task_type": "CAUSAL_LM", "lora_alpha": 7, **settings})
    model = get_peft_model(tiny_llama(), made)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                p.normal_(std=0.2)
            if "gate" in name and p.dim() == 1:
                p.normal_(std=0.02)
                p[: i % 5] = 0  # some layers lose ranks, some lose all of them
    return model.eval()


def gates_of(model):
    return [m.lora_A["default"].gate.weight for m in model.modules() if isinstance(m, SoraLayer)]


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


@torch.no_grad()
def uniform_reader(folder, model):
    """What a server does: one alpha / r for every module, only lora_A and lora_B, patterns ignored."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    for key, a in tensors.items():
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_A")
        if not part:
            assert ".lora_B.weight" in key, f"unknown tensor {key}"
            continue
        b = tensors[key.replace("lora_A", "lora_B")]
        assert 0 < a.shape[0] == b.shape[1] <= config["r"]
        assert name in config["target_modules"]
        modules[name].weight += scaling * b @ a
    return model.eval()


VARIANTS = {
    "sora": (SoraConfig, {}),
    "sora, rslora": (SoraConfig, {"use_rslora": True}),
    "sora, patterns": (SoraConfig, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "lora": (LoraConfig, {}),
    "rslora, patterns": (LoraConfig, {"use_rslora": True, "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 9}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_export_gives_the_same_outputs(tmp_path, variant):
    cls, settings = VARIANTS[variant]
    model = adapted(cls, **settings)
    want = logits(model)
    assert export_to_lora(model, tmp_path / "plain") == tmp_path / "plain"
    assert torch.equal(logits(model), want)  # the model is as it was
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    assert loaded.peft_config["default"].peft_type.value == "LORA"
    assert (logits(loaded) - want).abs().max() <= 1e-6
    assert (logits(uniform_reader(tmp_path / "plain", tiny_llama())) - want).abs().max() <= 1e-6
    assert (logits(tiny_llama()) - want).abs().max() > 1e-2  # the adapter does something


def test_loads_where_this_package_is_never_imported(tmp_path):
    model = adapted()
    tiny_llama().save_pretrained(tmp_path / "base")
    export_to_lora(model, tmp_path / "plain")
    torch.save({"ids": IDS, "want": logits(model)}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/base')\n"
        "model = PeftModel.from_pretrained(base, sys.argv[1] + '/plain').eval()\n"
        "case = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert 'hf_fastpeft' not in sys.modules\n"
        "with torch.no_grad(): print((model(case['ids']).logits - case['want']).abs().max().item())\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(run.stdout) <= 1e-6


def test_only_kept_ranks_are_written(tmp_path):
    model = adapted()
    for i, gate in enumerate(gates_of(model)):
        gate.data.fill_(0.02)
        gate.data[: (4, 1, 0)[i % 3]] = 0
    want = logits(model)
    export_to_lora(model, tmp_path / "plain")
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "plain" / "adapter_model.safetensors").items()}
    assert not any("q_proj" in key for key in shapes)
    assert shapes["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"] == (3, 32)
    assert shapes["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"] == (32, 4)
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 4, "LORA")
    assert sorted(config["target_modules"]) == [
        f"model.layers.{i}.{m}" for i in (0, 1) for m in ("mlp.down_proj", "self_attn.v_proj")
    ]
    assert (logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()) - want).abs().max() <= 1e-6
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "ranks 3 to 4 over 4" in card


def test_all_gates_at_zero_become_rank_one_of_zeros(tmp_path):
    model = adapted()
    for gate in gates_of(model):
        gate.data.zero_()
    export_to_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 12
    assert all(1 in t.shape and not t.any() for t in tensors.values())
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(tiny_llama()))


BUDGET = {"target_r": 2, "target_modules": MODULES, "task_type": "CAUSAL_LM"}
TRAINED = {
    "SoRA": (lambda: SoraConfig(r=4, **BUDGET), SoraCallback),
    "SoRA, reassigned": (lambda: SoraConfig(r=4, gate_scale=200.0, reassign_ranks=True, **BUDGET), SoraCallback),
    "adaptive LoRA": (lambda: AdaptiveLoraConfig(init_r=4, delta_t=1, **BUDGET), AdaLoraCallback),
    "adaptive LoRA, constant": (
        lambda: AdaptiveLoraConfig(init_r=4, delta_t=1, budget="constant", **BUDGET),
        AdaLoraCallback,
    ),
    "AdaLoRA of PEFT": (lambda: AdaLoraConfig(init_r=4, total_step=9, deltaT=1, **BUDGET), AdaLoraCallback),
}


def trained(method, folder):
    """After ten steps with its callback, in float64."""
    make, callback = TRAINED[method]
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), make())
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in IDS.repeat(4, 1)]
    args = TrainingArguments(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.01,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows, callbacks=[callback()]).train()
    return model.double().eval()


@torch.no_grad()
def prune(model, which):
    """Zeroes all gates of the first module, or of every module."""
    layers = [m for m in model.modules() if isinstance(m, (GatedLayer, AdaLoraLayer))]
    for layer in layers if which == "all" else layers[:1]:
        gate = layer.lora_E["default"] if isinstance(layer, AdaLoraLayer) else layer.lora_A["default"].gate.weight
        gate.zero_()


# PEFT takes AdaLoRA's rank_pattern for LoRA's, of another form, and says that it matches nothing.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("pruned", ["as trained", "a module", "all"])
@pytest.mark.parametrize("method", TRAINED)
def test_a_trained_adapter_is_one_function_in_every_form(tmp_path, method, pruned):
    """Gated, merged, saved and reloaded, and with the pruned ranks cut out: the same logits in float64."""
    model, base = trained(method, tmp_path / "run"), tiny_llama(torch.float64).eval()
    if pruned != "as trained":
        prune(model, pruned)
    want = logits(model)
    assert want.dtype == torch.float64
    moved = (want - logits(base)).abs().max()
    assert moved == 0 if pruned == "all" else moved > 1e-3
    export_to_lora(model, tmp_path / "plain", dtype=torch.float64)
    model.save_pretrained(tmp_path / "native")
    forms = {
        "plain": PeftModel.from_pretrained(tiny_llama(torch.float64), tmp_path / "plain").eval(),
        "native": PeftModel.from_pretrained(tiny_llama(torch.float64), tmp_path / "native").eval(),
        "merged": copy.deepcopy(model).merge_and_unload(safe_merge=True),
    }
    forms["plain, merged"] = copy.deepcopy(forms["plain"]).merge_and_unload()
    forms["server"] = uniform_reader(tmp_path / "plain", tiny_llama(torch.float64))
    for name, form in forms.items():
        assert (logits(form) - want).abs().max() <= 1e-10, name
    written = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    num_ranks = sum(t.shape[0] for key, t in written.items() if "lora_A" in key)
    assert num_ranks <= 2 * 6  # all: rank 1 of zeros in each of six


@pytest.mark.parametrize("cls", [SoraConfig, LoraConfig])
def test_modules_to_save_go_along(tmp_path, cls):
    model = adapted(cls, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(3)
    want = logits(model)
    export_to_lora(model, tmp_path)
    assert (logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()) - want).abs().max() <= 2e-6


def test_a_transformers_model_and_another_adapter_name(tmp_path):
    model = adapted()
    want = logits(model)
    model.save_pretrained(tmp_path / "sora")
    plain = tiny_llama()
    plain.load_adapter(str(tmp_path / "sora"), adapter_name="mine")
    export_to_lora(plain, tmp_path / "plain", "mine")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    assert (logits(loaded) - want).abs().max() <= 1e-6


def test_a_path_that_ends_another_path_targets_only_its_own_module(tmp_path):
    """``q`` survives and ``inner.q`` does not: as a list, PEFT's suffix matching would target both."""

    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"q": nn.Linear(4, 4), "inner": nn.ModuleDict({"q": nn.Linear(4, 4)})})

    model = get_peft_model(base(), SoraConfig(r=2, target_modules=["q"])).eval()
    model.base_model.model["inner"]["q"].lora_A["default"].gate.weight.data.zero_()
    nn.init.normal_(model.base_model.model["q"].lora_B["default"].weight)
    export_to_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert type(loaded.base_model.model["inner"]["q"]) is nn.Linear
    x = torch.randn(3, 4)
    torch.testing.assert_close(loaded.base_model.model["q"](x), model.base_model.model["q"](x))


def test_half_precision_adapters_and_dtype(tmp_path):
    model = adapted().to(torch.bfloat16)
    for name, dtype in (("exact", torch.float32), ("small", torch.bfloat16)):
        export_to_lora(model, tmp_path / name, dtype=dtype)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {t.dtype for t in tensors.values()} == {dtype}


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "adapter_model.bin").write_text("old")
    with pytest.raises(RunExistsError, match="the folder is not empty; choose another or pass overwrite=True"):
        export_to_lora(adapted(), tmp_path)
    export_to_lora(adapted(), tmp_path, overwrite=True)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"notes.txt", "adapter_model.safetensors", "adapter_config.json", "README.md"}
    with pytest.raises(RunExistsError, match="is a file; a folder is needed"):
        export_to_lora(adapted(), tmp_path / "notes.txt", overwrite=True)


def test_only_an_adapters_card_is_replaced(tmp_path):
    card = tmp_path / "README.md"
    adapted().save_pretrained(tmp_path)
    peft_card = card.read_text()
    export_to_lora(adapted(), tmp_path, overwrite=True)
    assert "written by `hf_fastpeft.export_to_lora`" in card.read_text() != peft_card
    card.write_text("mine")
    export_to_lora(adapted(), tmp_path, overwrite=True)
    assert card.read_text() == "mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "plain LoRA cannot express use_dora"),
        ({"bias": "lora_only"}, "bias='lora_only', lora_bias=False: servers read no biases"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base weights"),
        (
            {"target_modules": ["embed_tokens"]},
            r"found 1 others: model.embed_tokens \(peft.tuners.lora.layer.Emb",
        ),
    ],
)
def test_what_plain_lora_cannot_express_is_refused(tmp_path, settings, message):
    model = get_peft_model(tiny_llama(), LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings}))
    with pytest.raises(AdapterError, match=message):
        export_to_lora(model, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
        (BottleneckAdapterConfig(r=4), "BOTTLENECK"),
    ],
)
def test_other_methods_are_refused(tmp_path, made, kind):
    with pytest.raises(AdapterError, match=f"is of type {kind}; possible: LORA, ADALORA, ADAPTIVE_LORA, SORA"):
        export_to_lora(get_peft_model(tiny_llama(), made), tmp_path)


@pytest.mark.parametrize(
    ("made", "instead"),
    [
        (
            BottleneckAdapterConfig(r=4),
            r"A bottleneck's nonlinearity is not .* read it with hf_fastpeft\.load_adapter",
        ),
        (
            IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
            "merge_and_unload puts it into the base weights",
        ),
        (LoKrConfig(target_modules=["q_proj"]), r"peft\.convert_to_lora approximates it"),
    ],
)
def test_other_methods_are_told_what_is_possible(tmp_path, made, instead):
    """What is named works, and what would not work is not named."""
    model = get_peft_model(tiny_llama(), made)
    with pytest.raises(AdapterError, match=instead):
        export_to_lora(model, tmp_path)
    if "convert_to_lora" in instead:
        convert_to_lora(model, rank=2)
    else:
        with pytest.raises(TypeError, match="do not support LoRA conversion"):
            convert_to_lora(model, rank=2)
    if "merge_and_unload" in instead:
        model.merge_and_unload()


def test_an_unknown_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="adapter 'mine': not in the model; found: 'default'"):
        export_to_lora(adapted(), tmp_path, "mine")
    with pytest.raises(AdapterError, match="not in the model; found: none"):
        export_to_lora(tiny_llama(), tmp_path)
