"""On a GPU, with compiled kernels: loss and adapter gradients of two layers at full width against stock."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gate
from benchmarks.suites import LLAMA, QWEN
from benchmarks.variants import Skipped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
PADDED = {"batch": 2, "masked": 0.6, "sampled": True}
CHANGES = {
    "bfloat16": {},
    "float32": {"dtype": "float32"},
    "padded": PADDED,
    "NF4": {"four_bit": True},
    "rank 64": {"r": 64},
    "dora": {"method": "dora"},
    "sora": {"method": "sora"},
    "adalora": {"method": "adalora"},
}


def passes(variant, setting):
    try:
        verdict = gate.check(variant, setting, "cuda")
    except Skipped as why:
        pytest.skip(str(why))
    assert verdict.passed, verdict


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", [LLAMA, QWEN], ids=lambda setting: setting.model)
def test_patched_model_computes_what_stock_computes(model, change):
    passes("ours", replace(model, **CHANGES[change]))


@pytest.mark.parametrize("variant", ["ours+checkpointing", "ours-trl", "trl", "compile", "liger"])
def test_every_contestant_passes_the_gate(variant):
    passes(variant, replace(LLAMA, **PADDED))
