"The metrics against loops, scikit-learn and torchmetrics, on single, soft and several labels and masks"
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from calibration_oracles import Same, adaptive_loop, aurc_loop, ece_loop
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from learners import fit, make_learner
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss
from timm.loss import BinaryCrossEntropy
from torch import nn
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from fastai_smooth.callback import LabelSmoothing, OneOf
from fastai_smooth.calibration import AUGRC, AURC, ECE, MCE, NLL, AdaptiveECE, Brier, ClasswiseECE, DebiasedCE, SmoothECE
from fastai_smooth.losses import LabelSmoothingBCE, LabelSmoothingCrossEntropy, LabelSmoothingNLL


def values(z, y, metrics, loss=None, bs=7):
    "What the metrics say in a learner whose model gives its input as predictions"
    dl = torch.utils.data.DataLoader(list(zip(z, y)), batch_size=bs)
    learn = Learner(DataLoaders(dl, dl), Same(), loss_func=loss or CrossEntropyLossFlat(), metrics=metrics)
    with learn.no_bar(): return list(learn.validate())[1:]


def example(n=60, k=4, seed=0, scale=3.):
    torch.manual_seed(seed)
    z = scale*torch.randn(n, k)
    return z, torch.where(torch.rand(n) < .5, z.argmax(1), torch.randint(0, k, (n,)))


ALL = [ECE, lambda: ECE(10, 'l2'), MCE, AdaptiveECE, ClasswiseECE, NLL, Brier, AURC, lambda: AURC('logit_norm'), lambda: AURC('logit_norm', 4)]


def expected(z, q, bins=15):
    "All of them in loops, for logits and rows of targets"
    z, q = np.asarray(z, dtype=np.float64), np.asarray(q, dtype=np.float64)
    p = softmax(z, 1)
    nll = -(q*np.log(p)).sum()/q.sum()
    q = q/q.sum(1, keepdims=True)
    conf, right = p.max(1).tolist(), [float(row[g]) for row, g in zip(q, p.argmax(1))]
    norm = lambda o: [float(r.max()/np.linalg.norm(r, o)) for r in z]
    return [ece_loop(conf, right), ece_loop(conf, right, 10, 'l2'), ece_loop(conf, right, norm='max'), adaptive_loop(conf, right),
            np.mean([ece_loop(p[:, k].tolist(), q[:, k].tolist()) for k in range(p.shape[1])]), nll, ((p-q)**2).sum(1).mean(),
            aurc_loop(conf, right), aurc_loop(norm(2), right), aurc_loop(norm(4), right)]


@pytest.mark.parametrize('seed', range(2))
def test_single_labels_against_loops(seed):
    z, y = example(seed=seed)
    got = values(z, y, [m() for m in ALL])
    np.testing.assert_allclose(got, expected(z, torch.eye(4)[y]), atol=1e-9)
    assert [m().name for m in ALL] == ['ece', 'ece', 'mce', 'adaptive_ece', 'classwise_ece', 'nll', 'brier', 'aurc', 'aurc_logit_norm', 'aurc_logit_norm']


def test_single_labels_against_peers():
    z, y = example(500)
    got = values(z, y, [ECE(), ECE(norm='l2'), MCE(), NLL(), Brier()])
    p = z.double().softmax(1)
    theirs = [multiclass_calibration_error(p, y, 4, 15, n).item() for n in ('l1', 'l2', 'max')]
    np.testing.assert_allclose(got[:3], theirs, atol=1e-6)
    np.testing.assert_allclose(got[3:], [log_loss(y, p), brier_score_loss(y, p)], atol=1e-9)


def test_soft_labels_against_loops():
    z, _ = example()
    q = torch.rand(60, 4)
    q[7] = 0. # a row without mass says nothing
    kept = [i for i in range(60) if i != 7]
    np.testing.assert_allclose(values(z, q, [m() for m in ALL], LabelSmoothingCrossEntropy(0.)), expected(z[kept], q[kept]), atol=1e-6)


