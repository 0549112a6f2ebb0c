"What a loss says holds through wrappers, and a target that is not smoothed is trained with the user's own loss"
import fastai.losses as fl
import numpy as np
import oracles
import pytest
import timm.loss
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.torch_core import set_seed
from learners import Items, K, WhatTheLossSaw, expected_binary_loss, fit, make_learner, truth_of
from torch import nn
from torch.nn import functional as F

import fastai_smooth.losses as ours
from fastai_smooth.callback import LabelSmoothing, TimmMix, soft_loss
from fastai_smooth.distributions import Online
from fastai_smooth.losses import CombinedLoss, LabelSmoothingBCE, LabelSmoothingCrossEntropy, LogitPenalty, MultiTargetLoss

MIXERS = {'none': list, 'mixup': lambda: [MixUp()], 'both': lambda: [MixUp(), CutMix()], 'timm': lambda: [TimmMix(.8, 1.)]}
WRAPPERS = {'alone': lambda loss: loss, 'penalty': lambda loss: LogitPenalty(loss, 'margin', 0.), 'sum': CombinedLoss,
            'both': lambda loss: CombinedLoss(LogitPenalty(loss, strength=0.))}


@pytest.mark.parametrize('mixers', ['none', 'mixup'])
@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('ignored', [255, 2])
def test_ignored_labels_under_wrappers(ignored, wrapper, mixers):
    "An index outside the classes, and one among them: nothing is learned from it, by the loss or by Online"
    online = Online(K)
    loss = WRAPPERS[wrapper](LabelSmoothingCrossEntropy(0., axis=1, ignore_index=ignored))
    learn = make_learner('mask', loss, [LabelSmoothing(.2, online), WhatTheLossSaw(), *MIXERS[mixers]()])
    for dl in learn.dls: dl.dataset[:] = [(x if ignored == 255 else x*(y != ignored), y.masked_fill(y == -100, ignored)) for x, y in dl.dataset]
    fit(learn, 1)
    uniform = np.full((K, K), 1/K)
    for x, pred, value, _ in learn.look.seen:
        expected = oracles.cross_entropy(oracles.rows(pred, 1).tolist(), oracles.rows(truth_of(x, 'mask'), 1).tolist(), .2, matrix=uniform)
        np.testing.assert_allclose(value, expected, rtol=2e-5)
    if mixers == 'none':
        sums, counts = np.zeros((K, K)), np.zeros(K)
        for _, pred, _, (y,) in learn.look.seen:
            for z, label in zip(oracles.rows(pred, 1), y.flatten().tolist()):
                if label == ignored or z.argmax() != label: continue
                p = np.exp(z-z.max())
                sums[label], counts[label] = sums[label]+p/p.sum(), counts[label]+1
        np.testing.assert_allclose(online.matrix(K), [s/c if c else np.full(K, 1/K) for s, c in zip(sums, counts)], atol=1e-5)


@pytest.mark.parametrize('kind, convention', [('index', 'uniform'), ('multi_hot', 'half')])
@pytest.mark.parametrize('mixers', ['none', 'both'])
def test_a_binary_loss_in_a_sum(mixers, kind, convention):
    learn = make_learner(kind, CombinedLoss(LabelSmoothingBCE(0.)), [LabelSmoothing(.2), WhatTheLossSaw(), *MIXERS[mixers]()])
    fit(learn, 1)
    for x, pred, value, _ in learn.look.seen: np.testing.assert_allclose(value, expected_binary_loss(x, pred, .2, convention), rtol=1e-4)


def test_a_loss_that_ignores_nothing_under_a_penalty():
    loss = LogitPenalty(LabelSmoothingCrossEntropy(0., ignore_index=None), strength=0.)
    learn = fit(make_learner('index', loss, [LabelSmoothing(.2), MixUp(), WhatTheLossSaw()]), 1)
    for x, pred, value, _ in learn.look.seen:
        np.testing.assert_allclose(value, oracles.cross_entropy(pred.tolist(), truth_of(x, 'index').tolist(), .2), rtol=2e-5)


# -- heads that are not smoothed

W3 = torch.tensor([1., 50., 3.])


class OneInput(Items):
    n_inp = 1
    def new_empty(self): return OneInput()


class Two(nn.Module):
    "Four classes that are smoothed, three that are not, from an image that shows both"
    def __init__(self): super().__init__(); self.a, self.b = nn.Linear(K+3, K), nn.Linear(K+3, 3)
    def forward(self, x): x = x.mean((2, 3)); return self.a(x), self.b(x)


