"""torch.compile of patched models: the blocks run as operators, exactly, and what changes later is seen."""

from collections import Counter

import pytest
import torch
from adapters import METHODS, adapted_llama, step, token_batch, twin
from numerics import FLOAT64_REL, assert_no_worse, rel_err
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from test_families import adapted, batch_of, norms_in_float64, tiny
from test_head import losses, run_trainer
from tiny import tiny_llama
from torch._dynamo.backends.debugging import aot_eager
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fastpeft import patch_model, patched

BATCH = token_batch()
LAYERS = 2
BLOCKS = ("attention_in_forward", "attention_out_forward", "mlp_forward")
pytestmark = [
    pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned"),
    # dynamo looks at the gradient of each tensor that enters a graph, and hides its own warning of it (torch 2.13)
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
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
    handle = patched(patch_model(fast))
    run, graphs = compiled(fast)
    for seed in range(3):
        batch = token_batch(seed=seed)
        got = compiled_step(run, fast, batch)
        assert_equal_steps(got, step(stock, batch))
    assert len(graphs) == 1
    assert graphs.operators() == all_fused()
    assert handle.to_json()["blocks"]["mlp"]["calls_fused"] == 2  # once each: as they were traced


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


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen3", "gemma2"))]
)
def test_a_causal_model_without_adapter_trains_all(family):
    stock = tiny(family, torch.float64).train()
    fast = twin(stock)
    patch_model(fast)
    batch = batch_of(family)
    with norms_in_float64(fast):
        run, graphs = compiled(fast)
        assert_equal_steps(compiled_step(run, fast, batch), step(stock, batch))
    assert graphs.operators()["mlp_forward"] == LAYERS


def by_kind(gradients):
    """All gradients of one kind as one vector: the rounding errors of a gate's few numbers do not average."""
    kinds = {}
    for name, gradient in gradients.items():
        kinds.setdefault(name.split("_proj.")[-1], []).append(gradient.flatten())
    return {kind: torch.cat(found) for kind, found in kinds.items()}


@pytest.mark.parametrize("method", ["lora", "sora"])
def test_float32_is_no_worse_than_stock(method):
    stock = adapted_llama(method, torch.float32)
    exact, fast = twin(stock).double(), twin(stock)
    patch_model(fast)
    run, graphs = compiled(fast)
    got, base, want = compiled_step(run, fast, BATCH), step(stock, BATCH), step(exact, BATCH)
    assert graphs.operators() == all_fused(norms=1)
    assert_no_worse("loss", got[0], base[0], want[0])
    kinds = [by_kind(found[1]) for found in (got, base, want)]
    assert len(kinds[2]) == {"lora": 2, "sora": 3}[method]
    for kind in kinds[2]:
        assert_no_worse(kind, *(found[kind] for found in kinds))


@pytest.mark.parametrize("adapter_float32", [False, True])
def test_autocast_and_wider_adapters(adapter_float32):
    stock = adapted_llama("lora", torch.bfloat16 if adapter_float32 else torch.float32, adapter_float32)
    exact, fast = twin(stock).double(), twin(stock)
    patch_model(fast)
    run, graphs = compiled(fast)
    want = step(exact, BATCH)
    with torch.autocast("cpu", torch.bfloat16, enabled=not adapter_float32):
        got, base = compiled_step(run, fast, BATCH), step(stock, BATCH)
    assert graphs.operators() == all_fused(norms=1)
    kinds = [by_kind(found[1]) for found in (got, base, want)]
    for kind in kinds[2]:
        assert_no_worse(kind, *(found[kind] for found in kinds))


