"""patch_model: parity with stock, fallback for what cannot be exact, and leaving no trace."""

import copy
import io

import pytest
import torch
from adapters import adapted_llama, step, token_batch, twin
from numerics import FLOAT64_REL, assert_no_worse, rel_err
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from hf_fastpeft import patch_model
from hf_fastpeft.errors import AlreadyPatchedError, NothingToPatchError, UnknownFamilyError
from hf_fastpeft.fast_module import FastModule

BATCH = token_batch()
LINEAR_BLOCKS = ("attention_in", "attention_out", "mlp")
pytestmark = [
    pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned"),
]


def assert_parity(stock, fast, batch=BATCH, tol=FLOAT64_REL):
    want_loss, want = step(stock, batch)
    got_loss, got = step(fast, batch)
    assert rel_err(got_loss, want_loss) < tol
    assert got.keys() == want.keys()
    for name in want:
        assert rel_err(got[name], want[name]) < tol, name


def calls(patched):
    blocks = patched.to_json()["blocks"]
    return {name: (row["calls_fused"], row["calls_stock"]) for name, row in blocks.items()}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("method", ["lora", "rslora", "sora"])
def test_loss_and_every_gradient_in_float64(method, biases):
    stock = adapted_llama(method, attention_bias=biases, mlp_bias=biases)
    fast = twin(stock)
    patched = patch_model(fast)
    assert_parity(stock, fast)
    for block in LINEAR_BLOCKS:
        assert calls(patched)[block] == (2, {})


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["o_proj", "gate_proj"], ["k_proj"]])
def test_partial_targets_stay_fused(targets):
    stock = adapted_llama("lora", config={"target_modules": targets})
    fast = twin(stock)
    patched = patch_model(fast)
    assert_parity(stock, fast)
    assert calls(patched)["attention_in"] == (2, {})


def test_different_ranks_a_module():
    stock = adapted_llama("lora", config={"rank_pattern": {"q_proj": 1, "up_proj": 9}, "alpha_pattern": {"v_proj": 3}})
    fast = twin(stock)
    patch_model(fast)
    assert_parity(stock, fast)


def test_full_fine_tuning_without_adapters():
    stock = tiny_llama(torch.float64, attention_bias=True, mlp_bias=True).train()
    fast = twin(stock)
    patched = patch_model(fast)
    assert_parity(stock, fast)
    assert calls(patched)["mlp"] == (2, {})


def test_trained_norms_in_float32():
    stock = adapted_llama("lora", torch.float32, config={"modules_to_save": ["input_layernorm", "norm"]})
    fast = twin(stock)
    patched = patch_model(fast)
    assert_parity(stock, fast, tol=2e-5)
    assert calls(patched)["rms_norm"] == (5, {})


def pooled(tensors):
    """The gradients of all gates as one entry."""
    gates = [t for name, t in tensors.items() if "gate.weight" in name]
    rest = {name: t for name, t in tensors.items() if "gate.weight" not in name}
    return {**rest, "gates": torch.cat(gates)} if gates else rest


