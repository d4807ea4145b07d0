"""What the operator tests share: running a function with gradients, and the three-way comparison."""

import torch
from numerics import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on cpu the kernels run through Triton's interpreter


def run(fn, inputs, d_outs):
    """Outputs of ``fn`` and the gradients of its floating inputs that are not marked as constants."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outs = fn(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = torch.autograd.grad(outs, leaves, [d.to(o.dtype) for d, o in zip(d_outs, outs, strict=True)])
    return [o.detach() for o in outs] + list(grads)


def compare(names, fn, reference, inputs, d_outs, terms=None):
    """``fn`` against ``reference`` in float64, its error bounded by that of ``reference`` at the inputs' dtype."""
    terms = terms or {}
    want = run(reference, [t.double() for t in inputs], [d.double() for d in d_outs])
    base = run(reference, inputs, d_outs)
    got = run(fn, inputs, d_outs)
    for name, g, b, w in zip(names, got, base, want, strict=True):
        assert g.shape == w.shape
        assert g.dtype == b.dtype
        assert_no_worse(name, g, b, w, terms=terms.get(name, 0.0))
