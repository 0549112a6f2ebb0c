"Online and Teacher against loops. What they do while a model trains is in test_in_training.py"
import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fastai_smooth.distributions import Online, Teacher, Uniform
from fastai_smooth.losses import LabelSmoothingCrossEntropy
from fastai_smooth.targets import to_dense

K = 4


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=1e-6, check_dtype=False)


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


def test_dense_labels_without_mass_or_with_nan_teach_nothing():
    dist, z = Online(K), 5*torch.eye(K)
    q = torch.eye(K)
    q[1], q[2, 2] = 0., float('nan')
    dist.update(z, q), dist.next_epoch()
    close(dist.matrix(K)[1:3], torch.full((2, K), 1/K)), close(dist.matrix(K)[[0, 3]], z.softmax(1)[[0, 3]])


def test_the_order_of_the_rows_does_not_matter():
    z, y = torch.randn(1000, K), torch.randint(0, K, (1000,))
    a, b, perm = Online(K), Online(K), torch.randperm(1000)
    a.update(z, y), b.update(z[perm], y[perm])
    assert torch.equal(a.sums, b.sums) and torch.equal(a.counts, b.counts)


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


def test_more_rows_than_single_precision_counts():
    "The sums of 2^25 rows, and then one batch that differs: in single precision it would be lost"
    dist, first, later = Online(2), torch.tensor([2., 0.]), torch.tensor([9., 0.])
    dist.update(first.expand(2**10, 2), torch.zeros(2**10).long())
    dist.sums.mul_(2**15), dist.counts.mul_(2**15)
    for _ in range(8): dist.update(later.expand(2**17, 2), torch.zeros(2**17).long())
    assert dist.counts[0] == 2**25 + 2**20
    dist.next_epoch()
    expected = (first.double().softmax(0)*2**25 + later.double().softmax(0)*2**20)/(2**25 + 2**20)
    torch.testing.assert_close(dist.matrix(2)[0].double(), expected, rtol=1e-6, atol=1e-7)


def test_predictions_without_bounds_teach_nothing():
    dist = Online(3, momentum=.9)
    dist.update(torch.tensor([[torch.inf, 0., 0.], [torch.nan, 0., 0.], [0., 3., 0.]]), torch.tensor([0, 0, 1]))
    dist.next_epoch()
    assert dist.matrix(3).isfinite().all() and torch.equal(dist.matrix(3)[0], torch.full((3,), 1/3))


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


def test_a_model_with_several_outputs():
    "fastai's text models give the logits and hidden states; a model of one output stays as it is"
    class Text(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind
        def forward(self, x): return self.kind([x, x.new_zeros(3, 9), x.new_zeros(3, 9)])
    x, q = torch.randn(5, K), torch.rand(5, K)
    for kind in (tuple, list): assert torch.equal(Teacher(Text(kind), 2.)(q, inputs=x), Teacher(nn.Identity(), 2.)(q, inputs=x))


def test_a_pickle_has_no_teacher_and_a_copy_has():
    model = nn.Sequential(nn.Linear(3, 400), nn.Linear(400, K))
    teacher, x, q = Teacher(model, 3.), torch.randn(5, 3), torch.rand(5, K)
    u = teacher(q, inputs=x)
    loss = LabelSmoothingCrossEntropy(.1, dist=.5*teacher + .5*Uniform())
    assert len(pickle.dumps(loss)) < 10_000 < len(pickle.dumps(model))
    bare = pickle.loads(pickle.dumps(loss)).dist.parts[0]
    assert bare.temperature == 3. and repr(bare) == 'Teacher(None, temperature=3)' and bare.model is None
    for use in (lambda: bare(q, inputs=x), lambda: bare.check_classes(K)):
        with pytest.raises(ValueError, match=r'no model any more.* Set its `.model`'): use()
    bare.model = model
    assert torch.equal(bare(q, inputs=x), u) and teacher.model is model, "what was pickled goes on"
    deep, flat = copy.deepcopy(teacher), copy.copy(teacher)
    assert torch.equal(deep(q, inputs=x), u) and torch.equal(flat(q, inputs=x), u)
    assert deep.model is not model and flat.model is model and copy.deepcopy([teacher]*2)[0].temperature == 3.
    flat.model = None
    assert teacher.model is model
    pair = copy.deepcopy([teacher, teacher])
    assert pair[0] is pair[1] and type(pair[0]) is Teacher
