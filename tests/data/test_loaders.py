"Splits, and images, texts and tables in memory as DataLoaders"
import pickle
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import train_test_split

from fastai_smooth.data import array_dls, digits, random_split, stratified_split, table_dls, text_dls
from fastai_smooth.data.loaders import CachedTokenizer, line_dls


# -- splits

def test_split_is_stratified():
    labels = np.repeat(np.arange(10), 50)
    train, valid = stratified_split(labels, .2, 7)
    expected = train_test_split(np.arange(500), test_size=.2, random_state=7, stratify=labels)
    np.testing.assert_array_equal(train, expected[0])
    np.testing.assert_array_equal(valid, expected[1])
    for f in (lambda: stratified_split(labels, 1.), lambda: random_split(10, 0.)):
        with pytest.raises(ValueError, match='between 0 and 1'): f()


@pytest.mark.parametrize('counts', [(20, 1), (20, 2, 2), (1, 1, 1, 30), (2,)*20, (3, 3, 1, 40), (2, 1)])
def test_rare_classes_are_trained_on(counts):
    "Every class has a training example, whatever is left for validation, and nothing is lost or doubled"
    labels = np.repeat(np.arange(len(counts)), counts)
    train, valid = stratified_split(labels, .2, 0)
    assert sorted([*train, *valid]) == list(range(len(labels))) and set(labels[train]) == set(range(len(counts)))
    assert len(valid) == max(int(np.ceil(.2*sum(c for c in counts if c > 1))), 1) or len(valid) <= len(labels)-len(counts)
    for k in np.flatnonzero(np.array(counts) == 1): assert k not in labels[valid]
    again = stratified_split(labels, .2, 0)
    assert all(np.array_equal(a, b) for a, b in zip((train, valid), again))


def test_one_example_each_cannot_be_split():
    with pytest.raises(ValueError, match='one example'): stratified_split([0, 1, 2])


# -- images

def test_data_follows_its_seed_and_leaves_the_global_one():
    state = random.getstate()
    a, b, c = digits(seed=1), digits(seed=1), digits(seed=2)
    assert random.getstate() == state
    assert torch.equal(a.one_batch()[1], b.one_batch()[1]) and a.train_ds.items != c.train_ds.items


def test_images_stay_with_their_targets():
    "Images that are their own number, as a class, as labels and as a mask, also resized"
    x = np.arange(12, dtype=np.uint8)[:, None, None]*np.ones((12, 8, 8), np.uint8)*20
    hot = (np.arange(12)[:, None] >> np.arange(4)) & 1
    masks = x.astype(np.int64)//20
    for labels, number in ((np.arange(12), lambda y: y), (hot.astype(bool), lambda y: (y*2**torch.arange(4)).sum(1)), (masks, lambda y: y[:, 0, 0])):
        dls = array_dls(x, labels, [str(i) for i in range(12 if labels.ndim != 2 else 4)], (range(8), range(8, 12)), bs=4, size=16)
        for dl, owned in zip(dls.loaders, (set(range(8)), set(range(8, 12)))):
            seen = set()
            for images, y in dl:
                numbers = number(y.as_subclass(torch.Tensor))
                torch.testing.assert_close((images.as_subclass(torch.Tensor)[:, 0, 5, 5]*255/20).round(), numbers.float())
                seen |= set(numbers.int().tolist())
            assert seen == owned


# -- texts

TEXTS = ['the cat sat', 'a Dog ran', 'the dog and the cat', 'a bus', 'the train and the bus', 'late train', 'the bus was late', 'a zebra']


