"train, calibrate and list: folders that hold what they say, runs that survive, mistakes in one line"
import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from fastai.learner import load_learner
from PIL import Image
from sklearn.metrics import log_loss
from test_folders import write_digits

from fastai_smooth.cli import main
from fastai_smooth.recipes import calibrate, recipe, recipes, train

CLI = [sys.executable, '-W', 'ignore', '-m', 'fastai_smooth.cli']
pytestmark = pytest.mark.filterwarnings('ignore:The temperature')


def visible(folder): return sorted(p.name for p in folder.iterdir() if not p.name.startswith('.'))


def test_train_leaves_a_calibrated_learner(tmp_path, capsys):
    out = tmp_path/'run'
    assert main(['train', 'digits', '--epochs', '4', '--eps', '.2', '--out', str(out)]) == 0
    printed = capsys.readouterr().out
    assert visible(out) == ['config.json', 'learner.pkl', 'metrics.csv', 'reliability.png', 'report.html', 'summary.json'] and 'after temperature' in printed
    s, rows = json.loads((out/'summary.json').read_text()), list(csv.DictReader((out/'metrics.csv').open()))
    assert s['recipe'] == 'digits' and s['settings']['epochs'] == 4 and s['settings']['eps'] == .2 and len(rows) == 4 and float(rows[-1]['accuracy']) > .8
    # in a fresh process the learner predicts the probabilities of that temperature
    code = ("import sys, torch; from fastai.learner import load_learner; learn = load_learner(sys.argv[1]); torch.set_num_threads(1)\n"
            "learn.remove_cbs([c for c in learn.cbs if type(c).__name__ == 'ProgressCallback']); learn.path = '.'\n"
            "torch.save((learn.temperature, [learn.predict(i)[2] for i in range(5)]), sys.argv[2])")
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code, str(out/'learner.pkl'), str(tmp_path/'p.pt')], check=True, capture_output=True)
    t, p = torch.load(tmp_path/'p.pt')
    assert t == pytest.approx(s['temperature'])
    learn = load_learner(out/'learner.pkl')
    dl = recipe('digits').dls().valid
    z, y = [], []
    for xb, yb in dl:
        with torch.no_grad(): z.append(learn.model.model.eval()(xb.as_subclass(torch.Tensor)))
        y.append(yb.as_subclass(torch.Tensor))
    z, y = torch.cat(z).double(), torch.cat(y)
    assert s['as_trained']['nll'] == pytest.approx(log_loss(y, z.softmax(1)), rel=1e-4), "as trained is without the temperature"
    assert s['after_temperature']['nll'] < s['as_trained']['nll'] and log_loss(y, (z/t).softmax(1)) <= s['after_temperature']['nll']+1e-6
    assert len(p) == 5 and all(abs(v.sum()-1) < 1e-5 for v in p)


