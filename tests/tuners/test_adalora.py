"""PEFT's AdaLoRA in the fused blocks, this package's adaptive LoRA through PEFT, and both as plain LoRA."""

import copy
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from adapters import step, token_batch, twin
from hypothesis import given
from hypothesis import strategies as st
from numerics import FLOAT64_REL, rel_err
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer, SVDLinear
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from hf_fastpeft import export_to_lora, patch_model, patched, watch
from hf_fastpeft.errors import AdapterError
from hf_fastpeft.lowrank import LowRank, read
from hf_fastpeft.tuners import adalora
from hf_fastpeft.tuners._gated import kept_ranks
from hf_fastpeft.tuners.adalora import AdaptiveLoraConfig, AdaptiveLoraLayer, AdaptiveLoraLinear, Schedule, reader

pytestmark = [
    # PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA. ranks are not being allocated:UserWarning"),
]

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))
MODULES = ["q_proj", "v_proj", "down_proj"]


def svd_config(**settings):
    defaults = {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 7, "target_modules": MODULES}
    return AdaLoraConfig(**{**defaults, "task_type": "CAUSAL_LM", **settings})


def config(**settings):
    defaults = {"init_r": 4, "target_r": 2, "lora_alpha": 7, "target_modules": MODULES, "task_type": "CAUSAL_LM"}
    return AdaptiveLoraConfig(**{**defaults, **settings})


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, (AdaLoraLayer, AdaptiveLoraLayer))]


def gate_of(layer, adapter="default"):
    return layer.lora_E[adapter] if isinstance(layer, AdaLoraLayer) else layer.lora_A[adapter].gate.weight


@torch.no_grad()
def randomise(model, adapter="default", seed=0):
    """Factors of order one half, gates off zero but for some, one layer without any rank."""
    generator = torch.Generator().manual_seed(seed)
    for i, layer in enumerate(layer for layer in layers_of(model) if adapter in layer.lora_A):
        for name, p in layer.named_parameters():
            if "lora_" in name and f".{adapter}" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        gate_of(layer, adapter)[: (0, 1, 2, 4)[i % 4]] = 0
    return model


def adapted(made, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(dtype), made, **kwargs)
    for name, p in model.named_parameters():
        if "ranknum" in name:
            p.requires_grad_(False)  # as AdaLoraCallback does: PEFT trains it where the base is not float32 on the CPU
    return randomise(model).eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


# ---- PEFT's SVDLinear in the fused blocks


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_fused_svd_linears_are_stock_with_every_gradient_in_float64(targets):
    stock = adapted(svd_config(target_modules=targets), torch.float64, autocast_adapter_dtype=False).train()
    fast = twin(stock)
    handle = patched(patch_model(fast))
    batch = token_batch()
    want_loss, want = step(stock, batch)
    got_loss, got = step(fast, batch)
    assert rel_err(got_loss, want_loss) < FLOAT64_REL
    assert got.keys() == want.keys()
    assert sum("lora_E" in name for name in got) == (14 if targets == "all-linear" else 4)
    for name in want:
        assert rel_err(got[name], want[name]) < FLOAT64_REL, name
    blocks = handle.to_json()["blocks"]
    for block in ("attention_in", "attention_out", "mlp"):
        assert (blocks[block]["calls_fused"], blocks[block]["calls_stock"]) == (2, {})


def test_half_precision_and_dropout_run_fused():
    model = adapted(svd_config(target_modules="all-linear", lora_dropout=0.4), torch.bfloat16).train()
    want, _ = step(twin(model).eval(), token_batch())
    handle = patched(patch_model(model))
    losses = [step(model, token_batch())[0] for _ in range(2)]
    assert handle.to_json()["blocks"]["mlp"]["calls_stock"] == {}
    assert losses[0] != losses[1]  # dropout draws
    assert rel_err(losses[0], want) < 0.2
    got, _ = step(model.eval(), token_batch())
    assert rel_err(got, want) < 0.02


def svd_layer(**settings):
    layer = SVDLinear(nn.Linear(5, 6), "default", svd_config(**settings), r=3, lora_alpha=7)
    return randomise(nn.Sequential(layer))[0]


