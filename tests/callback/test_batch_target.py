"Until a mixer blends them, the targets of a batch are labels for everybody, and after the loss they are those of the rows that the batch then has"
import copy
import operator
import pickle

import learners
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.mixup import CutMix, MixHandler, MixUp
from fastai.data.block import CategoryBlock, DataBlock, RegressionBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import CastToTensor, Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.torch_core import TensorCategory, set_seed
from fastai.vision.core import PILImage, TensorPoint
from fastai.vision.data import ImageBlock, PointBlock
from learners import K, WhatTheLossSaw, check_seen, expected_loss, fit, make_learner
from torch import nn
from torch.nn import functional as F

from fastai_smooth.callback import LabelSmoothing, OneOf, TimmMix
from fastai_smooth.callback.batch_target import BatchTarget, BlendedTarget, Form, after_loss
from fastai_smooth.distributions import Online
from fastai_smooth.losses import LabelSmoothingCrossEntropy, MultiTargetLoss
from fastai_smooth.targets import to_dense

MIXERS = {'none': list, 'mixup': lambda: [MixUp()], 'cutmix': lambda: [CutMix()], 'both': lambda: [MixUp(), CutMix()],
          'timm': lambda: [TimmMix(.8, 1., mode='elem')]}


# -- operations: what a plain tensor of labels would give, unless a float comes in

Y = torch.tensor([0, 3, 1, 2, 3, 3])
ROWS = torch.tensor([5, 4, 3, 2, 1, 0])
READS = {
    'comparison': lambda y: y == 3, 'shape': lambda y: (y.shape, y.ndim, y.dtype, len(y), y.size(0)), 'list': lambda y: y.tolist(),
    'loop': lambda y: [int(v) for v in y],
    'one-hot': lambda y: F.one_hot(y, K), 'count': lambda y: torch.bincount(y), 'share': lambda y: (y == 3).sum()/len(y), 'unique': lambda y: y.unique(),
    'weights': lambda y: torch.tensor([1., 2., 3., 4.])[y], 'numpy': lambda y: np.asarray(y), 'float': lambda y: y.float(), 'max': lambda y: y.max(),
    'gathered': lambda y: torch.arange(24.).view(6, K).gather(1, y[:, None]), 'cross entropy': lambda y: F.cross_entropy(torch.arange(24.).view(6, K), y),
    'fastai': lambda y: CrossEntropyLossFlat()(torch.arange(24.).view(6, K), y), 'contains': lambda y: 3 in y, 'sorted': lambda y: y.sort().values,
    'equal': lambda y: torch.equal(y, Y), 'not': lambda y: bool((y != -100).all()), 'class weights': lambda y: len(y)/torch.bincount(y, minlength=K)}
EDITS = {
    'rows': lambda y: y[ROWS], 'filter': lambda y: y[y != 1], 'slice': lambda y: y[:3], 'list of rows': lambda y: y[[1, 0]],
    'cat': lambda y: torch.cat([y, y[:2]]),
    'cat with plain': lambda y: torch.cat([y, torch.tensor([1, 2])]), 'flip': lambda y: y.flip(0), 'roll': lambda y: torch.roll(y, 1),
    'where': lambda y: torch.where(y == 3, 2, y),
    'masked_fill': lambda y: y.masked_fill(y == 3, 2), 'clamp': lambda y: y.clamp(max=2), 'modulo': lambda y: y % 3, 'half': lambda y: y//2,
    'table': lambda y: torch.tensor([3, 2, 1, 0])[y],
    'reversed': lambda y: K-1-y, 'plus': lambda y: (y+1) % K, 'times': lambda y: y*(y < 3).long(), 'clone': lambda y: y.clone(),
    'index_select': lambda y: y.index_select(0, ROWS),
    'repeat': lambda y: y.repeat_interleave(2), 'column': lambda y: y[:, None].squeeze(1), 'cast': lambda y: y.as_subclass(torch.Tensor)}
