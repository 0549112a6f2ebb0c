"Dense targets: encoding, checks, the laws of smoothing over random shapes, conventions"
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastai_smooth.distributions import ClassPrior, Similarity, Taxonomy, Uniform
from fastai_smooth.targets import (MixedTarget, base_tensor, check_axis, check_choice, check_not_nan, convert_eps, dense_target, label_error, per_class,
                                   shape_error, smooth_binary, smooth_labels, to_dense, uniform_eps)

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
    kind = draw(st.sampled_from(['uniform', 'prior', 'similarity', 'taxonomy', 'sum']))
    if kind == 'uniform': return Uniform()
    if kind == 'prior': return ClassPrior(torch.rand(n_classes, generator=g)+.01)
    if kind == 'taxonomy': return Taxonomy([f'{torch.randint(0, 3, (), generator=g)}/{k}' for k in range(n_classes)], 3.)
    if kind == 'sum': return .25*Uniform() + .75*draw(fixed_distributions(n_classes))
    m = torch.rand(n_classes, n_classes, generator=g)
    return Similarity(m/m.sum(1, keepdim=True))


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False)


# -- to_dense

@given(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES), st.sampled_from([1, -1]), st.integers(0, 99))
def test_to_dense_against_loop(rest, dtype, axis, seed):
    ignore, shape = 255 if dtype is torch.uint8 else -100, (3, *rest)
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, shape, generator=g)
    y[torch.rand(shape, generator=g) < .2] = ignore
    q = to_dense(y.to(dtype), 4, axis=axis, ignore_index=ignore)
    assert q.shape == ((3, 4, *rest) if axis == 1 else (*shape, 4)) and q.dtype is torch.float32
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
    (dict(dist='uniform'), TypeError, 'dist must be a distribution'), (dict(dist=torch.eye(3)), TypeError, 'dist must be a distribution'),
    (dict(dist=Uniform), TypeError, 'dist must be a distribution'),
])
def test_smooth_labels_errors(kwargs, error, words):
    with pytest.raises(error, match=words): smooth_labels(torch.rand(2, 3), **kwargs)


def test_index_target_needs_n_classes():
    with pytest.raises(ValueError, match='pass n_classes'): smooth_labels(torch.tensor([0, 1]))


def test_targets_are_not_changed():
    q = torch.rand(4, 3)
    before = q.clone()
    for c in CONVENTIONS: smooth_labels(q, .5, convention=c)
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


@pytest.mark.parametrize('args', [(.1, 10, 'uniform', 'half'), (.1, 10, 'szegedy', 'uniform'), (.9, 10, 'uniform', 'classy'),
                                  (1., 10, 'uniform', 'classy'), (.6, 2, 'complement', 'half'), (.1, 1, 'others', 'uniform'),
                                  (1.1, 10, 'uniform', 'others')])
def test_convert_eps_errors(args):
    with pytest.raises(ValueError): convert_eps(*args)
    with pytest.raises(TypeError, match='takes one number'): convert_eps([.1, .2], 10, 'uniform', 'others')


@given(st.floats(0, 1), st.integers(2, 50), st.sampled_from(CONVENTIONS))
def test_uniform_eps_gives_the_same_targets(eps, n, convention):
    "Also above 1, where `convert_eps` refuses"
    q = torch.rand(3, n, dtype=torch.float64)
    e = uniform_eps(eps, convention, n)
    close(smooth_labels(q, eps, convention=convention), (1-e)*q + e*q.sum(1, keepdim=True)/n)


def test_uniform_eps_errors():
    with pytest.raises(ValueError, match='at least 2 classes'): uniform_eps(.1, 'others', 1)
    with pytest.raises(ValueError, match='above -1'): uniform_eps(-1., 'classy', 3)
    with pytest.raises(ValueError, match="'classy'"): uniform_eps(.1, 'half', 3)


# -- checks that losses and the callback share

def test_messages_name_values_shapes_and_what_would_fit():
    assert 'Label 9 is outside [0, 4) for 4 classes and is not ignore_index=-100' in str(label_error(torch.tensor([0, -100, 9]), 4, -100))
    assert 'ignore_index' not in str(label_error(torch.tensor([-100]), 4, None))
    message = str(shape_error((2, 5, 4), (2, 5), 1, True))
    assert 'want indices (2, 4) or a dense target (2, 5, 4), but got indices of shape (2, 5). axis=2 would fit.' in message
    assert 'The target has 6 classes and the logits have 5' in str(shape_error((2, 5), (2, 6), 1, False))
    assert check_axis(torch.ones(2, 3), -1) == 1
    with pytest.raises(ValueError, match=r'Logits of shape \(2, 3\) have no axis 2'): check_axis(torch.ones(2, 3), 2)
    with pytest.raises(TypeError, match='list'): check_axis([1.], 0)
    with pytest.raises(ValueError, match="kind must be one of 'a', 'b', but got 'c'"): check_choice('c', ('a', 'b'), 'kind')


