"""The callback patches the model that is trained, whenever the trainer gets it."""

import pytest
from tiny import tiny_llama
from transformers import Trainer, TrainingArguments

from hf_fastpeft import FastPeftCallback
from hf_fastpeft.fast_module import FastModule

ROWS = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4


def arguments(folder):
    return TrainingArguments(str(folder), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)


def patched_modules(model):
    return sum(isinstance(module, FastModule) for module in model.modules())


@pytest.mark.parametrize("late", [False, True])
def test_a_model_from_model_init(tmp_path, late):
    """``train()`` makes the model anew; and a callback may be added after the constructor."""
    callback = FastPeftCallback()
    trainer = Trainer(
        model_init=lambda: tiny_llama(),
        args=arguments(tmp_path),
        train_dataset=ROWS,
        callbacks=[] if late else [callback],
    )
    if late:
        trainer.add_callback(callback)
    trainer.train()
    assert patched_modules(trainer.model) == 13
    assert callback.patched.model is trainer.model
    assert callback.patched.to_json()["blocks"]["mlp"]["calls_fused"] == 4


def test_a_script_that_patched_the_model_itself_is_left_alone(tmp_path):
    from hf_fastpeft import patch_model

    model, callback = tiny_llama(), FastPeftCallback()
    patch_model(model, only="LlamaMLP")
    Trainer(model, args=arguments(tmp_path), train_dataset=ROWS, callbacks=[callback]).train()
    assert callback.patched is None
    assert patched_modules(model) == 2
