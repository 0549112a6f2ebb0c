"CalibrationInterpretation: figures, intervals, tables and what is drawn, against loops, numpy and scikit-learn"
import random
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.text.data import SortedDL
from fastai.text.learner import text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.torch_core import set_seed
from learners import Items, fit, make_learner
from scipy.special import expit, softmax
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from test_calibration import adaptive_loop, aurc_loop, ece_loop, shared
from test_temperature import SMALL, best_sigmoid, best_softmax, check_untouched, learner, several, single, snapshot, texts
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from fastai_smooth.calibration import CalibrationInterpretation, Predictions
from fastai_smooth.losses import LabelSmoothingBCE, LabelSmoothingCrossEntropy, LabelSmoothingNLL

NAMES = ['accuracy', 'nll', 'ece', 'adaptive_ece', 'classwise_ece', 'mce', 'brier', 'aurc']


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close('all')


def decisions(p, q, binary=False):
    "Confidence, how right it is, and for a question per class the surer side of it and whether that is right: lists"
    if not binary: return (list(p.max(1)), [q[i][g] for i, g in enumerate(p.argmax(1))])*2
    known = [(a, b) for row in zip(p, q) for a, b in zip(*row) if not np.isnan(b)]
    conf, right = map(list, zip(*known))
    return conf, right, [max(c, 1-c) for c in conf], [r if c > .5 else 1-r for c, r in known]


def naive(p, q, binary=False):
    "All figures in loops, from probabilities (N, K) and targets"
    conf, right, sure, correct = decisions(p, q, binary)
    columns = [(p[:, k][~np.isnan(q[:, k])], q[:, k][~np.isnan(q[:, k])]) for k in range(p.shape[1])]
    if binary: nll = -np.mean([r*np.log(c)+(1-r)*np.log(1-c) for c, r in zip(conf, right)])
    else: nll = -np.mean([sum(b*np.log(a) for a, b in zip(*row) if b) for row in zip(p, q)])
    brier = [sum((a-b)**2 for a, b in zip(*row) if not np.isnan(b)) for row in zip(p, q) if not np.isnan(row[1]).all()]
    return dict(accuracy=np.mean(correct), nll=nll, ece=ece_loop(conf, right), adaptive_ece=adaptive_loop(conf, right),
                classwise_ece=np.mean([ece_loop(list(a), list(b)) for a, b in columns if len(a)]), mce=ece_loop(conf, right, norm='max'),
                brier=np.mean(brier), aurc=aurc_loop(sure, correct))


