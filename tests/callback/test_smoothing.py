"The callback composes: the loss is recomputed from inputs and predictions alone, for every order of callbacks"
import copy
import itertools

import fastai.losses as fl
import learners
import numpy as np
import pytest
import timm.loss
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.mixup import CutMix, MixHandler, MixUp
from fastai.callback.schedule import SchedCos, SchedLin
from fastai.learner import Learner, load_learner
from fastai.losses import BaseLoss, BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.metrics import accuracy
from hypothesis import given, settings
from hypothesis import strategies as st
from learners import K, Look, check_seen, expected_binary_loss, fit, make_learner
from torch import nn
from torch.nn import functional as F

from fastai_smooth.callback import LabelSmoothing, OneOf, soft_loss
from fastai_smooth.callback.smoothing import AfterEverybody
from fastai_smooth.distributions import ClassPrior, Similarity, Teacher, Uniform, Zipf
from fastai_smooth.losses import LabelSmoothingBCE, LabelSmoothingCrossEntropy
from fastai_smooth.targets import MixedTarget

MIXERS = {'none': [], 'mixup': [MixUp], 'cutmix': [CutMix], 'both': [MixUp, CutMix], 'oneof': [lambda: OneOf(MixUp(), CutMix(), p=[.4, .4])]}
SOFTMAX_LOSSES = {
    'ours': lambda: LabelSmoothingCrossEntropy(0., axis=1), 'torch': nn.CrossEntropyLoss, 'fastai flat': CrossEntropyLossFlat,
    'fastai smoothing': lambda: fl.LabelSmoothingCrossEntropy(0.), 'fastai smoothing flat': lambda: fl.LabelSmoothingCrossEntropyFlat(0.),
    'base': lambda: BaseLoss(nn.CrossEntropyLoss), 'timm': lambda: timm.loss.LabelSmoothingCrossEntropy(0.)}


# -- 1. in training the loss sees S(mixed targets), for every order

@pytest.mark.parametrize('kind', ['index', 'one_hot'])
@pytest.mark.parametrize('mixers', MIXERS)
def test_every_order_of_callbacks(mixers, kind):
    made = [lambda: LabelSmoothing(.1), Look, *MIXERS[mixers]]
    for order in itertools.permutations(made):
        loss = nn.CrossEntropyLoss()  # it can validate on one-hot targets too
        learn = fit(make_learner(kind, loss, [cb() for cb in order]), 2)
        check_seen(learn, kind, .1, n_batches=6)
        assert learn.loss_func is loss


def test_mixing_happened():
    "The matrix above would be empty if the mixers had done nothing"
    for mixers in ('mixup', 'cutmix', 'both', 'oneof'):
        learn = fit(make_learner('index', cbs=[LabelSmoothing(.1), Look(), *[m() for m in MIXERS[mixers]]]), 2)
        truth = torch.cat([learners.truth_of(x, 'index') for x, *_ in learn.look.seen])
        assert ((truth > .01) & (truth < .99)).any()


@pytest.mark.parametrize('loss, mixers', zip(SOFTMAX_LOSSES, ['none', 'both']*4))
def test_every_softmax_loss(loss, mixers):
    learn = make_learner('index', SOFTMAX_LOSSES[loss](), [*[m() for m in MIXERS[mixers]], Look(), LabelSmoothing(.3)])
    check_seen(fit(learn, 1), 'index', .3)


@pytest.mark.parametrize('reduction, mixers', [('mean', 'none'), ('mean', 'both'), ('sum', 'none'), ('sum', 'oneof')])
def test_weights_and_reduction_carry_over(mixers, reduction):
    w = torch.tensor([1., 2., 5., .5])
    learn = make_learner('index', nn.CrossEntropyLoss(w, reduction=reduction), [LabelSmoothing(.2), Look(), *[m() for m in MIXERS[mixers]]], c=None)
    check_seen(fit(learn, 1), 'index', .2, weight=w.tolist(), reduction=reduction)