IN_PLACE = {
    'set': lambda y: operator.setitem(y, y == 3, 2), 'permute': lambda y: operator.setitem(y, slice(None), y[ROWS]),
    'masked_fill_': lambda y: y.masked_fill_(y == 3, 2),
    'clamp_': lambda y: y.clamp_(max=2), 'augmented': lambda y: operator.imod(y, 3), 'copy_': lambda y: y.copy_(y.flip(0))}


def batch(y, **kwargs): return BatchTarget.of(y, Form(K, **kwargs))


@pytest.mark.parametrize('what', READS)
def test_reading_is_reading_labels(what):
    expected, got = READS[what](Y), READS[what](batch(Y.clone()))
    if isinstance(expected, torch.Tensor): assert type(got) is type(expected) and torch.equal(got, expected)
    else: np.testing.assert_equal(got, expected)


@pytest.mark.parametrize('what', EDITS)
def test_edits_give_labels_that_can_be_blended(what):
    expected, got = EDITS[what](Y), EDITS[what](batch(Y.clone()))
    assert isinstance(got, BatchTarget) and got.is_labels and torch.equal(got.plain, expected)
    torch.testing.assert_close(torch.lerp(got.flip(0), got, .3).dense(), .3*to_dense(expected, K) + .7*to_dense(expected.flip(0), K))
    hard, touched = after_loss(got, Y)
    assert torch.equal(hard, expected) and touched == (what not in ('cast', 'clone'))


@pytest.mark.parametrize('what', IN_PLACE)
def test_edits_in_place_reach_the_data_loaders_tensor(what):
    expected, given = Y.clone(), Y.clone()
    IN_PLACE[what](expected)
    y = batch(given)
    IN_PLACE[what](y)
    assert torch.equal(y.plain, expected) and torch.equal(given, expected) and torch.equal(after_loss(y, given)[0], expected)


W = torch.tensor([.9, .8, .7, .6, .5, 1.])
BLENDS = {
    'lerp': lambda y, w: torch.lerp(y[ROWS], y, w), 'method': lambda y, w: y[ROWS].lerp(y, w), 'the other way': lambda y, w: torch.lerp(y, y[ROWS], 1-w),
    'arithmetic': lambda y, w: w*y + (1-w)*y[ROWS], 'lerp of lerps': lambda y, w: torch.lerp(y[ROWS], torch.lerp(y, y, .5), w[:, None])}


@pytest.mark.parametrize('how', BLENDS)
def test_blends(how):
    "The weight has the shape that suits labels; each row keeps its own label, whatever is blended in"
    y, q = batch(Y), to_dense(Y, K)
    got = BLENDS[how](y, W)
    dense = got.plain if isinstance(got, BatchTarget) else got.dense()
    torch.testing.assert_close(dense, W[:, None]*q + (1-W[:, None])*q[ROWS])
    assert torch.equal(got.hard, Y) and after_loss(got, Y) == (Y, False)
    for move in (lambda t: t[ROWS], lambda t: t.flip(0), lambda t: torch.flip(t, [0]), lambda t: t.index_select(0, ROWS)):
        moved = move(got)
        torch.testing.assert_close(moved.plain if isinstance(moved, BatchTarget) else moved.dense(), dense.flip(0))
        assert torch.equal(moved.hard, Y.flip(0)) and moved.touched
    halved = got[:3]
    assert torch.equal(halved.hard, Y[:3])
    both = torch.cat([got, got])
    assert torch.equal(both.hard, torch.cat([Y, Y]))


