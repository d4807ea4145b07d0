"""YAML to RunConfig: types, the classes of keys, and every mistake at once with its line."""

import typing
from pathlib import Path

import pytest

from hf_fastpeft.config import RunConfig, load_config, parse_config
from hf_fastpeft.config.keys import HINTS, INERT, NEUTRAL, UNSUPPORTED
from hf_fastpeft.config.methods import OPTIONS
from hf_fastpeft.config.schema import DatasetConfig, FastpeftConfig, expand_home
from hf_fastpeft.errors import ConfigError

BASE = "base_model: model\ndatasets: [{path: rows.jsonl}]\n"


def mistakes(text: str, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, **kwargs)
    return str(caught.value).split("\n")[1:]


def test_numbers_written_as_yaml_strings_are_numbers():
    config = parse_config(BASE + "learning_rate: 2e-5\nadam_epsilon: '1e-6'\nval_set_size: 0.05\n").config
    assert config.learning_rate == 2e-5
    assert config.adam_epsilon == 1e-6


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file():
    text = """\
adaptr: lora
micro_batch_size: zwei
lora_r: true
datasets:
  - path: a.jsonl
    typ: alpaca
  - {type: alpacca}
bf16: maybe
rl: dpo
fastpeft:
  sora: {target_rank: 4}
lr_scheduler: cosin
"""
    found = mistakes(text)
    expected = [
        "line 1: adaptr: unknown key; did you mean 'adapter'?",
        "line 2: micro_batch_size: found 'zwei'; expected a valid integer",
        "line 3: lora_r: found True; expected a number, not true or false",
        "line 6: datasets[0].typ: unknown key; did you mean 'type'?",
        "line 7: datasets[1].path: missing; it is required",
        "line 7: datasets[1].type: found 'alpacca'; possible: chat_template, alpaca, completion, ",
        "line 8: bf16: found 'maybe'; possible: auto or expected a valid boolean",
        "line 9: rl: 'dpo' is not supported and would change training: ",
        "line 11: fastpeft.sora.target_rank: unknown key; did you mean 'target_r'?",
        "line 12: lr_scheduler: found 'cosin'; not a schedule of Trainer; did you mean 'cosine'?",
        "base_model: missing; it is required",
    ]
    assert len(found) == len(expected)
    for line, want in zip(found, expected, strict=True):
        assert line.strip().startswith(want)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("adapter: qlora", "adapter: qlora needs load_in_4bit"),
        ("adapter: lora\nload_in_4bit: true\nload_in_8bit: true", "load_in_8bit: together with load_in_4bit"),
        ("load_in_8bit: true", "adapter: none cannot train 4- or 8-bit weights"),
        ("adapter: sora\npeft_use_dora: true", "peft_use_dora: adapter: sora has no use for peft_use_dora"),
        ("lora_target_linear: true", "adapter: none has no use for lora_target"),
        ("peft_use_rslora: true", "adapter: none has no use for peft_use_rslora"),
        ("warmup_ratio: 0.1\nwarmup_steps: 3", "line 4: warmup_steps: together with warmup_ratio"),
        ("eval_steps: 3\nevals_per_epoch: 2", "line 4: evals_per_epoch: together with eval_steps"),
        ("save_steps: 3\nsaves_per_epoch: 2", "line 4: saves_per_epoch: together with save_steps"),
        ("val_set_size: 0.1\ntest_datasets: [{path: x}]", "line 3: val_set_size: together with test_datasets"),
        ("flash_attention: true\nsdp_attention: true", "more than one kind of attention"),
        ("fp16: true\nbf16: true", "line 3: fp16: together with bf16"),
        ("model_type: AutoModelForSequenceClassification", "line 3: model_type: found "),
        ("optimizer: adamw_torh", "not an optimizer of Trainer; did you mean 'adamw_torch'?"),
        ("learning_rate: .inf", "line 3: learning_rate: found inf"),
        ("plugins: [axolotl.integrations.spectrum.SpectrumPlugin]", "line 3: plugins[0]: "),
        ("lora_r: 4\nlora_r: 8", "line 4: lora_r: stands twice, first on line 3"),
        ("1: 2", "line 3: 1: unknown key"),
    ],
)
def test_a_contradiction_names_its_key_and_line(keys, message):
    (found,) = mistakes(BASE + keys)
    assert message in found


