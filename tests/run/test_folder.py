"""The output folder: only files that a run listed are ever deleted or replaced, whatever happened to it."""

import json

import pytest
import tiny
from rich.console import Console
from transformers import TrainerCallback

from hf_fastpeft.config import RunConfig
from hf_fastpeft.errors import ConfigError, DataError, RunExistsError
from hf_fastpeft.run import runner
from hf_fastpeft.run.folder import OutputFolder
from hf_fastpeft.run.manifest import MANIFEST_FILE, Manifest, is_saved_name
from hf_fastpeft.run.runner import train

# PEFT 0.21 reads the old name of a property of transformers 5.23 (peft_model.py, PeftModel.__init__).
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny.tiny_llama().save_pretrained(folder / "model")
    tiny.tiny_tokenizer().save_pretrained(folder / "model")
    rows = "".join(json.dumps(row) + "\n" for row in tiny.tiny_dataset(8))
    (folder / "rows.jsonl").write_text(rows)
    return folder


@pytest.fixture
def console(tmp_path):
    with (tmp_path / "console.txt").open("w+") as file:
        yield Console(file=file, width=200)


def config(base, out, **values):
    return RunConfig.model_validate(
        {
            "base_model": str(base / "model"),
            "datasets": [{"path": str(base / "rows.jsonl")}],
            "adapter": "lora",
            "lora_target_linear": True,
            "micro_batch_size": 4,
            "max_steps": 2,
            "save_steps": 1,
            "output_dir": str(out),
            "fastpeft": {"plots": False},
            **values,
        }
    )


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")


def listed(folder):
    return set(json.loads((folder / MANIFEST_FILE).read_text())["files"])


def manifest_of(folder, *names, **lists):
    content = {"written_by": "hf_fastpeft", "files": list(names), "folders": [], "unfinished": [], **lists}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST_FILE).write_text(json.dumps(content))


def overwrite(base, folder, **values):
    output = OutputFolder(config(base, folder, **values), overwrite=True)
    output.start()
    return output


MINE = ("notes.txt", "model/weights.npz", "lora/notes.txt", "adapter/notes.txt", "checkpoint-2/sub/notes.txt")


@pytest.mark.parametrize("adapter", ["lora", "sora", "none"])
def test_a_run_lists_all_that_it_writes_and_overwriting_leaves_everything_else(base, tmp_path, console, adapter):
    out = tmp_path / "out"
    values = {"adapter": adapter, "lora_target_linear": adapter != "none", "fastpeft": {"plots": True}}
    values |= {"weight_decay": 0.01, "fastpeft": {"sora": {"target_r": 4}}}
    train(config(base, out, **values), console=console)
    first = files(out)
    assert listed(out) == first - {MANIFEST_FILE}
    assert first >= {"run.json", "report.json", "loss.png", "README.md", "checkpoint-1/trainer_state.json"}
    write(out, *MINE)
    train(config(base, out, **values, learning_rate=1e-3), overwrite=True, console=console)
    assert files(out) == first | set(MINE)
    assert listed(out) == first - {MANIFEST_FILE}
    assert all((out / name).read_text() == f"mine: {name}" for name in MINE)
    overwrite(base, out, **values)
    assert files(out) == {*MINE, MANIFEST_FILE}
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"model", "lora", "adapter", "checkpoint-2"}


def test_a_folder_in_which_no_run_was_is_left_alone(base, tmp_path, console):
    write(tmp_path, *MINE, "README.md", "adapter/adapter_config.json")
    before = files(tmp_path)
    with pytest.raises(
        RunExistsError, match=r"files \(README\.md, .*\) and no run_files\.json, which .*; move it away, or"
    ):
        train(config(base, tmp_path), overwrite=True, console=console)
    assert files(tmp_path) == before
    with pytest.raises(RunExistsError, match=r"already holds files \(README\.md, adapter"):
        train(config(base, tmp_path), console=console)


