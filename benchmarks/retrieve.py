"""Retrieval in training: for every history item the best items before it, by a fresh rank_bm25 each time and by ours.

    python benchmarks/retrieve.py --items 50 200 960 2000 --json retrieve.json

The histories are made of the sample's own texts, and of their words drawn anew where the sample has too few. Both
sides are timed in turn, and must give the same scores, to the bit, and the same order; else the script exits with 1.
The ratio without a size is that of 960 items (the mean history of LaMP_3), or of the largest size given.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
from common import ROOT, Spread, finish, interleaved, parser, ratio, show, spread
from rank_bm25 import BM25Okapi

from oppu import lamp
from oppu.records import Item
from oppu.retrieval import history_text, prefix_scores, prefix_top_k
from oppu.tasks import Task, task

NAME = "rank_bm25/ours"
TYPICAL = 960


def sample_history(record: Task, items: int) -> list[Item]:
    """The sample's distinct items of a task, by date, as if one user had written them, and made-up ones behind."""
    distinct = {item.id: item for question in lamp.read(ROOT / "data/sample/lamp", record) for item in question.history}
    history = sorted(distinct.values(), key=lambda item: (item.date or "", item.id))
    return history[:items] + made_up(record, history, items - len(history))


def made_up(record: Task, source: list[Item], items: int) -> list[Item]:
    """Items with words drawn from the source's, each as long as some item of it; the same ones each time."""
    draw = random.Random(0)
    words = {name: [word for item in source for word in item.fields[name].split(" ")] for name in record.history}
    made = []
    for number in range(items):
        like = draw.choice(source).fields
        fields = {name: " ".join(draw.choices(words[name], k=len(like[name].split(" ")))) for name in record.history}
        made.append(Item(f"made-up-{number}", None, fields))
    return made


def fresh_scores(documents: list[str], queries: list[str]) -> list[np.ndarray]:
    tokens = [document.split(" ") for document in documents]
    first = [np.zeros(0)] if documents else []
    return first + [BM25Okapi(tokens[:i]).get_scores(queries[i].split(" ")) for i in range(1, len(documents))]


def ranked(scores: np.ndarray, k: int) -> list[int]:
    """Higher score first, then the more recent."""
    return (len(scores) - 1 - np.argsort(-scores[::-1], kind="stable")[:k]).tolist()


def fresh_top_k(documents: list[str], queries: list[str], k: int) -> list[list[int]]:
    return [ranked(scores, k) for scores in fresh_scores(documents, queries)]


def compare(record: Task, items: int, k: int, repeats: int) -> dict[str, Any]:
    """Seconds of both sides and the ratio of each pair of runs, after one checked run of each."""
    history = sample_history(record, items)
    documents = [record.item_text(item) for item in history]
    queries = [history_text(record, item) for item in history]
    expected = fresh_scores(documents, queries)
    seconds = interleaved(
        {
            "rank_bm25": lambda: fresh_top_k(documents, queries, k),
            "ours": lambda: prefix_top_k(documents, queries, k),
        },
        repeats,
        warm=False,
    )
    return {
        "items": items,
        "words_per_item": sum(len(document.split(" ")) for document in documents) / items,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        NAME: ratio(seconds["rank_bm25"], seconds["ours"]),
        "same_scores": all(map(np.array_equal, expected, prefix_scores(documents, queries))),
        "same_order": [ranked(scores, k) for scores in expected] == prefix_top_k(documents, queries, k),
    }


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--items", type=int, nargs="+", default=[50, 200, 960, 2000], help="lengths of the history (50 200 960 2000)"
    )
    arguments.add_argument("--task", default="LaMP_4", choices=["LaMP_2N", "LaMP_4", "LaMP_5"], help="texts (LaMP_4)")
    arguments.add_argument("--k", type=int, default=4, help="items retrieved for each (4)")
    options = arguments.parse_args()
    if min(options.items) < 1:
        arguments.error("--items must be at least 1")
    sizes = [compare(task(options.task), items, options.k, options.repeats) for items in options.items]
    same = all(size["same_scores"] and size["same_order"] for size in sizes)
    show(
        ["items", "words per item", "same scores", "same order"],
        [[size["items"], size["words_per_item"], size["same_scores"], size["same_order"]] for size in sizes],
    )
    typical = next((size for size in sizes if size["items"] == TYPICAL), max(sizes, key=lambda size: size["items"]))
    ratios: dict[str, Spread] = {NAME: typical[NAME]}
    ratios |= {f"{NAME} at {size['items']}": size[NAME] for size in sizes}
    seconds = {f"{name} at {s['items']}": figure for s in sizes for name, figure in s["seconds"].items()}
    finish(options, seconds, ratios, sizes=sizes)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
