"""Scored labels against one plain forward pass per label, and what the choice does to predictions and keys."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oppu.bank import LoraBank, save_adapter
from oppu.cohort import Answers, Cohort
from oppu.config import Config, load
from oppu.decoding import Asked
from oppu.examples import Context, history_examples, label_targets
from oppu.keys import predictions_key
from oppu.labels import likeliest, scores, tree_of
from oppu.models import load_model, load_tokenizer
from oppu.progress import Stage
from oppu.recipe import cell_recipe
from oppu.records import InputError
from oppu.setting import parse_augmentation
from oppu.tasks import task, tasks
from tests.test_generation import bank_of, shared_prompts, watched
from tests.test_golden import ROOT, person
from tests.tiny_models import CONFIGS, EOS, VOCAB, settings, tiny_llama

MODEL = str(ROOT / "data/models/oppu-tiny")
LABELS = [[5, EOS], [5, 6, EOS], [7, 8, 9, EOS], [7, 8, EOS], [11, EOS]]
WITH_LABELS = [name for name, record in tasks().items() if record.labels]


def plain(asked: Asked, number: int, label: list[int]) -> float:
    """The log-probability of one label behind one prompt: one pass over both, no cache, nothing shared."""
    prompt = list(asked.prompts[number])
    with torch.no_grad(), asked.adapters([number]):
        logits = asked.model(torch.tensor([prompt + label])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + n, token].item() for n, token in enumerate(label))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("share", [False, True])
def test_scores_are_the_labels_log_probabilities(name: str, share: bool) -> None:
    model = tiny_llama(torch.float64, config=CONFIGS[name])
    asked = Asked(model, shared_prompts(7, 2), bank_of(model, 2), [n % 2 for n in range(7)])
    found: dict[int, list[float]] = {}
    with torch.no_grad():
        for numbers, values in scores(asked, LABELS, 150, share):
            found |= dict(zip(numbers, values.tolist(), strict=True))
    assert sorted(found) == list(range(7))
    expected = [[plain(asked, n, label) for label in LABELS] for n in range(7)]
    for n in range(7):
        # Eager attention takes its softmax in float32.
        assert found[n] == pytest.approx(expected[n], abs=1e-4 if name.startswith("gemma2") else 1e-11)
    best = [max(range(len(LABELS)), key=row.__getitem__) for row in expected]
    assert likeliest(asked, LABELS, 150, share) == best and len(set(best)) > 1


def test_all_answers_of_one_token_have_a_probability_below_one_together() -> None:
    """The sum over a whole family of answers is the probability that an answer is of that family."""
    asked = Asked(tiny_llama(torch.float64), [[1, 5, 9]])
    family = [[EOS], *([token, EOS] for token in range(VOCAB) if token != EOS)]
    with torch.no_grad():
        ((_, values),) = scores(asked, family, 1000)
    logits = asked.model(torch.tensor([[1, 5, 9]])).logits[0, -1].softmax(-1)
    total = logits[EOS].item()
    for token in range(VOCAB):
        if token != EOS:
            total += (
                logits[token].item()
                * asked.model(torch.tensor([[1, 5, 9, token]])).logits[0, -1].softmax(-1)[EOS].item()
            )
    assert values.exp().sum().item() == pytest.approx(total, abs=1e-12) and total < 1


def test_common_beginnings_of_labels_are_read_once_and_in_one_pass() -> None:
    tree = tree_of(LABELS)
    assert tree.tokens == (5, 6, 7, 8, 9, 11) and tree.parents == (0, 1, 0, 3, 4, 0)
    assert len(tree_of([[EOS], [EOS]])) == 0
    model, prompts = tiny_llama(), shared_prompts(6, 1)
    with watched(model) as passes:
        likeliest(Asked(model, prompts), LABELS, 10_000)
    assert passes == [14, 6 * (max(map(len, prompts)) - 14 + len(tree))]


@pytest.mark.parametrize("name", WITH_LABELS)
def test_labels_have_the_tokens_that_are_learned(name: str) -> None:
    """Behind any prompt of the task, retrieved items and profile or not."""
    tokenizer, record, user = load_tokenizer(MODEL), task(name), person(name)
    for augmentation, profile in (("k0", None), ("k1", None), ("profile-k1", "a profile")):
        context = Context(record, parse_augmentation(augmentation), tokenizer, tokenizer.eos_token_id, 256, 0)
        targets = label_targets(context)
        assert len(targets) == len(record.labels or [])
        assert [tokenizer.decode(t, skip_special_tokens=True).strip() for t in targets] == record.labels
        if record.pair:
            known = dict(zip(record.labels or [], targets, strict=True))
            for item, example in zip(user.history, history_examples(context, user, profile, Counter()), strict=True):
                assert list(example.target) == known[item.fields[record.y or ""]]


def config(name: str = "LaMP_2N", **generation: object) -> Config:
    return load({"tasks": [name], "model": {"path": MODEL, "max_length": 256}, "generation": generation})


def keys(name: str, **generation: object) -> str:
    recipe = cell_recipe(config(name, **generation), name, "k0", "none", "full")
    return predictions_key(recipe, {"key": "", "files": {}, "model": {}}, person(name), None, None, None)


def test_the_choice_changes_the_keys_of_tasks_with_labels_only() -> None:
    made = cell_recipe(config(), "LaMP_2N", "k0", "none", "full")["generation"]
    assert made == {"sample": False, "max_new_tokens": 8}, "as it was before there was a choice: keys stay"
    assert keys("LaMP_2N") == keys("LaMP_2N", labels="generate")
    assert keys("LaMP_2N", labels="score") != keys("LaMP_2N")
    assert keys("LaMP_2N", labels="score", sample=True) == keys("LaMP_2N", labels="score")
    assert keys("LaMP_4", labels="score") == keys("LaMP_4")
    with pytest.raises(InputError, match=r"generation\.labels"):
        config(labels="guess")


@pytest.mark.parametrize("labels", ["generate", "score"])
def test_users_are_answered_some_at_a_time_and_told_of_as_one(
    labels: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three queries at a time, of users with 2, 2, 0, 3, 0: the second, the fourth and the last end a pass.

    With adapters at random, so that users differ in their answers.
    """
    save_adapter(tmp_path / "adapter", LoraBank(load_model(MODEL), settings(), 1, 0), 0, "raw")
    whole, keys = person("LaMP_2N"), [f"u-{n:012d}" for n in range(5)]
    queries = [[replace(whole.queries[0], id=f"{n}-{i}") for i in range(own)] for n, own in enumerate((2, 2, 0, 3, 0))]
    users = [replace(whole, key=key, queries=tuple(own)) for key, own in zip(keys, queries, strict=True)]
    recipe = cell_recipe(config(labels=labels), "LaMP_2N", "k0", "lora", "full")
    cohort = Cohort(recipe, {}, tmp_path, None, [(user, None, Counter()) for user in users])
    assert cohort.bank is not None
    cohort.bank.weights.copy_(torch.randn(cohort.bank.weights.shape, generator=torch.Generator().manual_seed(0)))
    told: list[tuple[int, int, int]] = []
    events: list[str] = []

    class Told(Stage):
        def __call__(self, done: int, total: int, tokens: int) -> None:
            told.append((done, total, tokens))
            super().__call__(done, total, tokens)
            if not events or events[-1] != "pass":
                events.append("pass")

    monkeypatch.setattr("oppu.cohort.Stage", Told)
    once: dict[str, Answers] = {}
    assert not cohort.predict(keys, once.__setitem__)
    tokens = sum(row["prompt_tokens"] for rows in once.values() for row in rows)
    assert list(once) == keys and told[-1] == (7, 7, tokens)
    assert len({rows[0]["prediction"] for rows in once.values() if rows}) == 3
    told.clear()
    events.clear()
    monkeypatch.setattr("oppu.cohort.QUERIES_AT_ONCE", 3)
    found: dict[str, Answers] = {}

    def finished(key: str, rows: Answers) -> None:
        events.append(key)
        found[key] = rows

    assert not cohort.predict(keys, finished)
    assert found == once and [len(rows) for rows in found.values()] == [2, 2, 0, 3, 0]
    assert events == ["pass", *keys[:2], "pass", *keys[2:]]
    assert told == sorted(told) and {total for _, total, _ in told} == {7} and told[-1] == (7, 7, tokens)


def test_a_cohort_that_scores_answers_with_labels_only(tmp_path: Path) -> None:
    """With adapters at random, which generate anything."""
    bank = LoraBank(load_model(MODEL), settings(), 1, 0)
    save_adapter(tmp_path / "adapter", bank, 0, "raw")
    answers = {}
    for labels in ("generate", "score"):
        recipe = cell_recipe(config(labels=labels), "LaMP_2N", "k0", "lora", "full")
        user = person("LaMP_2N")
        cohort = Cohort(recipe, {}, tmp_path, None, [(user, None, Counter())])
        assert cohort.bank is not None
        cohort.bank.weights.copy_(torch.randn(cohort.bank.weights.shape, generator=torch.Generator().manual_seed(0)))
        predictions: dict[str, Answers] = {}
        assert not cohort.predict([user.key], predictions.__setitem__)
        answers[labels] = [row["prediction"] for row in predictions[user.key]]
    known = task("LaMP_2N").labels or []
    assert all(answer in known for answer in answers["score"])
    assert not any(answer in known for answer in answers["generate"])
