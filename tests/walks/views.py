"""Ways to look at a model: each runs it and returns what a user would see, for :meth:`Twins.both` to compare."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from random import Random
from threading import Thread
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale
from tiny import VOCAB_SIZE
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from walks.twins import Twins, base_of

Batch = dict[str, Any]
View = Callable[[Any, Batch, Random], Any]
VIEWS: dict[str, View] = {}
LOWEST_VOCAB = 100  # embeddings are never resized below it


def view(look: View) -> View:
    VIEWS[look.__name__] = look
    return look


def draw_batch(rng: Random) -> Batch:
    """Tokens of some shape: full, padded on either side, packed; with all, some or no labels."""
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    size, seq_len = rng.choice([(1, 1), (1, 9), (2, 7), (3, 11)])
    ids = torch.randint(3, LOWEST_VOCAB, (size, seq_len), generator=g)
    batch: Batch = {"input_ids": ids}
    kind = rng.choice(["plain", "padded", "padded", "packed"])
    mask = torch.ones_like(ids)
    if kind == "padded" and seq_len > 6:
        mask[0, :3] = 0
        mask[-1, -2:] = 0
    if kind == "padded" or rng.random() < 0.3:
        batch["attention_mask"] = mask
    if kind == "packed" and size == 1 and seq_len > 4:
        batch["position_ids"] = torch.cat([torch.arange(4), torch.arange(seq_len - 4)])[None]
    share = rng.choice([0.0, 0.3, 0.3, 0.9])
    batch["labels"] = ids.masked_fill((mask == 0) | (torch.rand(ids.shape, generator=g) < share), -100)
    if rng.random() < 0.3:
        batch["num_items_in_batch"] = rng.choice([7, torch.tensor(7)])
    return batch


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of all parameters that have one; an empty one, of an adapter whose ranks are all cut, is as good as none."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.numel()}


@contextmanager
def mode(model: Any, *, training: bool) -> Iterator[None]:
    """Train or eval inside; every module's flag as it was afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


@view
def train(model: Any, batch: Batch, rng: Random) -> Any:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


@view
def logits_in_the_loss(model: Any, batch: Batch, rng: Random) -> Any:
    model.zero_grad()
    out = model(**batch)
    logits = rng.choice([lambda: out.logits, lambda: out["logits"], lambda: out[1]])()
    (out.loss + 0.1 * logits.square().mean()).backward()
    return {"loss": out.loss, "logits": logits, "gradients": gradients(model)}


@view
def logits_after_backward(model: Any, batch: Batch, rng: Random) -> Any:
    """Of a caller that gives no ``num_items_in_batch``: after a Trainer's they are refused."""
    model.zero_grad()
    out = model(**{name: value for name, value in batch.items() if name != "num_items_in_batch"})
    out.loss.backward()
    return {"logits": out.logits, "gradients": gradients(model)}


@view
def no_labels(model: Any, batch: Batch, rng: Random) -> Any:
    model.zero_grad()
    out = model(**{name: value for name, value in batch.items() if name not in ("labels", "num_items_in_batch")})
    out.logits.square().mean().backward()
    return {"logits": out.logits, "gradients": gradients(model)}


@view
def evaluation(model: Any, batch: Batch, rng: Random) -> Any:
    grad = rng.choice([torch.no_grad, torch.no_grad, torch.inference_mode, torch.enable_grad])
    with mode(model, training=False), grad():
        out = model(**batch)
        return {"loss": out.loss, "logits": out.logits}


@view
def evaluation_with_gradients(model: Any, batch: Batch, rng: Random) -> Any:
    with mode(model, training=False):
        return train(model, batch, rng)


@view
def train_mode_without_gradients(model: Any, batch: Batch, rng: Random) -> Any:
    with mode(model, training=True), torch.no_grad():
        out = model(**batch)
        return {"loss": out.loss, "logits": out.logits}


@view
def accumulated(model: Any, batch: Batch, rng: Random) -> Any:
    model.zero_grad()
    for scale in (1.0, 0.5):
        (model(**batch).loss * scale).backward()
    return gradients(model)