@pytest.mark.parametrize("method", ["lora", "sora"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_float32", [False, True])
def test_low_precision_is_no_worse_than_stock(method, dtype, autocast, adapter_float32):
    """Errors over four batches together, and over all gates: a few numbers can be exact by luck."""
    stock = adapted_llama(method, dtype, adapter_float32)
    fast, exact = twin(stock), twin(stock).double()
    patched = patch_model(fast)
    runs = []
    for seed in range(4):
        batch = token_batch(seed=seed)
        want = step(exact, batch)[1] | {"logits": exact(**batch).logits}
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            base = step(stock, batch)[1] | {"logits": stock(**batch).logits}
            got = step(fast, batch)[1] | {"logits": fast(**batch).logits}
        runs.append([pooled(part) for part in (got, base, want)])
    got, base, want = runs[0]
    for name in want:
        assert got[name].dtype == base[name].dtype
        assert_no_worse(name, *(torch.stack([run[i][name] for run in runs]).detach() for i in range(3)))
    assert all(stock_calls == {} for _, stock_calls in calls(patched).values())


def test_patching_before_peft_equals_patching_after():
    torch.manual_seed(1)
    before = tiny_llama(torch.float64)
    patched = patch_model(before)
    before = get_peft_model(before, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    stock = get_peft_model(tiny_llama(torch.float64), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    stock.load_state_dict(before.state_dict())
    assert_parity(stock.train(), before.train())
    assert calls(patched)["mlp"] == (2, {})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_and_agrees(use_reentrant):
    stock = adapted_llama("lora")
    fast = twin(stock)
    patched = patch_model(fast)
    for model in (m.get_base_model() for m in (stock, fast)):
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_parity(stock, fast)
    assert calls(patched)["mlp"] == (4, {})  # two layers, forward and recompute


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropout_draws_the_masks_that_stock_draws(dtype, checkpointing):
    """The same elements are dropped, in the same order of the generator's stream, and nothing is kept of them."""
    stock = adapted_llama("lora", dtype, config={"lora_dropout": 0.3})
    fast = twin(stock)
    patched = patch_model(fast)
    runs = []
    for model in (stock, fast):
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        runs.append((*step(model, BATCH), torch.get_rng_state()))
    (loss, grads, state), (got_loss, got_grads, got_state) = runs
    tol = FLOAT64_REL if dtype == torch.float64 else 2e-5
    assert rel_err(got_loss, loss) < tol
    assert all(rel_err(got_grads[name], grads[name]) < tol for name in grads)
    assert torch.equal(state, got_state)
    for block in LINEAR_BLOCKS:
        assert calls(patched)[block] == (4 if checkpointing else 2, {})
    torch.manual_seed(8)
    assert rel_err(step(fast, BATCH)[0], loss) > 1e-4  # other masks, another loss


def test_bias_of_the_adapter():
    stock = adapted_llama("lora", config={"lora_bias": True}, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_()
    fast = twin(stock)
    patched = patch_model(fast)
    assert_parity(stock, fast)
    assert all(calls(patched)[block] == (2, {}) for block in LINEAR_BLOCKS)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["gate_proj", "down_proj"]},
        {"rank_pattern": {"k_proj": 1, "down_proj": 9}, "alpha_pattern": {"v_proj": 3, "up_proj": 11}},
        {"target_modules": ["o_proj"], "bias": "all"},
        {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj", "up_proj"]},
    ],
    ids=lambda config: "-".join(config),
)
def test_partial_and_mixed_targets_are_fused(config):
    stock = adapted_llama("lora", config=config, attention_bias="bias" in config)
    fast = twin(stock)
    patched = patch_model(fast)
    assert_parity(stock, fast)
    assert all(calls(patched)[block] == (2, {}) for block in LINEAR_BLOCKS)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_initialisations_that_change_the_base_weight(init):
    stock = adapted_llama("lora", torch.float32, config={"init_lora_weights": init})
    fast = twin(stock)
    patched = patch_model(fast)
    assert_parity(stock, fast, tol=2e-5)
    assert all(calls(patched)[block] == (2, {}) for block in LINEAR_BLOCKS)


def test_optimizer_steps_are_seen_without_a_version():
    """Fused optimizers write parameters without bumping ``tensor._version``."""
    stock = adapted_llama("sora")
    fast = twin(stock)
    patch_model(fast)
    for _ in range(3):
        assert_parity(stock, fast)
        for model in (stock, fast):
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.data.add_(p.grad.sign() if "gate" in name else p.grad, alpha=-0.1)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("only", [None, {"LlamaMLP"}, {"LlamaMLP", "LlamaAttention"}, {"LlamaModel"}], ids=str)
def test_recomputation_sees_the_present_adapters_whatever_is_patched(only, use_reentrant):
    stock = adapted_llama("lora")
    fast = twin(stock)
    patch_model(fast, only=only)
    for model in (stock, fast):
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for _ in range(3):
        assert_parity(stock, fast)
        for model in (stock, fast):
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.data.add_(p.grad, alpha=-0.3)


def test_layers_checkpointed_by_hand_see_the_present_adapters():
    from torch.utils.checkpoint import checkpoint

    stock = adapted_llama("lora")
    fast = twin(stock)
    patch_model(fast)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 32, generator=g, dtype=torch.float64)
    angles = torch.randn(1, 5, 8, generator=g, dtype=torch.float64)
    cos_sin = angles.cos(), angles.sin()
    for _ in range(3):
        found = []
        for model in (stock, fast):
            model(**BATCH)  # lays out what the layers must not see below
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.data.add_(0.01)  # a larger step saturates attention: q's gradient cancels to nothing
            model.zero_grad()
            h = x.clone().requires_grad_()
            for layer in model.get_base_model().model.layers:
                h = checkpoint(layer, h, position_embeddings=cos_sin, attention_mask=None, use_reentrant=False)
            h.square().sum().backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert all(rel_err(found[1][name], want) < FLOAT64_REL for name, want in found[0].items())


def test_training_goes_on_after_inference_mode_in_training_mode():
    stock = adapted_llama("lora")
    fast = twin(stock)
    patch_model(fast)
    for _ in range(2):
        with torch.inference_mode():
            fast(input_ids=BATCH["input_ids"])
        assert_parity(stock, fast)


def test_the_backbone_keeps_its_signature():
    import inspect

    model = tiny_llama()
    want = inspect.signature(model.model.forward)
    patched = patch_model(model)
    assert inspect.signature(model.model.forward) == want
    patched.restore()
    assert inspect.signature(model.model.forward) == want


def test_a_model_that_is_deleted_frees_its_memory_at_once():
    import gc
    import weakref

    model = adapted_llama("lora", torch.float32)
    patched = patch_model(model)
    step(model, BATCH)
    weight = weakref.ref(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight)
    gc.collect()
    gc.disable()
    try:
        del model, patched
        assert weight() is None
    finally:
        gc.enable()


def test_replicas_of_data_parallel_run_stock():
    model = adapted_llama("lora", torch.float32)
    patched = patch_model(model)
    for module in model.modules():
        module._is_replica = True
    model(**BATCH).loss.backward()
    assert set(calls(patched)["mlp"][1]) == {"a replica of DataParallel"}


def test_two_forwards_before_a_backward():
    stock = adapted_llama("lora")
    fast = twin(stock)
    patch_model(fast)
    grads = []
    for model in (stock, fast):
        model.zero_grad()
        first, second = model(**BATCH).loss, model(**token_batch(seed=1)).loss
        (first * second).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, want in grads[0].items():
        assert rel_err(grads[1][name], want) < FLOAT64_REL


def test_a_parameter_changed_before_the_backward_is_an_error_as_in_stock():
    for patch in (False, True):
        model = adapted_llama("lora")
        if patch:
            patch_model(model)
        loss = model(**BATCH).loss
        with torch.no_grad():
            model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_layer_called_on_its_own_sees_the_present_adapter():
    stock = adapted_llama("lora")
    fast = twin(stock)
    patch_model(fast)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 32, generator=g, dtype=torch.float64)
    angles = torch.randn(1, 5, 8, generator=g, dtype=torch.float64)
    for change in (0.0, 0.5):
        outs = []
        for model in (stock, fast):
            model(**BATCH)
            layer = model.base_model.model.model.layers[1]
            layer.mlp.up_proj.lora_B["default"].weight.data.add_(change)
            outs.append(layer(x, position_embeddings=(angles.cos(), angles.sin()), attention_mask=None))
        assert rel_err(outs[1].detach(), outs[0].detach()) < FLOAT64_REL


def test_accumulated_gradients():
    stock = adapted_llama("sora")
    fast = twin(stock)
    patch_model(fast)
    for model in (stock, fast):
        for seed in range(3):
            model(**token_batch(seed=seed)).loss.backward()
    want = dict(stock.named_parameters())
    for name, parameter in fast.named_parameters():
        if parameter.grad is not None:
            assert rel_err(parameter.grad, want[name].grad) < FLOAT64_REL


def test_retained_graph_gives_the_same_gradients_twice():
    model = adapted_llama("sora", torch.float32)
    patch_model(model)
    loss = model(**BATCH).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementations_and_their_outputs(attention):
    stock = adapted_llama("lora", attn_implementation=attention)
    fast = twin(stock)
    patch_model(fast)
    # eager attention gives NaN for a fully masked row, in stock too: no padding here
    batch = {k: v for k, v in BATCH.items() if k != "attention_mask"}
    assert_parity(stock, fast, batch)
    want, got = (m(**batch, output_hidden_states=True, output_attentions=attention == "eager") for m in (stock, fast))
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if attention == "eager":
        assert len(got.attentions) == 2


def test_packed_rows_with_position_ids():
    stock = adapted_llama("lora")
    fast = twin(stock)
    patch_model(fast)
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None]
    batch = {k: v[:1] for k, v in BATCH.items() if k != "attention_mask"} | {"position_ids": positions}
    assert_parity(stock, fast, batch)


