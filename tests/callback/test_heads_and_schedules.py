"Several targets, losses that know indices only, schedules of the strength and what is logged of them, data sets that cannot be validated"
import matplotlib.pyplot as plt
import numpy as np
import oracles
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import SchedCos, SchedNo, combine_scheds
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.torch_core import set_seed
from learners import Items, K, Look, check_seen, fit, make_learner
from torch import nn
from torch.nn import functional as F

from fastai_smooth.callback import LabelSmoothing, OneOf, TimmMix, soft_loss
from fastai_smooth.distributions import ClassPrior
from fastai_smooth.losses import EachClass, LabelSmoothingCrossEntropy, MultiTargetLoss
from fastai_smooth.targets import to_dense

A, B, C = 3, 5, 4  # classes of two exclusive targets, labels of a third one


class Heads(nn.Module):
    "Logits of three heads, from an image whose channels are the truth of the three targets"
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(A+B+C, A+B+C)

    def forward(self, x): return self.linear(x.mean((2, 3))).split([A, B, C], 1)


class OneInput(Items):
    "One input and several targets"
    n_inp = 1
    def new_empty(self): return OneInput()


def heads_learner(loss_func, cbs, n_targets=3, n=24, bs=8):
    set_seed(0)
    g = torch.Generator().manual_seed(1)
    ya, yb = torch.randint(0, A, (n,), generator=g), torch.randint(0, B, (n,), generator=g)
    yc = torch.randint(0, 2, (n, C), generator=g).float()
    truth = torch.cat([F.one_hot(ya, A), F.one_hot(yb, B), yc], 1).float()
    x = truth[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
    items = list(zip(x, *(ya, yb, yc)[:n_targets]))
    dls = DataLoaders(*(TfmdDL(OneInput(items), bs=bs, shuffle=s, num_workers=0, device='cpu') for s in (True, False)), device='cpu')
    dls.c = [A, B, C]
    return Learner(dls, Heads(), loss_func=loss_func, cbs=cbs, lr=.1)


def expected(x, preds, eps_a, eps_b, eps_c, matrix_b=None):
    "The three losses from image and predictions alone"
    qa, qb, qc = (t.tolist() for t in x.mean((2, 3)).split([A, B, C], 1))
    smooth_b = [oracles.smooth_row(q, eps_b, matrix=matrix_b) for q in qb]
    binary = oracles.binary_cross_entropy(preds[2].tolist(), [[oracles.binary_entry(v, eps_c, 'half', C) for v in row] for row in qc])
    return [oracles.cross_entropy(preds[0].tolist(), qa, eps_a), oracles.cross_entropy(preds[1].tolist(), smooth_b, 0.), binary]


class LookAtHeads(Look):
    name = 'look_at_heads'

    def after_loss(self):
        preds = [p.detach().clone() for p in self.learn.pred]
        self.seen.append((self.learn.xb[0].detach().clone(), preds, float(self.learn.loss_grad.detach()), self.learn.yb))


PRIOR = [1., 2., 3., 4., 0.]
# fastai's MixUp takes one target only: it asks the tuple of several for its size
MIX = {'none': lambda: [], 'oneof': lambda: [OneOf(TimmMix(), TimmMix(0., 1., mode='pair'))], 'timm': lambda: [TimmMix(.8, 1., mode='elem')]}


@pytest.mark.parametrize('mixers', list(MIX))
@pytest.mark.parametrize('cb, eps', [
    (lambda: LabelSmoothing(.2), (.2, 0., 0.)),
    (lambda: LabelSmoothing(.2, target=1), (0., .2, 0.)),
    (lambda: LabelSmoothing(.2, target=-1), (0., 0., .2)),
    (lambda: LabelSmoothing({0: .1, 1: .3, 2: .2}, target=(0, 1, 2)), (.1, .3, .2)),
    (lambda: LabelSmoothing({0: .1, 1: .3}, {1: ClassPrior(PRIOR)}, target=(0, 1)), (.1, .3, 0.))])
def test_each_target_has_its_own_strength(cb, eps, mixers):
    loss = MultiTargetLoss(CrossEntropyLossFlat(), nn.CrossEntropyLoss(), BCEWithLogitsLossFlat(), weights=[1., .5, 2.])
    smooth = cb()
    learn = fit(heads_learner(loss, [smooth, *MIX[mixers](), LookAtHeads()]), 2)
    matrix = np.tile(np.array(PRIOR)/sum(PRIOR), (B, 1)) if isinstance(smooth.dist, dict) else None
    for x, preds, seen, yb in learn.look_at_heads.seen:
        a, b, c = expected(x, preds, *eps, matrix)
        np.testing.assert_allclose(seen, a+.5*b+2*c, rtol=2e-5)
        assert [t.is_floating_point() for t in yb] == [False, False, True], "the data loader's targets are back"
    assert learn.loss_func is loss


def test_validation_of_several_heads_is_plain():
    loss = MultiTargetLoss(CrossEntropyLossFlat(), CrossEntropyLossFlat(), BCEWithLogitsLossFlat())
    learn = heads_learner(loss, [LabelSmoothing(.2, target=(0, 1, 2))])
    fit(learn, 1)
    x, *ys = (torch.stack(t) for t in zip(*learn.dls.valid.dataset))
    with torch.no_grad(): pa, pb, pc = learn.model(x)
    plain = F.cross_entropy(pa, ys[0])+F.cross_entropy(pb, ys[1])+F.binary_cross_entropy_with_logits(pc, ys[2])
    with learn.no_bar(): np.testing.assert_allclose(learn.validate()[0], plain.item(), rtol=1e-5)


class Sum(nn.Module):
    "A user's loss of two heads that knows dense targets"
    def forward(self, preds, a, b, c):
        return soft_cross_entropy(preds[0], a) + soft_cross_entropy(preds[1], b) + F.binary_cross_entropy_with_logits(preds[2], c)


def soft_cross_entropy(z, q):
    if not q.is_floating_point(): return F.cross_entropy(z, q)
    return -(q*z.log_softmax(1)).sum(1).mean()


def test_a_registered_loss_of_several_targets_gets_each_smoothed():
    soft_loss.register(Sum, lambda loss: loss)
    learn = fit(heads_learner(Sum(), [LabelSmoothing({0: .1, 1: .3}, target=(0, 1)), TimmMix(), LookAtHeads()]), 1)
    for x, preds, seen, _ in learn.look_at_heads.seen: np.testing.assert_allclose(seen, sum(expected(x, preds, .1, .3, 0.)), rtol=2e-5)


@pytest.mark.parametrize('make, words', [
    (lambda: LabelSmoothing(target=()), 'target must be'), (lambda: LabelSmoothing(target=(0, 0)), 'different'),
    (lambda: LabelSmoothing({0: .1}, target=(0, 1)), 'eps has values'), (lambda: LabelSmoothing(dist={2: ClassPrior([1])}, target=(0, 1)), 'dist has values'),
    (lambda: LabelSmoothing({0: .1, 1: 2.}, target=(0, 1)), r'eps must lie in \[0, 1\]')])
def test_bad_targets(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_targets_that_do_not_fit_the_loss():
    with pytest.raises(ValueError, match='does not have'): fit(heads_learner(MultiTargetLoss(CrossEntropyLossFlat(), CrossEntropyLossFlat()),
                                                                             [LabelSmoothing(target=2)], 2), 1)
    with pytest.raises(ValueError, match='MultiTargetLoss'): fit(make_learner('index', None, [LabelSmoothing(target=(0, 1))]), 1)
    own = MultiTargetLoss(LabelSmoothingCrossEntropy(.1), CrossEntropyLossFlat(), BCEWithLogitsLossFlat())
    with pytest.raises(ValueError, match='already smooths'): fit(heads_learner(own, [LabelSmoothing(.1)]), 1)
    learn = fit(heads_learner(own, [LabelSmoothing(.3, target=1), TimmMix(), LookAtHeads()]), 1) # the first head's own smoothing stays
    for x, preds, seen, _ in learn.look_at_heads.seen: np.testing.assert_allclose(seen, sum(expected(x, preds, .1, .3, 0.)), rtol=2e-5)


def test_multi_target_loss_alone():
    loss = MultiTargetLoss(CrossEntropyLossFlat(), MSELossFlat(), weights=[1., 2.])
    preds, targets = (torch.randn(5, 3), torch.randn(5, 1)), (torch.tensor([0, 1, 2, 0, 1]), torch.randn(5, 1))
    value = F.cross_entropy(preds[0], targets[0]) + 2*F.mse_loss(preds[1], targets[1])
    torch.testing.assert_close(loss(preds, *targets), value)
    assert loss.reduction == 'mean'
    loss.reduction = 'none'
    each = F.cross_entropy(preds[0], targets[0], reduction='none') + 2*F.mse_loss(preds[1], targets[1], reduction='none')[:, 0]
    torch.testing.assert_close(loss(preds, *targets), each)
    assert [d.shape for d in loss.decodes(loss.activation(preds))] == [(5,), (5, 1)]
    weighted = MultiTargetLoss(nn.CrossEntropyLoss(torch.ones(3)), CrossEntropyLossFlat(weight=torch.ones(3))).double()
    assert weighted.losses[0].weight.dtype == weighted.losses[1].func.weight.dtype == torch.float64
    for bad in ((preds[0], targets[0]), ((preds[0],), *targets)):
        with pytest.raises(ValueError, match='There are 2 losses'): loss(*bad)
    with pytest.raises(ValueError, match='needs a loss for each head'): MultiTargetLoss()
    with pytest.raises(ValueError, match='weights has 1'): MultiTargetLoss(nn.MSELoss(), nn.MSELoss(), weights=[1.])


# -- losses of indices only

class Hinge(nn.Module):
    "Linear in the target, and for indices only"
    def __init__(self, reduction='mean'):
        super().__init__()
        self.reduction = reduction

    def forward(self, pred, target):
        own = pred.gather(1, target[:, None])
        each = ((1+pred-own).relu().sum(1)-1)
        return each.mean() if self.reduction == 'mean' else each.sum() if self.reduction == 'sum' else each


def hinge_loop(pred, q):
    total = 0.
    for z, row in zip(pred.tolist(), q.tolist()):
        for k, share in enumerate(row): total += share*sum(max(0., 1+v-z[k]) for j, v in enumerate(z) if j != k)
    return total/len(pred)


@pytest.mark.parametrize('how', ['wrapped', 'registered'])
@pytest.mark.parametrize('mixers', [[], [MixUp, CutMix], [MixUp]])
def test_a_loss_of_indices_asked_once_per_class(mixers, how):
    if how == 'registered': soft_loss.register(Hinge, EachClass)
    loss = EachClass(Hinge()) if how == 'wrapped' else Hinge()
    learn = fit(make_learner('index', loss, [LabelSmoothing(.2), *[m() for m in mixers], Look()]), 1)
    for x, pred, seen, _ in learn.look.seen:
        q = x.mean((2, 3))
        np.testing.assert_allclose(seen, hinge_loop(pred, .8*q+.2/K), rtol=2e-5)
    assert learn.loss_func is loss and loss.reduction == 'mean'


def test_each_class_equals_a_loss_that_knows_dense_targets():
    z, q = torch.randn(4, K, 3, 2, dtype=torch.float64, requires_grad=True), torch.rand(4, K, 3, 2, dtype=torch.float64)
    q[0] = 0.
    for reduction in ('mean', 'sum', 'none'):
        each, whole = EachClass(nn.CrossEntropyLoss(reduction=reduction)), LabelSmoothingCrossEntropy(0., reduction=reduction, axis=1)
        torch.testing.assert_close(each(z, q), whole(z, q))
        y = torch.randint(0, K, (4, 3, 2))
        torch.testing.assert_close(each(z, y), F.cross_entropy(z, y, reduction=reduction))
        torch.testing.assert_close(each(z, to_dense(y, K)), F.cross_entropy(z, y, reduction=reduction))
    (g,) = torch.autograd.grad(EachClass(nn.CrossEntropyLoss())(z, torch.zeros_like(q)), z)
    assert not g.any(), "nothing to learn from"
    with pytest.raises(TypeError, match='no `reduction`'): EachClass(F.cross_entropy)


def test_each_class_puts_the_reduction_back():
    class Fails(Hinge):
        def forward(self, pred, target): raise RuntimeError('raised by a test')
    loss = Fails()
    with pytest.raises(RuntimeError): EachClass(loss)(torch.randn(2, K), torch.rand(2, K))
    assert loss.reduction == 'mean'


# -- schedules

WARM = combine_scheds([.2, .6, .2], [SchedCos(0., .2), SchedNo(.2, .2), SchedCos(.2, 0.)])


class Log(Callback):
    run_valid = False
    def before_fit(self): self.pct = []
    def before_batch(self): self.pct.append(self.pct_train)


@pytest.mark.parametrize('how', ['fit', 'one_cycle'])
def test_the_recorder_has_the_strength_of_each_batch(how):
    "Also beside the learning rates of a schedule, and of the last fit only"
    learn = make_learner('index', None, [LabelSmoothing(WARM), MixUp(), Log(), Look()])
    for n in (1, 2):
        if how == 'fit': fit(learn, n)
        else:
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n)
        logged = learn.recorder.hps['eps']
        np.testing.assert_allclose(logged, [float(WARM(p)) for p in learn.log.pct])
        assert len(logged) == 3*n and ('lr' in learn.recorder.hps) == (how == 'one_cycle')
    for (x, pred, seen, _), eps in zip(learn.look.seen, logged): check_one(x, pred, seen, eps)
    if how == 'one_cycle':
        learn.recorder.plot_sched()
        assert [ax.get_ylabel() for ax in plt.gcf().axes if ax.lines] == ['lr', 'mom', 'eps']
    plt.close('all')


def check_one(x, pred, seen, eps):
    q = x.mean((2, 3)).tolist()
    np.testing.assert_allclose(seen, oracles.cross_entropy(pred.tolist(), q, eps), rtol=2e-5)


def test_a_constant_leaves_the_recorder_alone():
    learn = fit(make_learner('index', None, [LabelSmoothing(.1)]), 1)
    assert not hasattr(learn.recorder, 'hps')


@pytest.mark.parametrize('cb, lines', [(LabelSmoothing(.1), [(.1, .1)]), (LabelSmoothing(SchedCos(.2, 0.)), [(.2, 0.)]),
                                       (LabelSmoothing([.1, .3]), [(.1, .1), (.3, .3)]),
                                       (LabelSmoothing({0: .1, 1: SchedCos(0., .4)}, target=(0, 1)), [(.1, .1), (0., .4)])])
def test_plot_eps(cb, lines):
    _, mine = plt.subplots()
    ax = cb.plot_eps(ax=mine)
    assert ax is mine and ax.get_xlabel() and ax.get_ylabel()
    np.testing.assert_allclose([(line.get_ydata()[0], line.get_ydata()[-1]) for line in ax.lines], lines, atol=1e-6)
    assert LabelSmoothing(.1).plot_eps() is not mine
    plt.close('all')


def test_plot_of_a_schedule_out_of_range():
    with pytest.raises(ValueError, match=r'eps must lie in \[0, 1\]'): LabelSmoothing(lambda p: 2*p).plot_eps()
    plt.close('all')


# -- dense data sets

class Count(Callback):
    steps = 0
    def after_step(self): self.steps += 1


def test_dense_targets_that_could_not_be_validated_are_an_error_before_a_step():
    learn = make_learner('one_hot', CrossEntropyLossFlat(), [LabelSmoothing(.1), MixUp(), Count()])
    weights = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match='validation after the first epoch would fail'): fit(learn, 1)
    assert learn.count.steps == 0 and all(torch.equal(a, b) for a, b in zip(weights, learn.model.parameters()))
    learn = fit(make_learner('one_hot', LabelSmoothingCrossEntropy(0.), [LabelSmoothing(.1), MixUp(), Look()]), 1)
    check_seen(learn, 'one_hot', .1)


