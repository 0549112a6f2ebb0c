#!/usr/bin/env python
"""Time the losses against torch, fastai and timm, forward and backward, in interleaved rounds of one process.

    python tests/benchmarks/losses.py [--threads 1] [--rounds 9] [--only index] [--compile] [--json nbs/figures/losses_cpu.json]

prints a Markdown table of ratios, and writes them as JSON, which the notebook of kernels.cpu reads. t: over torch's own loss,
F.cross_entropy(label_smoothing=.1), or F.binary_cross_entropy_with_logits of smoothed targets; for focal loss, Dice and the penalties over their formula
written down in torch. L: over one out-of-place softmax (sigmoid) of the
same logits. mem: the peak of what is allocated over the size of the logits, where the gradient alone is 1. --compile adds torch.compile of torch's
loss, which takes minutes and a C++ compiler.

Seconds differ between machines and between allocators, ratios less so: torch's loss allocates three times the logits and pays for each page that is
faulted in. `MALLOC_TOP_PAD_`, `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` in the environment change how often that happens.
"""
import argparse
import json
import os
import platform
import statistics
import time

import fastai.losses as fl
import timm.loss
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fastai_smooth.losses import (
    LabelSmoothingBCE,
    LabelSmoothingCrossEntropy,
    LabelSmoothingDice,
    LabelSmoothingFocal,
    LogitPenalty,
    MultiLabelSmoothingCrossEntropy,
)
from fastai_smooth.targets import MixedTarget

EPS = .1
# name, shape, class dimension, kind, share of ignored labels
CASES = [('index 64×10', (64, 10), 1, 'index', 0), ('index 256×1000', (256, 1000), 1, 'index', 0), ('index 128×21841', (128, 21841), 1, 'index', 0),
         ('LM 2048×32000, 20% ignored', (2048, 32000), 1, 'index', .2), ('masks (4,21,128,128)', (4, 21, 128, 128), 1, 'index', 0),
         ('masks (2,150,256,256)', (2, 150, 256, 256), 1, 'index', 0), ('MixUp pair 64×10', (64, 10), 1, 'pair', 0),
         ('MixUp pair 256×1000', (256, 1000), 1, 'pair', 0), ('MixUp pair 128×21841', (128, 21841), 1, 'pair', 0),
         ('dense 256×1000', (256, 1000), 1, 'dense', 0), ('dense 128×21841', (128, 21841), 1, 'dense', 0),
         ('multi-label 256×80', (256, 80), 1, 'multi-label', 0), ('multi-label 128×9605', (128, 9605), 1, 'multi-label', 0),
         ('no gradient 64×10', (64, 10), 1, 'no gradient', 0), ('no gradient 256×1000', (256, 1000), 1, 'no gradient', 0),
         ('no gradient 2048×32000', (2048, 32000), 1, 'no gradient', 0),
         *((f'{kind} {name}', shape, 1, kind, 0) for kind in ('focal', 'margin', 'maxsup', 'confidence')
           for name, shape in (('64×10', (64, 10)), ('256×1000', (256, 1000)), ('masks (4,21,128,128)', (4, 21, 128, 128)))),
         ('Dice masks (4,2,128,128)', (4, 2, 128, 128), 1, 'dice', 0), ('Dice masks (4,21,128,128)', (4, 21, 128, 128), 1, 'dice', 0),
         ('softmax of several labels 64×10', (64, 10), 1, 'several', 0), ('softmax of several labels 256×1000', (256, 1000), 1, 'several', 0)]


def smoothed(y, k, like):
    "One-hot labels, smoothed"
    return torch.zeros_like(like).scatter_(1, y.unsqueeze(1), 1-EPS).add_(EPS/k)


def focal(z, y):
    "Focal loss of the smoothed target, as its formula stands"
    log_p = z.log_softmax(1)
    return -(smoothed(y, z.shape[1], z)*(1-log_p.exp())**2*log_p).sum(1).mean()


def dice(z, y):
    "1 - (2 intersection + smooth)/(union + smooth) of the smoothed target"
    p, q, area = z.softmax(1), smoothed(y, z.shape[1], z), tuple(range(2, z.ndim))
    return (1 - (2*torch.minimum(p, q).sum(area)+1e-6)/((p+q).sum(area)+1e-6)).sum()


def penalized(kind):
    "torch's loss and a penalty of the logits"
    def loss(z, y):
        if kind == 'confidence':
            log_p = z.log_softmax(1)
            penalty = (log_p.exp()*log_p).sum(1)
        else:
            gap = z.amax(1, keepdim=True)-z
            penalty = (gap if kind == 'maxsup' else (gap-10.).relu()).mean(1)
        return F.cross_entropy(z, y, label_smoothing=EPS) + .1*penalty.mean()
    return loss