@pytest.mark.parametrize(("batch", "seq_len"), [(1, 2), (5, 3), (2, 1)])
def test_small_shapes(batch, seq_len):
    stock = adapted_llama("lora")
    fast = twin(stock)
    patch_model(fast)
    ids = token_batch(batch, seq_len)["input_ids"]
    for model in (stock, fast):
        model.zero_grad()
        model(ids).logits.pow(2).sum().backward()
    want = dict(stock.named_parameters())
    for name, parameter in fast.named_parameters():
        if parameter.grad is not None:
            error = (parameter.grad - want[name].grad).norm()  # queries and keys of one position have no gradient
            assert error < FLOAT64_REL * max(1e-3, want[name].grad.norm().item()), name


def test_frozen_adapter_passes_the_gradient_through():
    stock = adapted_llama("sora")
    for parameter in stock.parameters():
        parameter.requires_grad_(False)
    fast = twin(stock)
    patch_model(fast)
    embedded = stock.get_input_embeddings()(BATCH["input_ids"])
    grads = []
    for model in (stock, fast):
        leaf = embedded.clone().requires_grad_()
        model(inputs_embeds=leaf, labels=BATCH["labels"]).loss.backward()
        grads.append(leaf.grad)
    assert rel_err(grads[1], grads[0]) < FLOAT64_REL


