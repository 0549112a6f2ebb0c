"The choice of the path: what decides it, and that nothing is caught on the way"
import pytest
import torch

import fastai_smooth.kernels.cpu as cpu
from fastai_smooth.kernels import (
    smooth_binary_cross_entropy,
    smooth_binary_cross_entropy_reference,
    smooth_cross_entropy,
    smooth_cross_entropy_reference,
)
from fastai_smooth.kernels.formulas import in_transform
from fastai_smooth.losses import LabelSmoothingCrossEntropy

K = 7


def close(a, b, tol=1e-6): torch.testing.assert_close(a, b, rtol=tol, atol=tol, check_dtype=False)


def batch(dtype=torch.float64): return torch.randn(6, K, dtype=dtype), torch.randint(0, K, (6,))


def test_what_takes_the_formula(calls):
    z, y = batch()
    w = torch.ones(K, dtype=z.dtype)
    smooth_cross_entropy(z, y)
    assert calls == ['cpu']
    smooth_cross_entropy(z, y, weight=w), smooth_cross_entropy(z, y, reduction='none'), smooth_cross_entropy(z, y, [.1]*K), smooth_cross_entropy(z[:0], y[:0])
    q = torch.rand(6, K, dtype=z.dtype, requires_grad=True)
    smooth_cross_entropy(z, q).backward()
    smooth_binary_cross_entropy(z, q.detach(), weight=w), smooth_binary_cross_entropy(z, q.detach(), reduction='none')
    assert set(calls[1:]) == {'formula'} and len(calls) == 8 and q.grad is not None
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        assert torch.autograd.forward_ad.unpack_dual(smooth_cross_entropy(dual, y)).tangent is not None
    assert calls[-1] == 'formula'


@pytest.mark.parametrize('error', [RuntimeError, ArithmeticError, IndexError, torch.OutOfMemoryError])
def test_an_error_of_the_fast_path_is_seen(error, monkeypatch):
    "It is not taken for a sign that the formula should be used"
    def broken(*args): raise error('broken')
    monkeypatch.setattr(cpu, 'loss_of_rows', broken)
    monkeypatch.setattr(cpu, 'binary_loss_and_gradient', broken)
    z, y = batch()
    for wanted in (False, True):
        with pytest.raises(error, match='broken'): smooth_cross_entropy(z.requires_grad_(wanted), y)
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
    each = torch.func.vmap(lambda z, y: smooth_cross_entropy(z[None], y[None]))(z, y)
    close(each, smooth_cross_entropy(z, y, reduction='none'))


def test_compiles_whole():
    "torch's tracer takes model and loss as one graph"
    z, y = batch(torch.float32)
    model, loss = torch.nn.Linear(K, K), LabelSmoothingCrossEntropy(.1)
    compiled = torch.compile(lambda z, y: loss(model(z), y), fullgraph=True, backend='eager')
    close(compiled(z, y), loss(model(z), y))


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
