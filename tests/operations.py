"""One table of operations, as torch's `OpInfo`: every loss and function of this package with the targets that it takes. A new loss is one line.

`test_operations.py` asks of each: value and gradient in every dtype, `gradcheck`, `gradgradcheck`, `vmap`, `compile`, `deepcopy`, `pickle`, memory that is not
contiguous, a batch of nothing, the device 'meta'. What cannot be asked of one is a skip with its reason here, and fails if it works after all."""
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from fastai_smooth import kernels, losses, targets
from fastai_smooth.distributions import ClassPrior, Taxonomy, Zipf
from fastai_smooth.targets import MixedTarget

K = 4
EACH, WEIGHT = (.1, .2, .3, .4), (1., 2., 3., 4.)
CHECKS = 'value', 'gradcheck', 'gradgradcheck', 'vmap', 'compile', 'deepcopy', 'pickle', 'strides', 'empty', 'meta'
DTYPES = torch.float32, torch.float64, torch.float16, torch.bfloat16
DEVICES = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
# Checks that are made in some dtypes only, and why
ONLY = {'gradcheck': ((torch.float64,), 'finite differences need double precision'),
        'gradgradcheck': ((torch.float64,), 'finite differences need double precision'),
        'compile': ((torch.float32,), 'a graph takes half a second to trace, and goes through the same lines for each dtype'),
        'deepcopy': ((torch.float32,), 'a copy does not know the dtype of later inputs'),
        'pickle': ((torch.float32,), 'a pickle does not know the dtype of later inputs'),
        'meta': ((torch.bfloat16,), 'without values there are shapes and dtypes, and half precision is where the dtype changes')}
NOT_TRACED = ('a graph takes half a second to trace: one for each operation, of index targets, and more for those whose path depends on the target; '
              'none for a second name, other dimensions, and the references, which are what a compiled function becomes')


def labels(n, space, device):
    "Index labels, one of them ignored"
    y = torch.arange(n*max(1, torch.Size(space).numel()), device=device).reshape(n, *space) % K
    if n > 1: y.view(n, -1)[1, 0] = -100
    return y


@dataclass
class Target:
    "A kind of target: tensors of n examples, those that learn first, and what they are put together to"
    tensors: Callable # (n, space, dtype, device, axis) -> floating tensors with a gradient, other tensors
    join: Callable = lambda y, axis: y


def soft(n, space, dtype, device, axis): return torch.rand(n, K, *space, dtype=dtype, device=device).softmax(1).movedim(1, axis)
def several(n, space, dtype, device, axis):
    q = (torch.rand(n, K, *space, dtype=dtype, device=device) > .5).to(dtype)
    if n > 1: q.view(n, -1)[1, 0] = torch.nan # unknown
    return q.movedim(1, axis)


TARGETS = {
    'index': Target(lambda n, space, dtype, device, axis: ([], [labels(n, space, device)])),
    'dense': Target(lambda *a: ([], [soft(*a)])),
    'learnt': Target(lambda *a: ([soft(*a)], [])), # a dense target with a gradient
    'mixed': Target(lambda n, space, dtype, device, axis: ([], [torch.stack([labels(n, space, device), labels(n, space, device).flip(0)], 1),
                                                               torch.tensor([[.3, .7]]*n, dtype=dtype, device=device).view(n, 2)]),
                    lambda index, weight, axis: MixedTarget(index, weight, K, axis)),
    'labels': Target(lambda *a: ([], [several(*a)])), # some of several, one unknown
}
SOFTMAX, BINARY = ('index', 'dense', 'learnt', 'mixed'), ('index', 'labels', 'dense', 'learnt', 'mixed')


@dataclass
class Op:
    "An operation: `f` of floating inputs and a target"
    name: str # public name
    f: Callable
    kinds: tuple = SOFTMAX # of `TARGETS`
    inputs: str = 'logits' # 'logits', 'log_probs', 'head' (features, weight, bias of a linear layer), 'heads' (logits of two), 'none': of the target alone
    space: tuple = () # dimensions behind the classes
    axis: int = 1 # class dimension
    grid: str = '' # what tells it from others of its name
    graphs: tuple = ('index',) # the kinds of targets with which it is compiled, see `NOT_TRACED`
    judges: bool = True # whether a label that is no class makes the result of a graph nan or infinite
    skips: dict = field(default_factory=dict) # check, or (check, kind): the reason

    def floats(self, n, dtype, device):
        z = 2*torch.randn(n, K, *self.space, dtype=dtype, device=device).movedim(1, self.axis)
        rand = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)
        return {'logits': lambda: [z], 'log_probs': lambda: [z.log_softmax(self.axis)], 'heads': lambda: [z, z.flip(0)], 'none': lambda: [],
                'head': lambda: [rand(n, 3), rand(K, 3), rand(K)]}[self.inputs]()

    def sample(self, kind, dtype, device='cpu', n=3):
        "Inputs that have a gradient, and the others"
        learn, rest = TARGETS[kind].tensors(n, self.space, torch.promote_types(dtype, torch.float32), device, self.axis)
        xs = self.floats(n, dtype, device) + learn
        if self.inputs == 'none': xs, rest = xs + [t for t in rest if t.is_floating_point()], [t for t in rest if not t.is_floating_point()]
        return [x.detach().requires_grad_() for x in xs], rest

    def call(self, f, kind, xs, rest):
        "The operation `f` of a sample"
        n = {'logits': 1, 'log_probs': 1, 'head': 3, 'heads': 2, 'none': 0}[self.inputs]
        own, target = xs[:n], TARGETS[kind].join(*rest, *xs[n:], axis=self.axis)
        if self.inputs == 'head': return f(own[0], own[1], target, bias=own[2])
        return f(own, target, target) if self.inputs == 'heads' else f(*own, target)

    def cases(self): return [(kind, check) for kind in self.kinds for check in CHECKS if check != 'compile' or kind in self.graphs]

    def skip(self, check, kind): return self.skips.get((check, kind)) or self.skips.get(check)
    def __str__(self): return self.name + (f'[{self.grid}]' if self.grid else '')