def test_nan_is_not_hidden():
    model = adapted_llama("lora", torch.float32)
    patch_model(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[BATCH["input_ids"][0, 5]] = float("nan")
    assert torch.isnan(model(**BATCH).loss)


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
    patched = patch_model(fast)
    torch.manual_seed(4)
    want = stock(**BATCH)
    torch.manual_seed(4)
    got = fast(**BATCH)
    assert torch.equal(got.logits, want.logits)
    for block in LINEAR_BLOCKS:
        fused, reasons = calls(patched)[block]
        assert fused == 0
        assert all(STATES[state] in reason for reason in reasons), reasons
    assert STATES[state] in patched.report()


@pytest.mark.parametrize(("config", "reason"), [({"use_dora": True}, "LoRA variant DoraLinearVariant")])
def test_lora_options_without_a_fused_form_run_stock(config, reason):
    stock = adapted_llama("lora", config=config, attention_bias=True, mlp_bias=True)
    fast = twin(stock)
    patched = patch_model(fast)
    assert torch.equal(fast(**BATCH).logits, stock(**BATCH).logits)
    for block in LINEAR_BLOCKS:
        ((why, n),) = calls(patched)[block][1].items()
        assert reason in why
        assert n == 2


def test_states_are_followed_within_a_run():
    """Disable, merge, unmerge and enable between steps: each forward does what stock does in that state."""
    stock = adapted_llama("lora")
    fast = twin(stock)
    patched = patch_model(fast)
    for change in ("disable_adapter_layers", "enable_adapter_layers", "merge_adapter", "unmerge_adapter"):
        for model in (stock, fast):
            getattr(model, change, None) or getattr(model.base_model, change)
            getattr(model.base_model, change)()
        torch.testing.assert_close(fast(**BATCH).logits, stock(**BATCH).logits, rtol=1e-9, atol=1e-9)
    fused, reasons = calls(patched)["mlp"]
    assert fused == 6  # two layers: disabled (the base layers alone), enabled, unmerged
    assert reasons == {"gate_proj: adapter merged": 2}


def test_unknown_activation_runs_stock():
    model = adapted_llama("lora", hidden_act="relu")
    patched = patch_model(model)
    assert patched.to_json()["blocks"]["mlp"]["stock"] == {"activation ReLU": 2}


def test_restore_is_bitwise_and_leaves_no_trace():
    model = adapted_llama("lora", torch.float32)
    classes = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    want = step(model, BATCH)
    patched = patch_model(model)
    assert any(isinstance(m, FastModule) for m in model.modules())
    step(model, BATCH)
    patched.restore()
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    got = step(model, BATCH)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][n], want[1][n]) for n in want[1])
    patched.restore()  # twice changes nothing


