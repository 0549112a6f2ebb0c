"Rows of a data set: what losses and activations are understood, and what a learner says without being touched"
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from calibration_oracles import Outputs, learner, several, single
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import ProgressCallback
from fastai.callback.rnn import rnn_cbs
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import TfmdDL
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.losses import LabelSmoothingCrossEntropyFlat as FastaiLabelSmoothing
from fastai.metrics import accuracy
from fastai.text.core import BaseTokenizer
from fastai.text.data import SortedDL, TextDataLoaders
from fastai.text.learner import language_model_learner, text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
from learners import Items, data, fit, make_learner
from scipy.special import expit, logit, softmax
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.loss import LabelSmoothingCrossEntropy as TimmLabelSmoothing
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from fastai_smooth.calibration import ECE, Predictions, TemperatureScaling, gather
from fastai_smooth.calibration.predictions import Collect
from fastai_smooth.losses import (CombinedLoss, EachClass, LabelSmoothingBCE, LabelSmoothingCrossEntropy, LabelSmoothingNLL, LogitPenalty)

# -- what a loss says


class Named(nn.Module):
    "Losses of one's own with well-known names are asked, not recognised"
    def activation(self, pred): return (2*pred).softmax(-1)


class BinaryCrossEntropyLike(Named): pass


BinaryCrossEntropyLike.__name__ = 'BinaryCrossEntropy'
Named.__name__ = 'BCEWithLogitsLoss'


@pytest.mark.parametrize('loss', [Named(), BinaryCrossEntropyLike()], ids=['BCEWithLogitsLoss', 'BinaryCrossEntropy'])
def test_a_loss_is_recognised_by_its_class(loss):
    z, y = single(20)
    p = Predictions.of(z, y, loss)
    assert not p.binary
    np.testing.assert_allclose(p.p, softmax(2*z.double().numpy(), 1), atol=1e-9)


@pytest.mark.parametrize('loss', [SoftTargetCrossEntropy(), TimmLabelSmoothing(.1), FastaiLabelSmoothing(), nn.CrossEntropyLoss(),
                                  LogitPenalty(LabelSmoothingCrossEntropy(.1))], ids=repr)
def test_losses_of_a_softmax(loss):
    z, y = single(20)
    p = Predictions.of(z, F.one_hot(y, 4).float() if isinstance(loss, SoftTargetCrossEntropy) else y, loss)
    assert (p.form, p.binary) == ('softmax', False)
    np.testing.assert_allclose(p.p, softmax(z.double().numpy(), 1), atol=1e-9)


class Questions(nn.Module):
    "A loss of one's own that says its activation"
    def forward(self, pred, target): return F.binary_cross_entropy_with_logits(pred, target)

    def activation(self, pred): return pred.sigmoid()


@pytest.mark.parametrize('loss, act', [(F.binary_cross_entropy_with_logits, torch.sigmoid), (F.binary_cross_entropy_with_logits, lambda z: 1/(1+(-z).exp())),
                                       (Questions(), None), (CombinedLoss(LabelSmoothingBCE(0.), LabelSmoothingBCE(.1)), None), (BinaryCrossEntropy(.1), None)])
def test_a_sigmoid_by_any_name_is_a_question_per_class(loss, act):
    z, y = several()
    p = Predictions.of(z, y, loss, act)
    assert p.binary
    np.testing.assert_allclose(p.p, expit(z.double().numpy()), atol=1e-9)


def test_an_activation_that_takes_probabilities_only():
    def checked(p):
        if not ((p >= 0) & (p <= 1)).all(): raise ValueError('no probabilities')
        return p
    z, y = single(20)
    p = Predictions.of(z.softmax(1), y, lambda p, y: F.nll_loss(p.log(), y), checked)
    assert p.form == 'shares'
    np.testing.assert_allclose(p.scaled(2.).p, softmax(z.double().numpy()/2, 1), atol=1e-6)


