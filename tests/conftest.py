"""Test session set-up: Triton's interpreter where there is no GPU, no network, poisoned empty tensors."""

import os

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
