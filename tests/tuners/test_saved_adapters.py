"""An adapter that any version saved loads and computes what it did: the formula's values, in float64."""

import json

import pytest
import torch
from methods import METHODS
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from saved_adapters import FIXTURES, IDS, expected_logits, fixed_llama

import hf_fastpeft

# PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FOLDERS = sorted(FIXTURES.glob("*/*"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_saved_adapter_computes_what_it_did(folder):
    kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    expected = load_file(folder / "expected.safetensors")
    assert torch.equal(expected["input_ids"], IDS)
    model = hf_fastpeft.load_adapter(folder, fixed_llama())
    with torch.no_grad():
        got = model(expected["input_ids"]).logits
        plain = fixed_llama()(expected["input_ids"]).logits
    want = expected["logits"]
    assert (got - want).norm() / want.norm() < 2e-6  # float32 against float64
    assert (plain - want).norm() / want.norm() > 0.05  # the adapter does something
    tensors = load_file(folder / "adapter_model.safetensors")
    assert get_peft_model_state_dict(model).keys() == tensors.keys()
    recomputed = expected_logits(tensors, METHODS[kind], model.peft_config["default"])
    torch.testing.assert_close(want, recomputed, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_this_version_has_saved_one_of_each_method(name):
    folder = FIXTURES / hf_fastpeft.__version__ / name.lower()
    assert folder in FOLDERS, f"run `make fixtures` and commit {folder}"