def test_the_record_is_the_layers_present_state():
    layer, x = svd_layer(), torch.randn(4, 5)
    for change in (
        lambda: None,
        lambda: layer.ranknum["default"].data.copy_(torch.tensor([5.0])) and layer.ranknum["default"].add_(0),
        lambda: layer.update_layer("default", 2, 7, config=svd_config()),
        lambda: layer.ranknum["default"].copy_(torch.tensor([4.0])),
        lambda: layer.to(torch.bfloat16).to(torch.float32),
        lambda: layer.scaling.update(default=3),
        lambda: layer.to(torch.float64),
    ):
        with torch.no_grad():
            change()
        low, x = read(layer), x.to(layer.base_layer.weight.dtype)
        assert isinstance(low, LowRank)
        assert low.gate is layer.lora_E["default"]
        want = layer(x)
        got = x @ low.weight.T + low.bias + low.scaling * ((x @ low.A.T) * low.gate.flatten()) @ low.B.T
        torch.testing.assert_close(got, want)


def test_the_divisor_is_rounded_as_the_layer_rounds_it():
    """12 + 1e-5 is 12 in bfloat16."""
    layer = svd_layer().to(torch.bfloat16)
    assert read(layer).scaling == 7 / 3
    assert read(layer.float()).scaling == pytest.approx(7 / 3.00001, rel=1e-7)


def test_reading_asks_the_device_once(monkeypatch):
    for module in (reader, watch):
        monkeypatch.setattr(module, "waits", lambda tensor: True)

    class Count(TorchDispatchMode):
        synchronised = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.synchronised += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    layer = svd_layer()
    with Count() as count:
        for _ in range(5):
            read(layer)
        assert count.synchronised == 1
        with torch.no_grad():
            layer.ranknum["default"].fill_(2)
        assert read(layer).scaling == pytest.approx(7 / 2.00001)
        assert count.synchronised == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.merge(), "adapter merged"),
        (lambda m: m.register_forward_hook(lambda *a: None), "hooks on SVDLinear"),
        (lambda m: m.base_layer.register_forward_hook(lambda *a: None), "hooks on Linear"),
        (lambda m: m.lora_dropout["default"].register_forward_hook(lambda *a: None), "hooks on Identity"),
        (lambda m: m.lora_dropout.update({"default": nn.AlphaDropout()}), "lora_dropout is AlphaDropout"),
        (lambda m: setattr(m, "fan_in_fan_out", True), "fan_in_fan_out"),
        (lambda m: setattr(m, "cast_input_dtype_enabled", False), "input casting switched off"),
        (lambda m: setattr(m, "base_layer", Conv1D(6, 5)), "base layer is Conv1D"),
        (lambda m: m.lora_E.update({"default": nn.Parameter(m.lora_E["default"].double())}), "float64"),
        (lambda m: m.ranknum["default"].requires_grad_(True), "ranknum is being trained"),
        (lambda m: m.scaling.update(default=torch.tensor(2.0)), "scaling is a tensor"),
        (lambda m: m.lora_A.update({"default": nn.Parameter(m.lora_A["default"].to("meta"))}), "meta device"),
        (
            lambda m: m.ranknum.update({"default": nn.Parameter(torch.ones(1, device="meta"), requires_grad=False)}),
            "ranknum has no value",
        ),
    ],
)
def test_what_the_record_cannot_express_runs_stock(change, reason):
    layer = svd_layer()
    change(layer)
    assert reason in read(layer)


def test_two_active_adapters_run_stock_and_none_is_the_base():
    layer = svd_layer()
    layer.update_layer("second", 2, 7, config=svd_config())
    layer.set_adapter(["default", "second"])
    assert read(layer) == "2 active adapters"
    layer.set_adapter("second")
    assert read(layer).A is layer.lora_A["second"]
    layer._active_adapter = "third"
    assert read(layer).A is None
    layer._active_adapter = "default"
    layer.enable_adapters(False)
    assert read(layer).A is None


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_a_layer_that_lost_all_ranks_is_its_base():
    layer, x = svd_layer(), torch.randn(2, 5)
    layer.update_layer("default", 0, 7, config=svd_config())
    assert read(layer).A is None
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.filterwarnings("error:.*ranks are not being allocated:UserWarning")
def test_layers_without_a_callback_are_told_once(monkeypatch):
    model = patch = adapted(svd_config(target_modules="all-linear")).train()
    monkeypatch.setattr(reader, "_warned", set())
    patch_model(patch)
    with pytest.warns(UserWarning, match="AdaLoRA: ranks are not being allocated.*AdaLoraCallback"):
        model(IDS)
    model(IDS)
    with pytest.warns(UserWarning, match="adaptive LoRA: ranks are not being allocated.*AdaLoraCallback"):
        adapted(config()).train()(IDS)


