"The losses for several labels, areas and easy examples, penalties and sums: against loops and fastai, alone and under the callback"
import copy
import math
import pickle

import fastai.losses as fl
import learners
import numpy as np
import oracles
import pytest
import torch
from fastai.callback.mixup import CutMix, MixUp
from hypothesis import given
from hypothesis import strategies as st
from learners import K, Look, fit, make_learner
from torch import nn
from torch.nn import functional as F

import fastai_smooth.kernels as kernels
from fastai_smooth.callback import LabelSmoothing, soft_loss
from fastai_smooth.distributions import ClassPrior, Uniform
from fastai_smooth.kernels import smooth_binary_cross_entropy
from fastai_smooth.losses import (
    CombinedLoss,
    LabelRelaxation,
    LabelSmoothingBCE,
    LabelSmoothingCrossEntropy,
    LabelSmoothingDice,
    LabelSmoothingFocal,
    LogitPenalty,
    MultiLabelSmoothingCrossEntropy,
)
from fastai_smooth.targets import MixedTarget, smooth_labels, to_dense


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol, check_dtype=False)


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
    y = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0]])
    q = smooth_labels(y/y.sum(1, keepdim=True), .3)
    loss = MultiLabelSmoothingCrossEntropy(.3)
    z = q.log().requires_grad_()
    loss(z, y).backward()
    close(z.grad, torch.zeros_like(z))
    assert torch.equal(loss.decodes(loss.activation(z)).long(), y)


@pytest.mark.parametrize('kind', ['multi_hot', 'multi_hot_int'])
def test_multi_label_under_the_callback(kind):
    "Each mixed row is divided by what positives it has"
    loss = MultiLabelSmoothingCrossEntropy(0.)
    learn = fit(make_learner(kind, loss, [LabelSmoothing(.2), MixUp(), Look()]), 1)
    for x, pred, seen, _ in learn.look.seen:
        truth = learners.truth_of(x, kind)
        n = truth.sum(1, keepdim=True)
        np.testing.assert_allclose(seen, oracles.cross_entropy(pred.tolist(), (truth/n.where(n > 1e-6, 1.)).tolist(), .2), rtol=1e-4)
    assert learn.loss_func is loss and loss.eps == 0


# -- focal

@pytest.mark.parametrize('gamma', [0., .5, 1., 2., 5.])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_focal_is_fastais_on_indices(gamma, reduction):
    z, y = torch.randn(9, K), torch.randint(0, K, (9,))
    close(LabelSmoothingFocal(0., gamma, reduction=reduction)(z, y), fl.FocalLossFlat(gamma=gamma, reduction=reduction)(z, y))


def test_focal_against_loop():
    z, q, w = torch.randn(5, K, dtype=torch.float64), torch.rand(5, K, dtype=torch.float64), [1., 2., .5, 3.]
    total = mass = 0.
    for zi, qi in zip(z.tolist(), q.tolist()):
        log_p, s = oracles.log_softmax_row(zi), oracles.smooth_row(qi, .2)
        total += sum(-w[k]*s[k]*(1-math.exp(log_p[k]))**2*log_p[k] for k in range(K))
        mass += sum(w[k]*qi[k] for k in range(K))
    close(LabelSmoothingFocal(.2, 2., w)(z, q), total/mass)


def test_focal_is_linear_in_the_target():
    z, y, lam = torch.randn(6, K), torch.randint(0, K, (6,)), torch.rand(6)
    per = LabelSmoothingFocal(.1, reduction='none')
    mixed = torch.lerp(to_dense(y.flip(0), K), to_dense(y, K), lam[:, None])
    close(per(z, mixed), torch.lerp(per(z, y.flip(0)), per(z, y), lam))


def test_focal_gradient_where_it_is_sure():
    z = torch.tensor([[200., 0., 0.]], requires_grad=True)
    for gamma in (.5, 1., 2.):
        LabelSmoothingFocal(0., gamma)(z, torch.tensor([0])).backward()
        assert z.grad.isfinite().all()
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: LabelSmoothingFocal(.1)(x, torch.tensor([0, 1, 2])), x)


# -- Dice

