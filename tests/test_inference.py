"Intervals of paired differences: the same as a mixed model fitted otherwise, and right as often as they say."
import math

import numpy as np
import pandas as pd
import pytest

from bdam_repro.config import UserError
from bdam_repro.inference import (
    DifferenceEstimate,
    Spread,
    chance_to_settle,
    coverage,
    declared_level,
    estimate,
    mean_squares,
    person_values,
    power_of,
    seeds_needed,
    seeds_to_settle,
    simulated_coverage,
    variant_spread,
)

SD = dict(seed=2.5, person=10., rest=24.)


def table(n, m, seed=0, sd=SD, diff=0.):
    rng = np.random.default_rng(seed)
    a, b = sd['seed']*rng.normal(size=(n, 1)), sd['person']*rng.normal(size=(1, m))
    return diff + a + b + sd['rest']*rng.normal(size=(n, m))


# ---- against another implementation

def test_the_components_and_the_standard_error_are_those_of_restricted_maximum_likelihood():
    "In a balanced table both estimators agree where no component is negative."
    from statsmodels.regression.mixed_linear_model import MixedLM
    z = table(6, 40, seed=3, sd=dict(seed=6., person=12., rest=8.))
    s, p = np.indices(z.shape).reshape(2, -1)
    long = pd.DataFrame(dict(seed=s, person=p, y=z.ravel()))
    one = np.zeros(len(long))
    parts = {'seed': '0 + C(seed)', 'person': '0 + C(person)'}
    fit = MixedLM.from_formula('y ~ 1', long, groups=one, re_formula='0', vc_formula=parts).fit(reml=True)
    found = dict(zip(fit.model.exog_vc.names, fit.vcomp))
    seed, person, rest = mean_squares(z).components
    assert min(seed, person) > 0
    assert found['seed'] == pytest.approx(seed, rel=.01) and found['person'] == pytest.approx(person, rel=.01)
    assert fit.scale == pytest.approx(rest, rel=.01)
    mine = estimate(z, np.arange(40))
    assert mine.diff == pytest.approx(fit.fe_params.iloc[0])
    assert mine.se == pytest.approx(fit.bse_fe.iloc[0], rel=.01)


def test_the_pooled_variance_is_that_of_a_two_way_regression():
    import statsmodels.formula.api as smf
    rng = np.random.default_rng(0)
    y = rng.normal(size=(7, 5)) + rng.normal(size=5)
    y[0, 3:] = y[2, 0] = np.nan                                     # some variants have fewer seeds
    v, s = np.nonzero(np.isfinite(y))
    fit = smf.ols('y ~ C(v) + C(s)', pd.DataFrame(dict(v=v, s=s, y=y[v, s]))).fit()
    mine = variant_spread(y)
    assert mine.df == pytest.approx(fit.df_resid)
    if math.isinf(mine.weight): assert mine.variance == pytest.approx(fit.mse_resid)


def test_without_people_and_with_a_known_spread_it_is_the_regressions_contrast():
    "A pair of variants, against statsmodels' t-test of that contrast."
    import statsmodels.formula.api as smf
    rng = np.random.default_rng(1)
    y = rng.normal(size=(6, 4)) + 3*rng.normal(size=4)
    v, s = np.indices(y.shape).reshape(2, -1)
    fit = smf.ols('y ~ 0 + C(v) + C(s)', pd.DataFrame(dict(v=v, s=s, y=y.ravel()))).fit()
    contrast = np.zeros(len(fit.params))
    contrast[:2] = 1, -1
    theirs = fit.t_test(contrast)
    pooled = Spread(fit.mse_resid, math.inf, fit.df_resid)
    mine = estimate((y[0] - y[1])[:, None], [0], pooled)
    assert mine.diff == pytest.approx(theirs.effect[0]) and mine.se == pytest.approx(theirs.sd[0, 0])
    assert mine.p_value() == pytest.approx(float(theirs.pvalue))
    assert mine.interval() == pytest.approx(tuple(theirs.conf_int()[0]))


# ---- coverage

@pytest.mark.parametrize('n', [3, 5, 10])
@pytest.mark.parametrize('uneven', [0., 1/3])
def test_an_interval_covers_as_it_says(n, uneven):
    held, _ = coverage(simulated_coverage(n, 100, SD, repeats=300, uneven=uneven, seed=7))
    assert 92 <= held <= 98                       # 300 repeats: a standard error of 1.3 points


def test_more_seeds_and_more_people_narrow_an_interval():
    def half(n, m): return coverage(simulated_coverage(n, m, SD, repeats=40))[1]
    assert half(3, 100) > half(10, 100) > half(10, 800)


def test_queries_of_one_person_are_no_independent_evidence():
    z = table(4, 50)
    twice = np.repeat(z, 2, axis=1)
    assert estimate(twice, np.repeat(np.arange(50), 2)).se == pytest.approx(estimate(z, np.arange(50)).se)
    assert estimate(twice, np.arange(100)).se < estimate(z, np.arange(50)).se


