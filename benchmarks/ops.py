"""Operators one by one: ours, plain torch, torch.compile and Liger, against the memory or product ceiling.

    python -m benchmarks.ops [--only rms_norm,swiglu] [--impls ours,torch] [--json out.json]

An implementation is timed only after its results and gradients were as close to float64 as plain torch's at the same
dtype, within a factor of two. Bytes are what the operation must move at least, not what an implementation moves.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.machine import describe, device_name, matmul_flops_per_s, seconds_per_call, steady_threads
from hf_fastpeft.blocks.lm_head import lm_head_log_probs
from hf_fastpeft.ops import rms_norm, rms_norm_torch, rope, rope_torch, swiglu, swiglu_torch

__all__ = ["IMPLS", "OPERATORS", "Measured", "Operator", "main", "measure", "parity"]

IMPLS = ("ours", "torch", "compile", "liger")
EPS = 1e-6
Function = Callable[..., Any]


@dataclass(frozen=True)
class Operator:
    """One operation.

    Attributes:
        inputs: ``(tokens, dims, device, dtype) -> tensors``; floating ones that require no gradient are constants.
        trained: how many of the inputs, from the first, get a gradient.
        ours: our implementation.
        torch: the reference.
        liger: Liger's, imported when asked for; None if it has none.
        work: ``(inputs) -> (forward, forward + backward)`` bytes, or FLOPs where ``flops``.
        flops: whether ``work`` is FLOPs.
        dims: sizes on a GPU; divided by 16 on a CPU.
    """

    inputs: Callable[..., tuple[torch.Tensor, ...]]
    trained: int
    ours: Function
    torch: Function
    liger: Callable[[], Function] | None
    work: Callable[..., tuple[float, float]]
    dims: tuple[int, ...]
    flops: bool = False


@dataclass(frozen=True)
class Measured:
    """One implementation of one operator; ``status`` is ``timed``, ``refused`` or ``skipped``."""

    operator: str
    impl: str
    status: str
    reason: str = ""
    forward_ms: float = 0.0
    both_ms: float = 0.0
    forward_of_ceiling: float = 0.0
    both_of_ceiling: float = 0.0


def _liger_rms_norm() -> Function:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)


def _liger_swiglu() -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)


def _liger_rope() -> Function:
    from liger_kernel.ops.rope import LigerRopeFunction

    # works in place: a copy keeps the comparison's inputs; its time is Liger's to pay, as in its own patch it is not
    return lambda q, k, cos, sin: LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)


def _liger_head() -> Function:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda h, w, t: LigerFusedLinearCrossEntropyFunction.apply(h, w, t)[0]


def _norm_inputs(tokens: int, dims: tuple[int, ...], **kw: Any) -> tuple[torch.Tensor, ...]:
    return torch.randn(tokens, dims[0], **kw), torch.rand(dims[0], **kw)


def _pair(tokens: int, dims: tuple[int, ...], **kw: Any) -> tuple[torch.Tensor, ...]:
    return torch.randn(tokens, dims[0], **kw), torch.randn(tokens, dims[0], **kw)


def _heads(tokens: int, dims: tuple[int, ...], **kw: Any) -> tuple[torch.Tensor, ...]:
    heads, kv_heads, head_dim = dims
    q, k = (torch.randn(1, tokens, h, head_dim, **kw).transpose(1, 2) for h in (heads, kv_heads))
    angle = torch.rand(1, tokens, head_dim // 2, device=kw["device"]).repeat(1, 1, 2)
    return q, k, angle.cos().to(kw["dtype"]), angle.sin().to(kw["dtype"])


def _head(tokens: int, dims: tuple[int, ...], **kw: Any) -> tuple[torch.Tensor, ...]:
    hidden, vocab = dims
    targets = torch.randint(0, vocab, (tokens,), device=kw["device"])
    return torch.randn(tokens, hidden, **kw), torch.randn(vocab, hidden, **kw) * hidden**-0.5, targets


def _head_torch(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = h @ weight.t()
    return F.cross_entropy(logits.double() if h.dtype == torch.float64 else logits.float(), targets)


def _head_ours(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -lm_head_log_probs(h, weight, None, targets, dtype=h.dtype).log_probs.mean()


OPERATORS = {
    # work in units of the largest tensor: forward reads and writes it, backward reads x and d_out and writes d_x
    "rms_norm": Operator(
        _norm_inputs,
        1,
        lambda x, w: rms_norm(x, w, EPS),
        lambda x, w: rms_norm_torch(x, w, EPS),
        _liger_rms_norm,
        lambda x, w: (2 * x.nbytes, 5 * x.nbytes),
        (3584,),
    ),
    "swiglu": Operator(
        _pair, 2, swiglu, swiglu_torch, _liger_swiglu, lambda gate, up: (3 * gate.nbytes, 8 * gate.nbytes), (18944,)
    ),
    "rope": Operator(
        _heads,
        2,
        rope,
        rope_torch,
        _liger_rope,
        lambda q, k, cos, sin: (2 * (q.nbytes + k.nbytes), 4 * (q.nbytes + k.nbytes)),
        (28, 4, 128),
    ),
    "lm_head": Operator(
        _head,
        1,
        _head_ours,
        _head_torch,
        _liger_head,
        lambda h, w, t: (2.0 * h.numel() * w.shape[0], 4.0 * h.numel() * w.shape[0]),
        (3584, 152064),
        flops=True,
    ),
}


def implementation(op: Operator, impl: str) -> Function:
    """The callable of ``impl``.

    Raises:
        RuntimeError: it is not available here.
    """
    if impl == "ours":
        return op.ours
    if impl == "torch":
        return op.torch
    if impl == "compile":
        return torch.compile(op.torch, dynamic=False)
    if op.liger is None or importlib.util.find_spec("liger_kernel") is None:
        raise RuntimeError("liger-kernel is not installed" if op.liger else "Liger has no such operator")
    if device_name() == "cpu":
        raise RuntimeError("Liger's kernels need a GPU")
    return op.liger()


def _leaves(op: Operator, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    cast = [t.to(dtype) if dtype and t.is_floating_point() else t for t in inputs]
    return [t.detach().requires_grad_(i < op.trained) for i, t in enumerate(cast)]


def _run(op: Operator, run: Function, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results and gradients for a fixed random gradient of the results."""
    outs = run(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(0)
    d_outs = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outs]
    return [*outs, *torch.autograd.grad(outs, leaves[: op.trained], d_outs)]


