"Networks by kind of data, and weights from files"
import pickle
from urllib.error import URLError

import pytest
import timm
import torch
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fastai_smooth.data import body_of, build_model, load_weights, network_for, small_convnet, text_network


def test_weights_from_files(tmp_path):
    (tmp_path/'bad.pth').write_bytes(b'nothing')
    source, model = small_convnet(1, 10), small_convnet(1, 10)
    torch.save({'model': source.state_dict()}, tmp_path/'nested.pth')
    torch.save({f'x.{i}': v for i, v in enumerate(source.state_dict().values())}, tmp_path/'renamed.pth')
    for name in ('nested', 'renamed'):
        model = small_convnet(1, 10)
        assert load_weights(model, tmp_path/f'{name}.pth') == len(model.state_dict())
        for a, b in zip(model.state_dict().values(), source.state_dict().values()): assert torch.equal(a, b)
    other_head = small_convnet(1, 3)
    assert load_weights(other_head, tmp_path/'nested.pth') == len(source.state_dict())-2
    torch.save([1, 2], tmp_path/'list.pth')

    class Evil:
        def __reduce__(self): return print, ('code ran',)
    with open(tmp_path/'evil.pth', 'wb') as f: pickle.dump(Evil(), f)
    for name in ('bad', 'list', 'evil', 'none'):
        with pytest.raises(ValueError, match=f'{name}.pth'): load_weights(small_convnet(1, 10), tmp_path/f'{name}.pth')
    with pytest.raises(ValueError, match='does not hold weights'): load_weights(nn.Linear(2, 2), tmp_path/'nested.pth')


@pytest.mark.parametrize('kind, arch, n, shape, out', [
    ('images', 'convnet', 3, (2, 3, 16, 16), (2, 4)), ('images', 'resnet10t', 1, (2, 1, 32, 32), (2, 4)),
    ('masks', 'segmenter', 1, (2, 1, 8, 12), (2, 4, 8, 12)), ('masks', 'resnet18', 3, (2, 3, 64, 64), (2, 4, 64, 64)),
    ('texts', 'small_awd_lstm', 50, (2, 9), (2, 4)), ('table', 'layers', 5, (2, 5), (2, 4))])
def test_every_kind_has_its_networks(kind, arch, n, shape, out):
    model = network_for(kind, arch, n, 4, size=shape[2:]).eval()
    x = (torch.randint(2, 50, shape),) if kind == 'texts' else (torch.zeros(2, 0).long(), torch.rand(shape)) if kind == 'table' else (torch.rand(shape),)
    with torch.no_grad(): assert model(*x).shape == out


@pytest.mark.parametrize('args, words', [
    (('texts', 'resnet18', 9, 2), "not for texts: use 'small_awd_lstm'"), (('table', 'convnet', 9, 2), "not for table: use 'layers'"),
    (('images', 'segmenter', 9, 2), "not for images: use 'convnet'"), (('images', 'resnet_18', 3, 2), 'such as resnet18'),
    (('masks', 'resnet_18', 3, 2), "for masks use 'segmenter' or a torchvision model, such as resnet18"),
    (('images', 'convnet', 3, 2, None, True), 'no pretrained weights'), (('texts', 'awd_lstm', 3, 2, None, True), 'no pretrained weights')])
def test_networks_that_do_not_fit(args, words):
    with pytest.raises(ValueError, match=words): network_for(*args)


def test_bodies_for_fastai():
    assert body_of('resnet10t') == 'resnet10t' and callable(body_of('mobilenet_v3_small'))
    with pytest.raises(ValueError, match='such as'): body_of('resnet_18')


def test_padding_changes_nothing_and_words_are_learned():
    torch.manual_seed(0)
    model = text_network(20, 2)
    x = torch.randint(2, 20, (64, 6))
    y = (x == 7).any(1).long()
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        opt.zero_grad()
        CrossEntropyLossFlat()(model(x), y).backward()
        opt.step()
    model.eval()
    with torch.no_grad():
        assert (model(x).argmax(1) == y).float().mean() > .95
        torch.testing.assert_close(model(torch.cat([x, torch.ones(64, 9).long()], 1)), model(x))


def test_without_a_network_there_is_one_line(monkeypatch):
    def fails(*args, **kwargs): raise URLError('no route')
    monkeypatch.setattr(timm, 'create_model', fails)
    with pytest.raises(ValueError, match='resnet18 could not be downloaded.*weights=FILE'): build_model('resnet18', 3, 10, pretrained=True)
