"The named recipes: every number of the published table on the built learner, real data that they learn from, and mistakes in one line"
import pickle
from pkgutil import resolve_name
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.optimizer import Lamb
from fastai.torch_core import set_seed
from fastai.vision.core import PILImage
from PIL import Image
from photos import write_digits
from torch import nn

from fastai_smooth.callback import CutMixMask, LabelSmoothing, OneOf
from fastai_smooth.data import digits
from fastai_smooth.distributions import Spatial
from fastai_smooth.losses import LabelSmoothingBCE, LabelSmoothingCrossEntropy
from fastai_smooth.train import builders, recipe, recipes

# ResNet strikes back: epochs, smoothing, MixUp alpha, lr, weight decay, RandAugment magnitude, repeated augmentation, stochastic depth, train resolution
TABLE = dict(a1=(600, .1, .2, 5e-3, .01, 7, True, .05, 224), a2=(300, 0., .1, 5e-3, .02, 7, True, .05, 224), a3=(100, 0., .1, 8e-3, .02, 6, False, 0., 160))


def quiet(learn):
    learn.remove_cbs([c for c in learn.cbs if type(c).__name__ == 'ProgressCallback'])
    learn.logger = lambda *args: None
    return learn


def test_every_number_has_its_source():
    assert {'pets', 'finetune', 'digits', 'a1', 'a2', 'a3', 'multilabel', 'segmentation', 'text', 'tabular'} <= set(recipes)
    for name, r in recipes.items():
        assert r.name == name and r.purpose and set(r.settings) == set(r.sources) and all(r.sources.values())
        assert all(k in repr(r) for k in r.settings)
        for f in (r.make_dls, r.make_learner, r.train): assert callable(resolve_name(f.name))


@pytest.mark.slow
@pytest.mark.parametrize('name', TABLE)
def test_resnet_strikes_back(name, tmp_path):
    "Every number of the table on the learner, its data and its schedule"
    epochs, eps, alpha, lr, wd, magnitude, repeated, depth, size = TABLE[name]
    write_digits(tmp_path, 40, split=True)
    r = recipe(name)
    assert (r.settings['epochs'], r.settings['bs'], r.settings['arch']) == (epochs, 2048, 'resnet50')
    dls = r.dls(tmp_path, bs=6)
    learn = r.learner(dls)
    assert type(learn.model) is timm.models.resnet.ResNet and sum(p.numel() for p in learn.model.parameters()) > 23e6 and learn.model.fc.out_features == 10
    drops = [m.drop_prob for m in learn.model.modules() if type(m).__name__ == 'DropPath']
    assert (max(drops) if drops else 0.) == pytest.approx(depth)
    loss = learn.loss_func
    assert isinstance(loss, LabelSmoothingBCE) and loss.eps == 0 and loss.target_threshold == .2 and learn.label_smoothing.eps == eps
    assert isinstance(learn.one_of, OneOf) and learn.one_of.p == [.5, .5] and [type(m) for m in learn.one_of.mixers] == [MixUp, CutMix]
    assert [m.distrib.concentration0.item() for m in learn.one_of.mixers] == pytest.approx([alpha, 1.])
    assert learn.opt_func is Lamb and learn.lr == lr and learn.wd == wd and learn.wd_bn_bias is False
    learn.create_opt()
    decayed = [learn.opt.state[p].get('do_wd', True) for p in learn.model.parameters()]
    assert decayed == [p.ndim > 1 for p in learn.model.parameters()], "no weight decay on norm and bias"
    # data
    augment = next(t for t in dls.train.after_item.fs if type(t).__name__ == 'RandAugment')
    assert (augment.magnitude, augment.std, augment.split_idx) == (magnitude, .5, 0)
    assert dls.train.one_batch()[0].shape[-2:] == (size, size) and dls.valid.one_batch()[0].shape[-2:] == (224, 224)
    idxs = dls.train.get_idxs()
    assert len(idxs) == len(dls.train_ds) == 30 and len(set(idxs)) == (10 if repeated else 30)
    if repeated: assert all(len(set(idxs[i:i+3])) == 1 for i in range(0, 30, 3)) and len(set(dls.train.new(shuffle=False).get_idxs())) == 30
    assert sorted(dls.valid.get_idxs()) == list(range(len(dls.valid_ds)))
    # schedule
    schedule = builders.warm_cosine(lr, 5, epochs, r.settings['first_lr'], r.settings['last_lr'])
    assert schedule(0.) == pytest.approx(1e-4) and schedule(5/epochs) == pytest.approx(lr) and schedule(1.) == pytest.approx(1e-6)
    assert schedule(2.5/epochs) == pytest.approx((lr+1e-4)/2) and schedule(.5+2.5/epochs) == pytest.approx((lr+1e-6)/2)


