"""A bag-of-words teacher for news categories: soft labels for many small variants of few labelled texts.

A few hundred labelled articles are too few for a transformer, and enough for TF-IDF and logistic regression. The
language model learns that function from cut, thinned and mixed texts, and each article's own label beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oppu.tasks import task
from oppu.tiny_lm_texts import Document

FOLDS = 5
STRENGTH = 30.0
"""Inverse regularisation of the logistic regression, chosen on the validation users."""


@dataclass(frozen=True)
class Variant:
    """A text and its probabilities over the task's labels, in the table's order."""

    text: str
    target: np.ndarray


def labels() -> list[str]:
    """The categories of LaMP_2N, in the table's order."""
    return task("LaMP_2N").labels or []


def bag_of_words(documents: Sequence[Document]) -> Any:
    """TF-IDF and logistic regression, fitted on texts and titles as separate examples."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = [(text, d.category) for d in documents for text in (d.text, d.title) if text]
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=STRENGTH, max_iter=500))
    return model.fit([text for text, _ in rows], [label for _, label in rows])


def probabilities(model: Any, texts: Sequence[str]) -> np.ndarray:
    """[n, labels] probabilities in the table's order; a label that the model never saw gets none."""
    names = labels()
    found = np.zeros((len(texts), len(names)), dtype=np.float32)
    found[:, [names.index(c) for c in model.classes_]] = model.predict_proba(list(texts))
    return found


def varied(text: str, rng: np.random.Generator) -> str:
    """The text whole, cut to a span, or with words left out."""
    words = text.split()
    kind = rng.random()
    if kind < 0.3 or len(words) < 4:
        return text
    if kind < 0.6:
        size = int(rng.integers(max(3, len(words) // 3), len(words) + 1))
        start = int(rng.integers(0, len(words) - size + 1))
        return " ".join(words[start : start + size])
    kept = rng.random(len(words)) > rng.uniform(0.1, 0.5)
    return " ".join(w for w, keep in zip(words, kept, strict=True) if keep) or text


def mixed(a: str, b: str, rng: np.random.Generator) -> str:
    """A span of one text followed by a span of another."""
    return f"{varied(a, rng)} {varied(b, rng)}"


def _form(document: Document, rng: np.random.Generator) -> str:
    """What stands as the article: mostly the text, sometimes the headline or both."""
    kind = rng.random()
    if not document.title or kind < 0.6:
        return document.text
    return document.title if kind < 0.8 else f"{document.title} {document.text}"


class Teacher:
    """Soft labels: of a labelled document from the fold that did not see it, of any other from all folds' mean."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.labelled = [d for d in documents if d.category]
        self.folds = [
            bag_of_words([d for n, d in enumerate(self.labelled) if n % FOLDS != fold]) for fold in range(FOLDS)
        ]
        counts = np.array([sum(d.category == name for d in self.labelled) for name in labels()], dtype=np.float32)
        self.frequency = (counts + 0.5) / (counts + 0.5).sum()

    def variants(self, number: int, count: int, rng: np.random.Generator) -> list[Variant]:
        """Variants of one labelled document with out-of-fold targets."""
        texts = [varied(_form(self.labelled[number], rng), rng) for _ in range(count)]
        return self._with(probabilities(self.folds[number % FOLDS], texts), texts)

    def unlabelled(self, documents: Sequence[Document], count: int, rng: np.random.Generator) -> list[Variant]:
        """Variants and mixtures of any news texts, with the mean of all folds as targets."""
        texts = []
        for _ in range(count):
            a, b = (_form(documents[int(n)], rng) for n in rng.integers(0, len(documents), 2))
            texts.append(mixed(a, b, rng) if rng.random() < 0.4 else varied(a, rng))
        return self._with(np.mean([probabilities(fold, texts) for fold in self.folds], axis=0), texts)

    @staticmethod
    def _with(targets: np.ndarray, texts: list[str]) -> list[Variant]:
        return [Variant(text, target) for text, target in zip(texts, targets, strict=True)]
