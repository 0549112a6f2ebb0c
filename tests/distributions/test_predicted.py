"Zipf against a loop over the ranks"
import numpy as np
import pytest
import torch

from fastai_smooth.distributions import Zipf
from fastai_smooth.targets import to_dense

K = 4


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=1e-6, check_dtype=False)


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
