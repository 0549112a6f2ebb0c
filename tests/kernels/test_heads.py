"`smooth_linear_cross_entropy` against loops in double precision, its gradients, its memory, and what it refuses"
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from memory import peak

from fastai_smooth.distributions import ClassPrior, Online, Similarity, Spatial, Taxonomy, Uniform, Zipf
from fastai_smooth.kernels import smooth_linear_cross_entropy
from fastai_smooth.targets import MixedTarget

N, T, D, K = 4, 3, 5, 7
PATHS = ['a/b/c', 'a/b/d', 'a/e', 'f', 'g/h/i/j', 'g/h/i/k', 'g/l']  # classes that end at different depths
TREE = Taxonomy(PATHS, beta=3.)
PRIOR = ClassPrior([1, 0, 3, 2, 5, 1, 1])
SIMILAR = Similarity(torch.rand(K, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(1))
DISTS = {'none': None, 'uniform': Uniform(), 'prior': PRIOR, 'tree': TREE, 'similarity': SIMILAR, 'sum': .3*Uniform() + .2*PRIOR + .3*TREE + .2*SIMILAR}


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    def draw(*s): return torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_()
    return draw(N, T, D), draw(K, D), draw(K)


def target_of(kind, seed=0):
    g = torch.Generator().manual_seed(seed+1)
    y, other = (torch.randint(K, (N, T), generator=g) for _ in range(2))
    y[0, 0] = y[2, 1] = -100
    if kind == 'index': return y
    if kind == 'pair': return MixedTarget(torch.stack([y, other], 1), torch.tensor([.3, .7]).view(1, 2, 1).expand(N, 2, T), K, axis=2)
    q = torch.rand(N, T, K, generator=g, dtype=torch.float64)
    if kind == 'sparse teacher': q = q.where(q > q.topk(2, -1).values[..., 1:], 0.)
    q = q/q.sum(-1, keepdim=True).clamp(min=1e-9)
    q[1, 2] = 0.
    q[3, 0] *= .5
    return q


def rows_of(target):
    "A target as a list of {class: mass} per position"
    if isinstance(target, MixedTarget): target = target.dense()
    if not target.is_floating_point(): return [{v: 1.} if v != -100 else {} for v in target.flatten().tolist()]
    return [dict(enumerate(row)) for row in target.double().reshape(-1, target.shape[-1]).tolist()]


def matrix_of(dist): return (Uniform() if dist is None else dist)(torch.eye(K, dtype=torch.float64)).tolist()


def loop(x, w, b, target, eps, dist, weight, by, reduction):
    "Logits, softmax, smoothed target and loss, one number after the other; `x`, `w`, `b` may carry a graph"
    m, total, losses = matrix_of(dist), 0., []
    strength = [eps]*K if isinstance(eps, float) else eps.tolist()
    v = [1.]*K if weight is None else weight.tolist()
    for row, q in zip(x.reshape(-1, x.shape[-1]), rows_of(target)):
        z = [sum(row[j]*w[k, j] for j in range(D)) + (0. if b is None else b[k]) for k in range(K)]
        lse = torch.logsumexp(torch.stack(z), 0)
        smooth = [(1-strength[k])*q.get(k, 0.) + sum(strength[c]*mass*m[c][k] for c, mass in q.items()) for k in range(K)]
        known, mass = sum(v[k]*a for k, a in q.items()), sum(q.values())
        each = sum(s*(v[k] if by == 'class' else 1.)*(lse-z[k]) for k, s in enumerate(smooth))
        if by == 'example': each = each*(known/mass if mass else 0.)
        losses.append(each if mass else lse*0.)
        total += known
    if reduction == 'none': return torch.stack(losses).view(x.shape[:-1])
    return sum(losses)/(1. if reduction == 'sum' else total or 1.)


def check(ours, theirs, inputs, seed=0, rtol=1e-12):
    g = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed), dtype=theirs.dtype)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    for a, b in zip(torch.autograd.grad(ours, inputs, g), torch.autograd.grad(theirs, inputs, g)): torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize('kind', ['index', 'pair', 'dense', 'sparse teacher'])
