"The fast path on a CPU: the formula's numbers and gradients in every situation that autograd knows"
import functools
import itertools
import json
import math
import threading
from pathlib import Path

import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastai_smooth.kernels.cpu as cpu
from fastai_smooth.kernels import smooth_binary_cross_entropy, smooth_cross_entropy, smooth_cross_entropy_reference
from fastai_smooth.losses import LabelSmoothingCrossEntropy
from fastai_smooth.targets import MixedTarget

K = 7


def close(a, b, tol=1e-6): torch.testing.assert_close(a, b, rtol=tol, atol=tol, check_dtype=False)


def make(form, shape=(6, K), axis=-1, dtype=torch.float64, ignored=False, scale=1.):
    "Logits and a target of a form"
    z = scale*torch.randn(shape, dtype=dtype)
    y = torch.randint(0, shape[axis], z.select(axis, 0).shape)
    if ignored: y.view(-1)[::4] = -100
    if form == 'index': return z, y
    if form == 'dense': return z, torch.rand(shape, dtype=dtype)
    w = torch.rand(len(y), 1, *[1]*(y.ndim-1), dtype=dtype)
    return z, MixedTarget(torch.stack([y, y.flip(0)], 1), torch.cat([w, 1-w], 1), shape[axis], axis)


FORMS = ['index', 'dense', 'mixed']

LAYOUTS = [((6, K), -1), ((4, K, 3, 2), 1), ((3, 5, K), -1), ((4, K, 1), 1), ((1, K), 1), ((5, 1), -1), ((3, 2), -1)]


@pytest.mark.parametrize('block', [8, 2**19])
@pytest.mark.parametrize('shape, axis, form', [(*layout, form) for layout in LAYOUTS for form in FORMS if layout[0][layout[1]] > 1 or form != 'dense'])
def test_equals_the_formula(shape, axis, form, block, calls, monkeypatch):
    "Loss and gradient, also where the work is cut into many blocks"
    monkeypatch.setattr(cpu, 'BLOCK', block)
    monkeypatch.setattr(cpu, 'SMALL', 16)
    for eps, reduction, ignored in itertools.product((0., .1, 1.), ('mean', 'sum'), (False, True)):
        z, target = make(form, shape, axis, ignored=ignored)
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        fast = smooth_cross_entropy(a, target, eps, axis=axis, reduction=reduction)
        exact = smooth_cross_entropy_reference(b, target, eps, axis=axis, reduction=reduction)
        fast.backward(), exact.backward()
        close(fast, exact, 1e-10), close(a.grad, b.grad, 1e-10)
        with torch.no_grad(): close(smooth_cross_entropy(a, target, eps, axis=axis, reduction=reduction), exact, 1e-10)
    assert set(calls) == {'cpu'}


@given(st.integers(1, 40), st.integers(2, 300), st.floats(0, 1), st.floats(.1, 30), st.integers(0, 2**31))
def test_single_precision_is_as_good(n, k, eps, scale, seed):
    "float32 within 1e-6 of float64, relative to the size of the numbers that are added up"
    torch.manual_seed(seed)
    z, y = scale*torch.randn(n, k), torch.randint(0, k, (n,))
    a, b = z.clone().requires_grad_(), z.double().requires_grad_()
    fast, exact = smooth_cross_entropy(a, y, eps), smooth_cross_entropy_reference(b, y, eps)
    fast.backward(), exact.backward()
    assert abs(fast.item()-exact.item()) < 1e-6*(1+exact.item()+scale)
    close(a.grad, b.grad.float(), 1e-6)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('shape, axis', [((4, K), -1), ((2, K, 3), 1)])
def test_gradients_of_gradients(shape, axis, form):
    z, target = make(form, shape, axis)
    f = lambda z: smooth_cross_entropy(z, target, .2, axis=axis)
    z.requires_grad_()
    assert torch.autograd.gradcheck(f, z) and torch.autograd.gradgradcheck(f, z)


