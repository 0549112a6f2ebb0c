"Votes, counts and probabilities as labels; annotators and their confusions"
import time

import fastai.vision.learner  # noqa: F401  (teaches show_results to draw grids of images)
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.block import DataBlock
from fastai.data.transforms import ColReader, IndexSplitter
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.data import ImageBlock
from PIL import Image
from torch import nn

from fastai_smooth.callback import LabelSmoothing
from fastai_smooth.calibration import ECE, TemperatureScaling
from fastai_smooth.data import DawidSkene, SoftCategoryBlock, TensorSoftCategory, digits_arrays, top_accuracy, top_class
from fastai_smooth.data.soft_labels import shares_of
from fastai_smooth.distributions import ClassPrior

VOCAB = ['cat', 'dog', 'horse']


@pytest.mark.parametrize('label, expected', [
    ('cat', [1, 0, 0]), ('cat; dog', [.5, .5, 0]), (['dog', 'dog', 'horse'], [0, 2/3, 1/3]), (['dog', float('nan')], [0, 1, 0]),
    (dict(cat=3, dog=1), [.75, .25, 0]),
    (dict(cat=.2, dog=.8), [.2, .8, 0]), ([1, 1, 2], [.25, .25, .5]), (np.array([.1, .2, .7]), [.1, .2, .7]), (torch.tensor([0., 1., float('nan')]), [0, 1, 0]),
    ((.333, .333, .333), [1/3]*3)])
def test_forms_of_a_label(label, expected): np.testing.assert_allclose(shares_of(label, VOCAB), expected)


@pytest.mark.parametrize('label, words', [
    ('cat;cow', "vote for 'cow'"), (dict(cow=1), "'cow'"), ('', 'no votes'), ([float('nan')]*3, 'no votes'), ([0, 0, 0], 'no votes'),
    ([.5, .2, .1], 'sums to 0.8'), ([1, -1, 1], 'below 0'), ([.5, .5], '2 numbers, but there are 3')])
def test_labels_that_are_none(label, words):
    with pytest.raises(ValueError, match=words): shares_of(label, VOCAB)


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    "200 digits with three votes each, as strings and as columns of counts"
    folder = tmp_path_factory.mktemp('votes')
    images, labels, _ = digits_arrays()
    rng = np.random.default_rng(0)
    votes = np.stack([np.where(rng.random(200) < .3, rng.integers(0, 10, 200), labels[:200]) for _ in range(3)], 1)
    for i in range(200): Image.fromarray(images[i]).save(folder/f'{i}.png')
    counts = np.stack([(votes == k).sum(1) for k in range(10)], 1)
    return pd.DataFrame(dict(file=[str(folder/f'{i}.png') for i in range(200)], votes=[';'.join(f'n{v}' for v in row) for row in votes],
                             **{f'n{k}': counts[:, k] for k in range(10)}))


NAMES = [f'n{k}' for k in range(10)]


def loaders(table, label='votes', vocab=None):
    block = DataBlock((ImageBlock, SoftCategoryBlock(vocab)), get_x=ColReader('file'), get_y=ColReader(label), splitter=IndexSplitter(range(150, 200)))
    return block.dataloaders(table, bs=50, num_workers=0)


@pytest.mark.parametrize('label, vocab', [('votes', None), ('votes', NAMES[::-1]), (NAMES, NAMES)])
def test_votes_in_a_data_block(label, vocab, table):
    dls = loaders(table, label, vocab)
    assert list(dls.vocab) == (vocab or NAMES) and dls.c == 10
    x, y = dls.valid.one_batch()
    assert isinstance(y, TensorSoftCategory) and y.dtype == torch.float32 and y.shape == (50, 10)
    expected = table[list(dls.vocab)].to_numpy()[150:]/3
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-6)
    top = expected.argmax(1)
    np.testing.assert_array_equal(top_class(y).numpy(), top)
    shown = [str(dls.valid.decode_batch((x, y), max_n=50)[i][1]) for i in range(5)]
    for text, k, row in zip(shown, top, expected): assert text == (dls.vocab[k] if row[k] > .995 else f'{dls.vocab[k]} {row[k]:.0%}')
    np.testing.assert_allclose(np.asarray(ClassPrior.from_dls(dls).counts), table[list(dls.vocab)].to_numpy()[:150].sum(0)/3, rtol=1e-5)


