"However a fit ends, the learner is as it was and the next fit trains right"
import itertools

import pytest
import torch
from fastai.callback.core import (
    Callback,
    CancelBackwardException,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CancelTrainException,
    CancelValidException,
    _events,
)
import fastai.callback.schedule  # noqa: F401  (gives the Learner `lr_find`)
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from learners import Look, check_seen, fit, make_learner
from torch import nn

from fastai_smooth.callback import CutMixMask, LabelSmoothing, OneOf, TimmMix
from fastai_smooth.callback.smoothing import SmoothedLoss as _TrainingLoss
from fastai_smooth.callback.training_pass import OneShot as _OneShot
from fastai_smooth.losses import EachClass, LabelSmoothingCrossEntropy

CANCELS = [CancelBatchException, CancelBackwardException, CancelEpochException, CancelFitException, CancelStepException, CancelTrainException,
           CancelValidException]
ERRORS = [RuntimeError, KeyboardInterrupt, *CANCELS]
EVENTS = [e for e in _events if e != 'after_create']
MIXERS = {'none': lambda: [], 'both': lambda: [MixUp(), CutMix()], 'oneof': lambda: [OneOf(MixUp(), CutMix(), p=[.4, .4])]}


class Raise(Callback):
    "Raise an error at the n-th time of an event"
    def __init__(self, event, error, order, at=2): self.event, self.error, self.order, self.at, self.count = event, error, order, at, 0

    def __call__(self, name):
        if name != self.event: return
        self.count += 1
        if self.count == self.at: raise self.error('raised by a test')


def check_unharmed(learn, loss, kind='index', eps=.1, **kwargs):
    "The user's loss is in place, nothing of ours is left behind, and the next fit is exact"
    assert learn.loss_func is loss and loss.reduction == 'mean'
    assert '_do_epoch_train' not in learn.__dict__ or isinstance(learn.__dict__['_do_epoch_train'], _OneShot)
    assert all(not isinstance(v, _TrainingLoss) for v in vars(learn).values())
    assert all(y is None or isinstance(y, torch.Tensor) for y in vars(learn).get('yb', ())), "targets of ours must not stay behind"
    learn.remove_cbs([Raise, Look])
    learn.add_cb(Look())
    fit(learn, 1)
    check_seen(learn, kind, eps, **kwargs)
    assert learn.loss_func is loss and '_do_epoch_train' not in learn.__dict__
    weights = [p.detach().clone() for p in learn.model.parameters()]
    fit(learn, 1)
    assert any((a != b).any() for a, b in zip(weights, learn.model.parameters())), "the next fit must train"


def run(learn, *args):
    "Fit to whatever end; the cancel exceptions are ends too, and fastai lets some out where they don't belong"
    try: fit(learn, *args)
    except BaseException as e:
        if isinstance(e, (SystemExit, GeneratorExit)): raise
        return e


@pytest.mark.parametrize('mixers', MIXERS)
@pytest.mark.parametrize('order', [-1000, 1000])
@pytest.mark.parametrize('error', ERRORS, ids=lambda e: e.__name__)
@pytest.mark.parametrize('event', EVENTS)
def test_error_at_every_event(event, error, order, mixers):
    loss = CrossEntropyLossFlat()
    # the first of some events comes once an epoch, of others once a batch; those of a cancelled thing may not come at all
    at = 1 if event.split('_', 1)[1] in ('fit', 'epoch', 'train', 'validate') or 'cancel' in event else 2
    learn = make_learner('index', loss, [LabelSmoothing(.1), Look(), Raise(event, error, order, at), *MIXERS[mixers]()])
    e = run(learn, 2)
    if error in (RuntimeError, KeyboardInterrupt) and 'cancel' not in event: assert isinstance(e, error), "the error must reach the user"
    check_unharmed(learn, loss)


class Broken(nn.Module):
    "A module that fails on its second call in training"
    def __init__(self, inner, error): super().__init__(); self.inner, self.error, self.count = inner, error, 0

    def forward(self, *args):
        self.count += self.training
        if self.count == 2:
            self.count += 1
            raise self.error('raised by a test')
        return self.inner(*args)


@pytest.mark.parametrize('mixers', MIXERS)
@pytest.mark.parametrize('error', ERRORS, ids=lambda e: e.__name__)
@pytest.mark.parametrize('place', ['model', 'loss', 'optimizer', 'loader', 'backward'])
def test_error_inside(place, error, mixers):
    loss = LabelSmoothingCrossEntropy(0.)
    learn = make_learner('index', loss, [LabelSmoothing(.1), Look(), *MIXERS[mixers]()], opt_func=SGD)
    if place == 'model': learn.model = Broken(learn.model, error)
    elif place == 'loss':
        bad = make_bad_loss(error)
        learn.loss_func = bad
    elif place == 'optimizer':
        learn.create_opt()
        learn.opt.step = fail_once(learn.opt.step, error)
    elif place == 'loader':
        learn.dls.train.create_batch = fail_once(learn.dls.train.create_batch, error)
    else: learn._backward = fail_once(learn._backward, error)
    loss = learn.loss_func
    e = run(learn, 2)
    if error in (RuntimeError, KeyboardInterrupt): assert isinstance(e, error)
    check_unharmed(learn, loss)


def fail_once(f, error):
    count = itertools.count(1)

    def g(*args, **kwargs):
        if next(count) == 2: raise error('raised by a test')
        return f(*args, **kwargs)
    return g


