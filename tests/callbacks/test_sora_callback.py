"""SoRA in a Trainer run: what the proximal step computes, when it acts, and that resuming changes nothing."""

import itertools
import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_dataset, tiny_llama, tiny_tokenizer
from torch.nn.functional import softshrink
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from hf_fastpeft.callbacks._decay import DecayExemption
from hf_fastpeft.callbacks.sora import STATE_FILE, SoraCallback
from hf_fastpeft.errors import AdapterError
from hf_fastpeft.tuners.sora import SoraConfig, SoraLayer, kept_ranks
from hf_fastpeft.tuners.sora.prune import PruneWindow, keep_largest_, lambda_share, rank_budget, soft_threshold_

# PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NO_DECAY = "ignore:SoraCallback. no weight decay:UserWarning"


def three_line_version(p, threshold):
    """The widely copied step, as a test subject: its last line zeroes what the first two have just moved."""
    p[p > threshold] -= threshold
    p[p < -threshold] += threshold
    p[p.abs() < threshold] = 0


gate_lists = st.lists(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=9), min_size=1, max_size=5).map(
    lambda rows: [torch.tensor(row) for row in rows]
)


@given(gates=gate_lists, threshold=st.floats(0, 1, width=32), as_tensor=st.booleans())
def test_soft_threshold_is_softshrink(gates, threshold, as_tensor):
    want = [softshrink(gate, threshold) for gate in gates]
    soft_threshold_(gates, torch.tensor(threshold) if as_tensor else threshold)
    for got, expected in zip(gates, want, strict=True):
        assert torch.equal(got, expected)


def test_the_three_line_version_has_twice_the_dead_zone():
    gate = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.3
    ours, copied = gate.clone(), gate.clone()
    soft_threshold_([ours], 0.1)
    three_line_version(copied, 0.1)
    assert torch.equal(ours, softshrink(gate, 0.1))
    assert not torch.equal(copied, softshrink(gate, 0.1))
    # P(|N(0, 0.3)| < t) = erf(t / (0.3 sqrt 2)): 26.1 % at 0.1, 49.5 % at 0.2
    assert (ours == 0).float().mean().item() == pytest.approx(math.erf(0.1 / 0.3 / math.sqrt(2)), abs=0.01)
    assert (copied == 0).float().mean().item() == pytest.approx(math.erf(0.2 / 0.3 / math.sqrt(2)), abs=0.01)


@given(gates=gate_lists, threshold=st.floats(0, 3, width=32), min_rank=st.integers(0, 4))
def test_soft_threshold_leaves_min_rank(gates, threshold, min_rank):
    before = [gate.clone() for gate in gates]
    soft_threshold_(gates, threshold, min_rank=min_rank)
    for old, new in zip(before, gates, strict=True):
        assert (new != 0).sum() >= min(min_rank, int((old != 0).sum()))
        shrunk = softshrink(old, threshold)
        changed = new != shrunk
        assert torch.equal(new[changed], old[changed])  # a protected gate keeps its value
        assert changed.sum() <= min_rank


@given(gates=gate_lists, budget=st.integers(0, 50), min_rank=st.integers(0, 3))
def test_keep_largest_keeps_the_budget(gates, budget, min_rank):
    before = [gate.clone() for gate in gates]
    keep_largest_(gates, budget, min_rank=min_rank)
    sizes = [gate.numel() for gate in gates]
    allowed = min(max(budget, sum(min(min_rank, n) for n in sizes)), sum(sizes))
    flat_old, flat_new = torch.cat(before), torch.cat(gates)
    assert (flat_new != 0).sum() <= allowed
    assert torch.equal(flat_new[flat_new != 0], flat_old[flat_new != 0])  # survivors are not moved
    if min_rank == 0 and (flat_old != 0).all():
        assert (flat_new != 0).sum() == allowed
        dropped = flat_old[flat_new == 0].abs()
        if len(dropped) and allowed:
            assert dropped.max() <= flat_new[flat_new != 0].abs().min()


@given(first=st.integers(0, 50), length=st.integers(0, 200), total=st.integers(1, 400), share=st.floats(0, 1))
@settings(max_examples=50)
def test_rank_budget_falls_from_all_ranks_to_the_target(first, length, total, share):
    window, target = PruneWindow(first, first + length), round(share * total)
    budgets = [rank_budget(s, window, total=total, target=target) for s in range(first + length + 3)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(budgets))
    assert all(budget == total for budget in budgets[:first])
    assert budgets[-1] == target
    if length:
        assert budgets[window.end - 1] == target


