"Model cards of runs, and what goes to the hub"
import builtins
import json

import pytest
from fastai.learner import load_learner
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from photos import QUICK, write_digits

from fastai_smooth.train import export_safe, load_safe, model_card, push_to_hub, train

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished training of images from files"
    root = tmp_path_factory.mktemp('card')
    write_digits(root/'my photos', 60)
    train('finetune', root/'my photos', root/'run', **{**QUICK, 'arch': 'test_resnet'})
    return root/'run'


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    "A finished training of a table"
    out = tmp_path_factory.mktemp('rows')/'run'
    train('tabular', out=out, epochs=1, table='iris', layers=(10,))
    return out


class Hub:
    "Keeps what it is given, as huggingface_hub's HfApi would be asked"
    def __init__(self): self.repos, self.commits = [], []
    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.repos.append((repo_id, private, exist_ok))
        return f'https://huggingface.co/{repo_id}'
    def create_commit(self, repo_id, operations, commit_message): self.commits.append((repo_id, {o.path_in_repo: o.path_or_fileobj for o in operations}))


def test_the_card_has_the_figures_of_the_run(run, rows):
    for folder, kind, data in ((run, 'image-classification', 'my photos'), (rows, 'tabular-classification', 'iris')):
        s = json.loads((folder/'summary.json').read_text())
        text = (folder/'README.md').read_text()
        card = ModelCard(text)  # reads the head as the hub does
        head = card.data.to_dict()
        assert head['pipeline_tag'] == kind and head['library_name'] == 'fastai_smooth' and 'fastai' in head['tags']
        found = {r.metric_name: (r.metric_value, r.dataset_name, r.task_type) for r in card.data.eval_results}
        for when, words in (('as_trained', 'as trained'), ('after_temperature', 'after temperature')):
            for k, name in (('accuracy', 'accuracy'), ('nll', 'NLL'), ('ece', 'ECE')):
                assert found[f'{name} {words}'] == (round(s[when][k], 4), data, kind)
                low, high = s['intervals'][when][k]
                assert f'{s[when][k]:.3f} ({low:.3f} to {high:.3f})' in text and low <= s[when][k] <= high
        assert all(f'{k} {v}' in text for k, v in s['versions'].items()) and all(f'| {k} | ' in text for k in s['settings'])
        assert str(folder.parent) not in text, "no path of this machine"
        assert f"{s['n_valid']} validation examples" in text and '## Limitations' in text
    assert 'load_safe' in (run/'README.md').read_text() and 'load_learner' in (rows/'README.md').read_text()
    assert 'chosen' in text and "Street et al. 1993" not in text.split('| table |')[1].splitlines()[0]


def test_a_folder_without_a_training_has_no_card(tmp_path):
    with pytest.raises(ValueError, match='holds no finished training'): model_card(tmp_path)
    (tmp_path/'summary.json').write_text('{"verdict": "of compare"}')
    with pytest.raises(ValueError, match='holds no finished training'): model_card(tmp_path)


def test_the_safe_folder_and_the_card_go_up_and_no_pickle(run):
    hub = Hub()
    assert push_to_hub(run, 'me/digits', api=hub) == 'https://huggingface.co/me/digits'
    (repo, files), = hub.commits
    assert hub.repos == [('me/digits', True, True)] and repo == 'me/digits'
    assert sorted(files) == ['README.md', 'config.json', 'model.safetensors', 'reliability.png']
    assert b"snapshot_download('me/digits')" in files['README.md'] and 'USER/NAME' in (run/'README.md').read_text()
    push_to_hub(run, 'me/digits', private=False, pickles=True, api=hub)
    assert hub.repos[1][1] is False and 'learner.pkl' in hub.commits[1][1]


def test_what_is_not_safe_stays_here(run, rows, tmp_path, monkeypatch):
    hub = Hub()
    with pytest.raises(ValueError, match='only a pickle, which runs code'): push_to_hub(rows, 'me/iris', api=hub)
    with pytest.raises(HFValidationError): push_to_hub(run, 'no such/name/at all', api=hub)
    weights = (run/'safe'/'model.safetensors').read_bytes()
    (run/'safe'/'model.safetensors').write_bytes(weights[:-100])
    with pytest.raises(ValueError, match='Cannot read weights'): push_to_hub(run, 'me/digits', api=hub)
    (run/'safe'/'model.safetensors').write_bytes(weights)
    assert not hub.repos and not hub.commits
    push_to_hub(rows, 'me/iris', pickles=True, api=hub)
    assert sorted(hub.commits[0][1]) == ['README.md', 'learner.pkl', 'reliability.png']
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name == 'huggingface_hub': raise ImportError(name)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match=r"pip install 'fastai_smooth\[hub\]'"): push_to_hub(run, 'me/digits')


def test_the_folder_beside_the_learner_predicts_the_same_bits(run, tmp_path):
    "Also when the pickle is loaded and exported again"
    photos = sorted((run.parent/'my photos').rglob('*.png'))[:5]
    safe, pickled = load_safe(run/'safe'), load_learner(run/'learner.pkl')
    assert safe.temperature == pickled.temperature
    export_safe(pickled, tmp_path/'again')
    with safe.no_bar(), pickled.no_bar(), load_safe(tmp_path/'again').no_bar() as again:
        one, other, third = (learn.get_preds(dl=learn.dls.test_dl(photos))[0] for learn in (safe, pickled, again))
    assert (one == other).all() and (one == third).all()