@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(axis=1), nn.CrossEntropyLoss(ignore_index=255),
                                  LabelSmoothingCrossEntropy(.1, axis=1, ignore_index=255)])
def test_masks_leave_out_ignored_pixels(loss):
    z, y = 3*torch.randn(6, 4, 5, 3), torch.randint(0, 4, (6, 5, 3))
    y[:, 0] = 255 if getattr(loss, 'ignore_index', -100) == 255 else -100
    rows, kept = z.movedim(1, -1).reshape(-1, 4), y.flatten() < 4
    kept &= y.flatten() >= 0
    np.testing.assert_allclose(values(z, y, [m() for m in ALL], loss, 2), expected(rows[kept], torch.eye(4)[y.flatten()[kept]]), atol=1e-9)


@pytest.mark.parametrize('loss', [BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss(), LabelSmoothingBCE(.1), BinaryCrossEntropy(0.)])
def test_several_labels(loss):
    z, y = 2*torch.randn(50, 3), (torch.rand(50, 3) < .4).float()
    if isinstance(loss, LabelSmoothingBCE): y[::7, 1] = math.nan
    p = 1/(1+np.exp(-z.double().numpy()))
    known = ~y.isnan().numpy()
    conf, right = p[known].tolist(), y.double().numpy()[known].tolist()
    got = values(z, y, [ECE(), MCE(), AdaptiveECE(), ClasswiseECE(), NLL(), Brier(), AURC()], loss)
    sure, correct = [max(c, 1-c) for c in conf], [float((c > .5) == (r > .5)) for c, r in zip(conf, right)]
    per_label = [ece_loop(p[known[:, k], k].tolist(), y.double().numpy()[known[:, k], k].tolist()) for k in range(3)]
    nll = -np.mean([math.log(c if r else 1-c) for c, r in zip(conf, right)])
    brier = np.mean([sum((p[i, k]-y[i, k].item())**2 for k in range(3) if known[i, k]) for i in range(50)])
    np.testing.assert_allclose(got, [ece_loop(conf, right), ece_loop(conf, right, norm='max'), adaptive_loop(conf, right), np.mean(per_label), nll, brier,
                                     aurc_loop(sure, correct)], atol=1e-9)
    theirs = binary_calibration_error(torch.tensor(conf), torch.tensor(right).long(), 15).item()
    np.testing.assert_allclose(got[0], theirs, atol=1e-6)
    with pytest.raises(ValueError, match='exclusive classes'): values(z, y, [AURC('logit_norm')], loss)


def test_confidences_of_zero_and_one_are_in_the_outermost_bins():
    z = torch.tensor([[800., 0.], [0., 800.], [800., 0.]])
    got = values(z, torch.tensor([0, 1, 1]), [ECE(), MCE(), ClasswiseECE(), NLL()])
    np.testing.assert_allclose(got[:3], [1/3]*3, atol=1e-12)
    assert math.isfinite(got[3]) and got[3] > 200


def test_edges_belong_to_the_upper_bin():
    p = torch.tensor([[.5, .5], [.6, .4], [.8, .2], [.7, .3]], dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 0])
    got = values(p.log(), y, [ECE(10)], LabelSmoothingNLL(0.))[0]
    np.testing.assert_allclose(got, ece_loop(p.max(1)[0].tolist(), [1., 0., 1., 1.], 10), atol=1e-9)


def test_the_order_of_the_data_does_not_matter():
    z = torch.tensor([[2., 0.]]*6+[[0., 1.]]*5)
    y = torch.tensor([0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0])
    one = values(z, y, [AdaptiveECE(4), AURC(), AURC('logit_norm')])
    for seed in range(4):
        order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
        np.testing.assert_allclose(values(z[order], y[order], [AdaptiveECE(4), AURC(), AURC('logit_norm')]), one, atol=1e-12)


def test_batches_make_no_difference():
    z, y = example(101)
    one = values(z, y, [m() for m in ALL], bs=101)
    for bs in (1, 10, 64): np.testing.assert_allclose(values(z, y, [m() for m in ALL], bs=bs), one, atol=1e-12)


