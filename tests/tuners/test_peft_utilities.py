"""What PEFT's own utilities do to our layers: what they do to LoRA's, or an error; never other outputs in silence."""

import pytest
import torch
from methods import METHODS
from peft import (
    ArrowConfig,
    LoraConfig,
    LoraModel,
    PeftModel,
    XLoraConfig,
    convert_to_lora,
    create_arrow_model,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners import lora
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.tuners.mixed import MixedModel
from peft.utils.hotswap import _pad_lora_weights, hotswap_adapter, prepare_model_for_compiled_hotswap
from tiny import tiny_llama
from torch import nn

from hf_fastpeft.errors import AdapterError
from hf_fastpeft.tuners._gated import GatedLayer

pytestmark = [
    # PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned:UserWarning"),
    pytest.mark.filterwarnings("ignore:adaptive LoRA. ranks are not being allocated:UserWarning"),
]

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))
GATED = ["SORA", "ADAPTIVE_LORA"]
OURS = [*GATED, "BOTTLENECK"]


def own(model, adapter="default"):
    return {n: p for n, p in model.named_parameters() if f".{adapter}." in n}


@torch.no_grad()
def change(model, adapter="default", seed=0):
    """Factors of about 0.3 and gates of about 1 in effect, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    for p in own(model, adapter).values():
        size = 0.3 if p.dim() > 1 else p.abs().max().item() or 1.0
        p.copy_(torch.randn(p.shape, generator=generator) * size)
    return model


def adapted(name, **settings):
    torch.manual_seed(0)
    return change(get_peft_model(tiny_llama(), METHODS[name].config(**settings))).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.fixture
def unchanged():
    """``unchanged(model)`` around a refusal: tensors, configuration and outputs are as before, bit for bit."""

    class Unchanged:
        def __init__(self, model):
            self.model, self.want = model, logits(model)
            self.state = {k: v.clone() for k, v in model.state_dict().items()}
            self.config = {k: v for k, v in model.peft_config["default"].to_dict().items() if k != "kept_ranks"}

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            config = self.model.peft_config["default"].to_dict()
            assert {k: v for k, v in config.items() if k != "kept_ranks"} == self.config
            state = self.model.state_dict()
            assert state.keys() == self.state.keys()
            assert all(torch.equal(state[key], value) for key, value in self.state.items())
            assert torch.equal(logits(self.model), self.want)

    return Unchanged


# ---- hot-swapping


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("target_rank", [None, 4, 8])
@pytest.mark.parametrize("with_config", [False, True])
def test_preparing_for_hot_swapping_is_refused(name, target_rank, with_config, unchanged):
    model = adapted(name)
    config = model.peft_config if with_config else None
    with unchanged(model), pytest.raises(AdapterError, match="prepares a LoRA layer for hot-swapping"):
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank, config=config)


@pytest.mark.parametrize("name", GATED)
def test_padding_alone_is_refused(name, unchanged):
    model = adapted(name)
    with unchanged(model), pytest.raises(AdapterError, match=r"replace lora_A.'default'., which carries gates, by a"):
        _pad_lora_weights(model, target_rank=8)


@pytest.mark.parametrize("name", OURS)
def test_hot_swapping_is_refused(name, unchanged, tmp_path):
    model = adapted(name)
    model.save_pretrained(tmp_path)
    with unchanged(model), pytest.raises(ValueError, match=f"Hotswapping only supports LORA but {name}"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")


# ---- modules exchanged by kind, name or place


def plain(module):
    return nn.Linear(module.in_features, module.out_features, bias=False)


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize(
    "exchange",
    [
        lambda factors: factors.__setitem__("default", plain(factors["default"])),
        lambda factors: setattr(factors, "default", plain(factors["default"])),
        lambda factors: factors.add_module("default", plain(factors["default"])),
        lambda factors: factors.register_module("default", plain(factors["default"])),
        lambda factors: factors.update({"default": plain(factors["default"])}),
    ],
    ids=["item", "attribute", "add_module", "register_module", "update"],
)
def test_a_plain_linear_never_takes_a_gated_ones_place(name, exchange, unchanged):
    model = adapted(name)
    factors = next(m for m in model.modules() if isinstance(m, GatedLayer)).lora_A
    with unchanged(model), pytest.raises(AdapterError, match="the gates would be lost"):
        exchange(factors)


@pytest.mark.parametrize("name", GATED)
def test_a_wrapper_and_another_gated_module_may(name):
    model = adapted(name)
    want = logits(model)
    for layer in [m for m in model.modules() if isinstance(m, GatedLayer)]:
        layer.lora_A["default"] = nn.Sequential(layer.lora_A["default"])
        layer.lora_A["default"].weight = layer.lora_A["default"][0].weight  # what PEFT's forward reads
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("name", GATED)
def test_converters_of_linears_leave_gates_alone(name):
    """As converters to low precision do: each ``nn.Linear`` in the tree becomes another module of that weight."""
    model = adapted(name)
    want = logits(model)
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                other = plain(child)
                other.weight = child.weight
                setattr(parent, child_name, other)
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("name", GATED)
def test_an_adapter_is_made_anew_or_not_at_all(name, unchanged):
    model = adapted(name)
    layer = next(m for m in model.modules() if isinstance(m, GatedLayer))
    with unchanged(model), pytest.raises(ValueError, match="`r` should be a positive integer"):
        layer.update_layer("default", 0, lora_alpha=1, config=model.peft_config["default"])
    layer.update_layer("default", 3, lora_alpha=6, config=model.peft_config["default"])
    assert layer.lora_A["default"].gate.weight.shape == (3,)
    assert layer.scaling["default"] == 2.0
    logits(model)


# ---- plain LoRA made from our configurations


@pytest.mark.parametrize("name", GATED)
def test_plain_lora_is_never_made_from_a_gated_configuration(name, tmp_path):
    config = METHODS[name].config
    refused = pytest.raises(ValueError, match=r"unsupported variant combination: .'(gate_scale|init_r)'")
    for tuner in (LoraModel, MixedModel):
        with refused:
            tuner(tiny_llama(), config(), "default")
    with refused:
        lora.Linear(nn.Linear(4, 4), "default", config(), r=2)
    adapted(name).save_pretrained(tmp_path)
    base = tiny_llama()
    base.config.use_cache = False
    with refused:
        get_peft_model(
            base, XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters={"0": str(tmp_path)})
        )


@pytest.mark.parametrize("name", OURS)
def test_methods_do_not_mix(name, tmp_path):
    plain_config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for first, second in ((METHODS[name].config(), plain_config), (plain_config, METHODS[name].config())):
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            get_peft_model(tiny_llama(), first).add_adapter("second", second)
    mixed = get_peft_model(tiny_llama(), plain_config, mixed=True)
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        mixed.add_adapter("second", METHODS[name].config())


@pytest.mark.parametrize("name", GATED)
def test_arrow_is_refused(name, tmp_path):
    adapted(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        create_arrow_model(tiny_llama(), [str(tmp_path)] * 2, ArrowConfig(top_k=1))


# ---- conversions, initialisations, analyses


@pytest.mark.parametrize("name", GATED)
def test_conversion_to_lora_is_exact_at_full_rank(name):
    model = adapted(name)
    config, tensors = convert_to_lora(model, rank=4)
    converted = get_peft_model(tiny_llama(), config).eval()
    assert not set_peft_model_state_dict(converted, tensors).unexpected_keys
    assert (logits(converted) - logits(model)).norm() / logits(model).norm() < 1e-5  # float32, an SVD between


def test_conversion_to_lora_is_refused_where_there_is_none(unchanged):
    model = adapted("BOTTLENECK")
    with unchanged(model), pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4)


@pytest.mark.parametrize("name", GATED)
def test_initialisations_and_repairs_of_lora_are_refused(name, unchanged):
    model = adapted(name)
    with unchanged(model), pytest.raises(ValueError, match="can only be used with `init_lora_weights='eva'`"):
        initialize_lora_eva_weights(model, [{"input_ids": IDS}])
    with unchanged(model), pytest.raises(ValueError, match="is not using LoRA"):
        reduce_intruder_dimension(model, logging_sink=None)


@pytest.mark.parametrize("name", OURS)
def test_status_is_reported(name):
    model = adapted(name)
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.trainable_params == sum(p.numel() for p in own(model).values())
    assert len(model.get_layer_status()) == status.num_adapter_layers == 4


@pytest.mark.parametrize("name", OURS)
def test_injection_from_a_state_dict(name):
    model = adapted(name)
    tensors = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    injected = inject_adapter_in_model(METHODS[name].config(), tiny_llama(), state_dict=tensors)
    assert not set_peft_model_state_dict(injected, tensors).unexpected_keys
    assert torch.equal(logits(injected.eval()), logits(model))


# ---- scale, dtype, requires_grad


@pytest.mark.parametrize("name", GATED)
def test_scaling_is_lora_s(name):
    model = adapted(name)
    want, layers = logits(model), [m for m in model.modules() if isinstance(m, GatedLayer)]
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.mul_(0.5)
        halved = logits(model)
        for layer in layers:
            layer.lora_B["default"].weight.mul_(2.0)
    with rescale_adapter_scale(model, 0.5):
        assert torch.equal(logits(model), halved)
    assert torch.equal(logits(model), want)
    [layer.scale_layer(0.5) for layer in layers]
    assert torch.equal(logits(model), halved)
    [layer.unscale_layer(0.5) for layer in layers]
    assert torch.equal(logits(model), want)
    [layer.set_scale("default", 0.5) for layer in layers]
    assert torch.equal(logits(model), halved)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), halved, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_input_casting_can_be_switched_off(name):
    model = adapted(name)
    want = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), want)


@pytest.mark.parametrize("name", OURS)
def test_requires_grad_is_set_for_all_of_an_adapter(name):
    model = adapted(name)
    for flag in (False, True):
        model.set_requires_grad("default", flag)
        assert {p.requires_grad for p in own(model).values()} == {flag}
    model.set_adapter("default", inference_mode=True)
    assert {p.requires_grad for p in own(model).values()} == {False}


@pytest.mark.parametrize("name", GATED)
def test_peft_s_optimizers_hold_the_gates_once(name):
    model = adapted(name)
    gates = {id(p) for n, p in own(model).items() if ".gate." in n}
    plus = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0)
    riemannian = create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)
    for optimizer in (plus, riemannian):
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert gates <= set(held)
        assert len(held) == len(set(held))


@pytest.mark.parametrize("name", OURS)
def test_an_adapter_loaded_beside_another_is_whole(name, tmp_path):
    model = adapted(name)
    want = logits(model)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        again = change(PeftModel.from_pretrained(tiny_llama(), tmp_path), seed=5).eval()
        other = logits(again)
        again.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(again.eval()), other)
        again.set_adapter("second")
        assert torch.equal(logits(again.eval()), want)
