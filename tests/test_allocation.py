"""Ranks from gradients: the formula against full autograd, the budget, the memory bound, what is restored."""

import copy
import itertools
import json
import math
import re
import weakref

import pytest
import torch
from adapters import adapted_llama, token_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FLOAT64_REL
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from hf_fastpeft import allocate_ranks, patch_model
from hf_fastpeft.allocation import measure_importance
from hf_fastpeft.errors import AdapterError, DataError
from hf_fastpeft.rank_budget import ranks_under_budget

BATCHES = [token_batch(seed=seed) for seed in range(3)]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def by_autograd(model, batches, names=PROJECTIONS):
    """The formula, from gradients of everything: path -> mean |W * G| over steps and elements."""
    model = copy.deepcopy(model).eval()  # no dropout; SoRA warns in training without its callback
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    found = {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for path, module in model.named_modules():
            bare = path.removeprefix("base_model.model.").removesuffix(".base_layer")
            weight = module._parameters.get("weight")  # an adapter layer only shows its base layer's
            if bare.rpartition(".")[2] in names and weight is not None:
                found[bare] = found.get(bare, 0) + (weight * weight.grad).abs().mean().item() / len(batches)
    return found


def assert_same(got, want, rel=FLOAT64_REL):
    assert got.keys() == want.keys()
    for path in want:
        assert got[path] == pytest.approx(want[path], rel=rel), path


def ranks_in(model):
    """What PEFT made of a configuration: path -> (rank, scaling)."""
    return {
        path: (module.r["default"], module.scaling["default"])
        for path, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("kind", ["plain", "peft", "sora", "patched", "patched peft", "checkpointed"])
def test_importance_is_the_formula_of_full_autograd(kind):
    model = tiny_llama(torch.float64) if kind in ("plain", "patched", "checkpointed") else None
    model = model or adapted_llama("sora" if kind == "sora" else "lora")
    want = by_autograd(model, BATCHES)
    if kind.startswith("patched"):
        patch_model(model)
    if kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(measure_importance(model, BATCHES, n_steps=3), want)


def test_a_gpt2_convolution_is_a_linear():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=64)
    model = GPT2LMHeadModel(config).double().eval()
    names = ("c_attn", "c_proj", "c_fc")
    assert_same(measure_importance(model, BATCHES, n_steps=3), by_autograd(model, BATCHES, names))
    config = allocate_ranks(model, BATCHES, mean_rank=4, n_steps=1, fan_in_fan_out=True)
    assert len(ranks_in(get_peft_model(model, config))) == 4


def test_blocks_of_rows_add_up(monkeypatch):
    model = tiny_llama(torch.float64)
    want = by_autograd(model, BATCHES)
    monkeypatch.setattr("hf_fastpeft.allocation._BLOCK_ELEMENTS", 5 * 32)
    assert_same(measure_importance(model, BATCHES, n_steps=3), want)


def test_a_shared_weight_is_scored_once_with_its_whole_gradient():
    model = tiny_llama(torch.float64)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    got = measure_importance(model, BATCHES, n_steps=3)
    assert_same(got, by_autograd(model, BATCHES))
    assert got["model.layers.0.mlp.up_proj"] == got["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_scored_dequantised(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft.utils.integrations import dequantize_module_weight

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantisation = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    cls = type(tiny_llama())
    model = cls.from_pretrained(tmp_path, quantization_config=quantisation, dtype=torch.float32)
    plain = cls.from_pretrained(tmp_path, dtype=torch.float32)
    got = measure_importance(model, BATCHES, n_steps=3)
    again = measure_importance(model, BATCHES, n_steps=3)  # and nothing of the model was changed
    assert got == again
    config = allocate_ranks(model, BATCHES, mean_rank=4, n_steps=2)
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in PROJECTIONS:
            plain.get_submodule(path).weight.data = dequantize_module_weight(module).detach().float().clone()
    # the int8 product also rounds its inputs: bitsandbytes' own error, not ours
    assert_same(got, by_autograd(plain.eval(), BATCHES), rel=1e-3 if bits == 4 else 0.1)
    model = cls.from_pretrained(tmp_path, quantization_config=quantisation, dtype=torch.float32)
    assert sum(config.rank_pattern.values()) == sum(r for r, _ in ranks_in(get_peft_model(model, config)).values())


limits = st.tuples(st.integers(0, 4), st.integers(0, 12)).map(lambda t: (t[0], t[0] + t[1] + (t[1] + t[0] == 0)))
sizes = st.sampled_from([2, 3, 7, 8, 16, 24, 64])


@settings(max_examples=200, deadline=None)
@given(
    modules=st.lists(
        st.tuples(sizes, sizes, st.floats(0, 1e6, allow_subnormal=False) | st.just(1.0)), min_size=1, max_size=7
    ),
    limits=limits,
    fraction=st.floats(0, 1),
)
def test_budget_is_never_exceeded_and_filled_as_far_as_rounding_can(modules, limits, fraction):
    low, high = limits
    shapes = {str(i): (a, b) for i, (a, b, _) in enumerate(modules)}
    importance = {str(i): value for i, (_, _, value) in enumerate(modules)}
    cost = {path: sum(shape) for path, shape in shapes.items()}
    cap = {path: min(high, *shape) for path, shape in shapes.items()}
    floor = {path: min(low, *shape) for path, shape in shapes.items()}
    least, most = (sum(limit[path] * cost[path] for path in shapes) for limit in (floor, cap))
    budget = least + int(fraction * (most - least))
    ranks = ranks_under_budget(importance, shapes, budget=budget, min_rank=low, max_rank=high)
    spent = sum(ranks[path] * cost[path] for path in shapes)
    assert spent <= budget
    assert all(floor[path] <= ranks[path] <= cap[path] for path in shapes)
    for a, b in itertools.permutations(shapes, 2):  # more important, same shape: never less, but for rounding
        if importance[a] >= importance[b] and shapes[a] == shapes[b]:
            assert ranks[a] >= ranks[b] - 1
    # nothing rounded down fits any more: a module can only be below its cap by a share it does not have
    live = [path for path in shapes if importance[path] > 0]
    if all(ranks[path] == cap[path] for path in live):
        return
    assert budget - spent < max(cost[path] for path in live)


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(0.1, 10), min_size=1, max_size=6), data=st.data())
def test_rounding_fills_the_budget_best(values, data):
    """Against all ways of rounding shares up or down, the shares from a plain bisection."""
    shapes = {str(i): (data.draw(sizes), data.draw(sizes)) for i in range(len(values))}
    importance = dict(zip(shapes, values, strict=True))
    cost = {path: sum(shape) for path, shape in shapes.items()}
    budget = data.draw(st.integers(sum(cost.values()), 2 * sum(cost.values())))
    weight = {path: importance[path] / math.sqrt(cost[path]) for path in shapes}

    def shares(t):
        return {path: min(max(t * weight[path], 1), min(64, *shapes[path])) for path in shapes}

    lower, upper = 0.0, 1e6
    for _ in range(200):
        middle = (lower + upper) / 2
        fits = sum(share * cost[path] for path, share in shares(middle).items()) <= budget
        lower, upper = (middle, upper) if fits else (lower, middle)
    ideal = shares(lower)
    options = [{math.floor(share + 1e-7), math.ceil(share - 1e-7)} for share in ideal.values()]
    best = max(
        total
        for ranks in itertools.product(*options)
        if (total := sum(r * c for r, c in zip(ranks, cost.values(), strict=True))) <= budget
    )
    got = ranks_under_budget(importance, shapes, budget=budget, min_rank=1, max_rank=64)
    assert sum(got[path] * cost[path] for path in shapes) == best
    assert all(abs(got[path] - ideal[path]) < 1 + 1e-6 for path in shapes)


