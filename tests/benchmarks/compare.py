"""What `compare` costs over the same trainings in a bare fastai loop, and its memory over the seeds: python tests/benchmarks/compare.py

CPU seconds of one thread, in turn, so that what else the machine does falls on both alike. Memory is the highest that the process ever had,
in a process of its own for each number of seeds."""
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import torch
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import fit_one_cycle  # noqa: F401  (gives the Learner this method)
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed

from fastai_smooth.callback import LabelSmoothing
from fastai_smooth.data import digits
from fastai_smooth.recipes import Comparison, small_convnet

EPOCHS, SEEDS = 12, 3


def bare():
    "What anybody would write: four methods, two seeds, predictions of the validation set"
    for seed in range(SEEDS):
        for cbs in (lambda: [], lambda: [LabelSmoothing(.1)], lambda: [LabelSmoothing(0.), MixUp()], lambda: [LabelSmoothing(.1), MixUp()]):
            set_seed(seed, reproducible=True)
            learn = Learner(digits(seed=seed), small_convnet(1, 10), loss_func=CrossEntropyLossFlat(), cbs=cbs())
            with learn.no_bar(), learn.no_logging():
                learn.fit_one_cycle(EPOCHS, 3e-3)
                learn.get_preds()


def compared(seeds=SEEDS, epochs=EPOCHS, methods=None):
    with tempfile.TemporaryDirectory() as folder: Comparison('digits', methods, epochs=epochs, seeds=seeds, out=f'{folder}/run').run(progress=False)


def seconds(f):
    start = time.process_time()
    f()
    return time.process_time()-start


def peak(seeds):
    "MiB"
    code = f"import sys; sys.path.insert(0, {sys.path[0]!r}); import compare; compare.compared({seeds}, 1, ('ce', 'ls')); compare.report_peak()"
    return float(subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True, capture_output=True, text=True).stdout.split()[-1])


def report_peak(): print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    bare()
    pairs = [(seconds(bare), seconds(compared)) for _ in range(3)]
    ratios = [b/a for a, b in pairs]
    print(f'{len(pairs)} times {4*SEEDS} trainings of {EPOCHS} epochs: bare {statistics.median(a for a, _ in pairs):.1f} s, '
          f'compare with folder and report {statistics.median(b for _, b in pairs):.1f} s, '
          f'ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})')
    print('peak memory by seeds, MiB: ' + ', '.join(f'{n}: {peak(n):.0f}' for n in (2, 8, 32)))
