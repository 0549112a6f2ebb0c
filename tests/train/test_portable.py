"Exports that fastai loads alone, and that predict from whatever people have: a file, its name, its bytes, an array, a PIL image"
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.vision.augment import Resize
from photos import QUICK, write_digits
from PIL import Image
from torch import nn
from users_files import write_masks

from fastai_smooth.calibration import ScaledModel, TemperatureScaling
from fastai_smooth.data import image_dls
from fastai_smooth.losses import LabelSmoothingBCE, LabelSmoothingCrossEntropy, LogitPenalty
from fastai_smooth.train import recipe
from fastai_smooth.train.exported import write_learner
from fastai_smooth.train.portable import folded, plain_loss, portable

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')
# in a process that cannot import this package: what each kind of input is predicted to be
ALONE = '''
import sys; sys.modules['fastai_smooth'] = None
import io, json, pathlib, numpy as np, torch
from PIL import Image
from fastai.vision.all import load_learner, PILImage
torch.set_num_threads(1)
found = {}
for file, photo in zip(sys.argv[1::2], sys.argv[2::2]):
    learn = load_learner(file)
    photo = pathlib.Path(photo)
    with learn.no_bar():
        kinds = photo, str(photo), photo.read_bytes(), np.asarray(Image.open(photo).convert('RGB')), Image.open(photo), PILImage.create(photo)
        found[file] = [learn.predict(kind)[2].flatten()[:50].tolist() for kind in kinds]
print(json.dumps(found))
'''


@pytest.mark.slow
@pytest.mark.processes
def test_every_image_recipe_predicts_from_anything_without_this_package(tmp_path):
    write_digits(tmp_path/'photos', 120)
    photo = next((tmp_path/'photos'/'3').glob('*.png'))
    rows = [f'{f},{f.parent.name} {int(f.parent.name) % 2}' for f in sorted((tmp_path/'photos').rglob('*.png'))]
    (tmp_path/'several.csv').write_text('\n'.join(['file,label', *rows]))
    write_masks(tmp_path/'masks', 24)
    (tmp_path/'pets').mkdir()
    for f in (tmp_path/'photos').rglob('*.png'): Image.open(f).save(tmp_path/'pets'/f'{("cat", "dog")[int(f.parent.name) % 2]}_{f.stem}.png')
    pets = {k: v for k, v in QUICK.items() if k != 'freeze_epochs'}
    runs = [('finetune', 'photos', QUICK, photo), ('multilabel', 'several.csv', dict(size=16, epochs=1, delimiter=' '), photo),
            ('segmentation', 'masks', dict(size=24, epochs=1, ignore=255), tmp_path/'masks'/'images'/'000.png'), ('pets', 'pets', pets, photo)]
    words = []
    for name, data, changes, shown in runs:
        made = recipe(name)
        learn = made.learner(made.dls(tmp_path/data, **changes), **changes)
        with learn.no_bar(): learn = TemperatureScaling(learn).fit()
        assert write_learner(learn, tmp_path/f'{name}.pkl', learn.dls.valid.one_batch()[:1]), name
        words += [str(tmp_path/f'{name}.pkl'), str(shown)]
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', ALONE, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found) == 4
    for each in found.values():
        for p in each[1:]: np.testing.assert_allclose(p, each[0], atol=1e-5)


def learner_of(folder, loss=None):
    return Learner(image_dls(folder, dict(valid_pct=.2, seed=1, bs=16), Resize(16)), nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), loss_func=loss)


def test_a_turned_photo_is_turned_and_a_deep_one_keeps_our_reader(tmp_path):
    write_digits(tmp_path/'photos', 60)
    turned = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8)[:, None, None]*15, (1, 16, 3)))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path/'turned.png', exif=exif)
    learn = learner_of(tmp_path/'photos')
    new = portable(learn, learn.dls.valid.one_batch()[:1])
    with learn.no_bar(), new.no_bar():
        upright, plain = new.predict(tmp_path/'turned.png')[2], new.predict(Image.open(tmp_path/'turned.png').convert('RGB').rotate(180))[2]
        np.testing.assert_allclose(upright, learn.predict(tmp_path/'turned.png')[2], atol=1e-6)
    assert abs(upright-plain).max() > 1e-3
    deep = Image.fromarray(np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16))
    deep.save(tmp_path/'photos'/'3'/'deep.png')
    learn = learner_of(tmp_path/'photos')
    new = portable(learn, learn.dls.valid.one_batch()[:1])
    with learn.no_bar(), new.no_bar():
        np.testing.assert_allclose(new.predict(tmp_path/'photos'/'3'/'deep.png')[2], learn.predict(tmp_path/'photos'/'3'/'deep.png')[2], atol=1e-6)


def test_the_temperature_is_in_the_last_layer(tmp_path):
    write_digits(tmp_path/'photos', 60)
    learn = learner_of(tmp_path/'photos')
    with torch.no_grad(): learn.model[1].weight *= 20
    with learn.no_bar():
        calibrated = TemperatureScaling(learn).fit()
        new = portable(calibrated, learn.dls.valid.one_batch()[:1])
        p, q = (o.get_preds(dl=learn.dls.valid)[0] for o in (calibrated, new))
    np.testing.assert_allclose(p, q, atol=1e-5)
    assert new.temperature == calibrated.temperature and type(new.model) is nn.Sequential and isinstance(calibrated.model, ScaledModel)
    assert not torch.equal(new.model[1].weight, learn.model[1].weight), "the learner that was given is as it was"


@pytest.mark.parametrize('t', [2., [.5, 1., 4.]])
def test_folding(t):
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), torch.randn(6, 4)
    scaled = ScaledModel(model, torch.tensor(t), 'sigmoid')
    torch.testing.assert_close(folded(scaled, (x,))(x), model(x)/torch.tensor(t))
    norm = nn.BatchNorm1d(3)
    norm.running_mean += 1
    for other in (nn.Sequential(model, nn.Tanh()), nn.Sequential(nn.Linear(4, 3), norm).eval(), nn.Flatten()):
        scaled = ScaledModel(other, 2.)
        assert folded(scaled, (x,)) is scaled


def test_losses():
    assert repr(plain_loss(LabelSmoothingCrossEntropy(.1, axis=1)).axis) == '1' and isinstance(plain_loss(LabelSmoothingCrossEntropy()), CrossEntropyLossFlat)
    binary = plain_loss(LabelSmoothingBCE(.1, thresh=.3))
    assert isinstance(binary, BCEWithLogitsLossFlat) and binary.thresh == .3
    for loss in (LogitPenalty(LabelSmoothingCrossEntropy()), CrossEntropyLossFlat(), nn.CrossEntropyLoss()): assert plain_loss(loss) is loss