@pytest.mark.parametrize('mixers', ['none', 'mixup'])
@pytest.mark.parametrize('loss', [lambda: CrossEntropyLossFlat(axis=1), nn.CrossEntropyLoss, lambda: LabelSmoothingCrossEntropy(0., axis=1)])
def test_masks_with_ignored_pixels(loss, mixers):
    "fastai's MixUp raises on masks; an ignored pixel of the mask is a pixel without mass in the truth"
    learn = make_learner('mask', loss(), [*[m() for m in MIXERS[mixers]], LabelSmoothing(.2), Look()])
    check_seen(fit(learn, 2), 'mask', .2)
    with pytest.raises(RuntimeError): fit(make_learner('mask', CrossEntropyLossFlat(axis=1), [MixUp()]), 1)


@pytest.mark.parametrize('dist', [Uniform(), ClassPrior([1, 2, 3, 4]), Similarity(torch.rand(K, K, generator=torch.Generator().manual_seed(3)).softmax(1))])
@pytest.mark.parametrize('mixers', ['none', 'both'])
def test_distributions(mixers, dist):
    learn = make_learner('index', cbs=[LabelSmoothing(.2, dist), Look(), *[m() for m in MIXERS[mixers]]])
    check_seen(fit(learn, 1), 'index', .2, matrix=dist.matrix(K).tolist())


@pytest.mark.parametrize('convention', ['uniform', 'others', 'classy'])
def test_conventions(convention):
    learn = make_learner('index', cbs=[LabelSmoothing(.2, convention=convention), Look(), MixUp()])
    check_seen(fit(learn, 1), 'index', .2, convention=convention)


BINARY_LOSSES = {'fastai': BCEWithLogitsLossFlat, 'torch': nn.BCEWithLogitsLoss, 'ours': lambda: LabelSmoothingBCE(0.),
                 'timm': lambda: timm.loss.BinaryCrossEntropy(0.)}


@pytest.mark.parametrize('kind, convention', [('multi_hot', 'half'), ('multi_hot_int', 'half'), ('index', 'uniform')])
@pytest.mark.parametrize('loss, mixers', [('fastai', 'none'), ('fastai', 'both'), ('torch', 'mixup'), ('ours', 'none'), ('ours', 'oneof'), ('timm', 'both')])
def test_binary_losses(loss, mixers, kind, convention):
    "The form of the original target decides the convention, whatever the mixers make of it"
    validates = loss in ('ours', 'timm') or kind != 'index'
    learn = make_learner(kind, BINARY_LOSSES[loss](), [LabelSmoothing(.2), Look(), *[m() for m in MIXERS[mixers]]])
    if not validates or kind == 'multi_hot_int' and loss in ('torch', 'timm'): learn._do_epoch_validate = lambda: None  # a loss that takes no indices
    fit(learn, 1)
    for x, pred, seen, yb in learn.look.seen:
        np.testing.assert_allclose(seen, expected_binary_loss(x, pred, .2, convention), rtol=1e-4)
        assert yb[0].dtype is (torch.float32 if kind == 'multi_hot' else torch.int64)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=40)
def test_random_subsets_and_orders(data):
    kind = data.draw(st.sampled_from(['index', 'one_hot']))
    eps = data.draw(st.floats(0, 1))
    # one CutMix at most: of a patched image, a patch of some area no longer shows that share of the label
    mixers = data.draw(st.sampled_from([[], [MixUp], [CutMix], [MixUp, CutMix], [lambda: OneOf(MixUp, CutMix)], [MixUp, lambda: OneOf(MixUp, CutMix)]]))
    cbs = data.draw(st.permutations([lambda: LabelSmoothing(eps), Look, *mixers]))
    cbs = [cb() for cb in cbs]
    for cb in cbs:  # names must differ for a callback to be found on the learner
        if not isinstance(cb, (LabelSmoothing, Look)): cb.order = data.draw(st.integers(-99, 40))
    learn = fit(make_learner(kind, nn.CrossEntropyLoss(), cbs), 1)
    check_seen(learn, kind, eps)


class Halve(Callback):
    "A mixer of another package: does arithmetic on the target, in place or not"
    run_valid = False
    def __init__(self, inplace=False): self.inplace = inplace

    def before_batch(self):
        perm = torch.arange(len(self.x)).flip(0)
        self.learn.xb = (.5*self.x + .5*self.x[perm],)
        y = self.y
        if self.inplace:
            other = y[perm]*1
            y *= .5
            y += .5*other
            self.learn.yb = (y,)
        else: self.learn.yb = (.5*y + .5*y[perm],)


