"eps_find: the figures are those of separate trainings, and the learner stays as it was, bit for bit"
import copy
import itertools
import random
import re
import runpy
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from calibration_oracles import same
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from learners import SIDE, Items, K, make_learner
from sklearn.metrics import log_loss
from torch import nn

import fastai_smooth.calibration.eps_find as finder
from fastai_smooth.callback import LabelSmoothing, OneOf
from fastai_smooth.calibration import Predictions
from fastai_smooth.data import digits_arrays
from fastai_smooth.distributions import ClassPrior, Online, Teacher, Zipf
from fastai_smooth.losses import LabelSmoothingBCE, LabelSmoothingCrossEntropy

EPS = (0, .1, .4)


def digit_data(kind, n=320, n_valid=160):
    images, labels, _ = digits_arrays()
    x, y = torch.tensor(images[:n+n_valid]).float().div(255)[:, None], torch.tensor(labels[:n+n_valid])
    wrong = torch.rand(n, generator=torch.Generator().manual_seed(0)) < .2
    y[:n][wrong] = torch.randint(0, 10, (int(wrong.sum()),), generator=torch.Generator().manual_seed(1))
    if kind == 'multi': y = torch.nn.functional.one_hot(y, 10).float()
    if kind == 'mask': y = (y[:, None, None]*(x[:, 0] > .5)).masked_fill(x[:, 0] == 0, -100)
    return [Items(zip(x[s], y[s])) for s in (slice(None, n), slice(n, None))]


def make(kind='index', frozen=True, cbs=(), train_bn=False, loss=None, lr=3e-3, **kwargs):
    "A learner on real digits whose body, with dropout and batch norm, can be frozen"
    set_seed(0)
    train, valid = digit_data(kind)
    dls = DataLoaders(TfmdDL(train, bs=64, shuffle=True, num_workers=0), TfmdDL(valid, bs=64, num_workers=0))
    dls.c = 10
    body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    dense = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.BatchNorm1d(512), nn.Dropout(.3), nn.Linear(512, 10))
    head = nn.Conv2d(8, 10, 1) if kind == 'mask' else dense
    loss = loss or (BCEWithLogitsLossFlat() if kind == 'multi' else CrossEntropyLossFlat(axis=1 if kind == 'mask' else -1))
    learn = Learner(dls, nn.Sequential(body, head), loss_func=loss, cbs=[copy.deepcopy(cb) for cb in cbs], lr=lr, train_bn=train_bn,
                    splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())], **kwargs)
    if frozen: learn.freeze()
    return learn.remove_cbs([c for c in learn.cbs if type(c).__name__ == 'ProgressCallback'])


def separate(eps, dist=None, n_epoch=2, **kwargs):
    "Logits and targets of the validation set after an ordinary training with the callback"
    learn = make(**kwargs)
    learn.add_cb(LabelSmoothing(eps, dist))
    learn.opt = None
    with learn.no_logging(): learn.fit(n_epoch)
    return learn.get_preds(act=nn.Identity())


