"Comparisons: what is shared, what is checked first, files, figures, resuming, stopping, processes"
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout

import numpy as np
import pandas as pd
import pytest
import torch
from users_files import write_digits

from fastai_smooth.cli import main
from fastai_smooth.compare import METRICS, Comparison, score, table
from fastai_smooth.run_folder import read_config

FAST = ['--epochs', '1', '--seeds', '2', '--methods', 'ce,ls']
CLI = [sys.executable, '-W', 'ignore', '-m', 'fastai_smooth.cli', 'compare']
pytestmark = pytest.mark.filterwarnings('ignore')


# -- files and figures

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "One run of the command: its folder, and what it printed"
    out = tmp_path_factory.mktemp('compare')/'run'
    with redirect_stdout(io.StringIO()) as printed: assert main(['compare', 'digits', *FAST, '--noise', '.2', '--eps', '.3', '--out', str(out)]) == 0
    return out, printed.getvalue()


@pytest.mark.slow
def test_files_and_figures(run):
    out, printed = run
    assert {p.name for p in out.iterdir() if p.name[0] != '.'} == {'config.json', 'predictions', 'reliability.png', 'report.html', 'runs.csv', 'summary.json'}
    rows = list(csv.DictReader((out/'runs.csv').open()))
    assert [(r['method'], r['seed']) for r in rows] == [('ce', '0'), ('ls', '0'), ('ce', '1'), ('ls', '1')]
    s = json.loads((out/'summary.json').read_text())
    assert list(s) == ['data', 'n_train', 'n_valid', 'n_classes', 'arch', 'epochs', 'seeds', 'noise', 'eps', 'methods', 'verdict']
    assert (s['data'], s['n_train'], s['n_valid'], s['n_classes'], s['seeds'], s['noise'], s['eps']) == ('digits', 1437, 360, 10, 2, .2, .3)
    for m in ('ce', 'ls'):
        assert list(s['methods'][m]) == METRICS
        for k in METRICS:  # the summary follows from the rows
            a, b = (float(r[k]) for r in rows if r['method'] == m)
            assert s['methods'][m][k]['mean'] == pytest.approx((a+b)/2) and s['methods'][m][k]['ci95'] == pytest.approx(12.7062*abs(a-b)/2, rel=1e-4)
    for r in rows:  # the rows follow from the predictions, of every validation image once
        with np.load(out/'predictions'/f"{r['method']}-{r['seed']}.npz") as f: res = dict(f)
        assert len(res['labels']) == len({*res['items'].tolist()}) == 360
        figures = score(res['logits'], res['labels'], res['items'])
        assert all(float(r[k]) == pytest.approx(figures[k], abs=1e-9) for k in METRICS)
    assert (out/'reliability.png').read_bytes().startswith(b'\x89PNG') and 'data:image/png;base64' in (out/'report.html').read_text()
    assert s['verdict'] in printed and table(s) in printed
    places = [printed.index(words) for words in ('1437 for training, 360 for validation', 'label noise, in training only: 0.2', '| method')]
    assert places == sorted(places), "what was understood is said first"
    assert read_config(out)['looks'] == [2]


@pytest.mark.slow
@pytest.mark.processes
def test_a_second_look_is_counted_and_said(run, tmp_path):
    out = tmp_path/'run'
    shutil.copytree(run[0], out)
    command = ['compare', 'digits', *FAST, '--noise', '.2', '--eps', '.3', '--out', str(out), '--resume']
    assert main(command) == 0
    s = json.loads((out/'summary.json').read_text())
    assert read_config(out)['looks'] == [2] and 'look' not in s['verdict'], "the same seeds are the same look"
    (out/'config.json').write_text(json.dumps({**read_config(out), 'looks': [1]}))
    assert main(command) == 0
    assert 'This is look 2 at these runs (before: 1 seed)' in json.loads((out/'summary.json').read_text())['verdict'] and read_config(out)['looks'] == [1, 2]


# -- what runs share

def labels_of(learn, i): return [int(y) for y in learn.dls[i].dataset.tls[1]]


def test_noise_is_in_the_training_labels_only():
    noisy, clean = (Comparison('digits', ('ce',), noise=noise).learner('ce', 0) for noise in (.5, 0.))
    assert .4 < (np.array(labels_of(noisy, 0)) != labels_of(clean, 0)).mean() < .6 and labels_of(noisy, 1) == labels_of(clean, 1)


