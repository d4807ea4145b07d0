"""Bordered weights in whole models: parity, what the rule refuses, and weights that are moved, saved and merged."""

import copy
import io

import pytest
import torch
from adapters import adapted_llama, assert_parity, step, token_batch, twin
from numerics import FLOAT64_REL, assert_no_worse, rel_err
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import LlamaForCausalLM

from hf_fastpeft import FastPeftCallback, patch_model
from hf_fastpeft.blocks.adapters import KEPT
from hf_fastpeft.border import WIDEST_BORDER, Border, border_obstacle
from hf_fastpeft.lowrank import LowRank
from hf_fastpeft.stacking import adjacent

BATCH = token_batch()
STACKS = 6  # two layers of q/k/v, gate/up and down; o reads what the attention call wrote
pytestmark = [pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned")]


def bordered_pair(method="lora", dtype=torch.float64, *args, **kwargs):
    """A stock model, its bordered copy and what was done to it."""
    stock = adapted_llama(method, dtype, *args, **kwargs)
    fast = twin(stock)
    return stock, fast, patch_model(fast, bordered=True)


def stacks_of(patched):
    return patched.to_json()["bordered"]


def base_weights(model):
    return {n: p for n, p in model.named_parameters() if n.endswith("proj.base_layer.weight")}


def border_of(patched, index=0):
    return list(patched._placement._borders.values())[index]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("method", ["lora", "rslora", "sora"])
def test_loss_and_every_gradient_in_float64(method, biases):
    stock, fast, patched = bordered_pair(method, attention_bias=biases, mlp_bias=biases)
    assert_parity(stock, fast)
    assert stacks_of(patched) == {"stacks": STACKS, "apart": {}}
    assert "bordered weights: 6 stacks so far" in patched.report()
    strided = [n for n, p in base_weights(fast).items() if not p.is_contiguous()]
    assert len(strided) == 2 * 6


@pytest.mark.parametrize(
    ("targets", "stacks"), [(["q_proj", "v_proj"], 2), (["down_proj"], 2), (["k_proj", "gate_proj"], 4)]
)
def test_partial_targets(targets, stacks):
    stock, fast, patched = bordered_pair(config={"target_modules": targets})
    assert_parity(stock, fast)
    assert stacks_of(patched) == {"stacks": stacks, "apart": {"no adapter": STACKS - stacks}}


def test_different_ranks_and_scalings_a_module():
    config = {"rank_pattern": {"q_proj": 1, "up_proj": 9}, "alpha_pattern": {"v_proj": 3}}
    stock, fast, patched = bordered_pair(config=config)
    assert_parity(stock, fast)
    assert stacks_of(patched)["stacks"] == STACKS


@pytest.mark.parametrize("method", ["lora", "sora"])
@pytest.mark.parametrize(("autocast", "adapter_float32"), [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_stock(method, dtype, autocast, adapter_float32):
    scaled = {"lora_alpha": 8, "r": 4} if not adapter_float32 else {}
    stock, fast, patched = bordered_pair(method, dtype, adapter_float32)
    for model in (stock, fast):
        for module in model.modules():
            if scaled and hasattr(module, "lora_A") and isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] = 2.0
    exact = twin(stock).double()
    runs = []
    for seed in range(4):
        batch = token_batch(seed=seed)
        want = step(exact, batch)[1] | {"logits": exact(**batch).logits}
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            base = step(stock, batch)[1] | {"logits": stock(**batch).logits}
            got = step(fast, batch)[1] | {"logits": fast(**batch).logits}
        runs.append([pooled(part) for part in (got, base, want)])
    for name in runs[0][2]:
        assert runs[0][0][name].dtype == runs[0][1][name].dtype
        assert_no_worse(name, *(torch.stack([run[i][name] for run in runs]).detach() for i in range(3)))
    assert stacks_of(patched)["stacks"] == STACKS


def pooled(tensors):
    gates = [t for name, t in tensors.items() if "gate.weight" in name]
    rest = {name: t for name, t in tensors.items() if "gate.weight" not in name}
    return {**rest, "gates": torch.cat(gates)} if gates else rest


def test_the_kernels_run_bordered():
    stock = adapted_llama("lora", torch.float32, num_hidden_layers=1)
    fast = twin(stock)
    patched = patch_model(fast, impl="triton", bordered=True)
    ids = token_batch(1, 4)["input_ids"]
    assert_parity(stock, fast, {"input_ids": ids, "labels": ids}, 1e-5)
    assert stacks_of(patched)["stacks"] == 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    stock, fast, patched = bordered_pair()
    for model in (m.get_base_model() for m in (stock, fast)):
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_parity(stock, fast)
    assert stacks_of(patched)["stacks"] == STACKS


@pytest.mark.parametrize("fused", [False, True])
def test_training_follows_stock(fused):
    """A fused optimizer writes values without a trace in the tensors' versions."""
    stock, fast, _ = bordered_pair()
    for model in (stock, fast):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused)
        for seed in range(4):
            optimizer.zero_grad()
            model(**token_batch(seed=seed)).loss.backward()
            optimizer.step()
    assert_parity(stock, fast, tol=1e-8)


def test_two_forwards_before_one_backward():
    stock, fast, _ = bordered_pair()
    found = []
    for model in (stock, fast):
        model.zero_grad()
        losses = [model(**token_batch(seed=seed)).loss for seed in range(2)]
        (losses[0] + 2 * losses[1]).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, want in found[0].items():
        assert rel_err(found[1][name], want) < FLOAT64_REL


def test_retained_graph_gives_the_same_gradients_twice():
    _, fast, _ = bordered_pair("sora")
    loss = fast(**BATCH).loss
    parameters = [p for p in fast.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, parameters)))


