"The choice of the path: what decides it, and that nothing is caught on the way"
import math
from functools import partial

import pytest
import torch

import fastai_smooth.kernels.cpu as cpu
import fastai_smooth.kernels.paths as paths
from fastai_smooth.kernels import (
    smooth_binary_cross_entropy,
    smooth_binary_cross_entropy_reference,
    smooth_cross_entropy,
    smooth_cross_entropy_reference,
)
from fastai_smooth.kernels.formulas import in_transform

K = 7


def close(a, b, tol=1e-6): torch.testing.assert_close(a, b, rtol=tol, atol=tol, check_dtype=False)


def batch(dtype=torch.float64): return torch.randn(6, K, dtype=dtype), torch.randint(0, K, (6,))


def test_what_takes_which_path(calls):
    z, y = batch()
    w = torch.ones(K, dtype=z.dtype)
    q = torch.rand(6, K, dtype=z.dtype)
    smooth_cross_entropy(z, y), smooth_cross_entropy(z, q), smooth_cross_entropy(z.half(), y), smooth_binary_cross_entropy(z, q)
    assert calls == ['cpu']*4
    calls.clear()
    smooth_cross_entropy(z, y, weight=w), smooth_cross_entropy(z, y, reduction='none'), smooth_cross_entropy(z.to('meta'), y.to('meta'))
    assert calls == ['torch']*3
    calls.clear()
    smooth_cross_entropy(z, y, [.1]*K), smooth_cross_entropy(z[:0], y[:0]), smooth_cross_entropy(z, y, weight=w, weight_by='example')
    smooth_cross_entropy(z, q, weight=w), smooth_cross_entropy(z, q, reduction='none'), smooth_cross_entropy(z.to('meta'), q.to('meta'))
    smooth_binary_cross_entropy(z, q, weight=w), smooth_binary_cross_entropy(z, q, reduction='none')
    smooth_cross_entropy(z, q.requires_grad_()).backward()
    assert set(calls) == {'formula'} and len(calls) == 9 and q.grad is not None
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        assert torch.autograd.forward_ad.unpack_dual(smooth_cross_entropy(dual, y)).tangent is not None
    assert calls[-1] == 'formula'


@pytest.mark.parametrize('weight', [None, torch.rand(K)+.1])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('shape, axis', [((6, K), -1), ((4, K, 3, 2), 1), ((3, 5, K), -1), ((2, 3, K, 4), 2)])
def test_torchs_own_loss(shape, axis, reduction, weight, calls):
    "The numbers and gradients of the formula, with ignored labels, padding, classes that are ruled out, and nothing to learn from"
    for eps, ignore_index in ((0., -100), (.1, 2), (1., None)):
        z = torch.randn(shape, dtype=torch.float64)
        y = torch.randint(0, K, z.select(axis, 0).shape)
        if ignore_index is not None: y.view(-1)[::4] = ignore_index
        results = []
        index, coefficient = paths.kept_entries(y.unsqueeze(axis), None, K, ignore_index, z.dtype)
        own = partial(paths.torch_cross_entropy, index=index, coefficient=coefficient, eps=eps, axis=axis % z.ndim, weight=weight,
                      reduction=reduction, formula=None)
        exact = partial(smooth_cross_entropy_reference, target=y, eps=eps, axis=axis, weight=weight, ignore_index=ignore_index, reduction=reduction)
        for loss in (own, exact):
            x = z.clone().requires_grad_()
            value = loss(x)
            value.sum().backward()
            results.append((value, x.grad))
        for a, b in zip(*results): close(a, b, 1e-10)


def test_torchs_own_loss_at_the_edge(calls):
    z, y = batch()
    w = torch.tensor([1., 2., 3., 4., 5., 6., 0.], dtype=z.dtype)
    y[1] = -100
    x = z.clone()
    x[1] = math.nan
    x.requires_grad_()
    for kwargs in (dict(weight=w), dict(reduction='none'), dict(weight=w, reduction='none')):
        x.grad = None
        loss = smooth_cross_entropy(x, y, .1, **kwargs)
        loss.sum().backward()
        close(loss, smooth_cross_entropy_reference(z, y, .1, **kwargs))
        assert (x.grad[1] == 0).all() and x.grad.isfinite().all()
    assert smooth_cross_entropy(z, torch.full((6,), -100), weight=w) == 0 and smooth_cross_entropy(z, torch.full((6,), 6), weight=w, eps=0.) == 0
    ruled_out = z.clone()
    ruled_out[:, 6] = -math.inf
    close(smooth_cross_entropy(ruled_out, y.clamp(max=5), weight=w), smooth_cross_entropy_reference(ruled_out, y.clamp(max=5), weight=w))
    assert set(calls) == {'torch'}
    y[0] = 9 # where values cannot be read
    index, coefficient = y.unsqueeze(1).clamp(max=6), torch.tensor([math.nan, 0., 1., 1., 1., 1.], dtype=z.dtype)[:, None]
    for reduction in ('mean', 'sum'): assert paths.torch_cross_entropy(z, index.clamp(min=0), coefficient, .1, 1, None, reduction, None).isnan()


