"""Every Triton launch is an operator that tracers understand: its schema and its fake results hold."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_fastpeft.ops import _backend
from hf_fastpeft.ops.rms_norm import rms_norm_bwd, rms_norm_fwd
from hf_fastpeft.ops.rope import rotate
from hf_fastpeft.ops.swiglu import swiglu_bwd, swiglu_fwd
from hf_fastpeft.ops.vocab_fold import VocabStats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on cpu the kernels run through Triton's interpreter


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def heads(count):
    return rand(2, 3, count, 8).transpose(1, 2)


def statistics():
    stats = VocabStats.empty(3, torch.float32, torch.device(DEVICE))
    return [getattr(stats, name) for name in stats.__slots__]


CASES = {
    "rms_norm_fwd": lambda: (rand(3, 8), rand(8), 1e-6),
    "rms_norm_bwd": lambda: (rand(3, 8), rand(3, 8), rand(8), rand(3, 1), rand(1, 8)),
    "swiglu_fwd": lambda: (rand(3, 8), rand(3, 8)),
    "swiglu_bwd": lambda: (rand(3, 8), rand(3, 8), rand(3, 8), rand(3, 8)),
    "rotate_": lambda: (heads(4), heads(2), rand(1, 3, 8), rand(1, 3, 8), False),
    "rotate": lambda: (heads(4), heads(2), rand(1, 3, 8), rand(1, 3, 8), heads(4), heads(2), True),
    "fold": lambda: (
        rand(3, 16),
        torch.tensor([1, 5, 20], device=DEVICE),
        *statistics(),
        0,
        1.0,
        None,
    ),
}


def test_every_operator_has_a_case():
    operators = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "hf_fastpeft::" in name}
    assert operators == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_schema_and_fake_results_hold(name):
    operator = getattr(torch.ops.hf_fastpeft, name).default
    torch.library.opcheck(operator, CASES[name](), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_raw_operators_trace_without_memory(impl, monkeypatch):
    monkeypatch.setattr(_backend, "INTERPRETED", True)
    with FakeTensorMode():
        x = torch.empty(1 << 20, 4096, dtype=torch.bfloat16)
        weight = torch.empty(4096, dtype=torch.bfloat16)
        out, rstd = rms_norm_fwd(x, weight, 1e-6, impl)
        d_x, d_weight = rms_norm_bwd(out, x, weight, rstd, impl, with_dw=True)
        assert (d_x.shape, d_weight.shape, out.dtype) == (x.shape, weight.shape, torch.bfloat16)
        hidden, d_gate, d_up = swiglu_bwd(x, x, x, impl, with_out=True)
        assert hidden.shape == d_gate.shape == d_up.shape == swiglu_fwd(x, x, impl).shape
        q, k = (torch.empty(2, h, 64, 128, dtype=torch.bfloat16) for h in (32, 8))
        cos = torch.empty(1, 64, 128)
        rotate(q, k, cos, cos, q, k, impl)
        rotate(q, k, cos, cos, torch.empty_like(q), torch.empty_like(k), impl, inverse=True)