def test_unequal_numbers_of_queries_keep_the_mean_over_queries():
    d, groups = np.array([[1., 0, 0, 1, 1], [1., 1, 0, 0, 1]]), [3, 3, 3, 9, 8]
    z = person_values(d, groups)
    assert z.shape == (2, 3) and z.mean(1) == pytest.approx(d.mean(1))


# ---- spread

def test_a_variant_that_varies_more_gets_a_wider_interval_where_variants_differ():
    z = table(5, 100, sd=dict(seed=9., person=1., rest=1.))
    alike, unlike = Spread(1., math.inf, 60.), Spread(1., 4., 60.)
    assert estimate(z, np.arange(100), unlike).se > 2*estimate(z, np.arange(100), alike).se


def test_no_spread_without_six_variants_of_two_seeds():
    y = np.random.default_rng(0).normal(size=(6, 3))
    assert variant_spread(y) is not None
    assert variant_spread(y[:5]) is None
    y[0, 1:] = math.nan
    assert variant_spread(y) is None
    assert variant_spread(np.add.outer(np.arange(6.), np.arange(3.))) is None      # nothing is left


def test_a_pair_within_a_family_gets_a_narrower_interval_than_one_between_families():
    rng = np.random.default_rng(0)
    y = 3*rng.normal(size=(2, 10))[np.arange(12) % 2] + .3*rng.normal(size=(12, 10))
    spread = variant_spread(y)
    within, between = (estimate((y[0] - y[i])[:, None], [0], spread) for i in (2, 1))
    assert spread.weight < 10 and between.se > 2*within.se


def test_weights_of_a_contrast_scale_its_variance():
    y = np.random.default_rng(0).normal(size=(8, 3))
    spread = variant_spread(y)
    pair = estimate((y[0] - y[1])[:, None], [0], spread, 2.)
    effect = estimate((y[:4].mean(0) - y[4:].mean(0))[:, None], [0], spread, .5)
    if math.isinf(spread.weight): assert pair.se == pytest.approx(2*effect.se)


# ---- one seed, certainty, errors

def test_one_seed_gives_a_number_and_nothing_else():
    e = estimate(table(1, 20), np.arange(20), Spread(1., math.inf, 60.))
    assert math.isfinite(e.diff) and e.seeds == 1
    assert all(math.isnan(x) for x in (e.se, *e.interval(), e.p_value(), e.p_above(0)))


def test_equal_runs_are_certainly_equal():
    e = estimate(np.zeros((3, 20)), np.arange(20))
    assert e.interval() == (0., 0.) and e.p_value() == 1 and e.p_within(1.5) == 0


def test_intervals_and_p_values_agree():
    for seed in range(20):
        e = estimate(table(5, 30, seed, diff=3.), np.arange(30), Spread(4., math.inf, 40.))
        for level in (.9, .95, .99):
            lo, hi = e.interval(level)
            assert (lo > 0 or hi < 0) == (e.p_value() < 1 - level)
            assert (lo > -12 and hi < 12) == (e.p_within(12.) < 1 - level)


@pytest.mark.parametrize('call, says', [
    (lambda: estimate([[1., math.nan]], [0, 1]), 'finite'),
    (lambda: estimate(np.zeros((2, 3)), [0, 1]), '2 entries for 3 queries'),
    (lambda: estimate(np.zeros((0, 3)), [0, 1, 2]), 'finite'),
    (lambda: DifferenceEstimate(0., 1., 5., 3, 9).interval(95), 'level')])
def test_nonsense_is_one_clear_line(call, says):
    with pytest.raises(UserError, match=says): call()


# ---- many questions, and how many seeds

def test_the_level_is_that_of_benjamini_and_hochberg():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(25)**3
        ranked = np.sort(p)
        passed = [i for i in range(1, 26) if ranked[i - 1] <= .05*i/25]
        declared = max(passed, default=0)
        level = declared_level(list(p))
        assert level == pytest.approx(1 - .05*max(1, declared)/25)
        assert (p <= 1 - level + 1e-12).sum() == declared or not declared
    assert declared_level([]) == declared_level([math.nan]) == .95


def test_power_is_what_a_simulation_finds():
    sd, n, m = (2., 6., 20.), 6, 150
    found = simulated_coverage(n, m, dict(zip(('seed', 'person', 'rest'), sd)), repeats=400)
    seen = np.mean([abs(e.diff + 3) > e.interval()[1] - e.diff for e in found])
    assert seen == pytest.approx(power_of(3., sd, n, m), abs=.07)
    within = np.mean([e.interval()[0] > -3 and e.interval()[1] < 3 for e in found])
    assert within == pytest.approx(chance_to_settle(3., sd, n, m), abs=.07)


def test_seeds_that_are_needed():
    assert seeds_needed(1.5, (1., 0., 0.), 100) < seeds_needed(1.5, (3., 0., 0.), 100)
    assert seeds_needed(1.5, (0., 0., 0.), 100) == seeds_to_settle(1.5, (0., 0., 0.), 100) == 2
    hopeless = (0., 60., 0.)                                       # people vary: more seeds do not help
    assert math.isinf(seeds_needed(1.5, hopeless, 100)) and math.isinf(seeds_to_settle(1.5, hopeless, 100))