def test_a_learner_of_votes(table, tmp_path):
    dls = loaders(table)
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    own, theirs = Learner(dls, make(), metrics=[top_accuracy, ECE()]), Learner(dls, make(), loss_func=CrossEntropyLossFlat(), cbs=LabelSmoothing(.1))
    with own.no_bar(), own.no_logging(): own.fit(1, 1e-2)
    with theirs.no_bar(), pytest.raises(ValueError, match='Use a loss for both, such as LabelSmoothingCrossEntropy'): theirs.fit(1, 1e-2)
    with own.no_bar():
        preds, targets = own.get_preds()
        loss = own.validate()
        own.show_results(max_n=4, show=False)
        own.path = tmp_path
        TemperatureScaling(own).fit()
        own.export('x.pkl')
    z = preds.log().double()
    assert loss[0] == pytest.approx(-(targets.double()*z).sum(1).mean().item(), rel=1e-4)
    assert loss[1] == pytest.approx((preds.argmax(1) == targets.argmax(1)).float().mean().item())
    learn = load_learner(tmp_path/'x.pkl')
    with learn.no_bar(): name, k, p = learn.predict(table['file'][0])
    assert name == learn.dls.vocab[int(k)] and p.shape == (10,) and p.sum() == pytest.approx(1, abs=1e-5)


# -- annotators

def expectation_maximisation(votes, k, alpha, n_iter):
    "Dawid and Skene in loops"
    n, a = votes.shape
    p = np.array([[sum(v == c for v in row if v >= 0)/sum(v >= 0 for v in row) for c in range(k)] for row in votes])

    def errors():
        prior = np.array([(sum(p[i, c] for i in range(n))+alpha/k)/(n+alpha) for c in range(k)])
        m = np.zeros((a, k, k))
        for who in range(a):
            for c in range(k):
                for v in range(k): m[who, c, v] = sum(p[i, c] for i in range(n) if votes[i, who] == v) + alpha*((c == v)+1/k)/2
                m[who, c] /= m[who, c].sum()
        return prior, m
    prior, m = errors()
    for _ in range(n_iter):
        for i in range(n):
            for c in range(k): p[i, c] = prior[c]*np.prod([m[who, c, votes[i, who]] for who in range(a) if votes[i, who] >= 0])
            p[i] /= p[i].sum()
        prior, m = errors()
    return p, m


def test_as_in_loops():
    rng = np.random.default_rng(0)
    votes = rng.integers(-1, 3, (30, 4))
    votes[:, 0] = rng.integers(0, 3, 30)
    for alpha in (.1, 1.):
        ds, (p, m) = DawidSkene(votes, 3, alpha).fit(5, tol=-np.inf), expectation_maximisation(votes, 3, alpha, 5)
        np.testing.assert_allclose(ds.probabilities, p, rtol=1e-8)
        np.testing.assert_allclose(ds.confusion, m, rtol=1e-8)


def test_names_and_gaps():
    "A table of names is the matrix of their numbers, and annotators who were never asked harm nobody"
    frame = pd.DataFrame(dict(ann=['a', 'b', 'b', None], bob=['a', 'b', 'a', 'a'], eve=[None, None, 'b', 'a']))
    ds, same = DawidSkene(frame).fit(), DawidSkene(np.array([[0, 0, np.nan], [1, 1, np.nan], [1, 0, 1], [np.nan, 0, 0]])).fit()
    np.testing.assert_array_equal(ds.probabilities, same.probabilities)
    assert ds.vocab == ['a', 'b'] and ds.annotators == ['ann', 'bob', 'eve'] and len(ds.plot()) == 3
    again = DawidSkene(frame).fit()
    assert np.array_equal(again.probabilities, ds.probabilities) and np.isfinite(ds.confusion).all()


def test_annotators_are_known_by_their_errors():
    _, true, _ = digits_arrays()
    rng, n, rates = np.random.default_rng(2), 1797, (.1, .3, .5)
    votes = np.stack([np.where(rng.random(n) < r, (true+rng.integers(1, 10, n)) % 10, true) for r in rates], 1)
    ds = DawidSkene(votes).fit()
    expected = np.stack([np.full((10, 10), r/9)+np.eye(10)*(1-r-r/9) for r in rates])
    majority = np.array([np.bincount(v, minlength=10).argmax() for v in votes])
    assert abs(ds.confusion-expected).mean() < .03 and (ds.labels == true).mean() > (majority == true).mean()


def test_a_hundred_thousand_items_in_seconds():
    votes = np.random.default_rng(0).integers(0, 10, (100_000, 10))
    start = time.perf_counter()
    DawidSkene(votes).fit(10, tol=-np.inf)
    assert time.perf_counter()-start < 20


@pytest.mark.parametrize('votes, kwargs, words', [([[0, 1], [-1, -1]], {}, 'Nobody has voted on item 1'), ([[0], [1]], {}, 'at least two'),
                                                  ([[0, 5], [1, 1]], dict(n_classes=3), 'class 5, but there are 3')])
def test_votes_that_are_none(votes, kwargs, words):
    with pytest.raises(ValueError, match=words): DawidSkene(votes, **kwargs)
