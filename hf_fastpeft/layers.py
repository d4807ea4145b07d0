"""Fast forwards for the modules of a Llama-like decoder layer and the layer itself, as mixins over Hugging Face's
own classes.

A family file combines each with its stock class: ``class FastLlamaMLP(FastMLP, LlamaMLP)``. ``patch_model`` then sets
``module.__class__`` and gives the module a :class:`~hf_fastpeft.fast_module.Site`; nothing else about the module
changes. Every forward asks, per call, whether the block can do exactly what the stock modules would do now, and runs
the stock forward where it cannot. The layer runs its norms and residuals inside the blocks of its attention and MLP;
where it is not patched, or somebody listens to these modules, each runs its own block.
"""

from collections.abc import Callable, Collection
from functools import partial
from inspect import signature
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_fastpeft.blocks import attention_in, attention_out, compiled, mlp
from hf_fastpeft.blocks.bundle import Bundle
from hf_fastpeft.fast_module import FastModule
from hf_fastpeft.hooks import foreign_code, intercepted
from hf_fastpeft.lowrank import is_plain, read
from hf_fastpeft.ops.glu import Activation
from hf_fastpeft.ops.rms_norm import Norm, rms_norm
from hf_fastpeft.routing import Route
from hf_fastpeft.watch import Watch

__all__ = ["CACHE_NAMES", "FastAttention", "FastBackbone", "FastDecoderLayer", "FastMLP", "FastRMSNorm"]

FOREIGN = "foreign"  # what :meth:`FastBackbone._read` is asked for
KNOWN_ATTENTION = ("torch.", "transformers.")  # modules of attention functions that write to nobody's parameters
REFUSED = "arguments that stock refuses"
DROPPED = "dropout inside torch.compile"
CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument


