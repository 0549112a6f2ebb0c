"The DataLoaders of a training: the same data as a comparison reads, and learners that predict from what a user has"
import csv

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.tabular.learner import tabular_learner
from fastai.text.learner import text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.vision.augment import Resize
from PIL import Image
from users_files import write_digits, write_masks, write_texts

from fastai_smooth.data import (
    csv_dls, folder_dls, image_dls, lines_dls, mask_dls, pets_dls, read_source, small_convnet, small_segmenter, table_csv_dls, texts_dls)

SETTINGS = dict(size=16, presize=20, bs=8, ignore=None, delimiter=None, valid_pct=.2, seed=42)


def images_with_labels(folder, n=40):
    data = read_source('multi_digits')
    rows = []
    for i in range(n):
        Image.fromarray(data.images[i]).save(folder/f'{i}.png')
        rows.append((f'{i}.png', ' '.join(np.array(data.vocab)[data.labels[i]])))
    pd.DataFrame(rows, columns=['file', 'labels']).to_csv(folder/'l.csv', index=False)
    return data


# -- one reader

def test_folders_and_tables_of_one_reader(tmp_path):
    write_digits(tmp_path/'photos', 80, split=True)
    data = read_source(tmp_path/'photos', load=False, progress=False)
    dls = folder_dls(tmp_path/'photos', SETTINGS, Resize(16))
    assert list(dls.vocab) == data.vocab and dls.described == data.describe(data.split)
    for part, ds in zip(data.split, (dls.train_ds, dls.valid_ds)): assert [f for f, _ in ds.items] == [data.files[i] for i in part]
    several = images_with_labels(tmp_path)
    labels = csv_dls(tmp_path/'l.csv', dict(SETTINGS, delimiter=' '), Resize(16))
    assert [sorted(ls) for _, ls in labels.train_ds.items[:5]] and set(labels.vocab) == set(several.vocab)
    for delimiter in (None, ';'):
        with pytest.raises(ValueError, match="--delimiter ' '"): image_dls(tmp_path/'l.csv', dict(SETTINGS, delimiter=delimiter), Resize(16))


def images8(path, s): return image_dls(path, s, Resize(8))


@pytest.mark.parametrize('make, name', [(images8, 'digits'), (images8, 'multi_digits'), (texts_dls, 'docstrings'), (table_csv_dls, 'wine')])
def test_a_training_takes_embedded_data(make, name):
    data, dls = read_source(name), make(name, SETTINGS)
    train, valid = data.splits(.2, 42)
    assert (len(dls.train_ds), len(dls.valid_ds)) == (len(train), len(valid)) and dls.described.startswith(f'{name}: ')
    y = torch.cat([b[-1] for b in dls.valid]).as_subclass(torch.Tensor)
    np.testing.assert_allclose(np.sort(y.float().reshape(len(valid), -1).sum(1)), np.sort(data.labels[valid].reshape(len(valid), -1).sum(1)))


@pytest.mark.parametrize('make, path, words', [
    (images8, None, 'no data of its own: pass a folder'), (images8, 'wine', 'for images, but wine holds rows'),
    (mask_dls, 'digits', 'for masks, but digits holds images: pass a folder of images, labels and codes.txt'), (texts_dls, None, 'pass a CSV'),
    (table_csv_dls, 'docstrings', 'for table, but docstrings holds texts'), (texts_dls, 'nowhere.csv', 'Unknown data set')])
def test_data_of_another_kind(make, path, words):
    with pytest.raises(ValueError, match=words): make(path, SETTINGS)


def test_less_than_a_batch(tmp_path):
    write_digits(tmp_path, 20, nested=False)
    with pytest.raises(ValueError, match='16 training examples, less than a batch of 64'): images8(tmp_path, dict(SETTINGS, bs=64))


