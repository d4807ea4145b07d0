"""Every field of the schema is consumed: another value builds another run, or is refused.

A run is built and carried through with transformers' loading and TRL's trainer recorded, so a field that is accepted
and never read leaves the record as it was. The values to try follow from a field's type; what needs a special value,
or other keys beside it, stands in `VALUES` and `BESIDE`.
"""

import json
import os
import shutil
import types
import typing
from typing import Annotated, Any, Literal

import datasets
import pytest
import tiny
import torch
import transformers
import trl
from pydantic import BaseModel
from rich.console import Console

from hf_fastpeft.config import DatasetConfig, RunConfig
from hf_fastpeft.config.mapping import arguments
from hf_fastpeft.config.methods import OPTIONS
from hf_fastpeft.config.schema import FastpeftConfig
from hf_fastpeft.errors import FastPeftError
from hf_fastpeft.run import methods, runner
from hf_fastpeft.run.manifest import MANIFEST_FILE

ROW = {"text": "w1", "prompt": "w1 w2", "completion": " w3", "instruction": "w4", "input": "w5", "output": "w6"}
CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
OTHER_CHAT = [{"from": "assistant", "value": "w3"}, {"from": "user", "value": "w4"}]
VALUES: dict[str, Any] = {
    "base_model": "another",
    "model_type": "LlamaForCausalLM",
    "tokenizer_type": "PreTrainedTokenizerFast",
    "special_tokens": {"pad_token": "w9"},
    "adapter": "lora",
    "datasets": [{"path": "rows.jsonl", "field_prompt": "input"}],
    "test_datasets": [{"path": "rows.jsonl"}],
    "lora_target_modules": ["q_proj"],
    "lora_modules_to_save": ["lm_head"],
    "peft_init_lora_weights": "gaussian",
    "sequence_len": 4,
    "val_set_size": 2,
    "optimizer": "sgd",
    "lr_scheduler": "linear",
    "bf16": True,
    "fp16": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "attn_implementation": "eager",
    "resume_from_checkpoint": "elsewhere/checkpoint-2",
    "use_wandb": True,
    "use_mlflow": True,
    "hub_model_id": "owner/name",
    "datasets.path": "chats.jsonl",
    "datasets.type": "completion",
    "datasets.split": "train[:3]",
    "datasets.data_files": "rows.jsonl",
    "datasets.ds_type": "text",
    "datasets.name": "english",
    "datasets.field_messages": "other",
    "datasets.message_field_role": "from",
    "datasets.message_field_content": "value",
    "datasets.roles_to_train": ["user"],
    "fastpeft.ia3.feedforward_modules": ["down_proj"],
    "fastpeft.prompt.prompt_tuning_init": "SAMPLE_VOCAB",
    "fastpeft.prompt.prompt_tuning_init_text": "w1 w2",
    "fastpeft.bottleneck.nonlinearity": "relu",
    "fastpeft.ptuning.encoder_num_layers": 3,
    **{f"datasets.{key}": "other" for key in DatasetConfig.model_fields if key.startswith("field_") or key == "field"},
}
LORA = {"adapter": "lora", "lora_target_linear": True}
PLUS = {**LORA, "loraplus_lr_ratio": 4}
TEXT = {"prompt_tuning_init": "TEXT"}
BESIDE: dict[str, dict[str, Any]] = {
    "load_in_4bit": LORA,
    "load_in_8bit": LORA,
    "lora_target_modules": {"adapter": "lora"},
    "lora_target_linear": {"adapter": "lora"},
    "loraplus_lr_ratio": LORA,
    "loraplus_lr_embedding": PLUS,
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": True},
    "eval_sample_packing": {"val_set_size": 2},
    "eval_batch_size": {"val_set_size": 2},
    "eval_steps": {"val_set_size": 2},
    "evals_per_epoch": {"val_set_size": 2},
    "save_total_limit": {"save_steps": 1},
    "warmup_ratio": {"max_steps": None},
    "auto_resume_from_checkpoints": {"output_dir": "resumable"},
    "datasets.name": {"datasets": [{"path": "owner/name"}]},
    "datasets.data_files": {"datasets": [{"path": "."}]},
    "datasets.ds_type": {"datasets": [{"path": "rows.jsonl", "type": "completion"}]},
    "datasets.field": {"datasets": [{"path": "rows.jsonl", "type": "completion"}]},
    "fastpeft.eval_rows": {"val_set_size": 4},
    "fastpeft.sample_tokens": {"fastpeft": {"samples": 1}},
    "fastpeft.plots": {"adapter": "none"},
    "fastpeft.prompt.prompt_tuning_init_text": {"fastpeft": {"prompt": TEXT | {"prompt_tuning_init_text": "w3"}}},
    **{f"lora_{key}": LORA for key in ("r", "alpha", "dropout", "modules_to_save")},
    **{f"peft_{key}": LORA for key in ("use_rslora", "use_dora", "init_lora_weights")},
    **{f"wandb_{key}": {"wandb_project": "p"} for key in ("entity", "name", "run_id", "watch", "log_model", "mode")},
    **{f"mlflow_{key}": {"mlflow_experiment_name": "e"} for key in ("tracking_uri", "run_name")},
    **{f"trackio_{key}": {"trackio_project_name": "p"} for key in ("run_name", "space_id")},
    **{
        f"datasets.field_{key}": {"datasets": [{"path": "rows.jsonl", "type": "alpaca"}]}
        for key in ("instruction", "input", "output")
    },
    **{
        f"datasets.{key}": {"datasets": [{"path": "chats.jsonl", "type": "chat_template"}]}
        for key in ("field_messages", "message_field_role", "message_field_content", "roles_to_train")
    },
}
LAYERS: list[tuple[str, type[BaseModel]]] = [
    ("", RunConfig),
    ("datasets.", DatasetConfig),
    ("fastpeft.", FastpeftConfig),
    *((f"fastpeft.{name}.", options) for name, options in OPTIONS.items()),
]
FIELDS = [
    prefix + name
    for prefix, model in LAYERS
    for name in model.model_fields
    if (prefix, name) != ("", "fastpeft") and not (prefix == "fastpeft." and name in OPTIONS)
]


