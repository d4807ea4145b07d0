"""Every registered model family against its stock classes, on tiny random models."""

import json
import re
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from adapters import assert_parity, step, token_batch, twin
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FLOAT64_REL, assert_no_worse, rel_err
from peft import LoraConfig, get_peft_model
from tiny import VOCAB_SIZE
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_fastpeft import patch_model, patched
from hf_fastpeft.families import FAMILIES, families_table
from hf_fastpeft.layers import FastAttention, FastRMSNorm
from hf_fastpeft.ops.rms_norm import rms_norm_torch

README = Path(__file__).parents[1] / "README.md"
WINDOW = 6  # shorter than the batches
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BOTH_TYPES = ["sliding_attention", "full_attention"]
GEMMA = {"head_dim": 16, "sliding_window": WINDOW, "layer_types": BOTH_TYPES, "query_pre_attn_scalar": 24}
HALF_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
IMAGE_TOKEN = VOCAB_SIZE - 1
# what each family's config says beyond COMMON; a family without an entry here fails the first test
CONFIGS = {
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "gemma3": {**GEMMA, "final_logit_softcapping": 1.5},
    "gemma3_text": {**GEMMA, "final_logit_softcapping": 1.5, "attention_bias": True},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": WINDOW, "head_dim": 16},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4},
    "phi3": {"sliding_window": WINDOW, "rope_parameters": HALF_ROTARY},
    "qwen2": {**SLIDING, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {**SLIDING, "max_window_layers": 1, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_moe": {
        **SLIDING,
        "head_dim": 16,
        "attention_bias": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
}
MOE = {"mixtral": 2, "qwen3_moe": 1}  # layers with experts
DENSE = sorted(FAMILIES.keys() - MOE)
BATCH = token_batch()
families = pytest.mark.parametrize("family", sorted(FAMILIES))
pytestmark = [
    # PEFT 0.21 writes them itself where "all-linear" meets experts
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]


def batch_of(family, seed=0):
    """Gemma 2's has no padding on the left: stock's eager attention takes float64's least number, which stands for
    minus infinity in the mask, into a float32 softmax, and a row that sees nothing becomes NaN."""
    batch = token_batch(seed=seed)
    if family == "gemma2":
        batch["attention_mask"][0] = 1
    return batch


def tiny(family, dtype=torch.float32, **overrides):
    """A model whose norms and biases are none that they begin as; the global random state is left alone."""
    settings = {**COMMON, **CONFIGS[family], **overrides}
    attention = settings.pop("attn_implementation", None)
    experts = {"experts_implementation": "eager"} if family in MOE else {}  # the default's products take no float64
    factory = AutoModelForCausalLM
    if family == "gemma3":
        settings = {"text_config": settings, "vision_config": VISION, "image_token_index": IMAGE_TOKEN}
        settings.update(mm_tokens_per_image=4, tie_word_embeddings=True)
        factory = AutoModelForImageTextToText
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factory.from_config(config, attn_implementation=attention, **experts)
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.to(dtype)


def adapted(family, dtype=torch.float32, config=None, **overrides):
    """With a LoRA that is not the identity."""
    model = tiny(family, dtype, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **(config or {})}
        model = get_peft_model(model, LoraConfig(**settings), autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def norm(self, x):
    """Stock's norm, told by its attribute, in the dtype of its input and not in float32."""
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    return rms_norm_torch(x, self.weight, eps, unit_offset=hasattr(self, "eps"))


@contextmanager
def norms_in_float64(model):
    """Inside, stock's norms and those in the blocks compute float64 in float64."""
    with pytest.MonkeyPatch.context() as patch:
        for stock in {type(m).stock_class() for m in model.modules() if isinstance(m, FastRMSNorm)}:
            patch.setattr(stock, "forward", norm)
        patch.setattr(FastRMSNorm, "obstacle", lambda self, block: None)
        yield


def pair(family, dtype=torch.float64, **kwargs):
    """``(stock, fast, patched)``."""
    stock = adapted(family, dtype, **kwargs)
    fast = twin(stock)
    return stock, fast, patched(patch_model(fast))


def test_each_family_has_a_tiny_model():
    assert sorted(CONFIGS) == sorted(FAMILIES)


@families
def test_the_norm_of_these_tests_is_stocks(family):
    stock = next(m for m in tiny(family).modules() if type(m).__name__.endswith("RMSNorm"))
    x = torch.randn(5, *stock.weight.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(stock, x), stock(x))


@families
def test_loss_logits_and_every_gradient_in_float64(family):
    stock, fast, handle = pair(family)
    batch = batch_of(family)
    assert_parity(stock, fast, batch)
    with norms_in_float64(fast):
        assert_parity(stock, fast, batch)
        assert rel_err(fast.eval()(**batch).logits, stock.eval()(**batch).logits) < FLOAT64_REL
    blocks = handle.to_json()["blocks"]
    assert not {why for row in blocks.values() for why in row["calls_stock"]} - {
        "float64 model (stock computes this norm in float32)",
        "float64 model (stock computes the loss in float32)",
        "q_norm: float64 model (stock computes this norm in float32)",
        "not training: real logits",
        "mixture of experts",
    }


def pooled(runs):
    """Gradients of several runs as one tensor for each kind of parameter in all layers."""
    kinds = {}
    for run in runs:
        for name, tensor in run.items():
            kinds.setdefault(re.sub(r"layers\.\d+\.", "", name), []).append(tensor.detach().flatten())
    return {kind: torch.cat(tensors) for kind, tensors in kinds.items()}


@pytest.mark.parametrize(
    ("family", "dtype", "autocast"),
    [(f, torch.float32, None) for f in sorted(FAMILIES)]
    + [(f, torch.float32, torch.bfloat16) for f in DENSE]
    + [(f, torch.bfloat16, None) for f in ("gemma2", "gemma3_text", "phi3", "qwen3")],
)
def test_low_precision_is_no_worse_than_stock(family, dtype, autocast):
    """Experts are left out in bfloat16: a rounding that moves a token to another expert is no measure."""
    stock, fast, handle = pair(family, dtype)
    exact = twin(stock).double()
    runs = []
    for seed in range(4):
        batch = batch_of(family, seed)
        with norms_in_float64(fast):
            want = step(exact, batch)[1] | {"logits": exact(**batch).logits}
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            base = step(stock, batch)[1] | {"logits": stock(**batch).logits}
            got = step(fast, batch)[1] | {"logits": fast(**batch).logits}
        runs.append((got, base, want))
    got, base, want = (pooled(part) for part in zip(*runs, strict=True))
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == base[name].dtype
        assert_no_worse(name, got[name], base[name], want[name])
    blocks = handle.to_json()["blocks"]
    reasons = {why for row in blocks.values() for why in row["calls_stock"]}
    assert reasons == ({"mixture of experts"} if family in MOE else set())


@families
def test_training_follows_stock(family):
    stock, fast, _ = pair(family, torch.float32)
    losses = []
    for model in (stock, fast):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for seed in range(3):
            loss, _ = step(model, token_batch(seed=seed))
            optimizer.step()
            losses[-1].append(loss)
    want, got = map(torch.stack, losses)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert want[0] != want[-1]


@families
def test_every_block_of_every_layer_is_fused_or_said_not_to_be(family):
    _, fast, handle = pair(family, torch.float32)
    step(fast, BATCH)
    data = handle.to_json()
    assert data["unmatched"] == []
    assert data["skipped"] == {}
    blocks = data["blocks"]
    layers, experts = COMMON["num_hidden_layers"], MOE.get(family, 0)
    assert set(blocks) == {"rms_norm", "attention_in", "attention_out", "mlp", "lm_head"}
    for name, row in blocks.items():
        stock = experts if name == "mlp" else 0
        assert row["stock"] == row["calls_stock"] == ({"mixture of experts": stock} if stock else {}), name
        assert row["fused"] == row["modules"] - stock
        if name not in ("rms_norm", "lm_head"):
            assert row["modules"] == layers
            assert row["calls_fused"] == layers - stock
    norms = sum("norm" in name and "vision" not in name for name, _ in fast.named_parameters() if "weight" in name)
    assert blocks["rms_norm"]["modules"] == norms
    called = norms - (family == "gemma3")  # the projector's norm sees images only
    assert blocks["rms_norm"]["calls_fused"] == called


@families
def test_the_saved_adapter_is_stocks(family, tmp_path):
    stock, fast, _ = pair(family, torch.float32)
    for name, model in (("stock", stock), ("fast", fast)):
        model.save_pretrained(tmp_path / name)
    assert {p.name for p in (tmp_path / "stock").iterdir()} == {p.name for p in (tmp_path / "fast").iterdir()}
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("stock", "fast")]
    assert weights[0] == weights[1]
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("stock", "fast")]
    for config in configs:  # written from sets
        config.update({key: sorted(config[key] or ()) for key in ("target_modules", "target_parameters")})
    assert configs[0] == configs[1]


@families
def test_restore_is_bitwise_and_leaves_no_trace(family):
    stock, fast, handle = pair(family, torch.float32)
    step(fast, BATCH)
    handle.restore()
    assert [type(m) for m in fast.modules()] == [type(m) for m in stock.modules()]
    assert [set(vars(m)) for m in fast.modules()] == [set(vars(m)) for m in stock.modules()]
    want, got = step(stock, BATCH), step(fast, BATCH)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][name], want[1][name]) for name in want[1])


