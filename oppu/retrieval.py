"""Retrieval: R(q, H, k) of section 2.2 by BM25, also over the past alone (H^{<t} of section 3), and random items.

Beyond the paper: the newest items (recency), and the nearest by an encoder's vectors (dense).

Documents and queries are split at single spaces and keep their case. Scores are rank_bm25's BM25Okapi (k1 1.5, b .75,
epsilon .25). What rank_bm25 leaves open is fixed here: the higher score comes first, then the more recent document;
an empty corpus gives nothing; k beyond the corpus gives all of it, and so also what shares no word with the query.
Scores may be zero or negative (a word in over half of the documents gets epsilon times the average idf, which near
duplicates make negative): they rank as they stand. An empty text is one empty word, as `str.split(" ")` has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from rank_bm25 import BM25Okapi

from oppu.files import digest
from oppu.records import Item, Query
from oppu.setting import Augmentation
from oppu.tasks import Task, fields_of, render

K1, B, EPSILON = 1.5, 0.75, 0.25


def _best(scores: np.ndarray, k: int) -> list[int]:
    """The k highest scores' places, best first; among equals the last place first."""
    n = len(scores)
    if k <= 0 or n == 0:
        return []
    least = np.partition(scores, n - k)[n - k] if k < n else -np.inf
    places = (scores >= least).nonzero()[0][::-1]
    return places[(-scores[places]).argsort(kind="stable")][:k].tolist()


class Index:
    """A BM25 index over a whole history, built once for many queries."""

    def __init__(self, documents: Sequence[str]) -> None:
        self._bm25 = BM25Okapi([d.split(" ") for d in documents], k1=K1, b=B, epsilon=EPSILON) if documents else None

    def top_k(self, query: str, k: int) -> list[int]:
        """The k best documents' places, best first."""
        return _best(self._bm25.get_scores(query.split(" ")), k) if self._bm25 is not None and k > 0 else []


def top_k(documents: Sequence[str], query: str, k: int) -> list[int]:
    """The k documents that fit a query best, as places in `documents`, best first."""
    return Index(documents).top_k(query, k)


class _Postings:
    """For each word, in order of its first appearance: the documents that have it, ascending, and how often."""

    def __init__(self, documents: Sequence[str]) -> None:
        texts = [document.split(" ") for document in documents]
        self.number: dict[str, int] = {}
        words: list[int] = []
        tally: list[int] = []
        bounds = [0]
        for text in texts:
            counts: dict[int, int] = {}
            for token in text:
                word = self.number.setdefault(token, len(self.number))
                counts[word] = counts.get(word, 0) + 1
            words.extend(counts)
            tally.extend(counts.values())
            bounds.append(len(words))
        self.words = np.array(words, dtype=np.int64)
        self.bounds = bounds
        by_word = np.argsort(self.words, kind="stable")
        self.documents = np.repeat(np.arange(len(texts)), np.diff(bounds))[by_word]
        self.times = np.array(tally, dtype=np.int64)[by_word]
        self.starts = np.searchsorted(self.words[by_word], np.arange(len(self.number)))
        self.lengths = np.array([len(text) for text in texts], dtype=np.int64)


def prefix_scores(documents: Sequence[str], queries: Sequence[str]) -> Iterator[np.ndarray]:
    """For query i the scores of documents 0 … i-1, bit for bit those of a fresh BM25Okapi over just these.

    Floating sums are not associative, so the order of rank_bm25's operations is kept: logarithms by `math.log`, the
    average idf summed one by one in order of first appearance, a document's score summed in order of the query's
    words. Words that a document lacks add a zero there and are left out here.
    """
    past = _Postings(documents)
    logs = np.array([math.log(n + 0.5) for n in range(len(documents) + 1)])
    frequency = np.zeros(len(past.number), dtype=np.int64)
    seen, tokens = 0, 0
    for i, query in enumerate(queries):
        idf_of = logs[i::-1] - logs[: i + 1]
        words = np.array([w for w in map(past.number.get, query.split(" ")) if w is not None and w < seen], dtype=int)
        idf = idf_of[frequency[words]]
        if (common := idf < 0).any():
            total = np.add.accumulate(idf_of.take(frequency[:seen]))[-1]
            idf[common] = EPSILON * (total / seen)
        norm = K1 * (1 - B + B * past.lengths[:i] / (tokens / i)) if i else np.zeros(0)
        yield _summed(past, words, frequency[words], idf, norm)
        new = past.words[past.bounds[i] : past.bounds[i + 1]]
        frequency[new] += 1
        seen, tokens = max(seen, int(new.max()) + 1), tokens + int(past.lengths[i])


