"The GPU kernels: in Triton's interpreter where there is no GPU, and what can be said of them without running them"
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

if torch.cuda.is_available(): from kernels.triton_cases import *  # noqa: F403
else:
    @pytest.mark.processes
    @pytest.mark.slow
    def test_kernels_in_the_interpreter():
        run = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', str(HERE/'triton_cases.py')],
                             env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.processes
def test_no_kernel_is_defined_before_one_is_needed():
    code = "import sys, fastai_smooth.all, fastai_smooth.kernels.gpu; assert not [m for m in sys.modules if m.startswith('fastai_smooth.kernels.triton')]"
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
