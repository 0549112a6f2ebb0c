"Temperatures and calibrated learners against grids, logistic regression and the logits of the learner itself"
import copy
import json
import os
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from calibration_oracles import Outputs, Same, best_sigmoids, best_softmax, check_untouched, close, learner, same, several, single, snapshot
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.preds import MCDropoutCallback
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.rnn import rnn_cbs
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCELossFlat, BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat
from fastai.losses import LabelSmoothingCrossEntropyFlat as FastaiLabelSmoothing
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.tabular.core import Normalize
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from learners import fit, make_learner
from scipy.special import expit, log_softmax, logit, softmax
from sklearn.datasets import load_wine
from timm.loss import BinaryCrossEntropy
from torch import nn
from torch.nn import functional as F

from fastai_smooth.callback import LabelSmoothing
from fastai_smooth.calibration import NLL, Predictions, ScaledModel, TemperatureScaling, cross_fit, fit_temperature, gather
from fastai_smooth.calibration.temperature import folds_of, most_probable, nll_split
from fastai_smooth.data import array_dls, digits_arrays, stratified_split
from fastai_smooth.losses import (CombinedLoss, LabelSmoothingBCE, LabelSmoothingCrossEntropy, LabelSmoothingFocal, LabelSmoothingNLL, LogitPenalty,
                                  MultiLabelSmoothingCrossEntropy)
from fastai_smooth.data import small_convnet

ROOT = Path(__file__).resolve().parents[2]

# -- the best temperature


@pytest.mark.parametrize('loss, factor', [(CrossEntropyLossFlat(), .3), (nn.CrossEntropyLoss(torch.arange(1., 5.), label_smoothing=.3), 3.),
                                          (FocalLossFlat(), 3.),
                                          (LabelSmoothingCrossEntropy(.3, torch.arange(1., 5.)), .3), (LabelSmoothingFocal(.1), 3.),
                                          (FastaiLabelSmoothing(eps=.3), 3.), (LogitPenalty(LabelSmoothingCrossEntropy(.1)), 3.)], ids=repr)
def test_the_plain_nll_whatever_the_softmax_loss(loss, factor):
    z, y = single(factor=factor)
    close(fit_temperature(Predictions.of(z, y, loss)), best_softmax(z, y))
    calibrated = TemperatureScaling(learner(z, y, loss)).fit()
    assert isinstance(calibrated.temperature, float)
    close(calibrated.temperature, best_softmax(z, y))


@pytest.mark.parametrize('loss', [nn.NLLLoss(), LabelSmoothingNLL(.2)], ids=repr)
def test_log_probabilities(loss):
    z, y = single()
    t = best_softmax(z, y)
    calibrated = TemperatureScaling(learner(z.log_softmax(1), y, loss)).fit()
    close(calibrated.temperature, t)
    log_p = calibrated.get_preds(act=lambda p: p)[0]
    np.testing.assert_allclose(log_p, log_softmax(z.double().numpy()/calibrated.temperature, 1), atol=1e-4)


@pytest.mark.parametrize('loss', [nn.BCELoss(), BCELossFlat()], ids=repr)
def test_probabilities_of_labels(loss):
    z, y = several()
    z = z.clamp(-6, 6)
    calibrated = TemperatureScaling(learner(z.sigmoid(), y, loss)).fit()
    close(calibrated.temperature, best_sigmoids(z, y))
    np.testing.assert_allclose(calibrated.get_preds()[0], expit(z.double().numpy()/np.asarray(calibrated.temperature)), atol=1e-4)


@pytest.mark.parametrize('loss', [nn.BCELoss(), BCELossFlat(), BCEWithLogitsLossFlat()], ids=repr)
def test_a_calibrated_learner_can_be_looked_at(loss):
    "Its loss says as much about the predictions as the one before"
    z, y = several()
    z = z.clamp(-6, 6)
    calibrated = TemperatureScaling(learner(z if 'Logits' in repr(loss) else z.sigmoid(), y, loss)).fit()
    again = gather(calibrated)
    assert again.binary
    np.testing.assert_allclose(again.p, expit(z.double().numpy()/np.asarray(calibrated.temperature)), atol=1e-4)


def test_probabilities_of_exclusive_classes():
    "A model that ends in a softmax: calibrated, its probabilities are those of its logits, and still sum to 1"
    z, y = single()
    p = z.softmax(1)
    calibrated = TemperatureScaling(learner(p, y, lambda p, y: F.nll_loss(p.log(), y)), act=lambda p: p).fit()
    got = calibrated.get_preds(act=lambda p: p)[0]
    np.testing.assert_allclose(got.sum(1), np.ones(300), atol=1e-5)
    close(calibrated.temperature, best_softmax(z, y))
    np.testing.assert_allclose(got, softmax(z.double().numpy()/calibrated.temperature, 1), atol=1e-4)


