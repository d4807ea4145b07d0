"""PEFT's contracts as a matrix: every registered method, with LoRA as the control, through every check.

``make matrix`` runs it and prints the table. A cell that a method refuses by design is a test too: of the documented
error (``tests/methods.py``, ``refuses``).
"""

import copy
import json
import pickle
import sys
from contextlib import nullcontext

import pytest
import torch
from adapters import step, token_batch
from methods import METHODS, reference_llama
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from tiny import tiny_dataset, tiny_llama, tiny_tokenizer
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_fastpeft import export_to_lora, load_adapter, patch_model, patched

pytestmark = [
    # PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned:UserWarning"),
    pytest.mark.filterwarnings("ignore:adaptive LoRA. ranks are not being allocated:UserWarning"),
    # what PEFT says to every second transformers add_adapter
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))
FILE = "adapter_model.safetensors"


@pytest.fixture(params=METHODS)
def method(request, record_property):
    """One column of the table; which row is the test's name."""
    found, check = METHODS[request.param], request.function.__name__.removeprefix("test_")
    refusal = found.refuses.get(check)
    record_property("matrix", (check, found.name, refusal and refusal.reason))
    return found


@pytest.fixture
def promised(request, method):
    """Around what a method must do, or refuse with the error that it documents."""
    refusal = method.refuses.get(request.function.__name__.removeprefix("test_"))
    return nullcontext() if refusal is None else pytest.raises(refusal.error, match=refusal.match)


def own(model, adapter="default"):
    """The adapter's parameters: name -> parameter."""
    return {n: p for n, p in model.named_parameters() if f".{adapter}." in n or n.endswith(f".{adapter}")}


@torch.no_grad()
def change(model, adapter="default", seed=0):
    """Move every parameter of the adapter by about its own size, so that it is not the identity any more."""
    generator = torch.Generator().manual_seed(seed)
    for p in own(model, adapter).values():
        size = p.float().pow(2).mean().sqrt().item() or 0.3
        if p.dim() > 1:
            size = max(size, 0.1)
        p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * size)
    return model


def adapted(method, dtype=torch.float32, base=None, **settings):
    torch.manual_seed(0)
    return change(get_peft_model(base or tiny_llama(dtype), method.config(**settings))).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def base_logits(dtype=torch.float32):
    return logits(tiny_llama(dtype).eval())


def same_state(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


def test_every_refusal_is_a_check():
    checks = {n.removeprefix("test_") for n in dir(sys.modules[__name__]) if n.startswith("test_")}
    assert {check for method in METHODS.values() for check in method.refuses} <= checks


# ---- what it computes


def test_starts_as_the_base_model(method):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), method.config()).eval()
    assert torch.equal(logits(model), base_logits())
    assert not torch.allclose(logits(change(model)), base_logits(), atol=1e-2)


def test_forward_is_the_formula(method):
    assert method.formula is not None, f"describe {method.name} in tests/methods.py"
    model = adapted(method)
    base = tiny_llama()
    formula = method.formula(get_peft_model_state_dict(model), model.peft_config["default"])
    want = reference_llama(base.state_dict(), IDS, base.config, formula)
    assert (logits(model) - want).norm() / want.norm() < 2e-6  # float32 against float64


def test_gradients_only_in_the_adapter(method):
    model = adapted(method).train()
    names = set(own(model))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    _, grads = step(model, token_batch())
    assert {n for n, grad in grads.items() if grad.any()} == names