def check_against_separate(found, dist=None, n_epoch=2, **kwargs):
    for i, eps in enumerate(EPS):
        z, y = separate(eps, dist() if dist else None, n_epoch, **kwargs)
        z = z.double()
        if kwargs.get('kind') == 'multi':
            nll, accuracy = nn.functional.binary_cross_entropy_with_logits(z, y.double()).item(), ((z > 0) == (y > .5)).double().mean().item()
        else:
            if z.ndim == 4: z, y = z.movedim(1, -1)[y != -100], y[y != -100]
            nll, accuracy = log_loss(y, z.softmax(1), labels=np.arange(10)), (z.argmax(1) == y).double().mean().item()
        row = found.table.iloc[i]
        assert row.eps == eps
        np.testing.assert_allclose([row.nll, row.accuracy], [nll, accuracy], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('frozen, cbs', [(True, []), (True, [CutMix(), MixUp()]), (True, [OneOf(MixUp(), CutMix())]), (False, [MixUp()])],
                         ids=['none', 'both', 'one of', 'not frozen'])
def test_figures_are_those_of_separate_trainings(frozen, cbs, capsys):
    found = make(frozen=frozen, cbs=cbs).eps_find(EPS, n_epoch=2, show_plot=False)
    assert 'on its own' not in capsys.readouterr().out
    check_against_separate(found, frozen=frozen, cbs=cbs)


@pytest.mark.slow
@pytest.mark.parametrize('kind, frozen', [('multi', True), ('multi', False), ('mask', True)])
def test_other_targets(kind, frozen):
    check_against_separate(make(kind, frozen).eps_find(EPS, n_epoch=2, show_plot=False), kind=kind, frozen=frozen)


@pytest.mark.slow
@pytest.mark.parametrize('dist', [lambda: ClassPrior(range(1, 11)), lambda: Online(10), Zipf], ids=['prior', 'online', 'zipf'])
def test_distributions(dist):
    "Those that learn get a training of their own, so that strengths don't learn from each other"
    given = dist()
    found = make().eps_find(EPS, given, n_epoch=2, show_plot=False)
    check_against_separate(found, dist)
    if isinstance(given, Online): assert torch.equal(given.matrix(10), torch.full((10, 10), .1)), "the given one has learned nothing"


@pytest.mark.slow
@pytest.mark.parametrize('cb', [GradientClip(.1), GradientAccumulation(128)], ids=repr)
def test_gradient_side_callbacks_fork_and_say_so(cb, capsys):
    found = make(cbs=[cb, MixUp()]).eps_find(EPS, n_epoch=2, show_plot=False)
    assert type(cb).__name__ in capsys.readouterr().out
    check_against_separate(found, cbs=[cb, MixUp()])


def test_the_pass_is_shared(monkeypatch):
    "One body for all strengths, as many batches as one training has"
    calls, forward = [], finder.Heads.forward
    monkeypatch.setattr(finder.Heads, 'forward', lambda self, *xb: calls.append(self.training) or forward(self, *xb))
    make().eps_find(EPS, n_epoch=2, show_plot=False)
    assert calls == ([True]*5 + [False]*3)*2


@pytest.mark.slow
def test_norm_layers_of_the_body_keep_their_scale():
    "With fastai's train_bn=True, too: figures are those with False"
    found = make(train_bn=True).eps_find(EPS, n_epoch=2, show_plot=False)
    check_against_separate(found)


# -- what the table says

def test_table_and_suggestion(capsys):
    found = make().eps_find(EPS, n_epoch=3)
    names = ['accuracy', 'nll', 'ece', 'nll_ts', 'ece_ts']
    assert list(found.table) == ['eps', *names, 'temperature', *(f'{n}_{e}' for n in names for e in ('low', 'high'))]
    assert found.best == EPS[int(np.argmin(found.table.nll_ts))] and isinstance(found.best, float)
    for n in names: assert (found.table[f'{n}_low'] <= found.table[n]).all() and (found.table[n] <= found.table[f'{n}_high']).all()
    assert (found.table.nll_ts <= found.table.nll).all() and (found.table.temperature > 0).all()
    best, table = found
    assert best == found.best and isinstance(table, pd.DataFrame)
    by_accuracy = make().eps_find(EPS, n_epoch=3, metric='accuracy', show_plot=False)
    assert by_accuracy.best == EPS[int(np.argmax(by_accuracy.table.accuracy))]


def losses(gap, n=200, seed=0, strengths=EPS, scale=.6):
    "Losses of each example whose mean is `gap[eps]` less than that of 0"
    rng = np.random.default_rng(seed)
    shared = rng.gamma(.5, .6, (n, 1))
    return {float(e): shared + scale*rng.normal(size=(n, 1)) - gap.get(e, 0.) for e in strengths}


def recommended(each, metric='nll_ts'):
    scores = {e: v.mean() for e, v in each.items()}
    return finder.recommend(min(scores, key=scores.get), scores, each, metric)


def test_what_is_recommended_and_said():
    eps, words = recommended(losses({.1: .4, .4: .4}, scale=.2))
    assert eps in (.1, .4) and f'Recommended: {eps:g}' in words and 'corrected for 2 strengths' in words
    eps, words = recommended(losses({.1: .4, .4: .9}))
    assert eps == .4 and 'best by nll_ts is eps=0.4. Recommended: 0.4' in words
    eps, words = recommended(losses({.1: -.5, .4: -.5}))
    assert eps == 0 and words.startswith('no eps beats 0') and words.endswith('Recommended: 0.')
    zero = losses({})[0.]
    eps, words = recommended({0.: zero, .1: zero-.02+.6*np.resize([[1], [-1]], zero.shape), .4: zero+.5})
    assert eps == 0 and 'no eps beats 0 by more than chance' in words and words.endswith('Recommended: 0.')
    eps, words = recommended(losses({}, strengths=(.1, .4)))
    assert eps in (.1, .4) and '0 is not among' in words
    assert recommended(losses({}, strengths=(0,))) == (0., None)


def test_p_values_are_those_of_all_swaps():
    "Of eight examples, all 256 ways to swap, in loops"
    each = losses({.1: .5, .4: .2}, n=8)
    gains = {e: [(z-v).item() for z, v in zip(each[0.], each[e])] for e in (.1, .4)}
    draws = [[np.mean([s*g for s, g in zip(signs, gains[e])]) for e in (.1, .4)] for signs in itertools.product((1, -1), repeat=8)]
    spread = np.std(draws, 0)
    largest = (np.array(draws)/spread).max(1)
    got, error = finder.beats_zero(each, 4999)
    for e, s in zip((.1, .4), spread):
        assert got[e] == pytest.approx(np.mean(largest >= np.mean(gains[e])/s-1e-9), abs=.03)
        assert error[e] == pytest.approx((s**2-np.mean(gains[e])**2/8)**.5, rel=.05)


@pytest.mark.parametrize('metric', finder.SCORES)
def test_contributions_sum_to_the_figure(metric):
    z, y = torch.randn(60, 4), torch.randint(0, 4, (10, 6))
    y[2, :4] = -100
    predictions = Predictions.of(2*z.view(10, 6, 4).movedim(-1, 1), y, CrossEntropyLossFlat(axis=1))
    name = metric.removesuffix('_ts')
    figure = predictions.figures([name])[name]
    sums = finder.contributions(predictions, metric).sum(0)/10
    np.testing.assert_allclose(np.abs(sums).sum(), 1-figure if name == 'accuracy' else figure)
    several = Predictions.of(z, torch.where(z < 1, (z > 0).float(), torch.nan), LabelSmoothingBCE(0.))
    sums, figure = finder.contributions(several, metric).sum(0)/60, several.figures([name])[name]
    np.testing.assert_allclose(np.abs(sums).sum(), 1-figure if name == 'accuracy' else figure, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('n, strengths', [(200, 7), (60, 2), (300, 13)])
def test_false_recommendations_are_rare(n, strengths):
    "Strengths that do not differ: one is recommended in 5% of the cases, however many there are"
    grid = np.linspace(0, .5, strengths)
    said = [min(finder.beats_zero(losses({}, n, seed, grid), 199)[0].values()) <= .05 for seed in range(200)]
    assert np.mean(said) < .08


@pytest.mark.slow
@pytest.mark.parametrize('strengths', [2, 7])
def test_what_is_printed_recommends_nothing_where_nothing_helps(strengths):
    "By accuracy, which needs no temperature: tests/benchmarks/eps_find.py --null does the rest"
    benchmark = runpy.run_path(str(Path(__file__).parents[1]/'benchmarks'/'eps_find.py'))
    best, recommended = np.array([benchmark['suggestion'](200, benchmark['STRENGTHS'][strengths], seed, 'accuracy') for seed in range(150)]).T
    assert (best > 0).mean() > .3 and (recommended > 0).mean() < .05+2*(.05*.95/150)**.5


@pytest.mark.slow
def test_false_recommendations_of_calibration_errors_are_rare():
    said = []
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        truth = 2*torch.randn(200, 4, generator=g)
        y = torch.multinomial(truth.softmax(1), 1, generator=g)[:, 0]
        models = {e: Predictions.of(truth+.5*torch.randn(200, 4, generator=g), y, CrossEntropyLossFlat()) for e in (0., .1, .2, .3)}
        said.append(min(finder.beats_zero({e: finder.contributions(p, 'ece') for e, p in models.items()}, 199)[0].values()) <= .05)
    assert np.mean(said) < .09


def test_a_frozen_body_may_give_several_tensors():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(K*SIDE*SIDE, 4)

        def forward(self, x): return x.flatten(1).clone(), torch.tanh(self.linear(x.flatten(1)))

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(K*SIDE*SIDE+4, K)

        def forward(self, features):
            features[0].mul_(2.) # in place: the next head must not see it
            return self.linear(torch.cat(features, 1))

    def learner():
        learn = make_learner()
        torch.manual_seed(0)
        learn.model = nn.Sequential(Body(), Head())
        for p in learn.model[0].parameters(): p.requires_grad_(False)
        return learn
    together = learner().eps_find((0, .2), n_epoch=6, show_plot=False).table
    for i, e in enumerate((0, .2)):
        apart = learner().eps_find((e,), n_epoch=6, show_plot=False).table
        np.testing.assert_allclose(together.nll[i], apart.nll[0], rtol=1e-5)


def test_an_untrained_network_is_warned_about():
    with pytest.warns(UserWarning, match='no better than chance'): make(frozen=False).eps_find((0, .1), show_plot=False)
    learn = make(frozen=False)
    with learn.no_logging(): learn.fit(8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.eps_find((0, .1), show_plot=False)
        make().eps_find((0, .1), show_plot=False) # the body is frozen: it has been trained
    assert not [w for w in said if 'chance' in str(w.message)]


def test_what_is_printed_is_what_is_returned(capsys):
    found = make().eps_find(EPS, n_epoch=3, show_plot=False)
    said = capsys.readouterr().out
    assert float(re.search(r'Recommended: ([\d.]+)[,.]', said)[1].rstrip('.')) == found.recommended
    assert found.recommended in (0, *EPS)


def test_figures_after_temperature_are_cross_fitted(monkeypatch):
    seen = []
    fit = finder.cross_fit
    monkeypatch.setattr(finder, 'cross_fit', lambda p, folds: seen.append((p, fit(p, folds))) or seen[-1][1])
    found = make().eps_find(EPS, n_epoch=1, show_plot=False, folds=4)
    for (p, (_, temperatures)), (_, row) in zip(seen, found.table.iterrows()):
        folds = finder.folds_of(p, 4)
        assert torch.stack(folds).sum(0).eq(1).all()
        total = sum(nn.functional.cross_entropy(p.z[f].double()/t, p.q[f].argmax(1), reduction='sum').item() for f, t in zip(folds, temperatures))
        assert row.nll_ts == pytest.approx(total/len(p), rel=1e-6)
        for f, t in zip(folds, temperatures):
            rest = lambda t: nn.functional.cross_entropy(p.z[~f].double()/t, p.q[~f].argmax(1), reduction='sum').item() + np.log(t)**2/2  # noqa: B023
            assert rest(t) <= min(rest(t*1.02), rest(t/1.02))


def test_a_training_that_diverges_leaves_the_others(monkeypatch):
    all_rows, count = finder.Collect.all_rows, []

    def sometimes(self, order=None):
        count.append(1)
        if len(count) == 2: self.kept = [(z*torch.nan, *rest) for z, *rest in self.kept]
        return all_rows(self, order)
    monkeypatch.setattr(finder.Collect, 'all_rows', sometimes)
    table = make().eps_find(EPS, show_plot=False).table
    assert table.nll_ts.isna().tolist() == [False, True, False]


def test_an_error_that_speaks_of_nan_is_an_error(monkeypatch):
    def broken(*args): raise ValueError('the finance department says nan')
    monkeypatch.setattr(Predictions, 'of_rows', broken)
    with pytest.raises(ValueError, match='finance'): make().eps_find((0, .1), show_plot=False)


# -- nothing is touched

class Counts(Callback):
    "A callback with a state"
    def __init__(self): self.n, self.list = 0, []
    def before_batch(self): self.n += 1; self.list.append(self.n)


def frozen_copy(v): return v.detach().clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v) if isinstance(v, (list, dict, int, float, str)) else v


def state(learn):
    "Everything that must be as it was: objects by identity, values by value"
    values = {f'learn.{k}': (id(v), frozen_copy(v) if k not in ('cbs', 'model', 'opt') else None) for k, v in vars(learn).items()}
    for cb in learn.cbs:
        values.update({f'{cb.name}.{k}': (id(v), frozen_copy(v) if k != '_learn' else None) for k, v in vars(cb).items() if k != 'learn'})
    values['cbs'] = [id(cb) for cb in learn.cbs]
    values['weights'] = [v.clone() for v in learn.model.state_dict().values()]
    values['modes'] = [m.training for m in learn.model.modules()]
    values['requires_grad'] = [p.requires_grad for p in learn.model.parameters()]
    values['grads'] = [None if p.grad is None else p.grad.clone() for p in learn.model.parameters()]
    values['hooks'] = [(len(m._forward_hooks), len(m._state_dict_hooks), len(m._load_state_dict_pre_hooks)) for m in learn.model.modules()]
    if learn.opt: values['opt'] = copy.deepcopy(learn.opt.state_dict())
    values['loaders'] = [{k: id(v) for k, v in vars(dl).items()} for dl in learn.dls.loaders]
    values['dl.rng'] = [dl.rng.getstate() for dl in learn.dls.loaders]
    values['rng'] = torch.get_rng_state(), random.getstate(), [str(np.random.get_state())]  # noqa: NPY002
    return values


def check_same(before, after):
    different = [k for k in before.keys() | after.keys() if not same(before.get(k), after.get(k))]
    assert not different, different


class Stop(Callback):
    "Raises at an event, once so many batches have gone by in all copies"
    order, seen = 70, None
    def __init__(self, event, error): self.event, self.error = event, error

    def __call__(self, name):
        if name == self.event:
            Stop.seen += 1
            if Stop.seen == 4: raise self.error


@pytest.mark.slow
@pytest.mark.parametrize('frozen, cbs, fitted', [(True, [], False), (False, [MixUp(), Counts()], True),
                                                 (True, [LabelSmoothing(.2, ClassPrior(range(1, 11)))], True),
                                                 (True, [LabelSmoothing(.2, Online(10)), CutMix()], False)], ids=['none', 'mixup', 'smoothing', 'online'])
def test_nothing_is_touched(frozen, cbs, fitted):
    learn = make(frozen=frozen, cbs=cbs)
    with learn.no_logging():
        if fitted: learn.fit(1)
    before = state(learn)
    learn.eps_find(EPS, show_plot=False)
    check_same(before, state(learn))


@pytest.mark.slow
@pytest.mark.parametrize('frozen, error, event', [(True, KeyboardInterrupt(), 'before_batch'), (True, RuntimeError('broken'), 'after_epoch'),
                                                  (False, RuntimeError('broken'), 'after_batch'), (False, KeyboardInterrupt(), 'before_validate')])
def test_nothing_is_touched_by_an_interrupt(frozen, error, event):
    Stop.seen = 0
    learn = make(frozen=frozen, cbs=[MixUp()])
    learn.add_cb(Stop(event, error))
    before = state(learn)
    with pytest.raises(type(error)): learn.eps_find(EPS, n_epoch=5, show_plot=False)
    check_same(before, state(learn))


@pytest.mark.slow
def test_a_training_afterwards_is_the_one_it_would_have_been():
    weights = []
    for find in (False, True):
        learn = make(cbs=[MixUp(), LabelSmoothing(.1)], frozen=False)
        if find: learn.eps_find(EPS, show_plot=False)
        with learn.no_logging(): learn.fit(1)
        weights.append([p.detach() for p in learn.model.parameters()])
    assert same(*weights)


@pytest.mark.slow
def test_cancelled_fits_and_attached_smoothing_stand_aside():
    class Cancel(Callback):
        def before_batch(self):
            if self.training and self.iter == 2: raise CancelFitException
    learn = make(cbs=[Cancel()])
    with pytest.raises(ValueError, match='no batches'): learn.eps_find(EPS, show_plot=False)
    one, two = make(cbs=[LabelSmoothing(.9)]), make()
    assert one.eps_find(EPS, show_plot=False).table.equals(two.eps_find(EPS, show_plot=False).table)


# -- mistakes

@pytest.mark.parametrize('args, error, words', [
    (dict(eps=.1), TypeError, 'several strengths'), (dict(eps='0,1'), TypeError, 'several strengths'), (dict(eps=(0, 2)), ValueError, r'\[0, 1\]'),
    (dict(eps=(0, float('nan'))), ValueError, r'\[0, 1\]'), (dict(eps=()), ValueError, 'at least one'), (dict(eps=(.1, .1)), ValueError, 'different'),
    (dict(metric='loss'), ValueError, 'nll_ts'), (dict(n_epoch=0), ValueError, 'n_epoch'), (dict(folds=1), ValueError, 'folds'),
    (dict(folds=1000), ValueError, '160 examples'), (dict(dist='uniform'), TypeError, 'distribution'),
    (dict(dist=ClassPrior([1, 2])), ValueError, '2 classes')])
def test_bad_arguments_run_nothing(args, error, words, monkeypatch):
    learn = make()
    before = state(learn)
    monkeypatch.setattr(Learner, 'fit', lambda *args, **kwargs: pytest.fail('a training ran'))
    with pytest.raises(error, match=words): learn.eps_find(**args)
    check_same(before, state(learn))


def test_losses_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(Learner, 'fit', lambda *args, **kwargs: pytest.fail('a training ran'))
    for loss in (LabelSmoothingCrossEntropy(.1), nn.CrossEntropyLoss(label_smoothing=.1)):
        with pytest.raises(ValueError, match='already smooths'): make(loss=loss).eps_find()
    with pytest.raises(ValueError, match='binary loss'): make('multi', loss=LabelSmoothingBCE(0.)).eps_find(dist=Teacher(nn.Identity()))
    with pytest.raises(TypeError, match='soft_loss.register'): make(loss=nn.MultiMarginLoss()).eps_find()
    learn = make()
    learn.opt_func = OptimWrapper(opt=torch.optim.SGD(learn.model.parameters(), lr=.1))
    with pytest.raises(ValueError, match='OptimWrapper'): learn.eps_find()
    learn = make()
    learn.dls.loaders = learn.dls.loaders[:1]
    with pytest.raises(ValueError, match='validation set'): learn.eps_find()


def test_progress_is_shown(capsys):
    from fastai.callback.progress import ProgressCallback
    learn = make()
    learn.add_cb(ProgressCallback())
    learn.eps_find(EPS, show_plot=False)
    assert '100.00%' in capsys.readouterr().out


@pytest.mark.parametrize('what, words', [('lr', 'learn.lr is not one number'), ('dist', 'learns or remembers')])
def test_what_does_not_fit_one_pass_is_said(what, words, capsys):
    learn = make(lr=[1e-3, 3e-3] if what == 'lr' else 3e-3)
    learn.eps_find((0, .1), Online(10) if what == 'dist' else None, show_plot=False)
    assert words in capsys.readouterr().out
