"The losses in training, under the callback: fastai's and ours"
import fastai.losses as fl
import learners
import numpy as np
import oracles
import pytest
import torch
from fastai.callback.mixup import CutMix, MixUp
from learners import K, Look, fit, make_learner

from fastai_smooth.callback import LabelSmoothing, soft_loss
from fastai_smooth.distributions import Uniform
from fastai_smooth.losses import (
    CombinedLoss,
    LabelRelaxation,
    LabelSmoothingCrossEntropy,
    LabelSmoothingDice,
    LabelSmoothingFocal,
    LogitPenalty,
    MultiLabelSmoothingCrossEntropy,
)


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


def test_reductions_of_the_parts_in_training():
    "fastai sets 'none' for a while: each part gets back its own"
    both = CombinedLoss(LabelSmoothingDice(0.), LabelSmoothingCrossEntropy(0., axis=1))
    learn = fit(make_learner('mask', both, [LabelSmoothing(0.)]), 1)
    assert [loss.reduction for loss in both.losses] == ['sum', 'mean']
    with learn.no_bar(): assert learn.get_preds(with_loss=True)[2].shape == (24,)
    assert [loss.reduction for loss in both.losses] == ['sum', 'mean']


def test_relaxation_under_the_callback_and_bad_input():
    learn = fit(make_learner('index', LabelRelaxation(0.), [LabelSmoothing(.2), MixUp(), Look()]), 1)
    for x, pred, seen, _ in learn.look.seen:
        truth = learners.truth_of(x, 'index').tolist()
        expected = [sum(q*oracles.relaxation_row(z, k, .2) for k, q in enumerate(row)) for z, row in zip(pred.tolist(), truth)]
        np.testing.assert_allclose(seen, np.mean(expected), rtol=1e-4)
    assert LabelRelaxation(1.)(torch.randn(2, K), torch.tensor([0, 1])) < 1e-5, 'nothing is asked for'
    with pytest.raises(ValueError, match='has no meaning'):
        fit(make_learner('index', LabelRelaxation(0.), [LabelSmoothing(.2, Uniform())]), 1)
