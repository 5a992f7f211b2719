import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error

from oppu.metrics import measure, rating_of, totals, user_values, values
from oppu.tasks import task

NEWS, RATING, TITLES = task("LaMP_2N"), task("LaMP_3"), task("LaMP_5")
LABELS = NEWS.labels or []


def sums(of, pairs):
    return totals(of, [measure(of, gold, prediction) for gold, prediction in pairs])


answers = st.one_of(st.sampled_from(LABELS), st.sampled_from(["", "Politics", "politics, crime", "nonsense"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(LABELS), answers), min_size=1, max_size=60))
def test_classification_equals_sklearn_on_lamps_indices(pairs):
    found = values(NEWS, sums(NEWS, pairs))
    gold = [LABELS.index(g) for g, _ in pairs]
    predicted = [LABELS.index(p) if p in LABELS else -1 for _, p in pairs]
    every = list(range(len(LABELS)))
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, predicted))
    assert found["f1"] == pytest.approx(f1_score(gold, predicted, labels=every, average="macro", zero_division=0))


def test_labels_that_never_occur_count_as_zero():
    found = values(NEWS, sums(NEWS, [("politics", "politics"), ("crime", "crime")]))
    assert found["accuracy"] == 1
    assert found["f1"] == pytest.approx(2 / 15)


def test_predictions_are_stripped_but_not_otherwise_mended():
    assert measure(NEWS, "crime ", " crime\n")["correct"]
    assert measure(NEWS, "crime", "Crime") == {
        "gold_label": LABELS.index("crime"),
        "predicted_label": -1,
        "correct": False,
    }


def test_user_f1_is_over_the_labels_that_occur_for_the_user():
    own = np.stack([sums(NEWS, [("crime", "crime")]), sums(NEWS, [("crime", "women"), ("crime", "no label")])])
    assert user_values(NEWS, own)["f1"].tolist() == [1.0, 0.0]
    pairs = [("crime", "crime"), ("crime", "women"), ("sports", "sports")]
    found = user_values(NEWS, np.array([sums(NEWS, pairs)]))["f1"]
    assert found == pytest.approx(f1_score(*zip(*pairs, strict=True), average="macro"))


@pytest.mark.parametrize("of", [NEWS, RATING])
def test_a_gold_outside_the_labels_is_refused(of):
    with pytest.raises(ValueError, match=of.name):
        measure(of, "gardening", "crime")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("12345"), st.sampled_from(["1", " 2", "3.5", "5\n", "7"])), min_size=1))
def test_rating_equals_sklearn(pairs):
    found = values(RATING, sums(RATING, pairs))
    gold, predicted = [float(g) for g, _ in pairs], [float(p) for _, p in pairs]
    assert found["mae"] == pytest.approx(mean_absolute_error(gold, predicted))
    assert found["rmse"] == pytest.approx(root_mean_squared_error(gold, predicted))


@pytest.mark.parametrize("text", ["", "five", "4 stars", "nan", "inf", "1e300", "9" * 400])
@pytest.mark.parametrize(("gold", "farther"), [(1, 5), (2, 5), (3, 5), (4, 1), (5, 1)])
def test_an_unreadable_rating_is_the_farther_end(text, gold, farther):
    assert rating_of(text, gold) == (farther, False)


def test_ratings_outside_the_scale_stay_what_they_are():
    assert measure(RATING, "5", "10") == {"error": 5.0, "readable": True}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=8))
def test_generation_is_the_plain_mean_of_rouge_without_stemming(pairs):
    found = values(TITLES, sums(TITLES, pairs))
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    for name in ("rouge1", "rougeL"):
        expected = np.mean([scorer.score(g.strip(), p.strip())[name].fmeasure for g, p in pairs])
        assert found[name] == pytest.approx(expected)


def test_no_stemming():
    assert measure(TITLES, "tuning adapters", "tuned adapter") == {"rouge1": 0.0, "rougeL": 0.0}


def test_metrics_work_on_any_leading_shape():
    one, two = sums(NEWS, [("crime", "crime")]), sums(NEWS, [("crime", "women")])
    stacked = np.stack([[one, two], [two, one]])
    assert values(NEWS, stacked)["accuracy"].tolist() == [[1, 0], [0, 1]]
