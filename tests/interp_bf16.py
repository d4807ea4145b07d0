"""Makes Triton's CPU interpreter compute bfloat16 correctly. Tests only; no effect on compiled kernels.

The interpreter stores bfloat16 as its bit pattern in uint16 and runs integer arithmetic on it, and it truncates
where a GPU rounds to nearest even (https://github.com/triton-lang/triton/issues/11585). Here operands are widened
to float32 before every operation and rounded to nearest even after it.
TODO: drop when the interpreter computes bfloat16 itself.
"""

from functools import wraps

import numpy as np

try:
    import triton.language as tl
    from triton.runtime import interpreter
except ImportError:  # no Triton: nothing to repair, and kernel tests are skipped
    interpreter = None

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def _is_bf16(handle):
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    if not _is_bf16(handle):
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(handle):
    """float32 -> bfloat16, nearest even, NaN kept."""
    data = np.ascontiguousarray(np.asarray(handle.data, dtype=np.float32))
    bits = data.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded = np.where(np.isnan(data), np.uint16(0x7FC0), rounded).astype(np.uint16)
    return interpreter.TensorHandle(rounded.reshape(np.shape(handle.data)), tl.bfloat16)


def install() -> None:
    """Repair the interpreter once per process."""
    if interpreter is None or getattr(interpreter.InterpreterBuilder, "_computes_bf16", False):
        return
    builder = interpreter.InterpreterBuilder
    stock = {
        n: getattr(builder, n)
        for n in ("binary_op", "unary_op", "create_dot", "create_fma", "cast_impl", "create_fp_to_fp")
    }

    @wraps(stock["binary_op"])
    def binary_op(self, lhs, rhs, op):
        if not (_is_bf16(lhs) and _is_bf16(rhs)) or op in BITWISE:
            return stock["binary_op"](self, lhs, rhs, op)
        out = stock["binary_op"](self, _widen(lhs), _widen(rhs), op)
        return interpreter.TensorHandle(out.data, out.dtype) if out.data.dtype == np.bool_ else _round(out)

    @wraps(stock["unary_op"])
    def unary_op(self, arg, op):
        out = stock["unary_op"](self, _widen(arg), op)
        return _round(out) if _is_bf16(arg) else out

    @wraps(stock["create_dot"])
    def create_dot(self, a, b, d, *rest):
        return stock["create_dot"](self, _widen(a), _widen(b), d, *rest)

    @wraps(stock["create_fma"])
    def create_fma(self, x, y, z):
        out = stock["create_fma"](self, _widen(x), _widen(y), _widen(z))
        return _round(out) if _is_bf16(z) else out

    @wraps(stock["cast_impl"])
    def cast_impl(self, src, dst):
        if dst.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return _round(src)
        return stock["cast_impl"](self, src, dst)

    @wraps(stock["create_fp_to_fp"])
    def create_fp_to_fp(self, src, dst, mode):
        if dst.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return _round(src)
        return stock["create_fp_to_fp"](self, src, dst, mode)

    for fn in (binary_op, unary_op, create_dot, create_fma, cast_impl, create_fp_to_fp):
        setattr(builder, fn.__name__, fn)
    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_ext", "create_fp_trunc"):
        setattr(builder, name, lambda self, src, dst: self.cast_impl(src, dst))

    reduce_apply = interpreter.ReduceOps.apply_impl
    reductions = (tl.standard._sum_combine, tl.standard._elementwise_max, tl.standard._elementwise_min)

    @wraps(reduce_apply)
    def apply_impl(self, inputs):
        first = inputs[0] if isinstance(inputs, tuple) else inputs
        if first.dtype.scalar != tl.bfloat16 or self.combine_fn not in reductions:
            return reduce_apply(self, inputs)
        out = reduce_apply(self, tuple(self.to_tensor(_widen(t.handle).data, tl.float32) for t in inputs))
        return self.to_tensor(_round(out.handle).data, tl.bfloat16)

    interpreter.ReduceOps.apply_impl = apply_impl
    builder._computes_bf16 = True