def dice_loop(z, q, eps, smooth, square):
    "Per example and class, pixel by pixel; q rows per pixel, unsmoothed"
    n, k = z.shape[:2]
    out = np.zeros((n, k))
    for i in range(n):
        inter, union = np.zeros(k), np.zeros(k)
        for pz, pq in zip(oracles.rows(z[i], 0).tolist(), oracles.rows(q[i], 0).tolist()):
            s, mass = oracles.smooth_row(pq, eps), sum(pq)
            for c, lp in enumerate(oracles.log_softmax_row(pz)):
                p = math.exp(lp)*mass
                inter[c] += p*s[c] if square else min(p, s[c])
                union[c] += p*p+s[c]*s[c] if square else p+s[c]
        out[i] = 1-(2*inter+smooth)/(union+smooth)
    return out


@pytest.mark.parametrize('square', [False, True])
@pytest.mark.parametrize('eps', [0., .2])
@pytest.mark.parametrize('shape', [(2, K, 3, 4), (2, K, 2, 3, 2), (3, K)])
def test_dice_against_loop(shape, eps, square):
    z = torch.randn(shape, dtype=torch.float64)
    y = torch.randint(0, K, z[:, 0].shape)
    y.view(-1)[::5] = -100
    q = to_dense(y, K).double()
    soft = torch.lerp(q, q.flip(0), .3)
    for target, dense in ((y, q), (q, q), (soft, soft), (MixedTarget(y[:, None], torch.ones(len(y), 1), K), q)):
        expected = dice_loop(z, dense, eps, 1e-6, square)
        for r, e in (('none', expected), ('sum', expected.sum()), ('mean', expected.mean())):
            close(LabelSmoothingDice(eps, reduction=r, square_in_union=square)(z, target), torch.as_tensor(e), 1e-5)


@pytest.mark.parametrize('square', [False, True])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_dice_is_fastais_on_hard_masks(reduction, square):
    z, y = torch.randn(2, K, 6, 5), torch.randint(0, K, (2, 6, 5))
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    ours = LabelSmoothingDice(0., reduction=reduction, square_in_union=square)(a, y)
    theirs = fl.DiceLoss(reduction=reduction, square_in_union=square)(b, y)
    close(ours, theirs.as_subclass(torch.Tensor), 1e-4)
    ours.sum().backward(), theirs.sum().backward()
    close(a.grad, b.grad, 1e-5)


@pytest.mark.parametrize('square', [False, True])
def test_dice_is_zero_where_the_prediction_is_the_target(square):
    z = torch.randn(2, K, 4, 4, dtype=torch.float64)
    q = z.softmax(1)
    q[:, :, 0] *= .5  # half of the mass ignored
    q[:, :, 1] = 0.
    close(LabelSmoothingDice(0., square_in_union=square)(z, q), 0., 1e-6)


def test_dice_with_nothing_to_learn_from():
    z = torch.randn(1, K, 3, 3, requires_grad=True)
    loss = LabelSmoothingDice(.1)(z, torch.full((1, 3, 3), -100))
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


# -- penalties

@pytest.mark.parametrize('layout', ['NK', 'NKHW'])
@pytest.mark.parametrize('kind', ['margin', 'maxsup', 'confidence'])
def test_penalty_against_loop(kind, layout):
    shape = {'NK': (6, K), 'NKHW': (2, K, 3, 2)}[layout]
    z = 10*torch.randn(shape, dtype=torch.float64)
    y = torch.randint(0, K, z[:, 0].shape)
    y.view(-1)[1] = -100
    total = 0.
    for zi, yi in zip(oracles.rows(z, 1).tolist(), y.flatten().tolist()):
        if yi == -100: continue
        log_p = oracles.log_softmax_row(zi)
        if kind == 'margin': total += sum(max(0., max(zi)-v-4.) for v in zi)/K
        elif kind == 'maxsup': total += max(zi)-sum(zi)/K
        else: total += sum(math.exp(v)*v for v in log_p)
    base = LabelSmoothingCrossEntropy(.1, axis=1)
    for target in (y, to_dense(y, K).double(), MixedTarget(y[:, None], torch.ones(len(y), 1), K)):
        close(LogitPenalty(base, kind, .3, margin=4.)(z, target)-base(z, target), .3*total/(y != -100).sum())
    loss = LogitPenalty(copy.deepcopy(base), kind, .3, margin=4.)
    loss.reduction = 'none'
    assert loss(z, y).shape == y.shape and loss(z, y).view(-1)[1] == 0
    close(loss(z, y).sum()/(y != -100).sum(), LogitPenalty(base, kind, .3, margin=4.)(z, y))


