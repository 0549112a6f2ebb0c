"A loss is asked for its settings in one way, through every wrapper"
from functools import partial

import fastai.losses as fl
import pytest
import timm.loss
import torch
from torch import nn
from torch.nn import functional as F

from fastai_smooth.distributions import ClassPrior
from fastai_smooth.losses import (
    CombinedLoss,
    EachClass,
    LabelSmoothingBCE,
    LabelSmoothingCrossEntropy,
    LabelSmoothingDice,
    LabelSmoothingFocal,
    LogitPenalty,
    MultiTargetLoss,
    loss_settings,
)

W = torch.tensor([1., 2., 3.])


class Scaled(nn.Module):
    "A user's wrapper"
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, pred, target): return 2*self.loss(pred, target)


@pytest.mark.parametrize('wrap', [lambda loss: loss, LogitPenalty, CombinedLoss, lambda loss: CombinedLoss(LabelSmoothingDice(), loss),
                                  lambda loss: CombinedLoss(LogitPenalty(loss)), lambda loss: LogitPenalty(CombinedLoss(loss)),
                                  Scaled, lambda loss: Scaled(Scaled(loss)), MultiTargetLoss, lambda loss: MultiTargetLoss(nn.MSELoss(), loss)])
def test_through_wrappers(wrap):
    loss = wrap(LabelSmoothingCrossEntropy(.1, W, axis=1, ignore_index=255, convention='others'))
    found = loss_settings(loss, head=len(loss.losses)-1 if isinstance(loss, MultiTargetLoss) else 0)
    assert found[:3] == (1, 255, 'others') and found.weight is not None and found.n_classes == 3


@pytest.mark.parametrize('loss, axis, ignore_index, n_classes', [
    (nn.CrossEntropyLoss(W, ignore_index=255), 1, 255, 3), (nn.NLLLoss(), 1, -100, None), (nn.MSELoss(), None, -100, None), (F.cross_entropy, None, -100, None),
    (fl.CrossEntropyLossFlat(axis=1, ignore_index=255, weight=W), 1, 255, 3), (fl.CrossEntropyLossFlat(), -1, -100, None),
    (fl.FocalLossFlat(axis=1), 1, -100, None), (fl.DiceLoss(axis=2), 2, -100, None), (fl.LabelSmoothingCrossEntropyFlat(weight=W), -1, -100, 3),
    (timm.loss.LabelSmoothingCrossEntropy(), None, -100, None), (partial(F.cross_entropy, weight=W, ignore_index=2), None, 2, 3),
    (EachClass(fl.CrossEntropyLossFlat(axis=1, ignore_index=255, weight=W), axis=1), 1, 255, 3), (EachClass(nn.MultiMarginLoss(), axis=-1), -1, -100, None),
    (LabelSmoothingBCE(pos_weight=W), None, -100, 3), (LabelSmoothingCrossEntropy([.1, .2, .3, .4]), -1, -100, 4),
    (LabelSmoothingFocal(.1, dist=ClassPrior([1, 2]), axis=1), 1, -100, 2), (LogitPenalty(LabelSmoothingCrossEntropy(ignore_index=None)), -1, None, None)])
def test_each_kind(loss, axis, ignore_index, n_classes):
    found = loss_settings(loss)
    assert (found.axis, found.ignore_index, found.n_classes) == (axis, ignore_index, n_classes)


def test_the_wrapped_loss_is_asked_not_its_copy():
    "fastai's wrappers copy the attributes of the loss that they wrap"
    loss = fl.CrossEntropyLossFlat(ignore_index=255)
    assert vars(loss)['ignore_index'] == 255
    loss.func.ignore_index = 7
    assert loss_settings(loss).ignore_index == 7


def test_parts_that_ignore_different_labels():
    with pytest.raises(ValueError, match='give all the same ignore_index'):
        loss_settings(CombinedLoss(LabelSmoothingDice(ignore_index=0), LabelSmoothingCrossEntropy(axis=1, ignore_index=255)))


def test_a_penalty_around_a_loss_that_ignores_nothing():
    z, y = torch.randn(6, 3), torch.randint(0, 3, (6,))
    for kind in ('margin', 'maxsup', 'confidence'):
        plain, none = (LogitPenalty(LabelSmoothingCrossEntropy(.1, ignore_index=i), kind) for i in (-100, None))
        torch.testing.assert_close(none(z, y), plain(z, y))