@pytest.mark.parametrize('dtype', [bool, np.int64, np.float32])
def test_several_labels_of_any_dtype_are_no_distribution(dtype):
    "Rows that sum to 1 are one; of the others each label stays whole, in images and in texts"
    y = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]]).astype(dtype)
    splits, shares = ([0, 1], [2, 3]), np.full((4, 3), 1/3)
    images, texts = np.zeros((4, 8, 8), np.uint8), ['a b', 'b c', 'c', 'a']
    for make in (lambda q: array_dls(images, q, list('abc'), splits, 2), lambda q: text_dls(texts, q, list('abc'), splits, 2)):
        for got, q in ((make(y).valid, y), (make(shares).valid, shares)):
            rows = sorted(got.one_batch()[1].tolist())
            np.testing.assert_allclose(rows, sorted(q[2:].astype(float).tolist()), rtol=1e-6)


def test_texts_are_read_as_fastai_reads_them():
    hot = np.array([[1, 0], [1, 0], [1, 1], [0, 1], [0, 0], [0, 1], [0, 1], [1, 0]], bool)
    for labels in (np.array([0, 0, 0, 1, 1, 1, 1, 0]), hot):
        dls = text_dls(TEXTS, labels, ['pets', 'traffic'], (range(6), (6, 7)), bs=2)
        words, classes = dls.vocab
        assert list(classes) == ['pets', 'traffic'] and 'zebra' not in words and 'cat' in words
        found = {}
        for dl in dls.loaders:
            for x, y in dl:
                for row, label in zip(x.tolist(), y.tolist()): found[' '.join(words[i] for i in row if words[i] not in ('xxpad',))] = label
        for text, label in zip(TEXTS[:6] if labels.ndim == 1 else TEXTS, labels.tolist()):
            tokens = ['xxbos', *(t for w in text.split() for t in (['xxmaj', w.lower()] if w[0].isupper() else [w]))]
            shown = ' '.join(t if t in words else 'xxunk' for t in tokens)
            if shown in found and shown.count('xxunk') == 0: assert found[shown] == label, text
        assert len(dls.valid_ds) == 2 and any('xxunk' in t for t in found)


def test_texts_are_cut_once_and_stay_at_home(monkeypatch):
    tokenizer, counted = CachedTokenizer(3), []
    cut = tokenizer.tok
    tokenizer.tok = lambda texts: cut(counted.append(t) or t for t in texts)
    assert [len(t) for t in tokenizer.cut(TEXTS+TEXTS)] == [3]*16 and len(counted) == len(TEXTS)
    tokenizer('the cat sat'), tokenizer('the cow')
    assert len(counted) == len(TEXTS)+1
    tokenizer.tok = cut
    assert b'zebra' not in pickle.dumps(tokenizer)


def test_lines_for_a_language_model():
    x, y = line_dls(TEXTS*40, (range(300), range(300, 320)), bs=4, seq_len=10).one_batch()
    assert x.shape == (4, 10) and torch.equal(x[:, 1:].as_subclass(torch.Tensor), y[:, :-1].as_subclass(torch.Tensor))


# -- tables

def test_tables_with_gaps_and_words():
    "Numbers are normalised and filled by the training rows, in every column that has a gap anywhere"
    n = 40
    table = pd.DataFrame(dict(a=np.arange(n)*1., b=np.arange(n)[::-1]*2., word=['x', 'y']*20, few=[1, 2, 3, 4]*10))
    table.loc[35, 'a'] = np.nan  # in a validation row only
    train, valid = np.arange(30), np.arange(30, 40)
    with warnings.catch_warnings():
        warnings.simplefilter('error', pd.errors.PerformanceWarning)
        dls = table_dls(table, [i % 2 for i in range(n)], ['no', 'yes'], (train, valid), bs=10)
    assert list(dls.cont_names) == ['a', 'b'] and list(dls.cat_names) == ['word', 'few', 'a_na'] and list(dls.vocab) == ['no', 'yes']
    words, numbers, y = dls.valid.one_batch()
    values = np.array([v if v == v else np.median(np.arange(30)) for v in table['a'][valid]])
    np.testing.assert_allclose(numbers[:, 0], (values-np.arange(30).mean())/np.arange(30).std(), rtol=1e-5)
    assert y[:, 0].tolist() == [i % 2 for i in valid] and words[5, 2] != words[4, 2]
