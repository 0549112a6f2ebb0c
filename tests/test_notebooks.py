"Every notebook runs from top to bottom, in its own process, and has been committed with its outputs"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and not p.name.startswith('.'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    code = f"from nbdev.test import test_nb; import sys; ok, _ = test_nb({str(path)!r}, basepath={str(ROOT)!r}, skip_flags=['slow']); sys.exit(not ok)"
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}  # two threads get in each other's way as soon as anything else runs
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert res.returncode == 0, res.stderr[-3000:]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stored_as_it_should_be(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    first = ''.join(nb['cells'][0]['source'])
    assert nb['cells'][0]['cell_type'] == 'markdown' and first.startswith('# ') and '\n> ' in first, "an H1 and a > subtitle open it"
    assert all(c['execution_count'] is None and c['id'] for c in code) and len({c['id'] for c in nb['cells']}) == len(nb['cells'])
    assert not any(o['output_type'] == 'error' for c in code for o in c['outputs'])
    assert any(c['outputs'] for c in code), "committed with its outputs"