def test_contradictions_come_together_with_wrong_values():
    found = mistakes(BASE + "seed: x\nwarmup_ratio: 0.1\nwarmup_steps: 3\nfp16: true\nbf16: true\n")
    assert [line.split(":")[1].strip() for line in found] == ["seed", "warmup_steps", "fp16"]


def test_a_wrong_adapter_brings_no_contradictions_that_follow_from_it():
    (found,) = mistakes(BASE + "adapter: lra\nlora_target_linear: true\n")
    assert "did you mean 'lora'?" in found


def test_null_and_false_are_accepted_for_every_key_that_is_not_implemented():
    text = BASE + "".join(f"{key}: null\n" for key in sorted(UNSUPPORTED | dict.fromkeys(HINTS | INERT, "")))
    loaded = parse_config(text)
    assert loaded.notices == []
    assert loaded.config == parse_config(BASE).config
    assert parse_config(BASE + "rl: false\nrelora: false\ndeepspeed: null\n").config == loaded.config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "lambda_schedule: linaer",
            "fastpeft.sora.lambda_schedule: found 'linaer'; possible: constant, linear, cosine, cubic, stages",
        ),
        ("lambda_stages: 0", "fastpeft.sora.lambda_stages: found 0; "),
        ("reassign_ranks: maybe", "fastpeft.sora.reassign_ranks: found 'maybe'; expected a valid boolean"),
        ("min_rank: -1", "fastpeft.sora.min_rank: found -1; "),
    ],
)
def test_a_wrong_option_of_sora_is_named(options, message):
    (found,) = mistakes(BASE + f"adapter: sora\nfastpeft: {{sora: {{{options}}}}}\n")
    assert message in found


def test_null_means_the_default_at_every_level():
    text = "base_model: m\ndatasets: [{path: x, split: null}]\nlora_r: null\nfastpeft: {sora: {target_r: null}}\n"
    config = parse_config(text).config
    assert (config.datasets[0].split, config.lora_r, config.fastpeft.sora.target_r) == ("train", 8, None)


@pytest.mark.parametrize("key", sorted(UNSUPPORTED))
def test_a_value_that_would_change_training_is_never_ignored(key):
    (found,) = mistakes(BASE + f"{key}: [something]\n")
    assert found.strip().startswith(f"line 3: {key}")
    assert "not supported" in found


def test_values_that_ask_for_what_happens_anyway_are_accepted():
    for key, values in NEUTRAL.items():
        for value in values:
            assert parse_config(BASE + f"{key}: {value}\n").config == parse_config(BASE).config


def test_hints_of_other_accelerators_are_told_once():
    text = BASE + "liger_rope: true\nlora_mlp_kernel: true\nplugins: [axolotl.integrations.liger.LigerPlugin]\n"
    (notice,) = parse_config(text).notices
    assert "liger_rope, lora_mlp_kernel" in notice
    assert "patch_model does that here" in notice
    (notice,) = parse_config(text + "fastpeft: {patch: false}\n").notices
    assert "nothing is fused" in notice


def test_keys_without_effect_are_told():
    (notice,) = parse_config(BASE + "dataset_prepared_path: last_run\n").notices
    assert notice.startswith("dataset_prepared_path: without effect")


def test_keys_of_trackers_that_are_off_are_told():
    assert parse_config(
        BASE + "wandb_entity: me\ntrackio_run_name: run\nmlflow_tracking_uri: file:runs\n"
    ).notices == ["wandb_entity, mlflow_tracking_uri: without effect; trackers in use: none"]
    text = BASE + "wandb_project: p\nwandb_name: a\nmlflow_experiment_name: e\nmlflow_run_name: b\n"
    assert parse_config(text).notices == ["mlflow_run_name: without effect; trackers in use: wandb, mlflow"]


@pytest.mark.parametrize(
    "key",
    ["base_model", "output_dir", "resume_from_checkpoint", "datasets.0.path", "datasets.0.data_files",
     "test_datasets.0.path"],
)  # fmt: skip
def test_the_home_folder_is_written_out_in_every_path(key, monkeypatch, tmp_path):
    """As a shell, TRL and transformers would; variables stay, as in Axolotl."""
    monkeypatch.setenv("HOME", str(tmp_path))
    text = BASE + "test_datasets: [{path: x}]\n"

    def loaded(value):
        values = parse_config(text, overrides=[f"{key}={value}"]).config.model_dump()
        for part in key.split("."):
            values = values[int(part) if part.isdigit() else part]
        return values

    assert loaded("~/x") == str(tmp_path / "x")
    assert loaded("'~'") == str(tmp_path)
    for plain in ("$HOME/x", "a~/x", "owner/name", "/x/~", "builtin:x"):
        assert loaded(plain) == plain
    (found,) = mistakes(text, overrides=[f"{key}=~nobody-of-that-name/x"])
    assert "no home folder of '~nobody-of-that-name' is known; write the whole path" in found
    if key.endswith("data_files"):
        assert loaded("[~/x, y]") == [str(tmp_path / "x"), "y"]


