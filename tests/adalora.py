"""Models with PEFT's AdaLoRA and with adaptive LoRA, trainers for them, and what is read off them."""

import torch
from datasets import Dataset
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora.layer import AdaLoraLayer
from tiny import tiny_dataset, tiny_llama, tiny_tokenizer
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from hf_fastpeft import AdaptiveLoraConfig
from hf_fastpeft.tuners.adalora import AdaptiveLoraLayer
from hf_fastpeft.tuners.adalora.adapter import triplets_of as layer_triplets

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


def orthogonality(triplets):
    """The term as a loss: arXiv 2303.10512, eq. 5, with PEFT's mean of norms."""
    total, count = 0.0, 0
    for t in triplets:
        for p, cov in ((t.A, t.A @ t.A.T), (t.B, t.B.T @ t.B)):
            total, count = total + torch.linalg.matrix_norm(cov - torch.eye(len(cov), dtype=p.dtype)), count + 1
    return total / count


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
