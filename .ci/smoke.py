#!/usr/bin/env python
"What a user does first, with the package installed and away from the checkout: .ci/wheel runs this in an environment of its own"
# ruff: noqa: F403, F405
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from fastai.vision.all import *

import fastai_smooth
from fastai_smooth.all import *

assert Path(fastai_smooth.__file__).is_relative_to(sys.prefix), f'{fastai_smooth.__file__} is not the installed package'
assert version('fastai_smooth') == fastai_smooth.__version__

set_seed(0, reproducible=True)
logits, labels = torch.randn(8, 5), torch.arange(8) % 5
torch.testing.assert_close(LabelSmoothingCrossEntropy(.1)(logits, labels), F.cross_entropy(logits, labels, label_smoothing=.1))

loss_func = CrossEntropyLossFlat()
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
learn = Learner(digits(), model, loss_func=loss_func, metrics=[accuracy, ECE()], cbs=[LabelSmoothing(.1), MixUp(), CutMix()])
with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
assert learn.loss_func is loss_func and learn.recorder.values[-1][2] > .7, learn.recorder.values
with learn.no_bar(): calibrated = TemperatureScaling(learn).fit()
assert 0 < calibrated.temperature < 10
export = Path.cwd()/'learner.pkl'
calibrated.export(export)
assert load_learner(export).predict(learn.dls.valid_ds[0][0])[0] in [str(i) for i in range(10)]

command = str(Path(sys.executable).parent/'fastai-smooth')
assert subprocess.run([command, '--version'], capture_output=True, text=True, check=True).stdout.strip() == fastai_smooth.__version__
assert 'pets' in subprocess.run([command, 'list'], capture_output=True, text=True, check=True).stdout
subprocess.run([command, 'compare', 'digits', '--seeds', '1', '--epochs', '1', '--methods', 'ce,ls', '--out', 'run'], stdout=subprocess.DEVNULL, check=True)
assert set(json.loads(Path('run/summary.json').read_text())['methods']) == {'ce', 'ls'} and Path('run/report.html').stat().st_size > 10_000
assert subprocess.run([command, 'compare', 'nosuch'], capture_output=True).returncode == 2
print(f'fastai_smooth {fastai_smooth.__version__}: callback, losses, temperature, export and command work')
