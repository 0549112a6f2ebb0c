"Taxonomy, Online, Zipf, Teacher, Spatial and sums against loops, and their errors"
import math

import networkx as nx
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from hypothesis import given
from hypothesis import strategies as st
from learners import Items
from torch import nn

from fastai_smooth.distributions import Blend, ClassPrior, Distribution, Mixture, Online, Similarity, Spatial, Taxonomy, Teacher, Uniform, Zipf
from fastai_smooth.losses import LabelSmoothingBCE, LabelSmoothingCrossEntropy
from fastai_smooth.targets import MixedTarget, smooth_labels, to_dense

K = 4


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=1e-6, check_dtype=False)


# -- Taxonomy

def tree_distance(paths, a, b):
    "Height of the lowest common ancestor, by looking at all classes below it"
    if a == b: return 0
    x, y = paths[a].split('/'), paths[b].split('/')
    n = 0
    while n < min(len(x), len(y)) and x[n] == y[n]: n += 1
    return max(len(p.split('/'))-n for p in paths if p.split('/')[:n] == x[:n])


def tree_matrix(paths, beta):
    k = len(paths)
    d = [[tree_distance(paths, a, b) for b in range(k)] for a in range(k)]
    top = max(map(max, d)) or 1
    w = np.exp(-beta*np.array(d, dtype=float)/top)
    return w/w.sum(1, keepdims=True)


TREES = [['a'], ['a', 'b'], ['x/a', 'x/b', 'y/c'], ['x/a', 'x/b', 'x/c/d', 'x/c/e/f'], ['q/x/a', 'q/x/b', 'q/y/c', 'q/z'], ['x', 'x/a', 'x/a/b', 'y'],
         ['a/a/a', 'a/a/b', 'a/b', 'b', 'c/d', 'c/e/f/g']]


@pytest.mark.parametrize('beta', [0., 1., 10.])
@pytest.mark.parametrize('paths', TREES, ids='|'.join)
def test_taxonomy_against_loop(paths, beta):
    dist, expected = Taxonomy(paths, beta), tree_matrix(paths, beta)
    close(dist.matrix(len(paths)), expected)
    q = torch.rand(3, len(paths), 2, 2)
    close(dist(q), np.einsum('nyhw,yc->nchw', q.numpy(), expected))
    close(dist(q.movedim(1, -1), axis=-1), np.einsum('nyhw,yc->nhwc', q.numpy(), expected))
    for a in range(len(paths)):
        for b in range(len(paths)): assert dist.distance(torch.tensor([a]), torch.tensor([b])).item() == tree_distance(paths, a, b)
    assert repr(eval(repr(dist))) == repr(dist)


@given(st.lists(st.lists(st.sampled_from('abc'), min_size=1, max_size=4).map('/'.join), min_size=1, max_size=12, unique=True), st.floats(0, 30))
def test_any_taxonomy(paths, beta): close(Taxonomy(paths, beta).matrix(len(paths)), tree_matrix(paths, beta), 1e-4)


def test_taxonomy_at_full_strength_is_the_papers_label():
    dist = Taxonomy(TREES[4], 4.)
    close(smooth_labels(torch.tensor([1, 3]), 1., 4, dist=dist), tree_matrix(TREES[4], 4.)[[1, 3]])


def test_taxonomy_from_dicts_and_trees():
    expected = Taxonomy(['animal/cat', 'animal/dog', 'vehicle/car'])
    assert repr(Taxonomy({'car': 'vehicle/car', 'cat': 'animal/cat', 'dog': 'animal/dog'}, vocab=['cat', 'dog', 'car'])) == repr(expected)
    tree = nx.DiGraph([('all', 'animal'), ('all', 'vehicle'), ('animal', 'cat'), ('animal', 'dog'), ('vehicle', 'car')])
    close(Taxonomy.from_tree(tree, ['cat', 'dog', 'car']).matrix(3), expected.matrix(3))
    with pytest.raises(ValueError, match="no node for the class 'cow'"): Taxonomy.from_tree(tree, ['cat', 'cow'])
    tree.add_edge('vehicle', 'cat')
    with pytest.raises(ValueError, match='2 parents'): Taxonomy.from_tree(tree, ['cat'])


