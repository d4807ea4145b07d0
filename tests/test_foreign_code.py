"""Code that is nobody's business of ours runs in the midst of a forward or on its results: what it does counts."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from adapters import adapted_llama, assert_parity, step, token_batch, twin
from numerics import FLOAT64_REL, rel_err
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_fastpeft import patch_model, patched, restore

BATCH = token_batch()
WHERE = ["", "self_attn", "mlp", "mlp.down_proj", "mlp.act_fn", "mlp.down_proj.base_layer", "input_layernorm",
         "post_attention_layernorm", "self_attn.v_proj", "self_attn.o_proj.lora_A.default",
         "mlp.gate_proj.lora_dropout.default"]  # fmt: skip


def layers_of(model):
    return model.base_model.model.model.layers


def scale_adapters(module):
    for name, p in module.named_parameters():
        if "lora_" in name:
            p.data.mul_(1.1)  # leaves no version


def assert_steps_agree(stock, fast, steps=3):
    for _ in range(steps):
        (loss, want), (found, got) = step(stock, BATCH), step(fast, BATCH)
        assert rel_err(found, loss) < FLOAT64_REL
        assert all(rel_err(got[name], gradient) < FLOAT64_REL for name, gradient in want.items())


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("where", WHERE)
def test_adapters_written_by_a_hook_count_from_there_on(where, kind):
    """Of the next layer: stock's own gradients are wrong where adapters are written that have been used already."""
    stock = adapted_llama("lora", num_hidden_layers=3)
    fast = patch_model(twin(stock))
    for model in (stock, fast):
        layers = layers_of(model)
        for layer, written in pairwise(layers):
            module = layer.get_submodule(where)
            if kind == "pre":
                module.register_forward_pre_hook(lambda m, args, written=written: scale_adapters(written))
            else:
                module.register_forward_hook(lambda m, args, out, written=written: scale_adapters(written))
    assert_steps_agree(stock, fast)


@pytest.mark.parametrize("where", ["model.embed_tokens", "model.rotary_emb"])
def test_hooks_elsewhere_in_the_model(where):
    stock = adapted_llama("lora")
    fast = patch_model(twin(stock))
    for model in (stock, fast):
        module = model.base_model.model.get_submodule(where)
        module.register_forward_hook(lambda m, args, out, model=model: scale_adapters(model))
    assert_steps_agree(stock, fast)


class Meddler(nn.Module):
    """A module of a user's own in place of the activation; writes to the adapters of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = [layer]

    def forward(self, x):
        scale_adapters(self.layer[0])
        return nn.functional.silu(x)


@pytest.mark.parametrize("package", ["transformers_modules.org.model", "torchlike.nn", "peft_extras"])
@pytest.mark.parametrize("what", ["module", "hook"])
def test_packages_are_known_by_their_whole_name(what, package, monkeypatch):
    """A checkpoint's own code is in ``transformers_modules``."""
    stock = adapted_llama("lora", num_hidden_layers=3)
    fast = twin(stock)
    for model in (stock, fast):
        layers = layers_of(model)
        if what == "module":
            monkeypatch.setattr(Meddler, "__module__", package)
            layers[0].mlp.act_fn = Meddler(layers[1])
        else:

            def write(module, args, written=layers[1]):
                scale_adapters(written)

            write.__module__ = package
            layers[0].mlp.down_proj.register_forward_pre_hook(write)
    assert_steps_agree(stock, patch_model(fast))


@pytest.mark.parametrize("how", ["module", "forward", "attention function"])
def test_other_peoples_code_in_a_layer_may_write_adapters(how):
    stock = adapted_llama("lora", num_hidden_layers=3)
    fast = twin(stock)

    def prepare(model):
        layers = layers_of(model)
        if how == "module":
            layers[0].mlp.act_fn = Meddler(layers[1])
        if how == "forward":
            norm = layers[0].input_layernorm
            own = type(norm).forward

            def forward(x):
                scale_adapters(layers[1])
                return own(norm, x)

            norm.forward = forward
        if how == "attention function":

            def attend(module, *args, **kwargs):
                if module.layer_idx == 0:
                    scale_adapters(layers[1])
                return sdpa_attention_forward(module, *args, **kwargs)

            AttentionInterface.register("meddling", attend)
            model.base_model.model.config._attn_implementation = "meddling"

    prepare(stock)
    prepare(fast)
    for model in (stock, fast):
        if how == "attention function":
            prepare(model)  # the name stands for the last one registered
        if model is fast:
            patch_model(fast)
        if how != "attention function":
            continue
        model.found = [step(model, BATCH) for _ in range(3)]
    if how == "attention function":
        for (loss, want), (found, got) in zip(stock.found, fast.found, strict=True):
            assert rel_err(found, loss) < FLOAT64_REL
            assert all(rel_err(got[name], gradient) < FLOAT64_REL for name, gradient in want.items())
    else:
        assert_steps_agree(stock, fast)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_an_attention_function_may_work_in_place(qk_norm, padded):
    def attend(module, q, k, v, *args, **kwargs):
        q.mul_(1.5)
        k.add_(0.1)
        v.sub_(0.2).mul_(0.5)
        return sdpa_attention_forward(module, q, k, v, *args, **kwargs)

    AttentionInterface.register("in-place", attend)
    if qk_norm:
        from test_families import adapted

        stock = adapted("qwen3", torch.float32, attn_implementation="in-place")  # float64's norms run stock
    else:
        stock = adapted_llama("lora", attn_implementation="in-place")
    fast = patch_model(twin(stock))
    assert_parity(stock, fast, BATCH if padded else token_batch(1, 4), tol=1e-4 if qk_norm else FLOAT64_REL)
    assert patched(fast).to_json()["blocks"]["attention_in"]["calls_fused"] == 2


