"""How many virtual examples the temperature wants: python tests/benchmarks/temperature.py FOLDER

FOLDER is that of a finished comparison of many seeds, whose predictions are taken (53 fresh seeds, about fifteen minutes of one core):

    fastai-smooth compare digits --methods ce,ls --seeds 53 --seed0 1000 --out FOLDER

For each number of virtual examples: the NLL of each method after a cross-fitted temperature, the difference of the second method from the first with its
t-value, and how often the verdict on five of the seeds finds the second one better."""
import sys
import warnings
from pathlib import Path

import numpy as np

from fastai_smooth.calibration.temperature import folds_of, most_probable
from fastai_smooth.compare import Evidence
from fastai_smooth.compare.scores import per_example, predictions_of


def cross_fitted(predictions, virtual):
    "What each example contributes after the temperature of the other folds"
    temperature = predictions.z.new_ones(len(predictions), 1).double()
    for fold in folds_of(predictions): temperature[fold] = most_probable(predictions[~fold], virtual=virtual)
    return per_example(predictions.scaled(temperature), np.arange(len(predictions)))


def power(examples, methods, seeds, k, n_train, draws=200):
    "How often k of the seeds find the second method better"
    rng, found = np.random.default_rng(0), 0
    for _ in range(draws):
        some = rng.choice(seeds, k, replace=False).tolist()
        rows = [dict(method=m, seed=s, **{name: v.mean() for name, v in examples[m, s].items()}) for s in some for m in methods]
        kept = {run: v for run, v in examples.items() if run[1] in some}
        e = Evidence(rows, 0., kept, n_train, len(kept[methods[0], some[0]]['nll_ts']))
        found += e.differences()[methods[1]]['nll_ts'].sign > 0
    return found/draws


def main(folder, n_train=1437):
    runs = {tuple(f.stem.rsplit('-', 1)): f for f in sorted((Path(folder)/'predictions').glob('*.npz'))}
    methods, seeds = list(dict.fromkeys(m for m, _ in runs)), sorted({int(s) for _, s in runs})
    predictions = {}
    for (m, s), path in runs.items():
        with np.load(path) as f: predictions[m, int(s)] = predictions_of(f['logits'], f['labels'])
    print(f'{len(seeds)} seeds\n{"virtual":>8}' + ''.join(f'{m:>10}' for m in methods) + f'{"difference":>12}{"t":>7}{"5 seeds":>9}')
    for virtual in (0., .5, 1., 2.):
        examples = {run: cross_fitted(p, virtual) for run, p in predictions.items()}
        nll = np.array([[examples[m, s]['nll_ts'].mean() for s in seeds] for m in methods[:2]])
        gap = nll[1]-nll[0]
        print(f'{virtual:8}' + ''.join(f'{v:10.4f}' for v in nll.mean(1)) + f'{gap.mean():12.4f}{gap.mean()/gap.std(ddof=1)*len(gap)**.5:7.1f}'
              f'{power(examples, methods, seeds, 5, n_train):9.1%}', flush=True)


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    main(sys.argv[1])
