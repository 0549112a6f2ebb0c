"Distributions under the callback: what they learn, and that checkpoints carry it"
import copy

import fastai.callback.schedule  # noqa: F401  (gives the Learner `lr_find`)
import numpy as np
import oracles
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from learners import K, Look, check_seen, fit, make_learner
from torch import nn

from fastai_smooth.callback import LabelSmoothing, OneOf
from fastai_smooth.distributions import ClassPrior, Online, Spatial, Taxonomy, Teacher, Uniform, Zipf
from fastai_smooth.losses import LabelSmoothingCrossEntropy


class Watch(Callback):
    "For each batch: image, prediction, loss, the data loader's labels, and the matrix in use; the matrix at each epoch's end"
    order, run_valid = 90, True
    def __init__(self, dist): self.dist = dist
    def before_fit(self): self.seen, self.ends = [], []
    def after_loss(self):
        if self.training:
            self.seen.append((self.x.clone(), self.learn.pred.detach().clone(), self.learn.loss_grad.item(), self.y.clone(), self.dist.matrix(K)))
    def after_train(self): self.ends.append(len(self.seen))


def learned(batches, k=K):
    "Mean prediction on what was right, by the data loader's labels"
    sums, counts = np.zeros((k, k)), np.zeros(k)
    for _, pred, _, y, _ in batches:
        for row, label in zip(oracles.rows(pred, 1), y.flatten().tolist()):
            if label >= 0 and row.argmax() == label:
                p = np.exp(row-row.max())
                sums[label] += p/p.sum()
                counts[label] += 1
    return np.array([s/c if c else np.full(k, 1/k) for s, c in zip(sums, counts)])


def truth_rows(x, kind): return oracles.rows(x if kind == 'mask' else x.mean((2, 3)), 1)


@pytest.mark.parametrize('kind, mixers', [(kind, mixers) for kind in ('index', 'mask', 'one_hot') for mixers in ([], [MixUp], [MixUp, CutMix], ['one of'])
                                          if not (kind == 'mask' and CutMix in mixers)]) # CutMix blends whole masks, which the image does not show
def test_online_learns_from_the_labels_of_the_data_loader(kind, mixers):
    cbs = [OneOf(MixUp(), MixUp(.1), p=[.5, .3])] if mixers == ['one of'] else [m() for m in mixers]
    dist = Online(K)
    loss = LabelSmoothingCrossEntropy(0., axis=1)
    watch = Watch(dist)
    learn = fit(make_learner(kind, loss, [LabelSmoothing(.5, dist), *cbs, watch]), 3, .5)
    start, matrix = 0, np.full((K, K), 1/K)
    for end in watch.ends:
        batches = watch.seen[start:end]
        if kind == 'one_hot': batches = [(x, p, v, y.argmax(1), m) for x, p, v, y, m in batches]
        for x, pred, value, _, used in batches:
            np.testing.assert_allclose(used, matrix, atol=1e-6)
            rows = [oracles.smooth_row(q, .5, matrix=matrix) for q in truth_rows(x, kind)]
            mass = sum(q.sum() for q in truth_rows(x, kind))
            expected = sum(-sum(s*v for s, v in zip(r, oracles.log_softmax_row(z))) for r, z in zip(rows, oracles.rows(pred, 1)))/mass
            np.testing.assert_allclose(value, expected, rtol=2e-5)
        matrix, start = learned(batches), end
    np.testing.assert_allclose(dist.matrix(K), matrix, atol=1e-6)
    assert abs(matrix-1/K).max() > .05 and learn.loss_func is loss


class Stop(Callback):
    def __init__(self, event, error, at): self.event, self.error, self.at, self.n = event, error, at, 0
    def __call__(self, name):
        self.n += name == self.event
        if name == self.event and self.n == self.at: raise self.error('raised by a test')


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, CancelFitException])
@pytest.mark.parametrize('event', ['after_loss', 'after_batch', 'before_batch', 'after_step'])
def test_a_pass_cut_short_leaves_no_trace(event, error):
    dist = Online(K)
    learn = make_learner('index', None, [LabelSmoothing(.5, dist)])
    fit(learn, 1, .5)
    before = dist.matrix(K)
    assert (before != 1/K).any()
    learn.add_cb(Stop(event, error, 2))
    try: fit(learn, 2)
    except error: pass
    assert torch.equal(dist.matrix(K), before) and not dist.counts.any() and not dist.sums.any()


