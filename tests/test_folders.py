"Folders of images as data: what is read, how it is split, and mistakes that are named"
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastai_smooth.cli import main
from fastai_smooth.data import digits_arrays
from fastai_smooth.sources import folder_data
from fastai_smooth.recipes import Comparison


def write_digits(root, n=200, split=False, nested=True):
    "Real digits as PNG files: round/0, straight/1, ..."
    images, labels, _ = digits_arrays()
    for i in range(n):
        kind = 'round' if labels[i] in (0, 3, 6, 8, 9) else 'straight'
        folder = root/(('valid' if i % 4 == 0 else 'train') if split else '')/(f'{kind}/{labels[i]}' if nested else f'{labels[i]}')
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).resize((16, 16)).save(folder/f'{i}.png')
    return labels[:n]


def test_what_is_read(tmp_path):
    labels = write_digits(tmp_path, 60)
    (tmp_path/'notes.txt').write_text('no image')
    (tmp_path/'.cache').mkdir()
    Image.new('RGB', (4, 4)).save(tmp_path/'.cache'/'hidden.png')
    data = folder_data(tmp_path, 16, progress=False)
    assert data.images.shape == (60, 3, 16, 16) and data.images.dtype == np.uint8 and data.n_channels == 3
    assert data.vocab == sorted({f'{"round" if d in (0, 3, 6, 8, 9) else "straight"}/{d}' for d in labels})
    for file, image, label in zip(data.files, data.images, data.labels):
        assert data.vocab[label] == file.parent.relative_to(tmp_path).as_posix()
        assert np.array_equal(image, np.stack([np.asarray(Image.open(file))]*3))
    assert data.fingerprint() == folder_data(tmp_path, 16, progress=False).fingerprint()
    data.files[3].unlink()
    assert data.fingerprint() != folder_data(tmp_path, 16, progress=False).fingerprint()


def test_shapes_modes_and_turned_pictures(tmp_path):
    for name, mode, size in (('a', 'RGB', (30, 20)), ('b', 'L', (20, 30)), ('c', 'RGBA', (8, 8)), ('d', 'P', (9, 9)), ('e', 'CMYK', (10, 10))):
        (tmp_path/name).mkdir()
        Image.new(mode, size).save(tmp_path/name/('x.jpg' if mode == 'CMYK' else 'x.png'))
    turned = Image.new('RGB', (20, 20))
    turned.paste((255, 255, 255), (0, 0, 20, 10))  # white above, told to be turned by 180 degrees
    exif = turned.getexif()
    exif[0x0112] = 3
    turned.save(tmp_path/'a'/'y.png', exif=exif)
    data = folder_data(tmp_path, 10, progress=False)
    assert data.images.shape == (6, 3, 10, 10)
    upright = data.images[data.files.index(tmp_path/'a'/'y.png')]
    assert upright[:, :4].max() == 0 and upright[:, 6:].min() == 255


def test_split_that_the_folders_say(tmp_path):
    write_digits(tmp_path, 80, split=True, nested=False)
    data = folder_data(tmp_path, 16, progress=False)
    train, valid = data.splits(.5, 3)
    assert len(train) == 60 and len(valid) == 20 and data.vocab == [str(i) for i in range(10)]
    assert all(data.files[i].relative_to(tmp_path).parts[0] == 'train' for i in train)
    (tmp_path/'valid'/'new').mkdir()
    Image.new('L', (9, 9)).save(tmp_path/'valid'/'new'/'x.png')
    with pytest.raises(ValueError, match="no training images of the class 'new'"): folder_data(tmp_path, 16, progress=False)


def test_mistakes_name_the_file(tmp_path):
    with pytest.raises(ValueError, match='is not a folder'): folder_data(tmp_path/'none')
    with pytest.raises(ValueError, match='holds no images'): folder_data(tmp_path)
    (tmp_path/'a').mkdir()
    Image.new('L', (9, 9)).save(tmp_path/'a'/'x.png')
    with pytest.raises(ValueError, match="one class, 'a'"): folder_data(tmp_path)
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/'bad.png').write_bytes((tmp_path/'a'/'x.png').read_bytes()[:40])
    with pytest.raises(ValueError, match='bad.png'): folder_data(tmp_path, progress=False)
    (tmp_path/'b'/'bad.png').unlink()
    Image.new('L', (9, 9)).save(tmp_path/'x.png')
    with pytest.raises(ValueError, match='x.png is in no class'): folder_data(tmp_path)


