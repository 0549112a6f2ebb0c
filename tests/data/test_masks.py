"Images with a class per pixel, and every mistake in them named"
import numpy as np
import pytest
from PIL import Image
from users_files import two_masks, write_masks

from fastai_smooth.data import mask_dls, read_source

SETTINGS = dict(size=16, bs=4, ignore=None, valid_pct=.2, seed=42)


def read(path, **kwargs): return read_source(path, **{'size': 24, 'progress': False, **kwargs})


@pytest.mark.parametrize('names, end', [('labels', '_P'), ('masks', ''), ('masks', '_mask')])
def test_masks_are_read_as_they_are(names, end, tmp_path):
    canvases, masks = write_masks(tmp_path, 6, names=names, end=end)
    data = read(tmp_path, ignore=255)
    np.testing.assert_array_equal(data.labels, masks)
    np.testing.assert_array_equal(data.images[:, 0], canvases)
    assert data.kind == 'masks' and not data.several and data.vocab[:2] == ['background', '0'] and data.split is None
    (tmp_path/'valid.txt').write_text('001.png\n004.png\n')
    assert [s.tolist() for s in read(tmp_path, ignore=255).split] == [[0, 2, 3, 5], [1, 4]]
    half = read(tmp_path, ignore=255, size=12)
    assert half.labels.shape == (6, 12, 12) and set(np.unique(half.labels)) <= set(np.unique(masks)), "no class is made up between two others"


def wrong(folder, words, ignore=None):
    "The same words for a comparison and for a training"
    with pytest.raises(ValueError, match=words): read(folder, ignore=ignore)
    with pytest.raises(ValueError, match=words): mask_dls(folder, dict(SETTINGS, ignore=ignore))


def test_mistakes_in_masks_name_the_file(tmp_path):
    write_masks(tmp_path, 4)
    wrong(tmp_path, r'000_P.png has the value 255, but there are 11 codes .*--ignore 255 .ignore=255')
    (tmp_path/'valid.txt').write_text('\n'.join(f'{i:03}.png' for i in range(4)))
    wrong(tmp_path, 'every image on one side', 255)
    (tmp_path/'valid.txt').write_text('77.png')
    wrong(tmp_path, 'names 77.png', 255)
    (tmp_path/'valid.txt').unlink()
    Image.new('RGB', (24, 24)).save(tmp_path/'labels'/'001_P.png')
    (tmp_path/'labels'/'002_P.png').write_bytes(b'no image')
    wrong(tmp_path, '2 of 4 masks cannot be read: .*001_P.png .*colours.*002_P.png', 255)
    for load in (True, False): assert [f.stem for f in read(tmp_path, ignore=255, skip_broken=True, load=load).files] == ['000', '003']
    (tmp_path/'labels'/'001_P.png').unlink()
    wrong(tmp_path, 'no mask for 001.png')
    (tmp_path/'codes.txt').write_text('one\n')
    wrong(tmp_path, '1 class names')
    (tmp_path/'codes.txt').write_text('cat\ncat')
    wrong(tmp_path, 'twice')
    (tmp_path/'codes.txt').write_bytes('café\nthé'.encode('latin-1'))
    wrong(tmp_path, 'UTF-8')
    (tmp_path/'codes.txt').write_text('one\ntwo\n')
    for f in (tmp_path/'images').iterdir(): f.unlink()
    wrong(tmp_path, 'holds no images')
    (tmp_path/'images').rmdir()
    wrong(tmp_path, 'needs the folders')


def test_masks_that_do_not_fit_their_images(tmp_path):
    two_masks(tmp_path/'a', size=(32, 16))
    wrong(tmp_path/'a', 'one size')
    two_masks(tmp_path/'b')
    (tmp_path/'b'/'images'/'more').mkdir()
    Image.new('RGB', (16, 16)).save(tmp_path/'b'/'images'/'more'/'0.png')
    wrong(tmp_path/'b', 'Two images have the mask')


@pytest.mark.parametrize('mode, value', [('L', 1), ('P', 1), ('1', 1), ('L', 255)])
def test_numbers_of_a_mask_are_not_its_colours(mode, value, tmp_path):
    "Black and white with two codes is 0 and 1, and that is said"
    two_masks(tmp_path, mode, value)
    data = read(tmp_path, size=16)
    assert data.labels.sum((1, 2)).tolist() == [16*(i+2) for i in range(10)] and data.labels.max() == 1
    assert ("255 is read as class 1, 'cat'" in data.describe()) == (value == 255)
    dls = mask_dls(tmp_path, SETTINGS)
    assert {int(y.sum())//16 for dl in dls.loaders for y in dl.one_batch()[1]} <= set(range(2, 12))
    for dl in dls.loaders:
        for _, y in dl: assert set(y.unique().tolist()) <= {0, 1}
    assert dls.described.startswith(f'{tmp_path}: 10 images, 2 classes: sky, cat')


def test_one_class_is_nothing_to_learn(tmp_path):
    two_masks(tmp_path/'a', value=255)
    wrong(tmp_path/'a', r'1 class \(0\): .*leave out --ignore 255', 255)
    two_masks(tmp_path/'b', value=0)
    wrong(tmp_path/'b', r'1 class \(0\): there is nothing to tell apart.$')
    two_masks(tmp_path/'c', value=128)
    wrong(tmp_path/'c', 'value 128')


def test_what_memory_and_files_hold_is_the_same(tmp_path):
    "Embedded masks through the data blocks of a training, ignored pixels included"
    x, y = mask_dls('digit_masks', dict(SETTINGS, size=24)).valid.one_batch()
    data = read_source('digit_masks')
    for image, mask, i in zip(x, y, data.split[1]):
        np.testing.assert_array_equal(mask.numpy(), data.labels[i])
        np.testing.assert_allclose(image[0].numpy()*255, data.images[i], atol=1e-3)
