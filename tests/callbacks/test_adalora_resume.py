"""What checkpoints of an AdaLoRA run hold, resuming from them, an earlier best model, damaged files."""

import warnings

import pytest
import torch
from adalora import MAKERS, adaptive, logits, model_of, nonzero, svd, trainer_of, triplets_of
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers.trainer_callback import TrainerCallback

from hf_fastpeft import AdaLoraCallback, export_to_lora
from hf_fastpeft.callbacks.adalora import STATE_FILE
from hf_fastpeft.errors import AdapterError

pytestmark = [
    # PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT takes AdaLoRA's rank_pattern for LoRA's, of another form, and says that it matches nothing
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]


@pytest.mark.parametrize(
    ("name", "at"),
    [("PEFT", at) for at in (1, 4, 8, 9, 11)] + [(n, at) for n in list(MAKERS)[1:] for at in (4, 10)],
)
def test_resume_equals_a_straight_run_bit_for_bit(tmp_path, name, at):
    common = {"save_strategy": "steps", "save_steps": at}
    straight, seen = model_of(MAKERS[name](lora_dropout=0.1)), AdaLoraCallback()
    trainer_of(straight, tmp_path, [seen], **common).train()
    made, again = MAKERS[name](lora_dropout=0.1), AdaLoraCallback()
    resumed = model_of(made, seed=5)
    trainer_of(resumed, tmp_path, [again], **common).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    want, got = straight.state_dict(), resumed.state_dict()
    assert want.keys() == got.keys()
    for key in want:
        assert torch.equal(want[key], got[key]), key
    assert again.history == seen.history
    assert straight.peft_config["default"].to_dict() == resumed.peft_config["default"].to_dict()
    assert nonzero(straight) == 8


def test_checkpoints_hold_full_tensors_and_the_final_save_the_ranks_that_are_left(tmp_path):
    made = svd(orth_reg_weight=0.25)
    model = model_of(made)
    trainer = trainer_of(model, tmp_path, [AdaLoraCallback()], save_strategy="steps", save_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for step in (4, 12):
        saved = load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert {t.shape[0] for k, t in saved.items() if "lora_E" in k} == {4}
        state = load_file(tmp_path / f"checkpoint-{step}" / STATE_FILE)
        assert sum(int(t.sum()) for k, t in state.items() if k.endswith(".keep")) == (10 if step == 4 else 8)
    final = load_file(tmp_path / "final" / "adapter_model.safetensors")
    ranks = [t.shape[0] for k, t in final.items() if "lora_E" in k]
    lost = sum(not (t.E != 0).any() for t in triplets_of(model))
    assert sum(ranks) == 8 + lost  # a layer without ranks keeps a gate of zero: PEFT warns of empty tensors
    for folder in ("checkpoint-12", "final"):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / folder)
        assert (logits(loaded) - logits(model)).abs().max() <= 1e-6
        assert loaded.peft_config["default"].orth_reg_weight == 0.25
        assert loaded.peft_config["default"].total_step == 12
    kept = load_file(tmp_path / "checkpoint-12" / "adapter_model.safetensors")
    for key, tensor in final.items():
        pattern = made.rank_pattern[key.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".lora_E"]
        want = kept[key][:, pattern] if "lora_B" in key else kept[key][pattern]
        assert torch.equal(tensor, want)
    export_to_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    assert (logits(plain) - logits(model)).abs().max() <= 1e-6


