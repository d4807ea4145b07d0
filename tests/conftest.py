"""Test session set-up: Triton's interpreter where there is no GPU, no network, poisoned tensors; ``--matrix``."""

import os
from importlib.metadata import version

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when @triton.jit decorates: before any kernel module
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import interp_bf16
import pytest
from hypothesis import settings

interp_bf16.install()
# CI tries the same examples every time; everybody else new ones, and reports what they find
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture
def poison_empty(monkeypatch):
    """``torch.empty`` and ``empty_like`` hand out NaN, so an output element that is never written fails the test."""

    def poisoned(allocate):
        def fill(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return fill

    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))


VERSIONS = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "datasets", "numpy")


def pytest_report_header(config):
    """With which versions these tests were run."""
    return "versions: " + ", ".join(f"{name} {version(name)}" for name in VERSIONS)


@pytest.fixture
def transformers_takes_peft(monkeypatch):
    """transformers 5.24 asks for PEFT 0.22, which is not released, and needs nothing of it for its own adapter API."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21")


MATRIX_REPORTS = []  # in the order in which the tests ran


def pytest_addoption(parser):
    parser.addoption("--matrix", action="store_true", help="end with the table of tests/tuners/test_matrix.py")
    parser.addoption("--walks", type=int, default=24, help="number of random walks in tests/test_walk.py")
    parser.addoption("--walk", help="one walk again: its seed, or seed:step,step,... for some of its steps")


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:
        MATRIX_REPORTS.extend((report, *value) for name, value in report.user_properties if name == "matrix")


def pytest_terminal_summary(terminalreporter, config):
    """The table of methods and checks, from the ``matrix`` property that its tests record."""
    if not config.getoption("--matrix") or not MATRIX_REPORTS:
        return
    cells, notes = {}, {}
    for report, check, method, reason in MATRIX_REPORTS:
        variant = report.nodeid.partition("[")[2].removesuffix("]").removeprefix(method).removeprefix("-")
        row = f"{check.replace('_', ' ')} {variant}".strip()
        outcome = report.outcome.upper() if not report.passed else "refused" if reason else "ok"
        cells.setdefault(row, {})[method] = outcome
        if reason:
            notes.setdefault(f"refused by {method}: {reason}", []).append(row)
    methods = list(dict.fromkeys(method for _, _, method, _ in MATRIX_REPORTS))
    first = max(map(len, cells))
    write = terminalreporter.line
    terminalreporter.section("methods and checks")
    write(" ".join([" " * first, *methods]))
    for row, found in cells.items():
        write(" ".join([f"{row:<{first}}", *(f"{found.get(m, '-'):<{len(m)}}" for m in methods)]).rstrip())
    for note, rows in notes.items():
        write(f"{note} ({', '.join(rows)})")