@pytest.mark.parametrize('inplace', [False, True])
def test_mixer_that_does_its_own_arithmetic(inplace):
    learn = fit(make_learner('index', cbs=[LabelSmoothing(.1), Halve(inplace), MixUp(), Look()]), 1)
    check_seen(learn, 'index', .1)


class Stacking(MixHandler):
    "A MixHandler that blends losses whatever the loss says"
    def __init__(self): super().__init__(.4)

    def before_train(self):
        self.stack_y, self.old_lf = True, self.learn.loss_func
        self.learn.loss_func = self.lf

    def before_batch(self):
        perm, self.lam = torch.arange(len(self.x)).flip(0), torch.full((len(self.x),), .7)
        self.yb1 = tuple(y[perm] for y in self.yb)
        self.learn.xb = (torch.lerp(self.x[perm], self.x, .7),)


def test_mixer_that_insists_on_blending_losses():
    loss = CrossEntropyLossFlat()
    learn = fit(make_learner('index', loss, [LabelSmoothing(.1), Stacking(), Look()]), 1)
    check_seen(learn, 'index', .1)
    assert learn.loss_func is loss


# -- eps

def test_schedule():
    learn = make_learner('index', cbs=[LabelSmoothing(SchedLin(.4, 0.)), Look(), MixUp()])
    fit(learn, 2)
    for i, (x, pred, loss, _) in enumerate(learn.look.seen):
        np.testing.assert_allclose(loss, learners.expected_loss(x, pred, 'index', .4*(1-i/6)), rtol=2e-5)


def test_one_eps_per_class():
    eps = [0., .1, .5, 1.]
    check_seen(fit(make_learner('index', cbs=[LabelSmoothing(eps), Look(), MixUp()]), 1), 'index', eps)
    check_seen(fit(make_learner('index', cbs=[LabelSmoothing(eps, ClassPrior([4, 3, 2, 1])), Look()]), 1), 'index', eps,
               matrix=ClassPrior([4, 3, 2, 1]).matrix(K).tolist())


def test_schedule_out_of_range_is_an_error():
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [LabelSmoothing(SchedLin(.5, 2.))])
    with pytest.raises(ValueError, match=r'\[0, 1\]'): fit(learn, 3)
    assert learn.loss_func is loss


def test_zero_eps_is_the_loss_itself():
    a, b = (fit(make_learner('index', cbs=[*cbs, Look()]), 2) for cbs in ([], [LabelSmoothing(0.)]))
    for (x, p, la, _), (x2, p2, lb, _) in zip(a.look.seen, b.look.seen):
        assert torch.equal(x, x2)
        torch.testing.assert_close(p, p2), np.testing.assert_allclose(la, lb, rtol=1e-5, atol=1e-7)


# -- 2. from after_loss on everybody sees the data loader's targets

class Watch(Callback):
    "Records at each event of a training batch whether `yb` is the data loader's tuple"
    run_valid = False
    def __init__(self, order, cancel=None): self.order, self.cancel, self.same = order, cancel, {}

    def _note(self, event): self.same.setdefault(event, []).append(self.learn.yb is self.learn.given)
    def after_pred(self):
        if self.cancel: raise CancelBatchException
    def after_loss(self): self._note('after_loss')
    def before_backward(self): self._note('before_backward')
    def after_step(self): self._note('after_step')
    def after_cancel_batch(self): self._note('after_cancel_batch')
    def after_batch(self): self._note('after_batch')


def keep_given(learn):
    split = learn._split

    def f(b):
        split(b)
        learn.given = learn.yb
    learn._split = f
    return learn


@pytest.mark.parametrize('kind, order', [('index', -99), ('index', 100), ('one_hot', 0), ('mask', -11), ('multi_hot_int', 0)])
@pytest.mark.parametrize('cancel', [False, True])
def test_targets_are_the_data_loaders_again(order, cancel, kind):
    loss = BCEWithLogitsLossFlat() if kind == 'multi_hot_int' else nn.CrossEntropyLoss()
    watch = Watch(order, cancel)
    fit(keep_given(make_learner(kind, loss, [watch, LabelSmoothing(.1)])), 1)
    events = ['after_cancel_batch', 'after_batch'] if cancel else ['after_loss', 'before_backward', 'after_step', 'after_batch']
    assert list(watch.same) == events and all(len(v) == 3 and all(v) for v in watch.same.values())