def example(kind, n=90):
    "Interpretation, probabilities, targets, number of the example of each row, and whether each class is a question"
    numbers = np.arange(n)
    if kind == 'several':
        z, y = several(n)
        y[::5, 1] = torch.nan
        return CalibrationInterpretation(Predictions.of(z, y, LabelSmoothingBCE(.1))), expit(z.double().numpy()), y.double().numpy(), numbers, True
    z, y = single(n)
    p, q = softmax(z.double().numpy(), 1), np.eye(4)[y]
    if kind == 'soft':
        soft = torch.distributions.Dirichlet(4*(z.double()/3).softmax(1)+.1).sample()*.5
        return CalibrationInterpretation(Predictions.of(z, soft, LabelSmoothingCrossEntropy(.1))), p, (soft/soft.sum(1, True)).numpy(), numbers, False
    if kind == 'log': return CalibrationInterpretation(Predictions.of(z.log_softmax(1), y, LabelSmoothingNLL(.1))), p, q, numbers, False
    if kind == 'mask':
        y[[0, 1, 2, 9, 40]], y[10:20] = -100, -100 # a whole example, parts of others
        kept = y.numpy() >= 0
        prediction = Predictions.of(z.view(-1, 5, 2, 4).movedim(-1, 1), y.view(-1, 5, 2), CrossEntropyLossFlat(axis=1))
        return CalibrationInterpretation(prediction), p[kept], q[kept], (numbers//10)[kept], False
    return CalibrationInterpretation(Predictions.of(z, y, CrossEntropyLossFlat())), p, q, numbers, False


KINDS = pytest.mark.parametrize('kind', ['index', 'soft', 'log', 'several', 'mask'])


# -- figures and intervals

@KINDS
def test_figures(kind):
    interp, p, q, _, binary = example(kind)
    got, expected = interp.metrics(n_boot=20), naive(p, q, binary)
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


def bootstrap(p, q, numbers, binary, n=400):
    "Draw whole examples with numpy, score in loops"
    rng, rows, drawn = np.random.default_rng(1), [np.flatnonzero(numbers == e) for e in np.unique(numbers)], []
    for _ in range(n):
        at = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        conf, right, _, correct = decisions(p[at], q[at], binary)
        clip = np.clip(p[at], 1e-12, 1-1e-12)
        nll = -np.nanmean(q[at]*np.log(clip)+(1-q[at])*np.log(1-clip)) if binary else -(q[at]*np.log(clip)).sum(1).mean()
        drawn.append([np.mean(correct), nll, np.nansum((p[at]-q[at])**2, 1).mean(), ece_loop(conf, right)])
    return np.quantile(drawn, [.025, .975], 0).T


@KINDS
def test_intervals_are_those_of_a_bootstrap_of_examples(kind):
    interp, p, q, numbers, binary = example(kind)
    got = interp.metrics(n_boot=600)
    for name, (low, high) in zip(('accuracy', 'nll', 'brier'), bootstrap(p, q, numbers, binary)):
        width = high-low
        np.testing.assert_allclose([got[f'{name}_low'], got[f'{name}_high']], [low, high], atol=.15*width)
    low, high = bootstrap(p, q, numbers, binary)[3]
    np.testing.assert_allclose(got.ece_high-got.ece_low, high-low, rtol=.3)


def test_the_pixels_of_a_mask_stay_together():
    "Masks that are all right or all wrong: 24 examples, not 24*64 pixels"
    z, y = torch.randn(24, 3, 8, 8), torch.zeros(24, 8, 8).long()
    z[:12, 0] += 50
    z[12:, 1] += 50
    y[0, 1:] = -100
    got = CalibrationInterpretation(Predictions.of(z, y, CrossEntropyLossFlat(axis=1))).metrics()
    half = 1.96*np.sqrt(.25/24)
    np.testing.assert_allclose([got.accuracy_low, got.accuracy_high], [got.accuracy-half, got.accuracy+half], atol=.06)


@KINDS
def test_intervals_hold_the_figure(kind):
    "Also of the calibration errors, which resampling can only make larger"
    interp = example(kind, 150)[0]
    for i in (interp, interp.calibrated()):
        got = i.metrics()
        assert not {n: got[[n, f'{n}_low', f'{n}_high']].tolist() for n in NAMES if not got[f'{n}_low'] <= got[n] <= got[f'{n}_high']}


@pytest.mark.parametrize('seed', range(3))
def test_intervals_of_a_calibrated_model_hold_the_figure(seed):
    torch.manual_seed(seed)
    z, y = single(400, factor=1.)
    got = CalibrationInterpretation(Predictions.of(z, y, CrossEntropyLossFlat())).metrics()
    assert not {n: got[[n, f'{n}_low', f'{n}_high']].tolist() for n in NAMES if not got[f'{n}_low'] <= got[n] <= got[f'{n}_high']}


def test_figures_go_by_their_seed_alone():
    interp = example('index')[0]
    states = lambda: [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()] # noqa: NPY002
    before = states()
    one = interp.metrics(30)
    assert states() == before
    set_seed(9)
    pd.testing.assert_series_equal(one, interp.metrics(30))
    other = interp.metrics(30, seed=1)
    assert (one[NAMES] == other[NAMES]).all() and one.nll_low != other.nll_low


def test_a_single_example_and_no_bootstrap():
    z, y = single(1)
    got = CalibrationInterpretation(Predictions.of(z, y, CrossEntropyLossFlat())).metrics(10)
    assert all(got[n] == got[f'{n}_low'] == got[f'{n}_high'] for n in NAMES)
    got = example('index')[0].metrics(0)
    assert np.isfinite(got[NAMES]).all() and got.drop(NAMES).isna().all()


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


def test_the_class_names_of_a_text_classifier(tmp_path):
    "Whose vocab is that of the tokens and that of the labels"
    learn = text_classifier_learner(texts(False), AWD_LSTM, config={**awd_lstm_clas_config, **SMALL}, pretrained=False, path=tmp_path)
    assert CalibrationInterpretation.from_learner(learn.remove_cb(ProgressCallback)).vocab == ['neg', 'pos']


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


@pytest.mark.parametrize('what, words', [('nan', 'nan'), ('one class', 'one class'), ('unknown loss', 'pass act='), ('no labels', 'no labels'),
                                         ('all ignored', 'nothing to score'), ('nothing known', 'nothing to score'), ('no batches', 'no batches')])
def test_what_cannot_be_interpreted_says_why(what, words):
    z, y = single(20)
    if what == 'nan': z[3, 1] = torch.nan
    learn = {'one class': lambda: learner(z[:, :1], torch.zeros(20).long()), 'unknown loss': lambda: learner(z, y, lambda p, t: F.cross_entropy(p, t)),
             'all ignored': lambda: learner(z, y*0-100), 'nothing known': lambda: learner(z, z*torch.nan, LabelSmoothingBCE(.1))
             }.get(what, lambda: learner(z, y))()
    dl = {'no labels': lambda: learn.dls.valid.new(Items((v,) for v in z)), 'no batches': lambda: learn.dls.new_empty().valid}.get(what, lambda: None)()
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
    np.testing.assert_allclose(t, [best_sigmoid(z[:, k], y[:, k]) for k in range(3)], rtol=1e-3)


@KINDS
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
        best = [best_sigmoid(f(p)[others, k], q[others, k]) for k in range(3)] if binary else [best_softmax(np.log(p[others]), q[others])]
        np.testing.assert_allclose(fold, best, rtol=1e-3)
    before, figures = interp.metrics(0), after.metrics(0)
    assert figures.accuracy == before.accuracy and figures.nll < before.nll
    np.testing.assert_allclose(figures[NAMES], list(naive(after.predictions.p.numpy(), q, binary).values()), atol=1e-6)
    again = interp.calibrated(4).predictions.p
    assert torch.equal(after.predictions.p, again)
    with pytest.raises(ValueError, match='folds'): interp.calibrated(1)


# -- the surest errors

@KINDS
@pytest.mark.parametrize('k', [3, 10, 10000])
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


@KINDS
@pytest.mark.parametrize('plot', PLOTS)
def test_each_picture_takes_axes_or_makes_its_own(plot, kind):
    draw = getattr(example(kind)[0], plot)
    _, (one, two) = plt.subplots(1, 2)
    n = len(plt.get_fignums())
    assert draw(ax=one) is one and len(plt.get_fignums()) == n and not two.has_data() and one.has_data()
    own = draw()
    assert own not in (one, two) and own.figure is not one.figure and own.has_data() and len(plt.get_fignums()) == n+1
    assert draw().figure is not own.figure and one.get_xlabel() and one.get_ylabel()
    own.figure.canvas.draw()


def texts_of(ax): return [t.get_text() for t in ax.texts] + ([t.get_text() for t in ax.get_legend().get_texts()] if ax.get_legend() else [])


@KINDS
@pytest.mark.parametrize('n_bins', [15, 7])
def test_reliability(kind, n_bins):
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
    z, n = 1.959964, count # Wilson's interval
    half = z/(1+z*z/n)*np.sqrt(accuracy*(1-accuracy)/n+z*z/(4*n*n))
    centre = (accuracy+z*z/(2*n))/(1+z*z/n)
    np.testing.assert_allclose([low, high], [np.minimum(centre-half, accuracy), np.maximum(centre+half, accuracy)], atol=1e-6)


@KINDS
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


@KINDS
@pytest.mark.parametrize('order', [2, 4])
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


@pytest.mark.parametrize('classes', [[0, 1, 2], [3, 0, 2], ['bee', 'dog', 'ant'], ['dog', 1, 'ant'], list(np.arange(3))])
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
    assert re.search('too sure|too modest', words)[0] == ('too sure' if p.max(1).mean() > figures['accuracy'] else 'too modest')
    assert 'NLL' in example('several')[0].summary()
