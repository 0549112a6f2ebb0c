"A training that dies anywhere goes on and ends with the same weights, bit for bit"
import csv
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import fine_tune, fit_one_cycle, lr_find  # noqa: F401
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from photos import QUICK, write_digits

from fastai_smooth.callback import LabelSmoothing, OneOf
from fastai_smooth.cli import main
from fastai_smooth.data import digits, small_convnet
from fastai_smooth.distributions import Online
from fastai_smooth.train import Checkpoints, read_checkpoint, train, write_checkpoint

CLI = [sys.executable, '-W', 'ignore', '-m', 'fastai_smooth.cli']
pytestmark = pytest.mark.filterwarnings('ignore:The temperature')


class Dies(Callback):
    "Dies at an event of an epoch of a fit"
    order = 95
    def __init__(self, event, fit, epoch, batch=0): self.place = event, fit, epoch, batch
    def after_batch(self):
        if self.training and self.place == ('after_batch', self.learn.checkpoints.fits, self.epoch, self.iter): raise KeyboardInterrupt
    def after_epoch(self):
        if self.place[:3] == ('after_epoch', self.learn.checkpoints.fits, self.epoch): raise KeyboardInterrupt


class Rolls(Callback):
    "Draws from all generators, and keeps what it drew"
    def before_fit(self): self.drawn = getattr(self, 'drawn', [])
    def before_batch(self):
        if self.training: self.drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002


def learner(file, *cbs):
    set_seed(3, reproducible=True)
    return Learner(digits(bs=256), small_convnet(1, 10, 8), loss_func=CrossEntropyLossFlat(), metrics=accuracy,
                   cbs=[LabelSmoothing(.2, Online(10)), OneOf(MixUp(), CutMix()), Rolls(), Checkpoints(file), *cbs],
                   splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())])


def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(3, 1e-2, 2)
    return learn


def same(a, b):
    for (name, x), (other, y) in zip(a.model.state_dict().items(), b.model.state_dict().items(), strict=True): assert name == other and torch.equal(x, y)
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        for k in a.opt.state[p]: assert torch.equal(torch.as_tensor(a.opt.state[p][k]), torch.as_tensor(b.opt.state[q][k])), k
    assert [r[:-1] for r in a.checkpoints.rows] == [r[:-1] for r in b.checkpoints.rows]
    assert a.recorder.values == b.recorder.values and a.recorder.lrs == b.recorder.lrs and a.recorder.losses == [torch.as_tensor(v) for v in b.recorder.losses]
    assert torch.equal(a.label_smoothing.dist.matrix(10), b.label_smoothing.dist.matrix(10))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    learn = fit(learner(tmp_path_factory.mktemp('w')/'checkpoint.pt'))
    return learn, (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002


@pytest.mark.slow
@pytest.mark.parametrize('place', [('after_batch', 0, 0, 2), ('after_epoch', 0, 1, 0), ('after_batch', 1, 0, 1), ('after_batch', 1, 2, 4),
                                   ('after_epoch', 1, 2, 0)])
def test_dead_and_gone_on(place, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt): fit(learner(tmp_path/'c.pt', Dies(*place)))
    learn = fit(learner(tmp_path/'c.pt'))
    same(whole[0], learn)
    drawn, all_drawn = learn.rolls.drawn, whole[0].rolls.drawn
    assert drawn == all_drawn[len(all_drawn)-len(drawn):]
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == whole[1]  # noqa: NPY002
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)


def test_dead_twice(whole, tmp_path):
    for place in (('after_batch', 0, 1, 1), ('after_batch', 1, 1, 1)):
        with pytest.raises(KeyboardInterrupt): fit(learner(tmp_path/'c.pt', Dies(*place)))
    same(whole[0], fit(learner(tmp_path/'c.pt')))


def test_a_finished_training_is_put_back(whole, tmp_path):
    fit(learner(tmp_path/'c.pt'))
    learn = learner(tmp_path/'c.pt')
    fit(learn)
    same(whole[0], learn)
    assert not learn.rolls.drawn, "no batch was trained"


def test_lr_find_is_not_a_fit(tmp_path):
    learn = learner(tmp_path/'c.pt')
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    assert learn.checkpoints.fits == -1 and not (tmp_path/'c.pt').exists()
    with learn.no_bar(): learn.get_preds()
    assert learn.checkpoints.fits == -1


@pytest.mark.slow
@pytest.mark.parametrize('damage', [lambda b: b[:-1], lambda b: b'', lambda b: b[:100]+bytes([b[100] ^ 1])+b[101:]])
def test_what_is_damaged_is_not_read(damage, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt): fit(learner(tmp_path/'c.pt', Dies('after_batch', 1, 1)))
    (tmp_path/'c.pt').write_bytes(damage((tmp_path/'c.pt').read_bytes()))
    with pytest.warns(UserWarning, match='c.pt is damaged'): learn = fit(learner(tmp_path/'c.pt'))
    same(whole[0], learn)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, ('echo evil',)
    write_checkpoint(tmp_path/'c.pt', dict(x=Evil()))
    with pytest.raises(Exception, match='Weights only load failed'): read_checkpoint(tmp_path/'c.pt')


