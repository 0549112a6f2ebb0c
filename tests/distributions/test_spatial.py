"Spatial against a loop over the pixels"
import math

import numpy as np
import pytest
import torch

from fastai_smooth.distributions import Spatial
from fastai_smooth.targets import to_dense


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=1e-6, check_dtype=False)


def spatial_loop(q, size, sigma):
    "Pixel by pixel; q (N, K, *)"
    q, half = np.asarray(q, dtype=float), size//2
    spatial = q.shape[2:]
    offsets = list(np.ndindex(*[size]*len(spatial)))
    w = {o: math.exp(-sum((i-half)**2 for i in o)/(2*sigma**2)) for o in offsets}
    centre = (half,)*len(spatial)
    w[centre] = sum(v for o, v in w.items() if o != centre)
    out = np.zeros_like(q)
    for n in range(len(q)):
        for place in np.ndindex(*spatial):
            top, below = np.zeros(q.shape[1]), 0.
            for o, v in w.items():
                j = tuple(min(max(p+i-half, 0), s-1) for p, i, s in zip(place, o, spatial))
                here = q[(n, slice(None), *j)]
                top, below = top+v*here, below+v*here.sum()
            if below: out[(n, slice(None), *place)] = q[(n, slice(None), *place)].sum()*top/below
    return out


@pytest.mark.parametrize('size, sigma', [(3, 1.), (5, .7), (7, 2.), (3, .2)])
@pytest.mark.parametrize('shape', [(2, 3, 5, 4), (1, 2, 3, 4, 2), (1, 2, 1, 6)])
def test_spatial_against_loop(shape, size, sigma):
    y = torch.randint(-1, shape[1], (shape[0], *shape[2:]))
    y[y == -1] = -100
    q = to_dense(y, shape[1]).double()
    dist, expected = Spatial(size, sigma), spatial_loop(q, size, sigma)
    close(dist(q), expected)
    close(dist(q.movedim(1, -1), axis=-1).movedim(-1, 1), expected)
    close(dist(q).sum(1), q.sum(1))
    soft = torch.rand(shape, dtype=torch.float64)
    close(dist(soft), spatial_loop(soft, size, sigma))
    assert dist(q.float()).dtype == torch.float32 and torch.equal(q, to_dense(y, shape[1]).double())
    assert repr(eval(repr(dist))) == repr(dist)


def test_spatial_inside_an_area_changes_nothing():
    q = to_dense(torch.zeros(1, 6, 6).long(), 2)
    close(Spatial()(q), q)


@pytest.mark.parametrize('args, words', [((2,), 'odd'), ((4,), 'odd'), ((1,), 'odd'), ((3, .1), 'sigma'), ((3, math.inf), 'sigma')])
def test_spatial_errors(args, words):
    with pytest.raises(ValueError, match=words): Spatial(*args)
    with pytest.raises(ValueError, match='2 or 3 spatial'): Spatial()(torch.rand(2, 3))


def test_narrow_gaussians_in_every_precision():
    q = torch.zeros(1, 2, 5, 5)
    q[0, 0] = 1
    q[0, :, 2, 2] = torch.tensor([0., 1.])
    for sigma in (.2, .3, 1.):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            u = Spatial(3, sigma)(q.to(dtype))
            assert u.dtype == dtype and (u[0, :, 2, 2].float()-.5).abs().max() < 1e-2 and (u.sum(1).float()-1).abs().max() < 1e-2
        close(Spatial(3, sigma)(q), spatial_loop(q, 3, sigma))
