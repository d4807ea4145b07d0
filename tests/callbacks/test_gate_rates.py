"""Which learning rate prunes which gate: that of the optimizer's group which holds it, at that step."""

import warnings

import pytest
import torch
from adapters import token_batch
from peft import AdaLoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from tiny import tiny_llama
from torch.nn.functional import softshrink
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from hf_fastpeft import AdaLoraCallback, AdaptiveLoraConfig, SoraCallback, SoraConfig
from hf_fastpeft.tuners.sora import SoraLayer

pytestmark = [
    # PEFT 0.21 reads the alias that transformers 5.23 deprecates: peft/peft_model.py, PeftModel.__init__
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:SoraCallback. no weight decay:UserWarning"),
    pytest.mark.filterwarnings("ignore:SoraCallback. this schedule:UserWarning"),
]

LAMBDA = 0.3


def sora_model(**settings):
    torch.manual_seed(0)
    defaults = {"r": 4, "target_modules": ["q_proj", "down_proj"], "warmup_ratio": 0.0, "settle_ratio": 0.0}
    return get_peft_model(tiny_llama(), SoraConfig(**{**defaults, "sparse_lambda": LAMBDA, **settings}))


def gates_of(model, adapter="default"):
    return [m.lora_A[adapter].gate.weight for m in model.modules() if isinstance(m, SoraLayer)]


def apart(model, rates, optimizer_class=torch.optim.AdamW, **settings):
    """Optimizer with the matrices first, at a learning rate of their own, and each layer's gate in a group alone."""
    gates = gates_of(model)
    held = {id(gate) for gate in gates}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    groups = [{"params": others, "lr": 7e-4}]
    groups += [{"params": [gate], "lr": rate} for gate, rate in zip(gates, rates, strict=True)]
    return optimizer_class(groups, weight_decay=0.0, **settings)


class Record(TrainerCallback):
    """Gates and the learning rate of each, found by looking for it, after the optimizer's step."""

    def __init__(self):
        self.gates, self.rates = [], []

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.gates.append([g.detach().clone() for g in gates_of(model)])
        rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        self.rates.append([float(rate_of.get(id(g), "nan")) for g in gates_of(model)])


def train(model, optimizer, folder, *callbacks, steps=4, scheduler=None, **arguments):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        warmup_steps=0,
        **arguments,
    )
    batch = token_batch()
    rows = [{key: value[i % len(value)] for key, value in batch.items()} for i in range(4)]
    Trainer(model, args, train_dataset=rows, callbacks=list(callbacks), optimizers=(optimizer, scheduler)).train()


def pruned_by_own_rate(early, late):
    for stepped, rates, pruned in zip(early.gates, early.rates, late.gates, strict=True):
        for gate, rate, after in zip(stepped, rates, pruned, strict=True):
            assert torch.equal(after, softshrink(gate, rate * LAMBDA))


def test_each_gate_is_pruned_by_the_rate_of_its_own_group(tmp_path):
    model, early, late = sora_model(), Record(), Record()
    optimizer = apart(model, [1e-3, 2e-3, 5e-3, 0.0])
    train(model, optimizer, tmp_path, early, SoraCallback(), late, lr_scheduler_type="linear")
    assert early.rates[0] == [1e-3, 2e-3, 5e-3, 0.0]
    assert early.rates[2] == pytest.approx([5e-4, 1e-3, 2.5e-3, 0.0])
    pruned_by_own_rate(early, late)


def test_schedules_that_differ_between_groups(tmp_path):
    model, early, late = sora_model(), Record(), Record()
    optimizer = apart(model, [1e-3] * 4)
    factors = [lambda step: 1.0, *((lambda step, i=i: 1 + i * step) for i in range(4))]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    train(model, optimizer, tmp_path, early, SoraCallback(), late, scheduler=scheduler)
    assert early.rates[2] == pytest.approx([1e-3, 3e-3, 5e-3, 7e-3])
    pruned_by_own_rate(early, late)


def test_lora_plus_gives_gates_the_rate_of_b(tmp_path):
    model, early, late = sora_model(), Record(), Record()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0)
    train(model, optimizer, tmp_path, early, SoraCallback(), late, lr_scheduler_type="constant")
    assert early.rates[0] == pytest.approx([1.6e-3] * 4)
    pruned_by_own_rate(early, late)


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit"])
def test_optimizers_of_bitsandbytes(tmp_path, name, monkeypatch):
    """Its groups and hooks, with AdamW's arithmetic: the 8-bit kernels need a GPU."""
    import bitsandbytes

    model, early, late = sora_model(), Record(), Record()
    optimizer = apart(model, [1e-3, 2e-3, 5e-3, 1e-2], getattr(bitsandbytes.optim, name))

    def update(group, p, gindex, pindex):
        p.data.add_(p.grad.sign(), alpha=-group["lr"])

    monkeypatch.setattr(optimizer, "init_state", lambda *args: None)
    monkeypatch.setattr(optimizer, "update_step", update)
    monkeypatch.setattr(optimizer, "prefetch_state", lambda p: None)
    train(model, optimizer, tmp_path, early, SoraCallback(), late, lr_scheduler_type="constant")
    assert early.rates[0] == [1e-3, 2e-3, 5e-3, 1e-2]
    pruned_by_own_rate(early, late)


