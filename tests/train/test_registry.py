"A recipe: settings that are checked at once, functions that are imported late"
from types import SimpleNamespace

import pytest

from fastai_smooth.train import recipe, recipes, register
from fastai_smooth.train.registry import Recipe, checked

SETTINGS = dict(eps=.1, epochs=4, lr=1e-3, valid_pct=.2, calibrate=True, arch='resnet34', weights=None, layers=(200, 100))


@pytest.mark.parametrize('changes, words', [
    (dict(lrate=1), "'mine' has no setting 'lrate': it has eps, epochs"), (dict(epochs='two'), "epochs must be a number, but got 'two'"),
    (dict(epochs=True), 'epochs must be a number'), (dict(epochs=1.5), 'epochs must be a whole number, but got 1.5'),
    (dict(epochs=0), 'epochs must be above 0'),
    (dict(lr=-1.), 'lr must be above 0, but got -1.0'), (dict(calibrate=1), 'calibrate must be True or False, but got 1'),
    (dict(layers=300), r'layers must be several numbers such as \(200, 100\)'), (dict(valid_pct=1.), 'valid_pct must lie between 0 and 1, but got 1.0'),
    (dict(eps='much'), 'eps must be a number')])
def test_a_wrong_setting_is_named(changes, words):
    with pytest.raises(ValueError, match=words): checked(SETTINGS, changes, 'mine')


def test_what_may_be_set():
    changes = dict(eps=[.1, .2], epochs=2., lr=1, arch='convnext', weights='file.pth', layers=[50])
    assert checked(SETTINGS, changes) == {**SETTINGS, **changes} and SETTINGS['epochs'] == 4


@pytest.fixture
def mine():
    yield 'mine'
    recipes.pop('mine', None)


def test_a_recipe_of_ones_own(mine):
    log = []
    register(mine, 'an example', dict(epochs=(3, 'a paper'), calibrate=(False, 'our choice')), lambda path, s: (path, s['epochs']),
             lambda dls, s: SimpleNamespace(dls=dls), lambda learn, s: log.append((learn.dls, s['epochs'])))
    r = recipe(mine)
    learn = r.learner(epochs=5)
    assert r.dls('here', epochs=7) == ('here', 7) and learn.dls == (None, 5) and learn.recipe_settings == dict(epochs=5, calibrate=False)
    assert r.fit(learn) is learn and log == [((None, 5), 5)]
    assert r.sources == dict(epochs='a paper', calibrate='our choice') and 'epochs' in repr(r) and 'a paper' in repr(r)
    with pytest.raises(ValueError, match='no setting'): r.learner(lrate=1)
    with pytest.raises(ValueError, match='no setting'): r.dls(lrate=1)
    with pytest.raises(ValueError, match='There is no recipe .resnet.: there are pets'): recipe('resnet')


def test_functions_by_name_are_imported_when_they_are_called(mine):
    register(mine, 'an example', dict(calibrate=(False, '')), 'no_such_module:f', 'builtins:max', 'builtins:min')
    r = recipe(mine)
    assert isinstance(r, Recipe) and r.make_learner(2, 3) == 3
    with pytest.raises(ModuleNotFoundError, match='no_such_module'): r.dls()