@pytest.mark.parametrize('loss', [BCEWithLogitsLossFlat(), BCEWithLogitsLossFlat(thresh=.3), nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1., 2., 3.])),
                                  LabelSmoothingBCE(.3), BinaryCrossEntropy(.1)], ids=str)
def test_a_temperature_for_each_label(loss):
    z, y = several()
    expected = best_sigmoids(z, y)
    t = fit_temperature(Predictions.of(z, y, loss))
    assert t.shape == (3,)
    close(t, expected)
    close(TemperatureScaling(learner(z, y, loss)).fit().temperature, expected)


def test_unknown_labels_are_left_out():
    z, y = several(k=4, factor=(3., .5, 1.5, 1.))
    hole = torch.rand(400, 3) < .5
    y[:, :3][hole], y[:, 3] = torch.nan, torch.nan
    expected = best_sigmoids(z, y) # nothing is known of the last one
    close(fit_temperature(Predictions.of(z, y, LabelSmoothingBCE(.1))), expected)
    close(TemperatureScaling(learner(z, y, LabelSmoothingBCE(.1))).fit().temperature, expected)
    whole = torch.where(y.isnan(), -100, y.nan_to_num(0.)).long()
    close(fit_temperature(Predictions.of(z, whole, BCEWithLogitsLossFlat())), expected)


def test_several_labels_per_pixel():
    "Of a mask (N, K, H, W) the labels are at the axis that the loss says"
    z, y = several(600)
    rows = lambda t: t.view(12, 10, 5, 3).movedim(-1, 1).contiguous()
    p = Predictions.of(rows(z), rows(y), BCEWithLogitsLossFlat(axis=1))
    np.testing.assert_allclose(p.figures(['classwise_ece'])['classwise_ece'], Predictions.of(z, y, BCEWithLogitsLossFlat()).figures()['classwise_ece'])
    close(fit_temperature(p), best_sigmoids(z, y))


@pytest.mark.parametrize('loss, axis', [
    (CrossEntropyLossFlat(axis=1), 1), (nn.CrossEntropyLoss(ignore_index=255), 1), (LabelSmoothingCrossEntropy(.3, axis=1, ignore_index=255), 1),
    (LabelSmoothingNLL(.1, axis=1), 1), (LogitPenalty(LabelSmoothingCrossEntropy(.1, axis=1, ignore_index=255)), 1),
    (CombinedLoss(LabelSmoothingFocal(.1, axis=1, ignore_index=255), LabelSmoothingCrossEntropy(.1, axis=1, ignore_index=255)), 1)], ids=str)
def test_masks_without_ignored_pixels(loss, axis):
    z, y = single(240)
    expected = best_softmax(z[40:], y[40:])
    y[:40] = 255 if '255' in repr(loss) or getattr(loss, 'ignore_index', 0) == 255 else -100
    if 'NLL' in repr(loss): z = z.log_softmax(1)
    z, y = z.view(12, 4, 5, 4).movedim(-1, axis).contiguous(), y.view(12, 4, 5)
    p = Predictions.of(z, y, loss)
    close(fit_temperature(p), expected)
    assert len(p) == 200 and sorted(set(p.example.tolist())) == list(range(2, 12))
    calibrated = TemperatureScaling(learner(z, y, loss, bs=5)).fit()
    close(calibrated.temperature, expected)
    got = calibrated.model(z).movedim(axis, -1)
    np.testing.assert_allclose(softmax(got.numpy(), -1), softmax(z.movedim(axis, -1).double().numpy()/calibrated.temperature, -1), atol=1e-4)


def test_soft_targets():
    z, _ = single()
    q = torch.distributions.Dirichlet(5*(z/3).softmax(1)+.01).sample()
    q[7] = 0. # says nothing
    kept = [i for i in range(300) if i != 7]
    mass = torch.rand(300, 1) # counts as much as it is
    for loss in (LabelSmoothingCrossEntropy(.1), nn.CrossEntropyLoss()):
        close(fit_temperature(Predictions.of(z, q*mass, loss)), best_softmax(z[kept], (q*mass)[kept]))


@pytest.mark.parametrize('shape', [(300,), (300, 1)])
def test_one_binary_logit(shape):
    z, y = several(300, 1)
    z, flat = z.reshape(shape), y[:, 0]
    calibrated = TemperatureScaling(learner(z, flat, BCEWithLogitsLossFlat(thresh=.3))).fit()
    assert calibrated.temperature.shape == (1,)
    close(calibrated.temperature, best_sigmoids(z.flatten(), flat))
    p, _, chosen = calibrated.get_preds(with_decoded=True)
    assert p.shape == shape
    np.testing.assert_allclose(p.flatten(), expit(z.flatten().double().numpy()/calibrated.temperature.item()), atol=1e-5)
    assert torch.equal(chosen, z.sigmoid() > .3) and 0 < chosen.sum() < 300