@pytest.mark.parametrize('form', FORMS)
def test_backward_twice_and_scaled(form):
    z, target = make(form)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    (smooth_cross_entropy_reference(b, target)*2.5).backward()
    loss = smooth_cross_entropy(a, target)*2.5
    loss.backward(retain_graph=True)
    first = a.grad.clone()
    a.grad.zero_()  # an edit of the gradient that was given away must not reach the second one
    a.grad = None
    loss.backward()
    close(first, b.grad), close(a.grad, b.grad)


def test_gradient_accumulates():
    z, y = make('index')
    z.requires_grad_()
    for _ in range(3): smooth_cross_entropy(z, y).backward()
    x = z.detach().clone().requires_grad_()
    smooth_cross_entropy_reference(x, y).backward()
    close(z.grad, 3*x.grad)


def test_no_gradient_no_buffer():
    z, y = make('index', (64, 50))
    z.requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context(): loss = smooth_cross_entropy(z, y)
        assert not loss.requires_grad and loss.grad_fn is None
    loss = smooth_cross_entropy(z, y)
    assert loss.grad_fn.gradient.shape == z.shape
    loss.backward()
    assert loss.grad_fn.gradient is None


@pytest.mark.parametrize('form', ['index', 'dense', 'mixed'])
@pytest.mark.parametrize('kind', ['transposed', 'expanded', 'sliced', 'channels_last', 'permuted'])
def test_any_memory_layout(kind, form):
    shape, axis = ((4, K, 3, 2), 1) if kind in ('channels_last', 'permuted') else ((6, K), -1)
    z, target = make(form, shape, axis)
    z = {'transposed': lambda: z.T.contiguous().T, 'expanded': lambda: z[:1].expand(6, K), 'sliced': lambda: torch.randn(6, 2*K, dtype=z.dtype)[:, ::2],
         'channels_last': lambda: z.contiguous(memory_format=torch.channels_last),
         'permuted': lambda: z.permute(2, 1, 3, 0).contiguous().permute(3, 1, 0, 2)}[kind]()
    a, b = z.detach().requires_grad_(), z.detach().clone().requires_grad_()
    fast, exact = smooth_cross_entropy(a, target, axis=axis), smooth_cross_entropy_reference(b, target, axis=axis)
    (ga,), (gb,) = torch.autograd.grad(fast, a), torch.autograd.grad(exact, b)
    close(fast, exact), close(ga, gb)


def test_underflow_and_infinities():
    "p below the smallest number, impossible classes, nan: what the formula says"
    y = torch.tensor([0, 1])
    for row in ([-200., 100., 3.], [-1e4, 0., 1.], [-math.inf, 1., 2.], [math.inf, 0., 0.], [math.nan, 0., 0.], [0., -math.inf, 1.]):
        for eps in (0., .1):
            z = torch.tensor([row, [1., 2., 3.]])
            for target in (y, F.one_hot(y, 3).float()):
                a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
                fast, exact = smooth_cross_entropy(a, target, eps), smooth_cross_entropy_reference(b, target, eps)
                fast.backward(), exact.backward()
                torch.testing.assert_close(fast, exact, equal_nan=True), torch.testing.assert_close(a.grad, b.grad, equal_nan=True)


def test_changes_of_the_logits_after_the_loss():
    "The gradient was computed with the loss"
    z, y = make('index')
    z.requires_grad_()
    x = z*1
    loss = smooth_cross_entropy(x, y)
    with torch.no_grad(): x.zero_()
    loss.backward()
    expected = z.detach().clone().requires_grad_()
    smooth_cross_entropy_reference(expected, y).backward()
    close(z.grad, expected.grad)


def test_deterministic_and_from_several_threads():
    z, y = make('index', (50, 30), dtype=torch.float32)
    results = []

    def work():
        x = z.clone().requires_grad_()
        smooth_cross_entropy(x, y).backward()
        results.append(x.grad)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(results) == 4 and all(torch.equal(r, results[0]) for r in results)


