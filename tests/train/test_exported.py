"Learners from files, however they were made, and held-out data for them"
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.schedule import fit_one_cycle  # noqa: F401
from fastai.data.block import DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import get_image_files
from fastai.learner import Learner, load_learner
from fastai.losses import MSELossFlat
from fastai.tabular.core import Categorify, FillMissing
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from fastai.vision.data import ImageBlock, ImageDataLoaders
from photos import write_digits, write_table
from PIL import Image
from sklearn.metrics import log_loss

from fastai_smooth.data import read_source, small_convnet
from fastai_smooth.train import calibrate
from fastai_smooth.train.exported import held_out_dl, read_learner

pytestmark = pytest.mark.filterwarnings('ignore:The temperature')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Images to train on, and others that are held out as a folder and as a table"
    root = tmp_path_factory.mktemp('photos')
    write_digits(root/'train', 300)
    write_digits(root/'more', 200, first=300)
    write_table(root/'more.csv', root/'more')
    return root


def from_folder(root): return ImageDataLoaders.from_folder(root/'train', valid_pct=.2, bs=32, seed=1)
def from_path_func(root): return ImageDataLoaders.from_path_func(root, get_image_files(root/'train'), label_of, bs=32, seed=1)
def label_of(path): return path.parent.name


def from_df(root):
    files = sorted((root/'train').rglob('*.png'))
    frame = pd.DataFrame(dict(name=[f.relative_to(root).as_posix() for f in files], label=[f.parent.name for f in files]))
    return ImageDataLoaders.from_df(frame, root, bs=32, seed=1)


def exported(dls, file, model=None, epochs=2, **kwargs):
    learn = Learner(dls, model or small_convnet(3, 10), path=file.parent, **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2)
    learn.export(file.name)
    return learn


@pytest.mark.slow
@pytest.mark.parametrize('make, data', [(from_folder, 'more.csv'), (from_df, 'more'), (from_path_func, 'more.csv')])
def test_fastais_own_learners_are_calibrated(make, data, photos, tmp_path):
    learn = exported(make(photos), tmp_path/'l.pkl')
    found = calibrate(tmp_path/'l.pkl', photos/data, tmp_path/'c.pkl')
    # by hand: image by image through the model, the label from the name of its folder
    files = sorted((photos/'more').rglob('*.png'))
    x = torch.stack([torch.tensor(np.asarray(Image.open(f).convert('RGB'))).permute(2, 0, 1)/255 for f in files])
    with torch.no_grad(): z = learn.model.eval()(x).double()
    y = torch.tensor([int(f.parent.name) for f in files])
    assert found['as_trained']['nll'] == pytest.approx(log_loss(y, z.softmax(1)), rel=1e-4)
    assert found['as_trained']['accuracy'] == pytest.approx((z.argmax(1) == y).double().mean().item())
    calibrated = load_learner(tmp_path/'c.pkl')
    with calibrated.no_bar(): p = calibrated.predict(files[0])[2]
    np.testing.assert_allclose(p, (z[0]/found['temperature']).softmax(0), atol=1e-4)
    assert log_loss(y, (z/found['temperature']).softmax(1)) <= found['as_trained']['nll']