@pytest.mark.parametrize('loss, act', [(LabelSmoothingCrossEntropy(.1, axis=2), None), (LabelSmoothingNLL(.1, axis=2), None),
                                       (LabelSmoothingCrossEntropy(.1, axis=2), lambda z: z.softmax(2))], ids=['loss', 'log', 'act'])
def test_classes_at_the_third_axis(loss, act):
    "The activation sees predictions of as many dimensions as those of the model"
    z, y = single()
    if 'NLL' in repr(loss): z = z.log_softmax(1)
    p = Predictions.of(z.view(30, 10, 4), y.view(30, 10), loss, act)
    np.testing.assert_allclose(p.p, softmax(z.double().numpy(), 1), atol=1e-6)


@pytest.mark.parametrize('loss', [EachClass(nn.CrossEntropyLoss()), FastaiLabelSmoothing(axis=1)], ids=repr)
def test_probabilities_of_exclusive_classes_sum_to_one_or_are_refused(loss):
    "EachClass passes on the activation of a loss that has none, fastai's takes the softmax over the width of a mask"
    z, y = torch.randn(6, 4, 3, 2), torch.randint(0, 4, (6, 3, 2))
    try: p = Predictions.of(z, y, loss).p
    except ValueError: return
    np.testing.assert_allclose(p, softmax(z.double().numpy(), 1).transpose(0, 2, 3, 1).reshape(-1, 4), atol=1e-6)


class Wrapped(nn.Module):
    "A wrapper of one's own"
    def __init__(self, loss): super().__init__(); self.loss = loss

    def forward(self, pred, target): return self.loss(pred, target)


OURS = LabelSmoothingCrossEntropy(.1, axis=1, ignore_index=255)


@pytest.mark.parametrize('wrapped, ignore', [
    (LogitPenalty(OURS), 255), (CombinedLoss(OURS, OURS), 255), (Wrapped(OURS), 255), (Wrapped(LogitPenalty(OURS)), 255),
    (LogitPenalty(LabelSmoothingCrossEntropy(0., axis=1, ignore_index=2)), 2), (Wrapped(nn.CrossEntropyLoss(ignore_index=255)), 255)],
    ids=['penalty', 'combined', 'own', 'twice', 'among the classes', 'torch'])
def test_settings_are_found_through_wrappers(wrapped, ignore):
    z, y = torch.randn(4, 3, 2, 2), torch.randint(0, 3, (4, 2, 2))
    y[:, 0] = ignore
    p = Predictions.of(z, y, wrapped)
    kept = y != ignore
    np.testing.assert_allclose(p.p, softmax(z.movedim(1, -1)[kept].double().numpy(), 1), atol=1e-6)
    assert torch.equal(p.q.argmax(1), y[kept])


@pytest.mark.parametrize('loss', [LabelSmoothingBCE(.1), nn.BCEWithLogitsLoss(), CombinedLoss(LabelSmoothingBCE(.1), LabelSmoothingBCE(0.))],
                         ids=['ours', 'torch', 'combined'])
def test_the_labels_of_a_mask_are_at_axis_one(loss):
    z, y = torch.randn(5, 3, 4, 4), (torch.rand(5, 3, 4, 4) < .5).float()
    p = Predictions.of(z, y, loss)
    assert torch.equal(p.z, z.movedim(1, -1).reshape(-1, 3)) and torch.equal(p.q.float(), y.movedim(1, -1).reshape(-1, 3))


class OnAppleGPU(torch.Tensor):
    "A tensor that says it is on an Apple GPU, and refuses float64 as that does"
    @staticmethod
    def __new__(cls, inner): return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device='mps', strides=inner.stride())

    def __init__(self, inner): self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner = lambda v: v.inner if isinstance(v, cls) else torch.device('cpu') if isinstance(v, torch.device) else v
        to_cpu = str(func).startswith('aten._to_copy') and (kwargs or {}).get('device') == torch.device('cpu')
        out = func(*tree_map(inner, args), **tree_map(inner, kwargs or {}))
        if to_cpu or not isinstance(out, torch.Tensor): return out
        if out.dtype == torch.float64: raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        return cls(out)


