"""Where the embeddings start: words that stand together are near each other, labels near the words of their articles.

From random embeddings the few labelled articles taught nothing but the commonest category within the minutes there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from oppu.tiny_lm_texts import Document

WINDOW = 24
NEWS_COPIES = 4
LENGTH = 0.4
"""Norm of an embedding at the start: some one and a half times that of the random ones."""


def topical_vectors(documents: Sequence[Document], tokenizer: Any, width: int, seed: int) -> np.ndarray:
    """[vocabulary, width] vectors by latent semantic analysis of short windows of the texts."""
    from scipy.sparse import csr_matrix
    from sklearn.utils.extmath import randomized_svd

    texts = [f" {d.title} {d.text} {f'{d.category} ' * 2}".rstrip() for d in documents]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    windows: list[list[int]] = []
    for document, ids in zip(documents, encoded, strict=True):
        if document.source == "news":
            windows += [sorted(set(ids))] * NEWS_COPIES
        else:
            windows += [sorted(set(ids[start : start + WINDOW])) for start in range(0, len(ids), WINDOW)]
    columns = np.concatenate(windows)
    ends = np.cumsum([0, *map(len, windows)])
    count = np.bincount(columns, minlength=len(tokenizer))
    values = np.log((1 + len(windows)) / (1 + count))[columns] / np.sqrt(np.repeat(np.diff(ends), np.diff(ends)))
    matrix = csr_matrix((values, columns, ends), shape=(len(windows), len(tokenizer)))
    # The first direction is how frequent a word is, which the norm of the vectors should not say.
    _, sizes, words = randomized_svd(matrix, min(width + 1, len(tokenizer) - 1), n_iter=3, random_state=seed)
    vectors = np.zeros((len(tokenizer), width), dtype=np.float32)
    vectors[:, : len(sizes) - 1] = (words[1:] * np.sqrt(sizes[1:])[:, None]).T
    noise = np.random.default_rng([seed, 3]).normal(size=vectors.shape).astype(np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    mixed = np.where(norms > 1e-6, vectors / np.maximum(norms, 1e-6), 0) + 0.3 * noise / np.sqrt(width)
    return (LENGTH * mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)
