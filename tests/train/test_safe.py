"Safe folders: the same predictions in a process that cannot unpickle, and every lie in them is refused"
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, RegressionBlock
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize, IntToFloatTensor, get_image_files
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage
from fastai.vision.augment import RandomResizedCrop, Resize, ResizeMethod, aug_transforms
from fastai.vision.core import PILImageBW, imagenet_stats
from fastai.vision.data import ImageBlock, ImageDataLoaders, Normalize
from fastai.vision.learner import unet_learner, vision_learner
from fasttransform import Transform
from photos import write_digits
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import squeezenet1_1
from users_files import write_masks

from fastai_smooth.calibration import TemperatureScaling
from fastai_smooth.cli import main
from fastai_smooth.data import mask_dls, small_convnet, text_dls, text_network
from fastai_smooth.losses import LabelSmoothingBCE, MultiLabelSmoothingCrossEntropy
from fastai_smooth.train import calibrate, export_safe, load_safe, recipe
from fastai_smooth.train.training import _Training

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


def with_loss(learn, loss):
    learn.loss_func = loss
    return learn


TINY = dict(arch='test_resnet', pretrained=False, size=32, presize=40, bs=8)


def folder_dls(home, **kwargs): return ImageDataLoaders.from_folder(home/'photos', valid_pct=.2, seed=1, bs=8, **kwargs)


MADE = {
    'digits': lambda h: of_recipe('digits', None),
    'finetune': lambda h: of_recipe('finetune', h/'photos', **TINY),
    'finetune of votes': lambda h: of_recipe('finetune', h/'votes.csv', votes=';', **TINY),
    'pets': lambda h: of_recipe('pets', h/'pets', **TINY),
    'a1': lambda h: of_recipe('a1', h/'photos', arch='test_resnet', size=32, test_size=40, bs=8),
    'multilabel': lambda h: with_loss(of_recipe('multilabel', None), LabelSmoothingBCE(0., thresh=.49)), # thresholds that move with the temperatures
    'multilabel of files': lambda h: of_recipe('multilabel', h/'several.csv', size=40, bs=8, arch='squeezenet1_1', pretrained=False),
    'segmentation': lambda h: of_recipe('segmentation', None),
    'segmentation of files': lambda h: of_recipe('segmentation', h/'masks', size=24, ignore=255, bs=4),
    'segmentation by a U-Net': lambda h: of_recipe('segmentation', h/'masks', size=40, ignore=255, bs=4, arch='shufflenet_v2_x0_5'),
    'vision_learner': lambda h: vision_learner(folder_dls(h, item_tfms=Resize((44, 52), ResizeMethod.Pad, pad_mode='zeros'), batch_tfms=[
        *aug_transforms(size=40), Normalize.from_stats(*imagenet_stats)]), squeezenet1_1, pretrained=False, lin_ftrs=[20, 10], ps=[.1, 0, .3], bn_final=True),
    'vision_learner of grey': lambda h: vision_learner(folder_dls(h, img_cls=PILImageBW, item_tfms=RandomResizedCrop(20)), 'test_resnet', pretrained=False,
                                                       n_in=1),
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


class Inverted(Transform):
    order = 20
    def encodes(self, x: TensorImage): return 1-x


def plain(home, **kwargs): return vision_learner(folder_dls(home, **kwargs), 'test_resnet', pretrained=False)
def own_network(home): return Learner(folder_dls(home), nn.Sequential(nn.Flatten(), nn.Linear(768, 10)))
def own_transform(home): return plain(home, batch_tfms=[Inverted()])
def own_reader(home): return Learner(DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=folder_of, item_tfms=Turned()).dataloaders(
    home/'photos', bs=8), small_convnet(3, 10))


def own_steps(home):
    "Images that a function of the user makes of files"
    files = sorted((home/'photos').rglob('*.png'))
    dsets = Datasets(files, [[negative], [folder_of, Categorize()]], splits=[list(range(50)), list(range(50, 60))])
    return Learner(dsets.dataloaders(bs=8, num_workers=0, after_batch=IntToFloatTensor()), small_convnet(3, 10))


def own_loss(home): return Learner(folder_dls(home), small_convnet(3, 10), loss_func=MultiLabelSmoothingCrossEntropy())
def torchs_loss(home): return Learner(folder_dls(home), small_convnet(3, 10), loss_func=nn.CrossEntropyLoss())
def numbers(home): return Learner(DataBlock((ImageBlock, RegressionBlock), get_items=get_image_files, get_y=number_of).dataloaders(home/'photos', bs=8),
                                  small_convnet(3, 1))
