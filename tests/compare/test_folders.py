"Comparisons on folders of images"
import json

import pytest
import torch
from users_files import write_digits

from fastai_smooth.cli import main
from fastai_smooth.compare import Comparison


@pytest.mark.slow
def test_compare_with_nested_folders_as_tree(tmp_path, capsys):
    write_digits(tmp_path/'photos', 250)
    out = tmp_path/'run'
    args = ['compare', str(tmp_path/'photos'), '--size', '16', '--methods', 'ce,taxonomy,mixup+similarity', '--epochs', '1', '--seeds', '1', '--out', str(out)]
    assert main(args) == 0
    s = json.loads((out/'summary.json').read_text())
    assert s['n_classes'] == 10 and s['n_train'] == 200 and set(s['methods']) == {'ce', 'taxonomy', 'mixup+similarity'}
    learn = Comparison(tmp_path/'photos', ('taxonomy',), size=16).learner('taxonomy', 0)
    m = learn.label_smoothing.dist.matrix(10)
    near, far = list(learn.dls.vocab).index('round/3'), list(learn.dls.vocab).index('straight/1')
    assert m[0, near] > m[0, far] and learn.dls.vocab[0] == 'round/0'
    assert learn.dls.one_batch()[0].shape[1:] == (3, 16, 16)
    assert main([*args, '--resume']) == 0, "nothing has changed"
    next((tmp_path/'photos'/'round'/'0').iterdir()).unlink()
    capsys.readouterr()
    assert main([*args, '--resume']) == 2 and 'fingerprint' in capsys.readouterr().err


def test_flat_folders_are_no_tree(tmp_path, capsys):
    photos = tmp_path/'photos'
    write_digits(photos, 200, nested=False)
    assert main(['compare', str(photos), '--size', '16', '--methods', 'ce,taxonomy', '--out', str(tmp_path/'run')]) == 2
    assert 'nested folders' in capsys.readouterr().err
    for i in range(1, 10): (photos/str(i)).rename(tmp_path/f'{i}')
    assert main(['compare', str(photos), '--out', str(tmp_path/'run')]) == 2
    assert 'one class' in capsys.readouterr().err


def test_timm_body_on_colour(tmp_path):
    write_digits(tmp_path, 200)
    learn = Comparison(tmp_path, ('ls',), arch='resnet10t', size=32, epochs=1).learner('ls', 0)
    with torch.no_grad(): assert learn.model.eval()(learn.dls.one_batch()[0]).shape == (20, 10)