def test_no_path_is_forgotten():
    """Every text whose name says path, folder, file or model is expanded, or is no path."""
    paths = ("path", "dir", "file", "folder", "checkpoint", "model")
    no_paths = {"revision_of_model", "model_type", "hub_model_id", "wandb_log_model", "gradient_checkpointing_kwargs"}
    for model in (RunConfig, DatasetConfig, FastpeftConfig, *OPTIONS.values()):
        for name, info in model.model_fields.items():
            if name not in no_paths and any(part in name for part in paths) and "str" in str(info.annotation):
                assert all(expand_home in found for found in validators(info.annotation, info.metadata)), name


def validators(annotation, outer):
    """For each text in an annotation, the functions that it goes through."""
    if annotation is str:
        return [{getattr(item, "func", None) for item in outer}]
    inner = [*outer, *getattr(annotation, "__metadata__", ())]
    return [
        found for part in typing.get_args(annotation) if part is not type(None) for found in validators(part, inner)
    ]


def test_a_file_in_the_home_folder_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(BASE + "output_dir: ~/out\n")
    assert load_config("~/run.yaml").config.output_dir == str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"~nobody-of-that-name/run\.yaml: cannot be read"):
        load_config("~nobody-of-that-name/run.yaml")


def test_classes_that_transformers_lacks_are_told():
    found = mistakes(BASE + "model_type: LamaForCausalLM\ntokenizer_type: LlamaTokenizr\n")
    assert "model_type: found 'LamaForCausalLM'; no such class in transformers; did you mean 'LlamaFor" in found[0]
    assert "tokenizer_type: found 'LlamaTokenizr'; not a tokenizer of transformers" in found[1]
    (found,) = mistakes(BASE + "tokenizer_type: MyTokenizer\n")
    assert "no such class in transformers" in found
    assert "AutoTokenizer finds the class of any model" in found
    config = parse_config(BASE + "model_type: GemmaForCausalLM\ntokenizer_type: LlamaTokenizerFast\n").config
    assert (config.model_type, config.tokenizer_type) == ("GemmaForCausalLM", "LlamaTokenizerFast")


def test_tables_do_not_contradict_each_other():
    implemented = set(RunConfig.model_fields)
    assert not implemented & (HINTS | INERT | set(UNSUPPORTED))
    assert not HINTS & INERT
    assert not (HINTS | INERT) & set(UNSUPPORTED)
    assert set(NEUTRAL) <= set(UNSUPPORTED) | implemented


def test_override_replaces_keys_at_any_depth():
    text = BASE + "lora_r: 4\n"
    changes = ["lora_r=16", "fastpeft.sora.target_r=2", "datasets.0.path=b.jsonl", "learning_rate=1e-3"]
    config = parse_config(text, overrides=changes).config
    assert config.lora_r == 16
    assert config.fastpeft.sora.target_r == 2
    assert config.datasets[0].path == "b.jsonl"
    assert config.learning_rate == 1e-3


def test_wrong_overrides_say_where_they_come_from():
    found = mistakes(BASE, overrides=["lora_r=x", "nonsense", "datasets.5.path=x", "seed=[", "sed=3"])
    assert all(line.strip().startswith("--set: ") for line in found)
    assert len(found) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2", "config:2: not valid YAML"),
        ("- 1\n", "config:1: expected keys and values"),
        ("just text", "found plain text"),
        ("a: &x [*x]", "an alias refers to its own content"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("", "base_model: missing"),
    ],
)
def test_what_is_not_a_configuration_is_told(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert message in str(caught.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_merge_keys_and_anchors_work():
    text = "base_model: m\ndatasets:\n  - &a {path: x, type: alpaca}\n  - {<<: *a, path: y}\n"
    assert [d.path + d.type for d in parse_config(text).config.datasets] == ["xalpaca", "yalpaca"]


def test_the_example_loads():
    folder = Path(__file__).parents[2] / "examples"
    for file in folder.glob("*.yaml"):
        assert load_config(file).notices == []
