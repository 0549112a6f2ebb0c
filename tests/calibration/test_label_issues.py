"Suspect labels of a learner's training set; the learner stays as it was"
import copy
import random

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import combined_cos
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.tabular.learner import tabular_learner
from torch.nn import functional as F

from fastai_smooth.calibration import label_issues
from fastai_smooth.callback import LabelSmoothing
from fastai_smooth.data import array_dls, digit_masks, docstrings, embedded_table, multi_digits, small_convnet
from fastai_smooth.data import small_segmenter, text_network
from learners import Items, Look, make_learner


def quiet(learn, *args, **kwargs):
    with learn.no_bar(): return learn.find_label_issues(*args, **kwargs)


def test_the_learner_stays_as_it_was():
    check_unchanged(make_learner(cbs=[MixUp(), LabelSmoothing(.1), Look()], n=40).remove_cb(ProgressCallback), 4)  # `no_bar` makes a new one
    check_unchanged(frozen_learner(n=40).remove_cb(ProgressCallback), 3)


def check_unchanged(learn, classes):
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
    assert issues.probs.shape == (40, classes) and np.array_equal(issues.labels, [int(y) for _, y in learn.dls.train_ds])


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


class Body(torch.nn.Module):
    "Gives two tensors, and counts how many rows went through"
    rows = 0
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 8)

    def forward(self, x):
        Body.rows += len(x)
        return torch.tanh(self.linear(x)), x


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(14, 3)

    def forward(self, features): return self.linear(torch.cat(features, 1))


def frozen_learner(n=48, bs=8, **kwargs):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 6, generator=g), torch.arange(n) % 3
    dls = DataLoaders(*(TfmdDL(Items(zip(x, y)), bs=bs, shuffle=s, num_workers=0, device='cpu') for s in (True, False)))
    torch.manual_seed(0)
    learn = Learner(dls, torch.nn.Sequential(Body(), Head()), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.5,
                    splitter=lambda m: [list(p.parameters()) for p in m], **kwargs)
    learn.freeze()
    return learn


def test_a_frozen_body_is_passed_once_for_all_parts(monkeypatch):
    "Against a loop over batches and parts in plain torch, which takes the items in the same order"
    learn, k, epochs, orders = frozen_learner(), 3, 2, []
    monkeypatch.setattr(Body, 'rows', 0)
    ordered = label_issues._Part.ordered
    monkeypatch.setattr(label_issues._Part, 'ordered', lambda self, idxs: orders.append((self.shuffle, ordered(self, idxs))) or orders[-1][1])
    issues = quiet(learn, k, epochs)
    assert Body.rows == 48*(1+epochs+1)  # the labels are read, the trainings, what the heads say of their parts
    x, y = (torch.stack(t) for t in zip(*list(learn.dls.train_ds)))
    parts = label_issues.folds(y.numpy(), k)
    order = torch.tensor([idxs for shuffled, idxs in orders if shuffled]).view(epochs, -1, 8)
    assert all(sorted(o.flatten().tolist()) == list(range(48)) for o in order) and not torch.equal(*order)
    rate = combined_cos(.25, .5/25, .5, .5/1e5)
    for part in parts:
        head = copy.deepcopy(learn.model[1])
        for i, batch in enumerate(batches := order.flatten(0, 1)):
            rows = batch[~torch.isin(batch, torch.as_tensor(part))]
            with torch.no_grad(): features = learn.model[0](x[rows])
            grads = torch.autograd.grad(F.cross_entropy(head(features), y[rows]), list(head.parameters()))
            with torch.no_grad():
                for p, g in zip(head.parameters(), grads): p -= rate(i/len(batches))*g
        with torch.no_grad(): said = head(learn.model[0](x[part])).softmax(1)
        np.testing.assert_allclose(issues.probs[part], said.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('change', ['mixer', 'rates', 'small'])
def test_what_has_to_be_kept_apart_is_trained_apart(change, monkeypatch):
    "A mixer would show a head what is in its part; rates per group need the groups; of two rows none may be left"
    learn = frozen_learner(bs=2 if change == 'small' else 8, cbs=[MixUp()] if change == 'mixer' else [])
    if change == 'rates': learn.lr = slice(.1, .5)
    monkeypatch.setattr(Body, 'rows', 0)
    issues = quiet(learn, 3, 1)
    assert Body.rows > 48*(1+2) and issues.probs.shape == (48, 3)


def test_skipped_items_are_named():
    learn = make_learner(n=40)
    learn.dls[0].dataset[3] = (learn.dls[0].dataset[3][0], torch.tensor(-100))
    with pytest.raises(ValueError, match='Item 3 of the training set is skipped or has no label .1 such'): quiet(learn, 2, 1)


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
