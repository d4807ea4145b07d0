"""From a YAML file to a `RunConfig`, reporting every mistake at once: path in the file, line, what was found."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hf_fastpeft.config.keys import HINT_PLUGINS, HINTS, INERT, NEUTRAL, UNSUPPORTED, nearest
from hf_fastpeft.config.mapping import assignments
from hf_fastpeft.config.methods import OPTIONS, SHORTHANDS
from hf_fastpeft.config.schema import DatasetConfig, FastpeftConfig, RunConfig
from hf_fastpeft.errors import ConfigError

__all__ = ["LoadedConfig", "load_config", "parse_config"]

KeyPath = tuple[str | int, ...]
_SECTIONS: dict[str, type[BaseModel]] = {
    "datasets": DatasetConfig,
    "test_datasets": DatasetConfig,
    "fastpeft": FastpeftConfig,
    **{f"fastpeft.{name}": options for name, options in OPTIONS.items()},
}


class LoadedConfig:
    """A configuration and what its reader should be told.

    Attributes:
        config: the typed configuration.
        notices: sentences about keys that were understood in another way than they were written.
    """

    def __init__(self, config: RunConfig, notices: list[str]) -> None:
        self.config = config
        self.notices = notices


def load_config(path: str | Path, *, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Reads a YAML file into a `RunConfig`.

    Args:
        path: the file.
        overrides: ``key=value`` items that win over the file; the key may be dotted (``fastpeft.sora.target_r=4``),
            the value is YAML.

    Raises:
        ConfigError: the file is missing or not YAML, or any of its keys is wrong; all mistakes in one message.
    """
    try:
        file = Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    return parse_config(text, name=str(file), overrides=overrides)


def parse_config(text: str, *, name: str = "config", overrides: Sequence[str] = ()) -> LoadedConfig:
    """Reads YAML text into a `RunConfig`; ``name`` stands for the file in messages. See `load_config`."""
    data, lines, problems = _read_yaml(text, name)
    problems += _override(data, lines, overrides)
    notices, kept = _classify(data, problems)
    config = None
    try:
        config = RunConfig.model_validate(kept)
    except ValidationError as error:
        problems += _validation_problems(error)
        problems += _contradictions_behind(error, kept, problems)
    if problems:
        # In the order of the file; one key may be reported by two checks.
        ordered = sorted(dict.fromkeys(problems), key=lambda problem: _line_number(lines, problem[0]))
        body = "\n".join(f"  {_where(lines, path)}: {message}" for path, message in ordered)
        count = f"{len(ordered)} mistake{'s' if len(ordered) > 1 else ''}"
        raise ConfigError(f"{name}: {count} in this configuration:\n{body}")
    assert config is not None
    return LoadedConfig(config, [*_method_notices(kept, config), *_tracker_notices(kept, config), *notices])


Problem = tuple[KeyPath, str]
Lines = dict[KeyPath, "int | str"]


def _read_yaml(text: str, name: str) -> tuple[dict[str, Any], Lines, list[Problem]]:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        lines: Lines = {}
        problems: list[Problem] = []
        if node is not None:
            _walk(node, (), lines, problems, set())
        data = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(f"{name}:1: expected keys and values (`base_model: ...`), found {_kind(data)}")
    return {str(key): value for key, value in data.items()}, lines, problems


def _walk(node: yaml.Node, path: KeyPath, lines: Lines, problems: list[Problem], active: set[int]) -> None:
    """Notes the line of every key and list item, and keys that stand twice in one mapping."""
    if id(node) in active:
        raise yaml.YAMLError(f"an alias refers to its own content at line {node.start_mark.line + 1}")
    active.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here: KeyPath = (*path, str(key.value))
            line = key.start_mark.line + 1
            if here in lines and key.value != "<<":
                problems.append((here, f"stands twice, first on line {lines[here]}; keep one of them"))
            lines[here] = line
            _walk(value, here, lines, problems, active)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            here = (*path, index)
            lines[here] = value.start_mark.line + 1
            _walk(value, here, lines, problems, active)
    active.discard(id(node))


