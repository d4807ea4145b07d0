"""Padding and unscored positions left out of training steps: stock's losses, gradients and outputs."""

import pytest
import torch
import trl.trainer.utils
from adapters import adapted_llama, assert_parity, step, token_batch, twin
from numerics import FLOAT64_REL, rel_err
from test_families import adapted
from test_head import ReadsLogits, causal, loss_in_float64, losses, run_trainer
from test_no_sync import Waits
from test_trl import assert_same_run, dpo, sft
from tiny import CACHE, VOCAB_SIZE, tiny_llama
from torch.utils.checkpoint import checkpoint
from transformers.integrations.neftune import neftune_post_forward_hook

from hf_fastpeft import FastPeftCallback, causal_lm, layers, patch_model, patched
from hf_fastpeft.causal_lm import CALLER
from hf_fastpeft.routing import Routing, notices_rows, plan_route
from hf_fastpeft.watch import Watch

B, S = 3, 17
SECOND_FORWARD = "ignore:outputs.logits of a training step that left positions out"
pytestmark = [
    pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]


def mask_of(*spans):
    """One row a span ``(first, end)`` of real tokens."""
    mask = torch.zeros(len(spans), S, dtype=torch.int64)
    for row, (first, end) in zip(mask, spans, strict=True):
        row[first:end] = 1
    return mask


def padded(mask, seed=0, masked=0.4):
    """Random tokens and labels; no label that a padded position would have to predict."""
    batch = token_batch(*mask.shape, seed=seed)
    g = torch.Generator().manual_seed(seed + 100)
    hidden = (mask == 0) | (torch.nn.functional.pad(mask, (1, 0))[:, :-1] == 0)
    labels = batch["input_ids"].masked_fill(hidden | (torch.rand(mask.shape, generator=g) < masked), -100)
    batch = {"input_ids": batch["input_ids"].masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}
    return trainers(batch)


RIGHT, LEFT = mask_of((0, 17), (0, 9), (0, 12)), mask_of((0, 17), (8, 17), (5, 17))
PADDINGS = {
    "right": RIGHT,
    "left": LEFT,
    "both": mask_of((3, 17), (0, 9), (4, 12)),
    "holes": torch.tensor([[1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]] * 2 + [[1] * 9 + [0] * 8]),
    "a-row-without-tokens": mask_of((0, 17), (0, 0), (4, 12)),
    "one-token-rows": mask_of((0, 1), (16, 17), (0, 12)),
    "one-row": mask_of((2, 13)),
    "bool": RIGHT.bool(),
}


def routing_of(model):
    return causal(model)._fastpeft.routing


def trainers(batch):
    """As Trainer gives it: with the number of labels, by which a caller says that it wants the loss alone."""
    return {**batch, "num_items_in_batch": (batch["labels"][:, 1:] != -100).sum()}


def without_number(batch):
    """As any other caller gives it."""
    return {name: value for name, value in batch.items() if name != "num_items_in_batch"}


def exact_pair(monkeypatch, method="lora", stock=None, **overrides):
    """Stock and patched in float64, both with a loss in float64; the second's next step is routed."""
    stock = adapted_llama(method, num_hidden_layers=3, **overrides) if stock is None else stock
    fast = twin(stock)
    patch_model(fast)
    causal(stock).loss_function = loss_in_float64
    monkeypatch.setattr(causal_lm, "_loss_is_rounded", lambda dtype: False)
    return stock, fast


