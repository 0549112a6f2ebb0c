#!/usr/bin/env python
"Write README.md from nbs/index.ipynb; with --check, only say whether it is up to date"
import re
import sys
from pathlib import Path

from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent


def cell_lines(cell):
    "The Markdown of one cell: prose as it is, code fenced (unless `echo: false`), text outputs as quoted blocks"
    if cell.cell_type == 'markdown': return [cell.source, '']
    lines = cell.source.split('\n')
    directives = {''.join(line[2:].split()) for line in lines if line.startswith('#|')}
    if 'hide' in directives: return []
    code = '\n'.join(line for line in lines if not line.startswith('#|')).strip()
    res = [] if 'echo:false' in directives else ['```python', code, '```', '']
    for output in cell.get('outputs', []):
        text = output.get('text') if output['output_type'] == 'stream' and output.get('name') == 'stdout' else output.get('data', {}).get('text/plain')
        if text: res += ['```', ''.join(text).split('\r')[-1].strip(), '```', ''] # the last state of a progress bar
    return res


def from_root(text):
    "Links as they are seen from the root of the repository: of the index to other notebooks, and of its pages to files"
    text = re.sub(r'\]\((?!https?:|#|nbs/)([^)]+\.(?:ipynb|png))\)', r'](nbs/\1)', text)
    return re.sub(r'\]\(https://github\.com/[^/]+/[^/]+/blob/main/', '](', text)


def readme():
    nb = read_nb(ROOT/'nbs'/'index.ipynb')
    text = from_root('\n'.join(line for cell in nb.cells for line in cell_lines(cell)))
    return '<!-- Written by .ci/readme.py from nbs/index.ipynb: edit that. -->\n\n' + text.rstrip() + '\n'


def images():
    "Pictures that the index attaches to its Markdown cells would not reach README: there must be none"
    nb = read_nb(ROOT/'nbs'/'index.ipynb')
    return [c.id for c in nb.cells if c.get('attachments')]


if __name__ == '__main__':
    path, text = ROOT/'README.md', readme()
    if images(): sys.exit(f'nbs/index.ipynb has attached pictures in cells {images()}: store them as files in nbs/images.')
    if '--check' in sys.argv:
        if not path.exists() or path.read_text(encoding='utf-8') != text: sys.exit('README.md is not what nbs/index.ipynb says: run .ci/readme.py')
    else: path.write_text(text, encoding='utf-8')