def test_training_metrics_see_hard_labels():
    learn = make_learner('index', cbs=[LabelSmoothing(.1), MixUp()], metrics=accuracy)
    learn.recorder.train_metrics = True
    fit(learn, 1)
    assert len(learn.recorder.values[0]) == 4


# -- 3. validation and prediction are untouched

def test_validation_and_predictions_use_the_users_loss():
    learn = fit(make_learner('index', cbs=[LabelSmoothing(.5), MixUp()], metrics=accuracy), 1)
    in_fit = learn.recorder.values[-1][1:]
    plain = make_learner('index', metrics=accuracy)
    plain.model.load_state_dict(learn.model.state_dict())
    with learn.no_bar(), plain.no_bar():
        assert list(learn.validate()) == list(plain.validate()) == list(in_fit)
        for a, b in zip(learn.get_preds(with_loss=True), plain.get_preds(with_loss=True)): assert torch.equal(a, b)


class PredictsInTraining(Callback):
    "Asks for predictions and losses in the middle of a training pass"
    run_valid = False

    def after_batch(self):
        if self.iter != 1 or getattr(self, 'res', None) is not None: return
        keep = {k: getattr(self.learn, k) for k in ('dl', 'xb', 'yb', 'pred', 'loss', 'iter', 'n_iter')}
        self.res = self.learn.get_preds(ds_idx=1, with_loss=True, inner=True)
        self.expected = nn.functional.cross_entropy(self.res[0].log(), self.res[1], reduction='none')
        for k, v in keep.items(): setattr(self.learn, k, v)
        self.learn.training = True
        self.learn.model.train()


def test_predictions_inside_training_are_not_smoothed():
    cb = PredictsInTraining()
    learn = make_learner('index', cbs=[LabelSmoothing(.5), cb, Look()])
    fit(learn, 1)
    torch.testing.assert_close(cb.res[2], cb.expected)
    assert learn.loss_func.reduction == 'mean'


# -- 5. export, load, save

class ExportAt(Callback):
    def __init__(self, event): self.event, self.done = event, False

    def __call__(self, name):
        if name == self.event and not self.done:
            self.done, self.state = True, copy.deepcopy(self.learn.model.state_dict())
            self.learn.export()


def same_predictions(path, learn):
    loaded = load_learner(path/'export.pkl')
    with loaded.no_bar(), learn.no_bar():
        for a, b in zip(loaded.get_preds(dl=learn.dls.valid), learn.get_preds(dl=learn.dls.valid)): assert torch.equal(a, b)
    assert type(loaded.loss_func) is type(learn.loss_func) and '_do_epoch_train' not in learn.__dict__
    loaded.dls = learn.dls
    fit(loaded, 1)
    return loaded


def exportable(*cbs, path): return make_learner('index', CrossEntropyLossFlat(), list(cbs), path=path)


def test_export_before_between_and_after_fits(tmp_path):
    learn = exportable(LabelSmoothing(.1), MixUp(), path=tmp_path)
    for _ in range(3):
        learn.export()
        loaded = same_predictions(tmp_path, learn)
        assert repr(loaded.label_smoothing) == 'LabelSmoothing(0.1)'
        fit(learn, 1)


@pytest.mark.parametrize('event', ['before_fit', 'before_epoch', 'after_epoch', 'after_fit'])
@pytest.mark.parametrize('order', [-200, 200])
def test_export_in_the_middle_of_a_fit(event, order, tmp_path):
    at = ExportAt(event)
    at.order = order
    learn = exportable(LabelSmoothing(.1), at, path=tmp_path)
    fit(learn, 1)
    assert at.done
    learn.remove_cb(at)
    learn.model.load_state_dict(at.state)
    same_predictions(tmp_path, learn)


