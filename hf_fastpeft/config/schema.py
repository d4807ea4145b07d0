"""The typed configuration of one training run, under Axolotl's key names; our own keys live below ``fastpeft:``.

Defaults are Axolotl's where it has one, else those of TRL and PEFT. Everything is strict about unknown keys.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from hf_fastpeft.config.keys import nearest
from hf_fastpeft.config.methods import (
    AdaloraOptions,
    AdaptiveLoraOptions,
    BelowOne,
    BottleneckOptions,
    EvaOptions,
    Float,
    Ia3Options,
    Int,
    NonNegativeFloat,
    PositiveInt,
    PrefixOptions,
    PromptOptions,
    PtuningOptions,
    SoraOptions,
    Strict,
    contradictions,
    expand,
)

__all__ = ["DatasetConfig", "FastpeftConfig", "RunConfig", "SoraOptions", "expand_home"]


def expand_home(value: str) -> str:
    """A path whose leading ``~`` or ``~user`` is replaced by that home folder; ``$VARIABLE`` stays, as in Axolotl.

    Raises:
        ValueError: there is no such user.
    """
    if not value.startswith("~"):
        return value
    try:
        return str(Path(value).expanduser())
    except RuntimeError as error:
        user = value.partition("/")[0]
        raise ValueError(f"no home folder of {user!r} is known; write the whole path") from error


# A file or folder, or something in its place (a hub id, `builtin:...`), which never starts with `~`.
PathStr = Annotated[str, AfterValidator(expand_home)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Auto = Literal["auto"] | bool


class DatasetConfig(Strict):
    """One entry of ``datasets`` or ``test_datasets``."""

    path: PathStr
    type: Literal["chat_template", "alpaca", "completion", "prompt_completion"] = "prompt_completion"
    """How a row is rendered; ``builtin:`` sources bring their own rendering."""
    split: str = "train"
    """May be cut: ``train[:10%]``. Local files are one split, ``train``."""
    name: str | None = None
    """Configuration name of a hub data set."""
    data_files: PathStr | list[PathStr] | None = None
    ds_type: Literal["json", "csv", "parquet", "text", "arrow"] | None = None
    """Format of local files; default by their suffix (.csv, .parquet, .arrow, .txt), otherwise JSON or JSONL."""
    field_messages: str = "messages"
    message_field_role: str = "role"
    message_field_content: str = "content"
    roles_to_train: list[str] = Field(default=["assistant"])
    field: str = "text"
    """Column of ``type: completion``."""
    field_prompt: str = "prompt"
    field_completion: str = "completion"
    field_instruction: str = "instruction"
    field_input: str = "input"
    field_output: str = "output"

    @field_validator("type", mode="before")
    @classmethod
    def _default_variant(cls, value: Any) -> Any:
        return "chat_template" if value == "chat_template.default" else value


class FastpeftConfig(Strict):
    """Keys of this package."""

    patch: bool = True
    """Fuse the model's forward and backward with `hf_fastpeft.patch_model`."""
    impl: Literal["auto", "torch", "triton"] = "auto"
    sora: SoraOptions = SoraOptions()
    adalora: AdaloraOptions = AdaloraOptions()
    adaptive_lora: AdaptiveLoraOptions = AdaptiveLoraOptions()
    bottleneck: BottleneckOptions = BottleneckOptions()
    ia3: Ia3Options = Ia3Options()
    prefix: PrefixOptions = PrefixOptions()
    prompt: PromptOptions = PromptOptions()
    ptuning: PtuningOptions = PtuningOptions()
    eva: EvaOptions = EvaOptions()
    samples: Annotated[Int, Field(ge=0, le=20)] = 0
    """Held-out prompts answered before and after training."""
    sample_tokens: PositiveInt = 40
    eval_rows: PositiveInt | None = None
    """At most so many validation rows are scored."""
    plots: bool = True


