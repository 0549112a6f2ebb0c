"Numbers at the edge, for every loss and path: nan, masked-out classes, padding, one column, empty batches, the axis of binary losses; compilers"
import copy
import math

import oracles
import pytest
import torch
from torch import nn

from fastai_smooth.distributions import ClassPrior, Uniform
from fastai_smooth.kernels import (
    smooth_binary_cross_entropy,
    smooth_binary_cross_entropy_reference,
    smooth_cross_entropy,
    smooth_cross_entropy_reference,
)
from fastai_smooth.losses import (
    CombinedLoss,
    EachClass,
    LabelRelaxation,
    LabelSmoothingBCE,
    LabelSmoothingCrossEntropy,
    LabelSmoothingDice,
    LabelSmoothingFocal,
    LabelSmoothingNLL,
    LogitPenalty,
    MultiLabelSmoothingCrossEntropy,
)
from fastai_smooth.targets import MixedTarget, to_dense

K = 4
CE = LabelSmoothingCrossEntropy
SOFTMAX = [CE(.1), CE(.1, [1., 2., 3., 4.]), CE(.1, [1., 2., 3., 4.], weight_by='example'), CE(.1, dist=Uniform()), CE([.1, .2, .3, .4]), LabelSmoothingNLL(.1),
           LabelSmoothingFocal(.1), LabelSmoothingFocal(.1, .5), LabelRelaxation(.1), LabelSmoothingDice(.1), MultiLabelSmoothingCrossEntropy(.1),
           LogitPenalty(CE(.1)), CombinedLoss(LabelSmoothingDice(.1), CE(.1)), EachClass(nn.CrossEntropyLoss())]
ids = lambda loss: repr(loss)[:60]
softmax_losses = pytest.mark.parametrize('loss', SOFTMAX, ids=ids)


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol, check_dtype=False, equal_nan=True)


def batch(dtype=torch.float32): return torch.randn(6, K, dtype=dtype), torch.tensor([0, 1, 2, 3, 0, 1])


# -- nan is not nothing

@softmax_losses
def test_a_nan_in_the_target_stays_nan(loss):
    "A row of votes 0/0, alone in its batch or not"
    z, y = batch()
    q = to_dense(y, K)
    q[2] = math.nan
    for rows in (slice(None), slice(2, 3)): assert loss(z[rows], q[rows]).isnan()


@pytest.mark.parametrize('f', [smooth_cross_entropy, smooth_cross_entropy_reference])
def test_a_nan_in_a_mixture_or_a_row_of_votes(f):
    z, y = batch()
    for grad in (False, True):
        w = torch.rand(6, 1)
        w[3] = math.nan
        x = z.clone().requires_grad_(grad)
        assert f(x, MixedTarget(torch.stack([y, y.flip(0)], 1), torch.cat([w, 1-w], 1), K, 1)).isnan()
        assert f(x, torch.full((6, K), math.nan)).isnan()
        assert f(x, torch.full((6, K), math.nan), weight=torch.ones(K)).isnan()


@pytest.mark.parametrize('bad', [math.nan, -1., math.inf])
def test_weights_that_are_none(bad):
    z, y = batch()
    w = torch.tensor([1., bad, 1., 1.])
    for make in (lambda: CE(.1, w), lambda: LabelSmoothingFocal(.1, weight=w), lambda: LabelRelaxation(.1, w), lambda: LabelSmoothingBCE(.1, w),
                 lambda: LabelSmoothingBCE(.1, pos_weight=w), lambda: smooth_cross_entropy(z, y, weight=w),
                 lambda: smooth_cross_entropy_reference(z, y, weight=w),
                 lambda: smooth_binary_cross_entropy(z, y, weight=w), lambda: smooth_binary_cross_entropy_reference(z, y, pos_weight=w)):
        with pytest.raises(ValueError, match='weight must be finite and at least 0'): make()


@pytest.mark.parametrize('loss', [CE(axis=1), CE(axis=1, weight=[1.]), LabelSmoothingFocal(axis=1), LabelRelaxation(axis=1), LabelSmoothingNLL(axis=1),
                                  LabelSmoothingDice(), MultiLabelSmoothingCrossEntropy(axis=1), CE(axis=1, dist=Uniform())], ids=ids)