def contenders(shape, axis, kind, ignored, compiled=False):
    "Name to a function without arguments: ours, the peers that can do the case, and one softmax; and the bytes of the logits"
    torch.manual_seed(0)
    z = torch.randn(shape, requires_grad=kind != 'no gradient')
    n, k, data = shape[0], shape[axis], z.detach()
    y = torch.randint(0, k, data.select(axis, 0).shape)
    if ignored: y.view(-1)[torch.rand(y.numel()) < ignored] = -100
    ours, flat = LabelSmoothingCrossEntropy(EPS, axis=axis), fl.LabelSmoothingCrossEntropyFlat(EPS, axis=axis)

    def step(loss, *target):
        def run():
            z.grad = None
            value = loss(z, *target)
            if z.requires_grad: value.backward()
        return run
    cross_entropy = lambda z, y: F.cross_entropy(z, y, label_smoothing=EPS)
    if kind in ('index', 'no gradient'):
        target, losses = (y,), dict(ours=ours, torch=cross_entropy)
        # fastai smooths ignored rows and timm cannot ignore any
        if not ignored and len(shape) == 2:
            losses |= dict(fastai=fl.LabelSmoothingCrossEntropy(EPS), timm=timm.loss.LabelSmoothingCrossEntropy(EPS))
        elif not ignored: losses['fastai'] = flat
    elif kind == 'focal': target, losses = (y,), dict(ours=LabelSmoothingFocal(EPS, axis=axis), torch=focal)
    elif kind == 'dice': target, losses = (y,), dict(ours=LabelSmoothingDice(EPS), torch=dice)
    elif kind in ('margin', 'maxsup', 'confidence'): target, losses = (y,), dict(ours=LogitPenalty(ours, kind), torch=penalized(kind))
    elif kind == 'several':
        target = (torch.rand(shape) < .3).float().index_fill_(1, torch.tensor(0), 1.),
        losses = dict(ours=MultiLabelSmoothingCrossEntropy(EPS), torch=lambda z, y: F.cross_entropy(z, y/y.sum(1, keepdim=True), label_smoothing=EPS))
    elif kind == 'dense':
        target, soft = (torch.rand(shape).softmax(axis),), timm.loss.SoftTargetCrossEntropy()
        losses = dict(ours=ours, torch=cross_entropy, timm=lambda z, q: soft(z, q*(1-EPS)+EPS/k))
    elif kind == 'multi-label':
        target, bce = ((torch.rand(shape) < .05).float(),), fl.BCEWithLogitsLossFlat()
        losses = dict(ours=LabelSmoothingBCE(EPS), torch=lambda z, y: F.binary_cross_entropy_with_logits(z, y*(1-EPS)+EPS/2),
                      fastai=lambda z, y: bce(z, y*(1-EPS)+EPS/2), timm=timm.loss.BinaryCrossEntropy(EPS))
    else:  # a pair as MixUp makes it: two losses blended, as fastai does, or the mixture of two labels
        lam, other = torch.rand(n), y[torch.randperm(n)]
        one = lambda y: MixedTarget(y[:, None], torch.ones(n, 1), k, axis)
        mixed = torch.lerp(one(other), one(y), lam[:, None])
        none = fl.LabelSmoothingCrossEntropyFlat(EPS, reduction='none')
        pair = lambda loss: lambda z, y, other, lam: torch.lerp(loss(z, other), loss(z, y), lam).mean()
        target, losses = (y, other, lam), dict(torch=pair(lambda z, y: F.cross_entropy(z, y, label_smoothing=EPS, reduction='none')), fastai=pair(none))
        losses = dict(ours=lambda z, *_: ours(z, mixed)) | losses
    if compiled:
        torch.compiler.reset()
        losses['compile'] = torch.compile(losses['torch'], fullgraph=True)
    runs = {name: step(loss, *target) for name, loss in losses.items()}
    return runs | dict(softmax=data.sigmoid if kind == 'multi-label' else lambda: torch.softmax(data, axis)), data.nbytes


def peak_bytes(f):
    "The most that one call of `f` has allocated at a time, as torch's profiler sees it"
    f()
    peak = 0
    for _ in range(3): # the profiler loses events now and then
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof: f()
        now = 0
        for e in sorted((e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
            now += e.nbytes()
            peak = max(peak, now)
    return peak


def measure(functions, rounds, budget=.05):
    "Median seconds of each function; the functions take turns in every round"
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter # other processes don't count where one thread does the work
    calls, times = {}, {name: [] for name in functions}
    for name, f in functions.items():
        f()
        start = clock()
        f()
        calls[name] = max(1, int(budget/(clock()-start)))
    for _ in range(rounds):
        for name, f in functions.items():
            start = clock()
            for _ in range(calls[name]): f()
            times[name].append((clock()-start)/calls[name])
    return {name: statistics.median(t) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--only', default='', help="only cases whose name holds this")
    parser.add_argument('--compile', action='store_true', help="also torch.compile of torch's loss")
    parser.add_argument('--json', help="file to write the ratios to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    malloc = {k: v for k, v in os.environ.items() if k.startswith('MALLOC_')} or 'default'
    cpu = f'{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}'
    print(f"torch {torch.__version__}, {cpu}, {args.threads} thread(s), medians of {args.rounds} rounds, allocator: {malloc}\n")
    columns = {'ours t': ('ours', 'torch'), 'ours L': ('ours', 'softmax'), 'torch L': ('torch', 'softmax'), 'fastai t': ('fastai', 'torch'),
               'timm t': ('timm', 'torch')} | ({'torch.compile t': ('compile', 'torch')} if args.compile else {})
    print(f"| case | {' | '.join([*columns, 'ours mem', 'torch mem'])} |\n|{'---|'*(len(columns)+3)}")
    cases = []
    for name, *case in CASES:
        if args.only not in name: continue
        functions, size = contenders(*case, args.compile)
        t = measure(functions, args.rounds)
        ratios = {column: t[who]/t[to] if who in t else None for column, (who, to) in columns.items()}
        ratios |= {f'{who} mem': peak_bytes(functions[who])/size for who in ('ours', 'torch')}
        cases.append({'case': name} | {k: None if v is None else round(v, 3) for k, v in ratios.items()})
        print(f"| {name} | {' | '.join('–' if v is None else f'{v:.2f}' for v in ratios.values())} |", flush=True)
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as f:
            json.dump(dict(torch=torch.__version__, cpu=cpu, threads=args.threads, rounds=args.rounds, cases=cases), f, indent=1, ensure_ascii=False)
            f.write('\n')


if __name__ == '__main__': main()
