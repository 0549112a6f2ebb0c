"Every notebook runs from top to bottom, in its own process, and has been committed with its outputs"
import json
from pathlib import Path

import notebooks
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and not p.name.startswith('.')),
                   key=lambda p: (p.parent.name != 'tutorials', p))  # tutorials take longest: first, so that no process waits for another at the end
pytestmark = pytest.mark.notebook


TORCH_ONLY = '0', '1', '2', '3'  # notebooks of rooms that do without fastai, which changes how torch compares tensors


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path):
    log = tmp_path/'log'
    failed = notebooks.fails(str(path), str(log), str(ROOT), notebooks.TORCH if path.name.startswith(TORCH_ONLY) else notebooks.FASTAI)
    assert not failed, log.read_text(encoding='utf-8')[-3000:]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stored_as_it_should_be(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    first = ''.join(nb['cells'][0]['source'])
    assert nb['cells'][0]['cell_type'] == 'markdown' and first.startswith('# ') and '\n> ' in first, "an H1 and a > subtitle open it"
    assert all(c['execution_count'] is None and c['id'] for c in code) and len({c['id'] for c in nb['cells']}) == len(nb['cells'])
    assert not any(o['output_type'] == 'error' for c in code for o in c['outputs'])
    assert any(c['outputs'] for c in code), "committed with its outputs"
