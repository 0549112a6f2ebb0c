"""Writes the figures that README shows, by the command that README names: `python tests/benchmarks/readme.py` (about ten minutes on two cores)"""
import subprocess
import sys
import tempfile
from pathlib import Path

FIGURES = Path(__file__).resolve().parents[2]/'nbs'/'figures'
COMMANDS = {'compare_mnist5k': 'compare mnist5k --noise .2 --eps .3 --seeds 5'}


def printed(command):
    "What `fastai-smooth COMMAND` prints as its result: the table and the verdict"
    with tempfile.TemporaryDirectory() as folder:
        whole = [sys.executable, '-W', 'ignore', '-m', 'fastai_smooth.cli', *command.split(), '--out', f'{folder}/run']
        res = subprocess.run(whole, stdout=subprocess.PIPE, text=True, check=True)
    lines = res.stdout.split('\r')[-1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith('| method'))
    return '\n'.join(line for line in lines[start:] if folder not in line).strip() + '\n'


if __name__ == '__main__':
    for name, command in COMMANDS.items(): (FIGURES/f'{name}.txt').write_text(printed(command), encoding='utf-8')
