"""Wrong labels found and mended, votes as labels, and what the search costs: `python tests/benchmarks/labels.py` writes nbs/figures/labels.txt (about ten
minutes of one core); `python tests/benchmarks/labels.py wrong_labels`, `votes` or `cost` prints one part

mnist5k: 20% of the 4,000 training labels are replaced by another class (symmetric). `Learner.find_label_issues` looks for them; then networks are
trained on the labels as they are, smoothed, relabelled, and without the suspects, and scored on 1,000 right labels. Digits: three simulated
annotators, 10, 30 and 50% wrong; networks are trained on the majority, on the votes and on the votes with some in advance, and scored by right labels.
Cost: CPU seconds of the search beside those of its trainings in a bare loop, the two in turn; of a frozen timm body, too."""
import copy
import statistics
import sys
import time
import warnings
from pathlib import Path

import fastai.callback.progress  # noqa: F401  (gives the Learner `no_bar`)
import numpy as np
import torch
from fastai.callback.schedule import fit_one_cycle  # noqa: F401  (gives the Learner this method)
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.torch_core import set_seed
from sklearn.model_selection import StratifiedKFold

from fastai_smooth.calibration import cross_fit, gather
from fastai_smooth.compare import mean_ci
from fastai_smooth.data import DawidSkene, array_dls, corrupt_labels, digits_arrays, mnist5k_arrays, small_convnet, stratified_split
from fastai_smooth.losses import LabelSmoothingCrossEntropy

FIGURES = Path(__file__).resolve().parents[2]/'nbs'/'figures'/'labels.txt'
SEEDS = 5


def learner(images, targets, labels, split, vocab, eps=0.):
    "A learner of soft targets in training, and of right labels in validation"
    soft = np.eye(len(vocab))[labels]
    soft[split[0]] = targets
    return Learner(array_dls(images, soft, vocab, split), small_convnet(1, len(vocab)), loss_func=LabelSmoothingCrossEntropy(eps))


def scores(learn, epochs):
    "Accuracy, and negative log-likelihood after temperature"
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 3e-3)
        predictions = gather(learn)
    return predictions.figures(['accuracy'])['accuracy'], cross_fit(predictions)[0].figures(['nll'])['nll']


def side_by_side(title, ways, make, epochs):
    "A line per way to train: means over the seeds, and the paired difference from the first way with its 95% interval"
    found = {way: [] for way in ways}
    for seed in range(SEEDS):
        for way in ways:
            set_seed(seed, reproducible=True)
            found[way].append(scores(make(way), epochs))
    first = np.array(found[ways[0]])
    yield title
    for way, rows in found.items():
        (acc, nll), gaps = np.mean(rows, 0), np.array(rows)-first
        said = [f"{d['mean']:+.4f} ± {d['ci95']:.4f}" for d in map(mean_ci, gaps.T)] if way != ways[0] else ['', '']
        yield f'{way:24}accuracy {acc:.4f} {said[0]:20}NLL, T {nll:.4f} {said[1]}'.rstrip()


def wrong_labels():
    images, labels, vocab = mnist5k_arrays()
    split = tuple(map(np.array, stratified_split(labels, .2, 0)))
    noisy, transition, flipped = corrupt_labels(labels[split[0]], .2, seed=0)
    noisy, flipped = np.asarray(noisy), np.asarray(flipped)
    given = labels.copy()
    given[split[0]] = noisy
    set_seed(0, reproducible=True)
    learn = Learner(array_dls(images, given, vocab, split), small_convnet(1, 10), loss_func=LabelSmoothingCrossEntropy(0.), lr=3e-3)
    with learn.no_bar(): issues = learn.find_label_issues(5, 5)
    hit = (issues.mask & flipped).sum()
    true = np.asarray(transition)
    yield f'mnist5k, {flipped.mean():.1%} of {len(noisy)} training labels wrong'
    yield (f'suspects {issues.mask.sum()}, precision {hit/issues.mask.sum():.3f}, '
           f'recall {hit/flipped.sum():.3f}, noise matrix off by {abs(issues.noise_matrix-true).mean():.4f} (mean absolute)')
    hot, kept = np.eye(10)[noisy], issues.drop()
    targets = {'ce': hot, 'ls .1': hot, 'relabelled, mix .3': issues.relabel(.3), 'relabelled, mix 1': issues.relabel(1.), 'dropped': hot}

    def make(way):
        if way != 'dropped': return learner(images, targets[way], labels, split, vocab, .1 if way == 'ls .1' else 0.)
        return learner(images, hot[kept], labels, (split[0][kept], split[1]), vocab)
    title = f'mnist5k with these labels, 3 epochs, {SEEDS} seeds, scored on {len(split[1])} right labels; differences from ce'
    yield from side_by_side(title, [*targets], make, 3)


