"targets: encoding, the laws of smoothing over random shapes, conventions, mixtures"
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastai_smooth.distributions import ClassPrior, Similarity, Uniform
from fastai_smooth.targets import MixedTarget, convert_eps, smooth_binary, smooth_labels, to_dense

CONVENTIONS = ['uniform', 'others', 'classy']
DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]


@st.composite
def dense_targets(draw, min_classes=2):
    "Random dense targets of any shape, axis, dtype and mass, with their class axis"
    n_classes, axis_first = draw(st.integers(min_classes, 6)), draw(st.booleans())
    rest = draw(st.lists(st.integers(1, 4), max_size=2))
    shape = [draw(st.integers(0, 5)), n_classes, *rest] if axis_first else [draw(st.integers(0, 5)), *rest, n_classes]
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q = torch.rand(shape, generator=g, dtype=dtype)
    axis = 1 if axis_first else draw(st.sampled_from([-1, len(shape)-1]))
    if draw(st.booleans()): q = q/q.sum(axis, keepdim=True)  # mass 1
    if draw(st.booleans()) and q.numel(): q[0] = 0.  # an ignored example
    return q, axis


@st.composite
def fixed_distributions(draw, n_classes):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(['uniform', 'prior', 'similarity']))
    if kind == 'uniform': return Uniform()
    if kind == 'prior': return ClassPrior(torch.rand(n_classes, generator=g)+.01)
    m = torch.rand(n_classes, n_classes, generator=g)
    return Similarity(m/m.sum(1, keepdim=True))


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False)


# -- to_dense

