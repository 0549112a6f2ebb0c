"One of several mixers, CutMix on masks and timm's Mixup, with and without smoothing: every pixel and example accounted for"
import itertools
import math

import learners
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.torch_core import set_seed
from learners import K, Look, check_seen, fit, make_learner
from timm.data.mixup import Mixup
from torch.nn import functional as F

from fastai_smooth.callback import CutMixMask, LabelSmoothing, OneOf, TimmMix
from fastai_smooth.losses import LabelSmoothingCrossEntropy
from fastai_smooth.targets import MixedTarget, to_dense


def step(cb, x, y, training=True):
    "Run a mixer on a batch and return what it made of it"
    class Learn: pass
    learn = Learn()
    learn.xb, learn.yb, learn.x, learn.y, learn.training, learn.loss_func = (x,), (y,), x, y, training, lambda *a: None
    cb.learn = learn
    cb.before_train(), cb.before_batch()
    return learn.xb[0], learn.yb[0]


def coded_masks(n=6, h=9, w=7):
    "Masks in which each pixel of each example has a code of its own, and images that show the code"
    y = torch.arange(n*h*w).view(n, h, w)
    return y[:, None].float().expand(-1, 3, -1, -1).clone(), y


# -- CutMixMask

@pytest.mark.parametrize('alpha', [.3, 1., 5.])
def test_the_same_box_of_one_other_example_in_image_and_mask(alpha):
    for seed in range(20):
        set_seed(seed)
        x, y = coded_masks()
        kept = x.clone(), y.clone()
        cb = CutMixMask(alpha)
        xm, ym = step(cb, x, y)
        assert torch.equal(xm[:, 0].long(), ym) and torch.equal(xm[:, 0], xm[:, 2])
        assert torch.equal(x, kept[0]) and torch.equal(y, kept[1]), "the data set's tensors are not written to"
        place, source = ym % (9*7), ym // (9*7)
        assert torch.equal(place, (y % (9*7))), "a pixel keeps its place"
        pasted = source != torch.arange(6)[:, None, None]
        rows, columns = (pasted.any(0).any(d).nonzero().flatten() for d in (1, 0))
        if len(rows): # one rectangle
            inside = torch.zeros(9, 7, dtype=torch.bool)
            inside[rows[0]:rows[-1]+1, columns[0]:columns[-1]+1] = True
            for i in range(6): # an example that was its own partner shows nothing
                assert len(source[i][inside].unique()) == 1 and (source[i][~inside] == i).all()
            if pasted.any((1, 2)).all(): assert abs(cb.lam.item() - (1-inside.float().mean().item())) < 1e-6


@pytest.mark.parametrize('form', ['index', 'column', 'dense', 'mixed', 'mixed_last', 'dense_last'])
def test_masks_in_every_form(form):
    set_seed(3)
    n, h, w = 5, 8, 6
    y = torch.randint(0, K, (n, h, w))
    y[:, 0] = -100
    code = torch.arange(n*h*w).view(n, 1, h, w).float()
    one = lambda axis: MixedTarget(y[:, None], torch.ones(n, 1), K, axis)
    target = {'index': lambda: y, 'column': lambda: y[:, None], 'dense': lambda: to_dense(y, K), 'mixed': lambda: one(1), 'mixed_last': lambda: one(-1),
              'dense_last': lambda: to_dense(y, K, axis=-1)}[form]()
    xm, ym = step(CutMixMask(), code, target)
    expected = y.flatten()[xm[:, 0].long().flatten()].view(n, h, w)
    assert (expected != y).any()
    if form in ('index', 'column'): assert torch.equal(ym.view(n, h, w), expected)
    else: assert torch.equal(ym if isinstance(ym, torch.Tensor) else ym.dense(), to_dense(expected, K, axis=-1 if form.endswith('last') else 1))
    if form.startswith('mixed'): assert ym.is_sparse_mixture


