"""Intervals and paired differences by a bootstrap over users (the stars of Table 1).

Users, not queries, are drawn with replacement: the queries of one user resemble each other. Every setting of a task is
computed on the same draws, so a difference is paired. The intervals cover the choice of users, not that of the
training seed. The paper names no test behind its stars; this one is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oppu.files import digest
from oppu.metrics import Floats, values
from oppu.tasks import Task


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """value = setting minus counterpart, with its interval and two-sided p."""

    p_value: float

    @property
    def significant(self) -> bool:
        """p < .05: the interval excludes 0, and there are at least six users to say so (see `p_value`)."""
        return self.p_value < 0.05


def draws(task: Task, users: int, resamples: int, seed: int) -> Floats:
    """How often each user is drawn in each resample: [B, U], every row sums to U.

    The same (run seed, task, number of users, resamples) give the same draws.
    """
    rng = np.random.default_rng(int(digest([seed, task.name, "bootstrap"])[:16], 16))
    picked = rng.integers(users, size=(resamples, users))
    cells = (picked + users * np.arange(resamples)[:, None]).ravel()
    return np.bincount(cells, minlength=users * resamples).reshape(resamples, users).astype(np.float64)


def interval(sample: Floats) -> tuple[float, float]:
    """95 % percentile interval of bootstrap values [B]: order statistics, no interpolation.

    floor((B - 1) / 40) values are cut off at either end, so that it excludes 0 exactly when 2 min(...) / B of `p_value`
    is below .05.
    """
    ordered, cut = np.sort(sample), (len(sample) - 1) // 40
    return float(ordered[cut]), float(ordered[len(ordered) - 1 - cut])


def p_value(sample: Floats, users: int) -> float:
    """Two-sided paired-bootstrap p of differences d* [B]: 2 min(#{d* <= 0}, #{d* >= 0}) / B.

    Never below 1 / (B + 1), the finest that B resamples tell, nor below 2^(1 - U), the finest that U users tell (a sign
    test's): a bootstrap of one user has no spread and would call any difference certain. Never above 1.
    """
    tail = min(int((sample <= 0).sum()), int((sample >= 0).sum()))
    return min(1.0, max(2 * tail / len(sample), 1 / (len(sample) + 1), 2.0 ** (1 - users)))


def estimates(task: Task, sums: Floats, weights: Floats) -> dict[str, Estimate]:
    """Each metric pooled over all queries, with its interval. sums [U, S], weights [B, U] of `draws`."""
    pooled, resampled = values(task, sums.sum(0)), values(task, weights @ sums)
    return {name: Estimate(float(pooled[name]), *interval(resampled[name])) for name in pooled}


def differences(task: Task, sums: Floats, other: Floats, weights: Floats) -> dict[str, Difference]:
    """Each metric's difference to a counterpart on the same users, in the same order; both sums [U, S]."""
    if sums.shape != other.shape or weights.shape[1] != len(sums):
        raise ValueError(f"not paired: sums {sums.shape} and {other.shape}, weights {weights.shape}")
    pooled, against = values(task, sums.sum(0)), values(task, other.sum(0))
    left, right = values(task, weights @ sums), values(task, weights @ other)
    found = {}
    for name in pooled:
        sample = left[name] - right[name]
        found[name] = Difference(float(pooled[name] - against[name]), *interval(sample), p_value(sample, len(sums)))
    return found
