"Comparisons of masks, texts and tables, several noise rates, and what fits a kind of data"
import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import log_loss
from users_files import write_masks, write_texts

from fastai_smooth.cli import main
from fastai_smooth.compare import Comparison, method_callbacks, read_method
from fastai_smooth.compare.comparison import PIXELS, pixels_of
from fastai_smooth.method_names import KINDS, MIXERS, SMOOTH

pytestmark = pytest.mark.filterwarnings('ignore:The temperature', 'ignore:.*not writable')


@pytest.mark.slow
def test_masks_side_by_side(tmp_path):
    "Known pixels only, the same ones for every method, and the figures are those of a plain loop over them"
    write_masks(tmp_path/'data')
    args = ['compare', str(tmp_path/'data'), '--size', '24', '--ignore', '255', '--bs', '8', '--epochs', '1', '--seeds', '2',
            '--methods', 'ce,spatial,cutmix+ls']
    assert main([*args, '--out', str(tmp_path/'run')]) == 0
    s = json.loads((tmp_path/'run'/'summary.json').read_text())
    assert s['arch'] == 'segmenter' and s['n_train'] == 32 and s['n_valid'] == 8 and s['n_classes'] == 11
    by = {}
    for row in csv.DictReader((tmp_path/'run'/'runs.csv').open()):
        with np.load(tmp_path/'run'/'predictions'/f"{row['method']}-{row['seed']}.npz") as f: res = dict(f)
        assert res['labels'].min() >= 0
        p = torch.as_tensor(res['logits']).double().softmax(1).numpy()
        assert float(row['nll']) == pytest.approx(log_loss(res['labels'], p, labels=range(11)), rel=1e-5)
        assert float(row['accuracy']) == pytest.approx((p.argmax(1) == res['labels']).mean())
        by.setdefault(row['seed'], []).append((res['labels'], res['items']))
    for runs in by.values():
        for labels, items in runs[1:]: assert np.array_equal(labels, runs[0][0]) and np.array_equal(items, runs[0][1])


