"""Save by one saver, load by its loader: what a patched model writes is what stock writes, to the byte."""

import copy
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, load_model, save_file, save_model
from walks.steps import parameters, step
from walks.twins import Difference, Twins, base_of

SLACK = 0.02  # of a file's size: names and alignment, not weights


def _accelerate(model: Any, folder: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(folder))


def _accelerate_load(model: Any, folder: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.load_state(str(folder))
    AcceleratorState._reset_state(reset_partial_state=True)


def _pretrained_load(model: Any, folder: Path) -> None:
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        name = path.parent.name if path.parent != folder else "default"
        if name in model.peft_config:
            set_peft_model_state_dict(model, load_file(path), adapter_name=name)


def _dcp_load(model: Any, folder: Path) -> None:
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    model.load_state_dict(state)


SAVERS = {
    "save_pretrained": (lambda model, folder: model.save_pretrained(folder), _pretrained_load),
    "accelerate": (_accelerate, _accelerate_load),
    "safetensors model": (
        lambda model, folder: save_model(model, str(folder / "model.safetensors")),
        lambda model, folder: load_model(model, str(folder / "model.safetensors"))[0],
    ),
    "safetensors state dict": (
        lambda model, folder: save_file(model.state_dict(), folder / "state.safetensors"),
        lambda model, folder: model.load_state_dict(load_file(folder / "state.safetensors")),
    ),
    "torch": (
        lambda model, folder: torch.save(model.state_dict(), folder / "state.pt"),
        lambda model, folder: model.load_state_dict(torch.load(folder / "state.pt", weights_only=True)),
    ),
    "dcp": (lambda model, folder: dcp.save(model.state_dict(), checkpoint_id=str(folder), no_dist=True), _dcp_load),
    "merged": (lambda model, folder: copy.deepcopy(model).merge_and_unload().save_pretrained(folder), None),
    "base": (lambda model, folder: base_of(model).save_pretrained(folder), None),
}


@step
def save_and_load(twins: Twins, rng: Random) -> str | None:
    """Both save, some parameters change, both load: each what the other wrote."""
    saver, one = rng.choice([*SAVERS]), rng.random() < 0.2
    save, load = SAVERS[saver]
    if not twins.is_peft and saver == "merged":
        return None
    root = twins.folder / str(twins.draws)
    folders = [root / "stock", root / "patched"]
    for folder in folders:
        folder.mkdir(parents=True)
    twins.align()

    def write(model: Any) -> None:
        folder = folders[0 if model is twins.stock else 1]
        if one and saver == "torch":  # one tensor of them: no more than its own bytes
            torch.save(next(t for name, t in model.state_dict().items() if "proj" in name), folder / "one.pt")
        else:
            save(model, folder)

    written = twins.both(write, what=f"save by {saver}")
    if written is None:
        return f"{saver}: refused by both"
    _compare_files(folders[0], folders[1], saver)
    if load is None or (one and saver == "torch"):
        return saver
    names = parameters(twins, rng, count=5)

    @torch.no_grad()
    def change(model: Any) -> None:
        named = dict(model.named_parameters())
        for name in names:
            named[name].mul_(1.5)

    twins.both(change, what="change")
    read = folders if rng.random() < 0.5 else folders[::-1]
    twins.both(lambda model: str(load(model, read[0 if model is twins.stock else 1])), what=f"load by {saver}")
    if saver == "save_pretrained" and len(twins.names) < 4:
        name, trainable = f"a{twins.adapters}", rng.random() < 0.5
        twins.adapters += 1

        def add(model: Any) -> None:
            model.load_adapter(str(read[0 if model is twins.stock else 1]), name, is_trainable=trainable)

        twins.both(add, what="load_adapter")
        return f"{saver}, loaded as {name}, too"
    return saver


def _compare_files(want: Path, got: Path, saver: str) -> None:
    files = [{str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()} for folder in (want, got)]
    if files[0].keys() != files[1].keys():
        raise Difference(f"{saver}: stock wrote {sorted(files[0])}, patched {sorted(files[1])}")
    for name, path in files[0].items():
        other = files[1][name]
        if name.endswith(".safetensors") and path.read_bytes() != other.read_bytes():
            tensors = [load_file(p) for p in (path, other)]
            odd = sorted(tensors[0].keys() ^ tensors[1].keys())
            odd = odd or [n for n, t in tensors[0].items() if not torch.equal(t, tensors[1][n])]
            raise Difference(f"{saver}: {name} differs in {odd[:6]} ({len(odd)} tensors)")
        sizes = path.stat().st_size, other.stat().st_size
        if abs(sizes[0] - sizes[1]) > SLACK * sizes[0] + 64 and not name.endswith((".json", ".pkl")):
            raise Difference(f"{saver}: {name} has {sizes[0]} bytes, patched {sizes[1]}")