@given(
    gate=st.lists(st.floats(-2, 2), min_size=1, max_size=6, unique_by=abs),
    threshold=st.floats(0, 1),
    budget=st.integers(0, 6),
)
def test_threshold_and_budget_together_are_the_proximal_operator_of_both(gate, threshold, budget):
    """Against the minimum over every support of at most ``budget`` entries; on a support, softshrink is optimal."""
    g = torch.tensor(gate, dtype=torch.float64)

    def objective(x):
        return ((x - g) ** 2).sum() / 2 + threshold * x.abs().sum()

    supports = [mask for mask in itertools.product((0.0, 1.0), repeat=len(gate)) if sum(mask) <= budget]
    best = min(objective(softshrink(g, threshold) * torch.tensor(mask, dtype=torch.float64)) for mask in supports)
    x = g.clone()
    soft_threshold_([x], threshold)
    keep_largest_([x], budget)
    assert torch.count_nonzero(x) <= budget
    torch.testing.assert_close(objective(x), best, rtol=1e-12, atol=1e-12)


FORMULAS = {
    "constant": lambda u: 1.0,
    "linear": lambda u: u,
    "cosine": lambda u: (1 - math.cos(math.pi * u)) / 2,
    "cubic": lambda u: 1 - (1 - u) ** 3,
}


@given(name=st.sampled_from(sorted(FORMULAS)), first=st.integers(0, 50), length=st.integers(1, 300))
def test_the_pressure_follows_its_formula(name, first, length):
    window = PruneWindow(first, first + length)
    shares = [lambda_share(step, window, name) for step in range(first, first + length)]
    assert shares == pytest.approx([FORMULAS[name](i / length) for i in range(1, length + 1)], rel=1e-12)
    assert all(0 < a <= b <= 1 for a, b in itertools.pairwise([*shares, 1.0]))
    assert shares[-1] == 1.0


@given(length=st.integers(1, 300), stages=st.integers(1, 20))
def test_stages_rise_in_equal_steps_of_equal_length(length, stages):
    shares = [lambda_share(7 + i, PruneWindow(7, 7 + length), "stages", stages=stages) for i in range(length)]
    assert {round(share * stages, 9) for share in shares} <= set(range(1, stages + 1))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    if length >= stages:
        lengths = [len(list(group)) for _, group in itertools.groupby(shares)]
        assert len(lengths) == stages
        assert max(lengths) - min(lengths) <= 1


def test_the_cubic_pressure_rises_as_the_rank_budget_falls():
    window = PruneWindow(3, 43)
    for step in range(3, 43):
        left = rank_budget(step, window, total=10**9, target=0) / 10**9
        assert lambda_share(step, window, "cubic") == pytest.approx(1 - left, abs=1e-8)


def rows(n=8, seq_len=12):
    ids = torch.randint(3, 128, (n, seq_len), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def sora_model(seed=0, **settings):
    torch.manual_seed(seed)
    defaults = {"r": 4, "target_modules": ["q_proj", "down_proj"], "warmup_ratio": 0.0, "settle_ratio": 0.0}
    return get_peft_model(tiny_llama(), SoraConfig(**{**defaults, **settings}))


def trainer_of(model, folder, callbacks, **arguments):
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    return Trainer(model, args, train_dataset=rows(), eval_dataset=rows(2), callbacks=callbacks)


def gates_of(model, adapter="default"):
    return [m.lora_A[adapter].gate.weight for m in model.modules() if isinstance(m, SoraLayer)]


class Record(TrainerCallback):
    """Gates before the optimizer's step, after it, and after the callback that stands between the two records."""

    def __init__(self):
        self.before, self.after, self.lrs = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before.append([g.detach().clone() for g in gates_of(model)])

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.after.append([g.detach().clone() for g in gates_of(model)])
        self.lrs.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_step_is_softshrink_with_the_learning_rate_of_that_step(tmp_path, accumulation):
    model, early, late = sora_model(sparse_lambda=0.3, gate_scale=500.0), Record(), Record()
    trainer = trainer_of(
        model,
        tmp_path,
        [early, SoraCallback(), late],
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="linear",
        warmup_steps=2,
    )
    trainer.train()
    assert len(early.after) == 6  # once per optimizer step, whatever the accumulation
    assert early.lrs[:3] == pytest.approx([0.0, 0.005, 0.01])
    for lr, stepped, pruned in zip(early.lrs, early.after, late.after, strict=True):
        for a, b in zip(stepped, pruned, strict=True):
            assert torch.equal(b, softshrink(a, lr * 0.3))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "cubic", "stages"])
