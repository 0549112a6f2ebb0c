#!/usr/bin/env python
"""Time the losses on a GPU against torch, torch.compile, timm, fastai and, if it is installed, Liger: forward and backward.

    python tests/benchmarks/gpu.py [--quick] [--only TEXT] [--rounds 15] [--out gpu_benchmark.json]

prints one Markdown table and writes everything to a JSON file. The methods take turns in every round of one process; medians.

t: time over that of torch's own loss in eager mode, F.cross_entropy(label_smoothing=.1), where bfloat16 logits are made float32 first, as autocast does.
For pairs, two of those blended, as fastai's MixUp does; for binary losses F.binary_cross_entropy_with_logits of smoothed targets.
copy: one copy of the logits (a read and a write), the limit of what memory allows, over the same.
mem: the most that is allocated beside the logits, over the size of the logits; the gradient alone is 1.
error: largest error of the gradient over the largest gradient, and relative error of the loss, against torch's loss in float64.
reach: the bounds of t, and of mem (1.05, small cases 64 KiB more), that our loss has to keep; it must also never be slower than torch or than Liger.

--quick: few rounds, no torch.compile, no logits above 64 M entries. --device cpu: tiny shapes, to try the script itself; its figures mean nothing.
"""
import argparse
import importlib.util
import json
import statistics
import time

import fastai.losses as fl
import timm.loss
import torch
import torch.nn.functional as F

from fastai_smooth.losses import LabelSmoothingBCE, LabelSmoothingCrossEntropy
from fastai_smooth.targets import MixedTarget

EPS = .1
SINGLE, HALF = torch.float32, torch.bfloat16
# name, dtype, shape, kind, share of ignored labels, bound of t
CASES = [('fp32 index 64×10', SINGLE, (64, 10), 'index', 0, .85), ('fp32 index 1024×1000', SINGLE, (1024, 1000), 'index', 0, .65),
         ('fp32 index 1024×21841', SINGLE, (1024, 21841), 'index', 0, .60), ('fp32 index 8192×32000, 20% ignored', SINGLE, (8192, 32000), 'index', .2, .28),
         ('fp32 index 4096×128256', SINGLE, (4096, 128256), 'index', 0, .32), ('fp32 masks (16,21,256,256)', SINGLE, (16, 21, 256, 256), 'index', 0, .75),
         ('fp32 masks (8,150,512,512)', SINGLE, (8, 150, 512, 512), 'index', 0, .32), ('fp32 pair 256×1000', SINGLE, (256, 1000), 'pair', 0, .60),
         ('fp32 pair 1024×21841', SINGLE, (1024, 21841), 'pair', 0, .60), ('fp32 dense 256×1000', SINGLE, (256, 1000), 'dense', 0, .95),
         ('fp32 dense 1024×21841', SINGLE, (1024, 21841), 'dense', 0, .95), ('bf16 index 64×10', HALF, (64, 10), 'index', 0, .75),
         ('bf16 index 1024×1000', HALF, (1024, 1000), 'index', 0, .60), ('bf16 index 8192×32000, 20% ignored', HALF, (8192, 32000), 'index', .2, .16),
         ('bf16 index 4096×128256', HALF, (4096, 128256), 'index', 0, .16), ('bf16 masks (8,150,512,512)', HALF, (8, 150, 512, 512), 'index', 0, .22),
         ('bf16 pair 1024×21841', HALF, (1024, 21841), 'pair', 0, .50), ('bf16 dense 1024×21841', HALF, (1024, 21841), 'dense', 0, .75),
         ('bf16 binary 256×80', HALF, (256, 80), 'binary', 0, .65), ('bf16 binary 1024×9605', HALF, (1024, 9605), 'binary', 0, .65)]
METHODS = 'ours', 'torch', 'torch.compile', 'timm', 'fastai', 'Liger', 'copy'


def problem(dtype, shape, kind, ignored, device):
    "Logits that want a gradient, and everything that a target of this kind is made of"
    torch.manual_seed(0)
    z = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    k, positions = shape[1], (shape[0], *shape[2:])
    data = {'k': k}
    if kind == 'dense': data['q'] = torch.rand(shape, device=device).softmax(1)
    elif kind == 'binary': data['y'] = (torch.rand(shape, device=device) < .05).float()
    else:
        data['y'] = torch.randint(0, k, positions, device=device)
        if ignored: data['y'][torch.rand(positions, device=device) < ignored] = -100
    if kind == 'pair': data |= {'other': data['y'].flip(0), 'lam': torch.rand(shape[0], device=device)}
    return z, data


