"""Prompts of profiles: the sample of the history, the chat around it; and their answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oppu.config import load
from oppu.llm_profiles import Writer
from oppu.prompts import one_line
from oppu.records import InputError, Item, User
from oppu.tasks import task
from tests.profile_models import CHAT, recipe_for, save_model, user

HOSTILE = "{history} {0} {{ %s \"quoted\" 'so' \\n {prompt}\nand a second line"
BEFORE, AFTER = task("LaMP_2N").profile_prompt.split("{history}")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "chatty", chat=CHAT)


def hostile() -> User:
    return User("u-00000000abcd", "x", (Item("1", None, {"text": HOSTILE, "category": "crime"}),), ())


def asked(text: str) -> str:
    """The bare prompt about the hostile user, put together by hand."""
    return BEFORE + text + AFTER


LINE = one_line(f"article: {HOSTILE} category: crime")


@pytest.mark.parametrize(
    ("template", "whole"),
    [
        (None, "<s>" + asked(LINE)),
        ("A chat. USER: {prompt} ASSISTANT:", "<s>A chat. USER: " + asked(LINE) + " ASSISTANT:"),
        ("<s>[INST] {prompt} {x}[/INST]", "<s>[INST] " + asked(LINE) + " {x}[/INST]"),
    ],
)
def test_the_configs_template_or_none_takes_the_text_as_it_is(plain: Path, template: str | None, whole: str) -> None:
    writer = Writer(recipe_for(plain, chat_template=template, history_tokens=200))
    tokens = writer.prompt(hostile())
    assert tokens == writer.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokens.count(writer.tokenizer.bos_token_id) == 1
    assert "\n" not in writer.tokenizer.decode(tokens)


def test_the_tokenizers_own_chat_template_is_used_as_transformers_does(chatty: Path) -> None:
    writer = Writer(recipe_for(chatty, history_tokens=200))
    chat = [{"role": "user", "content": asked(LINE)}]
    expected = writer.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    tokens = writer.prompt(hostile())
    assert tokens == expected["input_ids"]
    assert writer.tokenizer.decode(tokens).startswith("<s>[user] Look at")
    assert writer.tokenizer.decode(tokens).endswith(" [assistant]")
    bare = Writer(recipe_for(chatty, chat_template="{prompt}", history_tokens=200)).prompt(hostile())
    assert "[user]" not in writer.tokenizer.decode(bare), "the config's template goes first"


def test_a_template_without_a_place_for_the_prompt_is_refused() -> None:
    with pytest.raises(InputError, match=r"chat_template: must hold \{prompt\}"):
        load({"profiles": {"backend": "llm", "path": "x", "chat_template": "USER: {history}"}})


def numbers(lines: list[str]) -> list[int]:
    return [int(line.split()[1].removeprefix("item")) for line in lines]


def test_items_are_drawn_by_a_seed_of_that_user_alone_and_stand_in_time_order(plain: Path) -> None:
    writer = Writer(recipe_for(plain, history_tokens=10_000, items=4))
    found = {n: numbers(writer.lines(user(n, items=30), 10_000)) for n in range(20)}
    assert all(len(drawn) == 4 and drawn == sorted(drawn) for drawn in found.values())
    assert len({tuple(drawn) for drawn in found.values()}) > 15
    again = Writer(recipe_for(plain, history_tokens=10_000, items=4))
    assert numbers(again.lines(user(7, items=30), 10_000)) == found[7], "nobody else was asked about"
    other = Writer(recipe_for(plain, history_tokens=10_000, items=4, seed=1))
    assert any(numbers(other.lines(user(n, items=30), 10_000)) != drawn for n, drawn in found.items())
    everything = Writer(recipe_for(plain, history_tokens=10_000))
    assert numbers(everything.lines(user(7, items=30), 10_000)) == list(range(30))


def test_as_many_items_as_have_room(plain: Path) -> None:
    writer, person = Writer(recipe_for(plain)), user(3, items=30)
    tokens = lambda lines: sum(len(writer.tokenizer(f"{x}\n", add_special_tokens=False)["input_ids"]) for x in lines)  # noqa: E731
    lines = writer.lines(person, 100)
    rest = [line for line in writer.lines(person, 10_000) if line not in lines]
    assert tokens(lines) <= 100 and 2 < len(lines) < 30
    assert all(tokens([*lines, line]) > 100 for line in rest)


def test_long_items_are_cut(plain: Path) -> None:
    words = Writer(recipe_for(plain, item_words=3, history_tokens=10_000)).lines(user(1), 10_000)
    assert words == [f"article: item{n} {user(1).history[n].fields['text'].split()[1]}" for n in range(8)]
    long = replace(user(1, items=1), history=(Item("0", None, {"text": "word " * 400, "category": "crime"}),))
    writer = Writer(recipe_for(plain))
    (line,) = writer.lines(long, 60)
    assert 40 <= len(writer.tokenizer(line, add_special_tokens=False)["input_ids"]) <= 60
    assert line.startswith("article: word word")


def test_the_models_context_lowers_the_room_or_refuses(plain: Path, tmp_path: Path) -> None:
    writer = Writer(recipe_for(plain, history_tokens=5_000, max_new_tokens=100))
    tokens = writer.prompt(user(2, items=200))
    assert 512 - 100 - 30 < len(tokens) <= 512 - 100
    tokens = writer.prompt(replace(hostile(), history=(Item("1", None, {"text": "x{" * 3000, "category": ""}),)))
    assert len(tokens) <= 512 - 100
    with pytest.raises(InputError, match=r"no room for a history; lower profiles\.max_new_tokens"):
        Writer(recipe_for(save_model(tmp_path / "short", context=64), max_new_tokens=40))


def test_a_batch_of_users_is_answered_as_each_alone_by_transformers(plain: Path) -> None:
    writer = Writer(recipe_for(plain, tokens_per_batch=500))
    prompts = {person.key: writer.prompt(person) for person in (user(n, items=3 + n) for n in range(7))}
    batches = list(writer.answers(prompts))
    found = {key: text for batch in batches for key, text in batch.items()}
    assert 1 < len(batches) < 7
    expected = {}
    for key, tokens in prompts.items():
        with torch.inference_mode():
            output = writer.model.generate(
                input_ids=torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), max_new_tokens=8
            )
        expected[key] = writer.tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True).strip()
    assert found == expected
    assert len(set(found.values())) > 3, "answers depend on the prompt"