@pytest.mark.slow
def test_resnet_strikes_back_scaled_down_learns(tmp_path):
    "On real digits: LAMB, one of MixUp and CutMix, binary cross entropy with a threshold, RandAugment, repeated augmentation"
    write_digits(tmp_path, 600)
    r = recipe('a1')
    changes = dict(arch='resnet10t', epochs=8, warmup_epochs=1, bs=20, size=32, test_size=32, mixup=.1, magnitude=2, drop_path=0., lr=1e-2)
    set_seed(0, reproducible=True)
    learn = quiet(r.learner(r.dls(tmp_path, **changes), **changes))

    class Rates(Callback):
        def before_fit(self): self.lrs = []
        def after_step(self): self.lrs.append(self.opt.hypers[-1]['lr'])
    learn.add_cb(Rates())
    r.fit(learn)
    accuracies = [v[-1] for v in learn.recorder.values]
    assert max(accuracies[-3:]) > .4 and accuracies[-1] > accuracies[0], accuracies
    lrs = np.array(learn.rates.lrs)
    n = len(learn.dls.train)
    assert lrs.argmax() in (n-1, n, n+1) and lrs[-1] < 1e-4
    with pytest.raises(ValueError, match='warmup_epochs'): r.fit(r.learner(learn.dls, **{**changes, 'epochs': 1}))
    pickle.loads(pickle.dumps(learn.dls.train.after_item))


def test_repeats_and_test_crop():
    with pytest.raises(ValueError, match='repeats must be 1 or 3, but got 2'): builders.repeated_dl(2)
    wide = PILImage.create(np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (50, 1, 3)))
    crop = builders.TestCrop(40, .8)
    out = np.asarray(crop(wide, split_idx=1))
    assert out.shape == (40, 40, 3) and abs(int(out[0, 20, 0])-50) <= 1 and crop(wide, split_idx=0) is wide
    assert 28 <= out[0, 0, 0] <= 32, "the square in the middle of an image of 50 by 100 that became 100 by 50 high: 40 of 50 rows' worth of columns"


@pytest.mark.slow
def test_pets_with_local_files(tmp_path):
    write_digits(tmp_path/'x', 160)
    for file in (tmp_path/'x').rglob('*.png'):
        Image.open(file).convert('RGB').resize((40, 40)).save(tmp_path/f"{('Abyssinian', 'great_pyrenees')[int(file.parent.name) % 2]}_{file.stem}.jpg")
        file.unlink()
    r = recipe('pets')
    changes = dict(arch='resnet18', pretrained=False, presize=40, size=32, bs=16, epochs=1)
    dls = r.dls(tmp_path, **changes)
    assert list(dls.vocab) == ['Abyssinian', 'great_pyrenees'] and len(dls.valid_ds) == 32
    learn = quiet(r.learner(dls, **changes))
    assert isinstance(learn.loss_func, LabelSmoothingCrossEntropy) and learn.loss_func.eps == .1
    assert r.settings['epochs'] == 4 and r.settings['arch'] == 'resnet34'
    calibrated = r.fit(learn)
    assert len(learn.recorder.values) == 1 and 0 < calibrated.temperature <= 100
    assert str(calibrated.predict(next(tmp_path.glob('*.jpg')))[0]) in dls.vocab


