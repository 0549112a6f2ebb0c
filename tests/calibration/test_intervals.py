"Bootstrap intervals: whole examples are drawn, and the intervals hold what they should"
import random

import numpy as np
import pytest
import torch
from calibration_oracles import decisions, ece_loop, example_of_kind, single
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from scipy.stats import binomtest

from fastai_smooth.calibration import Predictions
from fastai_smooth.calibration.intervals import intervals, wilson

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
    predictions, p, q, numbers, binary = example_of_kind(kind)
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
    one = intervals(predictions, ['nll'], n_boot=30)
    assert states() == before
    set_seed(9)
    assert one == intervals(predictions, ['nll'], n_boot=30)
    other = intervals(predictions, ['nll'], n_boot=30, seed=1)
    assert one['nll'] == other['nll'] and one['nll_low'] != other['nll_low']


def test_a_single_example_and_no_bootstrap():
    z, y = single(1)
    got = intervals(Predictions.of(z, y, CrossEntropyLossFlat()), n_boot=5)
    assert got['nll_low'] == got['nll'] == got['nll_high']
    none = intervals(example_of_kind('index')[0], n_boot=0)
    assert np.isfinite([none[n] for n in NAMES]).all() and np.isnan([none[f'{n}_{e}'] for n in NAMES for e in ('low', 'high')]).all()
