"The report: complete, self-contained, and opened in a real browser, wide and narrow (needs chromium: apt-get install chromium)"
import html
import re

import numpy as np
import pytest
from browser import BROWSER, look_at
from users_files import write_digits

from fastai_smooth.compare import Comparison
from fastai_smooth.compare.pictures import plot_confidence, plot_differences, plot_errors, plot_losses, plot_reliability, plot_risk, plot_targets

pytestmark = pytest.mark.slow
SECTIONS = ['Figures', 'At a glance', 'By strength', 'Reliability', 'Confidence', 'Which answers to doubt', 'Training', 'What the loss sees',
            'Sure, and wrong', 'Again']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A comparison of a folder with a name that would break a careless page"
    folder = tmp_path_factory.mktemp('r')/'digits <b>&x'
    write_digits(folder, 300, nested=False)
    c = Comparison(folder, ('ce', 'mixup', 'ls', 'mixup+ls', 'ols'), eps=[.1, .3], epochs=2, seeds=2, size=16, bs=32, out=folder.parent/'run')
    return c, c.run(progress=False), (folder.parent/'run'/'report.html').read_text()


def test_page_is_complete_and_alone(run):
    c, summary, page = run
    assert summary['verdict'] in html.unescape(page) and page.index(summary['verdict'][:20]) < page.index('alt="Differences') < page.index('<table')
    assert '-0.000' not in page and '2 seeds' in page and 'What the verdict means' in page
    heads = re.findall(r'<th scope="col">(.*?)</th>', page)[:6]
    assert heads == ['method', 'accuracy', 'NLL, refinement', 'NLL, calibration', 'T', 'ECE (if calibrated)'], "what decides, at the left"
    assert '<b>&x' not in page and re.findall(r'<h2>(.*?)</h2>', page) == SECTIONS
    assert not re.search(r'(?:src|href)="(?!data:)', page) and '<script' not in page
    for m, f in summary['methods'].items(): assert f'<td>{m}</td>' in page and f"{f['nll_ts']['mean']:.3f}" in page
    command = html.unescape(re.search(r'<code>(.*?)</code>', page).group(1))
    assert command.startswith('fastai-smooth compare') and '--methods ce,mixup,ls@0.1,ls@0.3' in command and 'torch' in page


def test_targets_are_what_the_loss_sees(run):
    "The bars under the images: shares that the images were mixed with, smoothed"
    fig = plot_targets(run[0])
    for ax in fig.axes[2::3] if len(fig.axes) < 15 else fig.axes[10:15]:
        widths = sorted((p.get_width() for p in ax.patches), reverse=True)
        assert sum(widths) == pytest.approx(1, abs=1e-4) and min(widths) == pytest.approx(.01, abs=1e-4), "ε = .1 over 10 classes"


def test_a_panel_per_method_however_many(run):
    c = run[0]
    assert len(c.methods) == 8, "two strengths of three methods"
    for plot in (plot_confidence, plot_reliability): assert len([ax for ax in plot(c).axes if ax.get_visible()]) == 8
    for plot, n_axes in ((plot_risk, 1), (plot_losses, 2)):
        fig = plot(c)
        assert len(fig.axes) == n_axes and all(len(ax.lines) == 8 for ax in fig.axes)
        looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in fig.axes[0].lines}
        assert len(looks) == 8, "told apart by colour, line and marker"


def test_reliability_is_what_loops_say(run):
    "Ten groups of equal size: mean confidence and share of right answers"
    c = run[0]
    z, y = (np.concatenate([c.predictions[r][k] for r in c.predictions if r[0] == 'mixup']) for k in ('logits', 'labels'))
    p = np.exp(z.astype(float)-z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    order = p.max(1).argsort(kind='stable')
    expected = [(p.max(1)[g].mean(), (p.argmax(1) == y)[g].mean()) for g in np.array_split(order, 10)]
    ax = plot_reliability(c).axes[c.methods.index('mixup')]
    np.testing.assert_allclose(np.stack(ax.lines[0].get_data(), 1)[:, 0], [x for x, _ in expected], atol=1e-6)
    assert abs(ax.lines[0].get_ydata().mean()-np.mean([r for _, r in expected])) < 1e-6


def test_forest_shows_the_intervals_of_the_verdict(run):
    found = run[0].evidence().differences()
    ax = plot_differences(found).axes[0]
    bars = [c.lines[2][0].get_segments()[0][:, 0] for c in ax.containers]
    np.testing.assert_allclose(bars, [(d['nll_ts'].low, d['nll_ts'].high) for d in found.values()])
    assert plot_differences({}) is None and [t.get_text() for t in ax.get_yticklabels()] == list(found)


def test_errors_show_their_own_images(run):
    c = run[0]
    fig = plot_errors(c)
    best = c.best_method()
    wrong = {}
    for (m, _), p in c.predictions.items():
        if m != best: continue
        z = p['logits'].astype(float)
        prob = np.exp(z-z.max(1, keepdims=True))
        prob /= prob.sum(1, keepdims=True)
        for i, y, row in zip(p['items'], p['labels'], prob):
            if row.argmax() != y: wrong.setdefault(f'{c.vocab[y]}\nnot {c.vocab[row.argmax()]}\n{row.max():.2f}', []).append(c.source.images[i])
    assert fig.axes
    for ax in fig.axes:
        shown, candidates = ax.images[0].get_array(), [i.astype(float).transpose(1, 2, 0) for i in wrong[ax.get_title()]]
        assert any(np.allclose(shown, (i-i.min())/(i.max()-i.min()), atol=1e-6) for i in candidates)


# left out where there is no browser: the list of widths is empty
@pytest.mark.browser
@pytest.mark.parametrize('width', [1280, 390] if BROWSER else [])
def test_in_a_browser(width, run, tmp_path):
    said, log = look_at(run[2], width, tmp_path)
    assert said['broken'] == 0 and said['images'] == 9 and said['alt'] and said['headings'] == SECTIONS
    assert said['width'] <= said['inner'] == width, "no scrolling sideways, except inside tables and pictures"
    assert said['focusable'] == 12 and said['smallest'] >= 13 and said['scripts'] == 1, "the probe is the only script"
    assert not log
