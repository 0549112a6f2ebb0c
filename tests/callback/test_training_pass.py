"However a fit ends, the learner is as it was and the next fit trains right"
import copy
import itertools
import pickle

import fastai.callback.schedule  # noqa: F401  (gives the Learner `lr_find`)
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
from fastai.callback.mixup import CutMix, MixUp
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from learners import WhatTheLossSaw, check_seen, fit, make_learner, quiet
from torch import nn

from fastai_smooth.callback import CutMixMask, LabelSmoothing, OneOf, TimmMix
from fastai_smooth.callback.training_pass import OneShot, StandIn
from fastai_smooth.losses import EachClass, LabelSmoothingCrossEntropy

EVENTS = [e for e in _events if e != 'after_create']
MIXERS = {'none': lambda: [], 'both': lambda: [MixUp(), CutMix()], 'oneof': lambda: [OneOf(MixUp(), CutMix(), p=[.4, .4])],
          'timm': lambda: [TimmMix(.8, 1., mode='elem')], 'one of timm': lambda: [OneOf(TimmMix(mode='pair'), CutMix(), p=[.5, .3])],
          'masks': lambda: [CutMixMask()], 'masks, blended': lambda: [CutMixMask(), TimmMix()]}


class Raise(Callback):
    "Raise an error at the n-th time of an event, in training if it is one of a batch"
    def __init__(self, event, error, order=1000, at=1): self.event, self.error, self.order, self.at, self.count = event, error, order, at, 0

    def __call__(self, name):
        if name != self.event: return
        self.count += 1
        if self.count == self.at: raise self.error('raised by a test')


# -- the three ways in which an exception leaves an event, at every event

CANCELLED = {'batch': ('after_pred', CancelBatchException), 'backward': ('before_backward', CancelBackwardException),
             'step': ('before_step', CancelStepException), 'train': ('before_train', CancelTrainException),
             'validate': ('before_validate', CancelValidException), 'epoch': ('before_epoch', CancelEpochException),
             'fit': ('after_pred', CancelFitException)}


def caught_at(event):
    "The exception that fastai catches around an event; None at the end of a fit, where nothing catches any"
    if event in ('after_cancel_fit', 'after_fit'): return None
    if event in ('before_fit', 'after_epoch', 'after_cancel_epoch'): return CancelFitException
    if event in ('before_epoch', 'after_train', 'after_cancel_train') or event.endswith('validate'): return CancelEpochException
    return CancelTrainException if event in ('before_train', 'after_batch', 'after_cancel_batch') else CancelBatchException


def let_out_at(event): return CancelValidException if event == 'before_step' else CancelStepException


BEHAVIOURS = {'error': lambda event: RuntimeError, 'cancel, caught': caught_at, 'cancel, not caught': let_out_at}
GRID = [(event, how, mixers, order) for event in EVENTS for how, of in BEHAVIOURS.items() if of(event)
        for mixers, order in (('none', -1000), ('both', 1000), ('oneof', 1000))]


@pytest.mark.parametrize('event, how, mixers, order', GRID)
def test_an_exception_at_every_event(event, how, mixers, order):
    "For the events after a cancellation a second callback cancels first"
    loss, error = CrossEntropyLossFlat(), BEHAVIOURS[how](event)
    once = event.split('_')[-1] in ('fit', 'epoch', 'train', 'validate') or 'cancel' in event
    fault = Raise(event, error, order, 1 if once else 2)
    cancels = [Cancel(*CANCELLED[event.removeprefix('after_cancel_')])] if 'cancel' in event else []
    learn = make_learner('index', loss, [LabelSmoothing(.1), WhatTheLossSaw(), fault, *cancels, *MIXERS[mixers]()])
    e = run(learn, 2)
    assert fault.count >= fault.at, "the fault must have happened"
    if how != 'cancel, caught': assert isinstance(e, error), "the error must reach the user"
    check_unharmed(learn, loss)


class Cancel(Raise):
    "Cancels something, for the events that follow"


def run(learn, *args):
    "Fit to whatever end, and return what came out; fastai's own events fail on some cancellations"
    try: fit(learn, *args)
    except BaseException as e:
        if isinstance(e, (SystemExit, GeneratorExit)): raise
        return e