def test_without_a_network_there_is_one_line(monkeypatch):
    def fails(*args, **kwargs): raise URLError('no route')
    real = builders.vision_learner
    monkeypatch.setattr(builders, 'vision_learner', lambda *args, **kwargs: fails() if kwargs['pretrained'] else real(*args, **kwargs))
    with pytest.raises(ValueError, match=r'resnet18 could not be downloaded.*weights=FILE'): recipe('finetune').learner(digits(), arch='resnet18')
    recipe('finetune').learner(digits(), arch='resnet18', pretrained=False)
    monkeypatch.setattr(builders, 'vision_learner', lambda *args, **kwargs: 1/0)
    with pytest.raises(ZeroDivisionError): recipe('finetune').learner(digits(), arch='resnet18')


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['resnet10t', 'resnet18', 'mobilenet_v3_small'])  # of timm, of both, of torchvision
def test_finetune_from_a_file(arch, tmp_path):
    write_digits(tmp_path/'photos', 200, nested=True)
    r = recipe('finetune')
    changes = dict(arch=arch, presize=40, size=32, bs=32, epochs=1, freeze_epochs=1)
    source = quiet(r.learner(r.dls(tmp_path/'photos', **changes), pretrained=False, **changes))
    torch.save(source.model[0].state_dict(), tmp_path/'body.pth')
    learn = quiet(r.learner(r.dls(tmp_path/'photos', **changes), weights=str(tmp_path/'body.pth'), **changes))
    for a, b in zip(learn.model[0].state_dict().values(), source.model[0].state_dict().values()): assert torch.equal(a, b)
    norms = nn.BatchNorm2d, nn.BatchNorm1d
    frozen = [p.requires_grad for m in learn.model[0].modules() if not isinstance(m, norms) for p in m.parameters(recurse=False)]
    assert not any(frozen) and all(p.requires_grad for p in learn.model[1].parameters())
    assert r.fit(learn).temperature > 0 and learn.label_smoothing.eps == .1


@pytest.mark.slow
@pytest.mark.parametrize('name, changes, metric, at_least', [
    ('digits', dict(epochs=5), 'accuracy', .9), ('multilabel', dict(epochs=4), 'accuracy_multi', .85), ('segmentation', dict(epochs=3), 'pixel_accuracy', .75),
    ('text', dict(epochs=2), 'accuracy', .6), ('tabular', dict(epochs=5), 'accuracy', .9)])
def test_recipes_learn_from_real_data(name, changes, metric, at_least):
    set_seed(0, reproducible=True)
    r = recipe(name)
    learn = quiet(r.learner(**changes))
    loss = learn.loss_func
    calibrated = r.fit(learn)
    values = dict(zip(learn.recorder.metric_names[1:-1], learn.recorder.values[-1]))
    assert values[metric] > at_least, values
    assert learn.loss_func is loss and any(isinstance(cb, LabelSmoothing) for cb in learn.cbs)
    quiet(calibrated)
    after = dict(zip(('loss', *(m.name for m in calibrated.metrics)), calibrated.validate()))
    assert after['nll'] <= values['nll']+1e-4 and after[metric] == pytest.approx(values[metric], abs=2e-3), "calibrated, and the same decisions"


def test_settings_reach_the_learner():
    learn = recipe('segmentation').learner(eps=.2, kernel_size=5)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat) and isinstance(learn.label_smoothing.dist, Spatial) and learn.label_smoothing.dist.kernel_size == 5
    assert any(isinstance(cb, CutMixMask) for cb in learn.cbs) and learn.label_smoothing.eps == .2 and learn.recipe_settings['eps'] == .2
    assert isinstance(recipe('multilabel').learner().loss_func, BCEWithLogitsLossFlat)
    learn = recipe('tabular').learner(table='iris', layers=(20,))
    assert [m.out_features for m in learn.model.modules() if isinstance(m, nn.Linear)] == [20, 3]
    with pytest.raises(ValueError, match='no pretrained weights of .small_awd_lstm'): recipe('text').learner(pretrained=True)
    with pytest.raises(ValueError, match="data of its own: leave photos out"): recipe('digits').dls('photos')
