"""What a fastai user does with a Learner, done with `LabelSmoothing` and, step for step, with torch's own smoothing on one-hot targets

Left out: `NonNativeMixedPrecision` asserts a CUDA device, `ShowGraphCallback` needs a progress bar on a screen, and fastai's mixers
cannot blend token ids or the integer categories of tabular data, so mixers of the tests take their place there."""
import pickle
import zipfile
from functools import partial

import learners
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.basics import DataBlock, DataLoaders, RandomSplitter, set_seed
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.preds import MCDropoutCallback
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.block import CategoryBlock
from fastai.data.core import TfmdDL
from fastai.data.transforms import get_image_files, parent_label
from fastai.distributed import ParallelTrainer
from fastai.interpret import ClassificationInterpretation, SegmentationInterpretation
from fastai.learner import Recorder, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.tabular.core import Categorify
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from fastai.text.core import BaseTokenizer
from fastai.text.data import TextDataLoaders
from fastai.text.learner import language_model_learner, text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
from fastai.torch_core import to_float
from fastai.vision.augment import Flip
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock, MaskBlock
from fastai.vision.learner import unet_learner, vision_learner
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import K, check_seen, expected_loss, quiet
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from fastai_smooth.callback import LabelSmoothing, OneOf
from fastai_smooth.losses import LabelSmoothingCrossEntropyFlat
from fastai_smooth.targets import MixedTarget

EPS = .2
MIXERS = {'none': lambda: [], 'mixup': lambda: [MixUp()], 'cutmix': lambda: [CutMix()], 'both': lambda: [MixUp(), CutMix()],
          'oneof': lambda: [OneOf(MixUp(), CutMix())]}
with_two = pytest.mark.parametrize('mixers', ['none', 'both'])


# -- what watches, and what is compared with

def class_means(x): return learners.truth_of(x, 'index')


class Look(learners.Look):
    "The batches of a whole life, not only of the last fit; `truth` reads the target off a batch, `axis` holds the classes of the prediction"
    name = 'look'

    def __init__(self, order=90, truth=None, axis=1): self.order, self.truth, self.axis, self.seen = order, truth, axis, []
    def before_fit(self): pass

    def after_loss(self):
        truth = self.learn.xb[0] if self.truth is None else self.truth(self.learn)
        pred = self.learn.pred.detach().float().movedim(self.axis, 1)
        self.seen.append((torch.Tensor(truth.detach()).clone(), torch.Tensor(pred).clone(), float(self.learn.loss_grad.detach()), self.learn.yb))


class Watch(Callback):
    "Whether, at each event after the loss, the targets are the tuple of the data loader, with the values that it had"
    order, run_valid = -200, False
    def __init__(self): self.hard, self.events = [], set()

    def before_batch(self):
        self.loaded, self.values = self.learn.yb, [torch.Tensor(y).clone() for y in self.learn.yb]
        self.plain = all(isinstance(y, torch.Tensor) and not y.is_floating_point() for y in self.loaded)

    def _note(self, event):
        self.events.add(event)
        self.hard.append(self.plain and self.learn.yb is self.loaded and all(torch.equal(torch.Tensor(y), v) for y, v in zip(self.loaded, self.values)))

    def before_backward(self): self._note('before_backward')
    def before_step(self): self._note('before_step')
    def after_step(self): self._note('after_step')
    def after_batch(self): self._note('after_batch')


def one_hot(y, n):
    y = torch.Tensor(y).long()
    return F.one_hot(y[:, 0] if y.shape[1:] == (1,) else y, n).float()


class OneHot(Callback):
    "What the user would have to write: one-hot targets for mixers and loss, and the labels back after it"
    order, run_valid = -100, False
    def __init__(self, n=K): self.n = n

    def before_batch(self):
        self.labels = self.learn.yb
        self.learn.yb = tuple(one_hot(y, self.n) for y in self.labels)

    def after_loss(self): self.learn.yb = self.labels


class TorchSmoothing(nn.Module):
    "Torch's smoothing of dense targets; the plain loss of indices, which is what validation has"
    def __init__(self, eps=EPS, axis=-1): super().__init__(); self.eps, self.axis, self.reduction = eps, axis, 'mean'

    def forward(self, pred, y):
        pred = torch.Tensor(pred).movedim(self.axis, -1).flatten(0, -2).float()
        y, eps = (torch.Tensor(y).reshape(pred.shape), self.eps) if y.is_floating_point() else (torch.Tensor(y).long().reshape(-1), 0.)
        return F.cross_entropy(pred, y, label_smoothing=eps, reduction=self.reduction)

    def activation(self, x): return F.softmax(x, dim=self.axis)
    def decodes(self, x): return x.argmax(self.axis)


class Net(nn.Module):
    "Two groups of parameters, a convolution, a batch norm and dropout"
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(K, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(.1), nn.Linear(6*16, K))

    def forward(self, x): return self.head(self.body(x))


def halves(model): return [list(model.body.parameters()), list(model.head.parameters())]


def make(path, cbs=(), loss=None, model=None, opt_func=None, n=24, **kwargs):
    opt_func = opt_func or (lambda params, **kw: SGD(params, mom=.9, **kw))
    learn = learners.make_learner('index', loss or CrossEntropyLossFlat(), cbs, path=path, splitter=halves, opt_func=opt_func, n=n, metrics=accuracy, **kwargs)
    torch.manual_seed(5)
    learn.model = (model or Net)()
    return learn


def quietly(live, learn):
    set_seed(7)
    with quiet(learn): return live(learn)