@pytest.mark.parametrize('name', DISTS)
def test_equals_the_loop(name, kind):
    weights = torch.linspace(.5, 2., K, dtype=torch.float64)
    for weight, by, bias, reduction in ((None, 'class', True, 'mean'), (None, 'class', False, 'none'), (weights, 'class', True, 'sum'),
                                        (weights, 'class', False, 'mean'), (weights, 'example', True, 'mean'), (weights, 'example', False, 'none')):
        x, w, b = data()
        b = b if bias else None
        target, dist = target_of(kind), DISTS[name]
        chunk = {'mean': 'auto', 'sum': 5, 'none': 1}[reduction]
        ours = smooth_linear_cross_entropy(x, w, target, .3, bias=b, dist=dist, class_weight=weight, weight_by=by, reduction=reduction, chunk=chunk)
        check(ours, loop(x, w, b, target, .3, dist, weight, by, reduction), [t for t in (x, w, b) if t is not None])


def test_one_strength_per_class():
    x, w, b = data()
    eps = torch.linspace(0., .6, K)
    for kind in ('index', 'dense'):
        ours = smooth_linear_cross_entropy(x, w, target_of(kind), eps, bias=b, dist=TREE)
        check(ours, loop(x, w, b, target_of(kind), eps, TREE, None, 'class', 'mean'), [x, w, b])


@given(n=st.integers(0, 6), k=st.integers(2, 9), d=st.integers(1, 5), chunk=st.one_of(st.just('auto'), st.integers(1, 20)), ignored=st.floats(0, 1),
       eps=st.floats(0, 1), reduction=st.sampled_from(['mean', 'sum', 'none']))
def test_equals_the_loss_of_the_linear_layer(n, k, d, chunk, ignored, eps, reduction):
    g = torch.Generator().manual_seed(n+10*k)
    x, w = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((n, d), (k, d)))
    y = torch.randint(k, (n,), generator=g).masked_fill(torch.rand(n, generator=g) < ignored, -100)
    ours = smooth_linear_cross_entropy(x, w, y, eps, reduction=reduction, chunk=chunk)
    theirs = F.cross_entropy(x @ w.T, y, label_smoothing=eps, reduction=reduction)
    if reduction == 'mean' and not (y >= 0).any(): theirs = (x @ w.T).sum()*0.  # torch gives nan where all is ignored
    check(ours, theirs, [x, w], rtol=1e-9)


def test_derivatives():
    x, w, b = data()
    x, w, y = x[:2, :2, :2].detach().requires_grad_(), w[:, :2].detach().requires_grad_(), target_of('index')[:2, :2]
    def f(*inputs): return smooth_linear_cross_entropy(inputs[0], inputs[1], y, .2, bias=inputs[2], dist=TREE, chunk=2)
    assert torch.autograd.gradcheck(f, (x, w, b)) and torch.autograd.gradgradcheck(f, (x, w, b))
    loss = f(x, w, b)  # a second backward makes the gradients again
    first = [g.clone() for g in torch.autograd.grad(loss, (x, w, b), retain_graph=True)]
    for a, c in zip(first, torch.autograd.grad(loss, (x, w, b))): torch.testing.assert_close(a, c, rtol=0, atol=0)
    ours = torch.func.grad(lambda w: f(x, w, b))(w)
    torch.testing.assert_close(ours, torch.autograd.grad(f(x, w, b), w)[0])
    only, = torch.autograd.grad(f(x, w.detach(), b.detach()), x)
    torch.testing.assert_close(only, first[0])


def test_a_weight_that_is_an_embedding_too():
    _, w, _ = data()
    y, words = torch.randint(K, (N,)), torch.randint(K, (N,))
    tied = torch.autograd.grad(smooth_linear_cross_entropy(F.embedding(words, w), w, y, .1), w)[0]
    plain = torch.autograd.grad(F.cross_entropy(F.embedding(words, w) @ w.T, y, label_smoothing=.1), w)[0]
    torch.testing.assert_close(tied, plain)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_precisions(dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 32, generator=g).to(dtype), (torch.randn(50, 32, generator=g)*.3).to(dtype)
    y = torch.randint(50, (64,), generator=g)
    got, wanted = {}, {}
    def exact(a, b, y, eps): return F.cross_entropy(a @ b.T, y, label_smoothing=eps)
    for store, (a, b), loss in ((got, (x, w), smooth_linear_cross_entropy), (wanted, (x.double(), w.double()), exact)):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        value = loss(a, b, y, .1)
        value.backward()
        store.update(loss=value.detach(), x=a.grad, w=b.grad)
    assert got['loss'].dtype == torch.float32 and got['x'].dtype == dtype
    for k in got: assert (got[k].double()-wanted[k]).norm() <= tolerance*wanted[k].norm()


