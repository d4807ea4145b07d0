"""Bottleneck adapters: the formula on every kind of module, defaults that find their place, and what is refused."""

import json
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from adapters import step, token_batch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tiny import tiny_llama
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from hf_fastpeft import BottleneckAdapterConfig, patch_model, patched
from hf_fastpeft.errors import AdapterError
from hf_fastpeft.tuners.bottleneck import DEFAULT_TARGETS, BottleneckLayer
from hf_fastpeft.tuners.bottleneck.targets import LINEAR_TARGETS

# PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))
ACT = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}
config = BottleneckAdapterConfig.tiny


def randomise(model, adapter="default", seed=0, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bottleneck_" in name and f".{adapter}." in name:
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    return model


def adapted(dtype=torch.float32, model=None, **settings):
    return randomise(get_peft_model(model or tiny_llama(dtype), config(**settings))).eval()


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, BottleneckLayer)]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


# ---- config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0: possible: an integer above 0"),
        ({"r": True}, "r=True"),
        ({"r": 4, "reduction_factor": 8}, "r=4 and reduction_factor=8: give one of them"),
        ({"r": None, "reduction_factor": 0}, "reduction_factor=0: possible: a number above 0"),
        ({"mode": "before"}, "mode='before': possible: 'sequential', 'parallel'"),
        ({"nonlinearity": "elu"}, "nonlinearity='elu': possible: 'gelu', 'gelu_tanh', 'relu', 'silu', 'tanh'"),
        ({"nonlinearity": []}, r"nonlinearity=\[\]"),
        ({"scaling": 0}, "scaling=0: possible: a number other than 0"),
        ({"scaling": float("nan")}, "scaling=nan"),
        ({"dropout": 1.0}, r"dropout=1.0: possible: a fraction in \[0, 1\)"),
        ({"layer_norm": "in"}, "layer_norm='in': possible: True, False"),
        ({"init_weights": "zero"}, "init_weights='zero': possible: True, False, 'houlsby'"),
        ({"init_weights": 1}, "init_weights=1: possible"),
        ({"hidden_size": 1.5}, "hidden_size=1.5"),
        ({"target_modules": []}, r"target_modules=\[\]: possible: at least one name"),
        ({"layers_to_transform": 1, "target_modules": "x"}, "a regular expression says itself which layers"),
        ({"layers_pattern": "h"}, "layers_pattern='h': only with layers_to_transform"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=f"BottleneckAdapterConfig: .*{message}"):
        config(**settings)


def test_all_mistakes_come_together():
    with pytest.raises(ValueError, match=r"r=-1.*mode='x'.*dropout=2"):
        config(r=-1, mode="x", dropout=2)


def test_the_size_of_the_bottleneck():
    assert BottleneckAdapterConfig().bottleneck_size(4096) == 64
    assert BottleneckAdapterConfig(r=7).bottleneck_size(4096) == 7
    assert BottleneckAdapterConfig(reduction_factor=16).bottleneck_size(4096) == 256
    assert BottleneckAdapterConfig(reduction_factor=2.5).bottleneck_size(32) == 12
    assert BottleneckAdapterConfig(reduction_factor=1000).bottleneck_size(32) == 1


def test_config_round_trip(tmp_path):
    made = BottleneckAdapterConfig(
        reduction_factor=4,
        mode="parallel",
        nonlinearity="silu",
        scaling=4.0,
        dropout=0.1,
        layer_norm=True,
        init_weights="houlsby",
        hidden_size=32,
        target_modules=["mlp"],
        layers_to_transform=[1],
        layers_pattern="layers",
    )
    (tmp_path / "README.md").write_text("# mine\n")
    for _ in range(2):
        made.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"
    for cls in (PeftConfig, BottleneckAdapterConfig):
        loaded = cls.from_pretrained(str(tmp_path))
        assert isinstance(loaded, BottleneckAdapterConfig)
        assert loaded.to_dict() == made.to_dict()
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# mine\n")
    assert card.count("import hf_fastpeft") == 1


