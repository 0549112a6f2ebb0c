"Losses over exclusive classes: parity with torch, timm and fastai, the forms of a target, fastai's contract"
import itertools
import math

import fastai.losses as fl
import numpy as np
import oracles
import pytest
import timm.loss
import torch
import torch.nn.functional as F
from fastai.torch_core import TensorBase, TensorCategory
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastai_smooth.distributions import ClassPrior, Similarity, Uniform
from fastai_smooth.kernels import smooth_cross_entropy, smooth_cross_entropy_reference
from fastai_smooth.losses import (
    LabelRelaxation,
    LabelSmoothingCrossEntropy,
    LabelSmoothingCrossEntropyFlat,
    LabelSmoothingDice,
    LabelSmoothingFocal,
    LabelSmoothingNLL,
    MultiLabelSmoothingCrossEntropy,
)
from fastai_smooth.targets import MixedTarget, smooth_labels, to_dense

K = 5
W = torch.tensor([1., 2., 3., .5, 4.])

REDUCTIONS = ['mean', 'sum', 'none']


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol, check_dtype=False)


def batch(layout='NK', dtype=torch.float32, ignored=True):
    "Logits, indices and the class axis of each layout"
    shape, axis = {'NK': ((8, K), -1), 'NK1': ((8, K), 1), 'NKd': ((3, K, 4), 1), 'NKHW': ((2, K, 4, 3), 1), 'NTK': ((3, 4, K), -1)}[layout]
    z = torch.randn(shape, dtype=dtype)
    y = torch.randint(0, K, z.select(axis, 0).shape)
    if ignored: y.view(-1)[::5] = -100
    return z, y, axis

LAYOUTS = ['NK', 'NK1', 'NKd', 'NKHW', 'NTK']


# -- parity with torch


@pytest.mark.parametrize('layout', LAYOUTS)
def test_torch_cross_entropy(layout):
    for reduction, weight, ignore, eps in itertools.product(REDUCTIONS, (None, W), (-100, 2), (0., .1, 1.)):
        z, y, axis = batch(layout)
        y[y == -100] = ignore
        theirs = F.cross_entropy(z.movedim(axis, 1), y, weight, label_smoothing=eps, ignore_index=ignore, reduction=reduction)
        close(LabelSmoothingCrossEntropy(eps, weight, reduction, axis=axis, ignore_index=ignore)(z, y), theirs)
        for f in (smooth_cross_entropy, smooth_cross_entropy_reference):
            close(f(z, y, eps, axis=axis, weight=weight, ignore_index=ignore, reduction=reduction), theirs)


@pytest.mark.parametrize('eps', [0., .1])
def test_torch_cross_entropy_gradient(eps):
    z, y, _ = batch(dtype=torch.float64)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    LabelSmoothingCrossEntropy(eps, W)(a, y).backward()
    F.cross_entropy(b, y, W.double(), label_smoothing=eps).backward()
    close(a.grad, b.grad, 1e-9)


def test_torch_dense_targets_where_they_agree():
    "Without weights and with mass 1 everywhere the denominators are the same"
    z, q = torch.randn(8, K), torch.rand(8, K).softmax(1)
    for r in REDUCTIONS: close(LabelSmoothingCrossEntropy(.1, reduction=r)(z, q), F.cross_entropy(z, q, label_smoothing=.1, reduction=r))


def test_law_3_where_torch_divides_dense_targets_by_n():
    "Weighted: the mean is over the weighted mass, so that one-hot costs what indices cost. torch divides by N"
    z, y, _ = batch(ignored=False)
    one_hot = F.one_hot(y, K).float()
    loss = LabelSmoothingCrossEntropy(.1, W)
    close(loss(z, one_hot), loss(z, y))
    theirs = F.cross_entropy(z, one_hot, W, label_smoothing=.1)
    assert abs(theirs - F.cross_entropy(z, y, W, label_smoothing=.1)) > .1
    close(loss(z, one_hot)*W[y].sum()/len(y), theirs)
    # and with a zero row, which counts in torch's N
    zero = one_hot.clone()
    zero[0] = 0
    close(LabelSmoothingCrossEntropy(0.)(z, zero)*(len(y)-1)/len(y), F.cross_entropy(z, zero))


