"""Tiny models with each adapter method, and one forward-backward of them."""

import copy

import torch
from numerics import FLOAT64_REL, rel_err
from peft import LoraConfig, get_peft_model
from tiny import VOCAB_SIZE, tiny_llama

from hf_fastpeft import SoraConfig

METHODS = {
    "lora": lambda **kw: LoraConfig(r=4, lora_alpha=6, **kw),
    "rslora": lambda **kw: LoraConfig(r=3, lora_alpha=5, use_rslora=True, **kw),
    "sora": lambda **kw: SoraConfig(r=5, lora_alpha=7, **kw),
}


def adapted_llama(method="lora", dtype=torch.float64, adapter_float32=False, config=None, **model_overrides):
    """A tiny Llama whose adapter is not the identity: random B, gates off one with one of them at zero."""
    model = tiny_llama(dtype, **model_overrides)
    config = {"target_modules": "all-linear", **(config or {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(model, METHODS[method](**config), autocast_adapter_dtype=adapter_float32)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_magnitude" in name:
                torch.nn.init.normal_(parameter, std=0.1)
            if "gate" in name and parameter.requires_grad:
                with torch.no_grad():
                    parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
                    parameter[1] = 0
    return model.train()


def token_batch(batch=3, seq_len=17, seed=0):
    """Random tokens, some labels masked, the first row padded on the left and the second on the right."""
    g = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE, (batch, seq_len), generator=g)
    mask = torch.ones_like(input_ids)
    if seq_len > 4:
        mask[0, :3] = 0
        mask[1 % batch, -4:] = 0
    labels = input_ids.masked_fill((mask == 0) | (torch.rand(input_ids.shape, generator=g) < 0.3), -100)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def step(model, batch):
    """``(loss, {name: gradient})`` of one forward-backward from clean gradients."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def twin(model):
    """An independent copy with the same parameters."""
    return copy.deepcopy(model)


def assert_parity(stock, fast, batch=None, tol=FLOAT64_REL):
    """Loss and every gradient of one step; in place of a batch the default one."""
    batch = token_batch() if batch is None else batch
    want_loss, want = step(stock, batch)
    got_loss, got = step(fast, batch)
    assert rel_err(got_loss, want_loss) < tol
    assert got.keys() == want.keys()
    for name in want:
        assert rel_err(got[name], want[name]) < tol, name


def calls(patched):
    """Block -> (fused calls, stock calls by reason)."""
    blocks = patched.to_json()["blocks"]
    return {name: (row["calls_fused"], row["calls_stock"]) for name, row in blocks.items()}
