"""The frozen head: against plain log-softmax in float64, and against TRL's own function."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import FLOAT64_REL, assert_no_worse, rel_err
from ops.operators import DEVICE

from hf_fastpeft.blocks import lm_head
from hf_fastpeft.blocks.lm_head import HeadOptions, lm_head_log_probs
from hf_fastpeft.ops.vocab_fold import VocabStats, fold, fold_torch


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles each way, at sizes a test can afford."""
    monkeypatch.setattr(lm_head, "TILES", {"cuda": (4, 7), "cpu": (4, 7)})


def inputs(n, hidden, vocab, dtype=torch.float64, bias=True, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, hidden, generator=g, dtype=torch.float64).mul(scale).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=g, dtype=torch.float64).to(dtype)
    b = torch.randn(vocab, generator=g, dtype=torch.float64).to(dtype) if bias else None
    return h, weight, b, torch.randint(0, vocab, (n,), generator=g)


def plain(h, weight, bias, targets, options):
    z = torch.nn.functional.linear(h, weight, bias) * options.scale
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    z = z / options.temperature
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    target = log_p.gather(1, targets[:, None])[:, 0]
    return target, entropy, (2 * log_p).logsumexp(-1), z.mean(-1), z.argmax(-1) == targets


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # the entropy: 0 * -inf, as in stock
def test_a_tile_of_nothing_but_minus_infinity_counts_nothing(impl):
    h, weight, b, _ = inputs(4, 5, 20, dtype=torch.float32)
    h, weight, b = h.detach().to(DEVICE).requires_grad_(), weight.to(DEVICE), b.to(DEVICE)
    b[:7] = -torch.inf  # the whole first tile
    targets = torch.tensor([7, 8, 19, 12], device=DEVICE)
    options = HeadOptions()
    want, got = (
        plain(h, weight, b, targets, options)[0],
        lm_head_log_probs(h, weight, b, targets, dtype=torch.float32, options=options, impl=impl).log_probs,
    )
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(x.sum(), h)[0] for x in (got, want)]
    torch.testing.assert_close(*gradients)