@pytest.mark.parametrize('kind', ['index', 'dense', 'several'])
def test_where_there_is_no_float64_the_cpu_computes(kind):
    z, y = several(20) if kind == 'several' else single(20)
    if kind == 'dense': y = F.one_hot(y, 4).float()
    loss = BCEWithLogitsLossFlat() if kind == 'several' else LabelSmoothingCrossEntropy(0.)
    with pytest.raises(TypeError, match='float64'): OnAppleGPU(z).double()
    expected = Predictions.of(z, y, loss).figures()
    there = OnAppleGPU(z), OnAppleGPU(y)
    assert Predictions.of(*there, loss).figures() == expected
    collect = Collect(None, 2**20)
    collect.learn = SimpleNamespace(loss_func=loss, n_iter=1)
    collect.start()
    collect.keep(*there)
    assert Predictions.of_rows(collect.all_rows()).figures() == expected
    metric = ECE()
    metric.reset()
    metric.accumulate(SimpleNamespace(pred=there[0], y=there[1], loss_func=loss, to_detach=lambda t, cpu: t))
    assert metric.value == expected['ece']


# -- rows, scaled

@pytest.mark.parametrize('form, z, loss, expected', [
    ('softmax', (z := torch.randn(9, 3, generator=torch.Generator().manual_seed(0))), CrossEntropyLossFlat(), lambda z, t: softmax(z/t, 1)),
    ('exp', z.log_softmax(1), nn.NLLLoss(), lambda z, t: softmax(z/t, 1)),
    ('sigmoid', z, BCEWithLogitsLossFlat(), lambda z, t: expit(z/t)),
    ('probability', z.sigmoid(), nn.BCELoss(), lambda p, t: expit(logit(p)/t))])
def test_forms_and_scaling(form, z, loss, expected):
    p = Predictions.of(z, torch.ones(9, 3) if 'BCE' in repr(loss) else torch.zeros(9).long(), loss)
    assert p.form == form and len(p) == 9
    for t in (1., .5, 7.): np.testing.assert_allclose(p.scaled(t).p, expected(z.double().numpy(), t), atol=1e-9)
    each = torch.tensor([1., 2., .5], dtype=torch.float64)
    if p.binary: np.testing.assert_allclose(p.scaled(each).p, expected(z.double().numpy(), each.numpy()), atol=1e-9)
    np.testing.assert_allclose(p.scaled(torch.arange(1., 10.)[:, None]).p, expected(z.double().numpy(), np.arange(1., 10.)[:, None]), atol=1e-9)
    part = p[torch.arange(9) % 2 == 0]
    assert len(part) == 5 and part.example.tolist() == [0, 2, 4, 6, 8] and torch.equal(part.p, p.p[::2]) and torch.equal(part.q, p.q[::2])


# -- from a learner

