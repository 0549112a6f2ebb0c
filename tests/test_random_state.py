"All generators are put back: torch, NumPy, Python, and those of data loaders, also of loaders that wrap others"
import random
from types import SimpleNamespace

import numpy as np
import torch
from fastai.data.core import TfmdDL

from fastai_smooth.random_state import random_state, set_random_state


def test_everything_is_put_back(tmp_path):
    generator = torch.Generator().manual_seed(3)
    inner = TfmdDL(list(range(50)), bs=50, shuffle=True)
    loaders = [SimpleNamespace(dl=inner, generator=generator)]  # as a distributed loader wraps another one
    def draw():
        own = torch.rand(3, generator=generator).tolist()
        return torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist(), inner.one_batch().tolist(), own  # noqa: NPY002
    torch.save(random_state(loaders), tmp_path/'state.pt')
    first = draw()
    torch.manual_seed(5), random.seed(5), np.random.seed(5), generator.manual_seed(5), inner.rng.seed(5)  # noqa: NPY002
    assert not any(a == b for a, b in zip(first, draw()))
    set_random_state(torch.load(tmp_path/'state.pt', weights_only=True), loaders)
    assert draw() == first
