#!/usr/bin/env python
"""Time training steps of a fastai Learner on a GPU: what the callback and the losses add.

    python tests/benchmarks/gpu_learner.py [--rounds 9] [--steps 200] [--out gpu_learner.json]

prints a Markdown table: milliseconds of a training step (64×1×28×28 images, a small CNN) and the same over plain cross entropy, or for the steps with
MixUp over fastai's MixUp with its own smoothing loss. The variants take turns in every round; medians. --device cpu tries the script itself.
"""
import argparse
import json

import fastai.losses as fl
import torch
from fastai.callback.mixup import MixUp
from learner import Batches, epoch, learner, measure, small_cnn

from fastai_smooth.callback import LabelSmoothing
from fastai_smooth.losses import LabelSmoothingCrossEntropyFlat

PLAIN, THEIRS = 'cross entropy', "fastai's MixUp and its smoothing loss"
# name, loss, callbacks, over which step, bound
STEPS = [(PLAIN, fl.CrossEntropyLossFlat, [], PLAIN, None), ('our loss', LabelSmoothingCrossEntropyFlat, [], PLAIN, 1.03),
         ('LabelSmoothing()', fl.CrossEntropyLossFlat, [LabelSmoothing], PLAIN, 1.03), (THEIRS, fl.LabelSmoothingCrossEntropyFlat, [MixUp], THEIRS, None),
         ('MixUp and LabelSmoothing()', fl.CrossEntropyLossFlat, [MixUp, LabelSmoothing], THEIRS, .80)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--steps', type=int, default=200, help="training steps of one round")
    parser.add_argument('--out', default='gpu_learner.json', help="JSON file to write")
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.exit(1, "There is no CUDA device here, so nothing was measured. (--device cpu tries the script itself.)\n")
    device = torch.device(args.device)
    Batches.device = device
    torch.manual_seed(0)
    batch = torch.randn(64, 1, 28, 28, device=device), torch.randint(0, 10, (64,), device=device)

    def run(loss, cbs):
        train = epoch(learner(small_cnn, batch, args.steps, loss(), [cb() for cb in cbs], 10))

        def until_done():
            train()
            if device.type == 'cuda': torch.cuda.synchronize()
        return until_done
    times = measure({name: run(loss, cbs) for name, loss, cbs, _, _ in STEPS}, args.steps, args.rounds)
    card = torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'
    print(f"{card}, torch {torch.__version__}, medians of {args.rounds} rounds of {args.steps} steps\n")
    print("| step | ms | over | ratio | reach |\n|---|---|---|---|---|")
    rows = []
    for name, _, _, base, reach in STEPS:
        ratio = times[name]/times[base]
        rows.append(dict(step=name, seconds=times[name], over=base, ratio=ratio, reach=reach, kept=reach is None or ratio <= reach))
        print(f"| {name} | {times[name]*1e3:.2f} | {base} | {ratio:.2f} | {'–' if reach is None else f'≤ {reach:.2f}'} |")
    with open(args.out, 'w') as f: json.dump(dict(card=card, torch=torch.__version__, steps=rows), f, indent=1)
    return rows


if __name__ == '__main__': main()
