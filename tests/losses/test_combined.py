"Losses made of losses: penalties and sums"
import copy
import math

import oracles
import pytest
import torch
from torch import nn

from fastai_smooth.distributions import ClassPrior
from fastai_smooth.losses import (
    CombinedLoss,
    LabelSmoothingBCE,
    LabelSmoothingCrossEntropy,
    LabelSmoothingDice,
    LabelSmoothingFocal,
    LogitPenalty,
    MultiLabelSmoothingCrossEntropy,
)
from fastai_smooth.targets import MixedTarget, to_dense

K = 4


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol, check_dtype=False)


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

LOSSES = [MultiLabelSmoothingCrossEntropy(.2, axis=1), LabelSmoothingFocal(.1, 3., [1., 2., 3., 4.], axis=1, dist=ClassPrior([1, 2, 3, 4])),
          LabelSmoothingDice(.1, smooth=1., reduction='mean', square_in_union=True), LogitPenalty(LabelSmoothingFocal(.1, axis=1), 'maxsup', .2),
          LogitPenalty(LabelSmoothingDice(), 'margin', margin=2.), LogitPenalty(LabelSmoothingCrossEntropy(axis=1), 'confidence'),
          CombinedLoss(LabelSmoothingDice(reduction='mean'), LogitPenalty(LabelSmoothingCrossEntropy(axis=1), 'margin'), weights=[1., .5])]


@pytest.mark.parametrize('loss', LOSSES, ids=lambda x: repr(x)[:40])
def test_contract(loss):
    z, y = torch.randn(3, K, 4, 4), torch.randint(0, K, (3, 4, 4))
    again = eval(repr(loss))
    assert repr(again) == repr(loss)
    close(again(z, y), loss(z, y))
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
        for _ in range(2): both.reduction = 'sum' # what it says already changes nothing
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