def test_export_in_the_middle_of_an_epoch(tmp_path):
    "fastai's export clears the batch, so the fit ends there; the file is that of the learner, and so is the learner"
    loss = CrossEntropyLossFlat()
    at = ExportAt('after_pred')
    learn = make_learner('index', loss, [LabelSmoothing(.1), MixUp(), at], path=tmp_path)
    with pytest.raises((TypeError, AttributeError)): fit(learn, 1)
    assert at.done and learn.loss_func is loss
    learn.remove_cb(at)
    learn.model.load_state_dict(at.state)
    refitted = same_predictions(tmp_path, learn)
    assert not any(isinstance(cb, AfterEverybody) for cb in refitted.cbs)


def test_save_and_load(tmp_path):
    learn = fit(make_learner('index', cbs=[LabelSmoothing(.1)], path=tmp_path), 1)
    learn.save('one')
    other = make_learner('index', cbs=[LabelSmoothing(.1)], path=tmp_path).load('one')
    without = make_learner('index', path=tmp_path).load('one')
    for o in (other, without): assert all(torch.equal(a, b) for a, b in zip(o.model.state_dict().values(), learn.model.state_dict().values()))


# -- 6. mistakes

@pytest.mark.parametrize('loss', [LabelSmoothingCrossEntropy(.1), nn.CrossEntropyLoss(label_smoothing=.1), fl.LabelSmoothingCrossEntropyFlat(.1),
                                  fl.LabelSmoothingCrossEntropy(.1), timm.loss.LabelSmoothingCrossEntropy(.1), LabelSmoothingCrossEntropy([.1]*K)])
def test_smoothing_twice(loss):
    learn = make_learner('index', loss, [LabelSmoothing(.2)])
    with learn.no_bar():
        learn.validate(), learn.get_preds()
        with pytest.raises(ValueError, match='already smooths.*remove the callback'): fit(learn, 1)
    assert learn.loss_func is loss and not getattr(learn.recorder, 'values', None)
    learn.remove_cb(LabelSmoothing)
    fit(learn, 1)


@pytest.mark.parametrize('loss', [timm.loss.BinaryCrossEntropy(.1), LabelSmoothingBCE(.1), LabelSmoothingBCE(0., eps_neg=.1)])
def test_smoothing_twice_binary(loss):
    with pytest.raises(ValueError, match='already smooths'): fit(make_learner('multi_hot', loss, [LabelSmoothing(.2)]), 1)


def test_two_callbacks():
    with pytest.raises(ValueError, match='two callbacks that smooth'): fit(make_learner('index', cbs=[LabelSmoothing(.1), LabelSmoothing(.2)]), 1)


@pytest.mark.parametrize('make, error, words', [
    (lambda: LabelSmoothing(1.5), ValueError, '1.5'), (lambda: LabelSmoothing(-.1), ValueError, 'negative=True'),
    (lambda: LabelSmoothing('x'), TypeError, 'number'), (lambda: LabelSmoothing(.1, convention='most'), ValueError, 'convention'),
    (lambda: LabelSmoothing(.1, Uniform(), convention='others'), ValueError, 'convention'),
    (lambda: OneOf(), ValueError, 'at least one'), (lambda: OneOf(MixUp(), p=[.5, .5]), ValueError, '2 probabilities for 1'),
    (lambda: OneOf(MixUp(), CutMix(), p=[.9, .9]), ValueError, 'at most 1'), (lambda: OneOf(MixUp(), p=[-.1]), ValueError, 'at least 0'),
    (lambda: OneOf('mixup'), TypeError, 'callbacks')])
def test_construction_errors(make, error, words):
    with pytest.raises(error, match=words): make()


