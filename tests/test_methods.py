"""Every method of ``adapter:``: its example runs at toy size, patched as stock, and what it cannot do it says."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from rich.console import Console
from typer.testing import CliRunner

import hf_fastpeft
from hf_fastpeft import cli
from hf_fastpeft.config import load_config, parse_config
from hf_fastpeft.config.mapping import adapter_config, arguments
from hf_fastpeft.config.methods import METHODS, PROMPT_METHODS, SHORTHANDS
from hf_fastpeft.errors import AdapterError, ConfigError
from hf_fastpeft.run import methods
from hf_fastpeft.run.runner import model_and_batch, train

pytestmark = [
    # PEFT 0.21 reads the old name of a property of transformers 5.23 (peft_model.py, PeftModel.__init__).
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT 0.21 hands prefixes over by the name that transformers 5.24 deprecates.
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    # PEFT 0.21 on loading its own AdaLoRA folders.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(file.stem for file in EXAMPLES.glob("*.yaml") if file.stem != "quickstart")
BASE = "base_model: model\ndatasets: [{path: rows.jsonl}]\n"
# What a model of hidden size 32 and a run of two steps need smaller.
TOY = {
    "eva": ["lora_r=4"],
    "rslora": ["lora_r=4"],
    "adalora": ["lora_r=4", "fastpeft.adalora.target_r=2", "fastpeft.adalora.tinit=0", "fastpeft.adalora.tfinal=0"],
    "adaptive_lora": [
        "lora_r=4", "fastpeft.adaptive_lora.target_r=2", "fastpeft.adaptive_lora.tinit=0",
        "fastpeft.adaptive_lora.tfinal=0",
    ],
    "sora": ["fastpeft.sora.warmup_ratio=0", "fastpeft.sora.settle_ratio=0"],
    "prompt": ["fastpeft.prompt.prompt_tuning_init_text=w1 w2 w3"],
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with a tiny model, its tokenizer and rows."""
    folder = tmp_path_factory.mktemp("methods")
    # bitsandbytes on a CPU takes whole blocks of 64 weights
    tiny.tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.tiny_dataset(16)))
    return folder


def toy(name, base, out, *more):
    """The example's own file, on the tiny model and two steps."""
    changes = [
        f"base_model={base / 'model'}", f"datasets=[{{path: {base / 'rows.jsonl'}}}]", "test_datasets=[]",
        "val_set_size=4", "max_steps=2", "micro_batch_size=4", "eval_batch_size=4", "sequence_len=64",
        "learning_rate=1e-2", "warmup_ratio=0", f"output_dir={out}", "fastpeft.samples=1", "fastpeft.sample_tokens=2",
        "fastpeft.plots=false",
    ]  # fmt: skip
    return load_config(EXAMPLES / f"{name}.yaml", overrides=[*changes, *TOY.get(name, ()), *more]).config


def run(config, tmp_path):
    with (tmp_path / "console.txt").open("a") as file:
        return train(config, console=Console(file=file, width=200))


