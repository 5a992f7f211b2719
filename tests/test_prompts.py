from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from oppu.prompts import Prompt, fit, ids
from oppu.records import Item
from oppu.tasks import task, tasks

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "data/models/oppu-tiny")
NEWS = task("LaMP_2N")


def item(text: str, category: str = "politics") -> Item:
    return Item("1", "2018-01-01", {"text": text, "category": category})


def test_profile_then_items_best_first_then_instruction() -> None:
    prompt = Prompt(
        NEWS, {"article": "new"}, (item("best\none"), item("second", "crime")), "most popular category: crime"
    )
    lines = str(prompt).split("\n")
    assert lines[:3] == [
        "most popular category: crime",
        "article: best one category: politics",
        "article: second category: crime",
    ]
    assert lines[3].startswith("Which category does this article relate to")
    assert lines[4] == "article: new category:"


@pytest.mark.parametrize("name", [name for name in tasks() if name.startswith("LaMP_")])
def test_the_golden_base_prompts_are_the_papers(name: str) -> None:
    golden = (Path(__file__).parent / "golden/appendix_i.txt").read_text(encoding="utf-8")
    record = task(name)
    fields = {"title": "QUERY PAPER TITLE", "option1": "OPTION1", "option2": "OPTION2"}
    query = {f: fields.get(f, f"QUERY {f.upper()}") for f in record.x or _fields(record.prompt)}
    assert f"== {name}\n{Prompt(record, query)}\n" in golden


def _fields(template: str) -> list[str]:
    from oppu.tasks import fields_of

    return fields_of(template)


def test_the_longest_history_text_is_cut_first_and_its_label_stays() -> None:
    long, short = item("word " * 300, "science & technology"), item("short text", "crime")
    prompt = Prompt(NEWS, {"article": "query text"}, (short, long), "a profile")
    budget = len(ids(TOKENIZER, str(prompt))) - 100
    cut = fit(prompt, TOKENIZER, budget)
    assert len(ids(TOKENIZER, str(cut))) <= budget
    assert cut.items[0] == short and cut.profile == "a profile" and cut.query == prompt.query
    assert str(cut).split("\n")[2].endswith("category: science & technology")
    assert cut.cut_history >= 100 and cut.cut_query == 0


def test_the_query_is_cut_from_its_end_only_when_no_history_is_left() -> None:
    prompt = Prompt(NEWS, {"article": "first words " + "more " * 400}, (item("some history"),), "a profile")
    bare = len(ids(TOKENIZER, str(Prompt(NEWS, {"article": ""}))))
    cut = fit(prompt, TOKENIZER, bare + 60)
    assert not cut.items[0].fields["text"] and cut.profile is None
    assert cut.query["article"].startswith("first words more") and cut.cut_query > 300
    assert str(cut).endswith(" category:") and NEWS.prompt.split("\n")[0] in str(cut)
    with pytest.raises(ValueError, match="the instruction alone"):
        fit(replace(prompt, items=()), TOKENIZER, 10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=200), max_size=3), st.text(max_size=400), st.integers(0, 60))
def test_any_text_fits_and_what_fits_is_untouched(texts: list[str], article: str, room: int) -> None:
    prompt = Prompt(NEWS, {"article": article}, tuple(item(t) for t in texts), None)
    bare = Prompt(NEWS, {"article": ""}, tuple(item("") for _ in texts), None)
    budget = len(ids(TOKENIZER, str(bare))) + 5 + room
    cut = fit(prompt, TOKENIZER, budget)
    assert len(ids(TOKENIZER, str(cut))) <= budget
    if len(ids(TOKENIZER, str(prompt))) <= budget:
        assert cut == prompt
