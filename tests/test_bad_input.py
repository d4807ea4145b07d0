"""What a fused block must not take, or take with care: the layer runs stock, with the reason, and is never wrong."""

import pytest
import torch
from adapters import adapted_llama, token_batch, twin
from numerics import FLOAT64_REL, rel_err
from tiny import tiny_llama

from hf_fastpeft import patch_model, patched

BATCH = token_batch()


def layer_inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 2, 32, generator=g, dtype=dtype).transpose(0, 1)  # (batch, seq_len, hidden), not contiguous
    angles = torch.randn(1, 7, 8, generator=g, dtype=dtype)
    return x, (angles.cos(), angles.sin())


@pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned")
def test_inputs_that_are_not_contiguous():
    stock = adapted_llama("sora")
    fast = twin(stock)
    handle = patched(patch_model(fast))
    runs = []
    for model in (stock, fast):
        x, cos_sin = layer_inputs()
        x.requires_grad_()
        out = model.get_base_model().model.layers[0](x, position_embeddings=cos_sin, attention_mask=None)
        runs.append((out.detach(), *torch.autograd.grad(out.transpose(0, 1).square().sum(), x)))
    assert all(rel_err(a, b) < FLOAT64_REL for a, b in zip(runs[1], runs[0], strict=True))
    assert handle.to_json()["blocks"]["mlp"]["calls_fused"] == 1


def test_one_linear_of_another_dtype_runs_its_block_stock():
    model = adapted_llama("lora", torch.bfloat16, adapter_float32=True)
    handle = patched(patch_model(model))
    model.get_base_model().model.layers[0].mlp.up_proj.base_layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # casts both
        model(**BATCH).loss.backward()
    assert handle.to_json()["blocks"]["mlp"]["calls_fused"] == 2
    with pytest.raises(RuntimeError, match="same dtype"):  # what stock says
        model(**BATCH)
    reasons = handle.to_json()["blocks"]["mlp"]["calls_stock"]
    assert list(reasons) == ["mixed dtypes: input torch.bfloat16, weights torch.bfloat16"]


def test_a_model_on_meta_can_be_patched_and_runs_stock():
    with torch.device("meta"):
        model = tiny_llama()
    handle = patched(patch_model(model.train()))
    assert model(input_ids=BATCH["input_ids"].to("meta")).logits.is_meta
    for name, row in handle.to_json()["blocks"].items():
        if name in ("attention_in", "attention_out", "mlp", "rms_norm"):
            assert row["fused"] == 0
            assert all("meta" in reason for reason in row["stock"])


def test_weights_loaded_after_patching_are_seen():
    """``to_empty`` and ``load_state_dict(assign=True)`` replace what the weights were stacked in."""
    want = tiny_llama(torch.float64)
    with torch.device("meta"):
        model = tiny_llama(torch.float64)
    patch_model(model)
    model.to_empty(device="cpu")
    model.load_state_dict(want.state_dict(), assign=True)
    model.model.rotary_emb = want.model.rotary_emb
    loss = model.train()(**BATCH).loss
    assert rel_err(loss.detach(), want.train()(**BATCH).loss.detach()) < FLOAT64_REL


@pytest.mark.parametrize("where", ["input", "weight", "adapter"])
def test_nan_is_never_hidden(where):
    model = adapted_llama("lora", torch.float32)
    patch_model(model)
    layer = model.get_base_model().model.layers[0]
    x, cos_sin = layer_inputs(torch.float32)
    x = x.contiguous()
    if where == "input":
        x[1, 3, 5] = float("nan")
    elif where == "weight":
        layer.mlp.up_proj.base_layer.weight.data[3, 3] = float("nan")
    else:
        layer.self_attn.v_proj.lora_A["default"].weight.data[1, 1] = float("nan")
    out = layer(x, position_embeddings=cos_sin, attention_mask=None)
    assert torch.isnan(out[1, 3:]).all() if where == "input" else torch.isnan(out).all()
    if where == "input":
        assert torch.isfinite(out[0]).all()


def test_a_dispatched_models_hooks_keep_working():
    """accelerate puts hooks on every module it moves inputs for: blocks with hooked linears run stock, rightly."""
    from accelerate import dispatch_model

    stock = adapted_llama("lora")
    fast = twin(stock)
    handle = patched(patch_model(fast))
    fast = dispatch_model(fast, device_map={"": "cpu"}, force_hooks=True)
    assert rel_err(fast(**BATCH).loss.detach(), stock(**BATCH).loss.detach()) < FLOAT64_REL
    assert handle.report()