def test_lines(tmp_path):
    rows = write_texts(tmp_path/'t.csv')
    (tmp_path/'lines.txt').write_text('\n'.join(t for t, _ in rows))
    x, y = lines_dls(tmp_path/'lines.txt', SETTINGS).one_batch()
    assert x.shape == (8, 72) and torch.equal(x[:, 1:].as_subclass(torch.Tensor), y[:, :-1].as_subclass(torch.Tensor))
    (tmp_path/'empty.txt').write_text('\n')
    with pytest.raises(ValueError, match='0 lines with text'): lines_dls(tmp_path/'empty.txt', SETTINGS)
    with pytest.raises(ValueError, match='no file'): lines_dls(tmp_path/'none.txt', SETTINGS)
    with pytest.raises(ValueError, match='use a smaller bs'): lines_dls(tmp_path/'lines.txt', dict(SETTINGS, bs=100_000))


# -- an exported learner and whatever a user hands it

def exported(learn, folder):
    learn.path = folder
    learn.export('x.pkl')
    return load_learner(folder/'x.pkl')


def pictures(file):
    image = Image.open(file).convert('RGB')
    return (file, str(file), file.read_bytes(), np.asarray(image), torch.as_tensor(np.array(image)), image, Image.open(file))


@pytest.mark.parametrize('kind', ['folder', 'several', 'masks', 'pets'])
def test_a_learner_predicts_from_every_kind_of_image(kind, tmp_path):
    if kind == 'folder':
        write_digits(tmp_path, 100, nested=False)
        dls = image_dls(tmp_path, SETTINGS, Resize(16))
    elif kind == 'several':
        images_with_labels(tmp_path)
        dls = csv_dls(tmp_path/'l.csv', dict(SETTINGS, delimiter=' '), Resize(16))
    elif kind == 'masks':
        write_masks(tmp_path, 20)
        dls = mask_dls(tmp_path, dict(SETTINGS, ignore=255))
    else:
        for i in range(20): Image.new('RGB', (30, 24), (9*i, 0, 0)).save(tmp_path/f'{("Abyssinian", "pug")[i%2]}_{i}.jpg')
        dls = pets_dls(tmp_path, SETTINGS)
    n = len(dls.vocab)
    model = small_segmenter(3, n) if kind == 'masks' else small_convnet(3, n)
    loss = BCEWithLogitsLossFlat() if kind == 'several' else CrossEntropyLossFlat(axis=1)
    learn = exported(Learner(dls, model.eval(), loss_func=loss), tmp_path)
    file = next(f for f in sorted(tmp_path.rglob('*')) if f.suffix in ('.png', '.jpg') and f.parent.name != 'labels')
    with learn.no_bar(): seen = [learn.predict(given) for given in pictures(file)]
    for decoded, _, probs in seen:
        assert probs.shape[0] == n
        torch.testing.assert_close(probs, seen[0][2])
        if kind in ('folder', 'pets'): assert decoded in dls.vocab


def test_learners_of_texts_and_tables_predict(tmp_path):
    rows = write_texts(tmp_path/'t.csv', n=120)
    dls = texts_dls(tmp_path/'t.csv', SETTINGS)
    learn = exported(text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=dict(emb_sz=8, n_hid=8, n_layers=1, pad_token=1, bidir=False, output_p=.4,
                                             hidden_p=.3, input_p=.4, embed_p=.05, weight_p=.5)), tmp_path)
    with learn.no_bar(): label, _, p = learn.predict('Return the array')
    assert label in dls.vocab[1] and len(p) == 4
    assert rows[0][0].encode() not in (tmp_path/'x.pkl').read_bytes(), "the texts stay at home"
    with open(tmp_path/'w.csv', 'w', newline='') as f:
        csv.writer(f).writerows([('acid', 'colour', 'label'), *((i % 7/2, ('red', 'white')[i % 2], ('a', 'b')[i % 3 == 0]) for i in range(60))])
    dls = table_csv_dls(tmp_path/'w.csv', SETTINGS)
    learn = exported(tabular_learner(dls, layers=[8], loss_func=CrossEntropyLossFlat()), tmp_path)
    with learn.no_bar(): assert learn.predict(pd.Series(dict(acid=1., colour='red')))[2].shape == (2,)
