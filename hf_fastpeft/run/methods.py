"""What each adapter method needs around stock SFTTrainer: callbacks, LoRA+'s optimizer, EVA's data, PiSSA's export."""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer import is_optimizer_factory
from trl import SFTTrainer

from hf_fastpeft.config.mapping import arguments
from hf_fastpeft.config.methods import BASE_CHANGING, METHODS
from hf_fastpeft.config.schema import RunConfig
from hf_fastpeft.errors import ConfigError
from hf_fastpeft.run.data import IGNORED
from hf_fastpeft.run.result import RunResult
from hf_fastpeft.tuners._gated import unpack_4bit

__all__ = ["EvaCallback", "LoraPlusTrainer", "MethodParts", "Unpack4bitCallback", "padded"]

_EVA_BATCHES = 500  # far more than the 10 to 50 that PCA takes to settle
_EVA_RHO = 2.0  # peft.EvaConfig's default


class LoraPlusTrainer(SFTTrainer):
    """SFTTrainer with PEFT's LoRA+ groups: B learns ``loraplus_lr_ratio`` times as fast as A (arXiv 2402.12354)."""

    loraplus: dict[str, Any]
    optimizer: Any

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer that the arguments name, over LoRA+'s groups.

        Raises:
            ConfigError: the optimizer makes its own groups.
        """
        if self.optimizer is None:
            from peft.optimizers import create_loraplus_optimizer

            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & set(options):
                raise ConfigError(
                    f"loraplus_lr_ratio: optimizer: {self.args.optim} makes parameter groups of its own; possible: "
                    "adamw_torch"
                )
            options = {k: v for k, v in options.items() if k != "lr"}
            self.optimizer = create_loraplus_optimizer(
                model,
                kind,
                lr=self.args.learning_rate,
                loraplus_weight_decay=self.args.weight_decay,
                **self.loraplus,
                **options,
            )
        return self.optimizer


class EvaCallback(TrainerCallback):
    """Starts LoRA's A at the principal directions of its inputs on training rows (EVA, arXiv 2410.07170).

    Acts when the trainer's constructor ends, so before anything is patched and before the optimizer exists. The rows
    are the first ones of the data, and the decomposition is seeded: a resumed run finds the same ranks.
    """

    def __init__(self, config: RunConfig, rows: Any, pad: int) -> None:
        self.config, self.rows, self.pad = config, rows, pad

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        from peft.tuners.lora.eva import initialize_lora_eva_weights

        batches = self._batches(model)
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            initialize_lora_eva_weights(model, batches, gather_distributed_inputs=False, show_progress_bar=False)

    def _batches(self, model: Any) -> "_Batches":
        """Batches with at least as many counted positions as a module may get ranks, which PEFT would wait for."""
        options = self.config.fastpeft.eva
        rho = _EVA_RHO if options.rho is None else options.rho
        needed = round(self.config.lora_r * rho)
        narrowest = min(layer.in_features for layer in model.modules() if hasattr(layer, "lora_A"))
        if needed > narrowest:
            raise ConfigError(
                f"peft_init_lora_weights: eva: lora_r x rho = {needed} directions, but a target has {narrowest} "
                f"inputs; possible: lora_r x fastpeft.eva.rho up to {narrowest}"
            )
        batches: list[list[dict[str, list[int]]]] = [[]]
        counted = 0
        for row in self.rows:
            batches[-1].append(row)
            labelled = options.use_label_mask is not False
            counted += sum(label != IGNORED for label in row["labels"]) if labelled else len(row["input_ids"])
            if counted >= needed and len(batches[-1]) >= self.config.micro_batch_size:
                batches.append([])
                counted = 0
                if len(batches) > _EVA_BATCHES:
                    break
        full = batches[:-1]
        if not full:
            raise ConfigError(
                f"peft_init_lora_weights: eva: the data have {counted} positions with a label, fewer than lora_r x "
                f"rho = {needed}; lower lora_r or fastpeft.eva.rho"
            )
        return _Batches([padded(batch, self.pad) for batch in full])


class Unpack4bitCallback(TrainerCallback):
    """Lets steps after an evaluation, or after generated samples, train through 4-bit weights on a CPU."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        unpack_4bit(model)


