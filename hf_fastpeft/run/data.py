"""Rows of a run: read from their source, then rendered to ``input_ids`` and ``labels``.

Reading needs neither model nor tokenizer, so a missing file or a malformed line is told before anything slow starts.
Labels are -100 wherever a token is context: the prompt, or the turns of a chat whose role is not trained.
"""

import random
from dataclasses import dataclass, field
from typing import Any

from hf_fastpeft.config.schema import DatasetConfig, RunConfig
from hf_fastpeft.errors import DataError
from hf_fastpeft.quickstart import builtin_name
from hf_fastpeft.run.sources import read_rows

__all__ = ["IGNORED", "Example", "RunData", "encode", "load_examples", "prompt_ids", "read_data", "tokenize"]

IGNORED = -100
Message = dict[str, str]

# Taori et al. 2023, "Stanford Alpaca": the two prompts of the data set's own format.
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """One row: either a chat with the turns to learn, or a prompt text and its completion.

    Attributes:
        where: file and line, or data set and row, for messages to people.
        messages: the chat; empty for plain text.
        trained: for each message, whether its tokens are learned.
        prompt: plain text before the completion.
        completion: plain text to learn; the end-of-sequence token is added after it.
        chunked: a completion longer than a sequence is cut into several rows instead of left out.
    """

    where: str
    messages: list[Message] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    prompt: str = ""
    completion: str = ""
    chunked: bool = False

    @property
    def reference(self) -> str:
        """The answer this row teaches."""
        return self.messages[-1]["content"] if self.messages else self.completion


@dataclass(frozen=True)
class RunData:
    """Examples to train on, those kept for validation (may be empty), and what the reader should be told."""

    train: list[Example]
    held_out: list[Example]
    notices: list[str] = field(default_factory=list)


def read_data(config: RunConfig) -> RunData:
    """Reads ``datasets`` and ``test_datasets`` (or splits ``val_set_size`` off), before any model is loaded.

    Raises:
        DataError: a file is missing, empty or malformed, or the split leaves nothing to train on.
    """
    notices: list[str] = []
    train = [example for entry in config.datasets for example in load_examples(entry, notices)]
    held_out = [example for entry in config.test_datasets for example in load_examples(entry, notices)]
    shuffler = random.Random(config.seed)
    if config.val_set_size > 0:
        share = config.val_set_size < 1
        count = max(1, round(config.val_set_size * len(train))) if share else int(config.val_set_size)
        if count >= len(train):
            raise DataError(
                f"val_set_size: {config.val_set_size:g} asks for {count} of {len(train)} rows; leave some to train on"
            )
        chosen = set(shuffler.sample(range(len(train)), count))
        held_out = [train[i] for i in sorted(chosen)]
        train = [example for i, example in enumerate(train) if i not in chosen]
    limit = config.fastpeft.eval_rows
    if limit is not None and limit < len(held_out):
        held_out = shuffler.sample(held_out, limit)
    return RunData(train, held_out, notices)


def load_examples(entry: DatasetConfig, notices: list[str] | None = None) -> list[Example]:
    """Examples of one ``datasets`` entry, in the order of the source.

    Args:
        entry: the entry.
        notices: gets sentences about keys that have no effect on this source.

    Raises:
        DataError: the source is missing, empty or malformed, or a row lacks a column of its ``type``.
    """
    rows, found = read_rows(entry)
    if notices is not None:
        notices += found
    if builtin_name(entry.path) is not None:
        entry = entry.model_copy(update={"type": "prompt_completion"})
    examples = [_example(where, row, entry) for where, row in rows]
    if not examples:
        raise DataError(f"datasets: {entry.path}: no rows; a data set needs at least one")
    return examples


def _example(where: str, row: Any, entry: DatasetConfig) -> Example:
    if not isinstance(row, dict):
        raise DataError(f"datasets: {where}: expected an object with columns, found {type(row).__name__}")
    if entry.type == "chat_template":
        messages = _messages(where, _column(where, row, entry.field_messages, list), entry)
        trained = [message["role"] in entry.roles_to_train for message in messages]
        if not any(trained):
            raise DataError(f"datasets: {where}: no message of the roles to train: {', '.join(entry.roles_to_train)}")
        return Example(where, messages=messages, trained=trained)
    if entry.type == "alpaca":
        extra = str(row.get(entry.field_input) or "")
        template = _ALPACA_INPUT if extra else _ALPACA_PLAIN
        instruction = _column(where, row, entry.field_instruction, str)
        # str.format would trip over braces in the text itself.
        prompt = template.replace("{input}", "\0").replace("{instruction}", instruction).replace("\0", extra)
        return Example(where, prompt=prompt, completion=_column(where, row, entry.field_output, str))
    if entry.type == "completion":
        return Example(where, completion=_column(where, row, entry.field, str), chunked=True)
    if isinstance(row.get(entry.field_prompt), list):
        context = _messages(where, row[entry.field_prompt], entry)
        learned = _messages(where, _column(where, row, entry.field_completion, list), entry)
        return Example(where, messages=context + learned, trained=[False] * len(context) + [True] * len(learned))
    return Example(
        where,
        prompt=_column(where, row, entry.field_prompt, str),
        completion=_column(where, row, entry.field_completion, str),
    )


