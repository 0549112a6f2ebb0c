"Suspects among the labels of a folder or a table: a CSV, a page, and soft labels that a training reads"
import html
import re

import numpy as np
import pandas as pd
import pytest
from browser import BROWSER, look_at
from PIL import Image

from fastai_smooth.cli import main
from fastai_smooth.compare import find_suspects, write_suspects
from fastai_smooth.data import corrupt_labels, digits_arrays, read_source

pytestmark = pytest.mark.filterwarnings('ignore')
N = 240


@pytest.fixture(scope='module')
def audit(tmp_path_factory):
    "Real digits in a folder per class, a tenth in the wrong one, with a name that would break a careless page, a rare class and a broken file"
    folder = tmp_path_factory.mktemp('audit')/'digits <b>&x'
    images, labels, _ = digits_arrays()
    noisy, _, flipped = corrupt_labels(labels[:N], .1, seed=0)
    for i, k in enumerate(noisy):
        (folder/f'n{k}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(folder/f'n{k}'/f'{i}.png')
    (folder/'rare').mkdir()
    Image.fromarray(images[0]).save(folder/'rare'/'a.png')
    (folder/'n3'/'broken.png').write_bytes(b'')
    return folder, {f'{i}.png' for i in np.flatnonzero(flipped)}


@pytest.mark.slow
def test_from_doubtful_labels_to_a_table_a_page_and_soft_labels(audit, tmp_path, capsys, monkeypatch):
    folder, wrong = audit
    monkeypatch.chdir(tmp_path)
    assert main(['labels', str(folder), '--skip-broken', '--out', 'suspects.csv', '--mix', '.3', '--epochs', '8', '--k', '3']) == 0
    out = capsys.readouterr().out
    assert "not judged, since they have fewer than 3 examples: 'rare' (1)" in out and 'suspects_relabelled.csv' in out
    table, soft = pd.read_csv('suspects.csv'), pd.read_csv('suspects_relabelled.csv')
    found = {f.rpartition('/')[2] for f in table['file']}
    assert list(table) == ['file', 'given', 'suggested', 'self_confidence'] and table.self_confidence.is_monotonic_increasing
    assert len(found & wrong) > .5*len(wrong) and len(found & wrong) > .5*len(found)
    for f, given in zip(table['file'], table['given']): assert f.rsplit('/', 2)[1] == given
    assert len(soft) == N and ((soft.iloc[:, 1:].max(1) < 1) == soft['file'].isin([f for f in soft['file'] if f.rpartition('/')[2] in found])).all()
    again = read_source('suspects_relabelled.csv', labels=list(soft)[1:], progress=False)
    np.testing.assert_allclose(again.shares(), soft.iloc[:, 1:], atol=1e-6)
    page = (tmp_path/'suspects.html').read_text()
    assert '<b>&x' not in page and not re.search(r'(?:src|href)="(?!data:)', page) and '<script' not in page
    assert '--skip-broken' in html.unescape(re.findall('<code>(.*?)</code>', page)[-1])
    if BROWSER:  # chromium, where it is installed
        said, log = look_at(page, 390, tmp_path)
        assert said['broken'] == 0 and said['images'] == min(len(table), 200)+1 and said['alt'] and said['width'] <= said['inner'] == 390 and not log


@pytest.mark.slow
def test_rows_and_texts_have_suspects_too(tmp_path):
    frame = pd.DataFrame(dict(text=['a good thing', 'a bad thing']*40, label=['+', '-']*40))
    frame.loc[4, 'label'] = '-'
    frame.to_csv(tmp_path/'t.csv', index=False)
    for data, column in ((tmp_path/'t.csv', 'text'), ('iris', 'row')):
        found = find_suspects(data, k=2, epochs=1, progress=False)
        assert list(found.table) == [column, 'given', 'suggested', 'self_confidence', 'item']
        files = write_suspects(found, tmp_path/f'{column}.csv')
        assert [f.suffix for f in files] == ['.csv', '.html']
    with pytest.raises(ValueError, match='without files'): found.relabelled()


@pytest.mark.parametrize('args, words', [
    ('digits --k 1', '--k must be at least 2'), ('digits --mix 2', '--mix must lie in [0, 1]'), ('digits --mix .3', '--mix writes a CSV'),
    ('nowhere', "Unknown data set 'nowhere'"), ('digits --out .', '--out . is there already'), ('digits --out no/a.csv', 'there is no folder no'),
    ('digit_masks', 'holds masks'), ('digits --delimiter ;', '--delimiter is for a CSV'), ('digits --k 900', 'smaller --k')])
def test_mistakes_are_one_line_and_write_nothing(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(['labels', *args.split()]) == 2
    err = capsys.readouterr().err.strip()
    assert words in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())
