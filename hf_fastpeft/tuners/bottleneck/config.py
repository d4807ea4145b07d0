"""Configuration of bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751; He et al. 2022, arXiv 2110.04366)."""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig

from hf_fastpeft.tuners import _config
from hf_fastpeft.tuners._config import is_int
from hf_fastpeft.tuners._peft import add_peft_type
from hf_fastpeft.tuners.bottleneck.layer import NONLINEARITIES

__all__ = ["BottleneckAdapterConfig"]

_DEFAULT_R = 64
_MODES = ("sequential", "parallel")
_INITS = (True, False, "houlsby")
_CARD_HEADING = "## Loading this bottleneck adapter"
_CARD = f"""{_CARD_HEADING}

Bottleneck adapters are not part of PEFT. Import the package that provides them first; `PeftModel.from_pretrained`
raises `KeyError: 'BOTTLENECK'` without it.

```python
import hf_fastpeft

model = hf_fastpeft.load_adapter("path/to/this/folder")
```

The adapter is not linear: it cannot be merged into the base model's weights or written as LoRA.
"""


@dataclass
class BottleneckAdapterConfig(PeftConfig):
    """An adapter ``s * up(dropout(act(down(norm(.)))))`` on a module's output (Houlsby) or beside the module (He).

    Never mergeable: the nonlinearity has no equal among the base weights, so it costs its two products at inference.
    Trains ``d_in * r + r * d_out + r + d_out`` numbers a module, and ``2 * d_in`` more with ``layer_norm``.

    Args:
        r: width of the bottleneck. Default 64 where ``reduction_factor`` is None too; the paper takes 8 to 256.
        reduction_factor: the module's width over ``r``, instead of ``r``; rounded down, at least one.
        mode: ``"sequential"``, ``h + s * adapter(h)`` of the module's output ``h`` (Houlsby, figure 2; default), or
            ``"parallel"``, ``module(x) + s * adapter(x)`` of its input ``x`` (He et al., table 1).
        nonlinearity: ``"gelu"`` (default, ours), ``"gelu_tanh"``, ``"relu"``, ``"silu"`` or ``"tanh"``.
        scaling: the factor ``s``; default 1, where the sequential form is the paper's.
        dropout: probability with which an element behind the nonlinearity is dropped in training.
        layer_norm: a LayerNorm over the adapter's input, trained with it.
        init_weights: True starts at exactly the base model: ``up`` is zero, ``down`` as torch makes a linear (default,
            ours). ``"houlsby"`` starts near it: both N(0, 0.01²) cut at two deviations, biases zero (section 2.1).
            False draws both as torch does, for tests.
        hidden_size: width of the targeted modules, where it is neither in a linear nor in the model's config.
        target_modules: names, path endings or a regular expression of the modules to adapt: blocks such as
            ``self_attn`` and ``mlp``, or linears. None takes the attention and feed-forward of known model types.
        exclude_modules: modules to leave out, given in the same way.
        modules_to_save: modules trained in full and saved along, such as a classifier.
        layers_to_transform: numbers of the layers to adapt; all by default.
        layers_pattern: name of the module list that these numbers count, where it cannot be told.

    Raises:
        ValueError: a value out of range; all mistakes in one message.
    """

    r: int | None = field(default=None, metadata={"help": "width of the bottleneck; default 64"})
    reduction_factor: float | None = field(default=None, metadata={"help": "module width over r, instead of r"})
    mode: Literal["sequential", "parallel"] = field(default="sequential", metadata={"help": "after or beside"})
    nonlinearity: str = field(default="gelu", metadata={"help": f"one of {', '.join(sorted(NONLINEARITIES))}"})
    scaling: float = field(default=1.0, metadata={"help": "factor of the adapter's output"})
    dropout: float = field(default=0.0, metadata={"help": "dropout behind the nonlinearity"})
    layer_norm: bool = field(default=False, metadata={"help": "LayerNorm over the adapter's input"})
    init_weights: bool | Literal["houlsby"] = field(default=True, metadata={"help": "True: exactly the base model"})
    hidden_size: int | None = field(default=None, metadata={"help": "width of the targets where it cannot be told"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to leave out"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained in full"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "numbers of the layers"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the module list"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("BOTTLENECK")
        wrong = self._wrong_values()
        if wrong:
            raise ValueError("BottleneckAdapterConfig: " + "; ".join(wrong))
        if self.r is None and self.reduction_factor is None:
            self.r = _DEFAULT_R
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)

    @classmethod
    def tiny(cls, **settings: Any) -> "BottleneckAdapterConfig":
        """For a tiny Llama: what the tests of every method take as this one's example."""
        return cls(**{"r": 3, "task_type": "CAUSAL_LM", **settings})

    def bottleneck_size(self, width: int) -> int:
        """The ``r`` of a module with ``width`` inputs to its adapter."""
        if self.reduction_factor is None:
            assert self.r is not None
            return self.r
        return max(1, int(width / self.reduction_factor))

    def _wrong_values(self) -> list[str]:
        wrong: list[str] = []
        check = partial(_config.check, self, wrong)

        def number(value: Any) -> bool:
            return not isinstance(value, bool) and -math.inf < value < math.inf

        def size(value: Any) -> bool:
            return value is None or (is_int(value) and value > 0)

        if self.r is not None and self.reduction_factor is not None:
            wrong.append(f"r={self.r!r} and reduction_factor={self.reduction_factor!r}: give one of them")
        check("r", size, "possible: an integer above 0, or None")
        check("reduction_factor", lambda v: v is None or (number(v) and v > 0), "possible: a number above 0, or None")
        check("mode", lambda v: v in _MODES, "possible: " + ", ".join(map(repr, _MODES)))
        check(
            "nonlinearity", lambda v: v in NONLINEARITIES, "possible: " + ", ".join(map(repr, sorted(NONLINEARITIES)))
        )
        check("scaling", lambda v: number(v) and v != 0, "possible: a number other than 0")
        check("dropout", lambda v: number(v) and 0 <= v < 1, "possible: a fraction in [0, 1)")
        check("layer_norm", lambda v: isinstance(v, bool), "possible: True, False")
        check(
            "init_weights",
            lambda v: any(v is i or v == i == "houlsby" for i in _INITS),
            "possible: True, False, 'houlsby'",
        )
        check("hidden_size", size, "possible: an integer above 0, or None")
        for name in ("target_modules", "exclude_modules"):
            check(
                name, lambda v: v is None or len(v) > 0, "possible: at least one name, a regular expression, or None"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            wrong.append(
                f"layers_to_transform={self.layers_to_transform!r} with target_modules={self.target_modules!r}: a "
                "regular expression says itself which layers; give target_modules as a list"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            wrong.append(f"layers_pattern={self.layers_pattern!r}: only with layers_to_transform")
        return wrong

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and say in the folder's model card what loading the adapter takes."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if _CARD_HEADING not in text:
            card.write_text(f"{text.rstrip()}\n\n{_CARD}".lstrip(), encoding="utf-8")
