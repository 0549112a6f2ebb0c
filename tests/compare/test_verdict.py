"What may be concluded: variances against loops, levels, words, and how often the printed verdict claims something where there is nothing"
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fastai_smooth.compare import Difference, Evidence, differences, mean_ci, table, verdict
from fastai_smooth.compare.scores import METRICS
from fastai_smooth.compare.verdict import baselines, cell, crossed_variance, number, rate_of, residual_variance, signed, variance_within

spec = importlib.util.spec_from_file_location('audit', Path(__file__).parent.parent/'benchmarks'/'verdict.py')
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)


def evidence(gaps, seeds=5, n=300, own=.001, **kwargs):
    "Methods that differ from the first by so much in NLL, on examples that they share"
    rng, rows, examples = np.random.default_rng(0), [], {}
    for s in range(seeds):
        hard = rng.gamma(.1, .4, n)
        for m, gap in gaps.items():
            nll = hard*(1+rng.normal(0, .1, n))+gap+rng.normal(0, own)
            examples[m, s] = dict(nll_ts=nll, accuracy=(hard < .8)*1.)
            figures = dict.fromkeys(METRICS, .1) | {k: v.mean() for k, v in examples[m, s].items()}
            rows.append(dict(figures, method=m, seed=s, ece_null_ts=.1, nll_chance=2.3, at_bound=0., untold=0.))
    return Evidence(rows, 0., examples, 4*n, n, **kwargs)


# -- figures and how they are written

def test_intervals_over_seeds():
    low, high = stats.t.interval(.95, 2, np.mean([1, 2, 4]), stats.sem([1, 2, 4]))
    assert mean_ci([1., 2., 4.])['ci95'] == pytest.approx((high-low)/2) and mean_ci([1.])['ci95'] is None
    rows = [dict.fromkeys(METRICS, v)|dict(method=m, seed=s) for s, m, v in ((0, 'ce', 1.), (0, 'ls', 2.), (1, 'ce', 5.), (1, 'ls', 6.5))]
    assert differences(rows)['ls']['nll'] == mean_ci([1., 1.5])


def test_methods_of_one_noise_are_paired_however_it_is_written():
    assert baselines(['ce~0.2', 'ls~.2']) == {'ce~0.2': None, 'ls~.2': 'ce~0.2'} and baselines(['ce', 'ls~.2'], .2) == {'ce': None, 'ls~.2': 'ce'}
    assert baselines(['ls', 'mixup']) == {'ls': None, 'mixup': 'ls'} and baselines(['ls~0', 'ce~0', 'ls~.1']) == {'ls~0': 'ce~0', 'ce~0': None, 'ls~.1': None}


@pytest.mark.parametrize('text, words', [
    (number(-.0001), '0.000'), (number(-.0001, sign='+'), '0.000'), (number(.0124, sign='+'), '+0.012'), (cell(dict(mean=.2, ci95=None)), '0.200'),
    (cell(dict(mean=-.0002, ci95=.012)), '0.000 ± 0.012'), (signed(dict(mean=-.00012, ci95=.00003)), '-0.00012 ± 0.00003'),
    (cell(dict(mean=0, ci95=0)), '0.000 ± 0.000')])
def test_numbers(text, words): assert text == words


# -- variances, by loops

def test_variances_against_loops():
    rng = np.random.default_rng(0)
    figures = rng.normal(size=(4, 3))+rng.normal(size=(4, 1))
    left = [[figures[s, j]-figures[s].mean()-figures[:, j].mean()+figures.mean() for j in range(3)] for s in range(4)]
    variance, df = residual_variance(figures)
    assert variance == pytest.approx(2*sum(v*v for row in left for v in row)/6) and df == 6
    pair = figures[:, :2]  # of two methods: the variance of their difference
    assert residual_variance(pair)[0] == pytest.approx((pair[:, 0]-pair[:, 1]).var(ddof=1))
    each = [rng.normal(size=50) for _ in range(3)]
    assert variance_within(each, 'nll_ts') == pytest.approx(np.mean([np.var(d, ddof=1)/50 for d in each]))
    assert variance_within([np.zeros(50)]*3, 'accuracy') == 1/50**2


