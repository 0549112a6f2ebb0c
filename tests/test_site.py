"The pages that .ci/site.py writes: complete, linked, without a network; and in a real browser, wide and narrow (needs chromium: apt-get install chromium)"
import ast
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from nbdev.config import nbpath2html

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(p.relative_to(NBS) for p in NBS.rglob('[!.]*.ipynb') if '.ipynb_checkpoints' not in p.parts)
BROWSER = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
# opens each page in a frame of each width and asks it what it looks like from inside; then a click on a link that leads into something folded
PROBE = '''<!doctype html><title>waiting</title><script>
const open = (url, width) => new Promise(done => { const f = document.createElement('iframe');
  f.style = `width:${width}px;height:800px;border:0`; f.onload = () => done(f); f.src = url; document.body.append(f) });
addEventListener('load', async () => { const said = []; for (const url of PAGES) for (const width of [1280, 375]) {
  const f = await open(url, width), d = f.contentDocument, root = d.documentElement, seen = e => e.getClientRects().length > 0;
  d.querySelectorAll('details').forEach(e => e.open = true);
  said.push({url, width, inner: f.contentWindow.innerWidth, content: Math.max(root.scrollWidth, d.body.scrollWidth),
    empty: [...d.images].filter(i => !i.complete || !i.naturalWidth).length, styled: getComputedStyle(d.querySelector('main')).overflowWrap == 'break-word',
    flat: [...d.querySelectorAll('math')].filter(m => seen(m) && m.getBoundingClientRect().height < 5).length,
    outside: [...d.querySelectorAll('main *')].filter(e => seen(e) && !e.closest('.scroll, math') && e.getBoundingClientRect().right > width + 1).length,
    smallest: Math.min(...[...d.querySelectorAll('p, td, pre, summary, nav a')].filter(seen).map(e => parseFloat(getComputedStyle(e).fontSize)))});
  f.remove() } document.title = JSON.stringify(said) });
</script><body></body>'''


class Reader(HTMLParser):
    "What a page says of itself"
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.images, self.text, self.attributes, self.skip, self.tags = [], [], [], [], {}, 0, set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if 'id' in attrs: self.ids.append(attrs['id'])
        if tag in ('a', 'link') and 'href' in attrs: self.links.append(attrs['href'])
        if tag == 'img': self.images.append(attrs)
        if tag in ('html', 'meta'): self.attributes |= {attrs.get('name', tag): attrs.get('content', attrs.get('lang'))}
        self.skip += tag in ('pre', 'code')

    def handle_endtag(self, tag): self.skip -= tag in ('pre', 'code')

    def handle_data(self, data):
        if not self.skip: self.text.append(data)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the site"
    out = tmp_path_factory.mktemp('site')
    res = subprocess.run([sys.executable, '-W', 'ignore', str(ROOT/'.ci'/'site.py'), str(out)], capture_output=True, text=True)
    assert res.returncode == 0, res.stderr[-3000:]
    return out


@pytest.fixture(scope='module')
def pages(site): return {p.relative_to(site).as_posix(): p.read_text(encoding='utf-8') for p in site.rglob('*.html')}


@pytest.fixture(scope='module')
def read(pages): return {name: Reader(text) for name, text in pages.items()}


def test_every_notebook_has_its_page_and_no_other(pages, read):
    assert sorted(pages) == sorted(nbpath2html(p).as_posix() for p in NOTEBOOKS)
    titles = [re.search('<title>(.*?)</title>', t)[1] for t in pages.values()]
    assert len(set(titles)) == len(titles)
    for r in read.values():
        assert r.attributes['html'] == 'en' and r.attributes['viewport'] and len(r.attributes['description']) > 10
        assert 'script' not in r.tags and {'main', 'nav', 'h1'} <= r.tags


def test_no_link_inside_is_broken(site, read):
    broken = []
    for name, r in read.items():
        assert len(set(r.ids)) == len(r.ids), f'{name} has an anchor twice'
        for link in r.links:
            parts = urlsplit(urljoin(f'/{name}', link))
            if parts.scheme: continue
            target = unquote(parts.path.lstrip('/'))
            if not (site/target).is_file() or parts.fragment and unquote(parts.fragment) not in read[target].ids: broken.append(f'{name}: {link}')
    assert not broken


def test_next_and_previous_walk_through_all_pages(pages):
    seen, name = [], 'index.html'
    while name:
        seen.append(name)
        follow = re.search(r'<a rel="next" href="(.*?)"', pages[name])
        following = urljoin(f'/{name}', follow[1]).lstrip('/') if follow else None
        if following: assert urljoin(f'/{following}', re.search(r'<a rel="prev" href="(.*?)"', pages[following])[1]).lstrip('/') == name
        name = following
    assert sorted(seen) == sorted(pages)