def test_one_logit_per_pixel(loss):
    with pytest.raises(ValueError, match='use LabelSmoothingBCE'): loss(torch.randn(2, 1, 4, 4), torch.rand(2, 1, 4, 4))


def test_dice_of_nothing():
    assert LabelSmoothingDice(.1, reduction='mean')(torch.randn(0, K, 3, 3), torch.zeros(0, 3, 3).long()) == 0


# -- classes that are ruled out, and padding

@pytest.mark.parametrize('kind', ['margin', 'maxsup', 'confidence'])
@pytest.mark.parametrize('strength', [0., .3])
def test_penalties_of_a_class_that_is_ruled_out(kind, strength):
    "It adds nothing, as if the mean over K ran over the others"
    z, y = batch(torch.float64)
    z = 8*z
    z[:, 3] = -math.inf
    y = y.clamp(max=2)
    total = 0.
    for row in z[:, :3].tolist():
        log_p = oracles.log_softmax_row(row)
        total += {'margin': sum(max(0., max(row)-v-2.) for v in row)/K, 'maxsup': sum(max(row)-v for v in row)/K,
                  'confidence': sum(math.exp(v)*v for v in log_p)}[kind]
    x = z.clone().requires_grad_()
    loss = LogitPenalty(CE(0.), kind, strength, margin=2.)
    value = loss(x, y)
    value.backward()
    close(value-CE(0.)(z, y), strength*total/6)
    assert x.grad.isfinite().all() and (x.grad[:, 3] == 0).all()


@pytest.mark.parametrize('loss', [CE(0.), CE(0., [1., 2., 3., 4.]), LabelSmoothingFocal(0.), LabelSmoothingFocal(0., .5), LabelRelaxation(.1),
                                  LabelSmoothingDice(.1), LogitPenalty(LabelSmoothingFocal(0.), 'confidence'), LabelSmoothingNLL(0.)], ids=ids)
def test_gradients_of_a_class_that_is_ruled_out(loss):
    "As without the class, in index and dense targets"
    z, y = batch(torch.float64)
    if isinstance(loss, LabelSmoothingNLL): z = z.log_softmax(1)
    y = y.clamp(max=2)
    for target in (y, to_dense(y, K)):
        x = torch.cat([z[:, :3], torch.full((6, 1), -math.inf)], 1).requires_grad_()
        value = loss(x, target)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all() and (x.grad[:, 3] == 0).all()
        if isinstance(loss, (LogitPenalty, LabelSmoothingDice)) or getattr(loss, 'weight', None) is not None: continue
        small = z[:, :3].clone().requires_grad_()
        same = loss(small, target if target is y else target[:, :3])
        same.backward()
        close(value, same), close(x.grad[:, :3], small.grad)


@softmax_losses
@pytest.mark.parametrize('padding', [-math.inf, math.nan, math.inf])
def test_padding_has_no_gradient(loss, padding):
    z, y = batch()
    if isinstance(loss, LabelSmoothingNLL): z = z.log_softmax(1)
    y[[1, 4]] = -100
    ignored = y == -100
    targets = [y, to_dense(y, K), MixedTarget(y[:, None], torch.ones(6, 1), K)]
    if isinstance(loss, EachClass): targets = targets[1:2] # torch's own loss of indices has a gradient of nan
    for target in targets:
        expected = loss(z, target)
        x = z.clone()
        x[ignored] = padding
        x.requires_grad_()
        value = loss(x, target)
        value.backward()
        close(value, expected)
        assert x.grad.isfinite().all() and (x.grad[ignored] == 0).all()


@pytest.mark.parametrize('f', [smooth_binary_cross_entropy, smooth_binary_cross_entropy_reference])
def test_binary_logits_without_bounds(f):
    "0 times infinity is 0, the rest is inf, and what is unknown has no gradient"
    x = torch.tensor([[-math.inf, math.inf, 1.], [math.nan, -math.inf, 2.]], requires_grad=True)
    y = torch.tensor([[0., 1., 1.], [math.nan, math.nan, 0.]])
    for kwargs in ({}, dict(weight=torch.ones(3)), dict(pos_weight=torch.ones(3))):
        x.grad = None
        loss = f(x, y, 0., reduction='sum', **kwargs)
        loss.backward()
        close(loss, math.log1p(math.exp(-1)) + math.log1p(math.exp(2)))
        close(x.grad, [[0., 0., -1/(1+math.e)], [0., 0., 1/(1+math.exp(-2))]])
    assert f(x.detach()[:1], torch.tensor([[1., 0., 1.]]), 0.).isinf() and f(x.detach()[:1], y[:1], .1).isinf()