def test_lr_find_leaves_it_as_it_was():
    dist = Online(K)
    learn = fit(make_learner('index', None, [LabelSmoothing(.5, .5*Uniform()+.5*dist), MixUp()]), 1, .5)
    before = dist.matrix(K)
    for n in (7, 30): # shorter and longer than an epoch
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=n, show_plot=False)
        assert torch.equal(dist.matrix(K), before) and not dist.counts.any()


def trained(dist, path=None, **kwargs):
    learn = make_learner('index', None, [LabelSmoothing(.5, dist)], **kwargs)
    if path is not None: learn.path = path
    return fit(learn, 1, .5)


@pytest.mark.parametrize('with_opt', [True, False])
def test_save_and_load(tmp_path, with_opt):
    dist = Online(K)
    learn = trained(.3*Uniform()+.7*dist, tmp_path)
    learn.save('model', with_opt=with_opt)
    saved = dist.matrix(K)
    fit(learn, 1, .5)
    assert not torch.equal(dist.matrix(K), saved)
    learn.load('model', with_opt=with_opt)
    assert torch.equal(dist.matrix(K), saved)
    # a new learner with the same callback
    other = Online(K)
    fresh = make_learner('index', None, [LabelSmoothing(.5, .3*Uniform()+.7*other)])
    fresh.path = tmp_path
    fresh.create_opt()
    fresh.load('model', with_opt=with_opt)
    assert torch.equal(other.matrix(K), saved)
    # one that gets the callback later
    late, third = make_learner('index'), Online(K)
    late.path = tmp_path
    late.add_cb(LabelSmoothing(.5, .3*Uniform()+.7*third))
    late.load('model', with_opt=False)
    assert torch.equal(third.matrix(K), saved)
    # without the callback; and a plain file into a learner with it
    plain = make_learner('index')
    plain.path = tmp_path
    plain.load('model', with_opt=False)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), fresh.model.parameters()))
    plain.save('plain', with_opt=False)
    fresh.load('plain', with_opt=False)
    assert torch.equal(other.matrix(K), saved)
    assert set(torch.load(tmp_path/'models'/'plain.pth', weights_only=True)) == set(plain.model.state_dict())


def test_a_removed_callback_leaves_the_model_alone(tmp_path):
    dist = Online(K)
    learn = trained(dist, tmp_path)
    learn.remove_cb(LabelSmoothing)
    assert not learn.model._state_dict_hooks and not learn.model._load_state_dict_pre_hooks
    learn.save('model', with_opt=False)
    before = dist.matrix(K)
    learn.load('model', with_opt=False)
    assert torch.equal(dist.matrix(K), before)
    uniform = make_learner('index', None, [LabelSmoothing(.5, ClassPrior([1]*K))])
    fit(uniform, 1)
    assert not uniform.model._state_dict_hooks, "nothing to carry"


def test_a_model_that_is_replaced(tmp_path):
    dist = Online(K)
    learn = trained(dist, tmp_path)
    old, learn.model = learn.model, copy.deepcopy(learn.model)
    learn.opt = None
    fit(learn, 1, .5)
    assert not old._state_dict_hooks
    learn.save('model', with_opt=False)
    saved = dist.matrix(K)
    dist.transition.fill_(1/K)
    learn.load('model', with_opt=False)
    assert torch.equal(dist.matrix(K), saved)


def test_export(tmp_path):
    dist = Online(K)
    learn = trained(dist, tmp_path)
    learn.export('learner.pkl')
    loaded = load_learner(tmp_path/'learner.pkl')
    cb = next(c for c in loaded.cbs if isinstance(c, LabelSmoothing))
    assert torch.equal(cb.dist.matrix(K), dist.matrix(K))
    cb.dist.transition.fill_(1/K)
    loaded.model.load_state_dict(learn.model.state_dict())
    assert torch.equal(cb.dist.matrix(K), dist.matrix(K)), "the loaded learner's checkpoints carry it too"