def torch_loss(kind, data, dtype=torch.float32):
    "torch's own loss, as a function of the logits"
    if kind == 'binary': return lambda z: F.binary_cross_entropy_with_logits(z.to(dtype), (data['y']*(1-EPS)+EPS/2).to(dtype))
    if kind == 'dense': return lambda z: F.cross_entropy(z.to(dtype), data['q'].to(dtype), label_smoothing=EPS)
    if kind == 'pair':
        one = lambda z, y: F.cross_entropy(z.to(dtype), y, label_smoothing=EPS, reduction='none')
        return lambda z: torch.lerp(one(z, data['other']), one(z, data['y']), data['lam'].to(dtype)).mean()
    return lambda z: F.cross_entropy(z.to(dtype), data['y'], label_smoothing=EPS)


def contenders(z, data, kind, ignored, compiled):
    "Name to a loss of the logits, for every method that can do the case"
    k, ours = data['k'], LabelSmoothingCrossEntropy(EPS, axis=1)
    losses = {'torch': torch_loss(kind, data)}
    if compiled:
        torch.compiler.reset()
        losses['torch.compile'] = torch.compile(losses['torch'], fullgraph=True)
    soft = timm.loss.SoftTargetCrossEntropy()
    if kind == 'index':
        losses['ours'] = lambda z: ours(z, data['y'])
        theirs = fl.LabelSmoothingCrossEntropy(EPS) if z.ndim == 2 else fl.LabelSmoothingCrossEntropyFlat(EPS, axis=1)
        if not ignored: losses['fastai'] = lambda z: theirs(z.float(), data['y'])  # fastai and timm count ignored rows
        if not ignored and z.ndim == 2:
            one = timm.loss.LabelSmoothingCrossEntropy(EPS)
            losses['timm'] = lambda z: one(z.float(), data['y'])
        if z.ndim == 2 and z.is_cuda and importlib.util.find_spec('liger_kernel'):
            from liger_kernel.transformers import LigerCrossEntropyLoss
            liger = LigerCrossEntropyLoss(label_smoothing=EPS)
            losses['Liger'] = lambda z: liger(z, data['y'])
    elif kind == 'pair':
        one = lambda y: MixedTarget(y[:, None], torch.ones(len(y), 1, device=y.device), k)
        mixed = torch.lerp(one(data['other']), one(data['y']), data['lam'][:, None])
        q = mixed.dense()*(1-EPS) + EPS/k
        losses |= {'ours': lambda z: ours(z, mixed), 'timm': lambda z: soft(z.float(), q)}
    elif kind == 'dense': losses |= {'ours': lambda z: ours(z, data['q']), 'timm': lambda z: soft(z.float(), data['q']*(1-EPS) + EPS/k)}
    else:
        bce, theirs = LabelSmoothingBCE(EPS), timm.loss.BinaryCrossEntropy(EPS)
        losses |= {'ours': lambda z: bce(z, data['y']), 'timm': lambda z: theirs(z.float(), data['y'])}
    return losses


def exact(z, data, kind, rows):
    "Loss and gradient by torch in float64, a few rows at a time"
    n = (data['y'] != -100).sum().item() if kind == 'index' else z.numel() if kind == 'binary' else len(z)
    total, grads = 0., []
    for i in range(0, len(z), rows):
        part = {name: v[i:i+rows] if isinstance(v, torch.Tensor) else v for name, v in data.items()}
        x = z.detach()[i:i+rows].double().requires_grad_()
        share = (part['y'] != -100).sum().item() if kind == 'index' else x.numel() if kind == 'binary' else len(x)
        loss = torch_loss(kind, part, torch.float64)(x)*share/n if share else x.sum()*0
        loss.backward()
        total += loss.item()
        grads.append(x.grad)
    return total, grads


def errors(loss, z, data, kind):
    "Relative error of a loss, and largest error of its gradient over the largest gradient"
    rows = max(1, 2**26//z[0].numel())
    z.grad = None
    value = loss(z)
    value.backward()
    total, grads = exact(z, data, kind, rows)
    largest = max(g.abs().max().item() for g in grads)
    wrong = max((z.grad[i*rows:(i+1)*rows].double()-g).abs().max().item() for i, g in enumerate(grads))
    return abs(value.item()-total)/abs(total), wrong/largest


def step(loss, z):
    def run():
        z.grad = None
        loss(z).backward()
    return run


def seconds(run, calls, device):
    "Time of `calls` calls"
    if device.type != 'cuda':
        start = time.perf_counter()
        for _ in range(calls): run()
        return time.perf_counter()-start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls): run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)/1e3


def measure(runs, rounds, device, budget=.05):
    "Median seconds of a call of each; they take turns"
    calls, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        for _ in range(3): run() # compile and warm up
        calls[name] = max(1, min(1000, int(budget/max(seconds(run, 3, device)/3, 1e-6))))
    for _ in range(rounds):
        for name, run in runs.items(): times[name].append(seconds(run, calls[name], device)/calls[name])
    return {name: statistics.median(t) for name, t in times.items()}