def test_an_empty_folder_and_one_whose_run_wrote_nothing_are_fresh(base, tmp_path):
    OutputFolder(config(base, tmp_path)).start()
    assert files(tmp_path) == {MANIFEST_FILE}
    OutputFolder(config(base, tmp_path)).start()
    OutputFolder(config(base, tmp_path), overwrite=True).start()
    (tmp_path / MANIFEST_FILE).unlink()
    OutputFolder(config(base, tmp_path), overwrite=True).start()
    OutputFolder(config(base, tmp_path / "new")).start()
    assert files(tmp_path) == {MANIFEST_FILE, f"new/{MANIFEST_FILE}"}


def test_nothing_is_deleted_before_data_and_model_are_loaded(base, tmp_path, console):
    out = tmp_path / "out"
    train(config(base, out), console=console)
    before = files(out)
    with pytest.raises(DataError):
        train(config(base, out, datasets=[{"path": str(base / "none.jsonl")}]), overwrite=True, console=console)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        train(config(base, out, base_model=str(base / "none")), overwrite=True, console=console)
    assert files(out) == before


class FailIn(TrainerCallback):
    """Ends a run within its second step, or where its second checkpoint has half been written."""

    def __init__(self, event):
        self.event = event

    def on_step_begin(self, args, state, control, **kwargs):
        if self.event == "step" and state.global_step == 1:
            raise RuntimeError("crashed")


@pytest.mark.parametrize("event", ["step", "checkpoint", "report"])
def test_a_crashed_run_can_be_overwritten(base, tmp_path, console, monkeypatch, event):
    out = tmp_path / "out"
    original = runner._Run.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.trainer.add_callback(FailIn(event))
        if event == "checkpoint":
            monkeypatch.setattr(self.trainer, "_save_optimizer_and_scheduler", crash)

    def crash(*args, **kwargs):
        raise RuntimeError("crashed")

    with monkeypatch.context() as patch:
        patch.setattr(runner._Run, "__init__", patched)
        if event == "report":
            from hf_fastpeft.run import report

            patch.setattr(report, "_samples", crash)
        with pytest.raises(RuntimeError, match="crashed"):
            train(config(base, out), console=console)
    assert len(files(out)) > 5
    write(out, "notes.txt", "checkpoint-1/notes.txt")
    overwrite(base, out)
    assert files(out) == {MANIFEST_FILE, "notes.txt", "checkpoint-1/notes.txt"}


def test_a_resumed_run_keeps_the_list_of_the_first(base, tmp_path, console):
    out = tmp_path / "out"
    train(config(base, out), console=console)
    (out / "adapter" / "adapter_config.json").unlink()
    train(config(base, out, max_steps=3, auto_resume_from_checkpoints=True), overwrite=True, console=console)
    assert listed(out) == files(out) - {MANIFEST_FILE}
    assert (out / "checkpoint-1").is_dir()
    assert (out / "checkpoint-3").is_dir()


def test_a_file_that_no_run_wrote_is_not_replaced_by_one(base, tmp_path, console):
    """Files are named before anything is deleted; a model card gives way to a README."""
    out = tmp_path / "out"
    train(config(base, out), console=console)
    before = files(out)
    for name, values in {
        "report.json": {},
        "lora/adapter_model.safetensors": {"adapter": "sora"},
        "adapter/vocab.json": {},
        "checkpoint-7/trainer_state.json": {},
        "config.json": {"hub_model_id": "owner/name"},
        "loss.png": {"fastpeft": {"plots": True}},
    }.items():
        existed = name in before
        if existed:
            manifest = json.loads((out / MANIFEST_FILE).read_text())
            manifest_of(out, *(set(manifest["files"]) - {name}))
        write(out, name)
        with pytest.raises(RunExistsError, match=f"would replace what no run wrote: {name}; move it away"):
            train(config(base, out, **values), overwrite=True, console=console)
        assert files(out) == before | {name}
        if existed:
            manifest_of(out, *manifest["files"])
        else:
            (out / name).unlink()
            if "/" in name and not any((out / name).parent.iterdir()):
                (out / name).parent.rmdir()
    (out / "README.md").unlink()
    manifest_of(out, *(listed(out) - {"README.md"}))
    write(out, "README.md")
    train(config(base, out), overwrite=True, console=console)
    assert (out / "README.md").read_text() == "mine: README.md"
    assert listed(out) == files(out) - {MANIFEST_FILE, "README.md"}