@pytest.mark.parametrize('summed', [False, True])
def test_an_exported_student_has_no_teacher(tmp_path, summed):
    big = nn.Sequential(nn.Flatten(), nn.Linear(K*16, 3000), nn.Linear(3000, K))
    teacher = Teacher(big, 2.)
    learn = make_learner('index', None, [LabelSmoothing(.5, .5*teacher + .5*Uniform() if summed else teacher)])
    learn.path = tmp_path
    fit(learn, 1)
    learn.export('student.pkl')
    assert (tmp_path/'student.pkl').stat().st_size < 100_000 < 4*sum(p.numel() for p in big.parameters())
    assert teacher.model is big
    fit(learn, 1), fit(copy.deepcopy(learn), 1) # what was exported, and a copy of it, train on
    loaded = load_learner(tmp_path/'student.pkl')
    x = learn.dls.one_batch()[0]
    assert torch.equal(loaded.model.eval()(x), load_learner(tmp_path/'student.pkl').model.eval()(x))
    assert len(loaded.get_preds(dl=learn.dls.valid)[0]) == len(learn.dls.valid_ds)
    assert next(m for d in loaded.label_smoothing.dists().values() for m in d.members() if isinstance(m, Teacher)).temperature == 2.
    loaded.dls = learn.dls
    loaded.opt = None
    before = [p.clone() for p in loaded.model.parameters()]
    with pytest.raises(ValueError, match='no model any more'): fit(loaded, 1, .1)
    assert all(torch.equal(a, b) for a, b in zip(before, loaded.model.parameters())), "nothing was trained"


def test_an_interrupted_and_resumed_fit_is_an_uninterrupted_one(tmp_path):
    def run(n, start=0, stop=None):
        dist = Online(K)
        cbs = [LabelSmoothing(.5, dist), SaveModelCallback(fname='model', every_epoch=True, with_opt=True), Look()]
        learn = make_learner('index', None, [*cbs, *([Stop('before_epoch', KeyboardInterrupt, stop)] if stop else [])])
        learn.path = tmp_path
        learn.dls.train.shuffle = False
        if start:
            learn.create_opt()
            learn.load(f'model_{start-1}', with_opt=True)
        try: fit(learn, n, .5, start_epoch=start)
        except KeyboardInterrupt: pass
        return learn, dist
    whole, a = run(4)
    run(4, stop=3)
    resumed, b = run(4, start=2)
    torch.testing.assert_close(a.matrix(K), b.matrix(K))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters()): torch.testing.assert_close(p, q)


def test_fine_tune_goes_on_with_what_was_learned():
    dist = Online(K)
    learn = make_learner('index', None, [LabelSmoothing(.5, dist), Watch(dist)], splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())])
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, .5)
    assert abs(learn.watch.seen[0][-1]-1/K).max() > .01, "the second fit starts with the matrix of the first"


def test_teachers_temperature_is_carried(tmp_path):
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(K*16, K)), 3.)
    learn = trained(teacher, tmp_path)
    learn.save('model')
    teacher.temperature = 1.
    learn.load('model')
    assert teacher.temperature == 3.
    assert not any('fastai_smooth' in k or 'teacher' in k for k in learn.model.state_dict())


def test_teacher_sees_the_mixed_inputs_and_not_the_validation():
    class Recorded(nn.Module):
        def __init__(self): super().__init__(); self.seen = []
        def forward(self, x):
            assert not self.training and not torch.is_grad_enabled()
            self.seen.append(x.clone())
            return 5*x.mean((2, 3))
    model = Recorded()
    learn = fit(make_learner('index', None, [LabelSmoothing(.3, Teacher(model, 2.)), MixUp(), CutMix(), Look()]), 2)
    assert len(model.seen) == len(learn.look.seen) == 6 and model.training
    for given, (x, pred, value, _) in zip(model.seen, learn.look.seen):
        assert torch.equal(given, x)
        q = x.mean((2, 3))
        target = .7*q + .3*(5*q/2).softmax(1)
        np.testing.assert_allclose(value, -(target*pred.log_softmax(1)).sum(1).mean(), rtol=1e-5)


def test_zipf_ranks_the_predictions():
    learn = fit(make_learner('index', None, [LabelSmoothing(.3, Zipf()), MixUp(), Look()]), 1)
    for x, pred, value, _ in learn.look.seen:
        q = x.mean((2, 3))
        u = torch.zeros_like(q)
        for c in range(K):
            rank = pred.clone().index_fill_(1, torch.tensor([c]), -torch.inf).argsort(1, descending=True).argsort(1)
            share = (1/(rank+1.)).index_fill_(1, torch.tensor([c]), 0.)
            u += q[:, c:c+1]*share/share.sum(1, keepdim=True)
        np.testing.assert_allclose(value, -((.7*q+.3*u)*pred.log_softmax(1)).sum(1).mean(), rtol=1e-4)


def test_spatial_and_taxonomy_under_the_callback():
    learn = fit(make_learner('mask', CrossEntropyLossFlat(axis=1), [LabelSmoothing(.3, Spatial()), MixUp(), Look()]), 1)
    for x, pred, value, _ in learn.look.seen:
        q = .7*x + .3*Spatial()(x)
        np.testing.assert_allclose(value, -(q*pred.log_softmax(1)).sum()/x.sum(), rtol=1e-5)
    tree = Taxonomy(['x/a', 'x/b', 'y/c', 'y/d'], 3.)
    learn = fit(make_learner('index', None, [LabelSmoothing(.3, tree), MixUp(), Look()]), 1)
    check_seen(learn, 'index', .3, matrix=tree.matrix(K).tolist())