def test_many_modules_are_rounded_in_a_window():
    generator = torch.Generator().manual_seed(0)
    shapes = {str(i): ((4096, 4096), (4096, 1024), (4096, 11008))[i % 3] for i in range(448)}
    importance = dict(zip(shapes, torch.rand(448, generator=generator).exp().tolist(), strict=True))
    budget = 8 * sum(map(sum, shapes.values())) + 1000  # not a multiple of anything
    ranks = ranks_under_budget(importance, shapes, budget=budget, min_rank=4, max_rank=32)
    spent = sum(ranks[path] * sum(shapes[path]) for path in shapes)
    assert 0 <= budget - spent < 1024  # every cost is a multiple of 256, and 1000 = 3 * 256 + 232


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"scaling": 1.5}])
def test_peft_gives_each_module_its_rank_and_all_the_same_scaling(options):
    model = tiny_llama(torch.float64)
    config = allocate_ranks(model, BATCHES, mean_rank=4, n_steps=3, **options)
    assert type(config) is LoraConfig
    want = {re.sub(r"\\(.)", r"\1", key[1:]): rank for key, rank in config.rank_pattern.items()}
    assert set(want) == set(measure_importance(model, BATCHES, n_steps=1))
    assert len(set(want.values())) > 2
    costs = {path: sum(model.get_submodule(path).weight.shape) for path in want}
    assert 0 <= 4 * sum(costs.values()) - sum(want[p] * costs[p] for p in want) < min(costs.values())
    peft_model = get_peft_model(model, config)
    made = ranks_in(peft_model)
    assert {path: r for path, (r, _) in made.items()} == want
    assert all(s == pytest.approx(options.get("scaling", 1.0)) for _, s in made.values())
    # what a server computes that reads one alpha and r
    assert config.lora_alpha / config.r ** (0.5 if config.use_rslora else 1) == pytest.approx(
        options.get("scaling", 1)
    )
    adapter = [p for n, p in peft_model.named_parameters() if p.requires_grad]
    assert sum(p.numel() for p in adapter) == sum(want[p] * costs[p] for p in want)