def check_life(learn, loss, eps=EPS, kind='index', n=None):
    "In training the loss was the smoothed one; everybody saw the labels; the loss is the user's"
    check_seen(learn, kind, eps, n)
    watch = learn.watch
    assert learn.loss_func is loss and not {'_do_epoch_train', '_pass'} & vars(learn).keys()
    assert {'before_backward', 'after_batch'} <= watch.events and all(watch.hard)
    for *_, yb in learn.look.seen: assert not any(y.is_floating_point() or isinstance(y, MixedTarget) for y in yb)


def flat(res):
    "Numbers in nested results"
    if res is None: return []
    if isinstance(res, (torch.Tensor, np.ndarray, float, int)): return [torch.as_tensor(res).as_subclass(torch.Tensor).double().reshape(-1)]
    if isinstance(res, dict): res = res.values()
    return [t for r in res for t in flat(r)]


def close(a, b, tol=1e-4):
    a, b = flat(a), flat(b)
    assert len(a) == len(b)
    for x, y in zip(a, b): torch.testing.assert_close(x, y, rtol=tol, atol=tol)


def weights(learn): return [v.detach().clone() for v in learn.model.state_dict().values()]


def twins(path, mixers, live, build=make, tol=1e-4, kind='index', look=Look, classes=K, axis=-1):
    "Live the same life with `LabelSmoothing` and with torch's smoothing of one-hot targets, and compare all that came out"
    mixers = MIXERS[mixers] if isinstance(mixers, str) else mixers
    loss = CrossEntropyLossFlat(axis=axis)
    learn = build(path/'smooth', [*mixers(), LabelSmoothing(EPS), look(), Watch()], loss)
    res = quietly(live, learn)
    check_life(learn, loss, kind=kind)
    torchs = build(path/'torch', [OneHot(classes), *mixers()], TorchSmoothing(axis=axis))
    expected = quietly(live, torchs)
    close(res, expected, tol), close(weights(learn), weights(torchs), tol)
    close(list(learn.recorder.values), list(torchs.recorder.values), tol), close(list(learn.recorder.losses), list(torchs.recorder.losses), tol)
    return learn, torchs


# -- lives: each returns what is to be compared

def frozen_and_not(learn):
    learn.freeze()
    learn.fit(1)
    learn.unfreeze()
    learn.fit(1)
    learn.freeze_to(1)
    learn.fit_one_cycle(1, lr_max=slice(.01, .1))


def find_lr(learn):
    learn.fit(1)
    before, state = weights(learn), [t.clone() for t in flat_state(learn)]
    found = learn.lr_find(start_lr=1e-4, end_lr=1., num_it=12, show_plot=False)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(learn))) and all(torch.equal(a, b) for a, b in zip(state, flat_state(learn)))
    found = list(found), list(learn.recorder.losses), list(learn.recorder.lrs)
    learn.fit(1)
    return found


def flat_state(learn): return [v for s in learn.opt.state_dict()['state'] for v in s.values() if isinstance(v, torch.Tensor)]


def validate_between(learn):
    res = []
    for _ in range(2):
        res.append(learn.validate())
        learn.fit(1)
        res += [list(learn.recorder.values[-1][1:]), learn.validate(), learn.validate(0)]
    return [list(r) for r in res]


def predict_between(learn):
    res = []
    for _ in range(2):
        learn.fit(1)
        values = list(learn.recorder.values)
        res += [learn.get_preds(with_input=True, with_loss=True, with_decoded=True), learn.get_preds(ds_idx=0, with_loss=True),
                learn.get_preds(act=lambda x: x), learn.get_preds(cbs=MCDropoutCallback())]
        learn.recorder.values = values  # get_preds resets them
    return res


def save_and_load(learn):
    learn.fit(1)
    learn.save('one')
    kept = weights(learn)
    learn.fit(1)
    assert not all(torch.equal(a, b) for a, b in zip(kept, weights(learn)))
    learn.load('one')
    assert all(torch.equal(a, b) for a, b in zip(kept, weights(learn)))
    learn.fit(1)


def best_model(learn):
    learn.fit(3, cbs=SaveModelCallback(fname='best'))
    return learn.get_preds(with_loss=True), (learn.path/learn.model_dir/'best.pth').exists()


def resume(learn):
    learn.fit(2, cbs=SaveModelCallback(every_epoch=True, with_opt=True))
    learn.load('model_0', with_opt=True)
    learn.fit(3, start_epoch=1)
    assert len(learn.recorder.values) == 3


def early_stop(learn):
    learn.fit(6, cbs=EarlyStoppingCallback(min_delta=10., patience=1))
    n = len(learn.recorder.values)
    assert n == 2
    learn.fit(1)
    return n


def reduce_lr(learn):
    learn.fit(3, lr=.1, cbs=ReduceLROnPlateau(min_delta=10., patience=1, factor=5.))
    assert learn.opt.hypers[0]['lr'] < .03
    return learn.opt.hypers[0]['lr']


def csv_log(learn):
    learn.path.mkdir()
    learn.fit(2, cbs=CSVLogger())
    log = pd.read_csv(learn.path/'history.csv')
    assert list(log.columns) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time'] and len(log) == 2
    np.testing.assert_allclose(log.values[:, 1:4].astype(float), np.array(list(map(list, learn.recorder.values))), rtol=1e-6)
    return log.values[:, :4].astype(float)


def train_metrics(learn):
    learn.recorder.train_metrics = True
    learn.fit(2)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy', 'time']
    return list(learn.recorder.values[-1])