@pytest.mark.parametrize('learner, error, words', [
    (lambda: make_learner('index', lambda p, y: F.cross_entropy(p, y), [LabelSmoothing(.1)]), TypeError, '@soft_loss.register'),
    (lambda: make_learner('index', cbs=[LabelSmoothing(.1), MixUp()], c=None), ValueError, 'n_classes'),
    (lambda: make_learner('index', cbs=[LabelSmoothing(.1), OneOf(MixUp())], c=None), ValueError, 'n_classes'),
    (lambda: make_learner('index', cbs=[LabelSmoothing(.1, ClassPrior([1, 2, 3]))]), ValueError, 'made for 3 classes, but there are 4'),
    (lambda: make_learner('multi_hot', BCEWithLogitsLossFlat(), [LabelSmoothing(.1, Uniform())]), ValueError, 'dist=.*binary'),
    (lambda: make_learner('multi_hot', BCEWithLogitsLossFlat(), [LabelSmoothing(.1, convention='others')]), ValueError, 'convention'),
    (lambda: make_learner('index', cbs=[LabelSmoothing(.1, convention='half')]), ValueError, 'convention'),
    (lambda: make_learner('index', nn.CrossEntropyLoss(torch.ones(K)), [LabelSmoothing(.1, n_classes=7)]), ValueError, 'n_classes=7'),
    (lambda: make_learner('index', cbs=[LabelSmoothing(.1, target=1)]), ValueError, 'target=1'),
    (lambda: make_learner('index', cbs=[LabelSmoothing(.1, n_classes=9), MixUp()]), ValueError, r'\(8, 9\)'),
    (lambda: make_learner('index', cbs=[LabelSmoothing([.1, .2])]), ValueError, 'eps has 2 values, but there are 4 classes'),
])
def test_errors_at_the_start_of_training(learner, error, words):
    learn = learner()
    loss = learn.loss_func
    with pytest.raises(error, match=words): fit(learn, 1)
    assert learn.loss_func is loss and '_do_epoch_train' not in learn.__dict__ and not getattr(learn.recorder, 'values', None)


def test_unknown_classes_without_a_mixer_are_no_obstacle():
    check_seen(fit(make_learner('index', cbs=[LabelSmoothing(.1), Look()], c=None), 1), 'index', .1)


# -- registered losses

def test_registered_loss_without_eps_gets_smoothed_targets():
    class Squared(nn.Module):
        def forward(self, pred, y): return (pred-F.one_hot(y, K)).square().mean()

    @soft_loss.register(Squared)
    def _(loss): return lambda pred, q: (pred-q).square().mean()

    learn = fit(make_learner('index', Squared(), [LabelSmoothing(.2), MixUp(), Look()]), 1)
    for x, pred, loss, _ in learn.look.seen:
        q = learners.truth_of(x, 'index')*.8 + .2/K
        np.testing.assert_allclose(loss, (pred-q).square().mean(), rtol=1e-5)


def test_registered_loss_with_eps_gets_the_unsmoothed_target():
    seen = []

    class Mine(nn.Module):
        def forward(self, pred, y): return F.cross_entropy(pred, y)

    class Soft:
        eps = 0.

        def __call__(self, pred, q):
            seen.append((self.eps, q))
            return F.cross_entropy(pred, q)

    @soft_loss.register(Mine)
    def _(loss): return Soft()

    fit(make_learner('index', Mine(), [LabelSmoothing(.2), Look()]), 1)
    assert all(e == .2 and q.shape[1] == K and set(q.unique().tolist()) == {0., 1.} for e, q in seen)


# -- small things

@pytest.mark.parametrize('cb', [LabelSmoothing(), LabelSmoothing(.2, ClassPrior([1, 2]), n_classes=2, axis=1), LabelSmoothing([.1, .2]),
                                LabelSmoothing(.1, convention='others', target=1), OneOf(MixUp(), CutMix(), p=[.5, .25])], ids=repr)
def test_repr_round_trips(cb): assert repr(eval(repr(cb))) == repr(cb)


def test_masks_stay_small():
    "With mixers of index masks no dense target is built: what the loss gets is a mixture of two labels per pixel"
    kinds = []

    class Kind(Callback):
        run_valid = False
        def after_pred(self): kinds.append(self.learn.yb[0])
    fit(make_learner('mask', nn.CrossEntropyLoss(), [LabelSmoothing(.1), MixUp(), Kind()]), 1)
    assert all(isinstance(q, MixedTarget) and q.is_sparse_mixture for q in kinds)


def test_cosine_schedule_of_fastai(): assert abs(SchedCos(.2, 0.)(.5)-.1) < 1e-6


# -- forms that fastai's flattening losses take

class Unmixed(Callback):
    "Keep the loss and what it was computed from"
    run_valid = False
    def after_loss(self): self.got = (self.learn.pred.detach().clone(), self.learn.yb[0], float(self.learn.loss))


