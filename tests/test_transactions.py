"""Patching and restoring are all or nothing, and need no handle."""

import copy

import pytest
import torch
from adapters import adapted_llama, assert_parity, step, token_batch, twin
from tiny import tiny_llama

import hf_fastpeft
from hf_fastpeft import patch_model, patched, patching, restore, stacking
from hf_fastpeft.errors import AlreadyPatchedError, NothingToPatchError, NotPatchedError
from hf_fastpeft.fast_module import FastModule

BATCH = token_batch()


def is_patched(model):
    return any(isinstance(m, FastModule) for m in model.modules())


def state_of(model):
    """Class and own attributes of every module, and where every parameter lies."""
    modules = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    return modules, [p.data_ptr() for p in model.parameters()]


class Broken(Exception):
    pass


def broken_after(calls, original):
    """``original`` that fails after so many calls."""
    left = iter(range(calls))

    def call(*args, **kwargs):
        if next(left, None) is None:
            raise Broken
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("calls", [0, 1, 5, 12])
@pytest.mark.parametrize("where", ["_set_class", "Site", "stack_weights"])
def test_a_patch_that_fails_half_way_changes_nothing(where, calls, monkeypatch):
    model = adapted_llama("lora")
    before, want = state_of(model)[0], step(twin(model), BATCH)
    place = stacking if where == "stack_weights" else patching
    with monkeypatch.context() as context:
        context.setattr(
            place, where, broken_after(calls if where != "stack_weights" else calls % 4, getattr(place, where))
        )
        with pytest.raises(Broken):
            patch_model(model)
    assert state_of(model)[0] == before
    assert not is_patched(model)
    assert not any(stacking.is_stacked(p) for p in model.parameters())
    assert torch.equal(step(model, BATCH)[0], want[0])
    patch_model(model)
    assert_parity(adapted_llama("lora"), model)


@pytest.mark.parametrize("calls", [0, 1, 5, 12])
def test_a_restore_that_fails_half_way_leaves_the_model_patched(calls, monkeypatch):
    model = patch_model(adapted_llama("lora"))
    step(model, BATCH)
    before = state_of(model)[0]
    with monkeypatch.context() as context:
        context.setattr(patching, "_set_class", broken_after(calls, patching._set_class))
        with pytest.raises(Broken):
            restore(model)
    assert state_of(model)[0] == before
    assert_parity(adapted_llama("lora"), model)
    assert patched(model).to_json()["blocks"]["mlp"]["calls_fused"] == 4
    assert not is_patched(restore(model))


@pytest.mark.parametrize("calls", [0, 3])
def test_a_swap_to_stock_forwards_that_fails_leaves_the_model_patched(calls, monkeypatch):
    model = patch_model(adapted_llama("lora"))
    before = state_of(model)[0]
    modules = [m for m in model.modules() if isinstance(m, FastModule)]
    with monkeypatch.context() as context:
        context.setattr(patching, "_set_class", broken_after(calls, patching._set_class))
        with pytest.raises(Broken), patching.stock_forwards(modules):
            pass
    assert state_of(model)[0] == before


def test_an_accelerate_hook_comes_back_where_patching_fails(monkeypatch):
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = tiny_llama()
    for module in model.modules():
        if "MLP" in type(module).__name__:
            add_hook_to_module(module, ModelHook())
    want, before = model(**BATCH).loss, state_of(model)
    monkeypatch.setattr(patching, "_set_class", broken_after(9, patching._set_class))
    with pytest.raises(Broken):
        patch_model(model)
    assert state_of(model)[0] == before[0]
    assert torch.equal(model(**BATCH).loss, want)


def test_the_users_exception_goes_on(monkeypatch):
    """Where the model cannot be restored, too: with a note."""
    model = patch_model(tiny_llama())
    with pytest.raises(ZeroDivisionError), patched(model):
        _ = 1 / 0
    assert not is_patched(model)
    patch_model(model)
    monkeypatch.setattr(patching, "_set_class", broken_after(3, patching._set_class))
    with pytest.raises(ZeroDivisionError) as caught, patched(model):
        _ = 1 / 0
    assert "hf_fastpeft: the model stays patched" in caught.value.__notes__[0]
    assert is_patched(model)


def test_the_restores_own_exception_is_told(monkeypatch):
    model = patch_model(tiny_llama())
    monkeypatch.setattr(patching, "_set_class", broken_after(3, patching._set_class))
    with pytest.raises(Broken), patched(model):
        pass


