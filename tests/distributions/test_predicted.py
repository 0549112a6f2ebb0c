"Zipf and PossibleClasses against loops"
import math

import numpy as np
import oracles
import pytest
import torch
from fastai.callback.mixup import MixUp
from hypothesis import given
from hypothesis import strategies as st
from learners import fit, make_learner
from torch import nn

from fastai_smooth.callback import LabelSmoothing
from fastai_smooth.distributions import ClassPrior, PossibleClasses, Uniform, Zipf
from fastai_smooth.losses import LabelSmoothingCrossEntropy
from fastai_smooth.targets import to_dense

K = 4


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=1e-6, check_dtype=False)


# -- Zipf

@pytest.mark.parametrize('power', [0., 1., 2.5])
def test_zipf_against_loop(power):
    z, q = torch.randn(6, K, dtype=torch.float64), torch.rand(6, K, dtype=torch.float64)
    shares = np.array([r**-power for r in range(1, K)])
    shares /= shares.sum()
    expected = np.zeros((6, K))
    for i in range(6):
        for c in range(K):
            others = sorted((k for k in range(K) if k != c), key=lambda k: -z[i, k].item())
            for r, k in enumerate(others): expected[i, k] += q[i, c].item()*shares[r]
    dist = Zipf(power)
    close(dist(q, logits=z.requires_grad_()), expected)
    close(dist(q.T[None], axis=1, logits=z.detach().T[None])[0].T, expected)
    u = dist(to_dense(torch.tensor([2]), K), logits=z[:1])
    assert u[0, 2] == 0 and not u.requires_grad and abs(u.sum()-1) < 1e-6


def test_zipf_errors():
    with pytest.raises(ValueError, match='needs `logits`'): Zipf()(torch.rand(2, K))
    with pytest.raises(ValueError, match=r'\(2, 5\)'): Zipf()(torch.rand(2, K), logits=torch.rand(2, 5))
    with pytest.raises(ValueError, match='at least 2'): Zipf()(torch.rand(2, 1), logits=torch.rand(2, 1))
    with pytest.raises(ValueError, match='power'): Zipf(-1.)


# -- PossibleClasses

@given(st.lists(st.lists(st.floats(-5, 5) | st.just(-math.inf), min_size=K, max_size=K), min_size=1, max_size=5), st.integers(0, 99), st.floats(0, 1))
def test_possible_classes_against_loop(rows, seed, eps):
    z = torch.tensor(rows, dtype=torch.float64)
    q = torch.rand(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u = PossibleClasses()(q, logits=z)
    close(u.sum(1), q.sum(1))
    for got, given_, row in zip(u.tolist(), q.tolist(), rows):
        n = sum(v > -math.inf for v in row)
        np.testing.assert_allclose(got, [sum(given_)/n*(v > -math.inf) for v in row] if n else given_, rtol=1e-12)
    close(PossibleClasses()(q.mT[None], axis=1, logits=z.mT[None])[0].mT, u)
    # the loss: what each row would be with its possible classes alone
    y = torch.tensor([next((k for k, v in enumerate(row) if v > -math.inf), -100) for row in rows])
    value = LabelSmoothingCrossEntropy(eps, dist=PossibleClasses())(z.requires_grad_(), y)
    kept = [(int(k), row) for k, row in zip(y, rows) if k != -100]
    expected = [oracles.cross_entropy([[v for v in row if v > -math.inf]], [[float(j == sum(v > -math.inf for v in row[:k]))
                                      for j in range(sum(v > -math.inf for v in row))]], eps) for k, row in kept]
    np.testing.assert_allclose(value.item(), np.mean(expected) if expected else 0., rtol=1e-9, atol=1e-12)
    value.backward()
    some = ~z.isneginf().all(1)
    assert z.grad[some].isfinite().all() and not z.grad[some][z[some].isneginf()].any()


def test_possible_classes_where_nothing_or_always_the_same_is_masked():
    z, q = torch.randn(6, K), to_dense(torch.tensor([0, 1, 2, 0, -100, 1]), K)
    close(PossibleClasses()(q, logits=z), Uniform()(q))
    z[:, 3] = -math.inf
    close(PossibleClasses()(q, logits=z), ClassPrior([1, 1, 1, 0])(q))
    close(PossibleClasses()(q, logits=z.fill_(-1e9)), Uniform()(q)) # a finite mask is a possible class
    with pytest.raises(ValueError, match='needs `logits`'): PossibleClasses()(q)
    with pytest.raises(ValueError, match='no transition matrix'): PossibleClasses().matrix(K)
    assert repr(eval(repr(PossibleClasses()))) == 'PossibleClasses()'


def test_a_label_that_is_impossible_costs_infinitely_much():
    z = torch.tensor([[1., -math.inf, 0.], [0., 1., 2.]])
    u = PossibleClasses()(to_dense(torch.tensor([1, 2]), 3), logits=z)
    close(u, [[.5, 0., .5], [1/3]*3])
    loss = LabelSmoothingCrossEntropy(.1, dist=PossibleClasses(), reduction='none')(z, torch.tensor([1, 2]))
    assert loss[0] == math.inf and loss[1].isfinite()


class Masked(nn.Module):
    "A model that must not choose class 3 for images that are mostly of class 0 and have nothing of class 3"
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(K*16, K)

    def forward(self, x):
        share = x.mean((2, 3))
        never = (share[:, :1] > .5) & (share[:, 3:] == 0) & (torch.arange(K) == 3)
        return self.linear(x.flatten(1)).masked_fill(never, -math.inf)


@pytest.mark.parametrize('mixers', [[], [MixUp]], ids=str)
def test_possible_classes_under_the_callback(mixers):
    for dist, finite in ((PossibleClasses(), True), (.5*PossibleClasses() + .5*ClassPrior([1, 1, 1, 0]), True), (None, False)):
        learn = make_learner('index', nn.CrossEntropyLoss(), [LabelSmoothing(.2, dist), *[m() for m in mixers]])
        learn.model = Masked()
        fit(learn, 1)
        assert all(math.isfinite(v) for v in learn.recorder.losses) == finite
