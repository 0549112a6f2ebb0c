"The figures that a notebook reads from nbs/figures/distributions.json are those of the file"
import contextlib
import io
import json
from pathlib import Path

import pytest

NBS = Path(__file__).parents[2]/'nbs'


def stored(notebook, part):
    "The code cells from the one that reads a part of the file on, and what they print in the notebook"
    cells = [c for c in json.loads((NBS/notebook).read_text())['cells'] if c['cell_type'] == 'code']
    start = next(i for i, c in enumerate(cells) if f"open('figures/distributions.json'))['{part}']" in ''.join(c['source']))
    return [(''.join(c['source']), ''.join(''.join(o.get('text', '')) for o in c['outputs'])) for c in cells[start-1:]]


@pytest.mark.notebook
@pytest.mark.parametrize('notebook, part', [('10_distributions.base.ipynb', 'costs'), ('12_distributions.learned.ipynb', 'confusable')])
def test_a_notebook_shows_the_file(notebook, part, monkeypatch):
    monkeypatch.chdir(NBS)
    names, shown = {}, 0
    for source, output in stored(notebook, part):
        out = io.StringIO()
        with contextlib.redirect_stdout(out): exec(source, names)
        assert out.getvalue() == output
        shown += bool(output)
    assert shown
