"""What the verdict of `compare` claims where there is nothing, and what it finds where there is something: python tests/benchmarks/verdict.py [draws]

Figures of methods that do not differ are drawn (normal, lognormal, Student's t with 2 degrees of freedom, accuracies on a grid, a method that varies three
times as much, one split for all seeds), written into rows as a comparison has them, and judged by the function that prints the verdict. A false claim is a
verdict with "better" or "worse" in it. After each share stands its Monte-Carlo error. Then the same for methods that are looked at again with more seeds.

With a folder instead, that of a finished comparison of many seeds, it draws 3, 5, ... of them again and again and prints how often each method is found to
be better, and what the verdict says of each five seeds that no other five share: python tests/benchmarks/verdict.py FOLDER"""
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from fastai_smooth.compare import Evidence, verdict
from fastai_smooth.compare.scores import score_all

N_TRAIN, N_VALID = 1437, 360


def normal(rng, k, j): return .05+.01*rng.normal(size=(k, j)), .97+.01*rng.normal(size=(k, j))
def lognormal(rng, k, j): return .05*np.exp(.5*rng.normal(size=(k, j))), .97-.01*np.exp(rng.normal(size=(k, j)))
def heavy(rng, k, j): return .05+.01*rng.standard_t(2, (k, j)), .97+.01*rng.standard_t(2, (k, j))
def grid(rng, k, j): return .05+.01*rng.normal(size=(k, j)), rng.binomial(180, .97, (k, j))/180
def unequal(rng, k, j): return .05+.01*rng.normal(size=(k, j))*np.r_[1, 3, np.ones(j-2)], .97+.01*rng.normal(size=(k, j))*np.r_[1, 3, np.ones(j-2)]


NULLS = [normal, lognormal, heavy, grid, unequal]


def evidence(nll, accuracy, examples=None, n_valid=N_VALID, **kwargs):
    "As a comparison has it"
    k, j = nll.shape
    names = ['ce', *(f'ls@{(i+1)/100}' for i in range(j-1))]
    runs = [(s, i, m) for s in range(k) for i, m in enumerate(names)]
    rows = [dict(method=m, seed=s, nll_ts=nll[s, i], accuracy=accuracy[s, i], ece=.03, ece_ts=.01, ece_null_ts=.01) for s, i, m in runs]
    return Evidence(rows, 0., examples and {(m, s): examples(s, i) for s, i, m in runs}, N_TRAIN, n_valid, **kwargs)


def claims(text): return 'better' in text or 'worse' in text


def one_split(rng, k, j, n=180, seed_sd=.003):
    "Examples that are the same for all seeds, on which each method is better or worse by chance; and what varies with the seed"
    common = rng.normal(0, .1, (n, j))
    nll = .05+common[None]+rng.normal(0, .05, (k, n, j))+rng.normal(0, seed_sd, (k, 1, j))
    right = (rng.random((k, n, j)) < .97-.1*(common[None] > .15)).astype(float)
    return evidence(nll.mean(1), right.mean(1), lambda s, i: dict(nll_ts=nll[s, :, i], accuracy=right[s, :, i]), n, one_split=True)


def looks(rng, methods, at=(3, 5, 10)):
    "Whether any look claims something, of runs that are added to"
    nll, accuracy = normal(rng, max(at), methods)
    return any(claims(verdict(evidence(nll[:k], accuracy[:k], looks=list(at[:i])))) for i, k in enumerate(at))


def show(what, values):
    share, n = np.mean(values), len(values)
    print(f'{what:48} {share:6.1%} ± {(share*(1-share)/n)**.5:.1%}', flush=True)


def main(draws):
    rng = np.random.default_rng(0)
    print(f'False claims of the printed verdict, {draws} draws each')
    for draw in NULLS:
        for methods in (2, 4, 8):
            for seeds in (2, 3, 5, 10):
                n_valid = 180 if draw is grid else N_VALID
                show(f'{draw.__name__}, {methods} methods, {seeds} seeds',
                     [claims(verdict(evidence(*draw(rng, seeds, methods), n_valid=n_valid))) for _ in range(draws)])
    for seeds in (2, 3, 5, 10): show(f'one split, 4 methods, {seeds} seeds', [claims(verdict(one_split(rng, seeds, 4))) for _ in range(draws//2)])
    show('4 methods, looked at with 3, 5 and 10 seeds', [looks(rng, 4) for _ in range(draws)])


def power(folder, draws=300):
    rng, runs, examples = np.random.default_rng(0), pd.read_csv(Path(folder)/'runs.csv').to_dict('records'), {}
    for r in runs:
        with np.load(Path(folder)/'predictions'/f"{r['method']}-{r['seed']}.npz") as f: figures, examples[r['method'], r['seed']] = score_all(**f)
    n_valid, methods = len(next(iter(examples.values()))['nll_ts']), list(dict.fromkeys(r['method'] for r in runs))
    seeds = [s for s in sorted({r['seed'] for r in runs}) if sum(r['seed'] == s for r in runs) == len(methods)]

    def signs(some):
        "What the verdict says of each method, with these seeds alone"
        e = Evidence([r for s in some for r in runs if r['seed'] == s], 0., examples, 4*n_valid, n_valid)
        return {(m, figure): int(d[figure].sign) for m, d in e.differences().items() for figure in ('nll_ts', 'accuracy')}

    for k in (3, 5, 7, 10):
        if k >= len(seeds): break
        found = [signs(rng.choice(seeds, k, replace=False).tolist()) for _ in range(draws)]
        for m in methods[1:]: show(f'{k} of {len(seeds)} seeds: {m} better', [f[m, 'nll_ts'] > 0 for f in found])
    fives = [signs(seeds[i:i+5]) for i in range(0, len(seeds)-4, 5)]
    for m, figure in fives[0] if fives else ():
        better, worse = (sum(f[m, figure] == sign for f in fives) for sign in (1, -1))
        print(f'{len(fives)} times five fresh seeds, {figure}: {m} better {better}, worse {worse}, cannot tell {len(fives)-better-worse}')


if __name__ == '__main__':
    what = sys.argv[1] if len(sys.argv) > 1 else '2000'
    if what.isdigit(): main(int(what))
    else: power(what)
