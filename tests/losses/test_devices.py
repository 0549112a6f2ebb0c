"""What losses and the callback must not do on a GPU: wait for it, or copy to it in every batch.

The device 'meta' stands for a GPU, see `gpu_mode`. It has no kernels of ours, so that the losses take torch's or the formula there."""
import copy

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from gpu_mode import Gpu
from torch import nn

from fastai_smooth.callback import LabelSmoothing
from fastai_smooth.distributions import ClassPrior, Online, Taxonomy, Zipf
from fastai_smooth.kernels import smooth_binary_cross_entropy, smooth_cross_entropy, smooth_cross_entropy_reference
from fastai_smooth.losses import (
    CombinedLoss,
    LabelRelaxation,
    LabelSmoothingBCE,
    LabelSmoothingCrossEntropy,
    LabelSmoothingDice,
    LabelSmoothingFocal,
    LabelSmoothingNLL,
    LogitPenalty,
    MultiLabelSmoothingCrossEntropy,
)
from fastai_smooth.targets import MixedTarget, check_eps

K = 4
CE, EACH = LabelSmoothingCrossEntropy, [.1, .2, .3, .4]
BINARY = [LabelSmoothingBCE(.1), LabelSmoothingBCE(EACH, EACH, pos_weight=EACH), LabelSmoothingBCE(eps_pos=EACH, eps_neg=.2, sum_classes=True),
          LabelSmoothingBCE(.1, target_threshold=.3)]
SOFTMAX = [CE(.1), CE(EACH), CE(.1, EACH), CE(EACH, EACH, weight_by='example', convention='others'),
           CE(EACH, dist=ClassPrior([1, 2, 3, 4])), CE(.1, dist=Zipf()),
           CE(.1, dist=Taxonomy(['x/a', 'x/b', 'y/c', 'z'])), LabelSmoothingNLL(EACH), LabelSmoothingFocal(EACH), LabelSmoothingFocal(.1),
           LabelRelaxation(EACH), LabelRelaxation(.1), LabelSmoothingNLL(.1), LabelSmoothingDice(EACH),
           *(LogitPenalty(CE(.1), kind) for kind in ('margin', 'maxsup', 'confidence')),
           LabelSmoothingDice(.1, square_in_union=True), CombinedLoss(LabelSmoothingDice(.1), CE(.1))]


@pytest.mark.parametrize('loss', [*SOFTMAX, MultiLabelSmoothingCrossEntropy(EACH), *BINARY], ids=lambda loss: repr(loss)[:70])
def test_no_loss_waits_or_copies(loss):
    loss = copy.deepcopy(loss).to('meta')
    z, y = torch.empty(5, K, device='meta', requires_grad=True), torch.empty(5, dtype=torch.long, device='meta')
    mixed = MixedTarget(torch.stack([y, y], 1), torch.empty(5, 2, device='meta'), K)
    for reduction in ('mean', 'sum', 'none'):
        loss.reduction = reduction
        with Gpu() as gpu:
            for target in (y, torch.empty(5, K, device='meta'), mixed):
                value = loss(z, target)
                assert value.device.type == 'meta'
                value.sum().backward()
        assert gpu.ops


def test_no_function_waits_or_copies():
    z, y, each = torch.empty(5, K, device='meta', requires_grad=True), torch.empty(5, dtype=torch.long, device='meta'), torch.empty(K, device='meta')
    one = torch.empty((), device='meta')
    with Gpu():
        for f in (smooth_cross_entropy, smooth_cross_entropy_reference):
            for eps in (.1, each, one):
                for weight in (None, each): f(z, y, eps, weight=weight).backward()
        for eps in (.1, each, one): smooth_binary_cross_entropy(z, y, eps, pos_weight=each).backward()


def test_a_strength_on_a_gpu_is_read_once(monkeypatch):
    "When a loss or callback is made, and never again"
    each = torch.empty(K, device='meta')
    assert check_eps(each).shape == (K,) and check_eps(each[0]).ndim == 0
    with pytest.raises(ValueError, match='one per class'): check_eps(torch.empty(2, K, device='meta'))
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda self: torch.tensor([.1, .2, .3, 1.4])) # what such a tensor would hold
    for make in (CE, LabelSmoothing, LabelSmoothingBCE, lambda e: LabelSmoothingBCE(eps_pos=e)):
        with pytest.raises(ValueError, match=r'must lie in \[0, 1\]'): make(each)


class Batches(list):
    "A data loader that gives the same batches again and again"
    device, n_inp, num_workers = torch.device('meta'), 1, 0
    after_item = after_batch = dataset = None


class Watched(Callback):
    "A batch in which nothing may wait"
    order, run_valid, mode = -300, False, None
    def before_batch(self):
        self.mode = Gpu()
        self.mode.__enter__()
    def leave(self):
        if self.mode is not None: self.mode.__exit__(None, None, None)
        self.mode = None
    def after_batch(self): self.leave()


class Mix(Callback):
    "MixUp, whose weights are there already"
    run_valid = False
    def before_batch(self): self.learn.yb = (torch.lerp(self.y.flip(0), self.y, torch.empty(5, device='meta')[:, None]),)


CALLBACKS = {'number': lambda: LabelSmoothing(.1), 'schedule': lambda: LabelSmoothing(lambda share: torch.full((K,), .1*share, device='meta')),
             'online': lambda: LabelSmoothing(.1, dist=Online(K)), 'zipf': lambda: LabelSmoothing(.1, dist=Zipf())}
TRAININGS = [(nn.BCEWithLogitsLoss, 'number'), (nn.BCEWithLogitsLoss, 'schedule'), *((CrossEntropyLossFlat, name) for name in CALLBACKS)]


@pytest.mark.parametrize('mixers', [[], [Mix]], ids=['none', 'mixed'])
@pytest.mark.parametrize('loss, cb', TRAININGS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_the_callback_waits_for_nothing(loss, cb, mixers, monkeypatch):
    "A distribution is for exclusive classes, not for the binary loss"
    x, y = torch.empty(5, 1, 4, 4, device='meta'), torch.empty(5, dtype=torch.long, device='meta')
    dls = DataLoaders(Batches([(x, y)]*2), Batches([(x, y)]))
    dls.c = K
    cb, watched = CALLBACKS[cb](), Watched()
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(16, K)).to('meta'), loss(), cbs=[cb, watched, *mixers], opt_func=SGD)
    learn.remove_cbs([c for c in learn.cbs if isinstance(c, (Recorder, ProgressCallback))]) # they wait for the loss, as they should
    learn._do_epoch_validate = lambda *args: None
    monkeypatch.setattr(torch.Tensor, '__float__', lambda self: 0.) # the log of a schedule is read at the end of a pass, and nothing has values here
    try: learn.fit(1)
    finally: watched.leave()
    assert learn.train_iter == 2