@families
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_stocks(family, cache):
    stock, fast, _ = pair(family, torch.float32)
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    prompt = {k: BATCH[k][:1] for k in ("input_ids", "attention_mask")}
    assert torch.equal(fast.eval().generate(**prompt, **options), stock.eval().generate(**prompt, **options))


def first_and_last(family):
    """Names of the linears that "q and v only" means in this family."""
    names = next(c for c in patch_classes(family) if issubclass(c, FastAttention)).linears["attention_in"]
    return [names[0], names[-1]]


def patch_classes(family):
    return import_module(FAMILIES[family]).FAMILY.fast_classes


@pytest.mark.parametrize(
    ("family", "attention"),
    # Gemma 2 has no sdpa: it knows no soft-capping
    [(f, a) for f in sorted(FAMILIES) for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")],
)
def test_partial_targets_ranks_and_attention_implementations(family, attention):
    """Linears without an adapter beside those with one, each of a rank of its own."""
    names = first_and_last(family)
    config = {"target_modules": [*names, "o_proj"], "rank_pattern": {names[-1]: 9, "o_proj": 1}}
    stock, fast, handle = pair(family, config=config, attn_implementation=attention)
    batch = batch_of("gemma2")
    with norms_in_float64(fast):
        assert_parity(stock, fast, batch)
        row = handle.to_json()["blocks"]["attention_in"]
    assert (row["calls_fused"], row["calls_stock"]) == (2, {})
    assert fast.get_base_model().config._attn_implementation == attention
    if attention == "eager":
        outs = [model(**batch, output_attentions=True) for model in (stock, fast)]
        for got, want in zip(outs[1].attentions, outs[0].attentions, strict=True):
            # eager attention takes its softmax in float32, whatever the model's dtype
            torch.testing.assert_close(got, want, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-7)


@families
def test_attention_gets_what_stock_passes(family, monkeypatch):
    """Sliding window, soft-capping, scaling and dropout: what kernels read, and sdpa and eager partly do not."""
    seen = []
    find = type(ALL_ATTENTION_FUNCTIONS).get_interface

    def get_interface(self, name, default):
        attend = find(self, name, default)

        def record(module, q, k, v, mask, **kwargs):
            tensors = {"mask": mask, **{n: t for n, t in kwargs.items() if isinstance(t, torch.Tensor)}}
            plain = {n: t for n, t in kwargs.items() if n not in tensors}
            seen.append((module.layer_idx, q.shape, k.shape, v.shape, default, plain, tensors))
            return attend(module, q, k, v, mask, **kwargs)

        return record

    monkeypatch.setattr(type(ALL_ATTENTION_FUNCTIONS), "get_interface", get_interface)
    stock, fast, _ = pair(family, attention_dropout=0.3)
    runs = []
    for model in (stock, fast):
        torch.manual_seed(5)
        runs.append(model(**batch_of(family)).loss)
    assert rel_err(*runs) < FLOAT64_REL
    assert len(seen) == 4
    for want, got in zip(seen[:2], seen[2:], strict=True):
        assert got[:-1] == want[:-1]
        assert got[-1].keys() == want[-1].keys()
        torch.testing.assert_close(got[-1], want[-1], rtol=0, atol=0)
    windows = [call[5].get("sliding_window", "not passed") for call in seen[2:]]
    assert WINDOW in windows or family == "llama"


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3_text"])
def test_the_sliding_window_matters_here(family):
    """What is beyond the window of all layers changes nothing: the parity above is one of windows."""
    overrides = {} if family == "mistral" else {"layer_types": ["sliding_attention"] * 2}
    model = adapted(family, torch.float64, **overrides)
    patch_model(model)
    ids = torch.arange(3, 3 + 17)[None]
    base, changed = model(input_ids=ids).logits, model(input_ids=ids.index_fill(1, torch.tensor([0]), 99)).logits
    reach = 2 * (WINDOW - 1)  # two layers
    assert rel_err(changed[:, reach + 1 :], base[:, reach + 1 :]) < FLOAT64_REL
    assert rel_err(changed[:, reach], base[:, reach]) > 1e-6


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma3_text"])
def test_packed_rows(family):
    """Several rows behind each other, told apart by their positions."""
    stock, fast, _ = pair(family)
    ids = token_batch(1, 24)["input_ids"]
    positions = torch.cat([torch.arange(9), torch.arange(4), torch.arange(11)])[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    with norms_in_float64(fast):
        assert_parity(stock, fast, batch)


@families
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_recomputes_and_agrees(family, use_reentrant):
    stock, fast, handle = pair(family)
    for model in (m.get_base_model() for m in (stock, fast)):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with norms_in_float64(fast):
        assert_parity(stock, fast, batch_of(family))
    assert handle.to_json()["blocks"]["attention_in"]["calls_fused"] == 4  # two layers, forward and recompute


@families
def test_full_fine_tuning(family):
    """Norms, biases and base weights trained, no adapter."""
    stock = tiny(family, torch.float64).train()
    fast = twin(stock)
    patch_model(fast)
    with norms_in_float64(fast):
        assert_parity(stock, fast, batch_of(family))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3", "qwen3"])
def test_impl_triton_runs_the_kernels(family):
    stock = adapted(family, num_hidden_layers=1, **{"layer_types": BOTH_TYPES[:1]} if family != "phi3" else {})
    fast = twin(stock)
    patch_model(fast, impl="triton")
    ids = token_batch(1, 4)["input_ids"]
    assert_parity(stock, fast, {"input_ids": ids, "labels": ids}, tol=2e-5)


def test_residual_dropouts_act_where_stock_has_them():
    stock, fast, _ = pair("phi3", resid_pdrop=0.4)
    results = []
    for model in (stock, fast):
        torch.manual_seed(7)
        results.append(step(model, BATCH))
    (want_loss, want), (got_loss, got) = results
    assert rel_err(got_loss, want_loss) < FLOAT64_REL
    assert all(rel_err(got[name], want[name]) < FLOAT64_REL for name in want)
    assert rel_err(step(stock, BATCH)[0], want_loss) > 1e-6  # it was random


def test_router_noise_and_router_logits():
    stock, fast, _ = pair("mixtral", router_jitter_noise=0.2)
    losses = []
    for model in (stock, fast):
        torch.manual_seed(7)
        with norms_in_float64(fast):
            losses.append(step(model, BATCH)[0])
    assert rel_err(*losses) < FLOAT64_REL
    stock, fast, handle = pair("mixtral", torch.float32)
    out = fast(**BATCH)
    assert out.aux_loss is None
    assert out.router_logits is None
    got, want = (model(**BATCH, output_router_logits=True) for model in (fast, stock))
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    torch.testing.assert_close(got.loss, want.loss)
    assert handle.to_json()["blocks"]["lm_head"]["calls_stock"] == {"router logits": 1}


def with_images():
    ids = token_batch(2, 17)["input_ids"].clamp(max=IMAGE_TOKEN - 1)
    ids[:, 3:7] = IMAGE_TOKEN
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE_TOKEN).long()}