def test_adapter_on_and_off_as_in_dpo():
    stock, fast, patched = bordered_pair()
    for seed in range(3):
        batch = token_batch(seed=seed)
        results = []
        for model in (stock, fast):
            model.zero_grad()
            policy = model(**batch).logits
            with torch.no_grad(), model.disable_adapter():
                reference = model(**batch).logits
            (policy - reference).square().mean().backward()
            results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        for name, want in results[0].items():
            assert rel_err(results[1][name], want) < FLOAT64_REL
    assert patched.to_json()["blocks"]["mlp"]["stock"] == {}


@pytest.mark.filterwarnings("ignore:.*multiple adapters.*|Already found a `peft_config`")
def test_a_second_adapter_lies_apart_until_the_first_is_gone():
    stock, fast, patched = bordered_pair()
    torch.manual_seed(3)
    stock.add_adapter("other", LoraConfig(r=6, lora_alpha=12, target_modules="all-linear"))
    fast.add_adapter("other", LoraConfig(r=6, lora_alpha=12, target_modules="all-linear"))
    for (name, p), q in zip(stock.named_parameters(), fast.parameters(), strict=True):
        if ".other." in name:
            torch.nn.init.normal_(p, std=0.1)
            q.data.copy_(p.data)
    for _ in range(2):  # both graphs alive at once
        results = []
        for model in (stock, fast):
            model.zero_grad()
            losses = []
            for name in ("default", "other"):
                model.set_adapter(name)
                losses.append(model(**BATCH).loss)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora" in name)
            (losses[0] + 2 * losses[1]).backward()
            results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert sum("lora_A" in name for name in results[1]) == 2 * 14
        assert results[0].keys() == results[1].keys()
        for name, want in results[0].items():
            assert rel_err(results[1][name], want) < FLOAT64_REL, name
    assert stacks_of(patched) == {"stacks": 0, "apart": {"another adapter lies in the border": STACKS}}
    for _ in range(KEPT):
        step(fast, BATCH)
    assert stacks_of(patched)["stacks"] == STACKS
    assert {border.R for border in patched._placement._borders.values()} == {24, 16, 8}  # 18, 12 and 6 ranks
    assert_parity(stock, fast)


def test_a_backward_after_the_border_was_handed_over():
    """A graph that outlives its adapter's turn in the border computes with its own adapter."""
    stock, fast, patched = bordered_pair()
    results = []
    for model in (stock, fast):
        model.zero_grad()
        loss = model(**BATCH).loss
        if model is fast:
            for border in patched._placement._borders.values():
                border.side = None
                border.A_RI.fill_(float("nan"))
                border.B_OR.fill_(float("nan"))
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, want in results[0].items():
        assert rel_err(results[1][name], want) < FLOAT64_REL, name


def test_resized_ranks():
    stock, fast, patched = bordered_pair()
    step(fast, BATCH)
    for model in (stock, fast):
        torch.manual_seed(8)
        for module in model.modules():
            if hasattr(module, "lora_A"):
                A, B = module.lora_A["default"], module.lora_B["default"]
                A.weight = torch.nn.Parameter(torch.randn(2, A.in_features, dtype=torch.float64))
                B.weight = torch.nn.Parameter(torch.randn(B.out_features, 2, dtype=torch.float64))
    for _ in range(KEPT + 1):
        assert_parity(stock, fast)
    assert stacks_of(patched)["stacks"] == STACKS
    assert border_of(patched).R == 8