def test_torch_nll_loss():
    z, y, _ = batch()
    for r in REDUCTIONS: close(LabelSmoothingNLL(0., W, r)(z.log_softmax(1), y), F.nll_loss(z.log_softmax(1), y, W, reduction=r))


# -- parity with timm and fastai, and where they are wrong


def test_timm_losses():
    z, y, _ = batch(ignored=False)
    q = torch.rand(8, K).softmax(1)
    close(LabelSmoothingCrossEntropy(.2)(z, y), timm.loss.LabelSmoothingCrossEntropy(.2)(z, y))
    close(LabelSmoothingCrossEntropy(0.)(z, q), timm.loss.SoftTargetCrossEntropy()(z, q))


def test_fastai_where_it_is_right():
    z, y, _ = batch(ignored=False)
    for r in REDUCTIONS: close(LabelSmoothingCrossEntropy(.1, reduction=r)(z, y), fl.LabelSmoothingCrossEntropy(.1, reduction=r)(z, y))
    z, y, axis = batch('NKHW', ignored=False)
    close(LabelSmoothingCrossEntropy(.1, axis=axis)(z, y), fl.LabelSmoothingCrossEntropyFlat(.1, axis=axis)(z, y))


def test_fastai_forgets_weights_in_the_smoothed_part():
    z, y, _ = batch(ignored=False)
    truth = F.cross_entropy(z, y, W, label_smoothing=.1)
    assert (fl.LabelSmoothingCrossEntropy(.1, W)(z, y) - truth).abs() > 1e-3
    close(LabelSmoothingCrossEntropy(.1, W)(z, y), truth)


def test_fastai_smooths_ignored_rows():
    z, y, _ = batch()
    truth = F.cross_entropy(z, y, label_smoothing=.1)
    assert (fl.LabelSmoothingCrossEntropy(.1)(z, y) - truth).abs() > 1e-3
    close(LabelSmoothingCrossEntropy(.1)(z, y), truth)


def test_fastai_decodes_masks_along_the_wrong_axis():
    z, y, axis = batch('NKHW')
    theirs = fl.LabelSmoothingCrossEntropyFlat(.1, axis=axis)
    assert theirs.decodes(z).shape != y.shape
    ours = LabelSmoothingCrossEntropyFlat(.1, axis=axis)
    assert ours.decodes(z).shape == y.shape
    close(ours.activation(z).sum(axis), torch.ones(y.shape))


def test_fastai_refuses_dense_targets():
    z, y, _ = batch(ignored=False)
    with pytest.raises(RuntimeError): fl.LabelSmoothingCrossEntropy(.1)(z, F.one_hot(y, K).float())


def test_fastai_takes_any_eps():
    fl.LabelSmoothingCrossEntropy(1.5)
    with pytest.raises(ValueError, match='1.5'): LabelSmoothingCrossEntropy(1.5)


# -- against loops


@given(st.data())
def test_cross_entropy_against_loop(data):
    n, k = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 5))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    z, q = torch.randn(n, k, generator=g, dtype=torch.float64)*3, torch.rand(n, k, generator=g, dtype=torch.float64)
    if data.draw(st.booleans()): q[0] = 0
    weight = data.draw(st.none() | st.just(torch.rand(k, generator=g)+.1))
    weight_by, reduction = data.draw(st.sampled_from(['class', 'example'])), data.draw(st.sampled_from(REDUCTIONS))
    eps = data.draw(st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=k, max_size=k))
    kind = data.draw(st.sampled_from(['uniform', 'others', 'classy', 'prior', 'similarity']))
    m = torch.rand(k, k, generator=g)
    dist = {'prior': ClassPrior(m[0]+.1), 'similarity': Similarity(m/m.sum(1, keepdim=True))}.get(kind)
    convention = kind if dist is None else 'uniform'
    if convention != 'uniform' and isinstance(eps, list): eps = eps[0]
    loss = LabelSmoothingCrossEntropy(eps, weight, reduction, weight_by=weight_by, dist=dist, convention=convention)
    expected = oracles.cross_entropy(z.tolist(), q.tolist(), eps, None if weight is None else weight.tolist(), weight_by, convention,
                                     None if dist is None else dist.matrix(k).tolist(), reduction)
    close(loss(z, q), torch.tensor(expected, dtype=torch.float64))