# ---- the formula


class Block(nn.Module):
    """A stand-in for an attention block: keywords in, a tuple out."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, *, hidden_states, scale=1.0):
        return self.linear(hidden_states) * scale, "weights"


def formula(z, layer, name, nonlinearity):
    down, up = layer.bottleneck_down[name], layer.bottleneck_up[name]
    if name in layer.bottleneck_norm:
        norm = layer.bottleneck_norm[name]
        centred = z - z.mean(-1, keepdim=True)
        z = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    return ACT[nonlinearity](z @ down.weight.T + down.bias) @ up.weight.T + up.bias


@given(
    seed=st.integers(0, 99),
    r=st.integers(1, 6),
    mode=st.sampled_from(["sequential", "parallel"]),
    nonlinearity=st.sampled_from(sorted(ACT)),
    norm=st.booleans(),
    scaling=st.sampled_from([1.0, 4.0, -0.5]),
)
def test_forward_is_the_formula(seed, r, mode, nonlinearity, norm, scaling):
    torch.manual_seed(seed)
    made = BottleneckAdapterConfig(
        r=r, mode=mode, nonlinearity=nonlinearity, layer_norm=norm, scaling=scaling, init_weights=False
    )
    block, linear = (BottleneckLayer(m, d_in, 7, "m") for m, d_in in ((Block(7), 7), (nn.Linear(5, 7), 5)))
    for layer, d_in in ((block, 7), (linear, 5)):
        layer.double().add_adapter("default", made)
        x = torch.randn(2, 3, d_in, dtype=torch.float64)
        if layer is block:
            got, rest = layer(hidden_states=x, scale=3.0)
            h, _ = layer.base_layer(hidden_states=x, scale=3.0)
            assert rest == "weights"
        else:
            got, h = layer(x), layer.base_layer(x)
        want = h + scaling * formula(h if mode == "sequential" else x, layer, "default", nonlinearity)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_gradients_are_right(mode):
    torch.manual_seed(0)
    layer = BottleneckLayer(nn.Linear(3, 4), 3, 4, "m").double()
    layer.add_adapter("default", BottleneckAdapterConfig(r=2, mode=mode, layer_norm=True, init_weights=False))
    params = {n: p.detach().requires_grad_() for n, p in layer.named_parameters()}

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(params, values, strict=True)), (x,))

    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert len(params) == 8
    assert torch.autograd.gradcheck(run, (x, *params.values()))


def test_several_active_adapters_act_one_after_the_other():
    torch.manual_seed(0)
    layer = BottleneckLayer(nn.Linear(4, 4).double(), 4, 4, "m")
    for name, mode in (("a", "sequential"), ("b", "parallel"), ("c", "sequential")):
        layer.add_adapter(name, BottleneckAdapterConfig(r=2, mode=mode, init_weights=False))
    layer.set_adapter(["c", "b", "a", "elsewhere"])
    x = torch.randn(3, 4, dtype=torch.float64)
    h = layer.base_layer(x)
    h = h + formula(h, layer, "c", "gelu")
    h = h + formula(x, layer, "b", "gelu")
    h = h + formula(h, layer, "a", "gelu")
    torch.testing.assert_close(layer(x), h)


def test_named_tuples_and_lists_keep_their_type():
    Pair = namedtuple("Pair", ["states", "weights"])

    class Returns(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.make = make

        def forward(self, x):
            return self.make(x)

    for make in (lambda x: Pair(x, None), lambda x: [x, None], lambda x: (x,)):
        layer = BottleneckLayer(Returns(make), 4, 4, "m")
        layer.add_adapter("default", BottleneckAdapterConfig(r=2, init_weights=False))
        x = torch.randn(2, 4)
        got, plain = layer(x), make(x)
        assert type(got) is type(plain)
        assert not torch.equal(got[0], x)
        assert got[1:] == plain[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"mode": "parallel", "layer_norm": True}, {"target_modules": "all-linear"}])
def test_starts_as_exactly_the_base_model(dtype, settings):
    model = get_peft_model(tiny_llama(dtype), config(**settings)).eval()
    assert torch.equal(logits(model), logits(tiny_llama(dtype)))
    adapters = [p for n, p in model.named_parameters() if "bottleneck_" in n]
    assert {p.dtype for p in adapters} == {torch.float32}
    model.train()(IDS, labels=IDS).loss.backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got == {n for n, _ in model.named_parameters() if "bottleneck_up" in n}


def test_houlsby_starts_near_the_base_model():
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), config(init_weights="houlsby", r=64)).eval()
    weights = torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith(".default.weight")])
    assert 0 < weights.abs().max() <= 0.02
    assert weights.std().item() == pytest.approx(0.0088, abs=2e-4)  # of N(0, 0.01²) cut at two deviations
    assert not torch.equal(logits(model), logits(tiny_llama()))
    torch.testing.assert_close(logits(model), logits(tiny_llama()), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_without_float32_adapters(dtype):
    model = get_peft_model(tiny_llama(dtype), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert randomise(model)(IDS).logits.dtype == dtype


def test_autocast_runs():
    model = adapted(layer_norm=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model)
    torch.testing.assert_close(got.float(), logits(model), atol=0.15, rtol=0.1)


def test_dropout_acts_in_training_alone():
    model = adapted(dropout=0.5)
    assert torch.equal(logits(model), logits(adapted()))
    torch.manual_seed(1)
    assert not torch.equal(logits(model.train()), logits(model))
    evaluated = get_peft_model(tiny_llama().eval(), config(dropout=0.5))
    assert not any(m.training for m in evaluated.modules() if type(m) is nn.Dropout)


# ---- where they go


def test_the_number_of_parameters():
    model = get_peft_model(tiny_llama(), config(r=5, layer_norm=True))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 2 * (32 * 5 + 5 * 32 + 5 + 32 + 2 * 32)


SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
OWN_NAMES = {
    "bloom": {"n_layer": 2, "n_head": 4, "hidden_size": 32, "vocab_size": 64},
    "distilbert": {"n_layers": 2, "n_heads": 4, "dim": 32, "hidden_dim": 48, "vocab_size": 64},
    "electra": {"embedding_size": 32},
    "falcon": {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 64},
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 64},
    "mixtral": {"num_local_experts": 2},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2},
    "mt5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen2_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 48},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
}
NOT_GENERAL = {"bloom", "distilbert", "falcon", "gpt2", "mt5", "t5"}


def family(kind):
    settings = {**({} if kind in NOT_GENERAL else SMALL), **OWN_NAMES.get(kind, {})}
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(kind, **settings)).eval()


@pytest.mark.parametrize("kind", sorted(DEFAULT_TARGETS))
def test_the_default_targets_of_a_model_type(kind):
    model = family(kind)
    inputs = {"input_ids": IDS % 64}
    if kind in ("t5", "mt5"):
        inputs["decoder_input_ids"] = IDS[:, :4] % 64
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
    model = get_peft_model(model, BottleneckAdapterConfig(r=3)).eval()
    assert torch.equal(model(**inputs).last_hidden_state, want)
    layers = layers_of(model)
    assert len(layers) == (2 * 2 + 2 * 3 if kind in ("t5", "mt5") else 2 * 2)
    assert {layer.d_out for layer in layers} == {32}
    got = randomise(model)(**inputs).last_hidden_state
    assert not torch.allclose(got, want, atol=1e-3)
    got.sum().backward()
    # the last norm's output has a fixed sum in some families: None is what is looked for, not zero
    assert [n for n, p in model.named_parameters() if "bottleneck_" in n and p.grad is None] == []
    if kind in LINEAR_TARGETS:
        with pytest.raises(ValueError, match="mode='parallel': its attention and feed-forward are not one module"):
            get_peft_model(family(kind), BottleneckAdapterConfig(mode="parallel"))
    else:
        other = get_peft_model(family(kind), BottleneckAdapterConfig(r=3, mode="parallel")).eval()
        assert torch.equal(other(**inputs).last_hidden_state, want)


def test_an_unknown_model_type_is_told_what_to_name():
    model = nn.ModuleDict({"part": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"target_modules=None for model_type=.*: no default; known: bert, .*llama"):
        get_peft_model(model, BottleneckAdapterConfig())


def test_some_layers_and_exclusions():
    model = get_peft_model(
        tiny_llama(), config(target_modules=["self_attn", "mlp"], layers_to_transform=[1], exclude_modules=["mlp"])
    )
    assert [layer.path for layer in layers_of(model)] == ["model.layers.1.self_attn"]


def test_conv1d_embeddings_and_given_widths():
    model = nn.ModuleDict({"conv": Conv1D(6, 3), "embed": nn.Embedding(5, 4), "norm": nn.LayerNorm(8)})
    model = get_peft_model(
        model, BottleneckAdapterConfig(r=2, hidden_size=8, target_modules=["conv", "embed", "norm"])
    )
    found = {layer.path: (layer.d_in, layer.d_out) for layer in layers_of(model)}
    assert found == {"conv": (3, 6), "embed": (None, 4), "norm": (8, 8)}
    assert model.base_model.model["embed"](torch.tensor([1, 2])).shape == (2, 4)


class FakeMambaMixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("module", "target", "message"),
    [
        (nn.ModuleList([nn.Linear(4, 4)]), "part", "only a container"),
        (nn.Conv1d(2, 2, 1), "part", "features are not in the last dimension"),
        (nn.MultiheadAttention(4, 2), "part", "reads its weights without calling it"),
        (nn.TransformerEncoderLayer(4, 2, 8), "linear2", "reads its weights without calling it"),
        (FakeMambaMixer(), "out_proj", "fused kernel of FakeMambaMixer"),
    ],
)
def test_modules_that_would_be_silently_wrong_are_refused(module, target, message):
    with pytest.raises(TypeError, match=f"bottleneck adapter 'default' on 'part.*{message}.*possible"):
        get_peft_model(nn.ModuleDict({"part": module}), BottleneckAdapterConfig(r=2, target_modules=[target]))


def test_widths_that_cannot_be_told():
    made = BottleneckAdapterConfig(r=2, target_modules=["part"])
    with pytest.raises(ValueError, match=r"'part': a Block is not a linear, and no config.*hidden_size=\.\.\."):
        get_peft_model(nn.ModuleDict({"part": Block(4)}), made)
    model = tiny_llama()
    model.model.layers[0].part = Block(5)
    with pytest.raises(ValueError, match=r"the config has hidden_size=32, and its linears give \[5\]"):
        get_peft_model(model, BottleneckAdapterConfig(r=2, target_modules=["part"]))
    with pytest.raises(ValueError, match="mode='parallel', and a Embedding takes no features"):
        get_peft_model(tiny_llama(), config(mode="parallel", target_modules=["embed_tokens"]))


def test_a_wrong_width_is_told_at_the_first_call():
    model = get_peft_model(tiny_llama(), config(hidden_size=16))
    with pytest.raises(
        ValueError,
        match=r"'model.layers.0.self_attn', sequential: input \(2, 9, 32\).*\(\.\.\., 16\).*Set hidden_size",
    ):
        model(IDS)


def test_what_a_module_takes_and_returns_is_checked():
    class Odd(nn.Module):
        def forward(self, x=None, named=None):
            return {"x": x} if named is None else (None, named)

    for mode in ("sequential", "parallel"):
        layer = BottleneckLayer(Odd(), 4, 4, "odd")
        layer.add_adapter("default", BottleneckAdapterConfig(r=2, mode=mode))
        with pytest.raises(TypeError, match="'odd': the module returned a dict; possible: a tensor, or a tuple"):
            layer(torch.zeros(1, 4))
        if mode == "sequential":
            with pytest.raises(TypeError, match="returned a tuple that starts with a NoneType"):
                layer(named=torch.zeros(1, 4))
        else:
            with pytest.raises(TypeError, match=r"called with keywords \['named'\]; possible: .*'hidden_states', 'x'"):
                layer(named=torch.zeros(1, 4))
            with pytest.raises(TypeError, match="called with a str"):
                layer("a")


def test_nested_targets_are_refused():
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.down_proj': it lies inside 'model.layers.0.mlp'"):
        get_peft_model(tiny_llama(), config(target_modules=["mlp", "down_proj"]))
    deep = nn.ModuleDict({"part": nn.Sequential(nn.Sequential(nn.Linear(4, 4)))})
    with pytest.raises(ValueError, match="lies inside 'part', which carries an adapter itself"):
        get_peft_model(deep, BottleneckAdapterConfig(r=2, hidden_size=4, target_modules=["part", "0.0"]))
    model = get_peft_model(tiny_llama(), config())
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.o_proj': it lies inside 'model.layers.0.self_a"):
        model.add_adapter("second", config(target_modules=["o_proj"]))
    model = get_peft_model(tiny_llama(), config(target_modules=["o_proj"]))
    with pytest.raises(TypeError, match=r"'o_proj' is already a hf_fastpeft.tuners.bottleneck.layer.BottleneckLayer"):
        model.add_adapter("second", config())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_one_peft_method_per_model():
    lora_model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), tiny_llama())
    with pytest.raises(TypeError, match=r"'q_proj' is already a peft.tuners.lora.layer.Linear"):
        inject_adapter_in_model(config(), lora_model, "second")
    with pytest.raises(ValueError, match="'BOTTLENECK' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_llama(), config(), mixed=True)


# ---- use


def test_attributes_of_the_wrapped_module_are_found():
    model = adapted()
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj is attention.base_layer.q_proj
    assert attention.layer_idx == 0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        attention.nothing  # noqa: B018
    with pytest.raises(AttributeError, match=r"BottleneckLayer.*_hf_hook"):
        attention._hf_hook  # noqa: B018
    assert "d_in=32, d_out=32, r={'default': 3}" in repr(attention)


def test_merging_is_refused_and_changes_nothing():
    model = adapted()
    want, keys = logits(model), list(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload, layers_of(model)[0].merge):
        with pytest.raises(AdapterError, match=r"not linear in its input.*possible: keep the adapter"):
            merge()
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model.unload()), logits(tiny_llama()))


def test_what_peft_tells_about_the_layers():
    model = adapted()
    (first, *_), status = model.get_layer_status(), model.get_model_status()
    assert (first.name, first.module_type) == ("model.model.layers.0.self_attn", "BottleneckLayer")
    assert (first.enabled, first.active_adapters, first.merged_adapters) == (True, ["default"], [])
    assert (status.adapter_model_type, status.num_adapter_layers) == ("BottleneckModel", 4)
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_classifier_is_trained_and_saved_along(tmp_path):
    kwargs = {**SMALL, "num_labels": 3}
    kwargs.pop("head_dim")
    kwargs.pop("num_key_value_heads")

    def base():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **kwargs))

    model = randomise(get_peft_model(base(), BottleneckAdapterConfig(r=3, task_type="SEQ_CLS"))).eval()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("classifier.modules_to_save" in n for n in trained)
    assert all("bottleneck_" in n or "classifier" in n for n in trained)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS % 64).logits, model(IDS % 64).logits)


def test_batches_of_several_adapters_are_refused():
    with pytest.raises(ValueError, match=r"adapter_names=\['default', '__base__'\]: bottleneck adapters act on whole"):
        adapted()(IDS, adapter_names=["default", "__base__"])


FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("settings", [FOUR_BIT, {"load_in_8bit": True}])
@pytest.mark.parametrize("targets", [["self_attn", "mlp"], ["o_proj", "down_proj"]])
def test_quantised_bases(tmp_path, settings, targets):
    tiny_llama(hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(tmp_path / "base")
    bits = BitsAndBytesConfig(**settings)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bits).eval()
    want = logits(base)
    model = get_peft_model(base, config(target_modules=targets)).eval()
    assert torch.equal(logits(model), want)
    assert {p.dtype for n, p in model.named_parameters() if "bottleneck_" in n} == {torch.float32}
    randomise(model, std=0.1)
    layer, x = layers_of(model)[1], torch.randn(2, 64)
    with torch.no_grad():
        h = layer.base_layer(x)
        torch.testing.assert_close(layer(x), h + formula(h, layer, "default", "gelu"), atol=2e-3, rtol=2e-3)
    model.state_dict()  # bitsandbytes 0.50 packs CPU weights in evaluation, without a backward; this undoes it
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "bottleneck_up" in n)
    model.save_pretrained(tmp_path / "adapter")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=bits)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model.eval()))


# ---- under patch_model


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize(
    ("settings", "fused"),
    [
        ({}, {"mlp", "attention_in", "attention_out"}),
        ({"mode": "parallel", "layer_norm": True, "scaling": 4.0}, {"mlp", "attention_in", "attention_out"}),
        ({"target_modules": ["mlp"], "mode": "parallel"}, {"mlp", "attention_in", "attention_out"}),
        ({"target_modules": ["o_proj", "down_proj"]}, {"attention_in"}),
        ({"target_modules": "all-linear", "mode": "parallel"}, set()),
        ({"target_modules": r"model\.layers\.1"}, {"mlp", "attention_in", "attention_out"}),
        ({"target_modules": ["mlp"], "dropout": 0.3}, {"mlp", "attention_in", "attention_out"}),
        ({"target_modules": ["norm", "input_layernorm"]}, {"mlp", "attention_in", "attention_out"}),
        ({"target_modules": ["embed_tokens", "lm_head"]}, {"mlp", "attention_in", "attention_out"}),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_patched_model_computes_the_same(patched_first, settings, fused, checkpointing):
    def build(patch):
        base = tiny_llama(torch.float64)
        handle = patched(patch_model(base)) if patch and patched_first else None
        model = randomise(get_peft_model(base, config(**settings), autocast_adapter_dtype=False)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model, patched(patch_model(model)) if patch and not patched_first else handle

    (stock, _), (fast, handle) = build(False), build(True)
    for seed in range(3):  # the second and third step may leave padding and unscored rows out
        batch = token_batch(seed=seed)
        torch.manual_seed(seed)
        want, want_grads = step(stock, batch)
        torch.manual_seed(seed)
        loss, grads = step(fast, batch)
        torch.testing.assert_close(loss, want)
        assert grads.keys() == want_grads.keys()
        for name, grad in want_grads.items():
            torch.testing.assert_close(grads[name], grad, msg=name)
    blocks = handle.to_json()["blocks"]
    assert {b for b in ("mlp", "attention_in", "attention_out") if not blocks[b]["calls_stock"]} == fused
    assert all(blocks[b]["calls_fused"] == 0 for b in ("mlp", "attention_in", "attention_out") if b not in fused)
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(IDS).logits, stock.eval()(IDS).logits)
    handle.restore()
    with torch.no_grad():
        assert torch.equal(fast(IDS).logits, stock(IDS).logits)


def test_generation_with_a_cache():
    model = adapted(mode="parallel")
    ids = IDS[:1]
    settings = {"max_new_tokens": 5, "do_sample": False}
    plain, cached = (model.generate(input_ids=ids, use_cache=use, **settings) for use in (False, True))
    assert torch.equal(plain, cached)