def scored(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def assert_routed(model, batch, steps=1):
    """Padding was removed and the last layer ran on labelled positions."""
    real, of = int(batch["attention_mask"].sum()), batch["attention_mask"].numel()
    seen = routing_of(model).to_json()
    assert seen["padding"] == {"calls": steps, "rows": steps * real, "of": steps * of}, seen
    assert seen["last_layer"] == {"calls": steps, "rows": steps * scored(batch), "of": steps * real}, seen


@pytest.mark.parametrize("padding", PADDINGS)
def test_loss_and_every_gradient_in_float64(padding, monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    batch = padded(PADDINGS[padding])
    assert_parity(stock, fast, batch)
    assert_routed(fast, batch)
    assert routing_of(fast).unrouted == {}


@pytest.mark.parametrize("method", ["rslora", "sora"])
def test_other_adapters(method, monkeypatch):
    stock, fast = exact_pair(monkeypatch, method, attention_bias=True, mlp_bias=True)
    batch = padded(PADDINGS["both"])
    assert_parity(stock, fast, batch)
    assert_routed(fast, batch)


def test_full_fine_tuning_gives_padding_a_gradient_of_zero(monkeypatch):
    stock = tiny_llama(torch.float64, attention_bias=True, mlp_bias=True).train()
    stock.lm_head.requires_grad_(False)
    stock.model.embed_tokens.padding_idx = None  # its own zero would hide what is tested
    stock, fast = exact_pair(monkeypatch, stock=stock)
    batch = padded(RIGHT)
    assert_parity(stock, fast, batch)
    assert (step(fast, batch)[1]["model.embed_tokens.weight"][0] == 0).all()
    assert_routed(fast, batch, steps=2)


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_gradient_checkpointing(checkpointing, monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    for model in (causal(stock), causal(fast)):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(checkpointing)
    batch = padded(PADDINGS["both"])
    assert_parity(stock, fast, batch)
    assert_routed(fast, batch)


def test_gradient_accumulation(monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    gradients = []
    for model in (stock, fast):
        for seed, padding in enumerate(("both", "left", "one-token-rows")):
            loss = model(**{**padded(PADDINGS[padding], seed), "num_items_in_batch": 40}).loss
            loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert routing_of(fast).calls["padding"] == 3
    assert all(rel_err(gradients[1][n], want) < FLOAT64_REL for n, want in gradients[0].items())


@pytest.mark.parametrize("padding", ["left", "right", "a-row-without-tokens"])
def test_eager_attention_stays_finite(padding):
    """Its masked rows are uniform in float32; in float64 stock's own are NaN."""
    stock = adapted_llama("lora", torch.float32, attn_implementation="eager")
    fast = twin(stock)
    patch_model(fast)
    batch = padded(PADDINGS[padding])
    assert_parity(stock, fast, batch, tol=1e-5)
    assert_routed(fast, batch)


def test_what_stands_in_padding_reaches_nothing():
    model = adapted_llama("lora", torch.float32)
    causal(model).model.embed_tokens.weight.data[0] = float("nan")
    patch_model(model)
    batch = padded(PADDINGS["both"])
    loss, gradients = step(model, batch)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())


FAMILIES = ["gemma2", "gemma3_text", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, monkeypatch):
    """Sliding windows, two rotary tables, norms before the residual, partial rotation, experts, soft caps."""
    stock, fast = exact_pair(monkeypatch, stock=adapted(family, torch.float64).train())
    # a window of nothing but padding is NaN in stock's eager attention in float64
    batch = padded(mask_of((0, 17), (0, 13), (0, 12)) if family == "gemma2" else RIGHT)
    assert_parity(stock, fast, batch)
    assert_routed(fast, batch)


def test_given_embeddings_and_positions(monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    batch = padded(PADDINGS["left"])
    mask, ids = batch["attention_mask"], batch.pop("input_ids")
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    embeddings = []
    for model in (stock, fast):
        embeds = causal(model).model.embed_tokens(ids).detach().requires_grad_()
        assert step(model, {**batch, "inputs_embeds": embeds})[0].isfinite()
        embeddings.append(embeds.grad)
    assert rel_err(*embeddings) < FLOAT64_REL
    assert (embeddings[1][mask == 0] == 0).all()
    assert_routed(fast, batch)


def test_packed_rows_only_lose_the_unscored_positions(monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    ids = token_batch(1, 20)["input_ids"]
    labels = ids.clone()
    labels[0, [0, 1, 2, 3, 9, 10, 11]] = -100
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.tensor([[*range(9), *range(11)]])}
    assert_parity(stock, fast, trainers(batch))
    assert routing_of(fast).calls == {"last_layer": 1, "last_layer_rows": 13, "last_layer_of": 20}
    assert routing_of(fast).unrouted == {"padding: no attention mask": 1}


LABELS = {
    "one label": ({}, lambda labels: torch.full_like(labels, -100).index_put_((torch.tensor(1), torch.tensor(5)),
                                                                           torch.tensor(7))),
    "a row without labels": ({}, lambda labels: labels.index_fill(0, torch.tensor(2), -100)),
    "no labels": ({"num_items_in_batch": 9}, lambda labels: torch.full_like(labels, -100)),
}  # fmt: skip


@pytest.mark.parametrize("case", LABELS)
def test_few_labels(case, monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    more, change = LABELS[case]
    batch = padded(RIGHT)
    batch = {**batch, "labels": change(batch["labels"]), **more}
    assert_parity(stock, fast, batch)
    if case == "no labels":
        assert routing_of(fast).unrouted == {"last layer: no labels": 1}
    else:
        assert_routed(fast, batch)


def test_a_mean_over_no_label_is_nan_and_teaches_nothing(monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    batch = without_number(padded(RIGHT))
    for model in (stock, fast):
        loss, gradients = step(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
        assert loss.isnan()
        assert all((g == 0).all() for g in gradients.values())


def test_shift_labels_and_another_ignored_index(monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    batch = padded(RIGHT)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    batch["labels"] = torch.where(shifted == -100, 9, shifted)
    assert_parity(stock, fast, {**batch, "shift_labels": batch["labels"], "ignore_index": 9})
    assert routing_of(fast).calls["padding"] == routing_of(fast).calls["last_layer"] == 1


STAYS = {
    "padding: less than 5 % of the positions": {"attention_mask": mask_of((0, 17), (0, 17), (0, 15))},
    "padding: labels on padding": {"labels": token_batch()["input_ids"]},
    "padding: no attention mask": {"attention_mask": None},
    "padding: no real token": {"attention_mask": mask_of(*[(0, 0)] * 3), "labels": torch.full((B, S), -100)}
    | {"num_items_in_batch": 3},
    "padding: attention mask of 4 dims": {"attention_mask": torch.ones(B, 1, S, S, dtype=torch.bool).tril()},
}


@pytest.mark.parametrize("reason", STAYS)
def test_padding_that_stays(reason, monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    batch = {**padded(RIGHT), **STAYS[reason]}
    assert_parity(stock, fast, batch)
    assert routing_of(fast).unrouted[reason] == 1
    assert routing_of(fast).calls["padding"] == 0


def test_labels_nearly_everywhere_leave_the_last_layer_whole(monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    batch = padded(RIGHT)
    every = batch["input_ids"].masked_fill(RIGHT == 0, -100)
    assert_parity(stock, fast, {**batch, "shift_labels": every})
    assert routing_of(fast).calls["padding"] == 1
    assert routing_of(fast).unrouted == {"last layer: nearly every position has a label": 1}


def test_each_layer_sees_only_its_rows(monkeypatch):
    rows = {"attention_in": [], "attention_out": [], "mlp": [], "attend": []}
    for name in ("attention_in", "attention_out", "mlp"):
        block = getattr(layers, name)

        def counted(x, *args, block=block, name=name, **kwargs):
            rows[name].append(tuple(x.shape[:2]))
            return block(x, *args, **kwargs)

        monkeypatch.setattr(layers, name, counted)
    model = adapted_llama("lora", torch.float32, num_hidden_layers=3, attn_implementation="eager")
    patch_model(model)
    eager = type(causal(model).model.layers[0].self_attn).eager_attention

    def attend(module, q, k, v, mask, **kwargs):
        rows["attend"].append((*q.shape, *mask.shape))
        assert (q.transpose(1, 2)[RIGHT == 0] == 0).all()
        return eager(module, q, k, v, mask, **kwargs)

    monkeypatch.setattr(type(causal(model).model.layers[0].self_attn), "eager_attention", staticmethod(attend))
    batch = padded(RIGHT)
    model(**batch)
    T, N = int(RIGHT.sum()), scored(batch)
    assert N < T < B * S
    assert rows["attention_in"] == [(1, T)] * 3
    assert rows["attention_out"] == rows["mlp"] == [(1, T), (1, T), (1, N)]
    assert rows["attend"] == [(B, 4, S, 8, B, 1, S, S)] * 3


def test_one_wait_a_step():
    model = adapted_llama("lora", torch.float32)
    patch_model(model)
    found = []
    routed = padded(RIGHT)
    for batch in (without_number(routed), routed):
        with Waits() as waits:
            model(**batch)
        found.append(waits.found)
    assert routing_of(model).calls["padding"] == 1
    assert len(found[1]) <= len(found[0])
    assert "nonzero" not in found[1]


def test_the_cache_of_a_training_step_has_stocks_real_positions(monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    batch = padded(PADDINGS["both"])
    want, got = (model(**batch, use_cache=True)[CACHE] for model in (stock, fast))
    assert_routed(fast, batch)
    real = batch["attention_mask"].bool()
    for a, b in zip(got.layers, want.layers, strict=True):
        for name in ("keys", "values"):
            x, y = (getattr(t, name).transpose(1, 2)[real] for t in (a, b))
            assert rel_err(x, y) < FLOAT64_REL


# when the logits are wanted


def test_only_a_caller_that_wants_the_loss_alone_is_routed():
    """Whatever was done with the outputs before."""
    model = adapted_llama("lora", torch.float32)
    patch_model(model)
    batch, routing = padded(RIGHT), routing_of(model)
    others = without_number(batch)
    for _ in range(3):
        model(**others).loss.backward()
    assert routing.calls == {}
    assert routing.unrouted == {CALLER: 3}
    for _ in range(3):
        model(**batch).loss.backward()
    assert routing.calls["padding"] == 3
    assert routing.unrouted == {CALLER: 3}


@pytest.mark.parametrize("kept", [False, True])
def test_logits_after_the_backward_are_stocks_for_every_other_caller(kept):
    """Three steps that drop their output and a fourth that reads it."""
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast)
    batch = without_number(padded(RIGHT))
    found = []
    for model in (stock, fast):
        for _ in range(3):
            out = model(**batch)
            out.loss.backward()
            if not kept:
                del out
        out = model(**batch)
        out.loss.backward()
        found.append(out.logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("routed", [False, True])
def test_checkpointed_model_calls_decide_alike_in_the_recomputation(routed, monkeypatch):
    """Two calls of the model under checkpoint() and one backward."""
    stock, fast = exact_pair(monkeypatch)
    batches = [padded(RIGHT, seed) for seed in (0, 1)]
    found = []
    for model in (stock, fast):
        losses = []
        for batch in batches:
            given = batch if routed else without_number(batch)
            losses.append(checkpoint(lambda g, model=model: model(**g).loss, given, use_reentrant=False))
        (losses[0] + 2 * losses[1]).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert (routing_of(fast).calls["padding"] > 0) == routed
    assert all(rel_err(found[1][name], want) < 1e-6 for name, want in found[0].items())


@pytest.mark.filterwarnings(SECOND_FORWARD)
def test_logits_of_a_routed_step_are_stocks(monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    batch = padded(PADDINGS["both"])
    gradients = []
    for model in (stock, fast):
        out = model(**batch)
        logits = out.logits
        assert logits.shape == (B, S, VOCAB_SIZE)
        assert out.logits is logits
        (out.loss + logits.square().mean()).backward()
        gradients.append(({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, logits))
    assert_routed(fast, batch)
    (want, want_logits), (got, got_logits) = gradients
    assert rel_err(got_logits, want_logits) < FLOAT64_REL
    # the gradients of both ways meet behind the final norm, not before: its stock backward rounds each to float32
    assert all(rel_err(got[n], want[n]) < 1e-6 for n in want)
    assert routing_of(fast).second_forwards == 1


@pytest.mark.filterwarnings(SECOND_FORWARD)
def test_logits_with_random_numbers_are_stocks():
    """Attention's dropout and noise on the embeddings (NEFTune) are drawn as in the forward; nothing moves on."""
    stock = adapted_llama("lora", torch.float32, attn_implementation="eager", attention_dropout=0.2)
    embedding = causal(stock).model.embed_tokens
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    fast = twin(stock)
    patch_model(fast)
    batch, runs = padded(RIGHT), []
    for model in (stock, fast):
        torch.manual_seed(3)
        out = model(**batch)
        state = torch.get_rng_state()
        runs.append((out.loss, out.logits))
        assert torch.equal(torch.get_rng_state(), state)
    assert_routed(fast, batch)
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["embed_tokens", "rotary_emb", "layers.0.mlp.act_fn"])
def test_other_peoples_hooks_do_not_run_twice(where):
    """One that counts would give a second forward other states: there is none."""
    stock = adapted_llama("lora", torch.float32)
    fast = patch_model(twin(stock))
    found = []
    for model in (stock, fast):
        calls = []
        module = causal(model).model.get_submodule(where)
        module.register_forward_hook(lambda m, args, out, calls=calls: calls.append(1))
        found.append((model(**padded(RIGHT)).logits, len(calls)))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    assert routing_of(fast).calls == {}


@pytest.mark.parametrize("where", ["embed_tokens", "rotary_emb"])
def test_other_peoples_hooks_that_came_later_do_not_run_at_all(where):
    model = patch_model(adapted_llama("lora", torch.float32))
    out = model(**padded(RIGHT))
    getattr(causal(model).model, where).register_forward_hook(lambda m, args, out: None)
    with pytest.raises(RuntimeError, match=r"hooks on Llama|hooks on Embedding"):
        _ = out.logits


def test_logits_after_the_backward_of_a_routed_step_say_what_to_do():
    model = adapted_llama("lora", torch.float32)
    patch_model(model)
    out = model(**padded(RIGHT))
    out.loss.backward()
    with pytest.raises(
        RuntimeError, match=r"a backward has run since; read them before that, or patch_model\(routing=False\)"
    ):
        out.to_tuple()


def test_a_loop_that_reads_logits_after_its_optimizer_step_gets_the_forwards():
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast)
    read = []
    for model in (stock, fast):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        read.append([])
        for _ in range(4):
            out = model(**without_number(padded(RIGHT)))
            out.loss.backward()
            optimizer.step()
            read[-1].append(out.logits.detach())
    assert routing_of(fast).calls == {}
    for got, want in zip(*read, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.usefixtures("one_precision")
def test_trainer_is_step_identical(bf16, tmp_path):
    stock, fast = (run_trainer(tmp_path, patch, bf16=bf16) for patch in (False, True))
    assert losses(fast) == pytest.approx(losses(stock), rel=3e-2 if bf16 else 1e-6)
    assert routing_of(fast.model).calls["last_layer"] == 8


@pytest.fixture
def one_precision():
    """accelerate keeps one mixed precision a process, unless told to forget."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_trainer_that_reads_logits_is_not_routed(tmp_path):
    stock, fast = (run_trainer(tmp_path, patch, ReadsLogits) for patch in (False, True))
    assert losses(fast) == pytest.approx(losses(stock), rel=1e-5)
    assert routing_of(fast.model).calls == {}
    assert routing_of(fast.model).unrouted == {CALLER: 8}


def test_the_first_second_forward_is_a_warning():
    model = patch_model(adapted_llama("lora", torch.float32))
    with pytest.warns(UserWarning, match=r"runs once more for it. patch_model\(routing=False\)"):
        _ = model(**padded(RIGHT)).logits
    _ = model(**padded(RIGHT)).logits
    assert "run once more for logits that were read: 2 calls" in patched(model).report()


SINCE = {
    "adapters off": lambda m, batch: m.base_model.disable_adapter_layers(),
    "scaled": lambda m, batch: m.base_model.model.model.layers[0].mlp.up_proj.scale_layer(2.0),
    "merged": lambda m, batch: m.merge_adapter(),
    "written to": lambda m, batch: next(p for n, p in m.named_parameters() if "lora_B" in n).detach().mul_(2.0),
    "inputs written to": lambda m, batch: batch["input_ids"].add_(1),
    "hook": lambda m, batch: m.base_model.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *a: None),
    "eval": lambda m, batch: m.eval(),
}


@pytest.mark.parametrize("change", SINCE)
def test_a_second_forward_of_another_state_is_an_error(change):
    model = patch_model(adapted_llama("lora", torch.float32))
    batch = padded(RIGHT)
    out = model(**batch)
    SINCE[change](model, batch)
    with pytest.raises(RuntimeError, match="adapters, weights or inputs have changed since; read them before that"):
        _ = out.logits


# TRL's contract


ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.mark.parametrize("shifted", [False, True])
def test_trls_outputs_without_a_label_are_zeros_of_the_model(shifted):
    """A process whose rows have no label must join the others' backward all the same."""
    model = adapted_llama("lora", torch.float32)
    patch_model(model)
    trl.trainer.utils.add_fused_lm_head(causal(model), outputs=ALL)
    batch = padded(RIGHT)
    batch["shift_labels" if shifted else "labels"] = torch.full_like(batch.pop("labels"), -100)
    outputs = causal(model)(**batch, fused_lm_head=True)
    for name in ALL:
        assert outputs[name].shape == (B, S if shifted else S - 1)
        assert not outputs[name].any()
    outputs.log_probs.sum().backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or (p.grad is not None and not p.grad.any()), name


@pytest.mark.parametrize("padding", ["left", "both", "a-row-without-tokens"])
@pytest.mark.parametrize("grad", [True, False])
def test_trls_outputs_are_stocks(padding, grad):
    """Also without gradients while training: a reference has to equal its policy to the last bit."""
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast)
    outputs, batch = [], padded(PADDINGS[padding])
    for model in (stock, fast):
        trl.trainer.utils.add_fused_lm_head(causal(model), outputs=ALL)
        with torch.set_grad_enabled(grad):
            outputs.append(causal(model)(**batch, fused_lm_head=True))
        if grad:
            outputs[-1].loss.backward()
    assert_routed(fast, batch)
    want, got = outputs
    torch.testing.assert_close(got.loss, want.loss)
    assert torch.equal(got.label_mask, want.label_mask)
    for name in ALL:
        assert got[name].shape == (B, S - 1)
        there = want[name].masked_fill(~want.label_mask, 0)
        torch.testing.assert_close(got[name], there, rtol=1e-4, atol=1e-5)
    for a, b in zip(fast.parameters(), stock.parameters(), strict=True):
        if grad and a.requires_grad:
            assert rel_err(a.grad, b.grad) < 1e-5


def test_sft_is_step_identical(tmp_path):
    want, _ = sft(tmp_path / "stock", None)
    got, trainer = sft(tmp_path / "fast", "callback")
    assert_same_run(got, want)
    routing = routing_of(trainer.model)
    assert routing.calls["last_layer"] == 8
    assert routing.calls["padding"] > 0
    assert set(routing.unrouted) <= {"padding: less than 5 % of the positions"}


def test_dpo_is_step_identical(tmp_path):
    want, _ = dpo(tmp_path / "stock", None)
    got, trainer = dpo(tmp_path / "fast", "callback")
    assert_same_run(got, want)
    assert routing_of(trainer.model).calls["padding"] == routing_of(trainer.model).calls["last_layer"] == 2 * 4 * 2


# what is left alone


def assert_unrouted(stock, fast, reason, batch=None, tol=1e-5):
    batch = padded(RIGHT) if batch is None else batch
    for model in (stock, fast):
        torch.manual_seed(5)
        model.zero_grad()
        model(**batch).loss.backward()
    assert routing_of(fast).calls == {}
    assert routing_of(fast).unrouted == {reason: 1}
    for a, b in zip(fast.parameters(), stock.parameters(), strict=True):
        if b.grad is not None:
            assert rel_err(a.grad, b.grad) < tol


def hook_a_layer(model):
    causal(model).model.layers[1].register_forward_hook(lambda module, args, out: out * 1.1)


def hook_a_projection(model):
    causal(model).model.layers[1].mlp.down_proj.base_layer.register_forward_pre_hook(lambda module, args: None)


def hook_the_backbone(model):
    causal(model).model.register_forward_hook(lambda module, args, out: None)


def hook_the_norm(model):
    causal(model).model.norm.register_full_backward_hook(lambda module, grads, out: None)


def own_forward(model):
    mlp = causal(model).model.layers[0].mlp
    mlp.forward = lambda x, forward=mlp.forward: forward(x)


def one_layer_in_eval(model):
    causal(model).model.layers[0].eval()


def fewer_layers(model):
    causal(model).config.num_hidden_layers = 1


def jitter(model):
    causal(model).config.router_jitter_noise = 0.1


STATES = {
    hook_a_layer: "hooks on LlamaDecoderLayer",
    hook_a_projection: "hooks on Linear",
    hook_the_backbone: "hooks on LlamaModel",
    hook_the_norm: "hooks on LlamaRMSNorm",
    own_forward: "LlamaMLP has a forward of its own (hook or foreign patch)",
    one_layer_in_eval: "some layers train, others do not",
    fewer_layers: "LlamaModel without its layers",
    jitter: "router jitter",
}


@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
def test_models_that_would_notice(state):
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    handle = patched(patch_model(fast))
    for model in (stock, fast):
        state(model)
    assert_unrouted(stock, fast, STATES[state])
    assert handle.to_json()["routing"]["obstacle"] == STATES[state]
    assert f"every position now: {STATES[state]}" in handle.report()


def test_dropout_in_the_layers():
    stock = adapted_llama("lora", torch.float32, config={"lora_dropout": 0.3})
    fast = twin(stock)
    patch_model(fast)
    assert_unrouted(stock, fast, "dropout in the layers (its masks would not be stock's)")
    assert notices_rows(causal(fast).eval().model, Watch()) is None


@pytest.mark.parametrize(
    ("only", "reason"),
    [
        (["LlamaForCausalLM"], "LlamaDecoderLayer is not patched"),
        (["LlamaForCausalLM", "LlamaDecoderLayer"], "LlamaAttention is not patched"),
    ],
)
def test_parts_that_are_not_patched(only, reason):
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast, only=only)
    assert_unrouted(stock, fast, reason)


@pytest.mark.parametrize("without", ["LlamaMLP", "LlamaRMSNorm", "LlamaModel"])
def test_stock_parts_inside_routed_layers(without, monkeypatch):
    stock = adapted_llama()
    fast = twin(stock)
    names = {"LlamaForCausalLM", "LlamaDecoderLayer", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm", "LlamaModel"}
    patch_model(fast, only=names - {without})
    causal(stock).loss_function = loss_in_float64
    monkeypatch.setattr(causal_lm, "_loss_is_rounded", lambda dtype: False)
    batch = padded(PADDINGS["both"])
    assert_parity(stock, fast, batch)
    assert_routed(fast, batch)


@pytest.mark.parametrize("reason", ["output_hidden_states", "output_attentions"])
def test_calls_that_want_every_position(reason):
    stock = adapted_llama("lora", torch.float32, attn_implementation="eager")
    fast = twin(stock)
    patch_model(fast)
    batch = padded(RIGHT)
    assert_unrouted(stock, fast, reason, {**batch, reason: True})
    for name in ("hidden_states", "attentions"):
        want, got = (getattr(model(**batch, **{reason: True}), name) or () for model in (stock, fast))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # transformers leaves its recording hooks behind; they look at nothing that is not asked for
    assert_parity(stock, fast, batch, tol=1e-5)
    assert_routed(fast, batch)


def test_evaluation_is_never_routed():
    model = adapted_llama("lora", torch.float32)
    patch_model(model)
    trl.trainer.utils.add_fused_lm_head(causal(model))
    causal(model)(**padded(RIGHT), fused_lm_head=True)
    assert routing_of(model).calls["padding"] == 1
    model.eval()
    with torch.no_grad():
        causal(model)(**padded(RIGHT), fused_lm_head=True)
        model(**padded(RIGHT))
    assert routing_of(model).calls["padding"] == 1


def test_a_given_cache_and_longer_masks_are_left_alone(monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    found = []
    for model in (stock, fast):
        with torch.no_grad():
            past = causal(model)(input_ids=token_batch(B, 4)["input_ids"], use_cache=True)[CACHE]
        mask = torch.cat([torch.ones(B, 4, dtype=torch.int64), RIGHT], 1)
        batch = {**padded(RIGHT), "attention_mask": mask, CACHE: past}
        found.append(step(model, batch)[0])
    assert rel_err(*found) < FLOAT64_REL
    assert routing_of(fast).unrouted == {"a cache given": 1}


def test_the_switch():
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    handle = patched(patch_model(fast, routing=False))
    assert_unrouted(stock, fast, "switched off (routing=False)")
    assert handle.to_json()["routing"]["enabled"] is False
    callback = FastPeftCallback(routing=False)
    callback.on_init_end(None, None, None, model=adapted_llama())
    assert callback.patched.to_json()["routing"]["obstacle"] == "switched off (routing=False)"


def test_a_backbone_that_keeps_its_kwargs(monkeypatch):
    """Its layers see no route: the head then chooses its rows itself."""
    stock, fast = exact_pair(monkeypatch)
    backbone = type(causal(fast).model)
    forward = backbone.forward

    def deaf(self, *args, fastpeft_route=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(backbone, "forward", deaf)
    assert_parity(stock, fast, padded(RIGHT))
    assert causal(fast)(**padded(RIGHT)).logits.shape == (B, S, VOCAB_SIZE)


def test_the_report_tells_rows_and_reasons():
    model = adapted_llama("lora", torch.float32)
    handle = patched(patch_model(model))
    batch = padded(RIGHT)
    model(**without_number(batch)).loss.backward()
    for _ in range(2):
        model(**batch).loss.backward()
    T, N = int(RIGHT.sum()), scored(batch)
    text = handle.report()
    assert f"padding removed in 2 calls ({2 * (B * S - T)} of {2 * B * S} tokens)" in text
    assert f"last layer ran on labelled positions in 2 calls ({2 * N} of {2 * T} tokens)" in text
    assert f"every position: {CALLER} (1 calls)" in text
    before = handle.to_json()["routing"]
    handle.restore()
    assert handle.to_json()["routing"] == before
    model(**batch).loss.backward()


@pytest.mark.parametrize("seed", range(5))
def test_positions_are_nonzeros(seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 9, generator=g) < 0.6
    scored_P = (mask & (torch.rand(4, 9, generator=g) < 0.5)).flatten()
    plan = plan_route((4, 9), scored_P, mask.long(), torch.nn.Identity(), Routing())
    assert plan.rows_N is None
    assert torch.equal(plan.places_N, scored_P.nonzero().squeeze(1))
    assert torch.equal(plan.route.real_T, mask.flatten().nonzero().squeeze(1))
    assert torch.equal(plan.route.real_T[plan.route.scored_N], plan.places_N)


def test_hooks_that_look_at_no_shape_do_not_count():
    """FSDP2's, and those transformers leaves behind; another's beside them does."""
    model = adapted_llama("lora", torch.float32)
    layer = causal(model).model.layers[0]

    def hook(module, args):
        return None

    hook.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    layer.register_forward_pre_hook(hook)
    assert notices_rows(causal(model).model.layers, Watch()) is None
    layer.register_forward_pre_hook(lambda module, args: None)
    assert notices_rows(causal(model).model.layers, Watch()) == "hooks on LlamaDecoderLayer"


def test_a_layer_that_occurs_twice_is_not_routed():
    stock = adapted_llama("lora", torch.float32)
    layers = stock.get_base_model().model.layers
    layers[1] = layers[0]
    fast = twin(stock)
    handle = patched(patch_model(fast))
    batch = {**trainers(token_batch()), "use_cache": False}  # its keys would be cached twice
    for _ in range(3):
        (loss, want), (found, got) = step(stock, batch), step(fast, batch)
        assert rel_err(found, loss) < 1e-4
        assert all(rel_err(got[name], gradient) < 1e-4 for name, gradient in want.items())
    assert "a layer occurs twice" in handle.to_json()["routing"]["unrouted"]


def test_what_notices_rows_is_seen_when_it_comes():
    """The walk over the layers is kept; what it looked at is not taken on trust."""
    fast = adapted_llama("lora", torch.float32)
    patch_model(fast)
    batch = token_batch()
    layer = causal(fast).model.layers[1]
    for _ in range(2):
        step(fast, batch)
    assert causal(fast)._bundles(causal_lm.ROWS) == ()
    handle = layer.mlp.down_proj.lora_B["default"].register_forward_hook(lambda *_: None)
    assert "hooks" in causal(fast)._bundles(causal_lm.ROWS)
    handle.remove()
    assert causal(fast)._bundles(causal_lm.ROWS) == ()
    layer.mlp.down_proj.lora_dropout["other"] = torch.nn.Dropout(0.1)
    assert "dropout" in causal(fast)._bundles(causal_lm.ROWS)
    del layer.mlp.down_proj.lora_dropout["other"]
    layer.mlp.act_fn.forward = layer.mlp.act_fn.forward
    assert "forward of its own" in causal(fast)._bundles(causal_lm.ROWS)