def test_what_changes_after_compilation_is_seen():
    """Each is traced again; nothing of what was compiled before is used for it."""
    stock = adapted_llama("lora", num_hidden_layers=1)
    stock.add_adapter("other", METHODS["lora"](target_modules=["q_proj", "down_proj"], lora_dropout=0.0))
    for name, parameter in stock.named_parameters():
        if "lora_B.other" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    fast = twin(stock)
    handle = patched(patch_model(fast))
    run, graphs = compiled(fast, backend=lambda module, inputs: module)
    torch._dynamo.config.recompile_limit, before = 64, torch._dynamo.config.recompile_limit
    seen = []

    def check(block="mlp"):
        got, want = compiled_step(run, fast, BATCH), step(stock, BATCH)
        assert_equal_steps(got, want)
        seen.append(want[0].item())
        return handle.to_json()["blocks"][block]

    def both(change):
        change(stock)
        change(fast)

    def scale(model):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= 3

    try:
        check()
        both(lambda model: model.set_adapter("other"))
        check()
        both(lambda model: model.set_adapter("default"))
        check()
        both(scale)
        check()
        with stock.disable_adapter(), fast.disable_adapter():
            want = stock(**BATCH).loss
            assert rel_err(run(**BATCH).loss, want) < FLOAT64_REL
            seen.append(want.item())
        check()
        assert not handle.to_json()["blocks"]["mlp"]["calls_stock"]
        both(lambda model: model.merge_adapter())
        with torch.enable_grad():
            want = stock(**BATCH).loss
            assert rel_err(run(**BATCH).loss, want) < FLOAT64_REL
        assert "gate_proj: adapter merged" in handle.to_json()["blocks"]["mlp"]["calls_stock"]
        both(lambda model: model.unmerge_adapter())
        check()
        both(lambda model: model.delete_adapter("other"))
        check()
        both(lambda model: model.get_base_model().model.layers[0].mlp.down_proj.weight.requires_grad_(True))
        check()
        both(lambda model: model.eval())
        check()
        fast.train()
        stock.train()
        handle.restore()
        check_graphs = len(graphs)
        assert_equal_steps(compiled_step(run, fast, BATCH), step(stock, BATCH))
        assert len(graphs) == check_graphs + 1
    finally:
        torch._dynamo.config.recompile_limit = before
    assert len(set(seen)) > 3  # the changes did change something


def test_optimizer_steps_compile_nothing_anew():
    """With weights that move, other batches of one shape, and gradients that accumulate."""
    stock = adapted_llama("sora")
    fast = twin(stock)
    patch_model(fast)
    run, graphs = compiled(fast)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (stock, fast)]
    for seed in range(4):
        batch = token_batch(seed=seed)
        want, got = stock(**batch).loss, run(**batch).loss
        assert rel_err(got, want) < FLOAT64_REL
        want.backward()
        got.backward()
        if seed % 2:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert len(graphs) == 1
    weights = dict(fast.named_parameters())
    for name, parameter in stock.named_parameters():
        assert rel_err(weights[name], parameter) < FLOAT64_REL


def test_other_lengths_compile_once_more_and_for_all():
    stock = adapted_llama("lora", num_hidden_layers=1)
    fast = twin(stock)
    patch_model(fast)
    run, graphs = compiled(fast)
    for seq_len in (17, 11, 23, 9):
        batch = token_batch(seq_len=seq_len)
        assert_equal_steps(compiled_step(run, fast, batch), step(stock, batch))
    assert len(graphs) == 2  # the second for any length
    assert graphs.operators() == dict.fromkeys(BLOCKS, 2)


def test_single_layers_compile_inside_an_eager_model():
    """The model around them keeps its fused head, and its routing leaves such layers alone."""
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    handle = patched(patch_model(fast))
    graphs = Graphs()
    for layer in fast.get_base_model().model.layers:
        layer.compile(backend=graphs, fullgraph=True)
    for seed in range(3):
        batch = token_batch(seed=seed)
        assert_equal_steps(step(fast, batch), step(stock, batch), tol=1e-5)
    assert graphs.operators() == dict.fromkeys(BLOCKS, len(graphs))
    data = handle.to_json()
    assert data["blocks"]["lm_head"]["calls_fused"] == 3
    assert data["routing"]["obstacle"] == "LlamaDecoderLayer is compiled"


@pytest.mark.parametrize(
    ("whole", "reentrant"),
    [(False, False), (False, True), (True, False), pytest.param(True, True, marks=pytest.mark.slow)],
)
def test_checkpointing(whole, reentrant):
    """A reentrant checkpoint breaks the graph around each layer, as in stock."""
    stock = adapted_llama("lora")
    fast = twin(stock)
    patch_model(fast)
    for model in (stock, fast):
        if reentrant:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if whole and not reentrant:  # the hook's requires_grad_ cannot be in a graph (torch 2.13)
            model.get_base_model().disable_input_require_grads()
    if whole:
        run, graphs = compiled(fast, fullgraph=not reentrant)
    else:
        run, graphs = fast, Graphs()
        for layer in fast.get_base_model().model.layers:
            layer.compile(backend=graphs)
    for seed in range(2):
        batch = {**token_batch(seed=seed), "use_cache": False}  # what transformers logs otherwise breaks the graph
        assert_equal_steps(compiled_step(run, fast, batch), step(stock, batch))
    assert set(graphs.operators()) == set(BLOCKS)


def test_dropout_runs_stock_and_is_reported():
    model = adapted_llama("lora", torch.float32, config={"lora_dropout": 0.5}, num_hidden_layers=1)
    handle = patched(patch_model(model))
    run, graphs = compiled(model)
    for _ in range(2):
        run(**BATCH).loss.backward()
    row = handle.to_json()["blocks"]["mlp"]
    assert (row["calls_fused"], row["calls_stock"]) == (0, {"dropout inside torch.compile": 1})  # traced once
    model.eval()
    run(**BATCH).loss.backward()
    assert graphs[1:]
    assert handle.to_json()["blocks"]["mlp"]["calls_fused"] == 1


