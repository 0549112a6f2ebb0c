"""Runs notebooks, each in a process of its own that is forked from one that has loaded the packages

    python tests/notebooks.py ROOT PACKAGE...

reads the paths of a notebook and of a file for what it prints from each line of the standard input, and answers with the exit code."""
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from functools import cache

os.environ.setdefault('OMP_NUM_THREADS', '1')  # two threads get in each other's way as soon as anything else runs
os.environ.setdefault('MPLBACKEND', 'agg')

TORCH = 'torch', 'matplotlib.pyplot', 'nbdev.test'  # without Triton: notebooks of kernels ask for its interpreter first
FASTAI = *TORCH, 'fastai.vision.all', 'fastai.text.all', 'fastai.tabular.all', 'fastai_smooth.all'


def run(path, log, root):
    "Execute all cells but the slow ones; what is printed goes to the file `log`; is there no error?"
    from nbdev.test import test_nb
    if 'fork' in multiprocessing.get_all_start_methods(): multiprocessing.set_start_method('fork', force=True)  # for the workers of data loaders
    with open(log, 'w', encoding='utf-8') as f:
        for stream in (1, 2): os.dup2(f.fileno(), stream)
    return test_nb(path, basepath=root, skip_flags=['slow'])[0]


@cache
def server(root, packages):
    "A process that waits for notebooks"
    return subprocess.Popen([sys.executable, __file__, root, *packages], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def fails(path, log, root, packages):
    "Run a notebook; its exit code"
    if not hasattr(os, 'fork'): return subprocess.run([sys.executable, __file__, root], input=json.dumps([path, log]), text=True).returncode
    s = server(root, packages)
    print(json.dumps([path, log]), file=s.stdin, flush=True)
    return int(s.stdout.readline())


if __name__ == '__main__':
    root, *packages = sys.argv[1:]
    with warnings.catch_warnings():  # only those of the imports: a notebook may ask for its own
        warnings.simplefilter('ignore')
        for package in packages: importlib.import_module(package)
    for line in sys.stdin:
        if not packages: sys.exit(not run(*json.loads(line), root))
        pid = os.fork()
        if not pid:
            code = 1  # also for what is no Exception
            try: code = int(not run(*json.loads(line), root))
            finally: os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