def test_confusable_noise():
    c = Comparison('digits', ('ce',), noise=.5, pairs='4:9,9:4')
    noisy, true = (labels_of(x.learner('ce', 0), 0) for x in (c, Comparison('digits', ('ce',))))
    changed = [(a, b) for a, b in zip(true, noisy) if a != b]
    assert set(changed) == {(4, 9), (9, 4)} and 100 < len(changed) < 190
    share = .5*np.isin(c.source.labels, [4, 9]).mean()
    assert '--pairs' in c.arguments() and f'0.5 of the classes in pairs, {share:.1%} of all labels' in c.describe()
    for bad in ('4-9', '4', 'a:b', '3:12', '4:4'):
        with pytest.raises(ValueError, match='pairs|4:4'): Comparison('digits', ('ce',), noise=.5, pairs=bad)


def test_methods_share_split_weights_and_order():
    c = Comparison('digits', ('ce', 'ls'))
    batches = []
    for m in ('ce', 'ls'):
        learn = c.learner(m, 1)
        batches.append((learn.dls.train.one_batch()[1], torch.cat([p.flatten() for p in learn.model.parameters()]), learn.dls.train_ds.items))
    (a, b, items), (x, y, others) = batches
    assert torch.equal(a, x) and torch.equal(b, y) and items == others != c.learner('ce', 2).dls.train_ds.items


def test_same_seeds_same_figures_and_fresh_ones_are_others():
    a, b = (Comparison('iris', ('ls',), epochs=1, seeds=2).run(progress=False) for _ in range(2))
    assert a == b
    fresh = Comparison('iris', ('ls',), epochs=1, seeds=1, seed0=1)
    fresh.run(progress=False)
    assert [r['seed'] for r in fresh.rows] == [1] and fresh.config['seed0'] == 1


def test_a_batch_of_one_is_left_out():
    "1437 images in batches of 4 leave one over, with which fastai's MixUp cannot work"
    learn = Comparison('digits', ('mixup',), bs=4).learner('mixup', 0)
    assert 1437 % 4 == 1 and len(learn.dls.train) == 1437//4


def test_a_learning_rate_is_found_for_each_method(tmp_path, monkeypatch):
    "As lr_find suggests it with the first seed, once, noted in the folder; the trainings are those with this rate"
    monkeypatch.chdir(tmp_path)
    settings = dict(methods=('ce', 'ls'), epochs=1, seeds=1, lr='find', seed0=3)
    comparison = Comparison('wine', out=tmp_path/'run', **settings)
    comparison.run(progress=False)
    rates = read_config(tmp_path/'run')['rates']
    for method in ('ce', 'ls'):
        learn = Comparison('wine', ('ce', 'ls'), epochs=1).learner(method, 3)
        learn.path = tmp_path/'here'
        assert rates[method] == pytest.approx(learn.lr_find(show_plot=False).valley, rel=1e-6)
        alike = Comparison('wine', ('ce', 'ls'), epochs=1, lr=rates[method]).train(method, 3)
        np.testing.assert_array_equal(comparison.predictions[method, 3]['logits'], alike['logits'])
    assert 'learning rates as found: ce ' in comparison.describe()
    assert not (tmp_path/'models').exists()
    page = (tmp_path/'run'/'report.html').read_text(encoding='utf-8')
    assert 'learning rates as found: ce ' in page and 'All methods have the same epochs. ' in page
    marked = dict(rates, ce=1e-4) # a rate that no search gives: it is read, not found anew
    config = read_config(tmp_path/'run')
    (tmp_path/'run'/'config.json').write_text(json.dumps(config | dict(rates=marked)), encoding='utf-8')
    again = Comparison('wine', out=tmp_path/'run', resume=True, **settings | dict(seeds=2))
    again.run(progress=False)
    assert again.rates == marked and read_config(tmp_path/'run')['rates'] == marked
    assert 'learning rate to be found' in Comparison('wine', **settings).describe()


def test_no_learning_rate_where_the_loss_is_nan(tmp_path):
    comparison = Comparison('digits', ('ce',), lr='find')
    network = comparison._network()
    for p in network.parameters(): torch.nn.init.constant_(p, torch.nan)
    torch.save(network.state_dict(), tmp_path/'nan.pth')
    with pytest.raises(ValueError, match='No learning rate can be found for ce'):
        Comparison('digits', ('ce',), lr='find', weights=str(tmp_path/'nan.pth')).run(progress=False)


def test_each_strength_is_a_method():
    both, one = (Comparison('iris', ('ce', 'ls'), eps=eps, epochs=1, seeds=2) for eps in ([.1, .4], .4))
    s = both.run(progress=False)
    assert list(s['methods']) == ['ce', 'ls@0.1', 'ls@0.4'] and 'differ only in ε' in s['verdict']
    assert one.run(progress=False)['methods']['ls'] == s['methods']['ls@0.4']


