"Second implementations of the figures and temperatures, in loops and grids, and logits whose truth is known"
import copy
import math

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from learners import Items
from scipy.special import expit, log_softmax, softmax
from torch import nn

from fastai_smooth.calibration import Predictions
from fastai_smooth.losses import LabelSmoothingBCE, LabelSmoothingCrossEntropy, LabelSmoothingNLL


SHRINKAGE = 30.
VIRTUAL = .5  # examples of any class


class Same(nn.Module):
    "A model whose predictions are its inputs"
    def __init__(self): super().__init__(); self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x): return x


class Outputs(nn.Module):
    "Logits and what else a recurrent network gives"
    def __init__(self, wrap=lambda *out: out):
        super().__init__()
        self.unused, self.wrap, self.resets = nn.Parameter(torch.zeros(1)), wrap, 0

    def forward(self, x):
        z = x+self.unused
        return self.wrap(z, 2*z, 3*z)

    def reset(self): self.resets += 1


def single(n=300, k=4, factor=3.):
    "Logits `factor` times too large, and labels drawn from what they should be"
    truth = 2*torch.randn(n, k)
    return factor*truth, torch.distributions.Categorical(logits=truth).sample()


def several(n=400, k=3, factor=(3., .5, 1.5)):
    truth = 1.5*torch.randn(n, k)
    return truth*torch.tensor(factor[:k]), torch.bernoulli(truth.sigmoid())


def learner(z, y, loss=None, model=None, bs=8, dl=TfmdDL, **kwargs):
    "On tensors, whose training set is another list of the same items"
    z, y = (t if isinstance(t, tuple) else (t,) for t in (z, y))
    dls = DataLoaders(*(dl(Items(zip(*z, *y)), bs=bs, shuffle=s, num_workers=0, device='cpu') for s in (True, False)))
    return Learner(dls, Same() if model is None else model, loss_func=loss or CrossEntropyLossFlat(), **kwargs).remove_cb(ProgressCallback)



