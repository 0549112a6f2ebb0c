"`FusedHead`: the same training without the logits, in every kind of model, and nothing left behind"
import random
import warnings

import learners
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.distributed as distributed
from callback.test_training_pass import BEHAVIOURS, CANCELLED, Cancel, Raise, run
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.text.core import BaseTokenizer
from fastai.text.data import TextDataLoaders
from fastai.text.learner import language_model_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
from fastai.torch_core import set_seed
from fastai.vision.learner import create_timm_model, create_vision_model
from learners import WhatTheLossSaw, fit, make_learner, quiet
from memory import peak
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from fastai_smooth.callback import FusedHead, LabelSmoothing, OneOf
from fastai_smooth.data.embedded import digits_arrays, docstrings_arrays
from fastai_smooth.distributions import ClassPrior, Online, Taxonomy, Zipf
from fastai_smooth.kernels import LazyLogits
from fastai_smooth.losses import LabelSmoothingCrossEntropy, LabelSmoothingFocal

pytestmark = pytest.mark.filterwarnings('error:.*stay unbuilt')  # nobody builds the logits, if a test does not say so


def weights(learn): return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}


def check_same(a, b, rtol=1e-4, atol=1e-6):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=rtol, atol=atol, msg=lambda m, k=k: f'{k}: {m}')


def fits(build, live=lambda learn: learn.fit(2), **kwargs):
    "The same life without and with the callback, from the same weights and seed"
    found = []
    for cbs in ([], [FusedHead()]):
        learn = build(cbs)
        set_seed(3)
        before = weights(learn)
        with quiet(learn): live(learn)
        assert any((before[k] != v).any() for k, v in weights(learn).items()), 'nothing was trained'
        found.append(learn)
    check_same(*found, **kwargs)
    np.testing.assert_allclose(np.array(found[0].recorder.values), np.array(found[1].recorder.values), rtol=1e-3, atol=1e-5)
    return found


# -- the same training

class Lazy(Callback):
    "What the predictions were in training, before and after everybody else has looked at them"
    run_valid = False
    order = 1000
    def __init__(self): self.kinds = set()
    def after_pred(self): self.kinds.add(type(self.learn.pred))


class LazyFirst(Lazy): order = -1000


class Autocast(MixedPrecision):
    "fastai's mixed precision is for GPUs: the same callback with the autocast of the CPU"
    name = 'mixed_precision'

    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', torch.bfloat16)


HEAVY = torch.linspace(.5, 2., learners.K)
TREE, PRIOR = Taxonomy(['a/b', 'a/c', 'd', 'e']), ClassPrior([1, 2, 3, 4])
SETTINGS = {
    'plain': (lambda: [], None), 'mixup': (lambda: [MixUp()], None), 'smoothed': (lambda: [LabelSmoothing(.1)], None),
    'both': (lambda: [LabelSmoothing(.1), MixUp(), CutMix()], None), 'one of': (lambda: [OneOf(MixUp(), CutMix()), LabelSmoothing(.1)], None),
    'weights': (lambda: [LabelSmoothing(.2)], lambda: CrossEntropyLossFlat(weight=HEAVY)),
    'torch': (list, lambda: nn.CrossEntropyLoss(HEAVY, label_smoothing=.1)),
    'ours': (list, lambda: LabelSmoothingCrossEntropy(.1, HEAVY, weight_by='example')),
    'others': (list, lambda: LabelSmoothingCrossEntropy(.1, convention='others')),
    'negative': (list, lambda: LabelSmoothingCrossEntropy(-.1, negative=True)), 'tree': (lambda: [LabelSmoothing(.3, .5*TREE + .5*PRIOR), MixUp()], None),
    'schedule': (lambda: [LabelSmoothing(lambda pct: .2*(1-pct))], None), 'accumulated': (lambda: [LabelSmoothing(.1), GradientAccumulation(16)], None),
    'per class': (lambda: [LabelSmoothing([.1, .2, .3, .4])], None)}


@pytest.mark.parametrize('name', SETTINGS)
def test_same_training(name):
    cbs, loss = SETTINGS[name]
    *_, learn = fits(lambda own: make_learner('index', loss() if loss else None, [*own, *cbs(), LazyFirst(), Lazy()], opt_func=SGD))
    assert learn.lazy_first.kinds == learn.lazy.kinds == {LazyLogits}
    assert not learn.model[-1]._forward_pre_hooks and '_do_epoch_train' not in vars(learn)


@pytest.mark.parametrize('cls', [Autocast, MixedPrecision])
def test_mixed_precision(cls):
    def build(own): return make_learner('index', None, [*own, cls('bf16'), LabelSmoothing(.1), MixUp(), Lazy()], opt_func=SGD)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*CUDA is not available.*')
        *_, learn = fits(build, rtol=2e-2, atol=2e-3) if cls is Autocast else fits(build)
    assert learn.lazy.kinds == {LazyLogits}


