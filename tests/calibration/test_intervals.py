"Bootstrap intervals: whole examples are drawn, and the intervals hold what they should"
import random
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from calibration_oracles import decisions, ece_loop, example_of_kind, single
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from scipy.stats import binomtest

from fastai_smooth.calibration import Predictions, calibrated_error, calibration_test, intervals
from fastai_smooth.calibration.intervals import wilson
from fastai_smooth.losses import LabelSmoothingBCE

NAMES = ['accuracy', 'nll', 'ece', 'adaptive_ece', 'classwise_ece', 'mce', 'brier', 'aurc']
KINDS = pytest.mark.parametrize('kind', ['index', 'soft', 'several', 'mask'])


def test_wilson():
    for right, n in ((0, 1), (5, 9), (300, 300)):
        np.testing.assert_allclose(wilson(right/n, n), binomtest(right, n).proportion_ci(method='wilson'), rtol=1e-6, atol=1e-12)


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


@pytest.mark.slow
@KINDS
def test_intervals_are_those_of_a_bootstrap_of_examples(kind):
    predictions, p, q, numbers, binary = example_of_kind(kind, 400 if kind == 'mask' else 90)  # ten pixels each: 40 masks
    got = intervals(predictions, ['accuracy', 'nll', 'ece', 'brier'], n_boot=600)
    *means, (low, high) = bootstrap(p, q, numbers, binary)
    for name, (a, b) in zip(('accuracy', 'nll', 'brier'), means):
        np.testing.assert_allclose([got[f'{name}_low'], got[f'{name}_high']], [a, b], atol=.15*(b-a))
    np.testing.assert_allclose(got['ece_high']-got['ece_low'], high-low, rtol=.3)


def test_the_pixels_of_a_mask_stay_together():
    "Masks that are all right or all wrong: 24 examples, not 24*64 pixels"
    z, y = torch.randn(24, 3, 8, 8), torch.zeros(24, 8, 8).long()
    z[:12, 0] += 50
    z[12:, 1] += 50
    y[0, 1:] = -100
    got = intervals(Predictions.of(z, y, CrossEntropyLossFlat(axis=1)), ['accuracy'])
    half = 1.96*np.sqrt(.25/24)
    np.testing.assert_allclose([got['accuracy_low'], got['accuracy_high']], [got['accuracy']-half, got['accuracy']+half], atol=.06)


@pytest.mark.slow
@pytest.mark.parametrize('factor', [1., 3.])
@pytest.mark.parametrize('seed', range(2))
def test_intervals_hold_the_figure(seed, factor):
    "Also of the calibration errors, which resampling can only make larger"
    torch.manual_seed(seed)
    z, y = single(200, factor=factor)
    got = intervals(Predictions.of(z, y, CrossEntropyLossFlat()))
    assert list(got) == [f'{n}{s}' for n in NAMES for s in ('', '_low', '_high')]
    assert not {n: got[n] for n in NAMES if not 0 <= got[f'{n}_low'] <= got[n] <= got[f'{n}_high']}


def test_intervals_go_by_their_seed_alone():
    predictions = example_of_kind('index')[0]
    states = lambda: [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()] # noqa: NPY002
    before = states()
    one = intervals(predictions, ['ece'], n_boot=30)
    assert states() == before
    set_seed(9)
    assert one == intervals(predictions, ['ece'], n_boot=30)
    other = intervals(predictions, ['ece'], n_boot=30, seed=1)
    assert one['ece'] == other['ece'] and one['ece_low'] != other['ece_low']


def test_a_single_example_and_no_bootstrap():
    z, y = single(1)
    got = intervals(Predictions.of(z, y, CrossEntropyLossFlat()), n_boot=5)
    assert all(np.isnan([got[f'{n}_low'], got[f'{n}_high']]).all() for n in NAMES[1:]), "one example does not say how far others are from it"
    np.testing.assert_allclose([got['accuracy_low'], got['accuracy_high']], wilson(got['accuracy'], 1))
    none = intervals(example_of_kind('index')[0], n_boot=0)
    assert np.isfinite([none[n] for n in NAMES]).all() and np.isnan([none[f'{n}_{e}'] for n in NAMES for e in ('low', 'high')]).all()


# -- what a calibrated model would show

def calibrated(n, seed=0, k=5):
    g = torch.Generator().manual_seed(seed)
    z = 2*torch.randn(n, k, generator=g)
    return z, torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]


def test_the_error_of_a_calibrated_model_is_that_of_drawn_labels():
    "For each metric, against figures of labels drawn with numpy"
    z, _ = calibrated(150)
    predictions = Predictions.of(3*z, z.argmin(1), CrossEntropyLossFlat())
    names, rng, p = ['ece', 'adaptive_ece', 'classwise_ece', 'mce', 'smooth_ece'], np.random.default_rng(0), predictions.p.numpy()
    got = calibrated_error(predictions, names, 60)
    drawn = [Predictions.of(3*z, torch.tensor([rng.choice(5, p=row/row.sum()) for row in p]), CrossEntropyLossFlat()).figures(names) for _ in range(60)]
    for name in names:
        each = [d[name] for d in drawn]
        assert abs(got[name]-np.mean(each)) < 4*np.std(each)*(2/60)**.5
    q = torch.full((40, 3), torch.nan)
    q[:30, :2] = 1.
    assert 0 < calibrated_error(Predictions.of(torch.randn(40, 3), q, LabelSmoothingBCE(.1)), ['ece'])['ece'] < .5


def test_p_values():
    z, y = calibrated(400)
    p = z.softmax(1)
    assert calibration_test((2*z).softmax(1), y) == 1/1000 and calibration_test(p, y) > .02
    assert calibration_test(p, y, 99) == calibration_test(p.numpy(), y.numpy(), 99)
    multi, answers = torch.rand(200, 3), torch.full((200, 3), torch.nan)
    answers[:, 0] = torch.bernoulli(multi[:, 0])
    assert calibration_test(multi, answers, 99) == calibration_test(multi[:, 0], answers[:, 0], 99)
    for bad, labels in ((z, y), (p, y[:5]), (p, y+1), (multi, answers*torch.nan)):
        with pytest.raises(ValueError): calibration_test(bad, labels)


def false_alarms(n, runs, draws):
    "With 39 draws two of 40 ranks have p ≤ .05"
    data = (calibrated(n, seed) for seed in range(runs))
    return np.mean([calibration_test(z.softmax(1), y, draws, seed=seed) <= .05 for seed, (z, y) in enumerate(data)])


def test_few_false_alarms():
    assert false_alarms(500, 200, 39) < .1


@pytest.mark.slow
@pytest.mark.parametrize('n', [500, 2000])
def test_false_alarms_are_five_percent(n):
    assert false_alarms(n, 1000, 39) == pytest.approx(.05, abs=.015)


coverage = runpy.run_path(str(Path(__file__).parents[1]/'benchmarks'/'coverage.py'))
MODEL = pytest.mark.parametrize('model', ['right 75%, overconfident', 'right 95%, calibrated'])


@pytest.mark.slow
@MODEL
@pytest.mark.parametrize('n, runs', [(200, 300), (1000, 200)])
def test_intervals_hold_the_truth_as_often_as_they_say(n, model, runs):
    held = coverage['coverage'](n, *coverage['MODELS'][model], runs)
    assert all(.92 <= v <= .98 for v in held.values()), held


@pytest.mark.slow
@pytest.mark.parametrize('masks', [8, 24])
def test_accuracies_of_few_masks_hold_the_truth(masks):
    assert .92 <= coverage['coverage_of_masks'](masks, runs=200) <= .98
