"""Tests of the GPU kernels. `test_gpu.py` runs them on a GPU, or else in a process of its own with TRITON_INTERPRET=1, where Triton runs kernels on
tensors of the CPU"""
import math

import numpy as np
import oracles
import pytest
import torch
import torch._dynamo.testing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fastai_smooth.distributions import ClassPrior
from fastai_smooth.kernels import gpu, gpu_binary, paths, smooth_cross_entropy_reference
from fastai_smooth.losses import LabelSmoothingBCE, LabelSmoothingCrossEntropy, MultiLabelSmoothingCrossEntropy
from fastai_smooth.targets import MixedTarget

DEVICE = torch.device('cuda', 0) if torch.cuda.is_available() else torch.device('cpu')


@pytest.fixture
def small_tiles(monkeypatch): set_tiles(monkeypatch, 8, 2)


def set_tiles(monkeypatch, rows, tiles):
    "Most classes in one tile, so that few of them already make long rows"
    monkeypatch.setattr(gpu, 'SINGLE_ROWS', rows)
    monkeypatch.setattr(gpu, 'SINGLE_TILES', tiles)
    for cached in (gpu.plan_of, gpu.cached_view): cached.cache_clear()
    monkeypatch.setattr(gpu, 'plan_of', gpu.plan_of.__wrapped__)
    monkeypatch.setattr(gpu, 'cached_view', gpu.view_of)


def loss_of(z, target, eps=.1, axis=1, weight=None, weight_by='class', ignore_index=-100, reduction='mean'):
    assert gpu.softmax_fits(z, target, eps, axis, weight, weight_by, reduction)
    return gpu.gpu_cross_entropy(z, target, eps, axis, weight, weight_by, ignore_index, reduction)


def dense_rows(target, shape, axis, ignore_index):
    "Any target as rows of coefficients"
    if isinstance(target, MixedTarget):
        parts = [np.array(oracles.encode(target.indices[:, j].flatten().tolist(), shape[axis], ignore_index)) for j in range(target.indices.shape[1])]
        return sum(part*target.weights[:, j].flatten().cpu().double().numpy()[:, None] for j, part in enumerate(parts))
    if target.is_floating_point(): return oracles.rows(target.cpu().double(), axis)
    return np.array(oracles.encode(target.flatten().tolist(), shape[axis], ignore_index))


def expected(z, q, eps, weight, weight_by, reduction, incoming):
    "Loss, and gradient of the logits as rows, one row after the other in float64"
    w, losses, masses, grads = np.ones(q.shape[1]) if weight is None else weight, [], [], []
    for row, coefficients in zip(z, q):
        smoothed = coefficients*(1-eps) + (coefficients*eps).sum()/len(row)
        mass = (w*coefficients).sum()
        a = w*smoothed if weight_by == 'class' else smoothed*(mass/coefficients.sum() if coefficients.any() else 0)
        log_p = np.array(oracles.log_softmax_row(row))
        losses.append(-(a*log_p).sum()), masses.append(mass), grads.append(np.exp(log_p)*a.sum() - a)
    losses, grads = np.array(losses), np.array(grads)
    if reduction == 'none': return losses, grads*incoming[:, None]
    n = 1 if reduction == 'sum' else sum(masses)
    return (losses.sum()/n, grads*incoming/n) if n > 0 else (0., grads*0)