# -- the forms of a target


@pytest.mark.parametrize('dist', [None, Uniform(), ClassPrior([1, 2, 3, 4, 5])])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_law_2_index_one_hot_and_mixture_agree(layout, dist):
    "The same result and the same gradient"
    for reduction, weight_by in itertools.product(REDUCTIONS, ('class', 'example')):
        z, y, axis = batch(layout, torch.float64)
        loss = LabelSmoothingCrossEntropy(.2, W, reduction, axis=axis, dist=dist, weight_by=weight_by)
        mixture = MixedTarget(torch.stack([y, y.flip(0)], 1), torch.tensor([1., 0.]).expand(len(y), 2), K, axis)
        results = []
        for target in (y, y.int(), to_dense(y, K, axis).double(), mixture):
            x = z.clone().requires_grad_()
            out = loss(x, target)
            out.sum().backward()
            results.append((out.detach(), x.grad))
        for out, grad in results[1:]: close(out, results[0][0]), close(grad, results[0][1])


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype):
    z, y, _ = batch(ignored=False)
    close(LabelSmoothingCrossEntropy()(z, y.to(dtype)), LabelSmoothingCrossEntropy()(z, y))


@pytest.mark.parametrize('dist', [None, Uniform()])
def test_a_column_of_labels_is_as_good(dist):
    "fastai's tabular data and masks with a channel come so"
    z, y, _ = batch()
    close(LabelSmoothingCrossEntropy(dist=dist)(z, y[:, None]), LabelSmoothingCrossEntropy(dist=dist)(z, y))
    z, y, _ = batch('NKHW')
    loss = LabelSmoothingCrossEntropy(axis=1, dist=dist)
    close(loss(z, y[:, None]), loss(z, y))


@pytest.mark.parametrize('loss', [LabelSmoothingCrossEntropy(.1, W), LabelSmoothingCrossEntropy(.1, dist=Uniform())])
def test_nothing_to_learn_from(loss):
    z = torch.randn(4, K, requires_grad=True)
    for target in (torch.full((4,), -100), torch.zeros(4, K)):
        out = loss(z, target)
        out.backward()
        assert out == 0 and (z.grad == 0).all()
    assert loss(torch.randn(0, K), torch.zeros(0).long()) == 0


def test_weights_of_zero_for_all_labels_present():
    "torch gives nan here; there is nothing to learn from"
    loss = LabelSmoothingCrossEntropy(.1, torch.tensor([0., 1., 1., 1., 1.]))(torch.randn(2, K), torch.tensor([0, 0]))
    assert loss == 0 and not F.cross_entropy(torch.randn(2, K), torch.tensor([0, 0]), torch.tensor([0., 1., 1., 1., 1.]), label_smoothing=.1).isfinite()


def test_mass_between_0_and_1():
    "A label blended with an ignored position counts with its weight, in the loss and in the denominator"
    z, y, _ = batch(ignored=False)
    lam = torch.rand(8)
    for by in ('class', 'example'):
        per = LabelSmoothingCrossEntropy(.1, W, 'none', weight_by=by)(z, y)
        close(LabelSmoothingCrossEntropy(.1, W, weight_by=by)(z, to_dense(y, K)*lam[:, None]), (per*lam).sum()/(W[y]*lam).sum())


def test_example_weights_leave_the_optimum_at_the_target():
    "The optimum of the loss in the logits, found by its gradient: p = S q for 'example', p ∝ w·S q for 'class'"
    s, w = torch.tensor([.9, .1]), torch.tensor([1., 16.])
    for by, p in (('example', s), ('class', w*s/(w*s).sum())):
        z = p.log()[None].requires_grad_()
        LabelSmoothingCrossEntropy(.2, w, weight_by=by)(z, torch.tensor([0])).backward()
        close(z.grad, torch.zeros(1, 2))