def test_gradient_checkpointing(method):
    model = adapted(method).train()
    loss, grads = step(model, token_batch())
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again, regrads = step(model, token_batch())
        assert torch.equal(again, loss)
        assert regrads.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(regrads[name], grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(method, dtype, tmp_path):
    model = adapted(method, dtype)
    assert {p.dtype for p in own(model).values()} == {torch.float32}
    assert logits(model).dtype == dtype
    assert torch.equal(logits(get_peft_model(tiny_llama(dtype), method.config()).eval()), base_logits(dtype))
    loss, grads = step(model.train(), token_batch())
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads.values())
    model.eval().save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / FILE).values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(tiny_llama(dtype), tmp_path).eval()
    same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize(
    "bits",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        {"load_in_8bit": True},
    ],
    ids=["4-bit", "8-bit"],
)
def test_quantised_base(method, bits, tmp_path):
    tiny_llama(hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(tmp_path / "base")

    def base():
        quantised = BitsAndBytesConfig(**bits)
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised).eval()

    model = get_peft_model(base(), method.config()).eval()
    assert torch.equal(logits(model), logits(base()))
    change(model)
    model.state_dict()  # bitsandbytes 0.50 packs CPU weights in evaluation, without a backward; this undoes it
    loss, grads = step(model.train(), token_batch())
    assert loss.isfinite()
    assert grads.keys() == own(model).keys()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model.eval()))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))


@pytest.mark.parametrize("patched_first", [True, False], ids=["before-peft", "after-peft"])
def test_patched_model(method, patched_first):
    def build(patch):
        base = tiny_llama(torch.float64)
        handle = patched(patch_model(base)) if patch and patched_first else None
        torch.manual_seed(0)
        model = change(get_peft_model(base, method.config(), autocast_adapter_dtype=False)).train()
        return model, patched(patch_model(model)) if patch and not patched_first else handle

    (stock, _), (fast, handle) = build(False), build(True)
    for seed in range(2):
        batch = token_batch(seed=seed)
        (want, want_grads), (loss, grads) = step(stock, batch), step(fast, batch)
        torch.testing.assert_close(loss, want)
        assert grads.keys() == want_grads.keys()
        for name, grad in want_grads.items():
            torch.testing.assert_close(grads[name], grad, msg=name)
    assert any(row["calls_fused"] for row in handle.to_json()["blocks"].values())
    handle.restore()
    assert torch.equal(logits(fast.eval()), logits(stock.eval()))


# ---- files


def test_config_round_trip(method, tmp_path):
    made = method.config(modules_to_save=["lm_head"])
    made.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == method.name
    for cls in (PeftConfig, type(made)):
        loaded = cls.from_pretrained(str(tmp_path))
        assert type(loaded) is type(made)
        assert loaded.to_dict() == made.to_dict()
    assert copy.deepcopy(made).to_dict() == made.to_dict()


def test_save_and_load(method, tmp_path):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(own(model))


def test_low_cpu_mem_usage(method, tmp_path):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=True).eval()
    same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_state_dict_keys(method, tmp_path):
    named, plain = (get_peft_model(tiny_llama(), method.config(), adapter_name=n) for n in ("other", "default"))
    keys = get_peft_model_state_dict(plain).keys()
    assert get_peft_model_state_dict(named, adapter_name="other").keys() == keys
    assert all(key.startswith("base_model.model.model.layers.") and "default" not in key for key in keys)
    assert len(keys) == len(own(plain))
    named.save_pretrained(tmp_path)
    assert load_file(tmp_path / "other" / FILE).keys() == keys


def test_model_card(method, tmp_path):
    adapted(method).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert ("import hf_fastpeft" in card) == (method.name != "LORA")  # LoRA loads without this package


def test_load_adapter_of_this_package(method, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted(method, base=LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(tmp_path / "adapter")), logits(model))


@pytest.mark.usefixtures("transformers_takes_peft")
def test_transformers_adapter_api(method, tmp_path):
    model = adapted(method)
    model.save_pretrained(tmp_path / "a")
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path / "a"))
    assert torch.equal(logits(loaded.eval()), logits(model))
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), base_logits())
    loaded.enable_adapters()
    loaded.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "b").eval()), logits(model))
    loaded.add_adapter(method.config(), "second")
    assert torch.equal(logits(loaded.eval()), base_logits())
    loaded.set_adapter("default")
    loaded.delete_adapter("second")
    assert torch.equal(logits(loaded), logits(model))


def test_modules_to_save(method, tmp_path):
    model = adapted(method, modules_to_save=["lm_head"])
    assert any("lm_head.modules_to_save.default" in n for n in own(model))
    _, grads = step(model.train(), token_batch())
    assert grads.keys() == own(model).keys()
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / FILE)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model.eval()))
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits())