def check(z, target, tolerance=2e-6, incoming=None, **options):
    "Loss and gradient against float64. Returns the gradient"
    o = dict(eps=.1, axis=1, weight=None, weight_by='class', ignore_index=-100, reduction='mean') | options
    axis, numbers = o['axis'], lambda t: t.cpu().double().numpy() if isinstance(t, torch.Tensor) else t
    x = z.detach().requires_grad_()
    x.grad = None
    loss = loss_of(x, target, **o)
    up = torch.ones_like(loss) if incoming is None else incoming
    loss.backward(up)
    assert loss.dtype == torch.float32 and x.grad.dtype == z.dtype
    value, gradient = expected(oracles.rows(numbers(z.detach()), axis), dense_rows(target, z.shape, axis, o['ignore_index']), numbers(o['eps']),
                               numbers(o['weight']), o['weight_by'], o['reduction'], numbers(up).flatten())
    np.testing.assert_allclose(numbers(loss.detach()).flatten(), np.ravel(value), rtol=tolerance, atol=tolerance*(1+np.abs(value).max()))
    # float16 has no numbers between 0 and 6e-8; the interpreter cuts float32 off to bfloat16 instead of rounding it
    rounding, smallest = {torch.float32: (tolerance, 0), torch.bfloat16: (2**-8 if x.is_cuda else 2**-7, 0), torch.float16: (2**-11, 6e-8)}[z.dtype]
    smallest = max(smallest, tolerance*np.abs(gradient).max(), 1e-7*up.abs().max().item())
    np.testing.assert_allclose(oracles.rows(numbers(x.grad), axis), gradient, rtol=rounding, atol=smallest)
    return x.grad


def labels(k, *shape, ignored=0.):
    y = torch.randint(0, k, shape)
    y[torch.rand(shape) < ignored] = -100
    return y.to(DEVICE)


def logits(*shape, dtype=torch.float32): return (3*torch.randn(shape)).to(DEVICE, dtype)


def mixture(k, n, m, *rest, axis=1): return MixedTarget(labels(k, n, m, *rest, ignored=.2), torch.rand(n, m).to(DEVICE), k, axis)


@pytest.mark.parametrize('k', (1, 2, 31, 32, 33, 1000, 1025))
def test_rows(k): check(logits(3, k), torch.tensor([0, -100, k-1], device=DEVICE), eps=.2)


@pytest.mark.parametrize('k', (7, 8, 9, 33))
def test_long_rows(k, small_tiles):
    check(logits(5, k), labels(k, 5, ignored=.3))
    check(logits(2, k, 3, 4), labels(k, 2, 3, 4, ignored=.3))
    check(logits(3, k), torch.rand(3, k).to(DEVICE), weight=torch.rand(k).to(DEVICE), weight_by='example')


def draw_problem(draw):
    "A target of any kind, options, and logits as they may lie in memory"
    k, n, rest = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.sampled_from([(), (3,), (2, 3)]))
    axis = draw(st.sampled_from([1, len(rest)+1]))
    shape = [n, *rest]
    shape.insert(axis, k)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    z = logits(*shape, dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])))
    memory = draw(st.sampled_from(['as it is', 'padded', 'transposed']))
    if memory == 'padded': z = torch.nn.functional.pad(z, (1, 2))[..., 1:-2]
    elif memory == 'transposed': z = z.transpose(0, -1).contiguous().transpose(0, -1)
    kind = draw(st.sampled_from(['index', 'dense', 'mixed']))
    ignore_index = draw(st.sampled_from([-100, 0, None]))
    if k == 1 and kind == 'dense': kind = 'index'  # a softmax over one column is an error there
    if kind == 'dense': target = torch.rand(shape).to(DEVICE)*(torch.rand(n, *[1]*(len(shape)-1)) > .3).to(DEVICE)
    elif kind == 'index': target = labels(k, n, *rest, ignored=.3 if ignore_index == -100 else 0)
    else: target, ignore_index = mixture(k, n, draw(st.integers(1, 4)), *rest, axis=axis), -100
    eps = draw(st.sampled_from([0., .1, 1., -.2, 'per class']))
    if eps == 'per class': eps = torch.rand(k).to(DEVICE)
    return z, target, dict(axis=axis, eps=eps, ignore_index=ignore_index, reduction=draw(st.sampled_from(['mean', 'sum', 'none'])),
                           weight=draw(st.sampled_from([None, (torch.rand(k)+.1).to(DEVICE)])), weight_by=draw(st.sampled_from(['class', 'example'])))


@settings(max_examples=60, phases=[Phase.generate])  # kernels are slow in the interpreter, too slow to look for the smallest example
@given(st.data())
def test_any_options(data):
    z, target, options = draw_problem(data.draw)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()): set_tiles(patch, 4, 2)
        incoming = torch.rand(z.select(options['axis'], 0).shape).to(DEVICE) if options['reduction'] == 'none' else torch.tensor(.7, device=DEVICE)
        check(z, target, incoming=incoming, tolerance=5e-6, **options)


