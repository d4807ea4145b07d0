"""The CausalLM's loss without logits under a plain Trainer and custom loops: stock's values, and logits if asked."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.distributed.fsdp._common_utils
import torch.nn.parallel.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.operations import recursively_apply
from adapters import adapted_llama, step, token_batch, twin
from datasets import Dataset
from numerics import FLOAT64_REL, assert_no_worse, rel_err
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import CACHE, VOCAB_SIZE, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.trainer_pt_utils import nested_detach
from transformers.utils.generic import find_labels
from trl.trainer import utils as trl_utils

from hf_fastpeft import causal_lm, patch_model, patched, restore
from hf_fastpeft.blocks import lm_head
from hf_fastpeft.causal_lm import FastCausalLM
from hf_fastpeft.fast_module import Site
from hf_fastpeft.lazy_output import LazyLogits

BATCH = token_batch()
LABELS = BATCH["labels"]
SHIFTED = torch.nn.functional.pad(LABELS[:, 1:], (0, 1), value=-100)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles each way, at sizes a test can afford."""
    monkeypatch.setattr(lm_head, "TILES", {"cuda": (8, 48), "cpu": (8, 48)})


@pytest.fixture
def one_precision():
    """accelerate keeps one mixed precision a process, unless told to forget."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def head_calls(model):
    site = causal(model)._fastpeft
    return site.fused["lm_head"], {why: n for (block, why), n in site.stock.items() if block == "lm_head"}


def causal(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def loss_in_float64(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
):
    """ForCausalLMLoss without its rounding to float32."""
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return fixed_cross_entropy(logits.view(-1, vocab_size), shift_labels.reshape(-1), num_items_in_batch, ignore_index)


def exact_pair(monkeypatch):
    """Stock and patched in float64, both with a loss in float64."""
    stock = adapted_llama()
    fast = twin(stock)
    patch_model(fast)
    causal(stock).loss_function = loss_in_float64
    monkeypatch.setattr(causal_lm, "_loss_is_rounded", lambda dtype: False)
    return stock, fast


def one_label():
    labels = torch.full_like(LABELS, -100)
    labels[2, 5] = 7
    return labels


CASES = {
    "mean": {},
    "num_items-int": {"num_items_in_batch": 50},
    "num_items-tensor": {"num_items_in_batch": torch.tensor(50)},
    "ignore_index": {"labels": LABELS.masked_fill(LABELS == -100, 9), "ignore_index": 9},
    "shift_labels": {"shift_labels": SHIFTED, "labels": torch.zeros_like(LABELS)},
    "shift_labels-flat": {"shift_labels": SHIFTED.view(1, -1), "num_items_in_batch": 31},
    "one-label": {"labels": one_label()},
    "every-label": {"labels": BATCH["input_ids"]},
    "no-label": {"labels": torch.full_like(LABELS, -100), "num_items_in_batch": 50},
    "first-label-only": {"labels": torch.full_like(LABELS, -100).index_fill_(1, torch.tensor([0]), 5)} | {
        "num_items_in_batch": 1
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_in_float64(case, monkeypatch):
    stock, fast = exact_pair(monkeypatch)
    batch = {**BATCH, **CASES[case]}
    want_loss, want = step(stock, batch)
    got_loss, got = step(fast, batch)
    assert head_calls(fast) == (1, {})
    assert got_loss.shape == want_loss.shape
    assert rel_err(got_loss, want_loss) < FLOAT64_REL
    assert got.keys() == want.keys()
    for name in want:
        assert rel_err(got[name], want[name]) < FLOAT64_REL, name


def test_a_mean_over_no_label_is_nan_and_teaches_nothing():
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast)
    batch = {**BATCH, "labels": torch.full_like(LABELS, -100)}
    for model in (stock, fast):
        loss, gradients = step(model, batch)
        assert loss.isnan()
        assert all((g == 0).all() for g in gradients.values())
    assert head_calls(fast) == (1, {})


def test_a_label_outside_the_vocabulary_is_refused():
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast)
    for wrong in (VOCAB_SIZE, -1):
        batch = {**BATCH, "labels": torch.full_like(LABELS, wrong)}
        for model in (stock, fast):
            with pytest.raises(IndexError):
                model(**batch)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_no_worse_than_stocks(dtype, autocast):
    """Over four batches together: a few numbers can be exact by luck."""
    stock = adapted_llama("lora", dtype, adapter_float32=True)
    fast, exact = twin(stock), twin(stock).double()
    patch_model(fast, only="LlamaForCausalLM")
    causal(exact).loss_function = loss_in_float64
    runs = []
    for seed in range(4):
        batch = token_batch(seed=seed)
        want = step(exact, batch)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            runs.append((step(fast, batch), step(stock, batch), want))
    losses = [torch.stack([run[i][0] for run in runs]) for i in range(3)]
    assert losses[0].dtype == losses[1].dtype == torch.float32
    assert_no_worse("loss", *losses)
    for name in runs[0][2][1]:
        assert_no_worse(name, *(torch.stack([run[i][1][name] for run in runs]) for i in range(3)))
    assert head_calls(fast) == (4, {})


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_times_vocabulary(dtype):
    stock = adapted_llama("lora", dtype, vocab_size=3000, config={"target_modules": ["q_proj", "down_proj"]})
    fast = twin(stock)
    patch_model(fast)
    batch = token_batch(4, 40)
    largest = {}
    for model in (stock, fast):
        with LargestTensor() as largest[model]:
            step(model, batch)
    head_elements = 3000 * 32  # views of the frozen weight
    assert largest[stock].numel == 4 * 40 * 3000
    assert largest[fast].numel <= head_elements < (batch["labels"] != -100).sum() * 3000


def test_the_output_is_stocks():
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast)
    want, got = (m(**BATCH, output_hidden_states=True) for m in (stock, fast))
    assert isinstance(got, CausalLMOutputWithPast)
    assert list(got.keys()) == list(want.keys()) == ["loss", "logits", CACHE, "hidden_states"]
    assert got.loss is got["loss"] is got[0] is got[:1][0] is got.get("loss")
    assert got.loss.dtype == torch.float32
    assert got.loss.shape == ()
    assert not got.loss._is_view()
    got.loss += 1  # as AdaLoRA does
    got.loss.backward()
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a, b)
    assert got[CACHE].get_seq_length() == want[CACHE].get_seq_length() == 17
    assert got.get("attentions") is None
    assert isinstance(got.__dict__["logits"], LazyLogits)  # nobody has asked
    torch.testing.assert_close(got.logits, want.logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attentions_are_stocks(attention):
    stock = adapted_llama("lora", torch.float32, attn_implementation=attention)
    fast = twin(stock)
    patch_model(fast)
    batch = {k: v for k, v in BATCH.items() if k != "attention_mask"}
    want, got = (m(**batch, output_attentions=attention == "eager") for m in (stock, fast))
    assert head_calls(fast) == (1, {})
    for a, b in zip(got.attentions or (), want.attentions or (), strict=True):
        torch.testing.assert_close(a, b)


ASK = {
    "attribute": lambda out: out.logits,
    "key": lambda out: out["logits"],
    "position": lambda out: out[1],
    "slice": lambda out: out[1:][0],
    "to_tuple": lambda out: out.to_tuple()[1],
    "get": lambda out: out.get("logits"),
    "dict": lambda out: dict(**out)["logits"],
    "copy": lambda out: copy.copy(out).logits,
    "items": lambda out: dict(out.items())["logits"],
    "values": lambda out: list(out.values())[1],
    "dictionary": lambda out: dict(out)["logits"],
    "unpacked": lambda out: {**out}["logits"],
    "pytree": lambda out: tree_leaves(out)[1],
    "nested_detach": lambda out: nested_detach(out)["logits"],
    "recursive": lambda out: recursively_apply(lambda t: t, out)["logits"],
}


@pytest.mark.parametrize("ask", ASK)
def test_logits_are_real_however_they_are_asked_for(ask):
    model = adapted_llama("lora", torch.float32)
    patch_model(model, only="LlamaForCausalLM")
    want = adapted_llama("lora", torch.float32)(**BATCH).logits
    out = model(**BATCH)
    assert torch.equal(ASK[ask](out), want)
    assert out.logits is out.logits is out["logits"] is dict(out.items())["logits"]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_logits_carry_stocks_gradient_and_dtype(autocast):
    """With no_grad() and outside the autocast in which the forward ran."""
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast, only="LlamaForCausalLM")
    gradients = []
    for model in (stock, fast):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            out = model(**BATCH)
        with torch.no_grad():
            logits = out.logits
        assert logits.dtype == (autocast or torch.float32)
        (out.loss + logits.float().square().mean()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert head_calls(fast) == (1, {})
    for name, want in gradients[0].items():
        assert rel_err(gradients[1][name], want) < (1e-5 if autocast is None else 2e-2), name


def test_an_output_is_pickled_with_its_logits():
    model = adapted_llama("lora", torch.float32)
    patch_model(model)
    out = model(**BATCH, use_cache=False)
    again = pickle.loads(pickle.dumps(out))  # noqa: S301
    assert isinstance(dict(again.items())["logits"], torch.Tensor)
    assert torch.equal(again.logits, out.logits)


@pytest.mark.usefixtures("one_precision")
@pytest.mark.parametrize("wrapped", ["peft", "causal-lm"])
def test_accelerates_conversion_keeps_the_logits_lazy_and_real(wrapped):
    """accelerate rebuilds the output in float32 out of its items."""
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast, only="LlamaForCausalLM")
    outputs = []
    for model in (stock, fast):
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        out = accelerator.prepare(model if wrapped == "peft" else causal(model))(**BATCH)
        if model is fast:
            assert isinstance(out.__dict__["logits"], LazyLogits)
        accelerator.backward(out.loss)
        outputs.append(out)
    want, got = outputs
    assert head_calls(fast) == (1, {})
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-2, atol=1e-2)
    assert got.logits.dtype == want.logits.dtype == torch.float32
    assert torch.equal(got.logits, want.logits)


@pytest.mark.usefixtures("one_precision")
def test_under_accelerates_wrapper_the_report_restore_and_unwrapping_are_right():
    model = tiny_llama().train()
    handle = patched(patch_model(model))
    model.lm_head.requires_grad_(False)
    want = model(**BATCH).loss
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(model)
    prepared(**BATCH)
    assert handle.to_json()["blocks"]["lm_head"]["stock"] == {}
    assert head_calls(model) == (2, {})
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(**BATCH).loss, want)
    prepared = accelerator.prepare(unwrapped)
    handle.restore()
    assert type(prepared(**BATCH)) is CausalLMOutputWithPast


@pytest.mark.parametrize("method", ["accelerate-hook-before", "accelerate-hook-after"])
def test_accelerate_hooks_on_the_causal_lm(method):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = adapted_llama("lora", torch.float32)
    want = causal(model)(**BATCH).loss
    if method.endswith("before"):
        add_hook_to_module(causal(model), ModelHook())
    handle = patched(patch_model(model))
    if method.endswith("after"):
        add_hook_to_module(causal(model), ModelHook())
    torch.testing.assert_close(model(**BATCH).loss, want)
    assert head_calls(model) == (1, {})
    assert handle.to_json()["blocks"]["lm_head"]["fused"] == 1
    remove_hook_from_module(causal(model))
    model(**BATCH)
    assert head_calls(model) == (2, {})
    handle.restore()
    assert "forward" not in vars(causal(model))
    assert torch.equal(model(**BATCH).loss, want)


def trained(model):
    causal(model).lm_head.requires_grad_(True)


def hooked(model):
    causal(model).lm_head.register_forward_hook(lambda module, args, out: out * 1.5)


def own_loss(model):
    causal(model).loss_function = lambda logits, labels, vocab_size, **kw: (
        2 * ForCausalLMLoss(logits, labels, vocab_size, **kw)
    )


def router(model):
    causal(model).config.output_router_logits = True


def foreign_head(model):
    head = causal(model).lm_head
    head.forward = lambda x: 2 * (x @ head.weight.t())


STATES = {
    trained: "the head is trained",
    hooked: "hooks on Linear",
    own_loss: "loss function <lambda>",
    router: "router logits",
    foreign_head: "Linear has a forward of its own (hook or foreign patch)",
}


@pytest.mark.parametrize("state", STATES, ids=lambda f: f.__name__)
def test_what_cannot_be_exact_runs_stock(state):
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    for model in (stock, fast):
        state(model)
    handle = patched(patch_model(fast, only="LlamaForCausalLM"))
    want, got = stock(**BATCH), fast(**BATCH)
    assert type(got) is type(want)
    assert torch.equal(got[0], want[0])
    assert head_calls(fast) == (0, {STATES[state]: 1})
    assert STATES[state] in handle.report()


@pytest.mark.parametrize(
    ("config", "overrides", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, {}, "head is ModulesToSaveWrapper"),
        ({"target_modules": ["q_proj", "lm_head"]}, {}, "adapter on the head"),
        ({"modules_to_save": ["embed_tokens"]}, {"tie_word_embeddings": True}, None),
        ({"trainable_token_indices": [5]}, {"tie_word_embeddings": True}, "head is TrainableTokensWrapper"),
    ],
    ids=["saved", "lora", "tied-saved", "tied-tokens"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapted_heads_are_exact(config, overrides, reason):
    stock = adapted_llama("lora", torch.float32, config=config, **overrides)
    fast = twin(stock)
    handle = patched(patch_model(fast, only="LlamaForCausalLM"))
    want_loss, want = step(stock, BATCH)
    got_loss, got = step(fast, BATCH)
    assert got.keys() == want.keys()
    if reason is not None:
        assert head_calls(fast) == (0, {reason: 1})
        assert handle.to_json()["blocks"]["lm_head"]["stock"] == {reason: 1}
        assert torch.equal(got_loss, want_loss)
    assert all(rel_err(got[n], want[n]) < 1e-5 for n in want)


def test_tied_and_trained_embeddings_run_stock():
    stock = tiny_llama(tie_word_embeddings=True).train()
    fast = twin(stock)
    patch_model(fast, only="LlamaForCausalLM")
    want_loss, want = step(stock, BATCH)
    got_loss, got = step(fast, BATCH)
    assert torch.equal(got_loss, want_loss)
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert head_calls(fast) == (0, {"the head is trained": 1})


CALLS = {
    "no labels: real logits": {"labels": None},
    "logits_to_keep": {"logits_to_keep": 17},
    "return_dict=False": {"return_dict": False},
    "router logits": {"output_router_logits": True},
    "not training: real logits": {},
}


@pytest.mark.parametrize("reason", CALLS)
def test_calls_that_want_more_run_stock(reason):
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast, only="LlamaForCausalLM")
    batch = {**BATCH, **CALLS[reason]}
    with torch.set_grad_enabled(not reason.startswith("not training")):
        want, got = stock(**batch), fast(**batch)
    assert type(got) is type(want)
    index = 0 if batch["labels"] is None else 1
    assert torch.equal(got[index], want[index])
    assert head_calls(fast) == (0, {reason: 1})


def test_labels_of_another_dtype_and_shift_labels_alone_are_stocks():
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast, only="LlamaForCausalLM")
    for model in (stock, fast):
        assert model(input_ids=BATCH["input_ids"], shift_labels=SHIFTED).loss is None
        with pytest.raises(RuntimeError, match="Int"):
            model(input_ids=BATCH["input_ids"], labels=BATCH["input_ids"].int())
    assert head_calls(fast) == (0, {"no labels: real logits": 1, "labels are torch.int32": 1})


def test_positional_arguments_and_stocks_own_errors():
    stock = adapted_llama("lora", torch.float32).get_base_model()
    fast = twin(stock)
    patch_model(fast)
    args = (BATCH["input_ids"], BATCH["attention_mask"], None, None, None, LABELS)
    torch.testing.assert_close(fast(*args).loss, stock(*args).loss)
    assert head_calls(fast) == (1, {})
    for model in (stock, fast):
        with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
            model(*args, input_ids=args[0])
        with pytest.raises(TypeError, match="positional arguments"):
            model(*args, None, 0, 5)


def test_float64_models_keep_stocks_float32_loss():
    model = adapted_llama("lora", torch.float64)
    handle = patched(patch_model(model))
    want = adapted_llama("lora", torch.float64)(**BATCH).loss
    assert rel_err(model(**BATCH).loss, want) < FLOAT64_REL
    reason = "float64 model (stock computes the loss in float32)"
    assert head_calls(model) == (0, {reason: 1})
    assert handle.to_json()["blocks"]["lm_head"]["stock"] == {reason: 1}


def test_a_forward_replaced_on_the_class_is_respected(monkeypatch):
    model = adapted_llama("lora", torch.float32)
    handle = patched(patch_model(model))
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, *args, **kwargs: "theirs")
    assert model(**BATCH) == "theirs"
    assert f"LlamaForCausalLM.forward was replaced by {__name__}" in handle.report()


def test_a_head_that_does_not_fit_the_config_is_stocks_to_refuse():
    model = adapted_llama("lora", torch.float32)
    patch_model(model)
    causal(model).config.vocab_size = 100
    with pytest.raises((RuntimeError, ValueError)):
        model(**BATCH)
    assert head_calls(model) == (0, {"head has 128 rows, config.vocab_size is 100": 1})


class FastGemma2ForCausalLM(FastCausalLM, Gemma2ForCausalLM):
    """A family whose logits have a soft cap, without its other blocks."""


def test_a_soft_cap_is_applied_to_loss_and_logits(monkeypatch):
    config = Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=VOCAB_SIZE, final_logit_softcapping=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = Gemma2ForCausalLM(config).double().train()
    stock.lm_head.weight.data.mul_(20)
    stock.lm_head.requires_grad_(False)  # and the embeddings, tied to it
    fast = twin(stock)
    fast.__class__, fast._fastpeft = FastGemma2ForCausalLM, Site("auto")
    batch = {k: v for k, v in BATCH.items() if k != "attention_mask"}  # a fully masked row is NaN in eager attention
    want = stock(**batch)
    assert want.logits.abs().max() > 0.4  # the cap bends something
    stock.loss_function = loss_in_float64
    monkeypatch.setattr(causal_lm, "_loss_is_rounded", lambda dtype: False)
    assert torch.equal(fast(**batch).logits, want.logits)
    want_loss, want = step(stock, batch)
    got_loss, got = step(fast, batch)
    assert head_calls(fast) == (2, {})
    assert rel_err(got_loss, want_loss) < FLOAT64_REL
    assert all(rel_err(got[n], want[n]) < FLOAT64_REL for n in want)
    config.logit_scale = 0.1
    fast.config.logit_scale = 0.1
    assert fast.obstacle("lm_head") == "config.logit_scale=0.1"


def test_signatures_are_stocks():
    model = tiny_llama()
    want = inspect.signature(model.forward)
    patch_model(model)
    assert inspect.signature(model.forward) == want
    assert inspect.signature(type(model).forward) == inspect.signature(LlamaForCausalLM.forward)
    assert find_labels(type(model)) == find_labels(LlamaForCausalLM) == ["labels"]
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert inspect.signature(model.forward) == want


def test_copies_pickles_and_restore():
    model = adapted_llama("lora", torch.float32)
    stock_loss = step(model, BATCH)[0]
    handle = patched(patch_model(model))
    want = step(model, BATCH)[0]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        before = head_calls(other)[0]
        assert torch.equal(step(other, BATCH)[0], want)
        assert head_calls(other) == (before + 1, {})
    held = causal(model).forward
    handle.restore()
    assert causal(model).forward.__func__ is LlamaForCausalLM.forward
    for out in (model(**BATCH), held(**BATCH)):
        assert type(out) is CausalLMOutputWithPast
        assert torch.equal(out.loss, stock_loss)


def rows(n=12, seq_len=11):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB_SIZE, (n, seq_len), generator=g)
    masked = torch.arange(seq_len) < torch.arange(n)[:, None] % 7 + 2  # another number of labels in each row
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.masked_fill(masked, -100).tolist()})


def run_trainer(folder, patch, trainer_class=Trainer, compute_metrics=None, model=None, **overrides):
    model = adapted_llama("lora", torch.float32) if model is None else model
    if patch:
        patch_model(model)
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **overrides,
    }
    trainer = trainer_class(
        model,
        args=TrainingArguments(**settings),
        train_dataset=rows(),
        eval_dataset=rows(4),
        compute_metrics=compute_metrics,
    )
    trainer.train()
    return trainer


def losses(trainer):
    return [row[name] for row in trainer.state.log_history for name in ("loss", "grad_norm") if name in row]


@pytest.mark.parametrize(
    "overrides",
    [{}, {"gradient_checkpointing": True}, {"average_tokens_across_devices": False}, {"max_grad_norm": 0.1}],
    ids=lambda overrides: next(iter(overrides), "plain"),
)
def test_trainer_is_step_identical(overrides, tmp_path):
    stock, fast = (run_trainer(tmp_path, patch, **overrides) for patch in (False, True))
    assert fast.model_accepts_loss_kwargs == stock.model_accepts_loss_kwargs
    assert fast.label_names == stock.label_names
    assert sorted(fast._signature_columns) == sorted(stock._signature_columns)
    assert losses(fast) == pytest.approx(losses(stock), rel=1e-6)
    assert len(losses(fast)) == 8
    assert head_calls(fast.model) == (8, {})


def test_trainer_decides_the_same_about_loss_arguments_without_peft(tmp_path):
    """It reads the signature of the CausalLM's own forward; the scaling under accumulation depends on it."""
    runs = []
    for patch in (False, True):
        model = tiny_llama()
        model.lm_head.requires_grad_(False)
        runs.append(run_trainer(tmp_path, patch, model=model))
    assert [run.model_accepts_loss_kwargs for run in runs] == [True, True]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)
    assert head_calls(runs[1].model) == (8, {})