def low(weight_dtype=torch.bfloat16, rank=4, factors=torch.bfloat16, **kw):
    weight = torch.nn.Parameter(torch.zeros(6, 5, dtype=weight_dtype), requires_grad=False)
    return LowRank(weight, None, torch.zeros(rank, 5, dtype=factors), torch.zeros(6, rank, dtype=factors), **kw)


@pytest.mark.parametrize(
    ("record", "dtypes", "reason"),
    [
        (low(), "bf16", None),
        (low(scaling=0.25), "bf16", None),
        (low(scaling=1.5), "bf16", "scaling 1.5, no power of two, would round a B in torch.bfloat16"),
        (low(scaling=1.5, factors=torch.float32), "bf16", None),
        (low(torch.float32, factors=torch.float32, scaling=1.5), "float32", None),
        (low(torch.float32), "bf16", "weight in torch.float32"),
        (low(factors=torch.float32), "mixed", "adapters' products in torch.float32"),
        (low(dropout=0.1), "bf16", "dropout"),
        (low(rank=WIDEST_BORDER), "bf16", None),
        (low(rank=WIDEST_BORDER + 1), "bf16", "129 ranks"),
        (LowRank(low().weight), "bf16", "no adapter"),
        (low()._replace(weight=torch.zeros(6, 5)), "bf16", "not a plain frozen parameter"),
        (low()._replace(weight=torch.nn.Parameter(torch.zeros(6, 5))), "bf16", "not a plain frozen parameter"),
    ],
)
def test_the_rule(record, dtypes, reason):
    pairs = {"bf16": (torch.bfloat16,) * 2, "float32": (torch.float32,) * 2, "mixed": (torch.bfloat16, torch.float32)}
    found = border_obstacle([record], *pairs[dtypes])
    assert found == reason if reason is None else reason in found


def test_dropout_runs_apart_and_evaluation_bordered():
    stock, fast, patched = bordered_pair(config={"lora_dropout": 0.2})
    for model in (stock, fast):
        torch.manual_seed(1)
        model.result = step(model, BATCH)
    assert rel_err(fast.result[0], stock.result[0]) < FLOAT64_REL
    (reason,) = stacks_of(patched)["apart"]
    assert "dropout" in reason
    for model in (stock, fast):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    assert_parity(stock, fast)
    assert stacks_of(patched) == {"stacks": STACKS, "apart": {}}


def test_tied_and_shared_weights_stay():
    model = adapted_llama("lora")
    layers = model.base_model.model.model.layers
    for name in ("gate_proj", "down_proj"):
        first, second = (getattr(layer.mlp, name).base_layer for layer in layers)
        second.weight.data = first.weight.data
    stock = twin(model)
    patched = patch_model(model, bordered=True)
    assert_parity(stock, model)
    assert stacks_of(patched)["apart"] == {"tied weights": 4}
    first, second = (layer.mlp.down_proj.base_layer.weight for layer in layers)
    assert first.data_ptr() == second.data_ptr()


def test_restore_gives_every_weight_its_own_memory_bit_for_bit():
    stock, fast, patched = bordered_pair(dtype=torch.float32)
    step(fast, BATCH)
    patched.restore()
    want = dict(stock.named_parameters())
    for name, p in fast.named_parameters():
        assert torch.equal(p, want[name])
        assert p.is_contiguous()
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), name
    assert torch.equal(step(fast, BATCH)[0], step(stock, BATCH)[0])


def test_state_dict_has_whole_tensors_and_the_border_comes_back(tmp_path):
    stock, fast, patched = bordered_pair(dtype=torch.float32)
    step(fast, BATCH)
    memory = border_of(patched).memory
    found = fast.state_dict()
    assert list(found) == list(stock.state_dict())
    assert all(t.is_contiguous() for t in found.values())
    assert not patched._placement._borders  # nor is its memory held by the copies of the adapters
    assert not any(key[0] is not None for key in patched._placement.on_drop().__self__._sides)
    proj = {k: v for k, v in found.items() if "proj" in k}
    save_file(proj, tmp_path / "w.safetensors")
    assert all(torch.equal(load_file(tmp_path / "w.safetensors")[k], stock.state_dict()[k]) for k in proj)
    buffer = io.BytesIO()
    torch.save(found, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)
    assert all(torch.equal(t, loaded[k]) for k, t in stock.state_dict().items())
    assert_parity(stock, fast, tol=2e-5)
    assert stacks_of(patched)["stacks"] == STACKS
    assert border_of(patched).memory.data_ptr() != memory.data_ptr()