def frozen_bn(learn):
    learn.train_bn = False
    learn.freeze()
    before = learn.model.body[1].running_mean.clone()
    learn.fit(2, cbs=BnFreeze())
    assert torch.equal(before, learn.model.body[1].running_mean)
    learn.unfreeze()
    learn.fit(1)
    assert not torch.equal(before, learn.model.body[1].running_mean)


def channels_last(learn):
    learn.fit(2, cbs=ChannelsLast())
    assert learn.model.body[0].weight.is_contiguous(memory_format=torch.channels_last)


def parallel(learn):
    "Without a GPU torch's DataParallel hands the batch to the module"
    learn.to_parallel()
    learn.fit(1)
    assert type(learn.model) is Net
    learn.detach_parallel() if hasattr(learn, 'detach_parallel') else learn.remove_cb(ParallelTrainer)
    learn.fit(1)


def native_amp(learn):
    "On the CPU fastai's autocast and GradScaler switch themselves off, their events run all the same"
    learn.to_fp16()
    learn.fit(1)
    learn.to_fp32()
    learn.to_bf16()
    learn.fit(1)
    learn.to_fp32()


def comes_and_goes(learn):
    "One fit with the callback passed to it, one beside it that is taken away for a while"
    cbs = [cb for cb in learn.cbs if isinstance(cb, (LabelSmoothing, OneHot))]
    learn.remove_cbs(cbs)
    learn.fit(1, cbs=cbs)
    assert not any(isinstance(cb, (LabelSmoothing, OneHot)) for cb in learn.cbs)
    learn.add_cbs(cbs)
    with learn.removed_cbs(learn.cbs.filter(lambda cb: isinstance(cb, (LabelSmoothing, OneHot)))): learn.validate()
    learn.fit(1)


def new_data(learn):
    learn.fit(1)
    x, y = learners.data('index', 40)
    set_seed(3)
    learn.dls = DataLoaders(*(TfmdDL(learners.Items(zip(x, y)), bs=10, shuffle=s, num_workers=0, device='cpu') for s in (True, False)))
    learn.dls.c = K
    learn.fit(1)


def looked_at(learn):
    learn.summary()
    learn.fit(1)
    learn.show_training_loop()
    learn.fit(1, reset_opt=True)


def other_optimizers(learn):
    learn.opt_func = Adam
    learn.fit(1, 1e-3)
    learn.opt_func = partial(OptimWrapper, opt=torch.optim.AdamW)
    learn.fit_one_cycle(1, 1e-3, reset_opt=True)


LIVES = {
    'fit': lambda learn: learn.fit(2), 'fit_one_cycle': lambda learn: learn.fit_one_cycle(2), 'fit_flat_cos': lambda learn: learn.fit_flat_cos(2),
    'fit_sgdr': lambda learn: learn.fit_sgdr(2, 1), 'fine_tune': lambda learn: learn.fine_tune(2, base_lr=.02), 'freeze and unfreeze': frozen_and_not,
    'lr_find': find_lr, 'validate': validate_between, 'get_preds': predict_between, 'save and load': save_and_load, 'SaveModelCallback': best_model,
    'start_epoch': resume, 'EarlyStopping': early_stop, 'ReduceLROnPlateau': reduce_lr, 'CSVLogger': csv_log, 'train_metrics': train_metrics,
    'GradientClip': lambda learn: learn.fit(2, cbs=GradientClip(.05)), 'BnFreeze': frozen_bn, 'ChannelsLast': channels_last, 'to_parallel': parallel,
    'MixedPrecision': native_amp, 'ParamScheduler': lambda learn: learn.fit(2, cbs=ParamScheduler({'lr': SchedCos(.1, .01), 'mom': SchedLin(.5, .9)})),
    'ShortEpoch': lambda learn: learn.fit(2, cbs=ShortEpochCallback(.5)), 'TerminateOnNaN': lambda learn: learn.fit(1, cbs=TerminateOnNaNCallback()),
    'cbs come and go': comes_and_goes, 'new data': new_data, 'summary and reset_opt': looked_at,
    'optimizers': other_optimizers,
}


@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning')
@pytest.mark.parametrize('life, mixers', [*zip(LIVES, list(MIXERS)*9), *(('fit', m) for m in list(MIXERS)[1:]), ('fine_tune', 'both'), ('get_preds', 'both')])
def test_same_life_as_with_torchs_smoothing(life, mixers, tmp_path, capsys):
    "Each life with one of the mixers, and some with all"
    twins(tmp_path, mixers, LIVES[life])


# -- mixed precision, as fastai's callback does it

class Autocast(Callback):
    "fastai's MixedPrecision on the CPU; it may leave the predictions as they are"
    order = 10
    def __init__(self, float_pred, dtype): self.float_pred, self.dtype, self.dtypes = float_pred, dtype, set()

    def before_batch(self):
        self.context = torch.autocast('cpu', self.dtype)
        self.context.__enter__()

    def after_pred(self):
        self.dtypes.add(self.learn.pred.dtype)
        if self.float_pred: self.learn.pred = to_float(self.learn.pred)

    def after_loss(self): self.context.__exit__(None, None, None)


@pytest.mark.parametrize('dtype, float_pred, mixers', [(torch.bfloat16, False, 'none'), (torch.bfloat16, True, 'both'), (torch.float16, False, 'both'),
                                                      (torch.float16, True, 'oneof')])
