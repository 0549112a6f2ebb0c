"accelerate launch -m fastai_smooth.cli train: the same command on two processes"
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.learner import load_learner

from fastai_smooth.cli import main
from fastai_smooth.train import recipe, register

# --multi_gpu stands for torch's launcher, which starts two processes without a GPU as well; --cpu alone starts one
LAUNCH = [sys.executable, '-W', 'ignore', '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1',
          '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']


def launch(*args):
    "Run something on two processes on the CPU"
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONWARNINGS': 'ignore',
           'PYTHONPATH': os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get('PYTHONPATH', '')])}
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'): env.pop(name, None)
    return subprocess.run([*LAUNCH, *map(str, args)], env=env, capture_output=True, text=True, timeout=300)


def said(done): return [line for line in done.stderr.splitlines() if line.startswith('fastai-smooth')]


class Watch(Callback):
    "How MixUp mixes"
    run_valid = False
    def before_fit(self): self.shares = []
    def after_pred(self): self.shares.append(self.learn.mix_up.lam.flatten().clone())


def worker(out):
    "On each of two processes: mistakes, then a training, and what this process has of it"
    out, rank = Path(out), os.environ['RANK']
    mistakes = ['train', 'resnet'], ['train', 'finetune', 'nowhere'], ['compare', 'digits']
    with patch('fastai_smooth.cli.time'): # they go on here, and need not wait for each other
        codes = [main([*args, '--out', f'{out}/none']) for args in mistakes]
    digits, watch, kept = recipe('digits'), Watch(), []

    def make_learner(dls, s):
        learn = digits.make_learner(dls, s)
        learn.add_cbs([MixUp(), watch])
        kept.append(learn)
        return learn
    register('mixed', 'digits with MixUp', {k: (v, '') for k, v in digits.settings.items()}, digits.make_dls, make_learner, digits.train)
    codes += [main(['train', 'mixed', '--epochs', '2', '--out', f'{out}/run'])]
    torch.save(dict(codes=codes, state=kept[0].model.state_dict(), shares=watch.shares, model=type(kept[0].model).__name__,
                    callbacks=[cb.name for cb in kept[0].cbs],
                    again=main(['train', 'mixed', '--epochs', '2', '--out', f'{out}/run'])), out/f'rank{rank}.pt')


@pytest.fixture(scope='module')
def command(tmp_path_factory):
    out = tmp_path_factory.mktemp('launch')/'run'
    return out, launch('-m', 'fastai_smooth.cli', 'train', 'digits', '--epochs', 2, '--out', out)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_print_and_write_once(command):
    out, done = command
    assert done.returncode == 0, done.stderr[-3000:]
    files = ['README.md', 'config.json', 'learner.pkl', 'metrics.csv', 'reliability.png', 'report.html', 'safe', 'summary.json']
    assert sorted(p.name for p in out.iterdir() if p.name != '.lock') == files
    assert json.loads((out/'summary.json').read_text())['processes'] == 2
    for words in ('as trained', 'after temperature', 'Learner:', 'train_loss'): assert done.stdout.count(words) == 1
    assert not done.stderr.strip()


@pytest.mark.slow
@pytest.mark.processes
def test_figures_of_two_processes_are_those_of_one_with_the_same_weights(command):
    out, _ = command
    s, rows = json.loads((out/'summary.json').read_text()), list(csv.DictReader((out/'metrics.csv').open()))
    assert [(row['fit'], row['epoch']) for row in rows] == [('0', '0'), ('0', '1')]
    for name in ('accuracy', 'ece', 'nll'): assert float(rows[-1][name]) == pytest.approx(s['as_trained'][name], rel=1e-5)
    learn = load_learner(out/'learner.pkl')
    assert learn.logger is print and not len(learn.dls.train_ds) and learn.temperature == pytest.approx(s['temperature'])
    dls = recipe('digits').dls()
    learn.dls = dls
    with learn.no_bar(), learn.no_logging(): label, _, p = learn.predict(0)
    assert label in dls.vocab and abs(p.sum()-1) < 1e-5
    with learn.no_bar(): p, y = learn.get_preds(dl=dls.valid)
    assert (p.argmax(1) == y).float().mean().item() == pytest.approx(s['after_temperature']['accuracy'])
    assert -p[range(len(y)), y].log().mean().item() <= s['after_temperature']['nll']+1e-3


@pytest.mark.slow
@pytest.mark.processes
def test_both_have_the_same_weights_and_mix_in_their_own_way(tmp_path):
    done = launch(__file__, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    words = 'there are pets', 'nowhere', 'one process', 'holds this run'
    assert len(said(done)) == 4 and all(w in line for w, line in zip(words, said(done)))
    ranks = [torch.load(tmp_path/f'rank{r}.pt') for r in (0, 1)]
    learn = load_learner(tmp_path/'run'/'learner.pkl')
    trained = {k: t*learn.temperature if k.startswith('6.') else t for k, t in learn.model.state_dict().items()} # the last layer was divided by it
    for r in ranks:
        assert r['codes'] == [2, 2, 2, 0] and r['again'] == 2 and r['model'] == 'Sequential' and 'distributed_trainer' not in r['callbacks']
        assert len(r['shares']) == 22, "1,437 images, 64 to each of the two in a step: 11 steps, two epochs"
        assert r['state'].keys() == trained.keys()
        for name, t in trained.items(): torch.testing.assert_close(r['state'][name], t, msg=name)
    assert not any(torch.equal(a, b) for a, b in zip(*(r['shares'] for r in ranks)))
    assert not (tmp_path/'none').exists()


@pytest.mark.slow
@pytest.mark.processes
def test_an_unknown_recipe_stops_all_with_one_line():
    done = launch('-m', 'fastai_smooth.cli', 'train', 'resnet')
    assert done.returncode and len(said(done)) == 1 and 'there are pets' in said(done)[0] and not done.stdout.strip()


if __name__ == '__main__': worker(*sys.argv[1:])