def test_nothing_at_all():
    z = torch.zeros(0, K, requires_grad=True)
    loss = smooth_cross_entropy(z, torch.zeros(0).long())
    loss.backward()
    assert loss == 0 and z.grad.shape == (0, K)


@pytest.mark.parametrize('shape, axis', [((2, 2, 5, 3), 2), ((3, 4, 5, 2, 3), 3), ((2, 3, 5), 2), ((2, 5, 3), 1)])
@pytest.mark.parametrize('form', FORMS)
def test_classes_at_any_axis(shape, axis, form, calls):
    z, target = make(form, shape, axis)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    dense = target if form == 'dense' else target.dense() if form == 'mixed' else F.one_hot(target, shape[axis]).movedim(-1, axis).double()
    q = .9*dense + .1*dense.sum(axis, keepdim=True)/shape[axis]
    expected = -(q*b.log_softmax(axis)).sum()/dense.sum()
    loss = smooth_cross_entropy(a, target, axis=axis)
    loss.backward(), expected.backward()
    close(loss, expected, 1e-10), close(a.grad, b.grad, 1e-10)
    assert calls == ['cpu']


@pytest.mark.parametrize('offset', [0., 100., 1e4, 1e6, 1e30])
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('shape, axis', [((512, 100), 1), ((2, 100, 16, 16), 1)])
def test_logits_far_from_zero(shape, axis, form, offset, calls):
    "The loss does not depend on what is added to all logits: nothing large is subtracted from something large"
    z, target = make(form, shape, axis, torch.float32)
    z = z+offset
    a, b = z.clone().requires_grad_(), z.double()
    for eps in (0., .1):
        loss, exact = smooth_cross_entropy(a, target, eps, axis=axis), smooth_cross_entropy_reference(b, target, eps, axis=axis)
        close(loss, exact, 3e-6)
        with torch.no_grad(): close(smooth_cross_entropy(a, target, eps, axis=axis), exact, 3e-6)
    assert set(calls) == {'cpu'}


def test_binary_logits_far_from_zero():
    "Right and sure costs nothing, however sure; half wrong costs what torch says"
    for size in (20., 80., 1e8, 1e30):
        y = (torch.rand(512, 80) < .5).float()
        z = size*(2*y-1)
        z.requires_grad_()
        assert abs(smooth_binary_cross_entropy(z, y, 0.).item()) < 1e-7
        half = torch.where(torch.rand(512, 80) < .5, z, -z).detach()
        close(smooth_binary_cross_entropy(half, y, .1)/size, F.binary_cross_entropy_with_logits(half.double(), y.double()*.9+.05)/size, 1e-6)


def test_one_example_without_a_batch_dimension():
    z = torch.randn(5)
    close(LabelSmoothingCrossEntropy(.1)(z, torch.tensor(2)), F.cross_entropy(z, torch.tensor(2), label_smoothing=.1))


def test_a_target_changed_before_the_gradient_is_computed_again():
    z, y = make('index')
    for loss_of, target in ((smooth_cross_entropy, y), (smooth_binary_cross_entropy, torch.rand(6, K, dtype=z.dtype))):
        x = z.clone().requires_grad_()
        loss = loss_of(x, target)
        loss.backward(retain_graph=True)
        target.copy_(target.flip(0))
        with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()


@pytest.mark.parametrize('loss_of', [smooth_cross_entropy, smooth_binary_cross_entropy])
def test_several_gradients_at_once(loss_of):
    z, _ = make('index')
    q = torch.rand(6, K, dtype=z.dtype)
    x = z.clone().requires_grad_()
    one, = torch.autograd.grad(loss_of(x, q), x)
    both, = torch.autograd.grad(loss_of(x, q), x, torch.tensor([1., -2.], dtype=z.dtype), is_grads_batched=True)
    close(both, torch.stack([one, -2*one]))