def test_context_manager_restores():
    model = tiny_llama()
    with patch_model(model) as patched:
        assert any(isinstance(m, FastModule) for m in patched.model.modules())
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
        second = model(ids[:, 9:], past_key_values=first.past_key_values)
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
    patched = patch_model(model)
    for layer in model.model.layers:
        add_hook_to_module(layer.self_attn, ModelHook())
    got = step(model, BATCH)
    assert rel_err(got[0], want[0]) < FLOAT64_REL
    assert calls(patched)["mlp"] == (2, {})
    assert calls(patched)["attention_in"] == (2, {})
    for layer in model.model.layers:
        remove_hook_from_module(layer.mlp)
        remove_hook_from_module(layer.self_attn)
    patched.restore()
    assert not any("forward" in vars(m) and isinstance(m, FastModule) for m in model.modules())
    assert torch.equal(step(model, BATCH)[0], want[0])


def test_a_foreign_forward_on_a_block_is_left_alone():
    model = tiny_llama(torch.float64)
    block = model.model.layers[0].mlp
    block.forward = lambda x: 0 * x
    patched = patch_model(model)
    assert type(block).__qualname__ == "LlamaMLP"
    assert "foreign forward" in patched.skipped["model.layers.0.mlp"]
    assert "model.layers.0.mlp" in patched.report()


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
    patched = patch_model(model, only={"LlamaRMSNorm"})
    assert set(patched.to_json()["blocks"]) == {"rms_norm"}
    assert set(patch_model(tiny_llama(), only="LlamaMLP").to_json()["blocks"]) == {"mlp"}
    with pytest.raises(
        NothingToPatchError, match=r"only=\['Norm'\]; possible: \['LlamaAttention', 'LlamaDecoderLayer'"
    ):
        patch_model(tiny_llama(), only={"Norm"})


def test_report_json_is_json():
    import json

    model = adapted_llama("lora")
    patched = patch_model(model)
    step(model, BATCH)
    data = json.loads(json.dumps(patched.to_json()))
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
    patched = patch_model(model)
    parameters = {n: p.detach() for n, p in model.named_parameters() if "lora_B" in n}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (), BATCH).loss

    got = torch.func.grad(loss)(parameters)
    patched.restore()
    want = torch.func.grad(loss)(parameters)
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_restore_refuses_a_class_that_others_derived():
    model = tiny_llama()
    patched = patch_model(model)
    norm = model.model.layers[0].input_layernorm
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", torch.nn.Identity())
    with pytest.raises(RuntimeError, match=r"layers\.0\.input_layernorm is now a ParametrizedLlamaRMSNorm"):
        patched.restore()
    assert isinstance(model.model.norm, FastModule)  # nothing was changed
    torch.nn.utils.parametrize.remove_parametrizations(norm, "weight")
    patched.restore()
    assert not any(isinstance(m, FastModule) for m in model.modules())


def test_the_report_survives_restore():
    model = adapted_llama("lora")
    with patch_model(model) as patched:
        step(model, BATCH)
    assert patched.to_json()["blocks"]["mlp"]["calls_fused"] == 2
    assert "restored; as it was before" in patched.report()
