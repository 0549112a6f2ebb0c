"Mixed targets: whatever is done with one, it is as with its dense form"
import operator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastai_smooth.targets import MixedTarget


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False)


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


BINARY = [operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow,
          operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]


def test_operators_work_on_the_dense_form():
    mix = MixedTarget(torch.tensor([[0, 1], [2, -100]]), torch.tensor([[.25, .75], [.5, .5]]), 3)
    q = mix.dense()
    for op in BINARY:
        for other in (.5, q.flip(0), torch.tensor(.5)):
            torch.testing.assert_close(op(mix, other), op(q, other), equal_nan=True)
            torch.testing.assert_close(op(other, mix), op(other, q), equal_nan=True)
        torch.testing.assert_close(op(mix, mix), op(q, q), equal_nan=True)


def test_what_else_a_tensor_can_do():
    mix = MixedTarget(torch.tensor([[0, 1], [2, 2]]), torch.tensor([[.25, .75], [.5, .5]]), 3)
    q = mix.dense()
    close(mix @ torch.ones(3, 2), q @ torch.ones(3, 2)), close(-mix, -q), close(+mix, q), close(abs(-mix), q)
    np.testing.assert_array_equal(np.asarray(mix), q.numpy())
    assert [r.tolist() for r in mix] == q.tolist() and .75 in mix and .3 not in mix and hash(mix) == hash(mix)
    assert float(mix[:1].sum()) == 1 and int(MixedTarget(torch.tensor([[0]]), torch.ones(1, 1), 1)) == 1
    with pytest.raises(RuntimeError, match='ambiguous'): bool(mix)
    with pytest.raises(AttributeError, match='no_such_thing'): _ = mix.no_such_thing
    close(torch.stack([mix, 2*mix]), torch.stack([q, 2*q])), close(torch.cat((mix, q)), torch.cat((q, q)))
    total = mix
    total += 1
    close(total, q+1), close(mix.dense(), q)


@given(mixtures(), st.data())
def test_where_is_as_on_the_dense_form(mix, data):
    other, dense = mix[[1, 0, 3, 2]], mix.dense()
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shape = [s if d != mix.axis or data.draw(st.booleans()) else 1 for d, s in enumerate(mix.shape)]
    c = torch.rand(shape, generator=g) < .5
    res = torch.where(c, mix, other)
    assert isinstance(res, MixedTarget) == (shape[mix.axis] == 1)
    close(res.dense() if isinstance(res, MixedTarget) else res, torch.where(c, dense, other.dense()))
    close(torch.where(c, dense, other), torch.where(c, dense, other.dense())), close(torch.where(c, mix, 0.), torch.where(c, dense, 0.))
    assert all(torch.equal(a, b) for a, b in zip(torch.where(mix), torch.where(dense)))


def test_nan_weights_stay_nan():
    mix = MixedTarget(torch.tensor([[0, 1], [2, -100], [1, 2]]), torch.tensor([[float('nan'), .5], [1., float('nan')], [.5, .5]]), 3)
    assert mix.dense().sum(1).isnan().tolist() == [True, True, False]


def test_the_hard_labels_stay_with_their_examples():
    y, perm = torch.tensor([[0, 1], [2, 2], [1, 0]]), torch.tensor([2, 0, 1])
    a = MixedTarget(y[:, None], torch.ones(3, 1), 3, labels=y)
    mixed = torch.lerp(a[perm], a, torch.tensor([.9, .8, .7]).view(3, 1, 1))
    mixed = torch.where(torch.rand(3, 1, 2) < .5, mixed[perm], mixed)
    assert mixed.is_sparse_mixture and torch.equal(mixed.labels, y) and torch.equal(mixed[perm].labels, y[perm])
    assert torch.equal(mixed[1:].to(torch.float64).labels, y[1:]) and torch.equal(mixed[[1]].labels, y[[1]])
    assert MixedTarget(y[:, None], torch.ones(3, 1), 3)[perm].labels is None


def test_labels_that_cannot_be_read_make_their_rows_nan():
    "Inside a transform as on a GPU: no error that ends the process, and nothing that is silently wrong"
    def dense(index): return MixedTarget(index, torch.tensor([[.5, .5]]).expand(len(index), 2), 3).dense()
    q = torch.func.vmap(dense)(torch.tensor([[[0, 1], [0, 9], [2, -100]]]))[0]
    assert q.isnan().any(1).tolist() == [False, True, False] and torch.equal(q[0], torch.tensor([.5, .5, 0.]))