def test_train_on_a_folder_and_calibrate_on_another(tmp_path, capsys):
    write_digits(tmp_path/'photos', 200, nested=False)
    args = ['--arch', 'resnet10t', '--pretrained', 'no', '--size', '32', '--bs', '32', '--epochs', '1', '--set', 'presize=40', '--set', 'freeze_epochs=0']
    assert main(['train', 'finetune', str(tmp_path/'photos'), *args, '--out', str(tmp_path/'run')]) == 0
    learn = load_learner(tmp_path/'run'/'learner.pkl')
    photo = next((tmp_path/'photos'/'3').glob('*.png'))
    label, _, p = learn.predict(photo)
    assert label in learn.dls.vocab and abs(p.sum()-1) < 1e-5
    write_digits(tmp_path/'more', 300, nested=False)
    capsys.readouterr()
    assert main(['calibrate', str(tmp_path/'run'/'learner.pkl'), str(tmp_path/'more'), '--out', str(tmp_path/'again.pkl')]) == 0
    assert 'Temperature' in capsys.readouterr().out
    again = load_learner(tmp_path/'again.pkl')
    np.testing.assert_allclose((again.predict(photo)[2].log()*again.temperature).softmax(0), p, atol=1e-4)
    assert again.predict(photo)[0] == label
    for bad, words in (((tmp_path/'none.pkl', tmp_path/'more', tmp_path/'x.pkl'), 'Cannot load'), ((photo, tmp_path/'more', tmp_path/'x.pkl'), 'Cannot load'),
                       ((tmp_path/'again.pkl', tmp_path/'none', tmp_path/'x.pkl'), 'holds no images'),
                       ((tmp_path/'again.pkl', tmp_path/'more', photo), 'there already'),
                       ((tmp_path/'again.pkl', tmp_path/'more', tmp_path/'no'/'x.pkl'), 'no folder')):
        with pytest.raises(ValueError, match=words): calibrate(*bad)
    (tmp_path/'more'/'unknown').mkdir()
    Image.new('L', (8, 8)).save(tmp_path/'more'/'unknown'/'x.png')
    assert main(['calibrate', str(tmp_path/'run'/'learner.pkl'), str(tmp_path/'more'), '--out', str(tmp_path/'x.pkl')]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not (tmp_path/'x.pkl').exists()


@pytest.mark.parametrize('name', ['multilabel', 'segmentation', 'text', 'language_model', 'tabular'])
def test_every_embedded_recipe_exports(name, tmp_path):
    s = train(name, out=tmp_path/'run', epochs=1)
    learn = load_learner(tmp_path/'run'/'learner.pkl')
    assert s['after_temperature']['nll'] <= s['as_trained']['nll']*1.05 and torch.as_tensor(learn.temperature).numel() == (
        {'multilabel': 10, 'text': 76}.get(name, 1))


def test_a_finished_run_is_not_done_again(tmp_path):
    out = tmp_path/'run'
    s = train('digits', out=out, epochs=1)
    with pytest.raises(ValueError, match='this run: name another folder, or resume it'): train('digits', out=out, epochs=1)
    with pytest.raises(ValueError, match='another run'): train('digits', out=out, epochs=2, resume=True)
    written = (out/'learner.pkl').stat().st_mtime_ns
    assert train('digits', out=out, epochs=1, resume=True) == s and (out/'learner.pkl').stat().st_mtime_ns == written
    (out/'learner.pkl').unlink()
    assert train('digits', out=out, epochs=1, resume=True) == s, "the same seeds, the same figures"


def test_two_runs_cannot_share_a_folder_and_a_killed_one_can_be_resumed(tmp_path):
    out = tmp_path/'run'
    args = ['train', 'digits', '--epochs', '30', '--out', str(out)]
    first = subprocess.Popen([*CLI, *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    for _ in range(600):
        if (out/'metrics.csv').exists(): break
        time.sleep(.1)
    second = subprocess.run([*CLI, *args, '--resume'], capture_output=True, text=True)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    first.stderr.close()
    assert second.returncode == 2 and 'in use by another run' in second.stderr and len(second.stderr.strip().splitlines()) == 1
    assert not (out/'summary.json').exists() and not (out/'learner.pkl').exists()
    assert main([*args, '--resume']) == 0 and load_learner(out/'learner.pkl').temperature > 0
    assert train('digits', out=tmp_path/'whole', epochs=30) == json.loads((out/'summary.json').read_text())


@pytest.mark.parametrize('args, words', [
    (['train', 'resnet'], 'there are pets'), (['train', 'digits', '--arch', 'resnet18'], "no setting 'arch'"), (['train', 'finetune'], 'no data of its own'),
    (['train', 'finetune', 'nowhere'], 'nowhere is not a folder'), (['train', 'digits', '--set', 'epochs'], 'NAME=VALUE'),
    (['train', 'digits', '--set', 'colour=3'], "no setting 'colour'"), (['train', 'digits', '--epochs', '0'], 'epochs must be above 0'),
    (['train', 'digits', '--set', 'bs=abc'], 'bs must be a number'), (['train', 'digits', '--set', 'calibrate=no'], 'True or False'),
    (['train', 'digits', '--lr', '-1'], 'lr must be above 0'), (['train', 'digits', '--epochs', '1', '--set', 'epochs=2'], 'epochs is given twice'),
    (['train', 'digits', '--set', 'out=x'], 'out is given twice'), (['train', 'tabular', '--set', 'layers=300'], 'layers must be several'),
    (['train', 'digits', '--epochs', 'x'], '--epochs'), (['train'], 'RECIPE'),
    (['train', 'finetune', '.', '--pretrained', 'perhaps'], 'yes nor no'), (['train', 'digits', '--out', '/proc/no/such'], '/proc/no'),
    (['train', 'digits', '--resume'], '--out'), (['calibrate', 'a.pkl', 'b'], '--out'), (['calibrate', 'a.pkl', 'b', '--out', 'c.pkl'], 'holds no images'),
    (['list', 'resnet'], 'there are pets')])
def test_mistakes_are_one_line_and_write_nothing(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try: code = main(args)
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and words in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_list(capsys):
    assert main(['list']) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.strip().splitlines()] == list(recipes)
    assert main(['list', 'a3']) == 0 and 'magnitude' in capsys.readouterr().out


def test_other_data_are_another_run(tmp_path, capsys):
    write_digits(tmp_path/'photos', 120, nested=False)
    args = ['train', 'finetune', str(tmp_path/'photos'), '--arch', 'resnet10t', '--pretrained', 'no', '--size', '32', '--bs', '16', '--epochs', '1',
            '--set', 'presize=32', '--set', 'freeze_epochs=0', '--out', str(tmp_path/'run')]
    assert main(args) == 0
    (tmp_path/'run'/'summary.json').unlink() # as if it had died before the end
    Image.new('L', (8, 8), 77).save(tmp_path/'photos'/'3'/'new.png')
    assert main([*args, '--resume']) == 2 and 'another run' in capsys.readouterr().err


def test_calibrate_knows_what_it_can(tmp_path, capsys):
    write_digits(tmp_path/'photos', 200, nested=False)
    train('digits', out=tmp_path/'digits', epochs=1)
    assert main(['calibrate', str(tmp_path/'digits'/'learner.pkl'), str(tmp_path/'photos'), '--out', str(tmp_path/'x.pkl')]) == 2
    assert 'is not a learner of image files' in capsys.readouterr().err
    files = sorted((tmp_path/'photos').rglob('*.png'))
    (tmp_path/'l.csv').write_text('file,label\n'+'\n'.join(f'photos/{f.parent.name}/{f.name},{f.parent.name}' for f in files))
    train('multilabel', tmp_path/'l.csv', tmp_path/'csv', size=16, bs=16, epochs=2, delimiter=None)
    assert main(['calibrate', str(tmp_path/'csv'/'learner.pkl'), str(tmp_path/'photos'), '--out', str(tmp_path/'y.pkl')]) == 0
    assert load_learner(tmp_path/'y.pkl').predict(files[0])[2].shape == (10,)


def test_an_image_that_is_cut_short_is_named(tmp_path, capsys):
    write_digits(tmp_path/'photos', 60, nested=False)
    cut = next((tmp_path/'photos'/'3').glob('*.png'))
    cut.write_bytes(cut.read_bytes()[:-30])
    args = ['--arch', 'resnet10t', '--pretrained', 'no', '--size', '32', '--bs', '16', '--epochs', '1', '--set', 'presize=32', '--set', 'freeze_epochs=0']
    assert main(['train', 'finetune', str(tmp_path/'photos'), *args, '--out', str(tmp_path/'run')]) == 2
    err = capsys.readouterr().err.strip()
    assert cut.name in err and len(err.splitlines()) == 1
