"Training on two processes is training on one with the batches put together"
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from learners import expected_loss, make_learner, truth_of
from torch.nn import functional as F

from fastai_smooth.calibration import AURC, ECE, MCE, NLL, AdaptiveECE, Brier, ClasswiseECE

pytestmark = [pytest.mark.processes, pytest.mark.slow]
EPS, LR = .2, .1  # as in two_processes.py


def all_metrics(): return [ECE(), AdaptiveECE(), ClasswiseECE(), MCE(), NLL(), Brier(), AURC(), AURC('logit_norm')]


MIXED = [('index', 'both'), ('index', 'oneof'), ('one_hot', 'timm'), ('mask', 'mixup')]
SCORED = ['index', 'mask']


@pytest.fixture(scope='module')
def ranks_of(tmp_path_factory):
    "All trainings on two processes, one after the other; gives what the two wrote of one of them"
    out = tmp_path_factory.mktemp('launch')
    with socket.socket() as s: # a free port
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    here = Path(__file__).parent
    cases = [*(f'{kind}:{mixers}' for kind, mixers in MIXED), 'index:online', *(f'{kind}:metrics' for kind in SCORED)]
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_addr', '127.0.0.1', '--master_port', str(port),
               str(here/'two_processes.py'), str(out), *cases]
    path = os.pathsep.join([str(here.parent), os.environ.get('PYTHONPATH', '')])
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path, 'CUDA_VISIBLE_DEVICES': ''}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    def read(kind, mixers):
        files = [out/f'{kind}-{mixers}-rank{r}.pt' for r in (0, 1)]
        assert all(f.exists() for f in files), done.stderr[-3000:]
        return [torch.load(f, weights_only=False) for f in files]
    yield read
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize('kind, mixers', MIXED)
def test_two_processes_are_one_with_both_batches(kind, mixers, ranks_of):
    ranks = ranks_of(kind, mixers)
    assert [r['world'] for r in ranks] == [2, 2] and [r['rank'] for r in ranks] == [0, 1]
    assert all(r['restored'] for r in ranks)
    steps = len(ranks[0]['seen'])
    assert steps == len(ranks[1]['seen']) == 6 and all(len(r['weights']) == steps for r in ranks)
    # the loss of each process is that of its own batch
    for r in ranks:
        for x, pred, loss, yb in r['seen']:
            np.testing.assert_allclose(loss, expected_loss(x, pred, kind, EPS), rtol=2e-5)
            assert not yb[0].is_floating_point() or kind == 'one_hot', "the data loader's targets are back"
    assert sum(len(x) for r in ranks for x, *_ in r['seen']) == 2*24, "every example once per epoch, by one of the two"
    # one process: the same model, torch's own loss on the two batches together, plain gradient descent
    model = make_learner(kind).model
    for step in range(steps):
        parameters = list(model.parameters())
        for r in ranks:
            for p, (before, _) in zip(parameters, r['weights'][step]): torch.testing.assert_close(p.detach(), before, rtol=1e-4, atol=1e-6)
        losses = []
        for r in ranks: # the mean of the means is what DistributedDataParallel makes of them
            x = r['seen'][step][0]
            q = truth_of(x, kind)
            q = (1-EPS)*q + EPS*q.sum(1, keepdim=True)/q.shape[1]
            losses.append(-(q*F.log_softmax(model(x), 1)).sum()/q.sum())
        model.zero_grad()
        (sum(losses)/2).backward()
        for r in ranks:
            for p, (_, grad) in zip(parameters, r['weights'][step]): torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for p in parameters: p -= LR*p.grad
    for r in ranks:
        for p, last in zip(model.parameters(), r['last']): torch.testing.assert_close(p.detach(), last, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ranks[0]['valid'][-1][1], ranks[1]['valid'][-1][1], rtol=1e-6)


def test_online_smoothing_learns_from_both(ranks_of):
    "The matrix after an epoch is that of all examples, the same on both processes, and the next epoch uses it"
    ranks = ranks_of('index', 'online')
    assert [r['world'] for r in ranks] == [2, 2] and torch.equal(ranks[0]['matrix'], ranks[1]['matrix'])
    matrix = np.full((4, 4), 1/4)
    for epoch in (0, 1):
        sums, counts = np.zeros((4, 4)), np.zeros(4)
        for r in ranks:
            for x, pred, loss, yb in r['seen'][3*epoch:3*epoch+3]:
                np.testing.assert_allclose(loss, expected_loss(x, pred, 'index', EPS, matrix=matrix), rtol=2e-5)
                for z, y in zip(pred.double(), yb[0].tolist()):
                    if z.argmax() == y: sums[y], counts[y] = sums[y]+z.softmax(0).numpy(), counts[y]+1
        matrix = np.array([s/c if c else np.full(4, 1/4) for s, c in zip(sums, counts)])
    np.testing.assert_allclose(ranks[0]['matrix'], matrix, atol=1e-6)
    assert abs(matrix-1/4).max() > .01


@pytest.mark.parametrize('kind', SCORED)
def test_metrics_are_those_of_all_examples(kind, ranks_of):
    "23 examples in batches of 4 on two processes: the last ones are padded, and must not count twice"
    ranks = ranks_of(kind, 'metrics')
    assert all(len(r['seen']) == 2*3 for r in ranks), "each process has seen half of the examples in both epochs"
    learn = make_learner(kind, n=23, bs=4, metrics=all_metrics())
    assert not any(torch.equal(p.detach(), last) for p, last in zip(learn.model.parameters(), ranks[0]['last'])), "they have learned"
    for p, last in zip(learn.model.parameters(), ranks[0]['last']): p.data.copy_(last)
    with learn.no_bar(): expected = learn.validate()
    for r in ranks: np.testing.assert_allclose(r['valid'][-1][2:], expected[1:], rtol=1e-5)