def peak(run, z):
    "The most that a step allocates beside the logits, in bytes. None where it is not counted"
    if not z.is_cuda: return None
    z.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run_case(name, dtype, shape, kind, ignored, reach, device, rounds, compiled):
    "All figures of one case"
    z, data = problem(dtype, shape, kind, ignored, device)
    losses = contenders(z, data, kind, ignored, compiled)
    own = z.detach().clone().requires_grad_() if 'Liger' in losses else None # it writes the gradient over the logits
    leaves = {method: own if method == 'Liger' else z for method in losses}
    runs, failed = {method: step(loss, leaves[method]) for method, loss in losses.items()}, {}
    for method in [m for m in runs if m not in ('ours', 'torch')]: # a compiler may be missing, or another package not fit this card
        try: runs[method]()
        except Exception as e: failed[method] = f'{type(e).__name__}: {e}'[:500]
    runs = {method: run for method, run in runs.items() if method not in failed}
    times = measure(runs | {'copy': z.detach().clone}, rounds, device)
    size = z.numel()*z.element_size()
    memory = {method: peak(run, leaves[method]) for method, run in runs.items()}
    wrong = {method: errors(losses[method], z, data, kind) for method in ('ours', 'torch')}
    case = dict(case=name, shape=list(shape), dtype=str(dtype)[6:], reach=reach, seconds=times, peak_bytes=memory, logits_bytes=size,
                failed=failed, loss_error={m: e[0] for m, e in wrong.items()}, gradient_error={m: e[1] for m, e in wrong.items()})
    case['missed'] = missed(case)
    return case


def missed(case):
    "The bounds that our loss does not keep"
    t, m, size = case['seconds'], case['peak_bytes'], case['logits_bytes']
    bad = []
    if t['ours'] > case['reach']*t['torch']: bad.append(f"t > {case['reach']}")
    bad += [f"slower than {name}" for name in ('torch', 'Liger') if name in t and t['ours'] > t[name]]
    if m['ours'] is not None:
        if m['ours'] > max(1.05*size, size+2**16): bad.append("mem > 1.05")
        if m['ours'] > m['torch']: bad.append("more memory than torch")
    return bad


def row(case):
    "One line of the table"
    t, m = case['seconds'], case['peak_bytes']
    cells = [case['case'], f"{t['torch']*1e6:.0f}"]
    for method in METHODS:
        if method == 'torch': continue
        cells.append('–' if method not in t else f"{t[method]/t['torch']:.2f}")
    cells += ['–' if m.get(method) is None else f"{m[method]/case['logits_bytes']:.2f}" for method in ('ours', 'torch')]
    cells += [f"{case['gradient_error']['ours']:.0e}", f"{case['loss_error']['ours']:.0e}", f"≤ {case['reach']:.2f}", ', '.join(case['missed']) or 'kept']
    return f"| {' | '.join(cells)} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help="few rounds, no torch.compile, no large logits")
    parser.add_argument('--only', default='', help="only cases whose name holds this text")
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--out', default='gpu_benchmark.json', help="JSON file to write")
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.exit(1, "There is no CUDA device here, so nothing was measured. (--device cpu tries the script itself.)\n")
    device, dry = torch.device(args.device), args.device == 'cpu'
    rounds = 1 if dry else 3 if args.quick else args.rounds
    compiled = not (args.quick or dry)
    card = torch.cuda.get_device_name() if not dry else 'CPU, tiny shapes: these figures mean nothing'
    versions = {'torch': torch.__version__, 'triton': __import__('triton').__version__ if importlib.util.find_spec('triton') else None}
    print(f"{card}, {', '.join(f'{k} {v}' for k, v in versions.items())}, medians of {rounds} rounds\n")
    names = [f"{m} t" for m in METHODS if m != 'torch']
    header = ['case', 'torch µs', *names, 'ours mem', 'torch mem', 'gradient error', 'loss error', 'reach t', 'bounds']
    print(f"| {' | '.join(header)} |\n|{'---|'*len(header)}")
    cases = []
    for name, dtype, shape, kind, ignored, reach in CASES:
        if args.only not in name: continue
        if dry: shape = tuple(min(n, 6+i) for i, n in enumerate(shape))
        elif args.quick and torch.Size(shape).numel() > 2**26: continue
        cases.append(run_case(name, dtype, shape, kind, ignored, reach, device, rounds, compiled))
        print(row(cases[-1]), flush=True)
        with open(args.out, 'w') as f: json.dump(dict(card=card, **versions, rounds=rounds, cases=cases), f, indent=1) # whatever comes after
        if not dry: torch.cuda.empty_cache()
    if not cases: parser.exit(2, f"No case holds {args.only!r}: use a part of {', '.join(name for name, *_ in CASES)}.\n")
    for case in cases:
        for method, error in case['failed'].items(): print(f"\n{case['case']}, {method} left out: {error}")
    print(f"\n{sum(not c['missed'] for c in cases)} of {len(cases)} cases keep all bounds. Written to {args.out}.")
    return cases


if __name__ == '__main__': main()