def test_every_method_has_an_example():
    assert set(NAMES) == {*METHODS, *SHORTHANDS}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_patched_as_stock_and_loads_again(name, base, tmp_path):
    torch.manual_seed(0)
    patched = run(toy(name, base, tmp_path / "patched"), tmp_path)
    torch.manual_seed(0)
    stock = run(toy(name, base, tmp_path / "stock", "fastpeft.patch=false"), tmp_path)
    assert patched.patch is not None
    assert stock.patch is None
    # TRL casts the adapters of quantised models to bfloat16, of which one ulp is 0.8 %
    tolerance = 2e-2 if name == "qlora" else 1e-3
    assert patched.loss_before == pytest.approx(stock.loss_before, rel=1e-4)
    assert patched.loss_after == pytest.approx(stock.loss_after, rel=1e-4)
    assert patched.loss_after != patched.loss_before
    for key in ("loss", "grad_norm"):
        found, want = ([step[key] for step in result.history if key in step] for result in (patched, stock))
        assert len(want) == 2
        assert found == pytest.approx(want, rel=tolerance)
        assert min(want) > 0
    if name == "full":
        return
    with torch.no_grad():
        logits = [
            hf_fastpeft.load_adapter(folder)(torch.arange(8, 16)[None]).logits
            for folder in (patched.adapter_dir, patched.lora_dir)
            if folder is not None
        ]
    assert torch.isfinite(logits[0]).all()
    if patched.lora_dir is not None:  # plain LoRA on the unchanged base: the same function
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PROMPT_METHODS)
def test_a_sample_is_the_adapted_models_answer(name, base, tmp_path):
    """By whole forwards of the saved adapter, token by token: PEFT's ``generate`` depends on transformers' release."""
    result = run(toy(name, base, tmp_path / "out", "fastpeft.sample_tokens=12", "learning_rate=3.0"), tmp_path)
    (sample,) = result.samples
    tokenizer = tiny.tiny_tokenizer()
    model = hf_fastpeft.load_adapter(result.adapter_dir).eval()
    asked = ids = torch.tensor([tokenizer(sample.prompt)["input_ids"]])
    plain = []
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            with model.disable_adapter():
                plain.append(model(input_ids=ids[:, :-1]).logits[0, -1].argmax())
    answer = ids[0, asked.shape[1] :]
    assert sample.after == tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert answer.tolist() != torch.stack(plain).tolist()  # the virtual tokens tell


