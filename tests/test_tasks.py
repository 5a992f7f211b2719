from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oppu.records import InputError, Item
from oppu.tasks import Task, fields_of, render, task, tasks

PAPER_TABLE_4 = {
    "LaMP_1": (8, 3, 1e-5, 1e-2, 16),
    "LaMP_2N": (8, 3, 1e-5, 1e-2, 16),
    "LaMP_2M": (8, 3, 1e-5, 1e-2, 4),
    "LaMP_3": (8, 3, 1e-5, 1e-2, 3),
    "LaMP_4": (8, 2, 1e-5, 1e-1, 8),
    "LaMP_5": (8, 2, 1e-5, 1e-1, 4),
    "LaMP_7": (8, 2, 1e-5, 1e-1, 8),
}
SIGNS = [*"{}[]\"'\\ \n\t:,12", "\x00", "\x1b[31m", "&quot;", "🙈", "{title}", "{0}", "%s", "\u2028", "\x85"]
SEPARATORS = [
    '", which reference is related?',
    '", which reference is related? Just answer with [1] or [2] without explanation. [1]: "',
    '" [2]: "',
    '[2]: "',
    '"[2]:"',
    '" using the following items: ',
    "article:",
    "without explanation.",
]
PLAIN = st.text(st.one_of(st.sampled_from(list(SIGNS[0])), st.characters(codec="utf-8")), max_size=40)
HOSTILE = st.lists(st.one_of(PLAIN, st.sampled_from(SIGNS), st.sampled_from(SEPARATORS)), max_size=6).map("".join)


def test_all_seven_tasks_with_table_4() -> None:
    rows = {n: (p.rank, p.epochs, p.lr, p.weight_decay, p.batch_size) for n, t in tasks().items() for p in [t.personal]}
    assert {name: row for name, row in rows.items() if name.startswith("LaMP_")} == PAPER_TABLE_4


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"LaMP_6.*LaMP_1, LaMP_2N"):
        task("LaMP_6")


def test_rendering_refuses_missing_and_surplus_fields() -> None:
    assert render("article: {article} category:", {"article": "{x} {0}"}) == "article: {x} {0} category:"
    with pytest.raises(ValueError, match="lacks a value for \\['article'\\]"):
        render("article: {article}", {})
    with pytest.raises(ValueError, match="no place for \\['title'\\]"):
        render("article: {article}", {"article": "", "title": ""})
    for template in ("{}", "{0}", "{a.b}", "{a!r}", "{a:>10}"):
        with pytest.raises(ValueError):
            fields_of(template)


@pytest.mark.parametrize("name", tasks())
@given(data=st.data())
def test_reading_is_the_inverse_of_writing(name: str, data: st.DataObject) -> None:
    """Exactly, but where a text repeats a whole separator, and then it is known that it does."""
    record = task(name)
    parts = {field: data.draw(HOSTILE).strip() for field in fields_of(record.input)}
    text = render(record.input, parts)
    assert record.read(text) == parts or record.ambiguous(text)
    once = all(text.count(literal) == 1 for literal in separators(name))
    assert not once or not record.ambiguous(text)


def separators(name: str) -> list[str]:
    """What stands between two fields of a task's input."""
    return [literal.rstrip() for literal in re.split(r"\{\w+\}", task(name).input)[1:-1]]


def test_quotes_and_brackets_inside_a_citation_query() -> None:
    record = task("LaMP_1")
    parts = {"title": 'On "[1]" and [2]', "option1": 'A "b"', "option2": "[3]: {c}\nd"}
    assert record.read(render(record.input, parts)) == parts
    hard = {
        "title": '", which reference is related? [1]: "',
        "option1": '[2]: "x" and "[2]:" and "\n[2]: "',
        "option2": '" [1]: "',
    }
    text = render(record.input, hard)
    assert record.read(text) == hard and not record.ambiguous(text)


def test_what_cannot_be_decided_is_known_to_be_so() -> None:
    record = task("LaMP_1")
    text = render(record.input, {"title": "T", "option1": 'A" [2]: "B', "option2": "C"})
    assert record.ambiguous(text)
    assert record.read(text) == {"title": "T", "option1": "A", "option2": 'B" [2]: "C'}


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("LaMP_4", " Generate a headline for the following article:\tA B\r\n", {"article": "A B"}),
        ("LaMP_4", "Generate a  headline for the\nfollowing article:A B", {"article": "A B"}),
        ("LaMP_4", "Generate a headline for the following article:", {"article": ""}),
        ("LaMP_7", "Paraphrase the following tweet without any explanation before or after it:\n\n x", {"text": "x"}),
        (
            "LaMP_1",
            'For an author who has written the paper with the title  "T", which\nreference is related? Just answer with'
            ' [1] or [2] without explanation.\n[1]:"A"\n[2]:"B" ',
            {"title": "T", "option1": "A", "option2": "B"},
        ),
    ],
)
def test_other_white_space_is_read_too(name: str, text: str, parts: dict[str, str]) -> None:
    assert task(name).read(text) == parts


@pytest.mark.parametrize("text", ["Generate aheadline for the following article: x", "Generate a headline for it: x"])
def test_words_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="does not have the form"):
        task("LaMP_4").read(text)


def test_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="does not have the form"):
        task("LaMP_4").read("Write a headline: x")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": "article: {text} category:"}, "prompt uses \\['text'\\]"),
        ({"item": "article: {body}"}, "item uses \\['body'\\]"),
        ({"x": {}}, "x must fill"),
        ({"retrieval_query": "{abstract}"}, "retrieval_query uses \\['abstract'\\], which x lacks"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_an_inconsistent_record_is_refused(change: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Task(**task("LaMP_2N").model_dump() | change)


def test_plain_items_are_learned_behind_their_label() -> None:
    assert task("LaMP_7").plain_label == "tweet:"
    assert task("LaMP_1").plain_label == "paper title:"
    assert not task("LaMP_7").pair and not task("LaMP_1").pair
    item = Item("1", None, {"title": "T", "abstract": "A"})
    assert task("LaMP_1").item_text(item) == "paper title: T abstract: A"