def test_saved_and_loaded_adapters_and_models(tmp_path):
    stock, fast, _ = bordered_pair(dtype=torch.float32)
    for name, model in (("stock", stock), ("fast", fast)):
        step(model, BATCH)
        model.save_pretrained(tmp_path / f"{name}-adapter")
        step(model, BATCH)
        model.get_base_model().save_pretrained(tmp_path / f"{name}-base")
        step(model, BATCH)
        model.merge_and_unload().save_pretrained(tmp_path / f"{name}-merged")
    for kind, file in (("adapter", "adapter_model"), ("base", "model"), ("merged", "model")):
        want, got = (load_file(tmp_path / f"{name}-{kind}" / f"{file}.safetensors") for name in ("stock", "fast"))
        assert want.keys() == got.keys()
        assert all(torch.equal(got[k], want[k]) for k in want)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "fast-adapter")
    assert torch.equal(again.eval()(**BATCH).logits, twin(again).eval()(**BATCH).logits)
    assert isinstance(LlamaForCausalLM.from_pretrained(tmp_path / "fast-merged"), LlamaForCausalLM)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_unmerging(safe):
    stock, fast, patched = bordered_pair()
    step(fast, BATCH)
    for model in (stock, fast):
        model.merge_adapter(safe_merge=safe)
    for (name, want), got in zip(base_weights(stock).items(), base_weights(fast).values(), strict=True):
        assert torch.equal(got, want), name
    torch.testing.assert_close(fast(**BATCH).logits, stock(**BATCH).logits, rtol=1e-9, atol=1e-9)
    for model in (stock, fast):
        model.unmerge_adapter()
    assert_parity(stock, fast)
    assert stacks_of(patched)["stacks"] == STACKS
    merged = [model.merge_and_unload(safe_merge=safe) for model in (stock, fast)]
    want, got = (model(**BATCH).logits for model in merged)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bordered", [False, True])
def test_moving_the_model_puts_the_stacks_together_again(bordered):
    """What ``model.to`` does in a Trainer's constructor."""
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patched = patch_model(fast, bordered=bordered)
    step(fast, BATCH)
    for model in (stock, fast):
        model.to(torch.float64)
    attention = fast.base_model.model.model.layers[0].self_attn
    weights = [getattr(attention, name).base_layer.weight for name in ("q_proj", "k_proj", "v_proj")]
    assert adjacent(weights) is None
    assert_parity(stock, fast)
    assert adjacent(weights) is not None
    assert all(w.is_contiguous() != bordered for w in weights)
    assert stacks_of(patched) == ({"stacks": STACKS, "apart": {}} if bordered else None)
    patched.restore()
    for name, p in fast.named_parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), name
        assert torch.equal(p, dict(stock.named_parameters())[name])


def apart(model):
    """Whether any q, k and v lie apart."""
    stacks = [[getattr(layer.self_attn, f"{n}_proj").base_layer.weight for n in "qkv"]
              for layer in model.base_model.model.model.layers]  # fmt: skip
    return any(adjacent(stack) is None for stack in stacks)


def moved_model():
    model = adapted_llama("lora", torch.float32)
    patched = patch_model(model)
    model.to(torch.float64)
    assert apart(model)
    return model, patched


@pytest.mark.parametrize("how", ["trained", "larger storage", "shared", "tied", "FSDP", "ZeRO-3"])
def test_weights_that_are_not_restacked(how, monkeypatch):
    model, patched = moved_model()
    weights = [layer.self_attn.k_proj.base_layer.weight for layer in model.base_model.model.model.layers]
    for weight in weights:
        if how == "trained":
            weight.requires_grad_(True)
        if how == "larger storage":
            weight.data = torch.cat([weight.data, weight.data])[: weight.shape[0]]
        if how == "shared":
            weight.data.share_memory_()
        if how == "tied":
            patched._placement._tied |= {id(weight)}
    if how in ("FSDP", "ZeRO-3"):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    if how == "FSDP":
        model.base_model.model.model.layers[1]._is_fsdp_managed_module = True
    if how == "ZeRO-3":
        model.base_model.model.model.norm.weight.ds_id = 0
    places = [w.data_ptr() for w in weights]
    step(model, BATCH)
    assert [w.data_ptr() for w in weights] == places


