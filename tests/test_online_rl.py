"""TRL's trainers that generate while they train: the same completions, rewards and losses as stock."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_trl import LORA, block_calls
from tiny import tiny_llama, tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hf_fastpeft import FastPeftCallback, patch_model

STEPS = 3
TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}
OF_THE_CLOCK = ("runtime", "per_second", "step_time")


def run(folder, name, how, checkpointing):
    """``(prompts and completions, metrics a step, trainer)``; ``how`` is the way of patching, None for stock."""
    trainer_class, config_class = TRAINERS[name]
    seen = []

    def distinct_words(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(set(words.split()))) for words in completions]

    torch.manual_seed(0)
    model = tiny_llama()
    if how == "before":
        patch_model(model)
    args = config_class(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        beta=0.05,
        learning_rate=1e-2,
        logging_steps=1,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"prompt": " ".join(f"w{(i * 7 + k) % 60}" for k in range(3 + i % 4))} for i in range(12)]
    trainer = trainer_class(
        model,
        reward_funcs=distinct_words,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(**LORA),
        callbacks=[FastPeftCallback()] if how == "callback" else [],
    )
    trainer.train()
    logged = [
        {key: value for key, value in row.items() if not any(part in key for part in OF_THE_CLOCK)}
        for row in trainer.state.log_history
    ]
    return seen, logged, trainer


@pytest.mark.parametrize("how", ["callback", "before"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", list(TRAINERS))
def test_completions_and_losses_are_stocks(name, checkpointing, how, tmp_path):
    seen, want, _ = run(tmp_path / "stock", name, None, checkpointing)
    got_seen, got, trainer = run(tmp_path / "fast", name, how, checkpointing)
    assert got_seen == seen
    assert len({completion for _, completion in seen}) > len(seen) / 2  # sampled, not one word again and again
    assert len(got) == len(want) > STEPS
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for key in b:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), key
    assert max(row.get("grad_norm", 0) for row in want) > 1e-3
    fused, _ = block_calls(trainer)
    assert fused["attention_in"] > 4 * 2 * STEPS  # more than the losses' own passes: generation ran fused, too