class RecordingTrainer:
    """In the place of TRL's: keeps what it is made of and asked for."""

    def __init__(self, **kwargs):
        self.record, self.model, self.args = [], kwargs["model"], kwargs["args"]
        self.train_dataset, self.eval_dataset = kwargs["train_dataset"], kwargs["eval_dataset"]
        self.state = types.SimpleNamespace(global_step=1, max_steps=1, log_history=[])
        adapter = kwargs["peft_config"]
        self.note("arguments", {k: v for k, v in self.args.to_dict().items() if k != "logging_dir"})
        self.note("adapter", adapter and {"class": type(adapter).__name__, **adapter.to_dict()})
        self.note(
            "rows", [list(rows) if rows is not None else None for rows in (self.train_dataset, self.eval_dataset)]
        )
        self.note("tokens", kwargs["processing_class"].special_tokens_map)
        self.note("trainer", [type(self).__name__, getattr(self, "loraplus", None)])
        self.note("callbacks", [[type(c).__name__, getattr(c, "impl", None)] for c in kwargs["callbacks"]])
        RecordingTrainer.last = self

    def note(self, what, value):
        self.record.append(f"{what}: {json.dumps(value, default=str, sort_keys=True)}")

    def remove_callback(self, kind):
        pass

    def is_world_process_zero(self):
        return True

    def train(self, **kwargs):
        self.note("train", kwargs)

    def evaluate(self):
        return {"eval_loss": 1.0}

    def save_model(self, folder):
        self.note("save", folder)