def test_one_alpha_for_all_modules_on_request():
    model = tiny_llama()
    config = allocate_ranks(model, BATCHES, mean_rank=4, n_steps=1, lora_alpha=16, use_rslora=True)
    assert config.alpha_pattern == {}
    for rank, scaling in ranks_in(get_peft_model(model, config)).values():
        assert scaling == pytest.approx(16 / math.sqrt(rank))


def test_saved_and_loaded_again(tmp_path):
    model = tiny_llama()
    config = allocate_ranks(model, BATCHES, mean_rank=4, n_steps=1)
    peft_model = get_peft_model(model, config)
    want = ranks_in(peft_model)
    peft_model.save_pretrained(tmp_path)
    json.loads((tmp_path / "adapter_config.json").read_text())
    assert ranks_in(PeftModel.from_pretrained(tiny_llama(), tmp_path)) == want


class Nested(nn.Module):
    """Paths that end with other paths: ``tower.body.0.up`` and ``body.0.up``, with a name that a regex misreads."""

    def __init__(self, width=8):
        super().__init__()
        self.tower = nn.ModuleDict({"body": nn.ModuleList([nn.ModuleDict({"u+p": nn.Linear(width, width)})])})
        self.body = nn.ModuleList([nn.ModuleDict({"u+p": nn.Linear(width, width)})])
        self.score = nn.Linear(width, 2)

    def forward(self, x):
        return self.score(self.tower["body"][0]["u+p"](x).tanh() + 3 * self.body[0]["u+p"](x))