def test_dense_targets_without_validation_are_fine():
    learn = make_learner('one_hot', CrossEntropyLossFlat(), [LabelSmoothing(.1), Look()])
    learn.dls.loaders = learn.dls.loaders[:1]
    learn._do_epoch_validate = lambda *a, **k: None
    check_seen(fit(learn, 1), 'one_hot', .1)


# -- what users' losses keep, and how they are looked into

def test_reductions_of_the_heads_survive_losses_per_example():
    parts = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction='sum'), BCEWithLogitsLossFlat()
    learn = fit(heads_learner(MultiTargetLoss(*parts), [LabelSmoothing(.1)]), 1)
    with learn.no_bar():
        before = learn.validate()[0]
        *_, losses = learn.get_preds(with_loss=True)
        assert losses.shape == (24,) and [p.reduction for p in parts] == ['mean', 'sum', 'mean'] and learn.validate()[0] == before


def test_a_regression_head_beside_a_smoothed_one():
    loss = MultiTargetLoss(CrossEntropyLossFlat(), CrossEntropyLossFlat(), MSELossFlat())
    learn = fit(heads_learner(loss, [LabelSmoothing(.2, target=(0, 1)), TimmMix(), LookAtHeads()]), 1)
    for x, preds, seen, _ in learn.look_at_heads.seen:
        a, b, _ = expected(x, preds, .2, .2, 0.)
        np.testing.assert_allclose(seen, a+b+F.mse_loss(preds[2], x.mean((2, 3))[:, A+B:]).item(), rtol=2e-5)
    with pytest.raises(TypeError, match='MSELoss is a loss that LabelSmoothing does not know'): fit(heads_learner(loss, [LabelSmoothing(.2, target=2)]), 1)
    with pytest.raises(ValueError, match='twice'): fit(heads_learner(loss, [LabelSmoothing(.2, target=(2, -1))]), 1)
    for bad in (F.l1_loss, nn.L1Loss):
        with pytest.raises(TypeError, match='loss objects'): MultiTargetLoss(bad)
    assert len(list(MultiTargetLoss(nn.Linear(2, 2)).parameters())) == 2


