"""Retrieval in training: for every history item the best items before it, by a fresh rank_bm25 each time and by ours.

    python benchmarks/retrieve.py --items 960 --json retrieve.json

The history is made of the sample's own texts. Both sides are timed in turn, and must give the same scores and order.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rank_bm25 import BM25Okapi

from oppu import lamp
from oppu.records import Item
from oppu.retrieval import history_text, prefix_scores, prefix_top_k
from oppu.tasks import Task, task

SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "lamp"


def sample_history(record: Task, items: int) -> list[Item]:
    """The sample's distinct items of a task, by date, as if one user had written them; the first so many."""
    distinct = {item.id: item for question in lamp.read(SAMPLE, record) for item in question.history}
    history = sorted(distinct.values(), key=lambda item: (item.date or "", item.id))
    if len(history) < items:
        sys.exit(f"the sample has {len(history)} items of {record.name}, not {items}; give a lower --items")
    return history[:items]


def fresh_scores(documents: list[str], queries: list[str]) -> list[np.ndarray]:
    tokens = [document.split(" ") for document in documents]
    first = [np.zeros(0)] if documents else []
    return first + [BM25Okapi(tokens[:i]).get_scores(queries[i].split(" ")) for i in range(1, len(documents))]


def ranked(scores: np.ndarray, k: int) -> list[int]:
    """Higher score first, then the more recent."""
    return (len(scores) - 1 - np.argsort(-scores[::-1], kind="stable")[:k]).tolist()


def fresh_top_k(documents: list[str], queries: list[str], k: int) -> list[list[int]]:
    return [ranked(scores, k) for scores in fresh_scores(documents, queries)]


def timed(run: Callable[[], list[list[int]]]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def compare(name: str, items: int, k: int, repeats: int) -> dict[str, object]:
    """Seconds of both sides and the ratio of each pair of runs, taken in turn after one checked run of each."""
    record = task(name)
    history = sample_history(record, items)
    documents = [record.item_text(item) for item in history]
    queries = [history_text(record, item) for item in history]
    expected = fresh_scores(documents, queries)
    scores_equal = all(map(np.array_equal, expected, prefix_scores(documents, queries)))
    order_equal = [ranked(scores, k) for scores in expected] == prefix_top_k(documents, queries, k)
    fresh, ours = [], []
    for _ in range(repeats):
        fresh.append(timed(lambda: fresh_top_k(documents, queries, k)))
        ours.append(timed(lambda: prefix_top_k(documents, queries, k)))
    return {
        "task": name,
        "items": items,
        "k": k,
        "repeats": repeats,
        "words_per_item": sum(len(document.split(" ")) for document in documents) / max(items, 1),
        "seconds": {"rank_bm25": spread(fresh), "ours": spread(ours)},
        "rank_bm25/ours": spread([a / b for a, b in zip(fresh, ours, strict=True)]),
        "same_scores": scores_equal,
        "same_order": order_equal,
        "machine": f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=960, help="length of the history (default 960)")
    parser.add_argument("--task", default="LaMP_4", choices=["LaMP_2N", "LaMP_4", "LaMP_5"], help="texts (LaMP_4)")
    parser.add_argument("--k", type=int, default=4, help="items retrieved for each (default 4)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side, at least 3 (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    options = parser.parse_args()
    if options.items < 1 or options.repeats < 3:
        parser.error("--items must be at least 1 and --repeats at least 3")
    result = compare(options.task, options.items, options.k, options.repeats)
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + "\n")
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if result["same_scores"] and result["same_order"] else 1


if __name__ == "__main__":
    sys.exit(main())
