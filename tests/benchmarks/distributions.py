#!/usr/bin/env python
"""What the distributions cost, and whether they help against labels that are confused with similar ones.

    python tests/benchmarks/distributions.py costs [--rounds 5]
    python tests/benchmarks/distributions.py confusable [--seeds 5]

`costs` measures, for a batch (256, 10000), the time over one matrix product with a (10000, 10000) matrix; for masks (2, 150, 256, 256) the time over one
pass (x + 1) of the masks; and the bytes that the distribution itself holds. `confusable` runs `fastai-smooth compare` with 3 of 10 training labels of six
MNIST digits swapped with the digit that they resemble (some ten minutes on one core). Each writes its part of nbs/figures/distributions.json,
which the notebooks show.
"""
import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastai_smooth.distributions import ClassPrior, Online, Spatial, Taxonomy, Uniform, Zipf

FILE = Path(__file__).parents[2]/'nbs'/'figures'/'distributions.json'
METRICS = 'accuracy nll ece temperature nll_ts ece_ts'.split()


def median(functions, rounds):
    "Median seconds of each; they take turns"
    times = {n: [] for n in functions}
    for f in functions.values(): f()
    for _ in range(rounds):
        for n, f in functions.items():
            start = time.perf_counter()
            f()
            times[n].append(time.perf_counter()-start)
    return {n: statistics.median(t) for n, t in times.items()}


def costs(rounds):
    "Rows of name, time, what it is relative to, and megabytes held"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    k = 10_000
    q, z, m = torch.rand(256, k).softmax(1), torch.randn(256, k), torch.rand(k, k)
    tree = [f'{i//1000}/{i//100}/{i//25}/{i//5}/{i}' for i in range(k)]
    dists = {'Uniform': Uniform(), 'ClassPrior': ClassPrior(range(1, k+1)), 'Taxonomy, 5 levels': Taxonomy(tree), 'Online': Online(k), 'Zipf': Zipf()}
    t = median({'product': lambda: q @ m, **{n: (lambda d=d: d(q, logits=z)) for n, d in dists.items()}}, rounds)
    rows = [{'distribution': n, 'time': t[n]/t['product'], 'over': 'matrix product', 'megabytes': sum(b.nbytes for b in d.buffers())/1e6}
            for n, d in dists.items()]
    masks = torch.rand(2, 150, 256, 256).softmax(1)
    sizes = {f'Spatial({s})': Spatial(s) for s in (3, 5)}
    t = median({'pass': lambda: masks+1, **{n: (lambda d=d: d(masks)) for n, d in sizes.items()}}, rounds)
    return rows + [{'distribution': n, 'time': t[n]/t['pass'], 'over': 'pass over the masks', 'megabytes': 0.} for n in sizes]


def confusable(seeds):
    "The command, and its rows of method, seed and metrics"
    options = f'compare mnist5k --methods ce,ls,similarity,ols,mixup+ls --noise .3 --pairs 4:9,9:4,3:5,5:3,7:1,1:7 --eps .3 --seeds {seeds}'
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, '-m', 'fastai_smooth.cli', *shlex.split(options), '--out', out], check=True)
        return f'fastai-smooth {options}', runs_of(Path(out)/'runs.csv')


def runs_of(file):
    "The rows of a file runs.csv that are shown"
    with open(file, newline='') as f:
        return [{'method': r['method'], 'seed': int(r['seed']), **{m: round(float(r[m]), 6) for m in METRICS}} for r in csv.DictReader(f)]


def write(part, content):
    "Replace a part of the file"
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.write_text(json.dumps({**known, part: content}, indent=1) + '\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=['costs', 'confusable'])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seeds', type=int, default=5)
    args = parser.parse_args()
    if args.part == 'costs': write('costs', {'torch': torch.__version__, 'rows': costs(args.rounds)})
    else:
        command, runs = confusable(args.seeds)
        write('confusable', {'command': command, 'runs': runs})


if __name__ == '__main__': main()