# -- the class dimension of binary losses

@pytest.mark.parametrize('convention', ['half', 'uniform', 'complement'])
def test_binary_masks_have_their_classes_at_1(convention):
    z, y, eps = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(0, 2, (2, 3, 4, 5)).double(), [.1, .2, .3]
    smoothed = torch.tensor([[oracles.binary_entry(v, eps[k], convention, 3) for k, v in enumerate(row)] for row in oracles.rows(y, 1).tolist()])
    expected = oracles.binary_cross_entropy(oracles.rows(z, 1).tolist(), smoothed.tolist())
    at_the_end = z.movedim(1, -1), y.movedim(1, -1)
    for f in (smooth_binary_cross_entropy, smooth_binary_cross_entropy_reference):
        close(f(z, y, eps, convention=convention), expected)
        close(f(*at_the_end, eps, convention=convention, axis=-1), expected)
    close(LabelSmoothingBCE(eps, convention=convention)(z, y), expected)
    close(LabelSmoothingBCE(eps, convention=convention, axis=-1)(*at_the_end), expected)


def test_binary_index_masks_and_sums_over_the_classes():
    z, y = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    rows = z.movedim(1, -1).reshape(-1, 3), y.reshape(-1)
    for kwargs in ({}, dict(sum_classes=True), dict(eps_neg=[.1, 0., .2])):
        close(LabelSmoothingBCE(.1, **kwargs)(z, y), LabelSmoothingBCE(.1, **kwargs)(*rows))
    close(smooth_binary_cross_entropy(z, y, .1), smooth_binary_cross_entropy(*rows, .1))
    assert repr(LabelSmoothingBCE(axis=-1)) == 'LabelSmoothingBCE(eps=0.1, axis=-1)'
    with pytest.raises(ValueError, match='have no axis 4'): LabelSmoothingBCE(axis=4)(z, y)


def test_binary_weights_broadcast_as_torchs():
    z, y, w = torch.randn(2, 3, 4, 5), torch.randint(0, 2, (2, 3, 4, 5)).float(), torch.rand(3, 1, 1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(z, y, w, pos_weight=2*w)
    close(LabelSmoothingBCE(0., w, pos_weight=2*w)(z, y), expected)


# -- compilers and transforms

class Model(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.layer, self.loss = nn.Conv2d(K, K, 1), loss

    def forward(self, x, y): return self.loss(self.layer(x), y)


@pytest.mark.slow
@pytest.mark.parametrize('loss', [CE(.1, axis=1), CE(.1, [1., 2., 3., 4.], axis=1, dist=ClassPrior([1, 2, 3, 4])), LabelSmoothingBCE(.1),
                                  LabelSmoothingFocal(.1, axis=1), LabelSmoothingNLL(.1, axis=1), LabelRelaxation(.1, axis=1),
                                  MultiLabelSmoothingCrossEntropy(.1, axis=1), EachClass(nn.CrossEntropyLoss()),
                                  CombinedLoss(LabelSmoothingDice(), LogitPenalty(CE(axis=1), 'confidence'))], ids=ids)
def test_exports(loss):
    x, y = torch.randn(2, K, 3, 3), torch.randint(0, K, (2, 3, 3))
    model = Model(copy.deepcopy(loss))
    for target in (y, torch.rand(2, K, 3, 3)):
        program = torch.export.export(model, (x, target), strict=False) # the other tracer is that of torch.compile: see `operations`
        close(program.module()(2*x, target), model(2*x, target))


@pytest.mark.parametrize('loss', [CE(.1), LabelSmoothingBCE(.1), LabelSmoothingFocal(.1)], ids=ids)
def test_vmap_over_logits_or_targets_alone(loss):
    z, y = batch()
    close(torch.func.vmap(lambda y: loss(z, y))(torch.stack([y, y.flip(0)])), torch.stack([loss(z, y), loss(z, y.flip(0))]))
    close(torch.func.vmap(lambda z: loss(z, y))(torch.stack([z, 2*z])), torch.stack([loss(z, y), loss(2*z, y)]))
