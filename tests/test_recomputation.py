"""Checkpointed forwards: what is recomputed in the backward decides as the forward did."""

import pytest
import torch
from adapters import METHODS, adapted_llama, token_batch, twin
from numerics import FLOAT64_REL, rel_err
from peft import AdaLoraConfig, get_peft_model
from tiny import tiny_llama
from torch.utils.checkpoint import checkpoint

from hf_fastpeft import patch_model

BATCH = token_batch()
pytestmark = [pytest.mark.filterwarnings("ignore:SoRA. gates are not|AdaLoRA. ranks are not")]


def model_of(method, **kwargs):
    if method in METHODS:
        return adapted_llama(method, **kwargs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules="all-linear")
        model = get_peft_model(tiny_llama(torch.float64), config, autocast_adapter_dtype=False)
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.1)
            if "ranknum" in name:
                p.requires_grad_(False)
    return model.train()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["layers", "layers, reentrant", "model"])
@pytest.mark.parametrize("state", ["merged and disabled", "merged", "disabled"])
@pytest.mark.parametrize("method", ["lora", "sora", "adalora"])
def test_merged_and_disabled_adapters_under_checkpointing(method, state, how):
    """PEFT unmerges inside the forward; the recomputation then finds another state."""
    found = []
    stock = model_of(method)
    stock.get_input_embeddings().weight.requires_grad_(True)
    for model in (twin(stock), patch_model(twin(stock))):
        for _ in range(2):
            if state != "disabled":
                model.merge_adapter()
            if state != "merged":
                model.base_model.disable_adapter_layers()
            if how == "model":
                loss = checkpoint(lambda model=model: model(**BATCH).loss, use_reentrant=False)
            else:
                model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in how})
                loss = model(**BATCH).loss
            model.zero_grad()
            loss.backward()
            found.append(
                (loss.detach(), gradients(model), [m.merged for m in model.modules() if hasattr(m, "merged")])
            )
            model.base_model.enable_adapter_layers()
            if state == "merged":
                model.unmerge_adapter()
    for (want_loss, want, want_merged), (loss, got, merged) in zip(found[:2], found[2:], strict=True):
        assert rel_err(loss, want_loss) < FLOAT64_REL
        assert merged == want_merged
        assert got.keys() == want.keys()
        assert all(rel_err(got[name], gradient) < FLOAT64_REL for name, gradient in want.items())
