"The report: complete, self-contained, and opened in a real browser, wide and narrow (needs chromium: apt-get install chromium)"
import html
import json
import re
import shutil
import subprocess

import matplotlib.pyplot as plt
import numpy as np
import pytest
from users_files import write_digits

from fastai_smooth.compare import Comparison
from fastai_smooth.compare import pictures as pages

BROWSER = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
SECTIONS = ['Figures', 'At a glance', 'By strength', 'Reliability', 'Confidence', 'Which answers to doubt', 'Training', 'What the loss sees',
            'Sure, and wrong', 'Again']
# what the page says about itself, from inside
PROBE = '''<script>addEventListener('load', () => setTimeout(() => { const imgs = [...document.images];
parent.document.title = JSON.stringify({
broken: imgs.filter(i => !i.complete || !i.naturalWidth).length, images: imgs.length, alt: imgs.every(i => i.alt.length > 10),
width: document.documentElement.scrollWidth, inner: innerWidth,
headings: [...document.querySelectorAll('h2')].map(h => h.textContent),
focusable: document.querySelectorAll('[tabindex="0"][aria-label]').length,
scripts: document.querySelectorAll('script').length,
smallest: Math.min(...[...document.querySelectorAll('p, td, figcaption')].map(e => parseFloat(getComputedStyle(e).fontSize)))}) }, 50))</script>'''


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A comparison of a folder with a name that would break a careless page"
    folder = tmp_path_factory.mktemp('r')/'digits <b>&x'
    write_digits(folder, 300, nested=False)
    c = Comparison(folder, ('ce', 'mixup', 'ls', 'mixup+ls', 'ols'), eps=[.1, .3], epochs=2, seeds=2, size=16, bs=32, out=folder.parent/'run')
    return c, c.run(progress=False), (folder.parent/'run'/'report.html').read_text()


def test_page_is_complete_and_alone(run):
    c, summary, page = run
    assert html.escape(summary['verdict'], quote=False) in page.replace('&#39;', "'").replace('&#34;', '"') or summary['verdict'] in html.unescape(page)
    assert page.index(html.unescape(summary['verdict'])[:20]) < page.index('<table')
    assert '<b>&x' not in page and re.findall(r'<h2>(.*?)</h2>', page) == SECTIONS
    assert not re.search(r'(?:src|href)="(?!data:)', page) and '<script' not in page
    for m, f in summary['methods'].items(): assert f'<td>{m}</td>' in page and f"{f['nll_ts']['mean']:.3f}" in page
    command = html.unescape(re.search(r'<code>(.*?)</code>', page).group(1))
    assert command.startswith('fastai-smooth compare') and '--methods ce,mixup,ls@0.1,ls@0.3' in command and 'torch' in page


def test_targets_are_what_the_loss_sees(run):
    "The bars under the images: shares that the images were mixed with, smoothed"
    fig = pages.plot_targets(run[0])
    for ax in fig.axes[2::3] if len(fig.axes) < 15 else fig.axes[10:15]:
        widths = sorted((p.get_width() for p in ax.patches), reverse=True)
        assert sum(widths) == pytest.approx(1, abs=1e-4) and min(widths) == pytest.approx(.01, abs=1e-4), "ε = .1 over 10 classes"
    plt.close('all')


def test_a_panel_per_method_however_many(run):
    c = run[0]
    assert len(c.methods) == 8, "two strengths of three methods"
    for plot, panels in ((pages.plot_confidence, 8), (pages.plot_reliability, 16)):
        shown = [ax for ax in plot(c).axes if ax.get_visible()]
        assert len(shown) == panels and all(ax.patches for ax in shown)
    for plot, n_axes in ((pages.plot_risk, 1), (pages.plot_losses, 2)):
        fig = plot(c)
        assert len(fig.axes) == n_axes and all(len(ax.lines) == 8 for ax in fig.axes)


def test_errors_show_their_own_images(run):
    c = run[0]
    fig = pages.plot_errors(c)
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
@pytest.mark.parametrize('width', [1280, 390] if BROWSER else [])
def test_in_a_browser(width, run, tmp_path):
    inside = html.escape(run[2].replace('</body>', PROBE+'</body>'))
    frame = f'<iframe srcdoc="{inside}" style="width:{width}px;height:900px;border:0"></iframe>'
    (tmp_path/'frame.html').write_text(f'<!doctype html><title>waiting</title>{frame}')
    res = subprocess.run([BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', '--window-size=1400,1000',
                          '--virtual-time-budget=5000', '--dump-dom', f'file://{tmp_path}/frame.html'], capture_output=True, text=True, timeout=120)
    said = json.loads(html.unescape(re.search(r'<title>(.*?)</title>', res.stdout, re.S).group(1)))
    assert said['broken'] == 0 and said['images'] == 8 and said['alt'] and said['headings'] == SECTIONS
    assert said['width'] <= said['inner'] == width, "no scrolling sideways, except inside tables and pictures"
    assert said['focusable'] == 10 and said['smallest'] >= 13 and said['scripts'] == 1, "the probe is the only script"
    assert 'CONSOLE' not in res.stderr, re.findall('.*CONSOLE.*', res.stderr)
