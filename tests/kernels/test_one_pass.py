"Focal loss, penalties and Dice with their gradient in closed form: against plain formulas in double precision, and where the formula has to do"
import copy
import itertools

import pytest
import torch
from memory import peak

import fastai_smooth.kernels.cpu as cpu
import fastai_smooth.kernels.formulas as formulas
import fastai_smooth.kernels.one_pass as one_pass
import fastai_smooth.kernels.paths as paths
from fastai_smooth.losses import LabelSmoothingCrossEntropy, LabelSmoothingDice, LabelSmoothingFocal, LogitPenalty
from fastai_smooth.targets import MixedTarget, to_dense

K, EPS = 5, .2


def close(a, b, tol=1e-9): torch.testing.assert_close(a, b, rtol=tol, atol=tol, check_dtype=False)


def smoothed(q): return (1-EPS)*q + EPS/K*q.sum(1, keepdim=True)


def focal(z, q, gamma):
    log_p = z.log_softmax(1)
    return -(smoothed(q)*(1-log_p.exp())**gamma*log_p).sum(1)


def penalty(z, q, kind, margin=0.):
    "Of each position that has a label"
    if kind == 'confidence': each = (z.softmax(1)*z.log_softmax(1)).sum(1)
    else: each = (z.amax(1, keepdim=True)-margin-z).clamp(min=0).mean(1)
    return each*q.sum(1).clamp(max=1)


def dice(z, q, square):
    p, s, area = z.softmax(1)*q.sum(1, keepdim=True), smoothed(q), tuple(range(2, z.ndim))
    total = lambda x: x.sum(area) if area else x
    inter, union = (total(p*s), total(p**2)+total(s**2)) if square else (total(torch.minimum(p, s)), total(p+s))
    return 1-(2*inter+1e-6)/(union+1e-6)


def cross_entropy(z, q): return -(smoothed(q)*z.log_softmax(1)).sum(1)


def penalized(kind, margin=0.): return lambda z, q: cross_entropy(z, q) + .3*penalty(z, q, kind, margin)


CE = LabelSmoothingCrossEntropy(EPS, axis=1)
# the loss, and what it is at each position (Dice: for each example and class)
LOSSES = {'focal': (LabelSmoothingFocal(EPS, axis=1), lambda z, q: focal(z, q, 2)),
          'focal 1': (LabelSmoothingFocal(EPS, 1., axis=1), lambda z, q: focal(z, q, 1)),
          'focal 3.5': (LabelSmoothingFocal(EPS, 3.5, axis=1), lambda z, q: focal(z, q, 3.5)),
          'margin': (LogitPenalty(CE, 'margin', .3, 1.), penalized('margin', 1.)),
          'maxsup': (LogitPenalty(CE, 'maxsup', .3), penalized('maxsup')), 'confidence': (LogitPenalty(CE, 'confidence', .3), penalized('confidence')),
          'dice': (LabelSmoothingDice(EPS), lambda z, q: dice(z, q, False)),
          'dice of squares': (LabelSmoothingDice(EPS, square_in_union=True), lambda z, q: dice(z, q, True))}
every = pytest.mark.parametrize('name', LOSSES)


def loss_of(name, reduction='mean'):
    loss = copy.deepcopy(LOSSES[name][0])
    loss.reduction = reduction
    return loss


def oracle(name, z, q, reduction):
    each = LOSSES[name][1](z.masked_fill((q.sum(1, keepdim=True) == 0), 0.), q)
    n = 1 if reduction == 'sum' else each.numel() if 'dice' in name else q.sum()
    if reduction == 'mean' and name in ('margin', 'maxsup', 'confidence'): # two means of their own
        part = .3*penalty(z.masked_fill((q.sum(1, keepdim=True) == 0), 0.), q, name, float(name == 'margin'))
        return (each-part).sum()/n + part.sum()/q.sum(1).clamp(max=1).sum()
    return each.sum()/n