@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(5,), (0,), (3, 4), (2, 3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize('axis', [1, -1])
def test_to_dense_against_loop(dtype, shape, axis):
    ignore = 255 if dtype is torch.uint8 else -100
    y = torch.randint(0, 4, shape)
    y[torch.rand(shape) < .2] = ignore
    q = to_dense(y.to(dtype), 4, axis=axis, ignore_index=ignore)
    assert q.shape == ((shape[0], 4, *shape[1:]) if axis == 1 else (*shape, 4)) and q.dtype is torch.float32
    np.testing.assert_array_equal(oracles.rows(q, axis), np.array(oracles.encode(y.flatten().tolist(), 4, ignore)).reshape(-1, 4))


def test_to_dense_passes_dense_through():
    q = torch.rand(3, 4, 2)
    assert to_dense(q, 4) is q and to_dense(q.double(), 4).dtype is torch.float64


def test_uint8_label_is_not_mistaken_for_a_negative_ignore_index():
    # -100 as uint8 is 156: comparing before the dtype is widened would drop class 156
    assert to_dense(torch.tensor([156], dtype=torch.uint8), 200)[0, 156] == 1


@pytest.mark.parametrize('y, n_classes, axis, error, words', [
    (torch.tensor([0, 7]), 5, 1, ValueError, 'Label 7 .* 5 classes'),
    (torch.tensor([0, -1]), 5, 1, ValueError, 'Label -1'),
    (torch.rand(3, 4, 5), 5, 1, ValueError, 'axis=2 would fit'),
    (torch.rand(3, 4), 7, 1, ValueError, 'No dimension has 7'),
    (torch.rand(3), 3, 1, ValueError, 'axis=0 would fit'),
    (torch.tensor([True]), 2, 1, TypeError, 'ambiguous'),
    ([0, 1], 2, 1, TypeError, 'tensor'),
    (torch.tensor([0]), 0, 1, ValueError, 'at least 1'),
    (torch.tensor([0]), 2, 5, ValueError, 'axis=5'),
])
def test_to_dense_errors(y, n_classes, axis, error, words):
    with pytest.raises(error, match=words): to_dense(y, n_classes, axis=axis)


# -- the laws

@given(dense_targets(), st.floats(0, 1), st.sampled_from(CONVENTIONS))
def test_smoothing_equals_loop_and_keeps_mass(target, eps, convention):
    q, axis = target
    s = smooth_labels(q, eps, axis=axis, convention=convention)
    assert s.shape == q.shape and s.dtype == q.dtype
    expected = [oracles.smooth_row(r, eps, convention) for r in oracles.rows(q, axis)]
    np.testing.assert_allclose(oracles.rows(s, axis), np.array(expected).reshape(-1, q.shape[axis]), rtol=1e-5, atol=1e-6)
    close(s.sum(axis), q.sum(axis))


@given(dense_targets(), st.floats(0, 1), st.floats(0, 1), st.sampled_from(CONVENTIONS), st.data())
def test_law_1_smoothing_commutes_with_mixing(target, eps, lam, convention, data):
    a, axis = target
    b = torch.rand_like(a)
    dist = None if convention != 'uniform' else data.draw(st.none() | fixed_distributions(a.shape[axis]))
    def s(q): return smooth_labels(q, eps, axis=axis, dist=dist, convention=convention)
    close(s(torch.lerp(a, b, lam)), torch.lerp(s(a), s(b), lam))


@given(dense_targets(), st.sampled_from(CONVENTIONS), st.data())
def test_law_2_extremes(target, convention, data):
    q, axis = target
    n = q.shape[axis]
    dist = None if convention != 'uniform' else data.draw(st.none() | fixed_distributions(n))
    assert torch.equal(smooth_labels(q, 0., axis=axis, dist=dist, convention=convention), q)
    s, mass = smooth_labels(q, 1., axis=axis, dist=dist, convention=convention), q.sum(axis, keepdim=True)
    if dist is not None: close(s, dist(q, axis=axis))
    elif convention == 'uniform': close(s, (mass/n).expand_as(q))
    elif convention == 'others': close(s, (mass-q)/(n-1))
    else: close(s, (q+mass/n)/2)  # classy stops half way


@given(st.lists(st.sampled_from([-100, 0, 1, 2, 3]), min_size=1, max_size=6), st.floats(0, 1), st.sampled_from(CONVENTIONS))
def test_law_2_forms_agree(labels, eps, convention):
    y = torch.tensor(labels)
    one_hot = torch.tensor(oracles.encode(labels, 4))
    mixed = MixedTarget(y[:, None], torch.ones(len(y), 1), 4)
    a, b, c = (smooth_labels(t, eps, n_classes=4, convention=convention) for t in (y, one_hot, mixed))
    close(a, b), close(a, c)
    assert (a[y == -100] == 0).all(), "an ignored label must stay ignored"


@given(dense_targets(), st.data())
def test_law_4_fixed_distributions_are_transitions(target, data):
    q, axis = target
    n = q.shape[axis]
    dist = data.draw(fixed_distributions(n))
    m = dist.matrix(n)
    close(m.sum(1), torch.ones(n))
    assert (m >= 0).all()
    u = dist(q, axis=axis)
    assert u.shape == q.shape and u.dtype == q.dtype
    np.testing.assert_allclose(oracles.rows(u, axis), oracles.rows(q, axis) @ m.double().numpy(), rtol=1e-4, atol=1e-6)
    close(u.sum(axis), q.sum(axis))


@given(dense_targets(), st.data())
def test_one_eps_per_class(target, data):
    q, axis = target
    n = q.shape[axis]
    eps = data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
    dist = data.draw(st.none() | fixed_distributions(n))
    s = smooth_labels(q, eps, axis=axis, dist=dist)
    m = None if dist is None else dist.matrix(n).tolist()
    expected = [oracles.smooth_row(r, eps, matrix=m) for r in oracles.rows(q, axis)]
    np.testing.assert_allclose(oracles.rows(s, axis), np.array(expected).reshape(-1, n), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('kwargs, error, words', [
    (dict(eps=1.5), ValueError, r'\[0, 1\]'), (dict(eps=-.1), ValueError, r'\[0, 1\]'), (dict(eps=math.nan), ValueError, r'\[0, 1\]'),
    (dict(eps='a lot'), TypeError, 'number'), (dict(eps=[.1, .2]), ValueError, '2 values, but there are 3'),
    (dict(eps=[.1, 2., .1]), ValueError, r'\[0, 1\]'), (dict(eps=True), TypeError, 'number'),
    (dict(convention='half'), ValueError, "'uniform', 'others', 'classy'"), (dict(n_classes=4), ValueError, 'Expected 4 classes'),
    (dict(axis=3), ValueError, 'axis=3'), (dict(dist=Uniform(), convention='others'), ValueError, 'convention'),
])
def test_smooth_labels_errors(kwargs, error, words):
    with pytest.raises(error, match=words): smooth_labels(torch.rand(2, 3), **kwargs)


def test_index_target_needs_n_classes():
    with pytest.raises(ValueError, match='pass n_classes'): smooth_labels(torch.tensor([0, 1]))


def test_targets_are_not_changed():
    q = torch.rand(4, 3)
    before = q.clone()
    for c in CONVENTIONS: smooth_labels(q, .5, convention=c)
    smooth_binary(q, .5)
    assert torch.equal(q, before)


# -- conventions of eps

@given(st.floats(0, 1), st.integers(2, 50), st.sampled_from(CONVENTIONS), st.sampled_from(CONVENTIONS))
def test_converted_eps_gives_the_same_targets(eps, n, source, to):
    y = torch.tensor([0, 1])
    try: other = convert_eps(eps, n, source, to)
    except ValueError as e:
        assert 'above 1' in str(e)
        return
    assert 0 <= other <= 1
    close(smooth_labels(y, eps, n, convention=source), smooth_labels(y, other, n, convention=to))


@given(st.floats(0, .5))
def test_converted_binary_eps_gives_the_same_targets(eps):
    y = torch.tensor([[0., 1., .3]])
    close(smooth_binary(y, eps, 'complement'), smooth_binary(y, convert_eps(eps, 3, 'complement', 'half'), 'half'))


@pytest.mark.parametrize('args', [(.1, 10, 'uniform', 'half'), (.1, 10, 'szegedy', 'uniform'), (.9, 10, 'uniform', 'classy'),
                                  (1., 10, 'uniform', 'classy'), (.6, 2, 'complement', 'half'), (.1, 1, 'others', 'uniform'),
                                  (1.1, 10, 'uniform', 'others')])
def test_convert_eps_errors(args):
    with pytest.raises(ValueError): convert_eps(*args)


# -- binary

@given(st.lists(st.lists(st.floats(0, 1) | st.just(math.nan), min_size=3, max_size=3), min_size=1, max_size=4), st.floats(0, 1),
       st.sampled_from(['half', 'uniform', 'complement']), st.none() | st.floats(0, 1), st.none() | st.floats(0, 1))
def test_binary_against_loop(rows, eps, convention, eps_pos, eps_neg):
    s = smooth_binary(torch.tensor(rows), eps, convention, eps_pos, eps_neg)
    expected = [[oracles.binary_entry(y, eps, convention, 3, eps_pos, eps_neg) for y in row] for row in rows]
    np.testing.assert_allclose(s.numpy(), np.array(expected), rtol=1e-5, atol=1e-6)  # nan where nan


@pytest.mark.parametrize('dtype', [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_binary_takes_any_multi_hot(dtype):
    y = torch.tensor([[1, 0, 1]]).to(dtype)
    close(smooth_binary(y, .2), torch.tensor([[.9, .1, .9]]))
    assert smooth_binary(y, 0.).is_floating_point()


def test_binary_errors():
    with pytest.raises(ValueError, match='holds 3'): smooth_binary(torch.tensor([3]))
    with pytest.raises(ValueError, match="'half'"): smooth_binary(torch.rand(2), convention='others')
    with pytest.raises(ValueError, match='eps_pos'): smooth_binary(torch.rand(2), eps_pos=2.)


# -- mixtures

@st.composite
def mixtures(draw, n=4, n_classes=3):
    rest = draw(st.sampled_from([(), (2,), (2, 3)]))
    axis = draw(st.sampled_from([1, -1]))
    m = draw(st.integers(1, 3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    index = torch.randint(-1, n_classes, (n, m, *rest), generator=g)
    index[index == -1] = -100
    w = torch.rand((n, m, *([1]*len(rest) if draw(st.booleans()) else rest)), generator=g)
    return MixedTarget(index, w, n_classes, axis)


@given(mixtures(), st.data())
def test_mixture_stands_for_its_dense_form(mix, data):
    "Whatever sequence of lerp, indexing and other operations: the same as on the dense form"
    dense = mix.dense()
    for _ in range(data.draw(st.integers(1, 4))):
        op = data.draw(st.sampled_from(['lerp', 'perm', 'slice', 'mask', 'mul', 'add', 'lerp_dense', 'pixels', 'inplace', 'to']))
        perm = torch.randperm(len(dense), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
        if op == 'lerp':
            shape = data.draw(st.sampled_from([(len(dense),)+(1,)*(dense.ndim-1), (1,)*dense.ndim]))
            w = torch.rand(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).to(dense.dtype)
            mix, dense = torch.lerp(mix[perm], mix, weight=w), torch.lerp(dense[perm], dense, weight=w)
        elif op == 'perm': mix, dense = mix[perm], dense[perm]
        elif op == 'slice': mix, dense = mix[:max(len(dense)-1, 1)], dense[:max(len(dense)-1, 1)]
        elif op == 'mask':
            mask = torch.arange(len(dense)) != 1
            mix, dense = mix[mask], dense[mask]
        elif op == 'mul': mix, dense = mix*2, dense*2
        elif op == 'add': mix, dense = .5 + mix, .5 + dense
        elif op == 'lerp_dense': mix, dense = torch.lerp(mix, dense.flip(0), .3), torch.lerp(dense, dense.flip(0), .3)
        elif op == 'pixels':
            w = torch.rand(dense.shape, generator=torch.Generator().manual_seed(7)).to(dense.dtype)
            mix, dense = torch.lerp(mix, mix[perm], w), torch.lerp(dense, dense[perm], w)
        elif op == 'inplace':
            dense = dense.clone()
            mix[0], dense[0] = 0., 0.
        elif op == 'to': mix, dense = mix.to(torch.float64), dense.to(torch.float64)
        assert tuple(mix.shape) == tuple(dense.shape) == tuple(mix.size()) and mix.ndim == dense.ndim and len(mix) == len(dense)
        close(mix.dense() if isinstance(mix, MixedTarget) else mix, dense)


def test_mixers_keep_a_mixture_sparse():
    "The calls of fastai's MixUp and CutMix; a weight per image is not written out per pixel"
    y = torch.randint(0, 150, (2, 1, 8, 8))
    a = MixedTarget(y, torch.ones(2, 1), 150)
    b = torch.lerp(a[torch.tensor([1, 0])], a, weight=torch.rand(2, 1, 1, 1))
    b = torch.lerp(b[torch.tensor([1, 0])], b, weight=torch.rand(1, 1, 1, 1))
    assert isinstance(b, MixedTarget) and b.is_sparse_mixture and b.indices.shape == (2, 4, 8, 8)
    assert b._weights.shape == (2, 4, 1, 1) and b.weights.shape == (2, 4, 8, 8)


def test_in_place_edit_of_a_mixture_is_kept():
    a = MixedTarget(torch.tensor([[0], [1]]), torch.ones(2, 1), 2)
    a.mul_(3)
    close(a.dense(), 3*torch.eye(2))


def test_mixture_gradient_reaches_the_weights():
    w = torch.rand(2, 2, requires_grad=True)
    MixedTarget(torch.tensor([[0, 1], [2, -100]]), w, 3).dense().pow(2).sum().backward()
    close(w.grad, torch.tensor([[2., 2.], [2., 0.]])*w.detach())


@pytest.mark.parametrize('args, words', [
    ((torch.rand(2, 1), torch.ones(2, 1), 3), 'integer'), ((torch.tensor([0]), torch.ones(1), 3), r'\(N, m, \*\)'),
    ((torch.zeros(2, 1).long(), torch.ones(3, 1), 3), 'do not fit'), ((torch.zeros(2, 1).long(), torch.ones(2, 1), 3, 0), 'axis=0')])
def test_mixture_errors(args, words):
    with pytest.raises(ValueError, match=words): MixedTarget(*args)


def test_mixture_label_out_of_range():
    with pytest.raises(ValueError, match='Label 5'): MixedTarget(torch.tensor([[5]]), torch.ones(1, 1), 3).dense()