def test_crossed_variance_is_what_seeds_cannot_reduce():
    "Of examples with a variance of 4, seeds of 1 and 9 of both together: 4/n, and 9/n of each seed"
    rng = np.random.default_rng(0)
    found = [crossed_variance(rng.normal(0, 2, (1, 200))+rng.normal(0, 1, (5, 1))+rng.normal(0, 3, (5, 200)), 'nll_ts') for _ in range(200)]
    assert np.mean([e for e, _ in found])*200 == pytest.approx(4, rel=.06) and np.mean([w for _, w in found])*200 == pytest.approx(9, rel=.02)


def test_interval_of_one_difference():
    d = Difference('ls', 'ce', 'nll_ts', -.02, .1, variance=4e-4, df=6, seeds=3, overlap=.25, level=.01)
    assert d.half() == pytest.approx(stats.t.ppf(.995, 6)*(4e-4*(1/3+.25))**.5), "Nadeau and Bengio"
    both = Difference('ls', 'ce', 'nll_ts', -.02, .1, variance=4e-4, df=6, seeds=3, within=3e-4, examples=1e-4, df_examples=50, level=.01)
    parts = stats.t.ppf(.995, 6)**2*1e-4/3, stats.norm.ppf(.995)**2*3e-4/3, stats.t.ppf(.995, 50)**2*1e-4
    assert both.half() == pytest.approx(sum(parts)**.5)
    better, worse = (Difference('ls', 'ce', k, .1, .5, 1e-4, 6, 3).sign for k in ('accuracy', 'nll_ts'))
    assert better == 1 and worse == -1 and Difference('ls', 'ce', 'nll_ts', 0., .5, 0., 6, 3).sign == 0


def test_seeds_needed_are_enough_in_four_of_five():
    rng, d = np.random.default_rng(0), Difference('ls', 'ce', 'nll_ts', -.01, .1, variance=1e-4, df=2, seeds=3, level=.05)
    k = d.seeds_needed()
    gaps = rng.normal(-.01, .01, (4000, k))
    assert .75 < (np.abs(gaps.mean(1)) > stats.t.ppf(.975, k-1)*gaps.std(1, ddof=1)/k**.5).mean() < .87
    assert Difference('ls', 'ce', 'nll_ts', -.01, .1, 1e-4, 2, 3, overlap=.25, level=.01).seeds_needed() is None


# -- the verdict

def test_error_rates_add_up_to_five_percent():
    assert rate_of(1) == .04 and sum(rate_of(k) for k in range(1, 60)) == pytest.approx(.05, abs=1e-9)
    e = evidence(dict(ce=0., ls=-.05, mixup=0.))
    d = e.differences()
    assert d['ls']['nll_ts'].level == pytest.approx(.04/2*.9) and d['mixup']['accuracy'].level == pytest.approx(.04/2*.1)
    assert d['ls']['nll_ts'].sign == 1 and d['ls']['accuracy'].level == pytest.approx(.04/2), "what a decided NLL had passes on"
    later = evidence(dict(ce=0., ls=0.), looks=[3]).differences()['ls']['nll_ts']
    assert later.level == pytest.approx(.005*.9)


def test_the_form_of_a_verdict():
    text = verdict(evidence(dict(ce=0., ls=-.02, mixup=.0005, cutmix=.05)))
    assert text.startswith('ls against ce, NLL after temperature -0.0') and ' (95% for new data -0.' in text
    assert ', corrected for 3 methods): better by ' in text and '; cutmix +0.0' in text and 'worse by' in text
    assert 'cannot tell' in text and ' Accuracy: ls 0.000 (' in text and 'To tell an NLL difference' in text
    assert 'corrected' not in verdict(evidence(dict(ce=0., ls=-.02)))
    rates = verdict(evidence({'ce~0': 0., 'ls~0': -.02, 'ce~0.4': 0., 'ls~0.4': 0.}))
    assert rates.startswith('Label noise 0: ls~0 against ce~0') and 'Label noise 0.4: ls~0.4 against ce~0.4' in rates and 'corrected for 2 methods' in rates


def test_no_verdict():
    assert 'nothing to compare' in verdict(evidence(dict(ls=0.)))
    one = verdict(evidence(dict(ce=0., ls=-.05), seeds=1))
    assert 'no verdict' in one and '--seeds 3' in one and 'better' not in one


