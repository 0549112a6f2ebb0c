"""Run by test_processes.py under torchrun: train on two processes on the CPU and write down what each of them saw

    torchrun --nproc_per_node 2 two_processes.py OUT KIND:MIXERS ..."""
import sys

import fastai.distributed as fd
import torch
import torch.distributed as distributed
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.optimizer import SGD
from fastcore.basics import patch
from learners import Look, make_learner

from fastai_smooth.calibration import AURC, ECE, MCE, NLL, AdaptiveECE, Brier, ClasswiseECE
from fastai_smooth.callback import LabelSmoothing, OneOf, TimmMix
from fastai_smooth.distributions import Online
from fastai_smooth.losses import LabelSmoothingCrossEntropy

EPS, LR = .2, .1


@patch
def _broadcast(self: fd.DistributedDL, t, rank):
    "fastai's asks for a GPU"
    t = torch.as_tensor(t)
    distributed.broadcast(t, rank)
    return t.tolist()


def all_metrics(): return [ECE(), AdaptiveECE(), ClasswiseECE(), MCE(), NLL(), Brier(), AURC(), AURC('logit_norm')]


class Weights(Callback):
    "The weights before each step, and the gradients that were used"
    order, run_valid = 95, False
    def before_fit(self): self.seen = []
    def before_step(self): self.seen.append([(p.detach().clone(), p.grad.clone()) for p in self.model.parameters()])


def train(out, kind, mixers):
    cbs = {'none': [], 'both': [MixUp(), CutMix()], 'oneof': [OneOf(MixUp(), CutMix(), p=[.5, .3])], 'timm': [TimmMix(.8, 1., mode='elem')],
           'mixup': [MixUp()], 'online': [MixUp()], 'metrics': []}[mixers]
    dist = Online(4) if mixers == 'online' else None
    loss = LabelSmoothingCrossEntropy(0., axis=1) if kind == 'one_hot' else None
    learn = make_learner(kind, loss, [LabelSmoothing(EPS, dist), *cbs, Look(), Weights()], bs=4, opt_func=SGD,
                         **(dict(n=23, metrics=all_metrics()) if mixers == 'metrics' else {}))
    loss = learn.loss_func
    with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
        torch.manual_seed(10+fd.rank_distrib()) # each process mixes its own way
        learn.fit(2, LR)
    rank = distributed.get_rank()
    found = dict(world=distributed.get_world_size(), rank=rank, seen=learn.look.seen, weights=learn.weights.seen, restored=learn.loss_func is loss,
                 last=[p.detach() for p in learn.model.parameters()], valid=[list(v) for v in learn.recorder.values],
                 matrix=None if dist is None else dist.matrix(4))
    found['seen'] = [(x, pred, loss, [torch.as_tensor(t) for t in yb]) for x, pred, loss, yb in found['seen']]
    torch.save(found, f'{out}/{kind}-{mixers}-rank{rank}.pt')


def main(out, *cases):
    torch.set_num_threads(1)
    for case in cases: train(out, *case.split(':'))
    distributed.destroy_process_group()


if __name__ == '__main__': main(*sys.argv[1:])