def parity(op: Operator, run: Function, inputs: tuple[torch.Tensor, ...]) -> str:
    """Empty if ``run`` is as exact as plain torch at this dtype, else what is wrong."""

    def error(got: torch.Tensor, want: torch.Tensor) -> float:
        return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()

    want = _run(op, op.torch, _leaves(op, inputs, torch.float64))
    base, got = _run(op, op.torch, _leaves(op, inputs)), _run(op, run, _leaves(op, inputs))
    for i, (g, b, w) in enumerate(zip(got, base, want, strict=True)):
        bound = 2 * error(b, w) + torch.finfo(inputs[0].dtype).eps
        if not error(g, w) <= bound:
            return f"result {i}: relative error {error(g, w):.2e}, bound {bound:.2e}"
    return ""


def _time(op: Operator, run: Function, leaves: list[torch.Tensor], budget_s: float) -> tuple[float, float]:
    """Seconds of the forward, and of forward and backward."""
    outs = run(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    d_outs = [torch.ones_like(o) for o in outs]

    def both() -> object:
        found = run(*leaves)
        return torch.autograd.grad(found if isinstance(found, tuple) else (found,), leaves[: op.trained], d_outs)

    def forward() -> object:
        return run(*leaves)

    return seconds_per_call(forward, budget_s=budget_s), seconds_per_call(both, budget_s=budget_s)


def measure(name: str, impl: str, *, ceilings: tuple[float, float], tokens: int, budget_s: float = 0.3) -> Measured:
    """Parity, then time.

    Args:
        name: in :data:`OPERATORS`.
        impl: in :data:`IMPLS`.
        ceilings: measured bytes/s of a copy and FLOP/s of a product.
        tokens: rows.
        budget_s: seconds spent on one figure.
    """
    op, device = OPERATORS[name], device_name()
    kw = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    dims = op.dims if device == "cuda" else tuple(max(d // 16, 2) for d in op.dims)
    torch.manual_seed(0)
    try:
        run = implementation(op, impl)
        wrong = parity(op, run, op.inputs(min(tokens, 64), dims, **kw))
    except (RuntimeError, ImportError) as why:
        return Measured(name, impl, "skipped", str(why).partition("\n")[0])
    if wrong:
        return Measured(name, impl, "refused", wrong)
    inputs = op.inputs(tokens, dims, **kw)
    forward, both = _time(op, run, _leaves(op, inputs), budget_s)
    ceiling = ceilings[1] if op.flops else ceilings[0]
    work = op.work(*inputs)
    return Measured(
        name, impl, "timed", "", forward * 1e3, both * 1e3, work[0] / forward / ceiling, work[1] / both / ceiling
    )


def copy_bytes_per_s(device: str) -> float:
    """Read plus written."""
    source = torch.empty((1024 if device == "cuda" else 64) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_per_call(lambda: target.copy_(source))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(OPERATORS))
    parser.add_argument("--impls", default=",".join(IMPLS))
    parser.add_argument("--tokens", type=int, default=8192 if device_name() == "cuda" else 512)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    steady_threads()
    device = device_name()
    ceilings = (
        copy_bytes_per_s(device),
        matmul_flops_per_s(device, torch.bfloat16 if device == "cuda" else torch.float32),
    )
    print(f"ceilings: {ceilings[0] / 1e9:.0f} GB/s copied, {ceilings[1] / 1e12:.3g} TFLOP/s")
    print("| operator | implementation | forward ms | fwd + bwd ms | of ceiling, fwd | fwd + bwd |")
    print("|---|---|---|---|---|---|")
    found = []
    for name in options.only.split(","):
        for impl in options.impls.split(","):
            m = measure(name, impl, ceilings=ceilings, tokens=options.tokens)
            found.append(m)
            if m.status == "timed":
                shares = f"{m.forward_of_ceiling:.0%} | {m.both_of_ceiling:.0%}"
                print(f"| {name} | {impl} | {m.forward_ms:.3f} | {m.both_ms:.3f} | {shares} |", flush=True)
            else:
                print(f"| {name} | {impl} | {m.status}: {m.reason} | | | |", flush=True)
    if options.json:
        result = {
            "kind": "ops",
            "machine": describe(),
            "tokens": options.tokens,
            "copy_bytes_per_s": ceilings[0],
            "matmul_flops_per_s": ceilings[1],
            "operators": [asdict(m) for m in found],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