# -- numbers at the edge


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('loss', [LabelSmoothingCrossEntropy(.1), LabelSmoothingCrossEntropy(.1, dist=Uniform())])
def test_half_precision_is_computed_in_single(loss, dtype):
    z, y, _ = batch(ignored=False)
    h = (z*100).to(dtype).requires_grad_()
    out = loss(h, y)
    close(out, loss(h.detach().float(), y))
    out.backward()
    assert out.dtype is torch.float32 and h.grad.dtype is dtype and h.grad.isfinite().all()


def test_impossible_classes():
    "A logit of -inf: finite where torch is finite, inf where torch is inf, and no nan where torch has one"
    z = torch.tensor([[1., 2., -math.inf]])
    y, one_hot = torch.tensor([0]), torch.tensor([[1., 0., 0.]])
    for target in (y, one_hot):
        x = z.clone().requires_grad_()
        out = LabelSmoothingCrossEntropy(0.)(x, target)
        out.backward()
        close(out, F.cross_entropy(z, y))
        assert x.grad.isfinite().all()
        assert LabelSmoothingCrossEntropy(.1)(z, target).isinf() and F.cross_entropy(z, y, label_smoothing=.1).isinf()
    assert F.cross_entropy(z, one_hot).isnan()


def test_nan_logits_of_ignored_rows_do_not_matter():
    z, y, _ = batch(ignored=False)
    y[0] = -100
    expected = LabelSmoothingCrossEntropy(.1)(z, y)
    z[0] = math.nan
    close(LabelSmoothingCrossEntropy(.1)(z, y), expected)
    close(F.cross_entropy(z, y, label_smoothing=.1), expected)


@pytest.mark.parametrize('dist', [None, Uniform()])
def test_impossible_class_without_weight(dist):
    z, w = torch.tensor([[1., 2., -math.inf]]), torch.tensor([1., 1., 0.])
    log_p = z.log_softmax(1)[0, :2].tolist()
    expected = -(.9*log_p[0] + .1/3*(log_p[0]+log_p[1]))
    close(LabelSmoothingCrossEntropy(.1, w, dist=dist)(z, torch.tensor([0])), expected)


# -- fastai's contract

LOSSES = [LabelSmoothingCrossEntropy(), LabelSmoothingCrossEntropy(.2, W, 'sum', axis=1, ignore_index=3, weight_by='example'),
          LabelSmoothingCrossEntropy([.1, .2, .3, .4, .5]), LabelSmoothingCrossEntropy(.3, convention='others'),
          LabelSmoothingCrossEntropy(-.2, negative=True), LabelSmoothingCrossEntropy(.1, dist=ClassPrior([1, 2, 3, 4, 5])),
          LabelSmoothingCrossEntropy(.1, dist=Similarity(torch.eye(5))), LabelSmoothingNLL(.1)]


@pytest.mark.parametrize('loss', LOSSES, ids=repr)
def test_repr_builds_the_loss_again(loss):
    z, y, _ = batch(ignored=False)
    again = eval(repr(loss))
    assert repr(again) == repr(loss) and ' at 0x' not in repr(loss)
    close(again(z, y), loss(z, y))


@pytest.mark.parametrize('loss', LOSSES, ids=repr)
def test_contract(loss):
    z, y, _ = batch(ignored=False)
    before = loss.reduction
    for r in REDUCTIONS:
        loss.reduction = r
        assert loss(z, y).ndim == (r == 'none')
    loss.reduction = before
    with pytest.raises(ValueError, match="'mean', 'sum', 'none'"): loss.reduction = 'batchmean'
    with pytest.raises(ValueError): loss.eps = 2.
    assert loss.to('cpu') is loss and loss.activation(z).shape == z.shape
    assert isinstance(loss, nn.Module) and loss.y_int


def test_both_names_are_one_class():
    assert LabelSmoothingCrossEntropyFlat is LabelSmoothingCrossEntropy


def test_fastai_tensor_types():
    z, y, _ = batch()
    loss = LabelSmoothingCrossEntropy(.1)
    out = loss(TensorBase(z), TensorCategory(y))
    assert type(out) is torch.Tensor
    close(out, loss(z, y))


