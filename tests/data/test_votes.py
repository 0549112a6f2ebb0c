"A CSV of votes, or of columns with counts or probabilities: as targets of a comparison and of a training"
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fastai_smooth.cli import main
from fastai_smooth.compare import Comparison
from fastai_smooth.data import TensorSoftCategory, digits_arrays, read_source
from fastai_smooth.train import recipe

pytestmark = pytest.mark.filterwarnings('ignore')
NAMES = [f'n{k}' for k in range(10)]


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    "120 digits, three votes each, of which 30% are drawn anew: as cells, as counts, as probabilities; and texts"
    folder, (images, labels, _), rng = tmp_path_factory.mktemp('votes'), digits_arrays(), np.random.default_rng(0)
    votes = np.stack([np.where(rng.random(120) < .3, rng.integers(0, 10, 120), labels[:120]) for _ in range(3)], 1)
    counts = np.stack([(votes == k).sum(1) for k in range(10)], 1)
    for i in range(120): Image.fromarray(images[i]).save(folder/f'{i}.png')
    files = dict(file=[f'{i}.png' for i in range(120)])
    cells = [';'.join(f'n{k}' for k in row) for row in votes]
    pd.DataFrame(dict(files, votes=cells)).to_csv(folder/'votes.csv', index=False)
    pd.DataFrame(dict(files, **dict(zip(NAMES, counts.T)))).to_csv(folder/'counts.csv', index=False)
    pd.DataFrame(dict(files, **dict(zip(NAMES, (counts/3).T)))).to_csv(folder/'shares.csv', index=False)
    pd.DataFrame(dict(text=[f'a text on {k}' for k in labels[:120]], label=cells)).to_csv(folder/'texts.csv', index=False)
    return folder, counts


@pytest.mark.parametrize('name, how, total', [
    ('votes', dict(votes=';'), 3), ('counts', dict(labels=NAMES), 3), ('counts', dict(labels=','.join(NAMES)), 3), ('shares', dict(labels=NAMES), 1)])
def test_every_form_is_the_same_votes(name, how, total, desk):
    folder, counts = desk
    data = read_source(folder/f'{name}.csv', progress=False, **how)
    assert data.vocab == NAMES and not data.several
    np.testing.assert_allclose(data.votes, counts*total/3)
    np.testing.assert_array_equal(data.labels, counts.argmax(1))
    np.testing.assert_allclose(data.shares(), counts/3)
    np.testing.assert_allclose(data.shares(.5), (data.votes+.5)/(total+5))
    assert any(f'{total} votes per example' in note for note in data.notes)
    train, valid = data.splits()
    y = data.dls(data.shares(), (train, valid), 8).valid.one_batch()[1]
    assert isinstance(y, TensorSoftCategory)
    np.testing.assert_allclose(y.numpy(), counts[valid][:16]/3, rtol=1e-6)


def test_a_broken_file_takes_its_votes_with_it(desk, tmp_path):
    folder, counts = desk
    for f in folder.iterdir(): (tmp_path/f.name).write_bytes(f.read_bytes())
    (tmp_path/'7.png').write_bytes(b'')
    data = read_source(tmp_path/'votes.csv', votes=';', skip_broken=True, progress=False)
    np.testing.assert_array_equal(data.votes, np.delete(counts, 7, 0))
    assert data.fingerprint() != read_source(folder/'votes.csv', votes=';', progress=False).fingerprint()