def test_mixed_precision(float_pred, dtype, mixers, tmp_path):
    "The predictions come in half precision, the loss is computed in float32"
    def live(learn):
        cb = Autocast(float_pred, dtype)
        learn.fit(2, cbs=cb)
        assert cb.dtypes == {dtype} and learn.loss_grad.dtype is torch.float32
    twins(tmp_path, mixers, live, tol=2e-2)


# -- gradient accumulation

class NoNorm(nn.Module):
    "A model whose loss over a batch is the mean of that over its parts"
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(16*K, 6), nn.Tanh()), nn.Linear(6, K)

    def forward(self, x): return self.head(self.body(x))


class Steps(Callback):
    "The gradients of each step, and the loss of each batch"
    order, run_valid = 50, False
    def __init__(self): self.grads, self.batches = [], []
    def before_step(self): self.grads.append([p.grad.clone() for p in self.learn.model.parameters()])
    def after_batch(self): self.batches.append(float(self.learn.loss.detach()))


@pytest.mark.parametrize('m', [2, 3])
def test_gradient_accumulation_equals_the_big_batch(m, tmp_path):
    "m batches of 4 under the callback are one batch of 4m under the plain loss: gradients, weights, and the mean of the losses"
    loss = CrossEntropyLossFlat()
    small = make(tmp_path, [Look(-50), LabelSmoothing(EPS), GradientAccumulation(4*m), Steps(), Watch()], loss, NoNorm, bs=4)
    big = make(tmp_path, [Steps()], LabelSmoothingCrossEntropyFlat(EPS), NoNorm, bs=4*m)
    for learn in (small, big): quietly(lambda learn: learn.fit(2), learn)
    check_life(small, loss, n=12)
    assert len(small.steps.grads) == len(big.steps.grads) == 12//m
    close(small.steps.grads, big.steps.grads, 1e-5), close(weights(small), weights(big), 1e-5)
    close(np.reshape(small.steps.batches, (-1, m)).mean(1), np.array(big.steps.batches), 1e-5)


@with_two
def test_gradient_accumulation_and_mixers(mixers, tmp_path):
    "Mixers mix within a small batch, so the twin accumulates as well"
    def live(learn):
        learn.fit(2, cbs=[GradientAccumulation(16), GradientClip(.5)])
        return float(learn.loss_grad.detach())
    twins(tmp_path, mixers, live, look=lambda: Look(-50))


# -- resuming

class SeedEpochs(Callback):
    "A random state for each epoch, so that one can be skipped"
    run_valid = False

    def before_train(self):
        torch.manual_seed(self.learn.epoch)
        self.learn.dls.train.rng.seed(self.learn.epoch)


@pytest.mark.parametrize('eps, mixers', [(EPS, 'none'), (SchedLin(.4, 0.), 'both'), (SchedLin(.4, 0.), 'oneof')], ids=['constant', 'schedule', 'oneof'])
def test_resumed_training_is_the_unbroken_one(eps, mixers, tmp_path):
    "In a new Learner, bit for bit, with a schedule at the place where it was"
    def learner(): return make(tmp_path, [LabelSmoothing(eps), Look(), Watch(), SeedEpochs(), *MIXERS[mixers]()])
    unbroken, first, second = learner(), learner(), learner()
    quietly(lambda learn: learn.fit(4, lr=.1), unbroken)
    interrupted = [SaveModelCallback(every_epoch=True, with_opt=True), Interrupt(2)]
    with pytest.raises(KeyboardInterrupt): quietly(lambda learn: learn.fit(4, lr=.1, cbs=interrupted), first)
    quietly(lambda learn: learn.load('model_1', with_opt=True).fit(4, lr=.1, start_epoch=2), second)
    assert all(torch.equal(a, b) for a, b in zip(weights(unbroken), weights(second)))
    assert list(unbroken.recorder.values[-1][1:]) == list(second.recorder.values[-1][1:])  # the first is a running mean over the fit
    for i, (x, pred, loss, _) in enumerate(second.look.seen, 6):
        np.testing.assert_allclose(loss, expected_loss(x, pred, 'index', eps if eps == EPS else .4*(1-i/12)), rtol=2e-5)
    assert len(second.look.seen) == 6 and all(second.watch.hard) and all(first.watch.hard)


class Interrupt(Callback):
    order = 200
    def __init__(self, epoch): self.at = epoch

    def before_train(self):
        if self.learn.epoch == self.at: raise KeyboardInterrupt('stop')


def test_scheduled_strengths_of_a_resumed_fit(tmp_path):
    "The log is that of the last fit, as long as the log of the learning rate beside which it is drawn"
    learn = make(tmp_path, [LabelSmoothing(SchedLin(.4, 0.))])
    quietly(lambda learn: learn.fit(2), learn)
    assert len(learn.label_smoothing.log) == 6
    quietly(lambda learn: learn.fit(3, start_epoch=1, cbs=ParamScheduler({'lr': SchedCos(.1, .01)})), learn)
    assert len(learn.recorder.hps['lr']) == 6
    np.testing.assert_allclose(learn.label_smoothing.log, [.4*(1-i/9) for i in range(3, 9)], rtol=1e-5)


# -- what others see in a training batch

