"""The adapter methods of ``adapter:``: their keys, the classes that these become, and what each does not go with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

if TYPE_CHECKING:
    from hf_fastpeft.config.schema import RunConfig

__all__ = ["BASE_CHANGING", "METHODS", "OPTIONS", "PROMPT_METHODS", "SHORTHANDS", "Method", "contradictions", "expand"]


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


# PyYAML reads `2e-5` as a string; pydantic's lax mode turns it into the number that was meant.
Int = Annotated[int, BeforeValidator(_not_bool)]
Float = Annotated[float, BeforeValidator(_not_bool)]
PositiveInt = Annotated[Int, Field(gt=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
BelowOne = Annotated[Float, Field(ge=0, lt=1)]
Length = Annotated[Int, Field(ge=0)] | BelowOne


class Strict(BaseModel):
    """Refuses unknown keys, NaN and infinities."""

    # Names such as `model_type` are Axolotl's; pydantic would reserve the prefix.
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class SoraOptions(Strict):
    """Fields of `hf_fastpeft.SoraConfig`; a field left out keeps that class's default."""

    sparse_lambda: NonNegativeFloat | None = None
    lambda_schedule: Literal["constant", "linear", "cosine", "cubic", "stages"] | None = None
    """How the pressure grows to ``sparse_lambda`` over the pruning window."""
    lambda_stages: PositiveInt | None = None
    gate_scale: PositiveFloat | None = None
    gate_init: Literal["ones", "randn"] | None = None
    warmup_ratio: BelowOne | None = None
    settle_ratio: BelowOne | None = None
    target_r: PositiveFloat | None = None
    """Mean rank a module keeps at the end of the run."""
    reassign_ranks: bool | None = None
    """With ``target_r``: ranks that ``sparse_lambda`` frees go to other modules."""
    min_rank: Annotated[Int, Field(ge=0)] | None = None


class AdaloraOptions(Strict):
    """Fields of `peft.AdaLoraConfig`; a field left out keeps that class's default. ``lora_r`` is its ``init_r``."""

    target_r: PositiveInt | None = None
    """Mean rank a module keeps at the end of the run; default two thirds of ``lora_r`` (paper, appendix)."""
    tinit: Length | None = None
    """Warm-up: steps (an integer) or a share of the run (below 1)."""
    tfinal: Length | None = None
    """End of the run with fixed ranks: steps or a share of the run."""
    delta_t: PositiveInt | None = None
    """Steps between two allocations; PEFT's ``deltaT``."""
    beta1: Annotated[Float, Field(gt=0, lt=1)] | None = None
    beta2: Annotated[Float, Field(gt=0, lt=1)] | None = None
    orth_reg_weight: NonNegativeFloat | None = None


class AdaptiveLoraOptions(AdaloraOptions):
    """Fields of `hf_fastpeft.AdaptiveLoraConfig`; a field left out keeps that class's default."""

    target_r: PositiveFloat | None = None  # type: ignore[assignment]  # a mean, which ours need not round
    scorer: Literal["sensitivity", "magnitude"] | None = None
    budget: Literal["decay", "constant"] | None = None
    regrow_ratio: Annotated[Float, Field(gt=0, le=1)] | None = None


class BottleneckOptions(Strict):
    """Fields of `hf_fastpeft.BottleneckAdapterConfig`; a field left out keeps that class's default."""

    r: PositiveInt | None = None
    reduction_factor: PositiveFloat | None = None
    mode: Literal["sequential", "parallel"] | None = None
    nonlinearity: str | None = None
    scaling: Float | None = None
    dropout: BelowOne | None = None
    layer_norm: bool | None = None
    init_weights: Literal["houlsby"] | bool | None = None


class Ia3Options(Strict):
    """Fields of `peft.IA3Config`."""

    feedforward_modules: list[str] | str | None = None
    """Those of ``lora_target_modules`` whose input is scaled, not their output; default PEFT's for the family."""


class PrefixOptions(Strict):
    """Fields of `peft.PrefixTuningConfig`."""

    num_virtual_tokens: PositiveInt = 20
    prefix_projection: bool | None = None
    """Prefixes come from an MLP over embeddings, as in the paper."""
    encoder_hidden_size: PositiveInt | None = None
    init_weights: Literal["zero"] | None = None


class PromptOptions(Strict):
    """Fields of `peft.PromptTuningConfig`."""

    num_virtual_tokens: PositiveInt = 20
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] | None = None
    prompt_tuning_init_text: str | None = None


class PtuningOptions(Strict):
    """Fields of `peft.PromptEncoderConfig`."""

    num_virtual_tokens: PositiveInt = 20
    encoder_reparameterization_type: Literal["MLP", "LSTM"] | None = None
    encoder_hidden_size: PositiveInt | None = None
    encoder_num_layers: PositiveInt | None = None
    encoder_dropout: BelowOne | None = None


