import gzip
import json
import logging
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oppu.config import Split
from oppu.lamp import read, read_counted
from oppu.lamp_values import Items, earliest, is_date
from oppu.records import InputError
from oppu.split import split
from oppu.tasks import task, tasks
from tests.lamp_files import item, question, write_raw, write_task

SAMPLE = Path(__file__).parents[1] / "data/sample/lamp"
NEWS = "LaMP_2N"
HOSTILE = 'a\n{b} {} "q" \\ \x00\x1b[31m &amp; <b> 🙈\u2028\u0085%s $(x) \t '


def refused(folder, name=NEWS, **options):
    with pytest.raises(InputError) as caught:
        read(folder, task(name), **options)
    return caught.value.problems


def one(folder, *history, name=NEWS, **values):
    """The single question of a file that holds these raw items."""
    write_raw(folder, name, [question(name, "q1", "ann", list(history), **values)])
    return read(folder, task(name))[0]


@pytest.mark.parametrize(
    ("name", "dev", "train"),
    [("LaMP_2N", (40, 240), (92, 143)), ("LaMP_4", (39, 156), (122, 186)), ("LaMP_5", (24, 48), (60, 112))],
)
def test_the_sample_has_the_counts_of_its_readme(name, dev, train):
    questions, counts = read_counted(SAMPLE, task(name))
    for source, (users, queries) in (("dev", dev), ("train", train)):
        own = [q for q in questions if q.source == source]
        assert (len({q.user_id for q in own}), len(own)) == (users, queries)
    assert counts == {}
    assert all(q.gold for q in questions)
    assert all(set(i.fields) == set(task(name).history) for q in questions for i in q.history)


@pytest.mark.parametrize("name", tasks())
def test_every_task_of_the_table_reads(tmp_path, name):
    write_task(tmp_path, name, {"ann": 3, "bob": 0})
    ann, bob = read(tmp_path, task(name))
    assert [i.id for i in ann.history] == ["ann-0", "ann-1", "ann-2"]
    assert bob.history == ()


@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("bare", [True, False])
def test_both_shapes_of_outputs_plain_and_compressed(tmp_path, gz, bare):
    write_task(tmp_path, NEWS, {"ann": 1}, gz=gz, bare=bare)
    assert [(q.id, q.gold, q.source) for q in read(tmp_path, task(NEWS))] == [("ann-q0", "travel", "dev")]


def test_train_and_dev_are_read_and_either_may_be_missing(tmp_path):
    write_task(tmp_path, NEWS, {"ann": 1}, source="train")
    assert [q.source for q in read(tmp_path, task(NEWS))] == ["train"]
    write_task(tmp_path, NEWS, {"bob": 1}, source="dev")
    assert [q.source for q in read(tmp_path, task(NEWS))] == ["train", "dev"]


def test_ids_are_text_whether_written_as_number_or_text(tmp_path):
    write_raw(tmp_path, NEWS, [question(NEWS, 600, 7, [item(NEWS, 0, id=6000)])], [{"id": "600", "output": "crime"}])
    (found,) = read(tmp_path, task(NEWS))
    assert (found.id, found.user_id, found.history[0].id, found.gold) == ("600", "7", "6000", "crime")


def test_numbers_become_text_and_are_counted(tmp_path):
    items = [item("LaMP_3", n, score=score) for n, score in enumerate([5, 5.0, "5"])] + [item("LaMP_3", 9, text=1.5)]
    questions = [question("LaMP_3", "q", "ann", items)]
    write_raw(tmp_path, "LaMP_3", questions, [{"id": "q", "output": 4.0}])
    (found,), counts = read_counted(tmp_path, task("LaMP_3"))
    assert [i.fields["score"] for i in found.history[:3]] == ["5", "5", "5"]
    assert found.history[3].fields["text"] == "1.5"
    assert found.gold == "4"
    assert counts == {"numbers_as_text": 4}


def test_one_and_true_are_not_the_same_item(tmp_path):
    items = [item("LaMP_3", 0, score=1), item("LaMP_3", 0, score=True)]
    write_raw(tmp_path, "LaMP_3", [question("LaMP_3", "q", "ann", items)])
    assert refused(tmp_path, "LaMP_3") == [
        "LaMP_3/dev_questions.json: question q: history[1] has a 'score' that is true or false, not text"
    ]