@view
def two_forwards_one_backward(model: Any, batch: Batch, rng: Random) -> Any:
    model.zero_grad()
    other = {**batch, "input_ids": batch["input_ids"].flip(1)}
    first, second = model(**batch), model(**other)
    (first.loss + 2 * second.loss).backward()
    return gradients(model)


@view
def two_backwards(model: Any, batch: Batch, rng: Random) -> Any:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(model)


@view
def autograd_grad(model: Any, batch: Batch, rng: Random) -> Any:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    chosen = rng.sample(named, min(len(named), 5))
    loss = model(**batch).loss
    found = torch.autograd.grad(loss, [p for _, p in chosen], allow_unused=True)
    return {name: g for (name, _), g in zip(chosen, found, strict=True)}


@view
def dropped_outputs(model: Any, batch: Batch, rng: Random) -> Any:
    losses = [float(model(**batch).loss.isnan()) for _ in range(rng.randint(1, 3))]
    return losses, train(model, batch, rng)


@view
def fields_of_the_output(model: Any, batch: Batch, rng: Random) -> Any:
    out = model(**batch, output_hidden_states=rng.random() < 0.5)
    leaves = rng.choice(
        [
            lambda: list(out.values()),
            lambda: [value for _, value in out.items()],
            lambda: list(out.to_tuple()),
            lambda: [out[name] for name in out],
            lambda: pytree.tree_leaves(dict(out)),
        ]
    )()
    kept = [leaf for leaf in pytree.tree_leaves(leaves) if not isinstance(leaf, DynamicCache)]
    return list(out.keys()), [type(leaf).__name__ for leaf in kept], kept


@view
def cached(model: Any, batch: Batch, rng: Random) -> Any:
    """A prompt, then its continuation from the cache; in this mode or in eval, with or without gradients."""
    ids = batch["input_ids"]
    name = "cache" if "cache" in signature(base_of(model).forward).parameters else "past_key_values"
    training, grad = rng.random() < 0.5, rng.random() < 0.5
    model.zero_grad()
    with mode(model, training=training), torch.set_grad_enabled(grad):
        cache = DynamicCache(config=base_of(model).config)
        logits = [
            model(input_ids=part, use_cache=True, **{name: cache}).logits
            for part in (ids[:, : max(1, ids.shape[1] - 2)], ids[:, -2:-1], ids[:, -1:])
            if part.shape[1]
        ]
        if grad:
            torch.cat(logits, 1).square().mean().backward()
    return {"logits": logits, "gradients": gradients(model)}


@view
def generation(model: Any, batch: Batch, rng: Random) -> Any:
    prompt = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    options = {"max_new_tokens": 3, "do_sample": rng.random() < 0.3, "pad_token_id": 0, "eos_token_id": 2}
    with mode(model, training=rng.random() < 0.4):
        return model.generate(**prompt, **options)


@view
def inside_checkpoint(model: Any, batch: Batch, rng: Random) -> Any:
    model.zero_grad()

    def losses() -> torch.Tensor:
        return sum(model(**batch).loss for _ in range(2))  # type: ignore[return-value]

    loss = checkpoint(losses, use_reentrant=False)
    loss.backward()
    return {"loss": loss, "gradients": gradients(model)}


@view
def autocast(model: Any, batch: Batch, rng: Random) -> Any:
    """Which leaves float64 alone."""
    with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype == torch.float64):
        return train(model, batch, rng)


@view
def saved_on_the_cpu(model: Any, batch: Batch, rng: Random) -> Any:
    """What the graph keeps goes through somebody's hooks: copied away and back."""
    with torch.autograd.graph.save_on_cpu():
        return train(model, batch, rng)


@view
def in_a_thread(model: Any, batch: Batch, rng: Random) -> Any:
    found: list[Any] = []

    def run() -> None:
        torch.manual_seed(5)
        try:
            found.append(train(model, batch, rng))
        except Exception as error:  # raised below
            found.append(error)

    thread = Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


@view
def without_the_wrapper(model: Any, batch: Batch, rng: Random) -> Any:
    """The transformers model inside, called by itself."""
    model.zero_grad()
    out = base_of(model)(**batch)
    out.loss.backward()
    return {"loss": out.loss, "gradients": gradients(model)}


