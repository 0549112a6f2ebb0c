"The soft version of a loss is the loss itself on indices, and the registry says which losses have one"
from functools import partial

import fastai.losses as fl
import pytest
import timm.loss
import torch
from fastai.losses import BaseLoss, BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import nn
from torch.nn import functional as F

from fastai_smooth.callback import soft_loss
from fastai_smooth.callback.soft_loss import COMPUTES, is_known
from fastai_smooth.distributions import Uniform
from fastai_smooth.losses import LabelSmoothingBCE, LabelSmoothingCrossEntropy, MultiTargetLoss

K = 4


def test_subclass_that_computes_something_else_is_unknown():
    class Scaled(nn.CrossEntropyLoss):
        def forward(self, pred, target): return 3*super().forward(pred, target)
    with pytest.raises(TypeError, match='Scaled'): soft_loss(Scaled())
    with pytest.raises(TypeError, match='AsymmetricLossMultiLabel'): soft_loss(timm.loss.AsymmetricLossMultiLabel())


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(torch.tensor([1., 2., 3., 4.]), ignore_index=2, label_smoothing=.1, reduction='sum'),
                                  CrossEntropyLossFlat(weight=torch.tensor([1., 2., 3., 4.]), ignore_index=1), nn.NLLLoss(ignore_index=0),
                                  fl.LabelSmoothingCrossEntropyFlat(.3), timm.loss.LabelSmoothingCrossEntropy(.3),
                                  LabelSmoothingCrossEntropy(.3, weight_by='example', weight=[1, 2, 3, 4])], ids=repr)
def test_soft_loss_equals_the_loss_on_indices(loss):
    z, y = torch.randn(9, K).log_softmax(1), torch.randint(0, K, (9,))
    soft = soft_loss(loss)
    assert soft is not loss
    torch.testing.assert_close(soft(z, y), torch.as_tensor(loss(z, y)).as_subclass(torch.Tensor))
    ignored = getattr(soft, 'ignore_index', -100)
    torch.testing.assert_close(soft(z, F.one_hot(y, K)*(y != ignored)[:, None].float()), soft(z, y))


@pytest.mark.parametrize('loss', [BCEWithLogitsLossFlat(thresh=.3), nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1., 2., 3., 4.]), reduction='sum'),
                                  timm.loss.BinaryCrossEntropy(0., sum_classes=True, target_threshold=.4)], ids=repr)
def test_soft_binary_loss_equals_the_loss(loss):
    z, y = torch.randn(9, K), torch.rand(9, K)
    torch.testing.assert_close(soft_loss(loss)(z, y), torch.as_tensor(loss(z, y)).as_subclass(torch.Tensor))
    assert soft_loss(loss).thresh == getattr(loss, 'thresh', .5)


def test_soft_loss_of_ours_is_a_copy():
    loss = LabelSmoothingCrossEntropy(0., [1, 2, 3, 4])
    soft = soft_loss(loss)
    soft.eps, soft.dist, soft.reduction = .5, Uniform(), 'sum'
    assert loss.eps == 0 and loss.dist is None and loss.reduction == 'mean' and soft.weight is loss.weight


def test_advice_for_unknown_losses():
    for loss, words in ((fl.MSELossFlat(), 'register.MSELoss'), (lambda p, y: 0, 'loss is a function'), (partial(F.nll_loss), 'nn.Module of your own'),
                        (F.nll_loss, 'loss is a function')):
        with pytest.raises(TypeError, match=words): soft_loss(loss)




def test_every_entry_can_be_asked_for():
    "`is_known` is whether `soft_loss` has an answer"
    known = [nn.CrossEntropyLoss(), CrossEntropyLossFlat(), BaseLoss(nn.NLLLoss), F.cross_entropy, LabelSmoothingBCE(), fl.DiceLoss(),
             timm.loss.BinaryCrossEntropy(), MultiTargetLoss(nn.MSELoss(), nn.CrossEntropyLoss())]
    for loss in known:
        assert is_known(loss)
        soft_loss(loss)
    class Other(nn.CrossEntropyLoss):
        def forward(self, pred, target): return 2*super().forward(pred, target)
    for loss in (Other(), BaseLoss(Other), nn.MSELoss(), fl.MSELossFlat(), F.nll_loss, print, object()):
        assert not is_known(loss)
        with pytest.raises(TypeError): soft_loss(loss)
    assert {nn.CrossEntropyLoss, BaseLoss, fl.FocalLoss} <= COMPUTES.keys()


def test_a_subclass_that_computes_the_same_is_known():
    class Named(nn.CrossEntropyLoss): pass
    assert repr(soft_loss(Named(ignore_index=3))) == repr(LabelSmoothingCrossEntropy(0., axis=1, ignore_index=3))
