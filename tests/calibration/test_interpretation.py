"CalibrationInterpretation: figures, tables and what is drawn, against loops, numpy and scikit-learn"
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from calibration_oracles import (aurc_loop, best_sigmoids, best_softmax, check_untouched, decisions, ece_loop, example_of_kind, learner, naive, several, shared,
                                 single, snapshot)
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import CategoryMap
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.text.data import SortedDL
from learners import Items, fit, make_learner
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from fastai_smooth.calibration import CalibrationInterpretation, Predictions
from fastai_smooth.losses import LabelSmoothingCrossEntropy

NAMES = ['accuracy', 'nll', 'ece', 'adaptive_ece', 'classwise_ece', 'mce', 'brier', 'aurc']


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def example(kind, n=90):
    predictions, *truth = example_of_kind(kind, n)
    return CalibrationInterpretation(predictions), *truth


KINDS = pytest.mark.parametrize('kind', ['index', 'soft', 'log', 'several', 'mask'])

# -- figures


@KINDS
def test_figures(kind):
    interp, p, q, _, binary = example(kind)
    got, expected = interp.metrics(n_boot=5), naive(p, q, binary)
    assert isinstance(got, pd.Series) and list(got.index) == [f'{n}{s}' for n in NAMES for s in ('', '_low', '_high')] and got.dtype == np.float64
    np.testing.assert_allclose(got[NAMES], [expected[n] for n in NAMES], atol=1e-6)
    assert all(0 <= got[f'{n}_low'] <= got[f'{n}_high'] for n in NAMES) and all(got[f'{n}_low'] < got[f'{n}_high'] for n in NAMES)


def test_figures_against_peers():
    z, y = single(500)
    got, p = CalibrationInterpretation(Predictions.of(z, y, CrossEntropyLossFlat())).metrics(0), z.double().softmax(1)
    expected = [accuracy_score(y, p.argmax(1)), log_loss(y, p), *(multiclass_calibration_error(p, y, 4, 15, n).item() for n in ('l1', 'max')),
                brier_score_loss(y, p)]
    np.testing.assert_allclose(got[['accuracy', 'nll', 'ece', 'mce', 'brier']], expected, atol=1e-6)
    z, y = several(500)
    got, p = CalibrationInterpretation(Predictions.of(z, y, BCEWithLogitsLossFlat())).metrics(0), z.double().sigmoid()
    expected = [accuracy_score(y.flatten(), p.flatten() > .5), log_loss(y.flatten(), p.flatten()),
                *(binary_calibration_error(p.flatten(), y.flatten().long(), 15, n).item() for n in ('l1', 'max'))]
    np.testing.assert_allclose(got[['accuracy', 'nll', 'ece', 'mce']], expected, atol=1e-6)


# -- from a learner

def test_from_learner():
    z, y = single(60)
    learn = learner(z, y, LabelSmoothingCrossEntropy(.2))
    learn.dls.vocab = list('abcd')
    half = TfmdDL(Items(zip(z[:30], y[:30])), bs=7, num_workers=0, device='cpu')
    for args, n in (({}, 60), (dict(ds_idx=0), 60), (dict(dl=half), 30)):
        interp = CalibrationInterpretation.from_learner(learn, **args)
        p = softmax(z[:n].double().numpy(), 1)
        np.testing.assert_allclose(interp.metrics(0)[NAMES], list(naive(p, np.eye(4)[y[:n]]).values()), atol=1e-6)
        assert interp.vocab == list('abcd') and interp.learn is learn
    learn.dls.vocab = list('abcde') # of something else
    assert CalibrationInterpretation.from_learner(learn).vocab == list('0123')


def test_class_names_of_several_vocabularies():
    "Text has one of its tokens and one of its labels"
    learn = learner(*single(20))
    learn.dls.vocab = [CategoryMap(list('abcdefgh')), CategoryMap(['ant', 'bee', 'cat', 'dog'])]
    assert CalibrationInterpretation.from_learner(learn).vocab == ['ant', 'bee', 'cat', 'dog']


