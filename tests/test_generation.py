"""Cached forwards and generation, patched against stock: every family, mode, kind and name of the cache."""

import warnings

import pytest
import torch
from adapters import calls, step
from numerics import FLOAT64_REL, rel_err
from peft import PrefixTuningConfig, get_peft_model
from test_families import SLIDING, WINDOW, adapted, batch_of, families, norms_in_float64, pair, tiny
from tiny import CACHE, VOCAB_SIZE
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, StaticCache

from hf_fastpeft import patch_model, patched

# PEFT 0.21 writes them itself where "all-linear" meets experts
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
CHUNKS = (WINDOW + 3, 3, 1, 1)  # a prefill longer than the window, some tokens at once, two single ones
LENGTH = sum(CHUNKS)
NAMES = list(dict.fromkeys(["past_key_values", CACHE]))
MODES = pytest.mark.parametrize(
    ("training", "grad"), [(True, True), (True, False), (False, True)], ids=["train", "train-no_grad", "eval-grad"]
)
CACHES = {
    "dynamic": lambda config: DynamicCache(),
    "by-layer": lambda config: DynamicCache(config=config),  # sliding layers drop what has left the window
    "static": lambda config: StaticCache(config=config, max_cache_len=LENGTH),
}


def text_config(model):
    return model.get_base_model().config.get_text_config()


def decode(model, batch, cache, name=CACHE, chunks=CHUNKS):
    """The logits of a batch that comes in chunks, each after what the cache already has."""
    logits, start = [], 0
    for chunk in chunks:
        end = start + chunk
        mask = batch["attention_mask"][:, :end]
        ids = batch["input_ids"][:, start:end]
        logits.append(model(input_ids=ids, attention_mask=mask, use_cache=True, **{name: cache}).logits)
        start = end
    return torch.cat(logits, 1)


def cached_step(model, batch, make, grad, chunks=CHUNKS):
    """``(logits, {name: gradient}, length of the cache)``; the gradients are those of the next tokens' loss."""
    model.zero_grad()
    cache = make(text_config(model))
    with torch.set_grad_enabled(grad):
        logits = decode(model, batch, cache, chunks=chunks)
        if grad:
            targets = batch["input_ids"][:, 1 : logits.shape[1] + 1]
            cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads, int(cache.get_seq_length())


def assert_same_step(got, want, tol=FLOAT64_REL):
    assert rel_err(got[0], want[0]) < tol
    assert got[1].keys() == want[1].keys()
    for name in want[1]:
        assert rel_err(got[1][name], want[1][name]) < tol, name
    assert got[2] == want[2]


@families
@MODES
@pytest.mark.parametrize("cache", ["dynamic", "by-layer"])
def test_prefill_and_decoding_steps(family, training, grad, cache):
    """In chunks over a cache, with gradients from the last token back into the prefill's keys and values."""
    stock, fast, _ = pair(family)
    batch = batch_of(family)
    with norms_in_float64(fast):
        want, got = (cached_step(m.train(training), batch, CACHES[cache], grad) for m in (stock, fast))
    assert_same_step(got, want)
    assert bool(want[1]) == grad
    assert want[2] == LENGTH
    assert calls(patched(fast))["attention_in"][0] == 2 * len(CHUNKS)


@families
@pytest.mark.parametrize("training", [True, False])
def test_chunks_are_the_whole(family, training):
    """What is compared above is right, too: a cache changes no logit."""
    _, fast, _ = pair(family)
    batch = batch_of(family)
    whole = {name: value[:, :LENGTH] for name, value in batch.items() if name != "labels"}
    real = whole["attention_mask"].bool()  # rows of padding see whatever a kernel lets them
    fast.train(training)
    with norms_in_float64(fast), torch.no_grad():
        want = fast(**whole, use_cache=False).logits
        for make in CACHES.values():
            assert rel_err(decode(fast, batch, make(text_config(fast)))[real], want[real]) < FLOAT64_REL


@families
@MODES
def test_a_static_cache(family, training, grad):
    """With gradients a prefill alone: a static cache is written in place, which no second backward survives."""
    stock, fast, _ = pair(family)
    batch, chunks = batch_of(family), CHUNKS[: 1 if grad else None]
    with norms_in_float64(fast):
        want, got = (cached_step(m.train(training), batch, CACHES["static"], grad, chunks) for m in (stock, fast))
    assert_same_step(got, want)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("window", [2, 30])
@pytest.mark.parametrize("cache", list(CACHES))
def test_windows_shorter_and_longer_than_the_tokens(family, window, cache):
    stock = adapted(family, torch.float64, sliding_window=window)
    fast = adapted(family, torch.float64, sliding_window=window)
    patch_model(fast)
    with norms_in_float64(fast):
        want, got = (cached_step(m.train(), batch_of(family), CACHES[cache], False) for m in (stock, fast))
    assert_same_step(got, want)


@families
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_both_names_of_the_argument(family, name, training):
    """What a release calls deprecated it says in the same words, and as often as stock."""
    said, found = [], []
    for model in pair(family)[:2]:
        cache = DynamicCache()
        with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(not training):
            warnings.simplefilter("always")
            found.append(decode(model.train(training), batch_of(family), cache, name))
        assert cache.get_seq_length() == LENGTH
        said.append([str(w.message).partition("Using")[0] for w in caught])
    assert rel_err(found[1], found[0]) < FLOAT64_REL
    assert said[1] == said[0]
    assert bool(said[0]) == (name != CACHE)