@pytest.mark.usefixtures("one_precision")
def test_trainer_in_bf16_runs_fused(tmp_path):
    stock, fast = (run_trainer(tmp_path, patch, bf16=True) for patch in (False, True))
    assert losses(fast) == pytest.approx(losses(stock), rel=3e-2)  # bf16's own resolution
    assert head_calls(fast.model) == (8, {})


def test_compute_metrics_sees_real_logits(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    for patch in (False, True):
        trainer = run_trainer(tmp_path, patch, compute_metrics=metrics, eval_strategy="steps", eval_steps=4)
    assert seen[0].shape == (4, 11, VOCAB_SIZE)
    torch.testing.assert_close(torch.tensor(seen[1]), torch.tensor(seen[0]), rtol=1e-4, atol=1e-5)
    assert head_calls(trainer.model) == (8, {"inference (stock numerics and caches)": 1})


class ReadsLogits(Trainer):
    """A user's trainer: a penalty on the logits beside the model's loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = outputs.loss + 1e-3 * outputs.logits.float().square().mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.usefixtures("one_precision")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_that_reads_logits_gets_them(bf16, tmp_path):
    stock, fast = (run_trainer(tmp_path, patch, ReadsLogits, bf16=bf16) for patch in (False, True))
    assert losses(fast) == pytest.approx(losses(stock), rel=3e-2 if bf16 else 1e-5)
    assert head_calls(fast.model) == (8, {})


def test_label_smoothing_is_stocks(tmp_path):
    stock, fast = (run_trainer(tmp_path, patch, label_smoothing_factor=0.1) for patch in (False, True))
    assert losses(fast) == pytest.approx(losses(stock), rel=1e-5)
    assert head_calls(fast.model) == (0, {"no labels: real logits": 8})


def test_a_compiled_model_runs_stock_and_is_not_counted():
    stock = adapted_llama("lora", torch.float32)
    fast = twin(stock)
    patch_model(fast)
    torch._dynamo.reset()
    compiled = torch.compile(causal(fast), backend="eager", fullgraph=True)
    out = compiled(**BATCH)
    torch.testing.assert_close(out.loss, stock(**BATCH).loss)
    assert head_calls(fast) == (0, {})


def test_functional_transforms_and_global_hooks_run_stock():
    model = adapted_llama("lora", torch.float32)
    patch_model(model, only="LlamaForCausalLM")
    parameters = {n: p.detach() for n, p in model.named_parameters() if "lora_B" in n}
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (), BATCH).loss)(parameters)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    model(**BATCH)
    handle.remove()
    assert head_calls(model) == (0, {"torch.func or forward-mode differentiation": 1, "global module hooks": 1})


def test_a_foreign_forward_on_the_instance_is_reported():
    model = adapted_llama("lora", torch.float32)
    handle = patched(patch_model(model))
    causal(model).forward = lambda *args, **kwargs: None
    assert model(**BATCH) is None
    assert "stock now: foreign forward on this instance" in handle.report()


def test_generation_is_stocks():
    stock = adapted_llama("lora", torch.float32).eval()
    fast = twin(stock)
    patch_model(fast)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    prompt = {k: BATCH[k][2:] for k in ("input_ids", "attention_mask")}
    assert torch.equal(fast.generate(**prompt, **options), stock.generate(**prompt, **options))


def test_data_parallel_replicas_run_stock():
    """They share what is counted and copied; and gathering would ask every replica for its logits."""
    model = adapted_llama("lora", torch.float32)
    patch_model(model)
    causal(model)._is_replica = True
    assert type(model(**BATCH)) is CausalLMOutputWithPast
    assert head_calls(model) == (0, {"a replica of DataParallel": 1})


# logits read late


def adapted_pair(**overrides):
    stock = adapted_llama("lora", torch.float32, **overrides)
    return stock, patch_model(twin(stock))


CHANGES = {
    "hook on the head": lambda m: m.lm_head.register_forward_hook(lambda module, args, out: 2 * out),
    "another head": lambda m: setattr(m, "lm_head", torch.nn.Linear(32, VOCAB_SIZE)),
    "another weight": lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(torch.zeros(VOCAB_SIZE, 32))),
    "weight's data replaced": lambda m: setattr(m.lm_head.weight, "data", torch.zeros(VOCAB_SIZE, 32)),
    "moved": lambda m: m.double(),
    "eval": lambda m: m.eval(),
    "restored": lambda m: restore(m),
    "adapters off": lambda m: [x.enable_adapters(False) for x in m.modules() if isinstance(x, BaseTunerLayer)],
}


@pytest.mark.parametrize("change", CHANGES)
def test_logits_are_the_forwards_whatever_happens_to_the_model_since(change):
    found = []
    for model in adapted_pair():
        out = model(**BATCH)
        CHANGES[change](causal(model))
        found.append(out.logits)
    assert found[1].dtype == found[0].dtype
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_head_that_was_written_to_is_an_error():
    _, fast = adapted_pair()
    out = fast(**BATCH)
    with torch.no_grad():
        causal(fast).lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="the head's weight was written to since this forward"):
        _ = out.logits


@pytest.mark.parametrize("watched", ["hook", "retained gradient"])
def test_a_gradient_of_logits_that_would_not_come_is_an_error(watched):
    _, fast = adapted_pair()
    out = fast(**BATCH)
    if watched == "hook":
        out.logits.register_hook(lambda gradient: 2 * gradient)
    else:
        out.logits.retain_grad()
    with pytest.raises(RuntimeError, match=r"outputs\.logits has a hook or retains its gradient"):
        out.loss.backward()


@pytest.mark.parametrize("trl", [False, True])
@pytest.mark.parametrize("shape", [(3, 16), (3, 18), (2, 17), (1, 51), (51,)])
def test_labels_of_another_shape_are_stocks_to_understand(shape, trl):
    labels = torch.full((51 * 2,), 5)[: torch.Size(shape).numel()].view(shape)
    found = []
    for model in adapted_pair():
        batch = {**BATCH, "labels": labels}
        if trl:
            trl_utils.add_fused_lm_head(causal(model))
            batch["fused_lm_head"] = True
        try:
            found.append(causal(model)(**batch).loss.item())
        except (ValueError, RuntimeError, IndexError) as error:
            found.append(type(error))
    assert found[1] == (pytest.approx(found[0], rel=1e-4) if isinstance(found[0], float) else found[0])


@pytest.mark.parametrize("trained", [False, True])
def test_a_label_outside_the_vocabulary_is_stocks_error(trained):
    labels = BATCH["labels"].clone()
    labels[0, 8] = VOCAB_SIZE
    for model in adapted_pair():
        model.requires_grad_(trained)
        causal(model).lm_head.requires_grad_(False)
        with pytest.raises(IndexError):
            model(**{**BATCH, "labels": labels})


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP"])
def test_torchs_wrappers_hand_the_output_on_without_computing_logits(wrapper):
    """They look for tensors that a backward can start from; a hook of theirs on logits would wait for ever."""
    find = {
        "DDP": torch.nn.parallel.distributed._find_tensors,
        "FSDP": getattr(torch.distributed.fsdp._common_utils, "collect_grad_tensors", None),
    }[wrapper]
    if find is None:
        pytest.skip("this torch's FSDP flattens outputs as a pytree")
    _, fast = adapted_pair()
    out = fast(**BATCH)
    assert any(tensor is out.loss for tensor in find(out))
    assert isinstance(out.__dict__["logits"], LazyLogits)
    out.loss.backward()