class EvaOptions(Strict):
    """Fields of `peft.EvaConfig`, for ``peft_init_lora_weights: eva``."""

    rho: Annotated[Float, Field(ge=1)] | None = None
    """Largest rank of one module over ``lora_r``: ranks move to where the variance is; 1 keeps them equal."""
    tau: Annotated[Float, Field(gt=0, le=1)] | None = None
    use_label_mask: bool | None = None
    """Only positions with a label count."""
    whiten: bool | None = None
    adjust_scaling_factors: bool | None = None


OPTIONS: dict[str, type[Strict]] = {
    "sora": SoraOptions,
    "adalora": AdaloraOptions,
    "adaptive_lora": AdaptiveLoraOptions,
    "bottleneck": BottleneckOptions,
    "ia3": Ia3Options,
    "prefix": PrefixOptions,
    "prompt": PromptOptions,
    "ptuning": PtuningOptions,
    "eva": EvaOptions,
}


@dataclass(frozen=True)
class Method:
    """One value of ``adapter``.

    Attributes:
        config: name of the configuration class; the module is ``peft`` or ``hf_fastpeft``.
        keys: keys at the top level that it reads -> arguments of the class (None: read elsewhere).
        callbacks: names in ``hf_fastpeft.callbacks`` that a Trainer needs.
    """

    config: str
    keys: Mapping[str, str | None]
    callbacks: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Where the configuration class is."""
        return "hf_fastpeft" if self.config in _OURS else "peft"


_OURS = ("AdaptiveLoraConfig", "BottleneckAdapterConfig", "SoraConfig")
_TARGETS = {"lora_target_modules": "target_modules", "lora_modules_to_save": "modules_to_save"}
_LOW_RANK = {"lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", **_TARGETS, "lora_target_linear": None}
_GATED = {"peft_use_rslora": "use_rslora", "peft_init_lora_weights": "init_lora_weights"}
_LORA = Method(
    "LoraConfig",
    {
        "lora_r": "r",
        **_LOW_RANK,
        **_GATED,
        "peft_use_dora": "use_dora",
        "loraplus_lr_ratio": None,
        "loraplus_lr_embedding": None,
    },
)
METHODS: dict[str, Method] = {
    "lora": _LORA,
    "qlora": _LORA,
    "sora": Method("SoraConfig", {"lora_r": "r", **_LOW_RANK, **_GATED}, ("SoraCallback",)),
    "adalora": Method("AdaLoraConfig", {"lora_r": "init_r", **_LOW_RANK}, ("AdaLoraCallback",)),
    "adaptive_lora": Method("AdaptiveLoraConfig", {"lora_r": "init_r", **_LOW_RANK, **_GATED}, ("AdaLoraCallback",)),
    "bottleneck": Method("BottleneckAdapterConfig", _TARGETS),
    "ia3": Method("IA3Config", _TARGETS),
    "prefix": Method("PrefixTuningConfig", {}),
    "prompt": Method("PromptTuningConfig", {}),
    "ptuning": Method("PromptEncoderConfig", {}),
}
PROMPT_METHODS = ("prefix", "prompt", "ptuning")

# Names people know -> the keys they stand for; `full` is the absence of an adapter.
SHORTHANDS: dict[str, dict[str, Any]] = {
    "full": {"adapter": "none"},
    "rslora": {"adapter": "lora", "peft_use_rslora": True},
    "dora": {"adapter": "lora", "peft_use_dora": True},
    "loraplus": {"adapter": "lora", "loraplus_lr_ratio": 16.0},  # 2^4, arXiv 2402.12354, section 5
    "pissa": {"adapter": "lora", "peft_init_lora_weights": "pissa"},
    "eva": {"adapter": "lora", "peft_init_lora_weights": "eva"},
}

INITS = (True, False, "gaussian", "orthogonal", "pissa", "olora", "eva")
# These subtract the first A and B from the base weights, so their adapters fit no other base.
BASE_CHANGING = ("pissa", "olora")
_REFUSED_INITS = {
    "pissa_niter": "its decomposition draws at random, so a loaded or resumed adapter would not fit its base weights; "
    "use pissa, which is exact",
    "loftq": "it needs a quantisation of its own that cannot be loaded again; use PEFT's LoftQ in a script",
    "corda": "it needs covariances of prepared data; use eva, or PEFT's CorDA in a script",
    "lora_ga": "it needs gradients before the first step; use eva, or PEFT's LoRA-GA in a script",
}
# Optimizers that bring parameter groups of their own, which LoRA+ would replace.
_OWN_GROUPS = ("adalomo", "apollo", "galore", "lomo", "muon", "dion")
_ADAPTER_KEYS = tuple(_LORA.keys)
# Axolotl's files for full fine-tuning often still carry these; they say nothing there.
_LEFT_OVER = ("lora_r", "lora_alpha", "lora_dropout", "lora_modules_to_save")


def expand(data: dict[str, Any]) -> dict[str, Any]:
    """Keys with a shorthand replaced by what it stands for; one that contradicts another key is left as it is."""
    name = data.get("adapter")
    meant = SHORTHANDS.get(name) if isinstance(name, str) else None
    if meant is None or any(data.get(k) not in (None, v) for k, v in meant.items() if k not in _FREE):
        return data
    return {**data, **{k: v for k, v in meant.items() if k == "adapter" or data.get(k) is None}}


_FREE = ("adapter", "loraplus_lr_ratio")  # any ratio is LoRA+


def contradictions(config: "RunConfig") -> Iterator[tuple[bool, str]]:
    """What the method and the other keys say against each other, as ``(found, "key: message")``."""
    name = config.adapter
    if name in SHORTHANDS:  # `expand` left it, so another key contradicts it
        key, value = next((k, v) for k, v in SHORTHANDS[name].items() if k not in _FREE)
        yield True, f"adapter: {name} means {key}: {_yaml(value)}, but {key}: {_yaml(getattr(config, key))} is given"
        return
    takes = METHODS[name].keys if name in METHODS else dict.fromkeys(_LEFT_OVER)
    for key in _ADAPTER_KEYS:
        given = key in config.model_fields_set and getattr(config, key) not in (None, False, 0)
        users = ", ".join(other for other, method in METHODS.items() if key in method.keys)
        instead = (
            "use fastpeft.bottleneck.r"
            if (name, key) == ("bottleneck", "lora_r")
            else f"possible with adapter: {users}"
        )
        yield given and key not in takes, f"{key}: adapter: {name} has no use for {key}; remove it; {instead}"
    yield from _init_contradictions(config)
    plus = config.loraplus_lr_ratio is not None
    yield (
        "loraplus_lr_embedding" in config.model_fields_set and not plus,
        "loraplus_lr_embedding: only with loraplus_lr_ratio",
    )
    yield (
        plus and any(part in config.optimizer for part in _OWN_GROUPS),
        (
            f"loraplus_lr_ratio: optimizer: {config.optimizer} makes parameter groups of its own; possible: "
            "adamw_torch and the other Adam, SGD and Lion optimizers"
        ),
    )
    prompts = name in PROMPT_METHODS
    yield (
        prompts and config.sample_packing,
        (
            f"sample_packing: adapter: {name} puts its virtual tokens in front of a row, so only the first sample of "
            "a packed row would see them; remove sample_packing"
        ),
    )
    yield (
        name == "prefix" and config.gradient_checkpointing,
        (
            "gradient_checkpointing: prefix tuning hands its prefixes over in the cache, which checkpointing does not "
            "keep; remove it, or use adapter: prompt or ptuning"
        ),
    )
    shares = [
        key
        for key in ("tinit", "tfinal")
        if isinstance(value := getattr(config.fastpeft.adalora, key), float) and value % 1
    ]
    yield (
        name == "adalora" and config.sample_packing and config.max_steps is None and bool(shares),
        "fastpeft: adalora." + ", ".join(shares) + ": a share of the steps, which sample_packing makes unknown; give "
        "steps, or max_steps",
    )
    text = config.fastpeft.prompt
    yield (
        name == "prompt" and (text.prompt_tuning_init == "TEXT") != (text.prompt_tuning_init_text is not None),
        "fastpeft: prompt.prompt_tuning_init: TEXT and prompt.prompt_tuning_init_text go together; give both or none",
    )
    for key in ("tokenizer_type", "trust_remote_code"):
        yield (
            name == "prompt"
            and text.prompt_tuning_init == "TEXT"
            and key in config.model_fields_set
            and getattr(config, key) not in (False, "AutoTokenizer"),
            (
                f"{key}: PEFT reads fastpeft.prompt.prompt_tuning_init_text with AutoTokenizer, and runs no code "
                "of the model; remove one of them"
            ),
        )


def _init_contradictions(config: "RunConfig") -> Iterator[tuple[bool, str]]:
    init, key = config.peft_init_lora_weights, "peft_init_lora_weights"
    reason = next((why for part, why in _REFUSED_INITS.items() if isinstance(init, str) and init.startswith(part)), "")
    possible = ", ".join(map(_yaml, INITS))
    unknown = init is not None and not any(init is i or (isinstance(i, str) and init == i) for i in INITS)
    yield unknown, f"{key}: {_yaml(init)} is not supported; {reason + '; ' if reason else ''}possible: {possible}"
    yield (
        init in BASE_CHANGING and config.is_quantized,
        (
            f"{key}: {init} takes its adapter out of the base weights, which 4- or 8-bit weights would round again; "
            "remove load_in_4bit and load_in_8bit, or use peft_init_lora_weights: eva"
        ),
    )
    plain = config.adapter in ("lora", "qlora")
    yield (
        config.adapter in ("sora", "adaptive_lora") and init in (*BASE_CHANGING, "eva"),
        f"{key}: {init} has no gated form; with adapter: {config.adapter} possible: true, false, orthogonal",
    )
    yield (
        plain and init in BASE_CHANGING and config.peft_use_dora,
        f"{key}: {init} changes the weights whose norms are DoRA's magnitudes; remove it or peft_use_dora",
    )


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