def test_zero_logits_have_no_norm():
    assert values(torch.zeros(3, 4), torch.tensor([0, 1, 2]), [AURC('logit_norm')])[0] == pytest.approx(2/3)


def test_nothing_to_score_and_nan_are_nan():
    z, y = example(8)
    assert all(math.isnan(v) for v in values(z, torch.full((8,), -100), [m() for m in ALL]))
    z[3, 1] = math.nan
    assert all(math.isnan(v) for v in values(z, y, [m() for m in ALL]))


def test_a_nan_where_nothing_is_known_does_no_harm():
    z, y = example(20)
    clean = values(z, y.masked_fill(torch.arange(20) < 3, -100), [m() for m in ALL])
    z[:3] = math.nan
    np.testing.assert_allclose(values(z, y.masked_fill(torch.arange(20) < 3, -100), [m() for m in ALL]), clean)
    z, q = torch.randn(20, 3), (torch.rand(20, 3) < .5).float()
    q[4, 1] = math.nan
    some = [m() for m in ALL[:8]]
    clean = values(z, q, some, LabelSmoothingBCE(.1))
    z[4, 1] = math.nan
    np.testing.assert_allclose(values(z, q, some, LabelSmoothingBCE(.1)), clean)


def test_a_class_that_is_ruled_out_has_no_part_in_the_norm():
    z, y = example(60)
    z[:, 3] = -math.inf
    y = y.clamp(max=2)
    got = values(z, y, [AURC('logit_norm'), AURC('logit_norm', 4)])
    right = (z.argmax(1) == y).double().tolist()
    np.testing.assert_allclose(got, [aurc_loop([float(r.max()/np.linalg.norm(r, o)) for r in z[:, :3].double().numpy()], right) for o in (2, 4)], atol=1e-9)


# -- without bins, and without chance

def smooth_loop(f, y, sigma):
    "Mean size of the gaps over mean density, both smoothed by a Gaussian that ends at 1/2 on either side, with its images at 0 and 1: a sum over the examples"
    t = np.linspace(0, 1, max(round(10/sigma), 200))
    gaps, density = np.zeros(len(t)), np.zeros(len(t))
    for a, b in zip(f, y):
        for place in (a, -a, 2-a):
            kernel = np.where(np.abs(t-place) <= .5, np.exp(-(t-place)**2/(2*sigma**2)), 0.)
            gaps, density = gaps+(a-b)*kernel, density+kernel
    return np.abs(gaps).sum()/density.sum()


@pytest.mark.parametrize('scale', [.5, 1.])
def test_smooth_ece_is_its_own_width(scale):
    "As relplot, which the next test compares with, it puts the confidences on a grid, whose ends are not mirrored: no confidence of these is near 1"
    z, y = example(150, scale=scale)
    got = values(z, y, [SmoothECE()])[0]
    p = z.double().softmax(1)
    f, right = p.max(1)[0].numpy(), (p.argmax(1) == y).double().numpy()
    low, high = 0., 1.
    for _ in range(10): low, high = (low, (low+high)/2) if smooth_loop(f, right, (low+high)/2) < (low+high)/2 else ((low+high)/2, high)
    assert got == pytest.approx(smooth_loop(f, right, high), abs=1e-5)


@pytest.mark.parametrize('n, scale', [(60, 3.), (3000, 1.)])
def test_smooth_ece_is_that_of_relplot(n, scale):
    relplot = pytest.importorskip('relplot')
    z, y = example(n, scale=scale)
    p = z.double().softmax(1)
    assert values(z, y, [SmoothECE()], bs=64)[0] == pytest.approx(relplot.smECE(p.max(1)[0].numpy(), (p.argmax(1) == y).double().numpy()), abs=1e-6)


