"""The tiny language model's lessons: plain texts and the seven instruction formats, with and without context.

A lesson is a group of exchanges that share the beginning of their prompts (a profile, retrieved items, the
instruction), so that a packed row carries that beginning once. Users are made up from the corpus: a news user prefers
one category as real journalists do, so that a retrieved label or a profile really tells something about the answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from oppu.profiles import extractive
from oppu.prompts import Prompt
from oppu.records import Item
from oppu.tasks import task
from oppu.tiny_lm_teacher import Teacher, Variant, labels
from oppu.tiny_lm_texts import Document

USER_PRIOR = 0.4
"""Pseudo-counts of the global label mix: one retrieved label gets .72, and its global share of the rest."""
PROFILE_COUNTS = 1.6
"""How many retrieved labels a profile's most popular category is worth."""
OWN_LABEL = 0.4
"""Share of the article's own label in its target; the rest is the teacher's."""
TAGS = {
    "politics": "social commentary",
    "entertainment": "comedy",
    "crime": "violence",
    "travel": "classic",
    "business": "true story",
    "science & technology": "sci-fi",
    "women": "romance",
    "sports": "action",
    "education": "psychology",
    "religion": "thought-provoking",
}
"""Made-up tags, so that LaMP_2M's format is known; they say nothing about films."""


@dataclass(frozen=True)
class Exchange:
    """A prompt and its answer; `target` are probabilities of the answer's label, where the answer is one.

    A plain text has an empty prompt and is learned whole.
    """

    prompt: str
    answer: str
    target: np.ndarray | None = None


Lesson = list[Exchange]
Style = Callable[[str], str]


def _sentence_case(text: str) -> str:
    return text[:1].upper() + text[1:].lower()


STYLES: dict[str, Style] = {"Title Case": str.title, "Sentence case": _sentence_case, "lower case": str.lower}