@pytest.mark.parametrize('kind', ['index', 'one_hot', 'multi_hot', 'mask'])
def test_gather_gives_what_the_model_says(kind):
    learn = make_learner(kind, BCEWithLogitsLossFlat() if kind == 'multi_hot' else None if kind == 'index' else LabelSmoothingCrossEntropy(
        .1, axis=1 if kind == 'mask' else -1), bs=7).remove_cb(ProgressCallback)
    x, y = data(kind)
    learn.model.eval()
    with torch.no_grad(): z = learn.model(x)
    if kind == 'mask': z, y = z.movedim(1, -1).reshape(-1, 4), y.flatten()
    example = torch.arange(24).repeat_interleave(len(z)//24)
    kept = y >= 0 if kind == 'mask' else torch.ones(24).bool()
    q = F.one_hot(y[kept], 4) if y.dtype == torch.int64 else y
    for dl in (None, learn.dls.train, learn.dls.valid.new(drop_last=True), learn.dls.valid.new(shuffle=True)):
        got = gather(learn, dl)
        torch.testing.assert_close(got.z, z[kept])
        torch.testing.assert_close(got.q, q.double())
        assert torch.equal(got.example, example[kept]) and got.binary == (kind == 'multi_hot')
    torch.testing.assert_close(gather(learn, ds_idx=0).z, got.z)
    loader = torch.utils.data.DataLoader(list(zip(*data(kind))), batch_size=5)
    torch.testing.assert_close(gather(learn, loader).z, got.z)
    assert torch.equal(gather(learn, [(x[:4], data(kind)[1][:4])]).z, got.z[example[kept] < 4])


def test_of_many_masks_a_sample_is_kept():
    z, y = torch.randn(16, 4, 8, 8), torch.randint(0, 4, (16, 8, 8))
    for first in (0, -100): # the first batches may have hardly a label
        y[:4] = first
        p = gather(learner(z, y, CrossEntropyLossFlat(axis=1), bs=2), max_elements=1000)
        assert 500 < p.z.numel() < 1300
        at = {tuple(r): n for n, r in zip(np.repeat(range(16), 64), z.movedim(1, -1).reshape(-1, 4).tolist())}
        assert [at[tuple(r)] for r in p.z.tolist()] == p.example.tolist() and len(set(p.example.tolist())) >= 12
    whole = gather(learner(z, y, CrossEntropyLossFlat(axis=1), bs=2))
    assert len(whole) == 12*64


class LargestFirst(TfmdDL):
    "A loader that goes by an order from numpy"
    def get_idxs(self): return np.argsort([-float(self.dataset[i][0].sum()) for i in range(len(self.dataset))], kind='stable')


@pytest.mark.parametrize('dl', [partial(SortedDL, sort_func=lambda b: float(b[0].sum())), LargestFirst], ids=['SortedDL', 'numpy'])
def test_examples_of_loaders_that_sort(dl):
    z, y = single(50)
    learn = learner(z, y, dl=dl)
    order = [int(i) for i in learn.dls.valid.get_idxs()]
    p = gather(learn)
    assert p.example.tolist() == order != sorted(order)
    torch.testing.assert_close(p.z, z[order])
    torch.testing.assert_close(gather(learn, ds_idx=0).z, z[gather(learn, ds_idx=0).example])


@pytest.mark.parametrize('what, words', [
    ('nan', 'nan'), ('one class', 'one class'), ('unknown loss', 'pass act='), ('no labels', 'no labels'), ('all ignored', 'nothing to score'),
    ('nothing known', 'nothing to score'), ('emptied', 'no batches|nothing to score'), ('empty', 'no batches|nothing to score'), ('regression', 'do not fit'),
    ('two targets', 'one tensor'), ('two outputs', 'one tensor'), ('label outside', 'outside'), ('no loader', 'dl='),
    ('numbers for labels', '[Ll]abel|[Tt]arget|probabilit'), ('numbers for soft labels', '[Ll]abel|[Tt]arget|probabilit')])
def test_what_cannot_be_scored_says_why(what, words):
    z, y = single(20)
    if what == 'nan': z[3, 1] = torch.nan
    learn = learner(z, y)
    if what == 'one class': learn = learner(z[:, :1], torch.zeros(20).long())
    if what == 'unknown loss': learn = learner(z, y, lambda p, t: F.cross_entropy(p, t))
    if what == 'all ignored': learn = learner(z, torch.full((20,), -100))
    if what == 'nothing known': learn = learner(z, torch.full((20, 4), torch.nan), LabelSmoothingBCE(.1))
    if what == 'regression': learn = learner(z, torch.rand(20))
    if what == 'two targets':
        learn = learner(z, (y, y))
        learn.dls.train._n_inp = learn.dls.valid._n_inp = 1
    if what == 'two outputs': learn = learner(z, y, model=Outputs())
    if what == 'label outside': learn = learner(z, y+1)
    if what == 'numbers for labels': learn = learner(z, 5*torch.randn(20, 4), BCEWithLogitsLossFlat())
    if what == 'numbers for soft labels': learn = learner(z, 5*torch.randn(20, 4), LabelSmoothingCrossEntropy(.1))
    if what == 'no loader': learn.dls.loaders = learn.dls.loaders[:1]
    dl = None
    if what == 'no labels': dl = learn.dls.valid.new(Items((v,) for v in z))
    if what == 'emptied': dl = learn.dls.new_empty().valid
    if what == 'empty': dl = TfmdDL(Items(), bs=4, num_workers=0)
    modes = [m.training for m in learn.model.modules()]
    for ask in (lambda: gather(learn, dl), TemperatureScaling(learn).fit if dl is None else lambda: TemperatureScaling(learn).fit(dl)):
        with pytest.raises(ValueError, match=words): ask()
    assert [m.training for m in learn.model.modules()] == modes


class Better(SaveModelCallback):
    "A callback of the user, made of one of fastai's"


@pytest.mark.parametrize('monitor', ['accuracy', 'valid_loss'])
def test_a_subclass_of_what_watches_training_watches_training_only(monitor, tmp_path):
    learn = fit(make_learner(metrics=accuracy, path=tmp_path, cbs=Better(monitor)), 1).remove_cb(ProgressCallback)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    assert len(gather(learn)) == 24
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')} == files


def test_after_a_fit_that_was_interrupted():
    "RNNCallback still holds the outputs of a training batch, and their graph"
    class Interrupt(Callback):
        run_valid = False
        def before_backward(self): raise CancelFitException
    z, y = single()
    learn = fit(learner(z, y, model=Outputs(), cbs=[*rnn_cbs(), Interrupt()]), 1)
    assert learn.rnn.out.requires_grad
    torch.testing.assert_close(gather(learn).z, z)


SMALL = dict(emb_sz=8, n_hid=8, n_layers=2)


def texts(lm):
    rng = np.random.default_rng(0)
    df = pd.DataFrame({'text': [' '.join(rng.choice(list('abcde'), rng.integers(3, 9))) for _ in range(40)], 'label': ['neg', 'pos']*20})
    return TextDataLoaders.from_df(df, seed=0, valid_pct=.5, is_lm=lm, text_col='text', label_col='label', tok_tfm=BaseTokenizer(), bs=4, seq_len=6,
                                   num_workers=0, device='cpu')


def test_text_classifier(tmp_path):
    learn = text_classifier_learner(texts(False), AWD_LSTM, config={**awd_lstm_clas_config, **SMALL}, pretrained=False, path=tmp_path)
    fit(learn, 1).remove_cb(ProgressCallback)
    p = gather(learn)
    assert p.example.tolist() == learn.dls.valid.get_idxs() and p.example.tolist() != sorted(p.example.tolist())
    q = learn.get_preds()[0][p.example] # in the order of the data set
    torch.testing.assert_close(p.p.float(), q, atol=1e-5, rtol=1e-4)
    calibrated = TemperatureScaling(learn).fit()
    (label, k, before), (label1, k1, after) = learn.predict('a b c'), calibrated.predict('a b c')
    assert label == label1 and k == k1
    np.testing.assert_allclose(after, softmax(np.log(before.double().numpy())/calibrated.temperature), atol=1e-5)


def test_language_model(tmp_path):
    learn = language_model_learner(texts(True), AWD_LSTM, config={**awd_lstm_lm_config, **SMALL}, pretrained=False, path=tmp_path)
    fit(learn, 1).remove_cb(ProgressCallback)
    model = learn.model.eval()
    model.reset()
    with torch.no_grad(): z, y = (torch.cat(t) for t in zip(*((model(x)[0].flatten(0, 1), y.flatten()) for x, y in learn.dls.valid)))
    p = gather(learn)
    torch.testing.assert_close(p.z, z)
    assert torch.equal(p.q.argmax(1), y) and p.example.tolist() == sorted(p.example.tolist())