@pytest.mark.parametrize('n', [7, 40, 400])
def test_debiased_ce_against_a_loop(n):
    z, y = example(n)
    p = z.double().softmax(1)
    f, right = p.max(1)[0].numpy(), (p.argmax(1) == y).double().numpy()
    total, order = 0., np.argsort(f)
    for part in np.array_split(order, 15):
        if len(part) > 1:
            mean = right[part].mean()
            total += len(part)/n*((f[part].mean()-mean)**2 - mean*(1-mean)/(len(part)-1))
    assert values(z, y, [DebiasedCE()])[0] == pytest.approx(max(total, 0)**.5, abs=1e-9)


def test_the_debiased_error_of_calibrated_models_averages_to_zero():
    "Before the root is taken: half of the estimates are below 0"
    zeros = 0
    for seed in range(60):
        z = 2*torch.randn(300, 4, generator=torch.Generator().manual_seed(seed))
        zeros += values(z, torch.distributions.Categorical(logits=z).sample(), [DebiasedCE()], bs=300)[0] == 0
    assert 15 < zeros < 50


def test_augrc_is_the_trapezoid_under_the_generalised_risk():
    z, y = example(80)
    p = z.double().softmax(1)
    wrong = (p.argmax(1) != y).double().numpy()[np.argsort(-p.max(1)[0].numpy())]
    curve = [wrong[:k].sum()/80 for k in range(1, 81)]
    area = sum((a+b)/2 for a, b in zip(curve[:-1], curve[1:]))/79
    assert values(z, y, [AUGRC()])[0] == pytest.approx(area, abs=1e-9)
    assert AUGRC().name == 'augrc' and AUGRC('logit_norm').name == 'augrc_logit_norm'


def test_new_metrics_of_several_labels_and_masks():
    z, q = torch.randn(50, 3), (torch.rand(50, 3) < .4).float()
    q[::7, 1] = math.nan
    known = ~q.isnan()
    flat = values(z[known][:, None], q[known][:, None], [SmoothECE(), DebiasedCE(), AUGRC()], LabelSmoothingBCE(.1))
    np.testing.assert_allclose(values(z, q, [SmoothECE(), DebiasedCE(), AUGRC()], LabelSmoothingBCE(.1)), flat, atol=1e-9)
    z, y = example(24)
    mask = values(z.view(6, 2, 2, 4).movedim(-1, 1), y.view(6, 2, 2), [SmoothECE(), DebiasedCE(), AUGRC()], CrossEntropyLossFlat(axis=1))
    np.testing.assert_allclose(mask, values(z, y, [SmoothECE(), DebiasedCE(), AUGRC()]), atol=1e-9)


def test_fewer_examples_than_bins():
    z, y = example(3)
    np.testing.assert_allclose(values(z, y, [m() for m in ALL]), expected(z, torch.eye(4)[y]), atol=1e-9)
    assert all(math.isfinite(v) for v in values(z[:1], y[:1], [SmoothECE(), DebiasedCE(), AUGRC()]))


def test_act_where_the_loss_does_not_say():
    z, y = example()
    with pytest.raises(ValueError, match='pass act='): values(z, y, [ECE()], nn.functional.cross_entropy)
    np.testing.assert_allclose(values(z, y, [ECE(act=lambda z: z.softmax(-1))], nn.functional.cross_entropy), expected(z, torch.eye(4)[y])[:1])
    q = (torch.rand(60, 4) < .5).float()
    np.testing.assert_allclose(values(z, q, [NLL(act=torch.sigmoid)], lambda p, t: nn.functional.mse_loss(p, t)),
                               nn.functional.binary_cross_entropy_with_logits(z.double(), q.double()).item(), rtol=1e-9)


@pytest.mark.parametrize('make, words', [(lambda: ECE(0), 'n_bins'), (lambda: ECE(2.5), 'n_bins'), (lambda: AdaptiveECE(True), 'n_bins'),
                                         (lambda: ECE(norm='l3'), 'norm'), (lambda: AURC('entropy'), 'score'), (lambda: AURC(p=0), 'p must')])
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_one_column_and_labels_out_of_range():
    with pytest.raises(ValueError, match='one class'): values(torch.randn(4, 1), torch.zeros(4).long(), [ECE()])
    with pytest.raises((ValueError, IndexError)): values(torch.randn(4, 3), torch.tensor([0, 1, 2, 3]), [ECE()])