def test_an_item_without_id_gets_one_from_its_content(tmp_path):
    plain = item(NEWS, 0)
    bare = {name: value for name, value in plain.items() if name != "id"}
    found = one(tmp_path, bare, bare | {"id": None}, bare | {"text": "other"}, bare | {"id": ""})
    ids = [i.id for i in found.history]
    assert ids[0] == ids[1] == ids[3] != ids[2]
    assert read_counted(tmp_path, task(NEWS))[1] == {"items_without_id": 4 - 1}  # {} and None are the same values


def test_partial_dates_sort_by_their_earliest_day_with_list_order_as_tie_break(tmp_path):
    dates = ["2016-05-01", "2017", "2016-05", "2016", "2015-12-31", "2016-01-01"]
    found = one(tmp_path, *(item(NEWS, n, id=str(n), date=date) for n, date in enumerate(dates)))
    assert [i.id for i in found.history] == ["4", "3", "5", "0", "2", "1"]
    assert [i.date for i in found.history] == ["2015-12-31", "2016", "2016-01-01", "2016-05-01", "2016-05", "2017"]


def test_a_history_with_an_undated_item_keeps_list_order_and_is_reported_once_per_file(tmp_path, caplog):
    items = [item(NEWS, 5, "secret"), item(NEWS, 1, "secret", date=None), item(NEWS, 3, "secret")]
    write_raw(tmp_path, NEWS, [question(NEWS, f"q{n}", "ann", items) for n in range(3)])
    with caplog.at_level(logging.INFO):
        questions = read(tmp_path, task(NEWS))
    assert [i.id for i in questions[0].history] == ["secret-5", "secret-1", "secret-3"]
    assert [r.getMessage() for r in caplog.records] == ["LaMP_2N/dev_questions.json: histories_in_list_order 3"]


day = st.sampled_from([f"{y}-{m}-{d}" for y in (2015, 2016) for m in ("01", "05") for d in ("01", "29")])


@given(st.lists(st.one_of(day, day.map(lambda d: d[:7]), day.map(lambda d: d[:4])), max_size=30))
def test_histories_are_oldest_first_and_stable(dates):
    with tempfile.TemporaryDirectory() as folder:
        found = one(Path(folder), *(item(NEWS, n, id=str(n), date=date) for n, date in enumerate(dates)))

    # the oracle: insertion by (year, month, day), never the reader's own text key
    def moment(date):
        parts = [int(part) for part in date.split("-")]
        return (*parts, 1, 1)[:3]

    wanted = []
    for n, date in enumerate(dates):
        place = len(wanted)
        while place and moment(dates[wanted[place - 1]]) > moment(date):
            place -= 1
        wanted.insert(place, n)
    assert [int(i.id) for i in found.history] == wanted


@given(st.lists(st.text(max_size=40), max_size=5))
def test_any_text_comes_through_unchanged(texts):
    with tempfile.TemporaryDirectory() as folder:
        found = one(Path(folder), *(item(NEWS, n, text=text) for n, text in enumerate([HOSTILE, *texts])))
    assert [i.fields["text"] for i in found.history] == [HOSTILE, *texts]


@pytest.mark.parametrize("name", tasks())
def test_a_hostile_query_of_any_task_comes_through(tmp_path, name):
    write_raw(tmp_path, name, [question(name, "q", "ann", [], text=HOSTILE.strip())])
    (found,), counts = read_counted(tmp_path, task(name))
    assert set(task(name).read(found.input).values()) == {HOSTILE.strip()}
    assert counts == {}


def test_a_query_that_can_be_read_in_two_ways_is_counted(tmp_path):
    questions = [question("LaMP_1", n, "ann", [], text=text) for n, text in enumerate(["A title", 'A" [2]: "B'])]
    write_raw(tmp_path, "LaMP_1", questions)
    assert read_counted(tmp_path, task("LaMP_1"))[1] == {"ambiguous_inputs": 1}


def test_citation_items_have_title_and_abstract_and_no_citation(tmp_path):
    made = {"id": "6000", "title": "T", "abstract": "A [1] of it", "date": "2016"}
    cited = made | {"id": "6001", "citation": ["x"], "venue": None}
    found = one(tmp_path, made, cited, name="LaMP_1")
    assert [i.fields for i in found.history] == [{"title": "T", "abstract": "A [1] of it"}] * 2