@with_two
def test_training_metrics_are_those_of_the_labels(mixers, tmp_path):
    def share(pred, y): return (pred.argmax(1) == y).float().mean()
    learn = make(tmp_path, [LabelSmoothing(EPS), Look(), Watch(), *MIXERS[mixers]()])
    learn.remove_cb(Recorder)
    learn.add_cb(Recorder(train_metrics=True))
    learn.metrics = [accuracy, share]
    quietly(lambda learn: learn.fit(1), learn)
    check_life(learn, learn.loss_func)
    right = [float((pred.argmax(1) == y[0]).float().mean()) for _, pred, _, y in learn.look.seen]
    close(list(learn.recorder.values[0])[1:3], [np.mean(right)]*2)
    assert 'train_share' in learn.recorder.metric_names


EVENTS = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'before_step', 'after_step', 'after_cancel_batch', 'after_batch', 'before_validate',
          'after_train', 'after_epoch']


class Spy(Callback):
    "Which events show a mixture as the target; cancels a batch at one event"
    def __init__(self, order, cancel=None): self.order, self.cancel, self.mixed, self.called = order, cancel, set(), set()

    def __call__(self, event):
        if event not in EVENTS: return
        self.called.add(event)
        if any(not isinstance(y, torch.Tensor) or y.is_floating_point() for y in self.learn.yb if y is not None): self.mixed.add(event)
        if event == self.cancel and self.learn.training: raise CancelBatchException


@pytest.mark.parametrize('order, mixers', [(-300, 'both'), (0, 'none'), (300, 'oneof')])
@pytest.mark.parametrize('cancel', [None, 'before_batch', 'after_pred', 'after_loss', 'before_backward'])
def test_no_mixture_leaves_the_batch(cancel, order, mixers, tmp_path):
    learn = make(tmp_path, [Spy(order, cancel), LabelSmoothing(EPS), Look(200), *MIXERS[mixers]()])
    loss = learn.loss_func
    quietly(lambda learn: learn.fit(1), learn)
    early = {'before_batch', 'after_pred', *(['after_loss', 'after_cancel_batch'] if order < -100 else [])}
    assert learn.spy.mixed <= early and {'after_batch', 'after_epoch'} <= learn.spy.called and learn.loss_func is loss
    if cancel is None:
        check_seen(learn, 'index', EPS, 3)
        assert 'after_pred' in learn.spy.mixed  # a mixture there is what it is about


# -- a life drawn at random

def neutral(): return GradientAccumulation(8)  # a batch has 8 examples: every batch is a step


OTHERS = [lambda: GradientClip(.1), neutral, CSVLogger, lambda: SaveModelCallback(fname='best'), lambda: Recorder(train_metrics=True),
          lambda: EarlyStoppingCallback(min_delta=.5, patience=1), lambda: ParamScheduler({'lr': SchedCos(.1, .01)}), TerminateOnNaNCallback]


@pytest.mark.slow
@given(st.data())
@settings(max_examples=15)
def test_random_lives(tmp_path_factory, data):
    "Any of them, in any order, given to the Learner or to the fit"
    path, eps = tmp_path_factory.mktemp('life'), data.draw(st.sampled_from([0., .1, .5, 1.]))
    chosen = data.draw(st.lists(st.sampled_from(range(len(OTHERS))), unique=True))
    mixers = data.draw(st.sampled_from(list(MIXERS)))
    n_mixers = len(MIXERS[mixers]())
    n = len(chosen) + n_mixers + 1
    order, in_fit = data.draw(st.permutations(range(n))), data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    epochs = data.draw(st.integers(1, 2))
    loss, res = CrossEntropyLossFlat(), []
    for ours in (True, False):
        cbs = [LabelSmoothing(eps) if ours else OneHot(), *MIXERS[mixers](), *[OTHERS[i]() for i in chosen]]
        learn = make(path/str(ours), [], loss if ours else TorchSmoothing(eps))
        learn.path.mkdir()
        if any(isinstance(cb, Recorder) for cb in cbs): learn.remove_cb(Recorder)
        if ours: learn.add_cbs([Look(-50), Watch()])
        learn.add_cbs([cbs[i] for i in order if not in_fit[i] or isinstance(cbs[i], Recorder)])
        temporary = [cbs[i] for i in order if in_fit[i] and not isinstance(cbs[i], Recorder)]

        def live(learn, temporary=temporary, epochs=epochs):
            for _ in range(2): learn.fit(epochs, cbs=temporary)
        quietly(live, learn)
        if ours:
            check_life(learn, loss, eps)
            assert not any(cb in learn.cbs for cb in temporary)
        res.append((weights(learn), list(learn.recorder.values), list(learn.recorder.losses)))
    close(*res)