def neighbours(texts: Sequence[str], count: int) -> np.ndarray:
    """[n, count] numbers of each text's nearest others by TF-IDF cosine, nearest first."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    matrix = TfidfVectorizer(sublinear_tf=True, stop_words="english", max_df=0.2).fit_transform(texts)
    found = np.zeros((len(texts), count), dtype=np.int64)
    for start in range(0, len(texts), 512):
        scores = (matrix[start : start + 512] @ matrix.T).toarray()
        scores[np.arange(len(scores)), np.arange(start, start + len(scores))] = -1.0
        best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
        found[start : start + len(scores)] = np.take_along_axis(best, order, 1)
    return found


class Lessons:
    """Draws lessons. Everything that is drawn comes from the generator that is passed in."""

    def __init__(self, documents: Sequence[Document], seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        self.news = [d for d in documents if d.source == "news"]
        self.papers = [d for d in documents if d.source == "acl" and d.title]
        self.headlines = [d for d in self.news if d.title]
        self.teacher = Teacher(self.news)
        self.labelled = self.teacher.labelled
        self.variants = [self.teacher.variants(n, 30, rng) for n in range(len(self.labelled))]
        self.unlabelled = self.teacher.unlabelled(self.news, 20000, rng)
        self.near_papers = neighbours([f"{d.title} {d.text}" for d in self.papers], 8)
        self.near_headlines = neighbours([f"{d.title} {d.text}" for d in self.headlines], 8)
        self.near_labelled = neighbours([d.text for d in self.labelled], len(self.labelled) - 1)
        numbers = {name: [n for n, d in enumerate(self.labelled) if d.category == name] for name in labels()}
        self.by_label = {name: found for name, found in numbers.items() if found}

    # --- plain texts -------------------------------------------------------------------------------------------

    def plain_news(self, rng: np.random.Generator) -> Lesson:
        """A few articles, as headline and text or text alone."""
        chosen = [self.news[int(n)] for n in rng.integers(0, len(self.news), 4)]
        return [Exchange("", f"{d.title}\n{d.text}" if d.title and rng.random() < 0.7 else d.text) for d in chosen]

    def plain_paper(self, rng: np.random.Generator) -> Lesson:
        """One abstract under its title."""
        d = self.papers[int(rng.integers(0, len(self.papers)))]
        return [Exchange("", f"{d.title}\n{d.text}")]

    # --- LaMP_2N ------------------------------------------------------------------------------------------------

    def category(self, rng: np.random.Generator) -> Lesson:
        """Articles to categorise without any context: own labels beside the teacher's."""
        return [self._category_of(rng) for _ in range(10)]

    def _category_of(self, rng: np.random.Generator) -> Exchange:
        if rng.random() < 0.5:
            return self._ask(self.unlabelled[int(rng.integers(0, len(self.unlabelled)))], None, (), None, rng)
        # Rare labels more often than they are, or politics is nearly all that is seen.
        names = list(self.by_label)
        share = np.array([len(self.by_label[name]) for name in names]) ** 0.8
        name = names[int(rng.choice(len(names), p=share / share.sum()))]
        number = int(rng.choice(self.by_label[name]))
        return self._ask(self._variant(number, rng), name, (), None, rng)

    def _variant(self, number: int, rng: np.random.Generator) -> Variant:
        return self.variants[number][int(rng.integers(0, len(self.variants[number])))]

    def _ask(
        self,
        variant: Variant,
        label: str | None,
        items: tuple[Item, ...],
        popular: str | None,
        rng: np.random.Generator,
    ) -> Exchange:
        """One question of LaMP_2N; its target joins teacher, own label and what the context says about the user."""
        names = labels()
        target = variant.target.copy()
        if items or popular:
            target = target * self._prior(items, popular) / self.teacher.frequency
            target /= target.sum()
        if label is not None:
            share = OWN_LABEL * (0.6 if items or popular else 1.0)
            target = (1 - share) * target + share * (np.arange(len(names)) == names.index(label))
        said = f"most popular category: {popular}" if popular else None
        prompt = Prompt(task("LaMP_2N"), {"article": variant.text}, items, said)
        answer = names[int(rng.choice(len(names), p=target / target.sum()))] if label is None else label
        return Exchange(str(prompt), answer, target.astype(np.float32))

    def _prior(self, items: tuple[Item, ...], popular: str | None) -> np.ndarray:
        names = labels()
        counts = USER_PRIOR * self.teacher.frequency
        for item in items:
            counts = counts + (np.arange(len(names)) == names.index(item.fields["category"]))
        if popular:
            counts = counts + PROFILE_COUNTS * (np.arange(len(names)) == names.index(popular))
        return counts / counts.sum()

    def category_user(self, rng: np.random.Generator) -> Lesson:
        """Articles of a made-up journalist, with a profile, retrieved items, or both."""
        names = list(self.by_label)
        mix = np.array([len(self.by_label[name]) for name in names]) ** 0.4
        favourite, share = int(rng.choice(len(names), p=mix / mix.sum())), rng.uniform(0.5, 1.0)
        chances = (1 - share) * mix / mix.sum() + share * (np.arange(len(names)) == favourite)
        drawn = [int(rng.choice(self.by_label[names[int(c)]])) for c in rng.choice(len(names), 32, p=chances)]
        history, asked = drawn[:24], [n for n in drawn[24:] if n not in drawn[:24]]
        if not asked:
            return self.category(rng)
        popular = Counter(self.labelled[n].category for n in history).most_common(1)[0][0]
        k, with_profile = [(0, True), (1, False), (1, True), (2, False), (4, False)][
            int(rng.choice(5, p=[0.35, 0.4, 0.08, 0.1, 0.07]))
        ]
        items = tuple(self._news_item(n) for n in self._retrieved(asked[0], history, k, rng))
        return [
            self._ask(self._variant(n, rng), self.labelled[n].category, items, popular if with_profile else None, rng)
            for n in asked
        ]

    def _retrieved(self, asked: int, history: list[int], k: int, rng: np.random.Generator) -> list[int]:
        if rng.random() < 0.3:
            return [int(n) for n in rng.permutation(history)[:k]]
        own = set(history)
        return [int(n) for n in self.near_labelled[asked] if int(n) in own][:k]

    def _news_item(self, number: int) -> Item:
        d = self.labelled[number]
        return Item("", None, {"text": d.text, "title": d.title, "category": d.category})

    # --- LaMP_4 and LaMP_5 --------------------------------------------------------------------------------------

    def headline(self, rng: np.random.Generator) -> Lesson:
        """Headlines from texts, without context."""
        chosen = [self.headlines[int(n)] for n in rng.integers(0, len(self.headlines), 6)]
        return [Exchange(str(Prompt(task("LaMP_4"), {"article": d.text})), d.title) for d in chosen]

    def title(self, rng: np.random.Generator) -> Lesson:
        """A paper's title from its abstract, without context."""
        d = self.papers[int(rng.integers(0, len(self.papers)))]
        return [Exchange(str(Prompt(task("LaMP_5"), {"abstract": _first(d.text, 200)})), d.title)]

    def headline_user(self, rng: np.random.Generator) -> Lesson:
        """A headline in the style of retrieved ones or of a profile."""
        return self._titled("LaMP_4", self.headlines, self.near_headlines, "article", "text", 60, rng)

    def title_user(self, rng: np.random.Generator) -> Lesson:
        """A paper's title in the style of retrieved ones or of a profile."""
        return self._titled("LaMP_5", self.papers, self.near_papers, "abstract", "abstract", 120, rng)

    def _titled(
        self,
        name: str,
        documents: list[Document],
        near: np.ndarray,
        asked: str,
        field: str,
        words: int,
        rng: np.random.Generator,
    ) -> Lesson:
        number = int(rng.integers(0, len(documents)))
        d, others = documents[number], [documents[int(n)] for n in near[number]]
        style = STYLES[str(rng.choice(list(STYLES)))] if rng.random() < 0.4 else str
        k = int(rng.choice([0, 1, 2, 4], p=[0.3, 0.4, 0.2, 0.1]))
        history = tuple(Item("", None, {field: _first(o.text, words), "title": style(o.title)}) for o in others)
        said = extractive(task(name), history) if k == 0 or rng.random() < 0.2 else None
        prompt = Prompt(task(name), {asked: _first(d.text, 200)}, history[:k], said)
        return [Exchange(str(prompt), style(d.title))]

    # --- the other formats, from made-up answers ------------------------------------------------------------------

    def citation(self, rng: np.random.Generator) -> Lesson:
        """LaMP_1: which of two titles is nearer to the paper."""
        number = int(rng.integers(0, len(self.papers)))
        near, far = int(self.near_papers[number][0]), int(rng.integers(0, len(self.papers)))
        right = int(rng.integers(0, 2))
        options = [self.papers[near].title, self.papers[far].title]
        fields = {"title": self.papers[number].title, "option1": options[right], "option2": options[1 - right]}
        k = int(rng.integers(0, 2))
        others = [self.papers[int(n)] for n in self.near_papers[number][1 : 1 + k]]
        rows = tuple(Item("", None, {"title": o.title, "abstract": _first(o.text, 60)}) for o in others)
        return [Exchange(str(Prompt(task("LaMP_1"), fields, rows)), f"[{right + 1}]")]

    def tag(self, rng: np.random.Generator) -> Lesson:
        """LaMP_2M: made-up tags, one for each news category."""
        chosen = [self.labelled[int(n)] for n in rng.integers(0, len(self.labelled), 5)]
        shown = chosen[0]
        k = int(rng.integers(0, 2))
        rows = (Item("", None, {"description": shown.text, "tag": TAGS[shown.category]}),) * k
        return [
            Exchange(str(Prompt(task("LaMP_2M"), {"description": d.text}, rows)), TAGS[d.category]) for d in chosen[1:]
        ]

    def rating(self, rng: np.random.Generator) -> Lesson:
        """LaMP_3: made-up scores; what tells the answer is the score of the retrieved reviews."""
        texts = [self.news[int(n)].text for n in rng.integers(0, len(self.news), 4)]
        usual = str(rng.choice(["1", "2", "3", "4", "5"], p=[0.05, 0.05, 0.1, 0.3, 0.5]))
        k = int(rng.integers(0, 3))
        rows = tuple(Item("", None, {"text": text, "score": usual}) for text in texts[:k])
        return [Exchange(str(Prompt(task("LaMP_3"), {"review": text}, rows)), usual) for text in texts[2:]]

    def paraphrase(self, rng: np.random.Generator) -> Lesson:
        """LaMP_7: a bare headline written again in the style of retrieved ones."""
        chosen = [self.headlines[int(n)].title for n in rng.integers(0, len(self.headlines), 5)]
        style = STYLES[str(rng.choice(list(STYLES)))] if rng.random() < 0.5 else str
        k = int(rng.integers(0, 3))
        rows = tuple(Item("", None, {"text": style(text)}) for text in chosen[:k])
        bare = [re.sub(r"[^\w\s]", "", text).lower() for text in chosen[2:]]
        return [
            Exchange(str(Prompt(task("LaMP_7"), {"text": b}, rows)), style(text) if k else text)
            for b, text in zip(bare, chosen[2:], strict=True)
        ]


def _first(text: str, words: int) -> str:
    return " ".join(text.split()[:words])