def image_learner(model, cbs, n=8, k=learners.K):
    set_seed(0)
    y = torch.arange(n) % k
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dls = DataLoaders(*[learners.TfmdDL(learners.Items(zip(x, y)), bs=4, num_workers=0, device='cpu')]*2)
    dls.c = k
    return Learner(dls, model, CrossEntropyLossFlat(), cbs=[LabelSmoothing(.1), *cbs], opt_func=SGD, lr=1e-3)


MODELS = {'vision_learner': lambda: create_vision_model(resnet18, 4, pretrained=False),
          'create_timm_model': lambda: create_timm_model('test_resnet.r160_in1k', 4, pretrained=False)[0],
          'timm': lambda: timm.create_model('test_vit.r160_in1k', num_classes=4, img_size=32)}


@pytest.mark.parametrize('name', [pytest.param('vision_learner', marks=pytest.mark.slow), 'create_timm_model', 'timm'])
def test_image_models(name):
    def build(cbs):
        torch.manual_seed(0)
        return image_learner(MODELS[name](), cbs)
    fits(build, lambda learn: learn.fit(1), rtol=1e-3, atol=1e-5)


def test_data_parallel():
    "The gradients of the weight come from the loss and not from a layer: DistributedDataParallel reduces them as others"
    distributed.init_process_group('gloo', rank=0, world_size=1, store=distributed.HashStore())
    try:
        def build(cbs):
            learn = make_learner('index', None, [LabelSmoothing(.1), *cbs], opt_func=SGD)
            learn.model = nn.parallel.DistributedDataParallel(learn.model)
            return learn
        fits(build)
    finally: distributed.destroy_process_group()


# -- real text and many classes


@pytest.fixture(scope='module')
def text_dls(tmp_path_factory):
    texts, _, _ = docstrings_arrays()
    df = pd.DataFrame({'text': texts[:300]})
    return TextDataLoaders.from_df(df, tmp_path_factory.mktemp('text'), seed=0, is_lm=True, text_col='text', tok_tfm=BaseTokenizer(), bs=16, seq_len=24,
                                   num_workers=0, device='cpu')


def language_model(dls, cbs):
    set_seed(0)
    dls.train.items.idxs[:] = range(len(dls.train.items.idxs))  # texts are shuffled in place
    dls.train.rng = random.Random(0)
    small = {**awd_lstm_lm_config, 'emb_sz': 24, 'n_hid': 32, 'n_layers': 2}
    learn = language_model_learner(dls, AWD_LSTM, config=small, pretrained=False, alpha=2., beta=1., cbs=[LabelSmoothing(.1), *cbs])
    assert learn.model[1].decoder.weight is learn.model[0].encoder.weight
    return learn


def test_language_model(text_dls):
    "A tied decoder, ModelResetter, RNNCallback, RNNRegularizer and a one-cycle schedule"
    fits(lambda cbs: language_model(text_dls, cbs), lambda learn: learn.fit_one_cycle(1, 1e-2), rtol=1e-4, atol=1e-5)


def digits_of_many_classes(cbs, k=21841, bs=64):
    "Each digit in one of 100 classes of its own, all over the numbers: (digit, how dark) spread"
    images, y, _ = digits_arrays()
    images, y = torch.from_numpy(images).float()/255, torch.from_numpy(y)
    set_seed(0)
    dark = images.sum((1, 2)).argsort().argsort()*100//len(images)
    labels = (y*100+dark)*21 % k
    items = learners.Items(zip(images[:, None], labels))
    dls = DataLoaders(*(learners.TfmdDL(items[i:j], bs=bs, shuffle=s, num_workers=0, device='cpu') for i, j, s in ((0, 384, True), (384, 512, False))))
    dls.c = k
    model = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, k))
    return Learner(dls, model, CrossEntropyLossFlat(), cbs=[LabelSmoothing(.1), MixUp(), *cbs], opt_func=SGD, lr=.1)


def test_21841_classes():
    fits(digits_of_many_classes, rtol=1e-4, atol=1e-6)


class Stop(Callback):
    "One training batch"
    def after_batch(self): raise CancelFitException


def test_memory_of_a_step():
    "The gradient of the weight, and a chunk of logits in place of three times all of them"
    n, k = 192, 60000
    found, logits, weight = {}, n*k*4, 32*k*4
    for name, cbs in (('logits', []), ('fused', [FusedHead()])):
        learn = digits_of_many_classes([*cbs, Stop()], k, n)
        with quiet(learn): found[name] = peak(lambda learn=learn: learn.fit(1))
    assert found['logits'] > 3*logits, found
    assert found['fused'] < 2**25 + weight + 2**22 < .4*found['logits'], found


