"""LaMP's metrics, each a function of sums over queries (section 4, Evaluation Metrics).

One query gives a row of statistics (`measure`), the row becomes a vector (`vectors`), vectors are summed, and a metric
is a function of the sum (`values`). So one user, all users and a bootstrap resample of users are the same computation.

Where LaMP's own evaluation leaves a choice, ours is:
- classification: predictions are stripped and must equal a label; any other text is wrong, whatever the gold is.
  Macro F1 is the mean over *all* labels of the task; a label that neither occurs nor is predicted counts as 0.
- rating: a prediction that is no number, or off by a million and more, becomes the farther of 1 and 5 from the gold
  (5 for a gold of 3); any other number outside 1 to 5 stays what it is.
- generation: F-measures of ROUGE-1 and ROUGE-L without stemming, as LaMP's evaluation leaves the default of Hugging
  Face's `rouge`; plain means instead of its BootstrapAggregator, which is random in the third digit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from oppu.tasks import Task  # name, kind and labels are all that is read of it

Floats = NDArray[np.float64]

METRICS = {"classification": ("accuracy", "f1"), "rating": ("MAE", "RMSE"), "generation": ("rouge-1", "rouge-L")}
"""Kind of task -> LaMP's names of its two metrics."""
COLUMN = {"accuracy": "accuracy", "f1": "f1", "MAE": "mae", "RMSE": "rmse", "rouge-1": "rouge1", "rouge-L": "rougeL"}
"""LaMP's metric name -> the name in our tables and in the paper's CSV."""

LOWER_IS_BETTER = frozenset({"mae", "rmse"})


def columns(task: Task) -> tuple[str, str]:
    """The task's two metrics by their names in tables."""
    first, second = METRICS[task.kind]
    return COLUMN[first], COLUMN[second]


def better(metric: str) -> str:
    """`higher` or `lower`: which values of a metric (by its name in tables) are better."""
    return "lower" if metric in LOWER_IS_BETTER else "higher"


def measure(task: Task, gold: str, prediction: str) -> dict[str, Any]:
    """One query's statistics.

    classification: gold_label, predicted_label (index, -1 for a text that is no label), correct;
    rating: error (predicted minus gold), readable; generation: rouge1, rougeL.
    Raises ValueError where the gold itself is no label or no rating.
    """
    return _MEASURE[task.kind](task, gold.strip(), prediction.strip())


def vectors(task: Task, rows: Mapping[str, Any]) -> Floats:
    """Columns of statistics, each of length Q, as vectors [Q, S] that may be summed over queries."""
    return _VECTORS[task.kind](task, {name: np.asarray(column) for name, column in rows.items()})


def values(task: Task, sums: Floats) -> dict[str, Floats]:
    """The task's metrics, by their names in tables, of sums of shape [..., S]; shape [...] each."""
    return dict(zip(columns(task), _VALUES[task.kind](sums), strict=True))


def user_values(task: Task, sums: Floats) -> dict[str, Floats]:
    """Metrics of each user from per-user sums [U, S]; shape [U] each.

    A single user's macro F1 is the mean over the labels that occur among that user's golds or predictions: over all
    labels, one who writes about a single category could not pass 1/15.
    """
    found = values(task, sums)
    if task.kind == "classification":
        f1, occurs = _label_f1(sums)
        found["f1"] = f1.sum(-1) / np.maximum(occurs.sum(-1), 1)
    return found


def rating_of(prediction: str, gold: float) -> tuple[float, bool]:
    """The rating that a prediction stands for, and whether it could be read."""
    try:
        rating = float(prediction)
    except ValueError:
        rating = math.nan
    if abs(rating - gold) < 1e6:  # false for nan too
        return rating, True
    return (1.0 if abs(1 - gold) > abs(5 - gold) else 5.0), False


def _classification(task: Task, gold: str, prediction: str) -> dict[str, Any]:
    labels = task.labels or []
    if gold not in labels:
        raise ValueError(f"the gold is not among the labels of {task.name} in tasks.yaml")
    predicted = labels.index(prediction) if prediction in labels else -1
    return {
        "gold_label": labels.index(gold),
        "predicted_label": predicted,
        "correct": predicted == labels.index(gold),
    }


def _rating(task: Task, gold: str, prediction: str) -> dict[str, Any]:
    if gold not in (task.labels or []):
        raise ValueError(f"the gold is not among the ratings of {task.name} in tasks.yaml")
    rating, readable = rating_of(prediction, float(gold))
    return {"error": rating - float(gold), "readable": readable}


def _generation(task: Task, gold: str, prediction: str) -> dict[str, Any]:
    found = _scorer().score(gold, prediction)
    return {"rouge1": found["rouge1"].fmeasure, "rougeL": found["rougeL"].fmeasure}


@lru_cache
def _scorer() -> Any:
    with _hidden("scipy", "sklearn", "matplotlib"):
        from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Packages that are not imported yet look as if they were not installed.

    rouge_score imports all of nltk for a stemmer that is not used here, and nltk whatever it can do without: two of
    three seconds.
    """
    names = [name for name in packages if name not in sys.modules]
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _classification_vectors(task: Task, rows: Mapping[str, NDArray[Any]]) -> Floats:
    """[Q, 1 + 3L]: 1, then one-hot over the L labels: true positives, golds, predictions (nothing for -1)."""
    labels = np.arange(len(task.labels or []))
    gold = rows["gold_label"][:, None] == labels
    predicted = rows["predicted_label"][:, None] == labels
    ones = np.ones((len(gold), 1), dtype=bool)
    return np.concatenate([ones, gold & predicted, gold, predicted], axis=1).astype(np.float64)


def _rating_vectors(task: Task, rows: Mapping[str, NDArray[Any]]) -> Floats:
    error = rows["error"].astype(np.float64)
    return np.stack([np.ones_like(error), np.abs(error), error * error], axis=1)


def _generation_vectors(task: Task, rows: Mapping[str, NDArray[Any]]) -> Floats:
    rouge1 = rows["rouge1"].astype(np.float64)
    return np.stack([np.ones_like(rouge1), rouge1, rows["rougeL"].astype(np.float64)], axis=1)


def _label_f1(sums: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """F1 of each label, [..., L], 0 where it does not occur; and whether it occurs as gold or prediction."""
    hits, gold, predicted = np.split(sums[..., 1:], 3, axis=-1)
    both = gold + predicted
    return 2 * hits / np.maximum(both, 1), both > 0


def _classification_values(sums: Floats) -> tuple[Floats, Floats]:
    labels = (sums.shape[-1] - 1) // 3
    accuracy = sums[..., 1 : 1 + labels].sum(-1) / sums[..., 0]
    return accuracy, _label_f1(sums)[0].mean(-1)


def _rating_values(sums: Floats) -> tuple[Floats, Floats]:
    return sums[..., 1] / sums[..., 0], np.sqrt(sums[..., 2] / sums[..., 0])


def _generation_values(sums: Floats) -> tuple[Floats, Floats]:
    return sums[..., 1] / sums[..., 0], sums[..., 2] / sums[..., 0]


_MEASURE: dict[str, Callable[[Task, str, str], dict[str, Any]]] = {
    "classification": _classification,
    "rating": _rating,
    "generation": _generation,
}
_VECTORS: dict[str, Callable[[Task, Mapping[str, NDArray[Any]]], Floats]] = {
    "classification": _classification_vectors,
    "rating": _rating_vectors,
    "generation": _generation_vectors,
}
_VALUES: dict[str, Callable[[Floats], tuple[Floats, Floats]]] = {
    "classification": _classification_values,
    "rating": _rating_values,
    "generation": _generation_values,
}