def test_activation_of_ones_own():
    z, y = single()
    with pytest.raises(ValueError, match='pass act='): TemperatureScaling(learner(z, y, F.cross_entropy)).fit()
    close(TemperatureScaling(learner(z, y, F.cross_entropy), act=partial(torch.softmax, dim=-1)).fit().temperature, best_softmax(z, y))
    close(TemperatureScaling(learner(z, y, F.cross_entropy), act=lambda z: (2*z).softmax(-1)).fit().temperature, best_softmax(2*z, y))


@pytest.mark.parametrize('n', [20, 200])
def test_a_temperature_that_the_data_cannot_tell(n):
    "All right or all wrong: the prior keeps it finite, and a warning says so"
    z = 3*torch.randn(n, 4)
    for y, low, high in ((z.argmax(1), .02, .9), (z.argmin(1), 1.5, 100)):
        with pytest.warns(UserWarning, match='cannot tell|end of its range'): t = fit_temperature(Predictions.of(z, y, CrossEntropyLossFlat()))
        assert low < t <= high
        close(t, best_softmax(z, y))


def test_a_temperature_that_the_data_tell(recwarn):
    fit_temperature(Predictions.of(*single(), CrossEntropyLossFlat()))
    fit_temperature(Predictions.of(*several(), BCEWithLogitsLossFlat()))
    cross_fit(Predictions.of(*single(), CrossEntropyLossFlat()))
    assert not [w for w in recwarn if 'temperature' in str(w.message)]


def test_the_ends_of_the_range_warn():
    z, y = single(factor=1500.)
    with pytest.warns(UserWarning, match='end of its range'): t = fit_temperature(Predictions.of(z, y, CrossEntropyLossFlat()))
    np.testing.assert_allclose(t, 100, rtol=1e-6)


@pytest.mark.parametrize('level', [0., -3.])
def test_constant_logits_have_the_temperature_one(level):
    y = torch.randint(0, 4, (50,))
    with pytest.warns(UserWarning, match='cannot tell'): t = fit_temperature(Predictions.of(torch.full((50, 4), level), y, CrossEntropyLossFlat()))
    assert t == pytest.approx(1)
    with pytest.warns(UserWarning): t = fit_temperature(Predictions.of(torch.zeros(50, 3), F.one_hot(y, 4)[:, :3].float(), BCEWithLogitsLossFlat()))
    np.testing.assert_allclose(t, 1, atol=1e-3)


def test_a_label_without_a_positive_takes_the_shared_temperature():
    z, y = several(300, 4, (3., 3., 3., 3.))
    y[:, 2] = 0.
    with pytest.warns(UserWarning, match='Label 2 has no positive'): t = fit_temperature(Predictions.of(z, y, BCEWithLogitsLossFlat()))
    close(t, best_sigmoids(z, y))
    assert t[2] > 1
    with pytest.warns(UserWarning, match='Cross-fitting.*Label 2'): after, _ = cross_fit(Predictions.of(z, y, BCEWithLogitsLossFlat()))
    assert (after.p[:, 2] < 1).all()
    y[0, 2] = 1. # one positive: still close to the others
    few = fit_temperature(Predictions.of(z, y, BCEWithLogitsLossFlat()))
    assert abs(few[2].log()-few.mean().log()) < .8


def test_separable_halves_do_not_explode():
    "Fitted on data without a mistake, the temperature does no harm on data with some"
    z, y = single(2000, 10, factor=4.)
    right = z.argmax(1) == y
    with pytest.warns(UserWarning, match='cannot tell'): t = fit_temperature(Predictions.of(z[right][:60], y[right][:60], CrossEntropyLossFlat()))
    nll = lambda t: F.cross_entropy(z.double()/t, y).item()
    assert nll(t) < nll(.01)/5


def test_huge_and_impossible_logits():
    "The NLL is never inf, and neither is the temperature nan"
    z, y = single(factor=300.)
    close(fit_temperature(Predictions.of(z/10, y, CrossEntropyLossFlat())), best_softmax(z/10, y))
    z, y = single()
    z[torch.arange(300), (y+1) % 4] = -torch.inf # ruled out
    close(fit_temperature(Predictions.of(z, y, CrossEntropyLossFlat())), best_softmax(z, y))


# -- cross-fitting