def test_blends_of_masks_columns_and_several_labels():
    masks = torch.randint(0, K, (6, 5, 3))
    w = W[:, None, None]
    y = batch(masks)
    got = torch.lerp(y[ROWS], y, w)
    assert isinstance(got, BlendedTarget) and got.is_sparse_mixture
    torch.testing.assert_close(got.dense(), w[:, None]*to_dense(masks, K) + (1-w[:, None])*to_dense(masks[ROWS], K))
    column = batch(Y[:, None])
    torch.testing.assert_close(torch.lerp(column[ROWS], column, W[:, None]).dense(), torch.lerp(to_dense(Y[ROWS], K), to_dense(Y, K), W[:, None]))
    hot = torch.randint(0, 2, (6, K))
    got = torch.lerp(batch(hot, kind='labels')[ROWS], batch(hot, kind='labels'), W[:, None])
    torch.testing.assert_close(got.plain, torch.lerp(hot[ROWS].float(), hot.float(), W[:, None]))
    assert torch.equal(got.hard, hot)
    got = torch.lerp(batch(Y, kind='labels')[ROWS], batch(Y, kind='labels'), W)
    torch.testing.assert_close(got.plain, torch.lerp(to_dense(Y, K)[ROWS], to_dense(Y, K), W[:, None]))


def test_dense_targets_know_their_rows_too():
    q = to_dense(Y, K)
    y = batch(q)
    mixed = torch.lerp(y[ROWS], y, W[:, None])
    assert torch.equal(mixed.hard, q) and not mixed.touched
    assert torch.equal(mixed[ROWS].hard, q[ROWS]) and torch.equal((.5*y + .5*y[ROWS]).hard, q)


def test_copies_are_plain():
    y = batch(Y)
    for c in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), copy.copy(y)): assert torch.equal(torch.as_tensor(c).as_subclass(torch.Tensor), Y)
    assert type(copy.deepcopy(y)) is type(pickle.loads(pickle.dumps(y))) is torch.Tensor
    assert 'BatchTarget' in repr(y)
    assert type(after_loss(y[ROWS], TensorCategory(Y))[0]) is TensorCategory


# -- in a Learner: labels and inputs changed together by another callback

class Change(Callback):
    "Changes inputs and targets in `before_batch`"
    run_valid = False
    def __init__(self, f, order=-20): self.f, self.order = f, order
    def before_batch(self): self.learn.xb, self.learn.yb = self.f(self.x, self.y)


def image_of(y): return F.one_hot(y, K).float()[:, :, None, None].expand(-1, -1, learners.SIDE, learners.SIDE).contiguous()


def corrected(x, y):
    y = torch.where(y == 3, 2, y)
    return (image_of(torch.as_tensor(y.tolist())),), (y,)


def corrected_in_place(x, y):
    y[y == 3] = 2
    return (image_of(torch.as_tensor(y.tolist())),), (y,)


CHANGES = {'reordered': lambda x, y: ((x.flip(0),), (y.flip(0),)), 'shuffled': lambda x, y: ((x[[3, 1, 2, 0, 7, 6, 5, 4]],), (y[[3, 1, 2, 0, 7, 6, 5, 4]],)),
           'filtered': lambda x, y: ((x[y != 1],), (y[y != 1],)), 'halved': lambda x, y: ((x[:4],), (y[:4],)),
           'doubled': lambda x, y: ((torch.cat([x, x.flip(0)]),), (torch.cat([y, y.flip(0)]),)), 'corrected': corrected,
           'corrected in place': corrected_in_place,
           'looked up': lambda x, y: ((x.flip(1),), (torch.arange(K-1, -1, -1)[y],)),
           'modulo': lambda x, y: ((image_of(torch.as_tensor((y % 2).tolist())),), (y % 2,)),
           'new labels': lambda x, y: ((x,), (torch.as_tensor(y.tolist()),))}


@pytest.mark.parametrize('mixers', ['none', 'both', 'timm'])
@pytest.mark.parametrize('change', CHANGES)
def test_changes_are_trained_on_and_seen_afterwards(change, mixers):
    "The image is the label: the loss of every batch can be worked out from images and predictions"
    if change == 'new labels' and mixers != 'none': return
    look = Rows()
    cb = Change(CHANGES[change])
    learn = make_learner('index', cbs=[LabelSmoothing(.2), cb, WhatTheLossSaw(), look, *MIXERS[mixers]()], metrics=accuracy, n=32)
    learn.recorder.train_metrics = True
    fit(learn, 1)
    check_seen(learn, 'index', .2, n_batches=4)
    for before, after in look.seen:
        assert type(after) is torch.Tensor and not after.is_floating_point()
        assert torch.equal(before, after), "the labels of the rows that were trained on"
    assert len(learn.recorder.values[0]) == 4


