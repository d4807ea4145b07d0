"""Every Triton launch is an operator that tracers understand: its schema and its fake results hold."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_fastpeft.ops import _backend
from hf_fastpeft.ops.glu import glu_bwd, glu_fwd
from hf_fastpeft.ops.mm_wide import mm_wide
from hf_fastpeft.ops.qk_norm import norm_rotate, norm_rotate_bwd
from hf_fastpeft.ops.rms_norm import Norm, rms_norm_bwd, rms_norm_fwd
from hf_fastpeft.ops.rope import rotate
from hf_fastpeft.ops.vocab_fold import VocabStats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on cpu the kernels run through Triton's interpreter


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def heads(count):
    return rand(2, 3, count, 8).transpose(1, 2)


def rows(count):
    return [rand(3, 8) for _ in range(count)]


def tables():
    return rand(1, 3, 8), rand(1, 3, 8)


def statistics():
    stats = VocabStats.empty(3, torch.float32, torch.device(DEVICE))
    return [getattr(stats, name) for name in stats.__slots__]


CASES = {
    "rms_norm_fwd": lambda: (rand(3, 8), rand(8), 1e-6, True),
    "rms_norm_into": lambda: (rand(3, 8), rand(8), rand(3, 12)[:, :8], 1e-6, False),
    "rms_norm_bwd": lambda: (*rows(2), rand(8), rand(3, 1), *rows(1), rand(1, 8), *rows(1), False),
    "glu_fwd": lambda: (*rows(3), "gelu"),
    "glu_bwd": lambda: (*rows(6), "gelu_tanh"),
    "rotate_": lambda: (heads(4), heads(2), *tables(), None, None, False),
    "rotate": lambda: (heads(4), heads(2), *tables(), heads(4), heads(2), heads(2), heads(2), True),
    "norm_rotate": lambda: (heads(4), heads(2), rand(8), rand(8), 1e-6, 1e-6, False, *tables(), heads(4), heads(2)),
    "norm_rotate_bwd": lambda: (
        *(heads(4), heads(2), heads(4), heads(2)),
        *(rand(2, 4, 3, 1), rand(2, 2, 3, 1)),
        *(rand(8), rand(8), True, *tables()),
        *(heads(4), heads(2), rand(6, 2, 8), heads(2), heads(2)),
    ),
    "mm_wide": lambda: (rand(3, 8), rand(8, 4), 0.5),
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
    blocks = {name for name in operators if name.endswith(("_forward", "_backward"))}  # checked in test_compile
    assert operators - blocks == set(CASES)


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
        assert rms_norm_fwd(x, weight, 1e-6, impl, out=torch.empty(1 << 20, 4160)[:, :4096])[1].shape == rstd.shape
        d_x, d_weight = rms_norm_bwd(out, x, weight, rstd, impl, with_dw=True, d_residual=x, out=torch.empty_like(out))
        assert (d_x.shape, d_weight.shape, out.dtype) == (x.shape, weight.shape, torch.bfloat16)
        assert mm_wide(x.t(), x).shape == (4096, 4096)
        q, k = (torch.empty(2, h, 64, 128, dtype=torch.bfloat16) for h in (32, 8))
        cos = torch.empty(1, 64, 128)
        rotate(q, k, cos, cos, q, k, impl)
        fresh = torch.empty_like(q), torch.empty_like(k)
        rotate(q, k, cos, cos, *fresh, impl, inverse=True, v=k, v_out=torch.empty_like(k))
        wide = torch.empty(1 << 20, 2 * 4096 + 16, dtype=torch.bfloat16)
        gate, up = wide[:, :4096], wide[:, 4096:8192]
        assert glu_fwd(gate, up, "gelu_tanh", impl).shape == gate.shape
        glu_bwd(x, gate, up, gate, up, "silu", impl, out=torch.empty_like(x))
        norm = Norm(torch.empty(128, dtype=torch.bfloat16), 1e-6)
        rstds = norm_rotate(q, k, norm, norm, cos, cos, *fresh, impl)
        assert [r.shape for r in rstds] == [(2, 32, 64, 1), (2, 8, 64, 1)]
        d_weights = norm_rotate_bwd(q, k, q, k, *rstds, norm, norm, cos, cos, *fresh, impl, with_dw=True)
        assert [d.shape for d in d_weights] == [(128,), (128,)]