def test_memory_is_taken_as_it_is():
    wide = logits(4, 6, 12)
    for z, axis in ((wide[:, :-1], 2), (wide[..., 2:9], 2), (logits(2, 5, 4, 3).to(memory_format=torch.channels_last), 1), (logits(9, 5).T, 1),
                    (logits(2, 3, 5, 4), 2), (logits(8, 7)[::2], 1)):
        y = labels(z.shape[axis], *z.shape[:axis], *z.shape[axis+1:])
        assert gpu.view_of(z.shape, z.stride(), y.unsqueeze(axis).stride(), None, axis) is not None, z.stride()
        grad = check(z, y, axis=axis)
        assert grad.shape == z.shape
    assert check(logits(2, 5, 4, 3).to(memory_format=torch.channels_last), labels(5, 2, 4, 3)).is_contiguous(memory_format=torch.channels_last)
    z = logits(4, 3, 6, 2)[:, ::2, :, ::2]  # no view: copied
    check(z, labels(6, 4, 2, 1), axis=2)


def test_forms_of_labels():
    z, y = logits(2, 5, 3), labels(5, 2, 3)
    for form in (y.flatten(), y.unsqueeze(1), y.int(), y.to(torch.uint8)): assert loss_of(z, form) == loss_of(z, y)


def test_incoming_gradients_of_any_memory(small_tiles):
    z, y = logits(3, 5, 4), labels(5, 3, 4)
    for up in (torch.ones((), device=DEVICE).expand(3, 4), torch.rand(4, 3).to(DEVICE).T, torch.rand(3, 8).to(DEVICE)[:, ::2]):
        check(z, y, incoming=up, reduction='none')


def test_nothing_to_learn_from():
    y = torch.full((3,), -100, device=DEVICE)
    for bad in (-math.inf, math.nan):
        z = torch.full((3, 5), bad, device=DEVICE, requires_grad=True)
        loss = loss_of(z, y)
        loss.backward()
        assert loss == 0 and (z.grad == 0).all()
    assert (check(logits(3, 5), torch.zeros(3, 5, device=DEVICE)) == 0).all()
    assert not gpu.softmax_fits(logits(0, 5), labels(5, 0), .1, 1, None, 'class', 'mean')


@pytest.mark.parametrize('tiles', (8, 2))
def test_classes_that_are_masked_out(tiles, monkeypatch):
    set_tiles(monkeypatch, tiles, tiles)
    z, y = logits(4, 6), torch.tensor([5, 4, -100, 5], device=DEVICE)
    z[:, :3], z[2] = -math.inf, math.nan
    x = z.clone().requires_grad_()
    loss = loss_of(x, y, eps=0.)
    loss.backward()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(z, y))
    expected = torch.where((y < 0)[:, None], 0., z.softmax(1) - torch.nn.functional.one_hot(y.clamp(min=0), 6))*(y >= 0)[:, None]
    torch.testing.assert_close(x.grad, expected.nan_to_num()/3)
    assert loss_of(z, y, eps=.1) == math.inf and loss_of(z, torch.tensor([0]*4, device=DEVICE), eps=0.).isnan()
    q = torch.nn.functional.one_hot(y.clamp(min=0), 6).float()*(y >= 0)[:, None]
    torch.testing.assert_close(loss_of(z, q, eps=0.), loss)


@pytest.mark.parametrize('layout', ((4, 9), (2, 9, 3)))
@pytest.mark.parametrize('tiles', (16, 4))
def test_large_logits(layout, tiles, monkeypatch):
    set_tiles(monkeypatch, tiles, tiles)
    z, y = (8*torch.randn(layout).to(DEVICE)).round()/8, labels(9, *layout[:1], *layout[2:])
    x, moved = z.clone().requires_grad_(), (z+1e6).requires_grad_()
    losses = [loss_of(t, y, reduction='none') for t in (x, moved)]
    for loss in losses: loss.sum().backward()
    assert (losses[0] == losses[1]).all() and (x.grad == moved.grad).all()
    check(z.sign()*1e4, y, tolerance=1e-5)