def test_a_scheduled_step_is_softshrink_with_its_share_of_lambda(tmp_path, schedule, accumulation):
    early, late = Record(), Record()
    settings = {"sparse_lambda": 0.3, "gate_scale": 500.0, "settle_ratio": 0.2}
    model = sora_model(lambda_schedule=schedule, lambda_stages=2, **settings)
    trainer_of(
        model, tmp_path, [early, SoraCallback(), late], max_steps=5, gradient_accumulation_steps=accumulation
    ).train()
    shares = [FORMULAS.get(schedule, lambda u: 0.5 if u <= 0.5 else 1.0)(u) for u in (0.25, 0.5, 0.75, 1.0)]
    for step, share in enumerate(shares):
        for a, b in zip(early.after[step], late.after[step], strict=True):
            assert torch.equal(b, softshrink(a, early.lrs[step] * (0.3 * share)))


def test_pruning_stays_inside_its_window_and_zeros_stay_zero_while_settling(tmp_path):
    early, late, callback = Record(), Record(), SoraCallback()
    model = sora_model(target_r=2, warmup_ratio=0.3, settle_ratio=0.4, gate_scale=5)
    trainer_of(model, tmp_path, [early, callback, late], max_steps=10).train()
    for step in range(3):
        assert all(torch.equal(a, b) for a, b in zip(early.after[step], late.after[step], strict=True))
    kept = [sum(int((g != 0).sum()) for g in gates) for gates in late.after]
    assert kept[:3] == [16, 16, 16]
    assert kept == sorted(kept, reverse=True)
    assert kept[5:] == [8] * 5  # 4 layers, mean rank 2
    for step in range(6, 10):
        for a, b, alive in zip(early.after[step], late.after[step], late.after[5], strict=True):
            assert torch.equal(b, a * (alive != 0))
    # Adam moves zeroed gates, so holding them is the callback's doing
    assert any((a[b == 0] != 0).any() for a, b in zip(early.after[9], late.after[9], strict=True))


@pytest.mark.parametrize(
    ("settings", "lowest"), [({"sparse_lambda": 0.9, "gate_scale": 1000.0}, 1), ({"target_r": 1.5}, 1)]
)
def test_min_rank_survives(tmp_path, settings, lowest):
    model = sora_model(min_rank=lowest, **settings)
    trainer_of(model, tmp_path, [SoraCallback()], max_steps=12).train()
    kept = [k for k, _ in kept_ranks(model).values()]
    assert min(kept) >= lowest
    assert sum(kept) < 16


def test_ranks_left_are_logged_and_remembered(tmp_path):
    model, callback = sora_model(target_r=1), SoraCallback()
    trainer = trainer_of(model, tmp_path, [callback], logging_steps=2)
    trainer.train()
    logged = [entry["sora/kept_rank"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [sum(kept.values()) / 4 for _, kept in callback.history]
    assert [step for step, _ in callback.history] == [2, 4, 6]
    assert logged[-1] == 1
    assert callback.history[-1][1] == {
        path.removeprefix("base_model.model."): kept for path, (kept, _) in kept_ranks(model).items()
    }


SETTINGS = {
    "fixed": {"sparse_lambda": 0.5},
    "fixed, min_rank": {"sparse_lambda": 0.9, "min_rank": 1},
    "closed loop": {"target_r": 2, "warmup_ratio": 0.1, "settle_ratio": 0.3, "lora_dropout": 0.1},
    "stages": {"sparse_lambda": 0.9, "lambda_schedule": "stages"},
    "cosine": {"sparse_lambda": 0.9, "lambda_schedule": "cosine", "settle_ratio": 0.2},
    "reassigned": {
        "gate_scale": 100.0,
        "target_r": 2,
        "reassign_ranks": True,
        "sparse_lambda": 0.6,
        "lambda_schedule": "cubic",
    },
}


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("fixed", 4),
        ("fixed, min_rank", 4),
        ("closed loop", 4),
        ("closed loop", 8),
        ("stages", 4),
        ("cosine", 4),
        ("reassigned", 8),
    ],
)
def test_resume_equals_a_straight_run_bit_for_bit(tmp_path, name, at):
    common = {"max_steps": 10, "save_strategy": "steps", "save_steps": at, "save_only_model": False}
    straight, seen = sora_model(**SETTINGS[name]), SoraCallback()
    trainer_of(straight, tmp_path, [seen], **common).train()
    resumed, again = sora_model(seed=5, **SETTINGS[name]), SoraCallback()
    trainer = trainer_of(resumed, tmp_path, [again], **common)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    want, got = straight.state_dict(), resumed.state_dict()
    assert want.keys() == got.keys()
    for key in want:
        assert torch.equal(want[key], got[key]), key
    assert again.history == seen.history
    assert sum(k for k, _ in kept_ranks(straight).values()) < 16  # something was pruned


