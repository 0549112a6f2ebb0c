"""`Learner.eps_find` over seven strengths against one plain frozen epoch, on a timm body

    python tests/benchmarks/eps_find.py            the table
    python tests/benchmarks/eps_find.py --size 64 --n 640

What it recommends where no strength is better than 0: should be above 0 in at most 5% of the runs (± the Monte-Carlo error that stands behind)

    python tests/benchmarks/eps_find.py --null [--runs 500]"""
import argparse
import statistics
import sys
import time

import fastai.callback.progress  # noqa: F401  (gives the Learner `no_bar`)
import numpy as np
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner

from fastai_smooth.calibration import Predictions, cross_fit
from fastai_smooth.calibration.eps_find import contributions, recommend

STRENGTHS = {2: (0., .1), 7: (0., .02, .05, .1, .2, .3, .5)}


class Items(list):
    "A data set in memory"
    def new_empty(self): return Items()


def make(n, size, bs, train_bn, arch='tf_efficientnet_lite0'):
    "A frozen body with fastai's head on images in memory, so that what is timed is the training"
    set_seed(0)
    x, y = torch.rand(n + n//4, 3, size, size), torch.randint(0, 10, (n + n//4,))
    dls = DataLoaders(*(TfmdDL(Items(zip(x[s], y[s])), bs=bs, shuffle=i == 0, num_workers=0, drop_last=i == 0)
                        for i, s in enumerate((slice(None, n), slice(n, None)))))
    dls.c = dls.n_inp = 1
    learn = vision_learner(dls, arch, n_out=10, pretrained=False, normalize=False, loss_func=CrossEntropyLossFlat(),
                          train_bn=train_bn)
    learn.freeze()
    return learn


def main(n=512, size=128, bs=64, rounds=3):
    learn, bare = (make(n, size, bs, train_bn) for train_bn in (True, False))
    runs = {'frozen epoch': lambda: learn.fit(1), 'frozen epoch, train_bn=False': lambda: bare.fit(1),
            'eps_find, 7 strengths': lambda: learn.eps_find(show_plot=False)}
    times = {name: [] for name in runs}
    with learn.no_bar(), learn.no_logging(), bare.no_bar(), bare.no_logging():
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter()-start)
    base = statistics.median(times['frozen epoch'])
    print(f'| tf_efficientnet_lite0, {n} images of {size}x{size}, batches of {bs} | seconds | ratio |\n|---|---|---|')
    for name, t in times.items(): print(f'| {name} | {statistics.median(t):.1f} | {statistics.median(t)/base:.2f} |')


def trained_alike(n, strengths, seed, classes=4):
    "Predictions of networks that differ by chance alone, scaled as smoothing scales them: the truth, and an error of its own for each strength"
    g = torch.Generator().manual_seed(seed)
    truth = 2*torch.randn(n, classes, generator=g)
    y = torch.multinomial(truth.softmax(1), 1, generator=g)[:, 0]
    return {e: Predictions.of((truth+.5*torch.randn(n, classes, generator=g))/(1+2*e), y, CrossEntropyLossFlat()) for e in strengths}


def suggestion(n, strengths, seed, metric='nll_ts'):
    "The best strength, and the one that is recommended, as `Learner.eps_find` has them"
    models = {e: cross_fit(p)[0] if metric.endswith('_ts') else p for e, p in trained_alike(n, strengths, seed).items()}
    figures = {e: p.figures([metric.removesuffix('_ts')])[metric.removesuffix('_ts')] for e, p in models.items()}
    scores = {e: 1-v if metric == 'accuracy' else v for e, v in figures.items()}
    best = min(scores, key=scores.get)
    return best, recommend(best, scores, {e: contributions(p, metric) for e, p in models.items()}, metric)[0]


def null(runs=500, sizes=(200, 1000, 5000)):
    print(f'{"strengths":>9}{"examples":>10}{"best > 0":>10}{"recommended > 0":>18}')
    for strengths in STRENGTHS.values():
        for n in sizes:
            best, recommended = np.array([suggestion(n, strengths, seed) for seed in range(runs)]).T
            share = (recommended > 0).mean()
            print(f'{len(strengths):9}{n:10}{(best > 0).mean():10.1%}{share:11.1%} ± {(share*(1-share)/runs)**.5:.1%}', flush=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--null', action='store_true')
    parser.add_argument('--runs', type=int, default=500)
    for name, default in (('n', 512), ('size', 128), ('bs', 64), ('rounds', 3)): parser.add_argument(f'--{name}', type=int, default=default)
    args = vars(parser.parse_args())
    runs = args.pop('runs')
    sys.exit(null(runs) if args.pop('null') else main(**args))