@pytest.mark.filterwarnings("ignore:AdaLoRA. ranks are not being allocated")
def test_adalora_runs_stock_and_is_reported():
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["down_proj"])
    stock = get_peft_model(tiny_llama(torch.float32, num_hidden_layers=1), config).train()
    fast = twin(stock)
    handle = patched(patch_model(fast))
    run, graphs = compiled(fast.get_base_model(), backend=lambda module, inputs: module)
    torch.testing.assert_close(run(**BATCH).loss, stock.get_base_model()(**BATCH).loss)
    assert handle.to_json()["blocks"]["mlp"]["calls_stock"] == {"down_proj: AdaLoRA inside torch.compile": 1}
    assert set(graphs.operators()) == {"attention_in_forward", "attention_out_forward", "norm_forward"}


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.usefixtures("fresh_dynamo")
def test_trainer_compiles(patch, tmp_path):
    """Trainer wraps the model in torch.compile; Trainer's own losses are the reference."""
    want = run_trainer(tmp_path, patch=False, max_steps=2)
    got = run_trainer(tmp_path, patch=patch, max_steps=2, torch_compile=True, torch_compile_backend="aot_eager")
    assert losses(got) == pytest.approx(losses(want), rel=1e-5)
    if patch:
        assert got.model.get_base_model().model.layers[0].mlp._fastpeft.fused["mlp"] >= 1


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operator_calls(method, family="llama"):
    """The arguments of each of our operators in one step of a tiny compiled model, in float64."""
    calls = {}

    class Forward(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if getattr(target, "namespace", None) == "hf_fastpeft":
                calls.setdefault(target, args)
            return super().call_function(target, args, kwargs)

    class Backward(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "hf_fastpeft":
                calls.setdefault(func, args)
            return func(*args, **(kwargs or {}))

    overrides = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1}
    model = adapted(family, torch.float64) if method is None else adapted_llama(method, **overrides)
    patch_model(model)
    with norms_in_float64(model):
        run, _ = compiled(model, backend=lambda module, inputs: Forward(module).run)
        loss = run(**batch_of(family)).loss
        with Backward():
            loss.backward()
    return calls


@pytest.mark.parametrize(("method", "family"), [("sora", "llama"), (None, "qwen3"), (None, "gemma2")])
def test_operators_keep_torchs_contract(method, family):
    """Schema, purity, results without memory, autograd and tracing with any shape, as torch itself checks them."""
    calls = operator_calls(method, family)
    assert {func._opname for func in calls} == {
        f"{block}_{way}"
        for block in ("attention_in", "attention_out", "mlp", "norm")
        for way in ("forward", "backward")
    }
    for func, args in calls.items():
        differentiable = func._opname.endswith("_forward")
        inputs = [
            t.detach().clone().requires_grad_(t.requires_grad and differentiable) if isinstance(t, torch.Tensor) else t
            for t in pytree.tree_leaves(args)
        ]
        torch.library.opcheck(func, pytree.tree_unflatten(inputs, pytree.tree_structure(args)))


def test_second_derivatives_are_refused():
    model = adapted_llama("lora", num_hidden_layers=1)
    patch_model(model)
    run, _ = compiled(model, backend=lambda module, inputs: module)
    (first,) = torch.autograd.grad(run(**BATCH).loss, [lora_B(model)], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*hf_fastpeft.restore\(model\)"):
        first.sum().backward()


def lora_B(model):
    return next(p for n, p in model.named_parameters() if "down_proj.lora_B" in n)


def test_an_exported_model_is_stocks():
    model = adapted_llama("lora", torch.float32).get_base_model()
    handle = patched(patch_model(model))
    program = torch.export.export(model, (), {"input_ids": BATCH["input_ids"], "use_cache": False}, strict=False)
    assert not [node for node in program.graph.nodes if getattr(node.target, "namespace", None) == "hf_fastpeft"]
    assert handle.to_json()["blocks"]["mlp"]["calls_fused"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor():
    stock = adapted_llama("lora", torch.float32, num_hidden_layers=1)
    exact, fast = twin(stock).double(), twin(stock)
    patch_model(fast)
    run = torch.compile(fast, fullgraph=True)
    got, base, want = compiled_step(run, fast, BATCH), step(stock, BATCH), step(exact, BATCH)
    kinds = [by_kind(found[1]) for found in (got, base, want)]
    for kind in kinds[2]:
        assert_no_worse(kind, *(found[kind] for found in kinds))