def test_weight_decay_acts_on_the_matrices_and_not_on_the_gates(tmp_path):
    """With lr * weight_decay = 0.05 and no gradient, A shrinks by 5 % a step and the gates do not move."""
    model = sora_model(sparse_lambda=0.0)
    before = [g.detach().clone() for g in gates_of(model)]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    exemption = DecayExemption.install(optimizer, gates_of(model))
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    a = {
        n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n and "gate" not in n and n in names
    }
    optimizer.step()
    assert all(torch.equal(g, old) for g, old in zip(gates_of(model), before, strict=True))
    for name, old in a.items():
        torch.testing.assert_close(model.get_parameter(name), old * 0.95)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == order
    exemption.remove()
    optimizer.step()
    assert not torch.equal(gates_of(model)[0], before[0])


def test_weight_decay_exemption_survives_a_step_that_raises():
    model = sora_model()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)
    exemption = DecayExemption.install(optimizer, gates_of(model))
    exemption._split()  # a step that raised stops here
    exemption._split()
    assert len(optimizer.param_groups) == 2
    exemption.remove()
    assert len(optimizer.param_groups) == 1
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], params, strict=True))


def test_nothing_is_installed_where_nothing_decays():
    model = sora_model()
    assert DecayExemption.install(torch.optim.SGD(model.parameters(), lr=0.1), gates_of(model)) is None


def test_decay_without_step_hooks_is_refused():
    class Foreign:
        def __init__(self, params):
            self.param_groups = [{"params": params, "weight_decay": 0.1}]

    model = sora_model()
    with pytest.raises(RuntimeError, match="Foreign decays the gates and has no step hooks"):
        DecayExemption.install(Foreign(gates_of(model)), gates_of(model))


def test_a_skipped_optimizer_step_prunes_nothing(tmp_path):
    class Skipped:
        step_was_skipped = True
        param_groups = ()

    callback, model = SoraCallback(), sora_model(sparse_lambda=0.9)
    trainer = trainer_of(model, tmp_path, [callback], max_steps=1)
    trainer.create_optimizer_and_scheduler(10)
    trainer.state.max_steps = 10
    kwargs = {"model": model, "lr_scheduler": trainer.lr_scheduler}
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, optimizer=trainer.optimizer, **kwargs)
    before = [g.detach().clone() for g in gates_of(model)]
    callback.on_optimizer_step(trainer.args, trainer.state, trainer.control, optimizer=Skipped())
    assert all(torch.equal(a, b) for a, b in zip(gates_of(model), before, strict=True))
    callback.on_optimizer_step(trainer.args, trainer.state, trainer.control, optimizer=trainer.optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(gates_of(model), before, strict=True))


class ByHand:
    """A run whose gradients are given: only the gates train, under Adam, and the callback acts after each step."""

    def __init__(self, steps, lr=1e-3, **settings):
        self.model, self.callback = sora_model(**settings), SoraCallback()
        self.optimizer = torch.optim.Adam(gates_of(self.model), lr=lr)
        self.state = type("State", (), {"global_step": 0, "max_steps": steps})()
        self.args = type("Args", (), {"output_dir": "nowhere"})()
        self.callback.on_train_begin(self.args, self.state, None, model=self.model, optimizer=self.optimizer)

    def step(self, grads):
        """Ranks left in each layer after a step with one gradient for all gates of a layer."""
        for gate, value in zip(gates_of(self.model), grads, strict=True):
            gate.grad = torch.full_like(gate, value)
        self.callback.on_step_begin(self.args, self.state, None)
        self.optimizer.step()
        self.callback.on_optimizer_step(self.args, self.state, None, optimizer=self.optimizer)
        self.state.global_step += 1
        return [int((gate != 0).sum()) for gate in gates_of(self.model)]