def test_nan_stays_nan():
    z, y = logits(3, 5), labels(5, 3)
    nan = lambda t: t.index_fill(0, torch.tensor([1], device=DEVICE), math.nan)
    assert loss_of(z, nan(torch.rand(3, 5).to(DEVICE))).isnan()
    assert loss_of(z, MixedTarget(y[:, None], nan(torch.ones(3, 1, device=DEVICE)), 5)).isnan()
    assert loss_of(z, torch.ones_like(y), weight=nan(torch.ones(5, device=DEVICE))).isnan()


@pytest.mark.parametrize('shape', ((32, 16), (1, 16, 32)))
def test_a_gradient_under_loss_scaling(shape):
    "A mean over 2^20 pixels in float16: what remains of the gradient after a scale of 2^16, and without it"
    z, pixels = logits(*shape, dtype=torch.float16), 2**20
    y = labels(16, *shape[:1], *shape[2:])
    gradients = {}
    for scale in (1., 2.**16):
        x = z.clone().requires_grad_()
        loss_of(x, y, reduction='sum').backward(torch.tensor(scale/pixels, device=DEVICE))
        gradients[scale] = x.grad.double()/scale
    x = z.double().requires_grad_()
    (smooth_cross_entropy_reference(x, y, axis=1, reduction='sum')/pixels).backward()
    error = {scale: ((g-x.grad).norm()/x.grad.norm()).item() for scale, g in gradients.items()}
    assert error[2.**16] < 2e-3 < error[1.]


def test_sums_over_programs_are_exact_and_repeatable():
    z, y = logits(3000, 3), labels(3, 3000, ignored=.2)
    first = check(z, y)
    again = check(z, y)
    assert (first == again).all() and loss_of(z, y) == loss_of(z, y)


def test_number_of_kernels(monkeypatch):
    from fastai_smooth.kernels import triton_softmax
    counts = []

    class Counted:
        def __init__(self, name): self.name, self.kernel = name, getattr(triton_softmax, name)

        def __getitem__(self, grid): return lambda *args, **kwargs: (counts.append(self.name), self.kernel[grid](*args, **kwargs))
    for name in ('softmax_forward', 'softmax_backward', 'add_up'): monkeypatch.setattr(triton_softmax, name, Counted(name))
    for n, kernels in ((64, ['softmax_forward', 'softmax_backward']), (300, ['softmax_forward', 'add_up', 'softmax_backward'])):
        counts.clear()
        loss_of(logits(n, 10).requires_grad_(), labels(10, n)).backward()
        assert counts == kernels


@pytest.mark.parametrize('bad', (5, -1, 10**12))
def test_a_label_outside_the_classes(bad):
    z, y = logits(3, 5).requires_grad_(), torch.tensor([0, bad, 2], device=DEVICE)
    words = rf"Label {bad} is outside \[0, 5\).*ignore_index=-100, in a target of shape \(3,\)"
    loss = loss_of(z, y)
    loss.backward()
    assert (z.grad[1] == 0).all() and (z.grad[0] != 0).all()
    with pytest.raises(ValueError, match=words): gpu.check_reported_labels(DEVICE)
    gpu.check_reported_labels()  # once
    torch.testing.assert_close(loss, loss_of(z[[0, 2]], y[[0, 2]]))
    loss_of(z, y).item()
    with pytest.raises(ValueError, match=words): loss_of(z, labels(5, 3))
    check(z, labels(5, 3))
    mixed = MixedTarget(y[:, None], torch.ones(3, 1, device=DEVICE), 5)
    loss_of(z, mixed).item()
    with pytest.raises(ValueError, match=f"Label {bad}"): gpu.check_reported_labels()


def test_a_label_is_no_error_where_it_is_ignored():
    loss_of(logits(3, 5), torch.tensor([0, 7, -100], device=DEVICE), ignore_index=7).item()
    with pytest.raises(ValueError, match="Label -100 .*ignore_index=7"): gpu.check_reported_labels()