def test_the_longest_history_and_the_longest_review_of_lamp(tmp_path):
    review = " ".join(f"word{n}" for n in range(1648))
    found = one(tmp_path, *(item("LaMP_3", n) for n in range(842)), item("LaMP_3", 842, text=review), name="LaMP_3")
    assert len(found.history) == 843
    assert len(found.history[-1].fields["text"].split()) == 1648
    (same,), counts = read_counted(tmp_path, task("LaMP_3"))
    assert same == found and counts == {}


def test_a_querys_own_text_in_its_history_is_read_as_it_stands_and_left_out_by_the_split(tmp_path):
    asked = "I loved it,\n\nand more"
    items = [item("LaMP_3", 0, id="other"), item("LaMP_3", 1, id="own", text="I loved it, and  more")]
    write_raw(tmp_path, "LaMP_3", [question("LaMP_3", "q", "ann", items, text=asked)])
    questions = read(tmp_path, task("LaMP_3"))
    assert [i.id for i in questions[0].history] == ["other", "own"]
    result = split(questions, task("LaMP_3"), Split(test_users="dev"))
    assert [i.id for i in result.test[0].history] == ["other"]
    assert result.counts["items_of_own_queries"] == 1


def test_lone_surrogates_become_replacement_characters_and_are_counted(tmp_path):
    found = one(tmp_path, item(NEWS, 0, text="a\ud800b🙈\udc00"))
    assert found.history[0].fields["text"] == "a\ufffdb🙈\ufffd"
    assert read_counted(tmp_path, task(NEWS))[1] == {"texts_with_lone_surrogates": 1}


def test_duplicated_items_stay_and_are_shared(tmp_path):
    history = [item(NEWS, 0), item(NEWS, 0), item(NEWS, 1)]
    write_raw(tmp_path, NEWS, [question(NEWS, n, "ann", history) for n in range(2)])
    first, second = read(tmp_path, task(NEWS))
    assert len(first.history) == 3
    assert first.history[0] is first.history[1] is second.history[0]


def test_a_megabyte_and_an_unknown_label_are_accepted_and_counted(tmp_path):
    found = one(tmp_path, item(NEWS, 0, text="x" * 10**6, category="knitting"))
    assert len(found.history[0].fields["text"]) == 10**6
    assert read_counted(tmp_path, task(NEWS))[1] == {"items_with_unknown_label": 1, "long_items": 1}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"text": None}, "history[1] has a 'text' that is missing or null, not text"),
        ({"text": ["a"]}, "history[1] has a 'text' that is a list, not text"),
        ({"category": {"a": 1}}, "history[1] has a 'category' that is an object, not text"),
        ({"date": "May 2016"}, "history[1] has the date 'May 2016'; needed is YYYY-MM-DD, YYYY-MM, YYYY or none"),
        ({"date": "2016-13"}, "history[1] has the date '2016-13'; needed is YYYY-MM-DD, YYYY-MM, YYYY or none"),
        ({"date": "2015-02-29"}, "history[1] has the date '2015-02-29'; needed is YYYY-MM-DD, YYYY-MM, YYYY or none"),
        ({"date": "２０１６"}, "history[1] has the date '２０１６'; needed is YYYY-MM-DD, YYYY-MM, YYYY or none"),
        ({"date": [2016]}, "history[1] has the date a list; needed is YYYY-MM-DD, YYYY-MM, YYYY or none"),
        ({"id": 1.5}, "history[1] has an 'id' that is a number; needed is text, an integer or none"),
    ],
)
def test_a_bad_item_is_refused_by_its_place(tmp_path, change, wanted):
    write_raw(tmp_path, NEWS, [question(NEWS, "q1", "ann", [item(NEWS, 0), item(NEWS, 1) | change])])
    assert refused(tmp_path) == [f"LaMP_2N/dev_questions.json: question q1: {wanted}"]


