"CSV files as people have them, and every mistake in them named"
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_wine
from users_files import write_texts

from fastai_smooth.data import read_source, read_table, table_csv_dls, texts_dls

SETTINGS = dict(valid_pct=.2, seed=42, bs=8)


def table(folder, text, n_files=3, **kwargs):
    for i in range(n_files): Image.new('RGB', (8, 8)).save(folder/f'{i}.png')
    (folder/'t.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(folder/'t.csv', **kwargs)


# -- what is read

@pytest.mark.parametrize('several', [False, True])
def test_texts(several, tmp_path):
    rows = write_texts(tmp_path/'t.csv', several)
    data = read_source(tmp_path/'t.csv', delimiter=';' if several else None)
    assert data.kind == 'texts' and data.texts == [t for t, _ in rows] and data.several == several
    got = [[data.vocab[k] for k in np.flatnonzero(r)] for r in data.labels] if several else [[data.vocab[k]] for k in data.labels]
    assert got == [sorted(ls) for _, ls in rows]
    other = read_source('docstrings')
    assert (set(data.texts) < set(other.texts)) and data.fingerprint() != other.fingerprint()


def test_spaces_around_labels_are_not_labels(tmp_path):
    t = table(tmp_path, 'id,file,label\n7,0.png,"cat, dog"\n8, 1.png,dog\n9,2.png,\n', delimiter=',')
    assert t.kind == 'file' and t.vocab == ['cat', 'dog'] and t.labels.tolist() == [[True, True], [False, True], [False, False]]
    assert [f.name for f in t.items] == ['0.png', '1.png', '2.png']


@pytest.mark.parametrize('text, kind', [
    ('breed,photo\ncat,0.png\ndog,1.png\n', 'file'), ('a,x,class\n0.png,1,cat\n1.png,2,dog\n', 'file'), ('sentence,lang\nhello,en\nbonjour,fr\n', 'text'),
    ('path,label\n1,cat\n2,dog\n3,cat\n', 'table'), ('image,width,tags\n1,3,cat\n2,4,dog\n', 'table')])
def test_what_a_table_holds_shows_in_its_columns(text, kind, tmp_path): assert table(tmp_path, text).kind == kind


@pytest.mark.parametrize('how', [dict(index=True), dict(sep=';', decimal=','), dict(sep='\t'), dict(encoding='latin-1'), dict(encoding='utf-8-sig')])
def test_tables_as_spreadsheets_write_them(how, tmp_path):
    frame = pd.DataFrame(dict(acid=[1.5, 2.25, 3.]*10, name=['rosé', 'blanc', 'noir']*10, label=['à', 'b', 'b']*10))
    frame.to_csv(tmp_path/'t.csv', **{'index': False, **how})
    t = read_table(tmp_path/'t.csv')
    assert t.vocab == ['b', 'à'] and list(t.items) == ['acid', 'name'] and t.items['acid'].tolist() == frame['acid'].tolist() and t.items['name'][0] == 'rosé'
    assert t.labels.tolist() == [1, 0, 0]*10 and len(t.notes) <= 1 and all('\n' not in n for n in t.notes)


def test_columns_that_number_or_name_the_rows_are_left_out(tmp_path):
    n = 40
    frame = pd.DataFrame(dict(id=range(n), day=pd.date_range('2024-01-01', periods=n).astype(str), size=np.arange(n)*2, kind=['x', 'y']*20, gap=[np.nan]*n,
                              label=['a', 'b']*20))
    frame.to_csv(tmp_path/'t.csv', index=False)
    t = read_table(tmp_path/'t.csv')
    assert list(t.items) == ['size', 'kind'] and 'id, day, gap' in t.notes[-1]
    frame[['id', 'day', 'label']].to_csv(tmp_path/'t.csv', index=False)
    with pytest.raises(ValueError, match="no column that could tell classes apart: id, day .*'text'"): read_table(tmp_path/'t.csv')


def test_tables_of_a_comparison_and_of_a_training_are_the_same(tmp_path):
    wine = load_wine(as_frame=True).frame
    wine['target'] = [f'kind {k}' for k in wine['target']]
    wine['cellar'] = ['north' if i % 2 else 'south' for i in range(len(wine))]
    wine['is_valid'] = [i % 5 == 0 for i in range(len(wine))]
    wine.to_csv(tmp_path/'t.csv', index=False)
    with pytest.raises(ValueError, match='has the columns alcohol, .*, cellar: .* .or pass --target NAME'): read_source(tmp_path/'t.csv')
    data = read_source(tmp_path/'t.csv', target='target')
    assert data.kind == 'table' and data.vocab == ['kind 0', 'kind 1', 'kind 2'] and data.table.shape == (178, 14) and len(data.split[1]) == 36
    a = data.dls(data.labels, data.splits(), 8)
    b = table_csv_dls(tmp_path/'t.csv', dict(SETTINGS, target='target'))
    for x, y in zip(a.valid.one_batch(), b.valid.one_batch()): np.testing.assert_array_equal(x, y)
    assert list(b.cat_names) == ['cellar'] and '36 for validation (as the data say)' in b.described and "labels: the column 'target'" in b.described


# -- mistakes

@pytest.mark.parametrize('text, words', [
    ('text,label\na,x\n', '1 class:'), ('text\na\n', 'a column of texts and one of labels'), ('text,label\na,x\n,y\n', 'no text in row 2 .1 of 2 rows'),
    ('text,label\na,\nb,y\n', 'no label in row 1'), ('text,label\n', 'no rows'), ('', 'Cannot read'),
    ('text,label,is_valid\na,x,1\nb,y,1\n', 'on one side'), ('text,label,is_valid\na,x,yes\nb,y,1\n', "'yes'"),
    ('text,label,is_valid\na,x,0\nb,y,1\n', "no training images of the class 'y'")])
def test_mistakes_in_tables_of_texts(text, words, tmp_path):
    "The same words for a comparison and for a training"
    with pytest.raises(ValueError, match=words): table(tmp_path, text)
    with pytest.raises(ValueError, match=words): texts_dls(tmp_path/'t.csv', SETTINGS)


@pytest.mark.parametrize('text, words', [
    ('file,split,breed\n0.png,train,cat\n1.png,train,dog\n', 'has the columns file, split, breed'),
    ('0.png,cat\n1.png,dog\n2.png,cat\n', 'no line with the names'),
    ('file,label\n0.png,cat\n0.png,dog\n', '0.png twice'), ('file,label,is_valid\n0.png,cat,0\n1.png,dog,1\n', "no training images of the class 'dog'"),
    ('file,label\n0.png,cat\n8.png,dog\n9.png,cat\n', r'names .*8.png, but there is no such file .2 of 3 are missing: 8.png, 9.png'),
    ('a,b,taste\n1,2,good\n2,3,bad\n', 'has the columns a, b, taste')])
def test_tables_are_not_guessed_at(text, words, tmp_path):
    with pytest.raises(ValueError, match=words): table(tmp_path, text)


def test_a_target_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no column 'taste': it has a, label"): table(tmp_path, 'a,label\n1,x\n2,y\n', target='taste')


@pytest.mark.parametrize('labels, mark', [('red;green red blue', ';'), ('red|green red', '|'), ('a,b b,c', ','), ('x;y y;z', ';')])
def test_several_labels_in_a_cell_are_asked_about(labels, mark, tmp_path):
    text = 'file,label\n' + ''.join(f'{i}.png,"{v}"\n' for i, v in enumerate(labels.split()))
    with pytest.raises(ValueError, match=rf"look like several per row .*--delimiter '\{mark}'"): table(tmp_path, text)
    assert table(tmp_path, text, delimiter=mark).labels.ndim == 2
    assert set(table(tmp_path, text, delimiter='').vocab) == set(labels.split())


@pytest.mark.parametrize('labels', [['New York', 'New Jersey'], ['kind 1', 'kind 2', 'kind 3'], ['a', 'b'], ['Smith, John', 'Doe, Jane']])
def test_names_of_several_words_are_not_several_labels(labels, tmp_path):
    assert table(tmp_path, 'file,label\n' + ''.join(f'{i}.png,"{v}"\n' for i, v in enumerate(labels))).vocab == sorted(labels)


def test_what_is_left_out_on_demand(tmp_path):
    text = 'file,label\n0.png,cat\n1.png,\n8.png,dog\n2.png,dog\n'
    with pytest.raises(ValueError, match='--skip-broken'): table(tmp_path, text)
    t = table(tmp_path, text, skip_broken=True)
    assert [f.name for f in t.items] == ['0.png', '2.png'] and t.labels.tolist() == [0, 1]
    assert t.notes == ['1 rows without label are left out', '1 files that are not there are left out']
