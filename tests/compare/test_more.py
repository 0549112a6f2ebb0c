"compare on tables and several labels, with several strengths and processes, and its paired verdict"
import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from users_files import write_digits

from fastai_smooth.cli import main
from fastai_smooth.compare import Comparison, method_callbacks, verdict
from fastai_smooth.compare import each_method
from fastai_smooth.data import read_source

FAST = ['--epochs', '1', '--seeds', '2']


def write_csv(root, n=200, several=False, valid=False):
    "A CSV beside real digits: the digit, or everything that is true of it"
    labels = write_digits(root/'images', n, nested=False)
    files = {int(f.stem): f.relative_to(root).as_posix() for f in (root/'images').rglob('*.png')}
    tags = [' '.join(([['even', 'odd'][k % 2]] + (['small'] if k < 5 else []))*several) if several else str(k) for k in labels]
    table = pd.DataFrame({'file': [files[i] for i in range(n)], 'label': tags})
    if valid: table['is_valid'] = [i % 4 == 0 for i in range(n)]
    table.to_csv(root/'labels.csv', index=False)
    return labels


# -- several labels

def test_several_labels_end_to_end(tmp_path):
    write_csv(tmp_path, 300, several=True)
    out = tmp_path/'run'
    args = ['compare', str(tmp_path/'labels.csv'), '--delimiter', ' ', '--size', '16', '--bs', '32', '--methods', 'ce,ls,mixup+ls', '--epochs', '2',
            '--seeds', '2']
    assert main([*args, '--out', str(out)]) == 0
    s = json.loads((out/'summary.json').read_text())
    assert s['n_classes'] == 3 and s['n_valid'] == 60 and set(s['methods']) == {'ce', 'ls', 'mixup+ls'}
    for row in csv.DictReader((out/'runs.csv').open()):
        with np.load(out/'predictions'/f"{row['method']}-{row['seed']}.npz") as f: res = dict(f)
        z, y = torch.as_tensor(res['logits']).double(), torch.as_tensor(res['labels']).double()
        assert float(row['nll']) == pytest.approx(torch.nn.functional.binary_cross_entropy_with_logits(z, y).item(), rel=1e-6)
        assert float(row['accuracy']) == pytest.approx(((z > 0) == (y > .5)).double().mean().item())
        assert float(row['nll_ts']) < 1 and len(res['labels']) + len(res['fit_labels']) == 60
    assert main([*args, '--out', str(out), '--resume']) == 0


@pytest.mark.parametrize('args, words', [(['--noise', '.1'], 'noise'), (['--methods', 'ce,prior'], "'prior' spreads mass")])
def test_what_several_labels_do_not_have(args, words, tmp_path, capsys):
    assert main(['compare', 'multi_digits', *args, '--out', str(tmp_path/'x')]) == 2 and words in capsys.readouterr().err
    assert read_source('multi_digits').labels.shape == (2000, 10)


# -- strengths

def test_strengths():
    each = tuple(m.name for m in each_method(('ce', 'ls', 'mixup', 'mixup+ls', 'ols@.5'), [.1, .3], [0.]))
    assert each == ('ce', 'ls@0.1', 'ls@0.3', 'mixup', 'mixup+ls@0.1', 'mixup+ls@0.3', 'ols@.5')
    assert tuple(m.name for m in each_method(('ce', 'ls'), [.1], [0.])) == ('ce', 'ls')
    assert [cb.eps for cb in method_callbacks('mixup+ls@.3') if hasattr(cb, 'eps')] == [.3] and method_callbacks('ls', .2)[0].eps == .2
    for bad in ('ls@', 'ls@x', 'ls@2'):
        with pytest.raises(ValueError, match=r'ls@'): method_callbacks(bad)


def test_several_strengths_side_by_side(tmp_path):
    assert main(['compare', *FAST, '--methods', 'ce,ls', '--eps', '.1,.4', '--out', str(tmp_path/'run')]) == 0
    s = json.loads((tmp_path/'run'/'summary.json').read_text())
    assert list(s['methods']) == ['ce', 'ls@0.1', 'ls@0.4']
    one = Comparison('digits', ('ls@0.4',), epochs=1, seeds=2).run(progress=False)
    assert one['methods']['ls@0.4'] == s['methods']['ls@0.4']
    assert Comparison('digits', ('ls',), eps=.4, epochs=1, seeds=2).run(progress=False)['methods']['ls'] == one['methods']['ls@0.4']


# -- the paired verdict