def targets(shape):
    "Each kind of target and its dense form"
    y = torch.randint(0, K, (shape[0], *shape[2:]))
    other, lam = torch.randint(0, K, y.shape), torch.rand(len(y), dtype=torch.float64)
    void = y.clone()
    void.view(-1)[::3] = -100
    one, two = to_dense(y, K).double(), to_dense(other, K).double()
    lam_ = lam.view(-1, *[1]*(len(shape)-1))
    part = torch.rand(shape, dtype=torch.float64)
    part = .9*part/part.sum(1, keepdim=True)
    part[0] = 0.
    weights = torch.stack([lam, 1-lam], 1).view(len(y), 2, *[1]*(y.ndim-1)).expand(len(y), 2, *y.shape[1:])
    return [(y, one), (void, to_dense(void, K).double()), (part, part), (MixedTarget(torch.stack([y, other], 1), weights, K), lam_*one+(1-lam_)*two)]


def check(name, z, target, q, reduction, tol=1e-9):
    a, b = z.clone(memory_format=torch.preserve_format).requires_grad_(), z.double().clone().requires_grad_()
    loss = loss_of(name, reduction)(a, target)
    assert 'LossWithGradient' in str(loss.grad_fn) or 'LossWithGradient' in str(loss.grad_fn.next_functions)
    expected = oracle(name, b, q, reduction)
    (2*loss).backward(retain_graph=True)
    loss.backward() # once more, from the logits
    (3*expected).backward()
    close(loss, expected, tol), close(a.grad, b.grad, tol)
    with torch.no_grad(): close(loss_of(name, reduction)(a, target), loss, tol)
    return loss.item(), a.grad


@pytest.fixture(params=['CPU', 'device'])
def place(request, monkeypatch):
    "On a CPU, and as where no value can be read"
    if request.param == 'CPU': return
    for module in (cpu, one_pass): monkeypatch.setattr(module, 'has_values', lambda x: False)
    monkeypatch.setattr(formulas, 'is_readable', lambda x: False)
    for name in ('cpu_cross_entropy', 'cpu_cross_entropy_of_few'): monkeypatch.setattr(paths, name, lambda logits, *args: args[-1](logits))


@every
@pytest.mark.parametrize('shape', [(6, K), (2, K, 3, 4)])
def test_values_and_gradients(name, shape, place, monkeypatch):
    "In one block, and in many"
    z = 3*torch.randn(shape, dtype=torch.float64)
    for (target, q), reduction in itertools.product(targets(shape), ('mean', 'sum')):
        first = check(name, z, target, q, reduction)
        with monkeypatch.context() as small:
            small.setattr(cpu, 'SMALL', 0), small.setattr(one_pass, 'SMALL', 0), small.setattr(cpu, 'BLOCK', 4*K)
            again = [check(name, z, target, q, reduction) for _ in range(2)]
        close(first[1], again[0][1])
        assert again[0][0] == again[1][0] and (again[0][1] == again[1][1]).all() # to the bit


@every
def test_memory_in_another_order(name, monkeypatch):
    monkeypatch.setattr(cpu, 'SMALL', 0)
    z = torch.randn(3, K, 4, 6, dtype=torch.float64)
    target, q = targets(z.shape)[1]
    for laid in (z.to(memory_format=torch.channels_last), torch.stack([z, z], -1)[..., 0], z.transpose(2, 3).contiguous().transpose(2, 3)):
        check(name, laid, target, q, 'mean')
    loss = loss_of(name)
    loss.eps, last = EPS, z.movedim(1, -1).contiguous().requires_grad_()
    for part in (loss, *loss.parts()):
        if not part.parts(): part.axis = -1
    loss(last, target).backward()
    a = z.clone().requires_grad_()
    loss_of(name)(a, target).backward()
    close(last.grad.movedim(-1, 1), a.grad)


