"Tests of the GPU kernels for binary losses. `test_gpu.py` runs them, as it does `triton_cases.py`"
import math

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastai_smooth.kernels import gpu, gpu_binary
from fastai_smooth.kernels.formulas import binary_cross_entropy_of_logits

DEVICE = torch.device('cuda', 0) if torch.cuda.is_available() else torch.device('cpu')


def loss_of(z, y, weight=None, pos_weight=None, reduction='mean', off=.05, on=.95, axis=-1):
    request = z, y, weight, pos_weight, reduction, off, on, axis % z.ndim
    assert gpu_binary.binary_fits(*request)
    return gpu_binary.gpu_binary_cross_entropy(*request)


def numbers(t): return t.detach().cpu().double().numpy() if isinstance(t, torch.Tensor) else np.float64(t)


def expected(z, y, weight, pos_weight, reduction, off, on, axis, incoming):
    "Loss and gradient in float64"
    known = ~np.isnan(y)
    target = off + (on-off)*np.nan_to_num(y)
    positive = target*(1. if pos_weight is None else pos_weight)
    w = known*(1. if weight is None else weight)
    loss = w*(positive*np.logaddexp(0, -z) + (1-target)*np.logaddexp(0, z))
    p = np.exp(-np.logaddexp(0, -z))
    gradient = w*((1-target)*p - positive*(1-p))*incoming
    if reduction == 'none': return loss, gradient
    n = {'sum': 1, 'mean': known.sum(), 'classes': known.any(axis).sum()}[reduction]
    return (loss.sum()/n, gradient/n) if n else (0., gradient*0)


def dense(y, shape, axis=-1):
    "Labels of any kind as float64, nan where unknown"
    if y.shape == shape: return numbers(y)
    y = numbers(y)
    return np.stack([np.where(y == -100, np.nan, y == k) for k in range(shape[axis])], axis)


def check(z, y, tolerance=3e-6, incoming=None, **options):
    "Loss and gradient against float64. Returns the gradient"
    o = dict(weight=None, pos_weight=None, reduction='mean', off=.05, on=.95, axis=-1) | options
    x = z.detach().requires_grad_()
    x.grad = None
    loss = loss_of(x, y, **o)
    up = torch.ones_like(loss) if incoming is None else incoming
    loss.backward(up)
    value, gradient = expected(numbers(z), dense(y, z.shape, o['axis']),
                               *(v if k in ('reduction', 'axis') or v is None else numbers(v) for k, v in o.items()), numbers(up))
    assert loss.dtype == torch.float32 and x.grad.dtype == z.dtype
    np.testing.assert_allclose(numbers(loss), value, rtol=tolerance, atol=tolerance)
    rounding, smallest = {torch.float32: (tolerance, 0), torch.bfloat16: (2**-8 if x.is_cuda else 2**-7, 0), torch.float16: (2**-11, 6e-8)}[z.dtype]
    np.testing.assert_allclose(numbers(x.grad), gradient, rtol=rounding, atol=max(smallest, tolerance*np.abs(gradient).max()))
    return x.grad


def logits(*shape, dtype=torch.float32): return (3*torch.randn(shape)).to(DEVICE, dtype)


def labels(*shape, unknown=.2):
    y = (torch.rand(shape) < .4).float()
    y[torch.rand(shape) < unknown] = math.nan
    return y.to(DEVICE)


