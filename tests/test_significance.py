"""Tango's interval against published values, the score equation and simulation; power against closed forms."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from bmjax.measure import significance


def restricted_score(b, c, n, difference):
    """The score statistic from its definition: the nuisance parameter maximises the likelihood numerically."""
    low, high = max(0.0, -difference), (1 - difference) / 2

    def loss(q):
        cells = [(b, q + difference), (c, q), (n - b - c, 1 - 2 * q - difference)]
        return -sum(k * math.log(p) for k, p in cells if k)

    q = optimize.minimize_scalar(loss, bounds=(low + 1e-12, high - 1e-12), method="bounded", options={"xatol": 1e-13}).x
    return (b - c - n * difference) / math.sqrt(n * (2 * q + difference - difference**2))


@pytest.mark.parametrize(
    ("b", "c", "n", "level", "expected", "digits"),
    [
        (1, 7, 21, 0.025, (-0.517, -0.026), 3),  # Fagerland, Lydersen and Laake (2014): airway reactivity of 21 children
        (28, 25, 618, 0.05, (-0.0148, 0.0247), 4),  # R, PropCIs::scoreci.mp(25, 28, 618, 0.90)
    ],
)
def test_published_intervals(b, c, n, level, expected, digits):
    found = significance.tango_interval(b, c, n, level)
    assert tuple(round(end, digits) for end in found) == expected


@pytest.mark.parametrize(("b", "c", "n"), [(12, 5, 100), (3, 9, 40), (40, 20, 160), (1, 1, 500)])
def test_both_ends_solve_the_score_equation(b, c, n):
    low, high = significance.tango_interval(b, c, n, 0.05)
    z = stats.norm.ppf(0.95)
    assert restricted_score(b, c, n, low) == pytest.approx(z, abs=1e-4)
    assert restricted_score(b, c, n, high) == pytest.approx(-z, abs=1e-4)


def test_closed_forms_at_the_edges():
    z2 = stats.norm.ppf(0.95) ** 2
    low, high = significance.tango_interval(0, 0, 50)  # without discordant pairs: z^2 / (n + z^2)
    assert high == pytest.approx(z2 / (50 + z2), abs=1e-9)
    assert low == pytest.approx(-high, abs=1e-9)
    low, high = significance.tango_interval(30, 0, 30)
    assert high == 1.0
    assert 0.8 < low < 1
    assert significance.tango_interval(0, 30, 30) == pytest.approx((-1.0, -low))
    assert significance.tango_interval(5, 12, 80) == pytest.approx(
        tuple(-x for x in reversed(significance.tango_interval(12, 5, 80)))
    )


def test_type_one_error_on_the_boundary():
    n, margin, discordance, trials = 540, 0.015, 0.05, 4000
    rng = np.random.default_rng(0)
    only_big = (discordance + margin) / 2
    tables = rng.multinomial(n, [only_big, discordance - only_big, 1 - discordance], trials)
    tables, counts = np.unique(tables[:, :2], axis=0, return_counts=True)
    passed = sum(k for (b, c), k in zip(tables, counts) if significance.tango_interval(int(b), int(c), n)[1] < margin)
    assert 0.03 < passed / trials < 0.06  # standard error 0.0034


@pytest.mark.parametrize(
    ("n", "margin", "discordance", "normal"),
    [(540, 0.015, 0.03, 0.643), (1797, 0.015, 0.03, 0.979), (719, 0.02, 0.03, 0.927), (9893, 0.005, 0.04, 0.800)],
)
def test_power(n, margin, discordance, normal):
    found = significance.power(n, discordance, margin)
    rng = np.random.default_rng(1)
    tables, counts = np.unique(
        rng.multinomial(n, [discordance / 2, discordance / 2, 1 - discordance], 4000)[:, :2], axis=0, return_counts=True
    )
    passed = sum(k for (b, c), k in zip(tables, counts) if restricted_passes(b, c, n, margin))
    assert found == pytest.approx(passed / 4000, abs=0.025)  # three standard errors
    assert found == pytest.approx(normal, abs=0.045)  # the textbook approximation ignores the variance under the hypothesis


def restricted_passes(b, c, n, margin):
    """The score test with the root of the score equation in its textbook form."""
    roots = np.roots([2 * n, (2 * n - b + c) * margin - b - c, -c * margin * (1 - margin)])
    q = max(roots.real)
    return (b - c - n * margin) / math.sqrt(n * (2 * q + margin * (1 - margin))) < -stats.norm.ppf(0.95)


def test_power_without_discordant_pairs_is_all_or_nothing():
    smallest = stats.norm.ppf(0.95) ** 2 * (1 - 0.02) / 0.02  # 132.6 examples pass a margin of 2 points
    assert significance.power(math.floor(smallest), 0.0, 0.02) == 0.0
    assert significance.power(math.ceil(smallest), 0.0, 0.02) == 1.0


@pytest.mark.parametrize(("margin", "expected"), [(0.005, 9893), (0.01, 2474)])
def test_examples_needed(margin, expected):
    assert significance.examples_needed(0.04, margin) == expected
    assert significance.power(expected, 0.04, margin) == pytest.approx(0.8, abs=0.015)


def pairs(b, c, n):
    big = np.zeros(n, bool)
    small = np.zeros(n, bool)
    big[:b] = True
    small[b : b + c] = True
    big[b + c :] = small[b + c :] = True
    return big, small


def test_three_verdicts():
    good = significance.non_inferiority(*pairs(10, 9, 1797), 0.015)
    assert (good.verdict, good.b, good.c, good.n, good.needed) == ("not worse", 10, 9, 1797, None)
    assert good.drop == pytest.approx(1 / 1797)
    assert good.sentence.startswith("not worse: accuracy changed by -0.06 points on 1,797 examples")

    bad = significance.non_inferiority(*pairs(60, 5, 540), 0.015)
    assert bad.verdict == "worse"
    assert bad.interval[0] > 0.015
    assert bad.sentence.startswith("worse: ")

    small = significance.non_inferiority(*pairs(2, 2, 100), 0.01)
    assert small.verdict == "inconclusive"
    assert small.needed == 2474
    assert small.power < 0.5
    assert small.sentence.startswith("inconclusive: about 2,474 examples needed")


def test_a_tiny_set_is_inconclusive_even_when_nothing_differs():
    verdict = significance.non_inferiority(np.ones(100, bool), np.ones(100, bool), 0.02)
    assert verdict.verdict == "inconclusive"
    assert verdict.needed > 132


def test_needed_exceeds_what_there_is():
    for b in range(0, 40, 3):
        verdict = significance.non_inferiority(*pairs(b, 10, 719), 0.02)
        if verdict.verdict == "inconclusive":
            assert verdict.needed is None or verdict.needed > 719


def test_wilson():
    from scipy.stats import binomtest

    for correct, n in [(0, 20), (20, 20), (81, 263), (15, 148)]:
        expected = binomtest(correct, n).proportion_ci(0.95, method="wilson")
        assert significance.accuracy_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3
    assert tuple(round(x, 4) for x in significance.accuracy_interval(81, 263)) == (0.2553, 0.3662)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: significance.non_inferiority([True], [True, False], 0.02), "same examples"),
        (lambda: significance.non_inferiority([], [], 0.02), "empty"),
        (lambda: significance.non_inferiority([True], [True], 2), "fraction between 0 and 1"),
        (lambda: significance.non_inferiority([True], [True], 0.02, 0.9), "level is 0.9"),
        (lambda: significance.tango_interval(5, 6, 10), "cannot be"),
        (lambda: significance.accuracy_interval(5, 4), "cannot be"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
