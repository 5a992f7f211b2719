from __future__ import annotations

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
HOSTILE = st.text(
    st.one_of(st.sampled_from(list("{}[]\"'\\ \n\t:,12")), st.characters(codec="utf-8")), min_size=1, max_size=40
)


def test_all_seven_tasks_with_table_4() -> None:
    rows = {n: (p.rank, p.epochs, p.lr, p.weight_decay, p.batch_size) for n, t in tasks().items() for p in [t.personal]}
    assert rows == PAPER_TABLE_4


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
    record = task(name)
    parts = {field: data.draw(HOSTILE).strip() for field in fields_of(record.input)}
    text = render(record.input, parts)
    if len(parts) == 1:
        assert record.read(text) == parts
    else:  # a separator within a user's text is read at its first place; the parts still make up the same text
        assert render(record.input, record.read(text)).split() == text.split()


def test_quotes_and_brackets_inside_a_citation_query() -> None:
    text = render(task("LaMP_1").input, {"title": 'On "[1]" and [2]', "option1": 'A "b"', "option2": "[3]: {c}\nd"})
    assert task("LaMP_1").read(text) == {"title": 'On "[1]" and [2]', "option1": 'A "b"', "option2": "[3]: {c}\nd"}


def test_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="does not have the form"):
        task("LaMP_4").read("Write a headline: x")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": "article: {text} category:"}, "prompt uses \\['text'\\]"),
        ({"item": "article: {body}"}, "item uses \\['body'\\]"),
        ({"x": {}}, "x must fill"),
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
