"""Patched against stock: loss and every gradient, in every state that the blocks can express."""

import pytest
import torch
from adapters import adapted_llama, assert_parity, calls, step, token_batch, twin
from numerics import FLOAT64_REL, assert_no_worse, rel_err
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from hf_fastpeft import patch_model, patched

BATCH = token_batch()
LINEAR_BLOCKS = ("attention_in", "attention_out", "mlp")
pytestmark = [
    pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned"),
]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("method", ["lora", "rslora", "sora"])
def test_loss_and_every_gradient_in_float64(method, biases):
    stock = adapted_llama(method, attention_bias=biases, mlp_bias=biases)
    fast = twin(stock)
    handle = patched(patch_model(fast))
    assert_parity(stock, fast)
    for block in LINEAR_BLOCKS:
        assert calls(handle)[block] == (2, {})


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["o_proj", "gate_proj"], ["k_proj"]])
def test_partial_targets_stay_fused(targets):
    stock = adapted_llama("lora", config={"target_modules": targets})
    fast = twin(stock)
    handle = patched(patch_model(fast))
    assert_parity(stock, fast)
    assert calls(handle)["attention_in"] == (2, {})


def test_different_ranks_a_module():
    stock = adapted_llama("lora", config={"rank_pattern": {"q_proj": 1, "up_proj": 9}, "alpha_pattern": {"v_proj": 3}})
    fast = twin(stock)
    patch_model(fast)
    assert_parity(stock, fast)


def test_full_fine_tuning_without_adapters():
    stock = tiny_llama(torch.float64, attention_bias=True, mlp_bias=True).train()
    fast = twin(stock)
    handle = patched(patch_model(fast))
    assert_parity(stock, fast)
    assert calls(handle)["mlp"] == (2, {})


def test_trained_norms_in_float32():
    stock = adapted_llama("lora", torch.float32, config={"modules_to_save": ["input_layernorm", "norm"]})
    fast = twin(stock)
    handle = patched(patch_model(fast))
    assert_parity(stock, fast, tol=2e-5)
    assert calls(handle)["rms_norm"] == (5, {})


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
    handle = patched(patch_model(fast))
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
    assert all(stock_calls == {} for _, stock_calls in calls(handle).values())


def test_patching_before_peft_equals_patching_after():
    torch.manual_seed(1)
    before = tiny_llama(torch.float64)
    handle = patched(patch_model(before))
    before = get_peft_model(before, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    stock = get_peft_model(tiny_llama(torch.float64), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    stock.load_state_dict(before.state_dict())
    assert_parity(stock.train(), before.train())
    assert calls(handle)["mlp"] == (2, {})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_and_agrees(use_reentrant):
    stock = adapted_llama("lora")
    fast = twin(stock)
    handle = patched(patch_model(fast))
    for model in (m.get_base_model() for m in (stock, fast)):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_parity(stock, fast)
    assert calls(handle)["mlp"] == (4, {})  # two layers, forward and recompute


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropout_draws_the_masks_that_stock_draws(dtype, checkpointing):
    """The same elements are dropped, in the same order of the generator's stream, and nothing is kept of them."""
    stock = adapted_llama("lora", dtype, config={"lora_dropout": 0.3})
    fast = twin(stock)
    handle = patched(patch_model(fast))
    runs = []
    for model in (stock, fast):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        runs.append((*step(model, BATCH), torch.get_rng_state()))
    (loss, grads, state), (got_loss, got_grads, got_state) = runs
    tol = FLOAT64_REL if dtype == torch.float64 else 2e-5
    assert rel_err(got_loss, loss) < tol
    assert all(rel_err(got_grads[name], grads[name]) < tol for name in grads)
    assert torch.equal(state, got_state)
    for block in LINEAR_BLOCKS:
        assert calls(handle)[block] == (4 if checkpointing else 2, {})
    torch.manual_seed(8)
    assert rel_err(step(fast, BATCH)[0], loss) > 1e-4  # other masks, another loss


def test_bias_of_the_adapter():
    stock = adapted_llama("lora", config={"lora_bias": True}, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_()
    fast = twin(stock)
    handle = patched(patch_model(fast))
    assert_parity(stock, fast)
    assert all(calls(handle)[block] == (2, {}) for block in LINEAR_BLOCKS)


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
    handle = patched(patch_model(fast))
    assert_parity(stock, fast)
    assert all(calls(handle)[block] == (2, {}) for block in LINEAR_BLOCKS)


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_initialisations_that_change_the_base_weight(init):
    stock = adapted_llama("lora", torch.float32, config={"init_lora_weights": init})
    fast = twin(stock)
    handle = patched(patch_model(fast))
    assert_parity(stock, fast, tol=2e-5)
    assert all(calls(handle)[block] == (2, {}) for block in LINEAR_BLOCKS)


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
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
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
    handle = patched(patch_model(model))
    assert inspect.signature(model.model.forward) == want
    handle.restore()
    assert inspect.signature(model.model.forward) == want


def test_a_model_that_is_deleted_frees_its_memory_at_once():
    import gc
    import weakref

    model = adapted_llama("lora", torch.float32)
    handle = patched(patch_model(model))
    step(model, BATCH)
    weight = weakref.ref(model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight)
    gc.collect()
    gc.disable()
    try:
        del model, handle
        assert weight() is None
    finally:
        gc.enable()


def test_replicas_of_data_parallel_run_stock():
    model = adapted_llama("lora", torch.float32)
    handle = patched(patch_model(model))
    for module in model.modules():
        module._is_replica = True
    model(**BATCH).loss.backward()
    assert set(calls(handle)["mlp"][1]) == {"a replica of DataParallel"}


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
