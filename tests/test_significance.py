import numpy as np
import pytest
from scipy import stats

from oppu.metrics import values
from oppu.significance import (
    differences,
    draws,
    estimates,
    holm,
    interval,
    p_value,
    permutation_p,
    resampled,
    swaps,
)
from oppu.tasks import task

TITLES, NEWS = task("LaMP_5"), task("LaMP_2N")


def generation(rng, users, mean, queries=4):
    """Per-user sums in which users differ more than queries do."""
    level = mean + 0.1 * rng.standard_normal((users, 1))
    scores = level + 0.05 * rng.standard_normal((users, queries))
    return np.stack([np.full(users, queries), scores.sum(1), scores.sum(1)], axis=1)


def confusion(rng, users):
    hits = rng.integers(0, 3, (users, 15))
    extra = rng.integers(0, 2, (users, 15))
    gold = hits + extra
    return np.concatenate([gold.sum(1, keepdims=True), hits, gold, hits + extra[:, ::-1]], axis=1).astype(float)


def test_draws_are_seeded_and_complete():
    weights = draws(NEWS, 7, 50, seed=3)
    assert weights.shape == (50, 7)
    assert (weights.sum(1) == 7).all()
    assert (weights == draws(NEWS, 7, 50, seed=3)).all()
    assert (weights != draws(NEWS, 7, 50, seed=4)).any()
    assert (weights != draws(TITLES, 7, 50, seed=3)).any()


def estimated(task, sums, weights):
    return estimates(task, sums, resampled(task, sums, weights))


def compared(task, sums, other, weights, swapped=None):
    return differences(task, sums, other, resampled(task, sums, weights), resampled(task, other, weights), swapped)


def test_bootstrap_equals_a_loop_over_the_same_resamples():
    sums, other = (confusion(np.random.default_rng(seed), 9) for seed in (0, 1))
    weights = draws(NEWS, 9, 80, seed=0)
    own, gap = {"accuracy": [], "f1": []}, {"accuracy": [], "f1": []}
    for row in weights:
        index = np.repeat(np.arange(9), row.astype(int))
        left, right = (values(NEWS, s[index].sum(0)) for s in (sums, other))
        for name in own:
            own[name].append(left[name])
            gap[name].append(left[name] - right[name])
    for name in own:
        found, apart = estimated(NEWS, sums, weights)[name], compared(NEWS, sums, other, weights)[name]
        assert (found.low, found.high) == pytest.approx(interval(np.array(own[name])))
        assert (apart.low, apart.high) == pytest.approx(interval(np.array(gap[name])))
        assert found.value == pytest.approx(values(NEWS, sums.sum(0))[name])


def test_a_setting_does_not_differ_from_itself():
    sums = generation(np.random.default_rng(0), 20, 0.5)
    for found in compared(TITLES, sums, sums.copy(), draws(TITLES, 20, 500, seed=0)).values():
        assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
        assert not found.significant


