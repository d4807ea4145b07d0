"""One training run, from a `RunConfig` to a folder: stock TRL SFTTrainer, stock PEFT, our patch and callbacks."""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hf_fastpeft.config.mapping import adapter_config, arguments, planned_steps, quantization_config
from hf_fastpeft.config.methods import PROMPT_METHODS
from hf_fastpeft.config.schema import RunConfig
from hf_fastpeft.errors import ConfigError, NothingToPatchError, UnknownFamilyError
from hf_fastpeft.run.data import Example, RunData, encode, prompt_ids, read_data
from hf_fastpeft.run.folder import (
    PICTURES,
    REPORT_FILE,
    RUN_FILE,
    FolderCallback,
    OutputFolder,
    latest_checkpoint,
    read_json,
)
from hf_fastpeft.run.manifest import write_json
from hf_fastpeft.run.result import RunResult, Sample
from hf_fastpeft.tuners._bitsandbytes import repeat_hints

__all__ = ["Loaded", "load_model", "load_tokenizer", "model_and_batch", "model_source", "train"]


@dataclass
class Loaded:
    """Model and tokenizer of a run, and the adapter still to be added (None: train every weight)."""

    model: Any
    tokenizer: Any
    adapter: Any


def train(config: RunConfig, *, overwrite: bool = False, console: Console | None = None) -> RunResult:
    """Runs one supervised fine-tuning and writes adapter, export, report and pictures to ``config.output_dir``.

    Everything a user can get wrong is checked before the model is loaded. Ctrl-C finishes the step, writes a
    checkpoint and returns with ``interrupted`` set.

    Args:
        config: the run.
        overwrite: delete what an earlier run wrote into the output folder, once data and model are loaded; files that
            no run wrote stay.
        console: where progress goes; default standard output.

    Raises:
        ConfigError: the configuration contradicts itself or the folder cannot be written.
        DataError: the data are missing, malformed, empty or too long.
        MissingPackageError: a package this run needs is not installed.
        RunExistsError: the folder holds an earlier run.
    """
    from hf_fastpeft.run.progress import quiet_bars
    from hf_fastpeft.run.report import finish, introduce

    console = console or Console()
    seconds: dict[str, float] = {}
    _adapter(config, None)
    folder = OutputFolder(config, overwrite=overwrite)
    with quiet_bars():
        with _timed(seconds, "data"):
            data = read_data(config)
        with _timed(seconds, "model"):
            source = model_source(config, notify=console.print)
            tokenizer = load_tokenizer(config, source)
            train_rows, notices = encode(data.train, tokenizer, config, what="training data")
            eval_rows = None
            if data.held_out:
                eval_rows, more = encode(data.held_out, tokenizer, config, what="validation data")
                notices = notices + more
            notices = data.notices + notices
            loaded = load_model(config, source, tokenizer, total_steps=_steps(config, train_rows))
        run = _Run(config, console, loaded, train_rows, eval_rows, seconds, folder)
        introduce(console, config, run.trainer, notices, folder.checkpoint)
        with folder.writing("runs"):  # TensorBoard's
            result = run.execute(data)
    with folder.writing(REPORT_FILE, *PICTURES):
        finish(console, config, result)
    return result


def model_source(config: RunConfig, *, notify: Any = None) -> str:
    """Folder or repository of the base model; a built-in one is converted on first use."""
    from hf_fastpeft.quickstart import builtin_name, ensure_model

    name = builtin_name(config.base_model)
    return config.base_model if name is None else str(ensure_model(name, notify=notify))


def load_tokenizer(config: RunConfig, source: str) -> Any:
    """The base model's tokenizer with the run's special tokens.

    Raises:
        ConfigError: it cannot be loaded, or a special token is not in its vocabulary.
    """
    options = {k: v for k, v in arguments(config, "from_pretrained").items() if k in ("revision", "trust_remote_code")}
    try:
        tokenizer = _class(config, "tokenizer_class").from_pretrained(source, **options)
    except (ImportError, OSError, ValueError) as error:
        raise _unloadable(config, error) from error
    vocabulary = tokenizer.get_vocab()
    new = [f"{kind}: {token!r}" for kind, token in config.special_tokens.items() if token not in vocabulary]
    if new:
        raise ConfigError(
            f"special_tokens: {', '.join(new)}: not in the vocabulary of {config.base_model}; extend the tokenizer "
            "and the embeddings first and point base_model at the result"
        )
    for kind, token in config.special_tokens.items():
        setattr(tokenizer, kind, token)
    return tokenizer


