"""LaMP's metrics, each a function of sums over queries (section 4, Evaluation Metrics).

One query gives a row of statistics (`measure`), rows are summed (`totals`), and a metric is a function of the sums
(`values`), be they numbers or arrays. So one user, all users and a bootstrap resample are the same computation.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oppu.significance import Floats
    from oppu.tasks import Task  # name, kind and labels are all that is read of it

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


def totals(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Queries' statistics summed, [S]: the number of queries first, then by kind as `values` takes them apart."""
    return [float(len(rows)), *map(float, _TOTALS[task.kind](task, rows))]


def values(task: Task, sums: Floats | list[float]) -> dict[str, Any]:
    """The task's metrics, by their names in tables, of totals [S] or an array [..., S] of them; shape [...] each."""
    return dict(zip(columns(task), _VALUES[task.kind](*_parts(sums)), strict=True))


def user_values(task: Task, sums: Floats) -> dict[str, Any]:
    """Metrics of each user from per-user sums [U, S]; shape [U] each.

    A single user's macro F1 is the mean over the labels that occur among that user's golds or predictions: over all
    labels, one who writes about a single category could not pass 1/15.
    """
    found = values(task, sums)
    if task.kind == "classification":
        f1, occurs = _label_f1(_parts(sums)[1:])
        count = sum(occurs)
        found["f1"] = sum(f1) / (count + (count == 0))
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


def _parts(sums: Any) -> list[Any]:
    """The S totals one by one: numbers, or arrays [...]."""
    return sums if isinstance(sums, list) else [sums[..., place] for place in range(sums.shape[-1])]


def _classification_totals(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """For each of the L labels: true positives; golds; predictions (nothing for -1). [3L]"""
    hits, gold, predicted = ([0] * len(task.labels or []) for _ in range(3))
    for row in rows:
        gold[row["gold_label"]] += 1
        hits[row["gold_label"]] += row["correct"]
        if row["predicted_label"] >= 0:
            predicted[row["predicted_label"]] += 1
    return hits + gold + predicted


def _rating_totals(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [math.fsum(abs(row["error"]) for row in rows), math.fsum(row["error"] ** 2 for row in rows)]


def _generation_totals(task: Task, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [math.fsum(row[name] for row in rows) for name in ("rouge1", "rougeL")]


def _label_f1(counts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """F1 of each label, 0 where it does not occur; and whether it occurs as gold or prediction."""
    labels = len(counts) // 3
    hits, both = counts[:labels], [counts[labels + n] + counts[2 * labels + n] for n in range(labels)]
    return [2 * h / (b + (b == 0)) for h, b in zip(hits, both, strict=True)], [b > 0 for b in both]


def _classification_values(queries: Any, *counts: Any) -> tuple[Any, Any]:
    f1, _ = _label_f1(counts)
    return sum(counts[: len(f1)]) / queries, sum(f1) / len(f1)


def _rating_values(queries: Any, absolute: Any, squared: Any) -> tuple[Any, Any]:
    return absolute / queries, (squared / queries) ** 0.5


def _generation_values(queries: Any, rouge1: Any, rouge_l: Any) -> tuple[Any, Any]:
    return rouge1 / queries, rouge_l / queries


_MEASURE: dict[str, Callable[[Task, str, str], dict[str, Any]]] = {
    "classification": _classification,
    "rating": _rating,
    "generation": _generation,
}
_TOTALS: dict[str, Callable[[Task, Sequence[Mapping[str, Any]]], Sequence[float]]] = {
    "classification": _classification_totals,
    "rating": _rating_totals,
    "generation": _generation_totals,
}
_VALUES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "classification": _classification_values,
    "rating": _rating_values,
    "generation": _generation_values,
}
