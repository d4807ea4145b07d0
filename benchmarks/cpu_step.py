"""Whole training steps of the real SmolLM2-135M on a CPU: stock TRL + PEFT against the patched model, in one run.

    python -m benchmarks.cpu_step [--steps 7] [--masked 0.6] [--padded] [--checkpointing] [--json out.json]

One process, one trainer, one batch; steps alternate stock, patched, stock, patched, ... so that whatever else the
machine does hits both alike. Reported are medians over the timed steps, their ratio, and the spread. Before anything
is timed the two must agree (``verify``). Peak memory comes from a fresh process a variant.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import machine
from benchmarks.models import token_batch
from hf_fastpeft import patch_model, patched, verify
from hf_fastpeft.quickstart.model import ensure_model

VARIANTS = ("stock", "patched")


def build_trainer(options: argparse.Namespace) -> tuple[trl.SFTTrainer, dict[str, torch.Tensor]]:
    """A stock SFTTrainer with LoRA r 16 on all linears, and one batch of random tokens."""
    folder = ensure_model("smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    arguments = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=options.checkpointing,
        per_device_train_batch_size=options.batch,
        max_steps=1,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list([{"text": "one row, to satisfy the constructor"}]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear"),
    )
    trainer.create_optimizer()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # the gradient of A is zero while B is
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return trainer, token_batch(
        model.config.vocab_size, options.batch, options.seq_len, masked=options.masked, sampled=options.padded
    )


def step(trainer: trl.SFTTrainer, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """``(seconds, loss)`` of forward, backward, clipping and the optimizer."""
    started = time.perf_counter()
    trainer.model.train()
    loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch=(batch["labels"] != -100).sum())
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return time.perf_counter() - started, loss.item()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Alternating steps in this process."""
    trainer, batch = build_trainer(options)
    checked = verify(trainer.model, batch)
    print(checked)
    if not checked.passed:
        raise SystemExit("not timed: the patched model does not compute what stock computes")
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for i in range(options.warmup + options.steps):
        for name in VARIANTS:
            handle = patched(patch_model(trainer.model)) if name == "patched" else None
            elapsed, loss = step(trainer, batch)
            if handle is not None:
                report = handle.to_json()
                handle.restore()
            if i >= options.warmup:
                seconds[name].append(elapsed)
                print(
                    f"step {i - options.warmup + 1}/{options.steps} {name:8} {elapsed:6.2f} s  loss {loss:.4f}",
                    flush=True,
                )
    tokens = int(batch["attention_mask"].sum())
    return {
        "tokens": tokens,
        "settings": {k: v for k, v in vars(options).items() if k not in ("json", "peak")},
        "seconds": seconds,
        "median_s": {name: statistics.median(t) for name, t in seconds.items()},
        "tokens_per_s": {name: tokens / statistics.median(t) for name, t in seconds.items()},
        "ratio": statistics.median(seconds["patched"]) / statistics.median(seconds["stock"]),
        "blocks": report["blocks"],
    }


def peak_bytes(options: argparse.Namespace) -> int:
    """Peak resident memory of this process after two steps of one variant."""
    trainer, batch = build_trainer(options)
    if options.peak == "patched":
        patch_model(trainer.model)
    for _ in range(2):
        step(trainer, batch)
    return machine.peak_resident_bytes()


def peak_in_fresh_process(variant: str) -> int:
    command = [sys.executable, "-m", "benchmarks.cpu_step", *sys.argv[1:], "--peak", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7, help="timed steps a variant")
    parser.add_argument("--warmup", type=int, default=2, help="steps a variant before timing")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--masked", type=float, default=0.0, help="share of each row without a label")
    parser.add_argument("--padded", action="store_true", help="rows of sampled lengths, padded, instead of full ones")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, TRL's default")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_bytes(options))
        return
    result = measure(options)
    result["peak_bytes"] = {name: peak_in_fresh_process(name) for name in VARIANTS}
    result["machine"] = machine.describe()
    print(f"\n{'variant':10} {'median s':>9} {'min..max':>13} {'tokens/s':>9} {'peak GB':>8}")
    for name in VARIANTS:
        times = result["seconds"][name]
        print(
            f"{name:10} {result['median_s'][name]:9.2f} {min(times):6.2f}..{max(times):5.2f} "
            f"{result['tokens_per_s'][name]:9.0f} {result['peak_bytes'][name] / 1e9:8.2f}"
        )
    print(f"patched / stock, ratio of medians: {result['ratio']:.3f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