@settings(max_examples=40, phases=[Phase.generate])
@given(st.data())
def test_any_options(data):
    draw = data.draw
    shape = draw(st.sampled_from([(4, 7), (5,), (2, 3, 4, 5), (3, 1), (1, 6)]))
    axis = draw(st.sampled_from([1, 3])) if len(shape) == 4 else len(shape)-1
    torch.manual_seed(draw(st.integers(0, 2**16)))
    z = logits(*shape, dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])))
    kinds = ['multi-hot', 'integers', 'dense'] + ['index']*(len(shape) > 1 and shape[-1] > 1)
    kind = draw(st.sampled_from(kinds))
    if kind == 'index':
        y = torch.randint(0, shape[axis], without := shape[:axis] + shape[axis+1:])
        y[torch.rand(without) < .3] = -100
        y = y.to(DEVICE)
    else: y = {'multi-hot': labels(*shape), 'integers': labels(*shape, unknown=0).int(), 'dense': torch.rand(shape).to(DEVICE)}[kind]
    if kind != 'index' and draw(st.booleans()): z, y = (t.transpose(0, -1).contiguous().transpose(0, -1) for t in (z, y))
    # a number, one per class, one per class of masks, one per example, one per entry
    shapes = [(), shape[-1:], shape, (*shape[:1], *[1]*(len(shape)-1)), *([(shape[1], 1, 1)] if len(shape) == 4 else [])]
    value = lambda low, high: (low + (high-low)*torch.rand(draw(st.sampled_from(shapes)))).to(DEVICE)
    options = dict(axis=axis, weight=draw(st.sampled_from([None, value(.5, 2)])), pos_weight=draw(st.sampled_from([None, value(.5, 3)])),
                   off=draw(st.sampled_from([0., .1, value(0, .3)])), on=draw(st.sampled_from([1., .8, value(.6, 1)])),
                   reduction=draw(st.sampled_from(['mean', 'sum', 'none', 'classes'])))
    fits = gpu_binary.binary_fits(z, y, *(options[k] for k in ('weight', 'pos_weight', 'reduction', 'off', 'on', 'axis')))
    assert fits or len(shape) == 4
    if not fits: return  # what needs more than three dimensions
    with pytest.MonkeyPatch.context() as patch:
        if draw(st.booleans()): patch.setattr(gpu_binary, 'SIZE', 16)
        incoming = torch.rand(shape).to(DEVICE) if options['reduction'] == 'none' else torch.tensor(.7, device=DEVICE)
        check(z, y, incoming=incoming, **options)