@pytest.mark.parametrize('shape', [(1, 1), (3, 5), (40, 70), (2, 3, 4)])
def test_binary_in_one_pass(shape):
    "The numbers and gradients of torch's own loss on smoothed targets, however often and scaled"
    for convention, reduction in itertools.product(('half', 'uniform', 'complement'), ('mean', 'sum')):
        z, y = 5*torch.randn(shape, dtype=torch.float64), torch.randint(0, 2, shape).double()
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        q = torch.tensor([oracles.binary_entry(v, .2, convention, shape[1]) for v in y.flatten().tolist()], dtype=torch.float64).view(shape)
        f = functools.partial(smooth_binary_cross_entropy, target=y, eps=.2, convention=convention, reduction=reduction)
        loss = f(a)
        assert 'LossWithGradient' in type(loss.grad_fn).__name__
        expected = F.binary_cross_entropy_with_logits(b, q, reduction=reduction)
        (3*loss).backward(retain_graph=True)
        loss.backward()
        (4*expected).backward()
        close(loss, expected, 1e-5), close(a.grad, b.grad, 1e-5)
        with torch.no_grad(): close(f(a), expected, 1e-5)
        if z.numel() < 30: assert torch.autograd.gradcheck(f, a) and torch.autograd.gradgradcheck(f, a)


def test_binary_where_the_fast_path_does_not_apply():
    "Unknown entries, logits without bounds, blocks, single precision"
    y = torch.tensor([[1., 0., math.nan]])
    z = torch.tensor([[1., 2., 3.]], requires_grad=True)
    loss = smooth_binary_cross_entropy(z, y)
    close(loss, F.binary_cross_entropy_with_logits(z[:, :2], torch.tensor([[.95, .05]])))
    big = torch.tensor([[300., -300., 90.]])
    close(smooth_binary_cross_entropy(big, y.nan_to_num(0.)), F.binary_cross_entropy_with_logits(big, torch.tensor([[.95, .05, .05]])))
    for z in (math.inf, -math.inf, math.nan): # 0 times infinity is 0, where torch says nan
        for label in (0., 1.):
            exact = (math.nan if math.isnan(z) else 0. if (z > 0) == (label > 0) else math.inf) + math.log(2)
            loss = smooth_binary_cross_entropy(torch.tensor([z, 0.]), torch.tensor([label, 1.]), 0., reduction='sum')
            torch.testing.assert_close(loss, torch.tensor(exact), equal_nan=True)
    z, y = 4*torch.randn(700, 1001), (torch.rand(700, 1001) < .1).float()
    assert z.numel() > cpu.BLOCK
    a, b = z.clone().requires_grad_(), z.double().requires_grad_()
    fast = smooth_binary_cross_entropy(a, y)
    exact = F.binary_cross_entropy_with_logits(b, y.double()*.9+.05)
    fast.backward(), exact.backward()
    close(fast, exact, 1e-6), close(a.grad, b.grad, 1e-10)


@pytest.mark.notebook
def test_the_notebook_shows_what_the_benchmark_wrote():
    root = Path(__file__).resolve().parents[2]
    measured = json.loads((root/'nbs'/'figures'/'losses_cpu.json').read_text(encoding='utf-8'))
    cells = json.loads((root/'nbs'/'21_kernels.cpu.ipynb').read_text(encoding='utf-8'))['cells']
    shown = next(text for c in cells for o in c.get('outputs', ()) if 'time over torch' in (text := ''.join(o.get('text', ''))))
    for row in measured['cases']:
        line = next(line for line in shown.splitlines() if line.startswith(row['case']))
        figures = [row[k] for k in ('ours t', 'fastai t', 'timm t', 'ours mem', 'torch mem')]
        assert line[len(row['case']):].split() == ['–' if v is None else f'{v:.2f}' for v in figures]