@pytest.mark.filterwarnings(NO_DECAY)
@pytest.mark.parametrize("reassign", [False, True])
def test_freed_ranks_go_to_the_layers_that_the_loss_pulls(reassign):
    """The first two layers are pulled up for 40 steps, then the last two; a gradient that alternates pulls nowhere."""
    run = ByHand(200, target_r=2, reassign_ranks=reassign, warmup_ratio=0.05, settle_ratio=0.1)
    matrices = {n: p.detach().clone() for n, p in run.model.named_parameters() if "gate" not in n}
    kept, largest_return = [], 0.0
    for step in range(200):
        before = [gate.detach().clone() for gate in gates_of(run.model)]
        noise = 0.1 * (-1) ** step
        kept.append(run.step([-1, -1, noise, noise] if step < 40 else [noise, noise, -1, -1]))
        back = torch.cat([now[old == 0] for old, now in zip(before, gates_of(run.model), strict=True)])
        largest_return = max([largest_return, *back.abs().tolist()])
    window = PruneWindow(10, 180)
    assert all(sum(now) <= rank_budget(step, window, total=16, target=8) for step, now in enumerate(kept))
    assert sum(kept[100][:2]) > sum(kept[100][2:])
    if reassign:
        assert sum(kept[-1][2:]) == 8
        assert sum(kept[-1][:2]) == 0
        assert 0 < largest_return <= 1e-3 * 1.01  # Adam's step: no rank comes back with a jump
    else:
        assert all(later <= earlier for a, b in itertools.pairwise(kept) for earlier, later in zip(a, b, strict=True))
    for name, old in matrices.items():  # A and B are the optimizer's alone
        assert torch.equal(run.model.get_parameter(name), old), name


@pytest.mark.filterwarnings(NO_DECAY)
def test_reassigned_layers_keep_min_rank():
    run = ByHand(60, lr=1e-2, target_r=1.5, min_rank=1, reassign_ranks=True, warmup_ratio=0)
    kept = [run.step([-1, -1, 0, 0]) for _ in range(60)]
    assert min(min(now) for now in kept) >= 1
    assert sum(kept[-1]) == 6


def test_without_a_steady_pull_freed_ranks_stay_free(tmp_path):
    """At a pressure that no Adam step reaches every gate dies, so the target is an upper bound."""
    model = sora_model(target_r=2, reassign_ranks=True, sparse_lambda=4.0)
    with pytest.warns(UserWarning, match=r"must prune every rank: .* Lower sparse_lambda below 1\.$"):
        trainer_of(model, tmp_path, [SoraCallback()], learning_rate=2e-2, max_steps=10).train()
    assert sum(k for k, _ in kept_ranks(model).values()) == 0


def test_a_run_that_ends_before_its_target_is_told(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    model = sora_model(target_r=1)
    with pytest.warns(
        UserWarning, match=r"ends with \d+ ranks over 4 layers, of a target of 4: the run ended.*step 12"
    ):
        trainer_of(model, tmp_path, [SoraCallback(), Stop()], max_steps=12).train()
    assert sum(k for k, _ in kept_ranks(model).values()) == rank_budget(2, PruneWindow(0, 12), total=16, target=4)


@pytest.mark.parametrize(("best", "ranks"), [(1, 16), (5, 4)])
def test_an_earlier_best_model_keeps_the_ranks_it_was_evaluated_with(tmp_path, best, ranks):
    class BestAt(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = 0.0 if state.global_step == best else 1.0 + state.global_step

    model = sora_model(target_r=1, warmup_ratio=0.2, settle_ratio=0.2)
    trainer = trainer_of(
        model,
        tmp_path,
        [SoraCallback(), BestAt()],
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
    told = [str(w.message) for w in caught if "SoraCallback" in str(w.message)]
    assert len(told) == (ranks == 16)
    assert all("ends with 16 ranks over 4 layers, of a target of 4" in text for text in told)
    assert sum(k for k, _ in kept_ranks(model).values()) == ranks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lambda_schedule": "stages", "lambda_stages": 7},
            "lambda_stages=7: the run prunes in 6 steps, 0 to 6; possible: at most 6 stages",
        ),
        (
            {"target_r": 4, "rank_pattern": {"q_proj": 1}},
            r"target_r=4 over 4 layers are 16 ranks, and the layers have 10; possible: a target_r of at most 2\.5",
        ),
    ],
)
def test_what_the_run_or_the_layers_do_not_allow_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(sora_model(**settings), tmp_path, [SoraCallback()]).train()


def test_only_active_adapters_are_pruned(tmp_path):
    model = sora_model(target_r=1)
    model.add_adapter("idle", SoraConfig(r=4, target_modules=["q_proj"], target_r=1))
    trainer_of(model, tmp_path, [SoraCallback()]).train()
    assert sum(k for k, _ in kept_ranks(model).values()) == 4
    assert all(kept == total for kept, total in kept_ranks(model, "idle").values())


