"""Run by test_metrics.py: score N masks of 512x512 pixels, four classes, in a Learner, and print the growth of memory in MB and the figures

    python stream_masks.py N"""
import resource
import sys

import fastai.callback.progress  # noqa: F401  (gives the Learner `no_bar`)
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fastai_smooth.calibration import ECE, MCE, NLL, Brier, ClasswiseECE


class Masks(torch.utils.data.Dataset):
    "Made when asked for: a mask, one pixel in ten ignored, and logits that know something of it"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n

    def __getitem__(self, i):
        if i >= self.n: raise IndexError(i)
        g = torch.Generator().manual_seed(i)
        y = torch.randint(0, 4, (512, 512), generator=g)
        z = torch.randn(4, 512, 512, generator=g) + 2*nn.functional.one_hot(y, 4).movedim(-1, 0)
        return z, y.masked_fill(torch.rand(512, 512, generator=g) < .1, -100)


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024


def main(n):
    torch.set_num_threads(1)
    model = nn.Conv2d(4, 4, 1)
    with torch.no_grad(): model.weight.copy_(torch.eye(4)[:, :, None, None]), model.bias.zero_()
    loaders = [torch.utils.data.DataLoader(Masks(k), batch_size=1) for k in (2, n)]
    learn = Learner(DataLoaders(loaders[0], loaders[1]), model, loss_func=CrossEntropyLossFlat(axis=1), metrics=[])
    with learn.no_bar():
        learn.validate(ds_idx=0)
        before = peak()
        learn.metrics = [ECE(), ClasswiseECE(), MCE(), NLL(), Brier()]
        values = learn.validate()[1:]
    print(peak()-before, *values)


if __name__ == '__main__': main(int(sys.argv[1]))