@view
def adapters_rescaled(model: Any, batch: Batch, rng: Random) -> Any:
    if not hasattr(model, "peft_config"):
        return None
    with rescale_adapter_scale(model, 0.5):
        return train(model, batch, rng)


@view
def functional(model: Any, batch: Batch, rng: Random) -> Any:
    """Other values for some parameters, for this call; a recomputation after it would find the old ones."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return None
    named = dict(model.named_parameters())
    names = rng.sample(sorted(named), 4)
    values = {name: (named[name].detach() * 1.1).requires_grad_() for name in names}
    loss = torch.func.functional_call(model, values, kwargs=batch).loss
    found = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
    return loss, dict(zip(names, found, strict=True))


@view
def adapters_switched_off(model: Any, batch: Batch, rng: Random) -> Any:
    if not hasattr(model, "disable_adapter"):
        return None
    with model.disable_adapter():
        return train(model, batch, rng)


@view
def adapter_for_each_row(model: Any, batch: Batch, rng: Random) -> Any:
    if not hasattr(model, "peft_config"):
        return None
    names = [rng.choice([*model.peft_config, "__base__"]) for _ in batch["input_ids"]]
    before = {module: {*module._forward_pre_hooks} for module in model.modules()}
    try:
        with mode(model, training=rng.random() < 0.1):
            return model(**batch, adapter_names=names).logits
    finally:  # PEFT 0.21 leaves its own where the forward raises, and every later forward then raises, too
        for module, hooks in before.items():
            for key in {*module._forward_pre_hooks} - hooks:
                del module._forward_pre_hooks[key]


@view
def backbone(model: Any, batch: Batch, rng: Random) -> Any:
    model.zero_grad()
    hidden = base_of(model).model(input_ids=batch["input_ids"]).last_hidden_state
    if hidden.requires_grad:
        hidden.square().mean().backward()
    return {"hidden": hidden, "gradients": gradients(model)}


@view
def parts_by_themselves(model: Any, batch: Batch, rng: Random) -> Any:
    model.zero_grad()
    base = base_of(model)
    x = torch.randn(1, 3, base.config.hidden_size, dtype=next(model.parameters()).dtype).requires_grad_()
    layer = base.model.layers[rng.randrange(2)]
    parts = [layer.mlp, layer.self_attn.o_proj, layer.input_layernorm, base.lm_head]
    part = parts[rng.randrange(4)]
    if part is layer.self_attn.o_proj:
        x = torch.randn(2, part.in_features, dtype=x.dtype).requires_grad_()
    part(x).square().mean().backward()
    return {"x": x.grad, "gradients": gradients(model)}


@view
def inputs_embeds(model: Any, batch: Batch, rng: Random) -> Any:
    model.zero_grad()
    given = {name: value for name, value in batch.items() if name != "input_ids"}
    embeds = base_of(model).get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, **given).loss
    loss.backward()
    return {"loss": loss, "embeds": embeds.grad, "gradients": gradients(model)}


@view
def arguments_of_the_loss(model: Any, batch: Batch, rng: Random) -> Any:
    labels = batch["labels"]
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    more = rng.choice(
        [{"logits_to_keep": 1}, {"return_dict": False}, {"shift_labels": shifted}, {"labels": labels % VOCAB_SIZE}]
    )
    out = model(**{**batch, **more})
    return out[0], out[1]


def second_derivative(twins: Twins, batch: Batch) -> None:
    """A gradient penalty: stock's, or a patched model that says what to do instead."""
    from walks.twins import Difference

    def penalty(model: Any) -> Any:
        model.zero_grad()
        loss = model(**batch).loss
        trained = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
        (loss + sum(g.square().sum() for g in first if g is not None)).backward()
        return gradients(model)

    stock, fast = (twins._attempt(penalty, model) for model in twins.models)
    if stock.error is None and fast.error is not None:
        if "restore" not in str(fast.error):
            raise Difference(f"second derivative: stock has it, patched: {fast.told()}")
    elif stock.error is not None:
        return
    else:
        twins.compare(stock.value, fast.value, "second derivative")
