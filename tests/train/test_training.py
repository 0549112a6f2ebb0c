"train: a folder that holds what it says, runs that survive, data that are told apart"
import csv
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from fastai.learner import load_learner
from photos import QUICK, QUICK_ARGS, write_digits
from PIL import Image
from sklearn.metrics import log_loss

from fastai_smooth.cli import main
from fastai_smooth.data import digits
from fastai_smooth.train import recipe, train, training
from fastai_smooth.train.page import plot_history
from fastai_smooth.train.training import fingerprint_of

CLI = [sys.executable, '-W', 'ignore', '-m', 'fastai_smooth.cli']
FILES = ['README.md', 'config.json', 'learner.pkl', 'metrics.csv', 'reliability.png', 'report.html', 'summary.json']
OF_IMAGES = sorted([*FILES, 'safe'])
pytestmark = pytest.mark.filterwarnings('ignore:The temperature')


def visible(folder): return sorted(p.name for p in folder.iterdir() if not p.name.startswith('.'))


@pytest.mark.slow
@pytest.mark.processes
def test_train_leaves_a_calibrated_learner(tmp_path, capsys):
    out = tmp_path/'run'
    assert main(['train', 'digits', '--epochs', '4', '--eps', '.2', '--out', str(out)]) == 0
    printed = capsys.readouterr().out
    assert visible(out) == OF_IMAGES and 'after temperature' in printed and f'Card: {out}/README.md' in printed and f'Safe: {out}/safe' in printed
    s, rows = json.loads((out/'summary.json').read_text()), list(csv.DictReader((out/'metrics.csv').open()))
    assert s['recipe'] == 'digits' and s['settings']['epochs'] == 4 and s['settings']['eps'] == .2 and len(rows) == 4 and float(rows[-1]['accuracy']) > .8
    page = (out/'report.html').read_text()
    assert 'yours' in page and 'as compare digits' in page and '<script' not in page and 'fastai-smooth train digits --eps 0.2 --epochs 4' in page
    # in a fresh process the learner predicts the probabilities of that temperature
    code = ("import sys, torch; from fastai.learner import load_learner; learn = load_learner(sys.argv[1]); torch.set_num_threads(1)\n"
            "learn.remove_cbs([c for c in learn.cbs if type(c).__name__ == 'ProgressCallback']); learn.path = '.'\n"
            "torch.save([learn.predict(i)[2] for i in range(5)], sys.argv[2])")
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(out/'learner.pkl'), str(tmp_path/'p.pt')], check=True, capture_output=True)
    learn = load_learner(out/'learner.pkl')
    t = learn.temperature
    assert t == pytest.approx(s['temperature'])
    z, y = [], []
    for xb, yb in recipe('digits').dls().valid:
        with torch.no_grad(): z.append(t*learn.model.eval()(xb.as_subclass(torch.Tensor))) # the last layer has been divided by the temperature
        y.append(yb.as_subclass(torch.Tensor))
    z, y = torch.cat(z).double(), torch.cat(y)
    assert s['as_trained']['nll'] == pytest.approx(log_loss(y, z.softmax(1)), rel=1e-4), "as trained is without the temperature"
    assert s['after_temperature']['nll'] < s['as_trained']['nll'] and log_loss(y, (z/t).softmax(1)) <= s['after_temperature']['nll']+1e-6
    assert all(abs(v.sum()-1) < 1e-5 for v in torch.load(tmp_path/'p.pt'))


@pytest.mark.slow
@pytest.mark.parametrize('name, n', [('multilabel', 10), ('segmentation', 1), ('text', 1), ('tabular', 1)])
def test_every_embedded_recipe_exports(name, n, tmp_path):
    s = train(name, out=tmp_path/'run', epochs=1)
    learn = load_learner(tmp_path/'run'/'learner.pkl')
    assert s['after_temperature']['nll'] <= s['as_trained']['nll']*1.05 and torch.as_tensor(learn.temperature).numel() == n


@pytest.mark.slow
def test_a_finished_run_is_not_done_again(tmp_path):
    out = tmp_path/'run'
    s = train('digits', out=out, epochs=1)
    with pytest.raises(ValueError, match='this run: name another folder, or resume it'): train('digits', out=out, epochs=1)
    with pytest.raises(ValueError, match=r'another run, with epochs=1 \(here 2\)'): train('digits', out=out, epochs=2, resume=True)
    written = (out/'learner.pkl').stat().st_mtime_ns
    assert train('digits', out=out, epochs=1, resume=True) == s and (out/'learner.pkl').stat().st_mtime_ns == written
    (out/'learner.pkl').unlink()
    assert train('digits', out=out, epochs=1, resume=True) == s, "the same seeds, the same figures"