@pytest.mark.parametrize('mixers', [[CutMixMask], [CutMixMask, MixUp], [MixUp, CutMixMask], [MixUp, MixUp], ['oneof']])
def test_masks_train_on_the_smoothed_truth(mixers):
    "Ignored pixels stay ignored, pasted or blended"
    cbs = [OneOf(CutMixMask(), MixUp(), p=[.5, .3])] if mixers == ['oneof'] else [m() for m in mixers]
    learn = fit(make_learner('mask', None, [LabelSmoothing(.2), *cbs, Look()]), 2)
    check_seen(learn, 'mask', .2)


def test_cutmix_mask_without_smoothing_keeps_hard_labels():
    loss = CrossEntropyLossFlat(axis=1)
    learn = fit(make_learner('mask', loss, [CutMixMask(), Look()]), 1)
    check_seen(learn, 'mask', 0.)
    assert learn.loss_func is loss and all(not yb[0].is_floating_point() for *_, yb in learn.look.seen)


def test_cutmix_mask_on_labels_of_images():
    with pytest.raises(ValueError, match=r'For labels of whole images use CutMix'): fit(make_learner('index', None, [CutMixMask()]), 1)


# -- TimmMix

def one_hot_images(n=8, side=6):
    return torch.eye(n)[:, :, None, None].expand(-1, -1, side, side).clone(), torch.arange(n)