def test_double_backward():
    z, y = logits(3, 5).requires_grad_(), labels(5, 3)
    other = z.detach().clone().requires_grad_()
    seconds = []
    for x, loss in ((z, loss_of(z, y)), (other, smooth_cross_entropy_reference(other, y))):
        g, = torch.autograd.grad(loss, x, create_graph=True)
        (g**2).sum().backward()
        seconds.append(x.grad)
    torch.testing.assert_close(*seconds)
    w, pair = torch.rand(5).to(DEVICE), mixture(5, 3, 2)
    hessians = [torch.autograd.functional.hessian(lambda x: f(x, pair, axis=1, weight=w, reduction='sum'), z.detach())  # noqa: B023
                for f in (loss_of, smooth_cross_entropy_reference)]
    torch.testing.assert_close(*hessians)


@pytest.mark.parametrize('reduction', ('mean', 'none'))
def test_several_gradients_at_once(reduction):
    z, y = logits(3, 5).requires_grad_(), labels(5, 3)
    up = torch.rand(4, *(() if reduction == 'mean' else (3,)), device=DEVICE)
    together, = torch.autograd.grad(loss_of(z, y, reduction=reduction), z, up, is_grads_batched=True)
    one = [torch.autograd.grad(loss_of(z, y, reduction=reduction), z, u)[0] for u in up]  # by the kernels; together they go through the formula
    torch.testing.assert_close(together, torch.stack(one))
    rows = torch.autograd.functional.jacobian(lambda x: loss_of(x, y, reduction='none'), z.detach(), vectorize=True)
    torch.testing.assert_close(rows, torch.autograd.functional.jacobian(lambda x: smooth_cross_entropy_reference(x, y, reduction='none'), z.detach()))


def test_edits_in_place_are_noticed():
    z, q = logits(3, 5).requires_grad_(), torch.rand(3, 5).to(DEVICE)
    loss = loss_of(z, q)
    q.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): loss.backward()
    loss = loss_of(z, q)
    loss /= 2  # as training loops do
    loss.backward()


def test_what_does_not_fit():
    z, y = logits(3, 5), labels(5, 3)
    fits = lambda z=z, y=y, eps=.1, axis=1, weight=None, weight_by='class', reduction='mean': gpu.softmax_fits(z, y, eps, axis, weight, weight_by, reduction)
    assert fits()
    q = torch.rand(3, 5).to(DEVICE)
    assert not any((fits(z=z.double()), fits(y=y[:2]), fits(y=q[:, :4]), fits(y=q.clone().requires_grad_()), fits(y=y.bool()), fits(eps=torch.rand(4)),
                    fits(weight=torch.rand(4)), fits(weight=torch.rand(5).requires_grad_()), fits(weight=torch.ones(5).long()), fits(reduction='max'),
                    fits(weight_by='row'), fits(y=mixture(5, 3, 5)), fits(y=mixture(5, 3, 2, axis=1).lerp(q, .5)) is False))
    seen = []

    def loss(x, y):
        seen.append(fits(z=x, y=y))
        return smooth_cross_entropy_reference(x, y)
    torch.func.vmap(loss)(z[None], y[None])
    torch.func.grad(loss)(z, y)
    torch.func.jvp(lambda x: loss(x, y), (z,), (z,))
    assert seen == [False]*3


def test_compiled_in_one_graph():
    torch.compiler.reset()
    w = (torch.rand(5)+.1).to(DEVICE)
    graphs = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')

    def model(z, y, eps): return loss_of(2*z, y, eps, weight=w)*3
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for i in range(100 if DEVICE.type == 'cuda' else 12):
        z, y = logits(4, 5).requires_grad_(), labels(5, 4)
        x = z.detach().clone().requires_grad_()
        compiled(z, y, i/200).backward()
        model(x, y, i/200).backward()
        torch.testing.assert_close(z.grad, x.grad)
    assert graphs.frame_count <= 3  # a number is a constant at first, and a variable when it changes
    torch.compiler.reset()


