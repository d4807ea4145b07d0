"""Fast forwards for the three module kinds of a Llama-like decoder layer, as mixins over Hugging Face's own classes.

A family file combines each with its stock class: ``class FastLlamaMLP(FastMLP, LlamaMLP)``. ``patch_model`` then sets
``module.__class__`` and gives the module a :class:`Site`; nothing else about the module changes. Every forward asks,
per call, whether the block can do exactly what the stock modules would do now, and runs the stock forward where it
cannot.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_fastpeft.blocks import attention_in, attention_out, mlp
from hf_fastpeft.lowrank import LowRank, compute_dtype, intercepted, read
from hf_fastpeft.ops._backend import Impl
from hf_fastpeft.ops.rms_norm import rms_norm

__all__ = ["FastAttention", "FastMLP", "FastModule", "FastRMSNorm", "Site"]

INFERENCE = "inference (stock numerics and caches)"
COMPILED = "inside torch.compile"
TRANSFORMED = "torch.func or forward-mode differentiation"


@dataclass(slots=True)
class Site:
    """What a patched module remembers: its options and what happened to each of its blocks so far."""

    impl: Impl
    fused: Counter[str] = field(default_factory=Counter)
    stock: Counter[tuple[str, str]] = field(default_factory=Counter)  # (block, reason) -> calls

    def fall_back(self, block: str, reason: str) -> None:
        """Count one call of ``block`` that ran stock."""
        if reason is not COMPILED:  # a counter in traced code would be guarded on: a recompilation a call
            self.stock[block, reason] += 1


def _new_instance(module: str, name: str) -> "FastModule":
    cls = getattr(import_module(module), name)
    instance = cls.__new__(cls)
    assert isinstance(instance, FastModule)
    return instance


class FastModule(nn.Module):
    """Base of the mixins. Subclasses name the blocks they can fuse and say, for each, what stands in the way now."""

    _fastpeft: Site
    _importable: ClassVar[tuple[str, str]]
    blocks: ClassVar[tuple[str, ...]] = ()
    # the kernels hub re-patches modules whose class inherits a layer name; our forward is the one that was asked for
    kernel_condition = staticmethod(lambda module: False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A family's class carries the stock name and module: transformers and FSDP choose layers by the one, PEFT
        writes both into the adapter's config."""
        super().__init_subclass__(**kwargs)
        stock = cls.stock_class()
        if stock in cls.__bases__:  # not for classes that FSDP or a parametrization derive from ours
            cls._importable = (cls.__module__, cls.__qualname__)
            cls.__name__, cls.__module__ = stock.__name__, stock.__module__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickled and copied by where the class really is."""
        state = getattr(self, "__getstate__", self.__dict__.copy)  # Python 3.10 has no default __getstate__
        return _new_instance, self._importable, state()

    @classmethod
    def stock_class(cls) -> type[nn.Module] | None:
        """The Hugging Face class under the mixin, or None for the mixin itself."""
        below = [base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, FastModule)]
        return below[0] if below and below[0] is not nn.Module else None

    @classmethod
    def tolerates(cls, forward: Any) -> bool:
        """Whether a module with this foreign instance ``forward`` can be patched all the same."""
        return False

    def obstacle(self, block: str) -> str | None:
        """Why ``block`` would run stock in the adapters' and dropouts' present state; None if it would be fused."""
        raise NotImplementedError

    def _may_fuse(self) -> str | None:
        """What rules out every block of this call, before any layer is read."""
        if torch.compiler.is_compiling():
            return COMPILED
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return TRANSFORMED
        if _has_any_global_hook():  # type: ignore[no-untyped-call]
            return "global module hooks"
        if not torch.is_grad_enabled() and not self.training:
            return INFERENCE
        return None


def _read_stack(owner: nn.Module, names: tuple[str, ...]) -> tuple[LowRank, ...] | str:
    records = []
    for name in names:
        record = read(getattr(owner, name))
        if isinstance(record, str):
            return f"{name}: {record}"
        records.append(record)
    return tuple(records)


def _dtype_of(x: torch.Tensor, stack: tuple[LowRank, ...]) -> torch.dtype | str:
    found = {compute_dtype(x, low.weight) for low in stack}
    dtype = found.pop() if len(found) == 1 else None
    return dtype if dtype is not None else f"mixed dtypes: input {x.dtype}, weights {stack[0].weight.dtype}"


class FastRMSNorm(FastModule):
    """RMSNorm in one kernel each way; keeps its input and one float a row."""

    blocks = ("rms_norm",)
    weight: torch.Tensor
    variance_epsilon: float

    def obstacle(self, block: str) -> str | None:
        if type(self.weight) is not nn.Parameter:
            return f"weight is a {type(self.weight).__name__}"
        if self.weight.is_meta:
            return "weight is on the meta device (offloaded)"
        # stock rounds to float32 here: only its own order of operations is equal to float64's last digits
        return "float64 model (stock computes this norm in float32)" if self.weight.dtype == torch.float64 else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        reason = self._may_fuse() or self.obstacle("rms_norm")
        if reason is not None:
            self._fastpeft.fall_back("rms_norm", reason)
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        self._fastpeft.fused["rms_norm"] += 1
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, impl=self._fastpeft.impl)


class FastMLP(FastModule):
    """gate, up, activation and down in one autograd Function."""

    blocks = ("mlp",)
    linears: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj", "down_proj")
    act_fn: nn.Module

    def _stack(self) -> tuple[LowRank, ...] | str:
        activation = type(self.act_fn).__name__
        if activation not in ("SiLU", "SiLUActivation"):
            return f"activation {activation}"
        return intercepted(self.act_fn) or _read_stack(self, self.linears)

    def obstacle(self, block: str) -> str | None:
        stack = self._stack()
        return stack if isinstance(stack, str) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        site = self._fastpeft
        stack = self._may_fuse() or self._stack()
        dtype = stack if isinstance(stack, str) else _dtype_of(x, stack)
        if isinstance(stack, str) or isinstance(dtype, str):
            site.fall_back("mlp", str(dtype))
            return super().forward(x)  # type: ignore[no-any-return]
        site.fused["mlp"] += 1
        return mlp(x, stack, dtype=dtype, impl=site.impl)


class FastAttention(FastModule):
    """q, k and v with their rotary embedding in one autograd Function, the output projection in another.

    The attention call between them, with its masks and caches, stays Hugging Face's.
    """

    blocks = ("attention_in", "attention_out")
    linears: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention_in": ("q_proj", "k_proj", "v_proj"),
        "attention_out": ("o_proj",),
    }
    # the family's own helpers, for the parts that run stock
    eager_attention: ClassVar[Callable[..., Any]]
    stock_rotary: ClassVar[Callable[..., Any]]
    config: Any
    head_dim: int
    layer_idx: int
    scaling: float
    attention_dropout: float

    def obstacle(self, block: str) -> str | None:
        stack = _read_stack(self, self.linears[block])
        return stack if isinstance(stack, str) else None

    def _project_in(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        site = self._fastpeft
        stack = _read_stack(self, self.linears["attention_in"])
        dtype = stack if isinstance(stack, str) else _dtype_of(x, stack)
        if isinstance(stack, str) or isinstance(dtype, str):
            site.fall_back("attention_in", str(dtype))
            shape = (*x.shape[:-1], -1, self.head_dim)
            q, k, v = (getattr(self, name)(x).view(shape).transpose(1, 2) for name in self.linears["attention_in"])
            q, k = type(self).stock_rotary(q, k, cos, sin)
            return q, k, v
        site.fused["attention_in"] += 1
        return attention_in(x, cos, sin, stack, head_dim=self.head_dim, dtype=dtype, impl=site.impl)

    def _project_out(self, x: torch.Tensor) -> torch.Tensor:
        site = self._fastpeft
        stack = _read_stack(self, self.linears["attention_out"])
        dtype = stack if isinstance(stack, str) else _dtype_of(x, stack)
        if isinstance(stack, str) or isinstance(dtype, str):
            site.fall_back("attention_out", str(dtype))
            return self.o_proj(x)  # type: ignore[no-any-return,operator]
        site.fused["attention_out"] += 1
        return attention_out(x, stack[0], dtype=dtype)

    def _attention_options(self) -> dict[str, Any]:
        """Keyword arguments that the family passes to the attention function beyond the common ones."""
        return {}

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        reason = self._may_fuse()
        if reason is not None or position_embeddings is None:
            for block in self.blocks:
                self._fastpeft.fall_back(block, reason or "no position embeddings")
            return super().forward(  # type: ignore[no-any-return]
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        q, k, v = self._project_in(hidden_states, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, type(self).eager_attention)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self._attention_options(),
            **kwargs,
        )
        return self._project_out(out.reshape(*hidden_states.shape[:-1], -1)), weights