class BestAt(TrainerCallback):
    """Makes the evaluation at one step the best."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = 0.0 if state.global_step == self.step else 1.0 + state.global_step


@pytest.mark.parametrize("make", [svd, adaptive])
@pytest.mark.parametrize(("best", "ranks"), [(3, 16), (10, 8)])
def test_an_earlier_best_model_is_restored_as_it_was_evaluated(tmp_path, make, best, ranks):
    model = model_of(make())
    trainer = trainer_of(
        model,
        tmp_path,
        [AdaLoraCallback(), BestAt(best)],
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(w.message) for w in caught if "AdaLoraCallback" in str(w.message)]
    assert trainer.state.best_global_step == best
    if ranks == 8:
        assert told == []
    else:
        assert "ends with 16 ranks over 4 layers, of a target of 8" in told[0]
        assert "before step 9, at which ranks are fixed" in told[0]
    want = PeftModel.from_pretrained(tiny_llama(), tmp_path / f"checkpoint-{best}")
    assert nonzero(model) == ranks
    assert torch.equal(logits(model), logits(want))
    trainer.save_model(str(tmp_path / "final"))
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "final")
    assert (logits(again) - logits(want)).abs().max() <= 1e-6


def test_a_second_trainer_on_the_same_model_resumes(tmp_path):
    made = svd()
    model = model_of(made)
    trainer_of(model, tmp_path, [AdaLoraCallback()], save_strategy="steps", save_steps=6).train()
    want = {key: t.clone() for key, t in model.state_dict().items()}
    assert made.rank_pattern
    trainer = trainer_of(model, tmp_path, [AdaLoraCallback()])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, want[key]), key


@pytest.mark.filterwarnings("ignore:.*no ranks are allocated")
def test_a_cut_adapter_is_refused_with_the_way_on(tmp_path):
    model = model_of(svd())
    trainer = trainer_of(model, tmp_path, [AdaLoraCallback()])
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    cut = PeftModel.from_pretrained(tiny_llama(), tmp_path / "final", is_trainable=True)
    with pytest.raises(AdapterError, match=r"do not have init_r=4 ranks, .*train it further without this callback"):
        trainer_of(cut, tmp_path, [AdaLoraCallback()]).train()
    trainer_of(cut, tmp_path, [], max_steps=1).train()


def damaged(file, **changes):
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    changes.get("tensors", lambda t: None)(tensors)
    for old, new in changes.get("text", {}).items():
        metadata = {k: v.replace(old, new) for k, v in metadata.items()}
    metadata |= changes.get("metadata", {})
    save_file(tensors, file, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"content": "{"}}, "not an AdaLoRA state file"),
        ({"metadata": {"content": "{}"}}, "not an AdaLoRA state file"),
        ({"metadata": {"format": "9"}}, r"found format and step \('9', 6\); possible: \('1', 6\)"),
        ({"text": {'"step": 6': '"step": 5'}}, r"found format and step \('1', 5\)"),
        ({"text": {'"default"': '"other"'}}, "adapter 'default' is not in it"),
        ({"text": {"q_proj": "v_proj"}}, "adapter 'default' is over 4 other layers in it"),
        ({"tensors": lambda t: t.pop("default.group_0.keep")}, "other layers, ranks or options: group_0.keep"),
        (
            {"tensors": lambda t: t.update({"default.group_0.keep": torch.ones(1, 1)})},
            "ranks or options: group_0.keep",
        ),
    ],
)
def test_a_broken_state_file_is_refused(tmp_path, finished, change, message):
    resumed, checkpoint = model_of(svd()), finished(tmp_path)
    damaged(checkpoint / STATE_FILE, **change)
    with pytest.raises(AdapterError, match=message):
        trainer_of(resumed, tmp_path, [AdaLoraCallback()]).train(resume_from_checkpoint=str(checkpoint))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Copies a checkpoint of step 6 of 12 into a folder."""
    import shutil

    source = tmp_path_factory.mktemp("finished")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_of(model_of(svd()), source, [AdaLoraCallback()], save_strategy="steps", save_steps=6)
        trainer.train()

    def copy(folder):
        return shutil.copytree(source / "checkpoint-6", folder / "checkpoint-6")

    return copy


def test_no_file_at_all_is_refused_as_a_state_and_a_missing_one_is_told(tmp_path, finished):
    checkpoint = finished(tmp_path)
    (checkpoint / STATE_FILE).write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="not an AdaLoRA state file"):
        trainer_of(model_of(svd()), tmp_path, [AdaLoraCallback()]).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / STATE_FILE).unlink()
    with pytest.warns(UserWarning, match="no adalora_state.safetensors in the checkpoint of step 6"):
        trainer_of(model_of(svd()), tmp_path, [AdaLoraCallback()]).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("name", ["PEFT", "constant"])
def test_past_the_last_allocation_the_gates_replace_a_missing_state(tmp_path, name):
    straight, resumed = model_of(MAKERS[name]()), model_of(MAKERS[name](), seed=5)
    trainer_of(straight, tmp_path, [AdaLoraCallback()], save_strategy="steps", save_steps=10).train()
    (tmp_path / "checkpoint-10" / STATE_FILE).unlink()
    trainer_of(resumed, tmp_path, [AdaLoraCallback()]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert all(torch.equal(got, want) for got, want in zip(resumed.parameters(), straight.parameters(), strict=True))


def test_resuming_with_another_number_of_steps_warns(tmp_path, finished):
    trainer = trainer_of(model_of(svd()), tmp_path, [AdaLoraCallback()], max_steps=14)
    with pytest.warns(UserWarning, match=r"\(2, 9, 2\) before and has \(2, 11, 2\) now"):
        trainer.train(resume_from_checkpoint=str(finished(tmp_path)))
