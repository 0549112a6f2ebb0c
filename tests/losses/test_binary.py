"Binary cross entropy: parity with torch and timm, unknown labels, the forms of a target, fastai's contract"
import copy
import itertools
import math

import oracles
import pytest
import timm.loss
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastai_smooth.kernels import smooth_binary_cross_entropy, smooth_binary_cross_entropy_reference
from fastai_smooth.losses import LabelSmoothingBCE
from fastai_smooth.targets import MixedTarget

K = 5
W = torch.tensor([1., 2., 3., .5, 4.])
FULL = LabelSmoothingBCE(.2, W, 'none', pos_weight=2*W, convention='complement', eps_pos=.1, thresh=.3, target_threshold=.2, sum_classes=True)


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol, check_dtype=False)


@pytest.mark.parametrize('weight', [None, W])
@pytest.mark.parametrize('eps', [0., .1, .4])
def test_timm_binary_cross_entropy(eps, weight):
    for pos_weight, threshold, sum_classes in itertools.product((None, W), (None, .2), (False, True)):
        z, y = torch.randn(8, K), torch.randint(0, K, (8,))
        kwargs = dict(weight=weight, pos_weight=pos_weight, target_threshold=threshold, sum_classes=sum_classes)
        ours = LabelSmoothingBCE(eps, **kwargs)
        close(ours(z, y), timm.loss.BinaryCrossEntropy(eps, **kwargs)(z, y))
        for q in (torch.rand(8, K), (torch.rand(8, K) > .5).float()):
            if hasattr(timm.loss.BinaryCrossEntropy(), 'smooth_dense'): # older versions of timm never smooth them
                close(ours(z, q), timm.loss.BinaryCrossEntropy(eps, smooth_dense=True, **kwargs)(z, q))


@given(st.data())
def test_binary_cross_entropy_against_loop(data):
    n, k = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    z, y = torch.randn(n, k, generator=g, dtype=torch.float64)*3, torch.rand(n, k, generator=g, dtype=torch.float64)
    y[torch.rand(n, k, generator=g) < .2] = math.nan
    eps, eps_neg = data.draw(st.floats(0, 1)), data.draw(st.none() | st.floats(0, 1))
    convention = data.draw(st.sampled_from(['half', 'uniform', 'complement']))
    w, pw = (data.draw(st.none() | st.just(torch.rand(k, generator=g)+.1)) for _ in range(2))
    smoothed = [[oracles.binary_entry(v, eps, convention, k, None, eps_neg) for v in row] for row in y.tolist()]
    expected = oracles.binary_cross_entropy(z.tolist(), smoothed, *(None if v is None else v.tolist() for v in (w, pw)))
    close(LabelSmoothingBCE(eps, w, pos_weight=pw, convention=convention, eps_neg=eps_neg)(z, y), torch.tensor(expected, dtype=torch.float64))
    if eps_neg is None:
        for f in (smooth_binary_cross_entropy, smooth_binary_cross_entropy_reference):
            close(f(z, y, eps, convention=convention, weight=w, pos_weight=pw), torch.tensor(expected, dtype=torch.float64))


def test_binary_single_output_takes_flat_labels():
    "Logits (N, 1) with labels (N,) are fastai's habit for two classes: the labels are not indices of one class"
    z, y = torch.randn(6, 1), torch.tensor([0, 1, 1, 0, 1, 0])
    close(LabelSmoothingBCE(0.)(z, y), F.binary_cross_entropy_with_logits(z[:, 0], y.float()))


def test_binary_ignored_index_is_unknown():
    z = torch.randn(3, K)
    close(LabelSmoothingBCE(.1)(z, torch.tensor([1, -100, 2])), LabelSmoothingBCE(.1)(z[[0, 2]], torch.tensor([1, 2])))


def test_ignored_component_of_a_mixture_is_unknown_to_a_binary_loss():
    z, y = torch.randn(3, K), torch.tensor([1, -100, 2])
    mixed = MixedTarget(y[:, None], torch.ones(3, 1), K)
    close(LabelSmoothingBCE(.2, convention='half')(z, mixed), LabelSmoothingBCE(.2, convention='half')(z, y))


def test_any_integer_dtype_and_a_column_of_labels():
    z, y = torch.randn(8, K), torch.randint(0, K, (8,))
    loss = LabelSmoothingBCE()
    for same in (y.int(), y.to(torch.uint8), y[:, None]): close(loss(z, same), loss(z, y))


def test_nothing_to_learn_from():
    z, loss = torch.randn(4, K, requires_grad=True), LabelSmoothingBCE(.1)
    for target in (torch.full((4,), -100), torch.full((4, K), math.nan)):
        z.grad = None
        out = loss(z, target)
        out.backward()
        assert out == 0 and (z.grad == 0).all()
    assert loss(torch.randn(0, K), torch.zeros(0).long()) == 0


def test_half_precision_is_computed_in_single():
    z, y, loss = torch.randn(8, K)*100, torch.randint(0, K, (8,)), LabelSmoothingBCE(.1)
    for dtype in (torch.float16, torch.bfloat16):
        h = z.to(dtype).requires_grad_()
        out = loss(h, y)
        close(out, loss(h.detach().float(), y))
        out.backward()
        assert out.dtype is torch.float32 and h.grad.dtype is dtype and h.grad.isfinite().all()


@pytest.mark.parametrize('loss', [LabelSmoothingBCE(), FULL], ids=repr)
def test_contract(loss):
    z, y = torch.randn(8, K), torch.randint(0, K, (8,))
    again = eval(repr(loss))
    assert repr(again) == repr(loss) and ' at 0x' not in repr(loss)
    close(again(z, y), loss(z, y))
    loss = copy.deepcopy(loss)
    for r in ('mean', 'sum', 'none'):
        loss.reduction = r
        assert loss(z, y).ndim == (0 if r != 'none' else 1 if loss.sum_classes else 2)
    with pytest.raises(ValueError, match="'mean', 'sum', 'none'"): loss.reduction = 'batchmean'
    with pytest.raises(ValueError): loss.eps = 2.
    assert loss.to('cpu') is loss and loss.activation(z).shape == z.shape and not getattr(loss, 'y_int', False)


@pytest.mark.parametrize('make, error, words', [
    (lambda z, y: LabelSmoothingBCE()(z, torch.rand(8, K+1)), ValueError, 'same shape'),
    (lambda z, y: LabelSmoothingBCE()(z, y+K), ValueError, r'outside \[0, 5\)'),
    (lambda z, y: LabelSmoothingBCE(weight=W[:3])(z, torch.rand(8, K)), ValueError, 'broadcast'),
    (lambda z, y: LabelSmoothingBCE(convention='others'), ValueError, "'half', 'uniform', 'complement'"),
    (lambda z, y: smooth_binary_cross_entropy(z, torch.rand(8, K), convention='others'), ValueError, 'convention'),
    (lambda z, y: smooth_binary_cross_entropy(z, torch.rand(8, K), reduction='classes'), ValueError, 'reduction'),
    (lambda z, y: smooth_binary_cross_entropy(z, torch.full((8, K), 7)), ValueError, 'holds 7'),
])
def test_errors(make, error, words):
    with pytest.raises(error, match=words): make(torch.randn(8, K), torch.randint(0, K, (8,)))