def test_images_have_a_text_and_data(site, read):
    for name, r in read.items():
        for img in r.images:
            assert len(img.get('alt') or '') > 3, f'{name}: a picture without a text'
            assert img['src'].startswith('data:image/') and len(img['src']) > 200 or (site/Path(name).parent/img['src']).is_file(), f'{name}: {img["src"][:60]}'
    assert sum(len(r.images) for r in read.values()) > 20


def test_formulas_are_mathml_and_directives_are_gone(pages, read):
    for name, r in read.items():
        text = ' '.join(r.text)
        assert not re.search(r'\$[^$]+\$|\\(?:frac|sum|varepsilon|begin|mathrm)\b', text), f'{name}: a formula is left'
        assert not re.search(r'^\s*#\|', html.unescape(re.sub(r'<[^>]*>', '', pages[name])), re.M), f'{name}: a directive is left'
        assert 'math' not in re.findall(r'<code[^>]*>[^<]*<(math)', pages[name]), f'{name}: a formula in code'
    assert sum(t.count('<math') for t in pages.values()) > 50


def test_exported_names_are_described(pages):
    from fastai_smooth.losses import LabelSmoothingCrossEntropy
    page = pages['losses.html']
    section = page[page.index('id="labelsmoothingcrossentropy"'):]
    assert LabelSmoothingCrossEntropy.__doc__.split(',')[0] in section and 'a factor of the class' in section[:section.index('<details')]
    assert 'id="learner.eps_find"' in pages['eps_find.html'] and 'id="calibrationinterpretation.plot_reliability"' in pages['interpretation.html']
    assert not any(re.search(r' at 0x[0-9a-f]+', t) for t in pages.values())


def test_a_formula_that_cannot_be_converted_is_an_error(tmp_path):
    code = ("import runpy; Renderer = runpy.run_path('.ci/site.py', run_name='pages')['Renderer']; r = Renderer.__new__(Renderer)\n"
            "r.page = type('P', (), {'path': 'x.ipynb'}); print(r.formula(r'\\frac12', False)); r.formula(r'\\nosuch', False)")
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert '<mfrac>' in res.stdout and 'ValueError: x.ipynb: cannot convert the formula' in res.stderr


def test_quarto_has_the_same_settings():
    "nbs/nbdev.yml and nbs/_quarto.yml are what nbdev writes, so that building the documentation leaves no change behind"
    from nbdev import quarto
    from nbdev.config import get_config
    cfg = get_config(path=ROOT)
    values = {**{k: cfg[k] for k in ('title', 'description', 'branch', 'git_url', 'doc_host', 'doc_baseurl')}, 'doc_path': cfg.doc_path.name}
    assert (NBS/'nbdev.yml').read_text() == quarto._nbdev_yml.format(**values)
    assert (NBS/'_quarto.yml').read_text().strip() == quarto._quarto_yml.strip()
    assert cfg.custom_sidebar, "otherwise nbdev writes its own order over nbs/sidebar.yml"


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if '#| default_exp' in (NBS/p).read_text(encoding='utf-8')], ids=lambda p: p.stem)
def test_cells_that_import_do_nothing_else(path):
    "nbdev, building the documentation of a module, runs the cells that import anything, and none of the cells that these rely on"
    for cell in json.loads((NBS/path).read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or re.search(r'^#\| *(export|exporti|default_exp|eval: false)', source, re.M): continue
        nodes = ast.parse(source).body
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes]
        inside = any(isinstance(n, (ast.Import, ast.ImportFrom)) for o in nodes for n in ast.walk(o))
        assert not inside or all(imports), f'give the imports of cell {cell["id"]} a cell of their own: {source[:80]!r}'


# left out where there is no browser: the list is empty
@pytest.mark.parametrize('browser', [BROWSER] if BROWSER else [])
def test_in_a_browser(browser, site, pages, tmp_path):
    (tmp_path/'frame.html').write_text(PROBE.replace('PAGES', json.dumps([(site/name).as_uri() for name in pages])))
    res = subprocess.run([browser, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', '--allow-file-access-from-files',
                          '--window-size=1400,1000', '--virtual-time-budget=60000', '--dump-dom', f'file://{tmp_path}/frame.html'],
                         capture_output=True, text=True, timeout=180)
    said = json.loads(html.unescape(re.search(r'<title>(.*?)</title>', res.stdout, re.S).group(1)))
    assert len(said) == 2*len(pages)
    for s in said:
        assert s['content'] <= s['inner'] == s['width'] and not s['outside'], f'{s}: no scrolling sideways, except inside boxes'
        assert s['empty'] == s['flat'] == 0 and s['styled'] and s['smallest'] >= 12, s
    assert 'CONSOLE' not in res.stderr, re.findall('.*CONSOLE.*', res.stderr)