def test_masks_of_any_number_need_no_memory():
    "Sums per bin only"
    metric = ECE()
    metric.reset()
    learn = type('Learn', (), dict(to_detach=staticmethod(lambda t, cpu: t), loss_func=CrossEntropyLossFlat(axis=1)))()
    sizes = []
    for _ in range(3):
        learn.pred, learn.y = torch.randn(1, 3, 64, 64), torch.randint(0, 3, (1, 64, 64))
        metric.accumulate(learn)
        sizes.append(sum(v.numel() for v in vars(metric).values() if isinstance(v, torch.Tensor)))
    assert sizes[0] == sizes[2] < 60 and metric.n == 3*64*64


@pytest.mark.parametrize('loss, cbs', [
    (CrossEntropyLossFlat(), []), (CrossEntropyLossFlat(), [MixUp]), (CrossEntropyLossFlat(), ['one of']), (nn.CrossEntropyLoss(), [LabelSmoothing, MixUp]),
    (LabelSmoothingCrossEntropy(0.), [LabelSmoothing]), (LabelSmoothingCrossEntropy(0.), ['one of']), (BCEWithLogitsLossFlat(), [MixUp]),
    (BCEWithLogitsLossFlat(), [LabelSmoothing]), (LabelSmoothingBCE(0.), [LabelSmoothing, MixUp])])
def test_training_metrics_know_the_users_loss(loss, cbs):
    "Whatever a training pass puts around it; the labels are the data loader's"
    binary = 'BCE' in repr(loss)
    made = [OneOf(MixUp(), MixUp(.1))] if cbs == ['one of'] else [c() for c in cbs]

    class Keep(Callback):
        run_valid, order = False, 49
        def before_fit(self): self.seen = []
        def after_batch(self): self.seen.append((self.learn.pred.detach().clone(), self.y.clone()))
    learn = make_learner('multi_hot' if binary else 'index', loss, [*made, Keep()], metrics=[NLL(), ECE()])
    learn.recorder.train_metrics = True
    fit(learn, 1)
    got = dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
    z, y = (torch.cat(t) for t in zip(*learn.keep.seen))
    plain = nn.functional.binary_cross_entropy_with_logits(z, y) if binary else nn.functional.cross_entropy(z, y)
    np.testing.assert_allclose(got['train_nll'], plain.item(), rtol=1e-5)
    assert 0 <= got['train_ece'] <= 1 and 0 <= got['valid_ece'] <= 1


@pytest.mark.processes
@pytest.mark.slow
def test_many_masks_take_little_memory():
    "Streaming over big masks: what it needs does not grow with them, and the figures are those of all pixels at once"
    script = Path(__file__).parent/'stream_masks.py'
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_THRESHOLD_': '1000000'}  # big tensors go back to the system at once
    growth, ece, classwise, _, nll, _ = map(float, subprocess.run([sys.executable, '-W', 'ignore', str(script), '12'], env=env, capture_output=True,
                                                                  text=True, check=True).stdout.split())
    assert growth < 200
    masks = runpy.run_path(str(script))['Masks']
    z, y = (torch.stack(t) for t in zip(*(masks(12)[i] for i in range(12))))
    z, y = z.movedim(1, -1)[y != -100].double(), y[y != -100]
    assert ece == pytest.approx(multiclass_calibration_error(z.softmax(1), y, 4, 15, 'l1').item(), abs=1e-6)
    assert nll == pytest.approx(log_loss(y, z.softmax(1)), abs=1e-6)
    p, per_class = z.softmax(1), []
    for k in range(4): per_class.append(binary_calibration_error(p[:, k], (y == k).long(), 15).item())
    assert classwise == pytest.approx(np.mean(per_class), abs=1e-6)