def nested_loss(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("target", ["all-linear", r"body\.0\.u\+p", ["body.0.u+p"]])
def test_keys_match_exactly_one_module(target):
    torch.manual_seed(0)
    model = Nested()
    batches = [torch.randn(4, 8) for _ in range(2)]
    options = {"n_steps": 2, "loss_fn": nested_loss, "target_modules": target, "min_rank": 1, "max_rank": 8}
    if isinstance(target, list):
        options["exclude_modules"] = ["tower.body.0.u+p"]
    config = allocate_ranks(model, batches, mean_rank=3, **options)
    paths = {"body.0.u+p"} if target != "all-linear" else {"body.0.u+p", "tower.body.0.u+p"}
    assert set(config.target_modules) == paths
    made = ranks_in(get_peft_model(model, config))
    assert made.keys() == paths
    assert {config.rank_pattern["^" + re.escape(path)] for path in paths} == {r for r, _ in made.values()}


def test_unimportant_modules_can_be_left_out():
    model = tiny_llama(torch.float64)
    config = allocate_ranks(model, BATCHES, mean_rank=0.5, n_steps=2, min_rank=0, max_rank=4)
    importance = measure_importance(model, BATCHES, n_steps=2)
    assert 0 < len(config.target_modules) < len(importance)
    made = ranks_in(get_peft_model(model, config))
    assert made.keys() == set(config.target_modules)
    assert max(importance, key=importance.get) in made


def test_classification_head_is_left_out_and_dropout_is_off():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=128)).double().train()
    batch = {"input_ids": torch.randint(3, 120, (3, 9)), "labels": torch.tensor([0, 1, 1])}
    importance = measure_importance(model, [batch], n_steps=1)
    assert not any("classifier" in path for path in importance)
    want = by_autograd(model.eval(), [batch], ("query", "key", "value", "dense"))
    assert_same(importance, want)


def test_result_is_deterministic_and_a_state_is_left_as_it_was():
    model = adapted_llama("lora", config={"lora_dropout": 0.1})
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    lora = next(p for n, p in model.named_parameters() if "lora_B" in n)
    weight.grad, lora.grad = torch.ones_like(weight), torch.ones_like(lora)
    model.get_base_model().model.layers[1].eval()
    before = snapshot(model)
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None, shuffle=True)
    first = allocate_ranks(model, loader, mean_rank=4, n_steps=3)
    after = snapshot(model)
    assert same(before, after)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(lora.grad, torch.ones_like(lora))
    torch.manual_seed(99)
    second = allocate_ranks(model, loader, mean_rank=4, n_steps=3)
    assert first.to_dict() == second.to_dict()


def same(before, after):
    """Whether two snapshots are equal."""
    return torch.equal(before[0], after[0]) and before[1:] == after[1:]