def test_a_table_of_numbers_and_words(tmp_path):
    rng = np.random.default_rng(0)
    taste = rng.integers(0, 2, 300)
    colour, label = np.where(rng.random(300) < .5, 'red', 'green'), np.array(['sour', 'sweet'])[taste]
    frame = pd.DataFrame(dict(size=taste+rng.normal(0, .5, 300), colour=colour, label=label))
    dls = TabularDataLoaders.from_df(frame[:200], procs=[Categorify, FillMissing], cat_names=['colour'], cont_names=['size'], y_names='label', bs=32)
    learn = tabular_learner(dls, layers=[10], path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
    learn.export('l.pkl')
    frame[200:].to_csv(tmp_path/'more.csv', index=False)
    found = calibrate(tmp_path/'l.pkl', tmp_path/'more.csv', tmp_path/'c.pkl')
    with learn.no_bar(): p, _ = learn.get_preds(dl=learn.dls.test_dl(frame[200:]))
    assert found['as_trained']['nll'] == pytest.approx(log_loss(taste[200:], p.double()), rel=1e-4)
    frame[200:].drop(columns='size').to_csv(tmp_path/'less.csv', index=False)
    with pytest.raises(ValueError, match="no column 'size', which the learner reads"): calibrate(tmp_path/'l.pkl', tmp_path/'less.csv', tmp_path/'x.pkl')


@pytest.fixture(scope='module')
def learner_file(photos, tmp_path_factory):
    file = tmp_path_factory.mktemp('l')/'l.pkl'
    exported(from_folder(photos), file, epochs=0)
    return file


@pytest.mark.parametrize('learner, data, out, words', [
    ('none.pkl', 'more', 'x.pkl', 'Cannot load a learner from'), ('text.pkl', 'more', 'x.pkl', 'Cannot load a learner from'),
    ('tensor.pkl', 'more', 'x.pkl', 'Cannot load a learner from'), (None, 'none', 'x.pkl', 'none'),
    (None, 'more', 'text.pkl', 'is there already: name another file'), (None, 'more', 'no/x.pkl', 'There is no folder'),
    (None, 'other', 'x.pkl', "class 'cat', which the learner does not know: it knows 0, 1"),
    (None, 'table.csv', 'x.pkl', 'The learner reads images, but .*table.csv holds table'),
    (None, 'texts.csv', 'x.pkl', 'The learner reads images, but .*texts.csv holds texts')])
def test_mistakes_are_named_and_write_nothing(learner, data, out, words, learner_file, photos, tmp_path):
    (tmp_path/'text.pkl').write_text('no learner')
    torch.save(torch.nn.Linear(1, 1), tmp_path/'tensor.pkl')
    for name in ('cat', 'dog'):
        (tmp_path/'other'/name).mkdir(parents=True)
        Image.new('L', (8, 8)).save(tmp_path/'other'/name/'x.png')
    (tmp_path/'table.csv').write_text('size,label\n'+'\n'.join(f'{i % 7}.5,{i % 2}' for i in range(30)))
    (tmp_path/'texts.csv').write_text('text,label\n'+'\n'.join(f'a text,{i % 2}' for i in range(30)))
    data = photos/data if data == 'more' else tmp_path/data
    with pytest.raises(ValueError, match=words): calibrate(learner_file if learner is None else tmp_path/learner, data, tmp_path/out)
    assert not (tmp_path/'x.pkl').exists() and (tmp_path/'text.pkl').read_text() == 'no learner'


def test_an_error_in_the_model_is_not_the_users_file(photos, tmp_path):
    "A TypeError of the network comes through as it is"
    exported(from_folder(photos), tmp_path/'l.pkl', epochs=0)
    learn = read_learner(tmp_path/'l.pkl')
    learn.model = Broken()
    learn.export(tmp_path/'broken.pkl')
    with pytest.raises(TypeError, match='of the network'): calibrate(tmp_path/'broken.pkl', photos/'more', tmp_path/'x.pkl')


class Broken(torch.nn.Linear):
    def __init__(self): super().__init__(1, 1)
    def forward(self, x): raise TypeError('a mistake of the network')


def test_several_labels_and_one(photos, tmp_path):
    "A multi-label learner takes a folder, too: each image has the one label of its folder"
    block = DataBlock((ImageBlock, MultiCategoryBlock), get_items=get_image_files, get_y=labels_of)
    learn = exported(block.dataloaders(photos/'train', bs=32), tmp_path/'l.pkl', epochs=0)
    _, y = held_out_dl(learn, read_source(photos/'more', load=False, progress=False)).one_batch()
    assert y.shape == (32, 10) and (y.sum(1) == 1).all()
    rows = [f'{f},{f.parent.name} 1' for f in sorted((photos/'more').rglob('*.png'))]
    (photos/'several.csv').write_text('\n'.join(['file,label', *rows]))
    source = read_source(photos/'several.csv', delimiter=' ', load=False, progress=False)
    _, y = held_out_dl(learn, source).one_batch()
    assert (y[:, 1] == 1).all() and y.sum(1).max() == 2
    with pytest.raises(ValueError, match='leave the delimiter out'): held_out_dl(exported(from_folder(photos), tmp_path/'one.pkl', epochs=0), source)


def labels_of(path): return [path.parent.name]


def test_a_learner_without_classes(photos, tmp_path):
    block = DataBlock((ImageBlock, RegressionBlock), get_items=get_image_files, get_y=number_of)
    learn = exported(block.dataloaders(photos/'train', bs=32), tmp_path/'l.pkl', small_convnet(3, 1), 0, loss_func=MSELossFlat())
    with pytest.raises(ValueError, match='one set of classes'): held_out_dl(learn, read_source(photos/'more', load=False, progress=False))


def number_of(path): return float(path.parent.name)
