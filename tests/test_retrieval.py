import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from oppu.records import InputError, Item, Query
from oppu.retrieval import (
    Draws,
    Index,
    Search,
    history_text,
    prefix_scores,
    prefix_top_k,
    query_text,
    random_item,
    retrieve_for_history,
    retrieve_for_queries,
    top_k,
)
from oppu.setting import Augmentation, parse_augmentation
from oppu.tasks import task, tasks
from tests.samples import TASKS, users

NEWS = task("LaMP_2N")
LINE = NEWS.input.replace("{article}", "")


def fresh_scores(documents, query):
    """The oracle: rank_bm25 built anew."""
    return BM25Okapi([d.split(" ") for d in documents]).get_scores(query.split(" ")) if documents else np.zeros(0)


def ranked(scores):
    return sorted(range(len(scores)), key=lambda place: (-scores[place], -place))


def assert_as_fresh(documents, queries, ks=(1, 2, 4)):
    fresh = [fresh_scores(documents[:i], query) for i, query in enumerate(queries)]
    for own, other in zip(prefix_scores(documents, queries), fresh, strict=True):
        assert own.dtype == np.float64
        assert own.tobytes() == other.tobytes()
    orders = [ranked(scores) for scores in fresh]
    for k in (*ks, len(documents) + 1):
        assert prefix_top_k(documents, queries, k) == [order[:k] for order in orders]


@pytest.mark.parametrize("source", ["train", "dev"])
@pytest.mark.parametrize("name", TASKS)
def test_every_item_of_the_sample_is_retrieved_as_by_a_fresh_index_of_its_past(name, source):
    for user in users(name, source):
        documents = [task(name).item_text(item) for item in user.history]
        assert_as_fresh(documents, [history_text(task(name), item) for item in user.history])


@pytest.mark.parametrize("name", TASKS)
def test_every_query_of_the_sample_is_retrieved_as_by_rank_bm25(name):
    for user in users(name, "dev"):
        documents = [task(name).item_text(item) for item in user.history]
        index = Index(documents)
        for query in user.queries:
            text = query_text(task(name), query)
            assert index.top_k(text, 4) == ranked(fresh_scores(documents, text))[:4] == top_k(documents, text, 4)


texts = st.lists(st.sampled_from(["", "a", "b", "c", "the", "The", "\n", "x\ty", "é"]), max_size=8).map(" ".join)