NO_FLOATS = 'class indices have no gradient'
CE = losses.LabelSmoothingCrossEntropy
OPERATIONS = [
    Op('to_dense', partial(targets.to_dense, n_classes=K), ('index', 'learnt', 'mixed'), 'none',
       skips={('gradcheck', 'index'): NO_FLOATS, ('gradgradcheck', 'index'): NO_FLOATS}),
    Op('smooth_labels', partial(targets.smooth_labels, eps=.1, n_classes=K), ('index', 'learnt', 'mixed'), 'none',
       skips={('gradcheck', 'index'): NO_FLOATS, ('gradgradcheck', 'index'): NO_FLOATS}),
    Op('smooth_binary', partial(targets.smooth_binary, eps=EACH), ('learnt',), 'none', graphs=('learnt',)),
    Op('smooth_cross_entropy', partial(kernels.smooth_cross_entropy, eps=.1), graphs=('index', 'learnt', 'mixed')),
    Op('smooth_cross_entropy', partial(kernels.smooth_cross_entropy, eps=torch.tensor(EACH), weight=torch.tensor(WEIGHT), reduction='none'), grid='each'),
    Op('smooth_cross_entropy', partial(kernels.smooth_cross_entropy, eps=.1, axis=1, reduction='sum'), space=(2,), grid='masks', graphs=()),
    Op('smooth_cross_entropy_reference', partial(kernels.smooth_cross_entropy_reference, eps=.1), graphs=()),
    Op('smooth_binary_cross_entropy', partial(kernels.smooth_binary_cross_entropy, eps=.1), BINARY, graphs=('index', 'labels', 'mixed')),
    Op('smooth_binary_cross_entropy_reference', partial(kernels.smooth_binary_cross_entropy_reference, eps=.1), BINARY, graphs=()),
    Op('smooth_linear_cross_entropy', partial(kernels.smooth_linear_cross_entropy, eps=.1, chunk=2), inputs='head'),
    Op('LabelSmoothingCrossEntropy', CE(.1)),
    Op('LabelSmoothingCrossEntropy', CE(.1, WEIGHT, weight_by='example', convention='others'), grid='example'),
    Op('LabelSmoothingCrossEntropy', CE(EACH, dist=ClassPrior([1, 2, 3, 4])), grid='prior'),
    Op('LabelSmoothingCrossEntropy', CE(.1, dist=.5*Taxonomy(['x/a', 'x/b', 'y/c', 'z']) + .5*Zipf()), grid='sum', graphs=('index', 'mixed')),
    Op('LabelSmoothingCrossEntropyFlat', losses.LabelSmoothingCrossEntropyFlat(.1, axis=1), space=(2,), graphs=()),
    Op('LabelSmoothingNLL', losses.LabelSmoothingNLL(.1), inputs='log_probs'),
    Op('LabelSmoothingFocal', losses.LabelSmoothingFocal(.1)),
    Op('LabelSmoothingFocal', losses.LabelSmoothingFocal(.1, .5, WEIGHT), grid='gamma=.5'),
    Op('LabelSmoothingDice', losses.LabelSmoothingDice(.1), space=(2,)),
    Op('LabelSmoothingDice', losses.LabelSmoothingDice(.1, square_in_union=True, reduction='none'), space=(2,), grid='squares'),
    Op('LabelRelaxation', losses.LabelRelaxation(.1)),
    Op('MultiLabelSmoothingCrossEntropy', losses.MultiLabelSmoothingCrossEntropy(.1), ('index', 'dense', 'learnt')),
    Op('LabelSmoothingBCE', losses.LabelSmoothingBCE(.1), BINARY),
    Op('LabelSmoothingBCE', losses.LabelSmoothingBCE(EACH, WEIGHT, pos_weight=WEIGHT, sum_classes=True), BINARY, grid='each'),
    *(Op('LogitPenalty', losses.LogitPenalty(CE(.1), kind, .3, margin=.5), grid=kind) for kind in ('margin', 'maxsup', 'confidence')),
    Op('CombinedLoss', losses.CombinedLoss(losses.LabelSmoothingDice(.1), CE(.1, axis=1), weights=(.5, 1.)), space=(2,)),
    Op('EachClass', losses.EachClass(nn.CrossEntropyLoss()), judges=False, # torch's own loss raises an IndexError
       skips={('empty', 'index'): 'indices go to the loss itself, and the mean of nothing is nan in torch'}),
    Op('MultiTargetLoss', losses.MultiTargetLoss(CE(.1), losses.LabelSmoothingFocal(.1)), inputs='heads'),
]
# Public names of these rooms that are no operations on tensors, and why
OTHERS = {
    'MixedTarget': 'a target: the kind `mixed` of every operation',
    'binary_levels': 'two numbers, which `smooth_binary` and the binary losses use',
    'convert_eps': 'from a number to a number',
    'SmoothingLoss': 'the base of the losses, which computes nothing itself',
    'loss_settings': 'reads the settings of a loss',
}