def _override(data: dict[str, Any], lines: Lines, overrides: Sequence[str]) -> list[Problem]:
    problems: list[Problem] = []
    for item in overrides:
        dotted, equals, text = item.partition("=")
        path: KeyPath = tuple(int(part) if part.isdigit() else part for part in dotted.strip().split("."))
        lines[path] = "--set"
        if not equals or not dotted.strip():
            problems.append((path, f"{item!r}: expected key=value"))
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            problems.append((path, f"{text!r} is not valid YAML: {getattr(error, 'problem', None) or error}"))
            continue
        target: Any = data
        for part in path[:-1]:
            if isinstance(target, dict):
                child = target.get(str(part))
                target = target.setdefault(str(part), {}) if child is not None else _fresh(target, str(part))
            elif isinstance(target, list) and isinstance(part, int) and part < len(target):
                target = target[part]
            else:
                target = None
        if isinstance(target, dict):
            target[str(path[-1])] = value
        elif isinstance(target, list) and isinstance(path[-1], int) and path[-1] < len(target):
            target[path[-1]] = value
        else:
            problems.append((path, f"{item!r}: there is no mapping or list item at {dotted.rpartition('.')[0]!r}"))
    return problems


def _fresh(parent: dict[str, Any], key: str) -> dict[str, Any]:
    child: dict[str, Any] = {}
    parent[key] = child
    return child


def _classify(data: Mapping[str, Any], problems: list[Problem]) -> tuple[list[str], dict[str, Any]]:
    """Sorts the top-level keys into those `RunConfig` reads and those this module answers for (see `keys`)."""
    fields = RunConfig.model_fields
    kept: dict[str, Any] = {}
    hints: list[str] = []
    inert: list[str] = []
    for key, value in data.items():
        off = value is None or value is False or value == [] or value == {}
        if key in fields:
            if value is not None:
                kept[key] = _without_nulls(value)
        elif key == "plugins" and not off:
            hints += _plugin_hints(value, problems)
        elif key in HINTS:
            hints += [] if off else [key]
        elif key in INERT:
            inert += [] if off else [key]
        elif key in NEUTRAL and value in NEUTRAL[key]:
            continue
        elif key in UNSUPPORTED:
            if not off:
                problems.append(((key,), f"{value!r} is not supported and would change training: {UNSUPPORTED[key]}"))
        else:
            known = [*fields, *HINTS, *INERT, *UNSUPPORTED]
            problems.append(((key,), f"unknown key{nearest(key, known)}"))
    return _notices(kept, hints, inert), kept


def _plugin_hints(value: Any, problems: list[Problem]) -> list[str]:
    hints: list[str] = []
    for index, plugin in enumerate(value if isinstance(value, list) else [value]):
        if any(part in str(plugin).lower() for part in HINT_PLUGINS):
            hints.append(f"plugins: {plugin}")
        else:
            problems.append((("plugins", index), f"{plugin!r} is not supported: {UNSUPPORTED['plugins']}"))
    return hints


def _notices(kept: Mapping[str, Any], hints: list[str], inert: list[str]) -> list[str]:
    notices: list[str] = []
    if hints:
        section = kept.get("fastpeft")
        off = isinstance(section, dict) and section.get("patch") is False
        answer = "fastpeft.patch is false, so nothing is fused" if off else "patch_model does that here"
        notices.append(f"{', '.join(hints)}: {answer}")
    if inert:
        notices.append(f"{', '.join(inert)}: without effect here and on the result")
    return notices


def _method_notices(kept: Mapping[str, Any], config: RunConfig) -> list[str]:
    """What a shorthand stands for, and options of methods that are not in use."""
    notices: list[str] = []
    name = kept.get("adapter")
    if name in SHORTHANDS:
        meant = [f"{key}: {value}".lower() for key, value in SHORTHANDS[name].items()]
        ratio = config.loraplus_lr_ratio
        meant = [f"loraplus_lr_ratio: {ratio:g}" if item.startswith("loraplus") else item for item in meant]
        notices.append(f"adapter: {name} stands for {', '.join(meant)}")
    used = {config.adapter, config.peft_init_lora_weights}
    idle = [f"fastpeft.{key}" for key in OPTIONS if key not in used and kept.get("fastpeft", {}).get(key)]
    if idle:
        notices.append(f"{', '.join(idle)}: without effect with adapter: {config.adapter}")
    return notices