def test_no_more_pixels_than_that():
    c = Comparison('digit_masks', ('ce',), epochs=1, seeds=1)
    learn, items = c.learner('ce', 0), c.source.splits()[1]
    logits, labels, owners, shown = pixels_of(learn, items, 0, {int(items[3])})
    known = [(c.source.labels[i] != -100).sum() for i in items]
    expected = [min(k, PIXELS//len(items)) for k in known]
    assert [int((owners == i).sum()) for i in items] == expected and logits.shape == (sum(expected), 11)
    assert list(shown) == [items[3]] and shown[items[3]].shape == (24, 24)


@pytest.mark.slow
@pytest.mark.parametrize('several', [False, True])
def test_texts_side_by_side(several, tmp_path):
    write_texts(tmp_path/'t.csv', several, 80)
    more = ['--delimiter', ';', '--seeds', '2'] if several else ['--noise', '0,.3', '--seeds', '1']
    args = ['compare', str(tmp_path/'t.csv'), *more, '--epochs', '1', '--bs', '32']
    assert main([*args, '--out', str(tmp_path/'run')]) == 0
    s = json.loads((tmp_path/'run'/'summary.json').read_text())
    assert list(s['methods']) == (['ce', 'ls'] if several else ['ce~0', 'ls~0', 'ce~0.3', 'ls~0.3']) and s['arch'] == 'small_awd_lstm'
    assert main([*args, '--out', str(tmp_path/'run'), '--resume']) == 0


@pytest.mark.slow
def test_tables_side_by_side():
    s = Comparison('wine', ('ce', 'ls', 'prior', 'ols', 'zipf'), epochs=3, seeds=2).run(progress=False)
    assert s['n_train'] == 142 and all(m['accuracy']['mean'] > .6 for m in s['methods'].values())


@pytest.mark.slow
def test_several_noise_rates_are_so_many_comparisons():
    "Each figure is that of a comparison with one rate; differences are taken within a rate"
    both = Comparison('wine', ('ce', 'ls'), noise=[0., .4], epochs=1, seeds=2)
    s = both.run(progress=False)
    for rate in (0., .4):
        alone = Comparison('wine', ('ce', 'ls'), noise=rate, epochs=1, seeds=2).run(progress=False)
        for m in ('ce', 'ls'): assert alone['methods'][m] == s['methods'][f'{m}~{rate:g}']
    assert 'Label noise 0.4: ' in s['verdict']


@pytest.mark.slow
def test_predictions_are_read_when_they_are_asked_for(tmp_path):
    c, memory = (Comparison('iris', ('ce',), epochs=1, seeds=2, out=out) for out in (tmp_path/'run', None))
    c.run(progress=False)
    memory.run(progress=False)
    assert len(c.predictions) == 2 and not any(isinstance(v, np.ndarray) for v in vars(c.predictions).values())
    for run in memory.predictions:
        for k, v in memory.predictions[run].items(): np.testing.assert_array_equal(c.predictions[run][k], v)


@pytest.mark.parametrize('kind', list(KINDS))
def test_what_fits_runs_and_what_does_not_is_named(kind):
    data = {'images': 'digits', 'table': 'iris'}.get(kind)
    for part in ('ce', *SMOOTH, *MIXERS):
        if part != 'ce' and part not in KINDS[kind]:
            with pytest.raises(ValueError, match=f"'{part}' does not fit"): read_method(part, kind=kind)
        elif data and part != 'taxonomy':
            learn = Comparison(data, (part,), epochs=1, seeds=1, bs=256 if kind == 'images' else 16).learner(part, 0)
            with learn.no_logging(): learn.fit(1)
    if kind == 'masks': assert [type(cb).__name__ for cb in method_callbacks('cutmix+ls', kind='masks')] == ['LabelSmoothing', 'CutMixMask']


@pytest.mark.parametrize('args, words', [
    (['docstrings', '--methods', 'mixup'], "'mixup' does not fit texts"), (['iris', '--size', '8'], 'size'),
    (['digit_masks', '--arch', 'resnet_18'], 'such as resnet18'), (['digit_masks', '--noise', '.1'], 'noise puts'),
    (['digits', '--noise', '0,1'], 'noise must lie'), (['digits', '--methods', 'ls~2'], "in 'ls~2'"), (['digits', '--methods', 'ls~x'], 'not a number'),
    (['digits', '--pretrained'], 'no pretrained weights'), (['digits', '--lr', '0'], 'lr must be above 0'),
    (['digits', '--methods', 'spatial'], 'does not fit images')])
def test_mistakes_are_one_line(args, words, tmp_path, capsys):
    try: code = main(['compare', *args, '--out', str(tmp_path/'run')])
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and words in err and len(err.splitlines()) == 1 and not (tmp_path/'run').exists()


@pytest.mark.slow
def test_another_split_is_another_comparison(tmp_path, capsys):
    rows = write_texts(tmp_path/'t.csv', n=120)
    def write(first):
        table = [(t, ls[0], int((i < 60) == first)) for i, (t, ls) in enumerate(rows)]
        pd.DataFrame(table, columns=['text', 'label', 'is_valid']).to_csv(tmp_path/'t.csv', index=False)
    write(True)
    args = ['compare', str(tmp_path/'t.csv'), '--methods', 'ce', '--epochs', '1', '--seeds', '1', '--bs', '8', '--out', str(tmp_path/'run')]
    assert main(args) == 0
    write(False)
    assert main([*args, '--resume']) == 2 and 'fingerprint' in capsys.readouterr().err


def test_the_same_method_twice_and_pairs():
    for same in (('ls', 'ls@.1'), ('mixup+ls', 'ls+mixup'), ('ce', 'ce~0')):
        with pytest.raises(ValueError, match='twice'): Comparison('digits', same, epochs=1)
    with pytest.raises(ValueError, match='4:4'): Comparison('digits', noise=.2, pairs='4:4')


def test_a_run_that_diverges_does_not_end_the_comparison(tmp_path, capsys):
    "It is scored as chance and named"
    args = ['compare', '--lr', '1e12', '--epochs', '1', '--seeds', '1', '--methods', 'ce', '--out', str(tmp_path/'run')]
    assert main(args) == 0 and 'ce diverged in 1 of 1 run' in capsys.readouterr().out
    row = pd.read_csv(tmp_path/'run'/'runs.csv').iloc[0]
    assert row.diverged == 1 and row.nll == row.nll_ts == pytest.approx(np.log(10)) and row.untold == 0


@pytest.mark.slow
def test_a_dollar_is_a_dollar(tmp_path):
    rows = [(f'costs ${i} or $\\foo_{{{i}}}$ {"much" if i % 2 else "little"}', 'dear $$' if i % 2 else 'cheap $') for i in range(120)]
    pd.DataFrame(rows, columns=['text', 'label']).to_csv(tmp_path/'t.csv', index=False)
    assert main(['compare', str(tmp_path/'t.csv'), '--epochs', '1', '--seeds', '1', '--bs', '16', '--out', str(tmp_path/'run')]) == 0
    assert 'What the loss sees' in (tmp_path/'run'/'report.html').read_text(), "the panel that writes the texts themselves"
