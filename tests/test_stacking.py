"""Weights that lie next to each other in memory: what others see of it, and when they are moved."""

import copy
import io

import pytest
import torch
from adapters import adapted_llama, assert_parity, step, token_batch, twin
from tiny import tiny_llama

from hf_fastpeft import patch_model, patched, restore
from hf_fastpeft.stacking import adjacent, owns_storage, span, stack_weights

BATCH = token_batch()
GROUPS = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


def layers_of(model):
    return model.base_model.model.model.layers


def stacks_of(model):
    """The base weights of each q/k/v and gate/up."""
    return [
        [getattr(getattr(layer, part), name).base_layer.weight for name in names]
        for layer in layers_of(model)
        for part, names in GROUPS.items()
    ]


def are_stacked(model):
    return [adjacent(stack) is not None for stack in stacks_of(model)]


def moved_model():
    model = patch_model(adapted_llama("lora", torch.float32)).to(torch.float64)
    assert not any(are_stacked(model))
    return model


def test_neighbours_have_storages_of_their_own():
    model = patch_model(adapted_llama("lora"))
    assert all(are_stacked(model))
    for name, p in model.named_parameters():
        assert owns_storage(p), name
        assert p.storage_offset() == 0, name
        assert p.is_contiguous(), name
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


def test_one_view_over_all():
    values = [torch.randn(n, 3) for n in (4, 1, 2)]
    weights = [torch.nn.Parameter(value.clone()) for value in values]
    assert adjacent(weights) is None
    assert stack_weights(weights)
    view = adjacent(weights)
    assert torch.equal(view, torch.cat(values))
    assert torch.equal(span(weights), view)
    weights[1].data.fill_(7.0)
    assert (view[4] == 7).all()
    assert adjacent(weights[:2]) is not None
    assert adjacent([weights[0], weights[2]]) is None
    assert adjacent(weights[::-1]) is None
    weights[2].data = weights[2].data.clone()
    assert adjacent(weights) is None


def test_a_tensor_alone_is_a_few_bytes_on_disk():
    model, stock = patch_model(tiny_llama()), tiny_llama()
    for chosen in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.gate_proj.weight"):
        sizes = []
        for each in (model, stock):
            buffer = io.BytesIO()
            torch.save(each.get_parameter(chosen), buffer)
            sizes.append(buffer.tell())
        assert sizes[0] == sizes[1]


def test_restore_gives_every_weight_its_own_memory_bit_for_bit():
    stock = adapted_llama("lora", torch.float32)
    fast = patch_model(twin(stock))
    step(fast, BATCH)
    restore(fast)
    want = dict(stock.named_parameters())
    for name, p in fast.named_parameters():
        assert torch.equal(p, want[name])
        assert owns_storage(p)
    assert not any(are_stacked(fast))
    assert torch.equal(step(fast, BATCH)[0], step(stock, BATCH)[0])


def test_moving_the_model_puts_the_stacks_together_again():
    """What ``model.to`` does in a Trainer's constructor."""
    stock = adapted_llama("lora", torch.float32).to(torch.float64)
    fast = moved_model()
    assert_parity(stock, fast)
    assert all(are_stacked(fast))


@pytest.mark.parametrize("when", ["before patching", "after moving"])
def test_weights_that_others_hold_stay_where_they_are(when):
    """A state dict that somebody keeps goes on seeing what is written to the weights, and the other way round."""
    model = adapted_llama("lora", torch.float64) if when == "before patching" else moved_model()
    kept = model.state_dict()
    if when == "before patching":
        patch_model(model)
    step(model, BATCH)
    assert not any(are_stacked(model))
    for name, p in model.state_dict().items():
        assert p.data_ptr() == kept[name].data_ptr()
    del kept, p
    if when == "after moving":
        step(model, BATCH)
        assert all(are_stacked(model))


@pytest.mark.parametrize("how", ["trained", "larger storage", "shared", "FSDP", "ZeRO-3"])
def test_weights_that_are_not_restacked(how, monkeypatch):
    model = moved_model()
    weights = [layer.self_attn.k_proj.base_layer.weight for layer in layers_of(model)]
    for weight in weights:
        if how == "trained":
            weight.requires_grad_(True)
        if how == "larger storage":
            weight.data = torch.cat([weight.data, weight.data])[: weight.shape[0]]
        if how == "shared":
            weight.data.share_memory_()
    if how in ("FSDP", "ZeRO-3"):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    if how == "FSDP":
        layers_of(model)[1]._is_fsdp_managed_module = True
    if how == "ZeRO-3":
        model.base_model.model.model.norm.weight.ds_id = 0
    places = [w.data_ptr() for w in weights]
    step(model, BATCH)
    assert [w.data_ptr() for w in weights] == places


@pytest.mark.parametrize("shared", ["the parameter", "its memory"])
def test_weights_tied_between_layers(shared):
    """They stay tied; one that is the same parameter in two stacks is moved once and not at every call."""
    stock = adapted_llama("lora")
    for layer in (layers_of(stock)[1],):
        for part, names in GROUPS.items():
            for name in names[:2]:
                mine, other = (getattr(getattr(each, part), name).base_layer for each in (layer, layers_of(stock)[0]))
                if shared == "the parameter":
                    mine.weight = other.weight
                else:
                    mine.weight.data = other.weight.data
    fast = patch_model(twin(stock))
    if shared == "its memory":  # a deep copy does not keep that
        for mine, other in zip(stacks_of(fast)[2:], stacks_of(fast)[:2], strict=True):
            for a, b in zip(mine[:2], other[:2], strict=True):
                a.data = b.data
    assert_parity(stock, fast)
    places = [w.data_ptr() for stack in stacks_of(fast) for w in stack]
    for model in (stock, fast):
        step(model, BATCH)
        with torch.no_grad():
            stacks_of(model)[0][0].mul_(1.5)
    assert_parity(stock, fast)
    assert places == [w.data_ptr() for stack in stacks_of(fast) for w in stack]


def test_several_processes_alone_do_not_keep_weights_apart(monkeypatch):
    """Nor do they after a layer was called by hand, when nobody could tell whether its weights are sharded."""
    model = moved_model()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    layer = layers_of(model)[0]
    x = torch.randn(1, 3, 32, dtype=torch.float64)
    layer.mlp(x)
    layer.self_attn(x, position_embeddings=model.base_model.model.model.rotary_emb(x, torch.arange(3)[None]))
    assert not all(are_stacked(model))
    step(model, BATCH)
    assert all(are_stacked(model))


def test_copies_and_pickles_work_on_their_own():
    stock = adapted_llama("lora")
    fast = patch_model(twin(stock))
    want = step(fast, BATCH)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        assert_parity(stock, other)
        assert all(are_stacked(other))
        assert patched(other).to_json()["blocks"]["mlp"]["calls_fused"] > 0
        with torch.no_grad():
            for name, p in other.named_parameters():
                if "lora_B" in name or "base_layer" in name:
                    p.zero_()
    assert torch.equal(step(fast, BATCH)[0], want[0])


def test_memory_goes_with_the_last_weight():
    weights = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    stack_weights(weights)
    address = weights[0].data_ptr()
    view = weakly = torch.multiprocessing.reductions.StorageWeakRef(span(weights).untyped_storage())
    weights[0].data = weights[0].data.clone()
    assert not weakly.expired()
    weights[1].data = weights[1].data.clone()
    assert view.expired()
    assert adjacent(weights) is None
    assert weights[0].data_ptr() != address
