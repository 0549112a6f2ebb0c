"Binary targets: conventions, what is unknown, one form for the losses"
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastai_smooth.targets import MixedTarget, binary_levels, binary_target, check_probabilities, convert_eps, smooth_binary


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False)


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


@given(st.floats(0, .5))
def test_converted_binary_eps_gives_the_same_targets(eps):
    y = torch.tensor([[0., 1., .3]])
    close(smooth_binary(y, eps, 'complement'), smooth_binary(y, convert_eps(eps, 3, 'complement', 'half'), 'half'))


def test_the_target_is_not_changed():
    y = torch.rand(4, 3)
    before = y.clone()
    smooth_binary(y, .5)
    assert torch.equal(y, before)


@given(st.floats(0, 1), st.sampled_from(['half', 'uniform', 'complement']))
def test_levels_are_what_smoothing_makes_of_0_and_1(eps, convention):
    y = torch.tensor([[0., 1., 1.]], dtype=torch.float64)
    off, on = binary_levels(eps, convention, None, None, y)
    close(smooth_binary(y, eps, convention), torch.tensor([[off, on, on]], dtype=torch.float64))


# -- one form for the losses

@pytest.mark.parametrize('axis', [1, -1, 2])
def test_indices_become_multi_hot(axis):
    y = torch.tensor([[0, 2, 1, -100], [1, 1, 0, 2]])
    logits = torch.zeros(2, 3, 4).movedim(1, axis)
    expected = torch.tensor(oracles.encode(y.flatten().tolist(), 3)).view(2, 4, 3)
    expected[0, 3] = math.nan
    for given_ in (y, y.unsqueeze(axis)):
        t, was_index = binary_target(logits, given_, axis)
        assert was_index
        torch.testing.assert_close(t, expected.movedim(-1, axis), equal_nan=True)


def test_dense_forms_pass():
    z = torch.zeros(2, 3, dtype=torch.float64)
    for y in (torch.tensor([[0, 1, 1], [1, 0, 0]]), torch.tensor([[0, 1, 1], [1, 0, 0]]).bool(), torch.rand(2, 3)):
        t, was_index = binary_target(z, y)
        assert not was_index and t.dtype is torch.float64
        close(t, y)
    assert binary_target(torch.zeros(4, 1), torch.tensor([0, 1, 1, 0]))[0].shape == (4, 1), "one logit: the labels themselves"


def test_a_blend_with_something_unknown_is_unknown():
    mix = MixedTarget(torch.tensor([[2, 0], [1, -100], [1, -100]]), torch.tensor([[.7, .3], [.7, .3], [1., 0.]]), 3)
    t, _ = binary_target(torch.zeros(3, 3), mix)
    close(t[0], torch.tensor([.3, 0., .7]))
    assert t[1].isnan().all() and not t[2].isnan().any()


@pytest.mark.parametrize('target, error, words', [
    (torch.rand(2, 4), ValueError, r'\(2, 3\) want .* indices of shape \(2,\), but got torch.float32 of shape \(2, 4\)'),
    (torch.tensor([0, 7]), ValueError, r'Label 7 is outside \[0, 3\)'), ([0, 1], TypeError, 'list'), (torch.full((2, 3), 2.), ValueError, 'holds 2'),
    (torch.tensor([True, False]), ValueError, 'torch.bool')])
def test_binary_target_errors(target, error, words):
    with pytest.raises(error, match=words): binary_target(torch.zeros(2, 3), target)


def test_nan_is_allowed_among_probabilities_and_hides_nothing():
    check_probabilities(torch.tensor([0., math.nan, 1.]))
    with pytest.raises(ValueError, match='holds -3'): check_probabilities(torch.tensor([math.nan, -3.]))
    torch.func.vmap(smooth_binary)(torch.rand(3, 2))  # there are no values to check


def test_labels_that_cannot_be_read_are_not_silently_no_positive():
    "nan means unknown here, so inf marks the row and makes the loss inf or nan"
    z, y = torch.zeros(2, 2, 3), torch.tensor([[0, -100], [1, 7]])
    t = torch.func.vmap(lambda z, y: binary_target(z, y)[0])(z, y)
    assert t.isinf().any(-1).tolist() == [[False, False], [False, True]] and t[0, 1].isnan().all()