# -- everything else sees the model as it is

def test_predictions_files_and_groups(tmp_path):
    plain, learn = (make_learner('index', None, [*own, LabelSmoothing(.1)], opt_func=SGD, path=tmp_path, metrics=accuracy) for own in ([], [FusedHead()]))
    for a in (plain, learn):
        fit(a, 1)
        a.save(f'of_{len(a.cbs)}')
    for a, b in ((plain, learn), (learn, plain)):
        with quiet(a), quiet(b):
            for p, q in zip(a.get_preds(with_loss=True), b.get_preds(with_loss=True)): torch.testing.assert_close(p, q)
            torch.testing.assert_close(a.validate(), b.validate())
    x = learn.dls.valid_ds[0]
    assert type(learn.model.eval()(x[0][None])) is torch.Tensor
    assert [len(g) for g in learn.opt.param_lists] == [len(g) for g in plain.opt.param_lists]
    assert [n for n, _ in learn.model.named_parameters()] == [n for n, _ in plain.model.named_parameters()]
    plain.load(f'of_{len(learn.cbs)}')
    learn.load(f'of_{len(learn.cbs)}')
    fit(plain, 1), fit(learn, 1)
    check_same(plain, learn)
    learn.export('one.pkl')
    again = load_learner(tmp_path/'one.pkl')
    check_same(again, learn)
    assert again.fused_head.layer is None


def test_exported_in_the_middle_of_a_batch(tmp_path):
    class InTheMiddle(Callback):
        order, run_valid = 100, False
        def after_batch(self):
            if self.learn.iter == 1: self.learn.export('mid.pkl')
    learn = make_learner('index', None, [FusedHead(), LabelSmoothing(.1), InTheMiddle()], path=tmp_path)
    fit(learn, 1)
    model = load_learner(tmp_path/'mid.pkl').model.train()
    x, _ = learners.data('index')
    assert type(model(x)) is torch.Tensor and not learn.model[-1]._forward_pre_hooks


# -- however a fit ends

EVENTS = ('before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step after_batch after_cancel_batch '
          'after_cancel_step after_train after_epoch').split()
FAULTS = [(event, how) for event in EVENTS for how, of in BEHAVIOURS.items() if of(event)]


@pytest.mark.parametrize('event, how', FAULTS)
def test_everything_is_put_back(event, how):
    error = BEHAVIOURS[how](event)
    fault = Raise(event, error, -1000 if how == 'cancel, caught' else 1000)
    cancels = [Cancel(*CANCELLED[event.removeprefix('after_cancel_')])] if 'cancel' in event else []
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [FusedHead(), LabelSmoothing(.1), MixUp(), fault, *cancels], opt_func=SGD)
    e = run(learn, 1)
    if how != 'cancel, caught': assert isinstance(e, error), "the error must reach the user"
    assert fault.count and learn.loss_func is loss and not learn.model[-1]._forward_pre_hooks
    learn.remove_cbs([Raise, Cancel])
    plain = make_learner('index', loss, [LabelSmoothing(.1), MixUp()], opt_func=SGD)
    plain.model.load_state_dict(learn.model.state_dict())
    for a in (learn, plain):
        a.opt, a.dls.train.rng = None, random.Random(0)
        a.model.zero_grad()  # of a batch that was cut short
        set_seed(1)
        fit(a, 1)
    check_same(learn, plain)


def test_removed_in_the_middle_of_a_pass():
    class Remove(Callback):
        def after_batch(self):
            if hasattr(self.learn, 'fused_head'): self.learn.remove_cb(FusedHead)
    learn = fit(make_learner('index', None, [FusedHead(), LabelSmoothing(.1), Remove(), Lazy()]), 1)
    assert learn.lazy.kinds == {LazyLogits, torch.Tensor} and not learn.model[-1]._forward_pre_hooks


# -- somebody who wants the logits

@pytest.mark.filterwarnings('default:.*stay unbuilt')
def test_whoever_looks_gets_the_logits():
    with pytest.warns(UserWarning, match='detach needs the logits'):
        learn = fit(make_learner('index', None, [FusedHead(), LabelSmoothing(.1), WhatTheLossSaw()]), 1)
    learners.check_seen(learn, 'index', .1, 3)


def test_a_change_in_place_and_a_late_look_are_refused():
    class Do(Callback):
        run_valid = False
        def __init__(self, event, what): self.event, self.what = event, what

        def __call__(self, name):
            if name == self.event and self.learn.training: self.what(self.learn.pred)
    for event, what, words in (('after_pred', lambda z: z.mul_(2.), 'mul_'), ('after_pred', lambda z: z.__setitem__(0, 1.), '__setitem__'),
                               ('after_loss', lambda z: z.retain_grad(), 'retain_grad'), ('after_batch', lambda z: z.argmax(1), 'before the step')):
        learn = make_learner('index', None, [FusedHead(), LabelSmoothing(.1), Do(event, what)])
        with pytest.raises(RuntimeError, match=words): fit(learn, 1)