def text(home):
    dls = text_dls(['a word', 'other words']*10, [0, 1]*10, ['one', 'two'], [range(16), range(16, 20)], bs=4)
    return Learner(dls, text_network(len(dls.vocab[0]), 2))


def rows(home): return of_recipe('tabular', None)
def folder_of(path): return path.parent.name
def negative(path): return TensorImage(255-np.asarray(Image.open(path).convert('RGB')).transpose(2, 0, 1))
def number_of(path): return float(path.parent.name)


class Turned(Transform):
    order = 1
    def encodes(self, x: Image.Image): return type(x)(x.rotate(90))


def own_head(home):
    learn = plain(home)
    learn.model[1].append(nn.Tanh())
    return learn


def hooked(home):
    "The layers and weights of a listed network, but another function"
    learn = plain(home)
    learn.model[1][-1].register_forward_hook(twice)
    return learn


def twice(module, args, out): return 2*out


class Louder(Callback):
    def after_pred(self): self.learn.pred = 2*self.pred


def with_callback(home):
    learn = plain(home)
    learn.add_cb(Louder())
    return learn


def with_a_spread_of_zero(home): return plain(home, batch_tfms=[Normalize.from_stats([0., 0., 0.], [0., 1., 1.])])


def halved(home):
    learn = plain(home)
    learn.model.half()
    return learn


@pytest.mark.parametrize('make, words', [
    (own_network, 'this Sequential is none that torchvision or timm lists'), (own_transform, 'go through Inverted, too'), (own_head, 'layers, and not'),
    (own_reader, 'go through Turned, too'), (own_steps, 'inputs of this learner come from negative'),
    (own_loss, 'not those of MultiLabelSmoothingCrossEntropy'), (torchs_loss, r'not those of CrossEntropyLoss\(\)'),
    (text, 'inputs of this learner come from .*CachedTokenizer'), (numbers, 'the targets of this learner are'),
    (rows, "data from fastai's blocks with one image"), (hooked, 'gives other probabilities'),
    (with_a_spread_of_zero, r'cannot hold this learner: The record.reading.batch\[1\].args.std\[0\] must be a number'),
    (with_callback, 'Louder takes part in predictions'), (halved, 'torch.float16')])
