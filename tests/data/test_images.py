"Folders of images: what is found, how it is read, and mistakes that are named"
import json
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from users_files import write_digits

from fastai_smooth.data import downloading, folder_files, open_image, read_source
from fastai_smooth.data import images as module
from fastai_smooth.data.images import each_file, image_files, pets_files, read_images


def photos(folder, names, n=4):
    for name in names:
        (folder/name).mkdir(parents=True)
        for i in range(n): Image.new('RGB', (20, 20), (30*i, 5*len(name), 0)).save(folder/name/f'{i}.png')


def test_what_is_found(tmp_path):
    labels = write_digits(tmp_path, 60)
    (tmp_path/'notes.txt').write_text('no image')
    (tmp_path/'.cache').mkdir()
    Image.new('RGB', (4, 4)).save(tmp_path/'.cache'/'hidden.png')
    files, numbers, vocab, split = folder_files(tmp_path)
    assert split is None and vocab == sorted({f'{"round" if d in (0, 3, 6, 8, 9) else "straight"}/{d}' for d in labels}) and len(files) == 60
    for file, label in zip(files, numbers): assert vocab[label] == file.parent.relative_to(tmp_path).as_posix()
    pixels, broken = read_images(files, 16, progress=False)
    assert pixels.shape == (60, 3, 16, 16) and pixels.dtype == np.uint8 and not broken
    for file, image in zip(files, pixels): assert np.array_equal(image, np.stack([np.asarray(Image.open(file))]*3))


def test_runs_are_no_classes(tmp_path):
    photos(tmp_path, ('a', 'b', 'results/pictures', 'fastai_smooth_runs/a-1', 'other'))
    (tmp_path/'results'/'config.json').write_text(json.dumps(dict(data='.', fingerprint='01')))
    (tmp_path/'other'/'config.json').write_text('[1, 2')
    assert folder_files(tmp_path)[2] == ['a', 'b', 'other'] and len(image_files(tmp_path)) == 12


@pytest.mark.parametrize('names, vocab, sizes', [(('animal/x', 'plant/x', 'plant/y'), ['animal/x', 'plant/x', 'plant/y'], None),
                                                 (('Train/a', 'Train/b', 'Valid/a', 'Valid/b'), ['a', 'b'], (8, 8)),
                                                 (('training/a', 'training/b', 'val/a', 'test/b'), ['a', 'b'], (8, 4))])
def test_the_split_that_folders_say(names, vocab, sizes, tmp_path):
    photos(tmp_path, names)
    files, _, found, split = folder_files(tmp_path)
    assert found == vocab and (split is None) == (sizes is None)
    if split is not None:
        assert tuple(map(len, split)) == sizes
        assert all(files[i].relative_to(tmp_path).parts[0].lower() in ('train', 'training') for i in split[0])
    Image.new('RGB', (9, 9)).save(tmp_path/'loose.png')
    with pytest.raises(ValueError, match='loose|beside them'): folder_files(tmp_path)


@pytest.mark.parametrize('names, words', [((), 'holds no images'), (('a',), "one class, 'a'"), (('train/a', 'train/b'), 'none with images for validation'),
                                          (('train/a', 'valid/a', 'docs/a'), "'docs'"), (('images', 'labels'), 'no codes.txt'),
                                          (('train/a', 'train/b', 'valid/new'), "no training images of the class 'new'")])
def test_mistakes_name_the_folder(names, words, tmp_path):
    photos(tmp_path, names)
    with pytest.raises(ValueError, match=words): folder_files(tmp_path)
    with pytest.raises(ValueError, match='is not a folder'): folder_files(tmp_path/'none')


def test_shapes_modes_and_turned_pictures(tmp_path):
    files = []
    for name, mode, size in (('a', 'RGB', (30, 20)), ('b', 'L', (20, 30)), ('c', 'RGBA', (8, 8)), ('d', 'P', (9, 9)), ('e', 'CMYK', (10, 10))):
        files.append(tmp_path/f"{name}.{'jpg' if mode == 'CMYK' else 'png'}")
        Image.new(mode, size).save(files[-1])
    turned = Image.new('RGB', (20, 20))
    turned.paste((255, 255, 255), (0, 0, 20, 10))  # white above, told to be turned by 180 degrees
    exif = turned.getexif()
    exif[0x0112] = 3
    turned.save(tmp_path/'y.png', exif=exif)
    pixels, _ = read_images([*files, tmp_path/'y.png'], 10, progress=False)
    for upright in (pixels[-1], np.asarray(open_image(tmp_path/'y.png').resize((10, 10))).transpose(2, 0, 1)):
        assert upright[:, :4].max() == 0 and upright[:, 6:].min() == 255