def test_per_class_lays_values_along_the_axis_or_looks_them_up():
    like, value = torch.zeros(2, 3, 4, dtype=torch.float64), torch.tensor([1., 2., 3.])
    assert per_class(.5, like, 1) == .5
    close(like + per_class(value, like, 1), value[None, :, None].expand(2, 3, 4)), close(like.mT + per_class(value, like.mT, -1), value.expand(2, 4, 3))
    assert per_class(value, like, 1, torch.tensor([[2, 0]])).tolist() == [[3., 1.]]
    with pytest.raises(ValueError, match='weight has 2 values, but there are 3 classes'): per_class(value[:2], like, 1, name='weight')
    with pytest.raises(ValueError, match=r'weight .* \(3, 1\)'): per_class(value[:, None], like, 1, name='weight')


def test_dense_target_takes_shape_and_dtype_of_the_predictions():
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    y = torch.tensor([[0, 2, 1, -100], [1, 1, 0, 2]])
    q = dense_target(y, z, 1, -100)
    assert q.dtype is torch.float64 and torch.equal(q, dense_target(y[:, None], z, 1, -100)) and torch.equal(q, dense_target(q.float(), z, 1, -100))
    with pytest.raises(ValueError, match=r'\(2, 3, 4\).*\(1, 3, 4\)'): dense_target(y[:1], z, 1, -100)


def test_labels_that_cannot_be_read_make_their_rows_nan():
    "Inside a transform as on a GPU: no error that ends the process, and nothing that is silently wrong"
    y = torch.tensor([[0, 1, -100], [2, 7, -1]])
    for q in (torch.func.vmap(lambda row: to_dense(row, 3, axis=0))(y), torch.compile(lambda y: to_dense(y, 3), backend='eager')(y)):
        assert q.isnan().any(1).tolist() == [[False, False, False], [False, True, True]]
        assert torch.equal(q[0], to_dense(y[:1], 3)[0])


def test_nan_stays_nan_and_the_example_is_named():
    q = torch.rand(3, 4, 2)
    check_not_nan(q), check_not_nan(q[:0])
    q[1, 2, 1] = math.nan
    for convention in CONVENTIONS: assert torch.equal(smooth_labels(q, .2, convention=convention).isnan().any(1), q.isnan().any(1))
    with pytest.raises(ValueError, match=r'\(3, 4, 2\) holds nan for the example 1'): check_not_nan(q)
    with pytest.raises(ValueError, match='for the example 1'): check_not_nan(q.movedim(1, -1), -1)


def test_no_value_is_read_on_a_device_that_would_have_to_stop():
    y = torch.empty(2, 3, dtype=torch.long, device='meta') # has no values to read
    q = to_dense(y, 4)
    assert smooth_labels(q, .1).shape == dense_target(y, torch.empty(2, 4, 3, device='meta'), 1, -100).shape == (2, 4, 3)
    check_not_nan(q)


def test_fastais_tensors_become_plain_ones():
    from fastai.torch_core import TensorBase, TensorCategory
    y = TensorCategory(torch.tensor([0, 2]))
    assert type(base_tensor(y)) is torch.Tensor and type(smooth_labels(y, .1, 3)) is torch.Tensor and base_tensor('x') == 'x'
    assert type(smooth_labels(TensorBase(torch.rand(2, 3)), .1)) is torch.Tensor and base_tensor(y).data_ptr() == y.data_ptr()


def test_targets_can_be_exported():
    "torch.export traces with a tensor subclass that computes by itself: it must not be taken off"
    class Model(torch.nn.Module):
        def forward(self, y, q): return smooth_labels(y, .1, 4), smooth_labels(q, .2, convention='others'), smooth_binary(q, .1)
    y, q = torch.tensor([0, 3, -100]), torch.rand(3, 4)
    for strict in (False, True):
        for a, b in zip(torch.export.export(Model(), (y, q), strict=strict).module()(y, q), Model()(y, q)): close(a, b)
