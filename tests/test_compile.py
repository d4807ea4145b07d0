"""torch.compile of patched models: the blocks run as operators, exactly, and what changes later is seen."""

from collections import Counter

import pytest
import torch
from adapters import METHODS, adapted_llama, step, token_batch, twin
from numerics import FLOAT64_REL, assert_no_worse, rel_err
from peft import get_peft_model
from test_families import adapted, batch_of, norms_in_float64, tiny
from torch._dynamo.backends.debugging import aot_eager

from hf_fastpeft import patch_model

BATCH = token_batch()
LAYERS = 2
BLOCKS = ("attention_in_forward", "attention_out_forward", "mlp_forward")
pytestmark = [
    pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned"),
]


class Graphs(list):
    """A backend that keeps what was traced."""

    def __init__(self, backend=aot_eager):
        super().__init__()
        self.backend = backend
        torch._dynamo.reset()

    def __call__(self, module, inputs):
        self.append(module)
        return self.backend(module, inputs)

    def operators(self):
        """Our operators in all graphs, by name."""
        found = Counter(
            node.target._opname
            for graph in self
            for part in graph.modules()
            if isinstance(part, torch.fx.GraphModule)
            for node in part.graph.nodes
            if getattr(node.target, "namespace", None) == "hf_fastpeft"
        )
        return {name: found[name] for name in (*BLOCKS, "norm_forward") if found[name]}


def compiled(model, backend=aot_eager, fullgraph=True, **options):
    graphs = Graphs(backend)
    return torch.compile(model, backend=graphs, fullgraph=fullgraph, **options), graphs


def compiled_step(compiled, model, batch):
    """As ``step``, through ``compiled``; names are those of ``model``."""
    model.zero_grad()
    loss = compiled(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(got, want, tol=FLOAT64_REL):
    assert rel_err(got[0], want[0]) < tol
    assert got[1].keys() == want[1].keys()
    for name in want[1]:
        assert rel_err(got[1][name], want[1][name]) < tol, name


def all_fused(norms=0):
    return {**dict.fromkeys(BLOCKS, LAYERS), **({"norm_forward": norms} if norms else {})}


@pytest.mark.parametrize("method", ["lora", "sora"])
def test_a_peft_model_compiles_whole(method):
    stock = adapted_llama(method)
    fast = twin(stock)
    patched = patch_model(fast)
    run, graphs = compiled(fast)
    for seed in range(3):
        batch = token_batch(seed=seed)
        got = compiled_step(run, fast, batch)
        assert_equal_steps(got, step(stock, batch))
        with norms_in_float64(fast):
            pass
    assert len(graphs) == 1
    assert graphs.operators() == all_fused()
    assert patched.to_json()["blocks"]["mlp"]["calls_fused"] == 2  # once each: as they were traced


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_each_kind_of_family_with_its_norms(family):
    stock = adapted(family, torch.float64)
    fast = twin(stock)
    patch_model(fast)
    batch = batch_of(family)
    with norms_in_float64(fast):
        run, graphs = compiled(fast)
        got = compiled_step(run, fast, batch)
        assert_equal_steps(got, step(fast, batch))
        assert_equal_steps(got, step(stock, batch))
    assert graphs.operators() == all_fused({"llama": 1, "qwen3": 1, "gemma2": 1 + 2 * LAYERS}[family])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_causal_model_without_adapter_trains_all(family):
    stock = tiny(family, torch.float64).train()
    fast = twin(stock)
    patch_model(fast)
    batch = batch_of(family)
    with norms_in_float64(fast):
        run, graphs = compiled(fast)
        assert_equal_steps(compiled_step(run, fast, batch), step(stock, batch))
    assert graphs.operators()["mlp_forward"] == LAYERS


@pytest.mark.parametrize("method", ["lora", "sora"])
def test_float32_is_no_worse_than_stock(method):
    stock = adapted_llama(method, torch.float32)
    exact, fast = twin(stock).double(), twin(stock)
    patch_model(fast)
    run, graphs = compiled(fast)
    got, base, want = compiled_step(run, fast, BATCH), step(stock, BATCH), step(exact, BATCH)
    assert graphs.operators() == all_fused(norms=1)
    assert_no_worse("loss", got[0], base[0], want[0])
    for name in want[1]:
        assert_no_worse(name, got[1][name], base[1][name], want[1][name])
