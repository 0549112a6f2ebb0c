"One run's figures against loops: every example once, as trained and after a temperature that the others have fitted"
import math

import numpy as np
import pytest
import torch

from fastai_smooth.compare import score
from fastai_smooth.compare.scores import METRICS, MORE, after_temperature, at_best_epoch, predictions_of, score_all


def naive(probs, labels):
    "Loops: accuracy, nll, ece (15 bins of the top confidence), brier, aurc (distinct confidences)"
    n, right, nll, brier, bins, order = len(labels), 0, 0., 0., {}, []
    for p, y in zip(probs.tolist(), labels.tolist()):
        top = max(range(len(p)), key=p.__getitem__)
        right += top == y
        nll -= math.log(p[y])
        brier += sum((v-(k == y))**2 for k, v in enumerate(p))
        bins.setdefault(min(int(p[top]*15), 14), []).append((p[top], top == y))
        order.append((-p[top], top != y))
    ece = sum(abs(sum(c for c, _ in b)-sum(r for _, r in b)) for b in bins.values())/n
    wrong, risks = 0, []
    for i, (_, w) in enumerate(sorted(order), 1):
        wrong += w
        risks.append(wrong/i)
    return dict(accuracy=right/n, nll=nll/n, ece=ece, brier=brier/n, aurc=sum(risks)/n)


def softmax(z):
    e = np.exp(z-z.max(1, keepdims=True))
    return e/e.sum(1, keepdims=True)


def made(n=400, k=6, scale=1.):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(n, k))
    return scale*z, np.array([rng.choice(k, p=p) for p in softmax(z)])


@pytest.mark.parametrize('scale', [.5, 4.])
def test_figures_against_loops(scale):
    z, y = made(scale=scale)
    figures, examples = score_all(z, y)
    assert list(figures) == METRICS+MORE and list(score(z, y)) == METRICS
    for k, v in naive(softmax(z), y).items(): assert figures[k] == pytest.approx(v, abs=1e-6), k
    after, folds = after_temperature(predictions_of(z, y))
    t = (torch.as_tensor(z)/after.z).nanmedian(1).values.numpy()  # the temperature of each example
    assert len(folds) == 5 and set(np.round(t, 6)) == set(np.round(folds, 6))
    scaled = naive(softmax(z/t[:, None]), y)
    for k in ('nll', 'ece', 'brier'): assert figures[f'{k}_ts'] == pytest.approx(scaled[k], abs=1e-6), k
    assert examples['nll_ts'].mean() == pytest.approx(figures['nll_ts']) and examples['accuracy'].mean() == pytest.approx(figures['accuracy'])
    assert figures['temperature'] == pytest.approx(scale, rel=.25)
    f = np.bincount(y)/len(y)
    assert figures['nll_chance'] == pytest.approx(-(f*np.log(f)).sum()) and figures['at_bound'] == 0


def test_ece_of_a_calibrated_model_is_its_mean_over_draws():
    z, y = made(300)
    p, rng = softmax(z), np.random.default_rng(1)
    draws = [naive(p, np.array([rng.choice(6, p=row) for row in p]))['ece'] for _ in range(60)]
    assert score_all(z, y)[0]['ece_null'] == pytest.approx(np.mean(draws), rel=.12)


def test_pixels_are_scored_by_image():
    "Folds keep an image whole, and an image contributes the mean of its pixels"
    z, y = made(600)
    items = np.repeat(np.arange(30)[::-1], 20)
    after, _ = after_temperature(predictions_of(z, y), items)
    t = (torch.as_tensor(z)/after.z).nanmedian(1).values.numpy()
    assert all(np.ptp(t[items == i]) < 1e-9 for i in range(30))
    examples = score_all(z, y, items)[1]
    p = softmax(z/t[:, None])[np.arange(600), y]
    np.testing.assert_allclose(examples['nll_ts'], [-np.log(p[items == i]).mean() for i in range(30)], rtol=1e-6)


def test_several_labels():
    rng = np.random.default_rng(0)
    z = 2*rng.normal(size=(300, 3))
    y = rng.random((300, 3)) < 1/(1+np.exp(-z))
    figures, examples = score_all(z, y)
    p = 1/(1+np.exp(-z))
    assert figures['nll'] == pytest.approx(-np.log(np.where(y, p, 1-p)).mean(), rel=1e-6) and figures['accuracy'] == pytest.approx(((z > 0) == y).mean())
    assert examples['accuracy'].shape == (300,) and examples['nll_ts'].mean() == pytest.approx(figures['nll_ts'])


def test_what_cannot_be_told_is_marked():
    y = np.arange(40) % 4
    figures = score_all(20.*np.eye(4)[y], y)[0]
    assert figures['untold'] == 1 and figures['accuracy'] == 1 and figures['nll_ts'] < .01


def test_the_best_epoch_is_that_of_the_other_folds():
    "An example never chooses for itself, and epochs that diverged are not chosen"
    z, y = made(200, 4, 3.)
    kept = at_best_epoch(np.stack([.1*np.random.default_rng(1).normal(size=z.shape), z, -z, np.full_like(z, np.nan)]), y)
    np.testing.assert_array_equal(kept, z)
    y = np.r_[np.zeros(9, int), 1]
    first, second = (4.*np.eye(2)[[k]*10] for k in (0, 1))  # the second is right about the last example alone, and nobody asks that one
    np.testing.assert_array_equal(at_best_epoch(np.stack([second, first]), y), first)
    np.testing.assert_array_equal(at_best_epoch(np.full((2, 10, 2), np.nan), y), np.full((10, 2), np.nan))
