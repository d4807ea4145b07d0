"""The blocks inside ``torch.compile``: each as one operator of ``torch.ops.hf_fastpeft`` and another for its gradient.

A compiled graph sees ``attention_in_forward`` where eager mode runs an autograd Function. The operators run these same
Functions, on a stand-in for autograd's context: the arithmetic exists once. What differs is what a graph may not know:

* Operators are pure. Adapters are laid out anew in each, forward and backward; weights that lie behind each other are
  found when the operator runs. Results share no memory, so q, k and v have each their own, and the
  way around attention is not one of them: its gradient is added outside.
* What a Function saves beyond its arguments is a further result of the operator, and the gradient's argument.
* A list of tensors that autograd follows holds no None, so ``given`` says which of the Function's arguments it holds.

What the caller reads off the layers to call an operator is read while ``torch.compile`` traces, and guarded by it: an
adapter that is switched, merged, disabled or scaled later is traced again.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from hf_fastpeft.blocks._function import tokens
from hf_fastpeft.blocks.adapters import SideCache
from hf_fastpeft.blocks.attention import _AttentionIn, _AttentionOut
from hf_fastpeft.blocks.attention import _Layout as _AttentionLayout
from hf_fastpeft.blocks.bundle import Bundle
from hf_fastpeft.blocks.layout import Stack, make_bias, make_side, slices
from hf_fastpeft.blocks.mlp import _MLP
from hf_fastpeft.blocks.mlp import _Layout as _MLPLayout
from hf_fastpeft.blocks.projection import Plan, make_plan, side_dtype_of
from hf_fastpeft.lowrank import TENSORS_PER_LINEAR, LowRank
from hf_fastpeft.ops._backend import TWICE, Impl, define_op, use_triton
from hf_fastpeft.ops.glu import Activation
from hf_fastpeft.ops.rms_norm import Norm, _RMSNorm

__all__ = ["attention_in", "attention_out", "mlp", "rms_norm"]

Slots = list[torch.Tensor | None]  # a Function's tensors: its own, then those of its linears
Factors = Sequence[float]  # scaling and gate_scale of one linear after the other
NEW = -1  # in the list of what a Function saves: nothing that it was given


class _Call(NamedTuple):
    """One call of a Function.

    Attributes:
        arguments: what it takes between its own tensors and those of its linears.
        context: what its forward leaves on the context for its backward, beside the tensors.
        new: for each tensor that it makes and saves, in this order, whether it does so here.
        dtype: of the first tensor that it saves, its input as contiguous rows; None for the input's.
    """

    arguments: tuple[Any, ...]
    context: dict[str, Any]
    new: tuple[bool, ...]
    dtype: torch.dtype | None = None


def _define(
    name: str,
    options: str,
    function: Any,
    call: Callable[..., _Call],
    *,
    own: int,
    saved: tuple[int, ...],
    results: int = 1,
    around: int | None = None,
) -> Callable[..., Any]:
    """The operator ``<name>_forward``, with ``<name>_backward`` as its gradient.

    Args:
        name: of the block.
        options: in the notation of ``torch.library``; what ``call`` takes after the tensors.
        function: the autograd Function.
        call: the arguments of the Function from its tensors and the options.
        own: how many tensors it takes before its linears'.
        saved: where each tensor that it saves before its linears' comes from: the place among its own, or ``NEW``.
        results: how many tensors it returns.
        around: the place of a tensor that is added to the result and has its gradient.
    """

    def forward(tensors: list[torch.Tensor], given: list[bool], *options: Any) -> list[torch.Tensor]:
        slots = _spread(tensors, given)
        arguments = call(slots, *options).arguments
        ctx = _Context([False] * (len(slots) + len(arguments)))
        out = function.forward(ctx, *slots[:own], *arguments, *slots[own:])
        kept = [t for t, source in zip(ctx.saved_tensors, saved, strict=False) if source == NEW and t is not None]
        return [*(out if isinstance(out, tuple) else (out,)), *kept]

    def gradient(
        d_outs: list[torch.Tensor],
        tensors: list[torch.Tensor],
        kept: list[torch.Tensor],
        given: list[bool],
        needs: list[bool],
        *options: Any,
    ) -> list[torch.Tensor]:
        slots = _spread(tensors, given)
        arguments, context, new, dtype = call(slots, *options)
        made = iter(_spread(kept, new))
        first, *others = (next(made) if source == NEW else slots[source] for source in saved)
        assert first is not None
        ctx = SimpleNamespace(
            needs_input_grad=(*needs[:own], *(False for _ in arguments), *needs[own:]),
            saved_tensors=(tokens(first, dtype), *others, *slots[own:]),
            **context,
        )
        with torch.no_grad():
            found = function.backward.__wrapped__(ctx, *d_outs)  # the operator's own gradient refuses a second one
        found = (*found[:own], *found[own + len(arguments) :])
        return _unshared([d for d, needed in zip(found, needs, strict=True) if needed])

    backward_op = define_op(
        f"{name}_backward(Tensor[] d_outs, Tensor[] tensors, Tensor[] kept, bool[] given, bool[] needs, {options}) "
        "-> Tensor[]",
        gradient,
        gradient,
        setup_context=lambda ctx, inputs, output: None,
        backward=_twice,
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
        tensors, ctx.given, *ctx.options = inputs
        ctx.shapes = [t.shape for t in tensors]
        ctx.mark_non_differentiable(*output[results:])
        ctx.save_for_backward(*tensors, *output[results:])

    def backward(ctx: Any, d_outs: list[torch.Tensor]) -> tuple[Any, ...]:
        needs, given, n = [*ctx.needs_input_grad[0]], ctx.given, len(ctx.shapes)
        grads: list[torch.Tensor | None] = [None] * n
        if around is not None and given[around]:
            i = sum(given[:around])
            if needs[i]:
                grads[i], needs[i] = d_outs[0].view(ctx.shapes[i]), False
        tensors, kept = list(ctx.saved_tensors[:n]), list(ctx.saved_tensors[n:])
        wanted = [bool(need) for need in _spread(needs, given)]
        if any(wanted):
            found = iter(backward_op(d_outs[:results], tensors, kept, given, wanted, *ctx.options))
            grads = [next(found) if need else d for need, d in zip(needs, grads, strict=True)]
        # torch takes an empty list for one of tensors (2.13)
        return grads, None, *([] if option == [] else None for option in ctx.options)

    return define_op(
        f"{name}_forward(Tensor[] tensors, bool[] given, {options}) -> Tensor[]",
        forward,
        forward,
        setup_context=setup_context,
        backward=backward,
    )


def _twice(*_: Any) -> None:
    raise RuntimeError(TWICE)


class _Context:
    """Stands in for autograd's context in a forward."""

    def __init__(self, needs_input_grad: list[bool]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[torch.Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors


def _spread(values: Sequence[Any], given: Sequence[bool]) -> list[Any]:
    """``values`` at the places that are given, None at the others."""
    left = iter(values)
    return [next(left) if here else None for here in given]


def _unshared(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of those that lie in the memory of one before them: the gradients of several A are one product."""
    seen: set[int] = set()
    found = []
    for tensor in tensors:
        place = tensor.untyped_storage()._cdata
        found.append(tensor.clone() if place in seen else tensor)
        seen.add(place)
    return found


def _stack_of(tensors: Slots, factors: Factors) -> list[LowRank]:
    stack = []
    for i in range(len(tensors) // TENSORS_PER_LINEAR):
        weight, *others = tensors[i * TENSORS_PER_LINEAR : (i + 1) * TENSORS_PER_LINEAR]
        assert weight is not None
        stack.append(LowRank(weight, *others, *factors[2 * i : 2 * i + 2]))  # type: ignore[arg-type]
    return stack


def _factors(stack: Stack) -> list[float]:
    return [factor for low in stack for factor in (low.scaling, low.gate_scale)]


def _plan(
    x: torch.Tensor, tensors: Slots, factors: Factors, dtype: torch.dtype, side_dtype: torch.dtype, impl: Impl
) -> Plan:
    stack = _stack_of(tensors, factors)
    if not isinstance(x, FakeTensor):
        return make_plan(stack, dtype, impl, x, None, side_dtype=side_dtype)
    # a trace asks for shapes alone, and those of the adapters may be symbols
    return Plan(
        dtype,
        side_dtype,
        impl,
        use_triton(impl, x),
        tuple((low.scaling, low.gate_scale, 0.0) for low in stack),
        make_side(stack, side_dtype, fill=False),
        None,
        make_bias(stack, dtype),
        slices(stack),
    )


def _packed(tensors: Slots) -> tuple[list[torch.Tensor], list[bool]]:
    return [t for t in tensors if t is not None], [t is not None for t in tensors]


PRODUCTS = "str impl, ScalarType dtype, ScalarType side_dtype, float[] factors"
NORMS = "float[] eps, bool[] unit_offset"  # of those norms that are given, in their order


def _attention_in_call(
    slots: Slots,
    impl: Impl,
    dtype: torch.dtype,
    side_dtype: torch.dtype,
    factors: Factors,
    head_dim: int,
    heads: Sequence[int],
    eps: Sequence[float],
    unit_offset: Sequence[bool],
) -> _Call:
    h, norm, q_norm, *_ = slots
    assert h is not None
    kinds = tuple(zip(eps, unit_offset, strict=True))
    layout = _AttentionLayout(
        head_dim,
        (heads[0], heads[1]),
        None if norm is None else kinds[0],
        None if q_norm is None else kinds[-2:],
        residual=False,
        apart=True,
    )
    plan = _plan(h, slots[6:], factors, dtype, side_dtype, impl)
    made = (norm is not None, *(q_norm is not None,) * 3, plan.side is not None)
    context = {"layout": layout, "plan": plan, "draw": None, "h_shape": h.shape, "h_dtype": h.dtype}
    return _Call((layout, plan), context, made, dtype if norm is None else None)


def _attention_out_call(
    slots: Slots, impl: Impl, dtype: torch.dtype, side_dtype: torch.dtype, factors: Factors
) -> _Call:
    x, *_ = slots
    assert x is not None
    plan = _plan(x, slots[2:], factors, dtype, side_dtype, impl)
    context = {"plan": plan, "draw": None, "x_shape": x.shape, "x_dtype": x.dtype}
    return _Call((plan,), context, (plan.side is not None,), dtype)


def _mlp_call(
    slots: Slots,
    impl: Impl,
    dtype: torch.dtype,
    side_dtype: torch.dtype,
    factors: Factors,
    down_side_dtype: torch.dtype,
    activation: Activation,
    residual: bool,
    eps: Sequence[float],
    unit_offset: Sequence[bool],
) -> _Call:
    h, norm, *tensors = slots
    assert h is not None
    first = len(tensors) - TENSORS_PER_LINEAR
    layout = _MLPLayout(activation, None if norm is None else (eps[0], unit_offset[0]), residual)
    plan = _plan(h, tensors[:first], factors[:-2], dtype, side_dtype, impl)
    down_plan = _plan(h, tensors[first:], factors[-2:], dtype, down_side_dtype, impl)
    context = {
        "layout": layout,
        "plans": (plan, down_plan),
        "first": first,
        "draw": None,
        "down_draw": None,
        "h_shape": h.shape,
        "h_dtype": h.dtype,
    }
    made = (norm is not None, True, plan.side is not None, down_plan.side is not None)
    return _Call((layout, plan, down_plan), context, made, dtype if norm is None else None)


def _rms_norm_call(slots: Slots, impl: Impl, eps: float, unit_offset: bool) -> _Call:
    return _Call((eps, unit_offset, impl), {"unit_offset": unit_offset, "impl": impl}, (True,))


_attention_in = _define(
    "attention_in",
    f"{PRODUCTS}, int head_dim, int[] heads, {NORMS}",
    _AttentionIn,
    _attention_in_call,
    own=6,
    saved=(0, 1, NEW, 2, 3, NEW, NEW, NEW, NEW, 4, 5),
    results=3,
)
_attention_out = _define(
    "attention_out", PRODUCTS, _AttentionOut, _attention_out_call, own=2, saved=(0, NEW), around=1
)
_mlp = _define(
    "mlp",
    f"{PRODUCTS}, ScalarType down_side_dtype, str activation, bool residual, {NORMS}",
    _MLP,
    _mlp_call,
    own=2,
    saved=(0, 1, NEW, NEW, NEW, NEW),
)
_rms_norm = _define(
    "norm", "str impl, float eps, bool unit_offset", _RMSNorm, _rms_norm_call, own=2, saved=(0, 1, NEW)
)


def _kinds(*norms: Norm | None) -> tuple[list[float], list[bool]]:
    given = [norm for norm in norms if norm is not None]
    return [norm.eps for norm in given], [norm.unit_offset for norm in given]


def _weight(norm: Norm | None) -> torch.Tensor | None:
    return None if norm is None else norm.weight


def attention_in(
    h: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    stack: Bundle,
    *,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    norm: Norm | None = None,
    qk_norm: tuple[Norm, Norm] | None = None,
    residual: bool = False,
    impl: Impl = "auto",
    adapters: SideCache | None = None,
) -> tuple[torch.Tensor, ...]:
    """:func:`hf_fastpeft.blocks.attention_in` as an operator; ``adapters`` is not used."""
    q_norm, k_norm = (None, None) if qk_norm is None else qk_norm
    weights = (_weight(norm), _weight(q_norm), _weight(k_norm))
    q, k, v, *_ = _attention_in(
        *_packed([h, *weights, cos, sin, *stack.flat]),
        impl,
        dtype,
        side_dtype_of(stack, dtype),
        _factors(stack),
        head_dim,
        list(heads),
        *_kinds(norm, q_norm, k_norm),
    )
    return (q, k, v, h) if residual else (q, k, v)


def attention_out(
    x: torch.Tensor,
    linear: Bundle,
    *,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    impl: Impl = "auto",
    adapters: SideCache | None = None,
) -> torch.Tensor:
    """:func:`hf_fastpeft.blocks.attention_out` as an operator; ``adapters`` is not used."""
    tensors, given = _packed([x, residual, *linear.flat])
    out_TO, *_ = _attention_out(tensors, given, impl, dtype, side_dtype_of(linear, dtype), _factors(linear))
    return out_TO.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


def mlp(
    h: torch.Tensor,
    stack: Bundle,
    down: Bundle,
    *,
    dtype: torch.dtype,
    activation: Activation = "silu",
    norm: Norm | None = None,
    residual: bool = False,
    impl: Impl = "auto",
    adapters: SideCache | None = None,
) -> torch.Tensor:
    """:func:`hf_fastpeft.blocks.mlp` as an operator; ``adapters`` is not used."""
    out_TI, *_ = _mlp(
        *_packed([h, _weight(norm), *stack.flat, *down.flat]),
        impl,
        dtype,
        side_dtype_of(stack, dtype),
        [*_factors(stack), *_factors(down)],
        side_dtype_of(down, dtype),
        activation,
        residual,
        *_kinds(norm),
    )
    return out_TI.view(*h.shape[:-1], -1)  # type: ignore[no-any-return]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, unit_offset: bool = False, impl: Impl = "auto"
) -> torch.Tensor:
    """:func:`hf_fastpeft.ops.rms_norm.rms_norm` as an operator."""
    out_ND, *_ = _rms_norm([x.reshape(-1, x.shape[-1]), weight], [True, True], impl, eps, unit_offset)
    return out_ND.view(x.shape)  # type: ignore[no-any-return]