def test_resuming_from_elsewhere_replaces_nothing_either(base, tmp_path, console):
    train(config(base, tmp_path / "first"), console=console)
    write(tmp_path / "out", "adapter/adapter_config.json")
    values = {"resume_from_checkpoint": str(tmp_path / "first" / "checkpoint-1")}
    with pytest.raises(RunExistsError, match=r"would replace what no run wrote: adapter/adapter_config\.json"):
        train(config(base, tmp_path / "out", **values), console=console)


def test_checkpoints_that_hold_other_files_are_not_rotated_away(base, tmp_path, console):
    out = tmp_path / "out"
    train(config(base, out), console=console)
    write(out, "checkpoint-1/notes.txt")
    values = {"save_total_limit": 1, "max_steps": 3}
    for mode in ({"auto_resume_from_checkpoints": True}, {}):
        with pytest.raises(RunExistsError, match=r"save_total_limit: 1: .*: checkpoint-1/notes\.txt; move it away"):
            train(config(base, out, **values, **mode), overwrite=True, console=console)
    (out / "checkpoint-1" / "notes.txt").unlink()
    train(config(base, out, **values), overwrite=True, console=console)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert listed(out) == files(out) - {MANIFEST_FILE}


@pytest.mark.parametrize(
    "name",
    ["../outside.txt", "/outside.txt", "adapter/../../outside.txt", "..\\outside.txt", "C:/x", "", ".", 3, None],
)
def test_a_list_that_leads_out_of_the_folder_deletes_nothing(base, tmp_path, name):
    write(tmp_path, "outside.txt", "out/inside.txt")
    for lists in ({}, {"files": ["inside.txt"], "folders": [name]}, {"files": ["inside.txt"], "unfinished": [name]}):
        manifest_of(tmp_path / "out", "inside.txt", name, **lists)
        for values in ({}, {"auto_resume_from_checkpoints": True}):
            with pytest.raises(ConfigError, match="cannot be read as the list of a run's files"):
                OutputFolder(config(base, tmp_path / "out", **values), overwrite=True)
    assert files(tmp_path) == {"outside.txt", "out/inside.txt", "out/" + MANIFEST_FILE}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"written_by": "another program", "files": []}', '{"written_by": "hf_fastpeft"}', "\xff"],
)
def test_a_damaged_list_is_an_error(base, tmp_path, text):
    write(tmp_path, "adapter/notes.txt")
    (tmp_path / MANIFEST_FILE).write_bytes(text.encode("latin-1"))
    for asked in (True, False):
        with pytest.raises(ConfigError, match=r"run_files\.json: cannot be read .* name another folder"):
            OutputFolder(config(base, tmp_path), overwrite=asked)
    assert files(tmp_path) == {"adapter/notes.txt", MANIFEST_FILE}