def test_weights_follow_the_module():
    loss = LabelSmoothingCrossEntropy(.1, W, dist=ClassPrior([1, 2, 3, 4, 5])).to('meta')
    assert loss.weight.device.type == 'meta' and loss.dist.share.device.type == 'meta'
    assert not LabelSmoothingCrossEntropy(.1, W.clone().requires_grad_()).weight.requires_grad


@pytest.mark.parametrize('make, error, words', [
    (lambda z, y: LabelSmoothingCrossEntropy(axis=1)(torch.randn(2, 4, 4, K), torch.zeros(2, 4, 4).long()), ValueError, 'axis=3 would fit'),
    (lambda z, y: LabelSmoothingCrossEntropy()(z, torch.rand(8, K+1)), ValueError, r'want indices \(8,\) or a dense target \(8, 5\)'),
    (lambda z, y: LabelSmoothingCrossEntropy()(z, y+K), ValueError, r'outside \[0, 5\)'),
    (lambda z, y: LabelSmoothingCrossEntropy(dist=Uniform())(z, y+K), ValueError, r'outside \[0, 5\)'),
    (lambda z, y: LabelSmoothingCrossEntropy(weight=W[:3])(z, y), ValueError, 'but there are 5 classes'),
    (lambda z, y: LabelSmoothingCrossEntropy([.1, .2])(z, y), ValueError, 'but there are 5 classes'),
    (lambda z, y: LabelSmoothingCrossEntropy(weight=torch.ones(2, 2)), ValueError, '1-D'),
    (lambda z, y: LabelSmoothingCrossEntropy(weight_by='row'), ValueError, "'class', 'example'"),
    (lambda z, y: LabelSmoothingCrossEntropy(convention='half'), ValueError, "'uniform', 'others', 'classy'"),
    (lambda z, y: LabelSmoothingCrossEntropy(dist=Uniform(), convention='others'), ValueError, 'convention'),
    (lambda z, y: LabelSmoothingCrossEntropy(dist=ClassPrior([1, 2]))(z, y), ValueError, 'made for 2 classes, but there are 5'),
    (lambda z, y: LabelSmoothingCrossEntropy(-.1), ValueError, 'negative=True'),
    (lambda z, y: LabelSmoothingCrossEntropy()(z, y > 2), TypeError, 'ambiguous'),
    (lambda z, y: LabelSmoothingCrossEntropy()(z.long(), y), TypeError, 'floating'),
    (lambda z, y: LabelSmoothingCrossEntropy()(z, MixedTarget(y[:, None], torch.ones(8, 1), 7)), ValueError, r'\(8, 7\)'),
    (lambda z, y: smooth_cross_entropy(z, y, 1.2), ValueError, r'\[0, 1\]'),
    (lambda z, y: smooth_cross_entropy(z, y, reduction='average'), ValueError, 'reduction'),
])
def test_errors(make, error, words):
    z, y, _ = batch(ignored=False)
    with pytest.raises(error, match=words): make(z, y)


@pytest.mark.parametrize('loss', [LabelSmoothingCrossEntropy, LabelSmoothingNLL, LabelSmoothingFocal, LabelSmoothingDice])
def test_what_is_no_distribution(loss):
    for dist in ('uniform', torch.eye(3), Uniform):
        with pytest.raises(TypeError, match='such as Uniform()'): loss(.1, dist=dist)


def test_dist_equals_smoothed_dense_targets():
    z, y, _ = batch(ignored=False)
    dist = Similarity(torch.rand(K, K).softmax(1))
    close(LabelSmoothingCrossEntropy(.3, dist=dist)(z, y), F.cross_entropy(z, smooth_labels(y, .3, K, dist=dist)))


def test_all_rows_masked_logits_numpy_weights():
    loss = LabelSmoothingCrossEntropy(.1, np.array([1., 2., 3., .5, 4.], dtype=np.float32))
    z, y, _ = batch()
    close(loss(z, y), F.cross_entropy(z, y, W, label_smoothing=.1))


def test_a_second_target_is_not_swallowed():
    z, y, _ = batch()
    with pytest.raises(TypeError): LabelSmoothingCrossEntropy()(z, y, y)