def lay_out(folder):
    """The files that runs read; nothing of an earlier run stays."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    rows = [ROW | {"prompt": f"w1 w{i}", "other": f" w{i + 20}"} for i in range(8)]
    chats = [{"messages": [a | b for a, b in zip(CHAT, OTHER_CHAT, strict=True)], "other": CHAT[1:], **ROW}] * 8
    for name, content in (("rows.jsonl", rows), ("chats.jsonl", chats)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    state = "checkpoint-2/trainer_state.json"
    for run in ("resumable", "elsewhere"):
        (folder / run / "checkpoint-2").mkdir(parents=True)
        (folder / run / state).write_text("{}")
        listed = {"written_by": "hf_fastpeft", "files": [state], "folders": [], "unfinished": []}
        (folder / run / MANIFEST_FILE).write_text(json.dumps(listed))


@pytest.fixture
def built(tmp_path, monkeypatch):
    """A function that carries a run of these keys through and gives the record of it."""
    monkeypatch.chdir(tmp_path)
    calls: list[str] = []
    loaders = {"AutoModelForCausalLM", "LlamaForCausalLM", "AutoTokenizer", "PreTrainedTokenizerFast"}

    def generate(input_ids, max_new_tokens, **kwargs):
        calls.append(f"generate({input_ids.tolist()}, {max_new_tokens})")
        return input_ids

    def load(name):
        def from_pretrained(source, **kwargs):
            calls.append(f"{name}({source!r}, {sorted(kwargs.items(), key=str)})")
            if "Tokenizer" in name:
                return tiny.tiny_tokenizer()
            model = tiny.tiny_llama()
            model.name_or_path = source
            model.generate = generate
            return model

        return from_pretrained

    for name in loaders:
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", load(name))

    def load_dataset(path, **kwargs):
        if path != "owner/name":
            return original(path, **kwargs)
        calls.append(str(sorted(kwargs.items())))
        return [ROW] * 8

    original = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(trl, "SFTTrainer", RecordingTrainer)
    monkeypatch.setattr(methods, "SFTTrainer", RecordingTrainer)
    monkeypatch.setattr(methods, "LoraPlusTrainer", type("LoraPlusTrainer", (RecordingTrainer,), {"loraplus": None}))
    monkeypatch.setattr(methods.MethodParts, "save", lambda self, model, result: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def build(keys):
        lay_out(tmp_path)
        calls.clear()
        before = dict(os.environ)
        there = set(tmp_path.rglob("*"))
        config = RunConfig.model_validate(keys)
        try:
            with (tmp_path / "console").open("w") as console:
                runner.train(config, overwrite=True, console=Console(file=console))
            environment = sorted((k, v) for k, v in os.environ.items() if before.get(k) != v)
        finally:
            os.environ.clear()
            os.environ.update(before)
        written = sorted(path.name for path in set(tmp_path.rglob("*")) - there)
        return [*calls, *RecordingTrainer.last.record, f"environment: {environment}", str(written), on_a_gpu(config)]

    def on_a_gpu(config):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
            patch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
            return f"on a GPU: {sorted(arguments(config, 'SFTConfig').items(), key=str)}"

    return build


def others(annotation, default):
    """Values of the type to try; one of them may be the default of the class that reads it."""
    kind = typing.get_origin(annotation)
    if kind is Annotated:
        return others(typing.get_args(annotation)[0], default)
    if kind in (typing.Union, types.UnionType):
        kinds = [a for a in typing.get_args(annotation) if a is not type(None)]
        return [value for kind in kinds for value in others(kind, default)]
    if kind is Literal:
        return [value for value in typing.get_args(annotation) if value != default]
    if annotation is bool:
        return [value for value in (True, False) if value is not default]
    if annotation is int:
        return [(default or 0) + 2]
    if annotation is float:
        return [default / 2 if default else 0.25]
    assert annotation is str, f"{annotation}: give the key a value in VALUES"
    return ["another"]


def keys_of(field, values):
    """A small run's keys with those of `BESIDE`, and the field set to each of ``values`` (none: left out)."""
    prefix, _, name = field.rpartition(".")
    keys = {
        "base_model": "base", "output_dir": "out", "max_steps": 3, "datasets": [{"path": "rows.jsonl"}],
        "fastpeft": {"plots": False},
    }  # fmt: skip
    method = prefix.removeprefix("fastpeft.") if prefix.startswith("fastpeft.") else None
    if method == "eva":
        keys |= {**LORA, "peft_init_lora_weights": "eva"}
    elif method is not None:
        keys |= {"adapter": method, "lora_target_linear": method in ("sora", "adalora", "adaptive_lora")}
    if method == "ia3":
        keys |= {"lora_target_modules": ["down_proj", "up_proj"]}
    beside = BESIDE.get(field, {})
    keys |= {k: v for k, v in beside.items() if k != "fastpeft"}
    keys["fastpeft"] = keys["fastpeft"] | beside.get("fastpeft", {})
    if field == "fastpeft.plots":
        del keys["fastpeft"]["plots"]
    target: Any = keys
    for part in filter(None, prefix.split(".")):
        target = target[part][0] if part == "datasets" else target.setdefault(part, {})
    for value in values:
        target[name] = value
    return {k: v for k, v in keys.items() if v is not None}


@pytest.mark.parametrize("field", FIELDS)
def test_another_value_builds_another_run_or_is_refused(built, field):
    prefix, _, name = field.rpartition(".")
    model = dict(LAYERS)[f"{prefix}." if prefix else ""]
    info = model.model_fields[name]
    values = [VALUES[field]] if field in VALUES else others(info.annotation, info.default)
    usual = built(keys_of(field, []))
    assert any(outcome(built, keys_of(field, [value]), name) != usual for value in values), values


def outcome(built, keys, name):
    """The record of a run, or the error that names the key."""
    try:
        return built(keys)
    except (FastPeftError, ValueError) as error:
        return str(error) if name in str(error) else pytest.fail(f"{error}: does not name {name}")


def test_a_field_that_nothing_reads_is_found(built):
    """What this file is for: a key that is accepted and not read does not pass."""
    keys = keys_of("seed", [])
    assert built(keys) == built(keys) == built({**keys, "wandb_entity": "read only with wandb_project"})
