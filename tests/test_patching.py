"""patch_model: parity with stock, fallback for what cannot be exact, and leaving no trace."""

import copy
import io

import pytest
import torch
from adapters import adapted_llama, assert_parity, calls, step, token_batch, twin
from numerics import FLOAT64_REL, rel_err
from peft import LoraConfig, get_peft_model
from tiny import CACHE, tiny_llama

from hf_fastpeft import patch_model, patched
from hf_fastpeft.errors import AlreadyPatchedError, NothingToPatchError, UnknownFamilyError
from hf_fastpeft.fast_module import FastModule

BATCH = token_batch()
LINEAR_BLOCKS = ("attention_in", "attention_out", "mlp")
pytestmark = [
    pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned"),
]


def odd_dropout(model):
    for module in model.modules():
        if "default" in getattr(module, "lora_dropout", {}):
            module.lora_dropout["default"] = torch.nn.AlphaDropout(0.3)


def merged(model):
    model.merge_adapter()


def two_adapters(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def hooked(model):
    for name, module in model.named_modules():
        if name.endswith(("q_proj.lora_A.default", "o_proj.base_layer", "up_proj")):
            module.register_forward_hook(lambda module, args, out: out * 1.5)


def foreign_forward(model):
    for name, module in model.named_modules():
        if name.endswith(("v_proj", "o_proj", "down_proj")):
            stock = module.forward
            module.forward = lambda x, stock=stock: 2 * stock(x)


STATES = {
    odd_dropout: "lora_dropout is AlphaDropout",
    merged: "adapter merged",
    two_adapters: "2 active adapters",
    hooked: "hooks on Linear",
    foreign_forward: "Linear has a forward of its own",
}


@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:.*multiple adapters.*|Already found a `peft_config`")
def test_what_cannot_be_exact_runs_stock_bit_for_bit(state):
    stock = adapted_llama("lora", torch.float64)
    fast = twin(stock)
    for model in (stock, fast):
        torch.manual_seed(3)
        state(model)
    handle = patched(patch_model(fast))
    torch.manual_seed(4)
    want = stock(**BATCH)
    torch.manual_seed(4)
    got = fast(**BATCH)
    assert torch.equal(got.logits, want.logits)
    for block in LINEAR_BLOCKS:
        fused, reasons = calls(handle)[block]
        assert fused == 0
        assert all(STATES[state] in reason for reason in reasons), reasons
    assert STATES[state] in handle.report()


@pytest.mark.parametrize(("config", "reason"), [({"use_dora": True}, "LoRA variant DoraLinearVariant")])
def test_lora_options_without_a_fused_form_run_stock(config, reason):
    stock = adapted_llama("lora", config=config, attention_bias=True, mlp_bias=True)
    fast = twin(stock)
    handle = patched(patch_model(fast))
    assert torch.equal(fast(**BATCH).logits, stock(**BATCH).logits)
    for block in LINEAR_BLOCKS:
        ((why, n),) = calls(handle)[block][1].items()
        assert reason in why
        assert n == 2


def test_states_are_followed_within_a_run():
    """Disable, merge, unmerge and enable between steps: each forward does what stock does in that state."""
    stock = adapted_llama("lora")
    fast = twin(stock)
    handle = patched(patch_model(fast))
    for change in ("disable_adapter_layers", "enable_adapter_layers", "merge_adapter", "unmerge_adapter"):
        for model in (stock, fast):
            getattr(model, change, None) or getattr(model.base_model, change)
            getattr(model.base_model, change)()
        torch.testing.assert_close(fast(**BATCH).logits, stock(**BATCH).logits, rtol=1e-9, atol=1e-9)
    fused, reasons = calls(handle)["mlp"]
    assert fused == 6  # two layers: disabled (the base layers alone), enabled, unmerged
    assert reasons == {"gate_proj: adapter merged": 2}


def test_unknown_activation_runs_stock():
    model = adapted_llama("lora", hidden_act="relu")
    handle = patched(patch_model(model))
    assert handle.to_json()["blocks"]["mlp"]["stock"] == {"activation ReLU": 2}


def test_restore_is_bitwise_and_leaves_no_trace():
    model = adapted_llama("lora", torch.float32)
    classes = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    want = step(model, BATCH)
    handle = patched(patch_model(model))
    assert any(isinstance(m, FastModule) for m in model.modules())
    step(model, BATCH)
    handle.restore()
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    got = step(model, BATCH)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][n], want[1][n]) for n in want[1])
    handle.restore()  # twice changes nothing


def test_context_manager_restores():
    model = tiny_llama()
    with patched(patch_model(model)) as handle:
        assert any(isinstance(m, FastModule) for m in handle.model.modules())
    assert not any(isinstance(m, FastModule) for m in model.modules())


def test_a_second_model_stays_stock_bit_for_bit():
    first, second = adapted_llama("lora", torch.float32), adapted_llama("lora", torch.float32)
    want = step(second, BATCH)
    patch_model(first)
    step(first, BATCH)
    got = step(second, BATCH)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][n], want[1][n]) for n in want[1])