class _Batches(Sequence[dict[str, torch.Tensor]]):
    """The batches again and again, as PEFT asks for them, but not for ever."""

    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self.batches, self.given = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self.batches[index]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.batches:
            self.given += 1
            if self.given > _EVA_BATCHES:
                raise ConfigError(
                    f"peft_init_lora_weights: eva: directions still turn after {_EVA_BATCHES} batches; raise "
                    "micro_batch_size, or lower lora_r or fastpeft.eva.tau"
                )
            yield batch


def padded(rows: Sequence[dict[str, list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` of rows as one batch, padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        gap = longest - len(row["input_ids"])
        columns["input_ids"].append(row["input_ids"] + [pad] * gap)
        columns["attention_mask"].append([1] * len(row["input_ids"]) + [0] * gap)
        columns["labels"].append(row["labels"] + [IGNORED] * gap)
    return {name: torch.tensor(values) for name, values in columns.items()}


class MethodParts:
    """Callbacks, trainer class and saving of a run's adapter.

    Attributes:
        ranks: the callback that prunes or allocates ranks, or None.
        patcher: `FastPeftCallback`, or None.
        callbacks: all of them, in the order in which they must act.
        trainer: class of the trainer.
    """

    def __init__(self, config: RunConfig, rows: Any, tokenizer: Any) -> None:
        import hf_fastpeft

        self.config = config
        self.callbacks: list[TrainerCallback] = []
        if config.peft_init_lora_weights == "eva":
            self.callbacks.append(EvaCallback(config, rows, tokenizer.pad_token_id or 0))
        if config.load_in_4bit:
            self.callbacks.append(Unpack4bitCallback())
        self.ranks: Any = None
        self.patcher: Any = None
        if config.fastpeft.patch:
            self.patcher = hf_fastpeft.FastPeftCallback(impl=config.fastpeft.impl)
            self.callbacks.append(self.patcher)
        for name in METHODS[config.adapter].callbacks if config.adapter in METHODS else ():
            self.ranks = getattr(hf_fastpeft, name)()
            self.callbacks.append(self.ranks)
        loraplus = arguments(config, "create_loraplus_optimizer")
        self.trainer: type[SFTTrainer] = SFTTrainer
        if loraplus:
            self.trainer = type("LoraPlusTrainer", (LoraPlusTrainer,), {"loraplus": loraplus})
        self._start: dict[str, torch.Tensor] | None = None

    def remember_start(self, model: Any) -> None:
        """Keeps the first A and B of an adapter that was taken out of the base weights, for its export."""
        config = self.config
        # PEFT does not convert rsLoRA's scaling: the difference has twice the rank.
        if config.peft_init_lora_weights in BASE_CHANGING and not config.peft_use_rslora:
            trained = {name for name, p in model.named_parameters() if p.requires_grad}
            self._start = {k: v.to("cpu", copy=True) for k, v in model.state_dict().items() if k in trained}

    def save(self, model: Any, result: RunResult) -> None:
        """Plain LoRA beside the adapter where servers could not load that one, and what became of the ranks."""
        out = result.output_dir / "lora"
        if self._start is not None:
            self._save_difference(model, out)
            result.lora_dir = out
        if self.ranks is None:
            return
        from hf_fastpeft.export import export_to_lora

        export_to_lora(model, out, overwrite=True)
        result.lora_dir = out
        result.rank_history = [(int(step), dict(ranks)) for step, ranks in self.ranks.history]
        if self.config.adapter == "sora":
            from hf_fastpeft.tuners.sora import kept_ranks

            result.kept_ranks = dict(kept_ranks(model))
        elif result.rank_history:
            start = self.config.lora_r
            result.kept_ranks = {path: (kept, start) for path, kept in result.rank_history[-1][1].items()}

    def _save_difference(self, model: Any, out: Path) -> None:
        """``B A - B0 A0`` as one LoRA of twice the rank, which fits the base weights as they are on disk."""
        settings = model.peft_config["default"]
        init = settings.init_lora_weights
        with tempfile.TemporaryDirectory() as start, warnings.catch_warnings():
            # The second adapter that PEFT warns of is its own, for as long as it subtracts.
            warnings.filterwarnings("ignore", message=".*changes the base weights of the model")
            settings.init_lora_weights = True
            model.save_pretrained(start, state_dict=self._start)
            settings.init_lora_weights = init
            model.save_pretrained(str(out), path_initial_model_for_weight_conversion=start)