# ---- adaptive LoRA: config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_r": 4}, r"target_r=4: with init_r=4 and budget='decay' no rank could be given.*below 4"),
        ({"target_r": 9, "budget": "constant"}, r"target_r=9: with init_r=4 and budget='constant'"),
        ({"target_r": 0}, "target_r=0"),
        ({"init_r": 0}, "init_r=0: possible: an integer above 0"),
        ({"r": 16}, "r=16: the ranks to start from are init_r=4; leave r out"),
        ({"scorer": "gradient"}, "scorer='gradient': possible: 'sensitivity', 'magnitude'"),
        ({"budget": "rising"}, "budget='rising': possible: 'decay', 'constant'"),
        ({"tinit": -1}, r"tinit=-1: possible: steps \(an int from 0\) or a fraction of the run"),
        ({"tfinal": 1.5}, r"tfinal=1.5: .*a float in \[0, 1\)"),
        ({"tinit": 0.6, "tfinal": 0.5}, "tinit=0.6, tfinal=0.5: their sum 1.1 must be below 1"),
        ({"delta_t": 0}, "delta_t=0"),
        ({"beta1": 1.0}, r"beta1=1.0: possible: a number in \(0, 1\)"),
        ({"beta2": "high"}, "beta2='high'"),
        ({"orth_reg_weight": -1}, "orth_reg_weight=-1"),
        ({"regrow_ratio": 0}, "regrow_ratio=0"),
        ({"total_step": 0}, "total_step=0: possible: an integer above 0, or None"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern=.*ranks are above 0"),
        ({"use_dora": True}, "use_dora=True: this LoRA variant has no gated form"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*possible: True, False, 'orthogonal'"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=f"AdaptiveLoraConfig: .*{message}"):
        config(**settings)


def test_all_mistakes_come_together():
    with pytest.raises(ValueError, match=r"scorer='x'.*delta_t=0.*use_dora=True"):
        config(scorer="x", delta_t=0, use_dora=True)


def test_config_round_trip(tmp_path):
    made = config(budget="constant", scorer="magnitude", tinit=3, tfinal=0.25, target_r=1.5, total_step=70)
    made.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ADAPTIVE_LORA"
    for cls in (PeftConfig, AdaptiveLoraConfig):
        loaded = cls.from_pretrained(str(tmp_path))
        assert isinstance(loaded, AdaptiveLoraConfig)
        assert loaded.to_dict() == made.to_dict()
    card = (tmp_path / "README.md").read_text()
    assert "KeyError: 'ADAPTIVE_LORA'" in card


@pytest.mark.parametrize(
    ("settings", "steps", "want"),
    [
        ({"tinit": 5, "tfinal": 10}, 100, Schedule(5, 90, 10)),
        ({"tinit": 0.1, "tfinal": 0.3}, 100, Schedule(10, 70, 10)),
        ({"tinit": 0, "tfinal": 0.5, "total_step": 60, "delta_t": 3}, 100, Schedule(0, 30, 3)),
    ],
)
def test_the_schedule_in_steps(settings, steps, want):
    assert config(**settings).schedule(steps) == want


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_step": 101}, r"total_step=101: the run has 100 steps.*possible: at most 100, or None"),
        ({"tinit": 60, "tfinal": 40}, "tinit=60, tfinal=40: 60 and 40 of 100 steps leave none"),
        ({"tinit": 60, "tfinal": 0.5}, "tinit=60, tfinal=0.5: 60 and 50 of 100 steps leave none"),
    ],
)
def test_a_schedule_longer_than_the_run_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings).schedule(100)


# ---- adaptive LoRA: layers


@given(seed=st.integers(0, 99), r=st.integers(1, 6), rslora=st.booleans(), batch=st.integers(1, 3))
def test_forward_is_the_formula(seed, r, rslora, batch):
    torch.manual_seed(seed)
    base, made = nn.Linear(5, 7).double(), config(init_r=r + 1, target_r=0.5, use_rslora=rslora)
    layer = AdaptiveLoraLinear(base, "a", made, r=r, lora_alpha=3).double()
    nn.init.normal_(layer.lora_A["a"].gate.weight)
    x = torch.randn(batch, 4, 5, dtype=torch.float64)
    a, b, g = layer.lora_A["a"].weight, layer.lora_B["a"].weight, layer.lora_A["a"].gate.weight
    scaling = 3 / r**0.5 if rslora else 3 / r
    torch.testing.assert_close(layer(x), base(x) + scaling * ((x @ a.T) * g) @ b.T)
    torch.testing.assert_close(layer.get_delta_weight("a"), scaling * b @ torch.diag(g) @ a)