@pytest.mark.slow
@pytest.mark.processes
def test_two_runs_cannot_share_a_folder_and_a_killed_one_can_be_resumed(tmp_path):
    out = tmp_path/'run'
    args = ['train', 'digits', '--epochs', '12', '--out', str(out)]
    first = subprocess.Popen([*CLI, *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for _ in range(600):
        if (out/'metrics.csv').exists(): break
        time.sleep(.02)
    first.send_signal(signal.SIGSTOP) # it holds the folder for as long as the other takes
    second = subprocess.run([*CLI, *args, '--resume'], capture_output=True, text=True)
    first.kill()
    first.wait()
    first.stderr.close()
    assert second.returncode == 2 and 'in use by another run' in second.stderr and len(second.stderr.strip().splitlines()) == 1
    assert not (out/'summary.json').exists() and not (out/'learner.pkl').exists()
    assert main([*args, '--resume']) == 0 and load_learner(out/'learner.pkl').temperature > 0
    assert train('digits', out=tmp_path/'whole', epochs=12) == json.loads((out/'summary.json').read_text())


@pytest.mark.slow
def test_other_data_are_another_run_and_a_broken_image_is_named(tmp_path, capsys):
    write_digits(tmp_path/'photos', 120)
    args = ['train', 'finetune', str(tmp_path/'photos'), *QUICK_ARGS, '--out', str(tmp_path/'run')]
    assert main(args) == 0
    photo = next((tmp_path/'photos'/'3').glob('*.png'))
    label, _, p = load_learner(tmp_path/'run'/'learner.pkl').predict(photo)
    assert label in map(str, range(10)) and abs(p.sum()-1) < 1e-5
    (tmp_path/'run'/'summary.json').unlink() # as if it had died before the end
    Image.new('L', (8, 8), 77).save(tmp_path/'photos'/'3'/'new.png')
    assert main([*args, '--resume']) == 2 and 'fingerprint' in capsys.readouterr().err
    photo.write_bytes(photo.read_bytes()[:-30])
    assert main([*args[:-1], str(tmp_path/'other')]) == 2
    err = capsys.readouterr().err.strip()
    assert photo.name in err and len(err.splitlines()) == 1 and not (tmp_path/'other').exists()


@pytest.mark.slow
def test_three_validation_images_are_scored_and_one_is_not(tmp_path):
    "The learner is there whatever becomes of its figures"
    write_digits(tmp_path/'photos', 40)
    for n in (3, 1):
        files = sorted((tmp_path/'photos').rglob('*.png'))
        rows = [f'{f},{f.parent.name},{i < n}' for i, f in enumerate(files)]
        (tmp_path/f'{n}.csv').write_text('\n'.join(['file,label,is_valid', *rows]))
        with pytest.warns(UserWarning, match=f'only {n} examples, so {n} folds' if n > 1 else 'at least two held-out examples'):
            s = train('finetune', tmp_path/f'{n}.csv', tmp_path/f'run{n}', **QUICK)
        assert s['n_valid'] == n and visible(tmp_path/f'run{n}') == OF_IMAGES and load_learner(tmp_path/f'run{n}'/'learner.pkl').temperature > 0
    assert s['temperature'] == 1.


@pytest.mark.slow
def test_what_dies_after_the_training_leaves_the_learner(tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'calibrated', lambda learn: 1/0)
    with pytest.raises(ZeroDivisionError): train('tabular', out=tmp_path/'run', epochs=1, table='iris')
    assert len(load_learner(tmp_path/'run'/'learner.pkl').dls.vocab) == 3 and not (tmp_path/'run'/'summary.json').exists()
    monkeypatch.undo()
    assert train('tabular', out=tmp_path/'run', resume=True, epochs=1, table='iris')['n_valid'] == 30, "nothing is trained again, and the rest is done"


def test_fingerprints():
    a = fingerprint_of(digits())
    assert a == fingerprint_of(digits(bs=16)) and a != fingerprint_of(digits(seed=1)) and a != fingerprint_of(digits(valid_pct=.3))


def test_weights_belong_to_the_fingerprint(tmp_path):
    (tmp_path/'w.pth').write_bytes(b'1')
    a = fingerprint_of(digits(), tmp_path/'w.pth')
    (tmp_path/'w.pth').write_bytes(b'2')
    assert len({a, fingerprint_of(digits(), tmp_path/'w.pth'), fingerprint_of(digits())}) == 3


def test_settings_reach_the_recipe_and_the_summary(tmp_path):
    "Two epochs of a small part of the work: what `train` writes says what was trained"
    s = train('tabular', out=tmp_path/'run', epochs=2, layers=(10,), table='iris')
    assert visible(tmp_path/'run') == FILES
    assert s['settings']['layers'] == [10] and s['n_train'] == 120 and s['n_valid'] == 30 and s['processes'] == 1
    assert len((tmp_path/'run'/'metrics.csv').read_text().splitlines()) == 3


def test_the_history_shows_every_figure_and_where_a_fit_begins():
    rows = [[0, 0, 2., 2.1, .3, '0'], [1, 0, 1., 1.2, .6, '0'], [1, 1, .8, 1., .7, '0']]
    fig = plot_history(['fit', 'epoch', 'train_loss', 'valid_loss', 'accuracy', 'time'], rows)
    losses, accuracy = fig.axes
    assert [line.get_label() for line in losses.lines[:2]] == ['train loss', 'valid loss'] and list(accuracy.lines[0].get_ydata()) == [.3, .6, .7]
    assert [line.get_xdata()[0] for line in losses.lines[2:]] == [1.5], "a line between the first epoch and the second"
