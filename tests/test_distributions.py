"distributions: construction, errors, state; the laws are in test_targets"
import copy

import numpy as np
import pytest
import torch
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize, MultiCategorize, OneHotEncode
from learners import make_learner

from fastai_smooth.data import digits
from fastai_smooth.distributions import ClassPrior, Distribution, Similarity, Uniform, training_labels
from fastai_smooth.targets import MixedTarget, to_dense


def close(a, b): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-5, atol=1e-6, check_dtype=False)


# -- ClassPrior

@pytest.mark.parametrize('counts', [[3, 0, 1], (3., 0., 1.), np.array([3, 0, 1]), torch.tensor([3, 0, 1]), torch.tensor([3., 0., 1.], requires_grad=True)])
def test_prior_takes_any_counts(counts):
    dist = ClassPrior(counts)
    close(dist(torch.eye(3)), [[.75, 0., .25]]*3)
    assert not dist.share.requires_grad and repr(dist) == 'ClassPrior([3.0, 0.0, 1.0])'


@pytest.mark.parametrize('counts, error, words', [([0, 0], ValueError, 'all 0'), ([1, -2], ValueError, 'class 1 has -2'), ([], ValueError, 'per class'),
                                                  ([[1, 2]], ValueError, r'\(1, 2\)'), ([1, float('nan')], ValueError, 'finite'), ('ab', TypeError, 'numbers')])
def test_prior_errors(counts, error, words):
    with pytest.raises(error, match=words): ClassPrior(counts)


def test_prior_from_single_labels():
    dls = digits()
    expected = np.bincount([int(dls.train_ds[i][1]) for i in range(len(dls.train_ds))], minlength=10)
    assert ClassPrior.from_dls(dls).counts == expected.tolist()


def test_prior_from_several_labels():
    labels = [['a', 'b'], ['b'], [], ['c', 'b']]
    dsets = Datasets(range(4), [[lambda i: torch.zeros(1)], [lambda i: labels[i], MultiCategorize(vocab=['a', 'b', 'c']), OneHotEncode(3)]],
                     splits=[[0, 1, 2], [3]])
    assert ClassPrior.from_dls(dsets.dataloaders(bs=2)).counts == [1., 2., 0.]


def test_prior_does_not_open_the_inputs():
    armed = []  # fastai opens one item when the data set is made

    def explode(i):
        assert not armed, 'opened'
        return i
    dsets = Datasets(range(4), [[explode], [lambda i: 'ab'[i % 2], Categorize(vocab=['a', 'b'])]], splits=[[0, 1, 2], [3]])


    armed.append(True)

    class Loaders: train_ds, n_inp, c = dsets.train, 1, 2
    assert [int(y) for y in training_labels(Loaders)] == [0, 1, 0] and ClassPrior.from_dls(Loaders).counts == [2., 1.]


def test_prior_from_masks_leaves_void_pixels_out():
    learn = make_learner('mask')
    y = torch.stack([y for _, y in learn.dls.train.dataset])
    assert ClassPrior.from_dls(learn.dls).counts == y[y >= 0].bincount(minlength=4).tolist()


def test_prior_needs_the_number_of_classes():
    learn = make_learner('index', c=None)
    with pytest.raises(ValueError, match='pass n_classes'): ClassPrior.from_dls(learn.dls)
    assert sum(ClassPrior.from_dls(learn.dls, n_classes=4).counts) == 24


# -- Similarity

@pytest.mark.parametrize('kind', ['list', 'array', 'tensor', 'graph'])
def test_similarity_leaves_its_matrix_alone(kind):
    m = torch.tensor([[.5, .5], [.2, .8]])
    given = {'list': m.tolist(), 'array': m.numpy().copy(), 'tensor': m.clone(), 'graph': m.clone().requires_grad_()*1}[kind]
    before = copy.deepcopy(given) if kind != 'graph' else given.detach().clone()
    dist = Similarity(given)
    dist.transition.zero_()
    close(torch.as_tensor(given).detach(), torch.as_tensor(before))
    assert not dist.transition.requires_grad


@pytest.mark.parametrize('matrix, error, words', [
    (torch.ones(2, 3)/3, ValueError, r'square .*\(2, 3\)'), ([[1., 0.], [.5, .4]], ValueError, 'row 1 sums to 0.9'),
    ([[1.5, -.5], [0., 1.]], ValueError, 'row 0 has -0.5 in column 1'), ([[float('nan'), 0.], [0., 1.]], ValueError, 'finite'), ('x', TypeError, 'numbers')])
def test_similarity_errors(matrix, error, words):
    with pytest.raises(error, match=words): Similarity(matrix)


