"Runs one notebook in a process of its own"
import multiprocessing
import os
import warnings

os.environ.setdefault('OMP_NUM_THREADS', '1')  # two threads get in each other's way as soon as anything else runs
os.environ.setdefault('MPLBACKEND', 'agg')

with warnings.catch_warnings():  # only those of the import: a notebook may ask for its own
    warnings.simplefilter('ignore')
    from nbdev.test import test_nb

FASTAI = 'fastai.vision.all', 'fastai.text.all', 'fastai.tabular.all', 'fastai_smooth.all'


def run(path, root, log):
    "Execute all cells but the slow ones; what is printed goes to the file `log`; exit code 1 for an error"
    if 'fork' in multiprocessing.get_all_start_methods(): multiprocessing.set_start_method('fork', force=True)  # for the workers of data loaders
    with open(log, 'w', encoding='utf-8') as f:
        for stream in (1, 2): os.dup2(f.fileno(), stream)
        ok, _ = test_nb(path, basepath=root, skip_flags=['slow'])
    os._exit(not ok)
