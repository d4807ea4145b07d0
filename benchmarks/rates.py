"""Rates of this machine that decide designs: products, copies, attention, host traffic, dequantisation, launches.

    python -m benchmarks.rates [--only products,launches] [--json out.json]

Qwen2-7B's shapes on a GPU; on a CPU everything is 1/32 of that, which exercises the code and says nothing more.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import describe, device_name, seconds_per_call, steady_threads, synchronize

__all__ = ["PROBES", "Machine", "Rate", "main", "measure"]

PRODUCTS = {"qkv": (3584, 4608), "gate and up": (3584, 37888), "down": (18944, 3584)}  # name -> (K, N)
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128
ATTENTION_TOKENS = 8192


@dataclass(frozen=True)
class Rate:
    """One measured figure."""

    probe: str
    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class Machine:
    """Where the probes run: sizes are divided by ``shrink``."""

    device: str
    dtype: torch.dtype
    shrink: int
    budget_s: float  # of one figure

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def seconds(self, run: Callable[[], object]) -> float:
        return seconds_per_call(run, budget_s=self.budget_s)


def products(m: Machine) -> Iterator[Rate]:
    """``X Wᵀ`` at each layer product, over the number of tokens."""
    for name, (K, N) in PRODUCTS.items():
        K, N = K // m.shrink, N // m.shrink
        weight = m.randn(N, K)
        for T in TOKENS:
            x, out = m.randn(T // m.shrink, K), m.randn(T // m.shrink, N)
            s = m.seconds(lambda x=x, out=out, weight=weight: torch.mm(x, weight.t(), out=out))
            yield Rate("products", f"{name}, T {T}", 2 * x.shape[0] * K * N / s / 1e12, "TFLOP/s")


def _forms(m: Machine, T: int, K: int, N: int) -> dict[str, Callable[[], object]]:
    x, weight, out = m.randn(T, K), m.randn(N, K), m.randn(T, N)
    wide_x, wide_weight = m.randn(T, K + 64), m.randn(N, K + 64)
    return {
        "plain": lambda: torch.mm(x, weight.t(), out=out),
        "K + 48": lambda: torch.mm(wide_x[:, : K + 48], wide_weight[:, : K + 48].t(), out=out),
        "K + 64": lambda: torch.mm(wide_x, wide_weight.t(), out=out),
        "strided x": lambda: torch.mm(wide_x[:, :K], weight.t(), out=out),
        "strided weight": lambda: torch.mm(x, wide_weight[:, :K].t(), out=out),
        "beta = 1": lambda: out.addmm_(x, weight.t()),
        "out @ W (gradient of x)": lambda: torch.mm(out, weight, out=x),
    }


def product_forms(m: Machine) -> Iterator[Rate]:
    """What a wider K, strided operands, accumulation and the transposed product cost, as time over the plain one."""
    for name, (K, N) in PRODUCTS.items():
        for T in (2048, 8192):
            forms = _forms(m, T // m.shrink, K // m.shrink, N // m.shrink)
            plain = m.seconds(forms["plain"])
            for form, run in forms.items():
                yield Rate("product forms", f"{name}, T {T}, {form}", m.seconds(run) / plain, "x plain")


def copies(m: Machine) -> Iterator[Rate]:
    """Device memory, bytes read plus bytes written."""
    for megabytes in (16, 256, 1024):
        source = m.randn(megabytes * 2**20 // m.shrink // m.dtype.itemsize)
        target = torch.empty_like(source)
        s = m.seconds(lambda source=source, target=target: target.copy_(source))
        yield Rate("copies", f"{megabytes} MB", 2 * source.nbytes / s / 1e9, "GB/s")


def attention(m: Machine) -> Iterator[Rate]:
    """Causal attention with grouped queries, forward and backward, by backend."""
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    for S in (1024, 2048, 4096):
        B, S_ = ATTENTION_TOKENS // S, max(S // m.shrink, 16)
        q, k, v = (m.randn(B, S_, h, HEAD_DIM).transpose(1, 2).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS))
        flops = 2 * B * S_ * S_ * HEADS * HEAD_DIM  # causal: half of two products of 2 S^2 d
        for backend in backends:
            label = f"{backend.name.partition('_')[0].lower()}, S {S}"

            def forward(q=q, k=k, v=v, backend=backend) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            try:
                out = forward()
            except RuntimeError as error:
                yield Rate("attention", label, 0.0, f"refused: {str(error).partition(chr(10))[0]}")
                continue
            d_out = torch.randn_like(out)

            def backward(out=out, d_out=d_out, inputs=(q, k, v)) -> object:
                return torch.autograd.grad(out, inputs, d_out, retain_graph=True)

            yield Rate("attention", f"{label}, forward", flops / m.seconds(forward) / 1e12, "TFLOP/s")
            yield Rate("attention", f"{label}, backward", 2.5 * flops / m.seconds(backward) / 1e12, "TFLOP/s")


def host_copies(m: Machine) -> Iterator[Rate]:
    """Pinned memory to the device and back, alone and while products run; and what that costs the products."""
    if m.device != "cuda":
        raise RuntimeError("needs a GPU")
    on_device = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    on_host = torch.empty(256 * 2**20, dtype=torch.uint8, pin_memory=True)
    a, b = m.randn(8192, 3584), m.randn(3584, 18944)
    directions = {"to device": (on_device, on_host), "to host": (on_host, on_device)}
    products_alone = m.seconds(lambda: a @ b)
    side = torch.cuda.Stream()
    for name, (target, source) in directions.items():
        alone = m.seconds(lambda target=target, source=source: target.copy_(source, non_blocking=True))
        yield Rate("host copies", f"{name}, alone", source.nbytes / alone / 1e9, "GB/s")
        copies_under, rounds = [], max(4, int(4 * alone / products_alone))
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(side):
            for _ in range(4):
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                marks[0].record()
                target.copy_(source, non_blocking=True)
                marks[1].record()
                copies_under.append(marks)
        begin.record()
        for _ in range(rounds):
            a @ b
        end.record()
        torch.cuda.synchronize()
        seconds = sorted(first.elapsed_time(last) / 1e3 for first, last in copies_under)[1]
        yield Rate("host copies", f"{name}, under products", source.nbytes / seconds / 1e9, "GB/s")
        under = begin.elapsed_time(end) / 1e3 / rounds
        yield Rate("host copies", f"products beside copies {name}", under / products_alone, "x alone")


def dequantisation(m: Machine) -> Iterator[Rate]:
    """NF4 to the compute dtype, bytes read plus written."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RuntimeError("bitsandbytes is not installed")
    import bitsandbytes.functional as bnb

    for name, (K, N) in PRODUCTS.items():
        weight = m.randn(*(max(size // m.shrink // 64, 1) * 64 for size in (N, K)))  # whole blocks
        for nested in (False, True):
            packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
            s = m.seconds(lambda packed=packed, state=state: bnb.dequantize_4bit(packed, state))
            label = f"{name}{', nested absmax' if nested else ''}"
            yield Rate("dequantisation", label, (weight.nbytes + packed.nbytes) / s / 1e9, "GB/s")


def launches(m: Machine) -> Iterator[Rate]:
    """Host time to start something small, without waiting for it."""
    from hf_fastpeft.ops.rms_norm import rms_norm_fwd

    x, weight = m.randn(8, 64), m.randn(64)
    cases: dict[str, Callable[[], object]] = {
        "torch.empty": lambda: torch.empty_like(x),
        "torch add_": lambda: x.add_(1.0),
        "torch mm": lambda: x @ x.t(),
        "our RMSNorm, forward": lambda: rms_norm_fwd(x, weight, 1e-6, "auto"),
    }
    for name, run in cases.items():
        calls = 500
        run()
        synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        yield Rate("launches", name, (time.perf_counter() - started) / calls * 1e6, "us")
        synchronize()


PROBES: dict[str, Callable[[Machine], Iterator[Rate]]] = {
    "launches": launches,
    "copies": copies,
    "products": products,
    "product-forms": product_forms,
    "attention": attention,
    "host-copies": host_copies,
    "dequantisation": dequantisation,
}


def measure(names: list[str], machine: Machine, report: Callable[[str], None] = print) -> dict[str, object]:
    """Run the probes; one that cannot run here is listed with the reason."""
    rates: list[Rate] = []
    skipped: dict[str, str] = {}
    for name in names:
        report(f"{name}: {(PROBES[name].__doc__ or '').splitlines()[0]}")
        try:
            for rate in PROBES[name](machine):
                rates.append(rate)
                report(f"  {rate.name:44} {rate.value:10.4g} {rate.unit}")
        except (RuntimeError, ImportError, NotImplementedError) as error:
            skipped[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            report(f"  skipped: {skipped[name]}")
        if machine.device == "cuda":
            torch.cuda.empty_cache()
    return {"rates": [asdict(rate) for rate in rates], "skipped": skipped}


def here(budget_s: float = 0.15) -> Machine:
    """Full shapes in bfloat16 on a GPU, toy sizes in float32 on a CPU."""
    if device_name() == "cuda":
        return Machine("cuda", torch.bfloat16, 1, budget_s)
    return Machine("cpu", torch.float32, 32, budget_s / 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PROBES), help=f"comma-separated: {', '.join(PROBES)}")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(PROBES):
        parser.error(f"--only: {', '.join(sorted(unknown))}; possible: {', '.join(PROBES)}")
    steady_threads()
    machine = here()
    found = measure(names, machine, lambda line: print(line, flush=True))
    result = {"kind": "rates", "machine": describe(), "shrink": machine.shrink, **found}
    print(f"{result['machine']['device']}, {machine.dtype}, sizes / {machine.shrink}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