@pytest.mark.parametrize("where", ["", "self_attn", "mlp", "input_layernorm"])
def test_a_forward_that_others_wrapped_is_stocks_after_restore(where):
    stock = adapted_llama("lora")
    fast = patch_model(twin(stock))
    for layer in layers_of(fast):
        module = layer.get_submodule(where)
        held = module.forward
        module.forward = lambda *args, held=held, **kwargs: held(*args, **kwargs)
    assert_steps_agree(stock, fast, steps=1)
    restore(fast)
    assert_steps_agree(stock, fast, steps=1)


@pytest.mark.parametrize("policy", ["list", "function"])
def test_selective_checkpointing_runs_stock(policy):
    def choose(ctx, op, *args, **kwargs):
        kept = op is torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    stock = adapted_llama("lora")
    fast = patch_model(twin(stock))
    chosen = [torch.ops.aten.mm.default] if policy == "list" else choose
    contexts = partial(create_selective_checkpoint_contexts, chosen)
    found = []
    for model in (stock, fast):
        loss = checkpoint(lambda model=model: model(**BATCH).loss, use_reentrant=False, context_fn=contexts)
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert all(rel_err(found[1][name], want) < FLOAT64_REL for name, want in found[0].items())
    assert "inside selective activation checkpointing" in patched(fast).report()


def test_mutation_of_saved_tensors_runs_stock():
    stock = adapted_llama("lora")
    fast = patch_model(twin(stock))
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        assert_steps_agree(stock, fast, steps=2)


# gradients of other kinds


def penalty(model):
    """Loss and the norm of its gradient, whose own gradient is asked for."""
    loss = model(**BATCH).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, create_graph=True)
    (loss + sum(g.square().sum() for g in gradients)).backward()


@pytest.mark.parametrize("only", [None, "LlamaForCausalLM", "LlamaMLP", "LlamaAttention", "LlamaRMSNorm"])
def test_a_second_derivative_is_an_error_that_says_what_to_do(only):
    model = patch_model(adapted_llama("lora", torch.float32, attn_implementation="eager"), only=only)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*hf_fastpeft.restore\(model\)"):
        penalty(model)
    restore(model)
    stock = adapted_llama("lora", torch.float32, attn_implementation="eager")
    for each in (model, stock):
        each.zero_grad()
        penalty(each)
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert p.grad is q.grad is None or rel_err(p.grad, q.grad) < 1e-4, name


def test_a_second_derivative_of_embeddings_alone_is_an_error_too():
    """The head's own gradient is a constant to autograd: torch's guard lets it pass."""
    model = patch_model(adapted_llama("lora", torch.float32), only="LlamaForCausalLM")
    embeds = model.get_input_embeddings()(BATCH["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, attention_mask=BATCH["attention_mask"], labels=BATCH["labels"]).loss
    with pytest.raises(RuntimeError, match=r"hf_fastpeft.restore\(model\)"):
        torch.autograd.grad(loss, embeds, create_graph=True)


@pytest.mark.parametrize("only", [None, "LlamaForCausalLM", "LlamaMLP", "LlamaAttention", "LlamaRMSNorm"])
@pytest.mark.parametrize("training", [False, True])
def test_forward_mode_gives_stocks_directional_derivative(only, training):
    stock = adapted_llama("lora", attn_implementation="eager").train(training)
    fast = patch_model(twin(stock), only=only)
    embeds = stock.get_input_embeddings()(BATCH["input_ids"]).detach()
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(embeds.shape, generator=g, dtype=embeds.dtype)
    found = []
    for model in (stock, fast):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(embeds, direction)
            loss = model(inputs_embeds=dual, labels=BATCH["labels"]).loss
            found.append(forward_ad.unpack_dual(loss).tangent)
    assert found[0] is not None
    assert found[1] is not None
    assert rel_err(found[1], found[0]) < 1e-6  # stock's norms and loss run in float32


def test_forward_mode_over_an_adapters_weight():
    stock = adapted_llama("lora", attn_implementation="eager")
    fast = patch_model(twin(stock))
    found = []
    for model in (stock, fast):
        layer = layers_of(model)[0].mlp.down_proj.lora_A["default"]
        weight = layer.weight
        del layer.weight
        with forward_ad.dual_level():
            layer.weight = forward_ad.make_dual(weight.detach(), torch.ones_like(weight))
            found.append(forward_ad.unpack_dual(model(BATCH["input_ids"], labels=BATCH["labels"]).loss).tangent)
    assert rel_err(found[1], found[0]) < 1e-6


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("training", [False, True])
def test_traces_are_stocks(training):
    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    stock = adapted_llama("lora", torch.float32).get_base_model().requires_grad_(False).train(training)
    fast = patch_model(twin(stock))
    traced = [torch.jit.trace(Logits(m), (BATCH["input_ids"],), check_trace=False) for m in (stock, fast)]
    assert torch.equal(*(trace(BATCH["input_ids"]) for trace in traced))


def test_fake_tensors_over_real_weights():
    """As tools that estimate memory use them."""
    model = patch_model(adapted_llama("lora", torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(**BATCH).logits.shape == (3, 17, 128)