def test_interval_agrees_with_scipys_percentile_bootstrap():
    sums = generation(np.random.default_rng(1), 40, 0.5)
    found = estimated(TITLES, sums, draws(TITLES, 40, 4000, seed=0))["rouge1"]
    per_user = sums[:, 1] / sums[:, 0]
    expected = stats.bootstrap((per_user,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.003)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        found = estimated(TITLES, generation(rng, 40, 0.5), draws(TITLES, 40, 400, seed))["rouge1"]
        covered += found.low <= 0.5 <= found.high
    assert 180 <= covered <= 198


def test_pairing_finds_what_users_would_hide():
    rng = np.random.default_rng(5)
    before = generation(rng, 40, 0.5)
    after = before.copy()
    after[:, 1:] += 4 * (0.02 + 0.01 * rng.standard_normal((40, 1)))
    weights = draws(TITLES, 40, 1000, seed=0)
    found = compared(TITLES, after, before, weights)["rouge1"]
    assert found.significant
    assert found.low < 0.02 < found.high
    assert found.p_value == 1 / 1001
    plain = estimated(TITLES, after, weights)["rouge1"]
    assert plain.high - plain.low > 5 * (found.high - found.low)


def test_without_an_effect_about_1_in_20_is_significant():
    false = 0
    for seed in range(200):
        rng = np.random.default_rng(1000 + seed)
        before, after = generation(rng, 30, 0.5), generation(rng, 30, 0.5)
        false += compared(TITLES, after, before, draws(TITLES, 30, 400, seed))["rouge1"].significant
    assert 2 <= false <= 22


@pytest.mark.parametrize("resamples", [20, 40, 41, 100, 130, 999, 1000])
def test_p_below_5_percent_is_an_interval_without_zero(resamples):
    for below in range(resamples + 1):
        sample = np.concatenate([-np.ones(below), np.ones(resamples - below)])
        low, high = interval(sample)
        assert (p_value(sample, users=100) < 0.05) == (low > 0 or high < 0)


def test_few_users_prove_nothing():
    sample = np.ones(2000)
    assert p_value(sample, users=1) == 1
    assert p_value(sample, users=5) == 0.0625
    assert p_value(sample, users=6) < 0.05
    assert p_value(sample, users=100) == 1 / 2001


def test_other_users_are_refused():
    rng = np.random.default_rng(0)
    five, six, weights = generation(rng, 5, 0.5), generation(rng, 6, 0.5), draws(TITLES, 5, 10, 0)
    with pytest.raises(ValueError, match="same users"):
        resampled(TITLES, six, weights)
    drawn = resampled(TITLES, five, weights)
    with pytest.raises(ValueError, match="not paired"):
        differences(TITLES, five, six, drawn, drawn)


@pytest.mark.parametrize("effect", [0.0, 0.01, 0.03])
def test_permutation_agrees_with_scipy_on_a_mean(effect):
    """With equal queries per user pooled ROUGE is the mean over users; scipy swaps users' pairs too."""
    rng = np.random.default_rng(3)
    before = generation(rng, 12, 0.5)
    after = before.copy()
    after[:, 1] += 4 * (effect + 0.03 * rng.standard_normal(12))
    found = compared(TITLES, after, before, draws(TITLES, 12, 100, 0), swaps(TITLES, 12, 20_000, 0))["rouge1"]
    pairs = after[:, 1] / 4, before[:, 1] / 4
    expected = stats.permutation_test(
        pairs, lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples", n_resamples=np.inf
    )  # all 2^12 of them
    assert found.value == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.012)


def test_permutation_of_a_metric_that_is_no_mean_equals_a_loop():
    sums, other = (confusion(np.random.default_rng(seed), 9) for seed in (0, 1))
    swapped = swaps(NEWS, 9, 60, seed=0)
    found = compared(NEWS, sums, other, draws(NEWS, 9, 60, seed=0), swapped)["f1"]
    sample = []
    for row in swapped.astype(bool):
        left = values(NEWS, np.where(row[:, None], other, sums).sum(0))["f1"]
        sample.append(left - values(NEWS, np.where(row[:, None], sums, other).sum(0))["f1"])
    as_large = sum(abs(d) >= abs(found.value) - 1e-12 for d in sample)
    assert found.p_value == (1 + as_large) / 61
    same = compared(NEWS, sums, other, draws(NEWS, 9, 60, seed=0))["f1"]
    assert (found.low, found.high) == (same.low, same.high)  # the interval stays the bootstrap's


def test_a_permutation_test_without_an_effect_is_significant_about_1_in_20_times():
    false = 0
    for seed in range(200):
        rng = np.random.default_rng(2000 + seed)
        before, after = generation(rng, 30, 0.5), generation(rng, 30, 0.5)
        chance = swaps(TITLES, 30, 400, seed)
        false += compared(TITLES, after, before, draws(TITLES, 30, 10, seed), chance)["rouge1"].significant
    assert 2 <= false <= 22


def test_swaps_are_seeded_and_even():
    first = swaps(NEWS, 7, 500, seed=3)
    assert (first == swaps(NEWS, 7, 500, seed=3)).all() and (first != swaps(NEWS, 7, 500, seed=4)).any()
    assert set(first.ravel()) == {0, 1} and 0.45 < first.mean() < 0.55


def test_few_users_prove_nothing_by_permutation_either():
    never = np.zeros(2000)
    assert permutation_p(0.3, never, users=1) == 1
    assert permutation_p(0.3, never, users=5) == 0.0625
    assert permutation_p(0.3, never, users=100) == 1 / 2001
    assert permutation_p(0.0, never, users=100) == 1


@pytest.mark.parametrize(
    ("p", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 4 x .005, 3 x .01, 2 x .03, then never below it
        ([0.04, 0.04], [0.08, 0.08]),
        ([0.6, 0.7, 0.0001], [1, 1, 0.0003]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm_by_hand(p, corrected):
    assert holm(p) == pytest.approx(corrected)


def test_holm_keeps_the_risk_of_any_false_finding():
    rng = np.random.default_rng(0)
    families = [rng.random(20) for _ in range(1000)]
    assert 25 <= sum(min(holm(p)) < 0.05 for p in families) <= 75
    assert sum(min(p) < 0.05 for p in families) > 500  # what goes wrong without it
