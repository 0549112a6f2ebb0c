"Suspect labels: the same as cleanlab finds, and what is made of them"
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from fastai_smooth.data import corrupt_labels, digits_arrays, find_label_issues
from fastai_smooth.data.label_issues import FILTERS, confident_joint


def noisy_digits(rate=.2, seed=0):
    images, true, _ = digits_arrays()
    given, t, flipped = corrupt_labels(true, rate, n_classes=10, seed=seed)
    probs = cross_val_predict(LogisticRegression(C=.05, max_iter=200), images.reshape(len(images), -1)/255, given.numpy(), cv=3, method='predict_proba')
    return given.numpy(), probs, flipped.numpy(), t.numpy()


@pytest.mark.filterwarnings('ignore:May not flag')
@pytest.mark.parametrize('filter_by', FILTERS)
def test_the_same_as_cleanlab(filter_by):
    count, find = pytest.importorskip('cleanlab.count'), pytest.importorskip('cleanlab.filter').find_label_issues
    cases = [noisy_digits()[:2]]
    rng = np.random.default_rng(1)
    for n, k in ((40, 3), (200, 6), (12, 4)):  # few examples per class, classes that are hardly ever right, ties
        labels = np.concatenate([np.arange(k), rng.integers(0, k, n-k)])
        probs = rng.dirichlet(np.full(k, .5), n).round(2)
        probs[:, 0] += 1-probs.sum(1)
        cases.append((labels, np.abs(probs)/np.abs(probs).sum(1, keepdims=True)))
    for labels, probs in cases:
        np.testing.assert_array_equal(confident_joint(labels, probs), count.compute_confident_joint(labels, probs))
        np.testing.assert_array_equal(find_label_issues(labels, probs, filter_by=filter_by).mask, find(labels, probs, filter_by=filter_by, n_jobs=1))


def test_what_is_made_of_suspects():
    given, probs, flipped, t = noisy_digits()
    issues = find_label_issues(given, probs, [f'n{i}' for i in range(10)])
    assert flipped[issues.mask].mean() > .8 and issues.mask[flipped].mean() > .85 and abs(issues.noise_matrix-t).mean() < .02
    table = issues.table
    assert list(table) == ['index', 'given', 'suggested', 'self_confidence'] and len(table) == issues.mask.sum()
    assert table.self_confidence.is_monotonic_increasing
    for _, row in table[:20].iterrows():
        i = row['index']
        assert row.given == f'n{given[i]}' and row.suggested == f'n{probs[i].argmax()}' and row.self_confidence == probs[i, given[i]]
    assert set(issues.drop()) == set(range(len(given))) - set(table['index']) and issues.joint.sum() == pytest.approx(1)
    for mix in (0., .3, 1.):
        soft = issues.relabel(mix)
        for i in (*table['index'][:5], *issues.drop()[:5]):
            hot = [float(k == given[i]) for k in range(10)]
            expected = [(1-mix)*h+mix*p for h, p in zip(hot, probs[i])] if issues.mask[i] else hot
            np.testing.assert_allclose(soft[i], expected)
    with pytest.raises(ValueError, match='mix must lie'): issues.relabel(2)
    images = digits_arrays()[0]
    assert issues.plot_suspects(images, 10).size == 16 and issues.plot_suspects(lambda i: images[i], 3).size == 3 and issues.plot_noise_matrix() is not None


def test_several_labels_are_questions_of_their_own():
    rng = np.random.default_rng(0)
    probs = rng.beta(.3, .3, (300, 4))
    labels = rng.random((300, 4)) < probs
    flipped = rng.random((300, 4)) < .1
    issues = find_label_issues(labels ^ flipped, probs, list('abcd'))
    for k in range(4):
        alone = find_label_issues((labels ^ flipped)[:, k].astype(int), np.stack([1-probs[:, k], probs[:, k]], 1))
        np.testing.assert_array_equal(issues.mask[:, k], alone.mask)
    row = issues.table.iloc[0]
    assert row.label in 'abcd' and row.given != row.suggested and issues.relabel(.5).shape == (300, 4)
    with pytest.raises(ValueError, match='no joint'): _ = issues.joint


@pytest.mark.parametrize('labels, probs, kwargs, words', [
    ([0, 1], [[2., -1.], [0., 3.]], {}, 'not logits'), ([0, 7], [[.2, .8], [.5, .5]], {}, 'Label 7'), ([0, 1], [[.2, .2], [.5, .5]], {}, 'sum to 0.4'),
    ([0, 1], [[.2, .8], [np.nan, .5]], {}, 'not logits'), ([0, 1, 1], [[.2, .8], [.5, .5]], {}, 'shapes'),
    ([0, 1], [[.2, .8], [.5, .5]], dict(filter_by='all'), "one of prune_by_noise_rate")])
def test_what_is_refused(labels, probs, kwargs, words):
    with pytest.raises(ValueError, match=words): find_label_issues(labels, probs, **kwargs)
