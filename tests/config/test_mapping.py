"""What keys become: the rules of the table in the order of its functions."""

import pytest
import torch

from hf_fastpeft.config import RunConfig
from hf_fastpeft.config.mapping import adapter_config, arguments, assignments, planned_steps, quantization_config


def config(**values):
    return RunConfig.model_validate({"base_model": "m", "datasets": [{"path": "x"}], **values})


def sft(**values):
    return arguments(config(**values), "SFTConfig")


def test_every_argument_exists_where_it_is_sent():
    from dataclasses import fields

    from trl import SFTConfig

    everything = config(
        adapter="lora",
        evals_per_epoch=4,
        save_steps=3,
        hub_model_id="a/b",
        wandb_project="p",
        wandb_name="n",
        trackio_project_name="t",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        eval_sample_packing=False,
        save_total_limit=2,
    )
    known = {f.name for f in fields(SFTConfig)}
    assert set(arguments(everything, "SFTConfig", total_steps=10)) <= known
    assert {a.key.split(".")[0].split(" ")[0] for a in assignments(everything)} <= set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("values", "strategy", "steps"),
    [
        ({}, "no", None),
        ({"evals_per_epoch": 0}, "no", None),
        ({"eval_steps": 7}, "steps", 7),
        ({"evals_per_epoch": 4, "num_epochs": 2}, "steps", 0.125),
        # A ratio of 1.0 would mean "every step".
        ({"evals_per_epoch": 1, "num_epochs": 1}, "epoch", None),
        ({"evals_per_epoch": 1, "num_epochs": 0.5}, "epoch", None),
    ],
)
def test_intervals(values, strategy, steps):
    found = sft(**values)
    assert (found["eval_strategy"], found.get("eval_steps")) == (strategy, steps)


def test_warmup_is_three_percent_and_at_most_100_steps_unless_given():
    assert arguments(config(), "SFTConfig", total_steps=200)["warmup_steps"] == 6
    assert arguments(config(), "SFTConfig", total_steps=10_000)["warmup_steps"] == 100
    assert "3% of the steps" in sft()["warmup_steps"]
    assert sft(warmup_ratio=0.1)["warmup_steps"] == 0.1
    assert sft(warmup_steps=5)["warmup_steps"] == 5


def test_planned_steps_round_as_trainer_does():
    assert planned_steps(config(micro_batch_size=4), 10) == 3
    assert planned_steps(config(micro_batch_size=4, gradient_accumulation_steps=2, num_epochs=3), 10) == 6
    assert planned_steps(config(micro_batch_size=4), 10, world_size=3) == 1
    assert planned_steps(config(max_steps=7), 10) == 7


def test_trackers_are_off_unless_asked_for():
    assert sft()["report_to"] == []
    assert arguments(config(), "environment") == {}
    asked = config(wandb_project="p", wandb_entity="e", wandb_mode="offline", use_tensorboard=True)
    assert arguments(asked, "SFTConfig")["report_to"] == ["wandb", "tensorboard"]
    assert arguments(asked, "environment") == {"WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_MODE": "offline"}
    assert sft(wandb_project="p", use_wandb=False)["report_to"] == []
    assert sft(mlflow_experiment_name="x", trackio_project_name="y")["report_to"] == ["mlflow", "trackio"]
    assert "push_to_hub" not in sft()
    assert sft(hub_model_id="a/b")["push_to_hub"] is True


def test_lora_and_sora_configs_carry_their_keys():
    lora = adapter_config(
        config(adapter="lora", lora_r=4, lora_target_modules="q_.*", peft_use_rslora=True, lora_dropout=0.1), None
    )
    assert (lora.r, lora.target_modules, lora.use_rslora, lora.lora_dropout) == (4, "q_.*", True, 0.1)
    assert lora.task_type == "CAUSAL_LM"
    assert adapter_config(config(adapter="lora", peft_use_dora=True), None).use_dora
    sora = adapter_config(
        config(adapter="sora", lora_target_linear=True, fastpeft={"sora": {"target_r": 3, "min_rank": 1}}), None
    )
    assert type(sora).__name__ == "SoraConfig"
    assert (sora.target_r, sora.min_rank, sora.target_modules) == (3, 1, "all-linear")
    assert (sora.lambda_schedule, sora.lambda_stages, sora.reassign_ranks) == ("constant", 4, False)
    options = {"target_r": 3, "reassign_ranks": True, "lambda_schedule": "stages", "lambda_stages": 2}
    sora = adapter_config(config(adapter="sora", lora_target_linear=True, fastpeft={"sora": options}), None)
    assert (sora.lambda_schedule, sora.lambda_stages, sora.reassign_ranks) == ("stages", 2, True)
    assert adapter_config(config(), None) is None


def test_quantisation_follows_qlora():
    assert quantization_config(config()) is None
    four = quantization_config(config(adapter="qlora", load_in_4bit=True, bf16=True))
    assert (four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == ("nf4", True)
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization_config(config(adapter="lora", load_in_8bit=True)).load_in_8bit


@pytest.mark.parametrize(
    ("values", "attention"),
    [
        ({"flash_attention": True}, "flash_attention_2"),
        ({"sdp_attention": True}, "sdpa"),
        ({"eager_attention": True}, "eager"),
        ({"attn_implementation": "sdpa"}, "sdpa"),
        ({}, None),
    ],
)
def test_attention(values, attention):
    assert arguments(config(**values), "from_pretrained").get("attn_implementation") == attention


def test_precision_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (sft()["bf16"], sft()["fp16"], sft().get("tf32")) == (False, False, None)
    assert sft(fp16="auto")["fp16"] is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert (sft()["bf16"], sft()["tf32"]) == (True, True)
    assert sft(tf32=False)["tf32"] is False
    assert sft(fp16=True)["bf16"] is False
    assert arguments(config(adapter="lora"), "from_pretrained")["dtype"] == "bfloat16"
    # Full fine-tuning keeps float32 weights under autocast.
    assert arguments(config(), "from_pretrained")["dtype"] == "float32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert sft(fp16="auto")["fp16"] is True
