"""What a person sees and can do while a run trains: one bar or plain lines, and Ctrl-C that saves first."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

__all__ = ["ProgressCallback", "StopCallback", "quiet_bars"]


class ProgressCallback(TrainerCallback):
    """A rich progress bar with the loss and the kept ranks; a line for each log where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: Any = None
        self._values: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._values = {}
        if not self.console.is_terminal or not state.is_world_process_zero:
            return
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[values]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step, values="")
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        ranks = dict.fromkeys(("sora/kept_rank", "adalora/kept_rank"), "kept rank")
        shown = {"loss": "loss", "eval_loss": "validation", **ranks}
        new = {label: _number((logs or {})[key]) for key, label in shown.items() if key in (logs or {})}
        scored = {"loss", "validation"} & set(new)  # not the summary at the end, which repeats the last step
        if not scored or not state.is_world_process_zero:
            return
        self._values.update(new)
        if self._bar is not None:
            self._bar.update(self._task, values="  ".join(f"{label} {value}" for label, value in self._values.items()))
        elif state.global_step and not self.console.is_terminal:
            line = "  ".join(f"{label} {value}" for label, value in new.items())
            self.console.print(f"step {state.global_step}/{state.max_steps}  {line}", highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class StopCallback(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once `requested` is set.

    A step is never cut in half: an interrupt inside the optimizer would leave some weights updated and others not.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.requested = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    @contextlib.contextmanager
    def on_interrupt(self) -> Iterator[None]:
        """Turns the first Ctrl-C into a request to stop; the second interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set signal handlers
            return
        previous = signal.signal(signal.SIGINT, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.console.print("Ctrl-C: finishing this step and saving a checkpoint; again to stop at once")


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Silences the bars of transformers and datasets while a run shows its own, and restores them."""
    import datasets
    from transformers.utils import logging

    loading = logging.is_progress_bar_enabled()
    mapping = datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if loading:
            logging.enable_progress_bar()
        if not mapping:
            datasets.enable_progress_bars()


def _number(value: Any) -> str:
    return f"{float(value):.3f}".rstrip("0").rstrip(".") if isinstance(value, int | float) else str(value)
