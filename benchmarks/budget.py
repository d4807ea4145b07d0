"""Budget of one training step, traced without memory or GPU: counts, not speeds.

    python -m benchmarks.budget --model qwen2-7b [--seq-len 2048] [--rank 16] [--json out.json]

Runs the real Hugging Face + PEFT step (LoRA on all linears, bf16 base, float32 adapters, bf16 autocast, flash
attention) on FakeTensors at full width, with 2 and with 3 layers; a layer's figures are the difference. Tensors claim
to be on the CPU: a torch without CUDA cannot run autograd on fake CUDA tensors, and the counts must not depend on the
machine. Autocast casts the same products on both; attention is sent to the flash operator by hand, and the patched
model is asked for its Triton kernels.
"""

import argparse
import functools
import json
import warnings
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.models import SHAPES, Shape, add_adapter, build_model
from benchmarks.trace import FlashAttention, LaunchCounter, saved_storages, storage_key
from hf_fastpeft import patch_model, patched
from hf_fastpeft.families import FAMILIES
from hf_fastpeft.ops import _backend

__all__ = ["VARIANTS", "LayerBudget", "layer_budget", "main"]

VARIANTS = (
    "stock", "stock, checkpointing", "patched", "patched, checkpointing"
)  # fmt: skip
FLASH = "sdpa_flash_without_mask"