class RunConfig(Strict):
    """One supervised fine-tuning run. Load it from YAML with `hf_fastpeft.config.load_config`."""

    base_model: PathStr
    revision_of_model: str | None = None
    model_type: str = "AutoModelForCausalLM"
    """Class in transformers that loads the model."""
    tokenizer_type: str = "AutoTokenizer"
    """Class in transformers that loads the tokenizer."""
    trust_remote_code: bool = False
    special_tokens: dict[Literal["bos_token", "eos_token", "pad_token", "unk_token"], str] = Field(default={})

    adapter: Literal[
        "lora", "qlora", "rslora", "dora", "loraplus", "pissa", "eva",
        "sora", "adalora", "adaptive_lora", "bottleneck", "ia3", "prefix", "prompt", "ptuning", "full", "none",
    ] = "none"  # fmt: skip
    """``none`` trains every weight. ``rslora``, ``dora``, ``loraplus``, ``pissa`` and ``eva`` are ``lora`` with the
    key of that name below, ``full`` is ``none``. Options of the methods are in ``fastpeft:``."""
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    lora_r: PositiveInt = 8
    lora_alpha: PositiveInt = 16
    lora_dropout: BelowOne = 0.0
    lora_target_modules: list[str] | str | None = None
    """Last name parts, or one regular expression over full names."""
    lora_target_linear: bool = False
    """Every linear layer except the output embedding."""
    lora_modules_to_save: list[str] | None = None
    peft_use_rslora: bool = False
    peft_use_dora: bool = False
    peft_init_lora_weights: bool | str | None = None
    """true, false, gaussian, orthogonal, pissa, olora or eva."""
    loraplus_lr_ratio: Annotated[Float, Field(gt=0)] | None = None
    """LoRA+: the learning rate of B over that of A (arXiv 2402.12354)."""
    loraplus_lr_embedding: Annotated[Float, Field(gt=0)] = 1e-6
    """LoRA+: the learning rate of adapters on embeddings."""

    datasets: Annotated[list[DatasetConfig], Field(min_length=1)]
    test_datasets: list[DatasetConfig] = Field(default=[])
    val_set_size: NonNegativeFloat = 0.0
    """Share of the rows if below 1, number of rows otherwise."""
    sequence_len: PositiveInt = 512
    sample_packing: bool = False
    eval_sample_packing: bool | None = None
    train_on_inputs: bool = False
    group_by_length: bool = False

    micro_batch_size: PositiveInt = 1
    eval_batch_size: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt = 1
    num_epochs: Annotated[Float, Field(gt=0)] = 1.0
    max_steps: PositiveInt | None = None
    optimizer: str = "adamw_torch"
    lr_scheduler: str = "cosine"
    learning_rate: Annotated[Float, Field(gt=0)] = 2e-4
    warmup_ratio: BelowOne | None = None
    warmup_steps: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0
    adam_beta1: BelowOne = 0.9
    adam_beta2: BelowOne = 0.999
    adam_epsilon: Annotated[Float, Field(gt=0)] = 1e-8

    bf16: Auto = "auto"
    fp16: Auto = False
    tf32: Auto = "auto"
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    attn_implementation: str | None = None
    flash_attention: bool = False
    sdp_attention: bool = False
    eager_attention: bool = False

    logging_steps: PositiveInt = 1
    eval_steps: PositiveInt | None = None
    evals_per_epoch: Annotated[Int, Field(ge=0)] | None = None
    save_steps: PositiveInt | None = None
    saves_per_epoch: Annotated[Int, Field(ge=0)] | None = None
    save_total_limit: PositiveInt | None = None
    output_dir: PathStr = "./outputs/out"
    resume_from_checkpoint: PathStr | None = None
    auto_resume_from_checkpoints: bool = False
    seed: Int = 42

    use_wandb: bool | None = None
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_name: str | None = None
    wandb_run_id: str | None = None
    wandb_watch: str | None = None
    wandb_log_model: str | None = None
    wandb_mode: str | None = None
    use_mlflow: bool | None = None
    mlflow_tracking_uri: str | None = None
    mlflow_experiment_name: str | None = None
    mlflow_run_name: str | None = None
    use_tensorboard: bool = False
    trackio_project_name: str | None = None
    trackio_run_name: str | None = None
    trackio_space_id: str | None = None
    hub_model_id: str | None = None
    """Repository the finished model is pushed to; nothing is pushed unless this is set."""

    fastpeft: FastpeftConfig = FastpeftConfig()

    @property
    def method(self) -> str:
        """The adapter and its variants in words."""
        variants = {
            "rsLoRA": self.peft_use_rslora,
            "DoRA": self.peft_use_dora,
            f"init {self.peft_init_lora_weights}": isinstance(self.peft_init_lora_weights, str),
            f"LoRA+ x {self.loraplus_lr_ratio:g}" if self.loraplus_lr_ratio else "": self.loraplus_lr_ratio,
        }
        found = [name for name, on in variants.items() if on]
        return self.adapter + (f" ({', '.join(found)})" if found else "")

    @property
    def is_quantized(self) -> bool:
        """Whether the base model is loaded in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit

    @field_validator("model_type")
    @classmethod
    def _causal(cls, value: str) -> str:
        if not value.endswith("ForCausalLM"):
            raise ValueError(
                "only causal language models are implemented: AutoModelForCausalLM, LlamaForCausalLM, ..."
            )
        return _transformers_class(value, "ForCausalLM", "AutoModelForCausalLM")

    @field_validator("tokenizer_type")
    @classmethod
    def _tokenizer(cls, value: str) -> str:
        if "Tokenizer" not in value:
            raise ValueError("not a tokenizer of transformers: AutoTokenizer, LlamaTokenizer, ...")
        return _transformers_class(value, "Tokenizer", "AutoTokenizer")

    @field_validator("optimizer")
    @classmethod
    def _optimizer(cls, value: str) -> str:

        known = _names_of("OptimizerNames")
        if value not in known:
            raise ValueError(f"not an optimizer of Trainer{nearest(value, known)}")
        return value

    @field_validator("lr_scheduler")
    @classmethod
    def _scheduler(cls, value: str) -> str:

        known = _names_of("SchedulerType")
        if value not in known:
            raise ValueError(f"not a schedule of Trainer{nearest(value, known)}; known: {', '.join(sorted(known))}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        return expand(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _together(self) -> "RunConfig":
        """Combinations that contradict each other, all of them at once."""
        problems = [message for found, message in self._contradictions() if found]
        if problems:
            # The loader splits on this separator, so each becomes an error of its own with its key's line.
            raise ValueError("\n".join(problems))
        return self

    def _contradictions(self) -> list[tuple[bool, str]]:
        no_adapter = self.adapter == "none"
        attention = sum(
            (self.flash_attention, self.sdp_attention, self.eager_attention, bool(self.attn_implementation))
        )
        return [
            (self.adapter == "qlora" and not self.load_in_4bit, "adapter: qlora needs load_in_4bit: true"),
            (self.load_in_4bit and self.load_in_8bit, "load_in_8bit: together with load_in_4bit; keep one of them"),
            (
                no_adapter and self.is_quantized,
                "adapter: none cannot train 4- or 8-bit weights; use adapter: qlora, lora or sora",
            ),
            *contradictions(self),
            (
                self.warmup_ratio is not None and self.warmup_steps is not None,
                "warmup_steps: together with warmup_ratio; keep one of them",
            ),
            (
                self.eval_steps is not None and bool(self.evals_per_epoch),
                "evals_per_epoch: together with eval_steps; keep one of them",
            ),
            (
                self.save_steps is not None and bool(self.saves_per_epoch),
                "saves_per_epoch: together with save_steps; keep one of them",
            ),
            (
                bool(self.test_datasets) and self.val_set_size > 0,
                "val_set_size: together with test_datasets; keep one",
            ),
            (attention > 1, "attn_implementation: more than one kind of attention is asked for; keep one of them"),
            (
                self.fp16 is True and self.bf16 is True,
                "fp16: together with bf16; keep one of them",
            ),
        ]


def _transformers_class(name: str, kind: str, auto: str) -> str:
    import transformers

    # Not dir(): older names of classes are found, but not listed.
    if not hasattr(getattr(transformers, name, None), "from_pretrained"):
        known = [known for known in dir(transformers) if kind in known]
        raise ValueError(
            f"no such class in transformers{nearest(name, known)}; {auto} finds the class of any model, also of one "
            "that brings its own code"
        )
    return name


def _names_of(enum: str) -> set[str]:
    import transformers.trainer_utils
    import transformers.training_args

    module = transformers.training_args if enum == "OptimizerNames" else transformers.trainer_utils
    return {member.value for member in getattr(module, enum)}