class Rows(Callback):
    "The labels that the images show when all callbacks but the mixers are done, and those that everybody sees afterwards"
    order, run_valid = -10, False
    def before_fit(self): self.seen = []
    def before_batch(self): self.labels = self.x.mean((2, 3)).argmax(1)
    def after_batch(self): self.seen.append((self.labels, self.learn.yb[0]))


@pytest.mark.parametrize('change', ['reordered', 'halved', 'doubled', 'corrected'])
def test_training_accuracy_and_online_of_a_perfect_model(change):
    "A model that is always right reads 1, and a matrix learned from the right rows is that of its own predictions"
    class Perfect(nn.Module):
        def __init__(self): super().__init__(); self.scale = nn.Parameter(torch.tensor(5.))
        def forward(self, x): return self.scale*x.mean((2, 3))
    online = Online(K)
    learn = make_learner('index', cbs=[LabelSmoothing(.2, online), Change(CHANGES[change])], metrics=accuracy, n=32)
    learn.model = Perfect()
    learn.recorder.train_metrics = True
    fit(learn, 1, 0.)
    assert learn.recorder.values[0][1] == 1.
    seen = 3 if change == 'corrected' else K
    rows = (5.*torch.eye(K)).softmax(1)[:seen]
    torch.testing.assert_close(online.matrix(K)[:seen], rows, atol=1e-5, rtol=0)


def test_an_untouched_batch_is_the_very_tuple():
    class Watch(Callback):
        order, run_valid = -200, False
        def __init__(self): self.same = []
        def before_batch(self): self.given = self.learn.yb
        def after_batch(self): self.same.append(self.learn.yb is self.given)
    for cbs in ([], [MixUp(), CutMix()], [CastToTensor()], [TimmMix()]):
        assert fit(make_learner('index', cbs=[LabelSmoothing(.1), Watch(), *cbs]), 1).watch.same == [True]*3


def test_a_cancelled_batch_shows_hard_labels_too():
    class Cancel(Callback):
        order = 50
        def after_pred(self): raise CancelBatchException
    look = Rows()
    fit(make_learner('index', cbs=[LabelSmoothing(.1), MixUp(), Change(CHANGES['halved']), look, Cancel()]), 1)
    assert all(torch.equal(a, b) and len(b) == 4 for a, b in look.seen)


@pytest.mark.parametrize('mixers', ['none', 'mixup'])
def test_mixers_after_the_cast(mixers):
    "fastai's CastToTensor re-wraps tensors; a mixer may come later"
    cbs = MIXERS[mixers]()
    for cb in cbs: cb.order = 30
    check_seen(fit(make_learner('index', cbs=[LabelSmoothing(.1), CastToTensor(), WhatTheLossSaw(), *cbs]), 1), 'index', .1)


class Mix1D(MixHandler):
    "CutMix of sequences as time series packages write it: a float weight, and the dimensions of `y`"
    def before_batch(self):
        n = self.x.shape[-1]
        order, cut = torch.arange(len(self.x)).flip(0), n//4
        x = self.x.clone()
        x[..., :cut] = self.x[order][..., :cut]
        self.lam = 1 - cut/n
        y, y1 = self.y, self.y[order]
        lam = self.lam
        for _ in range(y.ndim-1): lam = lam.unsqueeze(-1)
        self.learn.xb, self.learn.yb = (x,), (torch.lerp(y1, y, lam),)


def test_a_mixer_of_sequences_with_a_float_weight():
    check_seen(fit(make_learner('index', cbs=[LabelSmoothing(.1), Mix1D(), WhatTheLossSaw()]), 1), 'index', .1)