@pytest.mark.parametrize('make', [lambda: EachClass(nn.CrossEntropyLoss(label_smoothing=.1)), lambda: EachClass(LabelSmoothingCrossEntropy(.2)),
                                  lambda: EachClass(CrossEntropyLossFlat(label_smoothing=.1))])
def test_smoothing_twice_is_seen_through_a_wrapper(make):
    with pytest.raises(ValueError, match='already smooths'): fit(make_learner('index', make(), [LabelSmoothing(.1)]), 1)


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(torch.tensor([1., 2., 3., 10.])), nn.CrossEntropyLoss(ignore_index=2),
                                  CrossEntropyLossFlat(weight=torch.tensor([1., 0., 3., 10.]), ignore_index=3)])
def test_each_class_divides_as_the_loss_does(loss):
    z, y = torch.randn(9, K), torch.arange(9) % K
    each = EachClass(loss)
    torch.testing.assert_close(each(z, to_dense(y, K)), each(z, y))
    learn = fit(make_learner('index', each, [LabelSmoothing(0.), Look()]), 1)
    for _, pred, seen, yb in learn.look.seen: np.testing.assert_allclose(seen, loss(pred, yb[0]).item(), rtol=1e-5)
    hopeless = torch.tensor([[-torch.inf, 0., 1., 2.]])
    assert EachClass(nn.CrossEntropyLoss())(hopeless, torch.tensor([[0., 1., 0., 0.]])).isfinite()