@given(st.lists(st.tuples(texts, texts), max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_texts_give_the_scores_and_order_of_a_fresh_index(pairs):
    assert_as_fresh([document for document, _ in pairs], [query for _, query in pairs])


dates = st.dates().map(lambda date: date.isoformat())
histories = st.lists(st.tuples(dates, texts, st.sampled_from(["crime", "women"])), max_size=10).map(
    lambda rows: [Item(str(n), d, {"text": t, "category": y}) for n, (d, t, y) in enumerate(sorted(rows))]
)
augmentations = st.sampled_from(["k1", "k2", "k4", "profile-k1", "random"]).map(parse_augmentation)


@given(histories, augmentations)
@settings(deadline=None)
def test_nothing_is_retrieved_from_the_item_at_hand_on(history, augmentation):
    found = retrieve_for_history(NEWS, history, augmentation, Draws(0, "u-1"))
    assert len(found) == len(history)
    for i, items in enumerate(found):
        assert len(items) <= min(augmentation.k, i)
        assert all(int(item.id) < i and item.date <= history[i].date for item in items)


@given(histories, histories, augmentations.filter(lambda augmentation: not augmentation.random))
@settings(deadline=None)
def test_later_items_change_nothing_that_is_retrieved_for_earlier_ones(past, later, augmentation):
    found = retrieve_for_history(NEWS, past + later, augmentation)
    assert found[: len(past)] == retrieve_for_history(NEWS, past, augmentation)


def test_edge_cases():
    assert top_k([], "a", 3) == []
    assert prefix_top_k([], [], 3) == []
    assert prefix_top_k(["a"], ["a"], 3) == [[]]
    assert top_k(["a", "b"], "a", 0) == prefix_top_k(["a"], ["a"], 0)[0] == []
    assert top_k(["a", "b", "c"], "a", 9) == [0, 2, 1], "all of a small corpus; the more recent first among equals"
    assert top_k(["a", "b", "c"], "", 3) == [2, 1, 0], "an empty query finds nothing better than the most recent"
    assert top_k(["", "b", "c"], "", 1) == [0], "an empty text is one empty word"
    assert top_k(["A b", "a c", "d e"], "A", 1) == [0], "case is kept"
    assert top_k(["a\nb", "c", "d"], "a", 1) == [2], "only single spaces divide words"
    with pytest.raises(ValueError, match="1 documents, 2 queries"):
        prefix_top_k(["a"], ["a", "b"], 1)


def test_scores_of_near_duplicates_stay_negative_and_rank_as_they_stand():
    documents = ["same text", "same text", "same text once more"]
    scores = fresh_scores(documents, "same text")
    assert (scores < 0).all()
    assert top_k(documents, "same text", 3) == ranked(scores) == [2, 1, 0]


def test_augmentations_by_name():
    assert parse_augmentation("k0") == Augmentation(False, 0)
    assert parse_augmentation("k4") == Augmentation(False, 4)
    assert parse_augmentation("profile-k1") == Augmentation(True, 1)
    assert parse_augmentation("random") == Augmentation(False, 1, random=True)
    for bad in ("", "k", "K1", "profile", "profile-random", "k1 "):
        with pytest.raises(InputError, match="is none of"):
            parse_augmentation(bad)


@pytest.mark.parametrize("name", tasks())
def test_what_is_searched_is_the_base_prompt(name):
    record = task(name)
    parts = {"article": "a {b} c", "description": "d", "review": "r", "abstract": "s", "text": "t"}
    parts |= {"title": "t", "option1": "o", "option2": "p"}
    wanted = {field: parts[field] for field in parts if "{" + field + "}" in record.input}
    expected = record.prompt
    for field, value in wanted.items():
        expected = expected.replace("{" + field + "}", value)
    text = record.input
    for field, value in wanted.items():
        text = text.replace("{" + field + "}", value)
    assert query_text(record, Query("1", text)) == expected
    item = Item("1", None, {field: f"own {field}" for field in record.history})
    searched = history_text(record, item)
    if record.pair:
        assert record.y is not None
        assert item.fields[record.y] not in searched, "the answer is not searched for"
        assert searched.startswith(record.prompt[:40])
    else:
        assert searched == record.item_text(item)


def test_a_template_of_its_own_for_retrieval():
    record = NEWS.model_copy(update={"retrieval_query": "{article}"})
    assert query_text(record, Query("1", LINE + "x y")) == "x y"
    assert history_text(record, Item("1", None, {"text": "x y", "category": "crime"})) == "x y"


def items(*texts, y="crime"):
    return [Item(str(n), None, {"text": text, "category": y}) for n, text in enumerate(texts)]


def test_queries_take_from_the_whole_history_best_first():
    history = items("cats and dogs", "ships", "dogs at sea", "stars")
    queries = [Query("1", LINE + "sea dogs"), Query("2", LINE + "ships")]
    found = retrieve_for_queries(NEWS, history, queries, parse_augmentation("k2"))
    assert [[item.fields["text"] for item in row] for row in found] == [
        ["dogs at sea", "cats and dogs"],
        ["ships", "dogs at sea"],
    ]
    assert retrieve_for_queries(NEWS, history, queries, parse_augmentation("profile-k0")) == [(), ()]
    assert retrieve_for_queries(NEWS, [], queries, parse_augmentation("k2")) == [(), ()]
    assert retrieve_for_history(NEWS, history, parse_augmentation("k0")) == [()] * 4


def test_random_items_depend_on_seed_task_user_and_purpose_alone():
    pool = items(*map(str, range(1000)))

    def draw(*of):
        item = random_item(pool, *of)
        assert item is not None
        return item.id

    first = draw(0, "LaMP_2N", "u-1", "query/1")
    assert first == draw(0, "LaMP_2N", "u-1", "query/1")
    others = [(1, "LaMP_2N", "u-1", "query/1"), (0, "LaMP_4", "u-1", "query/1")]
    others += [(0, "LaMP_2N", "u-2", "query/1"), (0, "LaMP_2N", "u-1", "query/2")]
    assert first not in [draw(*of) for of in others]
    counts = np.bincount([int(draw(0, "t", "u", f"query/{n}")) // 100 for n in range(2000)], minlength=10)
    assert counts.min() > 150
    assert counts.max() < 250
    assert random_item([], 0, "t", "u", "p") is None


def test_random_items_come_from_the_base_or_from_the_users_own_past():
    history, pool = items("a", "b", "c"), items("p", "q")
    queries = [Query(str(n), LINE + "x") for n in range(50)]
    augmentation = parse_augmentation("random")

    def texts_of(found):
        return [tuple(item.fields["text"] for item in row) for row in found]

    assert set(texts_of(retrieve_for_queries(NEWS, history, queries, augmentation, Draws(0, "u-1", pool)))) == {
        ("p",),
        ("q",),
    }
    own = retrieve_for_queries(NEWS, history, queries, augmentation, Draws(0, "u-1"))
    assert set(texts_of(own)) == {("a",), ("b",), ("c",)}
    assert texts_of(retrieve_for_queries(NEWS, [], queries[:1], augmentation, Draws(0, "u-1"))) == [()]
    alone = retrieve_for_queries(NEWS, history, queries[7:8], augmentation, Draws(0, "u-1"))
    assert alone == own[7:8], "a query's draw depends on no other query"
    with pytest.raises(ValueError, match="Draws"):
        retrieve_for_queries(NEWS, history, queries, augmentation)


def test_a_random_item_is_never_a_copy_of_the_item_at_hand_or_of_a_later_one():
    history, pool = items("a", "b", "c"), items("b", "c", "x")
    for seed in range(20):
        found = retrieve_for_history(NEWS, history, parse_augmentation("random"), Draws(seed, "u-1", pool))
        texts = [[item.fields["text"] for item in row] for row in found]
        assert texts[0] == texts[1] == ["x"]
        assert texts[2] in (["b"], ["x"])
    assert random_item(items("b"), 0, "t", "u", "p", never=history) is None


def by_letters(texts):
    """An encoder that counts letters."""
    counts = np.array([[text.count(letter) for letter in "abcdefghij"] for text in texts], dtype=float) + 1e-9
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@given(st.lists(st.text("abcdefghij ", min_size=1, max_size=12), min_size=1, max_size=9), st.integers(1, 4))
def test_recency_takes_the_newest_and_dense_the_nearest_of_the_past(texts, k):
    history = [Item(str(n), None, {"text": text, "category": "crime"}) for n, text in enumerate(texts)]
    queries = [Query("q", NEWS.input.replace("{article}", "abc"))]
    search = Search("text", by_letters)
    recency, dense = (parse_augmentation(f"{kind}-k{k}") for kind in ("recency", "dense"))
    for n, found in enumerate(retrieve_for_history(NEWS, history, recency)):
        assert list(found) == list(reversed(history[:n]))[:k]
    assert list(retrieve_for_queries(NEWS, history, queries, recency)[0]) == list(reversed(history))[:k]

    def nearest(text, past):
        vectors = by_letters([NEWS.item_text(item) for item in past]) if past else np.zeros((0, 10))
        scores = vectors @ by_letters([text])[0]
        return [past[place] for place in ranked(scores)][:k]

    for n, found in enumerate(retrieve_for_history(NEWS, history, dense, search=search)):
        assert len(found) == min(n, k) and set(map(id, found)) <= set(map(id, history[:n]))
        scores = [by_letters([NEWS.item_text(i)])[0] @ by_letters([history[n].fields["text"]])[0] for i in found]
        best = [
            by_letters([NEWS.item_text(i)])[0] @ by_letters([history[n].fields["text"]])[0]
            for i in nearest(history[n].fields["text"], history[:n])
        ]
        assert np.allclose(scores, best)
    with pytest.raises(ValueError, match="encoder"):
        retrieve_for_queries(NEWS, history, queries, dense)


def test_what_is_searched_is_the_prompt_or_the_text_alone():
    item, query = (
        Item("1", None, {"text": "a b", "category": "crime"}),
        Query("q", NEWS.input.replace("{article}", "x y")),
    )
    assert query_text(NEWS, query, "text") == "x y" and "categories:" in query_text(NEWS, query)
    assert history_text(NEWS, item, "text") == "a b" and "categories:" in history_text(NEWS, item)


@pytest.mark.parametrize("name", ["recency-k0", "dense-k0", "dense-1", "recency", "random-k1", "profile-random"])
def test_a_retriever_without_items_is_no_augmentation(name):
    with pytest.raises(InputError, match="augmentation"):
        parse_augmentation(name)
