"Settings that every test shares"
import os
import warnings

os.environ.setdefault('OMP_NUM_THREADS', '1')  # the tests run side by side, and so do the processes that they start; read when torch is loaded

import matplotlib  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from fastcore.basics import defaults  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

matplotlib.use('Agg')
settings.register_profile('default', deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('default')
torch.set_num_threads(1)
defaults.cpus = 0  # fastai cuts texts in this process: one that is forked from a process with threads may wait for ever; read when fastai.text is loaded


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*torch.jit.script.*')
        yield
