"""Two processes over gloo: a patched model under DistributedDataParallel, FSDP 1 and 2 against stock on all rows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import assert_no_worse

from hf_fastpeft.causal_lm import FSDP1

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WRAPPERS = ("ddp", "fsdp2", "fsdp2-checkpointing", "fsdp2-sora", "fsdp1")
# Two SGD steps: the second one's gradients need the adapters' copies refreshed.
RANK = """
import sys
sys.path[:0] = sys.argv[3:5]
import torch, torch.distributed as dist
from adapters import adapted_llama, twin
from tiny import VOCAB_SIZE
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from hf_fastpeft import patch_model, patched
from hf_fastpeft.blocks import adapters as copies
from hf_fastpeft.stacking import adjacent

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
ids = torch.randint(3, VOCAB_SIZE, (4, 9), generator=torch.Generator().manual_seed(0))
filled, refresh, fill_one = [], copies.SideCache._refresh, copies.SideCache._fill_one
copies.SideCache._refresh = lambda self: filled.append("all") or refresh(self)
copies.SideCache._fill_one = lambda self, copy: filled.append("one") or fill_one(self, copy)


def wrap(model, wrapper):
    layers = model.get_base_model().model.layers
    if wrapper.startswith("ddp"):
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    if wrapper == "fsdp1":
        policy = ModuleWrapPolicy({type(layers[0])})
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id="cpu")
    if "checkpointing" in wrapper:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def gradients(model):
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in grads.items()}


def two_steps(model, ids):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        step = {n.replace("module.", "").replace("_fsdp_wrapped_", ""): g for n, g in gradients(model).items()}
        optimizer.step()
        step["loss"] = loss.detach().clone()
        dist.all_reduce(step["loss"])
        step["loss"] /= dist.get_world_size()
        found.append(step)
    return found


results = {}
for wrapper in sys.argv[5:]:
    exact = adapted_llama("sora" if "sora" in wrapper else "lora", torch.float64)
    stock, fast = twin(exact).float(), twin(exact)
    patch_model(fast)
    fast.float()  # the weights lie apart now
    filled.clear()
    rows = ids[2 * rank : 2 * rank + 2]
    found = {"exact": two_steps(exact, ids), "stock": two_steps(wrap(stock, wrapper), rows)}
    found["fast"] = two_steps(wrap(fast, wrapper), rows)
    if wrapper.startswith("ddp"):
        found["adjacent"] = [
            adjacent([getattr(part, f"{name}_proj").base_layer.weight for name in names]) is not None
            for layer in fast.get_base_model().model.layers
            for part, names in ((layer.self_attn, "qkv"), (layer.mlp, ("gate", "up")))
        ]
    results[wrapper] = {**found, "filled": list(filled), "report": patched(fast).to_json()}
torch.save(results, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both processes found, per wrapper."""
    folder, here = tmp_path_factory.mktemp("ranks"), Path(__file__).parent
    paths = [str(here), str(here.parent)]
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(folder), *paths, *WRAPPERS],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], "\n".join(text[-2000:] for text in errors)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {wrapper: [rank[wrapper] for rank in ranks] for wrapper in WRAPPERS}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_train_as_stock(wrapper, results):
    """Every gradient of both steps, no further from float64 on one process than stock's under the same wrapper."""
    for found in results[wrapper]:
        for fast, stock, exact in zip(found["fast"], found["stock"], found["exact"], strict=True):
            assert fast.keys() == stock.keys() == exact.keys()
            for name in exact:
                assert_no_worse(name, fast[name], stock[name], exact[name])
        for name, row in found["report"]["blocks"].items():
            reasons = {FSDP1: 2} if (wrapper, name) == ("fsdp1", "lm_head") else {}
            assert row["calls_stock"] == reasons, name
            assert (row["calls_fused"] == 0) == bool(reasons), name
    first, second = results[wrapper]
    for a, b in zip(first["fast"], second["fast"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)  # both hold the same


def test_ddp_stacks_weights_again_and_refreshes_adapters_together(results):
    for found in results["ddp"]:
        assert all(found["adjacent"])
        assert found["filled"] == ["all"]  # in the second step; the first lays them out


@pytest.mark.parametrize("wrapper", [wrapper for wrapper in WRAPPERS if wrapper.startswith("fsdp")])
def test_sharded_weights_stay_where_they_are(wrapper, results):
    for found in results[wrapper]:
        # each stack on its own, while its layer's parameters are there; FSDP 1 has other tensors in every forward
        assert found["filled"] == ([] if wrapper == "fsdp1" else ["one"] * 8)
