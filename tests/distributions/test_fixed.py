"Uniform, ClassPrior, Similarity, Taxonomy: construction, errors, matrices. The laws of smoothing with them are in targets/test_dense.py"
import copy
import math

import networkx as nx
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import Categorize, MultiCategorize, OneHotEncode
from fastai.learner import Learner
from hypothesis import given
from hypothesis import strategies as st
from learners import Items, make_learner
from torch import nn

from fastai_smooth.data import digits
from fastai_smooth.distributions import ClassPrior, Similarity, Taxonomy, Uniform, training_labels
from fastai_smooth.targets import MixedTarget, smooth_labels, to_dense


def close(a, b, tol=1e-5): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=1e-6, check_dtype=False)


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


def test_prior_from_fastais_own_masks(tmp_path):
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


# -- Taxonomy

def tree_distance(paths, a, b):
    "Height of the lowest common ancestor, by looking at all classes below it"
    if a == b: return 0
    x, y = paths[a].split('/'), paths[b].split('/')
    n = 0
    while n < min(len(x), len(y)) and x[n] == y[n]: n += 1
    return max(len(p.split('/'))-n for p in paths if p.split('/')[:n] == x[:n])


def tree_matrix(paths, beta):
    k = len(paths)
    d = [[tree_distance(paths, a, b) for b in range(k)] for a in range(k)]
    top = max(map(max, d)) or 1
    w = np.exp(-beta*np.array(d, dtype=float)/top)
    return w/w.sum(1, keepdims=True)


TREES = [['a'], ['a', 'b'], ['x/a', 'x/b', 'y/c'], ['x/a', 'x/b', 'x/c/d', 'x/c/e/f'], ['q/x/a', 'q/x/b', 'q/y/c', 'q/z'], ['x', 'x/a', 'x/a/b', 'y'],
         ['a/a/a', 'a/a/b', 'a/b', 'b', 'c/d', 'c/e/f/g']]


@pytest.mark.parametrize('paths', TREES, ids='|'.join)
def test_taxonomy_against_loop(paths):
    for beta in (0., 1., 10.):
        dist, expected = Taxonomy(paths, beta), tree_matrix(paths, beta)
        close(dist.matrix(len(paths)), expected)
        q = torch.rand(3, len(paths), 2, 2)
        close(dist(q), np.einsum('nyhw,yc->nchw', q.numpy(), expected))
        close(dist(q.movedim(1, -1), axis=-1), np.einsum('nyhw,yc->nhwc', q.numpy(), expected))
    for a in range(len(paths)):
        for b in range(len(paths)): assert dist.distance(torch.tensor([a]), torch.tensor([b])).item() == tree_distance(paths, a, b)
    assert repr(eval(repr(dist))) == repr(dist)


@given(st.lists(st.lists(st.sampled_from('abc'), min_size=1, max_size=4).map('/'.join), min_size=1, max_size=12, unique=True), st.floats(0, 30))
def test_any_taxonomy(paths, beta): close(Taxonomy(paths, beta).matrix(len(paths)), tree_matrix(paths, beta), 1e-4)


def test_taxonomy_at_full_strength_is_the_papers_label():
    dist = Taxonomy(TREES[4], 4.)
    close(smooth_labels(torch.tensor([1, 3]), 1., 4, dist=dist), tree_matrix(TREES[4], 4.)[[1, 3]])


def test_taxonomy_from_dicts_and_trees():
    expected = Taxonomy(['animal/cat', 'animal/dog', 'vehicle/car'])
    assert repr(Taxonomy({'car': 'vehicle/car', 'cat': 'animal/cat', 'dog': 'animal/dog'}, vocab=['cat', 'dog', 'car'])) == repr(expected)
    tree = nx.DiGraph([('all', 'animal'), ('all', 'vehicle'), ('animal', 'cat'), ('animal', 'dog'), ('vehicle', 'car')])
    close(Taxonomy.from_tree(tree, ['cat', 'dog', 'car']).matrix(3), expected.matrix(3))
    with pytest.raises(ValueError, match="no node for the class 'cow'"): Taxonomy.from_tree(tree, ['cat', 'cow'])
    tree.add_edge('vehicle', 'cat')
    with pytest.raises(ValueError, match='2 parents'): Taxonomy.from_tree(tree, ['cat'])


@pytest.mark.parametrize('args, error, words', [((['a/b', 'a/b'],), ValueError, "'a/b'"), ((['a', ''],), ValueError, 'needs a path'),
                                                (([],), ValueError, 'at least one'), ((['a'], -1.), ValueError, 'beta'),
                                                (('a/b',), TypeError, 'the string'), ((['a'], math.nan), ValueError, 'beta')])
def test_taxonomy_errors(args, error, words):
    with pytest.raises(error, match=words): Taxonomy(*args)
    with pytest.raises(ValueError, match="class 'dog'"): Taxonomy({'cat': 'a/cat'}, vocab=['cat', 'dog'])
    with pytest.raises(ValueError, match='made for 2 classes, but there are 3'): Taxonomy(['a', 'b'])(torch.rand(2, 3))


def test_mistake_severity_is_a_metric():
    paths = TREES[3]
    set_ = Taxonomy(paths)
    torch.manual_seed(1)
    x, y = torch.randn(30, 5), torch.randint(0, 4, (30,))
    dls = DataLoaders(*(TfmdDL(Items(zip(x, y)), bs=7, num_workers=0, device='cpu') for _ in range(2)))
    learn = Learner(dls, nn.Linear(5, 4), loss_func=nn.CrossEntropyLoss(), metrics=set_.mistake_severity())
    with learn.no_bar(): value = learn.validate()[1]
    guess = learn.model(x).argmax(1)
    expected = [tree_distance(paths, int(a), int(b)) for a, b in zip(y, guess) if a != b]
    assert expected and abs(value-np.mean(expected)) < 1e-6 and learn.metrics[0].name == 'mistake_severity'


# -- all of them

@pytest.mark.parametrize('dist', [Uniform(), ClassPrior([1, 2, 3]), Similarity([[.5, .5, 0.], [.1, .8, .1], [0., 0., 1.]]),
                                  Taxonomy(['x/a', 'x/b', 'y/c'])])
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
