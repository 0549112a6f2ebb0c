"The first hour of a user: folders and tables as people have them. Nothing ends in a traceback, and every refusal is one line that names the thing and the flag"
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fastai.learner import load_learner
from PIL import Image
from sklearn.datasets import load_wine
from users_files import write_masks, write_texts

from fastai_smooth.cli import main
from fastai_smooth.data import digits_arrays, read_source
from fastai_smooth.time_estimate import TimeEstimate

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]
NAMES = ['Null', 'Eins', 'Zwei', 'Drei', 'Vier', 'Fünf', 'sechs & mehr', 'Sieben', 'Acht', 'Neun']
QUICK = '--methods ce,ls --seeds 1 --epochs 1'.split()


def write_photos(folder):
    "A tree of classes with umlauts and spaces, in several formats, with a rare class, a broken and an empty file, and what systems leave behind"
    images, labels, _ = digits_arrays()
    for i in range(160):
        place = folder/('gerade' if labels[i] in (1, 4, 7) else 'rund')/NAMES[labels[i]]
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(images[i]).resize((20, 24))
        mode, name = {0: ('RGB', f'Bild {i}.JPG'), 1: ('RGBA', f'{i}.png'), 2: ('P', f'{i}.gif')}.get(i % 9, ('L', f'{i}.png'))
        image.convert(mode).save(place/name)
    for name, n in (('Einzelstück', 1), ('selten', 3)):
        (folder/'rund'/name).mkdir()
        for i in range(n): Image.fromarray(images[i]).save(folder/'rund'/name/f'{i}.png')
    (folder/'rund'/'Null'/'kaputt.png').write_bytes(b'no image')
    (folder/'rund'/'Null'/'leer.jpg').write_bytes(b'')
    for name in ('.DS_Store', 'Thumbs.db'): (folder/name).write_bytes(b'x')
    (folder/'.versteckt').mkdir()
    Image.fromarray(images[0]).save(folder/'.versteckt'/'a.png')


def write_wine(file):
    "A table with semicolons, decimal commas, a date and a name per row, and the classes in a column that is neither last nor called label"
    wine = load_wine(as_frame=True).frame.rename(columns={'target': 'Sorte'}).assign(Jahrgang=2000+np.arange(178) % 7)
    wine.insert(0, 'Datum', pd.date_range('2001-01-01', periods=178).astype(str))
    wine.insert(1, 'Name', [f'Wein {i}' for i in range(178)])
    wine.to_csv(file, index=False, sep=';', decimal=',')


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    "A folder with everything"
    here = tmp_path_factory.mktemp('Meine Daten')
    photos = here/'Fotos äöü'
    write_photos(photos)
    good = [f for f in sorted(photos.rglob('*.*')) if f.stat().st_size > 20 and '.versteckt' not in f.parts]
    rows = [(f.relative_to(here).as_posix(), f.parent.name) for f in good]
    (here/'Etiketten.csv').write_bytes('\n'.join(['Datei;Klasse', *map(';'.join, rows)]).encode('latin-1'))
    several = [f'{f},{k};{"hell" if i % 3 else "dunkel"}' for i, (f, k) in enumerate(rows)]
    (here/'mehrere.csv').write_text('\n'.join(['file,label', *several]), encoding='utf-8-sig')
    (here/'Lücken.csv').write_text('\n'.join(['file,label', *map(','.join, rows), 'fehlt.png,Null', f'{rows[0][0]}x,Eins', 'auch.png,']), encoding='utf-8')
    write_wine(here/'Wein.csv')
    write_texts(here/'Texte.csv', n=120)
    (here/'Zeilen.txt').write_text('ein Satz\nnoch einer\n')
    (here/'leer.csv').write_text('')
    write_masks(here/'Masken ü', 24)
    return here


