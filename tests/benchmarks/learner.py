#!/usr/bin/env python
"""Time training steps of a fastai Learner with smoothing, and measure the memory of a step on masks.

    python tests/benchmarks/learner.py [--threads 1] [--rounds 9]

prints three Markdown tables: milliseconds of a training step (64×1×28×28 images, a small CNN) and the same over the first row; microseconds that
callbacks add to a step; and for a MixUp step on masks (2,150,256,256), with a 1×1 convolution as the model, the time and the peak of what is allocated
over the size of the logits. The variants take turns in every round; medians. The dense path is that of a mixer that wants dense targets.
"""
import argparse
import statistics
import time

import fastai.losses as fl
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from losses import peak_bytes
from torch import nn

from fastai_smooth.callback import LabelSmoothing
from fastai_smooth.losses import LabelSmoothingCrossEntropyFlat
from fastai_smooth.targets import to_dense


class Batches(list):
    "A data loader that gives the same batches again and again"
    device, n_inp, num_workers = torch.device('cpu'), 1, 0
    after_item = after_batch = None

    def __init__(self, batches, n):
        super().__init__(batches*n)
        self.dataset, self.n = self, len(self)


class Idle(Callback):
    "A callback without any event"


def learner(model, batch, n, loss_func, cbs, c):
    "A learner whose epoch is `n` times the same batch"
    torch.manual_seed(0)
    dl = Batches([batch], n)
    dls = DataLoaders(dl, dl)
    dls.c = c
    learn = Learner(dls, model(), loss_func=loss_func, cbs=cbs, opt_func=SGD)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    return learn


def epoch(learn):
    "Train the epoch, without validation and printing"
    def run():
        with learn.no_logging(): learn.fit(1, lr=1e-3)
    learn.validate = lambda *a, **k: None
    learn._do_epoch_validate = lambda *a, **k: None
    return run


def measure(runs, steps, rounds):
    "Median seconds of a step of each variant"
    times = {name: [] for name in runs}
    for f in runs.values(): f()
    for _ in range(rounds):
        for name, f in runs.items():
            start = time.perf_counter()
            f()
            times[name].append((time.perf_counter()-start)/steps)
    return {name: statistics.median(t) for name, t in times.items()}


def small_cnn():
    return nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(32*49, 10))


class DenseFirst(Callback):
    "What one had to do before: dense targets for the mixers"
    order = -50
    def __init__(self, k): self.k = k
    def before_batch(self):
        if self.training: self.learn.yb = (to_dense(self.y, self.k),)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s), medians of {args.rounds} rounds\n")
    torch.manual_seed(0)
    batch, n = (torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))), 100
    ce, fastai = fl.CrossEntropyLossFlat, fl.LabelSmoothingCrossEntropyFlat
    steps = {'CrossEntropyLossFlat': (ce(), []), "fastai's LabelSmoothingCrossEntropyFlat": (fastai(), []), 'our loss': (LabelSmoothingCrossEntropyFlat(), []),
             'LabelSmoothing()': (ce(), [LabelSmoothing()]), "MixUp + fastai's LabelSmoothingCrossEntropyFlat": (fastai(), [MixUp()]),
             'MixUp + LabelSmoothing()': (ce(), [MixUp(), LabelSmoothing()])}
    t = measure({name: epoch(learner(small_cnn, batch, n, loss, cbs, 10)) for name, (loss, cbs) in steps.items()}, n, args.rounds)
    base = t['CrossEntropyLossFlat']
    print("| step | ms | over the first |\n|---|---|---|")
    for name, v in t.items(): print(f"| {name} | {v*1e3:.2f} | {v/base:.2f} |")
    print(f"\nMixUp + LabelSmoothing() over MixUp + fastai's: {t['MixUp + LabelSmoothing()']/t[list(t)[4]]:.2f}\n")

    # a model that costs nothing shows what callbacks cost
    tiny, n = (torch.randn(8, 4), torch.randint(0, 4, (8,))), 500
    kinds = {'none': (ce(), []), 'a callback without events': (ce(), [Idle()]), 'LabelSmoothing()': (ce(), [LabelSmoothing()])}
    t = measure({name: epoch(learner(lambda: nn.Linear(4, 4), tiny, n, *kind, 4)) for name, kind in kinds.items()}, n, args.rounds)
    print("| callback | µs added to a batch |\n|---|---|")
    for name, v in list(t.items())[1:]: print(f"| {name} | {(v-t['none'])*1e6:.0f} |")

    k, logits = 150, 2*150*256*256*4
    masks = torch.randn(2, 8, 256, 256), torch.randint(0, k, (2, 256, 256))
    cases = {'CrossEntropyLossFlat(axis=1), neither mixed nor smoothed': (ce(axis=1), []),
             'LabelSmoothing()': (ce(axis=1), [LabelSmoothing()]),
             'MixUp + LabelSmoothing()': (ce(axis=1), [MixUp(), LabelSmoothing()]),
             'MixUp + LabelSmoothing(), dense targets': (ce(axis=1), [DenseFirst(k), MixUp(), LabelSmoothing()])}
    runs = {name: epoch(learner(lambda: nn.Conv2d(8, k, 1), masks, 1, loss, cbs, k)) for name, (loss, cbs) in cases.items()}
    t = measure(runs, 1, min(args.rounds, 5))
    base = t[list(t)[0]]
    print("\n| step on masks (2,150,256,256) | time over the first | peak over the logits |\n|---|---|---|")
    for name, v in t.items(): print(f"| {name} | {v/base:.2f} | {peak_bytes(runs[name])/logits:.1f} |")


if __name__ == '__main__': main()