def test_fused_blocks_read_it():
    stock = adapted(config(target_modules="all-linear"), torch.float64, autocast_adapter_dtype=False).train()
    fast = twin(stock)
    handle = patched(patch_model(fast))
    want_loss, want = step(stock, token_batch())
    got_loss, got = step(fast, token_batch())
    assert rel_err(got_loss, want_loss) < FLOAT64_REL
    for name in want:
        assert rel_err(got[name], want[name]) < FLOAT64_REL, name
    assert handle.to_json()["blocks"]["mlp"]["calls_stock"] == {}


def test_starts_as_the_base_with_every_direction_in_place():
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), config(init_r=16))
    assert torch.equal(logits(model.eval()), logits(tiny_llama()))
    weights = torch.cat([layer.lora_B["default"].weight.flatten() for layer in layers_of(model)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.1)
    model = get_peft_model(tiny_llama(), config(init_lora_weights="orthogonal"))
    for layer in layers_of(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(b.T @ b, torch.eye(4), atol=1e-5, rtol=0)
    model = get_peft_model(tiny_llama(), config(init_lora_weights=False)).eval()
    assert not torch.equal(logits(model), logits(tiny_llama()))


def test_deepcopy_and_pickle():
    model = adapted(config())
    want = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), want)  # noqa: S301  our own bytes


def test_several_adapters_keep_apart():
    model = adapted(config())
    first = logits(model)
    model.add_adapter("second", config(init_r=3, target_modules=["q_proj"], scorer="magnitude"))
    randomise(model, "second", seed=9)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert not torch.allclose(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    with pytest.raises(AdapterError, match="also from a single adapter, and knows no gates of adaptive LoRA"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_one_peft_method_per_layer():
    layer = AdaptiveLoraLinear(nn.Linear(3, 3), "a", config(), r=2, lora_alpha=1)
    with pytest.raises(TypeError, match=r"the layer holds adaptive LoRA adapters.*Use AdaptiveLoraConfig"):
        layer.update_layer("b", 2, 1, config=LoraConfig(r=2))
    with pytest.raises(TypeError, match=r"adaptive LoRA on 'part': the module is a torch.nn"):
        get_peft_model(nn.ModuleDict({"part": nn.Embedding(4, 4)}), config(target_modules=["part"], task_type=None))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_reload_is_exact(tmp_path, low_cpu_mem_usage):
    model = adapted(config(rank_pattern={"q_proj": 3}))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved["base_model.model.model.layers.0.self_attn.q_proj.lora_A.gate.weight"].shape == (3,)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert torch.isfinite(loaded(IDS, labels=IDS).loss)
    kept = {path.removeprefix("base_model.model."): n for path, (n, _) in kept_ranks(model).items()}
    assert loaded.peft_config["default"].kept_ranks == kept
    plain = tiny_llama()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain.eval()), logits(model))


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(safe_merge):
    model = adapted(config())
    want, base = logits(model), logits(tiny_llama())
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model), want, atol=2e-6, rtol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), want, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(want, base, atol=1e-2)


def quantised(tmp_path, **settings):
    tiny_llama(hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**settings))


FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
EIGHT_BIT = {"load_in_8bit": True}


@pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear:UserWarning")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize(
    ("settings", "cls", "error"),
    [(FOUR_BIT, "AdaptiveLoraLinear4bit", 0.12), (EIGHT_BIT, "AdaptiveLoraLinear8bitLt", 0.02)],
)
def test_quantised_layers(tmp_path, settings, cls, error):
    from peft.utils.integrations import dequantize_module_weight

    model = randomise(get_peft_model(quantised(tmp_path / "base", **settings), config())).eval()
    layers = layers_of(model)
    assert {type(layer) for layer in layers} == {getattr(adalora, cls)}
    layer, x = layers[0], torch.randn(3, 64)
    a, b, g = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.gate_values()
    with torch.no_grad():
        b.mul_(0.01)
        added = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(added.float(), 7 / 4 * ((x @ a.T) * g) @ b.T, atol=2e-3, rtol=2e-3)
        layer.base_layer.state_dict()
        want = dequantize_module_weight(layer.base_layer).float() + layer.get_delta_weight("default")
        layer.merge()
        got = dequantize_module_weight(layer.base_layer).float()
    assert (got - want).norm() / want.norm() < error  # what quantising the sum costs


