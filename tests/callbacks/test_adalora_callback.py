"""Rank allocation in a Trainer run, for PEFT's AdaLoRA and for adaptive LoRA: each trap of PEFT's own is a test."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adalora import (
    IDS,
    MAKERS,
    Record,
    adaptive,
    grown,
    logits,
    model_of,
    moving,
    nonzero,
    orthogonality,
    random_gradients,
    rows,
    svd,
    trainer_of,
    triplets_of,
    trl_trainer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from hf_fastpeft import AdaLoraCallback, export_to_lora, patch_model, patched
from hf_fastpeft.tuners._gated import kept_ranks
from hf_fastpeft.tuners.adalora import RankAllocator, Schedule
from hf_fastpeft.tuners.adalora.adapter import active_adapters, refuse_shards
from hf_fastpeft.tuners.adalora.allocate import add_orthogonality_gradient_

pytestmark = [
    # PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT takes AdaLoRA's rank_pattern for LoRA's, of another form, and says that it matches nothing
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]


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


# ---- orthogonality


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
        handle = patched(patch_model(model)) if patch else None
        trainer = trainer_of(model, tmp_path, [AdaLoraCallback()], max_steps=6)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        if handle is not None:
            assert handle.to_json()["blocks"]["mlp"]["calls_stock"] == {}
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


@pytest.mark.usefixtures("transformers_takes_peft")
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
from adalora import IDS, adaptive, model_of, moving, svd, triplets_of
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