@pytest.mark.usefixtures("transformers_takes_peft")
def test_prunes_a_transformers_model_with_add_adapter(tmp_path):
    model = tiny_llama()
    model.add_adapter(SoraConfig(r=4, target_modules=["q_proj", "down_proj"], target_r=1, warmup_ratio=0))
    trainer_of(model, tmp_path, [SoraCallback()]).train()
    assert sum(k for k, _ in kept_ranks(model).values()) == 4


@pytest.mark.parametrize("add_late", [False, True])
def test_half_precision_gates_become_float32_again(tmp_path, add_late):
    model = sora_model(target_r=2)
    for gate in gates_of(model):
        gate.data = gate.data.to(torch.bfloat16)  # what TRL does to a quantised model
    parameters = [id(g) for g in gates_of(model)]
    trainer = trainer_of(model, tmp_path, [] if add_late else [SoraCallback()])
    if add_late:
        trainer.add_callback(SoraCallback())
    else:
        assert all(g.dtype == torch.float32 for g in gates_of(model))
    trainer.train()
    assert all(g.dtype == torch.float32 for g in gates_of(model))
    assert [id(g) for g in gates_of(model)] == parameters
    assert all(s["exp_avg"].dtype == torch.float32 for p, s in trainer.optimizer.state.items() if id(p) in parameters)


def test_float32_is_restored_in_the_same_parameters_and_their_optimizer_state():
    model, callback = sora_model(), SoraCallback()
    gates = gates_of(model)

    def halve():
        for gate in gates:
            gate.data = gate.data.to(torch.bfloat16)

    halve()
    callback.on_init_end(None, None, None, model=model)
    assert all(gate.dtype == torch.float32 for gate in gates)
    halve()
    optimizer = torch.optim.AdamW(gates, lr=0.1, weight_decay=0.0)
    for gate in gates:
        gate.grad = torch.ones_like(gate)
    optimizer.step()
    optimizer.zero_grad()
    state = type("State", (), {"global_step": 1, "max_steps": 9})()
    args = type("Args", (), {"output_dir": "nowhere"})()
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    assert gates_of(model)[0] is gates[0]
    assert all(gate.dtype == torch.float32 for gate in gates)
    assert all(optimizer.state[gate]["exp_avg_sq"].dtype == torch.float32 for gate in gates)
    for gate in gates:
        gate.grad = torch.ones_like(gate)
    optimizer.step()  # half-precision moments beside float32 gates would raise here


def test_resuming_with_a_callback_added_late_warns_about_lost_digits(tmp_path):
    model = sora_model(target_r=2)
    trainer_of(model, tmp_path, [SoraCallback()], save_strategy="steps", save_steps=3).train()
    model = sora_model(target_r=2)
    model.get_base_model().is_loaded_in_4bit = True
    trainer = trainer_of(model, tmp_path, [], save_steps=3)
    trainer.add_callback(SoraCallback())
    with pytest.warns(UserWarning, match="loaded into bfloat16 gates, which lose digits"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.filterwarnings(NO_DECAY)
def test_trl_on_a_4bit_model_ends_with_gates_moved_and_float32(tmp_path):
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    tiny_llama(hidden_size=64, head_dim=16).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    config = SoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_r=2, warmup_ratio=0, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        base,
        SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            dataloader_pin_memory=False,
        ),
        train_dataset=tiny_dataset(8),
        processing_class=tiny_tokenizer(),
        peft_config=config,
        callbacks=[SoraCallback()],
    )
    trainer.train()
    gates = gates_of(trainer.model)
    assert all(g.dtype == torch.float32 for g in gates)
    values = torch.cat([g.detach() * 50 for g in gates])
    assert (values == 0).sum() == 8
    assert ((values != 0) & (values != 1)).any()  # in bfloat16 every survivor would still be exactly 1