def test_what_symbolic_links_lead_to_is_never_deleted(base, tmp_path):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    write(elsewhere, "adapter_config.json", "file.txt", "deep/model.safetensors")
    out.mkdir()
    (out / "model").symlink_to(elsewhere)
    (out / "report.txt").symlink_to(elsewhere / "file.txt")
    (out / "checkpoint-1").mkdir()
    (out / "checkpoint-1" / "deep").symlink_to(elsewhere / "deep")
    links = ("model/adapter_config.json", "report.txt", "checkpoint-1/deep/model.safetensors")
    manifest_of(out, *links, folders=["model", "checkpoint-1/deep"], unfinished=["model", "checkpoint-1"])
    before = files(out)
    overwrite(base, out)
    assert files(out) == before
    assert files(elsewhere) == {"adapter_config.json", "file.txt", "deep/model.safetensors"}
    (out / "adapter").symlink_to(elsewhere)
    with pytest.raises(RunExistsError, match="would replace what no run wrote: adapter; move it away"):
        OutputFolder(config(base, out), overwrite=True)


def test_an_output_folder_may_be_a_symbolic_link_itself(base, tmp_path, console):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    train(config(base, tmp_path / "out"), console=console)
    write(tmp_path / "disk", "notes.txt")
    overwrite(base, tmp_path / "out")
    assert files(tmp_path / "disk") == {"notes.txt", MANIFEST_FILE}
    assert (tmp_path / "out").is_symlink()


def test_what_was_being_written_when_a_run_was_killed_is_the_runs(base, tmp_path):
    """The manifest says so before the first byte, and only names that saving uses count."""
    output = OutputFolder(config(base, tmp_path))
    output.start()
    output.begin("checkpoint-1", "report.json")
    write(
        tmp_path, "checkpoint-1/optimizer.pt", "checkpoint-1/rng_state_0.pth", "checkpoint-1/notes.txt", "report.json"
    )
    write(tmp_path, ".report.json.partial")
    overwrite(base, tmp_path)
    assert files(tmp_path) == {"checkpoint-1/notes.txt", MANIFEST_FILE}


def test_a_file_that_was_there_before_is_listed_only_if_it_was_replaced(tmp_path):
    manifest = Manifest(tmp_path)
    write(tmp_path, "lora/a.txt", "lora/b.txt", "README.md")
    manifest.begin("lora", "README.md")
    assert manifest.unfinished == {"lora"}
    (tmp_path / "lora" / "b.txt").write_text("ours")
    write(tmp_path, "lora/c.txt")
    manifest.finish("lora", "README.md")
    assert manifest.files == {"lora/b.txt", "lora/c.txt"}
    assert manifest.folders == {"lora"}
    assert Manifest.read(tmp_path).files == manifest.files


def test_names_of_saved_files():
    saved = (
        "README.md config.json adapter_config.json model.safetensors model-00001-of-00002.safetensors scheduler.pt "
    )
    saved += "model.safetensors.index.json optimizer.bin rng_state_3.pth training_args.bin trainer_state.json "
    saved += "sora_state.json adalora_state.safetensors tokenizer.json tokenizer_config.json chat_template.jinja"
    assert all(is_saved_name(name) for name in saved.split())
    assert not any(is_saved_name(name) for name in ("notes.txt", "model.txt", "models.safetensors", "myconfig.json"))


def test_a_file_in_the_place_of_the_folder_is_told(base, tmp_path):
    write(tmp_path, "file")
    with pytest.raises(ConfigError, match="file: is a file; a folder is needed"):
        OutputFolder(config(base, tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"below: cannot be written: Not a directory"):
        OutputFolder(config(base, tmp_path / "file" / "below"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="loop: cannot be written"):
        OutputFolder(config(base, tmp_path / "loop"))


def test_an_unwritable_folder_is_told(base, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "touch", refuse)
    with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
        OutputFolder(config(base, tmp_path / "out"))
    write(tmp_path, "full/notes.txt")
    manifest_of(tmp_path / "full", "notes.txt")
    monkeypatch.undo()
    output = OutputFolder(config(base, tmp_path / "full"), overwrite=True)
    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    with pytest.raises(ConfigError, match=r"notes\.txt: cannot be deleted: Permission denied"):
        output.start()
    monkeypatch.undo()
    assert files(tmp_path / "full") == {"notes.txt", MANIFEST_FILE}