def test_the_learner_stays_as_it_is():
    learn = fit(make_learner(bs=5), 1).remove_cb(ProgressCallback)
    learn.model.train()
    learn.model[0].eval()
    before = snapshot(learn)
    interp = CalibrationInterpretation.from_learner(learn)
    interp.metrics(3), interp.calibrated(3).metrics(3), interp.temperature(), interp.top_confident_errors(), interp.summary()
    interp.plot_reliability(), interp.plot_confidence(), interp.plot_risk_coverage(), interp.plot_penultimate([0, 1, 2])
    check_untouched(learn, before)
    with pytest.raises(ValueError): interp.plot_penultimate([0, 1, 7])
    learn.dls.loaders[0] = TfmdDL(Items((x,) for x, _ in learn.dls.train.dataset), bs=5, num_workers=0, device='cpu')
    before = snapshot(learn)
    with pytest.raises(Exception): interp.plot_penultimate([0, 1, 2]) # noqa: B017  (without labels)
    check_untouched(learn, before)


@pytest.mark.parametrize('what, words', [('nan', 'nan'), ('one class', 'one class'), ('unknown loss', 'pass act='), ('no labels', 'no labels')])
def test_what_cannot_be_interpreted_says_why(what, words):
    z, y = single(20)
    if what == 'nan': z[3, 1] = torch.nan
    learn = {'one class': lambda: learner(z[:, :1], torch.zeros(20).long()),
             'unknown loss': lambda: learner(z, y, lambda p, t: F.cross_entropy(p, t))}.get(what, lambda: learner(z, y))()
    dl = learn.dls.valid.new(Items((v,) for v in z)) if what == 'no labels' else None
    with pytest.raises(ValueError, match=words): CalibrationInterpretation.from_learner(learn, dl=dl)
    if what == 'unknown loss':
        with_act = CalibrationInterpretation.from_learner(learn, act=lambda z: z.softmax(-1))
        np.testing.assert_allclose(with_act.metrics(0).nll, log_loss(y, z.double().softmax(1), labels=range(4)), atol=1e-6)


# -- temperature

def test_temperature():
    z, y = single()
    np.testing.assert_allclose(CalibrationInterpretation(Predictions.of(z, y, CrossEntropyLossFlat())).temperature(), best_softmax(z, y), rtol=1e-3)
    z, y = several()
    t = CalibrationInterpretation(Predictions.of(z, y, BCEWithLogitsLossFlat())).temperature()
    np.testing.assert_allclose(t, best_sigmoids(z, y), rtol=1e-3)


@pytest.mark.parametrize('kind', ['index', 'several', 'mask'])
def test_calibrated(kind):
    interp, p, q, numbers, binary = example(kind, 300)
    interp.vocab = list('abcd')[:p.shape[1]]
    after = interp.calibrated(4)
    assert after.vocab == interp.vocab and after.learn is interp.learn and after is not interp
    assert after.predictions.example.tolist() == interp.predictions.example.tolist() == numbers.tolist()
    f = lambda p: np.log(p/(1-p)) if binary else np.log(p)-np.log(p).mean(1, keepdims=True)
    ratio = f(interp.predictions.p.numpy())/f(after.predictions.p.numpy()) # the temperature of each row
    if not binary: np.testing.assert_allclose(ratio, np.repeat(ratio[:, :1], 4, 1), rtol=1e-6)
    assert all(len(set(np.round(ratio[numbers == e, k], 6))) == 1 for e in np.unique(numbers) for k in range(p.shape[1]))
    folds = {tuple(r) for r in np.round(ratio if binary else ratio[:, :1], 6)}
    assert len(folds) == 4
    for fold in folds:
        others = (np.abs((ratio if binary else ratio[:, :1])-fold) > 1e-5).any(1)
        best = best_sigmoids(f(p)[others], q[others]) if binary else [best_softmax(np.log(p[others]), q[others])]
        np.testing.assert_allclose(fold, best, rtol=1e-3)
    before, figures = interp.metrics(0), after.metrics(0)
    assert figures.accuracy == before.accuracy and figures.nll < before.nll
    np.testing.assert_allclose(figures[NAMES], list(naive(after.predictions.p.numpy(), q, binary).values()), atol=1e-6)
    again = interp.calibrated(4).predictions.p
    assert torch.equal(after.predictions.p, again)
    with pytest.raises(ValueError, match='folds'): interp.calibrated(1)


# -- the surest errors