@every
@pytest.mark.parametrize('dtype, tol', [(torch.float32, 2e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_single_and_half_precision(name, dtype, tol):
    z = (2*torch.randn(4, K, 30, 70)).to(dtype)
    target, q = targets(z.shape)[1]
    _, g = check(name, z, target, q, 'mean', tol)
    assert g.dtype is dtype and loss_of(name)(z, target).dtype is torch.float32


@every
def test_derivatives_of_all_kinds(name):
    "Second and forward derivatives, several at once, functional transforms and compilers take the formula"
    z, y = torch.randn(2, K, dtype=torch.float64, requires_grad=True), torch.tensor([3, 1])
    loss = loss_of(name)
    f = lambda z: loss(z, y)
    assert torch.autograd.gradcheck(f, z, check_forward_ad=True, check_batched_grad=True) and torch.autograd.gradgradcheck(f, z)
    g, = torch.autograd.grad(f(z), z)
    close(torch.func.grad(f)(z.detach()), g), close(torch.func.jacrev(f)(z.detach()), g)
    batch = torch.stack([z.detach(), 2*z.detach()])
    close(torch.func.vmap(f)(batch), torch.stack([f(x) for x in batch]))
    q = to_dense(y, K).double().requires_grad_()
    loss(z.detach(), q).backward()
    assert q.grad.abs().sum() > 0


@pytest.mark.parametrize('name', ['focal', 'maxsup', 'dice'])
def test_a_compiler_takes_the_formula(name):
    z, y, loss = torch.randn(3, K, 2), torch.randint(0, K, (3, 2)), loss_of(name)
    close(torch.compile(loss, backend='eager')(z, y), loss(z, y), 1e-6)


@every
def test_extreme_logits(name, place):
    "Equal logits share a gradient, a class that is ruled out has none: as the formula says"
    ruled = torch.randn(4, K, dtype=torch.float64)
    ruled[:, 2] = -torch.inf
    for z, q in itertools.product((torch.zeros(4, K, dtype=torch.float64), ruled, 1e4*torch.randn(4, K).round().double()),
                                  (to_dense(torch.tensor([0, 1, 3, 4]), K).double(), torch.zeros(4, K, dtype=torch.float64))):
        fast, slow = loss_of(name, 'sum'), loss_of(name, 'none')
        fast.eps = slow.eps = 0.
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        loss, expected = fast(a, q), slow(b, q).sum()
        loss.backward(), expected.backward()
        close(loss, expected), close(a.grad, b.grad)


@every
def test_nothing_to_learn_from(name, place):
    ignored = torch.full((3,), -100)
    for z, y in ((torch.randn(3, K), ignored), (torch.full((3, K), torch.nan), ignored), (torch.randn(0, K), ignored[:0])):
        z.requires_grad_()
        loss = loss_of(name)(z, y)
        loss.backward()
        assert loss == 0 and (z.grad == 0).all()


@every
def test_padding_may_hold_anything(name, place):
    z, y = torch.randn(4, K, dtype=torch.float64), torch.tensor([1, -100, 3, -100])
    holes = z.clone()
    holes[1], holes[3] = torch.nan, torch.inf
    a, b = z.clone().requires_grad_(), holes.requires_grad_()
    loss_of(name)(a, y).backward(), loss_of(name)(b, y).backward()
    close(a.grad, b.grad)


@every
def test_memory(name):
    "The gradient and blocks, however many pixels; a penalty has a gradient beside that of its loss"
    z, y = torch.randn(6, 4, 256, 256, requires_grad=True), torch.randint(0, 4, (6, 256, 256))
    loss = loss_of(name)
    def step():
        z.grad = None
        loss(z, y).backward()
    step()
    assert peak(step) < (2.6 if isinstance(loss, LogitPenalty) else 2.1)*z.nbytes


@every
def test_other_options_take_the_formula(name):
    "A strength per class: nothing but the formula has it"
    z, y, each = torch.randn(6, K, requires_grad=True), torch.randint(0, K, (6,)), [.1, .2, .3, .2, .1]
    loss, per = loss_of(name), loss_of(name, 'none')
    loss.eps = per.eps = each
    close(loss(z, y), per(z, y).mean(), 1e-5)


@pytest.mark.parametrize('gamma', [.5, 0.])
def test_focal_below_one(gamma):
    "No infinite derivative where a class is certain; gamma 0 is cross entropy"
    z, y = torch.tensor([[200., 0., 0.], [1., 2., 3.]], requires_grad=True), torch.tensor([0, 1])
    loss = LabelSmoothingFocal(.1, gamma)(z, y)
    loss.backward()
    assert z.grad.isfinite().all()
    if not gamma: close(loss, LabelSmoothingCrossEntropy(.1)(z, y), 1e-6)
