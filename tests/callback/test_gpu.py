"Labels outside the classes on a GPU: the error of the CPU, at the end of the batch at the latest"
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.losses import CrossEntropyLossFlat
from learners import K, WhatTheLossSaw, check_seen, fit, make_learner

from fastai_smooth.callback import LabelSmoothing, smoothing
from fastai_smooth.callback.smoothing import AfterEverybody


class Steps(Callback):
    n = 0
    def after_step(self): self.n += 1


def test_noted_labels_are_asked_about_after_the_recorder(monkeypatch):
    "A device that notes a label in the second batch, without a GPU"
    learn = make_learner('index', cbs=[LabelSmoothing(.1), Steps()])
    loss = learn.loss_func

    def check():
        if learn.steps.n == 2: raise ValueError('Label 7 is outside')
    monkeypatch.setattr(smoothing, 'check_reported_labels', check)
    with pytest.raises(ValueError, match='Label 7'): fit(learn, 1)
    assert learn.loss_func is loss and learn.steps.n == 2 and len(learn.recorder.losses) == 2
    assert not any(isinstance(cb, AfterEverybody) for cb in learn.cbs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('mixers', [list, lambda: [MixUp()]], ids=['none', 'mixup'])
@pytest.mark.parametrize('batch', [0, 2])
def test_a_label_outside_the_classes_on_a_gpu(batch, mixers):
    loss = CrossEntropyLossFlat()
    learn = make_learner('index', loss, [LabelSmoothing(.1), Steps(), *mixers()])
    for dl in learn.dls.loaders: dl.device = torch.device('cuda')
    learn.dls.device = torch.device('cuda')
    learn.model.cuda()

    class Spoil(Callback):
        order, run_valid = -200, False
        def before_batch(self):
            if self.iter == batch: self.learn.yb = (self.y.clone().fill_(K+3),)
    learn.add_cb(Spoil())
    with pytest.raises(ValueError, match=f'Label {K+3} is outside'): fit(learn, 1)
    assert learn.loss_func is loss and learn.steps.n <= batch+1
    learn.remove_cb(Spoil)
    learn.model = make_learner('index').model.cuda()
    learn.create_opt()
    learn.add_cb(WhatTheLossSaw())
    fit(learn, 1)
    learn.look.seen = [(x.cpu(), pred.cpu(), value, yb) for x, pred, value, yb in learn.look.seen]
    check_seen(learn, 'index', .1)