# -- what is checked before anything runs

@pytest.mark.parametrize('args, words', [
    (['imagenette'], 'digits, mnist5k'), (['--methods', 'ce,magic'], "Unknown method 'magic'"), (['--methods', 'ce,ce'], 'twice'),
    (['--arch', 'vit_tiny_patch16_224'], 'another --size'), (['--out', '/proc/no/such'], '/proc/no'), (['--methods', ''], 'Unknown method'),
    (['--arch', 'resnet_18'], 'resnet18'), (['--eps', '1.5'], r'eps must lie in [0, 1]'), (['--noise', '1'], 'noise must lie in [0, 1)'),
    (['--epochs', '0'], 'epochs must be at least 1'), (['--bs', '99999'], 'training images'), (['--valid_pct', '1'], 'valid_pct'),
    (['--valid_pct', '.001'], 'valid_pct'), (['--size', '2'], 'size'), (['--weights', 'nowhere.pth'], 'nowhere.pth'), (['--resume'], '--out')])
def test_mistakes_are_one_line_and_write_nothing(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try: code = main(['compare', *args])
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and words in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_learning_rate_is_a_number_or_to_be_found():
    with pytest.raises(ValueError, match="lr must be a number or 'find', but got 'fast'"): Comparison('iris', lr='fast')


def test_empty_strengths():
    with pytest.raises(ValueError, match='eps is empty'): Comparison('digits', ('ce', 'ls'), eps=[])


def test_results_inside_the_data_are_refused(tmp_path):
    write_digits(tmp_path, 100, nested=False)
    with pytest.raises(ValueError, match='lies inside the data folder'): Comparison(tmp_path, ('ce',), size=8, bs=8, out=tmp_path/'results')
    assert Comparison(tmp_path, ('ce',), size=8, bs=8, out=tmp_path/'fastai_smooth_runs'/'a').n_train == 80, "which readers leave out"


@pytest.mark.slow
def test_the_best_epoch_of_cross_entropy():
    "Of a training that is still learning, that is the last"
    c = Comparison('digits', ('ce', 'ce@best'), epochs=2, seeds=1)
    best, last = (c.train(m, 0) for m in ('ce@best', 'ce'))
    np.testing.assert_allclose(best['logits'], last['logits'], atol=1e-5)
    assert (best['items'] == last['items']).all() and not best['diverged']


def test_rare_classes_are_named_and_not_refused(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(120, 3)), columns=list('abc'))
    frame['label'] = ['x', 'y']*58+['rare']*3+['once']
    frame.to_csv(tmp_path/'t.csv', index=False)
    c = Comparison(tmp_path/'t.csv', ('ce', 'ls'), epochs=1, seeds=2, bs=16)
    assert "Warning: 2 of 4 classes have fewer than two validation examples in some split: 'once' (0 of 1), 'rare' (" in c.describe()
    assert set(c.run(progress=False)['methods']) == {'ce', 'ls'}


# -- folders and interruptions

def test_folder_of_another_run(tmp_path, capsys):
    (tmp_path/'notes.txt').write_text('mine')
    assert main(['compare', 'iris', *FAST, '--out', str(tmp_path)]) == 2
    assert 'holds another run' in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ['notes.txt']
    (tmp_path/'config.json').write_text(json.dumps({**Comparison('iris', epochs=1).config, 'eps': .2}))
    with pytest.raises(ValueError, match=r'eps=0.2 \(here 0.1\)'): Comparison('iris', ('ce', 'ls'), epochs=1, out=tmp_path, resume=True)


def test_a_run_that_came_first_keeps_its_folder(tmp_path):
    first, second = (Comparison('iris', ('ce',), epochs=1, seeds=1, eps=eps, out=tmp_path/'run') for eps in (.1, .2))
    first.run(progress=False)
    noted = (tmp_path/'run'/'config.json').read_text()
    with pytest.raises(ValueError, match='another run by now'): second.run(progress=False)
    assert (tmp_path/'run'/'config.json').read_text() == noted