class WithGuard(nn.Module):
    "A registered loss whose eps guards a division"
    eps = 1e-8
    def forward(self, z, q): return -(q*(z.softmax(1)+self.eps).log()).sum(1).mean() if q.is_floating_point() else F.cross_entropy(z, q)


def test_a_guard_called_eps_is_no_strength():
    soft_loss.register(WithGuard, lambda loss: loss)
    learn = fit(make_learner('index', WithGuard(), [LabelSmoothing(.2), MixUp(), Look()]), 1)
    for x, pred, seen, _ in learn.look.seen: check_one(x, pred, seen, .2)


def test_hard_labels_in_validation_are_fine():
    "Dense labels in training only, such as those of another model"
    dense, hard = make_learner('one_hot'), make_learner('index')
    learn = make_learner('index', None, [LabelSmoothing(.1), Look()])
    learn.dls.loaders = [dense.dls.train, hard.dls.valid]
    check_seen(fit(learn, 1), 'index', .1)


def test_numbers_of_numpy():
    learn = make_learner('index', None, [LabelSmoothing(.2, target=np.int64(0)), MixUp(), Look()])
    learn.dls.c = np.int64(K)
    check_seen(fit(learn, 1), 'index', .2)


def test_a_second_look_at_the_loss_is_not_a_second_batch():
    class Again(Callback):
        run_valid = False
        def after_pred(self): self.learn.loss_func(self.learn.pred, *self.learn.yb)
    learn = fit(heads_learner(MultiTargetLoss(CrossEntropyLossFlat(), CrossEntropyLossFlat(), BCEWithLogitsLossFlat()),
                              [LabelSmoothing({0: .1, 1: SchedCos(.2, 0.)}, target=(0, 1)), Again()]), 1)
    assert len(learn.recorder.hps['eps']) == 3 and learn.recorder.hps['eps'][0] == .2


@pytest.mark.parametrize('c', [2, 10])
def test_another_number_of_classes_than_the_model_has(c):
    "Said in the first batch, with both numbers"
    learn = make_learner('index', None, [LabelSmoothing(.1), MixUp(), Count()], c=c)
    with pytest.raises(ValueError, match=f'The target has {c} classes and the logits have {K}: check n_classes'): fit(learn, 1)
    assert learn.count.steps == 0
