"The GPU kernels, in a process of their own: on a GPU, or else in Triton's interpreter. And what can be said of them without running them"
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize('cases', ('triton_cases.py', 'triton_binary_cases.py'))
def test_kernels(cases):
    run = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-W', 'ignore::RuntimeWarning', '-p', 'no:cacheprovider', '-p', 'no:xdist', str(HERE/cases)],
                         env=os.environ | ({} if torch.cuda.is_available() else {'TRITON_INTERPRET': '1'}), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def compiled(kernel, arguments, warps):
    """Compile a kernel for an H100 or H200; that takes none. `arguments`: types as Triton writes them, or values that are known when it is compiled.
    The others are integers"""
    triton = pytest.importorskip('triton')
    signature, values, hints = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        given = arguments.get(name, 'i32')
        if not isinstance(given, str): signature[name], values[(i,)] = 'constexpr', given
        else:
            signature[name] = given
            if given.startswith('*'): hints[(i,)] = [['tt.divisibility', 16]]
    source = triton.compiler.ASTSource(kernel, signature, values, hints)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget('cuda', 90, 32), options={'num_warps': warps}).asm['cubin']


POINTERS = dict(z='*bf16', y='*i64', g='*bf16', flags='*i64', **dict.fromkeys(('stats', 'sums', 'out', 'result', 'up'), '*fp32'))
SOFTMAX = POINTERS | dict(eps='fp32', c=None, w=None, es=None, rows=None, zk=1, gk=1, yb=1, BY_CLASS=False, BY_EXAMPLE=False, HAS_IGNORE=True, MEAN=True,
                          ALONE=False, EACH=False, EPS_AT=False, WIDE=False)
KERNELS = {'one tile of rows': dict(M=1, P=4, C=1024, SINGLE=True, AXIS=1, stats=None, c='*fp32', w='*fp32', BY_CLASS=True),
           'long rows': dict(M=1, P=1, C=8192, SINGLE=False, AXIS=1, w='*fp32', BY_EXAMPLE=True, EPS_AT=True, eps='*fp32'),
           'one tile of pixels': dict(M=2, P=128, C=32, SINGLE=True, AXIS=0, zk='i32', gk='i32', zb=1, gb=1, stats=None, c='*fp32'),
           'pixels of many classes': dict(M=0, P=512, C=16, SINGLE=False, AXIS=0, zk='i32', gk='i32', zb=1, gb=1, y='*fp32', WIDE=True),
           'entries': dict(w=None, pw='*fp32', off='fp32', on='*fp32', given=None, rows=None, INDEX=True, MEAN=True, ALONE=False, EACH=False, OFF_AT=False,
                           ON_AT=True, DIMS=2, FLAT=True, WIDE=False, SIZE=4096)}


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get('TRITON_INTERPRET') == '1', reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize('name', KERNELS)
def test_kernels_compile(name, tmp_path, monkeypatch):
    "The interpreter takes what the compiler refuses: a value that changes its type in a loop, say"
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    from fastai_smooth.kernels import triton_binary, triton_softmax
    if name == 'entries': kernels, known = (triton_binary.binary_forward, triton_binary.binary_backward), POINTERS
    else: kernels, known = (triton_softmax.softmax_forward, triton_softmax.softmax_backward), SOFTMAX
    for kernel in kernels: assert compiled(kernel, known | KERNELS[name], 4)
