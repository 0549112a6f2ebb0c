"What the texts tell a reader to type works: README's Python from top to bottom, every command line anywhere"
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastai_smooth.cli import _parser
from fastai_smooth.train import recipes

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)


def texts():
    "The prose of every Markdown file and notebook, by name"
    for p in sorted(ROOT.glob('*.md')): yield p.name, p.read_text(encoding='utf-8')
    for p in sorted((ROOT/'nbs').rglob('[!.]*.ipynb')):
        cells = json.loads(p.read_text(encoding='utf-8'))['cells']
        yield p.name, '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def commands():
    "Every `fastai-smooth ...` that is shown, with the name of its text"
    for name, text in texts():
        lines = [line for _, block in FENCE.findall(text) for line in block.replace('\\\n', ' ').split('\n')]
        lines += [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', FENCE.sub('', text))]
        for line in dict.fromkeys(lines):
            for part in re.split(r"(?:&&|;|\|)(?=(?:[^']*'[^']*')*[^']*$)", line):  # outside quotes
                if re.match(r'fastai-smooth\s+\S', part.strip()): yield name, part.strip()


def subcommands():
    "The parser of each command"
    return next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def words(text):
    "Lines without their numbers, and without the one that tells too sure from too modest"
    lines = [re.sub(r"[-\d.:'%]+", '#', line).strip() for line in text.strip().split('\n')]
    return [line for line in lines if not line.startswith('Reliability')]


@pytest.mark.parametrize('name, line', sorted(set(commands())), ids=lambda o: o)
def test_commands_exist_with_their_options(name, line):
    words = shlex.split(line, comments=True)[1:]
    if words[0].startswith('-'): return
    parser = subcommands()[words[0]]
    if len(words) == 1: return  # named in passing
    if '[' in line:  # a synopsis
        shown = {w.replace('_', '-') for w in re.findall(r'--[\w-]+', line)}
        assert shown <= set(parser._option_string_actions) | {'--SETTING'}, 'an option that does not exist'
        return
    args = _parser().parse_args(words)
    if args.command == 'train': assert args.recipe in recipes


def test_readme_names_the_main_commands():
    shown = {shlex.split(line)[1] for name, line in commands() if name == 'README.md'}
    assert {'compare', 'train'} <= shown <= set(subcommands())


@pytest.mark.slow
@pytest.mark.processes
def test_readmes_python_runs(tmp_path):
    "All blocks in one namespace, as a reader would paste them; what is printed is what README prints, but for the numbers"
    blocks = FENCE.findall((ROOT/'README.md').read_text(encoding='utf-8'))
    code = [block for kind, block in blocks if kind == 'python']
    expected = [blocks[i+1][1] if i+1 < len(blocks) and not blocks[i+1][0] else '' for i, (kind, _) in enumerate(blocks) if kind == 'python']
    assert len(code) >= 3
    script = '\n'.join(f'{block}\nprint("=====", {i})' for i, block in enumerate(code))
    (tmp_path/'readme.py').write_text(script, encoding='utf-8')
    env = {**os.environ, 'MPLBACKEND': 'agg', 'OMP_NUM_THREADS': '1'}
    res = subprocess.run([sys.executable, '-W', 'ignore', 'readme.py'], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert res.returncode == 0, res.stderr[-3000:]
    for block, said, shown in zip(code, re.split(r'^===== \d+\n', res.stdout, flags=re.M), expected):
        if 'eps_find' in block: continue  # which strength is the best, and whether that is sure, is the machine's to say
        assert words(said) == words(shown), f'{block}\nprinted\n{said}'