@pytest.mark.parametrize('n', [8, 7])
@pytest.mark.parametrize('alphas', [(1., 0.), (0., 1.), (.4, 1.)])
@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
def test_labels_are_mixed_as_images_are(mode, alphas, n):
    "The share of each example's colour in the mixed image is its share in the label"
    seen = set()
    for seed in range(15):
        set_seed(seed)
        x, y = one_hot_images(n)
        q = torch.eye(n)
        cb = TimmMix(*alphas, mode=mode)
        xm, qm = step(cb, x.clone(), q)
        torch.testing.assert_close(xm.mean((2, 3)), qm, rtol=0, atol=1e-5)
        for i in range(n):
            others = {j for j in range(n) if qm[i, j] > 0} - {i}
            assert others <= {n-1-i}, "the partner is the mirror image"
        lam = cb.lam
        if mode == 'batch': assert lam.unique().numel() == 1
        if mode != 'elem': torch.testing.assert_close(lam, lam.flip(0))
        if mode == 'pair' and n % 2: assert torch.equal(qm[n//2], q[n//2])
        seen.add(round(lam[0].item(), 4))
        constant = (xm == xm[:, :, :1, :1]).all(3).all(2).all(1)
        if alphas[0] == 0 and (lam < 1).any(): assert not constant[lam < 1].all(), "CutMix pastes, it does not blend"
        if alphas[1] == 0: assert constant.all()
    assert len(seen) > 5


def test_weights_follow_timms_distribution():
    "Mean and spread of the weights, and the share of CutMix, as timm's Mixup draws them"
    n = 4000
    mine = TimmMix(.3, 1., prob=.7, switch_prob=.25, mode='elem')
    set_seed(0)
    lam, cut = mine.draw(n)
    set_seed(0) # NumPy's, too
    theirs, their_cut = Mixup(.3, 1., prob=.7, switch_prob=.25, mode='elem')._params_per_elem(n)
    assert abs((lam == 1).float().mean() - (theirs == 1).mean()) < .04
    assert abs(cut.float().mean() - their_cut.mean()) < .04
    for q in (.1, .3, .5): assert abs(lam.quantile(q).item() - np.quantile(theirs, q)) < .05


def test_boxes_follow_timms():
    "Area after the cut at the border"
    from timm.data.mixup import cutmix_bbox_and_lam
    set_seed(0)
    lam = torch.rand(3000)
    box = TimmMix(0., 1.).boxes(lam, (32, 24))
    area = (box[:, 1]-box[:, 0])*(box[:, 3]-box[:, 2])/(32*24)
    set_seed(0)
    theirs = np.array([1-cutmix_bbox_and_lam((3, 32, 24), v)[1] for v in lam.tolist()])
    assert abs(area.mean().item()-theirs.mean()) < .02 and abs(area.std().item()-theirs.std()) < .02
    box = TimmMix(cutmix_minmax=(.25, .5)).boxes(lam, (32, 24))
    sides = torch.stack([box[:, 1]-box[:, 0], box[:, 3]-box[:, 2]], 1)
    assert (box >= 0).all() and (box[:, 1] <= 32).all() and (box[:, 3] <= 24).all()
    assert sides[:, 0].min() == 8 and sides[:, 0].max() == 15 and sides[:, 1].min() == 6 and sides[:, 1].max() == 11


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('kind', ['index', 'one_hot', 'mask'])
def test_timm_mix_trains_on_the_smoothed_truth(kind, mode):
    alphas = (.8, 0.) if kind == 'mask' else (.8, 1.) # CutMix blends whole masks: CutMixMask is for them
    loss = LabelSmoothingCrossEntropy(0., axis=1)
    learn = fit(make_learner(kind, loss, [LabelSmoothing(.1), TimmMix(*alphas, mode=mode), Look()]), 2)
    check_seen(learn, kind, .1)


def test_timm_mix_without_smoothing():
    "By fastai's blended losses on indices, by blended targets on dense ones"
    for kind in ('index', 'one_hot'):
        loss = LabelSmoothingCrossEntropy(0.) if kind == 'one_hot' else CrossEntropyLossFlat()
        if kind == 'one_hot': loss.y_int = False
        learn = fit(make_learner(kind, loss, [TimmMix(.8, 1., mode='elem'), Look()]), 1)
        check_seen(learn, kind, 0.)
        assert learn.loss_func is loss


def test_timm_mix_of_several_labels_and_in_one_of():
    learn = fit(make_learner('multi_hot', BCEWithLogitsLossFlat(), [LabelSmoothing(.2), TimmMix(mode='pair'), Look()]), 1)
    for x, pred, seen, _ in learn.look.seen: assert abs(seen-learners.expected_binary_loss(x, pred, .2, 'half')) < 1e-5
    learn = fit(make_learner('index', None, [LabelSmoothing(.2), OneOf(TimmMix(), CutMix(), p=[.5, .3]), Look()]), 2)
    check_seen(learn, 'index', .2)


def test_the_seed_reproduces_it():
    def lam():
        set_seed(7)
        return TimmMix(.5, 1., mode='elem').draw(10)
    assert all(torch.equal(a, b) for a, b in zip(lam(), lam()))
    torch.manual_seed(7) # NumPy's state has no part in it
    assert torch.equal(TimmMix(.5, 1., mode='elem').draw(10)[0], lam()[0])


def test_prob_of_zero_leaves_all_alone():
    x, y = one_hot_images()
    xm, qm = step(TimmMix(prob=0.), x, torch.eye(8))
    assert torch.equal(xm, x) and torch.equal(qm, torch.eye(8))


@pytest.mark.parametrize('kwargs, words', [(dict(mixup_alpha=0.), 'nothing to mix'), (dict(mixup_alpha=-1.), 'mixup_alpha'),
                                           (dict(mode='item'), "'batch', 'pair'"), (dict(prob=1.5), 'prob'),
                                           (dict(switch_prob=-.1), 'switch_prob'), (dict(cutmix_minmax=(.5, .2)), 'cutmix_minmax'),
                                           (dict(cutmix_alpha=math.nan), 'cutmix_alpha')])
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words): TimmMix(**kwargs)


def test_cutmix_of_vectors():
    with pytest.raises(ValueError, match=r'\(N, C, H, W\)'): step(TimmMix(0., 1.), torch.rand(4, 3), F.one_hot(torch.arange(4)).float())


@pytest.mark.parametrize('cb', [TimmMix(), TimmMix(.2, 1., (.1, .5), prob=.5, mode='pair', correct_lam=False), CutMixMask(.5)])
def test_repr(cb): assert repr(eval(repr(cb))) == repr(cb)


@pytest.mark.parametrize('form', ['mixed', 'dense'])
def test_a_cube_of_classes_and_pixels(form):
    "As many classes as rows and columns: the axis of the loss says where they are"
    set_seed(5)
    n = 8
    y = torch.randint(0, n, (4, n, n))
    x = torch.arange(4*n*n).view(4, 1, n, n).float()
    cb = CutMixMask()
    target = MixedTarget(y[:, None], torch.ones(4, 1), n, -1) if form == 'mixed' else to_dense(y, n, axis=-1)

    class Learn: pass
    learn = Learn()
    learn.xb, learn.yb, learn.training, learn.loss_func = (x,), (target,), True, LabelSmoothingCrossEntropy(axis=-1)
    cb.learn = learn
    cb.before_train(), cb.before_batch()
    source = learn.xb[0][:, 0].long().flatten()
    assert (source != x[:, 0].long().flatten()).any()
    ym = learn.yb[0]
    torch.testing.assert_close(ym.dense() if form == 'mixed' else ym, to_dense(y.flatten()[source].view(4, n, n), n, axis=-1))


def test_several_inputs():
    x, y = one_hot_images()
    other = 2*x

    def run(cb, *xb):
        class Learn: pass
        learn = Learn()
        learn.xb, learn.yb, learn.training, learn.loss_func = xb, (torch.eye(8),), True, lambda *a: None
        cb.learn = learn
        cb.before_train(), cb.before_batch()
        return learn.xb
    for alphas in ((1., 0.), (0., 1.)):
        a, b = run(TimmMix(*alphas), x, other)
        torch.testing.assert_close(b, 2*a)
    vectors = torch.randn(8, 3)
    a, b = run(TimmMix(), x, vectors)
    assert b.shape == vectors.shape
    with pytest.raises(ValueError, match='pastes boxes into images'): run(TimmMix(0., 1.), x, vectors)
    with pytest.raises(ValueError, match='pastes boxes into images'): run(CutMixMask(), x, vectors)
    with pytest.raises(ValueError, match='blends floating inputs'): run(TimmMix(), torch.randint(0, 5, (8, 3)), vectors)


# -- OneOf

class Drawn(Callback):
    run_valid = False
    def before_fit(self): self.names = []
    def before_backward(self): self.names.append(type(self.learn.one_of.chosen).__name__)


@pytest.mark.slow
@pytest.mark.parametrize('smooth', [True, False])
def test_shares_of_one_of(smooth):
    loss = CrossEntropyLossFlat()
    cbs = [OneOf(MixUp(), CutMix(), p=[.2, .5]), Drawn(), *([LabelSmoothing(.1)] if smooth else [])]
    learn = fit(make_learner('index', loss, cbs, n=400, bs=2), 5)
    share = {n: learn.drawn.names.count(n)/1000 for n in ('MixUp', 'CutMix', 'NoneType')}
    for n, p in (('MixUp', .2), ('CutMix', .5), ('NoneType', .3)): assert abs(share[n]-p) < .06  # four standard deviations
    assert learn.loss_func is loss


@pytest.mark.parametrize('order', list(itertools.permutations(range(2))))
def test_one_of_without_smoothing_is_exact(order):
    "The loss of the mixed truth, also on the batches that are left alone"
    cbs = [OneOf(MixUp(), CutMix(), p=[.3, .3]), Look()]
    check_seen(fit(make_learner('index', CrossEntropyLossFlat(), [cbs[i] for i in order]), 4), 'index', 0.)


def test_one_of_follows_the_seed():
    names = [fit(make_learner('index', cbs=[OneOf(MixUp(), CutMix()), Drawn()]), 3).drawn.names for _ in range(2)]
    assert names[0] == names[1] and len(set(names[0])) > 1
