"Masks, texts and tables as data of a comparison and of the recipes, and every mistake in them named"
import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import load_learner
from PIL import Image
from sklearn.datasets import load_wine
from sklearn.metrics import log_loss

from fastai_smooth.cli import main
from fastai_smooth.data import digit_masks_arrays, words_arrays
from fastai_smooth.recipes import Comparison, method_callbacks, read_method, recipe
from fastai_smooth.recipes import report as pages
from fastai_smooth.recipes.comparison import PIXELS
from fastai_smooth.recipes.methods import KINDS, MIXERS, SMOOTH
from fastai_smooth.recipes.scores import base_of
from fastai_smooth.sources import has_texts, read_source, text_data

pytestmark = pytest.mark.filterwarnings('ignore:The temperature', 'ignore:.*not writable')


def write_masks(folder, n=40, ignored=255, names='labels', end='_P'):
    canvases, masks, codes, _ = digit_masks_arrays(n, 1)
    for name in ('images', names): (folder/name).mkdir(parents=True)
    (folder/'codes.txt').write_text('\n'.join(codes)+'\n')
    for i in range(n):
        Image.fromarray(canvases[i]).save(folder/'images'/f'{i:03}.png')
        Image.fromarray(np.where(masks[i] < 0, ignored, masks[i]).astype(np.uint8)).save(folder/names/f'{i:03}{end}.png')
    return canvases[:n], masks[:n]


def write_texts(path, several=False, n=600):
    texts, labels, vocab = words_arrays()
    keep = [vocab.index(k) for k in ('de', 'en', 'fi')]
    rows = [(texts[i], [vocab[k] for k in keep if labels[i, k]]) for i in range(len(texts)) if labels[i, keep].any()]
    if not several: rows = [r for r in rows if len(r[1]) == 1]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:n]]
    with open(path, 'w', newline='', encoding='utf-8') as f: csv.writer(f).writerows([('text', 'language'), *((t, ' '.join(ls)) for t, ls in rows)])
    return rows


# -- masks

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
        assert res['labels'].min() >= 0 and set(res['shown_items']) <= set(res['items'])
        p = torch.as_tensor(res['logits']).double().softmax(1).numpy()
        assert float(row['nll']) == pytest.approx(log_loss(res['labels'], p, labels=range(11)), rel=1e-5)
        assert float(row['accuracy']) == pytest.approx((p.argmax(1) == res['labels']).mean())
        by.setdefault(row['seed'], []).append((res['labels'], res['items']))
    for runs in by.values():
        for labels, items in runs[1:]: assert np.array_equal(labels, runs[0][0]) and np.array_equal(items, runs[0][1])
    page = (tmp_path/'run'/'report.html').read_text()
    assert 'Pixel by pixel' in page and 'those of their pixels' in page and 'Sure, and wrong' not in page