def test_a_model_without_sora_is_told_once(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="no trainable SoRA layer, so nothing is pruned") as caught:
        trainer_of(model, tmp_path, [SoraCallback()], max_steps=2).train()
    assert len([w for w in caught if "SoraCallback" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"learning_rate": 1e-5}, "cannot prune: sparse_lambda=0.5, gate_scale=50"),
        ({"sparse_lambda": 2.0}, {"learning_rate": 1.0, "max_steps": 20}, "must prune every rank"),
        ({"gate_scale": 1e3}, {"weight_decay": 0.0}, "no weight decay on A and B"),
        ({"target_r": 2, "reassign_ranks": True}, {"learning_rate": 1e-5}, "cannot free a rank: sparse_lambda=0.5"),
    ],
)
def test_a_schedule_that_cannot_work_is_told(tmp_path, settings, arguments, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(sora_model(**settings), tmp_path, [SoraCallback()], **arguments).train()
    said = [str(w.message) for w in caught if "SoraCallback" in str(w.message)]
    assert len(said) == 1
    assert message in said[0]


@pytest.mark.parametrize(
    ("sparse_lambda", "schedule", "learning_rate", "message"),
    [
        # 6 steps at 9e-3 lower a gate by 0.5 * 50 * 6 * 9e-3 = 1.35 of 1; a linear growth has 7/12 of that: 0.79
        (0.5, "constant", 9e-3, None),
        (0.5, "linear", 9e-3, "cannot prune: sparse_lambda=0.5, gate_scale=50, lambda_schedule='linear' .* by 0.787"),
        # (2 - 1) * 50 * 6 * 1e-2 = 3 of 1; with the growth (2 * 7/12 - 1) * 50 * 6 * 1e-2 = 0.5
        (2.0, "constant", 1e-2, "must prune every rank"),
        (2.0, "linear", 1e-2, None),
    ],
)
def test_what_is_told_counts_the_growth_of_the_pressure(tmp_path, sparse_lambda, schedule, learning_rate, message):
    model = sora_model(sparse_lambda=sparse_lambda, lambda_schedule=schedule)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_of(
            model, tmp_path, [SoraCallback()], learning_rate=learning_rate, lr_scheduler_type="constant"
        ).train()
    said = [str(w.message) for w in caught if "this schedule" in str(w.message)]
    assert len(said) == (message is not None)
    assert message is None or re.search(message, said[0])


def test_gates_outside_the_optimizer_are_refused(tmp_path):
    model = sora_model()
    others = [p for n, p in model.named_parameters() if p.requires_grad and "gate.weight" not in n]
    trainer = trainer_of(model, tmp_path, [SoraCallback()])
    trainer.optimizer = torch.optim.AdamW(others, lr=1e-3)
    with pytest.raises(RuntimeError, match=r"does not hold the gates of 4 layers, 'model.layers.0.self_attn.q_proj'"):
        trainer.train()


def begin(model, deepspeed=None, optimizer=None):
    state = type("State", (), {"global_step": 0, "max_steps": 1})()
    SoraCallback().on_train_begin(type("Args", (), {"deepspeed": deepspeed})(), state, None, model, optimizer)


@pytest.mark.parametrize("settings", [{}, {"target_r": 2}])
def test_deepspeed_is_refused(settings):
    wrapper = type("DeepSpeedOptimizerWrapper", (), {"param_groups": ()})()
    for found, kwargs in (("deepspeed='zero2.json'", {"deepspeed": "zero2.json"}), (type(wrapper).__name__, {})):
        with pytest.raises(RuntimeError) as caught:
            begin(sora_model(**settings), optimizer=wrapper, **kwargs)
        assert str(caught.value).startswith(
            f"SoraCallback under DeepSpeed ({found}): its engine steps inside backward"
        )
        assert str(caught.value).endswith("possible: DDP, or FSDP2 with target_r=None and min_rank=0.")


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused(flattened, strategy, use_orig_params):
    message = r"SoraCallback under FSDP1 \(FullyShardedDataParallel\): it flattens .* possible: DDP, or FSDP2 with"
    with pytest.raises(RuntimeError, match=message):
        begin(flattened(sora_model(), strategy, use_orig_params))


@pytest.mark.parametrize("settings", [{"target_r": 2}, {"min_rank": 1}])
def test_sharded_gates_that_must_be_compared_are_refused(settings):
    from hf_fastpeft.callbacks.sora import _active_adapters, _refuse_shards

    (adapter,) = _active_adapters(sora_model(**settings))
    adapter.gates[0].to_local = lambda: None
    with pytest.raises(RuntimeError, match="cannot be compared across shards"):
        _refuse_shards(adapter)


TWO_PROCESSES = """
import sys
rank, folder, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.path[:0] = sys.argv[4:]
import torch, torch.distributed as dist
from test_sora_callback import sora_model, gates_of
from hf_fastpeft import SoraCallback
from hf_fastpeft.tuners.sora import kept_ranks
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store-{kind}", rank=rank, world_size=2)
ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(rank))
settings = {"sparse_lambda": 0.5} if kind == "fsdp2" else {"target_r": 2, "min_rank": 1}
model, callback = sora_model(**settings), SoraCallback()
args = type("Args", (), {"output_dir": folder, "deepspeed": None})()
state = type("State", (), {"global_step": 0, "max_steps": 8, "log_history": []})()
callback.on_init_end(args, state, None, model=model)
wrapped = model
if kind == "ddp":
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
elif kind == "fsdp2":
    for layer in model.get_base_model().model.layers:
        torch.distributed.fsdp.fully_shard(layer)
    torch.distributed.fsdp.fully_shard(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
for step in range(8):
    callback.on_step_begin(args, state, None)
    wrapped.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    callback.on_optimizer_step(args, state, None, optimizer=optimizer)
    optimizer.zero_grad()
    state.global_step += 1
logs = {"loss": 0.0}
callback.on_log(args, state, None, logs=logs)
gates = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in (g.detach() for g in gates_of(model))]
torch.save({"gates": gates, "kept": kept_ranks(model), "logged": logs["sora/kept_rank"]}, f"{folder}/{kind}-{rank}.pt")
dist.destroy_process_group()
"""


def two_processes(folder, kind):
    """Gates and ranks of a run on each of two processes, whose rows differ."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parents[1])]
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TWO_PROCESSES, str(rank), str(folder), kind, *paths],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors[0][-2000:]
    return [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_keep_the_same_ranks(tmp_path, kind):
    first, second = two_processes(tmp_path, kind)
    for a, b in zip(first["gates"], second["gates"], strict=True):
        assert torch.equal(a, b)
    kept = {
        path: int((gate != 0).sum()) for (path, _), gate in zip(first["kept"].items(), first["gates"], strict=True)
    }
    for run in (first, second):
        assert {path: n for path, (n, _) in run["kept"].items()} == kept
        assert run["logged"] == sum(kept.values()) / len(kept)
    if kind == "ddp":
        assert sum(kept.values()) == 2 * len(kept)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_that_do_not_reduce_gradients_differ(tmp_path):
    """So the test above sees whether they do."""
    first, second = two_processes(tmp_path, "apart")
    assert any(not torch.equal(a, b) for a, b in zip(first["gates"], second["gates"], strict=True))
    assert first["kept"] != second["kept"]


def test_a_broken_state_file_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(sora_model(target_r=2), tmp_path, [SoraCallback()], **saving).train()
    checkpoint = tmp_path / "checkpoint-3"
    assert json.loads((checkpoint / STATE_FILE).read_text())["step"] == 3
    for content, message in (
        ("{", "not a SoRA state file"),
        ('{"format": 1}', "not a SoRA state file"),
        ('{"format": 9, "step": 3, "history": [], "windows": {}}', r"found format and step \(9, 3\)"),
        ('{"format": 1, "step": 7, "history": [], "windows": {}}', r"found format and step \(1, 7\)"),
    ):
        (checkpoint / STATE_FILE).write_text(content)
        trainer = trainer_of(sora_model(target_r=2), tmp_path, [SoraCallback()], **saving)
        with pytest.raises(AdapterError, match=message):
            trainer.train(resume_from_checkpoint=str(checkpoint))


def test_resuming_with_another_number_of_steps_warns(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(sora_model(target_r=2), tmp_path, [SoraCallback()], **saving).train()
    trainer = trainer_of(sora_model(target_r=2), tmp_path, [SoraCallback()], max_steps=9, save_steps=3)
    with pytest.warns(UserWarning, match="pruned in steps 0 to 6 before, and now in 0 to 9"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_training_without_the_callback_warns_once_per_model(tmp_path):
    config = SoraConfig(r=2, target_modules=["q_proj"])
    batch = {k: v[None] for k, v in rows(1)[0].items()}
    for _ in range(2):  # two models from one config: each is told
        model = get_peft_model(tiny_llama(), config)
        with pytest.warns(UserWarning, match="gates are not being pruned") as caught:
            [model.train()(**batch) for _ in range(2)]
        assert len(caught) == 1
    quiet = get_peft_model(tiny_llama(), config)
    quiet.eval()(**batch)
    with torch.no_grad():
        quiet.train()(**batch)
    trainer_of(quiet, tmp_path, [SoraCallback()], max_steps=1, learning_rate=1.0).train()
    with pytest.warns(UserWarning, match="gates are not being pruned"):  # the callback has gone
        quiet.train()(**batch)


def test_a_checkpoint_holds_exact_float32_gates(tmp_path):
    model = sora_model(target_r=2)
    trainer = trainer_of(model, tmp_path, [SoraCallback()], save_strategy="steps", save_steps=6)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    gates = {key: value for key, value in saved.items() if key.endswith(".lora_A.gate.weight")}
    assert len(gates) == 4
    assert all(value.dtype == torch.float32 for value in gates.values())
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-6")
    for a, b in zip(gates_of(model), gates_of(again), strict=True):
        assert torch.equal(a, b)