def test_lazy_logits_are_the_logits():
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*s, generator=g, requires_grad=True) for s in ((2, 3, 4), (5, 4), (5,)))
    z, wanted = LazyLogits(x, w, b), F.linear(x, w, b)
    assert z.shape == wanted.shape and z.ndim == 3 and len(z) == 2 and z.size(-1) == 5 and z.numel() == 30 and z.dtype == wanted.dtype
    assert z.requires_grad and z.is_floating_point() and repr(z).startswith('LazyLogits')
    assert type(z.view(-1, 5)) is type(z.float()) is type(z.transpose(-1, 2)) is LazyLogits
    torch.testing.assert_close(z.view(-1, 5).build(), wanted.view(-1, 5))
    y = torch.randint(5, (6,), generator=g)
    q = torch.rand(6, 5, generator=g)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for f in (lambda z: z.softmax(-1), lambda z: z[0], lambda z: 2*z, lambda z: torch.cat([z, z]), lambda z: z.view(5, 6), lambda z: z.transpose(0, 1),
                  lambda z: F.cross_entropy(z.view(-1, 5), q, label_smoothing=.1), lambda z: F.cross_entropy(z.movedim(-1, 1), y.view(2, 3)),
                  lambda z: LabelSmoothingCrossEntropy(.1, axis=1)(z.movedim(-1, 1), y.view(2, 3)), lambda z: LabelSmoothingFocal(.1)(z.view(-1, 5), y)):
            torch.testing.assert_close(f(z), f(wanted))
            for a, c in zip(*(torch.autograd.grad(f(t).sum(), (x, w, b), retain_graph=True) for t in (z, wanted))): torch.testing.assert_close(a, c)
        with pytest.raises(RuntimeError, match='mul would change'): torch.mul(wanted, 2., out=z)


# -- what does not fit

def refused(words, model=None, loss=None, cbs=(), head=None, error=ValueError, **kwargs):
    learn = make_learner('index', loss, [head or FusedHead(), *cbs], **kwargs)
    if model is not None: learn.model = model
    before = weights(learn)
    with pytest.raises(error, match=words): fit(learn, 1)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(learn).values()))
    assert not any(m._forward_pre_hooks for m in learn.model.modules())
    return learn


class Twice(nn.Module):
    def __init__(self): super().__init__(); self.fc = nn.Linear(64, 64)
    def forward(self, x): return self.fc(self.fc(x.flatten(1)))


class Functional(nn.Module):
    def __init__(self): super().__init__(); self.fc = nn.Linear(64, 4)
    def forward(self, x): return F.linear(x.flatten(1), self.fc.weight, self.fc.bias)


class Sharing(nn.Module):
    def __init__(self): super().__init__(); self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64); self.first.weight = self.last.weight
    def forward(self, x): return self.last(self.first(x.flatten(1)))


def sequence(*layers): return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), *layers)


def test_what_does_not_fit_is_refused():
    refused("'2', BatchNorm1d", sequence(nn.BatchNorm1d(4)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        refused("'1' does not give the predictions", sequence(nn.Tanh()))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        refused("'fc' is used 2 times", Twice())
    refused("'fc' is not called as a layer", Functional())
    refused("'last' shares its weight with 'first'", Sharing())
    refused("'7' is not in the model.*'1'", head=FusedHead('7'))
    refused('FocalLoss.* needs the logits', loss=FocalLossFlat())
    refused('LabelSmoothingCrossEntropy.* needs the logits', loss=LabelSmoothingCrossEntropyFlat())
    for dist in (Online(4), Zipf()): refused('without the logits', cbs=[LabelSmoothing(.1, dist)])
    learn = make_learner('index', None, [FusedHead()], metrics=accuracy)
    learn.recorder.train_metrics = True
    with pytest.raises(ValueError, match='accuracy.* of the training set need the logits'): fit(learn, 1)
    learn.recorder.train_metrics = False
    fit(learn, 1)


def test_a_layer_that_is_not_registered_last():
    class Early(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(64, 4); self.norm = nn.BatchNorm1d(64)
        def forward(self, x): return self.fc(self.norm(x.flatten(1)))
    learn = make_learner('index', None, [FusedHead('fc'), Lazy()])
    learn.model = Early()
    assert fit(learn, 1).lazy.kinds == {LazyLogits} and repr(learn.fused_head) == "FusedHead(layer='fc')"
    refused("'norm'", Early())