def test_state_dict_keys_never_change(tmp_path):
    model = adapted_llama("lora", torch.float32)
    keys = list(model.state_dict())
    patch_model(model)
    step(model, BATCH)
    assert list(model.state_dict()) == keys


def test_copies_and_pickles_work_on_their_own():
    model = adapted_llama("lora", torch.float64)
    patch_model(model)
    want = step(model, BATCH)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(step(other, BATCH)[0], want[0])
        with torch.no_grad():
            next(p for n, p in other.named_parameters() if "lora_B" in n).zero_()
    assert torch.equal(step(model, BATCH)[0], want[0])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_stocks(cache):
    stock = adapted_llama("lora", torch.float32).eval()
    fast = twin(stock)
    patch_model(fast)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    prompt = {k: BATCH[k][2:] for k in ("input_ids", "attention_mask")}
    assert torch.equal(fast.generate(**prompt, **options), stock.generate(**prompt, **options))


def test_a_cache_filled_while_training_is_right():
    stock = adapted_llama("lora", torch.float64)
    fast = twin(stock)
    patch_model(fast)
    ids = BATCH["input_ids"][2:]
    for model in (stock, fast):
        first = model(ids[:, :9], use_cache=True)
        second = model(ids[:, 9:], **{CACHE: first[CACHE]})
        model.result = second.logits.detach()
    torch.testing.assert_close(fast.result, stock.result, rtol=1e-9, atol=1e-9)


def test_saved_tensors_of_a_layer():
    """The save lists of the three blocks of a layer: each hidden state once, no norm's output, no SwiGLU product."""
    model = adapted_llama("lora", torch.float32, num_hidden_layers=1)
    patch_model(model)
    B, S = BATCH["input_ids"].shape
    T, hidden, intermediate, qkv, rank = B * S, 32, 64, 32 + 2 * 16, 4
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in held:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    layer = model.base_model.model.model.layers[0]
    x = torch.randn(B, S, hidden, requires_grad=True)
    angles = torch.randn(1, S, 8)
    cos_sin = angles.cos(), angles.sin()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        q, _, _, around = layer.self_attn._project_in(x, *cos_sin, layer.input_layernorm)
        assert around.grad_fn is q.grad_fn
        found = {"attention_in": sum(kept.values())}
        kept.clear()
        layer.self_attn._project_out(torch.randn(B, S, hidden, requires_grad=True), x)
        found["attention_out"] = sum(kept.values())
        kept.clear()
        layer.mlp.run(x, layer.post_attention_layernorm, residual=True)
        found["mlp"] = sum(kept.values())
        kept.clear()
        layer(x, position_embeddings=cos_sin, attention_mask=None)
        found["layer"] = sum(kept.values())
    norm = hidden + 1  # its input and rstd
    assert found == {
        "attention_in": 4 * (T * (norm + 3 * rank) + 2 * S * 8),  # with cos and sin
        "attention_out": 4 * T * (hidden + rank),
        "mlp": 4 * T * (norm + 2 * intermediate + 3 * rank),
        # with q, k, v and the log-sum-exp of each head that the attention call keeps
        "layer": 4 * (T * (2 * norm + hidden + qkv + 2 * intermediate + 7 * rank + 4) + 2 * S * 8),
    }


def test_accelerate_hooks_before_and_after():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = tiny_llama(torch.float64).train()
    want = step(model, BATCH)
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp, ModelHook())
    handle = patched(patch_model(model))
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, ModelHook())
    got = step(model, BATCH)
    assert rel_err(got[0], want[0]) < FLOAT64_REL
    assert calls(handle)["mlp"] == (2, {})
    assert calls(handle)["attention_in"] == (2, {})
    for layer in model.model.layers:
        remove_hook_from_module(layer.mlp)
        remove_hook_from_module(layer.self_attn)
    handle.restore()
    assert not any("forward" in vars(m) and isinstance(m, FastModule) for m in model.modules())
    assert torch.equal(step(model, BATCH)[0], want[0])


def test_a_foreign_forward_on_a_block_is_left_alone():
    model = tiny_llama(torch.float64)
    block = model.model.layers[0].mlp
    block.forward = lambda x: 0 * x
    handle = patched(patch_model(model))
    assert type(block).__qualname__ == "LlamaMLP"
    assert "foreign forward" in handle.to_json()["skipped"]["model.layers.0.mlp"]
    assert "model.layers.0.mlp" in handle.report()


def test_names_stay_for_policies_that_choose_by_name():
    model = tiny_llama()
    patch_model(model)
    layer = model.model.layers[0]
    assert type(layer.mlp).__name__ == "LlamaMLP"
    assert type(layer.mlp).__module__ == "transformers.models.llama.modeling_llama"
    assert type(layer.mlp).__qualname__ == "LlamaMLP"  # transformers keys what it can capture by the whole name
    assert str(type(model.model)) == "<class 'transformers.models.llama.modeling_llama.LlamaModel'>"