def test_16_bits_links_and_capitals(tmp_path):
    "Deep images are scaled, folders that link to themselves are read once, test images stay out of validation"
    for name, n in (('Train', 20), ('valid', 10), ('test', 10)): write_digits(tmp_path/name, n, nested=False)
    (tmp_path/'Train'/'0'/'loop').symlink_to(tmp_path/'Train')
    assert [len(s) for s in folder_files(tmp_path)[3]] == [20, 10]
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    (tmp_path/'deep').mkdir()
    for name, values in (('a.png', ramp.astype(np.uint16)), ('b.tif', (ramp/65535).astype(np.float32)), ('c.tif', (ramp-9).astype(np.float32))):
        Image.fromarray(values).save(tmp_path/'deep'/name)
        if name == 'c.tif': continue
        np.testing.assert_allclose(np.asarray(open_image(tmp_path/'deep'/name))[..., 0], ramp/257, atol=1)
    with pytest.raises(ValueError, match='c.tif.*black'): read_images(image_files(tmp_path/'deep'), 8, progress=False)
    with pytest.raises(ValueError, match='c.tif.*black'): open_image(tmp_path/'deep'/'c.tif')


def test_an_image_as_whatever_a_user_has_it(tmp_path):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)*5)
    image.save(tmp_path/'x.png')
    for given in (tmp_path/'x.png', str(tmp_path/'x.png'), (tmp_path/'x.png').read_bytes(), np.asarray(image), torch.as_tensor(np.array(image)), image):
        assert np.array_equal(np.asarray(open_image(given)), np.asarray(image)), type(given)
    assert np.asarray(open_image(np.full((3, 5), 7, np.uint8))).tolist() == [[[7]*3]*5]*3


def test_all_that_is_broken_is_named_at_once(tmp_path):
    write_digits(tmp_path, 40, nested=False)
    files = image_files(tmp_path)
    bad = range(0, 40, 6)
    for i in bad: files[i].write_bytes(files[i].read_bytes()[:40])
    words = '7 of 40 images cannot be read: ' + '.*'.join(str(f) for f in files[:30:6]) + '.*--skip-broken'
    for read in (lambda: read_source(tmp_path, progress=False), lambda: read_source(tmp_path, load=False, progress=False)):
        with pytest.raises(ValueError, match=words) as e: read()
        assert str(files[30]) not in str(e.value) and '\n' not in str(e.value)
    for load in (True, False):
        data = read_source(tmp_path, skip_broken=True, load=load, progress=False)
        assert len(data) == 33 and data.files == [f for i, f in enumerate(files) if i not in bad] and '7 of 40 images' in data.describe()
        assert [data.vocab[k] for k in data.labels] == [f.parent.name for f in data.files]
    assert each_file([1, 2], lambda i: 1/(i-1), progress=False, skip_broken=True) == ([None, 1.], [0])


def test_what_is_left_of_a_split(tmp_path):
    photos(tmp_path, ('train/a', 'train/b', 'valid/a', 'valid/b'))
    files = image_files(tmp_path)
    for i in (0, 5, 9): files[i].write_bytes(b'')
    data = read_source(tmp_path, skip_broken=True, progress=False)
    expected = [[f for j, f in enumerate(files) if j in part and j not in (0, 5, 9)] for part in (range(8), range(8, 16))]
    assert [[data.files[i] for i in s] for s in data.split] == expected
    for f in files[:4]: f.write_bytes(b'')
    with pytest.raises(ValueError, match="no training images of the class 'a'"): read_source(tmp_path, skip_broken=True, progress=False)


def test_pets_and_downloads(tmp_path, monkeypatch):
    Image.new('RGB', (4, 4)).save(tmp_path/'Abyssinian_1.jpg')
    Image.new('RGB', (4, 4)).save(tmp_path/'great_pyrenees_12.jpg')
    assert pets_files(tmp_path)[1].tolist() == [0, 1] and pets_files(tmp_path)[2] == ['Abyssinian', 'great_pyrenees']
    def fails(*args, **kwargs): raise URLError('no route')
    monkeypatch.setattr(module, 'untar_data', fails)
    with pytest.raises(ValueError, match='could not be downloaded.*pass a folder'): read_source('pets')
    def caused():
        try: fails()
        except URLError as e: raise RuntimeError('hub') from e
    with pytest.raises(ValueError, match='weights could not be downloaded .hub.: take another'): downloading('weights', 'take another', caused)
    with pytest.raises(ZeroDivisionError): downloading('weights', 'take another', lambda: 1/0)
