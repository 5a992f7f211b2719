"""Intervals, paired differences and their tests, over users (the stars of Table 1).

Users, not queries, are drawn with replacement: the queries of one user resemble each other. Every setting of a task is
computed on the same draws, so a difference is paired. The intervals cover the choice of users, not that of the
training seed. Those of macro F1 lean low: a resample may miss the only user of a rare label. The paper names no test
behind its stars; ours is the paired bootstrap, or a paired permutation test (config.significance). `holm` corrects for
the number of comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oppu.files import digest
from oppu.metrics import values
from oppu.tasks import Task

Floats = NDArray[np.float64]
ALPHA = 0.05
TESTS = {"bootstrap": "paired bootstrap over users", "permutation": "paired permutation over users"}
"""config.significance -> the test's name in tables."""


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
        """p < .05. With the bootstrap: the interval excludes 0, and at least six users say so (see `p_value`)."""
        return self.p_value < ALPHA


def draws(task: Task, users: int, resamples: int, seed: int) -> Floats:
    """How often each user is drawn in each resample: [B, U], every row sums to U.

    The same (run seed, task, number of users, resamples) give the same draws.
    """
    picked = _rng(task, seed, "bootstrap").integers(users, size=(resamples, users))
    cells = (picked + users * np.arange(resamples)[:, None]).ravel()
    return np.bincount(cells, minlength=users * resamples).reshape(resamples, users).astype(np.float64)


def swaps(task: Task, users: int, resamples: int, seed: int) -> Floats:
    """Whose results change places with the counterpart's in each permutation: [B, U] of 0 and 1, seeded as `draws`."""
    return _rng(task, seed, "permutation").integers(2, size=(resamples, users)).astype(np.float64)


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


def resampled(task: Task, sums: Floats, weights: Floats) -> dict[str, Floats]:
    """Each metric in each resample: [B]. sums [U, S], weights [B, U] of `draws`."""
    if weights.shape[1] != len(sums):
        raise ValueError(f"not of the same users: sums {sums.shape}, weights {weights.shape}")
    return values(task, weights @ sums)


def estimates(task: Task, sums: Floats, drawn: Mapping[str, Floats]) -> dict[str, Estimate]:
    """Each metric pooled over all queries, with its interval. sums [U, S], and what `resampled` makes of them."""
    pooled = values(task, sums.sum(0))
    return {name: Estimate(float(pooled[name]), *interval(drawn[name])) for name in pooled}


def differences(
    task: Task,
    sums: Floats,
    other: Floats,
    drawn: Mapping[str, Floats],
    other_drawn: Mapping[str, Floats],
    swapped: Floats | None = None,
) -> dict[str, Difference]:
    """Each metric's difference to a counterpart on the same users, in the same order; both sums [U, S].

    drawn, other_drawn: what `resampled` makes of them, with the same weights.

    The interval is the bootstrap's; p too, or with `swapped` [B, U] (see `swaps`) the permutation test's.
    """
    if sums.shape != other.shape:
        raise ValueError(f"not paired: sums {sums.shape} and {other.shape}")
    value = _gaps(task, sums.sum(0), other.sum(0))
    gaps = {name: drawn[name] - other_drawn[name] for name in drawn}
    if swapped is None:
        p = {name: p_value(sample, len(sums)) for name, sample in gaps.items()}
    else:
        chance = _gaps(task, (1 - swapped) @ sums + swapped @ other, swapped @ sums + (1 - swapped) @ other)
        p = {name: permutation_p(float(value[name]), sample, len(sums)) for name, sample in chance.items()}
    return {n: Difference(float(value[n]), *interval(gaps[n]), p[n]) for n in value}


def permutation_p(observed: float, sample: Floats, users: int) -> float:
    """Two-sided p of a difference among those [B] after chance swaps: (1 + #{|d*| >= |d|}) / (B + 1).

    A user's results under the two settings change places or not, which is all that chance could do if the setting made
    no difference; so it holds for metrics that are no mean over users (F1, RMSE) too. Never below 2^(1 - U), the finest
    that U users tell. Rounding is forgiven, since swaps sum in another order.
    """
    as_large = np.abs(sample) >= abs(observed) - 1e-12
    return max((1 + int(as_large.sum())) / (len(sample) + 1), min(1.0, 2.0 ** (1 - users)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected by Holm for all comparisons of one family, in the order given.

    Below .05 is significant with at most 5 % risk of any false finding in the whole family. B resamples cannot get m
    comparisons below m / (B + 1): give many comparisons enough resamples.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    found = np.empty_like(p)
    found[order] = np.minimum(corrected, 1.0)
    return found.tolist()


def _gaps(task: Task, sums: Floats, other: Floats) -> dict[str, Floats]:
    left, right = values(task, sums), values(task, other)
    return {name: left[name] - right[name] for name in left}


def _rng(task: Task, seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(int(digest([seed, task.name, purpose])[:16], 16))
