"""Adapters saved by each released version: ``tests/tuners/fixtures/<version>/<method>/``.

``python tests/saved_adapters.py`` (``make fixtures``) adds those of the present version, and leaves what is there as
it is: a file that a version wrote is what later ones must read. Everything in them comes from an integer hash, so
neither torch's random numbers nor an initialisation of transformers is part of them.
"""

import sys
from pathlib import Path

import torch
from methods import METHODS, reference_llama
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from hf_fastpeft._version import __version__

FIXTURES = Path(__file__).parent / "tuners" / "fixtures"
IDS = torch.arange(12).view(2, 6) * 5 % 29 + 3


def hashed(shape, seed):
    """Uniform in [-1, 1), float64, the same on every machine: a 32-bit integer mix of the element's number."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) + seed * 7919
    for _ in range(2):
        n = ((n ^ (n >> 16)) * 0x45D9F3B) % 2**32
    return ((n ^ (n >> 16)).double() / 2**31 - 1).view(shape)


@torch.no_grad()
def fixed_llama():
    """A Llama of 2 layers, hidden size 16 and 32 tokens, in float32."""
    model = tiny_llama(hidden_size=16, intermediate_size=24, head_dim=4, vocab_size=32)
    for seed, (name, p) in enumerate(sorted(model.named_parameters())):
        values = hashed(p.shape, seed)
        p.copy_(1 + values / 10 if "norm" in name else values * (3 / p.shape[1]) ** 0.5)
    return model.eval()


def expected_logits(tensors, method, config):
    """What the formula gives in float64."""
    base = fixed_llama()
    return reference_llama(base.state_dict(), IDS, base.config, method.formula(tensors, config))


@torch.no_grad()
def add(method, folder):
    """Write an adapter of the method, and the logits that it must have."""
    model = get_peft_model(fixed_llama(), method.config(r=2))
    trained = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    for seed, (name, p) in enumerate(trained, start=1000):
        size = p.pow(2).mean().sqrt().item() or 0.5
        p.copy_(hashed(p.shape, seed) * (max(size, 0.3) if p.dim() > 1 else size))
        if ".gate." in name:
            p[0] = 0  # a rank that was pruned
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    logits = expected_logits(tensors, method, model.peft_config["default"])
    save_file({"input_ids": IDS, "logits": logits}, folder / "expected.safetensors")


def main():
    for name, method in METHODS.items():
        folder = FIXTURES / __version__ / name.lower()
        if folder.exists():
            sys.stdout.write(f"{folder}: is there already, left alone\n")
        elif method.formula is None:
            sys.exit(f"{name}: no formula in tests/methods.py to take expected values from")
        else:
            add(method, folder)
            sys.stdout.write(f"{folder}: written\n")


if __name__ == "__main__":
    main()
