"""How good the tiny language model is, on base users that it has not read (never on test users)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oppu.prompts import Prompt, fit, ids
from oppu.records import Item
from oppu.tasks import task
from oppu.tiny_lm import label_tokens
from oppu.tiny_lm_teacher import bag_of_words, labels
from oppu.tiny_lm_texts import training_texts, validation_authors

BUDGET = 900


@dataclass(frozen=True)
class Case:
    """A text of a validation user, its answer, and what that user wrote before it."""

    text: str
    gold: str
    earlier: tuple[Item, ...]


def cases(data: Path, name: str) -> list[Case]:
    """All history items and queries of a task's validation users that have something before them."""
    source, answer = ("text", "category") if name == "LaMP_2N" else ("text", "title")
    source = "abstract" if name == "LaMP_5" else source
    found = []
    for author in validation_authors(data, name):
        rows = [(i.fields[source], i.fields[answer], author.history[:n]) for n, i in enumerate(author.history) if n]
        queries = [(task(name).query_fields(q.input), q.gold or "") for q in author.queries]
        rows += [(next(iter(fields.values())), gold, author.history) for fields, gold in queries]
        found += [Case(*row) for row in rows]
    return found


def nearest(name: str, case: Case, k: int) -> tuple[Item, ...]:
    """The k earlier items that BM25 finds nearest, the later one first where they tie."""
    from rank_bm25 import BM25Okapi

    documents = [task(name).item_text(item).lower().split() for item in case.earlier]
    scores = BM25Okapi(documents).get_scores(case.text.lower().split())
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], -n))
    return tuple(case.earlier[n] for n in order[:k])


def _popular(case: Case) -> str:
    """The user's most common category, the latest one where they tie."""
    counts = Counter(item.fields["category"] for item in case.earlier)
    last = {item.fields["category"]: n for n, item in enumerate(case.earlier)}
    return max(counts, key=lambda name: (counts[name], last[name]))


def prompt_of(name: str, case: Case, augmentation: str) -> Prompt:
    """The prompt of a case under `k0`, `k1`, …, or `profile-k0` (LaMP_2N only)."""
    profile = f"most popular category: {_popular(case)}" if augmentation.startswith("profile") else None
    k = int(augmentation[-1])
    field = next(iter(task(name).x))
    return Prompt(task(name), {field: case.text}, nearest(name, case, k) if k else (), profile)


def _scores(model: Any, tokenizer: Any, rows: list[list[int]], answers: list[list[int]]) -> list[Any]:
    """For each prompt the log-probabilities [answer tokens, vocabulary] of what follows it."""
    import torch

    found: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]) + len(answers[n]))
    for start in range(0, len(order), 16):
        numbers = order[start : start + 16]
        texts = [rows[n] + answers[n][:-1] for n in numbers]
        longest = max(map(len, texts))
        padded = torch.tensor([t + [tokenizer.pad_token_id] * (longest - len(t)) for t in texts])
        mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts])
        with torch.no_grad():
            hidden = model.model(input_ids=padded, attention_mask=mask)[0]
            for n, states in zip(numbers, hidden, strict=True):
                at = states[len(rows[n]) - 1 : len(rows[n]) - 1 + len(answers[n])]
                found[n] = torch.log_softmax(model.lm_head(at).float(), dim=-1)
    return found


def _categories(model: Any, tokenizer: Any, prompts: list[Prompt]) -> list[str]:
    rows = [ids(tokenizer, str(fit(p, tokenizer, BUDGET))) for p in prompts]
    first = label_tokens(tokenizer)
    scores = _scores(model, tokenizer, rows, [[0]] * len(rows))
    return [labels()[int(s[0, first].argmax())] for s in scores]


def _loss(model: Any, tokenizer: Any, name: str, found: list[Case], augmentation: str) -> float:
    """Mean loss of a gold's token in nats."""
    import torch

    prompts = [str(fit(prompt_of(name, case, augmentation), tokenizer, BUDGET)) for case in found]
    rows = [ids(tokenizer, prompt) for prompt in prompts]
    answers = [[*ids(tokenizer, f" {case.gold}", special=False), tokenizer.eos_token_id] for case in found]
    scores = _scores(model, tokenizer, rows, answers)
    losses = [-s[torch.arange(len(a)), a] for s, a in zip(scores, answers, strict=True)]
    return float(torch.cat(losses).mean())


def _share(answers: list[str], found: list[Case]) -> float:
    return round(float(np.mean([a == case.gold for a, case in zip(answers, found, strict=True)])), 4)


def references(corpus: Path, data: Path) -> dict[str, float]:
    """LaMP_2N accuracies without a language model: majority, bag of words, the user's last and most common label."""
    found = cases(data, "LaMP_2N")
    labelled = [d for d in training_texts(corpus, data) if d.category]
    majority = Counter(d.category for d in labelled).most_common(1)[0][0]
    return {
        "global-majority": _share([majority] * len(found), found),
        "bag-of-words": _share(list(bag_of_words(labelled).predict([c.text for c in found])), found),
        "last-label": _share([c.earlier[-1].fields["category"] for c in found], found),
        "user-majority": _share([_popular(c) for c in found], found),
    }


def validate(model_folder: Path, data: Path) -> dict[str, float]:
    """LaMP_2N accuracy by augmentation, and the loss of golds of LaMP_4 and LaMP_5, on the validation users."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32").eval()
    found = cases(data, "LaMP_2N")
    result: dict[str, float] = {"LaMP_2N cases": len(found)}
    for augmentation in ("k0", "k1", "k2", "k4", "profile-k0", "profile-k1"):
        prompts = [prompt_of("LaMP_2N", case, augmentation) for case in found]
        result[f"LaMP_2N accuracy {augmentation}"] = _share(_categories(model, tokenizer, prompts), found)
    for name in ("LaMP_4", "LaMP_5"):
        some = cases(data, name)[:: 1 if name == "LaMP_4" else 8]
        for augmentation in ("k0", "k1"):
            result[f"{name} loss {augmentation}"] = round(_loss(model, tokenizer, name, some, augmentation), 4)
    return result