class LossFilter(Callback):
    "Takes the loss at the start of a fit and asks it for each example's later"
    def before_fit(self): self.loss, self.seen = self.learn.loss_func, []

    def after_pred(self):
        if not self.learn.training: return
        self.loss.reduction = 'none'
        self.seen.append((self.learn.pred.detach(), self.learn.y.tolist(), self.loss(self.learn.pred, self.learn.y).detach()))
        self.loss.reduction = 'mean'


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss, CrossEntropyLossFlat, lambda: LabelSmoothingCrossEntropy(0.)])
def test_a_loss_taken_at_the_start_of_a_fit(loss):
    learn = fit(make_learner('index', loss(), [LabelSmoothing(.1), LossFilter(), WhatTheLossSaw()]), 1)
    check_seen(learn, 'index', .1)
    for pred, y, each in learn.loss_filter.seen:
        torch.testing.assert_close(torch.as_tensor(each).as_subclass(torch.Tensor), F.cross_entropy(pred, torch.tensor(y), reduction='none'))


# -- real data: a category and a number, or points, per image

@pytest.mark.parametrize('mixers', ['none', 'timm'])
@pytest.mark.parametrize('other', ['number', 'points'])
def test_a_category_and_something_else_per_image(other, mixers):
    "As a DataBlock loads them: TensorCategory beside a float or TensorPoint; the other head has its own loss"
    set_seed(0)
    block = RegressionBlock() if other == 'number' else PointBlock
    get_other = (lambda i: float(i)/20) if other == 'number' else (lambda i: TensorPoint(torch.tensor([[float(i % 8), 3.]])))
    dls = DataBlock((ImageBlock, CategoryBlock, block), n_inp=1, get_items=lambda _: list(range(20)), splitter=lambda items: (items[:16], items[16:]),
                    get_x=lambda i: PILImage.create(np.full((8, 8, 3), 12*i, np.uint8)), get_y=[lambda i: 'abc'[i % 3], get_other]
                    ).dataloaders(None, bs=8, num_workers=0, device='cpu')

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3*64, 3), nn.Linear(3*64, 1 if other == 'number' else 2)

        def forward(self, x): return self.a(x.flatten(1)), self.b(x.flatten(1))
    seen = []

    class Look(Callback):
        order, run_valid = 90, False
        def after_loss(self):
            targets = [torch.as_tensor(y).as_subclass(torch.Tensor) for y in self.learn.yb]
            seen.append(([p.detach().clone() for p in self.learn.pred], targets, float(self.learn.loss.detach())))
    loss = MultiTargetLoss(CrossEntropyLossFlat(), MSELossFlat())
    learn = Learner(dls, Two(), loss_func=loss, cbs=[LabelSmoothing(.2, n_classes=3), Look(), *MIXERS[mixers]()], lr=1e-3)
    fit(learn, 1)
    assert len(seen) == 2 and learn.loss_func is loss
    for (a, b), (y, z), value in seen if mixers == 'none' else ():
        np.testing.assert_allclose(value, F.cross_entropy(a, y, label_smoothing=.2).item() + F.mse_loss(b.flatten(), z.flatten()).item(), rtol=1e-4)


# -- another loss in the middle of a fit

class Replace(Callback):
    "Gives the learner another loss"
    def __init__(self, event, loss, order=0): self.event, self.loss, self.order, self.done = event, loss, order, False

    def __call__(self, name):
        if name == self.event and not self.done: self.learn.loss_func, self.done = self.loss, True


@pytest.mark.parametrize('mixers', [list, lambda: [MixUp()], lambda: [OneOf(MixUp(), CutMix())], lambda: [TimmMix()]], ids=['none', 'mixup', 'oneof', 'timm'])
@pytest.mark.parametrize('event', ['before_train', 'before_batch', 'after_pred', 'after_loss', 'after_batch'])
@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss, CrossEntropyLossFlat])
def test_a_loss_set_in_a_fit_is_smoothed_and_kept(loss, event, mixers):
    w = torch.tensor([1., 2., 5., .5])
    new = loss(weight=w)
    replace = Replace(event, new, -50 if event == 'before_train' else 0)
    learn = fit(make_learner('index', CrossEntropyLossFlat(), [LabelSmoothing(.2), replace, WhatTheLossSaw(), *mixers()]), 2)
    assert learn.loss_func is new
    seen = learn.look.seen[event in ('after_loss', 'after_batch'):]
    for x, pred, loss, _ in seen: np.testing.assert_allclose(loss, expected_loss(x, pred, 'index', .2, weight=w.tolist()), rtol=2e-5)