@pytest.mark.parametrize('kind', ['soft', 'several', 'mask'])
@pytest.mark.parametrize('k', [3, 10000])
def test_top_confident_errors(kind, k):
    interp, p, q, numbers, binary = example(kind)
    vocab = ['ant', 'bee', 'cat', 'dog'][:p.shape[1]]
    interp = CalibrationInterpretation(interp.predictions, vocab)
    rows = []
    for e, a, b in zip(numbers, p, q):
        if binary:
            for name, c, y in zip(vocab, a, b):
                said = lambda yes, name=name: name if yes else f'not {name}'
                if not np.isnan(y) and (c > .5) != (y > .5): rows.append((e, said(y > .5), said(c > .5), max(c, 1-c)))
        elif a.argmax() != b.argmax(): rows.append((e, vocab[b.argmax()], vocab[a.argmax()], a.max()))
    rows.sort(key=lambda r: (-r[3], r[0]))
    got = interp.top_confident_errors(k)
    assert isinstance(got, pd.DataFrame) and list(got.columns) == ['index', 'label', 'predicted', 'confidence'] and list(got.index) == list(range(len(got)))
    assert len(got) == min(k, len(rows)) and len(rows) > 5
    assert list(got[['index', 'label', 'predicted']].itertuples(index=False, name=None)) == [r[:3] for r in rows[:k]]
    np.testing.assert_allclose(got.confidence, [r[3] for r in rows[:k]], atol=1e-6)


def test_errors_are_found_by_their_number_in_the_data_set():
    z, y = single(40)
    learn = learner(z, y, dl=lambda *a, **k: SortedDL(*a, sort_func=lambda b: float(b[0].sum()), **k))
    table = CalibrationInterpretation.from_learner(learn).top_confident_errors(40)
    p = softmax(z.double().numpy(), 1)
    wrong = sorted((i for i in range(40) if p[i].argmax() != y[i]), key=lambda i: -p[i].max())
    assert table['index'].tolist() == wrong and wrong
    assert [learn.dls.valid_ds[i][1].item() for i in table['index']] == table.label.astype(int).tolist()


def test_no_errors():
    z = torch.randn(9, 3)
    for classes in (z.argmax(1), (z > 0).float()):
        interp = CalibrationInterpretation(Predictions.of(z, classes, BCEWithLogitsLossFlat() if classes.ndim == 2 else CrossEntropyLossFlat()))
        assert len(interp.top_confident_errors()) == 0 and interp.metrics(0).accuracy == 1


# -- pictures

PLOTS = ['plot_reliability', 'plot_confidence', 'plot_risk_coverage']


@pytest.mark.parametrize('plot', PLOTS)
def test_each_picture_takes_axes_or_makes_its_own(plot):
    draw = getattr(example('index')[0], plot)
    _, (one, two) = plt.subplots(1, 2)
    n = len(plt.get_fignums())
    assert draw(ax=one) is one and len(plt.get_fignums()) == n and not two.has_data() and one.has_data()
    own = draw()
    assert own not in (one, two) and own.figure is not one.figure and own.has_data() and len(plt.get_fignums()) == n+1
    assert draw().figure is not own.figure and one.get_xlabel() and one.get_ylabel()
    own.figure.canvas.draw()


def texts_of(ax): return [t.get_text() for t in ax.texts] + ([t.get_text() for t in ax.get_legend().get_texts()] if ax.get_legend() else [])