@pytest.fixture
def go(desk, monkeypatch, capsys):
    "Run the command at the desk: exit code, what is printed, what is said on stderr"
    monkeypatch.chdir(desk)
    for module in ('compare.comparison', 'train.training'): # these runs are too short to be worth an estimate
        monkeypatch.setattr(f'fastai_smooth.{module}.TimeEstimate', partial(TimeEstimate, least=0, watched=0))
    def run(*args):
        try: code = main(list(args))
        except SystemExit as e: code = e.code
        said = capsys.readouterr()
        return code, said.out, said.err
    return run


REFUSED = [ # arguments, and what the one line names
    ('compare|nirgends', 'nirgends', 'a folder'), ('train|finetune|nirgends', 'nirgends'),
    ('compare|Fotos äöü', '2 of 166', 'kaputt.png', 'leer.jpg', '--skip-broken'), ('train|finetune|Fotos äöü', '2 of 166', 'kaputt.png', '--skip-broken'),
    ('compare|Fotos äöü|--out|Fotos äöü/Ergebnis', '--out', 'inside the data'), ('train|finetune|Fotos äöü|--out|Fotos äöü/Lauf', '--out', 'inside the data'),
    ('compare|Fotos äöü|--skip-broken|--delimiter|;', '--delimiter', 'Fotos äöü'), ('train|finetune|Fotos äöü|--target|Klasse', '--target', 'Fotos äöü'),
    ('compare|Fotos äöü/rund/Null', 'in no class'), ('compare|Etiketten.csv|--target|klasse', "'klasse'", 'Datei, Klasse'),
    ('compare|Etiketten.csv|--ignore|255', '--ignore', 'Etiketten.csv'), ('compare|mehrere.csv', "--delimiter ';'", 'mehrere.csv'),
    ('train|finetune|mehrere.csv', "--delimiter ';'"), ('train|multilabel|mehrere.csv', "--delimiter ';'"), ('compare|Lücken.csv', 'label', '--skip-broken'),
    ('train|finetune|Lücken.csv', 'row 167', '--skip-broken'), ('compare|Wein.csv', '--target', 'Sorte'), ('train|tabular|Wein.csv', '--target', 'Jahrgang'),
    ('train|finetune|Wein.csv|--target|Sorte', 'for images', 'rows'), ('compare|Wein.csv|--target|Sorte|--size|32', 'size is for images'),
    ('compare|Wein.csv|--target|Sorte|--methods|mixup', "'mixup' does not fit a table"),
    ('compare|Texte.csv|--methods|ce,spatial', "'spatial' does not fit texts"), ('compare|Zeilen.txt', 'Zeilen.txt', '--target'),
    ('train|text|Zeilen.txt', 'Zeilen.txt', '--target'), ('compare|leer.csv', 'leer.csv'), ('compare|Masken ü', '255', '--ignore 255'),
    ('train|segmentation|Masken ü', '255', '--ignore 255'), ('train|finetune|Masken ü', 'for images'),
    ('compare|digits|--delimiter|,', '--delimiter', 'digits'), ('compare|digits|--ignore|3', '--ignore', 'digits'),
    ('compare|digits|--bs|100000', '100000', '1437', '--bs'), ('train|digits|--bs|100000', '100000', '1437'),
    ('compare|digits|--methods|ce|--eps|.3', '--eps 0.3', 'ce'), ('compare|digits|--pairs|4:9', '--pairs 4:9', '--noise'),
    ('compare|digit_masks|--valid-pct|.4', '--valid-pct 0.4', 'digit_masks'), ('train|digits|Fotos äöü', 'data of its own', 'Fotos äöü'),
    ('train|multilabel|--delimiter|;', 'delimiter is for data of your own'), ('train|tabular|Wein.csv|--table|iris', 'table'),
    ('train|finetune|Fotos äöü|--skip-broken|--size|0', 'size must be above 0'), ('compare|--resume', '--out'), ('train|--resume', '--out'),
    ('compare|digits|--out|Wein.csv', 'Wein.csv'), ('compare|digits|--out|Masken ü', 'Masken ü')]


