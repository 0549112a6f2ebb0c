"""How often the 95% intervals of `fastai_smooth.calibration.intervals` hold the truth, on models whose figures are known

    python tests/benchmarks/coverage.py                 a table
    python tests/benchmarks/coverage.py --runs 1000"""
import argparse
import sys

import torch
from fastai.losses import CrossEntropyLossFlat

from fastai_smooth.calibration import Predictions, intervals

NAMES = 'accuracy', 'nll', 'brier', 'aurc'
MODELS = {'right 75%, calibrated': (2., 1.), 'right 75%, overconfident': (2., 2.), 'right 95%, calibrated': (8., 1.)}


def draw(n, sharpness, factor, g):
    "Predictions whose labels come from logits `factor` times smaller"
    z = sharpness*torch.randn(n, 5, generator=g)
    y = torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]
    return Predictions.of(factor*z, y, CrossEntropyLossFlat())


def coverage(n, sharpness, factor, runs, n_boot=400):
    "Share of the intervals that hold the figures of 400,000 examples, by name"
    truth = draw(400_000, sharpness, factor, torch.Generator().manual_seed(10**6)).figures(NAMES)
    held = dict.fromkeys(NAMES, 0)
    for seed in range(runs):
        found = intervals(draw(n, sharpness, factor, torch.Generator().manual_seed(seed)), NAMES, n_boot, seed)
        for name in NAMES: held[name] += found[f'{name}_low'] <= truth[name] <= found[f'{name}_high']
    return {name: v/runs for name, v in held.items()}


def main(runs=300):
    print(f'{"model":28}{"n":>6}' + ''.join(f'{name:>10}' for name in NAMES))
    for name, (sharpness, factor) in MODELS.items():
        for n in (200, 1000):
            print(f'{name:28}{n:6}' + ''.join(f'{v:10.1%}' for v in coverage(n, sharpness, factor, runs).values()), flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--runs', type=int, default=300)
    sys.exit(main(**vars(parser.parse_args())))
