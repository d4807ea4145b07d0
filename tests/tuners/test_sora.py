"""SoRA's config, layers and files: one formula on every linear backend, exact through save, load and merge."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners import lora
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_fastpeft.errors import AdapterError
from hf_fastpeft.tuners import sora
from hf_fastpeft.tuners.sora import GatedLinear, SoraConfig, SoraLayer, SoraLinear, kept_ranks
from hf_fastpeft.tuners.sora.layer import SoraRuntime

pytestmark = [
    # PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned:UserWarning"),
]

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))


def config(**settings):
    return SoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings})


def randomise(model, adapter="default", seed=0, std=0.3):
    """Nonzero B, spread gates, one dead rank in every layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sora_layers(model):
            if adapter not in layer.lora_A:
                continue
            b, gate = layer.lora_B[adapter].weight, layer.lora_A[adapter].gate.weight
            b.copy_(torch.randn(b.shape, generator=generator) * std)
            gate.copy_(torch.randn(gate.shape, generator=generator) / 50)
            gate[0] = 0
    return model


def sora_layers(model):
    return [m for m in model.modules() if isinstance(m, SoraLayer)]


def sora_model(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    return randomise(get_peft_model(tiny_llama(dtype), config(**settings))).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


# ---- config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparse_lambda": -0.1}, r"sparse_lambda=-0.1: possible: a number from 0"),
        ({"sparse_lambda": float("nan")}, "sparse_lambda=nan"),
        ({"sparse_lambda": "high"}, "sparse_lambda='high'"),
        ({"gate_scale": 0}, "gate_scale=0: possible: a number above 0"),
        ({"gate_init": "zeros"}, "gate_init='zeros': possible: 'ones', 'randn'"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio=1.0: possible: a fraction in \[0, 1\)"),
        ({"settle_ratio": -1}, "settle_ratio=-1"),
        ({"warmup_ratio": 0.5, "settle_ratio": 0.5}, "no step is left to prune in"),
        ({"target_r": 5}, "target_r=5: possible: a number above 0, at most r=4"),
        ({"target_r": 0}, "target_r=0"),
        ({"min_rank": 5}, "min_rank=5: possible: an integer from 0 to r=4"),
        ({"min_rank": 1.5}, "min_rank=1.5"),
        ({"min_rank": 3, "target_r": 2}, "min_rank=3: above target_r=2"),
        (
            {"lambda_schedule": "quadratic"},
            "lambda_schedule='quadratic': possible: 'constant', 'linear', 'cosine', 'cubic', 'stages'",
        ),
        ({"lambda_stages": 0}, "lambda_stages=0: possible: an integer above 0"),
        ({"reassign_ranks": "yes"}, "reassign_ranks='yes': possible: True, False"),
        ({"reassign_ranks": True}, "reassign_ranks=True, target_r=None: there is no budget"),
        (
            {"lambda_schedule": "linear", "target_r": 2},
            "lambda_schedule='linear': no sparse_lambda acts with target_r=2.*or reassign_ranks=True",
        ),
        ({"r": 0}, "r=0: possible: an integer above 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern=.*ranks are above 0"),
        ({"use_dora": True}, "use_dora=True: this LoRA variant has no gated form"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens=\[1\]: this LoRA variant"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*possible: True, False, 'gaussian', 'orthogonal'"),
        ({"bias": "all"}, "bias='all'.*possible: bias='none', lora_bias=False"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_parameters": ["w"]}, "target_parameters=.*only linear layers"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=f"SoraConfig: .*{message}"):
        config(**settings)


def test_all_mistakes_come_together():
    with pytest.raises(ValueError, match=r"sparse_lambda=-1.*gate_scale=-1.*use_dora=True"):
        config(sparse_lambda=-1, gate_scale=-1, use_dora=True)


def test_config_round_trip(tmp_path):
    made = config(
        sparse_lambda=0.2,
        lambda_schedule="stages",
        lambda_stages=3,
        reassign_ranks=True,
        gate_scale=7.0,
        gate_init="randn",
        warmup_ratio=0.2,
        settle_ratio=0.3,
        target_r=2.5,
        min_rank=1,
        rank_pattern={"q_proj": 6},
        use_rslora=True,
    )
    made.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SORA"
    for cls in (PeftConfig, SoraConfig):
        loaded = cls.from_pretrained(str(tmp_path))
        assert isinstance(loaded, SoraConfig)
        assert loaded.to_dict() == made.to_dict()


def test_the_model_card_says_how_to_load_and_is_written_once(tmp_path):
    (tmp_path / "README.md").write_text("# mine\n")
    for _ in range(2):
        config().save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# mine\n")
    assert card.count("import hf_fastpeft") == 1
    assert "export_to_lora" in card


# ---- layers


@given(seed=st.integers(0, 99), r=st.integers(1, 6), rslora=st.booleans(), batch=st.integers(1, 3))
def test_forward_is_the_formula(seed, r, rslora, batch):
    torch.manual_seed(seed)
    base = nn.Linear(5, 7).double()
    layer = SoraLinear(base, "a", SoraConfig(r=r, use_rslora=rslora, gate_init="randn"), r=r, lora_alpha=3).double()
    nn.init.normal_(layer.lora_B["a"].weight)
    x = torch.randn(batch, 4, 5, dtype=torch.float64)
    a, b, g = layer.lora_A["a"].weight, layer.lora_B["a"].weight, layer.lora_A["a"].gate.weight * 50
    scaling = 3 / r**0.5 if rslora else 3 / r
    want = base(x) + scaling * ((x @ a.T) * g) @ b.T
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer.get_delta_weight("a"), scaling * b @ torch.diag(g) @ a)
    torch.testing.assert_close(layer.gate_values("a"), g.detach().float())


def test_gradients_are_right():
    torch.manual_seed(0)
    layer = SoraLinear(nn.Linear(3, 4).double(), "a", SoraConfig(r=2, gate_init="randn"), r=2, lora_alpha=2).double()
    nn.init.normal_(layer.lora_B["a"].weight)
    params = {n: p.detach().requires_grad_() for n, p in layer.named_parameters() if "lora_" in n}
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(params, values, strict=True)), (x,))

    assert len(params) == 3
    assert torch.autograd.gradcheck(run, (x, *params.values()))


