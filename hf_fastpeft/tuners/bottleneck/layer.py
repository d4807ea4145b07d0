"""A module with bottleneck adapters on it; every one of them its own, chosen by its configuration.

    sequential (Houlsby et al. 2019, arXiv 1902.00751, figure 2)   h <- h + s * f(h)           h = module(x)
    parallel (He et al. 2022, arXiv 2110.04366, table 1)           h <- h + s * f(x)
    f(z) = act(norm(z) Wdᵀ + bd) Wuᵀ + bu

Shapes: x (..., d_in), h (..., d_out), Wd (r, width of z), Wu (d_out, r); norm is the identity unless asked for.
Several active adapters act one after the other, in the order in which they are active.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_fastpeft.errors import AdapterError

if TYPE_CHECKING:
    from hf_fastpeft.tuners.bottleneck.config import BottleneckAdapterConfig

__all__ = ["NONLINEARITIES", "NOT_MERGEABLE", "BottleneckLayer"]

NONLINEARITIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
NOT_MERGEABLE = (
    "a bottleneck adapter is not linear in its input, so no base weight has the same outputs; possible: keep the "
    "adapter, or unload() to get the base model back without it"
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INPUT_NAMES = ("hidden_states", "x", "input")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """Any module that maps ``(..., d_in)`` to ``(..., d_out)``, or to a tuple that starts with that, and its adapters.

    Public attributes of the wrapped module are found on this one: what reads ``layer.self_attn.q_proj`` still does.
    """

    adapter_layer_names = ("bottleneck_norm", "bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "r", "mode", "nonlinearity", "scaling")

    def __init__(self, base_layer: nn.Module, d_in: int | None, d_out: int, path: str) -> None:
        """Without adapters yet; ``d_in`` is None where the module takes no features, as an embedding does not."""
        super().__init__()
        self.base_layer = base_layer
        self.d_in, self.d_out, self.path = d_in, d_out, path
        self.bottleneck_norm = nn.ModuleDict()
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.mode: dict[str, str] = {}
        self.nonlinearity: dict[str, str] = {}
        self.scaling: dict[str, float] = {}
        self.cast_input_dtype_enabled = True  # peft.helpers.disable_input_dtype_casting
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # accelerate, FSDP and transformers keep their own state under names with an underscore: not inherited
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def add_adapter(self, adapter_name: str, config: "BottleneckAdapterConfig") -> None:
        """Make an adapter on the device of the wrapped module and in its dtype; it replaces one of the same name."""
        width = self.d_out if config.mode == "sequential" else self.d_in
        if width is None:
            raise ValueError(
                f"bottleneck adapter {adapter_name!r} on {self.path!r}: mode='parallel', and a "
                f"{type(self.base_layer).__name__} takes no features; possible: mode='sequential'"
            )
        r = config.bottleneck_size(width)
        down, up = nn.Linear(width, r), nn.Linear(r, self.d_out)
        _initialise(down, up, config)
        if config.layer_norm:
            self.bottleneck_norm[adapter_name] = nn.LayerNorm(width)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.bottleneck_dropout[adapter_name] = dropout.train(self.training)
        self.r[adapter_name] = r
        self.mode[adapter_name] = config.mode
        self.nonlinearity[adapter_name] = config.nonlinearity
        self.scaling[adapter_name] = float(config.scaling)
        device, dtype = self._place()
        if not down.weight.is_meta:
            for modules in (self.bottleneck_norm, self.bottleneck_down, self.bottleneck_up):
                if adapter_name in modules:
                    modules[adapter_name].to(device=device, dtype=dtype)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _place(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and floating dtype of the wrapped module; None where it does not say: quantised, offloaded, empty."""
        parameters = [p for p in self.get_base_layer().parameters() if not p.is_meta]
        device = parameters[0].device if parameters else None
        dtype = next((p.dtype for p in parameters if p.dtype in _FLOATS), None)
        return device, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        active = [name for name in self.active_adapters if name in self.bottleneck_down]
        if self.disable_adapters or not active:
            return self.base_layer(*args, **kwargs)
        x = self._input(args, kwargs) if any(self.mode[name] == "parallel" for name in active) else None
        result = self.base_layer(*args, **kwargs)
        h = result[0] if isinstance(result, (tuple, list)) and result else result
        if not isinstance(h, torch.Tensor):
            raise TypeError(
                f"bottleneck adapter on {self.path!r}: the module returned a {type(result).__name__}"
                f"{'' if h is result else f' that starts with a {type(h).__name__}'}; possible: a tensor, or a tuple "
                "that starts with one. Target a module inside it."
            )
        for name in active:
            h = self._add(name, h if x is None or self.mode[name] == "sequential" else x, h)
        if not isinstance(result, (tuple, list)):
            return h
        make = getattr(type(result), "_make", type(result))  # a named tuple takes its fields one by one
        return make((h, *result[1:]))

    def _add(self, name: str, z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        width = down.in_features
        if z.shape[-1] != width or (*z.shape[:-1], self.d_out) != tuple(h.shape):
            raise ValueError(
                f"bottleneck adapter {name!r} on {self.path!r}, {self.mode[name]}: input {tuple(z.shape)} and output "
                f"{tuple(h.shape)}; possible: (..., {width}) and (..., {self.d_out}). Set hidden_size in the "
                "configuration, or target other modules."
            )
        # autocast casts by itself, and back where the operation wants float32
        z = self._cast_input_dtype(z, down.weight.dtype)
        if name in self.bottleneck_norm:
            z = self.bottleneck_norm[name](z)
        z = up(self.bottleneck_dropout[name](NONLINEARITIES[self.nonlinearity[name]](down(z))))
        # a float32 adapter is added before the sum is rounded to a half-precision h
        return torch.add(h, z, alpha=self.scaling[name]).to(h.dtype)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        x = args[0] if args else next((kwargs[name] for name in _INPUT_NAMES if name in kwargs), None)
        if not isinstance(x, torch.Tensor):
            found = f"a {type(args[0]).__name__}" if args else f"keywords {sorted(kwargs)}"
            raise TypeError(
                f"bottleneck adapter on {self.path!r}, parallel: the module was called with {found}; possible: a "
                f"tensor as the first argument or under {', '.join(map(repr, _INPUT_NAMES))}. Use mode='sequential'."
            )
        return x

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Not possible."""
        raise AdapterError(f"merge the adapters of {self.path!r}: {NOT_MERGEABLE}")

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_out={self.d_out}, r={self.r}, mode={self.mode}"


def _initialise(down: nn.Linear, up: nn.Linear, config: "BottleneckAdapterConfig") -> None:
    if config.init_weights is True:
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
    elif config.init_weights == "houlsby":
        for linear in (down, up):
            nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(linear.bias)