@pytest.mark.parametrize('kind', ['soft', 'several', 'mask'])
def test_reliability(kind, n_bins=7):
    interp, p, q, _, binary = example(kind)
    conf, right, *_ = (np.array(v) for v in decisions(p, q, binary))
    bins = []
    for b in range(n_bins):
        inside = (conf >= b/n_bins) & ((conf < (b+1)/n_bins) | (b == n_bins-1))
        if inside.any(): bins.append((b/n_bins, inside.sum(), right[inside].mean(), conf[inside].mean()))
    left, count, accuracy, confidence = map(np.array, zip(*bins))
    ax = interp.plot_reliability(n_bins)
    bars, gaps = ([(b.get_x(), b.get_width(), b.get_y(), b.get_height()) for b in c] for c in ax.containers[:2])
    np.testing.assert_allclose(bars, np.stack([left, left*0+1/n_bins, left*0, accuracy], 1), atol=1e-9)
    gaps = np.array(gaps)
    np.testing.assert_allclose(gaps[:, 0], left, atol=1e-9)
    np.testing.assert_allclose(np.sort(np.stack([gaps[:, 2], gaps[:, 2]+gaps[:, 3]], 1), 1), np.sort(np.stack([accuracy, confidence], 1), 1), atol=1e-9)
    numbers = sorted((t.get_position()[0], int(t.get_text())) for t in ax.texts if t.get_text().isdigit())
    np.testing.assert_allclose(numbers, np.stack([left+.5/n_bins, count], 1), atol=1e-9)
    assert f'ECE {ece_loop(list(conf), list(right), n_bins):.3f}' in texts_of(ax)
    assert ax.get_xlim() == (0, 1) and ax.get_ylim() == (0, 1)
    low, high = np.array([s for c in ax.containers[2][2] for s in c.get_segments()])[:, :, 1].T
    if kind != 'soft':
        ends = [binomtest(round(a*n), int(n)).proportion_ci(method='wilson') for a, n in zip(accuracy, count)]
        np.testing.assert_allclose(np.transpose([low, high]), [(min(e.low, a), max(e.high, a)) for e, a in zip(ends, accuracy)], atol=1e-6)


@pytest.mark.parametrize('kind', ['soft', 'several'])
def test_confidence_of_right_and_wrong(kind):
    interp, p, q, _, binary = example(kind)
    _, _, sure, correct = (np.array(v) for v in decisions(p, q, binary))
    edges = np.linspace(.5 if binary else 0, 1, 31)
    right, wrong = (np.histogram(sure, edges, weights=w)[0] for w in (correct, 1-correct))
    ax = interp.plot_confidence()
    np.testing.assert_allclose([b.get_height() for b in ax.containers[0]], right, atol=1e-6)
    np.testing.assert_allclose([b.get_x() for b in ax.containers[0]], edges[:-1], atol=1e-6)
    outline = next(v.get_xy() for v in ax.patches if hasattr(v, 'get_xy') and np.ndim(v.get_xy()) == 2)
    drawn = np.zeros(30)
    for (x0, y0), (x1, y1) in zip(outline[:-1], outline[1:]): # the horizontal pieces
        if x1-x0 > 1e-6 and y0 == y1: drawn[int(round((x0-edges[0])/(edges[1]-edges[0])))] = y0
    np.testing.assert_allclose(drawn, wrong, atol=1e-6)
    words = ' '.join(texts_of(ax))
    assert f'mean {sure.mean():.3f}' in words and f'right ({correct.sum():.0f})' in words and f'wrong ({(1-correct).sum():.0f})' in words
    assert f'{correct.mean():.3f}' in ax.get_title()
    assert interp.plot_confidence(n_bins=8).containers[0][0].get_width() == pytest.approx((.5 if binary else 1)/8)


@pytest.mark.parametrize('kind', ['soft', 'several'])
@pytest.mark.parametrize('order', [4])
def test_risk_and_coverage(kind, order):
    interp, p, q, _, binary = example(kind)
    _, _, sure, correct = decisions(p, q, binary)
    scores = [sure]
    if not binary: scores.append([r.max()/np.linalg.norm(r, order) for r in interp.predictions.z.double().numpy()])
    ax = interp.plot_risk_coverage(order)
    lines = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert len(lines) == len(scores)
    for line, score in zip(lines, scores):
        right = shared(score, correct)
        ranked = [right[i] for i in sorted(range(len(score)), key=lambda i: -score[i])]
        risk = [1-np.mean(ranked[:n]) for n in range(1, len(score)+1)]
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, len(score)+1)/len(score), atol=1e-12)
        np.testing.assert_allclose(line.get_ydata(), risk, atol=1e-9)
        assert f'AURC {aurc_loop(score, correct):.3f}' in line.get_label() and any(line.get_label() in t for t in texts_of(ax))


# -- the last layer

def two_layers(classes=4, n=70, names=None):
    "A learner whose training loader shuffles and leaves out the last batch"
    x, y = torch.randn(n, 5), torch.randint(0, classes, (n,))
    dls = DataLoaders(*(TfmdDL(Items(zip(a, b)), bs=8, shuffle=i == 0, drop_last=i == 0, num_workers=0, device='cpu') for i, (a, b) in enumerate((
        (x[:40], y[:40]), (x[40:], y[40:])))))
    if names: dls.vocab = names
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(.5), nn.ReLU(), nn.Linear(6, classes))
    return Learner(dls, model, loss_func=CrossEntropyLossFlat()).remove_cb(ProgressCallback), x, y


