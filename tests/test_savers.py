"""What savers write of a patched model is what they write of a stock one, byte for byte, and loads into either."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from adapters import adapted_llama, assert_parity, step, token_batch, twin
from huggingface_hub import save_torch_model
from safetensors.torch import load_file, load_model, save_file, save_model
from tiny import tiny_llama

from hf_fastpeft import patch_model, restore

BATCH = token_batch()


def lora():
    return adapted_llama("lora", torch.float32)


def full():
    return tiny_llama(tie_word_embeddings=True).train()


def accelerate_state(model, folder):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(folder, safe_serialization=True)


def accelerate_state_pickled(model, folder):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(folder, safe_serialization=False)


def accelerate_model(model, folder):
    Accelerator(cpu=True).save_model(model, folder)


def safetensors_model(model, folder):
    save_model(model, str(folder / "model.safetensors"))


def safetensors_parameters(model, folder):
    save_file(dict(model.named_parameters()), folder / "parameters.safetensors")


def torch_state(model, folder):
    torch.save(model.state_dict(), folder / "model.pt")


def torch_parameters(model, folder):
    for name, p in model.named_parameters():
        torch.save(p.detach(), folder / f"{name}.pt")


def torch_submodules(model, folder):
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear:
            torch.save(module.state_dict(), folder / f"{name}.pt")


def distributed_checkpoint(model, folder):
    dcp.save(model.state_dict(), checkpoint_id=folder, no_dist=True)


def hub_model(model, folder):
    save_torch_model(model, folder, max_shard_size="40KB")


def module_pickled(model, folder):
    torch.save({n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear}, folder / "linears.pt")


def pretrained(model, folder):
    model.save_pretrained(folder)


def pretrained_base(model, folder):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.save_pretrained(folder, max_shard_size="20KB")


SAVERS = {
    saver.__name__: saver
    for saver in (
        accelerate_model,
        accelerate_state,
        accelerate_state_pickled,
        distributed_checkpoint,
        pretrained,
        hub_model,
        module_pickled,
        pretrained_base,
        safetensors_model,
        safetensors_parameters,
        torch_parameters,
        torch_state,
        torch_submodules,
    )
}


def written(folder):
    """File -> digest of its bytes; what a file says of times and random states is left out."""
    files = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and not path.name.startswith("random_states"):
            text = path.read_bytes()
            if path.name == "adapter_config.json":  # PEFT writes sets as lists in any order
                text = json.dumps({k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(text).items()})
                text = text.encode()
            files[str(path.relative_to(folder))] = hashlib.sha256(text).hexdigest()
    return files


@pytest.mark.filterwarnings("ignore:.*only works with.*|.*torch.distributed.*")
@pytest.mark.parametrize("when", ["patched", "trained", "restored"])
@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("build", [lora, full])
def test_every_saver_writes_stocks_bytes(build, saver, when, tmp_path):
    found = {}
    stock = build()
    if saver == "safetensors_parameters" and build is full:
        stock.lm_head.weight.requires_grad_(True)
    fast = patch_model(twin(stock))
    if when != "patched":
        step(fast, BATCH)
        fast.zero_grad()
    if when == "restored":
        restore(fast)
    for name, model in (("stock", stock), ("fast", fast)):
        folder = tmp_path / name
        folder.mkdir()
        SAVERS[saver](model, folder)
        found[name] = written(folder)
    assert found["stock"]
    if saver == "distributed_checkpoint":  # its metadata numbers what it pickles: compare what it holds
        for name, model in (("stock", stock), ("fast", fast)):
            into = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
            dcp.load(into, checkpoint_id=tmp_path / name, no_dist=True)
            assert all(torch.equal(value, stock.state_dict()[key]) for key, value in into.items())
        sizes = [sum(p.stat().st_size for p in (tmp_path / name).glob("*.distcp")) for name in ("stock", "fast")]
        assert sizes[0] == sizes[1]
    else:
        assert found["fast"] == found["stock"]


@pytest.mark.parametrize("patched_when", ["saving", "loading", "both"])
@pytest.mark.parametrize("build", [lora, full])
def test_accelerates_state_comes_back(build, patched_when, tmp_path):
    source = build()
    if patched_when != "loading":
        patch_model(source)
        step(source, BATCH)
        source.zero_grad()
    saver = Accelerator(cpu=True)
    saver.prepare(source)
    saver.save_state(tmp_path)
    target = build()
    with torch.no_grad():
        for p in target.parameters():
            p.mul_(0.5)
    if patched_when != "saving":
        patch_model(target)
        step(target, BATCH)
        target.zero_grad()
    loader = Accelerator(cpu=True)
    loader.prepare(target)
    loader.load_state(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert_parity(source.double(), target.double())


@pytest.mark.parametrize("build", [lora, full])
def test_safetensors_and_in_place_loaders(build, tmp_path):
    """A loader may write into the tensors that ``state_dict`` gave."""
    stock, fast = build(), patch_model(build())
    step(fast, BATCH)
    fast.zero_grad()
    with torch.no_grad():
        for p in stock.parameters():
            p.mul_(1.25)
    save_model(stock, str(tmp_path / "m.safetensors"))
    load_model(fast, str(tmp_path / "m.safetensors"))
    assert_parity(copy.deepcopy(stock).double(), copy.deepcopy(fast).double())
    for key, value in fast.state_dict().items():
        with torch.no_grad():
            value.copy_(0.5 * stock.state_dict()[key])
    with torch.no_grad():
        for p in stock.parameters():
            p.mul_(0.5)
    assert_parity(stock.double(), fast.double())


def test_files_of_parts_have_the_size_of_the_parts(tmp_path):
    fast = patch_model(lora())
    step(fast, BATCH)
    names = [name for name, _ in fast.named_parameters() if "v_proj" in name]
    save_file({name: fast.get_parameter(name) for name in names}, tmp_path / "v.safetensors")
    assert all(torch.equal(t, fast.get_parameter(n)) for n, t in load_file(tmp_path / "v.safetensors").items())
