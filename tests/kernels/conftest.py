"What the tests of the kernels share"
import pytest

import fastai_smooth.kernels.paths as paths


@pytest.fixture
def calls(monkeypatch):
    "The paths that were chosen"
    seen, path_of = [], paths.path_of

    def noted(*args):
        seen.append(path_of(*args))
        return seen[-1]
    monkeypatch.setattr(paths, 'path_of', noted)
    return seen
