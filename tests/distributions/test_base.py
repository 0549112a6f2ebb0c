"What every distribution does, and sums of them"
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastai_smooth.distributions import (ClassPrior, Distribution, Mixture, Online, PossibleClasses, Similarity, Spatial, Taxonomy, Teacher, Uniform, Zipf,
                                         check_distribution)
from fastai_smooth.losses import LabelSmoothingCrossEntropy
from fastai_smooth.targets import MixedTarget, smooth_labels, to_dense

K = 4


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=1e-6, check_dtype=False)


# -- sums

def test_sums_are_sums():
    a, b, c = Uniform(), ClassPrior([1, 2, 3, 4]), Taxonomy(['x/a', 'x/b', 'y/c', 'y/d'])
    q = torch.rand(5, K)
    whole = .5*a + .3*b + c*.2
    close(whole(q), .5*a(q)+.3*b(q)+.2*c(q)), close(whole.matrix(K), .5*a.matrix(K)+.3*b.matrix(K)+.2*c.matrix(K))
    nested = .5*(.5*a + .5*b) + .5*c
    close(nested(q), .25*a(q)+.25*b(q)+.5*c(q))
    assert isinstance(nested, Mixture) and repr(eval(repr(nested))) == repr(nested) and whole.n_classes == K
    close((1*a)(q), a(q))
    close(smooth_labels(torch.tensor([0, 3]), .2, K, dist=whole), .8*to_dense(torch.tensor([0, 3]), K)+.2*whole(to_dense(torch.tensor([0, 3]), K)))


@pytest.mark.parametrize('make', [lambda: .5*Uniform()+.4*Uniform(), lambda: 2*Uniform(), lambda: Uniform()+Uniform()])
def test_weights_are_checked_on_use(make):
    dist = make()
    with pytest.raises(ValueError, match='must sum to 1'): dist(torch.rand(2, K))
    with pytest.raises(ValueError, match='must sum to 1'): dist.matrix(K)
    with pytest.raises(ValueError, match='must sum to 1'): dist.check_classes(K)


def test_sum_errors():
    with pytest.raises(ValueError, match='at least 0'): -.5*Uniform()
    for bad in ('a', None, True, [1.]):
        with pytest.raises(TypeError): bad*Uniform()
    with pytest.raises(TypeError): Uniform()+1
    with pytest.raises(ValueError, match='made for 3 classes, but there are 4'): (.5*Uniform()+.5*ClassPrior([1, 1, 1])).check_classes(K)
    for part in (Zipf(), Spatial()):
        with pytest.raises(ValueError, match='no transition matrix'): (.5*Uniform()+.5*part).matrix(K)


# -- all of them

FIXED = [lambda: Taxonomy(['x/a', 'x/b', 'y/c', 'y/d']), lambda: Online(K), lambda: .5*Uniform()+.5*Similarity(torch.eye(K))]


@pytest.mark.parametrize('make', FIXED)
def test_fixed_ones_commute_with_mixing_and_are_row_stochastic(make):
    dist, a, b = make(), torch.rand(6, K), torch.rand(6, K)
    close(dist(torch.lerp(a, b, .3)), torch.lerp(dist(a), dist(b), .3))
    close(dist.matrix(K).sum(1), torch.ones(K)), close(dist(a), a@dist.matrix(K))
    mixed = MixedTarget(torch.tensor([[0, 1], [2, -100]]), torch.tensor([[.3, .7], [.6, .4]]), K)
    close(dist(mixed), dist(mixed.dense()))


@pytest.mark.parametrize('make', [*FIXED, Zipf, lambda: Teacher(nn.Identity()), Spatial])
def test_mass_is_kept_and_ignored_stays_ignored(make):
    y = torch.randint(0, K, (2, 5, 6))
    y[0, :2] = -100
    q, z = to_dense(y, K), torch.randn(2, K, 5, 6)
    u = make()(q, logits=z, inputs=z)
    close(u.sum(1), q.sum(1))
    assert u.shape == q.shape and u.dtype == q.dtype and (u >= 0).all()
    loss = LabelSmoothingCrossEntropy(.3, axis=1, dist=make())(z.requires_grad_(), y, inputs=z.detach())
    loss.backward()
    assert not z.grad[0, :, :2].any() and z.grad[1].any()


@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]), st.booleans(), st.booleans())
def test_mass_is_kept_whatever_the_target(seed, dtype, last, with_nan):
    "Any mass, ignored rows, the classes anywhere; a row with nan is nan, and only that row"
    g = torch.Generator().manual_seed(seed)
    q = torch.rand(3, K, 2, 3, generator=g, dtype=dtype)*torch.randint(0, 2, (3, 1, 2, 3), generator=g)
    if with_nan: q[0, 1, 0, 0] = float('nan')
    z = torch.randn(3, K, 2, 3, generator=g, dtype=dtype)
    z[torch.rand(z.shape, generator=g) < .2] = -torch.inf
    axis = -1 if last else 1
    q, z = (t.movedim(1, axis).contiguous() for t in (q, z))
    for dist in (*(make() for make in FIXED), Uniform(), ClassPrior([3, 0, 1, 2]), Zipf(2.), PossibleClasses(), .3*Zipf()+.7*PossibleClasses()):
        u = dist(q, axis=axis, logits=z)
        assert u.dtype is dtype and torch.equal(u.isnan().any(axis), q.isnan().any(axis))
        torch.testing.assert_close(u.sum(axis), q.sum(axis), rtol=1e-5, atol=1e-6, equal_nan=True)
        assert not u[(q == 0).all(axis, keepdim=True).expand_as(u)].any()


def test_every_one_says_what_it_is():
    for d in (Taxonomy(['a']), Online(2), Zipf(), Teacher(nn.Identity()), Spatial()): assert type(d).__name__ in repr(d)
    assert repr(.5*Uniform()+.5*Zipf()) == '0.5*Uniform() + 0.5*Zipf(1.0)'


def test_base_says_what_is_missing():
    with pytest.raises(TypeError, match='define forward'): Distribution()(torch.ones(1, 2))
    with pytest.raises(ValueError, match='no transition matrix'): Distribution().matrix(2)


@pytest.mark.parametrize('dist, words', [('uniform', 'such as Uniform'), (torch.eye(3), 'such as Uniform'), (Uniform, 'such as Uniform'),
                                         (nn.Linear(3, 3), r'is a Linear: .* Teacher\(model\)')])
def test_what_is_no_distribution(dist, words):
    with pytest.raises(TypeError, match=words): check_distribution(dist)


def test_a_distribution_beside_a_convention():
    check_distribution(None, 'others'), check_distribution(Uniform())
    with pytest.raises(ValueError, match="convention='others' cannot be combined"): check_distribution(Uniform(), 'others')