# -- learners that fastai builds: the pictures show their own label

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "24 pictures of three classes, and of masks: red and green hold the label, blue is noise"
    path, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for i in range(24):
        for kind, y in (('whole', np.full((32, 32), i % 3)), ('parts', rng.integers(0, 3, (4, 4)).repeat(8, 0).repeat(8, 1))):
            folder = path/kind/'abc'[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            x = np.stack([(y == 0)*255, (y == 1)*255, rng.integers(0, 256, (32, 32))], -1).astype(np.uint8)
            Image.fromarray(x).save(folder/f'{i}.png')
            if kind == 'parts':
                (path/'masks').mkdir(exist_ok=True)
                Image.fromarray(y.astype(np.uint8)).save(path/'masks'/f'{i}.png')
    return path


def three_classes(learn):
    red, green = learn.xb[0][:, 0], learn.xb[0][:, 1]
    return torch.stack([red, green, 1-red-green], 1)


def look_at_pictures(): return Look(truth=three_classes)
def few_files(path): return get_image_files(path).sorted()[:12]
def mask_of(file): return file.parent.parent.parent/'masks'/file.name


def picture_dls(pictures, masks=False, bs=8):
    set_seed(0)
    block = DataBlock((ImageBlock, MaskBlock(list('abc')) if masks else CategoryBlock), get_items=few_files if masks else get_image_files,
                      get_y=mask_of if masks else parent_label, splitter=RandomSplitter(1/3, seed=0), batch_tfms=Flip(p=.5))
    return block.dataloaders(pictures/('parts' if masks else 'whole'), bs=bs, num_workers=0, device='cpu')


def picture_learner(pictures, arch='resnet10t', **kwargs):
    def build(path, cbs, loss):
        dls = picture_dls(pictures)
        return vision_learner(dls, arch, normalize=False, pretrained=False, loss_func=loss, cbs=cbs, path=path, opt_func=SGD, metrics=accuracy, lin_ftrs=[],
                              concat_pool=False, **kwargs)
    return build


def plain_copy(learn, build, path):
    "A learner without the callback, with the same weights"
    plain = build(path, [], CrossEntropyLossFlat(axis=getattr(learn.loss_func, 'axis', -1)))
    plain.model.load_state_dict(learn.model.state_dict())
    return plain


@pytest.mark.slow
@pytest.mark.parametrize('arch, mixers', [('resnet10t', 'none'), ('resnet10t', 'both'), ('tf_efficientnet_lite0', 'oneof')])
def test_vision_learner_of_timm(arch, mixers, pictures, tmp_path):
    def live(learn):
        learn.fine_tune(1, base_lr=.01)
        return learn.get_preds(with_loss=True)
    learn, *_ = twins(tmp_path, mixers, live, picture_learner(pictures, arch), 1e-3 if arch == 'resnet10t' else 3e-2, look=look_at_pictures, classes=3)
    assert len(learn.look.seen) == 4


@pytest.fixture(scope='module')
def trained(pictures, tmp_path_factory):
    "A vision learner that was trained with smoothing and mixers, and a plain one with its weights"
    build, path = picture_learner(pictures), tmp_path_factory.mktemp('trained')
    loss = CrossEntropyLossFlat()
    learn = build(path, [LabelSmoothing(.5), *MIXERS['both'](), look_at_pictures(), Watch()], loss)
    quietly(lambda learn: learn.fit(2, .01), learn)
    check_life(learn, loss, .5)
    return learn, plain_copy(learn, build, path)


def both(trained, f):
    learn, plain = trained
    res = [quietly(f, learn) for learn in (learn, plain)]
    assert type(learn.loss_func) is CrossEntropyLossFlat and learn.loss_func.reduction == 'mean'
    return res


def same(trained, f):
    a, b = both(trained, f)
    for x, y in zip(flat(a), flat(b), strict=True): assert torch.equal(x, y)
    return a


def log_softmax_losses(learn):
    "Plain losses of the validation data, one at a time"
    learn.model.eval()
    res = []
    for x, y in learn.dls.valid:
        with torch.no_grad(): logits = learn.model(x)
        res += [-F.log_softmax(torch.Tensor(z).double(), 0)[int(k)] for z, k in zip(logits, y)]
    return torch.stack(res)


@pytest.mark.slow
def test_validate_and_predictions(trained):
    losses = log_softmax_losses(trained[0])
    p, y, decoded, by_item = same(trained, lambda learn: learn.get_preds(with_decoded=True, with_loss=True))
    close(by_item, losses, 1e-5)
    assert torch.equal(decoded, p.argmax(1))
    close(same(trained, lambda learn: list(learn.validate())), [losses.mean(), (p.argmax(1) == y).double().mean()], 1e-5)
    # a smoothed loss would be another number
    smoothed = .5*losses.mean() - .5*p.double().log().mean()
    assert abs(smoothed-losses.mean()) > 1e-3


@pytest.mark.slow
def test_predict(trained, i=1):
    item = trained[0].dls.valid.items[i]
    label, k, p = same_predict(trained, item)
    assert label == 'abc'[int(k)] and int(k) == int(p.argmax()) and abs(float(p.sum())-1) < 1e-5
    valid = quietly(lambda learn: learn.get_preds(), trained[1])[0][i]
    torch.testing.assert_close(torch.Tensor(p), valid)


def same_predict(trained, item):
    a, b = both(trained, lambda learn: learn.predict(PILImage.create(item)))
    assert a[0] == b[0] and torch.equal(a[2], b[2])
    return a


def titles(): return [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]


@pytest.mark.slow
def test_interpretation(trained):
    learn, plain = trained
    losses = log_softmax_losses(learn)
    interp = quietly(ClassificationInterpretation.from_learner, learn)
    other = quietly(ClassificationInterpretation.from_learner, plain)
    close(interp.losses, losses, 1e-5)
    close(interp.top_losses(4)[0], losses.sort(descending=True)[0][:4], 1e-5)
    p, y = quietly(lambda learn: learn.get_preds(), plain)
    counts = np.zeros((3, 3), int)
    for k, label in zip(p.argmax(1).tolist(), y.tolist()): counts[label, k] += 1
    drawn = []
    for i in (interp, other):
        with i.learn.no_bar():
            assert (i.confusion_matrix() == counts).all()
            plt.close('all')
            i.plot_confusion_matrix()
            texts = [t.get_text() for t in plt.gcf().axes[0].texts]
            i.plot_top_losses(4)
            drawn.append((texts, titles(), repr(i.most_confused())))
            plt.close('all')
    assert drawn[0] == drawn[1] and drawn[0][0] == [str(c) for c in counts.reshape(-1)]
    shown = [t for t in drawn[0][1] if '/' in t]
    assert len(shown) == 4
    for text, loss in zip(shown, losses.sort(descending=True)[0]): assert abs(float(text.split('/')[2]) - loss) < .006


@pytest.mark.slow
def test_show_results(trained):
    def show(learn):
        plt.close('all')
        learn.show_results(shuffle=False, max_n=4)
        res = titles()
        plt.close('all')
        return res
    a, b = both(trained, show)
    assert a == b and len(a) == 4
    p, y = quietly(lambda learn: learn.get_preds(), trained[1])
    for text, k, label in zip(a, p.argmax(1), y): assert text.split() == ['abc'[label], 'abc'[k]]


@pytest.mark.slow
@pytest.mark.parametrize('options', [{}, {'use_max': True}, {'beta': None}], ids=repr)
def test_tta(options, trained):
    res = same(trained, lambda learn: learn.tta(n=3, **options))
    if options.get('beta', 0) is None:
        (augmented, plain), y = res
        torch.testing.assert_close(plain, quietly(lambda learn: learn.get_preds(), trained[1])[0])
        assert not torch.equal(augmented, plain)


@pytest.mark.slow
def test_training_goes_on_after_all_that(trained):
    "In the same learner, also after an lr_find"
    learn, _ = trained
    before = weights(learn)
    quietly(lambda learn: learn.lr_find(num_it=6, show_plot=False), learn)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(learn)))
    quietly(lambda learn: learn.fit(1, .01), learn)
    check_life(learn, learn.loss_func, .5)
    learn.model.load_state_dict(dict(zip(learn.model.state_dict(), before)))