def _cache_name(stock: type[nn.Module]) -> str | None:
    """What the stock class's forward calls the cache; None if by none of the known names."""
    parameters = signature(stock.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def _read_stack(owner: nn.Module, names: tuple[str, ...], watch: Watch) -> Bundle | str:
    records = []
    for name in names:
        record = read(watch.item(owner.__dict__["_modules"], name), watch)
        if isinstance(record, str):
            return f"{name}: {record}"
        records.append(record)
    return Bundle(records)


def _dtype_of(x: torch.Tensor, bundles: tuple[Bundle, ...]) -> torch.dtype | str:
    found = {bundle.dtype_for(x) for bundle in bundles}
    dtype = found.pop() if len(found) == 1 else None
    if torch.compiler.is_compiling() and any(low.dropout > 0 for bundle in bundles for low in bundle):
        return DROPPED
    return dtype if dtype is not None else f"mixed dtypes: input {x.dtype}, weights {bundles[0][0].weight.dtype}"


def _restored(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward: its class is stock's again after ``restore()``, while others may hold ours."""
    return type(module).forward(module, *args, **kwargs)


def _only_argument(module: FastModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The one tensor that the module is called with, by position or by stock's name for it; None otherwise."""
    if len(args) == 1 and not kwargs:
        (given,) = args
    else:
        stock: Any = module.stock_class()
        given = kwargs.get([*signature(stock.forward).parameters][1]) if len(kwargs) == 1 and not args else None
    return given if isinstance(given, torch.Tensor) else None


class FastRMSNorm(FastModule):
    """RMSNorm in one kernel each way; keeps its input and one float a row."""

    blocks = ("rms_norm",)
    eps_name: ClassVar[str] = "variance_epsilon"
    unit_offset: ClassVar[bool] = False  # Gemma: times 1 + weight, rounded once
    weight: torch.Tensor

    def obstacle(self, block: str) -> str | None:
        weight = self.weight
        if not is_plain(weight):
            return f"weight is a {type(weight).__name__}"
        if weight.is_meta:
            return "weight is on the meta device (offloaded)"
        # stock rounds to float32 here: only its own order of operations is equal to float64's last digits
        return "float64 model (stock computes this norm in float32)" if weight.dtype == torch.float64 else None

    def parameters_of(self) -> Norm:
        """What a block needs to run this norm itself; counts as a fused call."""
        self._fastpeft.fuse("rms_norm")
        return Norm(self.weight, getattr(self, self.eps_name), self.unit_offset)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(self, FastRMSNorm):
            return _restored(self, *args, **kwargs)
        hidden_states = _only_argument(self, args, kwargs)
        reason = REFUSED if hidden_states is None else self._may_fuse() or self.obstacle("rms_norm")
        if hidden_states is None or reason is not None:
            self._fastpeft.fall_back("rms_norm", str(reason))
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        weight, eps, unit_offset = self.parameters_of()
        run = compiled.rms_norm if torch.compiler.is_compiling() else rms_norm
        return run(hidden_states, weight, eps, unit_offset=unit_offset, impl=self._fastpeft.impl)


def _foldable(norm: nn.Module | None) -> bool:
    """Whether a block may run this norm in its stead."""
    return isinstance(norm, FastRMSNorm) and norm.obstacle("rms_norm") is None and intercepted(norm) is None


class FastMLP(FastModule):
    """gate, up, activation and down in one autograd Function."""

    blocks = ("mlp",)
    linears: ClassVar[dict[str, tuple[str, ...]]] = {"mlp": ("gate_proj", "up_proj"), "mlp_down": ("down_proj",)}
    activation_name: ClassVar[str] = "act_fn"
    activations: ClassVar[dict[str, Activation]] = {
        "SiLU": "silu",
        "SiLUActivation": "silu",
        "GELUTanh": "gelu_tanh",
        "NewGELUActivation": "gelu_tanh",
        "GELUActivation": "gelu",
    }

    def _activation(self) -> nn.Module:
        return getattr(self, self.activation_name)  # type: ignore[no-any-return]

    def _read(self, block: str, watch: Watch) -> tuple[Bundle, ...] | str:
        act = self._activation()
        watch.item(self.__dict__["_modules"], self.activation_name)
        if watch.kind(act).__name__ not in self.activations:
            return f"activation {type(act).__name__}"
        if reason := intercepted(act, watch):
            return reason
        stack = _read_stack(self, self.linears["mlp"], watch)
        if isinstance(stack, str):
            return stack
        down = _read_stack(self, self.linears["mlp_down"], watch)
        return down if isinstance(down, str) else (stack, down)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(self, FastMLP):
            return _restored(self, *args, **kwargs)
        x = _only_argument(self, args, kwargs)
        if x is None:
            self._fastpeft.fall_back("mlp", REFUSED)
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        return self.run(x)

    def run(self, h: torch.Tensor, norm: nn.Module | None = None, *, residual: bool = False) -> torch.Tensor:
        """The module's output for ``norm(h)``, plus ``h`` where ``residual`` is asked for."""
        site = self._fastpeft
        stacks = self._may_fuse() or self._bundles("mlp")
        dtype = stacks if isinstance(stacks, str) else _dtype_of(h, stacks)
        fold = not isinstance(dtype, str) and _foldable(norm)
        x = h if norm is None or fold else norm(h)
        if isinstance(stacks, str) or isinstance(dtype, str):
            site.fall_back("mlp", str(dtype))
            out = super().forward(x)
            return h + out if residual else out  # type: ignore[no-any-return]
        site.fuse("mlp")
        stack, down = stacks
        act = self.activations[type(self._activation()).__name__]
        parameters = norm.parameters_of() if fold and isinstance(norm, FastRMSNorm) else None
        block = compiled.mlp if torch.compiler.is_compiling() else mlp
        out = block(
            x,
            stack,
            down,
            dtype=dtype,
            activation=act,
            norm=parameters,
            residual=residual and fold,
            impl=site.impl,
            adapters=site.adapters,
        )
        return h + out if residual and not fold else out


class FastAttention(FastModule):
    """q, k and v with their rotary embedding in one autograd Function, the output projection in another.

    The attention call between them, with its masks and caches, stays Hugging Face's.
    """

    blocks = ("attention_in", "attention_out")
    linears: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention_in": ("q_proj", "k_proj", "v_proj"),
        "attention_out": ("o_proj",),
    }
    qk_norms: ClassVar[tuple[str, str] | None] = None  # norms of queries and keys over head_dim
    # what the family passes to the attention function beyond the common arguments: keyword -> attribute of the module
    attention_options: ClassVar[dict[str, str]] = {}
    # the family's own helpers, for the parts that run stock
    eager_attention: ClassVar[Callable[..., Any]]
    stock_rotary: ClassVar[Callable[..., Any]]
    cache_name: ClassVar[str | None] = None
    _positional: ClassVar[tuple[str, ...]] = ()
    config: Any
    head_dim: int
    layer_idx: int
    scaling: float
    attention_dropout: float

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls.stock_class()
        if stock in cls.__bases__:
            cls.cache_name = _cache_name(stock)
            cls._positional = tuple(signature(stock.forward).parameters)[1:-1]

    @classmethod
    def foreign_arguments(cls) -> str | None:
        return _foreign_arguments(cls, {"hidden_states", "position_embeddings", "attention_mask", cls.cache_name})

    def _read(self, block: str, watch: Watch) -> tuple[Bundle, ...] | str:
        reason = self._qk_obstacle(watch) if block == "attention_in" else None
        stack = reason or _read_stack(self, self.linears[block], watch)
        return stack if isinstance(stack, str) else (stack,)

    def _qk_obstacle(self, watch: Watch) -> str | None:
        for name in self.qk_norms or ():
            norm = watch.item(self.__dict__["_modules"], name)
            watch.kind(norm)
            if not isinstance(norm, FastRMSNorm):
                return f"{name} is {type(norm).__name__}"
            if reason := norm.obstacle("rms_norm") or intercepted(norm, watch):
                return f"{name}: {reason}"
            watch.parameter(norm, "weight")
            watch.data(norm.weight)
        return None

    def _heads(self) -> tuple[int, int]:
        return self.config.num_attention_heads, self.config.num_key_value_heads

    def _project_in(
        self, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: nn.Module | None, *, residual: bool = True
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys, values and the hidden states for the way around."""
        site = self._fastpeft
        stacks = self._bundles("attention_in")
        dtype = stacks if isinstance(stacks, str) else _dtype_of(h, stacks)
        fold = not isinstance(dtype, str) and _foldable(norm)
        x = h if norm is None or fold else norm(h)
        if isinstance(stacks, str) or isinstance(dtype, str):
            site.fall_back("attention_in", str(dtype))
            return *self._stock_in(x, cos, sin), h
        site.fuse("attention_in")
        qk_norm = None
        if self.qk_norms is not None:
            q_norm, k_norm = (getattr(self, name).parameters_of() for name in self.qk_norms)
            qk_norm = q_norm, k_norm
        parameters = norm.parameters_of() if fold and isinstance(norm, FastRMSNorm) else None
        block = compiled.attention_in if torch.compiler.is_compiling() else attention_in
        found = block(
            x,
            cos,
            sin,
            stacks[0],
            heads=self._heads(),
            head_dim=self.head_dim,
            dtype=dtype,
            norm=parameters,
            qk_norm=qk_norm,
            residual=fold and residual,
            impl=site.impl,
            adapters=site.adapters,
        )
        return found if fold and residual else (*found, h)

    def _stock_in(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outs = [getattr(self, name)(x) for name in self.linears["attention_in"]]
        if len(outs) == 1:
            (Q, K), D = self._heads(), self.head_dim
            ends = Q * D, (Q + K) * D  # slices, as stock's: the results of split() may not be written to
            outs = [outs[0][..., : ends[0]], outs[0][..., ends[0] : ends[1]], outs[0][..., ends[1] :]]
        q, k, v = (out.view(*x.shape[:-1], -1, self.head_dim) for out in outs)
        if self.qk_norms is not None:
            q, k = (getattr(self, name)(t) for name, t in zip(self.qk_norms, (q, k), strict=True))
        q, k = type(self).stock_rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q, k, v.transpose(1, 2)

    def _project_out(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        site = self._fastpeft
        stacks = self._bundles("attention_out")
        dtype = stacks if isinstance(stacks, str) else _dtype_of(x, stacks)
        if isinstance(stacks, str) or isinstance(dtype, str):
            site.fall_back("attention_out", str(dtype))
            out = self.o_proj(x)  # type: ignore[operator]
            return out if residual is None else residual + out  # type: ignore[no-any-return]
        site.fuse("attention_out")
        block = compiled.attention_out if torch.compiler.is_compiling() else attention_out
        return block(x, stacks[0], dtype=dtype, residual=residual, impl=site.impl, adapters=site.adapters)

    def _attention_options(self) -> dict[str, Any]:
        """Keyword arguments that the family passes to the attention function beyond the common ones."""
        return {name: attrgetter(path)(self) for name, path in self.attention_options.items()}

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(self, FastAttention):
            return _restored(self, *args, **kwargs)
        given = {**dict(zip(self._positional, args, strict=False)), **kwargs}
        reason = self._may_fuse() or self._argument_obstacle(given, len(args) + len(kwargs))
        if reason is not None:
            for block in self.blocks:
                self._fastpeft.fall_back(block, reason)
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]
        return self.run(given.pop("hidden_states"), given.pop("position_embeddings"), **given)

    def _argument_obstacle(self, given: dict[str, Any], count: int) -> str | None:
        """Why stock must make sense of these arguments: one is missing, given twice, or by a deprecated name."""
        if len(given) != count or given.get("hidden_states") is None:
            return REFUSED
        if given.get("position_embeddings") is None:
            return "no position embeddings"
        given.setdefault("attention_mask", None)
        return _other_cache(given, self.cache_name)

    def run(
        self,
        h: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        *,
        norm: nn.Module | None = None,
        residual: bool = False,
        route: Route | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The module's output for ``norm(h)``, plus ``h`` where ``residual`` is asked for, and the attention weights.

        ``h`` is what the route lets in, the result what it lets go on.
        """
        site = self._fastpeft
        cos, sin = position_embeddings if route is None else map(route.table, position_embeddings)
        q, k, v, around = self._project_in(h, cos, sin, norm, residual=residual)
        if route is not None:
            q, k, v = route.spread(q), route.spread(k), route.spread(v)
            around = route.narrow(around, self) if residual else around
        cache = kwargs.pop(str(self.cache_name), None)
        if cache is not None:
            options = {"kwargs": kwargs} if self.cache_name == "cache" else {}
            k, v = cache.update(k, v, self.layer_idx, **options)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, type(self).eager_attention)
        function = attend.func if isinstance(attend, partial) else attend  # transformers' way with kernels of a hub
        if not str(getattr(function, "__module__", None)).startswith(KNOWN_ATTENTION):
            site.adapters.distrust()
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
        out = out.reshape(*h.shape[:-1], -1) if route is None else route.leave(out.reshape(*route.shape, -1), self)
        return self._project_out(out, around if residual else None), weights


def _other_cache(given: dict[str, Any], name: str | None) -> str | None:
    """Why a call that names its cache as another release of transformers does is stock's to understand."""
    other = next((other for other in CACHE_NAMES if other != name and other in given), None)
    return None if other is None else f"argument {other!r}"


def _foreign_arguments(fast: type[FastModule], known: Collection[str | None]) -> str | None:
    """Why the fast class cannot stand in for its stock class's forward: it takes other arguments than are known."""
    stock: Any = fast.stock_class()
    found = [p for p in list(signature(stock.forward).parameters.values())[1:] if p.kind is not p.VAR_KEYWORD]
    names = {parameter.name for parameter in found}
    if names == known and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found):
        return None
    return f"{stock.__name__}.forward takes {', '.join(p.name for p in found)}: other arguments than are known"


def _counted_forward(stock: type[nn.Module]) -> Callable[..., Any]:
    """The stock forward inside a new count; with its signature, by which Trainer chooses columns."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # the class is stock's again after restore(), while others may hold this function
        if torch.compiler.is_compiling() or not isinstance(self, FastBackbone) or "_is_replica" in self.__dict__:
            return stock.forward(self, *args, **kwargs)
        adapters = self._fastpeft.adapters
        with adapters.forward(self):
            if self.foreign_code():
                adapters.distrust()
            return stock.forward(self, *args, **kwargs)

    forward.__signature__ = signature(stock.forward)  # type: ignore[attr-defined]
    return forward


class FastBackbone(FastModule):
    """The model without its head: its forward is what the age of the adapters' copies is counted in."""

    def foreign_code(self) -> str | None:
        """Whose code runs in the midst of a forward and may write to what was read before."""
        found = self._bundles(FOREIGN)
        return found if isinstance(found, str) else None

    def _read(self, block: str, watch: Watch) -> tuple[Bundle, ...] | str:
        """For :data:`FOREIGN`: whose code may write to adapters in the midst of a forward."""
        assert block == FOREIGN
        return foreign_code(watch.members(self.__dict__["_modules"]), watch) or ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls.stock_class()
        if stock in cls.__bases__:
            cls.forward = _counted_forward(stock)


class FastDecoderLayer(FastModule):
    """A pre-norm decoder layer whose norms and residuals run inside the blocks of its attention and MLP."""

    attention_norm: ClassVar[str] = "input_layernorm"
    mlp_norm: ClassVar[str] = "post_attention_layernorm"
    # modules between a half's output and its residual; where one of them acts, the residual is added after it
    after_attention: ClassVar[tuple[str, ...]] = ()
    after_mlp: ClassVar[tuple[str, ...]] = ()
    cache_name: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls.stock_class()
        if stock in cls.__bases__:
            cls.cache_name = _cache_name(stock)

    @classmethod
    def foreign_arguments(cls) -> str | None:
        known = {"hidden_states", "attention_mask", "position_ids", "position_embeddings", cls.cache_name}
        return _foreign_arguments(cls, known) and _foreign_arguments(cls, {*known, "use_cache"})

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        fastpeft_route: Route | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not isinstance(self, FastDecoderLayer):
            return _restored(self, hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        reason = self._may_fuse() or _other_cache(kwargs, self.cache_name)
        if reason is not None or args or position_embeddings is None:
            assert fastpeft_route is None
            kwargs["position_embeddings"] = position_embeddings
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        h = hidden_states if fastpeft_route is None else fastpeft_route.enter(hidden_states)
        h = self._attend(h, fastpeft_route, position_embeddings=position_embeddings, **kwargs)
        return self._feed_forward(h)

    def _attend(self, h: torch.Tensor, route: Route | None = None, **kwargs: Any) -> torch.Tensor:
        attention: Any = self.self_attn
        norm = getattr(self, self.attention_norm)
        after = self._acting(self.after_attention)
        if isinstance(attention, FastAttention) and intercepted(attention) is None:
            out, _ = attention.run(h, norm=norm, residual=not after, route=route, **{"attention_mask": None, **kwargs})
            if not after:
                return out
        else:
            taken = {} if route is None else {"route": route}  # only by a FastAttention, or there is none
            out, _ = attention(hidden_states=norm(h), **taken, **kwargs)
        if route is not None:
            h = route.narrow(h, attention)
        for module in after:
            out = module(out)
        return h + out

    def _feed_forward(self, h: torch.Tensor) -> torch.Tensor:
        feed_forward, norm = self.mlp, getattr(self, self.mlp_norm)
        after = self._acting(self.after_mlp)
        if isinstance(feed_forward, FastMLP) and intercepted(feed_forward) is None:
            out = feed_forward.run(h, norm, residual=not after)
            if not after:
                return out
        else:
            out = feed_forward(norm(h))  # type: ignore[operator]
        for module in after:
            out = module(out)
        return h + out

    def _acting(self, names: tuple[str, ...]) -> list[nn.Module]:
        modules = [getattr(self, name) for name in names]
        return [m for m in modules if intercepted(m) or not (type(m) is nn.Dropout and (m.p == 0 or not m.training))]