OPTIONS = st.builds(
    HeadOptions,
    scale=st.sampled_from([1.0, 0.3]),
    softcap=st.sampled_from([None, 5.0]),
    temperature=st.sampled_from([1.0, 0.7]),
)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 9), vocab=st.integers(1, 20), bias=st.booleans(), options=OPTIONS, seed=st.integers(0, 999))
def test_every_output_and_gradient_in_float64(n, vocab, bias, options, seed):
    h, weight, b, targets = inputs(n, 5, vocab, bias=bias, seed=seed)
    want = plain(h, weight, b, targets, options)
    got = lm_head_log_probs(h, weight, b, targets, dtype=torch.float64, options=options)
    for name, g, w in zip(got._fields, got, want, strict=True):
        if name == "is_top1":
            assert torch.equal(g, w)
        else:
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
    for name, parts in {"log_probs": (0,), "entropy": (1,), "both": (0, 1)}.items():
        weights = torch.linspace(-1, 2, n, dtype=torch.float64)
        (d_want,) = torch.autograd.grad(sum((want[i] * weights).sum() for i in parts), h, retain_graph=True)
        (d_got,) = torch.autograd.grad(sum((got[i] * weights).sum() for i in parts), h, retain_graph=True)
        assert (d_got - d_want).norm() <= FLOAT64_REL * max(1.0, d_want.norm().item()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_error_is_no_worse_than_logits_and_log_softmax(dtype, scale):
    h, weight, _, targets = inputs(64, 32, 200, dtype, bias=False, scale=scale)
    exact_h = h.detach().double().requires_grad_()
    want = plain(exact_h, weight.double(), None, targets, HeadOptions())[0]
    stock_h = h.detach().clone().requires_grad_()
    base = torch.nn.functional.linear(stock_h, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    got = lm_head_log_probs(h, weight, None, targets, dtype=dtype).log_probs
    assert_no_worse("log_probs", got, base, want.detach())
    for loss in (got.sum(), base.sum(), want.sum()):
        loss.backward()
    assert h.grad.dtype == dtype
    assert_no_worse("d_hidden", h.grad, stock_h.grad, exact_h.grad)


@pytest.mark.parametrize("margin", [0, 6, 10, 13, 16, 18, 20, 24])
@pytest.mark.parametrize("loss_scale", [1.0, 2.0**10, 2.0**16])
@pytest.mark.parametrize("hidden_dtype", [torch.float16, torch.float32])
def test_sure_tokens_in_float16_are_as_exact_as_stocks(margin, loss_scale, hidden_dtype):
    """Also where a target is ahead of all others by so much that float16 keeps little of its row's gradient.

    All logits are exact, or their own rounding would hide every other.
    """
    g, n, vocab, size = torch.Generator().manual_seed(0), 8, 48, 2.0**-5
    mixed = torch.randint(-8, 9, (vocab, 8), generator=g) / 8
    weight = (torch.cat([torch.eye(vocab), mixed], 1) * size).to(DEVICE, torch.float16)
    targets = torch.randint(0, vocab, (n,), generator=g)
    h = torch.cat([torch.randint(-8, 9, (n, vocab), generator=g) / 8, torch.zeros(n, 8)], 1)
    h[torch.arange(n), targets] += margin
    h, targets = (h / size).to(DEVICE, hidden_dtype), targets.to(DEVICE)
    logits = torch.nn.functional.linear(h.half(), weight)
    assert torch.equal(logits.double(), h.double() @ weight.double().t())
    exact_h, stock_h, our_h = (t.requires_grad_() for t in (h.double(), h.clone(), h.clone()))
    stock = torch.nn.functional.linear(stock_h.half(), weight).float().log_softmax(-1)
    stock = stock.gather(1, targets[:, None])[:, 0]
    exact = plain(exact_h, weight.double(), None, targets, HeadOptions())[0]
    ours = lm_head_log_probs(our_h, weight, None, targets, dtype=torch.float16).log_probs
    for log_probs in (exact, stock, ours):
        (-log_probs.mean() * loss_scale).backward()
    assert_no_worse("log_probs", ours, stock, exact)
    assert_no_worse("d_hidden", our_h.grad.half(), stock_h.grad.half(), exact_h.grad)


def test_a_token_beyond_doubt_has_no_gradient():
    """The other entries' probabilities are zeros in float32."""
    h = torch.tensor([[200.0]], requires_grad=True)
    lm_head_log_probs(h, torch.tensor([[1.0], [-1.0]]), None, torch.tensor([0]), dtype=h.dtype).log_probs.backward()
    assert h.grad.item() == 0


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_agrees_with_trls_function(softcap):
    from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction

    h, weight, bias, targets = inputs(11, 6, 23, torch.float32)
    theirs_h = h.detach().clone().requires_grad_()
    theirs = ChunkedLogProbFunction.apply(theirs_h, weight, bias, targets, 0.8, 10, softcap, 1.3, OPTIONAL_OUTPUTS)
    ours = lm_head_log_probs(h, weight, bias, targets, dtype=torch.float32, options=HeadOptions(1.3, softcap, 0.8))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for out in (ours, theirs):
        (out[0].sum() - 0.2 * out[1].sum()).backward()
    assert rel_err(h.grad, theirs_h.grad) < 1e-5


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 4),
    cols=st.sampled_from([1, 5, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 999),
)
def test_kernel_folds_as_torch_does(n, cols, dtype, softcap, seed):
    g = torch.Generator().manual_seed(seed)
    rtol = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    chunks = [torch.randn(n, cols, generator=g).mul(4).to(DEVICE, dtype) for _ in range(3)]
    chunks[1][:, 0] = chunks[0].max()  # a tie: the first index counts
    targets = torch.randint(0, 3 * cols, (n,), generator=g).to(DEVICE)
    ours, theirs = (VocabStats.empty(n, torch.float32, targets.device) for _ in range(2))
    for i, z in enumerate(chunks):
        want_e, want_r = fold_torch(z, targets, i * cols, theirs, 0.9, softcap)
        e, r = fold(z.clone(), targets, i * cols, ours, scale=0.9, softcap=softcap, impl="triton")
        torch.testing.assert_close(e, want_e, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(r, want_r)
    for name in VocabStats.__slots__:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)


def test_a_confident_token_keeps_its_small_gradient():
    """p of the target within 1e-7 of one: the gradient is tiny, and not lost to cancellation."""
    weight = torch.eye(8) * 1.0
    h = torch.zeros(1, 8)
    h[0, 2] = 16.0
    exact = h.double().requires_grad_()
    plain(exact, weight.double(), None, torch.tensor([2]), HeadOptions())[0].sum().backward()
    h.requires_grad_()
    lm_head_log_probs(h, weight, None, torch.tensor([2]), dtype=torch.float32).log_probs.sum().backward()
    assert rel_err(h.grad, exact.grad) < 1e-5


def test_a_trained_head_is_refused():
    h, weight, _, targets = inputs(2, 3, 4)
    with pytest.raises(ValueError, match="the head is trained"):
        lm_head_log_probs(h, weight.requires_grad_(), None, targets, dtype=torch.float64)
