"recipes and the command line: figures against other implementations, files, resuming, mistakes"
import csv
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastai_smooth.callback import LabelSmoothing, OneOf
from fastai_smooth.cli import main
from fastai_smooth.data import build_model, digits, small_convnet
from fastai_smooth.compare import (
    METRICS,
    Comparison,
    mean_ci,
    method_callbacks,
    score,
    table,
    verdict,
)

FAST = ['--epochs', '1', '--seeds', '2', '--methods', 'ce,ls']


# -- scores

def naive_scores(logits, labels):
    "Loops: accuracy, nll, ece (15 bins of the top confidence), brier, aurc (distinct confidences)"
    n, right, nll, brier, bins, order = len(labels), 0, 0., 0., {}, []
    for z, y in zip(logits.tolist(), labels.tolist()):
        e = [math.exp(v-max(z)) for v in z]
        p = [v/sum(e) for v in e]
        top = max(range(len(p)), key=p.__getitem__)
        right += top == y
        nll -= math.log(p[y])
        brier += sum((v-(k == y))**2 for k, v in enumerate(p))
        bins.setdefault(min(int(p[top]*15), 14), []).append((p[top], top == y))
        order.append((-p[top], top != y))
    ece = sum(abs(sum(c for c, _ in b)-sum(r for _, r in b)) for b in bins.values())/n
    wrong, risks = 0, []
    for i, (_, w) in enumerate(sorted(order), 1):
        wrong += w
        risks.append(wrong/i)
    return dict(accuracy=right/n, nll=nll/n, ece=ece, brier=brier/n, aurc=sum(risks)/n)


@pytest.mark.parametrize('scale', [.5, 1., 4.])
def test_scores_against_loops(scale):
    rng = np.random.default_rng(0)
    z, y = scale*rng.normal(size=(400, 6)), rng.integers(0, 6, 400)
    z[np.arange(400), y] += 1
    s = score(z[:200], y[:200], z[200:], y[200:])
    assert list(s) == METRICS
    raw, scaled = naive_scores(z[:200], y[:200]), naive_scores(z[:200]/s['temperature'], y[:200])
    for k, v in raw.items(): assert s[k] == pytest.approx(v, abs=1e-6), k
    for k in ('nll', 'ece', 'brier'): assert s[f'{k}_ts'] == pytest.approx(scaled[k], abs=1e-6), k


def test_interval():
    r = mean_ci([1., 2., 4.])
    assert r['mean'] == pytest.approx(7/3) and r['ci95'] == pytest.approx(4.302653*np.std([1, 2, 4], ddof=1)/3**.5, rel=1e-5)
    assert mean_ci([1.])['ci95'] is None


# -- methods and models

def test_methods():
    assert method_callbacks('ce') == []
    ls, = method_callbacks('ls', .3)
    assert isinstance(ls, LabelSmoothing) and ls.eps == .3
    zero, mixup = method_callbacks('mixup', .3)
    assert zero.eps == 0 and type(mixup).__name__ == 'MixUp'
    assert isinstance(method_callbacks('ls+cutmix+mixup')[1], OneOf)
    for bad in ('', 'ce+ls', 'ls+ls', 'magic'):
        with pytest.raises(ValueError, match='Unknown method'): method_callbacks(bad)


def test_models(tmp_path):
    for size in (8, 28, 64): assert small_convnet(1, 7)(torch.rand(2, 1, size, size)).shape == (2, 7)
    torch.save(small_convnet(1, 7).state_dict(), tmp_path/'w.pth')
    own, loaded = torch.load(tmp_path/'w.pth', weights_only=True), build_model('convnet', 1, 3, str(tmp_path/'w.pth'))
    assert torch.equal(loaded[0][0].weight, own['0.0.weight']) and loaded[-1].out_features == 3
    assert build_model('resnet10t', 1, 5)(torch.rand(1, 1, 64, 64)).shape == (1, 5)
    (tmp_path/'bad.pth').write_bytes(b'not weights')
    for weights, words in ((tmp_path/'bad.pth', 'Cannot read'), (tmp_path/'none.pth', 'Cannot read')):
        with pytest.raises(ValueError, match=words): build_model('convnet', 1, 3, str(weights))
    torch.save({'a': torch.ones(2)}, tmp_path/'other.pth')
    with pytest.raises(ValueError, match='does not hold weights'): build_model('convnet', 1, 3, str(tmp_path/'other.pth'))


