"The contract: the names that users write, their parameters and defaults"
import argparse
import inspect

import pytest
from fastai.learner import Learner, Metric
from torch import nn

import fastai_smooth.all as exported
from fastai_smooth.cli import _parser

CROSS_ENTROPY = "eps=.1, weight=None, reduction='mean', *, axis=-1, ignore_index=-100, dist=None, convention='uniform', weight_by='class'"
# what is promised may only be added to: parameters by keyword, or behind the last one
CONTRACT = {
    'to_dense': 'y, n_classes, axis=1, ignore_index=-100',
    'smooth_labels': "target, eps=.1, n_classes=None, axis=1, dist=None, convention='uniform', ignore_index=-100",
    'smooth_binary': "target, eps=.1, convention='half', eps_pos=None, eps_neg=None",
    'convert_eps': 'eps, n_classes, source, to',
    'MixedTarget': 'indices, weights, n_classes, axis=1',
    'MixedTarget.dense': '',
    'Uniform': '',
    'Uniform.__call__': 'target, axis=1, logits=None, inputs=None',
    'Uniform.matrix': 'n_classes',
    'Uniform.plot': 'vocab',
    'ClassPrior': 'counts',
    'ClassPrior.from_dls': 'dls',
    'Similarity': 'matrix',
    'Similarity.from_confusion': 'matrix',
    'Similarity.from_embeddings': 'vectors, temperature',
    'Taxonomy': 'paths, beta=10.',
    'Online': 'n_classes, momentum=None',
    'Online.update': 'logits, labels, axis=1',
    'Online.next_epoch': '',
    'Online.matrix': 'n_classes',
    'Zipf': 'power=1.',
    'Teacher': 'model, temperature=1.',
    'Spatial': 'kernel_size=3, sigma=1.',
    'smooth_cross_entropy': "logits, target, eps=.1, *, axis=-1, weight=None, weight_by='class', ignore_index=-100, reduction='mean'",
    'smooth_binary_cross_entropy': "logits, target, eps=.1, *, convention='half', weight=None, pos_weight=None, reduction='mean'",
    'smooth_linear_cross_entropy': "features, weight, target, eps=.1, *, bias=None, dist=None, class_weight=None, weight_by='class', ignore_index=-100, "
                                   "reduction='mean', chunk='auto'",
    'LabelSmoothingCrossEntropy': CROSS_ENTROPY,
    'LabelSmoothingCrossEntropyFlat': CROSS_ENTROPY,
    'LabelSmoothingBCE': "eps=.1, weight=None, reduction='mean', *, pos_weight=None, convention=None, eps_pos=None, eps_neg=None, thresh=.5, "
                         "target_threshold=None, sum_classes=False",
    'MultiLabelSmoothingCrossEntropy': "eps=.1, reduction='mean', *, axis=-1",
    'LabelSmoothingDice': "eps=.1, axis=1, smooth=1e-6, reduction='sum', *, square_in_union=False, dist=None, ignore_index=-100",
    'LabelSmoothingFocal': 'eps=.1, gamma=2.',
    'LogitPenalty': "loss, kind='margin'",
    'LabelSmoothing': 'eps=.1, dist=None, *, n_classes=None, axis=None, convention=None, target=0',
    'soft_loss': 'loss_func',
    'soft_loss.register': '',
    'OneOf': '*cbs, p=None',
    'CutMixMask': 'alpha=1.',
    'ECE': "n_bins=15, norm='l1'",
    'AdaptiveECE': 'n_bins=15',
    'ClasswiseECE': 'n_bins=15',
    'MCE': 'n_bins=15',
    'NLL': '',
    'Brier': '',
    'AURC': "score='msp', p=2",
    'SmoothECE': '', 'DebiasedCE': '', 'AUGRC': '',
    'calibration_test': 'probs, labels',
    'CalibrationInterpretation.from_learner': 'learn, ds_idx=1, dl=None',
    'CalibrationInterpretation.metrics': '',
    'CalibrationInterpretation.plot_reliability': 'n_bins=15, *, ax=None',
    'CalibrationInterpretation.plot_confidence': '*, ax=None',
    'CalibrationInterpretation.plot_risk_coverage': '*, ax=None',
    'CalibrationInterpretation.plot_penultimate': 'classes, *, ax=None',
    'CalibrationInterpretation.top_confident_errors': 'k',
    'CalibrationInterpretation.temperature': '',
    'TemperatureScaling': 'learn',
    'TemperatureScaling.fit': 'dl=None, allow_train=False',
    'Learner.eps_find': "eps=(0, .02, .05, .1, .2, .3, .5), dist=None, metric='nll_ts', n_epoch=1, show_plot=True",
    'corrupt_labels': "y, rate, kind='symmetric', n_classes=None, seed=None",
    'digits': '', 'mnist5k': '', 'multi_digits': '', 'digit_masks': '',
    'SoftCategoryBlock': 'vocab=None',
    'DawidSkene': 'votes',
    'find_label_issues': 'labels, probs',
    'Learner.find_label_issues': 'k=5',
    'recipe': 'name',
    'Recipe.learner': 'dls',
    'Recipe.fit': 'learn',
}
LOSSES = [n for n in CONTRACT if n.startswith(('LabelSmoothing', 'MultiLabel', 'LogitPenalty')) and n != 'LabelSmoothing']
# of `fastai-smooth compare`, with the defaults where these do not depend on the data
# bs: 64, or less where that makes fewer than eight batches
OPTIONS = {'data': 'digits', 'eps': .1, 'noise': 0., 'epochs': None, 'seeds': 5, 'weights': None, 'bs': None, 'size': None, 'valid_pct': .2, 'out': None,
           'resume': False}