@pytest.mark.parametrize('args, error, words', [((['a/b', 'a/b'],), ValueError, "'a/b'"), ((['a', ''],), ValueError, 'needs a path'),
                                                (([],), ValueError, 'at least one'), ((['a'], -1.), ValueError, 'beta'),
                                                (('a/b',), TypeError, 'the string'), ((['a'], math.nan), ValueError, 'beta')])
def test_taxonomy_errors(args, error, words):
    with pytest.raises(error, match=words): Taxonomy(*args)
    with pytest.raises(ValueError, match="class 'dog'"): Taxonomy({'cat': 'a/cat'}, vocab=['cat', 'dog'])
    with pytest.raises(ValueError, match='made for 2 classes, but there are 3'): Taxonomy(['a', 'b'])(torch.rand(2, 3))


def test_mistake_severity_is_a_metric():
    paths = TREES[3]
    set_ = Taxonomy(paths)
    torch.manual_seed(1)
    x, y = torch.randn(30, 5), torch.randint(0, 4, (30,))
    dls = DataLoaders(*(TfmdDL(Items(zip(x, y)), bs=7, num_workers=0, device='cpu') for _ in range(2)))
    learn = Learner(dls, nn.Linear(5, 4), loss_func=nn.CrossEntropyLoss(), metrics=set_.mistake_severity())
    with learn.no_bar(): value = learn.validate()[1]
    guess = learn.model(x).argmax(1)
    expected = [tree_distance(paths, int(a), int(b)) for a, b in zip(y, guess) if a != b]
    assert expected and abs(value-np.mean(expected)) < 1e-6 and learn.metrics[0].name == 'mistake_severity'


# -- Online

def online_loop(batches, k):
    sums, counts = np.zeros((k, k)), np.zeros(k)
    for z, y in batches:
        for row, label in zip(z.double(), y.tolist()):
            if 0 <= label < k and row.argmax() == label:
                sums[label] += row.softmax(0).numpy()
                counts[label] += 1
    return np.array([s/c if c else np.full(k, 1/k) for s, c in zip(sums, counts)])


@pytest.mark.parametrize('momentum', [None, 0., .3])
def test_online_against_loop(momentum):
    dist, expected = Online(K, momentum), np.full((K, K), 1/K)
    for _ in range(3):
        batches = [(3*torch.randn(20, K), torch.randint(-1, K, (20,))) for _ in range(2)]
        for z, y in batches:
            y[y == -1] = -100
            y[y == 2] = 1 # a class that nobody has
            dist.update(z.requires_grad_(), y)
        close(dist.matrix(K), expected), "nothing changes within an epoch"
        dist.next_epoch()
        m = momentum or 0.
        expected = m*expected + (1-m)*online_loop([(z.detach(), y) for z, y in batches], K)
        close(dist.matrix(K), expected)
        q = torch.rand(5, K)
        close(dist(q), q.numpy()@expected)
    assert not dist.sums.any() and not dist.counts.any() and not dist.transition.requires_grad
    assert repr(eval(repr(dist))) == repr(dist)


def test_online_per_pixel_and_from_dense_labels():
    a, b, c = Online(K), Online(K), Online(K)
    z, y = torch.randn(3, K, 4, 5), torch.randint(0, K, (3, 4, 5))
    y[0] = -100
    a.update(z, y), b.update(z.movedim(1, -1).reshape(-1, K), y.reshape(-1)), c.update(z, to_dense(y, K))
    for d in (a, b, c): d.next_epoch()
    close(a.matrix(K), online_loop([(z.movedim(1, -1).reshape(-1, K), y.reshape(-1))], K)), close(b.matrix(K), a.matrix(K)), close(c.matrix(K), a.matrix(K))


def test_half_strength_is_the_papers_loss():
    dist = Online(K)
    z, y = 3*torch.randn(50, K), torch.randint(0, K, (50,))
    dist.update(z, y), dist.next_epoch()
    rows = torch.from_numpy(online_loop([(z, y)], K)).float()[y]
    paper = .5*nn.functional.cross_entropy(z, y) - .5*(rows*z.log_softmax(1)).sum(1).mean()
    close(LabelSmoothingCrossEntropy(.5, dist=dist)(z, y), paper)
    before = dist.matrix(K)
    LabelSmoothingCrossEntropy(.5, dist=dist)(z, y)
    assert torch.equal(before, dist.matrix(K)) and not dist.counts.any(), "a loss alone never learns"


