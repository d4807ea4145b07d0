"""No part of a patched layer waits for the device: reading a value back stops the host until the queue is empty."""

import pytest
import torch
from adapters import adapted_llama, token_batch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

from hf_fastpeft import patch_model

ALL_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# operators whose result the host must read before it can go on
WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "item",
    "masked_scatter_backward",  # a masked_select inside
    "masked_select",
    "nonzero",
    "unique",
}


class Waits(TorchDispatchMode):
    """Counts operators that would synchronise with a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func._opname in ("index", "index_put", "index_put_") else ()
        if func._opname in WAITING or any(i is not None and i.dtype == torch.bool for i in indices):
            self.found.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:SoRA. gates are not being pruned")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "sora"])
def test_a_patched_layer_never_waits(method, checkpointing):
    found = []
    for patch in (False, True):
        model = adapted_llama(method, torch.float32, config={"lora_dropout": 0.1})
        if patch:
            patch_model(model)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        backbone = model.get_base_model().model
        inputs = {"input_ids": token_batch()["input_ids"], "use_cache": False}
        backbone(**inputs)  # the first forward lays things out
        with Waits() as waits:
            backbone(**inputs).last_hidden_state.sum().backward()
        found.append(waits.found)
    stock, handle = found
    assert handle == stock  # the model's own, before its layers


def test_the_head_waits_only_to_find_its_rows():
    found = []
    for patch in (False, True):
        model = adapted_llama("lora", torch.float32)
        if patch:
            patch_model(model)
        with Waits() as waits:
            model(**token_batch()).loss.backward()
        found.append(waits.found)
    stock, handle = found
    assert len(handle) <= len(stock) + 1, handle


@pytest.mark.parametrize("shifted", [False, True])
def test_trls_head_waits_only_to_find_its_rows(shifted):
    """Also where the loss is made of the outputs, as DPO's is."""
    batch = token_batch()
    if shifted:
        batch["shift_labels"] = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    found = []
    for patch in (False, True):
        model = adapted_llama("lora", torch.float32)
        add_fused_lm_head(model.get_base_model(), outputs=ALL_OUTPUTS)
        if patch:
            patch_model(model)
        with Waits() as forward:
            outputs = model(**batch, fused_lm_head=True)
            loss = (outputs.log_probs * outputs.label_mask).sum() - outputs.entropy.mean()
        with Waits() as backward:
            loss.backward()
        assert backward.found == []
        found.append(forward.found)
    stock, handle = found
    assert len(handle) <= len(stock) + 1, handle


@pytest.mark.gpu
def test_no_synchronisation_on_a_gpu():
    model = adapted_llama("lora", torch.float32).cuda()
    patch_model(model)
    backbone = model.get_base_model().model
    ids = token_batch()["input_ids"].cuda()
    backbone(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backbone(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