# -- export

@pytest.mark.slow
@with_two
def test_export_and_predict(mixers, pictures, tmp_path):
    "The loaded learner predicts the same, and trains with smoothing"
    learn = picture_learner(pictures)(tmp_path, [LabelSmoothing(EPS), *MIXERS[mixers](), look_at_pictures(), Watch()], CrossEntropyLossFlat())
    quietly(lambda learn: learn.fit(1, .01), learn)
    learn.export()
    loaded = load_learner(tmp_path/'export.pkl')
    for file in learn.dls.valid.items[:2]:
        a, b = (quietly(lambda learn, file=file: learn.predict(file), o) for o in (learn, loaded))
        assert a[0] == b[0] and torch.equal(a[2], b[2])
    loss = loaded.loss_func
    assert type(loss) is CrossEntropyLossFlat
    loaded.dls = picture_dls(pictures)
    quietly(lambda learn: learn.fit(1, .01), loaded)
    check_life(loaded, loss, n=4)
    check_life(quietly(lambda learn: learn.fit(1, .01) or learn, learn), learn.loss_func, n=4)


@pytest.mark.slow
def test_exported_learner_without_the_callback_needs_no_fastai_smooth(pictures, tmp_path):
    "Whoever takes the callback away before the export can load the file where the package is missing"
    learn = picture_learner(pictures)(tmp_path, [LabelSmoothing(EPS), MixUp(), CutMix()], CrossEntropyLossFlat())
    quietly(lambda learn: learn.fit(1, .01), learn)
    learn.remove_cb(LabelSmoothing)
    learn.export()
    with zipfile.ZipFile(tmp_path/'export.pkl') as z: data = z.read(next(n for n in z.namelist() if n.endswith('data.pkl')))
    assert b'fastai.callback.mixup' in data and b'fastai_smooth' not in data


def test_learner_that_is_pickled_in_training(tmp_path):
    "As a process that loads data in the background would"
    class Pickles(Callback):
        run_valid = False
        def after_batch(self): self.copy = pickle.loads(pickle.dumps(self.learn.loss_func))
    learn = make(tmp_path, [LabelSmoothing(EPS), MixUp(), Pickles(), Look(), Watch()])
    quietly(lambda learn: learn.fit(1), learn)
    check_life(learn, learn.loss_func)
    assert type(learn.pickles.copy) is CrossEntropyLossFlat


# -- masks

def unet(pictures):
    def build(path, cbs, loss):
        dls = picture_dls(pictures, masks=True, bs=4)
        return unet_learner(dls, resnet18, normalize=False, pretrained=False, loss_func=loss, cbs=cbs, path=path, opt_func=SGD)
    return build


@pytest.mark.slow
@pytest.mark.parametrize('mixers', ['none', 'mixup'])
def test_unet_learner(mixers, pictures, tmp_path):
    "fastai's CutMix blends whole masks, which is another truth than that of the picture, so it has no place here"
    learn, *_ = twins(tmp_path, mixers, lambda learn: learn.fit(1, .01), unet(pictures), 2e-3, 'mask', look_at_pictures, 3, 1)
    assert learn.look.seen[0][0].shape == (4, 3, 32, 32)
    if mixers == 'mixup': return
    plain = plain_copy(learn, unet(pictures), tmp_path)
    a, b = (quietly(lambda learn: learn.get_preds(with_loss=True, with_decoded=True), o) for o in (learn, plain))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    interp = quietly(SegmentationInterpretation.from_learner, learn)
    by_pixel = F.nll_loss(a[0].double().log(), torch.Tensor(a[1]).long(), reduction='none')
    close(interp.losses, by_pixel.mean((1, 2)), 1e-4)
    with learn.no_bar():
        learn.show_results(max_n=2)
        assert learn.predict(learn.dls.valid.items[0])[0].shape == (32, 32)
    plt.close('all')


# -- tables and texts

