"""What an adapter learns from and what a query asks: nothing is lost silently, whatever the lengths."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from oppu.examples import Context, history_examples, query_examples, query_prompts
from oppu.models import load_tokenizer
from oppu.records import Item, User
from oppu.rows import virtual
from oppu.setting import parse_augmentation
from oppu.tasks import task, tasks
from tests.test_golden import ROOT, person

TOKENIZER = load_tokenizer(str(ROOT / "data/models/oppu-tiny"))


def context(name: str, augmentation: str = "k0", max_length: int = 256) -> Context:
    return Context(task(name), parse_augmentation(augmentation), TOKENIZER, TOKENIZER.eos_token_id, max_length, 0)


@pytest.mark.parametrize("name", tasks())
@pytest.mark.parametrize("augmentation", ["k0", "k1", "profile-k1"])
def test_prompt_and_answer_together_are_the_text_and_fit(name: str, augmentation: str) -> None:
    user, record = person(name), task(name)
    profile = "a profile" if augmentation.startswith("profile") else None
    examples = history_examples(context(name, augmentation), user, profile, Counter())
    assert len(examples) == len(user.history)
    for item, example in zip(user.history, examples, strict=True):
        assert len(example) <= 256 and example.target[-1] == TOKENIZER.eos_token_id
        prompt, answer = (TOKENIZER.decode(ids, skip_special_tokens=True) for ids in (example.prompt, example.target))
        if record.pair:
            assert prompt.endswith(record.prompt.rsplit("}", 1)[1]) and answer.strip() == item.fields[record.y or ""]
        else:
            assert prompt.endswith(record.plain_label) and f"{record.plain_label} {answer.strip()}" == record.item_text(
                item
            )
    assert ("a profile" in TOKENIZER.decode(examples[0].prompt)) is (profile is not None)


def grown(user: User, name: str, place: int, text: str) -> User:
    item = user.history[place]
    fields = {f: text if f != task(name).y else value for f, value in item.fields.items()}
    history = (*user.history[:place], replace(item, fields=fields), *user.history[place + 1 :])
    return replace(user, history=history)


@pytest.mark.parametrize("name", ["LaMP_2N", "LaMP_7"])
def test_an_item_of_a_megabyte_is_cut_and_counted(name: str) -> None:
    user = grown(person(name), name, 3, "very long text " * 70_000)
    counts: Counter[str] = Counter()
    examples = history_examples(context(name, "k1"), user, None, counts)
    assert len(examples) == len(user.history) and all(len(example) <= 256 for example in examples)
    assert counts["cut_history_tokens"] + counts["cut_query_tokens"] > 100_000
    assert examples[3].target[-1] == TOKENIZER.eos_token_id
    prompts = query_prompts(context(name, "k4"), user, None, 16, counts)
    assert all(len(tokens) <= 240 for *_, tokens in prompts)


def test_an_answer_that_does_not_fit_leaves_its_item_out_and_is_counted() -> None:
    user = person("LaMP_4")
    item = user.history[2]
    long = replace(item, fields=item.fields | {"title": "endless title " * 300})
    counts: Counter[str] = Counter()
    examples = history_examples(
        context("LaMP_4"), replace(user, history=(*user.history[:2], long, *user.history[3:])), None, counts
    )
    assert len(examples) == len(user.history) - 1 and counts["items_too_long"] == 1


def test_max_items_keeps_the_newest_and_what_they_retrieve() -> None:
    user, where = person("LaMP_2N"), context("LaMP_2N", "k1")
    every = history_examples(where, user, None, Counter())
    assert history_examples(where, user, None, Counter(), 3) == every[-3:]
    assert history_examples(where, user, None, Counter(), 100) == every


def test_a_user_without_history_can_still_be_asked() -> None:
    empty = replace(person("LaMP_2N"), history=())
    assert history_examples(context("LaMP_2N", "k2"), empty, "", Counter()) == []
    ((_, prompt, tokens),) = query_prompts(context("LaMP_2N", "k2"), empty, "", 8, Counter())
    assert prompt.items == () and tokens


def test_a_base_learns_its_users_golds() -> None:
    user = person("LaMP_2N")
    asked = replace(user, queries=(replace(user.queries[0], gold="politics"),))
    (example,) = query_examples(context("LaMP_2N", "k1"), asked, None, Counter())
    assert TOKENIZER.decode(example.target, skip_special_tokens=True).strip() == "politics"


def test_text_with_braces_and_newlines_stays_text() -> None:
    item = Item("1", None, {"text": "{article}\n{0} {category}", "category": "politics"})
    (example,) = history_examples(context("LaMP_2N"), replace(person("LaMP_2N"), history=(item,)), None, Counter())
    assert "{article}\n{0} {category}" in TOKENIZER.decode(example.prompt)


@pytest.mark.parametrize("name", ["LaMP_2N", "LaMP_7"])
def test_virtual_tokens_stand_before_every_prompt_and_take_their_room(name: str) -> None:
    """The same prompts as with so much less room, and never over it."""
    user = grown(person(name), name, 3, "very long text " * 1000)
    with_lead, shorter = replace(context(name, "k1"), lead=virtual(20)), context(name, "k1", 256 - 20)
    examples, plain = (history_examples(c, user, None, Counter()) for c in (with_lead, shorter))
    assert [(e.prompt, e.target) for e in examples] == [(virtual(20) + e.prompt, e.target) for e in plain]
    assert 128 < max(map(len, examples)) <= 256
    asked, bare = (query_prompts(c, user, None, 16, Counter()) for c in (with_lead, shorter))
    assert [tokens for *_, tokens in asked] == [[*virtual(20), *tokens] for *_, tokens in bare]