@pytest.mark.filterwarnings("ignore:.*(gates are not being pruned|ranks are not being allocated):UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_verify_compares_every_method_with_stock(name, base, tmp_path):
    model, batch = model_and_batch(toy(name, base, tmp_path), 2)
    outcome = hf_fastpeft.verify(model, batch)
    assert outcome.passed, str(outcome)


@pytest.mark.parametrize("name", NAMES)
def test_explain_shows_the_class_that_a_method_becomes(name):
    shown = CliRunner(env={"COLUMNS": "250"}).invoke(cli.app, ["explain", str(EXAMPLES / f"{name}.yaml")])
    assert shown.exit_code == 0, shown.output
    if name != "full":
        adapter = load_config(EXAMPLES / f"{name}.yaml").config.adapter
        assert f"{METHODS[adapter].config}(" in shown.output
        for callback in METHODS[adapter].callbacks:
            assert callback in shown.output
    assert ("create_loraplus_optimizer(loraplus_lr_ratio)" in shown.output) is (name == "loraplus")


@pytest.mark.parametrize("name", sorted(SHORTHANDS))
def test_a_shorthand_is_the_key_it_stands_for(name):
    short = parse_config(BASE + f"adapter: {name}\n")
    meant = "".join(f"{key}: {value}\n" for key, value in SHORTHANDS[name].items())
    assert short.config == parse_config(BASE + meant).config
    (notice,) = short.notices
    assert notice.startswith(f"adapter: {name} stands for adapter: ")


def test_options_of_another_method_are_told():
    (notice,) = parse_config(BASE + "adapter: lora\nfastpeft: {adalora: {target_r: 2}, prompt: {}}\n").notices
    assert notice == "fastpeft.adalora: without effect with adapter: lora"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("adapter: ia3\nlora_r: 8", "line 4: lora_r: adapter: ia3 has no use for lora_r; remove it; possible with"),
        ("adapter: bottleneck\nlora_r: 8", "use fastpeft.bottleneck"),
        ("adapter: ia3\nlora_target_linear: true", "lora_target_linear: adapter: ia3 has no use for lora"),
        ("adapter: prefix\nlora_modules_to_save: [lm_head]", "possible with adapter: lora, qlora, sora, adalora"),
        ("adapter: prompt\nsample_packing: true", "line 4: sample_packing: adapter: prompt puts its virtual tokens"),
        ("adapter: prefix\ngradient_checkpointing: true", "use adapter: prompt or ptuning"),
        ("adapter: prompt\nfastpeft: {prompt: {prompt_tuning_init: TEXT}}", "go together; give both or none"),
        ("adapter: adalora\npeft_use_dora: true", "peft_use_dora: adapter: adalora has no use for"),
        ("adapter: adalora\nsample_packing: true\nfastpeft: {adalora: {tinit: 0.1}}", "give steps, or max_steps"),
        ("adapter: sora\nloraplus_lr_ratio: 16", "possible with adapter: lora, qlora"),
        ("adapter: sora\npeft_init_lora_weights: pissa", "pissa has no gated form"),
        ("adapter: lora\nload_in_8bit: true\npeft_init_lora_weights: pissa", "use peft_init_lora_weights: eva"),
        ("adapter: lora\npeft_init_lora_weights: pissa_niter_4", "use pissa, which is exact; possible: true, false"),
        ("adapter: lora\npeft_init_lora_weights: pisa", "pisa is not supported; possible: true, false, gaussian"),
        ("adapter: pissa\npeft_use_dora: true", "remove it or peft_use_dora"),
        ("adapter: pissa\npeft_init_lora_weights: eva", "adapter: pissa means peft_init_lora_weights: pissa, but"),
        ("adapter: dora\npeft_use_dora: false", "adapter: dora means peft_use_dora: true, but peft_use_dora: false"),
        ("adapter: lora\nloraplus_lr_embedding: 1e-5", "loraplus_lr_embedding: only with loraplus_lr_ratio"),
        ("adapter: loraplus\noptimizer: galore_adamw", "makes parameter groups of its own; possible: adamw_torch"),
        ("adapter: prefix\nfastpeft: {prefix: {num_tokens: 3}}", "did you mean 'num_virtual_tokens'?"),
        ("adapter: lora\nloraplus_lr_ratio: 0", "line 4: loraplus_lr_ratio: found 0"),
    ],
)
def test_what_does_not_go_together_names_what_is_possible(keys, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(BASE + keys)
    (found,) = str(caught.value).split("\n")[1:]
    assert message in found


def test_left_overs_of_an_adapter_do_not_stop_full_fine_tuning():
    parse_config(BASE + "adapter: full\nlora_r: 8\nlora_alpha: 16\nlora_dropout: 0.1\n")


def test_adalora_counts_shares_in_steps_of_the_run():
    config = parse_config(
        BASE + "adapter: adalora\nlora_r: 12\nfastpeft: {adalora: {tinit: 0.1, tfinal: 30}}\n"
    ).config
    made = adapter_config(config, None, total_steps=200)
    assert (made.init_r, made.target_r, made.tinit, made.tfinal, made.total_step) == (12, 8, 20, 30, 200)
    assert arguments(config, "AdaLoraConfig")["tinit"] == "10% of the steps"


def test_lora_plus_gives_b_its_own_rate(base, tmp_path):
    config = toy("loraplus", base, tmp_path / "out", "max_steps=1", "weight_decay=0.1", "lr_scheduler=constant")
    seen = {}

    class Look(methods.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {id(p): name for name, p in model.named_parameters()}
            for group in optimizer.param_groups:
                for p in group["params"]:
                    part = "lora_A" if "lora_A" in names[id(p)] else "lora_B"
                    seen.setdefault(part, set()).add((round(group["lr"], 6), group["weight_decay"]))

    original = methods.MethodParts.__init__

    def with_look(self, *args):
        original(self, *args)
        self.callbacks.append(Look())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods.MethodParts, "__init__", with_look)
        run(config, tmp_path)
    assert seen == {"lora_A": {(0.01, 0.1)}, "lora_B": {(0.16, 0.1)}}


def test_lora_plus_refuses_an_optimizer_with_groups_of_its_own(base, tmp_path, monkeypatch):
    config = toy("loraplus", base, tmp_path / "out")
    own = (torch.optim.AdamW, {"lr": 1e-3, "params": []})
    monkeypatch.setattr(methods.LoraPlusTrainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *a: own))
    with pytest.raises(ConfigError, match="makes parameter groups of its own; possible: adamw_torch"):
        run(config, tmp_path)