def test_patch_model_returns_the_model():
    model = tiny_llama().train()
    assert patch_model(model) is model
    assert model(**BATCH).loss.isfinite()
    assert restore(model) is model
    assert restore(model) is model  # nothing left to do


def test_handles_of_copies_wrappers_and_stock_models():
    model = patch_model(adapted_llama("lora"))
    step(model, BATCH)
    for other in (copy.deepcopy(model), torch.nn.ModuleDict({"inner": model}), model.get_base_model()):
        assert patched(other).to_json()["blocks"]["mlp"]["calls_fused"] == 2
    copied = copy.deepcopy(model)
    with pytest.raises(AlreadyPatchedError, match=r"hf_fastpeft\.restore\(model\) undoes it"):
        patch_model(copied)
    restore(copied)
    assert not is_patched(copied)
    assert is_patched(model)
    assert_parity(copied, model)
    with pytest.raises(NotPatchedError, match=r"no module of this PeftModel is patched; call patch_model\(model\)"):
        patched(copied)
    kept = patched(model)
    restore(model)
    with pytest.raises(NotPatchedError, match="report: no module"):
        kept.report()


def test_a_report_after_the_active_adapter_was_deleted():
    model = adapted_llama("lora")
    model.add_adapter("other", model.peft_config["default"])
    patch_model(model)
    model.base_model.set_adapter(["default", "other"])
    model.delete_adapter("default")
    assert "LlamaForCausalLM (llama)" in patched(model).report()
    patched(model).restore()


def test_parameters_can_be_swapped_while_patched():
    """``torch.__future__.set_swap_module_params_on_conversion`` makes ``model.to`` do that."""
    stock = adapted_llama("lora", torch.float32)
    fast = patch_model(twin(stock))
    step(fast, BATCH)
    fast.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model in (stock, fast):
            model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_parity(stock, fast)
    assert hf_fastpeft.patched(fast).to_json()["blocks"]["mlp"]["calls_stock"] == {}


def test_restore_inside_a_forward_is_refused():
    """By a hook, before anything is changed; the forward goes on."""
    stock = adapted_llama("lora", torch.float32)
    model = patch_model(twin(stock))
    told = []

    def undo(module, args, out):
        with pytest.raises(
            RuntimeError, match="restore: a forward of this model is running; restore it between steps"
        ):
            restore(model)
        told.append(True)

    model.base_model.model.model.layers[0].register_forward_hook(undo)
    assert_parity(stock, model, tol=1e-5)
    assert told
    assert is_patched(model)
    assert not is_patched(restore(model))


def test_patching_and_restoring_in_inference_mode_leaves_weights_that_train():
    stock = adapted_llama("lora")
    model = twin(stock)
    for where in ("patch", "restore"):
        with torch.inference_mode():
            _ = patch_model(model) if where == "patch" else restore(model)
        model.requires_grad_(True)
        assert not any(p.is_inference() for p in model.parameters())
        stock.requires_grad_(True)
        assert_parity(stock, model)


@pytest.mark.parametrize("alias", ["state dict", "numpy", "tie"])
def test_aliases_taken_while_patched_go_on_after_restore(alias):
    model = patch_model(tiny_llama())
    first, second = (layer.self_attn.k_proj for layer in model.model.layers)
    step(model, BATCH)
    held = {
        "state dict": lambda: model.state_dict()["model.layers.0.self_attn.k_proj.weight"],
        "numpy": lambda: torch.from_numpy(first.weight.detach().numpy()),
        "tie": lambda: second.weight,
    }[alias]()
    if alias == "tie":
        second.weight.data = first.weight.data
    restore(model)
    with torch.no_grad():
        first.weight.fill_(3.0)
    assert (held == 3).all()


@pytest.mark.parametrize("call", [patch_model, patched, restore, lambda m: hf_fastpeft.verify(m, BATCH)])
def test_what_is_no_model_is_named(call):
    trainer = type("Trainer", (), {"model": tiny_llama()})()
    cases = {
        "found a str": "org/name",
        "found a NoneType": None,
        "found the class LlamaForCausalLM": type(trainer.model),
        "found a LlamaConfig": trainer.model.config,
        "found a Trainer; .*pass trainer.model": trainer,
    }
    for message, given in cases.items():
        with pytest.raises(TypeError, match=message):
            call(given)


def test_a_patched_model_and_no_class_are_named_before_anything_else():
    model = patch_model(tiny_llama())
    with pytest.raises(AlreadyPatchedError):
        patch_model(model, only=["mlp"])
    with pytest.raises(NothingToPatchError, match=r"only=\[\]; possible: \["):
        patch_model(tiny_llama(), only=[])