def load_model(config: RunConfig, source: str, tokenizer: Any, *, total_steps: int | None = None) -> Loaded:
    """The base model, quantised if asked, and the PEFT config to wrap it with for ``total_steps`` optimizer steps.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if config.load_in_4bit:
        repeat_hints()
    options = arguments(config, "from_pretrained")
    quantization = quantization_config(config)
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        model = _class(config, "model_class").from_pretrained(source, **options)
    except (ImportError, OSError, ValueError) as error:
        raise _unloadable(config, error) from error
    return Loaded(model, tokenizer, _adapter(config, model, total_steps))


def _class(config: RunConfig, argument: str) -> Any:
    import transformers

    return getattr(transformers, arguments(config, "transformers")[argument])


def _unloadable(config: RunConfig, error: Exception) -> ConfigError:
    reason = str(error).strip().split("\n")[0]
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return ConfigError(f"base_model: {config.base_model}: cannot be loaded{offline}: {reason}")


def _adapter(config: RunConfig, model: Any, total_steps: int | None = None) -> Any:
    """The PEFT config; without a model, only a check that its values go together."""
    try:
        if model is None:
            config = config.model_copy(update={"lora_target_linear": False})
        return adapter_config(config, model, total_steps=total_steps)
    except ValueError as error:
        raise ConfigError(f"adapter: {config.adapter}: {error}") from error


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


@contextmanager
def _told_how_to_go_on() -> Iterator[None]:
    """Names the key that trains a model which `patch_model` cannot patch, and hides a warning nobody here can heed."""
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 reads the old name of a property of transformers 5.23 (peft_model.py, _prepare_model).
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # TRL makes the adapter and has no such option.
            warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage")
            yield
    except (UnknownFamilyError, NothingToPatchError) as error:
        raise type(error)(f"{error} To train it unpatched, set fastpeft.patch: false.") from error


class _Run:
    """One SFTTrainer and the phases around its training."""

    def __init__(
        self,
        config: RunConfig,
        console: Console,
        loaded: Loaded,
        train_rows: Any,
        eval_rows: Any,
        seconds: dict[str, float],
        folder: OutputFolder,
    ) -> None:
        from transformers import PrinterCallback
        from trl import SFTConfig

        from hf_fastpeft.run.methods import MethodParts
        from hf_fastpeft.run.progress import ProgressCallback, StopCallback

        self.config, self.tokenizer, self.seconds, self.folder = config, loaded.tokenizer, seconds, folder
        self.stop, self.progress = StopCallback(console), ProgressCallback(console)
        self.parts = MethodParts(config, train_rows, loaded.tokenizer)
        steps = _steps(config, train_rows)
        options = arguments(config, "SFTConfig", total_steps=steps)
        if eval_rows is None:
            options["eval_strategy"] = "no"
        os.environ.update(arguments(config, "environment"))
        args = SFTConfig(**options, disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available())
        if args.process_index == 0:  # by now every process has looked at the folder
            folder.start()
        with _timed(seconds, "trainer"), _told_how_to_go_on():
            self.trainer = self.parts.trainer(
                model=loaded.model,
                args=args,
                train_dataset=train_rows,
                eval_dataset=eval_rows,
                processing_class=loaded.tokenizer,
                peft_config=loaded.adapter,
                callbacks=[*self.parts.callbacks, self.progress, self.stop, FolderCallback(folder)],
            )
            self.parts.remember_start(self.trainer.model)
        self.trainer.remove_callback(PrinterCallback)
        folder.keep_card(self.trainer)
        self.has_eval = eval_rows is not None

    def execute(self, data: RunData) -> RunResult:
        """Scores, trains, scores again and saves; returns early where training was interrupted."""
        config, trainer, checkpoint = self.config, self.trainer, self.folder.checkpoint
        result = RunResult(self.folder.path, base=trainer.model.name_or_path, seconds=self.seconds)
        probes = (data.held_out or data.train)[: config.fastpeft.samples]
        self._before(result, probes, checkpoint)
        with _timed(self.seconds, "training"), self.stop.on_interrupt(), warnings.catch_warnings():
            # An interrupted run goes on, so the ranks that it has by then are not its last.
            warnings.filterwarnings("ignore", message=r"\w+Callback: adapter .* ends with \d+ ranks")
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except KeyboardInterrupt:
                self.stop.requested = True
            finally:
                self.progress.close()
        result.steps = trainer.state.global_step
        result.history = trainer.state.log_history
        result.checkpoint = latest_checkpoint(result.output_dir)
        if self.stop.requested and trainer.state.global_step < trainer.state.max_steps:
            result.interrupted = True
            return result
        if self.has_eval:
            with _timed(self.seconds, "validation"):
                result.loss_after = float(trainer.evaluate()["eval_loss"])
        with _timed(self.seconds, "samples"):
            for sample, answer in zip(result.samples, self._answers(probes), strict=True):
                sample.after = answer
        self._save(result)
        return result

    def _before(self, result: RunResult, probes: list[Example], checkpoint: Path | None) -> None:
        """Loss and answers of the untrained model; a resumed run reads them from its first start."""
        file = result.output_dir / RUN_FILE
        earlier = read_json(file) if checkpoint is not None else {}
        if earlier:
            result.loss_before = earlier.get("loss_before")
            stored = [Sample(**sample) for sample in earlier.get("samples", [])]
            result.samples = stored if len(stored) == len(probes) else [self._sample(probe, "") for probe in probes]
            return
        if self.has_eval:
            with _timed(self.seconds, "validation"):
                result.loss_before = float(self.trainer.evaluate()["eval_loss"])
        with _timed(self.seconds, "samples"):
            answers = self._answers(probes)
            result.samples = [self._sample(p, answer) for p, answer in zip(probes, answers, strict=True)]
        content = {
            "config": self.config.model_dump(),
            "loss_before": result.loss_before,
            "samples": [asdict(sample) for sample in result.samples],
        }
        if self.trainer.is_world_process_zero():
            with self.folder.writing(RUN_FILE):
                write_json(file, content)

    def _sample(self, probe: Example, before: str) -> Sample:
        text = probe.prompt or "\n".join(m["content"] for m in probe.messages[:-1] if m["role"] != "system")
        return Sample(prompt=text, reference=probe.reference, before=before)

    def _answers(self, probes: list[Example]) -> list[str]:
        """Greedy continuations of the prompts, all in one batch padded on the left."""
        if not probes:
            return []
        if self.config.adapter in PROMPT_METHODS and len(probes) > 1:
            # Padding would stand between the virtual tokens and the prompt, and PEFT drops position ids.
            return [answer for probe in probes for answer in self._answers([probe])]
        model = self.trainer.model
        prompts = [prompt_ids(probe, self.tokenizer) for probe in probes]
        longest = max(len(ids) for ids in prompts)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
        model.eval()
        with torch.inference_mode(), warnings.catch_warnings():
            if self.config.adapter in PROMPT_METHODS:
                # PEFT 0.21 hands prefixes over by the name that transformers 5.24 deprecates.
                warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")
                out = _greedy(model, ids, self.config.fastpeft.sample_tokens, self.tokenizer.eos_token_id)
            else:
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=self.config.fastpeft.sample_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=pad,
                    eos_token_id=self.tokenizer.eos_token_id,
                )
        return [str(self.tokenizer.decode(row[longest:], skip_special_tokens=True)).strip() for row in out]

    def _save(self, result: RunResult) -> None:
        """Adapter in its own format, plain LoRA beside it, and what the method and the patch report."""
        model = self.trainer.model.eval()
        name = "model" if self.config.adapter == "none" else "adapter"
        with _timed(self.seconds, "saving"), self.folder.writing(name, "lora"):
            result.adapter_dir = result.output_dir / name
            self.trainer.save_model(str(result.adapter_dir))
            self.parts.save(model, result)
        patched = getattr(self.parts.patcher, "patched", None)
        if patched is not None:
            result.patch, result.patch_text = patched.to_json(), patched.report()


def _greedy(model: Any, ids: torch.Tensor, tokens: int, eos_token_id: int | None) -> torch.Tensor:
    """One prompt ``(1, seq_len)`` and its greedy continuation, each token from a whole forward.

    Under transformers 5.24 PEFT 0.21 loses a prefix in ``generate`` and repeats prompts at every token: it looks for
    the cache by its old name. TODO: generate() again at peft>=0.22.
    """
    for _ in range(tokens):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == eos_token_id:
            break
    return ids


def _steps(config: RunConfig, rows: Any) -> int:
    return planned_steps(config, len(rows), int(os.environ.get("WORLD_SIZE", "1")))


def model_and_batch(config: RunConfig, rows: int, *, notify: Any = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """The run's model in training mode, with an adapter that does something, and a batch of its first training rows.

    Raises:
        ConfigError: see `train`.
        DataError: see `train`.
    """
    from hf_fastpeft.run.methods import padded
    from hf_fastpeft.run.progress import quiet_bars

    with quiet_bars():
        data = read_data(config)
        source = model_source(config, notify=notify)
        tokenizer = load_tokenizer(config, source)
        encoded, _ = encode(data.train[:rows], tokenizer, config, what="training data")
        loaded = load_model(config, source, tokenizer)
    model = loaded.model
    if loaded.adapter is not None:
        from peft import get_peft_model, prepare_model_for_kbit_training

        if config.is_quantized:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        with _told_how_to_go_on():
            model = get_peft_model(model, loaded.adapter)
        # A new adapter is zero in one of its factors, which makes other gradients zero whatever computes them.
        generator = torch.Generator().manual_seed(config.seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_((0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter))
    batch = padded(encoded, tokenizer.pad_token_id or 0)
    return model.train(), {name: values.to(model.device) for name, values in batch.items()}