def test_no_more_pixels_than_that():
    c = Comparison('digit_masks', ('ce',), epochs=1, seeds=1)
    learn, items = c.learner('ce', 0), c.source.splits()[1]
    from fastai_smooth.recipes.comparison import pixels_of
    logits, labels, owners, shown = pixels_of(learn, items, 0, {int(items[3])})
    known = [(c.labels[i] != -100).sum() for i in items]
    expected = [min(k, PIXELS//len(items)) for k in known]
    assert [int((owners == i).sum()) for i in items] == expected and logits.shape == (sum(expected), 11)
    assert list(shown) == [items[3]] and shown[items[3]].shape == (24, 24)


# -- texts and tables

@pytest.mark.parametrize('several', [False, True])
def test_texts_side_by_side(several, tmp_path):
    rows = write_texts(tmp_path/'t.csv', several)
    data = text_data(tmp_path/'t.csv', ' ' if several else None)
    assert data.vocab == ['de', 'en', 'fi'] and data.texts == [t for t, _ in rows] and data.several == several and has_texts(tmp_path/'t.csv')
    got = [[data.vocab[k] for k in np.flatnonzero(r)] for r in data.labels] if several else [[data.vocab[k]] for k in data.labels]
    assert got == [ls for _, ls in rows]
    args = ['compare', str(tmp_path/'t.csv'), *(['--delimiter', ' '] if several else ['--noise', '0,.3']), '--epochs', '2', '--seeds', '2', '--bs', '32']
    assert main([*args, '--out', str(tmp_path/'run')]) == 0
    s = json.loads((tmp_path/'run'/'summary.json').read_text())
    assert list(s['methods']) == (['ce', 'ls'] if several else ['ce~0', 'ls~0', 'ce~0.3', 'ls~0.3']) and s['arch'] == 'characters'
    assert main([*args, '--out', str(tmp_path/'run'), '--resume']) == 0
    assert ('By label noise' in (tmp_path/'run'/'report.html').read_text()) == (not several)


def test_tables_side_by_side():
    c = Comparison('wine', ('ce', 'ls', 'prior', 'ols', 'zipf'), epochs=3, seeds=2)
    s = c.run(progress=False)
    assert s['n_train'] == 142 and all(m['accuracy']['mean'] > .6 for m in s['methods'].values())
    x, y = c.source.table, c.source.labels
    np.testing.assert_allclose(x.to_numpy(), load_wine().data, rtol=1e-6)
    assert np.array_equal(y, load_wine().target)


def test_several_noise_rates_are_so_many_comparisons():
    "Each figure is that of a comparison with one rate; differences are taken within a rate"
    both = Comparison('digits', ('ce', 'ls'), noise=[0., .4], epochs=1, seeds=2)
    s = both.run(progress=False)
    for rate in (0., .4):
        one = Comparison('digits', ('ce', 'ls'), noise=rate, epochs=1, seeds=2)
        alone = one.run(progress=False)
        for m in ('ce', 'ls'): assert alone['methods'][m] == s['methods'][f'{m}~{rate:g}']
        assert one.differences()['ls'] == both.differences()[f'ls~{rate:g}']
    assert set(both.differences()) == {'ls~0', 'ls~0.4'} and 'Label noise 0.4: ' in s['verdict']
    assert pages.plot_noise(both, s['methods']) is not None and pages.plot_noise(one, alone['methods']) is None


def test_predictions_are_read_when_they_are_asked_for(tmp_path):
    c, memory = (Comparison('digits', ('ce',), epochs=1, seeds=2, out=out) for out in (tmp_path/'run', None))
    c.run(progress=False)
    memory.run(progress=False)
    assert len(c.predictions) == 2 and not any(isinstance(v, np.ndarray) for v in vars(c.predictions).values())
    for run in memory.predictions:
        for k, v in memory.predictions[run].items(): np.testing.assert_array_equal(c.predictions[run][k], v)


# -- methods and networks by kind

@pytest.mark.parametrize('kind', list(KINDS))
def test_what_fits_runs_and_what_does_not_is_named(kind):
    data = {'images': 'digits', 'masks': 'digit_masks', 'texts': 'words', 'table': 'iris'}[kind]
    for part in ('ce', *SMOOTH, *MIXERS):
        if part != 'ce' and part not in KINDS[kind]:
            with pytest.raises(ValueError, match=f"'{part}' does not fit"): read_method(part, kind=kind)
        elif kind in ('images', 'table') and part != 'taxonomy':
            learn = Comparison(data, (part,), epochs=1, seeds=1, bs=16).learner(part, 0)
            with learn.no_logging(): learn.fit(1)
    if kind == 'masks': assert [type(cb).__name__ for cb in method_callbacks('cutmix+ls', kind='masks')] == ['LabelSmoothing', 'CutMixMask']


@pytest.mark.parametrize('args, words', [
    (['words', '--methods', 'mixup'], "'mixup' does not fit texts"), (['iris', '--size', '8'], 'size is for images'),
    (['words', '--arch', 'resnet18'], "use 'characters'"),
    (['digit_masks', '--arch', 'resnet_18'], 'such as resnet18'), (['digit_masks', '--noise', '.1'], 'noise puts'),
    (['digits', '--noise', '0,1'], 'noise must lie'),
    (['digits', '--methods', 'ls~2'], "in 'ls~2'"), (['digits', '--methods', 'ls~x'], 'not a number'),
    (['digits', '--pretrained'], 'no pretrained weights'),
    (['digits', '--lr', '0'], 'lr must be above 0'), (['digits', '--eps', '.1,.x'], '--eps'), (['digits', '--methods', 'spatial'], 'does not fit images')])
def test_mistakes_are_one_line(args, words, tmp_path, capsys):
    try: code = main(['compare', *args, '--out', str(tmp_path/'run')])
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err.strip()
    assert code == 2 and words in err and len(err.splitlines()) == 1 and not (tmp_path/'run').exists()


# -- the recipes on the user's own data, to a learner that predicts from what a user has

def test_train_on_masks(tmp_path, capsys):
    write_masks(tmp_path/'data')
    args = ['train', 'segmentation', str(tmp_path/'data'), '--size', '24', '--bs', '8', '--epochs', '2']
    assert main([*args, '--out', str(tmp_path/'no')]) == 2 and 'ignore=255' in capsys.readouterr().err
    assert main([*args, '--set', 'ignore=255', '--out', str(tmp_path/'run')]) == 0
    learn = load_learner(tmp_path/'run'/'learner.pkl')
    mask, _, p = learn.predict(tmp_path/'data'/'images'/'000.png')
    assert mask.shape == (24, 24) and p.shape == (11, 24, 24) and torch.allclose(p.sum(0), torch.ones(24, 24), atol=1e-4)
    assert 'number in the masks' not in (tmp_path/'run'/'report.html').read_text().split('yours')[0][-200:]


def test_train_on_images_with_several_labels(tmp_path):
    source = read_source('multi_digits')
    rows = []
    for i in range(200):
        Image.fromarray(source.images[i]).save(tmp_path/f'{i}.png')
        rows.append((f'{i}.png', ' '.join(np.array(source.vocab)[source.labels[i]])))
    pd.DataFrame(rows, columns=['file', 'labels']).to_csv(tmp_path/'l.csv', index=False)
    sets = ['presize=40', 'delimiter= ', 'freeze_epochs=0']
    body = ['--arch', 'resnet10t', '--pretrained', 'no', '--size', '32', *(a for s in sets for a in ('--set', s))]
    for name, more in (('multilabel', ['--size', '16']), ('finetune', body)):
        out = tmp_path/name
        assert main(['train', name, str(tmp_path/'l.csv'), '--bs', '16', '--epochs', '1', *more, '--out', str(out)]) == 0
        learn = load_learner(out/'learner.pkl')
        names, hot, p = learn.predict(tmp_path/'0.png')
        assert p.shape == (10,) and list(names) == [learn.dls.vocab[k] for k in np.flatnonzero(hot)] and torch.as_tensor(learn.temperature).numel() == 10


@pytest.mark.parametrize('several', [False, True])
def test_train_on_texts(several, tmp_path):
    write_texts(tmp_path/'t.csv', several)
    delimiter = ['--set', 'delimiter= '] if several else []
    assert main(['train', 'text', str(tmp_path/'t.csv'), *delimiter, '--epochs', '8', '--bs', '32', '--out', str(tmp_path/'run')]) == 0
    learn = load_learner(tmp_path/'run'/'learner.pkl')
    label, _, p = learn.predict('yhdessä')
    assert (list(label) if several else label) in ('fi', ['fi']) and len(p) == 3
    assert 'Sure, and wrong' not in (tmp_path/'run'/'report.html').read_text()
    assert b'yhdess' not in (tmp_path/'run'/'learner.pkl').read_bytes(), "the texts stay at home"


def test_train_on_sentences_with_awd_lstm(tmp_path):
    rows = write_texts(tmp_path/'one.csv', n=400)
    sentences = [(' '.join(t for t, ls in rows[i:i+40] if ls == [k]), k) for k in ('de', 'en', 'fi') for i in range(0, 400, 10)]
    pd.DataFrame(sentences, columns=['text', 'label']).to_csv(tmp_path/'s.csv', index=False)
    out = tmp_path/'run'
    assert main(['train', 'text', str(tmp_path/'s.csv'), '--arch', 'awd_lstm', '--epochs', '1', '--bs', '16', '--out', str(out)]) == 0
    assert load_learner(out/'learner.pkl').predict('minä ja sinä')[0] in ('de', 'en', 'fi')
    assert main(['train', 'text', '--arch', 'awd_lstm', '--out', str(tmp_path/'no')]) == 2


def test_train_on_lines_and_on_a_table(tmp_path):
    rows = write_texts(tmp_path/'t.csv')
    (tmp_path/'lines.txt').write_text('\n'.join(t for t, _ in rows))
    assert main(['train', 'language_model', str(tmp_path/'lines.txt'), '--epochs', '1', '--bs', '32', '--out', str(tmp_path/'lm')]) == 0
    (tmp_path/'empty.txt').write_text('\n')
    with pytest.raises(ValueError, match='0 lines with text'): recipe('language_model').dls(tmp_path/'empty.txt')
    wine = load_wine(as_frame=True).frame
    wine['target'] = [f'kind {k}' for k in wine['target']]
    wine['cellar'] = ['north' if i % 2 else 'south' for i in range(len(wine))]
    wine.to_csv(tmp_path/'wine.csv', index=False)
    args = ['train', 'tabular', str(tmp_path/'wine.csv'), '--epochs', '5', '--bs', '16']
    assert main([*args, '--set', 'target=target', '--out', str(tmp_path/'table')]) == 0
    learn = load_learner(tmp_path/'table'/'learner.pkl')
    assert learn.predict(wine.iloc[0])[2].shape == (3,) and learn.dls.vocab == ['kind 0', 'kind 1', 'kind 2']
    assert main([*args, '--set', 'target=taste', '--out', str(tmp_path/'no')]) == 2


def test_a_recipe_that_takes_no_data_says_so(tmp_path, capsys):
    assert main(['train', 'digits', str(tmp_path), '--out', str(tmp_path/'run')]) == 2 and 'data of its own' in capsys.readouterr().err


def test_another_split_is_another_comparison(tmp_path, capsys):
    rows = write_texts(tmp_path/'t.csv', n=200)
    def write(first):
        with open(tmp_path/'t.csv', 'w', newline='', encoding='utf-8') as f:
            csv.writer(f).writerows([('text', 'label', 'is_valid'), *((t, ls[0], int((i < 60) == first)) for i, (t, ls) in enumerate(rows[:120]))])
    write(True)
    args = ['compare', str(tmp_path/'t.csv'), '--methods', 'ce', '--epochs', '1', '--seeds', '1', '--bs', '8', '--out', str(tmp_path/'run')]
    assert main(args) == 0
    write(False)
    assert main([*args, '--resume']) == 2 and 'fingerprint' in capsys.readouterr().err


def test_methods_of_one_noise_are_paired_however_it_is_written():
    assert base_of(['ce~0.2', 'ls~.2']) == {'ce~0.2': None, 'ls~.2': 'ce~0.2'} and base_of(['ce', 'ls~.2'], .2) == {'ce': None, 'ls~.2': 'ce'}
    for same in (('ls', 'ls@.1'), ('mixup+ls', 'ls+mixup'), ('ce', 'ce~0')):
        with pytest.raises(ValueError, match='twice'): Comparison('digits', same, epochs=1)
    with pytest.raises(ValueError, match='4:4'): Comparison('digits', noise=.2, pairs='4:4')


def test_a_run_that_diverges_is_named_and_not_kept(tmp_path, capsys):
    args = ['compare', '--lr', '1e12', '--epochs', '1', '--seeds', '1', '--methods', 'ce', '--out', str(tmp_path/'run')]
    for more in ([], ['--resume']):
        assert main([*args, *more]) == 2
        assert 'ce with seed 0' in capsys.readouterr().err and not list((tmp_path/'run'/'predictions').iterdir())


def test_a_dollar_is_a_dollar(tmp_path):
    rows = [(f'costs ${i} or $\\foo_{{{i}}}$ {"much" if i % 2 else "little"}', 'dear $$' if i % 2 else 'cheap $') for i in range(120)]
    pd.DataFrame(rows, columns=['text', 'label']).to_csv(tmp_path/'t.csv', index=False)
    assert main(['compare', str(tmp_path/'t.csv'), '--epochs', '1', '--seeds', '1', '--bs', '16', '--out', str(tmp_path/'run')]) == 0
    assert 'What the loss sees' in (tmp_path/'run'/'report.html').read_text(), "the panel that writes the texts themselves"


def test_embedded_recipes_take_the_share_of_the_validation_set():
    assert len(recipe('tabular').dls(valid_pct=.5).valid_ds) == 285