# -- contract of all of them, alone and in combination

LOSSES = [MultiLabelSmoothingCrossEntropy(.2, axis=1), LabelSmoothingFocal(.1, 3., [1., 2., 3., 4.], axis=1, dist=ClassPrior([1, 2, 3, 4])),
          LabelSmoothingDice(.1, smooth=1., reduction='mean', square_in_union=True), LogitPenalty(LabelSmoothingFocal(.1, axis=1), 'maxsup', .2),
          LogitPenalty(LabelSmoothingDice(), 'margin', margin=2.), LogitPenalty(LabelSmoothingCrossEntropy(axis=1), 'confidence'),
          CombinedLoss(LabelSmoothingDice(reduction='mean'), LogitPenalty(LabelSmoothingCrossEntropy(axis=1), 'margin'), weights=[1., .5])]


@pytest.mark.parametrize('loss', LOSSES, ids=lambda x: repr(x)[:40])
def test_contract(loss):
    z, y = torch.randn(3, K, 4, 4), torch.randint(0, K, (3, 4, 4))
    again = eval(repr(loss))
    assert repr(again) == repr(loss)
    for other in (again, pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)): close(other(z, y), loss(z, y))
    loss = copy.deepcopy(loss)
    loss.eps = .3
    assert loss.eps == .3 and all(leaf.eps == .3 for leaf in loss.leaves())
    for r in ('mean', 'sum', 'none'):
        loss.reduction = r
        assert loss.reduction == r and (loss(z, y).ndim == 0) == (r != 'none') and len(loss(z, y).shape) < 4
    assert loss.activation(z).shape == z.shape and loss.to('cpu') is loss
    h = loss(z.half(), y)
    assert h.dtype is torch.float32
    with pytest.raises(ValueError): loss.eps = 2.
    with pytest.raises(ValueError): loss.reduction = 'average'


def test_combined_is_the_weighted_sum():
    z, y = torch.randn(2, K, 4, 4), torch.randint(0, K, (2, 4, 4))
    a, b = LabelSmoothingDice(.1), LabelSmoothingCrossEntropy(.1, axis=1)
    for target in (y, to_dense(y, K)): close(CombinedLoss(a, b, weights=[2., .5])(z, target), 2*a(z, target)+.5*b(z, target))
    both = CombinedLoss(copy.deepcopy(a), copy.deepcopy(b))
    both.reduction = 'none'
    assert both(z, y).shape == (2,)
    assert both.decodes(z).shape == y.shape


def test_combined_parts_get_their_own_reduction_back():
    both = CombinedLoss(LabelSmoothingDice(0.), LabelSmoothingCrossEntropy(0., axis=1))
    for _ in range(2):
        both.reduction = 'none'
        both.reduction = 'none'
        assert [loss.reduction for loss in both.losses] == ['none', 'none']
        both.reduction = 'sum'
        assert [loss.reduction for loss in both.losses] == ['sum', 'mean']
    learn = fit(make_learner('mask', both, [LabelSmoothing(0.)]), 1)
    assert [loss.reduction for loss in both.losses] == ['sum', 'mean']
    with learn.no_bar(): assert learn.get_preds(with_loss=True)[2].shape == (24,)
    assert [loss.reduction for loss in both.losses] == ['sum', 'mean']


@pytest.mark.parametrize('make, error, words', [
    (lambda: LabelSmoothingFocal(gamma=-1), ValueError, 'gamma'), (lambda: LabelSmoothingDice(smooth=0), ValueError, 'smooth'),
    (lambda: LogitPenalty(LabelSmoothingCrossEntropy(), 'l2'), ValueError, "'margin', 'maxsup', 'confidence'"),
    (lambda: LogitPenalty(nn.CrossEntropyLoss()), TypeError, 'of fastai_smooth'), (lambda: LogitPenalty(LabelSmoothingBCE()), ValueError, 'exclusive'),
    (lambda: LogitPenalty(LabelSmoothingCrossEntropy(), strength=-1), ValueError, 'strength'), (lambda: CombinedLoss(), ValueError, 'at least one'),
    (lambda: CombinedLoss(LabelSmoothingDice(), weights=[1, 2]), ValueError, '2 numbers for 1'),
    (lambda: CombinedLoss(nn.MSELoss()), TypeError, 'MSELoss'),
    (lambda: LogitPenalty(CombinedLoss(LabelSmoothingDice(), LabelSmoothingCrossEntropy(axis=1))), ValueError, 'put it around the part'),
    (lambda: LabelSmoothingDice()(torch.randn(2, K, 3, 3), torch.zeros(2, 3, 4).long()), ValueError, 'do not fit'),
    (lambda: LabelSmoothingDice()(torch.randn(2, K, 3, 3), torch.full((2, 3, 3), 9)), ValueError, 'Label 9'),
    (lambda: MultiLabelSmoothingCrossEntropy()(torch.randn(2, K), torch.full((2, K), 5)), ValueError, 'holds 5')])
