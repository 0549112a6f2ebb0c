"""What distributions must not do on a GPU: wait for it, copy to it in every call, use double precision where there is none, lose digits under autocast.

The device 'meta' stands for a GPU. It has no values, so that whatever would read one fails; a dispatch mode refuses copies from the CPU and float64."""
import pytest
import torch
from gpu_mode import Gpu
from torch import nn

from fastai_smooth.distributions import ClassPrior, Online, PossibleClasses, Similarity, Spatial, Taxonomy, Teacher, Uniform, Zipf
from fastai_smooth.targets import MixedTarget, smooth_binary, smooth_labels, to_dense

K = 4
def everyone():
    return [Uniform(), ClassPrior([1, 2, 0, 3]), Similarity(torch.full((K, K), 1/K)), Taxonomy(['x/a', 'x/b', 'y/c', 'z']), Online(K), Online(K, .5),
            Zipf(), PossibleClasses(), Teacher(nn.Linear(3, K)), .5*Uniform()+.5*Online(K)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('dist', everyone(), ids=lambda d: type(d).__name__)
def test_a_training_batch_waits_for_nothing(dist, dtype):
    dist = dist.to('meta')
    z, y, x = torch.empty(5, K, device='meta', dtype=dtype), torch.empty(5, dtype=torch.long, device='meta'), torch.empty(5, 3, device='meta')
    with Gpu() as gpu:
        q = to_dense(y, K)
        mixed = torch.lerp(*(MixedTarget(y[:, None], torch.ones(5, 1, device='meta'), K) for _ in range(2)), torch.empty(5, 1, device='meta'))
        for target in (q, q.to(dtype), mixed):
            u = dist(target, logits=z, inputs=x)
            assert u.device.type == 'meta' and u.shape == (5, K) and u.dtype == target.dtype
        for labels in (y, q): dist.update(z, labels)
        dist.next_epoch(), dist.forget()
    assert gpu.ops


def test_masks_wait_for_nothing():
    z, y = torch.empty(2, K, 5, 6, device='meta'), torch.empty(2, 5, 6, dtype=torch.long, device='meta')
    online = Online(K).to('meta')
    with Gpu():
        for sigma in (.2, 1.): assert smooth_labels(y, .1, K, dist=Spatial(3, sigma)).device.type == 'meta'
        online.update(z, y), smooth_labels(y, .1, K, dist=online), smooth_binary(z)


def test_the_mode_refuses_what_it_is_for():
    x = torch.empty(3, device='meta')
    for bad in (lambda: x.nonzero(), lambda: x.double(), lambda: torch.ones(3).to('meta'), lambda: torch.ones(()).to('meta'),
                lambda: torch.as_tensor(.1, device='meta'), lambda: x[torch.empty(3, dtype=torch.bool, device='meta')]):
        # the mode says AssertionError; torch itself has no such operation on the meta device and says one of the others
        with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), Gpu(): bad()


def test_a_distribution_that_was_left_on_the_cpu_moves_once():
    q = torch.empty(5, K, device='meta')
    for dist in everyone()[:6]:
        dist(q)
        with Gpu(): dist(q)


def test_nothing_holds_double_precision():
    for dist in [*everyone(), Spatial()]: assert not any(b.dtype is torch.float64 for b in dist.buffers())


@pytest.mark.parametrize('dist', [*everyone(), Spatial(3, .3)], ids=lambda d: type(d).__name__)
def test_autocast_costs_no_digits(dist):
    torch.manual_seed(0)
    if isinstance(dist, Teacher): dist.model = nn.Identity() # another model's own precision is its own
    y, z = torch.randint(0, K, (3, 6, 6)), torch.randn(3, K, 6, 6)
    q, z = to_dense(y, K), (z if isinstance(dist, (Zipf, Teacher, PossibleClasses, Spatial)) else None)
    plain = dist(q, logits=z, inputs=z)
    with torch.autocast('cpu', torch.bfloat16): cast = dist(q, logits=z, inputs=z)
    assert cast.dtype is torch.float32 and torch.equal(cast, plain)
    torch.testing.assert_close(cast.sum(1), torch.ones(3, 6, 6), rtol=0, atol=1e-6)


def test_half_precision_targets_are_summed_in_single():
    "1000 classes: a sum in bfloat16 that is rounded after every step stands still at a 256th of it"
    k = 1000
    q = torch.full((2, k), 1/k, dtype=torch.bfloat16)
    for dist in (Uniform(), ClassPrior([1]*k), Similarity(torch.full((k, k), 1/k)), Taxonomy([f'{i % 7}/{i}' for i in range(k)], 0.), Online(k)):
        u = dist(q)
        assert u.dtype is torch.bfloat16
        torch.testing.assert_close(u.double().sum(1), q.double().sum(1), rtol=4e-3, atol=0)


@pytest.mark.parametrize('dist', [Zipf(), PossibleClasses(), ClassPrior([1, 2, 0, 3]), Taxonomy(['x/a', 'x/b', 'y', 'z']), Online(K)],
                         ids=lambda d: type(d).__name__)
def test_vmap_over_logits_or_targets(dist):
    z, q = torch.randn(7, 3, K), torch.rand(7, 3, K)
    loop = torch.stack([dist(a, logits=b) for a, b in zip(q, z)])
    torch.testing.assert_close(torch.func.vmap(lambda a, b: dist(a, logits=b))(q, z), loop)
    torch.testing.assert_close(torch.func.vmap(lambda b: dist(q[0], logits=b))(z), torch.stack([dist(q[0], logits=b) for b in z]))


class Smoothed(nn.Module):
    "What is compiled or exported: labels, logits and inputs to smoothed targets"
    def __init__(self, dist):
        super().__init__()
        self.dist = dist

    def forward(self, y, z, x):
        q = to_dense(y, K)
        return .9*q + .1*self.dist(q, logits=z, inputs=x)


@pytest.mark.slow
@pytest.mark.parametrize('dist', [*everyone(), Spatial()], ids=lambda d: type(d).__name__)
def test_compile_without_a_break_and_export(dist):
    y, z, x = torch.tensor([0, 1, 3, -100, 2]), torch.randn(5, K), torch.randn(5, 3)
    if isinstance(dist, Spatial): y, z, x = torch.randint(0, K, (2, 5, 6)), torch.randn(2, K, 5, 6), torch.randn(2, K, 5, 6)
    torch.compiler.reset()
    model = Smoothed(dist)
    expected = model(y, z, x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend='eager')(y, z, x), expected)
    torch.testing.assert_close(torch.export.export(model, (y, z, x)).module()(y, z, x), expected)


@pytest.mark.slow
def test_online_learns_the_same_where_no_rows_can_be_picked_out():
    z, y = 3*torch.randn(6, 40, K), torch.randint(-1, K, (6, 40))
    z[0, 0, 0], z[0, 1, 1] = torch.nan, torch.inf
    y[0, :2] = torch.tensor([0, 1])
    a, b = Online(K), Online(K)
    a.update(z, y, axis=-1)
    torch.compile(lambda z, y: b.update(z, y, axis=-1), backend='eager', fullgraph=True)(z, y) # where nothing is readable
    assert a.counts.sum() and torch.equal(a.counts, b.counts) and torch.equal(a.sums, b.sums)
