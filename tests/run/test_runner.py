"""Whole runs on a tiny model on disk: files, resuming, Ctrl-C, and mistakes told before anything slow."""

import json
import signal
import sys

import pytest
import tiny
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, TrainerCallback

import hf_fastpeft
from hf_fastpeft.config import RunConfig
from hf_fastpeft.errors import ConfigError, DataError, RunExistsError, UnknownFamilyError
from hf_fastpeft.run import progress, runner
from hf_fastpeft.run.runner import train

# PEFT 0.21 reads the old name of a property of transformers 5.23 (peft_model.py, PeftModel.__init__).
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder with a tiny model, its tokenizer and prompt/completion rows."""
    folder = tmp_path_factory.mktemp("base")
    tiny.tiny_llama().save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    with (folder / "rows.jsonl").open("w") as file:
        for row in tiny.tiny_dataset(24):
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def console(tmp_path):
    with (tmp_path / "console.txt").open("w+") as file:
        yield Console(file=file, width=200)


def said(console):
    console.file.seek(0)
    return console.file.read()


def config(base, out, **values):
    return RunConfig.model_validate(
        {
            "base_model": str(base / "model"),
            "datasets": [{"path": str(base / "rows.jsonl")}],
            "val_set_size": 4,
            "adapter": "lora",
            "lora_r": 4,
            "lora_target_linear": True,
            "sequence_len": 64,
            "micro_batch_size": 4,
            "max_steps": 6,
            "learning_rate": "1e-2",
            "output_dir": str(out),
            "fastpeft": {"samples": 2, "sample_tokens": 4, "plots": False},
            **values,
        }
    )


def test_a_lora_run_leaves_adapter_report_and_code_that_loads_it(base, tmp_path, console):
    out = tmp_path / "out"
    result = train(config(base, out, evals_per_epoch=1, saves_per_epoch=1), console=console)
    assert result.loss_after < result.loss_before
    assert result.lora_dir is None
    assert {p.name for p in out.iterdir()} >= {"adapter", "report.json", "run.json"}
    report = json.loads((out / "report.json").read_text())
    assert report["loss_after"] == result.loss_after
    assert report["config"]["lora_r"] == 4
    assert report["versions"]["peft"]
    assert report["patch"] is not None
    assert len(report["samples"]) == 2
    text = said(console)
    assert "step 6/6  loss" in text
    assert "validation loss" in text
    *_, first, second, third = (line.strip() for line in text.strip().split("\n"))
    assert first == "import hf_fastpeft, transformers"
    assert second == f"model = hf_fastpeft.load_adapter({str(out / 'adapter')!r})"
    assert third.startswith("tokenizer = ")
    model = hf_fastpeft.load_adapter(out / "adapter")
    ids = torch.arange(8, 16)[None]
    assert not torch.equal(model(ids).logits, model.get_base_model()(ids).logits * 0)


def test_a_sora_run_prunes_draws_and_exports_the_same_function(base, tmp_path, console):
    out = tmp_path / "out"
    fastpeft = {"sora": {"target_r": 2, "warmup_ratio": 0.2, "settle_ratio": 0.2}}
    result = train(config(base, out, adapter="sora", max_steps=10, fastpeft=fastpeft), console=console)
    assert len(result.kept_ranks) == 14
    assert sum(kept for kept, _ in result.kept_ranks.values()) == 28
    assert all(start == 4 for _, start in result.kept_ranks.values())
    for name in ("loss.png", "ranks.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "ranks kept: 28 of 56 over 14 modules, 2.00 on average" in said(console)
    report = json.loads((out / "report.json").read_text())
    assert report["rank_history"][-1] == {"step": 10, "kept": 28}
    ids = torch.arange(8, 16)[None]
    native, plain = (hf_fastpeft.load_adapter(out / name)(ids).logits for name in ("adapter", "lora"))
    torch.testing.assert_close(native, plain)
    assert json.loads((out / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.filterwarnings("ignore:SoraCallback. this schedule cannot free a rank:UserWarning")
# PEFT 0.21 on loading its own AdaLoRA folders.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        ("sora", {"target_r": 2, "reassign_ranks": True, "lambda_schedule": "cubic"}),
        ("adalora", {"target_r": 2, "tinit": 1, "tfinal": 2, "delta_t": 1}),
        ("adaptive_lora", {"target_r": 2, "tinit": 1, "tfinal": 2, "delta_t": 1}),
    ],
)
def test_every_adaptive_method_draws_its_ranks_and_logs_them(base, tmp_path, console, adapter, options):
    out = tmp_path / "out"
    result = train(
        config(base, out, adapter=adapter, max_steps=8, weight_decay=0.01, fastpeft={adapter: options}),
        console=console,
    )
    logged = [e[key] for e in result.history for key in ("sora/kept_rank", "adalora/kept_rank") if key in e]
    assert len(logged) == 9  # eight steps and the summary
    assert logged[-1] == logged[-2] == sum(kept for kept, _ in result.kept_ranks.values()) / 14 == 2
    assert (out / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert [entry["step"] for entry in json.loads((out / "report.json").read_text())["rank_history"]] == [*range(1, 9)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_r": 2, "min_rank": 5}, "min_rank=5: possible: an integer from 0 to r=4"),
        ({"reassign_ranks": True}, "reassign_ranks=True, target_r=None: there is no budget"),
    ],
)
def test_options_of_sora_that_do_not_go_together_are_told_before_loading(base, tmp_path, console, options, message):
    with pytest.raises(ConfigError, match=f"adapter: sora: SoraConfig: {message}"):
        train(config(base, tmp_path / "out", adapter="sora", fastpeft={"sora": options}), console=console)


def test_full_fine_tuning_saves_a_model(base, tmp_path, console):
    values = {"adapter": "none", "lora_target_linear": False, "max_steps": None, "num_epochs": 1}
    result = train(config(base, tmp_path / "out", **values), console=console)
    assert result.steps == 5
    assert result.adapter_dir == tmp_path / "out" / "model"
    AutoModelForCausalLM.from_pretrained(result.adapter_dir)
    assert "AutoModelForCausalLM.from_pretrained" in said(console)


def test_patched_and_stock_runs_learn_the_same(base, tmp_path, console):
    losses = [
        train(
            config(base, tmp_path / str(patch), fastpeft={"patch": patch, "plots": False}), console=console
        ).loss_after
        for patch in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


class PressCtrlC(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)


def interrupt_with(monkeypatch, *extra):
    """Adds callbacks to the next trainers, as a person at the keyboard would."""
    original = runner._Run.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        for callback in extra:
            self.trainer.add_callback(callback)

    monkeypatch.setattr(runner._Run, "__init__", patched)


def test_ctrl_c_saves_a_checkpoint_and_the_resumed_run_equals_a_straight_one(base, tmp_path, console, monkeypatch):
    values = {"adapter": "sora", "lora_dropout": 0.1, "fastpeft": {"sora": {"target_r": 2}, "samples": 1}}
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    straight = train(config(base, tmp_path / "straight", **values), console=console)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_with(patch, PressCtrlC())
        result = train(config(base, out, **values), console=console)
    assert result.interrupted
    assert result.steps == 3
    assert result.checkpoint == out / "checkpoint-3"
    assert not (out / "report.json").exists()
    assert "--resume" in said(console)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(RunExistsError, match="already holds a run"):
        train(config(base, out, **values), console=console)
    resumed = train(config(base, out, auto_resume_from_checkpoints=True, **values), console=console)
    assert resumed.steps == 6
    assert resumed.loss_before == straight.loss_before
    assert resumed.loss_after == straight.loss_after
    assert resumed.kept_ranks == straight.kept_ranks
    assert resumed.samples == straight.samples


class PressTwice(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once(base, tmp_path, console, monkeypatch):
    interrupt_with(monkeypatch, PressTwice())
    result = train(config(base, tmp_path / "out"), console=console)
    assert result.interrupted
    assert result.checkpoint is None
    assert "start again with --overwrite" in said(console)


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test where a mistake is only found once the model loads."""

    def fail(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(runner, "load_model", fail)


@pytest.mark.usefixtures("no_model")
def test_mistakes_are_told_before_the_model_loads(base, tmp_path, console):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no such file"):
        train(config(base, out, datasets=[{"path": str(base / "none.jsonl")}]), console=console)
    with pytest.raises(DataError, match="all 20 rows are longer than sequence_len: 2"):
        train(config(base, out, sequence_len=2), console=console)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        train(config(base, tmp_path / "file" / "out"), console=console)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        train(config(base, out, resume_from_checkpoint=str(out / "checkpoint-1")), console=console)
    with pytest.raises(ConfigError, match="adapter: sora: SoraConfig: target_r=9"):
        train(config(base, out, adapter="sora", fastpeft={"sora": {"target_r": 9}}), console=console)
    with pytest.raises(ConfigError, match=r"base_model: .*none: cannot be loaded"):
        train(config(base, out, base_model=str(base / "none")), console=console)
    with pytest.raises(ConfigError, match="special_tokens: pad_token: '<new>': not in the vocabulary"):
        train(config(base, out, special_tokens={"pad_token": "<new>"}), console=console)


def test_a_model_that_cannot_be_patched_names_the_way_out(base, tmp_path, console, monkeypatch):
    from hf_fastpeft import families

    monkeypatch.setattr(families, "FAMILIES", {})
    with pytest.raises(UnknownFamilyError, match=r"set fastpeft\.patch: false"):
        train(config(base, tmp_path / "out"), console=console)


def test_missing_matplotlib_costs_only_the_pictures(base, tmp_path, console, monkeypatch):
    from hf_fastpeft.run import report

    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else sys)
    monkeypatch.setattr(report, "versions", dict)
    result = train(config(base, tmp_path / "out", max_steps=1, fastpeft={"samples": 0}), console=console)
    assert (result.output_dir / "report.json").is_file()
    assert "matplotlib is not installed" in said(console)


def test_the_progress_bar_shows_loss_and_ranks_on_a_terminal(tmp_path):
    from types import SimpleNamespace as Namespace

    with (tmp_path / "t").open("w+") as file:
        console = Console(file=file, force_terminal=True, width=120)
        callback = progress.ProgressCallback(console)
        state = Namespace(max_steps=3, global_step=0, is_world_process_zero=True)
        callback.on_train_begin(None, state, None)
        state.global_step = 1
        callback.on_step_end(None, state, None)
        callback.on_log(None, state, None, logs={"loss": 2.5, "sora/kept_rank": 3.25})
        callback.on_log(None, state, None, logs={"eval_loss": 2.0})
        callback.on_train_end(None, state, None)
        callback.close()
        text = said(console)
    assert "loss 2.5" in text
    assert "kept rank 3.25" in text
    assert "validation 2" in text


def test_adapter_targets_join_linear_layers_and_named_modules(base):
    from hf_fastpeft.config.mapping import adapter_config

    values = config(base, "out", lora_target_modules=["embed_tokens"])
    assert adapter_config(values, tiny.tiny_llama()).target_modules == {
        "embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