def test_what_is_said_and_is_no_finding():
    e = evidence({'ce': 0., 'ls@0.1': 0., 'ls@0.3': -.2, 'mixup': 0.})
    assert "ls@0.1 and ls@0.3 differ only in ε" in verdict(e)
    for r in e.rows:
        if r['method'] == 'ls@0.3' and r['seed'] == 2: r['nll_ts'] = 2.3
        if r['method'] == 'mixup': r['at_bound'] = 1.
        if r['method'] == 'ce': r['untold'] = 1.
    text = verdict(Evidence(e.rows, 0., e.examples, 1200, 300, looks=[3]))
    assert 'ls@0.3 learned nothing in 1 of 5 runs' in text and 'better' not in text and 'ls@0.3 -' not in text and 'corrected for 2 methods' in text
    assert 'The temperature of mixup is at the end of its range in 5 of 5 runs' in text and 'hardly tell the temperature of ce in 5 of 5' in text
    assert 'This is look 2' in text and '--seed0 5' in text
    for r in e.rows:
        if r['method'] == 'ls@0.3' and r['seed'] == 2: r['diverged'] = 1.
    assert 'ls@0.3 diverged in 1 of 5 runs' in verdict(e) and 'learned nothing' not in verdict(e) and 'ls@0.3 -' not in verdict(e)
    same = evidence(dict(ce=0., prior=0., ls=0.), own=0.)
    for r in same.rows: r['nll_ts'] = .1+.01*r['seed']
    for v in same.examples.values(): v['nll_ts'][:] = .1
    assert 'prior and ls gave the same predictions' in verdict(same) and 'better' not in verdict(same)


def test_a_smoothed_network_is_mended_only_where_a_temperature_mends_it():
    for after, words in ((.11, 'smooth, then calibrate'), (.38, 'temperature scaling leaves 0.380')):
        e = evidence(dict(ce=0., ls=-.05))
        for r in e.rows:
            if r['method'] == 'ls': r |= dict(ece=.4, ece_ts=after)
        assert words in verdict(e)


@pytest.mark.parametrize('seeds', [2, 3])
def test_one_image_is_no_finding(seeds):
    "Accuracies lie on a grid: seeds that agree to the last digit have an interval all the same"
    for n in (180, 10_000):
        nll = np.random.default_rng(0).normal(.1, .01, (seeds, 2))
        e = audit.evidence(nll, np.tile([[.9, .9+1/n]], (seeds, 1)), n_valid=n)
        d = e.differences()['ls@0.01']['accuracy']
        assert d.half() > 1/n and d.sign == 0


def test_table_is_markdown():
    text = table(dict(methods={m: dict.fromkeys(METRICS, dict(mean=-.0001, ci95=.01)) for m in ('ce', 'mixup+ls')}))
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4 and lines[0].startswith('| method   | accuracy') and '-0.000' not in text


# -- how often is it wrong?

def false_claims(draw, methods, seeds, draws, n_valid=audit.N_VALID):
    rng = np.random.default_rng(0)
    return np.mean([audit.claims(verdict(audit.evidence(*draw(rng, seeds, methods), n_valid=n_valid))) for _ in range(draws)])


@pytest.mark.slow
def test_methods_that_do_not_differ():
    assert false_claims(audit.normal, 4, 3, 1000) <= .07


@pytest.mark.slow
@pytest.mark.parametrize('draw, methods, seeds', [(audit.grid, 4, 2), (audit.heavy, 8, 2), (audit.lognormal, 2, 2), (audit.unequal, 8, 3)])
def test_methods_that_do_not_differ_in_other_ways(draw, methods, seeds):
    assert false_claims(draw, methods, seeds, 250, 180 if draw is audit.grid else audit.N_VALID) <= .09


@pytest.mark.slow
def test_one_split_for_all_seeds():
    rng = np.random.default_rng(0)
    assert np.mean([audit.claims(verdict(audit.one_split(rng, 3, 4))) for _ in range(200)]) <= .09


@pytest.mark.slow
def test_power():
    "A difference of two and a quarter standard deviations over seeds, most of which the examples make, is seen by five seeds"
    rng, found = np.random.default_rng(0), []
    for _ in range(60):
        nll = rng.gamma(.1, .4, (5, 360, 1))+rng.normal(0, .067, (5, 360, 4))-np.array([0, .0112, 0, 0])+rng.normal(0, .0005, (5, 1, 4))
        e = audit.evidence(nll.mean(1), np.ones((5, 4)), lambda s, i, nll=nll: dict(nll_ts=nll[s, :, i], accuracy=np.ones(360)))
        found.append(e.differences()['ls@0.01']['nll_ts'].sign)
    assert np.mean(found) > .7