def _tracker_notices(kept: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Keys of trackers that are off, and names that another tracker's name goes before."""
    used = assignments(config)
    idle = [
        key
        for key in kept
        if key.startswith(("wandb_", "mlflow_", "trackio_"))
        and assignments(config.model_copy(update={key: RunConfig.model_fields[key].default})) == used
    ]
    on = next(item.value for item in used if item.argument == "report_to")
    return [f"{', '.join(idle)}: without effect; trackers in use: {', '.join(on) or 'none'}"] if idle else []


def _without_nulls(value: Any) -> Any:
    """A null means "the default" at every level, as it does at the top."""
    if isinstance(value, dict):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _validation_problems(error: ValidationError) -> list[Problem]:
    problems: list[Problem] = []
    branches: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        path = tuple(item["loc"])
        if not path:
            # Contradictions between keys: each line starts with the key to blame.
            for line in str(item["ctx"]["error"]).split("\n"):
                key, _, message = line.partition(":")
                problems.append(((key,), message.strip() if key in RunConfig.model_fields else line))
        elif item["type"] == "extra_forbidden":
            problems.append((path, f"unknown key{nearest(str(path[-1]), _fields_at(path[:-1]))}"))
        elif item["type"] == "missing":
            problems.append((path, "missing; it is required"))
        else:
            branches.setdefault(_real_path(path), []).append(item)
    for path, items in branches.items():
        # A union fails once for each of its kinds: one mistake, all that would have been possible.
        wanted = " or ".join(dict.fromkeys(_plain(item) for item in items))
        problems.append((path, f"found {items[0]['input']!r}; {wanted}"))
    return problems


def _contradictions_behind(error: ValidationError, kept: Mapping[str, Any], problems: list[Problem]) -> list[Problem]:
    """Contradictions between the keys that are right by themselves: pydantic stops before comparing them."""
    wrong = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
    unknown = [str(path[0]) for path, message in problems if message.startswith("unknown key")]
    if not wrong or "adapter" in wrong or difflib.get_close_matches("adapter", unknown):
        return []  # most of them depend on the adapter, so guessing it would report what is not there
    rest = {"base_model": "-", "datasets": [{"path": "-"}], **{k: v for k, v in kept.items() if k not in wrong}}
    try:
        RunConfig.model_validate(rest)
    except ValidationError as second:
        return _validation_problems(second)
    return []


def _fields_at(path: KeyPath) -> list[str]:
    section = ".".join(str(part) for part in path if isinstance(part, str))
    model = _SECTIONS.get(section, RunConfig)
    return list(model.model_fields)


def _real_path(path: KeyPath) -> KeyPath:
    """Drops the branch names pydantic appends for unions (``('bf16', 'bool')`` is the key ``bf16``)."""
    depth = 0
    for depth in range(len(path), 0, -1):
        section = ".".join(str(part) for part in path[: depth - 1] if isinstance(part, str))
        model = RunConfig if depth == 1 else _SECTIONS.get(section)
        if isinstance(path[depth - 1], str) and model is not None and path[depth - 1] in model.model_fields:
            return path[:depth]
    return path[: depth or 1]


def _plain(item: Any) -> str:
    message = (
        str(item["msg"]).removeprefix("Value error, ").replace("Input should be", "expected").split(", unable to")[0]
    )
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        choices = [part.strip(" '") for part in str(item["ctx"]["expected"]).replace(" or ", ",").split(",")]
        return f"possible: {', '.join(choices)}{nearest(item['input'], choices)}"
    return message


def _line_number(lines: Lines, path: KeyPath) -> float:
    line = _line(lines, path)
    return line if isinstance(line, int) else float("inf")


def _line(lines: Lines, path: KeyPath) -> "int | str | None":
    """The line of the key, or of the closest mapping around it."""
    for depth in range(len(path), 0, -1):
        if path[:depth] in lines:
            return lines[path[:depth]]
    return None


def _where(lines: Lines, path: KeyPath) -> str:
    line = _line(lines, path)
    dotted = ""
    for part in path:
        dotted += f"[{part}]" if isinstance(part, int) else f"{'.' if dotted else ''}{part}"
    if isinstance(line, int):
        return f"line {line}: {dotted}"
    return f"{line}: {dotted}" if line else dotted


def _kind(value: Any) -> str:
    return {"list": "a list", "str": "plain text"}.get(type(value).__name__, f"{type(value).__name__}")
