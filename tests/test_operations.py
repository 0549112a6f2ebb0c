"Every operation of the table in `operations.py`, in every dtype and on every device that is there"
import copy
import pickle

import pytest
import torch
from operations import CHECKS, DEVICES, DTYPES, K, NOT_TRACED, ONLY, OPERATIONS, OTHERS
from torch import nn

from fastai_smooth import kernels, losses, targets

ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2} # of a gradient in that dtype


def results(op, f, kind, xs, rest):
    "The value, and the gradients of what has one"
    value = op.call(f, kind, xs, rest)
    if not value.requires_grad: return [value, *[None]*len(xs)]
    return [value, *torch.autograd.grad(value.double().sum() if value.device.type != 'meta' else value.sum(), xs, allow_unused=True)]


def close(a, b, tol):
    for x, y in zip(a, b, strict=True): torch.testing.assert_close(x, y, rtol=tol, atol=tol, equal_nan=True, check_dtype=False, check_stride=False)


def to_device(f, device): return copy.deepcopy(f).to(device) if isinstance(f, nn.Module) else moved(f, device)
def moved(f, device): return type(f)(f.func, **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in f.keywords.items()})


def check_value(op, f, kind, dtype, device):
    "As in double precision, and in single precision where the input has half"
    xs, rest = op.sample(kind, dtype, device)
    found = results(op, f, kind, xs, rest)
    exact = results(op, f, kind, [x.detach().double().requires_grad_() for x in xs], [t.double() if t.is_floating_point() else t for t in rest])
    if op.inputs != 'none': assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(found[:1], exact[:1], ROUNDING[dtype] if op.inputs == 'head' else 1e-9 if dtype == torch.float64 else 1e-5) # logits in the dtype of the layer
    for x, grad in zip(xs, found[1:]): assert grad is None or (grad.dtype, grad.shape) == (x.dtype, x.shape)
    close(found[1:], exact[1:], ROUNDING[dtype])


def check_gradcheck(op, f, kind, dtype, device):
    xs, rest = op.sample(kind, dtype, device)
    assert torch.autograd.gradcheck(lambda *xs: op.call(f, kind, xs, rest), xs)


def check_gradgradcheck(op, f, kind, dtype, device):
    xs, rest = op.sample(kind, dtype, device)
    assert torch.autograd.gradgradcheck(lambda *xs: op.call(f, kind, xs, rest), xs, fast_mode=True)


def check_vmap(op, f, kind, dtype, device):
    "Example by example; weight and bias of a linear layer are those of all"
    xs, rest = op.sample(kind, dtype, device)
    given = [x.detach() for x in xs] + rest
    dims = tuple(None if op.inputs == 'head' and i in (1, 2) else 0 for i in range(len(given)))

    def one(*ts):
        ts = [t if d is None else t[None] for t, d in zip(ts, dims)]
        return op.call(f, kind, ts[:len(xs)], ts[len(xs):])
    loop = torch.stack([one(*(t if d is None else t[i] for t, d in zip(given, dims))) for i in range(3)])
    close([torch.func.vmap(one, dims)(*given)], [loop], ROUNDING[dtype] if op.inputs == 'head' else 1e-5)


def check_compile(op, f, kind, dtype, device):
    "One graph, with its gradients. A label that is no class cannot be an error there, and must not be a number that looks good"
    xs, rest = op.sample(kind, dtype, device)
    torch.compiler.reset()
    compiled = torch.compile(lambda xs, rest: op.call(f, kind, xs, rest), fullgraph=True, backend='eager')
    close([compiled(xs, rest), *torch.autograd.grad(compiled(xs, rest).sum(), xs, allow_unused=True)] if xs else [compiled(xs, rest)],
          results(op, f, kind, xs, rest), ROUNDING[dtype])
    if kind == 'index' and op.judges:
        for wrong in (K, -1): assert not compiled(xs, [rest[0].clamp(min=0).index_fill(0, torch.tensor([2], device=device), wrong)]).isfinite().all()


def same_bits(op, f, other, kind, dtype, device):
    xs, rest = op.sample(kind, dtype, device)
    close(results(op, other, kind, xs, rest), results(op, f, kind, xs, rest), 0)


def check_deepcopy(op, f, kind, dtype, device):
    other = copy.deepcopy(f)
    assert other is not f
    same_bits(op, f, other, kind, dtype, device)


def check_pickle(op, f, kind, dtype, device): same_bits(op, f, pickle.loads(pickle.dumps(f)), kind, dtype, device)


def check_strides(op, f, kind, dtype, device):
    "The same numbers in memory of another order, and with gaps"
    xs, rest = op.sample(kind, dtype, device)
    expected = results(op, f, kind, xs, rest)
    for other in (lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), lambda t: torch.stack([t, t], -1)[..., 0]):
        close(results(op, f, kind, [other(x.detach()).requires_grad_() for x in xs], [other(t) for t in rest]), expected, ROUNDING[dtype])


def check_empty(op, f, kind, dtype, device):
    "A batch of nothing is worth nothing, and its gradients are there"
    xs, rest = op.sample(kind, dtype, device, n=0)
    value, *grads = results(op, f, kind, xs, rest)
    assert value.isfinite().all() and value.sum() == 0
    for x, grad in zip(xs, grads): assert grad.shape == x.shape and (grad == 0).all()


def check_meta(op, f, kind, dtype, device):
    "Shapes without values, as on a GPU that is not to be waited for"
    xs, rest = op.sample(kind, dtype)
    there = results(op, f, kind, xs, rest)
    found = results(op, to_device(f, 'meta'), kind, [x.detach().to('meta').requires_grad_() for x in xs], [t.to('meta') for t in rest])
    for a, b in zip(found, there, strict=True):
        assert a is b is None or (a.device.type, a.shape, a.dtype) == ('meta', b.shape, b.dtype)


CASES = [pytest.param(op, kind, check, id=f'{op}-{kind}-{check}') for op in OPERATIONS for kind, check in op.cases()]


@pytest.mark.parametrize('op, kind, check', CASES)
def test_operation(op, kind, check):
    run = globals()[f'check_{check}']
    for device in DEVICES:
        f = to_device(op.f, device)
        for dtype in ONLY.get(check, (DTYPES,))[0]:
            torch.manual_seed(0)
            if not op.skip(check, kind): run(op, f, kind, dtype, device)
            else: # it fails: a skip that is no longer needed has to go
                with pytest.raises((ValueError, TypeError, RuntimeError, AssertionError)): run(op, f, kind, dtype, device)


def test_every_public_operation_is_in_the_table():
    known = {op.name for op in OPERATIONS} | set(OTHERS)
    public = {*targets.__all__, *kernels.__all__, *losses.__all__}
    assert known == public, f'not in the table: {sorted(public-known)}; not public: {sorted(known-public)}'


def test_skips_say_why():
    skips = [(op, case, reason) for op in OPERATIONS for case, reason in op.skips.items()]
    for op, case, _ in skips:
        check, kind = case if isinstance(case, tuple) else (case, None)
        assert check in CHECKS and kind in (None, *op.kinds), f'{op}: no case {case}'
    for reason in [NOT_TRACED, *(r for *_, r in skips), *OTHERS.values(), *(r for _, r in ONLY.values())]: assert len(reason.split()) > 2, reason
