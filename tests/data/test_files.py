"One reader: what it says of the data, at which size it reads them, and which options it refuses"
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from users_files import write_digits, write_masks, write_texts

from fastai_smooth.data import SOURCES, digits_arrays, network_for, read_source, NETWORKS

EMBEDDED = [s for s in SOURCES if s not in ('pets', 'mnist5k')]


@pytest.mark.parametrize('name', EMBEDDED)
def test_embedded_data_fit_their_network(name):
    "Batches, the sample without content and the network belong together"
    data = read_source(name)
    train, valid = data.splits(.2, 0)
    assert not set(train) & set(valid) and len(train)+len(valid) == len(data)
    *x, y = data.dls(data.labels, (train[:32], valid), 8).one_batch()
    sample = data.sample()
    assert [t.ndim for t in x] == [t.ndim for t in sample]
    model = network_for(data.kind, NETWORKS[data.kind], data.n_channels, len(data.vocab), size=(24, 24)).eval()
    with torch.no_grad():
        for inputs in (x, sample): assert model(*inputs).shape[:2] == (len(inputs[0]), len(data.vocab))
    assert data.fingerprint() == read_source(name).fingerprint() and data.describe((train, valid)).startswith(f'{name}: {len(data)} {data.unit}, ')


def test_a_fingerprint_tells_data_apart(tmp_path):
    write_digits(tmp_path, 40)
    data, again = (read_source(tmp_path, progress=False) for _ in range(2))
    assert data.fingerprint() == again.fingerprint() and len(data.fingerprint()) == 16
    next(tmp_path.rglob('*.png')).unlink()
    assert data.fingerprint() != read_source(tmp_path, progress=False).fingerprint()
    table = read_source('wine')
    table.table.iloc[3, 2] += 1
    assert table.fingerprint() != read_source('wine').fingerprint()


@pytest.mark.parametrize('side, expected', [(28, 28), (5, 8), (300, 128)])
def test_images_are_not_blown_up(side, expected, tmp_path):
    for k in 'ab':
        (tmp_path/k).mkdir()
        for i in range(3): Image.new('L', (side+i, side)).save(tmp_path/k/f'{i}.png')
    assert read_source(tmp_path, progress=False).images.shape == (6, 3, expected, expected)
    assert read_source(tmp_path, size=16, progress=False).images.shape[-1] == 16
    assert read_source(tmp_path, load=False, progress=False).images is None


@pytest.mark.parametrize('options, words', [(dict(delimiter=','), '--delimiter is for a CSV'), (dict(target='x'), '--target is for a CSV'),
                                            (dict(ignore=255), '--ignore is for masks, but digits holds images')])
def test_options_that_would_be_ignored_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words): read_source('digits', **options)
    with pytest.raises(ValueError, match='use one of digits, .*, a folder'): read_source('cifar')
    write_texts(tmp_path/'t.csv', n=20)
    if 'ignore' in options:
        with pytest.raises(ValueError, match='holds texts'): read_source(tmp_path/'t.csv', **options)


def test_what_was_understood(tmp_path):
    write_digits(tmp_path/'photos', 80, split=True)
    data = read_source(tmp_path/'photos', progress=False)
    assert data.describe(data.split).splitlines()[:3] == [
        f'{tmp_path}/photos: 80 images, 10 classes: round/0, round/3, round/6, round/8, round/9, straight/1, ...',
                                                      'read at 16 by 16 pixels', '60 for training, 20 for validation (as the data say)']
    rows = [(f'photos/{f.relative_to(tmp_path/"photos")}', 'a;b' if i % 2 else 'b') for i, f in enumerate(data.files)]
    pd.DataFrame(rows, columns=['file', 'tags']).to_csv(tmp_path/'t.csv')
    lines = read_source(tmp_path/'t.csv', delimiter=';', progress=False).describe().splitlines()
    assert lines == [f'{tmp_path}/t.csv: 80 images, 2 classes, several per example: a, b', "labels: the column 'tags'",
                     'the column without a name (Unnamed: 0) is left out', 'read at 16 by 16 pixels']


def test_rare_classes_are_named(tmp_path):
    "One image: it is trained on. Too few for two in the validation set: said, and no error"
    images, _, _ = digits_arrays()
    for k, n in dict(many=30, few=4, one=1).items():
        (tmp_path/k).mkdir()
        for i in range(n): Image.fromarray(images[i]).save(tmp_path/k/f'{i}.png')
    data = read_source(tmp_path, progress=False)
    train, valid = data.splits(.2, 3)
    for more, said in ([], 'examples: '), ([data.splits(.2, 4)], 'in some split: '):
        line = data.describe((train, valid), *more).splitlines()[-1]
        assert line.startswith("Warning: 2 of 3 classes have fewer than two") and f"{said}'few' (1 of 4), 'one' (0 of 1)" in line and '10 to 20' in line
    assert data.vocab.index('one') in data.labels[train] and len(train)+len(valid) == 35
    digits = read_source('digits')
    assert 'Warning' not in digits.describe(digits.splits())


def test_data_that_cannot_be_split(tmp_path):
    for k in 'ab':
        (tmp_path/k).mkdir()
        Image.new('L', (9, 9)).save(tmp_path/k/'x.png')
    with pytest.raises(ValueError, match=r'does not split the 2 images of .*one example'): read_source(tmp_path, progress=False).splits()


def test_masks_in_memory_and_resized(tmp_path):
    _, masks = write_masks(tmp_path, 10)
    data = read_source(tmp_path, ignore=255, progress=False)
    assert data.images.shape == (10, 3, 24, 24) and data.sample(12)[0].shape == (2, 3, 12, 12)
    x, y = data.dls(data.labels, data.splits(.2, 0), 4, 12).one_batch()
    assert x.shape == (4, 3, 12, 12) and y.shape == (4, 12, 12) and set(y.unique().tolist()) <= set(np.unique(masks))
