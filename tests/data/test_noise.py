"Label noise: its matrix, its seeds, its errors"
import numpy as np
import pytest
import torch

from fastai_smooth.noise import corrupt_labels, transition_matrix


def expected_transition(rate, n, kind, pairs=None):
    "Cell by cell"
    m = [[0.]*n for _ in range(n)]
    for a in range(n):
        for b in range(n):
            if kind == 'symmetric': m[a][b] = 1-rate if a == b else rate/(n-1)
            else:
                to = (a+1) % n if kind == 'pair' else (pairs or {k: k+1 for k in range(0, n-1, 2)}).get(a)
                m[a][b] = (1. if to is None else 1-rate) if a == b else rate if b == to else 0.
    return torch.tensor(m, dtype=torch.float64)


@pytest.mark.parametrize('rate', [0., .3, 1.])
@pytest.mark.parametrize('kind, pairs', [('symmetric', None), ('pair', None), ('asymmetric', None), ('asymmetric', {1: 3, 3: 1})])
def test_noise_follows_its_matrix(kind, pairs, rate):
    y = torch.randint(0, 5, (50_000,))
    noisy, t, flipped = corrupt_labels(y, rate, kind, 5, seed=1, pairs=pairs)
    torch.testing.assert_close(t, expected_transition(rate, 5, kind, pairs))
    counts = torch.zeros(5, 5, dtype=torch.float64).index_put_((y, noisy), torch.ones(len(y), dtype=torch.float64), accumulate=True)
    share = counts/counts.sum(1, keepdim=True)
    assert (share-t).abs().max() < 5*(.25/10_000)**.5  # five standard deviations of a share of 10,000
    assert torch.equal(flipped, noisy != y) and noisy.dtype is torch.int64


@pytest.mark.parametrize('y', [[0, 1, 2], np.array([0, 1, 2], dtype=np.int32), torch.tensor([[0, 1], [2, 2]], dtype=torch.uint8)])
def test_noise_takes_any_labels(y):
    noisy, t, flipped = corrupt_labels(y, .5, seed=0)
    assert noisy.shape == torch.as_tensor(y).shape == flipped.shape and t.shape == (3, 3)


def test_noise_follows_seeds():
    y = torch.randint(0, 10, (1000,))
    state = torch.get_rng_state()
    a = corrupt_labels(y, .5, seed=3)[0]
    assert torch.equal(state, torch.get_rng_state()), "an own seed leaves the global generator alone"
    assert torch.equal(a, corrupt_labels(y, .5, seed=3)[0]) and not torch.equal(a, corrupt_labels(y, .5, seed=4)[0])
    torch.manual_seed(5)
    b = corrupt_labels(y, .5)[0]
    torch.manual_seed(5)
    assert torch.equal(b, corrupt_labels(y, .5)[0])


@pytest.mark.parametrize('args, error, words', [
    (([0, 1], 1.2), ValueError, '1.2'), (([0, 1], -.1), ValueError, '-0.1'), (([0, 9], .1, 'pair', 5), ValueError, 'Label 9'),
    (([0, 1], .1, 'rare'), ValueError, "'symmetric'"), (([0., 1.], .1), TypeError, 'integers'), (([0, 0], .1), ValueError, 'at least 2'),
    (([0, 1], .1, 'pair', 2, None, {0: 1}), ValueError, 'pairs'), (([0, 1], .1, 'asymmetric', 2, None, {0: 7}), ValueError, '0: 7')])
def test_noise_errors(args, error, words):
    with pytest.raises(error, match=words): corrupt_labels(*args)


def test_no_noise_and_no_labels():
    assert not corrupt_labels([0, 1, 0], 0.)[2].any() and corrupt_labels(torch.zeros(0).long(), .3, n_classes=3)[0].shape == (0,)
    assert torch.equal(transition_matrix(0., 3), torch.eye(3, dtype=torch.float64))
