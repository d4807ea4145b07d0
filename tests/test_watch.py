"""Readings of layers are kept as long as they would come out the same, and not a call longer."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections import OrderedDict

import pytest
import torch
from adapters import METHODS, adapted_llama, step, token_batch, twin
from numerics import FLOAT64_REL, rel_err
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tiny import tiny_llama
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from hf_fastpeft import patch_model
from hf_fastpeft.blocks.adapters import KEPT
from hf_fastpeft.layers import FastAttention, FastMLP
from hf_fastpeft.watch import Watch

BATCH = token_batch(2, 7)
BLOCKS = [("self_attn", "attention_in"), ("self_attn", "attention_out"), ("mlp", "mlp")]


def patched(method="lora", **kwargs):
    model = adapted_llama(method, torch.float32, **kwargs)
    patch_model(model)
    return model


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, FastAttention | FastMLP)]


def description(found):
    """What a reading says, by the identities of its tensors."""
    if isinstance(found, str):
        return found
    parts = [[(tuple(map(id, low.tensors)), low[6:], low.rank, low.weight.dtype) for low in stack] for stack in found]
    tensors = [t for stack in found for low in stack for t in low.tensors if t is not None]
    return parts, [(t.data_ptr(), t.stride(), t.requires_grad) for t in tensors]


def kept_and_fresh(model):
    """Of every block: what the layer would use now, and what a new reading says."""
    for module in layers_of(model):
        for block in module.blocks:
            yield block, description(module._bundles(block)), description(module._read(block, Watch()))


def target(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def add(model, name="other", **config):
    model.add_adapter(name, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, **config))


def new_parameter(t, dtype=None):
    return nn.Parameter(torch.randn(t.shape, dtype=dtype or t.dtype), t.requires_grad)


class Derived(nn.Linear):
    pass


def set_class(layer):
    layer.lora_A["default"].__class__ = Derived


def switch(model, name):
    add(model)
    model.set_adapter(name)


CHANGES = {
    "another adapter": lambda m, q: switch(m, "other"),
    "two adapters": lambda m, q: (add(m), m.base_model.set_adapter(["default", "other"])),
    "active list written in place": lambda m, q: (add(m), q._active_adapter.append("other")),
    "disabled": lambda m, q: q.enable_adapters(False),
    "merged": lambda m, q: q.merge(),
    "merged marker written in place": lambda m, q: q.merged_adapters.append("default"),
    "scaled": lambda m, q: q.scale_layer(0.5),
    "scaling of another adapter": lambda m, q: (add(m), q.set_scale("other", 0.5)),
    "dropout": lambda m, q: q.lora_dropout.update({"default": nn.Dropout(0.5)}),
    "other dropout": lambda m, q: q.lora_dropout.update({"default": nn.AlphaDropout(0.5)}),
    "fan_in_fan_out": lambda m, q: setattr(q, "fan_in_fan_out", True),
    "no casting": lambda m, q: setattr(q, "cast_input_dtype_enabled", False),
    "new A": lambda m, q: setattr(q.lora_A["default"], "weight", new_parameter(q.lora_A["default"].weight)),
    "new A module": lambda m, q: q.lora_A.update({"default": nn.Linear(q.in_features, 2, bias=False)}),
    "A elsewhere": lambda m, q: setattr(q.lora_A["default"].weight, "data", q.lora_A["default"].weight.data.clone()),
    "A of another dtype": lambda m, q: q.lora_A["default"].double(),
    "new base": lambda m, q: setattr(q, "base_layer", copy.deepcopy(q.base_layer)),
    "base without bias gets one": lambda m, q: setattr(q.base_layer, "bias", nn.Parameter(torch.ones(q.out_features))),
    "trained weight": lambda m, q: q.base_layer.weight.requires_grad_(True),
    "weight elsewhere": lambda m, q: setattr(q.base_layer.weight, "data", q.base_layer.weight.data.clone()),
    "parametrized": lambda m, q: nn.utils.parametrize.register_parametrization(
        q.base_layer, "weight", nn.Identity(), unsafe=True
    ),
    "hook on the layer": lambda m, q: q.register_forward_hook(lambda *a: None),
    "hook before the base": lambda m, q: q.base_layer.register_forward_pre_hook(lambda *a: None),
    "hook behind A": lambda m, q: q.lora_A["default"].register_full_backward_hook(lambda *a: None),
    "hook before B's backward": lambda m, q: q.lora_B["default"].register_full_backward_pre_hook(lambda *a: None),
    "forward on the layer": lambda m, q: setattr(q, "forward", q.forward),
    "forward on the base": lambda m, q: setattr(q.base_layer, "forward", q.base_layer.forward),
    "forward on B": lambda m, q: setattr(q.lora_B["default"], "forward", q.lora_B["default"].forward),
    "another class": lambda m, q: set_class(q),
    "DoRA": lambda m, q: q.lora_variant.update({"default": object()}),
    "deleted": lambda m, q: (add(m), m.set_adapter("other"), m.delete_adapter("default")),
    "scaling replaced": lambda m, q: setattr(q, "scaling", {"default": 0.1}),
    "all A replaced": lambda m, q: setattr(q, "lora_A", copy.deepcopy(q.lora_A)),
    "all B replaced": lambda m, q: setattr(q, "lora_B", copy.deepcopy(q.lora_B)),
    "all dropouts replaced": lambda m, q: setattr(q, "lora_dropout", nn.ModuleDict({"default": nn.Dropout(0.5)})),
    "all variants replaced": lambda m, q: setattr(q, "lora_variant", {"default": object()}),
    "hooks replaced, then one set": lambda m, q: (
        setattr(q.base_layer, "_forward_hooks", OrderedDict()),
        q.base_layer.register_forward_hook(lambda *a: None),
    ),
    "children replaced": lambda m, q: setattr(
        q, "_modules", {**q._modules, "base_layer": copy.deepcopy(q.base_layer)}
    ),
    "parameters replaced": lambda m, q: setattr(
        q.base_layer, "_parameters", {**q.base_layer._parameters, "weight": new_parameter(q.base_layer.weight)}
    ),
    "unwrapped": lambda m, q: setattr(m.base_model.model.model.layers[0].self_attn, "q_proj", q.base_layer),
    "moved": lambda m, q: m.double(),
    "eval": lambda m, q: m.eval(),
}


HARMLESS = {"scaling of another adapter"}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_reading_is_seen(change):
    model = patched(config={"lora_dropout": 0.3})
    step(model, BATCH)
    before = [kept for _, kept, _ in kept_and_fresh(model)]
    CHANGES[change](model, target(model))
    after = list(kept_and_fresh(model))
    for block, kept, fresh in after:
        assert kept == fresh, block
    assert ([kept for _, kept, _ in after] == before) == (change in HARMLESS)


@pytest.mark.filterwarnings("ignore:SoRA")
def test_what_changes_a_gated_reading_is_seen():
    model = patched("sora")
    step(model, BATCH)
    gate = target(model).lora_A["default"].gate
    for change in (
        lambda: setattr(gate, "scale", 2.5),
        lambda: setattr(gate, "weight", new_parameter(gate.weight)),
        lambda: setattr(gate.weight, "data", gate.weight.data.clone()),
        lambda: gate.register_forward_hook(lambda *a: None),
    ):
        before = [kept for _, kept, _ in kept_and_fresh(model)]
        change()
        after = list(kept_and_fresh(model))
        assert all(kept == fresh for _, kept, fresh in after)
        assert [kept for _, kept, _ in after] != before


def test_what_changes_an_svd_reading_is_seen():
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules="all-linear")
    model = get_peft_model(tiny_llama(torch.float32), config).train()
    patch_model(model)
    with contextlib.suppress(UserWarning):  # said once a process: no callback allocates ranks
        model(**BATCH)
    model(**BATCH)
    q = target(model)
    for change in (
        lambda: q.ranknum["default"].copy_(torch.tensor([2.0])),
        lambda: q.lora_E.update({"default": new_parameter(q.lora_E["default"])}),
        lambda: q.scaling.update(default=3.0),
        lambda: setattr(q, "scaling", {"default": 2.0}),
        lambda: setattr(q, "lora_E", copy.deepcopy(q.lora_E)),
        lambda: q.ranknum["default"].requires_grad_(True),
    ):
        before = [kept for _, kept, _ in kept_and_fresh(model)]
        with torch.no_grad():
            change()
        after = list(kept_and_fresh(model))
        assert all(kept == fresh for _, kept, fresh in after)
        assert [kept for _, kept, _ in after] != before


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_read_once(method, monkeypatch):
    """As long as nothing changes; optimizer steps and gradients are no change. Plans are made once, too."""
    model = patched(method)
    if method == "sora":
        for module in model.modules():
            if hasattr(module, "runtime"):
                module.runtime.pruned_by_callback = True
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    step(model, BATCH)
    count = []
    for cls in (FastAttention, FastMLP):
        monkeypatch.setattr(cls, "_read", lambda self, *a, read=cls._read: count.append(1) or read(self, *a))
    monkeypatch.setattr("hf_fastpeft.blocks.bundle.make_plan", lambda *a: pytest.fail("planned again"))
    losses = []
    for _ in range(3):
        losses.append(step(model, BATCH)[0])
        optimizer.step()
    assert not count
    assert losses[2] < losses[0]


@pytest.mark.filterwarnings("ignore:SoRA")
@pytest.mark.parametrize("method", METHODS)
def test_kept_plans_multiply_with_what_the_parameters_are_now(method):
    """Stock and patched through writes that leave no trace, autocast on and off, blocks called bare, eval."""
    stock = adapted_llama(method, torch.float32)
    fast = twin(stock)
    patch_model(fast)
    for turn in range(6):
        for model in (stock, fast):
            torch.manual_seed(turn)
            for p in model.parameters():
                if p.requires_grad:
                    p.data.add_(0.05 * torch.randn_like(p))
        with torch.autocast("cpu", torch.bfloat16, enabled=turn == 2):
            (loss, want), (found, got) = step(stock, BATCH), step(fast, BATCH)
        assert rel_err(found, loss) < (3e-2 if turn == 2 else 1e-5)
        for name, gradient in want.items() if turn != 2 else ():  # both round to bfloat16, each in its order
            assert rel_err(got[name], gradient) < 1e-4, (turn, name)
        if turn == 3:  # bare calls of a layer
            x = torch.randn(1, 4, stock.config.hidden_size)
            outs = [m.base_model.model.model.layers[1].mlp(x) for m in (stock, fast)]
            assert rel_err(outs[1], outs[0]) < 1e-5


def test_copies_start_without_readings_and_pickles_hold_none():
    model = patched()
    step(model, BATCH)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.base_model.model))):  # noqa: S301  our own bytes
        assert all(not module._fastpeft.readings for module in layers_of(again))
    assert all(module._fastpeft.readings for module in layers_of(model))


def test_readings_keep_no_memory_alive():
    """What is moved is freed at once, and so is a model that nobody holds, without the garbage collector."""
    model = patched()
    step(model, BATCH)
    weights = [p for name, p in model.named_parameters() if "layers" in name and "norm" not in name]
    places = [StorageWeakRef(p.untyped_storage()) for p in weights]
    gc.disable()
    try:
        assert all(module._fastpeft.readings for module in layers_of(model))
        model.double()
        assert all(place.expired() for place in places)
        step(model, BATCH)
        laid_out = layers_of(model)[0]._fastpeft.readings["attention_in"][2][0]._planned[1].side
        places = [StorageWeakRef(t.untyped_storage()) for t in (*weights, laid_out.A_RI, laid_out.B_OR)]
        del weights, laid_out, model
        assert all(place.expired() for place in places)
    finally:
        gc.enable()


def test_a_weight_that_is_turned_where_it_lies_is_seen():
    """Same memory, other strides."""
    stock = adapted_llama("lora")
    fast = twin(stock)
    patch_model(fast)
    step(fast, BATCH)
    for model in (stock, fast):
        weight = target(model).base_layer.weight
        assert weight.shape[0] == weight.shape[1]
        weight.data = weight.data.t()
    (loss, want), (found, got) = step(stock, BATCH), step(fast, BATCH)
    assert rel_err(found, loss) < FLOAT64_REL
    assert all(rel_err(got[name], gradient) < FLOAT64_REL for name, gradient in want.items())


def test_a_shallow_copy_of_a_module_reads_its_own_children():
    model = patched()
    step(model, BATCH)
    attention = layers_of(model)[0]
    twin_of_it = copy.copy(attention)
    twin_of_it._modules = {**attention._modules, "q_proj": copy.deepcopy(attention.q_proj)}
    for module in (twin_of_it, attention, twin_of_it):
        (stack,) = module._bundles("attention_in")
        assert stack[0].A is module.q_proj.lora_A["default"].weight


def test_weights_that_are_replaced_or_moved_by_hand_are_freed_at_once():
    model = patched()
    step(model, BATCH)
    weights = [p for name, p in model.named_parameters() if "base_layer.weight" in name]
    places = [StorageWeakRef(p.untyped_storage()) for p in weights]
    gc.disable()
    try:
        for p in weights:
            p.data = p.data.clone()
        assert all(place.expired() for place in places)
        step(model, BATCH)
        places = [StorageWeakRef(p.untyped_storage()) for p in weights]
        del weights, p
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        with torch.no_grad():
            model.eval()(**BATCH)
        assert all(place.expired() for place in places)
    finally:
        gc.enable()


@pytest.mark.parametrize("graph", [False, True])
def test_adapters_that_are_new_in_every_forward_leave_nothing_behind(graph):
    model, alive = patched(), []
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(3 * KEPT):
        made = {n: (p if graph else p.detach()) * 1.0 for n, p in trained.items()}
        if not graph:
            made = {n: p.requires_grad_() for n, p in made.items()}
        alive += [weakref.ref(p) for p in made.values()]
        torch.func.functional_call(model, made, kwargs=BATCH).loss.backward()
        del made
    left = sum(ref() is not None for ref in alive)
    assert left <= (0 if graph else KEPT * len(trained))
    assert len(layers_of(model)[0]._fastpeft.adapters._sides) <= (0 if graph else KEPT * 8)


def test_threads_that_overlap_in_a_forward_do_not_stop_training():
    """A sampler beside the trainer: the one that came first leaves first."""
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast)
    first_in, second_in = threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread() is first:
            first_in.set()
            second_in.wait(30)
        elif threading.current_thread() is second:
            second_in.set()
            first.join(30)

    def sample():
        with torch.no_grad():
            fast(input_ids=BATCH["input_ids"])

    first, second = threading.Thread(target=sample), threading.Thread(target=sample)
    hook = fast.base_model.model.model.layers[0].register_forward_pre_hook(wait)
    first.start()
    first_in.wait(30)
    second.start()
    first.join(60)
    second.join(60)
    hook.remove()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5) for m in (stock, fast)]
    for _ in range(3):
        losses = [step(model, BATCH)[0] for model in (stock, fast)]
        assert rel_err(losses[1], losses[0]) < 1e-5
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("others", range(KEPT - 2, KEPT + 4))
def test_trained_biases_and_adapters_after_forwards_that_ran_stock(others):
    """Copies that nobody asked for are dropped after a while: each alone, not one under the other's hands."""
    stock = adapted_llama("lora", attention_bias=True, mlp_bias=True, config={"bias": "all", "lora_bias": False})
    fast = twin(stock)
    patch_model(fast)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5) for m in (stock, fast)]
    for i in range(6):
        (loss, want), (found, got) = step(stock, BATCH), step(fast, BATCH)
        assert rel_err(found, loss) < FLOAT64_REL
        assert all(rel_err(got[name], gradient) < FLOAT64_REL for name, gradient in want.items())
        for optimizer in optimizers:
            optimizer.step()
        fast.eval()
        for _ in range(others if i % 2 else 0):  # the first step lays copies out, the second writes them together
            with torch.no_grad():
                fast(input_ids=BATCH["input_ids"][:, :3])
        fast.train()


@pytest.mark.parametrize("method", ["lora", "sora"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
@pytest.mark.filterwarnings("ignore:SoRA")
def test_autocast_may_change_from_one_half_to_the_other(method, dtypes):
    model = adapted_llama(method, torch.float32)
    exact, _ = step(model, BATCH)
    patch_model(model)
    for dtype in (*dtypes, *dtypes, dtypes[1], dtypes[1]):
        with torch.autocast("cpu", dtype):
            loss, _ = step(model, BATCH)
        assert rel_err(loss, exact) < 3e-2


def test_float64_stays_exact_over_many_calls():
    stock = adapted_llama("lora")
    fast = twin(stock)
    patch_model(fast)
    for _ in range(3):
        (loss, want), (found, got) = step(stock, BATCH), step(fast, BATCH)
        assert rel_err(found, loss) < FLOAT64_REL
        assert all(rel_err(got[name], gradient) < FLOAT64_REL for name, gradient in want.items())
