"Safe folders: the same predictions in a process that cannot unpickle, and every lie in them is refused"
import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import get_image_files
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.vision.augment import RandomResizedCrop, Resize, ResizeMethod, aug_transforms
from fastai.vision.core import PILImageBW, imagenet_stats
from fastai.vision.data import ImageBlock, ImageDataLoaders, Normalize
from fastai.vision.learner import unet_learner, vision_learner
from fasttransform import Transform
from photos import write_digits
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import resnet18, squeezenet1_1
from users_files import write_masks

from fastai_smooth.calibration import TemperatureScaling
from fastai_smooth.data import build_unet, mask_dls, small_convnet
from fastai_smooth.losses import LabelSmoothingBCE, LabelSmoothingCrossEntropy, MultiLabelSmoothingCrossEntropy
from fastai_smooth.train import export_safe, load_safe, recipe

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')
# a process in which nothing is unpickled, by whatever name it is called, and nothing is fetched: what each folder predicts
POISONED = '''
import json, pickle, sys
from pathlib import Path
armed = False
def never(event, args):
    if armed and event in ('pickle.find_class', 'socket.connect', 'socket.getaddrinfo', 'subprocess.Popen', 'os.system'): raise RuntimeError('poison: '+event)
sys.addaudithook(never)
def poison(*args, **kwargs): raise RuntimeError('poison')
import numpy as np, torch
from fastai_smooth.train import load_safe
armed = True
pickle.load = pickle.loads = pickle._load = pickle._loads = pickle.Unpickler = pickle._Unpickler = poison
torch.load = torch.serialization.load = torch.serialization._load = np.load = poison
torch.set_num_threads(1)
before = set(sys.modules)
for folder, files in json.loads(Path(sys.argv[1]).read_text()).items():
    learn = load_safe(Path(folder)/'safe')
    with learn.no_bar():
        p, _, decided = learn.get_preds(dl=learn.dls.test_dl(list(map(Path, files))), with_decoded=True)
        name = str(learn.predict(files[0])[0])
    np.save(folder+'/p.npy', p.numpy()), np.save(folder+'/decided.npy', decided.numpy())
    Path(folder, 'said.json').write_text(json.dumps([name[:200], [str(v) for v in learn.dls.vocab]]))
print(sorted({m.partition('.')[0] for m in set(sys.modules)-before}))
'''


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Images in classes, a CSV with several labels and one with votes, and masks"
    root = tmp_path_factory.mktemp('safe')
    write_digits(root/'photos', 60)
    files = sorted((root/'photos').rglob('*.png'))
    (root/'several.csv').write_text('\n'.join(['file,label', *(f'{f},{f.parent.name} {int(f.parent.name) % 2}' for f in files)]))
    (root/'votes.csv').write_text('\n'.join(['file,label', *(f'{f},{f.parent.name};{int(f.parent.name) % 2}' for f in files)]))
    write_masks(root/'masks', 12)
    (root/'pets').mkdir()
    for f in files: Image.open(f).resize((30, 22)).save(root/'pets'/f'{("cat", "dog")[int(f.parent.name) % 2]}_{f.stem}.png')
    return root


def of_recipe(name, data, **changes):
    made = recipe(name)
    return made.learner(made.dls(data, **changes), **changes)


def images_of(learn, folder):
    "The validation set as files: those that it has, or what it has in memory"
    items = learn.dls.valid_ds.items
    first = [item[0] if isinstance(item, list) else item for item in items]
    if hasattr(first[0], 'suffix'): return [str(f) for f in first]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(items)): Image.fromarray(np.asarray(learn.dls.valid_ds.tls[0][i])[0]).save(folder/f'{i:03}.png')
    return [str(f) for f in sorted(folder.iterdir())]


TINY = dict(arch='test_resnet', pretrained=False, size=32, presize=40, bs=8)
BODY = dict(block=dict(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=lambda p: p.parent.name))


def folder_dls(home, **kwargs): return ImageDataLoaders.from_folder(home/'photos', valid_pct=.2, seed=1, bs=8, **kwargs)


MADE = {
    'digits': lambda h: of_recipe('digits', None),
    'finetune': lambda h: of_recipe('finetune', h/'photos', **TINY),
    'finetune of votes': lambda h: of_recipe('finetune', h/'votes.csv', votes=';', **TINY),
    'finetune of several': lambda h: of_recipe('finetune', h/'several.csv', delimiter=' ', **TINY),
    'pets': lambda h: of_recipe('pets', h/'pets', **TINY),
    'a1': lambda h: of_recipe('a1', h/'photos', arch='test_resnet', size=32, test_size=40, bs=8),
    'multilabel': lambda h: of_recipe('multilabel', None),
    'multilabel of files': lambda h: of_recipe('multilabel', h/'several.csv', size=40, bs=8, arch='squeezenet1_1', pretrained=False),
    'segmentation': lambda h: of_recipe('segmentation', None),
    'segmentation of files': lambda h: of_recipe('segmentation', h/'masks', size=24, ignore=255, bs=4),
    'segmentation by a U-Net': lambda h: of_recipe('segmentation', h/'masks', size=40, ignore=255, bs=4, arch='squeezenet1_1'),
    'vision_learner': lambda h: vision_learner(folder_dls(h, item_tfms=Resize((44, 52), ResizeMethod.Pad, pad_mode='zeros'), batch_tfms=[
        *aug_transforms(size=40), Normalize.from_stats(*imagenet_stats)]), squeezenet1_1, pretrained=False, lin_ftrs=[20, 10], ps=[.1, 0, .3], bn_final=True),
    'vision_learner of grey': lambda h: vision_learner(folder_dls(h, img_cls=PILImageBW, item_tfms=RandomResizedCrop(20)), 'test_resnet', pretrained=False, n_in=1),
    'unet_learner': lambda h: unet_learner(mask_dls(h/'masks', dict(size=40, ignore=255, valid_pct=.2, seed=1, bs=4)), squeezenet1_1, pretrained=False,
                                           self_attention=True, loss_func=CrossEntropyLossFlat(axis=1)),
}
CALIBRATED = 'digits', 'multilabel', 'vision_learner', 'segmentation of files'


@pytest.mark.slow
@pytest.mark.processes
def test_the_same_bits_in_a_process_that_cannot_unpickle(home, tmp_path):
    jobs, said = {}, {}
    for name, make in MADE.items():
        learn, folder = make(home), tmp_path/name.replace(' ', '_')
        with learn.no_bar():
            if name in CALIBRATED: learn = TemperatureScaling(learn).fit()
            p, _, decided = learn.get_preds(with_decoded=True)
        files = images_of(learn, folder/'images')
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        export_safe(learn, folder/'safe')
        assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items()), "the learner stays as it is"
        assert sorted(f.name for f in (folder/'safe').iterdir()) == ['config.json', 'model.safetensors']
        jobs[str(folder)], said[str(folder)] = files, (p.numpy(), decided.numpy(), learn)
    (tmp_path/'jobs.json').write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', POISONED, str(tmp_path/'jobs.json')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, (p, decided, learn) in said.items():
        theirs = np.load(folder+'/p.npy')
        assert theirs.dtype == p.dtype and np.array_equal(theirs, p) and np.array_equal(np.load(folder+'/decided.npy'), decided), folder
        name, vocab = json.loads((tmp_path/folder/'said.json').read_text())
        assert vocab == [str(v) for v in getattr(learn.dls, 'vocab', vocab)]
        loaded = load_safe(folder+'/safe')
        assert torch.equal(torch.as_tensor(getattr(loaded, 'temperature', 1.)), torch.as_tensor(getattr(learn, 'temperature', 1.)))
