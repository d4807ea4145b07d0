"""What a gate costs in a fused step, in operators a layer: LoRA's and a few over matrices of an adapter's size."""

from collections import Counter

import pytest
from adapters import token_batch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tiny import tiny_llama

from benchmarks.trace import LaunchCounter
from hf_fastpeft import AdaLoraCallback, AdaptiveLoraConfig, SoraConfig, patch_model, patched, watch
from hf_fastpeft.tuners.adalora import reader

pytestmark = [
    # PEFT 0.21 reads the old name of a property of transformers 5.23 (peft_model.py, PeftModel.__init__).
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*(gates are not being pruned|ranks are not being allocated):UserWarning"),
]

METHODS = {
    "LoRA": lambda **kw: LoraConfig(r=4, **kw),
    "SoRA": lambda **kw: SoraConfig(r=4, **kw),
    "AdaLoRA": lambda **kw: AdaLoraConfig(init_r=4, target_r=2, total_step=100, **kw),
    "adaptive LoRA": lambda **kw: AdaptiveLoraConfig(init_r=4, target_r=2, **kw),
}


def launches(method, layers):
    """Operators of the second step that would start a kernel; the first lays things out."""
    config = METHODS[method](target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(num_hidden_layers=layers), config).train()
    callback, state = AdaLoraCallback(), type("State", (), {"global_step": 0, "max_steps": 100})()
    if "Ada" in type(config).__name__:  # PEFT's own loss has an orthogonality term without the callback
        callback.on_init_end(None, state, None, model=model)
        callback.on_train_begin(type("Args", (), {"deepspeed": None})(), state, None, model=model)
    handle = patched(patch_model(model, impl="torch"))
    batch = token_batch()
    for _ in range(2):  # copies are made in the first forward and put in line in the second
        model(**batch).loss.backward()
    model.zero_grad()
    with LaunchCounter() as counter:
        model(**batch).loss.backward()
    assert not any(row["calls_stock"] for row in handle.to_json()["blocks"].values())
    return counter.phases["forward"].operators


def per_layer(method):
    return launches(method, 4) - launches(method, 3)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "LoRA"])
def test_a_gate_costs_two_operators_a_stack(method, monkeypatch):
    """The gate's gradient and A's factor, in each of four stacks; the A's of q, k, v and of gate, up are put together.

    Nothing in the forward: gates are folded into A once for the whole model.
    """
    for module in (reader, watch):  # on a CPU the number of ranks is read anew every time
        monkeypatch.setattr(module, "waits", lambda tensor: True)
    more = Counter({"aten.baddbmm_": 4, "aten.mul_": 4, "aten.cat": 2})
    assert per_layer(method) == per_layer("LoRA") + more