def test_eva_starts_at_principal_directions_and_says_what_it_cannot(base, tmp_path):
    from peft import get_peft_model

    config = toy("eva", base, tmp_path, "fastpeft.eva.rho=1", "lora_r=2", "lora_target_linear=false",
                 "lora_target_modules=[q_proj]")  # fmt: skip
    data = [{"input_ids": [8 + i, 9, 10 + i, 11], "labels": [-100, 9, 10 + i, 11]} for i in range(12)]
    model = get_peft_model(tiny.tiny_llama(), adapter_config(config, None), low_cpu_mem_usage=True)
    methods.EvaCallback(config, data, 0).on_init_end(None, None, None, model=model)
    first = model.base_model.model.model.layers[0]
    with torch.no_grad():
        ids = methods.padded(data, 0)
        hidden = first.input_layernorm(model.get_input_embeddings()(ids["input_ids"]))[ids["labels"] != -100]
    _, _, want = torch.linalg.svd(hidden - hidden.mean(0))
    a = first.self_attn.q_proj.lora_A["default"].weight
    cosine = torch.linalg.svdvals(a @ want[:2].T)
    assert cosine.min() > 0.99
    with pytest.raises(ConfigError, match="fewer than lora_r x rho = 2; lower lora_r"):
        methods.EvaCallback(config, [{"input_ids": [8, 9], "labels": [-100, 9]}], 0)._batches(model)
    wide = toy("eva", base, tmp_path, "lora_r=20")
    with pytest.raises(ConfigError, match=r"40 directions, but a target has 32 inputs; possible: .* up to 32"):
        methods.EvaCallback(wide, data, 0)._batches(model)
    endless = methods._Batches([{}])
    endless.given = 500
    with pytest.raises(ConfigError, match="directions still turn after 500 batches"):
        next(iter(endless))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *((name, "so no LoRA equals them") for name in ("prefix", "prompt", "ptuning")),
        ("ia3", "merge_and_unload puts it into the base weights"),  # PEFT cannot convert it
        ("bottleneck", "so no LoRA equals it; keep what save_pretrained writes"),
    ],
)
def test_what_is_no_lora_is_not_exported(name, why, base, tmp_path):
    model, _ = model_and_batch(toy(name, base, tmp_path), 1)
    with pytest.raises(AdapterError, match=rf"possible: LORA, ADALORA, ADAPTIVE_LORA, SORA.*{why}"):
        hf_fastpeft.export_to_lora(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "exports"),
    [(["peft_init_lora_weights=olora"], True), (["peft_use_rslora=true"], False), (["loraplus_lr_ratio=4"], True)],
)
def test_variants_of_lora_combine(keys, exports, base, tmp_path):
    result = run(toy("pissa", base, tmp_path / "out", *keys), tmp_path)
    assert (result.lora_dir is not None) is exports
    ids = torch.arange(8, 16)[None]
    with torch.no_grad():
        native = hf_fastpeft.load_adapter(result.adapter_dir)(ids).logits
        if exports:
            plain = hf_fastpeft.load_adapter(result.lora_dir)(ids).logits
            torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["eva", "pissa", "loraplus"])
def test_a_resumed_run_equals_a_straight_one(name, base, tmp_path):
    straight = run(toy(name, base, tmp_path / "a", "max_steps=4", "save_steps=2"), tmp_path)
    resumed = toy(name, base, tmp_path / "b", "max_steps=4", f"resume_from_checkpoint={tmp_path / 'a/checkpoint-2'}")
    torch.manual_seed(1)
    assert run(resumed, tmp_path).loss_after == straight.loss_after