def _column(where: str, row: dict[str, Any], name: str, kind: type) -> Any:
    value = row.get(name)
    if not isinstance(value, kind) or not value:
        found = "missing" if name not in row else f"found {value!r}"[:80]
        wanted = "a list of messages" if kind is list else "text"
        raise DataError(f"datasets: {where}: column {name!r}: {found}; expected {wanted}; columns: {', '.join(row)}")
    return value


def _messages(where: str, value: list[Any], entry: DatasetConfig) -> list[Message]:
    messages: list[Message] = []
    for item in value:
        role = item.get(entry.message_field_role) if isinstance(item, dict) else None
        content = item.get(entry.message_field_content) if isinstance(item, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"datasets: {where}: message {item!r}: expected the texts {entry.message_field_role!r} and "
                f"{entry.message_field_content!r}"
            )
        messages.append({"role": role, "content": content})
    return messages


def encode(examples: list[Example], tokenizer: Any, config: RunConfig, *, what: str) -> tuple[Any, list[str]]:
    """Tokenises examples into a `datasets.Dataset` of ``input_ids`` and ``labels``.

    Rows longer than ``sequence_len`` are left out, as Axolotl does; plain completions are cut into several rows.

    Returns:
        The data set, and notices about rows that were left out.

    Raises:
        DataError: no row fits.
    """
    from datasets import Dataset

    rows: list[dict[str, list[int]]] = []
    too_long = 0
    limit = config.sequence_len
    for example in examples:
        row = tokenize(example, tokenizer, train_on_inputs=config.train_on_inputs)
        if len(row["input_ids"]) <= limit:
            rows.append(row)
        elif example.chunked:
            length = len(row["input_ids"])
            rows += [{key: ids[at : at + limit] for key, ids in row.items()} for at in range(0, length, limit)]
        else:
            too_long += 1
    if not rows:
        raise DataError(f"{what}: all {len(examples)} rows are longer than sequence_len: {limit}; raise it")
    notices = [f"{what}: {too_long} of {len(examples)} rows are longer than {limit} tokens and left out"]
    return Dataset.from_list(rows), notices if too_long else []


def tokenize(example: Example, tokenizer: Any, *, train_on_inputs: bool = False) -> dict[str, list[int]]:
    """``input_ids`` and ``labels`` of one example; the same as TRL's for its prompt-completion rows.

    Raises:
        DataError: a chat, but the tokenizer has no chat template.
    """
    if example.messages:
        ids = _render(example, example.messages, tokenizer)
        labels = [IGNORED] * len(ids)
        for i, trained in enumerate(example.trained):
            if trained:
                # A template may render a prefix differently from the whole (e.g. drop earlier reasoning):
                # what is learned starts and ends where the two diverge.
                start = _shared(_render(example, example.messages[:i], tokenizer, open_turn=True), ids) if i else 0
                end = _shared(_render(example, example.messages[: i + 1], tokenizer), ids)
                labels[start:end] = ids[start:end]
    else:
        eos = tokenizer.eos_token or ""
        completion = example.completion if example.completion.endswith(eos) else example.completion + eos
        ids = tokenizer(example.prompt + completion)["input_ids"]
        start = _shared(tokenizer(example.prompt)["input_ids"], ids) if example.prompt else 0
        labels = [IGNORED] * start + ids[start:]
    return {"input_ids": ids, "labels": list(ids) if train_on_inputs else labels}


def prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """Tokens a model answers: everything before the last learned turn, with the answer's turn opened."""
    if example.messages:
        last = max(i for i, trained in enumerate(example.trained) if trained)
        return _render(example, example.messages[:last], tokenizer, open_turn=True)
    ids: list[int] = tokenizer(example.prompt)["input_ids"]
    return ids


def _render(example: Example, messages: list[Message], tokenizer: Any, *, open_turn: bool = False) -> list[int]:
    if tokenizer.chat_template is None:
        raise DataError(
            f"datasets: {example.where}: is a chat, but the model's tokenizer has no chat template; "
            "use type: alpaca or prompt_completion with plain text, or an instruction-tuned base_model"
        )
    ids: list[int] = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=open_turn, return_dict=True
    )["input_ids"]
    return ids


def _shared(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