def test_the_gpu_kernels_get_what_the_model_made(monkeypatch):
    "Logits in their own precision, labels as they came"
    seen = []
    for name in ('gpu_cross_entropy', 'gpu_binary_cross_entropy'):
        monkeypatch.setattr(paths, name, lambda logits, target, *request: (seen.append((logits, target, *request)), logits.sum())[1])
    for name in ('gpu_takes', 'gpu_takes_binary'): monkeypatch.setattr(paths, name, lambda *request: True)
    z, y = batch(torch.bfloat16)
    smooth_cross_entropy(z, y, .2, weight=torch.ones(K), reduction='none', axis=1)
    logits, target, eps, axis, weight, *rest = seen.pop()
    assert logits.dtype is torch.bfloat16 and target is y and (eps, axis) == (.2, 1) and weight.shape == (K,) and rest == ['class', -100, 'none']
    with pytest.raises(ValueError, match='LabelSmoothingBCE'): smooth_cross_entropy(z[:, :1], torch.rand(6, 1))
    smooth_binary_cross_entropy(z.float(), torch.rand(6, K), .2)
    _, _, weight, pos_weight, reduction, off, on, axis = seen.pop()
    assert weight is None and pos_weight is None and reduction == 'mean' and (off, on) == (.1, .9) and axis == 1


@pytest.mark.parametrize('error', [RuntimeError, ArithmeticError, IndexError, torch.OutOfMemoryError])
def test_an_error_of_the_fast_path_is_seen(error, monkeypatch):
    "It is not taken for a sign that the formula should be used"
    def broken(*args): raise error('broken')
    for name in ('loss_of_block', 'loss_of_few'): monkeypatch.setattr(cpu, name, broken)
    monkeypatch.setattr(cpu, 'binary_loss_and_gradient', broken)
    z, y = batch()
    for wanted in (False, True):
        for target in (y, y.where(y > 0, -100)):
            with pytest.raises(error, match='broken'): smooth_cross_entropy(z.requires_grad_(wanted), target)
        with pytest.raises(error, match='broken'): smooth_binary_cross_entropy(z.requires_grad_(wanted), torch.rand(6, K, dtype=z.dtype))


def test_labels_out_of_range():
    "One ValueError, whatever the path"
    z, y = batch()
    for loss in (smooth_cross_entropy, smooth_cross_entropy_reference, smooth_binary_cross_entropy, smooth_binary_cross_entropy_reference):
        for bad in (K, -1, 99):
            wrong = y.clone()
            wrong[3] = bad
            with pytest.raises(ValueError, match=f'Label {bad} is outside'): loss(z.requires_grad_(), wrong)
    wrong = y.clone()
    wrong[2] = -100
    assert smooth_cross_entropy(z, wrong).isfinite()
    with pytest.raises(ValueError, match='Label -100 '): smooth_cross_entropy(z, wrong, ignore_index=3)
    with pytest.raises(ValueError, match='Label -100 '): smooth_cross_entropy(z, wrong, ignore_index=None)


def test_functional_transforms():
    z, y = batch()
    grad = torch.func.grad(lambda z: smooth_cross_entropy(z, y))(z)
    x = z.clone().requires_grad_()
    smooth_cross_entropy(x, y).backward()
    close(grad, x.grad)


@pytest.mark.parametrize('f, target', [(smooth_cross_entropy, torch.tensor([0, 1, 2])), (smooth_binary_cross_entropy, torch.tensor([[0., 1., 1.]]*3))],
                         ids=['softmax', 'binary'])
def test_a_strength_that_is_a_symbol_compiles_once(f, target):
    torch.compiler.reset()
    graphs, z = [], torch.randn(3, 3)
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for eps in (.1, .2, .3, .4): close(compiled(z, target, eps), f(z, target, eps))
    assert len(graphs) == (1 if torch.__version__ >= (2, 14) else 2)  # torch 2.6 makes one of the first strength, and one for all others


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('loss_of', [smooth_cross_entropy, smooth_binary_cross_entropy])
def test_traced(loss_of):
    z, q = torch.randn(6, K), torch.rand(6, K)
    traced = torch.jit.trace(lambda z, q: loss_of(z, q), (torch.zeros(6, K), torch.ones(6, K)), check_trace=False)
    close(traced(z, q), loss_of(z, q))


def test_private_names_of_torch():
    "The releases of torch that the package allows have these names, and they tell what we take them for"
    assert torch._C._are_functorch_transforms_active() is False
    torch.func.vmap(lambda x: [x, assert_(torch._C._are_functorch_transforms_active() and in_transform(x))][0])(torch.ones(2))
    assert torch.autograd.forward_ad._current_level < 0
    with torch.autograd.forward_ad.dual_level(): assert torch.autograd.forward_ad._current_level >= 0
    seen = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.sum()

        @staticmethod
        def backward(ctx, grad):
            seen.append(cpu.several_at_once(grad))
            return grad.expand(3)
    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Probe.apply(x), x)
    torch.autograd.grad(Probe.apply(x), x, torch.ones(2), is_grads_batched=True)
    assert seen == [False, True]


def assert_(condition): assert condition