def test_an_adapter_saved_from_a_patched_model_is_stocks(tmp_path):
    """PEFT writes the base class and its module into adapter_config.json."""
    for name in ("stock", "fast"):
        model = tiny_llama()
        if name == "fast":
            patch_model(model)
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / name)
    read = [(tmp_path / name / "adapter_config.json").read_text() for name in ("stock", "fast")]
    assert read[0] == read[1]


def test_only_some_classes():
    model = tiny_llama()
    handle = patched(patch_model(model, only={"LlamaRMSNorm"}))
    assert set(handle.to_json()["blocks"]) == {"rms_norm"}
    assert set(patched(patch_model(tiny_llama(), only="LlamaMLP")).to_json()["blocks"]) == {"mlp"}
    with pytest.raises(
        NothingToPatchError, match=r"only=\['Norm'\]; possible: \['LlamaAttention', 'LlamaDecoderLayer'"
    ):
        patch_model(tiny_llama(), only={"Norm"})


def test_report_json_is_json():
    import json

    model = adapted_llama("lora")
    handle = patched(patch_model(model))
    step(model, BATCH)
    data = json.loads(json.dumps(handle.to_json()))
    assert data["blocks"]["mlp"] == {
        "modules": 2, "fused": 2, "stock": {}, "calls_fused": 2, "calls_stock": {},
    }  # fmt: skip
    assert data["model_type"] == "llama"


def test_impl_triton_runs_the_kernels():
    stock = adapted_llama("lora", torch.float32, num_hidden_layers=1)
    fast = twin(stock)
    patch_model(fast, impl="triton")
    ids = token_batch(1, 4)["input_ids"]
    assert_parity(stock, fast, {"input_ids": ids, "labels": ids}, tol=1e-5)


def test_errors():
    class Other(torch.nn.Module):
        config = type("Config", (), {"model_type": "foo"})()

    with pytest.raises(UnknownFamilyError, match=r"model_type='foo' \(Other\); known: .*llama, mistral"):
        patch_model(Other())
    with pytest.raises(UnknownFamilyError, match="model_type=None"):
        patch_model(torch.nn.Linear(2, 2))
    with pytest.raises(
        NothingToPatchError, match="with linears to fuse; found: LlamaForCausalLM, LlamaModel, LlamaRMSNorm"
    ):
        patch_model(tiny_llama(num_hidden_layers=0))
    with pytest.raises(ValueError, match="impl='cuda'; possible: 'auto', 'triton', 'torch'"):
        patch_model(tiny_llama(), impl="cuda")
    with pytest.raises(RuntimeError, match="impl='triton' needs"):
        patch_model(tiny_llama(torch.float64), impl="triton")
    model = tiny_llama()
    patch_model(model)
    with pytest.raises(AlreadyPatchedError, match="13 modules of this model are patched already"):
        patch_model(model)
    with pytest.raises(
        NothingToPatchError, match=r"already wrapped \(OptimizedModule\); patch it before torch.compile"
    ):
        patch_model(torch.compile(tiny_llama()))
    with pytest.raises(NothingToPatchError, match=r"already wrapped \(DataParallel\)"):
        patch_model(torch.nn.DataParallel(tiny_llama()))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_patched_model_agrees_and_compiles_once(fullgraph):
    stock = adapted_llama("lora", torch.float32).get_base_model()
    fast = twin(stock)
    patch_model(fast)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(fast, backend=counter, fullgraph=fullgraph)
    for _ in range(4):
        out = compiled(**BATCH)
        out.loss.backward()
    torch.testing.assert_close(out.logits, stock(**BATCH).logits, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_disabled_adapters_give_the_same_numbers_as_an_untrained_adapter():
    """DPO's reference pass against its policy at step 0: both fused, so they differ by exactly zero."""
    model = adapted_llama("lora", torch.bfloat16)
    patch_model(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    policy = model(**BATCH).logits
    with torch.no_grad(), model.disable_adapter():
        reference = model(**BATCH).logits
    assert torch.equal(policy, reference)


def test_functional_transforms_run_stock():
    model = adapted_llama("lora")
    handle = patched(patch_model(model))
    parameters = {n: p.detach() for n, p in model.named_parameters() if "lora_B" in n}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (), BATCH).loss

    got = torch.func.grad(loss)(parameters)
    handle.restore()
    want = torch.func.grad(loss)(parameters)
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_restore_refuses_a_class_that_others_derived():
    model = tiny_llama()
    handle = patched(patch_model(model))
    norm = model.model.layers[0].input_layernorm
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", torch.nn.Identity())
    with pytest.raises(RuntimeError, match=r"layers\.0\.input_layernorm is now a ParametrizedLlamaRMSNorm"):
        handle.restore()
    assert isinstance(model.model.norm, FastModule)  # nothing was changed
    torch.nn.utils.parametrize.remove_parametrizations(norm, "weight")
    handle.restore()
    assert not any(isinstance(m, FastModule) for m in model.modules())


def test_the_report_survives_restore():
    model = adapted_llama("lora")
    with patched(patch_model(model)) as handle:
        step(model, BATCH)
    assert handle.to_json()["blocks"]["mlp"]["calls_fused"] == 2
    assert "restored; as it was before" in handle.report()
