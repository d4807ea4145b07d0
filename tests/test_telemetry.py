"""What leaves the machine: nothing from the command line unless asked for; imports and patching change nothing."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import tiny

NAMES = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
# Connections fail and are told, and so is what huggingface_hub would send from a thread of its own.
RECORD = """
    import json, os, socket, sys
    from huggingface_hub import constants
    from huggingface_hub.utils import _telemetry

    sent, connections = [], []

    class Queue:
        def put(self, message):
            sent.append(message["topic"])

    def refuse(*args, **kwargs):
        connections.append(str(args[:2]))
        raise OSError("no network")

    _telemetry._TELEMETRY_QUEUE = Queue()
    _telemetry._start_telemetry_thread = lambda: None
    socket.socket.connect = socket.getaddrinfo = refuse
"""
TELL = """
    name = "HF_HUB_DISABLE_TELEMETRY"
    print(json.dumps([sent, connections, os.environ.get(name), getattr(constants, name)]))
"""


def run(code, *arguments, **environment):
    """The four values that ``TELL`` prints, of a process that may go online and is no CI (where TRL sends nothing)."""
    script = textwrap.dedent(RECORD) + textwrap.dedent(code) + textwrap.dedent(TELL)
    clean = {k: v for k, v in os.environ.items() if k not in (*NAMES, "HF_HUB_OFFLINE", "CI", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**clean, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().split("\n")[-1])


@pytest.fixture
def run_file(tmp_path):
    tiny.tiny_llama().save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.tiny_dataset(8)))
    keys = {
        "base_model": str(tmp_path / "model"),
        "datasets": [{"path": str(tmp_path / "rows.jsonl")}],
        "adapter": "lora",
        "lora_target_linear": True,
        "max_steps": 1,
        "save_steps": 1,
        "output_dir": str(tmp_path / "out"),
        "fastpeft": {"plots": False},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(keys))
    return tmp_path / "run.yaml"


TRAIN = """
    from hf_fastpeft.cli import main
    sys.argv = ["hf-fastpeft", "train", sys.argv[1]]
    try:
        main()
    except SystemExit as done:
        assert not done.code
"""


def test_the_command_line_sends_nothing(run_file):
    assert run(TRAIN, run_file) == [[], [], "1", True]


def test_a_value_of_the_user_wins(run_file):
    assert run(TRAIN, run_file, HF_HUB_DISABLE_TELEMETRY="0") == [["trl/SFTTrainer"], [], "0", False]


@pytest.mark.parametrize("name", NAMES)
def test_any_of_the_names_that_the_hub_reads_is_left_alone(name):
    code = """
        from hf_fastpeft import cli
        cli.app = lambda: None
        cli.main()
    """
    for value, off in (("0", False), ("1", True)):
        given = value if name == NAMES[0] else None
        assert run(code, **{name: value}) == [[], [], given, off]


def test_importing_and_patching_change_nothing():
    code = """
        before = dict(os.environ)
        import hf_fastpeft, hf_fastpeft.cli, hf_fastpeft.run, tiny
        hf_fastpeft.patch_model(tiny.tiny_llama())
        assert dict(os.environ) == before
    """
    assert run(code, TRITON_INTERPRET="1") == [[], [], None, False]