def example_of_kind(kind, n=90):
    "Predictions, probabilities, targets, number of the example of each row, and whether each class is a question"
    numbers = np.arange(n)
    if kind == 'several':
        z, y = several(n)
        y[::5, 1] = torch.nan
        return Predictions.of(z, y, LabelSmoothingBCE(.1)), expit(z.double().numpy()), y.double().numpy(), numbers, True
    z, y = single(n)
    p, q = softmax(z.double().numpy(), 1), np.eye(4)[y]
    if kind == 'soft':
        soft = torch.distributions.Dirichlet(4*(z.double()/3).softmax(1)+.1).sample()*.5
        return Predictions.of(z, soft, LabelSmoothingCrossEntropy(.1)), p, (soft/soft.sum(1, True)).numpy(), numbers, False
    if kind == 'log': return Predictions.of(z.log_softmax(1), y, LabelSmoothingNLL(.1)), p, q, numbers, False
    if kind == 'mask':
        y[[0, 1, 2, 9, 40]], y[10:20] = -100, -100 # a whole example, parts of others
        kept = y.numpy() >= 0
        prediction = Predictions.of(z.view(-1, 5, 2, 4).movedim(-1, 1), y.view(-1, 5, 2), CrossEntropyLossFlat(axis=1))
        return prediction, p[kept], q[kept], (numbers//10)[kept], False
    return Predictions.of(z, y, CrossEntropyLossFlat()), p, q, numbers, False


# -- figures

def ece_loop(conf, right, n_bins=15, norm='l1'):
    gaps, shares = [], []
    for b in range(n_bins):
        lo, hi = b/n_bins, (b+1)/n_bins
        inside = [i for i, c in enumerate(conf) if lo <= c < hi or (b == n_bins-1 and c == 1)]
        if inside:
            gaps.append(abs(np.mean([conf[i] for i in inside])-np.mean([right[i] for i in inside])))
            shares.append(len(inside)/len(conf))
    return {'l1': np.dot(shares, gaps), 'l2': math.sqrt(np.dot(shares, np.square(gaps))), 'max': max(gaps)}[norm]


def shared(scores, right):
    return [np.mean([r for s2, r in zip(scores, right) if s2 == s]) for s in scores]


def adaptive_loop(conf, right, n_bins=15):
    right = shared(conf, right)
    order = sorted(range(len(conf)), key=lambda i: conf[i])
    total = 0.
    for part in np.array_split(np.array(order), n_bins):
        if len(part): total += len(part)*abs(np.mean([conf[i] for i in part])-np.mean([right[i] for i in part]))
    return total/len(conf)


def aurc_loop(score, right):
    right = shared(score, right)
    order = sorted(range(len(score)), key=lambda i: -score[i])
    risks = [sum(1-right[i] for i in order[:n])/n for n in range(1, len(order)+1)]
    return np.mean(risks)


def decisions(p, q, binary=False):
    "Confidence, how right it is, and for a question per class the surer side of it and whether that is right: lists"
    if not binary: return (list(p.max(1)), [q[i][g] for i, g in enumerate(p.argmax(1))])*2
    known = [(a, b) for row in zip(p, q) for a, b in zip(*row) if not np.isnan(b)]
    conf, right = map(list, zip(*known))
    return conf, right, [max(c, 1-c) for c in conf], [r if c > .5 else 1-r for c, r in known]


def naive(p, q, binary=False):
    "All figures in loops, from probabilities (N, K) and targets"
    conf, right, sure, correct = decisions(p, q, binary)
    columns = [(p[:, k][~np.isnan(q[:, k])], q[:, k][~np.isnan(q[:, k])]) for k in range(p.shape[1])]
    if binary: nll = -np.mean([r*np.log(c)+(1-r)*np.log(1-c) for c, r in zip(conf, right)])
    else: nll = -np.mean([sum(b*np.log(a) for a, b in zip(*row) if b) for row in zip(p, q)])
    brier = [sum((a-b)**2 for a, b in zip(*row) if not np.isnan(b)) for row in zip(p, q) if not np.isnan(row[1]).all()]
    return dict(accuracy=np.mean(correct), nll=nll, ece=ece_loop(conf, right), adaptive_ece=adaptive_loop(conf, right),
                classwise_ece=np.mean([ece_loop(list(a), list(b)) for a, b in columns if len(a)]), mce=ece_loop(conf, right, norm='max'),
                brier=np.mean(brier), aurc=aurc_loop(sure, correct))


# -- temperatures

def optimum(nll):
    "The best temperature: a grid over the range, then one between the neighbours of its best"
    grid = np.geomspace(.01, 100, 401)
    for _ in range(2):
        i = int(np.argmin([nll(t) for t in grid]))
        grid = np.geomspace(grid[max(i-1, 0)], grid[min(i+1, len(grid)-1)], 201)
    return grid[int(np.argmin([nll(t) for t in grid]))]


def best_softmax(z, q):
    "For rows of logits, and labels or rows of targets, with the prior at 1 and half an example of any class that is possible"
    z, q = np.asarray(z, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if q.ndim == 1: q = np.eye(z.shape[1])[q.astype(int)]
    mass, possible = q.sum(1), np.isfinite(z)
    def nll(t):
        log_p = np.where(possible, log_softmax(z/t, 1), 0.)
        virtual = -(log_p.sum(1)/possible.sum(1)*mass).sum()/mass.sum()
        return -(q*log_p).sum() + VIRTUAL*virtual + np.log(t)**2/2
    return optimum(nll)


def best_sigmoids(z, y):
    "For columns: a temperature of all entries, to which that of each label is drawn"
    z, y = (np.asarray(t, dtype=np.float64).reshape(len(t), -1) for t in (z, y))
    losses = lambda t, z, y: np.where(np.isnan(y), 0., np.logaddexp(0., z/t)-np.nan_to_num(y)*z/t).sum()
    nll = lambda t, z, y: losses(t, z, y) + VIRTUAL*losses(t, z, np.where(np.isnan(y), y, .5))/(~np.isnan(y)).sum()
    shared = optimum(lambda t: nll(t, z, y) + np.log(t)**2/2)
    if z.shape[1] == 1: return [shared]
    res = []
    for k in range(z.shape[1]):
        positives, negatives = np.nansum(y[:, k]), np.nansum(1-y[:, k])
        if not positives*negatives: res.append(shared)
        else:
            precision = 1 + SHRINKAGE*(1/positives + 1/negatives)
            res.append(optimum(lambda t, k=k, precision=precision: nll(t, z[:, k], y[:, k]) + precision*np.log(t/shared)**2/2))
    return res


def close(t, expected): np.testing.assert_allclose(np.asarray(t), expected, rtol=1e-3)


# -- what a learner is made of

def snapshot(learn):
    "What a learner is made of: objects by identity, and what they hold"
    whole = lambda o: copy.deepcopy(o.state_dict()) if o is not None else None
    modules, recorder = list(learn.model.modules()), learn.recorder
    return dict(vars=dict(vars(learn)), cbs=list(learn.cbs), of_cbs=[dict(vars(cb)) for cb in learn.cbs], modes=[m.training for m in modules],
                weights=whole(learn.model), opt=whole(learn.opt), values=copy.deepcopy(recorder.values), losses=list(recorder.losses),
                hooks=[len(m._forward_hooks)+len(m._forward_pre_hooks) for m in modules], grads=[p.requires_grad for p in learn.model.parameters()],
                loss=dict(vars(learn.loss_func)), metrics=[id(m) for m in learn.metrics], loaders=[id(dl) for dl in learn.dls.loaders])


def same(a, b):
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b or a is b


def check_untouched(learn, before):
    after = snapshot(learn)
    for name in ('vars', 'of_cbs', 'loss'):
        for old, new in zip(*((o[name] if name == 'of_cbs' else [o[name]]) for o in (before, after)), strict=True):
            assert old.keys() == new.keys() and not [k for k in old if old[k] is not new[k]]
    assert len(before['cbs']) == len(after['cbs']) and all(a is b for a, b in zip(before['cbs'], after['cbs']))
    assert all(cb.learn is learn for cb in learn.cbs)
    for name in ('modes', 'weights', 'opt', 'values', 'losses', 'hooks', 'grads', 'metrics', 'loaders'): assert same(before[name], after[name]), name