def test_errors(make, error, words):
    with pytest.raises(error, match=words): make()


# -- under the callback, from fastai's losses and ours

SEGMENTATION = {'fastai dice': lambda: fl.DiceLoss(reduction='mean'), 'dice': lambda: LabelSmoothingDice(0., reduction='mean'),
                'fastai focal': lambda: fl.FocalLossFlat(axis=1), 'focal': lambda: LabelSmoothingFocal(0., axis=1),
                'penalty': lambda: LogitPenalty(LabelSmoothingCrossEntropy(0., axis=1), 'maxsup'),
                'sum': lambda: CombinedLoss(LabelSmoothingDice(0.), LabelSmoothingCrossEntropy(0., axis=1))}


@pytest.mark.parametrize('loss', SEGMENTATION)
@pytest.mark.parametrize('mixers', [[], [MixUp]])
@pytest.mark.parametrize('dist', [None, Uniform()])
def test_masks_under_the_callback(loss, mixers, dist):
    "The loss of the mixed truth, by the loss itself with its own eps on a dense target: what that computes is checked above"
    user = SEGMENTATION[loss]()
    learn = make_learner('mask', user, [LabelSmoothing(.2, dist), Look(), *[m() for m in mixers]])
    if loss.startswith('fastai'): learn._do_epoch_validate = lambda: None  # fastai's losses cannot ignore pixels
    fit(learn, 1)
    same = soft_loss(user)
    same.eps = .2
    for x, pred, seen, _ in learn.look.seen: np.testing.assert_allclose(seen, same(pred, learners.truth_of(x, 'mask')), rtol=1e-4)
    assert learn.loss_func is user and getattr(user, 'eps', 0) == 0 and getattr(user, 'dist', None) is None
    if hasattr(user, 'leaves'): assert all(leaf.eps == 0 and leaf.dist is None for leaf in user.leaves())


def test_smoothing_twice_is_seen_inside():
    for loss in (CombinedLoss(LabelSmoothingDice(0.), LabelSmoothingCrossEntropy(.1, axis=1)), LogitPenalty(LabelSmoothingCrossEntropy(.1, axis=1))):
        with pytest.raises(ValueError, match='already smooths'): fit(make_learner('mask', loss, [LabelSmoothing(.2)]), 1)


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match='no meaning'): fit(make_learner('mask', LabelSmoothingDice(0.), [LabelSmoothing(.2, convention='others')]), 1)
    with pytest.raises(ValueError, match='LabelSmoothingFocal'): soft_loss(fl.FocalLossFlat(weight=torch.ones(K)))


def test_classes_with_cutmix_and_focal():
    learn = fit(make_learner('index', fl.FocalLossFlat(), [LabelSmoothing(.1), CutMix(), Look()]), 1)
    focal = LabelSmoothingFocal(.1)
    for x, pred, seen, _ in learn.look.seen: np.testing.assert_allclose(seen, focal(pred, learners.truth_of(x, 'index')), rtol=1e-4)


# -- label relaxation

def relaxation_loop(z, y, alpha):
    "KL divergence from the nearest distribution that gives the label at least 1-alpha"
    p = [math.exp(v) for v in oracles.log_softmax_row(z)]
    if p[y] >= 1-alpha: return 0.
    r = [1-alpha if k == y else alpha*p[k]/sum(p[j] for j in range(len(p)) if j != y) for k in range(len(p))]
    return sum(a*math.log(a/b) for a, b in zip(r, p) if a)