def check_unharmed(learn, loss, kind='index', eps=.1, **kwargs):
    "The user's loss is in place, nothing of ours is left behind, and the next fit is exact"
    assert learn.loss_func is loss and loss.reduction == 'mean'
    assert '_do_epoch_train' not in learn.__dict__ or isinstance(learn.__dict__['_do_epoch_train'], OneShot)
    assert all(not isinstance(v, StandIn) for v in vars(learn).values())
    assert all(y is None or isinstance(y, torch.Tensor) for y in vars(learn).get('yb', ())), "targets of ours must not stay behind"
    learn.remove_cbs([Raise, Cancel, WhatTheLossSaw])
    learn.add_cb(WhatTheLossSaw())
    fit(learn, 1)
    check_seen(learn, kind, eps, **kwargs)
    assert learn.loss_func is loss and '_do_epoch_train' not in learn.__dict__
    weights = [p.detach().clone() for p in learn.model.parameters()]
    fit(learn, 1)
    assert any((a != b).any() for a, b in zip(weights, learn.model.parameters())), "the next fit must train"


# -- errors elsewhere than in an event

class Broken(nn.Module):
    "A module that fails on its second call in training"
    def __init__(self, inner, error): super().__init__(); self.inner, self.error, self.count = inner, error, 0

    def forward(self, *args):
        self.count += self.training
        if self.count == 2:
            self.count += 1
            raise self.error('raised by a test')
        return self.inner(*args)


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelBatchException, CancelValidException], ids=lambda e: e.__name__)
@pytest.mark.parametrize('place', ['model', 'loss', 'optimizer', 'loader', 'backward'])
def test_error_inside(place, error):
    learn = make_learner('index', LabelSmoothingCrossEntropy(0.), [LabelSmoothing(.1), WhatTheLossSaw(), *MIXERS['both']()], opt_func=SGD)
    if place == 'model': learn.model = Broken(learn.model, error)
    elif place == 'loss': learn.loss_func = make_bad_loss(error)
    elif place == 'optimizer':
        learn.create_opt()
        learn.opt.step = fail_once(learn.opt.step, error)
    elif place == 'loader': learn.dls.train.create_batch = fail_once(learn.dls.train.create_batch, error)
    else: learn._backward = fail_once(learn._backward, error)
    loss = learn.loss_func
    e = run(learn, 2)
    if error is not CancelBatchException or place == 'loader': assert isinstance(e, error)
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


# -- other targets, other mixers, other losses

SOME = ['before_train', 'before_batch', 'after_pred', 'after_loss', 'after_batch', 'after_epoch']


@pytest.mark.parametrize('kind', ['one_hot', 'mask'])
@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'after_batch'])
def test_other_targets_survive_too(event, kind):
    loss = nn.CrossEntropyLoss()
    learn = make_learner(kind, loss, [LabelSmoothing(.1), WhatTheLossSaw(), Raise(event, KeyboardInterrupt, at=2), MixUp()])
    assert isinstance(run(learn, 1), KeyboardInterrupt)
    check_unharmed(learn, loss, kind)


@pytest.mark.parametrize('mixers', ['timm', 'one of timm', 'masks', 'masks, blended'])
@pytest.mark.parametrize('event', SOME)
def test_every_mixer_and_a_schedule(event, mixers):
    "A strength that changes ends where it was, and its log belongs to the last fit"
    kind = 'mask' if mixers.startswith('masks') else 'index'
    loss = CrossEntropyLossFlat(axis=1 if kind == 'mask' else -1)
    cb = LabelSmoothing(lambda pct: .1)
    learn = make_learner(kind, loss, [cb, WhatTheLossSaw(), Raise(event, RuntimeError), *MIXERS[mixers]()])
    assert isinstance(run(learn, 2), RuntimeError)
    check_unharmed(learn, loss, kind)
    assert cb.log == [.1]*3 and learn.recorder.hps['eps'] == cb.log


@pytest.mark.parametrize('event', SOME)
def test_one_of_alone_restores_the_loss(event):
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [OneOf(MixUp(), CutMix()), WhatTheLossSaw(), Raise(event, RuntimeError)])
    assert isinstance(run(learn, 1), RuntimeError)
    check_unharmed(learn, loss, eps=0.)


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss'])
def test_a_loss_asked_for_each_class(event):
    inner = nn.CrossEntropyLoss()
    loss = EachClass(inner)
    learn = make_learner('index', loss, [LabelSmoothing(.1), WhatTheLossSaw(), Raise(event, RuntimeError), MixUp()])
    assert isinstance(run(learn, 2), RuntimeError)
    check_unharmed(learn, loss)
    assert inner.reduction == 'mean'


# -- callbacks that come, go and move