@pytest.mark.parametrize('args, words', [((0,), 'at least 1'), ((2.5,), 'at least 1'), ((3, 1.), 'momentum'), ((3, -.1), 'momentum')])
def test_online_errors(args, words):
    with pytest.raises(ValueError, match=words): Online(*args)
    with pytest.raises(ValueError, match='made for 3 classes, but there are 4'): Online(3).update(torch.rand(2, 4), torch.tensor([0, 1]))


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


# -- Teacher

class Noisy(nn.Module):
    "A model that shows in its output whether it is in training mode"
    def __init__(self, k=K):
        super().__init__()
        self.inner, self.norm = nn.Linear(3, k), nn.BatchNorm1d(3)

    def forward(self, x, scale=1.):
        if self.training: raise RuntimeError('asked in training mode')
        return scale*self.inner(self.norm(x))


def test_teacher_is_a_softmax_at_its_temperature():
    model = Noisy()
    model.train(), model.norm.eval()
    x, q = torch.randn(5, 3), torch.rand(5, K)
    for as_learner in (False, True):
        teacher = type('Learner', (), {'model': model})() if as_learner else model
        u = Teacher(teacher, 2.)(q, inputs=x)
        close(u, q.sum(1, keepdim=True)*(model.eval()(x)/2).softmax(1))
        model.train(), model.norm.eval()
        Teacher(teacher)(q, inputs=(x, 3.))
        assert model.training and model.inner.training and not model.norm.training and not u.requires_grad


def test_teacher_that_fails_gets_its_mode_back():
    model = Noisy()
    model.inner.eval()
    with pytest.raises(RuntimeError): Teacher(model)(torch.rand(5, K), inputs=torch.randn(5, 4))
    assert model.training and not model.inner.training


def test_teacher_errors():
    with pytest.raises(ValueError, match='needs `inputs`'): Teacher(Noisy())(torch.rand(5, K))
    with pytest.raises(ValueError, match=r'gave \(5, 7\) for a target of shape \(5, 4\)'): Teacher(Noisy(7))(torch.rand(5, K), inputs=torch.randn(5, 3))
    with pytest.raises(TypeError, match='nn.Module or a Learner'): Teacher(lambda x: x)
    with pytest.raises(ValueError, match='temperature'): Teacher(Noisy(), 0.)
    with pytest.raises(ValueError, match='no transition matrix'): Teacher(Noisy()).matrix(K)


# -- Spatial

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


def test_parts_that_learn_do_learn():
    one, two = Online(K), Online(K, .5)
    whole = .5*Uniform() + .5*(.2*one + .8*two)
    z, y = 3*torch.randn(30, K), torch.randint(0, K, (30,))
    whole.update(z, y), whole.next_epoch()
    close(one.matrix(K), online_loop([(z, y)], K)), close(two.matrix(K), .5/K+.5*online_loop([(z, y)], K))
    whole.update(z, y), whole.forget()
    assert not one.counts.any() and not two.counts.any()
    state = {k: v.clone() for k, v in whole.memory().items()}
    assert len(state) == 2
    fresh = .5*Uniform() + .5*(.2*Online(K) + .8*Online(K, .5))
    fresh.remember(state)
    close(fresh.matrix(K), whole.matrix(K))
    with pytest.raises(ValueError, match=r'of shape \(4, 4\)'): Online(3).remember({'transition': torch.ones(4, 4)})


def test_blend_follows_its_schedule():
    dist = Blend(Uniform(), ClassPrior([1, 2, 3, 4]), lambda p: p**2)
    q = torch.rand(3, K)
    for p in (0., .5, 1.):
        dist.progress(p)
        close(dist(q), (1-p**2)*Uniform()(q)+p**2*ClassPrior([1, 2, 3, 4])(q))
    close(dist.matrix(K), ClassPrior([1, 2, 3, 4]).matrix(K))
    with pytest.raises(ValueError, match=r'must stay in \[0, 1\]'): Blend(Uniform(), Uniform(), lambda p: 2.)(q)


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


def test_every_one_says_what_it_is():
    for d in (Taxonomy(['a']), Online(2), Zipf(), Teacher(nn.Identity()), Spatial()): assert type(d).__name__ in repr(d)
    assert repr(.5*Uniform()+.5*Zipf()) == '0.5*Uniform() + 0.5*Zipf(1.0)'
    with pytest.raises(TypeError, match='define forward'): Distribution()(torch.rand(2, 2))
    assert not hasattr(LabelSmoothingBCE(.1), 'dist')
