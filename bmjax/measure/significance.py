"""Is the small model worse? Paired, one-sided non-inferiority of accuracy with Tango's score interval."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

TARGET_POWER = 0.8


class Verdict(NamedTuple):
    """The answer of `non_inferiority`. Fractions, not percent; a drop is positive where the small model is worse.

    Attributes:
        verdict: "not worse", "worse" or "inconclusive".
        drop: accuracy of the big model minus accuracy of the small one.
        interval: (low, high) around the drop; each end holds at the one-sided `level`.
        b: examples that only the big model gets right.
        c: examples that only the small model gets right.
        n: examples.
        margin: the drop that is allowed.
        level: one-sided error level.
        power: chance that this test set says "not worse" to a model that lost nothing and disagrees as often as this one.
        needed: about how many examples would decide, with 80% power; None where this test set has decided, and where no
            number would because the drop seen equals the margin.
    """

    verdict: str
    drop: float
    interval: tuple[float, float]
    b: int
    c: int
    n: int
    margin: float
    level: float
    power: float
    needed: int | None

    @property
    def sentence(self) -> str:
        """The verdict in one plain line."""
        low, high = (100 * end for end in self.interval)
        seen = (
            f"accuracy changed by {-100 * self.drop:+.2f} points on {self.n:,} examples, and the drop lies between {low:.2f} and "
            f"{high:.2f} points ({100 * (1 - 2 * self.level):g}% interval)"
        )
        allowed = f"the allowed {100 * self.margin:g} points"
        if self.verdict == "inconclusive":
            answer = "no number of examples decides" if self.needed is None else f"about {self.needed:,} examples needed"
            return f"inconclusive: {answer}; {seen}, against {allowed}"
        return f"{self.verdict}: {seen}, {'within' if self.verdict == 'not worse' else 'beyond'} {allowed}"


def non_inferiority(big_correct: Any, small_correct: Any, margin: float, level: float = 0.05) -> Verdict:
    """Tests whether the small model's accuracy is at most `margin` below the big one's, on the same examples.

    "not worse" if the whole interval lies below the margin, "worse" if it lies wholly above, else "inconclusive".

    Args:
        big_correct, small_correct: [n] bool, in the same order of examples.
        margin: allowed drop in accuracy, a fraction in (0, 1).
        level: one-sided error level, in (0, 0.5).

    Raises:
        ValueError: arrays that do not pair or are empty, or a margin or level out of range.
    """
    big, small = np.asarray(big_correct), np.asarray(small_correct)
    if big.shape != small.shape or big.ndim != 1:
        raise ValueError(
            f"paired results need two [n] arrays of the same examples, but got {list(big.shape)} and {list(small.shape)}"
        )
    _check(len(big), margin, level)
    big, small = big.astype(bool), small.astype(bool)
    b, c, n = int(np.sum(big & ~small)), int(np.sum(~big & small)), len(big)
    low, high = tango_interval(b, c, n, level)
    verdict = "not worse" if high < margin else "worse" if low > margin else "inconclusive"
    discordance = max(b + c, 1) / n  # none seen does not mean that there are none: assume one
    needed = None
    if verdict == "inconclusive":
        needed = examples_needed(discordance, margin, drop=max(0.0, (b - c) / n), level=level)
    return Verdict(verdict, (b - c) / n, (low, high), b, c, n, margin, level, power(n, discordance, margin, level), needed)


def tango_interval(b: int, c: int, n: int, level: float = 0.05) -> tuple[float, float]:
    """The score interval of a difference of paired proportions, (b - c) / n.

    Tango (1998), Statistics in Medicine 17:891-908. It holds its level with few discordant pairs and has width with none.

    Args:
        b, c: pairs where only the first, and only the second, is a success.
        n: all pairs.
        level: one-sided level of each end: 0.05 gives the two-sided 90% interval.

    Raises:
        ValueError: counts that cannot be, or a level outside (0, 0.5).
    """
    if min(b, c) < 0 or b + c > n or n < 1:
        raise ValueError(f"{b} and {c} discordant pairs of {n} cannot be; expected b >= 0, c >= 0, b + c <= n and n >= 1")
    _check(n, 0.5, level)
    z = NormalDist().inv_cdf(1 - level)
    return _limit(b, c, n, z, -1.0), _limit(b, c, n, z, 1.0)


def power(n: int, discordance: float, margin: float, level: float = 0.05) -> float:
    """Chance that `non_inferiority` says "not worse" where both models are equally accurate.

    Exact for the score test: the sum of the probabilities of all tables that pass.

    Args:
        n: examples.
        discordance: probability that exactly one of the two models is right, in [0, 1].
        margin, level: as for `non_inferiority`.
    """
    from scipy.stats import binom

    _check(n, margin, level)
    z = NormalDist().inv_cdf(1 - level)
    spread = 8 * math.sqrt(n * discordance * (1 - discordance)) + 8
    pairs = np.arange(max(0, math.floor(n * discordance - spread)), min(n, math.ceil(n * discordance + spread)) + 1)
    # For each number of discordant pairs, the largest b that passes; -1 where not even b = 0 does.
    low, high = np.full(pairs.shape, -1), pairs.copy()
    while np.any(low < high):
        middle = (low + high + 1) // 2
        passes = _score(middle, pairs - middle, n, margin) < -z
        low, high = np.where(passes, middle, low), np.where(passes, high, middle - 1)
    return float(np.sum(binom.pmf(pairs, n, discordance) * binom.cdf(low, pairs, 0.5)))


def examples_needed(discordance: float, margin: float, *, drop: float = 0.0, level: float = 0.05) -> int | None:
    """About how many examples tell a true `drop` from the margin, with 80% power; None if they are equal.

    The leading term of Nam (1997), Biometrics 53:1422, and at least as many as pass without any discordant pair.
    """
    _check(1, margin, level)
    if math.isclose(drop, margin):
        return None
    z = NormalDist().inv_cdf(1 - level)
    gap = margin - drop
    by_variance = (discordance - drop**2) * (z + NormalDist().inv_cdf(TARGET_POWER)) ** 2 / gap**2
    without_discordance = z**2 * (1 - margin) / margin
    return math.floor(max(by_variance, without_discordance)) + 1


def accuracy_interval(correct: int, n: int, level: float = 0.025) -> tuple[float, float]:
    """Wilson's score interval of one accuracy; each end at the one-sided level, so that 0.025 gives 95%.

    Wilson (1927), Journal of the American Statistical Association 22:209.

    Raises:
        ValueError: counts that cannot be, or a level outside (0, 0.5).
    """
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n} cannot be; expected 0 <= correct <= n")
    _check(n, 0.5, level)
    z = NormalDist().inv_cdf(1 - level)
    share = correct / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _score(b: Any, c: Any, n: int, drop: Any) -> np.ndarray:
    """Tango's statistic of the hypothesis that the difference is `drop`; negative where the observed one is smaller."""
    b, c, drop = np.asarray(b, np.float64), np.asarray(c, np.float64), np.asarray(drop, np.float64)
    linear = (2 * n - b + c) * drop - b - c
    constant = -c * drop * (1 - drop)
    second = (np.sqrt(np.maximum(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)  # estimate of c/n under the hypothesis
    variance = np.maximum(n * (2 * second + drop * (1 - drop)), 0.0)
    difference = b - c - n * drop
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / np.sqrt(variance))


def _limit(b: int, c: int, n: int, z: float, end: float) -> float:
    """Bisects between the estimate, which the interval holds, and the `end` (-1 or 1) of what is possible."""
    inside, outside = (b - c) / n, end
    for _ in range(60):
        middle = (inside + outside) / 2
        if abs(_score(b, c, n, middle)) <= z:
            inside = middle
        else:
            outside = middle
    return inside


def _check(n: int, margin: float, level: float) -> None:
    if n < 1:
        raise ValueError("the evaluation split is empty: a test of significance needs at least one example")
    if not 0 < margin < 1:
        raise ValueError(
            f"the margin is {margin}; expected a fraction between 0 and 1, for example 0.02 for 2 points of accuracy"
        )
    if not 0 < level < 0.5:
        raise ValueError(f"the level is {level}; expected a number between 0 and 0.5, for example 0.05")