def snapshot(model):
    return [
        torch.get_rng_state(),
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
        [p.grad is None or id(p.grad) for p in model.parameters()],
        [len(m._forward_hooks) for m in model.modules()],
        [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        [type(m) for m in model.modules()],
    ]


def test_processes_agree_on_the_mean(monkeypatch):
    """With torch.distributed every process gets the same importance; here the other one saw all-zero gradients."""
    model = tiny_llama(torch.float64)
    alone = measure_importance(model, BATCHES, n_steps=2)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert measure_importance(model, BATCHES, n_steps=2) == alone
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        assert_same(measure_importance(model, BATCHES, n_steps=2), {path: v / 2 for path, v in alone.items()})
    finally:
        torch.distributed.destroy_process_group()


def test_state_is_left_as_it_was_after_an_error():
    model = adapted_llama()
    patch_model(model)
    before = snapshot(model)

    def broken(model, batch):
        loss = model(**batch).loss
        loss.backward()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        allocate_ranks(model, BATCHES, mean_rank=4, n_steps=2, loss_fn=broken)
    after = snapshot(model)
    assert same(before, after)


class AliveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive; the peak of it."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.alive:
                    key, size = storage._cdata, storage.nbytes()
                    self.now += size
                    self.alive[key] = weakref.finalize(storage, self.drop, key, size)
        self.peak = max(self.peak, self.now)
        return out

    def drop(self, key, size):
        self.now -= size
        self.alive.pop(key, None)


def short_batch():
    ids = torch.arange(3, 8)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def tall(num_layers):
    """Weights large beside activations: every linear 96 x 96 to 96 x 192, one short row."""
    return tiny_llama(
        hidden_size=96, intermediate_size=192, num_hidden_layers=num_layers, num_key_value_heads=4, head_dim=24
    )


@pytest.mark.parametrize("num_layers", [2, 6])
@pytest.mark.parametrize("fused", [False, True])
def test_one_weight_gradient_is_alive_at_a_time(num_layers, fused, monkeypatch):
    model = tall(num_layers)
    if fused:
        patch_model(model)
    alive, peak, fired = {}, 0, 0

    def watch(grad):
        nonlocal peak, fired
        storage = grad.untyped_storage()
        alive[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, alive.pop, storage._cdata, None)
        peak, fired = max(peak, sum(alive.values())), fired + 1

    weights = [m.weight for n, m in model.named_modules() if n.rpartition(".")[2] in PROJECTIONS]

    def loss_fn(model, batch):
        if not fired:
            for weight in weights:
                weight.register_hook(watch)
        return model(**batch).loss

    measure_importance(model, [short_batch()] * 2, n_steps=2, loss_fn=loss_fn)
    assert fired == 2 * len(weights)
    assert peak == max(w.numel() * w.element_size() for w in weights)


def test_memory_above_activations_is_one_gradient_and_scratch(monkeypatch):
    """All storages counted: against a backward that makes no weight gradient, at two depths."""
    monkeypatch.setattr("hf_fastpeft.allocation._BLOCK_ELEMENTS", 1024)
    above = []
    for num_layers in (2, 6):
        model, batch = tall(num_layers), short_batch()
        frozen = copy.deepcopy(model).requires_grad_(False).eval()
        embedded = frozen.get_input_embeddings()(batch.pop("input_ids")).requires_grad_(True)
        with AliveBytes() as base:
            frozen(inputs_embeds=embedded, **batch).loss.backward()
        with AliveBytes() as ours:
            measure_importance(model, [short_batch()], n_steps=1)
        above.append(ours.peak - base.peak)
    largest = 96 * 192 * 4
    scratch = 2 * 1024 * 4
    # Inputs of linears are kept for their weight gradients: 5 rows of at most 192 floats for each of 7 linears a layer
    kept = 5 * (6 * 96 + 192) * 4
    assert above[0] <= largest + scratch + 2 * kept
    assert above[1] - above[0] <= 4 * kept


def errors():
    llama = tiny_llama
    yield "both", llama(), {"mean_rank": 4, "budget": 10}, ValueError, "exactly one of them"
    yield "neither", llama(), {}, ValueError, "exactly one of them"
    yield "zero", llama(), {"mean_rank": 0}, ValueError, r"mean_rank=0; possible: a number above 0"
    yield "little", llama(), {"budget": 10}, ValueError, r"budget=10 is 10 parameters; possible with ranks 1"
    yield "much", llama(), {"mean_rank": 99, "max_rank": 8}, ValueError, "above max_rank=8"
    yield "order", llama(), {"mean_rank": 4, "min_rank": 6, "max_rank": 5}, ValueError, "above max_rank=5"
    yield "kind", llama(), {"mean_rank": 4, "max_rank": 8.5}, ValueError, "max_rank=8.5: possible: an integer"
    yield "steps", llama(), {"mean_rank": 4, "n_steps": 0}, ValueError, "n_steps=0"
    yield "field", llama(), {"mean_rank": 4, "rank_pattern": {}}, ValueError, "rank_pattern: decided here"
    yield "scaling", llama(), {"mean_rank": 4, "scaling": 0}, ValueError, "scaling=0"
    yield "target", llama(), {"mean_rank": 4, "target_modules": ["nothing"]}, AdapterError, "no such linear"
    yield "embedding", llama(), {"mean_rank": 4, "target_modules": ["embed_tokens"]}, AdapterError, "a Embedding, not"
    yield "meta", llama().to("meta"), {"mean_rank": 4}, AdapterError, r"offloaded \(meta device\)"
    yield "short", llama(), {"mean_rank": 4, "n_steps": 9}, DataError, "n_steps=9: the dataloader ended after 3"
    yield "wrapped", nn.DataParallel(llama()), {"mean_rank": 4}, AdapterError, "DataParallel.*pass model.module"


@pytest.mark.parametrize(("model", "options", "kind", "message"), [pytest.param(*e[1:], id=e[0]) for e in errors()])
def test_errors_say_what_is_possible(model, options, kind, message):
    with pytest.raises(kind, match=message):
        allocate_ranks(model, BATCHES, **{"n_steps": 1, **options})


def test_a_weight_that_is_not_a_plain_parameter_is_refused():
    class Packed(nn.Parameter):
        pass

    model = tiny_llama()
    layer = model.model.layers[1].self_attn
    layer.q_proj.weight = Packed(layer.q_proj.weight.data)
    with pytest.raises(AdapterError, match=r"layers.1.self_attn.q_proj: its weight is a Packed"):
        allocate_ranks(model, BATCHES, mean_rank=4)


def test_weights_packed_for_inference_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64).save_pretrained(tmp_path)
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = type(tiny_llama()).from_pretrained(tmp_path, quantization_config=quantisation, dtype=torch.float32)
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(AdapterError, match=r"layers.0.mlp.up_proj: bitsandbytes packed its weight"):
        allocate_ranks(model, BATCHES, mean_rank=4)