def test_differences_are_paired():
    c = Comparison('digits', ('ce', 'ls'), epochs=1, seeds=3)
    c.run(progress=False)
    by = lambda m: np.array([r['nll_ts'] for r in c.rows if r['method'] == m])
    d, gap = c.differences()['ls']['nll_ts'], by('ls')-by('ce')
    low, high = stats.t.interval(.95, 2, gap.mean(), stats.sem(gap))
    assert d['mean'] == pytest.approx(gap.mean()) and d['ci95'] == pytest.approx((high-low)/2)


def test_a_paired_difference_is_seen_where_intervals_overlap():
    figures = {m: {k: dict(mean=v, ci95=.1) for k in ('accuracy', 'nll', 'ece', 'nll_ts', 'ece_ts')} for m, v in (('ce', .5), ('ls', .45))}
    differences = {'ls': {k: dict(mean=-.05, ci95=.01) for k in ('accuracy', 'nll', 'ece', 'nll_ts', 'ece_ts')}}
    assert 'No difference' in verdict(figures, 5) and 'ls beats ce' in verdict(figures, 5, differences)
    assert '-0.050 ± 0.010' in verdict(figures, 5, differences) and 'lower with ls' in verdict(figures, 5, differences)
    differences['ls']['nll_ts'] = dict(mean=-.05, ci95=.06)
    assert 'No difference' in verdict(figures, 5, differences)


# -- processes and interruptions

def test_jobs_give_the_same_figures(tmp_path):
    args = ['compare', *FAST, '--methods', 'ce,mixup+ls']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    for jobs in ('1', '2'):
        command = [sys.executable, '-m', 'fastai_smooth.cli', *args, '--jobs', jobs, '--out', str(tmp_path/jobs)]
        subprocess.run(command, check=True, capture_output=True, env=env)
    assert (tmp_path/'1'/'runs.csv').read_text() == (tmp_path/'2'/'runs.csv').read_text()
    assert (tmp_path/'1'/'summary.json').read_text() == (tmp_path/'2'/'summary.json').read_text()


def test_killed_and_resumed_is_the_same_as_uninterrupted(tmp_path):
    "kill -9 in the middle; meanwhile nobody else may use the folder"
    args = ['compare', '--epochs', '6', '--seeds', '6', '--methods', 'ce,ls']
    command = [sys.executable, '-W', 'ignore', '-m', 'fastai_smooth.cli', *args, '--out', str(tmp_path/'killed')]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    for _ in range(900):
        if list(tmp_path.glob('killed/predictions/*.npz')): break
        time.sleep(.1)
    second = subprocess.run([*command, '--resume'], capture_output=True, text=True, env=env)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert second.returncode == 2 and 'in use by another run' in second.stderr
    assert not (tmp_path/'killed'/'summary.json').exists()
    subprocess.run([*command, '--resume'], check=True, capture_output=True, env=env)
    subprocess.run([*command[:-1], str(tmp_path/'whole')], check=True, capture_output=True, env=env)
    for name in ('runs.csv', 'summary.json'): assert (tmp_path/'killed'/name).read_text() == (tmp_path/'whole'/name).read_text()


def test_a_full_disk_ends_in_one_line_and_keeps_the_rest(tmp_path, monkeypatch, capsys):
    keep, kept = Comparison._keep, []

    def fills_up(self, res, method, seed):
        if len(kept) == 2: raise OSError(28, 'No space left on device', str(self._file(method, seed)))
        kept.append((method, seed))
        return keep(self, res, method, seed)
    monkeypatch.setattr(Comparison, '_keep', fills_up)
    args = ['compare', *FAST, '--methods', 'ce,ls', '--out', str(tmp_path/'run')]
    assert main(args) == 2
    err = capsys.readouterr().err.strip()
    assert 'No space left' in err and 'ce-1.npz' in err and len(err.splitlines()) == 1
    assert len(list((tmp_path/'run'/'predictions').glob('*.npz'))) == 2 and len((tmp_path/'run'/'runs.csv').read_text().splitlines()) == 3
    monkeypatch.setattr(Comparison, '_keep', keep)
    assert main([*args, '--resume']) == 0


def test_a_run_that_came_first_keeps_its_folder(tmp_path):
    "Two runs look at the same empty folder; the second one to start does not overwrite what the first has noted"
    first, second = (Comparison('digits', ('ce',), epochs=1, seeds=1, eps=eps, out=tmp_path/'run') for eps in (.1, .2))
    first.run(progress=False)
    noted = (tmp_path/'run'/'config.json').read_text()
    with pytest.raises(ValueError, match='another run by now'): second.run(progress=False)
    assert (tmp_path/'run'/'config.json').read_text() == noted
    with pytest.raises(ValueError, match='eps is empty'): Comparison('digits', ('ce', 'ls'), eps=[])
