"""Time and peak memory of a linear head with its smoothed loss, forward and backward, one thread: `OMP_NUM_THREADS=1 python tests/benchmarks/heads.py`

torch: F.cross_entropy(F.linear(...), label_smoothing=.1). chunks: torch's chunked F.linear_cross_entropy *without* smoothing, which it has no chunks for.
products: the three matrix products alone. On a machine with a GPU the same in bfloat16 at 4096x4096 -> 128256. Medians of interleaved rounds; on a CPU of the
CPU time, which other processes disturb less. What to reach on a GPU: peak at most the gradients + 512 MiB, time at most 1.35 of the products, smoothing at most
5% over none, a tree or a pair at most 10% more.

`--learner` takes steps of fastai's AWD_LSTM language model in its default size, vocabulary 60,000, 64 texts of 72 tokens, with fastai's smoothing loss and with
`LabelSmoothing` and `FusedHead`; one step after a warm one."""
import argparse
import json
import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from fastai_smooth.distributions import Taxonomy
from fastai_smooth.kernels import smooth_linear_cross_entropy
from fastai_smooth.targets import MixedTarget


def cases(n, d, k, device, dtype):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g).mul(.05).to(device, dtype).requires_grad_() for s in ((n, d), (k, d)))
    y, other = (torch.randint(k, (n,), generator=g).to(device) for _ in range(2))
    pair = MixedTarget(torch.stack([y, other], 1), torch.tensor([.7, .3], device=device).expand(n, 2), k)
    tree = Taxonomy([f'{c % 40}/{c % 1200}/{c}' for c in range(k)]).to(device)

    def step(f): return lambda: f().backward()

    def clear(): x.grad = w.grad = None

    def products():
        with torch.no_grad():
            z = x @ w.T
            return z @ w, z.T @ x
    found = {'torch': step(lambda: F.cross_entropy(F.linear(x, w).float(), y, label_smoothing=.1))}
    if hasattr(torch.nn, 'LinearCrossEntropyOptions'):
        found['chunks, no smoothing'] = step(partial(F.linear_cross_entropy, x, w, y, options=torch.nn.LinearCrossEntropyOptions()))
    ours = {'ours, eps=0': (y, 0., None), 'ours': (y, .1, None), 'ours, tree': (y, .1, tree), 'ours, pair': (pair, .1, None)}
    ours = {name: step(partial(smooth_linear_cross_entropy, x, w, t, eps, dist=dist)) for name, (t, eps, dist) in ours.items()}
    ours['ours, 256 rows a chunk'] = step(partial(smooth_linear_cross_entropy, x, w, y, .1, chunk=256))
    return {**found, 'products': products, **ours}, clear


def peak(step, device):
    "Most MiB that a call allocates at a time, beside what was there"
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated()-before)/2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: step()
    now = most = 0
    for e in sorted((e for e in p.profiler.kineto_results.events() if e.name() == '[memory]'), key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    return most/2**20


def timed(step, device):
    clock = time.perf_counter if device == 'cuda' else time.process_time
    start = clock()
    step()
    if device == 'cuda': torch.cuda.synchronize()
    return clock()-start


def language_models(device, vocab, bs=64, seq_len=72):
    "A step of each language model, as a function"
    from fastai.callback.core import Callback, CancelFitException
    from fastai.data.core import DataLoaders
    from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
    from fastai.text.data import LMDataLoader
    from fastai.text.learner import LMLearner
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import get_language_model

    from fastai_smooth.callback import FusedHead, LabelSmoothing

    class Halt(Callback):
        order = 100
        def after_batch(self): raise CancelFitException

    def step(loss, cbs):
        torch.manual_seed(0)
        tokens = torch.randint(vocab, (bs*seq_len+1,))
        dls = DataLoaders(*[LMDataLoader([(tokens,)], lens=[len(tokens)], bs=bs, seq_len=seq_len, device=device)]*2)
        learn = LMLearner(dls, get_language_model(AWD_LSTM, vocab).to(device), loss_func=loss, cbs=[*cbs, Halt()], lr=1e-3)
        def run():
            with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return run
    yield "fastai's smoothing", step(LabelSmoothingCrossEntropyFlat(eps=.1), [])
    yield 'LabelSmoothing', step(CrossEntropyLossFlat(), [LabelSmoothing(.1)])
    yield 'LabelSmoothing, FusedHead', step(CrossEntropyLossFlat(), [LabelSmoothing(.1), FusedHead()])


def compare_learners(device, rounds, vocab):
    print(f'AWD_LSTM language model, vocabulary {vocab}, 64 x 72 tokens, {torch.get_num_threads()} thread(s), torch {torch.__version__}')
    found = {}
    for name, step in language_models(device, vocab):
        step()
        memory = peak(step, device)
        found[name] = statistics.median(timed(step, device) for _ in range(rounds)), memory
        first = next(iter(found.values()))
        print(f'{name:28}{found[name][0]:8.2f} s {found[name][0]/first[0]:6.2f}{memory:9.0f} MiB {memory/first[1]:6.2f}', flush=True)
    return found


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--size', type=int, nargs=3, metavar=('ROWS', 'FEATURES', 'CLASSES'))
    parser.add_argument('--json', help='file for the figures')
    parser.add_argument('--learner', type=int, nargs='?', const=60000, metavar='VOCABULARY', help='compare steps of a language model')
    args = parser.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if args.learner:
        compare_learners(device, args.rounds, args.learner)
        raise SystemExit
    size = args.size or ((4096, 4096, 128256) if device == 'cuda' else (1024, 256, 128256))
    steps, clear = cases(*size, device, torch.bfloat16 if device == 'cuda' else torch.float32)
    memory, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        clear()  # a gradient that is freed within a step would count as memory that the step does not need
        memory[name] = peak(step, device)
    for _ in range(args.rounds):
        for name, step in steps.items():
            clear()
            times[name].append(timed(step, device))
    seconds = {name: statistics.median(t) for name, t in times.items()}
    print(f'{size[0]} x {size[1]} -> {size[2]} on {torch.cuda.get_device_name() if device == "cuda" else "cpu"}, torch {torch.__version__}')
    print(f'{"":24}{"s" if device == "cuda" else "CPU s":>8}{"/ torch":>9}{"/ products":>12}{"peak MiB":>10}')
    for name, s in seconds.items(): print(f'{name:24}{s:8.2f}{s/seconds["torch"]:9.2f}{s/seconds["products"]:12.2f}{memory[name]:10.0f}')
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as f: json.dump({'size': size, 'device': device, 'seconds': seconds, 'peak_mib': memory}, f, indent=1)