def test_float16_under_a_scaled_loss():
    "The gradient of a mean over many rows is below the smallest float16; the scale of the loss keeps it alive"
    g = torch.Generator().manual_seed(0)
    n = 2**14
    x, w = (torch.randn(n, 4, generator=g)*1e-2).half().requires_grad_(), torch.randn(8, 4, generator=g).half().requires_grad_()
    y = torch.randint(8, (n,), generator=g)
    (smooth_linear_cross_entropy(x, w, y, .1)*2.**16).backward()
    exact = x.detach().double().requires_grad_()
    F.cross_entropy(exact @ w.detach().double().T, y, label_smoothing=.1).backward()
    assert (x.grad.double()/2**16-exact.grad).norm() <= 2e-3*exact.grad.norm()


def test_autocast_is_that_of_the_linear_layer():
    x, w, b = (t.detach().float().requires_grad_() for t in data())
    y = target_of('index')
    with torch.autocast('cpu', torch.bfloat16):
        ours = smooth_linear_cross_entropy(x, w, y, .1, bias=b)
        theirs = F.cross_entropy(F.linear(x, w, b).float().flatten(0, 1), y.flatten(), label_smoothing=.1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, c in zip(torch.autograd.grad(ours, (x, w, b)), torch.autograd.grad(theirs, (x, w, b))):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, c, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('dist', [None, ClassPrior([1.]*20000), Taxonomy([f'{k % 20}/{k % 400}/{k}' for k in range(20000)])], ids=['uniform', 'prior', 'tree'])
def test_memory(dist):
    "Nothing of the size of the weight but its gradient, and nothing of the size of all logits"
    n, d, k, chunk = 128, 32, 20000, 8
    x, w, y = torch.randn(n, d, requires_grad=True), torch.randn(k, d, requires_grad=True), torch.randint(k, (n,))
    gradients, logits, group_sums = (n*d+k*d)*4, chunk*k*4, 421*(d+1)*4*3
    vectors = 14*k*8  # per class: shares, groups, masses
    most = peak(lambda: smooth_linear_cross_entropy(x, w, y, .1, dist=dist, chunk=chunk).backward())
    assert gradients < most < gradients + logits + group_sums + vectors + 4096*(d+1)*4*3 + 2**19
    assert most < .6*n*k*4
    with torch.no_grad(): alone = peak(lambda: smooth_linear_cross_entropy(x, w, y, .1, dist=dist, chunk=chunk))
    assert alone < most-.9*gradients  # none is made


def test_what_does_not_fit_is_refused():
    x, w, b = data()
    y = target_of('index')
    for words, kwargs in (('bias', dict(bias=b[:2])), ('class_weight', dict(class_weight=torch.ones(3))), ('class_weight', dict(class_weight=-torch.ones(K))),
                          ('chunk', dict(chunk=0)), ('chunk', dict(chunk=1.5)), ('eps', dict(eps=1.2)), ('reduction', dict(reduction='all')),
                          ('weight_by', dict(weight_by='row')), ('logits', dict(dist=Zipf())), ('logits', dict(dist=.5*Uniform()+.5*Online(K))),
                          ('logits', dict(dist=Spatial())), ('7', dict(dist=ClassPrior([1, 2])))):
        with pytest.raises(ValueError, match=words): smooth_linear_cross_entropy(x, w, y, **{'eps': .1, **kwargs})
    with pytest.raises(ValueError, match=r'\(4, 3, 4\).*\(7, 5\)'): smooth_linear_cross_entropy(x[..., :4], w, y)
    with pytest.raises(ValueError, match='Label 7'): smooth_linear_cross_entropy(x, w, y.clone().fill_(7))
    with pytest.raises(ValueError, match='shape'): smooth_linear_cross_entropy(x, w, y[:2])
    with pytest.raises(TypeError, match='weight'): smooth_linear_cross_entropy(x, w.long(), y)
