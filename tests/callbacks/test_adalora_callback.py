"""Rank allocation in a Trainer run, for PEFT's AdaLoRA and for adaptive LoRA: each trap of PEFT's own is a test."""

import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from safetensors.torch import load_file, save_file
from tiny import tiny_dataset, tiny_llama, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from hf_fastpeft import AdaLoraCallback, AdaptiveLoraConfig, export_to_lora, patch_model
from hf_fastpeft.callbacks.adalora import STATE_FILE
from hf_fastpeft.errors import AdapterError
from hf_fastpeft.tuners._gated import kept_ranks
from hf_fastpeft.tuners.adalora import AdaptiveLoraLayer, RankAllocator, Schedule, Triplet
from hf_fastpeft.tuners.adalora.adapter import active_adapters, refuse_shards
from hf_fastpeft.tuners.adalora.adapter import triplets_of as layer_triplets
from hf_fastpeft.tuners.adalora.allocate import add_orthogonality_gradient_

pytestmark = [
    # PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT takes AdaLoRA's rank_pattern for LoRA's, of another form, and says that it matches nothing
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]
TARGETS = ["q_proj", "down_proj"]
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))


def svd(**changes):
    """PEFT's configuration; its total_step is a dummy."""
    defaults = {"init_r": 4, "target_r": 2, "total_step": 10**9, "tinit": 2, "tfinal": 3, "deltaT": 2}
    return AdaLoraConfig(**{**defaults, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})


def adaptive(**changes):
    defaults = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "delta_t": 2}
    return AdaptiveLoraConfig(**{**defaults, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes})


def moving(**changes):
    return adaptive(**{"budget": "constant", "regrow_ratio": 0.5, **changes})


MAKERS = {
    "PEFT": svd,
    "decay": adaptive,
    "magnitude": lambda **kw: adaptive(scorer="magnitude", **kw),
    "constant": moving,
    "constant, magnitude": lambda **kw: moving(scorer="magnitude", **kw),
}


def model_of(made, seed=0, **overrides):
    torch.manual_seed(seed)
    return get_peft_model(tiny_llama(**overrides), made)


