"Suspect labels of a learner's training set; the learner stays as it was"
import copy
import random

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.tabular.learner import tabular_learner

import fastai_smooth.calibration.label_issues  # noqa: F401
from fastai_smooth.callback import LabelSmoothing
from fastai_smooth.data import array_dls, digit_masks, docstrings, embedded_table, multi_digits, small_convnet
from fastai_smooth.data import small_segmenter, text_network
from learners import Look, make_learner


def quiet(learn, *args, **kwargs):
    with learn.no_bar(): return learn.find_label_issues(*args, **kwargs)


def test_the_learner_stays_as_it_was():
    learn = make_learner(cbs=[MixUp(), LabelSmoothing(.1), Look()], n=40).remove_cb(ProgressCallback)  # `no_bar` makes a new one
    attributes, weights = dict(vars(learn)), copy.deepcopy(learn.model.state_dict())
    loaders = [dict(vars(dl)) for dl in learn.dls.loaders]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), *(dl.rng.getstate() for dl in learn.dls.loaders)  # noqa: NPY002

    class Fails(Callback):
        def after_step(self): raise KeyboardInterrupt
    for fails in (False, True):
        if fails: learn.add_cb(Fails())
        try: issues = quiet(learn, 2, 1)
        except KeyboardInterrupt: assert fails
        if fails: learn.remove_cb(Fails)
        after = torch.get_rng_state(), np.random.get_state()[1], random.getstate(), *(dl.rng.getstate() for dl in learn.dls.loaders)  # noqa: NPY002
        for a, b in zip(states, after): assert np.array_equal(a, b) if not isinstance(a, tuple) else a == b
        assert {k: v for k, v in vars(learn).items() if k != 'fails'} == attributes
        assert [dict(vars(dl)) for dl in learn.dls.loaders] == loaders
        for k, v in learn.model.state_dict().items(): assert torch.equal(v, weights[k])
    assert issues.probs.shape == (40, 4) and np.array_equal(issues.labels, [int(y) for _, y in learn.dls.train_ds])


def test_probabilities_are_of_models_that_have_not_seen_the_example():
    "Labels drawn at random cannot be known: a network that learns by heart agrees with a tenth of them"
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (200, 8, 8), dtype=np.uint8), np.arange(200) % 10
    dls = array_dls(images, labels, list('0123456789'), (range(160), range(160, 200)), bs=16)
    learn = Learner(dls, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)),
                    loss_func=CrossEntropyLossFlat(), lr=1e-2)
    issues = quiet(learn, 4, 10)
    assert (issues.probs.argmax(1) == issues.labels).mean() < .2
    np.testing.assert_allclose(issues.probs.sum(1), 1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['several', 'table', 'texts'])
def test_other_data(kind):
    if kind == 'several': learn = Learner(multi_digits(n_train=300, n_valid=40), small_convnet(1, 10), loss_func=BCEWithLogitsLossFlat())
    elif kind == 'table': learn = tabular_learner(embedded_table('wine', bs=16), layers=[20], loss_func=CrossEntropyLossFlat(), lr=3e-2)
    else:
        dls = docstrings()
        learn = Learner(dls, text_network(len(dls.vocab[0]), 4), loss_func=CrossEntropyLossFlat(), lr=1e-2)
    issues = quiet(learn, 3, 3)
    right = (issues.probs > .5) == issues.labels if kind == 'several' else issues.probs.argmax(1) == issues.labels
    assert len(issues.labels) == len(learn.dls.train_ds) and right.mean() > .6, right.mean()


def test_what_is_refused():
    learn = make_learner(n=40)
    for kwargs, words in ((dict(k=1), 'at least 2'), (dict(k=30), 'rarest class')):
        with pytest.raises(ValueError, match=words): quiet(learn, **kwargs)
    masks = digit_masks(n_train=40, n_valid=8, bs=8)
    with pytest.raises(ValueError, match='pixels'): quiet(Learner(masks, small_segmenter(1, 11), loss_func=CrossEntropyLossFlat(axis=1)))