# -- the verdict follows from the figures

def figures(**methods):
    return {m: {k: dict(mean=v.get(k, (0, 0))[0], ci95=v.get(k, (0, 0))[1]) for k in METRICS} for m, v in methods.items()}


@pytest.mark.parametrize('figs, seeds, words, absent', [
    (figures(ce=dict(nll_ts=(.2, .01), ece=(.1, .0)), ls=dict(nll_ts=(.15, .01), ece=(.3, .0))), 3, ['ls beats ce', 'smooth, then calibrate'], ['No diff']),
    (figures(ce=dict(nll_ts=(.2, .01), ece=(.3, .0)), ls=dict(nll_ts=(.15, .01), ece=(.1, .0))), 3, ['ls beats ce'], ['smooth, then calibrate']),
    (figures(ce=dict(nll_ts=(.2, .04)), ls=dict(nll_ts=(.15, .04))), 3, ['No difference'], ['beats']),
    (figures(ce=dict(nll_ts=(.2, .01)), ls=dict(nll_ts=(.3, .01))), 3, ['ce is the best'], ['beats']),
    (figures(ce=dict(nll_ts=(.2, .01)), ls=dict(nll_ts=(.3, .01)), mixup=dict(nll_ts=(.2, .01))), 3, ['No difference', 'Worse than ce: ls'], ['beats']),
    (figures(ce=dict(accuracy=(.9, .01)), ls=dict(accuracy=(.95, .01))), 3, ['Accuracy: higher with ls'], []),
    (figures(ce=dict(accuracy=(.9, .01)), ls=dict(accuracy=(.8, .01))), 3, ['Accuracy: lower with ls'], []),
    (figures(ce=dict(), ls=dict()), 1, ['no verdict', '--seeds 3'], ['beats']),
    (figures(ls=dict()), 3, ['nothing to compare'], []),
])
def test_verdict(figs, seeds, words, absent):
    if seeds == 1:
        for f in figs.values():
            for v in f.values(): v['ci95'] = None
    text = verdict(figs, seeds)
    assert all(w in text for w in words) and not any(w in text for w in absent), text


# -- the command

def test_files_and_figures(tmp_path, capsys):
    out = tmp_path/'run'
    assert main(['compare', 'digits', *FAST, '--noise', '.2', '--eps', '.3', '--out', str(out)]) == 0
    printed = capsys.readouterr().out
    assert {p.name for p in out.iterdir() if p.name != '.lock'} == {'config.json', 'predictions', 'reliability.png', 'report.html', 'runs.csv', 'summary.json'}
    rows = list(csv.DictReader((out/'runs.csv').open()))
    assert [(r['method'], r['seed']) for r in rows] == [('ce', '0'), ('ls', '0'), ('ce', '1'), ('ls', '1')]
    s = json.loads((out/'summary.json').read_text())
    assert list(s) == ['data', 'n_train', 'n_valid', 'n_classes', 'arch', 'epochs', 'seeds', 'noise', 'eps', 'methods', 'verdict']
    assert (s['data'], s['n_train'], s['n_valid'], s['n_classes'], s['seeds'], s['noise'], s['eps']) == ('digits', 1437, 360, 10, 2, .2, .3)
    for m in ('ce', 'ls'):
        assert list(s['methods'][m]) == METRICS
        for k in METRICS:  # the summary follows from the rows
            values = [float(r[k]) for r in rows if r['method'] == m]
            assert s['methods'][m][k]['mean'] == pytest.approx(np.mean(values))
            assert s['methods'][m][k]['ci95'] == pytest.approx(12.7062*abs(values[0]-values[1])/2, rel=1e-4)
    assert s['verdict'] in printed and table(s) in printed
    for r in rows:  # the rows follow from the predictions
        with np.load(out/'predictions'/f"{r['method']}-{r['seed']}.npz") as f: res = dict(f)
        assert len(res['labels']) == len(res['fit_labels']) == 180
        naive = naive_scores(res['logits'].astype(np.float64), res['labels'])
        for k in ('accuracy', 'nll', 'brier', 'ece'): assert float(r[k]) == pytest.approx(naive[k], abs=1e-5)
    html = (out/'report.html').read_text()
    assert s['verdict'] in html and 'data:image/png;base64' in html and 'http' not in html
    assert (out/'reliability.png').read_bytes().startswith(b'\x89PNG')


