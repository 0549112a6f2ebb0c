#!/usr/bin/env python
"""What differs between Linux, macOS and Windows: names with spaces and umlauts, processes that import everything anew, files that are replaced,
output that is not UTF-8. (Locks between processes are in tests/test_run_folder.py.) It works in a temporary folder, with the package installed."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = [sys.executable, '-W', 'ignore', '-m', 'fastai_smooth.cli']
PLAIN = {**os.environ, 'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0'} # as where output goes to a file on Windows, which knows no ε


def photos(folder):
    "Digits as image files, in a folder per class"
    from PIL import Image
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    for i in range(300):
        if labels[i] > 2: continue
        to = folder/('Äpfel', 'süße Birnen', 'Quitten')[labels[i]]
        to.mkdir(parents=True, exist_ok=True)
        Image.fromarray((images[i].reshape(8, 8)*15).astype('uint8')).resize((16, 16)).save(to/f'Bild {i}.png')


def run(*args, code=0):
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, encoding='utf-8', env=PLAIN)
    assert done.returncode == code, (args, done.returncode, done.stdout, done.stderr)
    return done.stdout+done.stderr


def main():
    with tempfile.TemporaryDirectory() as tmp:
        data, out = Path(tmp)/'Maße und Größen', Path(tmp)/'Läufe'/'der erste'
        photos(data)
        compare = ('compare', data, '--methods', 'ce,ls', '--seeds', 1, '--epochs', 1, '--jobs', 2, '--out', out)
        assert 'Report: ' in run(*compare) # two trainings at a time, in processes of their own
        assert set(json.loads((out/'summary.json').read_text(encoding='utf-8'))['methods']) == {'ce', 'ls'}
        assert 'süße Birnen' in (out/'report.html').read_text(encoding='utf-8')
        assert 'resume' in run(*compare, code=2)
        assert 'Report: ' in run('compare', '--out', out, '--resume') # every file is written again, over what is there

        learned = Path(tmp)/'gelernt'
        run('train', 'finetune', data, '--arch', 'resnet18', '--pretrained', 'no', '--size', 32, '--epochs', 1, '--out', learned)
        assert 'Temperature' in run('calibrate', learned/'learner.pkl', data, '--out', learned/'kalibriert.pkl')
    print(f'{sys.platform}, Python {sys.version.split()[0]}: names, processes and files work')


if __name__ == '__main__': main()
