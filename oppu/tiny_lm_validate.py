"""How good the tiny language model is, on base users that it has not read (never on test users)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oppu.profiles import commonest, extractive
from oppu.prompts import Prompt, fit, ids
from oppu.records import Item
from oppu.retrieval import retrieve_for_history, retrieve_for_queries
from oppu.setting import parse_augmentation
from oppu.tasks import task
from oppu.tiny_lm import label_tokens
from oppu.tiny_lm_teacher import bag_of_words, labels
from oppu.tiny_lm_texts import training_texts, validation_authors

BUDGET = 900
AUGMENTATIONS = ("k0", "k1", "k2", "k4", "profile-k0", "profile-k1")


@dataclass(frozen=True)
class Case:
    """A text of a validation user, its answer, and what that user wrote before it (something)."""

    query: dict[str, str]
    gold: str
    earlier: tuple[Item, ...]
    retrieved: tuple[Item, ...]


def cases(data: Path, name: str, augmentation: str = "k0") -> list[Case]:
    """All history items and queries of a task's validation users that have something before them."""
    record, wanted = task(name), parse_augmentation(augmentation)
    found = []
    for author in validation_authors(data, name):
        history = author.history
        retrieved = retrieve_for_history(record, history, wanted)
        for n, item in enumerate(history):
            fields = record.item_fields(item)
            found.append(Case(fields, item.fields[record.y or ""], history[:n], retrieved[n]))
        of_queries = retrieve_for_queries(record, history, author.queries, wanted)
        for query, items in zip(author.queries, of_queries, strict=True):
            found.append(Case(record.query_fields(query.input), query.gold or "", history, items))
    return [case for case in found if case.earlier]


def prompt_of(name: str, case: Case, augmentation: str) -> Prompt:
    """The prompt of a case, as the workflow would write it."""
    profile = extractive(task(name), case.earlier) if parse_augmentation(augmentation).profile else None
    return Prompt(task(name), case.query, case.retrieved, profile)


def _chances(model: Any, tokenizer: Any, prompts: Sequence[Prompt], answers: list[list[int]]) -> list[Any]:
    """For each prompt the log-probabilities [answer tokens, vocabulary] of what follows it."""
    import torch

    rows = [ids(tokenizer, str(fit(prompt, tokenizer, BUDGET))) for prompt in prompts]
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
                found[n] = torch.log_softmax(model.lm_head(at), dim=-1)
    return found


def _accuracy(model: Any, tokenizer: Any, data: Path, augmentation: str) -> float:
    found = cases(data, "LaMP_2N", augmentation)
    prompts = [prompt_of("LaMP_2N", case, augmentation) for case in found]
    chances = _chances(model, tokenizer, prompts, [[0]] * len(prompts))
    first = label_tokens(tokenizer)
    return _share([labels()[int(c[0, first].argmax())] for c in chances], found)


def _loss(model: Any, tokenizer: Any, data: Path, name: str, augmentation: str) -> float:
    """Mean loss of a gold's token in nats, over some 300 cases."""
    import torch

    found = cases(data, name, augmentation)
    found = found[:: max(1, len(found) // 300)]
    answers = [[*ids(tokenizer, f" {case.gold}", special=False), tokenizer.eos_token_id] for case in found]
    chances = _chances(model, tokenizer, [prompt_of(name, case, augmentation) for case in found], answers)
    losses = [-c[torch.arange(len(a)), a] for c, a in zip(chances, answers, strict=True)]
    return round(float(torch.cat(losses).mean()), 4)


def _share(answers: Sequence[str | None], found: Sequence[Case]) -> float:
    return round(float(np.mean([a == case.gold for a, case in zip(answers, found, strict=True)])), 4)


def references(corpus: Path, data: Path) -> dict[str, float]:
    """LaMP_2N accuracies without a language model: majority, bag of words, the user's last and most common label."""
    found = cases(data, "LaMP_2N")
    labelled = [d for d in training_texts(corpus, data) if d.category]
    majority = Counter(d.category for d in labelled).most_common(1)[0][0]
    answers = {
        "global-majority": [majority] * len(found),
        "bag-of-words": list(bag_of_words(labelled).predict([case.query["article"] for case in found])),
        "last-label": [case.earlier[-1].fields["category"] for case in found],
        "user-majority": [commonest([item.fields["category"] for item in case.earlier]) for case in found],
    }
    return {f"LaMP_2N accuracy {name}, no model": _share(given, found) for name, given in answers.items()}


def validate(model_folder: Path, data: Path) -> dict[str, float]:
    """LaMP_2N accuracy by augmentation, and the loss of golds of LaMP_4 and LaMP_5, on the validation users."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32").eval()
    result: dict[str, float] = {"LaMP_2N cases": len(cases(data, "LaMP_2N"))}
    for augmentation in AUGMENTATIONS:
        result[f"LaMP_2N accuracy {augmentation}"] = _accuracy(model, tokenizer, data, augmentation)
    for name in ("LaMP_4", "LaMP_5"):
        for augmentation in ("k0", "k1", "profile-k0"):
            result[f"{name} loss {augmentation}"] = _loss(model, tokenizer, data, name, augmentation)
    return result