def rows(n=16, seq_len=12):
    ids = torch.randint(3, 128, (n, seq_len), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def trainer_of(model, folder, callbacks, **arguments):
    defaults = {
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    return Trainer(model, args, train_dataset=rows(), eval_dataset=rows(4), callbacks=callbacks)


def triplets_of(model):
    found = [(p, m) for p, m in model.named_modules() if isinstance(m, (AdaLoraLayer, AdaptiveLoraLayer))]
    return [t for path, layer in found for _, t, _ in layer_triplets(path, layer)]


def nonzero(model):
    return sum(int((t.E != 0).sum()) for t in triplets_of(model))


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(ids).logits


class Record(TrainerCallback):
    """Non-zero gates, gates, and gradients of A and B, at each of its turns."""

    def __init__(self):
        self.after, self.gates, self.grads = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads.append([p.grad.clone() for t in triplets_of(model) for p in (t.A, t.B)])

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.after.append(nonzero(model))
        self.gates.append([t.E.detach().clone() for t in triplets_of(model)])


# ---- the budget


@given(
    tinit=st.integers(0, 40),
    length=st.integers(1, 200),
    start=st.integers(1, 400),
    share=st.floats(0, 1),
    dt=st.just(3),
)
@settings(max_examples=50)
def test_the_budget_is_the_papers(tinit, length, start, share, dt):
    schedule, target = Schedule(tinit, tinit + length, dt), round(share * start)
    budgets = [schedule.budget(s, start=start, target=target) for s in range(tinit + length + 3)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(budgets))
    assert set(budgets[: tinit + 1]) == {start}
    assert set(budgets[tinit + length :]) == {target}
    middle = tinit + length // 2  # eq. 13
    exact = target + (start - target) * (1 - (middle - tinit) / length) ** 3
    assert budgets[middle] == pytest.approx(exact, abs=1)
    steps = [s for s in range(tinit + length + 3) if schedule.allocates(s)]
    assert steps == [s for s in range(tinit + 1, tinit + length) if s % 3 == 0]


@pytest.mark.parametrize("name", MAKERS)
def test_ranks_equal_the_budget(tmp_path, name):
    made, early, late, callback = MAKERS[name](), Record(), Record(), AdaLoraCallback()
    model = model_of(made)
    trainer = trainer_of(model, tmp_path, [early, callback, late])
    trainer.train()
    total, target = 16, 8
    schedule = Schedule(2, 9, 2)
    for step, (before, after) in enumerate(zip(early.after, late.after, strict=True), start=1):
        if "constant" in name:
            assert after <= target
            assert before > after or step == 1 or after == target
        elif schedule.allocates(step) or step >= schedule.freeze:
            assert after == schedule.budget(step, start=total, target=target), step
        else:
            assert after == total  # switched-off ranks may return between two allocations
    assert late.after[8:] == [target] * 4
    pattern = [[g != 0 for g in gates] for gates in late.gates[8:]]
    assert all(torch.equal(a, b) for later in pattern for a, b in zip(later, pattern[0], strict=True))
    assert early.after[-1] > target  # Adam moves the gates, so holding them is the callback's doing
    logged = [entry["adalora/kept_rank"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [sum(kept.values()) / 4 for _, kept in callback.history]
    assert logged[-1] == 2
    assert [step for step, _ in callback.history] == list(range(1, 13))


def test_total_step_is_the_trainers_and_equal_ranks_work(tmp_path):
    made = svd(init_r=2, target_r=2)
    model = model_of(made)
    trainer_of(model, tmp_path, [AdaLoraCallback()], num_train_epochs=1, max_steps=-1).train()
    assert made.total_step == 8
    assert made.orth_reg_weight == 0.5
    assert nonzero(model) == 8
    assert all(all(row) for row in made.rank_pattern.values())


def test_without_a_final_phase_the_last_step_chooses(tmp_path):
    for make in (svd, adaptive):
        model = model_of(make(tinit=0, tfinal=0))
        trainer_of(model, tmp_path, [AdaLoraCallback()], max_steps=5).train()
        assert nonzero(model) == 8


def test_a_constant_budget_moves_ranks_and_keeps_their_number(tmp_path):
    callback, model = AdaLoraCallback(), model_of(moving(target_r=1.5))
    trainer_of(model, tmp_path, [callback], max_steps=20).train()
    totals = [sum(kept.values()) for _, kept in callback.history]
    assert set(totals) == {6}
    assert list(callback.history[0][1].values()) == [2, 2, 1, 1]  # spread evenly, the rest to the first
    assert len({tuple(kept.values()) for _, kept in callback.history}) > 1
    assert nonzero(model) == 6


# ---- scores


def grown(seed=0, dtype=torch.float64, **overrides):
    """A model of PEFT's AdaLoRA with random factors and gradients, and its trainable parameters by name."""
    made = svd(target_modules="all-linear", **overrides)
    model = get_peft_model(tiny_llama(dtype), made, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    with torch.no_grad():
        for t in triplets_of(model):
            for p in (t.A, t.B, t.E):
                p.copy_(torch.randn(p.shape, generator=generator))
    return model, made


def random_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p) if p.requires_grad else None


def test_sensitivity_is_the_papers_elementwise_formula():
    model, _ = grown()
    triplets = triplets_of(model)
    allocator = RankAllocator(triplets, beta1=0.7, beta2=0.9)
    want = [[(torch.zeros_like(p), torch.zeros_like(p)) for p in (t.A, t.B, t.E)] for t in triplets]
    for seed in range(3):
        random_gradients(model, seed)
        allocator.observe()
        for t, states in zip(triplets, want, strict=True):
            for i, p in enumerate((t.A, t.B, t.E)):
                average, deviation = states[i]
                now = (p * p.grad).abs().detach()
                average = 0.7 * average + 0.3 * now  # eq. 9
                states[i] = average, 0.9 * deviation + 0.1 * (now - average).abs()  # eq. 10
    scores = []
    for states in want:
        a, b, e = (average * deviation for average, deviation in states)  # eq. 11
        scores.append(e.flatten() + a.mean(1) + b.mean(0))  # eq. 12
    torch.testing.assert_close(allocator.scores(), torch.cat(scores), rtol=1e-12, atol=0)


def test_the_same_ranks_as_pefts_allocator():
    model, made = grown()
    made.total_step, tuner = 100, model.base_model
    peft, ours = PeftAllocator(tuner.model, made, "default"), RankAllocator(triplets_of(model))
    for step in range(1, 5):
        random_gradients(model, step)
        ours.observe()
        peft.update_ipt(tuner.model)
    expected = peft.mask_to_budget(tuner.model, 31)
    ours.keep_(31)
    kept = ours.kept()
    assert sum(kept.values()) == 31
    for path, n in kept.items():
        assert sum(expected[f"{path.removeprefix('base_model.model.')}.lora_E.default"]) == n


@given(seed=st.integers(0, 50), scale=st.floats(0.1, 10))
@settings(max_examples=20)
def test_magnitude_is_the_norm_of_a_ranks_weight_change(seed, scale):
    generator = torch.Generator().manual_seed(seed)

    def triplet(r, n_in, n_out):
        parts = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((r, n_in), (n_out, r), (r,))]
        return Triplet("x", *parts, scale)

    triplets = [triplet(3, 5, 4), triplet(2, 5, 4), triplet(3, 5, 4)]
    want = [
        torch.linalg.matrix_norm(scale * t.E[i] * torch.outer(t.B[:, i], t.A[i]))
        for t in triplets
        for i in range(len(t.E))
    ]
    allocator = RankAllocator(triplets, scorer="magnitude")
    torch.testing.assert_close(allocator.scores(), torch.stack(want))
    assert not any(group.average for group in allocator.groups)  # no state


@given(
    scores=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    budget=st.integers(0, 12),
)
def test_exactly_the_budget_is_kept_also_of_equal_scores(scores, budget):
    gates = torch.tensor(scores, dtype=torch.float32)
    ones = torch.ones(len(scores), 1)
    allocator = RankAllocator([Triplet("x", ones, ones.T, gates, 1.0)], scorer="magnitude")
    budget = min(budget, len(scores))
    allocator.keep_(budget)
    assert allocator.kept() == {"x": budget}
    want = sorted(scores, reverse=True)[:budget]
    assert sorted(gates[gates != 0].tolist(), reverse=True) == [s for s in want if s]


def test_ranks_move_to_where_the_gradient_is():
    a, gates = torch.eye(4), [torch.tensor([3.0, 1.0, 0, 0]), torch.tensor([4.0, 2.0, 0, 0])]
    for gate in gates:
        gate.requires_grad_(True)
    layers = [Triplet(name, a, a, gate, 1.0) for name, gate in zip("pq", gates, strict=True)]
    allocator = RankAllocator(layers, scorer="magnitude", start=4)
    gates[0].grad, gates[1].grad = torch.tensor([0, 0, 0.1, 0.2]), torch.tensor([0, 9.0, 0.5, -0.6])
    allocator.observe()
    allocator.move_(2, 4)
    assert [g.keep_LR.tolist() for g in allocator.groups] == [[[True, False, False, False], [True, False, True, True]]]
    assert gates[0].tolist() == [3, 0, 0, 0]
    assert gates[1].tolist() == [4, 0, 0, 0]  # what came back starts at zero
    allocator.move_(0, 4)
    assert allocator.kept() == {"p": 1, "q": 3}


def test_half_precision_is_scored_in_float32():
    exact, rough = grown()[0], grown(dtype=torch.bfloat16)[0]
    allocators = [RankAllocator(triplets_of(m)) for m in (exact, rough)]
    for seed in range(2):
        for model, allocator in zip((exact, rough), allocators, strict=True):
            random_gradients(model, seed)
            allocator.observe()
    got, want = allocators[1].scores(), allocators[0].scores()
    assert got.dtype == torch.float32
    assert ((got - want).norm() / want.norm()).item() < 0.02  # inputs are bfloat16, the products are not


class CountOps(TorchDispatchMode):
    """Operators that run under it, and those among them that wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")

    def __init__(self):
        super().__init__()
        self.ops, self.waits = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        self.waits += func.__name__.split(".")[0] in self.WAITS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("moves", [False, True])
def test_a_mask_step_is_a_few_operators_a_shape_and_waits_for_nothing(moves, monkeypatch):
    waits = []
    for name in ("tolist", "item", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, *a, m=method, **k: waits.append(1) or m(t, *a, **k))
    counts = {}
    for num_layers in (2, 6):
        model = get_peft_model(tiny_llama(num_hidden_layers=num_layers), svd(target_modules="all-linear"))
        random_gradients(model, 0)
        triplets = triplets_of(model)
        allocator = RankAllocator(triplets, start=2 * len(triplets) if moves else None)
        waits.clear()
        with CountOps() as count, torch.no_grad():
            add_orthogonality_gradient_(allocator.groups, 0.5)
            allocator.observe()
            if moves:
                allocator.move_(5, 2 * len(triplets))
            else:
                allocator.keep_(40)
            allocator.hold_()
        assert count.waits == len(waits) == 0
        counts[num_layers] = count.ops
        assert len(allocator.groups) == 4  # q and o; k and v; gate and up; down
        assert count.ops <= 60 * len(allocator.groups)
    assert counts[2] == counts[6]  # nothing per layer
    waits.clear()
    assert len(allocator.kept()) == 42
    assert sum(waits) == 1  # what a log costs


# ---- orthogonality


def orthogonality(triplets):
    """The term as a loss: arXiv 2303.10512, eq. 5, with PEFT's mean of norms."""
    total, count = 0.0, 0
    for t in triplets:
        for p, cov in ((t.A, t.A @ t.A.T), (t.B, t.B.T @ t.B)):
            total, count = total + torch.linalg.matrix_norm(cov - torch.eye(len(cov), dtype=p.dtype)), count + 1
    return total / count


def test_the_orthogonality_gradient_is_autograds():
    model, _ = grown()
    triplets = triplets_of(model)
    parameters = [p for t in triplets for p in (t.A, t.B)]
    want = torch.autograd.grad(0.3 * orthogonality(triplets), parameters)
    parameters[0].grad = torch.ones_like(parameters[0])
    add_orthogonality_gradient_(RankAllocator(triplets).groups, 0.3)
    parameters[0].grad -= 1
    for p, grad in zip(parameters, want, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=2e-10, atol=1e-14)


def test_orthonormal_factors_get_no_gradient():
    model = get_peft_model(tiny_llama(), adaptive(init_lora_weights="orthogonal"))
    for t in triplets_of(model):
        t.A.data.copy_(torch.eye(*t.A.shape))
        t.B.data.copy_(torch.eye(*t.B.shape))
    add_orthogonality_gradient_(RankAllocator(triplets_of(model)).groups, 0.3)
    assert all(not p.grad.any() for t in triplets_of(model) for p in (t.A, t.B))


@pytest.mark.parametrize("make", [svd, adaptive])
def test_the_orthogonality_gradient_does_not_grow_with_accumulation(tmp_path, make):
    added = {}
    for accumulation in (1, 4, 16):
        early, late = Record(), Record()
        model = model_of(make())
        parameters = [p for t in triplets_of(model) for p in (t.A, t.B)]
        want = torch.autograd.grad(0.5 * orthogonality(triplets_of(model)), parameters)
        trainer_of(
            model,
            tmp_path,
            [early, AdaLoraCallback(), late],
            max_steps=6,
            per_device_train_batch_size=16 // accumulation,
            gradient_accumulation_steps=accumulation,
        ).train()
        added[accumulation] = [b - a for a, b in zip(early.grads[0], late.grads[0], strict=True)]
        for got, expected in zip(added[accumulation], want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    for grads in zip(*added.values(), strict=True):
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(grads[0], grads[2], rtol=1e-5, atol=1e-7)


def trl_trainer(kind, folder, made, callbacks, base=None):
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    common = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    torch.manual_seed(0)
    common_objects = {"processing_class": tiny_tokenizer(), "peft_config": made, "callbacks": callbacks}
    if kind == "sft":
        return SFTTrainer(
            base or tiny_llama(), args=SFTConfig(**common), train_dataset=tiny_dataset(8), **common_objects
        )
    pairs = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 9} w{i + 2}", "rejected": f" w{i + 50}"} for i in range(8)
    ]
    args = DPOConfig(max_length=32, **common)
    return DPOTrainer(tiny_llama(), args=args, train_dataset=Dataset.from_list(pairs), **common_objects)


@pytest.mark.parametrize("make", [svd, adaptive])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_trainers_get_the_orthogonality_gradient_and_the_budget(tmp_path, kind, make):
    """PEFT adds its term to outputs.loss, which TRL does not use: its gradient is exactly zero there."""
    early, late = Record(), Record()
    made = make(tinit=1, tfinal=2)
    trainer = trl_trainer(kind, tmp_path, made, [early, AdaLoraCallback(), late])
    parameters = [p for t in triplets_of(trainer.model) for p in (t.A, t.B)]
    want = torch.autograd.grad(0.5 * orthogonality(triplets_of(trainer.model)), parameters)
    trainer.train()
    for before, after, expected in zip(early.grads[0], late.grads[0], want, strict=True):
        assert expected.any()
        torch.testing.assert_close(after - before, expected, rtol=1e-4, atol=1e-7)
    assert nonzero(trainer.model) == 8


def test_losses_are_the_tasks_in_training_and_evaluation(tmp_path):
    model = model_of(svd(orth_reg_weight=5.0, lora_dropout=0.0))
    trainer = trainer_of(
        model, tmp_path, [AdaLoraCallback()], max_steps=6, eval_strategy="steps", eval_steps=6, learning_rate=1e-3
    )
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(4.85, abs=0.3)  # ln 128, without the regulariser's 5 * 2 or so
    trainer.train()
    losses = {key: e[key] for e in trainer.state.log_history for key in ("loss", "eval_loss") if key in e}
    assert all(value < 6 for value in losses.values())
    with torch.no_grad():
        batch = {k: torch.stack([row[k] for row in rows(4)]) for k in rows(1)[0]}
        task = model.base_model.model.eval()(**batch).loss.item()
    assert losses["eval_loss"] == pytest.approx(task, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(task, rel=1e-5)
    assert model.train()(**batch).loss.item() > 6  # training without the callback is PEFT's own again


def test_gradients_under_a_scaler_are_unscaled_first():
    """Without clipping, the trainer leaves float16 gradients in the scaler's units until the optimizer's step."""
    model, callback = model_of(adaptive()), AdaLoraCallback()
    for t in triplets_of(model):
        t.E.data.fill_(100.0)  # at zero A and B have no gradient but the term's
    parameters = [p for p in model.parameters() if p.requires_grad]
    inner = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = type("Wrapped", (), {"optimizer": inner, "scaler": scaler, "param_groups": inner.param_groups})()
    arguments = TrainingArguments("unused", max_grad_norm=0.0, use_cpu=True, report_to="none")
    state = type("State", (), {"global_step": 0, "max_steps": 12})()
    callback.on_train_begin(arguments, state, None, model=model, optimizer=optimizer)
    scaler.scale(model.train()(IDS, labels=IDS).loss).backward()
    scaled = [p.grad.clone() for t in triplets_of(model) for p in (t.A, t.B)]
    want = torch.autograd.grad(
        0.5 * orthogonality(triplets_of(model)), [p for t in triplets_of(model) for p in (t.A, t.B)]
    )
    callback.on_pre_optimizer_step(arguments, state, None, optimizer=optimizer)
    got = [p.grad for t in triplets_of(model) for p in (t.A, t.B)]
    for grad, raw, term in zip(got, scaled, want, strict=True):
        assert raw.norm() > term.norm()
        torch.testing.assert_close(grad, raw / 1024 + term, rtol=1e-4, atol=1e-6)
    scaler.step(inner)  # the scaler knows that they are
    scaler.update()


# ---- resume, best model, files


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


# ---- steps, warnings, refusals


class Skipping:
    """Stands for accelerate's optimizer at a step with an overflow."""

    step_was_skipped = True


@pytest.mark.parametrize("make", [svd, adaptive])
def test_skipped_steps_score_nothing_and_the_pattern_is_chosen_anyway(tmp_path, make):
    model, callback = model_of(make()), AdaLoraCallback()
    trainer = trainer_of(model, tmp_path, [callback])
    trainer.create_optimizer_and_scheduler(12)
    state = trainer.state
    state.max_steps = 12
    callback.on_train_begin(trainer.args, state, None, model=model, optimizer=trainer.optimizer)
    random_gradients(model, 0)
    for t in triplets_of(model):
        t.E.data.fill_(1.0)
    state.global_step = 8  # the step that is due is the ninth, at which the pattern is chosen
    before = {k: t.clone() for k, t in callback._adapters[0].allocator.state_dict().items()}
    callback.on_optimizer_step(trainer.args, state, None, optimizer=Skipping())
    after = callback._adapters[0].allocator.state_dict()
    assert all(torch.equal(after[k], t) for k, t in before.items())
    assert nonzero(model) == 16
    state.global_step = 9
    callback.on_step_end(trainer.args, state, None)
    assert nonzero(model) == 8


@pytest.mark.filterwarnings("ignore:.*kernels")
def test_ranknum_is_not_trained(tmp_path):
    """PEFT makes it a trainable Parameter wherever the base is not float32 on the CPU; no checkpoint would have it."""
    model = model_of(svd(), dtype=torch.bfloat16)
    ranknums = [p for n, p in model.named_parameters() if "ranknum" in n]
    assert len(ranknums) == 4
    trainer = trainer_of(model, tmp_path, [AdaLoraCallback()], weight_decay=0.1)
    trainer.train()
    assert all(p.item() == 4 for p in ranknums)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in ranknums}
    late = trainer_of(model_of(svd(), dtype=torch.bfloat16), tmp_path, [])
    late.add_callback(AdaLoraCallback())
    late.train()
    assert all(p.item() == 4 for n, p in late.model.named_parameters() if "ranknum" in n)


def test_a_patched_model_runs_fused_with_the_callback(tmp_path):
    losses = []
    for patch in (False, True):
        model = model_of(svd(target_modules="all-linear"))
        patched = patch_model(model) if patch else None
        trainer = trainer_of(model, tmp_path, [AdaLoraCallback()], max_steps=6)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        if patched is not None:
            assert patched.to_json()["blocks"]["mlp"]["calls_stock"] == {}
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


def test_half_precision_gates_of_adaptive_lora_become_float32_again(tmp_path):
    model = model_of(adaptive())
    for t in triplets_of(model):
        t.E.data = t.E.data.to(torch.bfloat16)  # what TRL does to a quantised model
    trainer = trainer_of(model, tmp_path, [])
    trainer.add_callback(AdaLoraCallback())
    trainer.train()
    assert all(t.E.dtype == torch.float32 for t in triplets_of(model))
    assert nonzero(model) == 8


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize(
    # PEFT's own layer over 8 bits multiplies float32 by the bfloat16 that TRL has made of A, and raises
    ("name", "bits"),
    [("PEFT", 4), ("decay", 4), ("decay", 8), ("constant, magnitude", 4)],
)
def test_trl_on_a_quantised_model_ends_at_the_target(tmp_path, name, bits):
    """TRL casts what trains to bfloat16 there; gates of adaptive LoRA are float32 again."""
    tiny_llama(hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(tmp_path / "base")
    quantisation = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantisation)
    made = MAKERS[name](tinit=1, tfinal=2)
    trainer = trl_trainer("sft", tmp_path / "out", made, [AdaLoraCallback()], base=base)
    trainer.train()
    assert nonzero(trainer.model) == 8
    gates = torch.cat([t.E.detach().flatten() for t in triplets_of(trainer.model)])
    assert gates.dtype == (torch.bfloat16 if name == "PEFT" else torch.float32)
    export_to_lora(trainer.model, tmp_path / "plain")
    written = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert sum(t.shape[0] for key, t in written.items() if "lora_A" in key) == 8


def test_a_transformers_model_with_add_adapter(tmp_path):
    for make in (svd, adaptive):
        model = tiny_llama()
        model.add_adapter(make())
        trainer_of(model, tmp_path, [AdaLoraCallback()]).train()
        assert nonzero(model) == 8


def test_only_active_adapters_are_allocated(tmp_path):
    model = model_of(adaptive())
    model.add_adapter("idle", moving(target_modules=["q_proj"]))
    trainer_of(model, tmp_path, [AdaLoraCallback()]).train()
    assert sum(n for n, _ in kept_ranks(model).values()) == 8
    model.set_adapter("idle")
    trainer_of(model, tmp_path, [AdaLoraCallback()]).train()
    assert sum(n for n, _ in kept_ranks(model, "idle").values()) == 4


def test_a_model_without_such_layers_is_told_once(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="no trainable AdaLoRA or adaptive LoRA layer, so no ranks") as caught:
        trainer_of(model, tmp_path, [AdaLoraCallback()], max_steps=1).train()
    assert len([w for w in caught if "AdaLoraCallback" in str(w.message)]) == 1


def test_layers_whose_callback_has_gone_are_told(tmp_path):
    model = model_of(adaptive())
    trainer_of(model, tmp_path, [AdaLoraCallback()], max_steps=6).train()
    with pytest.warns(UserWarning, match="ranks are not being allocated"):
        model.train()(IDS)


def test_pefts_own_allocation_beside_the_callback_is_refused(tmp_path):
    class Both(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.base_model.update_and_allocate(state.global_step + 1)

    with pytest.raises(RuntimeError, match="AdaLoraCallback already allocates the ranks"):
        trainer_of(model_of(svd()), tmp_path, [AdaLoraCallback(), Both()]).train()
    trainer_of(model_of(svd(total_step=12)), tmp_path, [Both()]).train()  # PEFT's alone


def begin(model, optimizer=None, max_steps=12, **arguments):
    args = type("Args", (), {"output_dir": "nowhere", "deepspeed": None, **arguments})()
    state = type("State", (), {"global_step": 0, "max_steps": max_steps})()
    callback = AdaLoraCallback()
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    return callback


@pytest.mark.parametrize("make", [svd, adaptive])
def test_deepspeed_is_refused(make):
    wrapper = type("DeepSpeedOptimizerWrapper", (), {})()
    for found, kwargs in (("deepspeed='zero.json'", {"deepspeed": "zero.json"}), (type(wrapper).__name__, {})):
        with pytest.raises(RuntimeError) as caught:
            begin(model_of(make()), optimizer=wrapper, **kwargs)
        assert str(caught.value).startswith(f"AdaLoraCallback under DeepSpeed ({found}): its engine steps inside")
        assert str(caught.value).endswith("possible: DDP.")


@pytest.mark.parametrize("make", [svd, adaptive])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused(flattened, make, use_orig_params):
    with pytest.raises(RuntimeError, match=r"AdaLoraCallback under FSDP1 .* cannot be told apart; possible: DDP"):
        begin(flattened(model_of(make()), "FULL_SHARD", use_orig_params))


def test_a_layer_that_lost_all_ranks_saves_and_loads_without_a_warning(tmp_path):
    made = svd()
    model = model_of(made)
    callback = begin(model)
    for t, kept in zip(triplets_of(model), (0, 2, 1, 3), strict=True):
        t.E.data[:kept] = 1.0
    callback.on_train_end(None, None, None, model=model)
    assert next(iter(made.rank_pattern.values())) == [True, False, False, False]
    assert [sum(pattern) for pattern in made.rank_pattern.values()] == [1, 2, 1, 3]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert (logits(loaded) - logits(model)).abs().max() <= 1e-6
    assert (logits(tiny_llama()) - logits(model)).abs().max() > 1e-4


def test_sharded_adapters_are_refused():
    (adapter,) = active_adapters(model_of(adaptive()))
    adapter.gates[0].to_local = lambda: None
    with pytest.raises(RuntimeError, match=r"adapter 'default' is sharded \(FSDP2\)"):
        refuse_shards(adapter)


def test_gradients_that_are_gone_are_refused(tmp_path):
    class Clear(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.zero_grad()

    with pytest.raises(RuntimeError, match="no gradients at on_optimizer_step, so components cannot be scored"):
        trainer_of(model_of(svd()), tmp_path, [Clear(), AdaLoraCallback()]).train()
    made = adaptive(scorer="magnitude")  # needs none
    trainer_of(model_of(made), tmp_path, [Clear(), AdaLoraCallback()]).train()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (svd(target_r=9), r"target_r=9 over 4 layers are 36 ranks, and the layers have 16; possible: .* at most 4"),
        (svd(tinit=6, tfinal=6), "tinit=6, tfinal=6, deltaT=2 in a run of 12 steps: none is left"),
        (adaptive(total_step=13), "total_step=13: the run has 12 steps"),
        (adaptive(tinit=0.5, tfinal=6), "tinit=0.5, tfinal=6: 6 and 6 of 12 steps leave none"),
    ],
)
def test_a_schedule_or_target_that_cannot_be_met_is_refused(made, message):
    with pytest.raises(ValueError, match=message):
        begin(model_of(made))


RANK_OF_TWO = """
import sys
apart = sys.argv[4] == "apart"
sys.path[:0] = sys.argv[5:]
import torch, torch.distributed as dist
from test_adalora_callback import IDS, adaptive, model_of, moving, svd, triplets_of
from transformers import TrainingArguments
from hf_fastpeft import AdaLoraCallback
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
ids = torch.randint(3, 128, (4, 9), generator=torch.Generator().manual_seed(0))
ids = ids[2 * rank : 2 * rank + 2] if world > 1 else ids
args, results = TrainingArguments(folder, use_cpu=True, report_to="none"), {}
for name, make in (("PEFT", svd), ("decay", adaptive), ("constant", moving)):
    model, callback = model_of(make()), AdaLoraCallback()
    state = type("State", (), {"global_step": 0, "max_steps": 12})()
    callback.on_init_end(args, state, None, model=model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 and not apart else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    for step in range(12):
        wrapped.train()(input_ids=ids, labels=ids).loss.backward()
        callback.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
        optimizer.step()
        callback.on_optimizer_step(args, state, None, optimizer=optimizer)
        optimizer.zero_grad()
        state.global_step += 1
    results[name] = [p.detach().clone() for t in triplets_of(model) for p in (t.A, t.B, t.E)]
    callback.on_train_end(args, state, None, model=model)
torch.save(results, f"{folder}/{world}-{rank}.pt")
if world > 1:
    dist.destroy_process_group()
"""


def runs_of(folder, kind, *ranks):
    """Factors and gates of each process, by method; ``ranks`` are (rank, number of processes)."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parents[1])]
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK_OF_TWO, str(rank), str(world), str(folder), kind, *paths],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world in ranks
    ]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(ranks), errors[0][-2000:]
    return [torch.load(folder / f"{world}-{rank}.pt") for rank, world in ranks]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one_with_both_their_rows(tmp_path):
    first, second, alone = runs_of(tmp_path, "together", (0, 2), (1, 2), (0, 1))
    for name in alone:
        for a, b, want in zip(first[name], second[name], alone[name], strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, want, rtol=1e-4, atol=1e-6)
        gates = alone[name][2::3]
        assert sum(int((gate != 0).sum()) for gate in gates) == 8


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_that_do_not_reduce_gradients_differ(tmp_path):
    """So the test above sees whether they do."""
    first, second = runs_of(tmp_path, "apart", (0, 2), (1, 2))
    for name in first:
        assert not any(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True)), name
    masks = [[gate != 0 for name in run for gate in run[name][2::3]] for run in (first, second)]
    assert any(not torch.equal(a, b) for a, b in zip(*masks, strict=True))