def test_nothing_is_shown_of_what_is_skipped(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt): fit(learner(tmp_path/'c.pt', Dies('after_batch', 1, 1)))
    learn = learner(tmp_path/'c.pt')
    capsys.readouterr()
    with learn.no_bar(): learn.fine_tune(3, 1e-2, 2)
    lines = [eval(line.replace('00:0', '0:')[:line.rindex(',')]+']') for line in capsys.readouterr().out.strip().splitlines()]
    assert [line[0] for line in lines] == [1, 2]


@pytest.mark.slow
@pytest.mark.processes
def test_killed_anywhere_and_resumed(tmp_path):
    "kill -9 at two moments, the second an epoch later or more; the folder is then that of a run that nobody disturbed"
    args = ['train', 'digits', '--epochs', '12', '--out', str(tmp_path/'run')]
    env, rows = {**os.environ, 'OMP_NUM_THREADS': '1'}, 0
    for _ in range(2):
        process = subprocess.Popen([*CLI, *args, *(['--resume'] if rows else [])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
        for _ in range(1200):
            found = len((tmp_path/'run'/'metrics.csv').read_text().splitlines())-1 if (tmp_path/'run'/'metrics.csv').exists() else 0
            if found > rows+1 or process.poll() is not None: break
            time.sleep(.02)
        process.kill()
        process.wait()
        assert found > rows, "it goes on where it was"
        rows = found
    assert not (tmp_path/'run'/'summary.json').exists() and (tmp_path/'run'/'checkpoint.pt').exists()
    assert main([*args, '--resume']) == main([*args[:-1], str(tmp_path/'whole')]) == 0
    assert not (tmp_path/'run'/'checkpoint.pt').exists()
    table = lambda name: [{k: v for k, v in r.items() if k != 'time'} for r in csv.DictReader((tmp_path/name/'metrics.csv').open())]
    assert table('run') == table('whole') and len(table('run')) == 12
    assert json.loads((tmp_path/'run'/'summary.json').read_text()) == json.loads((tmp_path/'whole'/'summary.json').read_text())


@pytest.mark.slow
def test_two_fits_are_told_apart_in_the_table(tmp_path):
    write_digits(tmp_path/'photos', 120)
    train('finetune', tmp_path/'photos', tmp_path/'run', **{**QUICK, 'epochs': 2, 'freeze_epochs': 1})
    rows = list(csv.DictReader((tmp_path/'run'/'metrics.csv').open()))
    assert [(r['fit'], r['epoch']) for r in rows] == [('0', '0'), ('1', '0'), ('1', '1')] and all(float(r['nll']) > 0 for r in rows)


def test_validation_between_fits_is_no_fit(tmp_path):
    "fit, validate, fit: killed in the second and resumed, with the very weights of one that was not"
    def train_twice(learn):
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-2)
            learn.validate()
            learn.fit(2, 1e-3)
        return learn
    # `no_bar` is fastai's, and takes away the callback only: what validate does not make is the bar itself
    whole = train_twice(learner(tmp_path/'a.pt'))
    with pytest.raises(KeyboardInterrupt): train_twice(learner(tmp_path/'b.pt', Dies('after_batch', 1, 1, 1)))
    again = train_twice(learner(tmp_path/'b.pt'))
    same(whole, again)
    assert [r[:2] for r in again.checkpoints.rows] == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_a_fit_without_epochs(tmp_path):
    def train_none_then_two(learn):
        with learn.no_bar(), learn.no_logging():
            learn.fit(0)
            learn.fit(2, 1e-2)
        return learn
    whole = train_none_then_two(learner(tmp_path/'a.pt'))
    with pytest.raises(KeyboardInterrupt): train_none_then_two(learner(tmp_path/'b.pt', Dies('after_batch', 1, 1, 1)))
    same(whole, train_none_then_two(learner(tmp_path/'b.pt')))


def test_what_a_checkpoint_cannot_put_back_is_refused(tmp_path):
    make = lambda *cbs: learner(tmp_path/'c.pt', EarlyStoppingCallback(patience=9), *cbs)
    with pytest.raises(KeyboardInterrupt): fit(make(Dies('after_batch', 1, 1)))
    with pytest.raises(ValueError, match='early_stopping cannot be resumed'): fit(make())
    learn = learner(tmp_path/'c.pt')
    with pytest.raises(ValueError, match='longer training'), learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
        learn.fit(0)