def test_images():
    """Gemma 3's vision tower and head run stock where there are images; its language model does not."""
    stock, fast, handle = pair("gemma3", torch.float32)
    batch = with_images()
    assert_parity(stock, fast, batch, tol=1e-4)
    blocks = handle.to_json()["blocks"]
    assert (blocks["attention_in"]["calls_fused"], blocks["mlp"]["calls_fused"]) == (2, 2)
    assert list(blocks["lm_head"]["calls_stock"]) == ["images: their hidden states are part of the output"]
    want, got = (m(input_ids=batch["labels"] % IMAGE_TOKEN, labels=batch["labels"]) for m in (stock, fast))
    assert isinstance(got, type(want))
    assert list(got.keys()) == list(want.keys())


@families
def test_trls_head(family):
    """TRL's forward is served by the block in each family, Gemma 3's images included."""
    from trl.trainer.utils import add_fused_lm_head

    stock = adapted(family)
    fast = twin(stock)
    for model in (stock, fast):
        add_fused_lm_head(model.get_base_model())
    handle = patched(patch_model(fast))
    batch = {**(with_images() if family == "gemma3" else BATCH), "fused_lm_head": True}
    assert_parity(stock, fast, batch, tol=1e-4)
    row = handle.to_json()["blocks"]["lm_head"]
    assert (row["fused"], row["calls_fused"], row["calls_stock"]) == (1, 1, {})