def test_several_processes_alone_do_not_keep_weights_apart(monkeypatch):
    """Nor do they after a layer was called by hand, when nobody could tell whether its weights are sharded."""
    model, _ = moved_model()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    layer = model.base_model.model.model.layers[0]
    x = torch.randn(1, 3, 32, dtype=torch.float64)
    layer.mlp(x)
    layer.self_attn(x, position_embeddings=model.base_model.model.model.rotary_emb(x, torch.arange(3)[None]))
    assert apart(model)
    step(model, BATCH)
    assert not apart(model)


def test_restacking_is_tried_once_a_place(monkeypatch):
    model, patched = moved_model()
    asked = []
    monkeypatch.setattr(patched._placement, "_fixed", lambda weights: asked.append(weights) or "no")
    step(model, BATCH)
    first = len(asked)
    assert first == 4  # q/k/v and gate/up of two layers
    step(model, BATCH)
    assert len(asked) == first


def test_copies_and_pickles_work_on_their_own():
    stock, fast, _ = bordered_pair()
    want = step(fast, BATCH)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fast), torch.load(buffer, weights_only=False)):
        assert_parity(stock, other)
        with torch.no_grad():
            for name, p in other.named_parameters():
                if "lora_B" in name or "base_layer" in name:
                    p.zero_()
    assert torch.equal(step(fast, BATCH)[0], want[0])
    copied = copy.deepcopy(fast)
    step(copied, BATCH)
    weights = base_weights(copied)
    assert sum(not w.is_contiguous() for w in weights.values()) == 12  # the option goes with the copy
    assert not {w.untyped_storage().data_ptr() for w in weights.values()} & {
        w.untyped_storage().data_ptr() for w in base_weights(fast).values()
    }


def test_loading_a_state_dict():
    stock, fast, _ = bordered_pair()
    step(fast, BATCH)
    other = adapted_llama("lora")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.25)
    for assign in (False, True):
        for model in (stock, fast):
            model.load_state_dict(other.state_dict(), assign=assign)
            for name, p in model.named_parameters():
                p.requires_grad_("lora" in name)
        assert_parity(stock, fast)


def test_borders_of_replaced_weights_are_given_up():
    _, fast, patched = bordered_pair()
    step(fast, BATCH)
    fast.load_state_dict(adapted_llama("lora").state_dict(), assign=True)
    for p in base_weights(fast).values():
        p.requires_grad_(False)
    for _ in range(KEPT + 2):
        step(fast, BATCH)
    assert len(patched._placement._borders) == STACKS


def test_not_bordered_outside_a_forward_of_the_model():
    """A block called on its own lays its adapters out for itself: nobody says when they are old."""
    _, fast, _ = bordered_pair()
    step(fast, BATCH)
    layer = fast.base_model.model.model.layers[0]
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    before = layer.mlp(x)
    with torch.no_grad():
        for name, p in layer.mlp.named_parameters():
            if "lora_B" in name:
                p.zero_()
    assert not torch.equal(layer.mlp(x), before)
    only = adapted_llama("lora")
    patched = patch_model(only, only="LlamaMLP", bordered=True)
    step(only, BATCH)
    assert stacks_of(patched)["apart"] == {"a block called outside a forward of a patched model": 4}


def test_the_callback_passes_the_option_on():
    model = adapted_llama("lora")
    callback = FastPeftCallback(bordered=True)
    callback.on_init_end(None, None, None, model=model)
    step(model, BATCH)
    assert stacks_of(callback.patched)["stacks"] == STACKS


def test_border_layout():
    weights = [torch.nn.Parameter(torch.randn(n, 5)) for n in (2, 3)]
    values = [w.detach().clone() for w in weights]
    border = Border.around(weights, 3)
    assert (border.out_features, border.in_features, border.R) == (5, 5, 8)
    assert border.memory.stride() == (64, 1)
    assert torch.equal(border.weight_OI, torch.cat(values))
    assert torch.equal(adjacent(weights), border.weight_OI)
    assert adjacent(weights).data_ptr() == border.memory.data_ptr()
    assert all(torch.equal(w, v) for w, v in zip(weights, values, strict=True))