@pytest.mark.parametrize('order', [-150, 95])
def test_a_loss_set_between_prediction_and_loss_by_whoever_comes_first_or_last(order):
    new = nn.CrossEntropyLoss()
    learn = fit(make_learner('index', CrossEntropyLossFlat(), [LabelSmoothing(.2), MixUp(), WhatTheLossSaw(), Replace('after_pred', new, order)]), 1)
    assert learn.loss_func is new
    check_seen(learn, 'index', .2)


def test_a_loss_set_after_the_last_batch_is_kept_and_an_unknown_one_is_an_error():
    new, old = nn.CrossEntropyLoss(), CrossEntropyLossFlat()
    learn = fit(make_learner('index', old, [LabelSmoothing(.2), Replace('after_train', new)]), 1)
    assert learn.loss_func is new
    learn = make_learner('index', old, [LabelSmoothing(.2), Replace('before_train', nn.MSELoss())])
    with pytest.raises(TypeError, match='MSELoss'): fit(learn, 1)


# -- mixers alone leave nothing behind

@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('mixer', [lambda: TimmMix(.8, 1.), lambda: OneOf(TimmMix(), CutMix())])
def test_timm_mix_alone_leaves_nothing_behind(mixer, error):
    class Fail(Callback):
        run_valid = False
        def after_pred(self): raise error('raised by a test')
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [mixer(), Fail()])
    with pytest.raises(error): fit(learn, 1)
    assert learn.loss_func is loss


# -- nan in a dense target

def test_nan_in_a_dense_target_is_an_error_that_names_the_row():
    learn = make_learner('one_hot', nn.CrossEntropyLoss(), [LabelSmoothing(.1), MixUp()])
    for dl in learn.dls: dl.dataset[:] = [(x, y/0. if i == 5 else y) for i, (x, y) in enumerate(dl.dataset)]
    with pytest.raises(ValueError, match='Row . of a dense target of shape .8, 4. holds nan'): fit(learn, 1)
    learn = make_learner('multi_hot', BCEWithLogitsLossFlat(), [LabelSmoothing(.1)])
    learn._do_epoch_validate = lambda: None
    for dl in learn.dls: dl.dataset[:] = [(x, y.where(y > 0, torch.nan)) for x, y in dl.dataset]
    fit(learn, 1)  # unknown labels


# -- flattened predictions

@pytest.mark.parametrize('mixers', ['none', 'mixup'])
def test_flattened_logits_with_unflattened_labels(mixers):
    "fastai's losses flatten both: (N*T, K) beside (N, T)"
    class Flat(nn.Module):
        def __init__(self): super().__init__(); self.linear = nn.Linear(K, K)
        def forward(self, x): return self.linear(x).flatten(0, 1)
    set_seed(0)
    y = torch.randint(0, K, (8, 5))
    x = F.one_hot(y, K).float()
    dls = DataLoaders(*(DataLoader(learners.Items(zip(x, y)), bs=4, num_workers=0, device='cpu') for _ in range(2)))
    dls.c = K
    online = Online(K)
    learn = Learner(dls, Flat(), loss_func=CrossEntropyLossFlat(), cbs=[LabelSmoothing(.2), WhatTheLossSaw(), *MIXERS[mixers]()])
    fit(learn, 1)
    for x, pred, loss, _ in learn.look.seen: np.testing.assert_allclose(loss, F.cross_entropy(pred, (.8*x+.2/K).flatten(0, 1)).item(), rtol=1e-5)
    learn.remove_cb(LabelSmoothing)
    learn.add_cb(LabelSmoothing(.2, online))
    fit(learn, 1)
    assert not torch.equal(online.matrix(K), torch.full((K, K), 1/K)) or mixers != 'none'