def flat_learner(model, x, y, loss, cbs, c):
    from fastai.data.core import DataLoaders, TfmdDL
    dls = DataLoaders(*(TfmdDL(learners.Items(zip(x, y)), bs=len(x), num_workers=0, device='cpu') for _ in range(2)))
    if c: dls.c = c
    return Learner(dls, model, loss_func=loss, cbs=cbs)


@pytest.mark.parametrize('loss, column, c', [(BCEWithLogitsLossFlat, False, None), (BCEWithLogitsLossFlat, True, 1), (BCEWithLogitsLossFlat, False, 2),
                                             (lambda: LabelSmoothingBCE(0.), True, 2), (lambda: LabelSmoothingBCE(0.), False, 1)])
def test_one_logit_and_two_classes(loss, column, c):
    "Labels 0 and 1 of a single logit are not indices of one class"
    x, y = torch.randn(8, 3), torch.tensor([0, 1, 1, 0, 1, 1, 0, 1])
    look = Unmixed()
    fit(flat_learner(nn.Linear(3, 1), x, y[:, None] if column else y, loss(), [LabelSmoothing(.2), look], c), 1)
    pred, seen, got = look.got
    np.testing.assert_allclose(got, F.binary_cross_entropy_with_logits(pred.view(-1), seen.view(-1)*.8+.1), rtol=1e-5)


@pytest.mark.parametrize('c', [1, 2])
def test_one_logit_with_a_mixer(c):
    x = torch.tensor([0., 1., 1., 0., 1., 1., 0., 1.])
    learn = flat_learner(nn.Linear(1, 1), x[:, None], x.long(), BCEWithLogitsLossFlat(), [LabelSmoothing(.2), MixUp(), Look()], c)
    fit(learn, 1)
    for x, pred, loss, _ in learn.look.seen: np.testing.assert_allclose(loss, F.binary_cross_entropy_with_logits(pred, x*.8+.1), rtol=1e-5)


@pytest.mark.parametrize('floating', [False, True])
@pytest.mark.parametrize('mixers', ['none', 'mixup'])
def test_masks_of_one_class(mixers, floating):
    "Predictions (N, 1, H, W) and masks (N, H, W); the input is the mask"
    y = torch.randint(0, 2, (8, 4, 4))
    learn = flat_learner(nn.Conv2d(1, 1, 1), y[:, None].float(), y.float() if floating else y, BCEWithLogitsLossFlat(),
                         [LabelSmoothing(.2), Look(), *[m() for m in MIXERS[mixers]]], 2)
    fit(learn, 1)
    for x, pred, loss, _ in learn.look.seen: np.testing.assert_allclose(loss, F.binary_cross_entropy_with_logits(pred, x*.8+.1), rtol=1e-5)


@pytest.mark.parametrize('mixers', MIXERS)
def test_a_column_of_labels(mixers):
    learn = make_learner('index', cbs=[LabelSmoothing(.1), Look(), *[m() for m in MIXERS[mixers]]])
    for dl in learn.dls: dl.dataset[:] = [(x, y[None]) for x, y in dl.dataset]
    check_seen(fit(learn, 1), 'index', .1)


# -- registered binary losses, functions, settings that change on the way

class MultiFocal(nn.Module):
    "A loss of several labels per example that takes multi-hot floats"
    def forward(self, pred, y): return F.binary_cross_entropy_with_logits(pred, y.float())


class SoftMultiFocal:
    binary = True
    def __call__(self, pred, y): return F.binary_cross_entropy_with_logits(pred, y)


@pytest.mark.parametrize('kind', ['multi_hot', 'multi_hot_int'])
@pytest.mark.parametrize('convention', [None, 'complement'])
def test_registered_binary_loss(convention, kind):
    soft_loss.register(MultiFocal, lambda loss: SoftMultiFocal())
    learn = fit(make_learner(kind, MultiFocal(), [LabelSmoothing(.2, convention=convention), MixUp(), Look()]), 1)
    for x, pred, loss, _ in learn.look.seen:
        np.testing.assert_allclose(loss, expected_binary_loss(x, pred, .2, convention or 'half'), rtol=1e-4)