@pytest.mark.parametrize(
    "activation",
    ["silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh"],
)
def test_activations_by_their_name_in_configs(activation):
    stock, fast, handle = pair("llama", hidden_act=activation)
    assert_parity(stock, fast)
    assert handle.to_json()["blocks"]["mlp"]["calls_fused"] == 2


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "hidden_act"), ("gemma2", "hidden_activation"), ("phi3", "hidden_act")]
)
def test_unknown_activation_runs_stock(family, name):
    stock, fast, handle = pair(family, **{name: "relu"})
    assert_parity(stock, fast, batch_of(family))
    row = handle.to_json()["blocks"]["mlp"]
    assert row["stock"] == row["calls_stock"] == {"activation ReLU": 2}


def test_replaced_modules_run_as_they_are():
    """A norm or an attention of another class is called, the rest of its layer stays fused."""
    stock = adapted("qwen3", torch.float64)
    first, second = stock.get_base_model().model.layers
    kind = type(first.self_attn)
    first.self_attn.__class__ = type("OtherAttention", (kind,), {})
    first.post_attention_layernorm = torch.nn.LayerNorm(32, dtype=torch.float64)
    second.self_attn.q_norm = torch.nn.Identity()
    fast = twin(stock)
    handle = patched(patch_model(fast))
    with norms_in_float64(fast):
        assert_parity(stock, fast)
        blocks = handle.to_json()["blocks"]
    assert handle.to_json()["skipped"] == {
        "base_model.model.model.layers.0.self_attn": "OtherAttention derives from Qwen3Attention"
    }
    assert "OtherAttention derives from Qwen3Attention" in handle.report()
    assert blocks["attention_in"]["stock"] == blocks["attention_in"]["calls_stock"] == {"q_norm is Identity": 1}
    assert blocks["attention_out"]["calls_fused"] == 1
    assert blocks["mlp"]["calls_fused"] == 2


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    seq_len=st.integers(1, 9),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    head_dim=st.sampled_from([64, 80, 128, 256]),
    rank=st.integers(1, 64),
    labels=st.sampled_from(["all masked", "some rows empty", "all"]),
    seed=st.integers(0, 2**31),
)
def test_shapes(batch, seq_len, kv_heads, groups, head_dim, rank, labels, seed):
    stock, fast, _ = pair(
        "llama",
        config={"r": rank},
        hidden_size=24,
        intermediate_size=16,
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (batch, seq_len), generator=generator)
    targets = ids.clone()
    if labels == "all masked":
        targets[:] = -100
    elif labels == "some rows empty":
        targets[torch.rand(batch, generator=generator) < 0.5] = -100
    inputs = {"input_ids": ids, "labels": targets, "num_items_in_batch": torch.tensor(7)}
    with norms_in_float64(fast):
        (want_loss, want), (got_loss, got) = step(stock, inputs), step(fast, inputs)
        # a query that sees one key has no gradient but rounding: the whole step's counts beside a parameter's own
        whole = torch.cat([gradient.flatten() for gradient in want.values()]).norm()
        assert rel_err(got_loss, want_loss) < FLOAT64_REL
        for name in want:
            assert (got[name] - want[name]).norm() <= FLOAT64_REL * max(want[name].norm(), 1e-6 * whole), name
        torch.testing.assert_close(fast(**inputs).logits, stock(**inputs).logits, rtol=1e-9, atol=1e-9)
    got, want = fast.float()(**inputs).loss, stock.float()(**inputs).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_readme_shows_the_registry():
    shown = re.search(r"<!-- families -->\n(.*?)<!-- /families -->", README.read_text(), flags=re.DOTALL)
    assert shown is not None
    assert shown[1] == families_table()