def make_bad_loss(error):
    "A smoothing loss whose arithmetic fails once, in training"
    class Bad(LabelSmoothingCrossEntropy):
        count = itertools.count(1)

        def log_probs(self, pred, axis):
            if pred.requires_grad and next(Bad.count) == 2: raise error('raised by a test')
            return super().log_probs(pred, axis)
    return Bad(0.)


@pytest.mark.parametrize('kind', ['one_hot', 'mask'])
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'after_batch'])
def test_other_targets_survive_too(event, error, kind):
    loss = nn.CrossEntropyLoss()
    learn = make_learner(kind, loss, [LabelSmoothing(.1), Look(), Raise(event, error, 1000), MixUp()])
    assert isinstance(run(learn, 1), error)
    check_unharmed(learn, loss, kind)


@pytest.mark.parametrize('event', EVENTS)
def test_one_of_alone_restores_the_loss(event):
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [OneOf(MixUp(), CutMix()), Look(), Raise(event, RuntimeError, 1000, 1)])
    run(learn, 1)
    check_unharmed(learn, loss, eps=0.)


def test_callback_removed_after_an_error_between_the_epochs_start_and_its_training():
    "The stand-in that is left then does nothing"
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [LabelSmoothing(.9), Raise('before_epoch', RuntimeError, 1000, 1)])
    assert isinstance(run(learn, 1), RuntimeError)
    learn.remove_cbs([LabelSmoothing, Raise])
    learn.add_cb(Look())
    fit(learn, 1)
    check_seen(learn, 'index', 0.)
    assert '_do_epoch_train' not in learn.__dict__


def test_callback_for_one_fit_only():
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [Look()])
    fit(learn, 1, cbs=LabelSmoothing(.3))
    check_seen(learn, 'index', .3)
    fit(learn, 1)
    check_seen(learn, 'index', 0.)


def test_two_learners_one_after_the_other():
    "A callback object moved to another learner serves that one"
    cb, a, b = LabelSmoothing(.3), make_learner('index', cbs=[Look()]), make_learner('index', cbs=[Look()])
    for learn in (a, b, a):
        learn.add_cb(cb)
        fit(learn, 1)
        check_seen(learn, 'index', .3)
        learn.remove_cb(cb)


class FitInside(Callback):
    "Another fit of the same learner between two epochs"
    def __init__(self): self.done = False

    def after_epoch(self):
        if self.done: return
        self.done = True
        keep = {k: getattr(self.learn, k) for k in ('n_epoch', 'epoch')}
        self.learn.fit(1, 0.)
        for k, v in keep.items(): setattr(self.learn, k, v)


def test_a_fit_inside_a_fit():
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [LabelSmoothing(.1), Look(), FitInside()])
    fit(learn, 2)
    check_unharmed(learn, loss)


NEWER = {'timm': ('index', lambda: [TimmMix(.8, 1., mode='elem')]), 'one of timm': ('index', lambda: [OneOf(TimmMix(mode='pair'), CutMix(), p=[.5, .3])]),
         'masks': ('mask', lambda: [CutMixMask()]), 'masks, blended': ('mask', lambda: [CutMixMask(), TimmMix()])}


@pytest.mark.parametrize('mixers', NEWER)
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelBatchException, CancelFitException], ids=lambda e: e.__name__)
@pytest.mark.parametrize('event', [e for e in EVENTS if 'cancel' not in e])
def test_every_mixer_and_a_schedule(event, error, mixers):
    "A strength that changes ends where it was, and its log belongs to the last fit"
    kind, cbs = NEWER[mixers]
    loss = CrossEntropyLossFlat(axis=1 if kind == 'mask' else -1)
    cb = LabelSmoothing(lambda pct: .1)
    learn = make_learner(kind, loss, [cb, Look(), Raise(event, error, 1000, 1), *cbs()])
    run(learn, 2)
    check_unharmed(learn, loss, kind)
    assert cb.log == [.1]*3 and learn.recorder.hps['eps'] == cb.log


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelBatchException, CancelFitException], ids=lambda e: e.__name__)
@pytest.mark.parametrize('event', ['before_train', 'before_batch', 'after_pred', 'after_loss', 'after_batch', 'after_epoch'])
def test_a_loss_asked_for_each_class(event, error):
    inner = nn.CrossEntropyLoss()
    loss = EachClass(inner)
    learn = make_learner('index', loss, [LabelSmoothing(.1), Look(), Raise(event, error, 1000, 1), MixUp()])
    run(learn, 2)
    check_unharmed(learn, loss)
    assert inner.reduction == 'mean'


def test_lr_find_between_two_fits_and_inside_one():
    "fastai's finder trains with the same callbacks; the weights and the loss come back"
    class Finder(Callback):
        done = False
        def after_epoch(self):
            if self.done: return
            self.done = True
            keep = {k: getattr(self.learn, k) for k in ('n_epoch', 'epoch')}
            with self.learn.no_logging(): self.learn.lr_find(num_it=3, show_plot=False)
            for k, v in keep.items(): setattr(self.learn, k, v)
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [LabelSmoothing(.1), MixUp(), Look(), Finder()])
    fit(learn, 2)
    learn.remove_cb(Finder)
    weights = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=3, show_plot=False)
    assert all(torch.equal(a, b) for a, b in zip(weights, learn.model.parameters()))
    check_unharmed(learn, loss)
