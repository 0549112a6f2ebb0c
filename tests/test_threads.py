"How many threads a training uses: by the clock, unless somebody has said; noted, and kept when it is resumed"
import pytest
import torch

from fastai_smooth import threads
from fastai_smooth.compare import Comparison
from fastai_smooth.random_state import random_state
from fastai_smooth.run_folder import read_config
from fastai_smooth.threads import choose_threads, limited, seconds
from fastai_smooth.train import recipe


@pytest.fixture
def clock(monkeypatch):
    "Four threads, of which as many as it says are fastest: a stand-in"
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    def says(faster): monkeypatch.setattr(threads, 'seconds', lambda model, xb, n: abs(n-faster))
    return says


@pytest.mark.parametrize('faster', [1, 4])
def test_chosen_by_time_and_draws_nothing(faster, clock, monkeypatch):
    "What a training draws afterwards is as if nothing had been timed"
    learn = recipe('digits').learner()
    before = [p.clone() for p in learn.model.state_dict().values()]
    drawn = random_state(learn.dls.loaders)
    clock(faster)
    assert choose_threads(learn) == faster and choose_threads(learn, 1) == 1
    after = random_state(learn.dls.loaders)
    assert torch.equal(drawn['torch'], after['torch']) and drawn['python'] == after['python'] and drawn['loaders'] == after['loaders']
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.state_dict().values()))
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    assert choose_threads(learn) == 4, "somebody has said how many"


def test_a_step_is_timed_and_the_number_put_back():
    n, used = torch.get_num_threads(), []
    class Model(torch.nn.Linear):
        def forward(self, x):
            used.append(torch.get_num_threads())
            return super().forward(x)
    assert seconds(Model(3, 2), (torch.randn(4, 3),), n+1) > 0 and used == [n+1]*3 and torch.get_num_threads() == n
    with pytest.raises(KeyboardInterrupt), limited(n+2): raise KeyboardInterrupt
    assert torch.get_num_threads() == n


def test_a_comparison_chooses_notes_and_keeps_them(clock, monkeypatch, tmp_path):
    make = lambda resume=False, **kwargs: Comparison('iris', ('ce',), seeds=1, epochs=1, out=tmp_path/'run', resume=resume, **kwargs)
    clock(1)
    first = make()
    assert first.threads == 1 and '1 thread' in first.describe()
    used = []
    monkeypatch.setattr(torch, 'set_num_threads', used.append)
    first.run(progress=False)
    assert read_config(tmp_path/'run')['threads'] == 1 and used == [1, 4], "put back"
    clock(4)
    assert Comparison('iris', ('ce',)).threads == 4
    assert make(True).threads == 1, "the sums of the runs that are there were made so"
    monkeypatch.setenv('OMP_NUM_THREADS', '4')
    with pytest.raises(ValueError, match=r'threads=1 \(here 4\)'): make(True)
    assert Comparison('iris', ('ce',), jobs=2).threads == 4