def test_starts_as_lora_does():
    torch.manual_seed(0)
    plain = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    gated = get_peft_model(tiny_llama(), config(target_modules=["q_proj"]))
    other = plain.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in gated.state_dict().items() if "gate.w" not in key)
    assert all(torch.equal(layer.gate_values(), torch.ones(4)) for layer in sora_layers(gated))


def test_randn_gates():
    model = get_peft_model(tiny_llama(), config(gate_init="randn", r=256, gate_scale=10.0))
    values = torch.cat([layer.gate_values() for layer in sora_layers(model)])
    assert values.std().item() == pytest.approx(1, abs=0.1)


def test_what_trains_is_a_b_and_gate():
    model = get_peft_model(tiny_llama(), config())
    trained = {name.split("lora_")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"A.default.weight", "A.default.gate.weight", "B.default.weight"}


def test_a_bfloat16_gate_would_never_move():
    """Why gates stay float32 beside half-precision A and B: Adam's step at a usual learning rate, at the start."""
    for dtype, moves in ((torch.bfloat16, False), (torch.float32, True)):
        gate = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = torch.optim.Adam([gate], lr=2e-4)
        for _ in range(20):
            gate.grad = torch.ones_like(gate)
            optimizer.step()
        assert bool((gate < 1).all()) == moves


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_models_keep_float32_gates(dtype, autocast_adapter_dtype):
    model = get_peft_model(tiny_llama(dtype), config(), autocast_adapter_dtype=autocast_adapter_dtype)
    randomise(model)
    exact = [layer.gate_values().clone() for layer in sora_layers(model)]
    model = model.to(dtype).half().to(dtype)
    assert model(IDS).logits.dtype == dtype
    for layer, want in zip(sora_layers(model), exact, strict=True):
        assert layer.lora_A["default"].gate.weight.dtype == torch.float32
        assert layer.lora_A["default"].weight.dtype == dtype
        assert torch.equal(layer.gate_values(), want)
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(layer.lora_A["default"].gate.weight.grad).all() for layer in sora_layers(model))


def test_autocast_runs():
    model = sora_model()
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model)
    torch.testing.assert_close(got.float(), logits(model), atol=0.1, rtol=0.1)


def test_deepcopy_and_pickle():
    model = sora_model()
    want = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), want)  # noqa: S301  our own bytes