@pytest.mark.parametrize('kind', ('index', 'dense'))
def test_operators_are_as_they_say(kind, small_tiles):
    y = labels(5, 4).unsqueeze(1) if kind == 'index' else torch.rand(4, 5).to(DEVICE)
    for reduction in ('mean', 'none'):
        args = logits(4, 5).requires_grad_(), y, None, torch.tensor(.1, device=DEVICE), torch.rand(5).to(DEVICE), False, -100, 1, reduction, True
        torch.library.opcheck(gpu.softmax_loss, args, test_utils=('test_schema', 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_static'))


def test_kernels_are_tried_once(monkeypatch):
    gpu.try_kernels(DEVICE)
    gpu.check_reported_labels()
    monkeypatch.setattr(gpu, 'AVAILABLE', {})
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda i: 'a card')
    calls = []

    def broken(device):
        calls.append(device)
        raise RuntimeError("ptxas too old")
    monkeypatch.setattr(gpu, 'try_kernels', broken)
    with pytest.warns(UserWarning, match="do not work on a card.*RuntimeError: ptxas too old"): assert not gpu.kernels_work(0)
    assert not gpu.kernels_work(0) and len(calls) == 1


@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float64))
def test_the_trial_and_compiled_losses_do_not_depend_on_defaults(dtype, kernels_chosen, monkeypatch):
    z, y = logits(4, 5), labels(5, 4)
    before, plain = torch.get_default_dtype(), loss_of(z, y)
    monkeypatch.setattr(paths, 'gpu_cross_entropy', gpu.gpu_cross_entropy)
    try:
        torch.set_default_dtype(dtype)
        gpu.try_kernels(DEVICE)
        torch.compiler.reset()
        loss = LabelSmoothingCrossEntropy(.1)
        torch.testing.assert_close(torch.compile(lambda z, y: loss(z, y), fullgraph=True, backend='aot_eager')(z, y), plain)
    finally:
        torch.set_default_dtype(before)
        torch.compiler.reset()
    with torch.device('meta'): gpu.try_kernels(DEVICE)  # stands for a default that is not the host


def test_tensors_without_values_try_no_kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(gpu, 'AVAILABLE', {})
    with torch._subclasses.FakeTensorMode() as mode:
        z, y = mode.from_tensor(logits(3, 5)), mode.from_tensor(labels(5, 3))
        assert not gpu.kernels_work(0) and not gpu.AVAILABLE
    assert not gpu.softmax_fits(z, y, .1, 1, None, 'class', 'mean') and not gpu_binary.binary_fits(z, y, None, None, 'mean', 0., 1., 1)


def test_a_captured_call_keeps_its_number(monkeypatch):
    "As a CUDA graph replays it, long after its place in the list was taken"
    report = gpu.LabelReport(DEVICE)
    monkeypatch.setattr(gpu.LabelReport, 'in_capture', lambda self: captured)
    captured = True
    call = report.new_call((3,), 5, -100)
    report.view[:] = call, 7
    report.check()  # nothing may wait in a capture
    captured = False
    for _ in range(300): report.new_call((4,), 9, -100)
    with pytest.raises(ValueError, match=r"Label 7 is outside \[0, 5\).*of shape \(3,\)"): report.check()


@pytest.mark.parametrize('name, asked', (('cpu', True), ('cpu:0', False), ('meta', False)))
def test_reports_are_asked_by_device(name, asked, monkeypatch):
    "'cuda' means every card, 'cuda:0' one; 'cpu' stands for them"
    report = gpu.LabelReport(torch.device('cpu'))
    monkeypatch.setattr(gpu, 'REPORTS', {torch.device('cpu', 1 if name == 'cpu:0' else None): report})
    monkeypatch.setattr(report, 'check', lambda: found.append(1))
    found = []
    gpu.check_reported_labels(name)
    assert bool(found) == asked


@pytest.fixture
def kernels_chosen(monkeypatch):
    "Let the losses take the kernels also in the interpreter. A list that counts how often they did"
    calls = []

    def counted(f): return lambda *args: (calls.append(f.__name__), f(*args))[1]
    for name, fits in (('gpu_takes', gpu.softmax_fits), ('gpu_takes_binary', gpu_binary.binary_fits)): monkeypatch.setattr(paths, name, fits)
    for name in ('gpu_cross_entropy', 'gpu_binary_cross_entropy'): monkeypatch.setattr(paths, name, counted(getattr(paths, name)))
    return calls