@families
def test_the_name_of_another_release_is_stocks_to_understand(family):
    """``cache`` was a keyword of attention functions before it was the cache's name."""
    if CACHE == "cache":
        names = {"past_key_values": DynamicCache(), "cache": DynamicCache()}
    else:
        names = {"cache": DynamicCache()}
    batch = {**batch_of(family), "use_cache": False}
    found = []
    for model in pair(family)[:2]:
        given = {name: DynamicCache() for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers: both are set
            out = model(**batch, **given)
        found.append((out.loss, [cache.get_seq_length() for cache in given.values()]))
    assert rel_err(found[1][0], found[0][0]) < 1e-6  # the loss of a float64 model is stock's, in float32
    assert found[1][1] == found[0][1]


@families
def test_labels_behind_a_cache(family):
    """The loss of tokens that continue a cache, without logits: no position may be left out in the layers."""
    found = []
    for model in pair(family, torch.float32)[:2]:
        model.train().zero_grad()
        batch, cache = batch_of(family), DynamicCache()
        first = {name: value[:, :9] for name, value in batch.items() if name != "labels"}
        model(**first, use_cache=True, **{CACHE: cache})
        rest = {"input_ids": batch["input_ids"][:, 9:], "labels": batch["labels"][:, 9:]}
        loss, grads = step(model, {**rest, "attention_mask": batch["attention_mask"], CACHE: cache})
        found.append((loss, grads, int(cache.get_seq_length())))
    want, got = found
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
    assert got[2] == want[2] == batch["input_ids"].shape[1]
    for name in want[1]:
        torch.testing.assert_close(got[1][name], want[1][name], rtol=1e-3, atol=1e-6)


@families
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(family, training, cache):
    """Tokens, scores and the length of the cache; sampled, so that a wrong distribution shows."""
    stock, fast, _ = pair(family, torch.float32)
    batch, found = batch_of(family), []
    prompt = {name: batch[name][:, : WINDOW + 2] for name in ("input_ids", "attention_mask")}
    for model in (stock, fast):
        torch.manual_seed(3)
        out = model.train(training).generate(
            **prompt,
            max_new_tokens=5,
            do_sample=True,
            cache_implementation=cache,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.append((out.sequences, torch.stack(out.logits), int(out[CACHE].get_seq_length())))
    want, got = found
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)
    assert got[2] == want[2]
    assert bool(calls(patched(fast))["attention_in"][0]) == training


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "how", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"use_cache": False}]
)
def test_ways_to_generate(how, training):
    found = []
    for model in pair("llama", torch.float32)[:2]:
        torch.manual_seed(3)
        prompt = {name: batch_of("llama")[name][:, :8] for name in ("input_ids", "attention_mask")}
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **how}
        found.append(model.train(training).generate(**prompt, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}])
# torch of every reentrant checkpoint under no_grad, in which transformers 5.17 makes them
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_generation_while_training_with_checkpointing(checkpointing):
    """transformers drops the cache there up to 5.22 and keeps it from 5.23 on where no gradient is asked for."""
    found = []
    for model in pair("llama", torch.float32)[:2]:
        model.train().gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
        prompt = {name: batch_of("llama")[name][:, :8] for name in ("input_ids", "attention_mask")}
        tokens = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
        found.append((tokens, *step(model, batch_of("llama"))))
    want, got = found
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=0)
    for name in want[2]:
        torch.testing.assert_close(got[2][name], want[2][name], rtol=1e-3, atol=1e-6)


def prefixed(family, dtype=torch.float64):
    model = tiny(family, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).train()


@families
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# PEFT 0.21 hands its prefixes over by the name that transformers 5.24 deprecates
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_prefix_tuning(family, training):
    """PEFT hands the prefix over in a cache: the loss depends on it, and its gradient is all there is to train."""
    stock, fast = prefixed(family), prefixed(family)
    patch_model(fast)
    batch = batch_of(family)
    with norms_in_float64(fast):
        want, got = (step(m.train(training), batch) for m in (stock, fast))
    assert rel_err(got[0], want[0]) < 1e-6  # stock's loss is in float32
    assert got[1].keys() == want[1].keys()
    for name in want[1]:
        assert want[1][name].abs().max() > 0, name
        assert rel_err(got[1][name], want[1][name]) < 1e-6, name
    assert calls(patched(fast))["attention_in"][0] == 2
    with stock.disable_adapter(), torch.no_grad():
        assert abs(stock(**batch).loss - want[0]) > 1e-4


def test_a_second_chunk_needs_the_first():
    """Were the cache dropped, these tests must fail: the logits of a chunk depend on it."""
    _, fast, _ = pair("llama")
    ids = torch.randint(3, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    fast(input_ids=ids[:, :5], **{CACHE: cache})
    assert rel_err(fast(input_ids=ids[:, 5:], **{CACHE: cache}).logits, fast(input_ids=ids[:, 5:]).logits) > 1e-3


def test_sliding_layers_are_among_the_families():
    assert {"sliding_window": WINDOW}.items() <= SLIDING.items()
    assert any("sliding_attention" in (text_config(adapted(f)).layer_types or []) for f in ("qwen2", "gemma3_text"))