def test_all_linear_and_patterns():
    model = get_peft_model(
        tiny_llama(),
        config(target_modules="all-linear", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 6}),
    )
    layers = dict(model.named_modules())
    q, k = (layers[f"base_model.model.model.layers.0.self_attn.{n}_proj"] for n in "qk")
    assert len(sora_layers(model)) == 14
    assert (q.r["default"], q.scaling["default"], q.gate_values().shape) == (2, 3.0, (2,))
    assert (k.r["default"], k.scaling["default"], k.gate_values().shape) == (4, 2.0, (4,))


def test_kept_ranks_by_path():
    model = sora_model()
    kept = kept_ranks(model)
    assert set(kept) == {
        f"base_model.model.model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert set(kept.values()) == {(3, 4)}
    assert kept_ranks(model, "other") == {}
    plain = inject_adapter_in_model(config(), tiny_llama())
    assert set(kept_ranks(plain).values()) == {(4, 4)}


def test_an_unknown_adapter_is_named():
    with pytest.raises(KeyError, match=r"adapter 'b': not in this layer; found: .'default'"):
        sora_layers(sora_model())[0].gate_values("b")


# ---- adapters: several, disabled, deleted


def test_several_adapters_keep_apart():
    model = sora_model()
    first = logits(model)
    model.add_adapter("second", config(r=2, gate_scale=5.0, target_modules=["q_proj"]))
    randomise(model, "second", seed=9)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, first)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".second." in n for n in trainable)
    assert any("gate" in n for n in trainable)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    mixed = model(IDS, adapter_names=["default", "second"]).logits
    torch.testing.assert_close(mixed[0], first[0])
    torch.testing.assert_close(mixed[1], second[1])
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any(".second." in n for n, _ in model.named_parameters())


def test_adapters_save_apart(tmp_path):
    model = sora_model()
    model.add_adapter("second", config(r=2, target_modules=["q_proj"]))
    randomise(model, "second", seed=9)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "second", adapter_name="again").eval()
    loaded.load_adapter(tmp_path, "default")
    for adapter, name in (("second", "again"), ("default", "default")):
        model.set_adapter(adapter)
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_one_peft_method_per_model():
    lora_model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny_llama())
    with pytest.raises(TypeError, match=r"'model.layers.0.self_attn.q_proj': the module is already a peft"):
        inject_adapter_in_model(config(), lora_model, "second")
    gated = inject_adapter_in_model(config(), tiny_llama())
    with pytest.raises(TypeError, match="add adapter 'second' of type LoraConfig: the layer holds SoRA adapters"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), gated, "second")


def test_an_adapter_called_gate_is_refused():
    with pytest.raises(ValueError, match="adapter_name='gate'"):
        get_peft_model(tiny_llama(), config(), adapter_name="gate")


def test_add_weighted_adapter_is_refused():
    model = sora_model()
    with pytest.raises(
        AdapterError, match="from A and B alone, also from a single adapter, and knows no gates of SoRA"
    ):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    assert list(model.peft_config) == ["default"]


def test_conversion_of_initial_weights_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="SoRA never changes the base weights"):
        sora_model().save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "b"))


@pytest.mark.parametrize("module", [nn.Embedding(4, 4), nn.Conv1d(2, 2, 1)])
def test_other_layer_types_are_refused(module):
    model = nn.ModuleDict({"part": module})
    with pytest.raises(TypeError, match=r"SoRA on 'part': the module is a torch.nn.*possible: torch.nn.Linear"):
        get_peft_model(model, config(target_modules=["part"], task_type=None))


def test_a_backend_without_a_gated_layer_is_refused(monkeypatch):
    class ForeignBackendLinear(lora.Linear):
        """Stands for what PEFT's dispatch returns on gptq, awq, torchao and the like."""

    monkeypatch.setattr(
        lora.LoraModel,
        "_create_new_module",
        staticmethod(lambda c, name, target, **kw: ForeignBackendLinear(target, name, c, r=c.r, lora_alpha=1)),
    )
    with pytest.raises(TypeError, match=r"SoRA on 'model.layers.0.self_attn.q_proj'.*bitsandbytes Linear4bit and Lin"):
        get_peft_model(tiny_llama(), config())