def test_another_number_of_classes_is_an_error_at_the_start():
    for dist in (Online(3), Taxonomy(['a', 'b', 'c']), .5*Uniform()+.5*Online(3)):
        with pytest.raises(ValueError, match='made for 3 classes, but there are 4'): fit(make_learner('index', None, [LabelSmoothing(.3, dist)]), 1)
    with pytest.raises(ValueError, match='must sum to 1'): fit(make_learner('index', None, [LabelSmoothing(.3, .5*Uniform())]), 1)


def test_one_that_occurs_twice_learns_once():
    z, y = 3*torch.randn(30, K), torch.randint(0, K, (30,))
    one, twice = Online(K), Online(K)
    for d in (one, .5*twice+.5*(.5*twice+.5*Uniform())): d.update(z, y), d.next_epoch()
    assert torch.equal(one.matrix(K), twice.matrix(K)) and (one.matrix(K) != 1/K).any()


def test_state_is_carried_through_data_parallel(tmp_path):
    from fastai.distributed import ParallelTrainer
    dist = Online(K)
    learn = make_learner('index', None, [LabelSmoothing(.5, dist), ParallelTrainer(None)])
    learn.path = tmp_path
    fit(learn, 2, .5)
    learn.save('end')
    fresh = Online(K)
    other = make_learner('index', None, [LabelSmoothing(.5, fresh)])
    other.path = tmp_path
    other.load('end', with_opt=False)
    assert torch.equal(fresh.matrix(K), dist.matrix(K)) and (fresh.matrix(K) != 1/K).any()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=7, show_plot=False)
    assert torch.equal(fresh.matrix(K), dist.matrix(K))


def test_a_distribution_of_the_loss_learns_under_the_callback(tmp_path):
    held = Online(K)
    learn = make_learner('index', LabelSmoothingCrossEntropy(0., dist=held), [LabelSmoothing(.5), Watch(held)])
    learn.path = tmp_path
    fit(learn, 2, .5)
    np.testing.assert_allclose(held.matrix(K), learned(learn.watch.seen[3:]), atol=1e-6)
    with pytest.raises(ValueError, match='leave dist out'):
        fit(make_learner('index', LabelSmoothingCrossEntropy(0., dist=held), [LabelSmoothing(.5, Uniform())]), 1)


def test_labels_that_the_loss_ignores_teach_nothing():
    dist = Online(K)
    learn = make_learner('index', CrossEntropyLossFlat(ignore_index=0), [LabelSmoothing(.5, dist)])
    learn.model[1].bias.data[0] = 5.
    fit(learn, 1)
    assert torch.equal(dist.matrix(K)[0], torch.full((K,), 1/K))


def test_a_copy_of_the_model_is_another_model():
    dist = Online(K)
    learn = make_learner('index', None, [LabelSmoothing(.5, dist)])
    fit(learn, 1, .5)
    average = copy.deepcopy(learn.model)
    fit(learn, 1, .5)
    now = dist.matrix(K)
    learn.model.load_state_dict(average.state_dict())
    assert torch.equal(dist.matrix(K), now)
    again = copy.deepcopy(learn)
    fit(again, 1, .5)
    assert torch.equal(dist.matrix(K), now), "a copied learner learns for itself"


def test_inputs_reach_a_teacher_in_a_part_of_the_loss():
    from fastai_smooth.losses import CombinedLoss, LogitPenalty
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(K*16, K)))
    loss = CombinedLoss(LogitPenalty(LabelSmoothingCrossEntropy(0.)), LabelSmoothingCrossEntropy(0.))
    fit(make_learner('index', loss, [LabelSmoothing(.5, teacher), MixUp()]), 1)


@pytest.mark.parametrize('dist', [Uniform(), ClassPrior([1, 2, 3, 4]), Online(4), Zipf()], ids=lambda d: type(d).__name__)
def test_plain_torch_loaders(dist):
    learn = make_learner('index')
    plain = torch.utils.data.DataLoader(list(learn.dls.train_ds), batch_size=8)
    fit(Learner(DataLoaders(plain, plain), learn.model, loss_func=CrossEntropyLossFlat(), cbs=LabelSmoothing(.1, dist, n_classes=K)), 1)
