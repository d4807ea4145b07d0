"""The suites of the step benchmark: which settings, which variants, how many steps. One row is one setting."""

from dataclasses import dataclass, replace

__all__ = ["SUITES", "Setting", "Suite"]


@dataclass(frozen=True)
class Setting:
    """One workload.

    Attributes:
        model: name in :data:`benchmarks.models.SHAPES`.
        batch: rows a step.
        seq_len: longest row.
        method: name in :data:`benchmarks.models.METHODS`.
        r: rank.
        dropout: of the adapter.
        four_bit: base linears in NF4.
        masked: share of each row without a label.
        sampled: row lengths drawn from ``seq_len / 8 .. seq_len``, padded; else all full.
        dtype: of the base model; half precision runs under autocast with float32 adapters, as Trainer has it.
        layers: decoder layers, None for the model's own number.
    """

    model: str
    batch: int
    seq_len: int
    method: str = "lora"
    r: int = 16
    dropout: float = 0.0
    four_bit: bool = False
    masked: float = 0.0
    sampled: bool = False
    dtype: str = "bfloat16"
    layers: int | None = None

    @property
    def name(self) -> str:
        """What distinguishes it, in words."""
        parts = [self.model, f"B{self.batch} S{self.seq_len}", f"{self.method} r{self.r}"]
        parts += ["NF4"] if self.four_bit else []
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        parts += [f"masked {self.masked:g}"] if self.masked else []
        parts += ["lengths sampled"] if self.sampled else []
        parts += [f"{self.layers} layers"] if self.layers else []
        return ", ".join([*parts, self.dtype])


@dataclass(frozen=True)
class Suite:
    """Settings x variants; ``variants[0]`` runs first and last, to see the machine drift."""

    settings: tuple[Setting, ...]
    variants: tuple[str, ...]
    steps: int = 10
    warmup: int = 3
    limit_s: float = 240.0  # of one process, compilation included
    threads: int | None = None  # torch's own number; tiny work on a busy machine needs one


QWEN = Setting("qwen2-7b", 4, 2048)
LLAMA = Setting("llama-3-8b", 2, 4096)
SMOL = Setting("smollm2-135m", 2, 256, dtype="float32", layers=10)
TOY = Setting("toy", 2, 32, r=4, dtype="float32", masked=0.6)
DEFAULTS = ("trl", "stock", "stock+checkpointing", "compile", "liger", "unsloth", "ours", "ours-trl")

SUITES = {
    # 24 processes of about 25 s: ten minutes on an H100
    "core": Suite(
        (
            LLAMA,
            replace(LLAMA, layers=8, masked=0.6, sampled=True, batch=8, seq_len=1024),
            replace(QWEN, layers=8),
        ),
        ("trl", "stock", "stock+checkpointing", "compile", "liger", "unsloth", "ours"),
    ),
    "full": Suite(
        (
            QWEN,
            replace(QWEN, batch=16, seq_len=1024),
            replace(QWEN, batch=8, seq_len=1024, masked=0.6, sampled=True),
            LLAMA,
        ),
        (*DEFAULTS, "compile+checkpointing", "liger+checkpointing", "unsloth+checkpointing", "ours+checkpointing"),
        steps=20,
    ),
    "methods": Suite(
        tuple(
            replace(LLAMA, layers=8, **change)
            for change in (
                {"r": 8},
                {"r": 64},
                {"dropout": 0.05},
                {"four_bit": True},
                {"method": "dora"},
                {"method": "sora"},
                {"method": "adalora"},
            )
        ),
        ("trl", "stock", "ours"),
    ),
    # the rows of the published comparison on Qwen-7B: batch 4 and 16, time and memory
    "qwen-batches": Suite(
        tuple(replace(QWEN, batch=batch, seq_len=1024) for batch in (4, 16)),
        ("stock+checkpointing", "ours", "ours+checkpointing"),
    ),
    "cpu": Suite(
        (SMOL, replace(SMOL, masked=0.6, sampled=True), replace(SMOL, method="sora")),
        ("trl", "stock", "stock+checkpointing", "ours", "ours-trl", "ours+checkpointing"),
        steps=5,
        warmup=1,
        threads=1,
    ),
    "toy": Suite((TOY,), ("stock", "trl", "ours"), steps=5, warmup=2, threads=1),
    # does the harness see what it must see? "planted" variants are wrong on purpose
    "self-check": Suite((TOY,), ("stock", "planted-slow", "planted-wrong"), steps=5, warmup=2, threads=1),
}