def test_same_seeds_same_figures():
    a, b = (Comparison('digits', ('ls', 'mixup+ls'), epochs=1, seeds=1).run(progress=False) for _ in range(2))
    assert a == b


def test_noise_is_in_the_training_labels_only():
    learn = Comparison('digits', ('ce',), noise=.5).learner('ce', 0)
    clean = Comparison('digits', ('ce',)).learner('ce', 0)
    def labels(dls, i): return [int(y) for y in dls[i].dataset.tls[1]]
    train, truth = (np.array(labels(x.dls, 0)) for x in (learn, clean))
    assert .4 < (train != truth).mean() < .6 and labels(learn.dls, 1) == labels(clean.dls, 1)


def test_methods_share_split_weights_and_order():
    c = Comparison('digits', ('ce', 'ls'))
    a, b = c.learner('ce', 1), c.learner('ls', 1)
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))
    a, b = c.learner('ce', 1), None
    first = a.dls.train.one_batch()[1]
    b = c.learner('ls', 1)
    assert torch.equal(first, b.dls.train.one_batch()[1])
    assert a.dls.train_ds.items == b.dls.train_ds.items != c.learner('ce', 2).dls.train_ds.items


def test_resume_after_a_stop(tmp_path, monkeypatch):
    "A stopped run goes on: finished methods are kept, a damaged file is done again, the figures are those of one go"
    whole = Comparison('digits', ('ce', 'ls'), epochs=1, seeds=2).run(progress=False)
    out, trained, train = tmp_path/'run', [], Comparison.train

    def count(self, method, seed):
        if len(trained) == 2: raise KeyboardInterrupt
        trained.append((method, seed))
        return train(self, method, seed)
    monkeypatch.setattr(Comparison, 'train', count)
    with pytest.raises(KeyboardInterrupt): main(['compare', 'digits', *FAST, '--out', str(out)])
    assert len((out/'runs.csv').read_text().splitlines()) == 3
    damaged = out/'predictions'/'ce-0.npz'
    damaged.write_bytes(damaged.read_bytes()[:500])
    trained.clear()
    monkeypatch.setattr(Comparison, 'train', lambda self, m, s: trained.append((m, s)) or train(self, m, s))
    assert main(['compare', 'digits', *FAST, '--out', str(out), '--resume']) == 0
    assert trained == [('ce', 0), ('ce', 1), ('ls', 1)]
    assert json.loads((out/'summary.json').read_text()) == whole


@pytest.mark.parametrize('args, words', [
    (['imagenette'], 'digits, mnist5k'), (['--methods', 'ce,magic'], "Unknown method 'magic'"), (['--methods', 'ce,ce'], 'twice'),
    (['--arch', 'vit_tiny_patch16_224'], 'another --size'), (['--arch', 'vgg11'], 'another --size'), (['--out', '/proc/no/such'], '/proc/no'),
    (['--methods', ''], 'Unknown method'), (['--arch', 'resnet_18'], 'resnet18'), (['--eps', '1.5'], r'eps must lie in [0, 1]'), (['--eps', 'x'], '--eps'),
    (['--noise', '1'], 'noise must lie in [0, 1)'), (['--noise', '-.1'], 'noise'), (['--epochs', '0'], 'epochs must be at least 1'),
    (['--seeds', '0'], 'seeds'), (['--bs', '1'], 'bs'),
    (['--bs', '99999'], 'training images'), (['--valid_pct', '1'], 'valid_pct'), (['--valid_pct', '.001'], 'valid_pct'), (['--size', '2'], 'size'),
    (['--weights', 'nowhere.pth'], 'nowhere.pth'), (['--resume'], '--out'), (['--colour'], '--colour'), (['digits', 'more'], 'more')])