def test_a_missing_field_is_named_like_the_design_says(tmp_path):
    broken = {name: value for name, value in item(NEWS, 3).items() if name != "category"}
    write_raw(tmp_path, NEWS, [question(NEWS, 12, "ann", [item(NEWS, n) for n in range(3)] + [broken])])
    assert refused(tmp_path) == ["LaMP_2N/dev_questions.json: question 12: history[3] has no 'category'"]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"profile": {"a": 1}}, "question q1: 'profile' is an object, not a list of items"),
        ({"profile": None}, "question q1: 'profile' is missing or null, not a list of items"),
        ({"profile": ["secret"]}, "question q1: history[0] is text, not an object"),
        ({"input": None}, "question q1: 'input' is missing or null, not text"),
        ({"user_id": ["a"]}, "question q1: 'user_id' is a list or empty; needed is text"),
        ({"user_id": ""}, "question q1: 'user_id' is text or empty; needed is text"),
        ({"id": None}, "question number 0: 'id' is missing or null or empty; needed is text"),
        ({"id": 1.5}, "question number 0: 'id' is a number or empty; needed is text"),
    ],
)
def test_a_bad_question_is_refused(tmp_path, change, wanted):
    write_raw(tmp_path, NEWS, [question(NEWS, "q1", "ann", []) | change], [{"id": "q1", "output": "crime"}])
    assert f"LaMP_2N/dev_questions.json: {wanted}" in refused(tmp_path)


def test_an_input_of_another_form_is_refused_without_showing_it(tmp_path):
    write_raw(tmp_path, NEWS, [question(NEWS, "q1", "ann", [], input="Guess: my secret")])
    (problem,) = refused(tmp_path)
    assert problem.startswith("LaMP_2N/dev_questions.json: question q1: input does not have the form 'Which category")
    assert "secret" not in problem


def test_user_based_files_are_refused_with_the_reason_once(tmp_path):
    questions = [question(NEWS, n, "ann", []) for n in range(30)]
    for each in questions:
        del each["user_id"]
    write_raw(tmp_path, NEWS, questions)
    (problem,) = refused(tmp_path)
    assert problem.startswith(
        "LaMP_2N/dev_questions.json: 30 of 30 questions: no 'user_id': these look like LaMP's user"
    )


def test_questions_that_share_an_id_are_refused_within_and_across_files(tmp_path):
    write_raw(tmp_path, NEWS, [question(NEWS, 1, "ann", []), question(NEWS, "1", "bob", [])])
    wanted = "LaMP_2N/dev_questions.json: question 1: this id stands in dev_questions.json already"
    assert any(problem.startswith(wanted) for problem in refused(tmp_path))
    write_raw(tmp_path, NEWS, [question(NEWS, 1, "ann", [])])
    write_raw(tmp_path, NEWS, [question(NEWS, 1, "cy", [])], source="train")
    assert "this id stands in train_questions.json already" in refused(tmp_path)[0]


@pytest.mark.parametrize(
    ("golds", "wanted"),
    [
        ([], "dev_questions.json: question q1: has no gold in dev_outputs.json"),
        ([("q1", "crime"), ("q9", "crime")], "dev_outputs.json: gold q9: no such question in dev_questions.json"),
        ([("q1", "crime"), ("q1", "crime")], "dev_outputs.json: gold q1: this id stands twice"),
        ([("q1", "knitting")], "dev_outputs.json: gold q1: unknown label 'knitting'; add it to labels of LaMP_2N in"),
        ([("q1", None)], "dev_outputs.json: gold q1: 'output' is missing or null, not text"),
        ([("q1", ["crime"])], "dev_outputs.json: gold q1: 'output' is a list, not text"),
        ([(None, "crime")], "dev_outputs.json: gold number 0: is not an object with an 'id'"),
        ("crime", "dev_outputs.json: holds text where a list of golds is needed"),
        ({"task": NEWS}, "dev_outputs.json: holds missing or null where a list of golds is needed"),
        ({"task": "LaMP_4", "golds": []}, "dev_outputs.json: holds golds of LaMP_4, not of LaMP_2N"),
    ],
)
def test_bad_golds_are_refused(tmp_path, golds, wanted):
    if isinstance(golds, list):
        golds = [{"id": id_, "output": output} for id_, output in golds]
    write_raw(tmp_path, NEWS, [question(NEWS, "q1", "ann", [])], golds)
    assert any(problem.startswith(f"LaMP_2N/{wanted}") for problem in refused(tmp_path))


def test_lamp_2_names_both_of_its_tasks(tmp_path):
    questions = [question(NEWS, "q1", "ann", [])]
    write_raw(tmp_path, NEWS, questions, {"task": "LaMP_2", "golds": [{"id": "q1", "output": " crime\n"}]})
    assert read(tmp_path, task(NEWS))[0].gold == "crime"