def _summed(past: _Postings, words: np.ndarray, counts: np.ndarray, idf: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """BM25 scores from the first `counts` postings of each word; bincount adds one by one, in order."""
    ends = counts.cumsum()
    places = (past.starts[words] - ends + counts).repeat(counts) + np.arange(ends[-1] if len(ends) else 0)
    documents, times = past.documents.take(places), past.times.take(places)
    parts = idf.repeat(counts) * (times * (K1 + 1) / (times + norm.take(documents)))
    return np.bincount(documents, weights=parts, minlength=len(norm)).astype(np.float64, copy=False)


def prefix_top_k(documents: Sequence[str], queries: Sequence[str], k: int) -> list[list[int]]:
    """For query i the k best among documents 0 … i-1, best first: what `top_k(documents[:i], queries[i], k)` gives.

    One pass over the history, where a fresh index for each item would be quadratic in it.
    """
    if len(documents) != len(queries):
        raise ValueError(f"{len(documents)} documents, {len(queries)} queries: one query for each document is needed")
    if k <= 0:
        return [[] for _ in queries]
    return [_best(scores, k) for scores in prefix_scores(documents, queries)]


@dataclass(frozen=True)
class Draws:
    """Where random items come from: the run's seed, the user, and the pool; without a pool, the user's own past."""

    seed: int
    user: str
    pool: Sequence[Item] | None = None


def random_item(
    pool: Sequence[Item], seed: int, task: str, user_key: str, purpose: str, never: Sequence[Item] = ()
) -> Item | None:
    """One item of a pool (App. D), drawn by sha256 of (seed, task, user, purpose): it depends on no other user.

    An item with the same fields as one of `never` is passed over for the next in the pool. None if nothing is left.
    """
    first = int(digest([seed, task, user_key, purpose]), 16) % len(pool) if pool else 0
    for n in range(len(pool)):
        item = pool[(first + n) % len(pool)]
        if all(item.fields != other.fields for other in never):
            return item
    return None


def _draw(
    task: Task, draws: Draws | None, own: Sequence[Item], purpose: str, never: Sequence[Item]
) -> tuple[Item, ...]:
    if draws is None:
        raise ValueError("augmentation 'random' needs the run's seed, the user and the pool (Draws)")
    pool = own if draws.pool is None else draws.pool
    item = random_item(pool, draws.seed, task.name, draws.user, purpose, never)
    return () if item is None else (item,)


@dataclass(frozen=True)
class Search:
    """How items are searched: with what, and for dense retrieval by whose vectors.

    `encode` gives one vector of length 1 for each text: [n, d].
    """

    query: Literal["prompt", "text"] = "prompt"
    encode: Callable[[Sequence[str]], np.ndarray] | None = field(default=None, compare=False)


BM25 = Search()


def _searched(task: Task, parts: dict[str, str], query: str) -> str:
    template = task.retrieval_query or (task.prompt if query == "prompt" else None)
    if template is None:
        return " ".join(parts[name] for name in fields_of(task.prompt))
    return render(template, {name: parts[name] for name in fields_of(template) if name in parts})


def query_text(task: Task, query: Query, how: str = "prompt") -> str:
    """What is searched for a query: phi_t, the base prompt, or the task's own `retrieval_query`.

    With `how` "text" it is the query's own text alone, without instruction and labels.
    """
    return _searched(task, task.read(query.input), how)


def history_text(task: Task, item: Item, how: str = "prompt") -> str:
    """What is searched for a history item in training: as for a query, of its x; a plain item's own text."""
    return _searched(task, task.item_fields(item), how) if task.pair else task.item_text(item)


def retrieve_for_history(
    task: Task,
    history: Sequence[Item],
    augmentation: Augmentation,
    draws: Draws | None = None,
    search: Search = BM25,
) -> list[tuple[Item, ...]]:
    """For each item of a history the items that its training prompt carries, best first (D_u^{<t} of section 3).

    Only what stands before the item in the history is retrieved. A random item is never the item at hand nor a later
    one, not even by a copy of it in another user's history. `draws` is needed for augmentation `random` only.
    """
    if augmentation.random:
        return [_draw(task, draws, history[:i], f"history/{i}", history[i:]) for i in range(len(history))]
    if augmentation.k == 0:
        return [()] * len(history)
    documents = [task.item_text(item) for item in history]
    queries = [history_text(task, item, search.query) for item in history]
    if augmentation.retriever == "recency":
        found = [list(range(i)[::-1][: augmentation.k]) for i in range(len(history))]
    elif augmentation.retriever == "dense":
        scores = _cosines(search, queries, documents)
        found = [_best(scores[i, :i], augmentation.k) for i in range(len(history))]
    else:
        found = prefix_top_k(documents, queries, augmentation.k)
    return [tuple(history[place] for place in places) for places in found]


def _cosines(search: Search, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
    """Cosines [queries, documents] of the encoder's vectors."""
    if search.encode is None:
        raise ValueError("dense retrieval needs an encoder (Search.encode)")
    if not queries or not documents:
        return np.zeros((len(queries), len(documents)))
    return search.encode(queries) @ search.encode(documents).T


def retrieve_for_queries(
    task: Task,
    history: Sequence[Item],
    queries: Sequence[Query],
    augmentation: Augmentation,
    draws: Draws | None = None,
    search: Search = BM25,
) -> list[tuple[Item, ...]]:
    """For each query the items that its prompt carries, best first: D_u of section 2.2, from the whole history."""
    if augmentation.random:
        return [_draw(task, draws, history, f"query/{query.id}", ()) for query in queries]
    if augmentation.k == 0:
        return [()] * len(queries)
    texts = [query_text(task, query, search.query) for query in queries]
    documents = [task.item_text(item) for item in history]
    if augmentation.retriever == "recency":
        found = [list(range(len(history))[::-1][: augmentation.k])] * len(queries)
    elif augmentation.retriever == "dense":
        found = [_best(row, augmentation.k) for row in _cosines(search, texts, documents)]
    else:
        index = Index(documents)
        found = [index.top_k(text, augmentation.k) for text in texts]
    return [tuple(history[place] for place in places) for places in found]