def test_functions_of_torch():
    z, y = torch.randn(5, K), torch.randint(0, K, (5,))
    torch.testing.assert_close(soft_loss(F.cross_entropy)(z, y), F.cross_entropy(z, y))
    check_seen(fit(make_learner('index', F.cross_entropy, [LabelSmoothing(.1), MixUp(), Look()]), 1), 'index', .1)


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), CrossEntropyLossFlat(weight=torch.ones(K)), LabelSmoothingCrossEntropy(0.)])
def test_a_pass_reads_the_loss_before_its_first_batch(loss):
    "Weights set in `before_train` count, those set in a batch count from the next pass on"
    first, second = torch.tensor([1., 2., 5., .5]), torch.tensor([3., 1., 1., 2.])

    class Reweight(Callback):
        run_valid = False
        def set(self, w): getattr(self.learn.loss_func, 'func', self.learn.loss_func).weight = w
        def before_train(self): self.set(first if self.epoch == 0 else second)
        def after_batch(self): self.set(second)
    learn = fit(make_learner('index', loss, [LabelSmoothing(.2), Look(), Reweight()]), 2)
    seen = learn.look.seen
    for part, w in ((seen[:3], first), (seen[3:], second)):
        learn.look.seen = part
        check_seen(learn, 'index', .2, weight=w.tolist())
    assert getattr(loss, 'func', loss).weight is second


class Squares(nn.Module):
    "A registered loss without a strength"
    def forward(self, pred, y): return (pred-F.one_hot(y, K)).square().mean()


soft_loss.register(Squares, lambda loss: lambda pred, q: (pred-q).square().mean())


@pytest.mark.parametrize('mixers', ['none', 'mixup'])
@pytest.mark.parametrize('dist', [Zipf, lambda: Teacher(teacher()), lambda: .5*Zipf() + .5*Uniform()], ids=['zipf', 'teacher', 'sum'])
def test_a_registered_loss_and_a_distribution_that_asks(dist, mixers):
    "It is told what the model predicts and what it was called with"
    learn = fit(make_learner('index', Squares(), [LabelSmoothing(.3, dist()), Look(), *[m() for m in MIXERS[mixers]]]), 1)
    asked = dist()
    for x, pred, loss, _ in learn.look.seen:
        q = learners.truth_of(x, 'index')
        q = .7*q + .3*asked(q, logits=pred, inputs=x)
        np.testing.assert_allclose(loss, (pred-q).square().mean(), rtol=1e-5)


def teacher():
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(K*learners.SIDE**2, K))


@pytest.mark.parametrize('loss, cb, words', [
    (LabelSmoothingCrossEntropy(0., dist=Uniform()), LabelSmoothing(.2, convention='others'), 'cannot be combined'),
    (LabelSmoothingCrossEntropy(0., convention='others'), LabelSmoothing(.2, Uniform()), 'cannot be combined')])
def test_dist_and_convention_from_two_sides(loss, cb, words):
    with pytest.raises(ValueError, match=words): fit(make_learner('index', loss, [cb]), 1)


def test_negative_eps_is_for_softmax_losses():
    check_seen(fit(make_learner('index', cbs=[LabelSmoothing(-.2, negative=True), Look()]), 1), 'index', -.2)
    with pytest.raises(ValueError, match='no meaning for the binary loss'):
        fit(make_learner('multi_hot', BCEWithLogitsLossFlat(), [LabelSmoothing(-.2, negative=True)]), 1)


@pytest.mark.parametrize('axis', [3, -1])
@pytest.mark.parametrize('mixers', ['none', 'mixup'])
def test_masks_with_the_classes_last(mixers, axis):
    "Predictions (N, H, W, K); input is the one-hot mask in the same layout"
    y = torch.randint(0, K, (8, 4, 4))
    learn = flat_learner(nn.Linear(K, K), F.one_hot(y, K).float(), y, LabelSmoothingCrossEntropy(0., axis=axis),
                         [LabelSmoothing(.2), Look(), *[m() for m in MIXERS[mixers]]], K)
    fit(learn, 1)
    for x, pred, loss, _ in learn.look.seen: np.testing.assert_allclose(loss, F.cross_entropy(pred.flatten(0, 2), (.8*x+.2/K).flatten(0, 2)), rtol=1e-5)