def test_memory_is_taken_as_it_is():
    z = logits(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert check(z, labels(2, 3, 4, 5).to(memory_format=torch.channels_last)).stride() == z.stride()
    check(z, labels(2, 3, 4, 5), reduction='none', incoming=torch.ones((), device=DEVICE).expand(2, 3, 4, 5))
    assert not gpu_binary.binary_fits(logits(4, 8)[:, :5], labels(4, 5), None, None, 'mean', 0., 1., 1)


def test_extremes():
    z = torch.tensor([[-1e4, 1e4, -30., 30., 0., 1e-3]], device=DEVICE)
    for y in (torch.zeros_like(z), torch.ones_like(z)): check(z, y, off=0., on=1.)
    y = torch.full_like(z, math.nan)
    x = torch.full_like(z, math.nan).requires_grad_()
    for reduction in ('mean', 'classes', 'sum'):
        x.grad = None
        loss = loss_of(x, y, reduction=reduction)
        loss.backward()
        assert loss == 0 and (x.grad == 0).all()
    assert loss_of(z, labels(1, 6, unknown=0), weight=torch.full((6,), math.nan, device=DEVICE)).isnan()


def test_a_gradient_under_loss_scaling():
    z, y = logits(32, 16, dtype=torch.float16), labels(32, 16, unknown=0)
    exact = check(z.float(), y, reduction='sum').double()
    error = {}
    for scale in (1., 2.**16):
        x = z.clone().requires_grad_()
        loss_of(x, y, reduction='sum').backward(torch.tensor(scale/2**24, device=DEVICE))
        error[scale] = ((x.grad.double()/scale*2**24 - exact).norm()/exact.norm()).item()
    assert error[2.**16] < 2e-3 < error[1.]


def test_labels():
    z, y = logits(3, 5), torch.tensor([0, 4, -100], device=DEVICE)
    for form in (y[:, None], y.int()): assert loss_of(z, form) == loss_of(z, y)
    single = logits(3, 1)
    assert loss_of(single, torch.tensor([0, 1, 1], device=DEVICE)) == loss_of(single, torch.tensor([[0.], [1.], [1.]], device=DEVICE))
    loss_of(z, torch.tensor([0, 7, 1], device=DEVICE)).item()
    with pytest.raises(ValueError, match=r"Label 7 is outside \[0, 5\)"): gpu.check_reported_labels()


def test_double_backward():
    z, w = logits(3, 5).requires_grad_(), torch.rand(5).to(DEVICE)
    for y in (labels(3, 5), torch.tensor([0, 4, -100], device=DEVICE)):
        q = torch.tensor(dense(y, z.shape), device=DEVICE, dtype=torch.float32)
        hessians = [torch.autograd.functional.hessian(f, z.detach())
                    for f in (lambda x: loss_of(x, y, w), lambda x: binary_cross_entropy_of_logits(x, q, w, None, 'mean', .05, .95))]  # noqa: B023
        torch.testing.assert_close(*hessians)


@pytest.mark.parametrize('reduction', ('mean', 'none'))
def test_several_gradients_at_once(reduction):
    z, q = logits(3, 5).requires_grad_(), torch.rand(3, 5).to(DEVICE)
    up = torch.rand(4, *(() if reduction == 'mean' else z.shape), device=DEVICE)
    together, = torch.autograd.grad(loss_of(z, q, reduction=reduction), z, up, is_grads_batched=True)
    one = [torch.autograd.grad(loss_of(z, q, reduction=reduction), z, u)[0] for u in up]  # by the kernels; together they go through the formula
    torch.testing.assert_close(together, torch.stack(one))


def test_compiled_in_one_graph():
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    w = torch.rand(5).to(DEVICE)

    def model(z, y, eps): return loss_of(2*z, y, pos_weight=w, off=eps/2, on=1-eps/2)*3
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for i in range(6):
        z, y = logits(4, 5).requires_grad_(), labels(4, 5)
        x = z.detach().clone().requires_grad_()
        compiled(z, y, i/20).backward()
        model(x, y, i/20).backward()
        torch.testing.assert_close(z.grad, x.grad)
    assert graphs.frame_count <= 3
    torch.compiler.reset()


@pytest.mark.parametrize('index', (False, True))
def test_operators_are_as_they_say(index):
    y = torch.tensor([0, 4, -100, 2], device=DEVICE) if index else labels(4, 5)
    levels = torch.tensor(.1, device=DEVICE), torch.tensor(.9, device=DEVICE)
    for reduction in ('mean', 'none'):
        torch.library.opcheck(gpu_binary.binary_loss, (logits(4, 5).requires_grad_(), y, None, None, *levels, 1, reduction),
                              test_utils=('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_static'))


def test_what_does_not_fit():
    z, y = logits(3, 5), labels(3, 5)

    def fits(z=z, y=y, weight=None, pos_weight=None, reduction='mean', off=0., on=1.):
        return gpu_binary.binary_fits(z, y, weight, pos_weight, reduction, off, on, 1)
    assert fits()
    assert not any((fits(z=z.double()), fits(z=z[:0], y=y[:0]), fits(y=y[:2]), fits(y=y[:, 0]), fits(y=y.clone().requires_grad_()), fits(reduction='max'),
                    fits(weight=torch.rand(4)), fits(pos_weight=torch.rand(5).requires_grad_()), fits(off=torch.zeros(2, 3, 5))))


@pytest.mark.skipif(DEVICE.type != 'cuda', reason="needs a GPU")
def test_the_host_does_not_wait():
    z, w = logits(64, 10).requires_grad_(), torch.rand(10).to(DEVICE)
    targets = labels(64, 10), torch.randint(0, 10, (64,), device=DEVICE)
    loss_of(z, targets[0]).backward()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for y in targets: loss_of(z, y, weight=w).backward()
    finally: torch.cuda.set_sync_debug_mode('default')