def test_golds_are_needed_unless_told_otherwise(tmp_path):
    (write_task(tmp_path, NEWS, {"ann": 1}).parent / "dev_outputs.json").unlink()
    assert refused(tmp_path) == ["LaMP_2N/dev_questions.json: there is no dev_outputs.json[.gz] beside it; fetch it"]
    assert [q.gold for q in read(tmp_path, task(NEWS), need_golds=False)] == [None]


def test_files_that_do_not_belong_together(tmp_path):
    assert "no question in {train,dev}_questions.json[.gz]" in refused(tmp_path)[0]
    path = write_task(tmp_path, NEWS, {"ann": 1})
    path.with_suffix(".json.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert refused(tmp_path) == ["LaMP_2N/dev_questions.json: stands beside dev_questions.json.gz; remove one of them"]
    path.with_suffix(".json.gz").unlink()
    path.unlink()
    assert refused(tmp_path)[0] == "LaMP_2N/dev_outputs.json: there is no dev_questions.json[.gz] beside it; fetch it"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b'[{"id": 1,]', "is not JSON: Expecting property name enclosed in double quotes at line 1, column 11"),
        (b"[]\n[]", "is not JSON: Extra data at line 2, column 1"),
        (b"", "is not JSON: Expecting value at line 1, column 1"),
        (b'[{"id": NaN}]', "it has NaN, which is no JSON number"),
        (b"[-Infinity]", "it has -Infinity, which is no JSON number"),
        (b'["\xff"]', "is not UTF-8 at byte 2"),
        (b"{}", "holds an object where a list is needed"),
        (b"null", "holds missing or null where a list is needed"),
        (b"[3]", "question number 0: is a number, not an object"),
        (b"[" * 200_000, "is not JSON that can be read"),
    ],
)
def test_broken_files_are_refused_by_name_and_place(tmp_path, content, wanted):
    path = write_task(tmp_path, NEWS, {"ann": 1})
    path.write_bytes(content)
    problems = refused(tmp_path)
    assert problems[0].startswith("LaMP_2N/dev_questions.json: ")
    assert wanted in problems[0]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b[:5], lambda b: b"no gzip", lambda b: b[:30] + b"x" * 9 + b[39:]]
)
def test_damaged_gzip_is_refused_by_name(tmp_path, damage):
    path = write_task(tmp_path, NEWS, {"ann": 20}, gz=True)
    path.write_bytes(damage(path.read_bytes()))
    (problem,) = refused(tmp_path)
    assert problem.startswith("LaMP_2N/dev_questions.json.gz: its gzip data is cut short or damaged")


def test_all_problems_of_all_files_come_at_once(tmp_path):
    write_raw(tmp_path, NEWS, [question(NEWS, 1, "ann", [{}]), question(NEWS, 2, "ann", [], input="x")], source="train")
    write_raw(tmp_path, NEWS, [question(NEWS, 3, "ann", [])], [])
    problems = refused(tmp_path)
    assert [p.split(": ")[:2] for p in problems] == [
        ["LaMP_2N/train_questions.json", "question 1"],
        ["LaMP_2N/train_questions.json", "question 2"],
        ["LaMP_2N/dev_questions.json", "question 3"],
    ]


def test_a_huge_number_is_no_text(tmp_path):
    path = write_task(tmp_path, "LaMP_3", {"ann": 1})
    path.write_text(path.read_text().replace('"score": "1"', '"score": 1e999'))
    assert "has a 'score' that is a number, not text" in refused(tmp_path, "LaMP_3")[0]


@given(st.one_of(st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False)))
def test_a_number_as_text_is_that_number(number):
    text = Items(task("LaMP_3")).text(json.loads(json.dumps(number)))
    assert text is not None
    assert math.isclose(float(text), number, rel_tol=0, abs_tol=0)
    assert not text.endswith(".0")


def test_dates():
    assert [earliest(date) for date in ("2016", "2016-05", "2016-05-09")] == ["2016-01-01", "2016-05-01", "2016-05-09"]
    assert not any(map(is_date, ("", "16", "2016-5", "2016-05-32", "0000", "2016-05-09 10:00", "2016\n")))
