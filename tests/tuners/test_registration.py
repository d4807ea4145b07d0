"""How our methods enter PEFT's registries, and what PEFT and transformers then do with them."""

import enum

import pytest
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import lora
from tiny import tiny_llama

from hf_fastpeft import tuners
from hf_fastpeft.tuners import _peft
from hf_fastpeft.tuners.sora import SoraConfig, SoraModel

# PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_registering_again_changes_nothing():
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_PREFIX_MAPPING)
    tuners.register()
    assert (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_PREFIX_MAPPING)) == before


@pytest.mark.parametrize("name", tuners.methods())
def test_a_method_is_a_full_member_of_the_enum(name):
    config_cls, model_cls = tuners.methods()[name]
    member = PeftType(name)
    assert member is PeftType[name] is getattr(PeftType, name)
    assert member.value == member.name == name == member
    assert name in list(PeftType)
    assert member in set(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[name] is config_cls
    assert PEFT_TYPE_TO_TUNER_MAPPING[name] is model_cls
    assert PEFT_TYPE_TO_PREFIX_MAPPING[name] == model_cls.prefix


def test_a_name_of_another_package_is_not_overwritten():
    with pytest.raises(RuntimeError, match=r"register 'LORA' with PEFT: the name is taken by peft.tuners.lora.config"):
        _peft.register_method(PeftType.LORA, SoraConfig, SoraModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LORA"] is LoraConfig


def test_a_member_is_added_once():
    class Colour(enum.StrEnum):
        RED = "RED"

    added = _peft.add_peft_type("BLUE", Colour)
    assert _peft.add_peft_type("BLUE", Colour) is added
    assert list(Colour) == ["RED", "BLUE"]
    assert Colour("BLUE") is Colour.BLUE is added
    assert repr(added) == "<Colour.BLUE: 'BLUE'>"
    assert _peft.add_peft_type("RED", Colour) is Colour.RED


def test_without_the_private_fields_a_named_string_stands_in():
    class Opaque:
        pass

    kind = _peft.add_peft_type("OPAQUE", Opaque)
    assert (kind, kind.value, kind.name, kind.value.lower()) == ("OPAQUE", "OPAQUE", "OPAQUE", "opaque")
    try:
        _peft.register_method(kind, SoraConfig, SoraModel)
        _peft.register_method(kind, SoraConfig, SoraModel)
        assert PEFT_TYPE_TO_CONFIG_MAPPING["OPAQUE"] is SoraConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING["OPAQUE"] is SoraModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING["OPAQUE"] == "lora_"
    finally:
        for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
            mapping.pop("OPAQUE", None)


def test_stock_lora_stays_stock():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer) is lora.Linear
    assert type(layer.lora_A["default"]).__name__ == "Linear"


def test_mixed_models_are_refused():
    with pytest.raises(ValueError, match="'SORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_llama(), SoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
