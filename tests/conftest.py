"Settings that every test shares"
import warnings

import matplotlib
import pytest
import torch
from hypothesis import HealthCheck, settings

matplotlib.use('Agg')
settings.register_profile('default', deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('default')
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*torch.jit.script.*')
        yield