def test_what_cannot_be_written_is_refused_in_words(make, words, home, tmp_path):
    with pytest.raises(ValueError, match=words) as e: export_safe(make(home), tmp_path/'safe')
    assert 'learn.export' in str(e.value) and not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def bundle(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp('bundle')
    learn = plain(home, item_tfms=Resize(20))
    export_safe(learn, folder/'safe')
    with pytest.raises(ValueError, match='is there already: name another folder'): export_safe(learn, folder/'safe')
    return folder/'safe'


@pytest.fixture
def changed(bundle, tmp_path):
    "A copy of the folder, and a function that changes its record"
    shutil.copytree(bundle, tmp_path/'safe')
    def change(place, value):
        record = json.loads((tmp_path/'safe'/'config.json').read_text())
        at = record
        *way, last = place.split('.')
        for k in way: at = at[int(k) if k.isdigit() else k]
        if value is KeyError: del at[last]
        else: at[int(last) if last.isdigit() else last] = value
        (tmp_path/'safe'/'config.json').write_text(json.dumps(record))
        return tmp_path/'safe'
    return change


@pytest.mark.parametrize('place, value, words', [
    ('format', 'other', "its format is 'other', and not 'fastai_smooth learner'"), ('version', 2, 'has version 2, and this package reads version 1'),
    ('version', True, 'has version True'), ('versions.torch', KeyError, 'versions.torch must be there, but is .missing'),
    ('weights', '../x', "nothing else, but is 'weights'"),
    ('network.arch', 'os.system', "network.arch must be the name of an image network that timm lists here, but is 'os.system'"),
    ('network.arch', 'hf-hub:timm/resnet18', 'network.arch must be'), ('network.arch', 'local-dir:/tmp', 'network.arch must be'),
    ('network.arch', '../resnet18', 'network.arch must be'), ('network.arch', 'test_resnet.evil', 'network.arch must be'),
    ('network.arch', ['resnet18'], 'network.arch must be a text'),
    ('network.arch', 'resnet18', 'The tensor .* of .* is'), ('network.package', 'os', "one of 'timm', 'torchvision', 'fastai_smooth', but is 'os'"),
    ('network.package', 'fastai_smooth', 'network.arch must be'), ('network.form', 'unet', 'network.form must be a form that networks of timm have'),
    ('network.form', '__class__', 'network.form must be one of'), ('network.options.custom_head', 'x', "but is 'custom_head'"),
    ('network.options.lin_ftrs', [10**9], r'lin_ftrs\[0\] must be a whole number from 1 to 65536'),
    ('network.options.lin_ftrs', [60000], 'no tensor with such a side'),
    ('network.n_classes', 11, 'names 10 classes, but its network tells 11 apart'), ('network.n_classes', 2.5, 'a whole number'),
    ('network.n_channels', 4, 'n_channels must be one of 1, 3'), ('reading.vocab', [], 'vocab must be a list of 1 to 1000000'),
    ('reading.vocab.3', {'a': 1}, r'vocab\[3\] must be'), ('reading.vocab.3', '0', 'names 9 classes, but its network'),
    ('reading.mode', 'L', 'reads images of mode L, but its network has 3 channels'),
    ('temperature', [1., 2.], 'has 2 temperatures or thresholds for 10 classes'),
    ('reading.batch', [dict(name='Normalize', args=dict(mean=[0., 0.], std=[1., 1.]))], 'normalises by 2 means'),
    ('network', dict(package='timm', arch='vgg11', form='whole', n_channels=3, n_classes=10, options=dict(drop_path_rate=.5)), "'vgg11' cannot be built"),
    ('reading.item.0.name', 'eval', "name must be one of 'Resize'"),
    ('reading.item.0.args.size', [10**7, 4], r'size\[0\] must be a whole number from 1 to 4096'),
    ('reading.item.0.args.method', 'exec', "method must be one of 'squish', 'crop', 'pad'"), ('reading.batch.0.args.div', 0, 'div must be a number from 1'),
    ('reading.bs', 0, 'bs must be a whole number'), ('reading.bs', 10**9, 'bs must be a whole number'), ('reading.task', 'exec', 'task must be one of'),
    ('loss.activation', 'relu', "activation must be one of 'softmax'"), ('loss.axis', 'a', 'axis must be a whole number'),
    ('loss', None, 'loss must be a record'),
    ('scales', [dict(temperature=0, form='softmax', axis=-1)], 'temperature must be a number from 1e-06'),
    ('scales', [dict(temperature=1., form='eval', axis=-1)], 'form must be one of'), ('temperature', 'hot', 'temperature must be a number')])
def test_a_record_that_lies_is_refused(place, value, words, changed):
    with pytest.raises(ValueError, match=words): load_safe(changed(place, value))


@pytest.mark.parametrize('change, words', [
    (lambda t, k: t.pop(k), 'missing'), (lambda t, k: t.update(more=torch.zeros(1)), "'more' of .* but the network .* has none of this name"),
    (lambda t, k: t.update({k: t[k][:-1].clone()}), "is .* but the network 'test_resnet' has"), (lambda t, k: t.update({k: t[k].half()}), 'torch.float16')])
def test_other_tensors_are_refused(change, words, bundle, changed, tmp_path):
    folder = changed('version', 1)
    tensors = load_file(bundle/'model.safetensors')
    change(tensors, next(k for k, v in tensors.items() if v.ndim))
    save_file(tensors, folder/'model.safetensors')
    with pytest.raises(ValueError, match=words): load_safe(folder)


def test_other_files_are_refused(bundle, tmp_path):
    with pytest.raises(ValueError, match='is no folder'): load_safe(bundle/'config.json')
    folder = tmp_path/'f'
    folder.mkdir()
    with pytest.raises(ValueError, match='has no file config.json'): load_safe(folder)
    for damaged, words in (('{', 'is no JSON'), ('[]', 'its format is'), ('{"format": NaN}', 'NaN is no number'), ('{"format": 1, "format": 2}', 'twice')):
        (folder/'config.json').write_text(damaged)
        with pytest.raises(ValueError, match=words): load_safe(folder)
    shutil.copy(bundle/'config.json', folder)
    with pytest.raises(ValueError, match='has no file model.safetensors'): load_safe(folder)
    torch.save(nn.Linear(1, 1), folder/'model.safetensors')
    with pytest.raises(ValueError, match='Cannot read weights from'): load_safe(folder)
    (folder/'model.safetensors').unlink()
    (folder/'model.safetensors').symlink_to(bundle/'model.safetensors')
    with pytest.raises(ValueError, match='is a link out of its folder, to .*model.safetensors'): load_safe(folder)
    hub = tmp_path/'models--me--digits'
    shutil.copytree(bundle, hub/'blobs')
    (hub/'snapshots'/'abc').mkdir(parents=True)
    for name in ('config.json', 'model.safetensors'): (hub/'snapshots'/'abc'/name).symlink_to(hub/'blobs'/name)
    assert len(load_safe(hub/'snapshots'/'abc').dls.vocab) == 10, "as huggingface_hub keeps what it has fetched"


def test_a_network_far_larger_than_its_weights_is_not_built(changed, monkeypatch):
    from fastai_smooth.train import safe
    monkeypatch.setattr(safe, 'CUT_OFF', 10**6)
    folder = changed('network.arch', 'vit_large_patch16_224')
    with pytest.raises(ValueError, match='The network has more than .* numbers, which do not belong to these weights'): load_safe(folder)


def test_a_loaded_learner_is_a_learner(bundle, home, tmp_path):
    "It predicts from what people have, is calibrated, exported again, and its random state is the user's"
    state = torch.get_rng_state()
    learn = load_safe(bundle)
    assert torch.equal(state, torch.get_rng_state())
    photo = next((home/'photos'/'3').glob('*.png'))
    with learn.no_bar():
        array = np.asarray(Image.open(photo).convert('RGB'))
        kinds = photo, str(photo), photo.read_bytes(), array, torch.tensor(array).permute(2, 0, 1), Image.open(photo)
        first, *others = [learn.predict(kind)[2] for kind in kinds]
        assert all(torch.equal(first, p) for p in others)
        learn.model[1][-1].weight.data *= 3
        export_safe(learn, tmp_path/'again')
        assert torch.equal(load_safe(tmp_path/'again').predict(photo)[2], learn.predict(photo)[2]) and not torch.equal(learn.predict(photo)[2], first)


def test_calibrate_reads_a_safe_folder_and_writes_one(home, tmp_path, capsys):
    "With the figures and the predictions that it has for a pickle of the same learner"
    learn = plain(home, item_tfms=Resize(20))
    learn.path = tmp_path
    learn.export('learner.pkl')
    export_safe(learn, tmp_path/'safe')
    one, other = (calibrate(tmp_path/name, home/'photos', tmp_path/out) for name, out in (('learner.pkl', 'calibrated.pkl'), ('safe', 'calibrated')))
    assert one == other
    new, pickled = load_safe(tmp_path/'calibrated'), load_learner(tmp_path/'calibrated.pkl')
    files = sorted((home/'photos').rglob('*.png'))
    with new.no_bar(), pickled.no_bar(): p, q = (v.get_preds(dl=v.dls.test_dl(files))[0] for v in (new, pickled))
    assert torch.equal(p, q) and new.temperature == pickled.temperature == one['temperature']
    args = ['calibrate', str(tmp_path/'calibrated'), str(home/'photos'), '--out']
    assert main([*args, str(tmp_path/'safe')]) == 2 and 'is there already' in capsys.readouterr().err
    assert main([*args, str(tmp_path/'twice')]) == 0 and f"Learner: {tmp_path/'twice'}" in capsys.readouterr().out
    assert load_safe(tmp_path/'twice').temperature == pytest.approx(1., abs=.3), "the temperature of a calibrated learner"


def test_a_training_says_why_there_is_no_safe_folder(home, tmp_path):
    run, xb = SimpleNamespace(out=tmp_path), folder_dls(home).one_batch()[:1]
    note, = _Training.safe(run, own_network(home), xb)
    assert note.startswith('There is no folder safe beside learner.pkl: A safe file names the network') and not list(tmp_path.iterdir())
    assert _Training.safe(run, plain(home), xb) == [] and (tmp_path/'safe'/'config.json').exists()
    assert _Training.safe(run, None, (torch.zeros(2, 3, dtype=torch.long),)) == [] and not (tmp_path/'safe').exists(), "of texts nothing is said"
