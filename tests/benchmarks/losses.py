#!/usr/bin/env python
"""Time the losses against torch, fastai and timm, forward and backward, in interleaved rounds of one process.

    python tests/benchmarks/losses.py [--threads 1] [--rounds 9] [--only index]

prints a Markdown table of ratios: t over F.cross_entropy(label_smoothing=.1), L over one out-of-place softmax of the same logits. Seconds differ
between machines and between allocators; ratios less so. `MALLOC_TOP_PAD_`, `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` in the environment
change how often memory is faulted in.
"""
import argparse
import os
import statistics
import time

import fastai.losses as fl
import timm.loss
import torch
import torch.nn.functional as F

from fastai_smooth.losses import LabelSmoothingCrossEntropy
from fastai_smooth.targets import MixedTarget

EPS = .1
# name, shape, class dimension, kind, share of ignored labels
CASES = [('index 64×10', (64, 10), 1, 'index', 0), ('index 256×1000', (256, 1000), 1, 'index', 0), ('index 128×21841', (128, 21841), 1, 'index', 0),
         ('LM 2048×32000, 20% ignored', (2048, 32000), 1, 'index', .2), ('masks (4,21,128,128)', (4, 21, 128, 128), 1, 'index', 0),
         ('masks (2,150,256,256)', (2, 150, 256, 256), 1, 'index', 0), ('MixUp pair 64×10', (64, 10), 1, 'pair', 0),
         ('MixUp pair 256×1000', (256, 1000), 1, 'pair', 0), ('MixUp pair 128×21841', (128, 21841), 1, 'pair', 0),
         ('dense 256×1000', (256, 1000), 1, 'dense', 0), ('dense 128×21841', (128, 21841), 1, 'dense', 0),
         ('no gradient 256×1000', (256, 1000), 1, 'no gradient', 0), ('no gradient 2048×32000', (2048, 32000), 1, 'no gradient', 0)]


def contenders(shape, axis, kind, ignored):
    "Name to a function without arguments: ours, the peers that can do the case, and one softmax"
    torch.manual_seed(0)
    z = torch.randn(shape, requires_grad=kind != 'no gradient')
    n, k, data = shape[0], shape[axis], z.detach()
    y = torch.randint(0, k, data.select(axis, 0).shape)
    if ignored: y.view(-1)[torch.rand(y.numel()) < ignored] = -100
    ours, flat = LabelSmoothingCrossEntropy(EPS, axis=axis), fl.LabelSmoothingCrossEntropyFlat(EPS, axis=axis)

    def step(loss):
        def run():
            z.grad = None
            value = loss()
            if z.requires_grad: value.backward()
        return run
    if kind in ('index', 'no gradient'):
        losses = dict(ours=lambda: ours(z, y), torch=lambda: F.cross_entropy(z, y, label_smoothing=EPS))
        # fastai smooths ignored rows and timm cannot ignore any
        if not ignored and len(shape) == 2:
            losses |= dict(fastai=lambda: fl.LabelSmoothingCrossEntropy(EPS)(z, y), timm=lambda: timm.loss.LabelSmoothingCrossEntropy(EPS)(z, y))
        elif not ignored: losses['fastai'] = lambda: flat(z, y)
    elif kind == 'dense':
        q = torch.rand(shape).softmax(axis)
        losses = dict(ours=lambda: ours(z, q), torch=lambda: F.cross_entropy(z, q, label_smoothing=EPS),
                      timm=lambda: timm.loss.SoftTargetCrossEntropy()(z, q*(1-EPS)+EPS/k))
    else:  # a pair as MixUp makes it: two losses blended, as fastai does, or the mixture of two labels
        lam, other = torch.rand(n), y[torch.randperm(n)]
        one = lambda y: MixedTarget(y[:, None], torch.ones(n, 1), k, axis)
        mixed = torch.lerp(one(other), one(y), lam[:, None])
        pair = lambda loss: torch.lerp(loss(other), loss(y), lam).mean()
        none = fl.LabelSmoothingCrossEntropyFlat(EPS, reduction='none')
        losses = dict(ours=lambda: ours(z, mixed), torch=lambda: pair(lambda y: F.cross_entropy(z, y, label_smoothing=EPS, reduction='none')),
                      fastai=lambda: pair(lambda y: none(z, y)))
    return {name: step(loss) for name, loss in losses.items()} | dict(softmax=lambda: torch.softmax(data, axis))


def measure(functions, rounds, budget=.05):
    "Median seconds of each function; the functions take turns in every round"
    calls, times = {}, {name: [] for name in functions}
    for name, f in functions.items():
        f()
        start = time.perf_counter()
        f()
        calls[name] = max(1, int(budget/(time.perf_counter()-start)))
    for _ in range(rounds):
        for name, f in functions.items():
            start = time.perf_counter()
            for _ in range(calls[name]): f()
            times[name].append((time.perf_counter()-start)/calls[name])
    return {name: statistics.median(t) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--only', default='', help="only cases whose name holds this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    malloc = {k: v for k, v in os.environ.items() if k.startswith('MALLOC_')} or 'default'
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} thread(s), medians of {args.rounds} rounds, "
          f"allocator: {malloc}\n")
    print("| case | ours t | ours L | torch L | fastai t | timm t |\n|---|---|---|---|---|---|")
    for name, *case in CASES:
        if args.only not in name: continue
        t = measure(contenders(*case), args.rounds)
        ratio = lambda who, to, t=t: f"{t[who]/t[to]:.2f}" if who in t else '–'
        columns = [('ours', 'torch'), ('ours', 'softmax'), ('torch', 'softmax'), ('fastai', 'torch'), ('timm', 'torch')]
        print(f"| {name} | {' | '.join(ratio(*c) for c in columns)} |", flush=True)


if __name__ == '__main__': main()