class Regroup(TrainerCallback):
    """Moves the last gate into a group of its own, at another learning rate, after the second step."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step != 2:
            return
        gate, inner = gates_of(model)[-1], optimizer.optimizer
        for group in inner.param_groups:
            group["params"] = [p for p in group["params"] if p is not gate]
        inner.add_param_group({"params": [gate], "lr": 2e-2})


def test_groups_may_change_in_the_run(tmp_path):
    model, early, late = sora_model(), Record(), Record()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    train(model, optimizer, tmp_path, early, SoraCallback(), late, Regroup(), scheduler=scheduler)
    assert early.rates == [[1e-3] * 4] * 2 + [[1e-3] * 3 + [2e-2]] * 2
    pruned_by_own_rate(early, late)


class Lose(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not gates_of(model)[-1]]


def test_a_gate_that_leaves_the_optimizer_is_told(tmp_path):
    model = sora_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    with pytest.raises(
        RuntimeError, match=r"gates of 1 layers, 'model.layers.1.mlp.down_proj' first, so they are not"
    ):
        train(model, optimizer, tmp_path, SoraCallback(), Lose())


class Switch(TrainerCallback):
    """Hands the run to another adapter, or to none, after the second step."""

    def __init__(self, change):
        self.change = change

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            self.change(model)


@pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned:UserWarning")  # the second adapter's
@pytest.mark.filterwarnings("ignore:SoraCallback. adapter 'default' ends with 9 ranks:UserWarning")
@pytest.mark.parametrize("settings", [{}, {"target_r": 2}], ids=["pressure", "budget"])
def test_an_adapter_that_is_switched_off_is_left_as_it_is(tmp_path, settings):
    model, late = sora_model(**settings), Record()
    model.add_adapter("second", SoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    trained = [p for n, p in model.named_parameters() if ".default." in n or ".second." in n]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    switch = Switch(lambda model: model.set_adapter("second"))
    train(model, optimizer, tmp_path, SoraCallback(), late, switch)
    for first, last in zip(late.gates[1], late.gates[3], strict=True):
        assert torch.equal(first, last)


# ---- what has no learning rate to go by


def begin(model, optimizer, callback=None, steps=9):
    state = type("State", (), {"global_step": 0, "max_steps": steps})()
    args = type("Args", (), {"output_dir": "nowhere", "deepspeed": None})()
    (callback or SoraCallback()).on_train_begin(args, state, None, model=model, optimizer=optimizer)


def test_an_optimizer_without_groups_is_refused():
    with pytest.raises(RuntimeError, match="FusedBackward has no param_groups, so nothing tells at which learning"):
        begin(sora_model(), type("FusedBackward", (), {})())


@pytest.mark.parametrize(("key", "value"), [("lr", None), ("d", 1e-6)])
def test_steps_that_are_not_the_learning_rate_s_are_refused(key, value):
    def optimizer(model):
        made = apart(model, [1e-3] * 4)
        made.param_groups[2][key] = value
        return made

    model = sora_model()
    with pytest.raises(RuntimeError, match=rf"steps of its own \(parameter group 2 has lr=.*{value!r}"):
        begin(model, optimizer(model))
    model = sora_model(target_r=2)  # a budget needs no learning rate
    begin(model, optimizer(model))


class ScheduleFree(torch.optim.SGD):
    """Its two modes: the parameters are one point while training, and an average while evaluating."""

    def train(self):
        pass

    def eval(self):
        pass


@pytest.mark.parametrize("callback", [SoraCallback, AdaLoraCallback])
def test_schedule_free_optimizers_are_refused(callback):
    config = AdaptiveLoraConfig(init_r=4, target_r=2, target_modules=["q_proj"])
    model = sora_model() if callback is SoraCallback else get_peft_model(tiny_llama(), config)
    optimizer = ScheduleFree([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(RuntimeError, match=f"{callback.__name__} with ScheduleFree: .* no rank would stay pruned"):
        begin(model, optimizer, callback())


@pytest.mark.parametrize("kind", ["sora", "adaptive", "adalora"])
def test_merged_adapters_are_refused(kind):
    config = {
        "sora": SoraConfig(r=4, target_modules=["q_proj"]),
        "adaptive": AdaptiveLoraConfig(init_r=4, target_r=2, target_modules=["q_proj"]),
        "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=1, target_modules=["q_proj"]),
    }[kind]
    model, callback = get_peft_model(tiny_llama(), config), SoraCallback() if kind == "sora" else AdaLoraCallback()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    model.merge_adapter()
    match = rf"{type(callback).__name__}: '.*model.layers.0.self_attn.q_proj' has adapters \['default'\] merged"
    with pytest.raises(RuntimeError, match=match):
        begin(model, optimizer, callback)
    model.unmerge_adapter()
    begin(model, optimizer, callback)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ([1e-2] * 4, "must prune every rank"),
        ([1e-2, 1e-2, 1e-2, 1e-5], None),  # the last layer's gates stay
        ([1e-5, 1e-5, 1e-5, 1e-2], None),
        ([1e-5] * 4, "cannot prune"),
    ],
)
def test_what_a_schedule_can_do_is_judged_group_by_group(rates, message):
    model = sora_model(sparse_lambda=2.0)  # (2 - 1) * 50 * 9 steps * 1e-2 = 4.5 of 1
    optimizer = apart(model, rates)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = type("State", (), {"global_step": 0, "max_steps": 9})()
    args = type("Args", (), {"output_dir": "nowhere", "deepspeed": None})()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SoraCallback().on_train_begin(args, state, None, model=model, optimizer=optimizer, lr_scheduler=scheduler)
    said = [str(w.message) for w in caught if "this schedule" in str(w.message)]
    assert len(said) == (message is not None)
    assert message is None or message in said[0]