def test_settings_are_checked_when_used():
    z, y, _ = batch()
    for name in ('convention', 'weight_by'):
        loss = LabelSmoothingCrossEntropy(.1)
        setattr(loss, name, 'foo')
        with pytest.raises(ValueError, match=name): loss(z, y)


def test_functional_forms_take_lists_and_check_ranges():
    z, y, _ = batch()
    close(smooth_cross_entropy(z, y, [.1]*K), smooth_cross_entropy(z, y, .1))


def test_flattened_labels():
    "fastai's losses take labels flattened"
    z, y, axis = batch('NTK')
    close(LabelSmoothingCrossEntropy()(z, y.flatten()), LabelSmoothingCrossEntropy()(z, y))


# -- several labels under one softmax


@given(st.integers(1, 5), st.integers(2, 6), st.floats(0, 1), st.integers(0, 2**31))
def test_multi_label_against_loop(n, k, eps, seed):
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(n, k, generator=g, dtype=torch.float64), torch.randint(0, 2, (n, k), generator=g)
    losses, rows = [], 0
    for zi, yi in zip(z.tolist(), y.tolist()):
        log_p, positives = oracles.log_softmax_row(zi), [i for i, v in enumerate(yi) if v]
        rows += bool(positives)
        losses.append((1-eps)*sum(-log_p[i] for i in positives)/len(positives) + eps/k*sum(-v for v in log_p) if positives else 0.)
    for target in (y, y.double(), y.bool()):
        close(MultiLabelSmoothingCrossEntropy(eps, 'none')(z, target), torch.tensor(losses, dtype=torch.float64))
        close(MultiLabelSmoothingCrossEntropy(eps)(z, target), sum(losses)/rows if rows else 0.)


def test_multi_label_of_one_label_is_cross_entropy():
    z, y = torch.randn(6, K), torch.randint(0, K, (6,))
    for t in (y, to_dense(y, K)): close(MultiLabelSmoothingCrossEntropy(.1)(z, t), LabelSmoothingCrossEntropy(.1)(z, y))


def test_multi_label_decodes_the_positives_at_the_optimum():
    y = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0]])
    q = smooth_labels(y/y.sum(1, keepdim=True), .3)
    loss = MultiLabelSmoothingCrossEntropy(.3)
    z = q.log().requires_grad_()
    loss(z, y).backward()
    close(z.grad, torch.zeros_like(z))
    assert torch.equal(loss.decodes(loss.activation(z)).long(), y)


# -- label relaxation


@pytest.mark.parametrize('alpha', [0., .1, .5])
def test_relaxation_against_loop(alpha):
    z, y = 3*torch.randn(40, K, dtype=torch.float64), torch.randint(0, K, (40,))
    per = LabelRelaxation(alpha, reduction='none')
    expected = torch.tensor([oracles.relaxation_row(a, b, alpha) for a, b in zip(z.tolist(), y.tolist())], dtype=torch.float64)
    assert (expected == 0).any() or not alpha
    close(per(z, y), expected)
    lam = torch.rand(40, dtype=torch.float64)
    mixed = torch.lerp(to_dense(y.flip(0), K).double(), to_dense(y, K).double(), lam[:, None])
    close(per(z, mixed), torch.lerp(per(z, y.flip(0)), per(z, y), lam))
    w = torch.tensor([1., 2., .5, 3., .2])
    close(LabelRelaxation(alpha, w)(z, y), (w[y]*expected).sum()/w[y].sum())


def test_relaxation_gradient():
    "p - r with r held fixed, 0 where the label is probable enough; finite at the ends"
    z, y = (3*torch.randn(12, K, dtype=torch.float64)).requires_grad_(), torch.randint(0, K, (12,))
    LabelRelaxation(.2, reduction='sum')(z, y).backward()
    p = z.detach().softmax(1)
    py = p.gather(1, y[:, None])
    r = (.2*p/(1-py)).scatter(1, y[:, None], .8)
    close(z.grad, torch.where(py >= .8, 0., p-r))
    for alpha in (0., .1):
        x = torch.tensor([[200., 0., 0.], [-200., 0., 0.]], requires_grad=True)
        LabelRelaxation(alpha)(x, torch.tensor([0, 0])).backward()
        assert x.grad.isfinite().all()