def test_compare_with_nested_folders_as_tree(tmp_path, capsys):
    write_digits(tmp_path/'photos', 400)
    out = tmp_path/'run'
    args = ['compare', str(tmp_path/'photos'), '--size', '16', '--methods', 'ce,taxonomy,mixup+similarity', '--epochs', '1', '--seeds', '2', '--out', str(out)]
    assert main(args) == 0
    s = json.loads((out/'summary.json').read_text())
    assert s['n_classes'] == 10 and s['n_train'] == 320 and set(s['methods']) == {'ce', 'taxonomy', 'mixup+similarity'}
    learn = Comparison(tmp_path/'photos', ('taxonomy',), size=16).learner('taxonomy', 0)
    m = learn.label_smoothing.dist.matrix(10)
    near, far = list(learn.dls.vocab).index('round/3'), list(learn.dls.vocab).index('straight/1')
    assert m[0, near] > m[0, far] and learn.dls.vocab[0] == 'round/0'
    assert learn.dls.one_batch()[0].shape[1:] == (3, 16, 16)
    assert main([*args, '--resume']) == 0, "nothing has changed"
    next((tmp_path/'photos'/'round'/'0').iterdir()).unlink()
    capsys.readouterr()
    assert main([*args, '--resume']) == 2 and 'fingerprint' in capsys.readouterr().err


def test_flat_folders_are_no_tree(tmp_path, capsys):
    write_digits(tmp_path, 200, nested=False)
    assert main(['compare', str(tmp_path), '--size', '16', '--methods', 'ce,taxonomy', '--out', str(tmp_path/'run')]) == 2
    assert 'nested folders' in capsys.readouterr().err
    for i in range(1, 10): (tmp_path/str(i)).rename(tmp_path.parent/f'{tmp_path.name}-{i}')
    assert main(['compare', str(tmp_path), '--out', str(tmp_path/'run')]) == 2
    assert 'one class' in capsys.readouterr().err


def test_timm_body_on_colour(tmp_path):
    write_digits(tmp_path, 200)
    learn = Comparison(tmp_path, ('ls',), arch='resnet10t', size=32, epochs=1).learner('ls', 0)
    with torch.no_grad(): assert learn.model.eval()(learn.dls.one_batch()[0]).shape == (64, 10)


def test_16_bits_links_and_capitals(tmp_path):
    "Deep images are scaled, folders that link to themselves are read once, test images stay out of validation"
    write_digits(tmp_path/'Train', 20, nested=False)
    write_digits(tmp_path/'valid', 10, nested=False)
    write_digits(tmp_path/'test', 10, nested=False)
    (tmp_path/'Train'/'0'/'loop').symlink_to(tmp_path/'Train')
    data = folder_data(tmp_path, 8, progress=False)
    assert data.vocab == [str(i) for i in range(10)] and [len(s) for s in data.splits()] == [20, 10]
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    for name, values in (('a', ramp.astype(np.uint16)), ('b', (ramp/65535).astype(np.float32))):
        (tmp_path/'deep'/name).mkdir(parents=True)
        Image.fromarray(values).save(tmp_path/'deep'/name/('x.png' if name == 'a' else 'x.tif'))
    deep = folder_data(tmp_path/'deep', 8, progress=False)
    for image in deep.images: np.testing.assert_allclose(image[0], ramp/257, atol=1)
    Image.fromarray((ramp-9).astype(np.float32)).save(tmp_path/'deep'/'a'/'y.tif')
    with pytest.raises(ValueError, match='y.tif.*black'): folder_data(tmp_path/'deep', 8, progress=False)


@pytest.mark.parametrize('extra, words', [('docs', "'docs'"), (None, 'none with images for validation')])
def test_half_a_split_is_told(extra, words, tmp_path):
    write_digits(tmp_path/'train', 20, nested=False)
    if extra:
        write_digits(tmp_path/'valid', 10, nested=False)
        write_digits(tmp_path/extra, 3, nested=False)
    with pytest.raises(ValueError, match=words): folder_data(tmp_path, 8, progress=False)