@pytest.mark.parametrize('folds', [5])
def test_cross_fit_scores_each_example_after_a_temperature_of_the_others(folds):
    z, y = single()
    after, temperatures = cross_fit(Predictions.of(z, y, CrossEntropyLossFlat()), folds)
    t = (z.double()[:, 0]/after.z[:, 0]).numpy()
    assert len(temperatures) == folds and len(after) == 300
    np.testing.assert_allclose(after.p, softmax(z.double().numpy()/t[:, None], 1), atol=1e-9)
    place = np.abs(t[:, None]-np.array(temperatures)).argmin(1)
    np.testing.assert_allclose(t, np.array(temperatures)[place], rtol=1e-9)
    assert np.bincount(place, minlength=folds).tolist() == [300//folds]*folds
    for f in range(folds): close(temperatures[f], best_softmax(z[place != f], y[place != f]))
    again, same = cross_fit(Predictions.of(z, y, CrossEntropyLossFlat()), folds)
    assert same == temperatures and torch.equal(after.p, again.p)


def test_cross_fit_of_several_labels():
    z, y = several()
    y[::9, 0] = torch.nan
    after, temperatures = cross_fit(Predictions.of(z, y, LabelSmoothingBCE(.1)), 4)
    t = (z.double()/after.z).numpy()
    place = np.array([next(f for f in range(4) if np.allclose(row, temperatures[f])) for row in t])
    assert np.bincount(place).tolist() == [100]*4
    for f in range(4): close(temperatures[f], best_sigmoids(z[place != f], y[place != f]))


def test_cross_fit_keeps_the_pixels_of_a_mask_together():
    z, y = single(600)
    z, y = z.view(30, 20, 4), y.view(30, 20)
    y[0, :15], y[4] = -100, -100
    before = Predictions.of(z, y, CrossEntropyLossFlat())
    after, temperatures = cross_fit(before, 3)
    t = (before.z.double()[:, 0]/after.z[:, 0]).numpy()
    by_example = {int(e): set(np.round(t[before.example == e], 6)) for e in before.example.unique()}
    assert len(by_example) == 29 and all(len(v) == 1 for v in by_example.values())
    for temperature in temperatures:
        kept = np.abs(t-temperature) > 1e-6
        close(temperature, best_softmax(before.z[kept], before.q[kept]))
    with pytest.raises(ValueError, match='folds'): cross_fit(before, 1)
    with pytest.raises(ValueError, match='folds'): cross_fit(before[before.example == 1])
    with pytest.warns(UserWarning, match='29 folds instead of 30'): assert len(cross_fit(before, 30)[1]) == 29


def test_folds_have_their_share_of_each_class():
    z, _ = single(103)
    y = torch.tensor([0]*80+[1]*20+[2]*3)[torch.randperm(103)]
    p = Predictions.of(z, y, CrossEntropyLossFlat())
    counts = np.array([[int((y[f] == k).sum()) for k in range(3)] for f in folds_of(p, 5)])
    assert counts[:, :2].tolist() == [[16, 4]]*5 and counts[:, 2].max() == 1
    q = torch.zeros(50, 3)
    q[:, 0], q[:10, 1], q[:5, 2] = 1., 1., 1.
    counts = [q[f].sum(0).tolist() for f in folds_of(Predictions.of(torch.randn(50, 3), q, BCEWithLogitsLossFlat()), 5)]
    assert counts == [[10, 2, 1]]*5


def test_refinement_and_calibration():
    z, y = single(400)
    split = nll_split(Predictions.of(z, y, CrossEntropyLossFlat()))
    after = cross_fit(Predictions.of(z, y, CrossEntropyLossFlat()))[0]
    np.testing.assert_allclose(split['nll'], F.cross_entropy(z.double(), y).item())
    np.testing.assert_allclose(split['refinement'], F.cross_entropy(after.z, y).item())
    assert split['nll'] == pytest.approx(split['refinement']+split['calibration']) and split['calibration'] > .1


# -- the calibrated learner

@pytest.fixture(scope='module')
def trained():
    "Digits with smoothing, dropout and batch norm; the classes are named"
    torch.manual_seed(0)
    images, labels, _ = digits_arrays()
    splits = stratified_split(labels, .2, 0)
    dls = array_dls(images, labels, list('abcdefghij'), (splits[0][:640], splits[1]))
    learn = Learner(dls, small_convnet(1, 10, 8), loss_func=CrossEntropyLossFlat(), cbs=LabelSmoothing(.3), metrics=[accuracy, NLL()])
    return fit(learn, 3, 3e-3).remove_cb(ProgressCallback)


def logits_of(learn, dl):
    "Logits and labels of a loader, in a plain loop"
    model = copy.deepcopy(learn.model).eval()
    with torch.no_grad(): batches = [(model(*b[:-1]), b[-1]) for b in dl]
    return tuple(torch.cat([torch.Tensor(t.cpu()).to(t.dtype) for t in ts]) for ts in zip(*batches))


def test_probabilities_and_decisions_of_the_calibrated_learner(trained):
    z, y = (t.numpy() for t in logits_of(trained, trained.dls.valid))
    calibrated = TemperatureScaling(trained).fit()
    t = calibrated.temperature
    close(t, best_softmax(z, y))
    assert abs(t-1) > .1 and type(calibrated) is type(trained) and calibrated is not trained
    p = softmax(z.astype(np.float64)/t, 1)
    got, targets, decoded = calibrated.get_preds(with_decoded=True)
    np.testing.assert_allclose(got, p, atol=1e-5)
    assert (targets.numpy() == y).all() and (decoded.numpy() == z.argmax(1)).all()
    loss, right, nll = calibrated.validate()
    np.testing.assert_allclose([loss, nll], [-np.log(p[range(len(y)), y]).mean()]*2, rtol=1e-4)
    np.testing.assert_allclose(right, (z.argmax(1) == y).mean(), rtol=1e-6)
    assert trained.validate()[1] == right and trained.validate()[2] > nll
    for i in (5, 11):
        (before, k, p0), (after, k1, p1) = trained.predict(i), calibrated.predict(i)
        assert before == after == 'abcdefghij'[k] and k == k1
        np.testing.assert_allclose(p1, softmax(np.log(p0.double().numpy())/t), atol=1e-4)
    np.testing.assert_allclose(gather(calibrated).figures(['nll'])['nll'], nll, rtol=1e-5)
    np.testing.assert_allclose(gather(calibrated).p, gather(trained).scaled(t).p, atol=1e-5)


def test_held_out_data_of_ones_own(trained):
    dl = trained.dls.test_dl(list(range(700, 900)), with_labels=True)
    z, y = logits_of(trained, dl)
    scaling = TemperatureScaling(trained)
    assert 'not fitted' in repr(scaling)
    calibrated = scaling.fit(dl)
    close(calibrated.temperature, best_softmax(z, y))
    assert scaling.temperature == calibrated.temperature and repr(calibrated.temperature) in repr(scaling)
    close(calibrated.model.temperature, calibrated.temperature)


def test_the_given_learner_stays_as_it_is(trained, tmp_path):
    learn = fit(Learner(trained.dls, copy.deepcopy(trained.model), loss_func=CrossEntropyLossFlat(), metrics=[accuracy, NLL()], path=tmp_path,
                        cbs=[LabelSmoothing(.1), MixUp(), GradientClip(), CSVLogger(), SaveModelCallback('accuracy'), EarlyStoppingCallback()]), 1)
    learn.model.train()
    learn.model[1].eval()
    list(learn.model.parameters())[0].requires_grad_(False)
    before, files = snapshot(learn), {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    assert before['values'] and before['opt']['state'] and len(set(before['modes'])) == 2
    calibrated = TemperatureScaling(learn).fit()
    check_untouched(learn, before)
    calibrated.validate()
    calibrated.get_preds()
    calibrated.predict(3)
    with torch.no_grad():
        for p in calibrated.model.parameters(): p.add_(1.)
    check_untouched(learn, before)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == files
    assert not any(cb is other for cb in calibrated.cbs for other in learn.cbs) and all(cb.learn is calibrated for cb in calibrated.cbs)
    assert calibrated.loss_func is not learn.loss_func and calibrated.opt is None and any(isinstance(cb, ProgressCallback) for cb in calibrated.cbs)
    calibrated.path = tmp_path
    calibrated.export('calibrated.pkl')
    check_untouched(learn, before)


def test_failing_leaves_the_learner_alone(trained):
    learn = fit(Learner(trained.dls, copy.deepcopy(trained.model), loss_func=nn.CrossEntropyLoss()), 1)
    learn.loss_func = lambda p, y: F.cross_entropy(p, y)
    learn.model[0].eval()
    before = snapshot(learn)
    with pytest.raises(ValueError, match='act='): TemperatureScaling(learn).fit()
    check_untouched(learn, before)


def test_the_wrapped_optimizer_keeps_its_state(trained, tmp_path):
    model = copy.deepcopy(trained.model)
    learn = fit(Learner(trained.dls, model, loss_func=CrossEntropyLossFlat(), opt_func=OptimWrapper(opt=torch.optim.Adam(model.parameters())),
                        path=tmp_path), 1).remove_cb(ProgressCallback)
    before = snapshot(learn)
    assert before['opt']['state']
    TemperatureScaling(learn).fit().export('calibrated.pkl')
    check_untouched(learn, before)


def test_precision_and_dropout_callbacks(trained):
    "What changes predictions is part of the calibrated learner"
    learn = Learner(trained.dls, trained.model, loss_func=CrossEntropyLossFlat(), cbs=[MixedPrecision()]).remove_cb(ProgressCallback)
    assert torch.isfinite(TemperatureScaling(learn).fit().get_preds()[0]).all()
    learn = Learner(trained.dls, trained.model, loss_func=CrossEntropyLossFlat(), cbs=[MCDropoutCallback()]).remove_cb(ProgressCallback)
    calibrated = TemperatureScaling(learn).fit()
    assert not torch.equal(calibrated.get_preds()[0], calibrated.get_preds()[0])
    calibrated.remove_cb(MCDropoutCallback)
    assert torch.equal(calibrated.get_preds()[0], calibrated.get_preds()[0])


# -- decisions

@pytest.mark.parametrize('loss', [BCEWithLogitsLossFlat(thresh=.3), LabelSmoothingBCE(.1, thresh=.3),
                                  BCEWithLogitsLossFlat(thresh=torch.tensor([.3, .5, .8])),
                                  CombinedLoss(LabelSmoothingBCE(.1, thresh=.3), LabelSmoothingBCE(.2))], ids=str)
def test_the_same_labels_are_chosen(loss):
    z, y = several()
    learn = learner(z, y, loss)
    thresh = getattr(loss, 'thresh', .3)
    calibrated = TemperatureScaling(learn).fit()
    chosen, again = (l.get_preds(with_decoded=True)[2] for l in (learn, calibrated))
    assert torch.equal(chosen, z.sigmoid() > thresh) and 0 < chosen.sum() < chosen.numel()
    assert torch.equal(again, chosen)
    close(calibrated.temperature, best_sigmoids(z, y))
    p = calibrated.get_preds()[0]
    np.testing.assert_allclose(p, expit(z.double().numpy()/np.asarray(calibrated.temperature)), atol=1e-5)
    moved = expit(logit(np.asarray(thresh))/np.asarray(calibrated.temperature))
    assert (np.asarray(again) == (p.numpy() > moved)).all()
    assert getattr(learn.loss_func, 'thresh', .3) is thresh


def test_the_same_labels_are_chosen_where_probabilities_saturate():
    "A model twelve times too modest: above p = .9 it is as good as certain"
    z = 1.2*torch.randn(600, 2)
    learn = learner(z, torch.bernoulli((12*z).sigmoid()), BCEWithLogitsLossFlat(thresh=.9))
    chosen, again = (l.get_preds(with_decoded=True)[2] for l in (learn, TemperatureScaling(learn).fit()))
    assert chosen.sum() > 20 and torch.equal(again, chosen)


def test_the_same_labels_are_chosen_by_a_softmax_over_several_labels():
    z, y = several(300, 3, (3., 3., 3.))
    y[:, 0] = 1.
    learn = learner(z, y, MultiLabelSmoothingCrossEntropy(.1))
    chosen, again = (l.get_preds(with_decoded=True)[2] for l in (learn, TemperatureScaling(learn).fit()))
    assert 0 < chosen.sum() < chosen.numel() and torch.equal(again, chosen)


def test_decisions_at_any_axis():
    "A loss that decides by a threshold along the third axis"
    class Sure(LabelSmoothingCrossEntropy):
        def decodes(self, p): return torch.where(p.amax(self.axis) > .6, p.argmax(self.axis), 9)
    z, y = single()
    learn = learner(z.view(30, 10, 4), y.view(30, 10), Sure(.1, axis=2))
    chosen, again = (l.get_preds(with_decoded=True)[2] for l in (learn, TemperatureScaling(learn).fit()))
    assert 0 < (chosen == 9).sum() < 300 and torch.equal(again, chosen)


# -- the training set

def test_the_training_set_is_refused(trained):
    learn = Learner(trained.dls, trained.model, loss_func=CrossEntropyLossFlat()).remove_cb(ProgressCallback)
    scaling = TemperatureScaling(learn)
    for dl in (learn.dls.train, learn.dls.train.new(shuffle=False), learn.dls.train.new(bs=3), learn.dls[0],
               torch.utils.data.DataLoader(learn.dls.train.dataset, batch_size=50)):
        with pytest.raises(ValueError, match='training set'): scaling.fit(dl)
    z, y = logits_of(learn, learn.dls.train.new(shuffle=False, drop_last=False))
    assert len(z) == 640
    close(scaling.fit(learn.dls.train, allow_train=True).temperature, best_softmax(z, y))
    twin = Learner(DataLoaders(learn.dls.train, learn.dls.train.new(shuffle=False)), learn.model, loss_func=CrossEntropyLossFlat()).remove_cb(ProgressCallback)
    with pytest.raises(ValueError, match='training set'): TemperatureScaling(twin).fit()
    close(TemperatureScaling(twin).fit(allow_train=True).temperature, best_softmax(z, y))
    assert scaling.fit(learn.dls.valid).temperature == scaling.fit().temperature


# -- learners of all kinds

def test_with_mixup_and_smoothing(trained):
    learn = fit(Learner(trained.dls, copy.deepcopy(trained.model), loss_func=LabelSmoothingCrossEntropy(0.), cbs=[MixUp(), LabelSmoothing(.2)]), 1)
    learn.remove_cb(ProgressCallback)
    z, y = logits_of(learn, learn.dls.valid)
    calibrated = TemperatureScaling(learn).fit()
    close(calibrated.temperature, best_softmax(z, y))
    np.testing.assert_allclose(calibrated.get_preds()[0], softmax(z.double().numpy()/calibrated.temperature, 1), atol=1e-5)
    assert calibrated.loss_func is not learn.loss_func and type(calibrated.loss_func) is LabelSmoothingCrossEntropy


def wine(path='.'):
    x, y = load_wine(return_X_y=True, as_frame=True)
    table = x.iloc[:, :5].assign(kind=pd.Series(['red', 'rosé', 'white'])[y].values)
    dls = TabularDataLoaders.from_df(table, path, procs=[Normalize], cont_names=list(x.columns[:5]), y_names='kind', valid_idx=list(range(0, 178, 2)), bs=16,
                                     device='cpu', num_workers=0)
    return table, tabular_learner(dls, layers=[8], loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=path)


def test_tabular_learner(tmp_path):
    table, learn = wine(tmp_path)
    fit(learn, 4, .02).remove_cb(ProgressCallback)
    calibrated = TemperatureScaling(learn).fit()
    z, y = logits_of(learn, learn.dls.valid)
    t = best_softmax(z, y[:, 0])
    close(calibrated.temperature, t)
    np.testing.assert_allclose(calibrated.get_preds()[0], softmax(z.double().numpy()/calibrated.temperature, 1), atol=1e-5)
    for i in (0, 60, 150):
        (row, k, p), (row1, k1, p1) = learn.predict(table.iloc[i, :5]), calibrated.predict(table.iloc[i, :5])
        assert k == k1 and row.items.kind.iloc[0] == int(k) and row1.items.equals(row.items)
        np.testing.assert_allclose(p1, softmax(np.log(p.double().numpy())/calibrated.temperature), atol=1e-5)


class TakeFirst(Callback):
    def after_pred(self): self.learn.pred = self.learn.pred[0]


Named = namedtuple('Named', 'logits raw out')


@pytest.mark.parametrize('wrap', [lambda *out: out, lambda *out: list(out), Named], ids=['tuple', 'list', 'namedtuple'])
def test_a_model_with_several_outputs(wrap):
    z, y = single()
    learn = learner(z, y, model=Outputs(wrap), cbs=rnn_cbs() if wrap is not Named else TakeFirst())
    calibrated = TemperatureScaling(learn).fit()
    close(calibrated.temperature, best_softmax(z, y))
    np.testing.assert_allclose(calibrated.get_preds()[0], softmax(z.double().numpy()/calibrated.temperature, 1), atol=1e-5)
    out, raw = calibrated.model(z), learn.model(z)
    assert type(out) is type(raw) and len(out) == 3 and torch.equal(out[1], raw[1]) and torch.equal(out[2], raw[2])
    torch.testing.assert_close(out[0], raw[0]/calibrated.temperature)


class TwoInputs(nn.Module):
    def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.ones(1))

    def forward(self, a, b): return self.weight*(a-b)


def test_a_model_with_several_inputs():
    z, y = single()
    a = torch.randn(300, 4)
    learn = learner((z+a, a), y, model=TwoInputs())
    learn.dls.train._n_inp = learn.dls.valid._n_inp = 2
    calibrated = TemperatureScaling(learn).fit()
    close(calibrated.temperature, best_softmax(z, y))
    with torch.no_grad(): p = calibrated.get_preds()[0]
    np.testing.assert_allclose(p, softmax(z.double().numpy()/calibrated.temperature, 1), atol=1e-5)


def test_calibrating_twice_changes_nothing():
    z, y = single()
    once = TemperatureScaling(learner(z, y)).fit()
    twice = TemperatureScaling(once).fit()
    close(twice.temperature, best_softmax(z/once.temperature, y))
    np.testing.assert_allclose(twice.temperature, 1., atol=.01)  # half an example more, among 300
    np.testing.assert_allclose(twice.get_preds()[0], once.get_preds()[0], atol=5e-3)


@pytest.mark.parametrize('beside', [-1e-15, 1e-15])
def test_the_centre_of_the_prior_beside_a_point_of_the_grid(beside):
    "Rounding decides which is the lowest: the optimum may lie on either side of both"
    z, y = single()
    for factor in (.99, 1.01):
        predictions = gather(learner(factor*z/best_softmax(z, y), y))
        close(most_probable(predictions, beside), best_softmax(factor*z/best_softmax(z, y), y))


class Warm(Same):
    "A model that knows the words of ScaledModel for something of its own"
    def __init__(self):
        super().__init__()
        self.register_buffer('temperature', torch.tensor(7.))
        self.form = self.axis = 'mine'


def test_a_model_with_a_temperature_of_its_own():
    z, y = single()
    calibrated = TemperatureScaling(learner(z, y, model=Warm())).fit()
    close(calibrated.temperature, best_softmax(z, y))
    assert calibrated.model.model.temperature == 7 and calibrated.model.model.form == 'mine'


def test_the_scaled_model_can_be_trained_on(trained, tmp_path):
    "Its parts are reached as those of the model are: freeze by a splitter, hooks, half precision"
    split = lambda m: [[p for i in range(6) for p in m[i].parameters()], list(m[6].parameters())]
    learn = Learner(trained.dls, copy.deepcopy(trained.model), loss_func=CrossEntropyLossFlat(), splitter=split).remove_cb(ProgressCallback)
    calibrated = TemperatureScaling(learn).fit()
    calibrated.freeze()
    weights = copy.deepcopy(learn.model.state_dict())
    fit(calibrated, 1)
    assert same(weights, learn.model.state_dict()) and calibrated.temperature == pytest.approx(calibrated.model.temperature.item(), rel=1e-6)
    half = ScaledModel(nn.Identity(), 2.)(torch.ones(2, 3).bfloat16())
    assert half.dtype == torch.bfloat16 and (half == .5).all()
    assert ScaledModel(nn.Linear(2, 2), 2.).state_dict().keys() == {'temperature', 'model.weight', 'model.bias'}


# -- another process

LOAD = '''
import json, sys, warnings
import fastai.callback.progress, torch
from fastai.data.core import TfmdDL
from fastai.learner import load_learner
import learners, pandas as pd
warnings.filterwarnings('ignore')
digits, labels, wine = (load_learner(f'{sys.argv[1]}/{n}.pkl') for n in ('digits', 'labels', 'wine'))
x, y = learners.data('multi_hot')
dl = TfmdDL(learners.Items(zip(x, y)), bs=7, num_workers=0, device='cpu')
res = {}
with digits.no_bar(), labels.no_bar(), wine.no_bar():
    name, k, p = digits.predict(7)
    res['digits'] = [name, int(k), p.tolist(), digits.temperature, digits.get_preds(dl=digits.dls.test_dl(list(range(30))))[0].tolist()]
    p, _, chosen = labels.get_preds(dl=dl, with_decoded=True)
    res['labels'] = [labels.temperature.tolist(), p.tolist(), chosen.tolist()]
    row, k, p = wine.predict(pd.Series(json.loads(sys.argv[2])))
    res['wine'] = [row.items.kind.iloc[0], int(k), p.tolist(), wine.temperature]
print('RESULT', json.dumps(res))
'''


@pytest.mark.processes
@pytest.mark.slow
def test_exported_and_loaded_in_another_process(trained, tmp_path):
    table, tabular = wine(tmp_path)
    several = make_learner('multi_hot', BCEWithLogitsLossFlat(thresh=.3), path=tmp_path)
    several.model[1].weight.data.mul_(20)
    digits, labels, wines = (TemperatureScaling(learn.remove_cb(ProgressCallback)).fit() for learn in (trained, several, fit(tabular, 4, .02)))
    digits.path = tmp_path
    for name, learn in (('digits', digits), ('labels', labels), ('wine', wines)): learn.export(f'{name}.pkl')
    row = table.iloc[31, :5]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT/'tests')])}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', LOAD, str(tmp_path), json.dumps(row.to_dict())], capture_output=True, text=True, env=env,
                          cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout.split('RESULT')[1])
    name, k, p = digits.predict(7)
    assert got['digits'][:2] == [name, int(k)] and got['digits'][3] == digits.temperature
    np.testing.assert_allclose(got['digits'][2], p, atol=1e-6)
    z = logits_of(trained, trained.dls.test_dl(list(range(30)), with_labels=True))[0]
    np.testing.assert_allclose(got['digits'][4], softmax(z.double().numpy()/digits.temperature, 1), atol=1e-5)
    z = gather(several).z
    np.testing.assert_allclose(got['labels'][0], labels.temperature)
    np.testing.assert_allclose(got['labels'][1], expit(z.double().numpy()/np.asarray(labels.temperature)), atol=1e-5)
    assert got['labels'][2] == (z.sigmoid() > .3).tolist()
    row, k, p = wines.predict(row)
    assert got['wine'][:2] == [row.items.kind.iloc[0], int(k)] and got['wine'][3] == wines.temperature
    np.testing.assert_allclose(got['wine'][2], p, atol=1e-6)