def test_every_refusal_is_one_line_that_names_the_thing_and_the_flag(go, desk):
    before,wrong = sorted(desk.rglob('*')),[]
    for command, *words in REFUSED:
        code, _, err = go(*command.split('|'))
        if code != 2 or len(err.strip().splitlines()) != 1 or not all(word in err for word in words): wrong.append((command, words, code, err))
    assert not wrong
    assert sorted(desk.rglob('*')) == before, "nothing is written"


def test_compare_a_folder_with_a_mess_in_it(go, desk):
    "Broken files are left out and listed, rare classes named, the run folder is no class, and the run goes on"
    code, out, err = go('compare', 'Fotos äöü', '--skip-broken', *QUICK, '--out', 'Lauf 1')
    assert code == 0 and not err
    for words in ('164 images, 12 classes', '2 of 166 images cannot be read and are left out', 'kaputt.png', "'rund/Einzelstück' (0 of 1)", 'batches of 16',
                  'read at 20 by 20 pixels', 'results: Lauf 1', 'for 2 runs, by the first 3 batches', 'Report: Lauf 1/report.html'): assert words in out, out
    shutil.copytree(desk/'Lauf 1', desk/'Fotos äöü'/'Lauf 1')
    assert len(read_source(desk/'Fotos äöü', load=False, skip_broken=True, progress=False)) == 164
    code, _, err = go('compare', '--out', 'Lauf 1', '--resume', '--bs', '8')
    assert code == 2 and 'bs=16' in err and 'here 8' in err
    place = desk/'Fotos äöü'/'rund'/'selten'
    place.rename(place.with_name('anders'))
    code, _, err = go('compare', '--out', 'Lauf 1', '--resume')
    place.with_name('anders').rename(place)
    assert code == 2 and 'fingerprint' in err


def test_a_table_of_files(go):
    "Semicolons, Latin-1, columns with names of one's own; gaps are left out when that is asked for"
    said = read_source('Etiketten.csv', load=False, progress=False).describe()
    for words in ("labels: the column 'Klasse'", 'read as Latin-1', "separated by ';'", 'Fünf', '164 images'): assert words in said
    data = read_source('Lücken.csv', skip_broken=True, load=False, progress=False)
    assert len(data) == 164 and '2 files that are not there are left out' in data.notes


@pytest.mark.parametrize('recipe, args, words', [
    ('multilabel', ['mehrere.csv', '--delimiter', ';'], ['several per example', 'resized to 20 by 20 pixels']),
    ('segmentation', ['Masken ü', '--ignore', '255'], ['24 images, 11 classes', 'resized to 24 by 24 pixels']),
    ('tabular', ['Wein.csv', '--target', 'Sorte'], ['178 rows, 3 classes', "the column 'Sorte'", 'left out, since they name or number the rows: Datum, Name']),
    ('text', ['Texte.csv'], ['120 texts, 4 classes', 'for 1 epoch, by the first 3 batches'])])
def test_train_says_what_it_read_and_the_learner_predicts(recipe, args, words, go, desk):
    code, out, _ = go('train', recipe, *args, '--epochs', '1', '--out', f'Lauf {recipe}')
    assert code == 0 and all(word in out for word in words), out
    assert json.loads((desk/f'Lauf {recipe}'/'config.json').read_text())['fingerprint']
    learn = load_learner(desk/f'Lauf {recipe}'/'learner.pkl')
    with learn.no_bar():
        if recipe == 'text': return learn.predict('Return the indices of an array')
        if recipe == 'tabular': return learn.predict(read_source('Wein.csv', target='Sorte', progress=False).table.iloc[0])
        file = next(f for f in Path('Fotos äöü/rund/Drei').iterdir())
        kinds = file, str(file), file.read_bytes(), Image.open(file), Image.open(file).convert('RGB'), np.asarray(Image.open(file).convert('RGB'))
        p = [learn.predict(kind)[2].numpy() for kind in kinds]
    for other in p[1:]: np.testing.assert_allclose(other, p[0], atol=1e-5)
