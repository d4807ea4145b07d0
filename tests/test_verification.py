"""verify: passes on our blocks, fails on planted mistakes, leaves the model as it was."""

import json
from importlib import import_module

import pytest
import torch
from adapters import adapted_llama, token_batch
from tiny import tiny_llama

from hf_fastpeft import patch_model, patched, verification, verify
from hf_fastpeft.blocks import projection
from hf_fastpeft.fast_module import FastModule
from hf_fastpeft.lowrank import TENSORS_PER_LINEAR

BATCH = token_batch()
pytestmark = [
    pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned"),
]


@pytest.mark.parametrize("method", ["lora", "sora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_passes_and_changes_nothing(method, dtype):
    model = adapted_llama(method, dtype)
    before = {n: p.clone() for n, p in model.named_parameters()}
    result = verify(model, BATCH)
    assert result.passed, str(result)
    assert result.fused_calls >= 6
    assert not any(isinstance(m, FastModule) for m in model.modules())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert "verify passed" in str(result)
    assert json.loads(json.dumps(result.to_json()))["passed"]


def test_a_patched_model_stays_patched():
    model = adapted_llama("lora")
    handle = patched(patch_model(model))
    assert verify(model, BATCH).passed
    assert handle.to_json()["blocks"]["mlp"]["calls_fused"] == 2
    assert any(isinstance(m, FastModule) for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mistake", ["scaling", "missing_gate_gradient"])
def test_finds_planted_mistakes(mistake, dtype, monkeypatch):
    model = adapted_llama("sora", dtype)
    if mistake == "scaling":
        stock = projection._add_product
        monkeypatch.setattr(projection, "_add_product", lambda out, a, b, scale=1.0: stock(out, a, b, 1.1 * scale))
    else:
        stock_grads = projection.add_weight_grads

        def forgetful(grads, *args):
            stock_grads(grads, *args)
            grads[4::TENSORS_PER_LINEAR] = [None] * len(grads[4::TENSORS_PER_LINEAR])

        monkeypatch.setattr(import_module("hf_fastpeft.blocks.mlp"), "add_weight_grads", forgetful)
    result = verify(model, BATCH)
    assert not result.passed
    assert "FAIL" in str(result)
    assert "verify FAILED" in str(result)


@pytest.mark.parametrize("planted", [False, True])
def test_float32_beyond_the_direct_bound_is_held_against_float64(planted, monkeypatch):
    """Two right float32 runs may differ by more than each is wrong; here by stock's log-softmax over large logits."""
    model = adapted_llama("lora", torch.float32)
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(300)
    if planted:
        stock = projection._add_product
        monkeypatch.setattr(projection, "_add_product", lambda out, a, b, scale=1.0: stock(out, a, b, 1.001 * scale))
    monkeypatch.setitem(verification.DIRECT_TOLERANCE, torch.float32, 1e-6)
    result = verify(model, BATCH)
    assert "both against float64" in result.reference
    assert result.passed != planted, str(result)


def test_what_is_no_batch_is_named():
    with pytest.raises(TypeError, match="batch is a Tensor; a mapping is needed, with input_ids and labels"):
        verify(adapted_llama("lora"), BATCH["input_ids"])


def test_nothing_fused_is_no_pass():
    model = adapted_llama("lora", torch.float64, config={"use_dora": True})
    result = verify(model, BATCH)
    assert not result.passed
    assert "mlp: gate_proj: LoRA variant DoraLinearVariant" in str(result)
    assert "nothing ran fused" in str(result)


def test_errors():
    frozen = tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        verify(frozen, BATCH)
    with pytest.raises(ValueError, match="stock's own loss is nan; the batch needs a label"):
        verify(tiny_llama(), {**BATCH, "labels": torch.full_like(BATCH["labels"], -100)})
    with pytest.raises(ValueError, match="the batch needs labels"):
        verify(tiny_llama(), {"input_ids": BATCH["input_ids"]})
