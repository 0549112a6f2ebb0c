"Methods by name, their strengths and noise rates, and the callbacks that they are"
import numpy as np
import pytest

from fastai_smooth.callback import LabelSmoothing, OneOf
from fastai_smooth.compare import Method, each_method, method_callbacks, parse_method, read_method
from fastai_smooth.data import digits


def test_names_are_read_once():
    m = parse_method('mixup+ls@.3~.2')
    assert m == Method('mixup+ls@.3~.2', ('mixup', 'ls'), .3, .2, True, True)
    assert (m.plain, m.smoothing, m.mixers, m.is_baseline) == ('mixup+ls', 'ls', ('mixup',), False) and parse_method('ce').is_baseline
    assert parse_method('ls+mixup', .3, .2).key == m.key and parse_method('ce', .1).key == parse_method('ce', .2).key
    best = parse_method('ce@best~.2')
    assert (best.plain, best.best, best.noise, best.is_baseline, best.key == parse_method('ce~.2').key) == ('ce@best', True, .2, False, False)
    with pytest.raises(ValueError, match='of masks'): read_method('ce@best', kind='masks')
    for bad, words in (('ls@best', 'not a number'), ('', 'Unknown method'), ('ce+ls', 'Unknown'), ('ls+ls', 'Unknown'), ('magic', 'Unknown'),
                       ('ls+ols', 'Unknown'), ('ls@', 'ls@'), ('ls@x', 'not a number'), ('ls@2', "in 'ls@2'"), ('ls~1', 'noise must lie')):
        with pytest.raises(ValueError, match=words): parse_method(bad)
    with pytest.raises(ValueError, match='exclusive classes'): read_method('mixup+prior', several=True)
    with pytest.raises(ValueError, match='noise puts'): read_method('ls', noise=.1, kind='masks')


@pytest.mark.parametrize('names, eps, noise, expected', [
    (('ce', 'ls', 'mixup', 'mixup+ls', 'ols@.5'), [.1, .3], [0.], ['ce', 'ls@0.1', 'ls@0.3', 'mixup', 'mixup+ls@0.1', 'mixup+ls@0.3', 'ols@.5']),
    (('ce', 'ce@best'), [.1, .3], [0., .2], ['ce~0', 'ce@best~0', 'ce~0.2', 'ce@best~0.2']), (('ce', 'ls'), [.1], [0.], ['ce', 'ls']),
    (('ce', 'ls', 'ls~.1'), [.1], [0., .2], ['ce~0', 'ls~0', 'ce~0.2', 'ls~0.2', 'ls~.1'])])
def test_several_strengths_and_rates(names, eps, noise, expected):
    methods = each_method(names, eps, noise)
    assert [m.name for m in methods] == expected
    for m in methods: assert parse_method(m.name, eps[0], noise[0]).key == m.key, "a name says all that the method is"


def test_callbacks():
    assert method_callbacks('ce') == []
    ls, = method_callbacks('ls', .3)
    assert isinstance(ls, LabelSmoothing) and ls.eps == .3
    zero, mixup = method_callbacks('mixup', .3)
    assert zero.eps == 0 and type(mixup).__name__ == 'MixUp'
    assert isinstance(method_callbacks('ls+cutmix+mixup')[1], OneOf) and method_callbacks('mixup+ls@.2')[0].eps == .2


def test_distributions_are_made_from_the_training_set():
    dls = digits(valid_pct=.5)
    made = {name: method_callbacks(name, .2, dls)[0].dist for name in ('ls', 'prior', 'similarity', 'ols', 'zipf')}
    assert made['ls'] is None and [type(made[n]).__name__ for n in made][1:] == ['ClassPrior', 'Similarity', 'Online', 'Zipf']
    items = [dls.train_ds[i] for i in range(len(dls.train_ds))]
    x, y = np.stack([np.asarray(x).ravel()/255 for x, _ in items]), np.array([int(y) for _, y in items])
    assert made['prior'].counts == np.bincount(y, minlength=10).tolist() and made['ols'].n_classes == 10
    means = np.stack([x[y == k].mean(0) for k in range(10)])
    means -= means.mean(0)
    unit = means/np.linalg.norm(means, axis=1, keepdims=True)
    np.fill_diagonal(logits := unit@unit.T/.3, -np.inf)
    np.testing.assert_allclose(made['similarity'].matrix(10).numpy(), np.exp(logits)/np.exp(logits).sum(1, keepdims=True), atol=2e-3)
    with pytest.raises(ValueError, match='needs classes that are paths'): method_callbacks('taxonomy', .2, dls)
    dls.vocab[:] = [f'{"round" if v in "0689" else "straight"}/{v}' for v in map(str, dls.vocab)]
    assert method_callbacks('mixup+taxonomy', .2, dls)[0].dist.n_classes == 10