def test_an_optimizer_inside_backward_is_refused():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(AdapterError, match="hook that runs after each gradient"):
        allocate_ranks(model, BATCHES, mean_rank=4)


def test_batches_without_anything_to_learn():
    model = tiny_llama()
    blank = {**BATCHES[0], "labels": torch.full_like(BATCHES[0]["labels"], -100)}
    with pytest.raises(DataError, match=r"the losses sum to nan.*not finite; each batch needs a label"):
        allocate_ranks(model, [blank], mean_rank=4, n_steps=1)
    without = {k: v for k, v in BATCHES[0].items() if k != "labels"}
    with pytest.raises(DataError, match=r"no loss from a batch with .*add labels"):
        allocate_ranks(model, [without], mean_rank=4, n_steps=1)
    with pytest.raises(DataError, match="a batch is a list"):
        allocate_ranks(model, [[1]], mean_rank=4, n_steps=1)
    with pytest.raises(DataError, match="does not depend on any target"):
        allocate_ranks(model, BATCHES, mean_rank=4, n_steps=1, loss_fn=lambda m, b: torch.ones(()))
    with pytest.raises(DataError, match="every gradient was zero"):
        allocate_ranks(model, BATCHES, mean_rank=4, n_steps=1, loss_fn=lambda m, b: 0 * m(**b).loss)


def test_a_module_without_gradient_is_named():
    torch.manual_seed(0)
    model = Nested()

    def one_tower(model, x):
        return model.score(model.body[0]["u+p"](x)).square().mean()

    with pytest.warns(UserWarning, match=r"1 modules got no gradient and so min_rank, 'tower.body.0.u\+p' first"):
        config = allocate_ranks(model, [torch.randn(4, 8)], mean_rank=3, n_steps=1, loss_fn=one_tower)
    assert sorted(config.rank_pattern.values()) == [1, 5]


def test_importance_must_be_finite_and_the_budget_reach_the_minimum():
    with pytest.raises(ValueError, match="importance of 'a' is nan"):
        ranks_under_budget({"a": math.nan}, {"a": (4, 4)}, budget=8, min_rank=1, max_rank=2)
    with pytest.raises(ValueError, match="budget=7 is below min_rank=1 everywhere: 8"):
        ranks_under_budget({"a": 1.0}, {"a": (4, 4)}, budget=7, min_rank=1, max_rank=2)
