"Dice and focal: against loops and fastai"
import math

import fastai.losses as fl
import numpy as np
import oracles
import pytest
import torch

from fastai_smooth.losses import LabelSmoothingDice, LabelSmoothingFocal
from fastai_smooth.targets import MixedTarget, to_dense

K = 4


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol, check_dtype=False)


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