@pytest.mark.parametrize('text, how, words', [
    ('file,label\n0.png,a;b\n1.png,b', dict(votes=','), "has ',' between votes"), ('file,label\n0.png,a;a\n1.png,a', dict(votes=';'), 'name 1 class'),
    ('file,label\n0.png,a;b\n1.png,', dict(votes=';'), 'no label in row 2'),
    ('file,a,b\n0.png,.5,.4\n1.png,1,0', dict(labels='a,b'), r'0.5, 0.4|.5, .4 in row 1'),
    ('file,a,b\n0.png,1,x\n1.png,1,0', dict(labels='a,b'), '1, x in row 1'), ('file,a,b\n0.png,-1,2\n1.png,1,0', dict(labels='a,b'), '-1, 2'),
    ('file,a,b\n0.png,0,0\n1.png,1,0', dict(labels='a,b'), '0, 0 in row 1'), ('file,a,b\n0.png,1,0', dict(labels='a,c'), "no column 'c'"),
    ('file,a,b\n0.png,1,0', dict(labels='a'), 'two columns'), ('file,a,b\n0.png,1,0', dict(labels='a,b', votes=';'), 'leave one out'),
    ('file,a,b\n0.png,1,0', dict(labels='a,b', target='a'), 'leave one out'), ('x,a,b\n1,1,0', dict(labels='a,b'), 'votes are for files or texts'),
    ('file,label\n0.png,a;b\n1.png,b;a', {}, "--votes ';'")])
def test_votes_that_are_none(text, how, words, desk):
    file = desk[0]/'wrong.csv'
    file.write_text(text)
    with pytest.raises(ValueError, match=words): read_source(file, progress=False, **how)


@pytest.mark.slow
def test_what_each_method_trains_on(desk):
    "The majority label, the votes, or the votes and some in advance; validation labels are the votes for all of them"
    folder, counts = desk
    c = Comparison(folder/'votes.csv', votes=';', eps=.2, epochs=1, seeds=1, bs=96)
    assert c.methods == ('ce', 'votes', 'votes+dirichlet')
    train, valid = c.source.splits(.2, 0)
    expected = {'ce': np.eye(10)[counts.argmax(1)], 'votes': counts/3, 'votes+dirichlet': (counts+.2)/5}
    for method, q in expected.items():
        dls = c.learner(method, 0).dls
        np.testing.assert_allclose(np.sort(dls.train.one_batch()[1].numpy(), 0), np.sort(q[train], 0), rtol=1e-6)
        np.testing.assert_allclose(torch.cat([y for _, y in dls.valid]).numpy(), (counts/3)[valid], rtol=1e-6)
    res = c.train('votes', 0)
    q, z = (counts/3)[valid], torch.as_tensor(res['logits']).double()
    figures = c.run(progress=False)['methods']['votes']
    assert figures['nll']['mean'] == pytest.approx(float(-(torch.as_tensor(q)*z.log_softmax(1)).sum(1).mean()), rel=1e-5)
    assert figures['accuracy']['mean'] == pytest.approx(q[np.arange(len(q)), z.argmax(1)].mean())
    with pytest.raises(ValueError, match='needs votes'): Comparison('digits', ('votes',))
    with pytest.raises(ValueError, match='Unknown method'): Comparison(folder/'votes.csv', ('dirichlet',), votes=';')
    with pytest.raises(ValueError, match='votes or masks'): Comparison(folder/'votes.csv', noise=.1, votes=';')


@pytest.mark.slow
def test_from_a_csv_of_votes_to_a_trained_model_with_two_commands(desk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [str(desk[0]/'counts.csv'), '--labels', ','.join(NAMES), '--epochs', '1']
    assert main(['compare', *args, '--seeds', '1', '--methods', 'votes,votes+dirichlet+mixup', '--out', 'compared']) == 0
    noted = json.loads((tmp_path/'compared'/'config.json').read_text())
    assert noted['labels'] == NAMES and 'What the loss sees' in (tmp_path/'compared'/'report.html').read_text()
    assert main(['train', 'text', str(desk[0]/'texts.csv'), '--votes', ';', '--epochs', '1', '--out', 'trained']) == 0
    assert json.loads((tmp_path/'trained'/'summary.json').read_text())['n_train'] == 96
    dls = recipe('finetune').dls(desk[0]/'votes.csv', votes=';', presize=20, size=16)
    assert isinstance(dls.one_batch()[1], TensorSoftCategory) and '3 votes per example' in dls.described


def test_data_without_votes_have_no_shares():
    with pytest.raises(ValueError, match='digits has no votes'): read_source('digits').shares()