@pytest.mark.parametrize('classes', [[3, 0, 2], ['dog', 1, 'ant'], list(np.arange(3))])
def test_points_of_the_penultimate_layer(classes):
    names = ['ant', 'bee', 'cat', 'dog']
    learn, x, y = two_layers(names=names)
    numbers = [names.index(c) if isinstance(c, str) else int(c) for c in classes]
    first, last = (learn.model[i] for i in (0, 3))
    features = np.maximum(x.double().numpy() @ first.weight.detach().double().numpy().T + first.bias.detach().double().numpy(), 0)
    w = last.weight.detach().double().numpy()[numbers]
    plane = np.linalg.qr(np.stack([w[0]-w[2], w[1]-w[2]], 1))[0]
    modes = [m.training for m in learn.model.modules()]
    _, ax = plt.subplots()
    assert CalibrationInterpretation.from_learner(learn).plot_penultimate(classes, ax=ax) is ax
    assert modes == [m.training for m in learn.model.modules()] and not any(m._forward_pre_hooks or m._forward_hooks for m in learn.model.modules())
    drawn = {c.get_label(): np.asarray(c.get_offsets()) for c in ax.collections}
    assert set(drawn) == {f'{names[c]}, {part}' for c in numbers for part in ('training', 'validation')} and len(ax.collections) == 6
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [c.get_label() for c in ax.collections]
    parts = dict(training=slice(0, 40), validation=slice(40, 70))
    naive = {f'{names[c]}, {part}': (features[s] @ plane)[y[s].numpy() == c] for c in numbers for part, s in parts.items()}
    sort = lambda v: v[np.lexsort(v.round(4).T)]
    fits = lambda sign: all(len(drawn[k]) == len(v) and np.allclose(sort(drawn[k]), sort(v*sign), atol=1e-4) for k, v in naive.items())
    assert sum(fits(np.array([a, b])) for a in (-1, 1) for b in (-1, 1)) == 1 # one choice of signs for all of them
    own = CalibrationInterpretation.from_learner(learn).plot_penultimate(classes)
    assert own is not ax and own.figure is not ax.figure


@pytest.mark.parametrize('classes, words', [([0, 1], 'three'), ([0, 1, 1], 'three different'), ([0, 1, 2, 3], 'three'), ([0, 1, 9], 'no class 9'),
                                            ([0, 1, -1], 'no class -1'), (['ant', 'bee', 'cow'], "no class 'cow'"), (['ant', 0, 1], 'three different')])
def test_wrong_classes(classes, words):
    interp = CalibrationInterpretation.from_learner(two_layers(names=['ant', 'bee', 'cat', 'dog'])[0])
    n = len(plt.get_fignums())
    with pytest.raises(ValueError, match=words): interp.plot_penultimate(classes)
    assert len(plt.get_fignums()) == n


@pytest.mark.parametrize('what, words', [('no learner', 'from_learner'), ('no linear layer', 'no linear layer'), ('several', 'one label per example')])
def test_learners_without_a_plane(what, words):
    if what == 'several': learn = make_learner('multi_hot', BCEWithLogitsLossFlat())
    else: learn = make_learner('mask' if what == 'no linear layer' else 'index')
    interp = CalibrationInterpretation.from_learner(learn.remove_cb(ProgressCallback))
    if what == 'no learner': interp = CalibrationInterpretation(interp.predictions)
    with pytest.raises(ValueError, match=words): interp.plot_penultimate([0, 1, 2])


def test_the_words_say_what_the_figures_say():
    interp, p, q, _, _ = example('index')
    words, figures = interp.summary(), naive(p, q)
    assert all(f'{figures[n]:.3f}' in words for n in ('nll', 'brier', 'ece', 'mce', 'aurc')) and f'{figures["accuracy"]:.1%}' in words
    assert re.search('overconfident|underconfident', words)[0] == ('overconfident' if p.max(1).mean() > figures['accuracy'] else 'underconfident')
    assert 'NLL' in example('several')[0].summary()