def two_heads(other, target, cbs, c=K):
    set_seed(0)
    n = 16
    g = torch.Generator().manual_seed(1)
    y = torch.randint(0, K, (n,), generator=g)
    labels = torch.randint(0, 3, (n,), generator=g)
    q = F.one_hot(labels, 3).float()
    b = {'index': labels, 'one_hot': q, 'half mass': .5*q, 'multi_hot': torch.randint(0, 2, (n, 3), generator=g).float()}[target]
    shown = q if target == 'index' else b
    x = torch.cat([F.one_hot(y, K).float(), shown], 1)[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
    dls = DataLoaders(*(TfmdDL(OneInput(zip(x, y, b)), bs=8, num_workers=0, device='cpu') for _ in range(2)), device='cpu')
    dls.c = c
    return Learner(dls, Two(), loss_func=MultiTargetLoss(CrossEntropyLossFlat(), other), cbs=cbs, lr=.1)


class LookAtTwo(Callback):
    order, run_valid = 90, False
    def before_fit(self): self.seen = []
    def after_loss(self): self.seen.append((self.x.detach().clone(), [p.detach() for p in self.learn.pred], self.learn.yb, float(self.learn.loss.detach())))


OTHERS = {'weights on a dense target': (lambda: nn.CrossEntropyLoss(W3), 'one_hot'), 'weights': (lambda: nn.CrossEntropyLoss(W3), 'index'),
          'timm, several labels': (lambda: timm.loss.BinaryCrossEntropy(.1), 'multi_hot'), 'timm, index': (lambda: timm.loss.BinaryCrossEntropy(.1), 'index'),
          'half a mass': (timm.loss.SoftTargetCrossEntropy, 'half mass'),
          'weighted smoothing of fastai': (lambda: fl.LabelSmoothingCrossEntropy(.1, W3), 'index'),
          'focal with weights': (lambda: BCEWithLogitsLossFlat(), 'multi_hot'), 'numbers': (lambda: nn.L1Loss(), 'multi_hot')}


@pytest.mark.parametrize('what', OTHERS)
def test_a_head_that_is_not_smoothed_has_the_users_own_loss(what):
    make, target = OTHERS[what]
    learn = fit(two_heads(make(), target, [LabelSmoothing(.2), LookAtTwo()]), 1)
    for _, (a, b), (y, z), value in learn.look_at_two.seen:
        np.testing.assert_allclose(value, (F.cross_entropy(a, y, label_smoothing=.2) + make()(b, z)).item(), rtol=1e-5)


@pytest.mark.parametrize('what', ['weights on a dense target', 'timm, several labels', 'half a mass', 'numbers'])
def test_of_blended_numbers_too(what):
    "What is blended as numbers is a target that the user's loss takes; the other head is smoothed"
    make, target = OTHERS[what]
    learn = fit(two_heads(make(), target, [LabelSmoothing(.2), TimmMix(.8, 1.), LookAtTwo()]), 1)
    for x, (a, b), _, value in learn.look_at_two.seen:
        q = x.mean((2, 3))
        np.testing.assert_allclose(value, (F.cross_entropy(a, .8*q[:, :K]+.2/K) + make()(b, q[:, K:])).item(), rtol=1e-5)


@pytest.mark.parametrize('c', [K, [K, 3]])
def test_blended_labels_of_another_number_of_classes(c):
    "Three classes beside four: the soft version takes what the user's loss cannot"
    learn = fit(two_heads(CrossEntropyLossFlat(), 'index', [LabelSmoothing(.2, n_classes=K), TimmMix(.8, 1.), LookAtTwo()], c), 1)
    for x, (a, b), (_, z), value in learn.look_at_two.seen:
        q = x.mean((2, 3))
        np.testing.assert_allclose(value, (F.cross_entropy(a, .8*q[:, :K]+.2/K) + F.cross_entropy(b, q[:, K:])).item(), rtol=1e-5)
        assert not z.is_floating_point()


def test_timms_binary_loss_smooths_indices_only():
    z, y, hot = torch.randn(5, K), torch.tensor([0, 1, 2, 3, 0]), torch.randint(0, 2, (5, K)).float()
    loss = timm.loss.BinaryCrossEntropy(.1)
    for target in (y, hot): torch.testing.assert_close(soft_loss(loss)(z, target), loss(z, target))
    if hasattr(loss, 'smooth_dense'):
        dense = timm.loss.BinaryCrossEntropy(.1, smooth_dense=True)
        for target in (y, hot): torch.testing.assert_close(soft_loss(dense)(z, target), dense(z, target))


# -- what the user's loss cannot take shows before the first step

class Steps(Callback):
    n = 0
    def after_step(self): self.n += 1


UNFIT = {'float64 weights': ('index', lambda: nn.CrossEntropyLoss(torch.ones(K, dtype=torch.float64)), lambda y: y),
         'weights per class of another length': ('multi_hot', lambda: nn.BCEWithLogitsLoss(torch.ones(7)), lambda y: y),
         'class numbers': ('index', BCEWithLogitsLossFlat, lambda y: y), 'int32': ('index', nn.CrossEntropyLoss, lambda y: y.int()),
         'a column': ('index', nn.CrossEntropyLoss, lambda y: y[None]), 'integers of several labels': ('multi_hot_int', nn.BCEWithLogitsLoss, lambda y: y)}


@pytest.mark.parametrize('what', UNFIT)
def test_targets_that_could_not_be_validated_are_an_error_before_the_first_step(what):
    kind, make, change = UNFIT[what]
    learn = make_learner(kind, make(), [LabelSmoothing(.1), Steps()])
    for dl in learn.dls: dl.dataset[:] = [(x, change(y)) for x, y in dl.dataset]
    with pytest.raises((ValueError, RuntimeError)): fit(learn, 1)
    assert learn.steps.n == 0


@pytest.mark.parametrize('what', ['int32', 'a column'])
def test_and_what_it_can_take_works(what):
    kind, _, change = UNFIT[what]
    learn = make_learner(kind, CrossEntropyLossFlat(), [LabelSmoothing(.1), Steps(), MixUp()])
    for dl in learn.dls: dl.dataset[:] = [(x, change(y)) for x, y in dl.dataset]
    assert fit(learn, 1).steps.n == 3


def test_looking_at_the_validation_set_draws_nothing():
    "The random numbers of the training are those of a training without the callback"
    def numbers(cbs):
        learn = make_learner('index', LabelSmoothingCrossEntropy(0.), cbs)
        valid = learn.dls.valid.dataset
        valid.__class__ = Noisy
        fit(learn, 1)
        return torch.rand(3), np.random.rand(3)  # noqa: NPY002

    class Noisy(Items):
        def __getitem__(self, i):
            torch.rand(1), np.random.rand(1)  # noqa: NPY002
            return super().__getitem__(i)
    for a, b in zip(numbers([]), numbers([LabelSmoothing(.1)])): assert (np.asarray(a) == np.asarray(b)).all()


# -- messages

@pytest.mark.parametrize('loss, words', [
    (fl.MSELossFlat(), 'for classes only'), (nn.HuberLoss(), 'for classes only'), (ours.LabelSmoothingCrossEntropy, r'write LabelSmoothingCrossEntropy\(\)'),
    (timm.loss.JsdCrossEntropy(), 'timm.loss.jsd.JsdCrossEntropy')])
def test_what_is_said_of_unknown_losses(loss, words):
    with pytest.raises(TypeError, match=words): fit(make_learner('index', loss, [LabelSmoothing(.1)]), 1)


@pytest.mark.parametrize('loss, words', [(fl.LabelSmoothingCrossEntropy(.1), "fastai's LabelSmoothingCrossEntropy"),
                                         (fl.LabelSmoothingCrossEntropyFlat(.1), "fastai's LabelSmoothingCrossEntropy"),
                                         (LabelSmoothingCrossEntropy(.1), "fastai_smooth's LabelSmoothingCrossEntropy")])
def test_which_of_two_losses_of_one_name(loss, words):
    with pytest.raises(ValueError, match=words): fit(make_learner('index', loss, [LabelSmoothing(.1)]), 1)


@pytest.mark.parametrize('mixers', ['none', 'mixup'])
def test_floating_class_labels(mixers):
    learn = make_learner('index', LabelSmoothingCrossEntropy(0.), [LabelSmoothing(.1), *MIXERS[mixers]()])
    for dl in learn.dls: dl.dataset[:] = [(x, y.float()) for x, y in dl.dataset]
    with pytest.raises(ValueError, match=r'\.long\(\)'): fit(learn, 1)