# ---- files


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reload_is_exact(tmp_path, low_cpu_mem_usage, dtype):
    model = sora_model(dtype, rank_pattern={"q_proj": 2}, use_rslora=True, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    gate = saved["base_model.model.model.layers.0.mlp.down_proj.lora_A.gate.weight"]
    assert gate.dtype == torch.float32
    loaded = PeftModel.from_pretrained(tiny_llama(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    want, got = model.state_dict(), loaded.state_dict()
    assert want.keys() == got.keys()
    rounded = low_cpu_mem_usage and dtype != torch.float32  # PEFT then rounds A and B to dtype, stock LoRA's too
    for key, value in want.items():
        assert value.dtype == got[key].dtype, key
        assert torch.equal(value, got[key]) or (rounded and key.endswith(("A.default.weight", "B.default.weight"))), (
            key
        )
    if not rounded:
        assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].kept_ranks == {
        path.removeprefix("base_model.model."): kept for path, (kept, _) in kept_ranks(model).items()
    }
    assert all(layer.lora_A["default"].gate.weight.dtype == torch.float32 for layer in sora_layers(loaded))


@pytest.mark.usefixtures("transformers_takes_peft")
def test_transformers_load_and_save(tmp_path):
    model = sora_model()
    model.save_pretrained(tmp_path / "a")
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path / "a"))
    assert torch.equal(logits(loaded.eval()), logits(model))
    loaded.save_pretrained(tmp_path / "b")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "b").eval()
    assert torch.equal(logits(again), logits(model))
    assert "import hf_fastpeft" in (tmp_path / "b" / "README.md").read_text()
    loaded.delete_adapter("default")
    assert not sora_layers(loaded) or torch.equal(logits(loaded), logits(tiny_llama()))


# ---- merging


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(safe_merge):
    model = sora_model()
    want, base = logits(model), logits(tiny_llama())
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model), want, atol=2e-6, rtol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, atol=2e-6, rtol=1e-5)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not sora_layers(merged)
    torch.testing.assert_close(logits(merged), want, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(want, base, atol=1e-2)  # the adapter does something


def test_conv1d_merges_transposed():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base = nn.ModuleDict({"part": Conv1D(6, 3)})
    model = get_peft_model(base, config(target_modules=["part"], task_type=None, fan_in_fan_out=True))
    randomise(model)
    layer, x = model.base_model.model["part"], torch.randn(2, 3)
    want = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), want)


def quantised(tmp_path, **settings):
    tiny_llama(hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**settings))


FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear:UserWarning")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize(
    ("settings", "cls", "quantisation"),
    [(FOUR_BIT, "SoraLinear4bit", 0.12), ({"load_in_8bit": True}, "SoraLinear8bitLt", 0.02)],
)
def test_quantised_layers(tmp_path, settings, cls, quantisation):
    from peft.utils.integrations import dequantize_module_weight

    model = randomise(get_peft_model(quantised(tmp_path / "base", **settings), config()), std=0.02).eval()
    layers = sora_layers(model)
    assert {type(layer) for layer in layers} == {getattr(sora, cls)}
    layer, x = layers[0], torch.randn(3, 64)
    a, b, g = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.gate_values()
    with torch.no_grad():
        added = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(added.float(), 2 * ((x @ a.T) * g) @ b.T, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(layer.get_delta_weight("default"), 2 * b @ torch.diag(g) @ a)
        layer.base_layer.state_dict()  # undoes the packing of the forward above
        want = dequantize_module_weight(layer.base_layer).float() + layer.get_delta_weight("default")
        model.save_pretrained(tmp_path / "adapter")
        if cls == "SoraLinear4bit":
            layer.base_layer(x)  # packs the weight again where the CPU has AVX512
        layer.merge()
        got = dequantize_module_weight(layer.base_layer).float()
    assert (got - want).norm() / want.norm() < quantisation  # what quantising the sum costs
    again = PeftModel.from_pretrained(quantised(tmp_path / "base", **settings), tmp_path / "adapter")
    for one, other in zip(layers, sora_layers(again), strict=True):
        assert torch.equal(one.gate_values(), other.gate_values())


def test_an_unknown_lazy_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SoraConv2d'"):
        sora.SoraConv2d  # noqa: B018


def test_a_gate_knows_its_size():
    gated = GatedLinear(nn.Linear(3, 2, bias=False), SoraRuntime(config(gate_scale=4.0)))
    assert "r=2, scale=4.0" in repr(gated)