@pytest.mark.slow
def test_resume_after_a_stop(tmp_path, monkeypatch):
    "Finished runs are kept, a damaged file is done again, and the figures are those of one go"
    make = lambda out=None, resume=False: Comparison('iris', ('ce', 'ls'), epochs=1, seeds=2, out=out, resume=resume)
    whole, out, trained, train = make().run(progress=False), tmp_path/'run', [], Comparison.train

    def stops(self, method, seed):
        if len(trained) == 2: raise KeyboardInterrupt
        trained.append((method, seed))
        return train(self, method, seed)
    monkeypatch.setattr(Comparison, 'train', stops)
    with pytest.raises(KeyboardInterrupt): make(out).run(progress=False)
    assert len((out/'runs.csv').read_text().splitlines()) == 3
    damaged = out/'predictions'/'ce-0.npz'
    damaged.write_bytes(damaged.read_bytes()[:500])
    trained.clear()
    monkeypatch.setattr(Comparison, 'train', lambda self, m, s: trained.append((m, s)) or train(self, m, s))
    make(out, True).run(progress=False)
    assert trained == [('ce', 0), ('ce', 1), ('ls', 1)] and json.loads((out/'summary.json').read_text()) == whole


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_keeps_the_rest(tmp_path, monkeypatch, capsys):
    keep, kept = Comparison._keep, []

    def fills_up(self, res, method, seed):
        if len(kept) == 2: raise OSError(28, 'No space left on device', str(self._file(method, seed)))
        kept.append((method, seed))
        return keep(self, res, method, seed)
    monkeypatch.setattr(Comparison, '_keep', fills_up)
    args = ['compare', 'iris', *FAST, '--out', str(tmp_path/'run')]
    assert main(args) == 2
    err = capsys.readouterr().err.strip()
    assert 'No space left' in err and 'ce-1.npz' in err and len(err.splitlines()) == 1
    assert len(list((tmp_path/'run'/'predictions').glob('*.npz'))) == 2 and len((tmp_path/'run'/'runs.csv').read_text().splitlines()) == 3
    monkeypatch.setattr(Comparison, '_keep', keep)
    assert main([*args, '--resume']) == 0


@pytest.mark.slow
def test_several_labels_end_to_end(tmp_path):
    labels = write_digits(tmp_path/'images', 300, nested=False)
    files = {int(f.stem): f.relative_to(tmp_path).as_posix() for f in (tmp_path/'images').rglob('*.png')}
    tags = [' '.join([['even', 'odd'][k % 2]]+(['small'] if k < 5 else [])) for k in labels]
    pd.DataFrame({'file': [files[i] for i in range(300)], 'label': tags}).to_csv(tmp_path/'labels.csv', index=False)
    c = Comparison(tmp_path/'labels.csv', ('ce', 'mixup+ls'), delimiter=' ', size=16, bs=32, epochs=2, seeds=2)
    s = c.run(progress=False)
    assert s['n_classes'] == 3 and s['n_valid'] == 60 and 'against ce' in s['verdict']
    for row in c.rows:
        z, y = (torch.as_tensor(c.predictions[row['method'], row['seed']][k]).double() for k in ('logits', 'labels'))
        assert row['nll'] == pytest.approx(torch.nn.functional.binary_cross_entropy_with_logits(z, y).item(), rel=1e-6)
        assert row['accuracy'] == pytest.approx(((z > 0) == (y > .5)).double().mean().item()) and len(y) == 60


# -- processes

@pytest.fixture
def one_thread():
    "As the processes of a comparison have: sums in another order are other sums"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def same_results(one, other):
    for name in ('runs.csv', 'summary.json'): assert (one/name).read_text() == (other/name).read_text()


@pytest.mark.slow
@pytest.mark.processes
def test_jobs_give_the_same_figures(tmp_path, one_thread):
    for jobs in ('1', '2'): assert main(['compare', 'iris', *FAST, '--jobs', jobs, '--out', str(tmp_path/jobs)]) == 0
    same_results(tmp_path/'1', tmp_path/'2')


@pytest.mark.slow
@pytest.mark.processes
def test_killed_and_resumed_is_the_same_as_uninterrupted(tmp_path, one_thread):
    "kill -9 in the middle; meanwhile nobody else may use the folder"
    args = ['iris', '--epochs', '3', '--seeds', '4', '--methods', 'ce,ls', '--out']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    run = subprocess.Popen([*CLI, *args, str(tmp_path/'killed')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    for _ in range(3000):
        if list(tmp_path.glob('killed/predictions/*.npz')): break
        time.sleep(.02)
    run.send_signal(signal.SIGSTOP) # so that it is not done before the next line is
    with pytest.raises(ValueError, match='in use by another run'):
        with Comparison('iris', ('ce', 'ls'), epochs=3, seeds=4, out=tmp_path/'killed', resume=True)._folder.claim(): pass
    run.kill()
    run.wait()
    assert not (tmp_path/'killed'/'summary.json').exists()
    for name, more in (('killed', ['--resume']), ('whole', [])): assert main(['compare', *args, str(tmp_path/name), *more]) == 0
    same_results(tmp_path/'killed', tmp_path/'whole')
