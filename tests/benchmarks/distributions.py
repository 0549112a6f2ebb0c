#!/usr/bin/env python
"""Time and memory of the distributions on large targets.

    python tests/benchmarks/distributions.py [--rounds 5]

prints a Markdown table: for a batch (256, 10000) the time over one matrix product with a (10000, 10000) matrix, for masks (2, 150, 256, 256) the time
over one pass (x + 1) of the masks; and the bytes that the distribution itself holds.
"""
import argparse
import statistics
import time

import torch

from fastai_smooth.distributions import ClassPrior, Online, Spatial, Taxonomy, Uniform, Zipf


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    k = 10_000
    q, z, m = torch.rand(256, k).softmax(1), torch.randn(256, k), torch.rand(k, k)
    tree = [f'{i//1000}/{i//100}/{i//25}/{i//5}/{i}' for i in range(k)]
    dists = {'Uniform': Uniform(), 'ClassPrior': ClassPrior(range(1, k+1)), 'Taxonomy, 5 levels': Taxonomy(tree),
             'Online': Online(k), 'Zipf': Zipf()}
    t = median({'product': lambda: q @ m, **{n: (lambda d=d: d(q, logits=z)) for n, d in dists.items()}}, args.rounds)
    print("| distribution | time | over | holds, MB |\n|---|---|---|---|")
    for n, d in dists.items():
        held = sum(b.nbytes for b in d.buffers())/1e6
        print(f"| {n} | {t[n]/t['product']:.3f} | matrix product | {held:.1f} |", flush=True)
    masks = torch.rand(2, 150, 256, 256).softmax(1)
    sizes = {f'Spatial({s})': Spatial(s) for s in (3, 5)}
    t = median({'pass': lambda: masks+1, **{n: (lambda d=d: d(masks)) for n, d in sizes.items()}}, args.rounds)
    for n in sizes: print(f"| {n} | {t[n]/t['pass']:.1f} | pass over the masks | 0.0 |")


if __name__ == '__main__': main()