@functools.wraps(sdpa_attention_forward)  # by whose module the patched model tells that it writes to no adapter
def _flash(*args: Any, **kwargs: Any) -> Any:
    """Hugging Face's SDPA path, with the operator that a GPU would pick; in a recomputation too."""
    with FlashAttention():
        return sdpa_attention_forward(*args, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(FLASH, _flash)
# on a GPU full rows need no mask; told that it is traced, transformers would build one to be safe
ALL_MASK_ATTENTION_FUNCTIONS.register(FLASH, lambda *args, **kwargs: None)


@dataclass(frozen=True)
class LayerBudget:
    """Traced cost of one decoder layer.

    Attributes:
        launches_forward: kernels started by the forward.
        launches_backward: kernels started by the backward, recomputation included.
        elementwise_bytes_per_token: moved by launches that are neither products nor attention.
        saved_bytes_per_token: distinct storages handed to autograd, parameters excluded.
        alive_bytes_per_token: storages made in the forward that still exist after it; counts what checkpointing keeps.
        gemm_flops_per_4nd: FLOPs of matrix products over 4 x weights x tokens.
        largest_in_layers: bytes, shape, dtype of the largest tensor without a vocabulary dimension.
        largest_in_step: the same over everything.
        operators_forward: launches by operator.
        operators_backward: launches by operator.
        stock_blocks: blocks that the patch left to stock, with the reasons.
    """

    launches_forward: int
    launches_backward: int
    elementwise_bytes_per_token: float
    saved_bytes_per_token: float
    alive_bytes_per_token: float
    gemm_flops_per_4nd: float
    largest_in_layers: tuple[int, tuple[int, ...], str]
    largest_in_step: tuple[int, tuple[int, ...], str]
    operators_forward: dict[str, int]
    operators_backward: dict[str, int]
    stock_blocks: dict[str, Any]


def _fake(model: nn.Module) -> nn.Module:
    """Replaces meta tensors by fake CPU tensors; must run inside FakeTensorMode. Tied parameters stay tied."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for slot in (module._parameters, module._buffers):
            for name, t in slot.items():
                if t is not None and t not in made:
                    empty = torch.empty(t.shape, dtype=t.dtype, device="cpu")
                    made[t] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
                if t is not None:
                    slot[name] = made[t]  # type: ignore[assignment]
    return model


def _patch(model: nn.Module) -> nn.Module:
    """Everything but the head, which picks the labelled rows by their values; a trace has none."""
    family = import_module(FAMILIES[model.config.model_type]).FAMILY  # type: ignore[union-attr]
    only = {stock.__name__ for stock, fast in family.swaps.items() if "lm_head" not in fast.blocks}
    return patch_model(model, impl="triton", only=only)


def _trace(shape: Shape, variant: str, layers: int, seq_len: int, rank: int, dropout: float) -> dict[str, Any]:
    meta = add_adapter(build_model(shape, layers=layers, device="meta"), "lora", rank, dropout)
    meta.config._attn_implementation = FLASH
    # the kernels take CPU tensors as under Triton's interpreter: nothing is launched on a fake tensor
    with FakeTensorMode(), warnings.catch_warnings(), mock.patch.object(_backend, "INTERPRETED", True):
        warnings.simplefilter("ignore")
        # built outside: PEFT moves the adapter's modules, which FakeTensors do not allow
        model = _fake(meta)
        if "checkpointing" in variant:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        handle = None if "stock" in variant else patched(_patch(model))
        ids = torch.zeros(1, seq_len, dtype=torch.int64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=ids)  # the first forward of a model lays things out
        held = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
        with LaunchCounter(shape.vocab) as counter:
            with saved_storages(held) as saved, torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            alive = counter.alive_bytes()
            counter.phase = "backward"
            loss.backward()
    blocks = {} if handle is None else handle.to_json()["blocks"]
    return {
        "phases": counter.phases,
        "saved": sum(saved.values()),
        "alive": alive,
        "largest": counter.largest,
        "stock": {name: row["calls_stock"] for name, row in blocks.items() if row["calls_stock"]},
    }


def layer_budget(
    model: str, variant: str, *, seq_len: int = 2048, rank: int = 16, dropout: float = 0.0
) -> LayerBudget:
    """Figures of one layer of ``SHAPES[model]``, in one of :data:`VARIANTS`."""
    shape = SHAPES[model]
    two, three = (_trace(shape, variant, layers, seq_len, rank, dropout) for layers in (2, 3))

    def per_layer(field: str) -> dict[str, int]:
        return {p: getattr(three["phases"][p], field) - getattr(two["phases"][p], field) for p in three["phases"]}

    launches, moved, flops = (per_layer(name) for name in ("launches", "elementwise_bytes", "gemm_flops"))
    operators = {
        p: dict(sorted((three["phases"][p].operators - two["phases"][p].operators).items())) for p in three["phases"]
    }
    return LayerBudget(
        launches_forward=launches["forward"],
        launches_backward=launches["backward"],
        elementwise_bytes_per_token=sum(moved.values()) / seq_len,
        saved_bytes_per_token=(three["saved"] - two["saved"]) / seq_len,
        alive_bytes_per_token=(three["alive"] - two["alive"]) / seq_len,
        gemm_flops_per_4nd=sum(flops.values()) / (4 * shape.params() * seq_len),
        largest_in_layers=three["largest"]["layers"],
        largest_in_step=three["largest"]["step"],
        operators_forward=operators["forward"],
        operators_backward=operators["backward"],
        stock_blocks=three["stock"],
    )


def table(budgets: dict[str, LayerBudget]) -> str:
    """Markdown table, one row a variant."""
    lines = [
        "| per layer | launches fwd + bwd | elementwise | saved | alive after fwd | GEMM / 4ND | largest tensor |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, b in budgets.items():
        size, dims, dtype = b.largest_in_layers
        lines.append(
            f"| {variant} | {b.launches_forward} + {b.launches_backward} "
            f"| {b.elementwise_bytes_per_token / 1e6:.3f} MB/token | {b.saved_bytes_per_token / 1e3:.1f} KB/token "
            f"| {b.alive_bytes_per_token / 1e3:.1f} KB/token | {b.gemm_flops_per_4nd:.4f} "
            f"| {size / 1e6:.0f} MB, {'x'.join(map(str, dims))} {dtype} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*SHAPES], default="qwen2-7b")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--operators", action="store_true", help="list launches by operator")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    known = SHAPES[options.model].model_type in FAMILIES
    budgets = {
        variant: layer_budget(
            options.model, variant, seq_len=options.seq_len, rank=options.rank, dropout=options.dropout
        )
        for variant in VARIANTS
        if known or "stock" in variant
    }
    print(table(budgets))
    print("Counts of a trace: nothing ran and nothing was timed.")
    if not known:
        print(f"patched: no patch for model_type {SHAPES[options.model].model_type!r} yet; stock only.")
    for variant, b in budgets.items():
        if b.stock_blocks:
            print(f"{variant}: ran stock inside: {b.stock_blocks}")
        if options.operators:
            print(f"{variant}: forward {b.operators_forward}\n{variant}: backward {b.operators_backward}")
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "operators")}
        result = {"kind": "budget (traced)", "settings": settings, "torch": torch.__version__}
        result["layers"] = {variant: asdict(b) for variant, b in budgets.items()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