def parameters(f):
    "Of a function, a class, or a method without its first one"
    return {k: p for k, p in inspect.signature(f).parameters.items() if k not in ('self', 'cls')}


@pytest.mark.parametrize('name', CONTRACT)
def test_contract(name):
    first, _, rest = name.partition('.')
    if first != 'Learner': assert first in exported.__all__
    obj = Learner if first == 'Learner' else getattr(exported, first)
    if rest == '__call__': obj, rest = obj, 'forward'
    for part in rest.split('.') if rest else (): obj = getattr(obj, part)
    scope = {}
    exec(f'def promised({CONTRACT[name]}): pass', scope)
    has, wants = parameters(obj), parameters(scope['promised'])
    names = [k for k, p in has.items() if p.kind != p.KEYWORD_ONLY]
    for i, (k, want) in enumerate(wants.items()):
        assert k in has, f'{name} has no {k}'
        if want.kind in (want.POSITIONAL_OR_KEYWORD, want.VAR_POSITIONAL): assert names[i] == k, f'{name}: {k} is not parameter {i}'
        if want.default is not want.empty: assert has[k].default == want.default, f'{name}({k}) has another default'
    for k, p in has.items():
        optional = p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        assert k in wants or optional, f'{name} demands {k}, which was not promised'


@pytest.mark.parametrize('name', LOSSES)
def test_losses_keep_fastais_contract(name):
    loss = getattr(exported, name)
    loss = loss(exported.LabelSmoothingCrossEntropy()) if name == 'LogitPenalty' else loss()
    assert isinstance(loss, nn.Module) and callable(loss.activation) and callable(loss.decodes)
    for reduction in ('none', 'sum', 'mean'):
        loss.reduction = reduction
        assert loss.reduction == reduction


def test_names_in_the_table_and_options_of_the_command():
    names = {'ECE': 'ece', 'AdaptiveECE': 'adaptive_ece', 'ClasswiseECE': 'classwise_ece', 'MCE': 'mce', 'NLL': 'nll', 'Brier': 'brier', 'AURC': 'aurc'}
    for k, name in names.items():
        assert getattr(exported, k)().name == name and isinstance(getattr(exported, k)(), Metric)
    assert exported.AURC('logit_norm').name == 'aurc_logit_norm'
    for name in ('digits', 'pets', 'a1', 'a2', 'a3'): assert isinstance(exported.recipe(name), exported.Recipe)
    commands = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert set(commands) >= {'compare', 'train', 'calibrate', 'list'}
    has = vars(_parser().parse_args(['compare']))
    assert {'methods', 'arch'} <= set(has) and {k: has[k] for k in OPTIONS} == OPTIONS