@pytest.mark.parametrize('alpha', [0., .1, .5])
def test_relaxation_against_loop(alpha):
    z, y = 3*torch.randn(12, K, dtype=torch.float64), torch.randint(0, K, (12,))
    per = LabelRelaxation(alpha, reduction='none')
    expected = torch.tensor([relaxation_loop(a, b, alpha) for a, b in zip(z.tolist(), y.tolist())], dtype=torch.float64)
    assert (expected == 0).any() or not alpha
    close(per(z, y), expected)
    lam = torch.rand(12, dtype=torch.float64)
    mixed = torch.lerp(to_dense(y.flip(0), K).double(), to_dense(y, K).double(), lam[:, None])
    close(per(z, mixed), torch.lerp(per(z, y.flip(0)), per(z, y), lam))
    w = torch.tensor([1., 2., .5, 3.])
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
    assert torch.autograd.gradcheck(lambda x: LabelRelaxation(.1)(x, y), z)


def test_relaxation_under_the_callback_and_bad_input():
    learn = fit(make_learner('index', LabelRelaxation(0.), [LabelSmoothing(.2), MixUp(), Look()]), 1)
    for x, pred, seen, _ in learn.look.seen:
        truth = learners.truth_of(x, 'index').tolist()
        expected = [sum(q*relaxation_loop(z, k, .2) for k, q in enumerate(row)) for z, row in zip(pred.tolist(), truth)]
        np.testing.assert_allclose(seen, np.mean(expected), rtol=1e-4)
    assert LabelRelaxation(1.)(torch.randn(2, K), torch.tensor([0, 1])) < 1e-5, 'nothing is asked for'
    with pytest.raises(ValueError, match='has no meaning'):
        fit(make_learner('index', LabelRelaxation(0.), [LabelSmoothing(.2, Uniform())]), 1)


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('convention', ['half', 'uniform', 'complement'])
@pytest.mark.parametrize('shape', [(1, 1), (3, 5), (40, 70), (2, 3, 4)])
def test_binary_in_one_go(shape, convention, reduction):
    "The fast binary path gives the numbers and gradients of torch's own loss on smoothed targets, however often and scaled"
    z, y = 5*torch.randn(shape, dtype=torch.float64), torch.randint(0, 2, shape).double()
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    q = torch.tensor([oracles.binary_entry(v, .2, convention, shape[-1]) for v in y.flatten().tolist()], dtype=torch.float64).view(shape)
    loss = smooth_binary_cross_entropy(a, y, .2, convention=convention, reduction=reduction)
    assert 'GivesGradientAway' in type(loss.grad_fn).__name__
    expected = F.binary_cross_entropy_with_logits(b, q, reduction=reduction)
    (3*loss).backward(retain_graph=True)
    loss.backward()
    (4*expected).backward()
    close(loss, expected), close(a.grad, b.grad)
    with torch.no_grad(): close(smooth_binary_cross_entropy(a, y, .2, convention=convention, reduction=reduction), expected)
    f = lambda x: smooth_binary_cross_entropy(x, y, .2, convention=convention, reduction=reduction)
    if z.numel() < 30: assert torch.autograd.gradcheck(f, a) and torch.autograd.gradgradcheck(f, a)


def test_binary_where_the_fast_path_has_to_give_way():
    "Unknown entries, logits without bounds, blocks, single precision"
    y = torch.tensor([[1., 0., math.nan]])
    z = torch.tensor([[1., 2., 3.]], requires_grad=True)
    loss = smooth_binary_cross_entropy(z, y)
    close(loss, F.binary_cross_entropy_with_logits(z[:, :2], torch.tensor([[.95, .05]])))
    big = torch.tensor([[300., -300., 90.]])
    close(smooth_binary_cross_entropy(big, y.nan_to_num(0.)), F.binary_cross_entropy_with_logits(big, torch.tensor([[.95, .05, .05]])))
    for z in (math.inf, -math.inf, math.nan): # what torch says
        for label in (0., 1.):
            a, b = torch.tensor([z, 0.]), torch.tensor([label, 1.])
            torch.testing.assert_close(smooth_binary_cross_entropy(a, b, 0.), F.binary_cross_entropy_with_logits(a, b), equal_nan=True)
    z, y = 4*torch.randn(700, 1001), (torch.rand(700, 1001) < .1).float()
    assert z.numel() > kernels.BLOCK
    a, b = z.clone().requires_grad_(), z.double().requires_grad_()
    fast = smooth_binary_cross_entropy(a, y)
    exact = F.binary_cross_entropy_with_logits(b, y.double()*.9+.05)
    fast.backward(), exact.backward()
    close(fast, exact, 1e-6), close(a.grad, b.grad, 1e-10)
