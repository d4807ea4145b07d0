"""load_adapter: an adapter folder onto its base model, and errors that say what is missing."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama

import hf_fastpeft
from hf_fastpeft.errors import AdapterError
from hf_fastpeft.tuners.sora import SoraConfig

# PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(3, 128, (1, 7), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def saved(tmp_path, cls=SoraConfig, task_type="CAUSAL_LM"):
    """An adapter folder whose config names a base model on disk."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, cls(r=2, target_modules=["q_proj"], task_type=task_type)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


@pytest.mark.parametrize("cls", [SoraConfig, LoraConfig])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_loads_the_base_that_the_config_names(tmp_path, cls, task_type):
    folder, want = saved(tmp_path, cls, task_type)
    model = hf_fastpeft.load_adapter(folder)
    assert isinstance(model, PeftModel)
    assert not model.training
    assert torch.equal(logits(model), want)


def test_arguments_reach_the_base_and_peft(tmp_path):
    folder, want = saved(tmp_path)
    model = hf_fastpeft.load_adapter(str(folder), base_kwargs={"dtype": torch.bfloat16}, is_trainable=True)
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert any(p.requires_grad for p in model.parameters())
    onto = hf_fastpeft.load_adapter(folder, tiny_llama(), adapter_name="mine")
    assert onto.active_adapter == "mine"
    assert torch.equal(logits(onto), want)


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(AdapterError, match=r"nowhere': no such folder. A local folder is needed"):
        hf_fastpeft.load_adapter(tmp_path / "nowhere")


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(AdapterError, match=r"no adapter_config.json; found: an empty folder"):
        hf_fastpeft.load_adapter(tmp_path)


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config.json is not JSON"):
        hf_fastpeft.load_adapter(tmp_path)


@pytest.mark.parametrize("content", ['{"peft_type": "NOPE"}', "{}", "[]"])
def test_an_unknown_method_is_named_with_the_known_ones(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match=r"peft_type=.*; known: .*LORA.*SORA"):
        hf_fastpeft.load_adapter(tmp_path)


def test_a_folder_without_weights_is_told_what_was_looked_for(tmp_path):
    folder, _ = saved(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        AdapterError,
        match=r"looked for adapter_model.safetensors, adapter_model.bin; found: README.md, adapter_co",
    ):
        hf_fastpeft.load_adapter(folder)


def test_a_missing_base_model_is_named(tmp_path):
    folder, _ = saved(tmp_path)
    edit(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(AdapterError, match=r"gone' cannot be loaded \(.*\); pass model="):
        hf_fastpeft.load_adapter(folder)
    edit(folder, base_model_name_or_path=None)
    with pytest.raises(AdapterError, match=r"names no base model \(base_model_name_or_path=None\); pass model="):
        hf_fastpeft.load_adapter(folder)


def test_only_classes_of_transformers_are_imported(tmp_path):
    folder, _ = saved(tmp_path, task_type=None)
    edit(folder, auto_mapping={"base_model_class": "system", "parent_library": "os"})
    with pytest.raises(AdapterError, match=r"cannot tell the class of its base model \(task_type=None.*Pass model="):
        hf_fastpeft.load_adapter(folder)


def test_base_kwargs_beside_a_model_are_refused(tmp_path):
    folder, _ = saved(tmp_path)
    with pytest.raises(AdapterError, match="got both model and base_kwargs"):
        hf_fastpeft.load_adapter(folder, tiny_llama(), base_kwargs={"dtype": torch.bfloat16})