def test_callback_removed_after_an_error_between_the_epochs_start_and_its_training():
    "The stand-in that is left then does nothing"
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [LabelSmoothing(.9), Raise('before_epoch', RuntimeError)])
    assert isinstance(run(learn, 1), RuntimeError)
    learn.remove_cbs([LabelSmoothing, Raise])
    learn.add_cb(WhatTheLossSaw())
    fit(learn, 1)
    check_seen(learn, 'index', 0.)
    assert '_do_epoch_train' not in learn.__dict__


@pytest.mark.parametrize('event', ['before_batch', 'after_pred'])
def test_callback_removed_in_the_middle_of_a_batch(event):
    "That batch is still smoothed once it is encoded, the next ones are not"
    class Remove(Callback):
        def __call__(self, name):
            if name == event and self.learn.training and hasattr(self.learn, 'label_smoothing'): self.learn.remove_cb(LabelSmoothing)
    loss = CrossEntropyLossFlat()
    learn = fit(make_learner('index', loss, [LabelSmoothing(.2), Remove(), WhatTheLossSaw()]), 1)
    assert learn.loss_func is loss and not hasattr(learn, 'label_smoothing')
    first, *rest = learn.look.seen
    for seen, eps in ((first, .2), *((s, 0.) for s in rest)):
        learn.look.seen = [seen]
        check_seen(learn, 'index', eps)


def test_callback_for_one_fit_only():
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [WhatTheLossSaw()])
    fit(learn, 1, cbs=LabelSmoothing(.3))
    check_seen(learn, 'index', .3)
    fit(learn, 1)
    check_seen(learn, 'index', 0.)


def test_two_learners_one_after_the_other():
    "A callback object moved to another learner serves that one"
    cb, a, b = LabelSmoothing(.3), make_learner('index', cbs=[WhatTheLossSaw()]), make_learner('index', cbs=[WhatTheLossSaw()])
    for learn in (a, b, a):
        learn.add_cb(cb)
        fit(learn, 1)
        check_seen(learn, 'index', .3)
        learn.remove_cb(cb)


class Inside(Callback):
    "Something else that trains the same learner, between two epochs"
    def __init__(self, what): self.what, self.done = what, False

    def after_epoch(self):
        if self.done: return
        self.done = True
        keep = {k: getattr(self.learn, k) for k in ('n_epoch', 'epoch')}
        self.what(self.learn)
        for k, v in keep.items(): setattr(self.learn, k, v)


@pytest.mark.parametrize('what', [lambda learn: learn.fit(1, 0.), lambda learn: learn.lr_find(num_it=3, show_plot=False)], ids=['fit', 'lr_find'])
def test_a_training_inside_a_fit(what):
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [LabelSmoothing(.1), MixUp(), WhatTheLossSaw(), Inside(what)])
    fit(learn, 2)
    learn.remove_cb(Inside)
    weights = [p.detach().clone() for p in learn.model.parameters()]
    with quiet(learn): learn.lr_find(num_it=3, show_plot=False)
    assert all(torch.equal(a, b) for a, b in zip(weights, learn.model.parameters()))
    check_unharmed(learn, loss)


# -- what it rests on

def test_fastai_still_calls_the_training_pass_through_the_instance():
    "LabelSmoothing stands in for `learn._do_epoch_train`; a fastai that calls it otherwise must be noticed"
    learn, calls = make_learner('index'), []
    learn._do_epoch_train = lambda: calls.append(1) or Learner._do_epoch_train(learn)
    fit(learn, 2)
    assert calls == [1, 1]


def test_fastais_mixers_still_keep_their_targets():
    "In `yb1`, which is cleared of mixtures at the end of a pass"
    learn = fit(make_learner('index', cbs=[MixUp()]), 1)
    assert isinstance(learn.mix_up.yb1, tuple)
    learn.add_cb(LabelSmoothing(.1))
    assert not hasattr(fit(learn, 1).mix_up, 'yb1')


def test_cost_of_unhandled_events_is_a_look_up():
    "Events without a method return at once, without asking the learner"
    cb = LabelSmoothing(.1)
    cb.learn = None
    for e in ('before_backward', 'after_step', 'before_validate'): assert cb(e) is None


def test_pickle_and_copy_of_the_training_loss():
    kept = []

    class Keep(Callback):
        def before_batch(self):
            if self.training: kept[:] = [pickle.loads(pickle.dumps(self.learn.loss_func)), copy.deepcopy(self.learn.loss_func), repr(self.learn.loss_func)]
    fit(make_learner('index', cbs=[LabelSmoothing(.1), Keep()]), 1)
    assert type(kept[0]) is type(kept[1]) is CrossEntropyLossFlat and 'LabelSmoothing(0.1)' in kept[2]
