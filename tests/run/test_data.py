"""Rows from files to labels: what is learned, what is context, and what a broken file is answered with."""

import json

import pytest
import tiny

from hf_fastpeft.config import DatasetConfig, RunConfig
from hf_fastpeft.errors import DataError
from hf_fastpeft.run.data import IGNORED, Example, encode, load_examples, prompt_ids, read_data, tokenize

CHAT = [
    {"role": "system", "content": "w1 w2"},
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": "w4 w5"},
    {"role": "user", "content": "w6"},
    {"role": "assistant", "content": "w7"},
]


@pytest.fixture
def tokenizer():
    return tiny.tiny_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(path, **values):
    datasets = values.pop("datasets", [{"path": str(path)}])
    return RunConfig.model_validate({"base_model": "m", "datasets": datasets, **values})


def learned(row, tokenizer):
    return tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED])


def load(path, **values):
    return load_examples(DatasetConfig(path=str(path), **values))


def test_prompt_tokens_are_context_and_labels_equal_trl(tmp_path, tokenizer):
    """The same rows through TRL's own preparation give the same ids and labels."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": CHAT[:2], "completion": CHAT[2:3]}, {"prompt": CHAT[:4], "completion": CHAT[4:]}]
    args = SFTConfig(
        output_dir=str(tmp_path), report_to=[], max_length=256, gradient_checkpointing=False, use_cpu=True
    )
    trainer = SFTTrainer(
        tiny.tiny_llama(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    ours = [tokenize(e, tokenizer) for e in load(write(tmp_path / "a.jsonl", rows))]
    for row, theirs in zip(ours, trainer.train_dataset, strict=True):
        assert row["input_ids"] == theirs["input_ids"]
        assert row["labels"] == theirs["labels"]
    assert learned(ours[0], tokenizer).split() == ["w4", "w5", "</s>"]
    plain = [{"prompt": "w1 w2", "completion": " w3"}]
    trainer = SFTTrainer(
        tiny.tiny_llama(), args=args, train_dataset=Dataset.from_list(plain), processing_class=tokenizer
    )
    (example,) = load(write(tmp_path / "b.jsonl", plain))
    theirs = trainer.train_dataset[0]
    assert tokenize(example, tokenizer) == {key: theirs[key] for key in ("input_ids", "labels")}


def test_every_assistant_turn_of_a_chat_is_learned(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    (example,) = load(path, type="chat_template")
    assert learned(tokenize(example, tokenizer), tokenizer).split() == ["w4", "w5", "</s>", "w7", "</s>"]
    assert tokenizer.decode(prompt_ids(example, tokenizer)).split()[-1] == "<|assistant|>"
    (example,) = load(path, type="chat_template", roles_to_train=["user"])
    assert learned(tokenize(example, tokenizer), tokenizer).split()[-3:] == ["<|user|>", "w6", "</s>"]
    with pytest.raises(DataError, match="no message of the roles to train: tool"):
        load(path, type="chat_template", roles_to_train=["tool"])


def test_train_on_inputs_learns_every_token(tmp_path, tokenizer):
    (example,) = load(write(tmp_path / "a.jsonl", [{"messages": CHAT}]), type="chat_template.default")
    row = tokenize(example, tokenizer, train_on_inputs=True)
    assert row["labels"] == row["input_ids"]


def test_alpaca_uses_its_published_prompt(tmp_path):
    rows = [{"instruction": "Add {input}.", "input": "1 2", "output": "3"}, {"instruction": "Sing.", "output": "La."}]
    with_input, without = load(write(tmp_path / "a.jsonl", rows), type="alpaca")
    assert with_input.prompt.endswith("### Instruction:\nAdd {input}.\n\n### Input:\n1 2\n\n### Response:\n")
    assert without.prompt.startswith("Below is an instruction that describes a task. Write")
    assert "### Input" not in without.prompt
    assert without.reference == "La."


def test_a_long_completion_becomes_several_rows_and_a_long_chat_is_left_out(tmp_path, tokenizer):
    text = " ".join(f"w{i}" for i in range(20))
    examples = load(write(tmp_path / "a.jsonl", [{"text": text}]), type="completion")
    rows, notices = encode(examples, tokenizer, config("x", sequence_len=8), what="training data")
    assert [len(row["input_ids"]) for row in rows] == [8, 8, 5]
    assert tokenizer.decode([i for row in rows for i in row["labels"]]) == text + " </s>"
    assert notices == []
    chats = [Example("x", messages=CHAT, trained=[False] * 4 + [True]), Example("y", prompt="w1", completion=" w2")]
    rows, notices = encode(chats, tokenizer, config("x", sequence_len=8), what="training data")
    assert len(rows) == 1
    assert notices == ["training data: 1 of 2 rows are longer than 8 tokens and left out"]
    with pytest.raises(DataError, match="all 1 rows are longer than sequence_len: 8"):
        encode(chats[:1], tokenizer, config("x", sequence_len=8), what="training data")


def test_a_chat_needs_a_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="tokenizer has no chat template"):
        tokenize(Example("x", messages=CHAT, trained=[True] * 5), tokenizer)


def test_reading_json_arrays_folders_and_named_files(tmp_path):
    rows = [{"prompt": "w1", "completion": "w2"}] * 3
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    write(tmp_path / "b.jsonl", rows[:2])
    (tmp_path / "c.jsonl").write_text('\ufeff{"prompt": "w1", "completion": "a\u2028b"}\n\n')
    assert len(load(tmp_path / "a.json")) == 3
    assert len(load(tmp_path)) == 6
    assert len(load(tmp_path, data_files="b.jsonl")) == 2
    assert len(load("json", data_files=[str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")])) == 5
    assert load(tmp_path / "c.jsonl")[0].completion == "a\u2028b"


ROWS = [{"prompt": "w1 w2", "completion": f"w{i}"} for i in range(10)]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "arrow"])
@pytest.mark.parametrize("by", ["suffix", "ds_type", "folder", "path"])
def test_every_format_gives_the_same_rows(tmp_path, kind, by):
    """By the suffix, or by ``ds_type`` whatever the suffix says."""
    from datasets import Dataset

    table = Dataset.from_list(ROWS)
    suffix = "dat" if by in ("ds_type", "path") else kind
    file = tmp_path / f"rows[1].{suffix}"
    if kind == "json":
        write(file, ROWS)
    elif kind == "arrow":
        table.save_to_disk(tmp_path / "table")
        next((tmp_path / "table").glob("*.arrow")).rename(file)
    else:
        getattr(table, f"to_{kind}")(file)
    values = {"ds_type": kind} if by in ("ds_type", "folder") else {}
    if by == "path":  # as Axolotl's files write it: the format in place of a path
        examples = load(kind, data_files=str(file))
    else:
        examples = load(tmp_path if by == "folder" else file, **values)
    assert [(e.prompt, e.completion) for e in examples] == [(r["prompt"], r["completion"]) for r in ROWS]


def test_a_text_file_is_one_row_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2\nw3\n")
    for values in ({}, {"ds_type": "text"}):
        assert [e.completion for e in load(tmp_path / "a.txt", type="completion", **values)] == ["w1 w2", "w3"]
    assert len(load(tmp_path, type="completion", ds_type="text")) == 2
    with pytest.raises(DataError, match=r"a\.txt:1: not valid JSON"):
        load(tmp_path / "a.txt", type="completion", ds_type="json")
    with pytest.raises(DataError, match=r"a\.txt: cannot be read as parquet: "):
        load(tmp_path / "a.txt", type="completion", ds_type="parquet")
    with pytest.raises(DataError, match=r"holds no \.csv file"):
        load(tmp_path, ds_type="csv")


def test_a_split_of_local_files_may_be_cut_as_datasets_cuts_it(tmp_path):
    from datasets import load_dataset

    path = write(tmp_path / "a.jsonl", ROWS)
    for split in ("train[:30%]", "train[-3:]", "train[2:4]+train[8:]", "train"):
        want = load_dataset("json", data_files=path, split=split)["completion"]
        assert [e.completion for e in load(path, split=split)] == list(want)
    for split in ("validation", "train[x]"):
        with pytest.raises(DataError, match=r"split: .*; local files are the one split 'train', which may be cut"):
            load(path, split=split)


def test_keys_that_a_source_does_not_read_are_told(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    entry = {"path": path, "name": "default", "data_files": ["b.jsonl"], "field_instruction": "prompt"}
    assert read_data(config(path, datasets=[entry])).notices == [
        f"datasets: {path}: data_files, name: without effect with local files",
        f"datasets: {path}: field_instruction: without effect with type: prompt_completion",
    ]
    assert read_data(config(path)).notices == []


@pytest.mark.parametrize(
    ("content", "values", "message"),
    [
        (
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a", }\n',
            {},
            r"a\.jsonl:2: not valid JSON: .* at column \d+",
        ),
        ('[{"prompt": 1},\n 2', {}, r"a\.jsonl:2: not valid JSON"),
        ("", {}, "no rows"),
        ("\n\n", {}, "no rows"),
        ("[]", {}, "no rows"),
        ("3\n", {}, r"a\.jsonl:1: expected an object with columns, found int"),
        ('{"prompt": "a"}\n', {}, r"a\.jsonl:1: column 'completion': missing; expected text; columns: prompt"),
        ('{"prompt": "a", "completion": 3}\n', {}, r"column 'completion': found 3; expected text"),
        (
            '{"messages": []}\n',
            {"type": "chat_template"},
            r"column 'messages': found \[\]; expected a list of messages",
        ),
        ('{"messages": [{"role": "user"}]}\n', {"type": "chat_template"}, "expected the texts 'role' and 'content'"),
    ],
)
def test_malformed_data_names_file_and_line(tmp_path, content, values, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load(path, **values)


def test_missing_data_is_told(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no such file or folder"):
        load("none.jsonl")
    with pytest.raises(DataError, match=r"holds no \.jsonl, \.json, \.csv, \.parquet or \.arrow file; name"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"no such file: .*x\.jsonl"):
        load(tmp_path, data_files="x.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "latin.jsonl")


def test_a_hub_data_set_that_cannot_be_read_is_told(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"owner/name: neither a local file nor a readable hub data set: Couldn't"):
        load("owner/name")


def test_a_hub_data_set_gives_its_rows(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"prompt": "w1", "completion": k["split"]}])
    assert load("owner/name", split="dev")[0].completion == "dev"


def test_the_validation_split_is_stable_and_disjoint(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"w{i}", "completion": "w1"} for i in range(20)])
    data = read_data(config(path, val_set_size=0.25))
    names = [{e.prompt for e in part} for part in (data.train, data.held_out)]
    assert [len(part) for part in names] == [15, 5]
    assert not names[0] & names[1]
    assert read_data(config(path, val_set_size=0.25)) == data
    assert len(read_data(config(path, val_set_size=4)).held_out) == 4
    assert len(read_data(config(path, val_set_size=8, fastpeft={"eval_rows": 3})).held_out) == 3
    with pytest.raises(DataError, match="asks for 20 of 20 rows"):
        read_data(config(path, val_set_size=20))


def test_test_datasets_are_the_validation_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "w1", "completion": "w2"}])
    assert len(read_data(config(path, test_datasets=[{"path": path}])).held_out) == 1
