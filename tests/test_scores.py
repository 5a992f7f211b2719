import pytest

from oppu.boards import user_sums
from oppu.cells import read_predictions
from oppu.files import jsonl, read_jsonl
from oppu.records import InputError, Query, User
from oppu.scores import score, score_texts, submission
from oppu.split import queries_of
from oppu.tasks import task
from tests.test_lamp import HOSTILE

NEWS, RATING, TITLES = task("LaMP_2N"), task("LaMP_3"), task("LaMP_5")


def asked(*queries):
    return [{"user": user, "id": id_, "gold": gold} for user, id_, gold in queries]


QUERIES = asked(("u-b", "3", "crime"), ("u-a", "1", "women"), ("u-a", "2", "crime"))


def records(**answers):
    return [{"id": name.removeprefix("q"), "prediction": text} for name, text in answers.items()]


GOOD = {"u-a": records(q1="women", q2="sports"), "u-b": records(q3="no label")}


def test_metrics_have_lamps_names_and_counts():
    found = score(NEWS, QUERIES, GOOD)
    assert found.metrics == {
        "accuracy": pytest.approx(1 / 3),
        "f1": pytest.approx(1 / 15),
        "n_users": 2,
        "n_queries": 3,
        "unknown_labels": 1,
    }
    assert list(found.scored[0]) == ["user", "id", "gold", "prediction", "gold_label", "predicted_label", "correct"]
    assert [(row["user"], row["id"], row["correct"]) for row in found.scored] == [
        ("u-a", "1", True),
        ("u-a", "2", False),
        ("u-b", "3", False),
    ]


def test_the_order_of_predictions_does_not_matter():
    turned = {"u-b": GOOD["u-b"], "u-a": GOOD["u-a"][::-1]}
    assert score(NEWS, QUERIES, turned).scored == score(NEWS, QUERIES, GOOD).scored


def test_ids_may_repeat_among_users():
    queries = asked(("u-a", "1", "crime"), ("u-b", "1", "women"))
    both = {"u-a": records(q1="crime"), "u-b": records(q1="crime")}
    assert score(NEWS, queries, both).metrics["accuracy"] == 0.5
    with pytest.raises(InputError, match="user u-b: query id 1 stands twice"):
        submission(NEWS, both)


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({"u-a": GOOD["u-a"]}, "LaMP_2N: user u-b: query 3: no prediction"),
        (GOOD | {"u-b": []}, "LaMP_2N: user u-b: query 3: no prediction"),
        (GOOD | {"u-b": GOOD["u-b"] * 2}, "LaMP_2N: user u-b: query 3: predicted twice"),
        (GOOD | {"u-b": records(q3="crime", q4="crime")}, "LaMP_2N: user u-b: query 4: predicted, but no such query"),
        (GOOD | {"u-c": records(q3="crime")}, "LaMP_2N: user u-c: query 3: predicted, but no such query"),
        (
            GOOD | {"u-b": [{"id": "3", "prediction": None}]},
            "user u-b: query 3: the prediction must be text, found NoneType",
        ),
        (GOOD | {"u-b": [{"id": "3"}]}, "user u-b: query 3: the prediction must be text"),
    ],
)
def test_refusals_name_user_and_query(predictions, message):
    with pytest.raises(InputError) as caught:
        score(NEWS, QUERIES, predictions)
    assert message in str(caught.value)


def test_all_problems_are_collected():
    with pytest.raises(InputError) as caught:
        score(NEWS, QUERIES, {"u-c": records(q9="crime")})
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(("gold", "message"), [(None, "there is no gold"), ("gardening", "not among the labels")])
def test_queries_without_a_usable_gold_are_refused(gold, message):
    queries = asked(("u-a", "1", gold))
    with pytest.raises(InputError, match=f"user u-a: query 1: .*{message}"):
        score(NEWS, queries, {"u-a": records(q1="crime")})


def test_no_queries_and_doubled_queries_are_refused():
    with pytest.raises(InputError, match="no queries"):
        score(NEWS, [], {})
    with pytest.raises(InputError, match="user u-b: query 3: asked twice"):
        score(NEWS, [*QUERIES, QUERIES[0]], GOOD)


def test_unreadable_ratings_are_counted():
    queries = asked(("u-b", "3", "4"), ("u-a", "1", "2"), ("u-a", "2", "5"))
    found = score(RATING, queries, {"u-a": records(q1="two", q2="4"), "u-b": records(q3="4")})
    assert found.metrics == {
        "MAE": pytest.approx((3 + 1 + 0) / 3),
        "RMSE": pytest.approx((10 / 3) ** 0.5),
        "n_users": 2,
        "n_queries": 3,
        "unreadable_ratings": 1,
    }


def test_cut_prompts_are_counted_where_known():
    cut = {"u-a": [GOOD["u-a"][0] | {"cut_history": 3}, GOOD["u-a"][1] | {"cut_query": 0}], "u-b": GOOD["u-b"]}
    assert score(NEWS, QUERIES, cut).metrics["cut_prompts"] == 1
    assert "cut_prompts" not in score(NEWS, QUERIES, GOOD).metrics


def test_generation_survives_a_round_trip_through_json_lines(tmp_path):
    answers = {("u-a", "1"): "women", ("u-a", "2"): "crime and women", ("u-b", "3"): ""}
    scored = score_texts(TITLES, QUERIES, answers).scored
    (tmp_path / "scored.jsonl").write_bytes(jsonl(scored))
    again = user_sums(TITLES, read_jsonl(tmp_path / "scored.jsonl"))
    assert again.users == ["u-a", "u-b"]
    assert again.sums.tolist() == [[2, 1.5, 1.5], [1, 0, 0]]


def test_queries_of_users():
    user = User("u-a", "17", (), (Query("1", "input", "crime"), Query("2", "input")))
    rows = [("u-a", "1", "input", "crime"), ("u-a", "2", "input", None)]
    assert [tuple(query.values()) for query in queries_of([user])] == rows


def test_submission_is_lamps_format_in_a_fixed_order():
    expected = [{"id": "1", "output": "women"}, {"id": "2", "output": "sports"}, {"id": "3", "output": "no label"}]
    for predictions in (GOOD, dict(reversed(GOOD.items()))):
        assert submission(NEWS, predictions) == {"task": "LaMP_2N", "golds": expected}


def test_a_prediction_may_hold_any_text(tmp_path):
    rows = [{"id": "1", "prediction": HOSTILE}, {"id": "2", "prediction": "\u2029\x1e\x85\r"}]
    (tmp_path / "predictions.jsonl").write_bytes(jsonl(rows))
    assert read_predictions(tmp_path) == rows
