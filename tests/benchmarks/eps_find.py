"""`Learner.eps_find` over seven strengths against one plain frozen epoch, on a timm body

    python tests/benchmarks/eps_find.py            the table
    python tests/benchmarks/eps_find.py --size 64 --n 640"""
import argparse
import statistics
import sys
import time

import fastai.callback.progress  # noqa: F401  (gives the Learner `no_bar`)
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner

import fastai_smooth.calibration  # noqa: F401  (gives the Learner `eps_find`)


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


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    for name, default in (('n', 512), ('size', 128), ('bs', 64), ('rounds', 3)): parser.add_argument(f'--{name}', type=int, default=default)
    sys.exit(main(**vars(parser.parse_args())))
