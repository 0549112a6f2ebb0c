"Learners whose inputs are their own truth: an image of one-hot labels is mixed as its labels are"
from contextlib import contextmanager

import fastai.callback.progress  # noqa: F401  (gives the Learner `no_bar`)
import numpy as np
import oracles
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn
from torch.nn import functional as F

K, SIDE = 4, 4


class Items(list):
    "A data set in memory"
    def new_empty(self): return Items()


class PerPixel(nn.Module):
    "Logits per pixel"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(K, K, 1)

    def forward(self, x): return self.conv(x)


def data(kind, n=24):
    "Images and targets: 'index', 'one_hot', 'multi_hot', 'multi_hot_int' or 'mask' (a pixel in eight is ignored)"
    g = torch.Generator().manual_seed(1)
    if kind == 'mask':
        y = torch.randint(0, K, (n, SIDE, SIDE), generator=g)
        x = F.one_hot(y, K).movedim(-1, 1).float()
        hole = torch.rand(n, SIDE, SIDE, generator=g) < .125
        return x*~hole[:, None], y.masked_fill(hole, -100)
    if kind.startswith('multi_hot'):
        q = torch.randint(0, 2, (n, K), generator=g)
        y = q if kind.endswith('int') else q.float()
    else:
        labels = torch.randint(0, K, (n,), generator=g)
        q = F.one_hot(labels, K)
        y = labels if kind == 'index' else q.float()
    return q.float()[:, :, None, None].expand(-1, -1, SIDE, SIDE).contiguous(), y


def make_learner(kind='index', loss_func=None, cbs=(), n=24, bs=8, c=K, **kwargs):
    "A learner on `data(kind)`; shuffling, weights and mixing follow torch's seed"
    set_seed(0)
    x, y = data(kind, n)
    dls = DataLoaders(*(TfmdDL(Items(zip(x, y)), bs=bs, shuffle=s, num_workers=0, device='cpu') for s in (True, False)))
    if c: dls.c = c
    model = PerPixel() if kind == 'mask' else nn.Sequential(nn.Flatten(), nn.Linear(K*SIDE*SIDE, K))
    if loss_func is None: loss_func = CrossEntropyLossFlat(axis=1 if kind == 'mask' else -1)
    return Learner(dls, model, loss_func=loss_func, cbs=cbs, default_cbs=True, lr=.1, **kwargs)


class WhatTheLossSaw(Callback):
    "After each training loss: keep input, prediction, loss and target, as everybody else sees them"
    order, run_valid, name = 90, False, 'look'

    def before_fit(self): self.seen = []

    def after_loss(self):
        self.seen.append((self.learn.xb[0].detach().clone(), self.learn.pred.detach().clone(), float(self.learn.loss_grad), self.learn.yb))


Look = WhatTheLossSaw


def truth_of(x, kind): return x if kind == 'mask' else x.mean((2, 3))


def expected_loss(x, pred, kind, eps, **kwargs):
    "The loss of the smoothed truth, from input and prediction alone, in loops"
    return oracles.cross_entropy(oracles.rows(pred, 1).tolist(), oracles.rows(truth_of(x, kind), 1).tolist(), eps, **kwargs)


def expected_binary_loss(x, pred, eps, convention):
    q = [[oracles.binary_entry(v, eps, convention, K) for v in row] for row in truth_of(x, 'multi_hot').tolist()]
    return oracles.binary_cross_entropy(pred.tolist(), q)


@contextmanager
def quiet(learn):
    "Nothing is shown or printed"
    with learn.no_bar(), learn.no_logging(): yield learn


def fit(learn, *args, **kwargs):
    with quiet(learn): learn.fit(*args, **kwargs)
    return learn


def check_seen(learn, kind, eps, n_batches=None, **kwargs):
    "Every training batch had exactly the expected loss"
    assert learn.look.seen and (n_batches is None or len(learn.look.seen) == n_batches)
    for x, pred, loss, _ in learn.look.seen:
        np.testing.assert_allclose(loss, expected_loss(x, pred, kind, eps, **kwargs), rtol=2e-5, atol=1e-6)