class MixNumbers(Callback):
    "MixUp of the continuous columns"
    run_valid = False

    def before_batch(self):
        categories, x = self.learn.xb
        self.learn.xb = categories, torch.lerp(x.flip(0), x, .7)
        self.learn.yb = tuple(torch.lerp(y.flip(0) if isinstance(y, torch.Tensor) else y[torch.arange(len(y)-1, -1, -1)], y, .7) for y in self.learn.yb)


def numbers(learn): return learn.xb[1][:, :3, None, None]
def look_at_numbers(): return Look(truth=numbers)


def rows():
    y, rng = np.arange(24) % 3, np.random.default_rng(0)
    df = pd.DataFrame({**{f'is_{k}': (y == k).astype(np.float32) for k in range(3)}, 'noise': rng.normal(size=24).astype(np.float32), 'y': list('abc')*8})
    df['category'] = rng.choice(list('uvw'), 24)
    return df


def table(path, cbs, loss):
    set_seed(0)
    dls = TabularDataLoaders.from_df(rows(), path, cat_names=['category'], cont_names=['is_0', 'is_1', 'is_2', 'noise'], y_names='y', bs=8,
                                     valid_idx=[*range(8)], procs=[Categorify], num_workers=0, device='cpu')
    return tabular_learner(dls, layers=[8], loss_func=loss, cbs=cbs, opt_func=SGD, metrics=accuracy)


@pytest.mark.slow
@pytest.mark.parametrize('mixers', [list, lambda: [MixNumbers()]], ids=['none', 'numbers'])
def test_tabular_learner(mixers, tmp_path):
    def live(learn):
        learn.fit_one_cycle(2, .05)
        return learn.get_preds(with_loss=True), learn.validate(), learn.lr_find(num_it=6, show_plot=False)
    learn, *_ = twins(tmp_path, mixers, live, table, look=look_at_numbers, classes=3)
    row, k, p = quietly(lambda learn: learn.predict(rows().iloc[0]), learn)
    torch.testing.assert_close(p, quietly(lambda learn: learn.get_preds(), learn)[0][0])
    assert int(k) == int(p.argmax())


class MixLabels(Callback):
    "Soft labels without mixed inputs: a third of the label of the mirror image"
    run_valid = False
    def before_batch(self): self.learn.yb = tuple(torch.lerp(y[mirror(y)], y, .7) for y in self.learn.yb)


def mirror(y): return torch.arange(len(y)-1, -1, -1)


class Labels:
    "Reads the truth off the labels of the data loader"
    def __init__(self, n, mixed, sequence): self.n, self.mixed, self.sequence = n, mixed, sequence

    def __call__(self, learn):
        q = one_hot(learn.yb[0], self.n)
        if self.mixed: q = torch.lerp(q.flip(0), q, .7)
        return q.movedim(-1, 1) if self.sequence else q[:, :, None, None]


def texts(path, lm):
    set_seed(0)
    rng = np.random.default_rng(0)
    df = pd.DataFrame({'text': [' '.join(rng.choice(list('abcde'), 8)) for _ in range(24)], 'label': list('xyz')*8})
    path.mkdir(exist_ok=True)
    return TextDataLoaders.from_df(df, path, seed=0, is_lm=lm, text_col='text', label_col='label', tok_tfm=BaseTokenizer(), bs=4, seq_len=6, num_workers=0,
                                   device='cpu')


SMALL = dict(emb_sz=8, n_hid=8, n_layers=2)


@pytest.mark.slow
@pytest.mark.parametrize('mixed', [False, True])
def test_text_classifier(mixed, tmp_path):
    "With ModelResetter, RNNCallback and RNNRegularizer, whose penalty comes on top of the smoothed loss"
    def build(path, cbs, loss):
        return text_classifier_learner(texts(path, False), AWD_LSTM, config={**awd_lstm_clas_config, **SMALL}, pretrained=False, loss_func=loss, cbs=cbs,
                                       opt_func=SGD, alpha=2., beta=1., metrics=accuracy)

    def live(learn):
        assert {'model_resetter', 'rnn', 'rnn_regularizer'} <= {cb.name for cb in learn.cbs}
        learn.fit_one_cycle(1, .05)
        learn.freeze()
        learn.fit(1, .05)
        return learn.get_preds(with_loss=True), learn.validate()
    learn, *_ = twins(tmp_path, lambda: [MixLabels()]*mixed, live, build, look=lambda: Look(-50, Labels(3, mixed, False)), classes=3)
    label, k, p = quietly(lambda learn: learn.predict('a b c d'), learn)
    assert label == 'xyz'[int(k)] and int(k) == int(p.argmax())


@pytest.mark.slow
@pytest.mark.parametrize('mixed', [False, True])
def test_language_model(mixed, tmp_path):
    n = len(texts(tmp_path, True).vocab)

    def build(path, cbs, loss):
        learn = language_model_learner(texts(path, True), AWD_LSTM, config={**awd_lstm_lm_config, **SMALL}, pretrained=False, cbs=cbs, opt_func=SGD,
                                       alpha=2., beta=1., metrics=accuracy)
        learn.loss_func = loss  # language_model_learner has no argument for it
        return learn

    def live(learn):
        learn.fit(2, .1)
        return learn.validate()
    learn, *_ = twins(tmp_path, lambda: [MixLabels()]*mixed, live, build, 1e-4, 'mask', lambda: Look(-50, Labels(n, mixed, True), -1), n)
    assert learn.look.seen[0][0].shape == (4, n, 6)
