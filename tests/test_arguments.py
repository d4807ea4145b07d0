"""Modules of a patched model called by hand take what stock's take, however it is passed; forwards of other releases,
whose arguments are not known, are left alone."""

import functools
import inspect

import pytest
import torch
from adapters import adapted_llama, assert_parity, token_batch, twin
from numerics import FLOAT64_REL, rel_err
from test_families import adapted, families
from tiny import CACHE, tiny_llama
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from hf_fastpeft import patch_model, patched

pytestmark = [pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")]


PARTS = ("mlp", "input_layernorm")


def parts_of(model):
    backbone = model.get_base_model()
    backbone = getattr(backbone.model, "language_model", backbone.model)
    return backbone, backbone.layers[0]


@families
@pytest.mark.parametrize("how", ["by name", "by position"])
def test_attention_layer_mlp_and_norm_called_by_hand(family, how):
    stock = adapted(family)
    fast = patch_model(twin(stock))
    known = {part: inspect.signature(parts_of(stock)[1].get_submodule(part).forward) for part in PARTS}
    names = {part: next(iter(signature.parameters)) for part, signature in known.items()}
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, stock.get_input_embeddings().weight.shape[1], generator=generator)
    positions = torch.arange(5)[None]
    found = []
    for model in (stock, fast):
        backbone, layer = parts_of(model)
        args = (
            (hidden, positions) if family not in ("gemma3", "gemma3_text") else (hidden, positions, "full_attention")
        )
        rotary = backbone.rotary_emb(*args)
        attention, caches = layer.self_attn, [DynamicCache(config=backbone.config) for _ in range(3)]
        given = {"position_embeddings": rotary, "attention_mask": None}
        if how == "by name":
            outs = [attention(hidden_states=hidden, **given, **{CACHE: caches[0]})[0]]
            outs.append(layer(hidden_states=hidden, **given, **{CACHE: caches[1]}))
        else:
            outs = [attention(hidden, rotary, None, caches[0])[0]]
            outs.append(layer(hidden, **given, **{CACHE: caches[1]}))
        for part, name in names.items():
            module = layer.get_submodule(part)
            outs.append(module(**{name: hidden}) if how == "by name" else module(hidden))
            for args, kwargs in (((hidden, hidden), {}), ((), {"hidden_state": hidden}), ((), {})):
                with pytest.raises(TypeError):
                    module(*args, **kwargs)
        outs.append(attention(hidden, rotary, None)[0])
        outs += [cache.layers[0].keys for cache in caches[:2]]
        found.append([out[0] if isinstance(out, tuple) else out for out in outs])
    for got, want in zip(found[1], found[0], strict=True):
        assert rel_err(got, want) < 1e-5


@pytest.mark.parametrize("part", ["LlamaAttention", "LlamaDecoderLayer"])
def test_a_forward_with_unknown_arguments_is_left_alone(part, monkeypatch):
    """As a release that does not exist yet might have it."""
    stock_class = getattr(modeling_llama, part)
    known = stock_class.forward

    def forward(self, *args, horizon=None, **kwargs):
        return known(self, *args, **kwargs)

    functools.update_wrapper(forward, known)
    del forward.__wrapped__
    monkeypatch.setattr(stock_class, "forward", forward)
    stock = adapted_llama("lora")
    fast = patch_model(twin(stock))
    assert_parity(stock, fast)
    data = patched(fast).to_json()
    reasons = {why for path, why in data["skipped"].items() if path.endswith(("self_attn", "layers.0", "layers.1"))}
    assert any("other arguments than are known" in why and f"{part}.forward takes" in why for why in reasons)


@pytest.mark.parametrize("given", [0, [0, -1], True])
def test_hidden_states_by_number_are_not_routed_away(given):
    """transformers 5.24 takes the number of a layer, and 0 is one."""
    stock = adapted_llama("lora", torch.float32)
    fast = patch_model(twin(stock))
    batch = {**token_batch(), "num_items_in_batch": 20, "output_hidden_states": given}
    want, got = (model(**batch) for model in (stock, fast))
    assert (got.hidden_states is None) == (want.hidden_states is None)
    for a, b in zip(got.hidden_states or (), want.hidden_states or (), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert got.logits.shape == want.logits.shape


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
def test_a_cache_by_either_name_is_stocks(name, labels):
    stock = adapted_llama("lora", torch.float32)
    fast = patch_model(twin(stock))
    ids = token_batch(2, 9)["input_ids"]
    found = []
    for model in (stock, fast):
        with torch.no_grad():
            first = model(input_ids=ids[:, :5], use_cache=True)
        given = {name: first[CACHE], "labels": ids[:, 5:]} if labels else {name: first[CACHE]}
        try:
            out = model(input_ids=ids[:, 5:], **given)
            found.append((out.loss, out.logits, first[CACHE].get_seq_length()))
        except TypeError as error:
            found.append(str(error))
    if isinstance(found[0], str):
        assert found[1] == found[0]
        return
    assert found[1][2] == found[0][2]
    assert rel_err(found[1][1], found[0][1]) < 1e-5
    assert not labels or rel_err(found[1][0], found[0][0]) < 1e-5


def test_a_tiny_models_float64_attention_with_a_cache_has_stocks_gradients():
    stock = tiny_llama(torch.float64).train()
    fast = patch_model(twin(stock))
    ids = token_batch(2, 9)["input_ids"]
    found = []
    for model in (stock, fast):
        first = model(input_ids=ids[:, :5], use_cache=True)
        second = model(input_ids=ids[:, 5:], **{CACHE: first[CACHE]})
        (first.logits.square().mean() + second.logits.square().mean()).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(rel_err(got, want) < FLOAT64_REL for got, want in zip(*found, strict=True))