def test_from_confusion_against_loop():
    counts = torch.tensor([[50, 2, 3], [0, 9, 0], [4, 0, 1]])
    m = Similarity.from_confusion(counts).matrix(3)
    for a in range(3):
        others = sum(counts[a, k].item() for k in range(3) if k != a)
        for b in range(3):
            expected = 0. if a == b else counts[a, b].item()/others if others else 1/2
            assert abs(m[a, b].item()-expected) < 1e-6
    with pytest.raises(ValueError, match='row 1 has -1'): Similarity.from_confusion([[1, 0], [-1, 2]])
    with pytest.raises(ValueError, match='at least 2'): Similarity.from_confusion([[1]])


def test_from_embeddings_against_loop():
    v = np.random.default_rng(0).normal(size=(4, 6))
    m = Similarity.from_embeddings(v, temperature=.5).matrix(4).double().numpy()
    cos = np.array([[v[a]@v[b]/np.sqrt(v[a]@v[a])/np.sqrt(v[b]@v[b]) for b in range(4)] for a in range(4)])
    for a in range(4):
        e = {b: np.exp(cos[a, b]/.5) for b in range(4) if b != a}
        for b in range(4): assert abs(m[a, b]-(e[b]/sum(e.values()) if b != a else 0)) < 1e-6
    with pytest.raises(ValueError, match='temperature'): Similarity.from_embeddings(v, temperature=0.)
    with pytest.raises(ValueError, match='Row 1'): Similarity.from_embeddings([[1., 0.], [0., 0.]])


# -- all of them

@pytest.mark.parametrize('dist', [Uniform(), ClassPrior([1, 2, 3]), Similarity([[.5, .5, 0.], [.1, .8, .1], [0., 0., 1.]])])
def test_common_behaviour(dist):
    y = torch.tensor([0, 2, -100])
    q = to_dense(y, 3)
    mixed = MixedTarget(y[:, None], torch.ones(3, 1), 3)
    close(dist(mixed), dist(q))
    for dtype in (torch.float64, torch.float16): assert dist(q.to(dtype)).dtype is dtype
    close(dist(q.T, axis=0), dist(q).T)
    assert repr(eval(repr(dist))) == repr(dist) and dist.plot(['a', 'b', 'c']).get_title() == type(dist).__name__
    with pytest.raises(ValueError, match='to_dense'): dist(y)
    if dist.n_classes:
        with pytest.raises(ValueError, match='made for 3 classes, but there are 4'): dist(torch.ones(2, 4))
        with pytest.raises(ValueError, match='made for 3 classes, but there are 4'): dist.matrix(4)


def test_base_says_what_is_missing():
    with pytest.raises(TypeError, match='define forward'): Distribution()(torch.ones(1, 2))
    with pytest.raises(ValueError, match='no transition matrix'): Distribution().matrix(2)


def test_prior_from_fastais_own_masks(tmp_path):
    import numpy as np
    from fastai.vision.all import SegmentationDataLoaders
    from PIL import Image
    masks = np.random.default_rng(0).integers(0, 3, (4, 8, 8)).astype(np.uint8)
    files = []
    for i, m in enumerate(masks):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path/f'{i}.png'), Image.fromarray(m).save(tmp_path/f'{i}_mask.png')
        files.append(tmp_path/f'{i}.png')
    dls = SegmentationDataLoaders.from_label_func(tmp_path, files, lambda f: f.with_name(f'{f.stem}_mask.png'), codes=list('abc'), bs=2, valid_pct=.25,
                                                  seed=0, num_workers=0)
    mine = [masks[int(f.stem)] for f in dls.train_ds.items]
    assert ClassPrior.from_dls(dls).counts == np.bincount(np.concatenate([m.ravel() for m in mine]), minlength=3).tolist()


def test_prior_from_tables():
    import pandas as pd
    from fastai.tabular.all import CategoryBlock, FillMissing, Normalize, TabularDataLoaders
    df = pd.DataFrame({'a': np.arange(10.), 'y': list('xxyxxyxxyz')})
    dls = TabularDataLoaders.from_df(df, cont_names=['a'], y_names='y', y_block=CategoryBlock(), procs=[FillMissing, Normalize], valid_idx=[0, 9], bs=4)
    assert ClassPrior.from_dls(dls).counts == [5., 3., 0.][:dls.c]


def test_prior_from_integer_multi_hot():
    learn = make_learner('multi_hot_int')
    assert ClassPrior.from_dls(learn.dls).counts == torch.stack([y for _, y in learn.dls.train.dataset]).sum(0).tolist()