def test_an_unknown_lazy_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'AdaptiveLoraConv2d'"):
        adalora.AdaptiveLoraConv2d  # noqa: B018


# ---- as plain LoRA

VARIANTS = {
    "PEFT's": svd_config,
    "adaptive": config,
    "adaptive, rslora": lambda: config(use_rslora=True),
}


@torch.no_grad()
def uniform_reader(folder, model):
    """What a server does: one alpha / r for every module, only lora_A and lora_B, patterns ignored."""
    made = json.loads((folder / "adapter_config.json").read_text())
    tensors, modules = load_file(folder / "adapter_model.safetensors"), dict(model.named_modules())
    for key, a in tensors.items():
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_A")
        assert part or ".lora_B.weight" in key, f"unknown tensor {key}"
        if part:
            b = tensors[key.replace("lora_A", "lora_B")]
            assert 0 < a.shape[0] == b.shape[1] <= made["r"]
            modules[name].weight += made["lora_alpha"] / made["r"] * b @ a
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_export_gives_the_same_outputs(tmp_path, variant):
    model = adapted(VARIANTS[variant]())
    want = logits(model)
    export_to_lora(model, tmp_path / "plain")
    assert torch.equal(logits(model), want)  # the model is as it was
    made = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert made["peft_type"] == "LORA"
    shapes = {k: t.shape for k, t in load_file(tmp_path / "plain" / "adapter_model.safetensors").items()}
    kept = [int((gate_of(layer) != 0).sum()) for layer in layers_of(model)]
    assert sorted(s[0] for k, s in shapes.items() if "lora_A" in k) == sorted(n for n in kept if n)
    assert 0 in kept
    assert (logits(uniform_reader(tmp_path / "plain", tiny_llama())) - want).abs().max() <= 1e-6
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    assert (logits(loaded) - want).abs().max() <= 1e-6
    assert (logits(tiny_llama()) - want).abs().max() > 1e-2  # the adapter does something


def test_exports_load_where_this_package_is_never_imported(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    wanted = []
    for i, make in enumerate(VARIANTS.values()):
        model = adapted(make())
        export_to_lora(model, tmp_path / f"plain-{i}")
        wanted.append(logits(model))
    torch.save({"ids": IDS, "want": wanted}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "case = torch.load(sys.argv[1] + '/expected.pt')\n"
        "for i, want in enumerate(case['want']):\n"
        "    base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/base')\n"
        "    model = PeftModel.from_pretrained(base, f'{sys.argv[1]}/plain-{i}').eval()\n"
        "    with torch.no_grad(): print((model(case['ids']).logits - want).abs().max().item())\n"
        "assert 'hf_fastpeft' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert max(map(float, run.stdout.split())) <= 1e-6


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_an_adapter_that_peft_has_cut_exports_too(tmp_path):
    model = adapted(svd_config())
    names = {layer: path for path, layer in model.base_model.model.named_modules()}
    model.peft_config["default"].rank_pattern = {
        f"{names[layer]}.lora_E.default": (layer.lora_E["default"] != 0).flatten().tolist()
        for layer in layers_of(model)
    }
    want = logits(model)
    model.save_pretrained(tmp_path / "cut")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "cut").eval()
    assert torch.equal(logits(loaded), want) or (logits(loaded) - want).abs().max() <= 1e-6
    export_to_lora(loaded, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    assert (logits(plain) - want).abs().max() <= 1e-6


def test_a_convolution_is_refused(tmp_path):
    base = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)})
    model = get_peft_model(base, svd_config(target_modules=["conv"], task_type=None))
    with pytest.raises(AdapterError, match=r"found 1 others: conv \(peft.tuners.adalora.layer.SVDConv2d\)"):
        export_to_lora(model, tmp_path / "plain")


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("settings", [FOUR_BIT, EIGHT_BIT])
@pytest.mark.parametrize("make", [svd_config, config])
def test_adapters_of_quantised_models_export(tmp_path, settings, make):
    model = randomise(get_peft_model(quantised(tmp_path / "base", **settings), make())).eval()
    want = logits(model)
    export_to_lora(model, tmp_path / "plain")
    base = quantised(tmp_path / "base", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(base, tmp_path / "plain").eval()
    scale = want.abs().max()
    assert (logits(loaded) - want).abs().max() / scale < 2e-2  # 8-bit products round their input in half precision