def test_deepcopy_and_pickle(method):
    model = adapted(method)
    want = logits(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  our own bytes
        change(model, seed=1)
        assert torch.equal(logits(again), want)
        assert {n for n, p in again.named_parameters() if p.requires_grad} == set(own(model))


# ---- merging and exporting


def test_merge_and_unmerge(method, promised):
    model = adapted(method)
    want = logits(model)
    with promised:
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(logits(model), want, atol=2e-5, rtol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), base_logits(), atol=2e-5, rtol=1e-5)
        model.merge_adapter()
        model.unmerge_adapter()
    torch.testing.assert_close(logits(model), want, atol=2e-5, rtol=1e-5)


def test_merge_and_unload(method, promised):
    model = adapted(method)
    want = logits(model)
    with promised:
        merged = model.merge_and_unload()
        assert merged.state_dict().keys() == tiny_llama().state_dict().keys()
        torch.testing.assert_close(logits(merged), want, atol=2e-5, rtol=1e-5)


def test_unload(method):
    base = adapted(method).unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in base.modules())
    same_state(base, tiny_llama())
    assert torch.equal(logits(base), base_logits())


def test_export_to_lora(method, promised, tmp_path):
    model = adapted(method)
    with promised:
        export_to_lora(model, tmp_path / "lora")
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
        assert loaded.peft_config["default"].peft_type.value == "LORA"
        torch.testing.assert_close(logits(loaded), logits(model), atol=2e-5, rtol=1e-5)
    assert (tmp_path / "lora").exists() == ("export_to_lora" not in method.refuses)


# ---- several adapters


def test_disable_adapter(method):
    model = adapted(method)
    want = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits())
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), want)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(own(model))


def test_several_adapters(method, tmp_path):
    model = adapted(method)
    model.add_adapter("second", method.config(r=2))
    change(model.eval(), "second", seed=1)
    first = logits(model)
    assert torch.equal(first, logits(adapted(method)))
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(second, first, atol=1e-2)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(own(model, "second"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "second", adapter_name="again").eval()
    loaded.load_adapter(tmp_path, "default")
    for name, want in (("again", second), ("default", first), ("again", second)):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), want)


def test_two_active_adapters(method):
    model = adapted(method)
    model.add_adapter("second", method.config(r=2))  # the identity yet
    want = logits(model)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model.eval()), want)
    change(model, "second", seed=1)
    assert not torch.allclose(logits(model), want, atol=1e-2)
    _, grads = step(model.train(), token_batch())
    assert grads.keys() == own(model).keys() | own(model, "second").keys()


@pytest.mark.filterwarnings("ignore:Adapter second was active which is now deleted:UserWarning")
def test_delete_adapter(method):
    model = adapted(method)
    model.add_adapter("second", method.config(r=2))
    model.set_adapter("second")
    model.delete_adapter("second")
    assert own(model, "second") == {}
    model.set_adapter("default")
    assert torch.equal(logits(model.eval()), logits(adapted(method)))
    model.delete_adapter("default")
    assert own(model) == {}
    assert torch.equal(logits(model.base_model.model), base_logits())  # a PeftModel without adapters cannot be called


def test_mixed_batch(method, promised):
    model = adapted(method)
    with promised:
        mixed = model(IDS, adapter_names=["default", "__base__"]).logits
        torch.testing.assert_close(mixed[0], logits(model)[0])
        torch.testing.assert_close(mixed[1], base_logits()[1])


def test_mixed_model(method, promised):
    with promised:
        get_peft_model(tiny_llama(), method.config(), mixed=True)


# ---- under a trainer


def test_trainer(method, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), method.config(**method.training))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(row["prompt"] + row["completion"])["input_ids"][:6] for row in tiny_dataset(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.01,
        warmup_steps=0,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=method.callbacks())
    assert trainer.train().global_step == 2
    after = dict(model.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    assert {n for n, p in after.items() if not torch.equal(p, before[n])} == set(own(model))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-2").eval()
    assert torch.equal(logits(loaded), logits(model.eval()))