def votes():
    images, labels, vocab = digits_arrays()
    split = tuple(map(np.array, stratified_split(labels, .2, 0)))
    cast = np.stack([np.asarray(corrupt_labels(labels[split[0]], rate, seed=i)[0]) for i, rate in enumerate((.1, .3, .5))], 1)
    counts, annotators = np.stack([(cast == k).sum(1) for k in range(10)], 1), DawidSkene(cast, 10).fit()
    targets = {'majority': np.eye(10)[counts.argmax(1)], 'votes': counts/3, 'votes, α = .1': (counts+.1)/4, 'Dawid and Skene': annotators.probabilities}
    right = {'majority': counts.argmax(1), 'Dawid and Skene': annotators.labels}
    yield ('digits, annotators 10, 30 and 50% wrong: right labels '+', '.join(f'{k} {(v == labels[split[0]]).mean():.3f}' for k, v in right.items()))
    yield from side_by_side(f'digits, 12 epochs, {SEEDS} seeds, scored on {len(split[1])} right labels; differences from majority', [*targets],
                            lambda way: learner(images, targets[way], labels, split, vocab), 12)


def bare(learn, k, epochs):
    "The trainings of a search, each on all parts but one"
    labels = np.array([int(y) for _, y in learn.dls.train_ds])
    for train, part in StratifiedKFold(k, shuffle=True, random_state=0).split(labels, labels):
        new = Learner(learn.dls, copy.deepcopy(learn.model), loss_func=learn.loss_func, lr=learn.lr, splitter=learn.splitter, train_bn=False)
        items = learn.dls.train_ds
        new.dls = DataLoaders(*(learn.dls.train.new(dataset=type(items)(items[int(i)] for i in rows), shuffle=s) for rows, s in ((train, True), (part, False))))
        new.freeze()
        with new.no_bar(), new.no_logging(): new.fit_one_cycle(epochs)


def cost(k=5, epochs=5, rounds=3):
    import runpy
    frozen = runpy.run_path(str(Path(__file__).with_name('eps_find.py')))['make'](256, 96, 32, False)
    images, labels, vocab = digits_arrays()
    x, y = torch.as_tensor(images[:800, None]/255., dtype=torch.float32), torch.as_tensor(labels[:800])
    items = type(frozen.dls.train_ds)
    whole = Learner(DataLoaders(*(TfmdDL(items(zip(x, y)), bs=64, shuffle=s, num_workers=0) for s in (True, False))), small_convnet(1, 10),
                    loss_func=LabelSmoothingCrossEntropy(0.), lr=3e-3)
    for name, learn in (('small convnet on 800 digits', whole), ('frozen tf_efficientnet_lite0 on 256 images of 96x96', frozen)):
        times = {'search': [], 'bare': []}
        for _ in range(rounds):
            for way, run in dict(search=type(learn).find_label_issues, bare=bare).items():
                start = time.process_time()
                with learn.no_bar(), learn.no_logging(): run(learn, k, epochs)
                times[way].append(time.process_time()-start)
        took, trainings = (statistics.median(times[w]) for w in times)
        yield f'{name}: find_label_issues takes {took:.1f} s, {took/trainings:.2f} of {k} trainings of {epochs} epochs'


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    parts, lines = sys.argv[1:] or ['wrong_labels', 'votes', 'cost'], []
    for part in parts:
        for line in dict(wrong_labels=wrong_labels, votes=votes, cost=cost)[part]():
            lines.append(line)
            print(line, flush=True)
    if not sys.argv[1:]: FIGURES.write_text('\n'.join(lines)+'\n', encoding='utf-8')
