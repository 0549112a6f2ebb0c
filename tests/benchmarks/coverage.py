"""How often the 95% intervals of `fastai_smooth.calibration.intervals` hold the truth, on models whose figures are known

    python tests/benchmarks/coverage.py                 a table: 95% intervals should hold it in 92 to 98% of the runs
    python tests/benchmarks/coverage.py --runs 300"""
import argparse
import sys

import numpy as np
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


def coverage(n, sharpness, factor, runs):
    "Share of the intervals that hold the figures of 400,000 examples, by name"
    truth = draw(400_000, sharpness, factor, torch.Generator().manual_seed(10**6)).figures(NAMES)
    held = dict.fromkeys(NAMES, 0)
    for seed in range(runs):
        found = intervals(draw(n, sharpness, factor, torch.Generator().manual_seed(seed)), NAMES)
        for name in NAMES: held[name] += found[f'{name}_low'] <= truth[name] <= found[f'{name}_high']
    return {name: v/runs for name, v in held.items()}


def coverage_of_masks(masks, runs, alpha=8., beta=2., pixels=40):
    "Share of the intervals that hold the accuracy of masks whose own accuracies are drawn from a beta distribution"
    rng, held = np.random.default_rng(0), 0
    for _ in range(runs):
        right = torch.as_tensor(rng.random((masks, pixels)) < rng.beta(alpha, beta, (masks, 1)))
        z = torch.stack([torch.where(right, 1., -1.), torch.zeros(masks, pixels)], 1)
        found = intervals(Predictions.of(z, torch.zeros(masks, pixels).long(), CrossEntropyLossFlat(axis=1)), ['accuracy'])
        held += found['accuracy_low'] <= alpha/(alpha+beta) <= found['accuracy_high']
    return held/runs


def main(runs=1000):
    print(f'{"model":28}{"n":>6}' + ''.join(f'{name:>10}' for name in NAMES))
    for name, (sharpness, factor) in MODELS.items():
        for n in (200, 1000):
            print(f'{name:28}{n:6}' + ''.join(f'{v:10.1%}' for v in coverage(n, sharpness, factor, runs).values()), flush=True)
    for masks in (8, 24, 60): print(f'{"pixels, right 80%":28}{masks:6}{coverage_of_masks(masks, runs):10.1%}', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--runs', type=int, default=1000)
    sys.exit(main(**vars(parser.parse_args())))
