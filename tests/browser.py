"Pages opened in a real browser (needs chromium: apt-get install chromium)"
import html
import json
import re
import shutil
import subprocess

BROWSER = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
# what the page says about itself, from inside
PROBE = '''<script>addEventListener('load', () => setTimeout(() => { const imgs = [...document.images];
parent.document.title = JSON.stringify({
broken: imgs.filter(i => !i.complete || !i.naturalWidth).length, images: imgs.length, alt: imgs.every(i => i.alt.length > 10),
width: document.documentElement.scrollWidth, inner: innerWidth,
headings: [...document.querySelectorAll('h2')].map(h => h.textContent),
focusable: document.querySelectorAll('[tabindex="0"][aria-label]').length,
scripts: document.querySelectorAll('script').length,
smallest: Math.min(...[...document.querySelectorAll('p, td, figcaption')].map(e => parseFloat(getComputedStyle(e).fontSize)))}) }, 50))</script>'''


def look_at(page, width, tmp_path):
    "What a page says about itself in a window of that width, and what it logs"
    inside = html.escape(page.replace('</body>', PROBE+'</body>'))
    frame = f'<iframe srcdoc="{inside}" style="width:{width}px;height:900px;border:0"></iframe>'
    (tmp_path/'frame.html').write_text(f'<!doctype html><title>waiting</title>{frame}')
    res = subprocess.run([BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', '--window-size=1400,1000',
                          '--virtual-time-budget=5000', '--dump-dom', f'file://{tmp_path}/frame.html'], capture_output=True, text=True, timeout=120)
    said = json.loads(html.unescape(re.search(r'<title>(.*?)</title>', res.stdout, re.S).group(1)))
    return said, re.findall('.*CONSOLE.*', res.stderr)