@pytest.mark.parametrize('dtype', (torch.float32, torch.bfloat16))
def test_losses_take_the_kernels(dtype, kernels_chosen):
    z, y, w, masks = logits(4, 5, dtype=dtype), labels(5, 4, ignored=.2), (torch.rand(5)+.1).to(DEVICE), logits(2, 5, 3, 4, dtype=dtype)
    multi_hot, prior = (torch.rand(4, 5) < .4).float().to(DEVICE), ClassPrior([1, 2, 3, 4, 5]).to(DEVICE)
    cases = [(LabelSmoothingCrossEntropy(.2, w), z, y), (LabelSmoothingCrossEntropy(.2, dist=prior), z, y),
             (LabelSmoothingCrossEntropy(.2, axis=1, convention='others', reduction='none'), masks, labels(5, 2, 3, 4)),
             (LabelSmoothingCrossEntropy(.2, weight=w, weight_by='example'), z, mixture(5, 4, 2)), (MultiLabelSmoothingCrossEntropy(.2), z, multi_hot),
             (LabelSmoothingBCE(.2, w, pos_weight=2*w), z, multi_hot), (LabelSmoothingBCE(.2, sum_classes=True), z, y),
             (LabelSmoothingBCE([.1, .2, .3, 0, 0]), masks, labels(5, 2, 3, 4)), (LabelSmoothingBCE(.2, target_threshold=.3), z, multi_hot)]
    for loss, pred, target in cases:
        x, exact, loss = pred.clone().requires_grad_(), pred.double().requires_grad_(), loss.to(DEVICE)
        before = len(kernels_chosen)
        found = loss(x, target)
        assert len(kernels_chosen) == before + 1, loss
        wanted = loss(exact, target)  # double: by the formula, or on a CPU by its own path
        assert len(kernels_chosen) == before + 1
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
        for value in (found, wanted): value.sum().backward()
        tolerance = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=2**-7, atol=1e-5)
        torch.testing.assert_close(x.grad.double(), exact.grad, **tolerance)


@pytest.mark.parametrize('loss', (LabelSmoothingCrossEntropy(.2, axis=1), LabelSmoothingBCE(.2)))
def test_losses_compile_with_batches_of_any_size(loss, kernels_chosen, monkeypatch):
    for name, module in (('gpu_cross_entropy', gpu), ('gpu_binary_cross_entropy', gpu_binary)): monkeypatch.setattr(paths, name, getattr(module, name))
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(lambda z, y: loss(2*z, y), fullgraph=True, backend=graphs)
    for n in (3, 4, 6):
        z, y = logits(n, 5).requires_grad_(), torch.rand(n, 5).to(DEVICE)
        x = z.detach().clone().requires_grad_()
        compiled(z, y).backward()
        loss(2*x, y).backward()
        torch.testing.assert_close(z.grad, x.grad)
    assert graphs.frame_count <= 2  # the second is for any size
    torch.compiler.reset()


def test_a_label_outside_reaches_the_user_of_a_loss(kernels_chosen):
    z, y, loss = logits(3, 5), torch.tensor([0, 9, 1], device=DEVICE), LabelSmoothingCrossEntropy()
    loss(z, y).item()
    with pytest.raises(ValueError, match=r"Label 9 is outside \[0, 5\)"): loss(z, labels(5, 3))
    assert loss(z, labels(5, 3)).isfinite()


@pytest.mark.skipif(DEVICE.type != 'cuda', reason="needs a GPU")
def test_the_host_does_not_wait():
    z, y, w = logits(64, 10).requires_grad_(), labels(10, 64, ignored=.1), torch.rand(10).to(DEVICE)
    targets = y, torch.rand(64, 10, device=DEVICE), mixture(10, 64, 2)  # which wait for their copies
    loss_of(z, y, weight=w).backward()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for target in targets: loss_of(z, target, weight=w).backward()
    finally: torch.cuda.set_sync_debug_mode('default')