def test_mistakes_are_one_line_and_write_nothing(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try: code = main(['compare', *args])
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and words in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_folder_of_another_run(tmp_path, capsys):
    (tmp_path/'notes.txt').write_text('mine')
    assert main(['compare', *FAST, '--out', str(tmp_path)]) == 2
    assert 'holds another run' in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ['notes.txt']
    assert main(['compare', *FAST, '--out', str(tmp_path), '--resume']) == 2
    (tmp_path/'config.json').write_text(json.dumps({**Comparison(epochs=1).config, 'eps': .2}))
    assert main(['compare', *FAST, '--out', str(tmp_path), '--resume']) == 2
    assert 'eps=0.2' in capsys.readouterr().err
    (tmp_path/'config.json').write_text('[]')
    assert main(['compare', *FAST, '--out', str(tmp_path), '--resume']) == 2
    assert main(['compare', *FAST, '--out', str(tmp_path/'notes.txt')]) == 2
    assert main(['compare', *FAST, '--out', str(tmp_path/'notes.txt'/'x')]) == 2


def test_a_batch_of_one_is_left_out():
    "1437 images in batches of 4 leave one over, with which fastai's MixUp cannot work"
    learn = Comparison('digits', ('mixup',), bs=4).learner('mixup', 0)
    assert 1437 % 4 == 1 and len(learn.dls.train) == 1437//4


def test_installed_command(tmp_path):
    "The console script, from another folder, with its default output folder"
    exe = os.path.join(os.path.dirname(sys.executable), 'fastai-smooth')
    assert subprocess.run([exe, '--version'], capture_output=True, text=True, check=True).stdout.strip()
    res = subprocess.run([exe, 'compare', '--epochs', '1', '--seeds', '1', '--methods', 'ce'], capture_output=True, text=True, cwd=tmp_path)
    assert res.returncode == 0 and 'Report: fastai_smooth_runs' in res.stdout, res.stderr
    assert len(list(tmp_path.glob('fastai_smooth_runs/digits-*/summary.json'))) == 1
    res = subprocess.run([exe, 'compare', 'nothing'], capture_output=True, text=True, cwd=tmp_path)
    assert res.returncode == 2 and len(res.stderr.strip().splitlines()) == 1


def test_module_runs_as_a_script():
    res = subprocess.run([sys.executable, '-m', 'fastai_smooth.cli', '--version'], capture_output=True, text=True)
    assert res.returncode == 0 and res.stdout.strip()


# -- distributions as methods

def test_methods_smooth_with_distributions_of_the_training_set():
    dls = digits(valid_pct=.5)
    made = {name: method_callbacks(name, .2, dls)[0].dist for name in ('ls', 'prior', 'similarity', 'ols', 'zipf')}
    assert made['ls'] is None and [type(made[n]).__name__ for n in made][1:] == ['ClassPrior', 'Similarity', 'Online', 'Zipf']
    counts = np.bincount([int(dls.train_ds[i][1]) for i in range(len(dls.train_ds))], minlength=10)
    assert made['prior'].counts == counts.tolist() and made['ols'].n_classes == 10
    x = np.stack([np.asarray(dls.train_ds[i][0]).ravel()/255 for i in range(len(dls.train_ds))])
    y = np.array([int(dls.train_ds[i][1]) for i in range(len(dls.train_ds))])
    means = np.stack([x[y == k].mean(0) for k in range(10)])
    means -= means.mean(0)
    unit = means/np.linalg.norm(means, axis=1, keepdims=True)
    np.fill_diagonal(logits := unit@unit.T/.3, -np.inf)
    expected = np.exp(logits)/np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(made['similarity'].matrix(10).numpy(), expected, atol=2e-3)
    with pytest.raises(ValueError, match='needs classes that are paths'): method_callbacks('taxonomy', .2, dls)
    dls.vocab[:] = [f'{"round" if v in "0689" else "straight"}/{v}' for v in map(str, dls.vocab)]
    assert method_callbacks('mixup+taxonomy', .2, dls)[0].dist.n_classes == 10
    with pytest.raises(ValueError, match='Unknown method'): method_callbacks('ls+ols')


def test_confusable_noise(tmp_path):
    one = Comparison('digits', ('ce',), noise=.5, pairs='4:9,9:4', epochs=1, seeds=1)
    clean = Comparison('digits', ('ce',), epochs=1, seeds=1)
    noisy, true = ([int(learn.dls.train_ds[i][1]) for i in range(1437)] for learn in (one.learner('ce', 0), clean.learner('ce', 0)))
    changed = [(a, b) for a, b in zip(true, noisy) if a != b]
    assert set(changed) == {(4, 9), (9, 4)} and 100 < len(changed) < 190
    assert '--pairs' in one.arguments() and '--pairs' not in clean.arguments()
    for bad in ('4-9', '4', 'a:b', '3:12'):
        with pytest.raises(ValueError, match='pairs'): Comparison('digits', ('ce',), noise=.5, pairs=bad, epochs=1, seeds=1)
