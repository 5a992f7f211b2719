import subprocess
import sys

import pytest

from oppu.profiles import commonest, extractive
from oppu.records import Item
from oppu.tasks import task, tasks
from tests.samples import TASKS, users


def history(name, **columns):
    rows = zip(*columns.values(), strict=True)
    other = dict.fromkeys(task(name).history, "")
    return [Item(str(n), None, other | dict(zip(columns, row, strict=True))) for n, row in enumerate(rows)]


def test_the_commonest_value_and_among_equals_the_later():
    assert commonest([]) is None
    assert commonest(["a", "b", "b", "a", "c"]) == "a"
    assert commonest(["a", "b", "a", "b", "c"]) == "b"


def test_the_commonest_label():
    assert extractive(task("LaMP_2N"), history("LaMP_2N", category=["crime", "women", "crime"])) == (
        "most popular category: crime"
    )
    assert extractive(task("LaMP_2M"), history("LaMP_2M", tag=["comedy", "action"])) == "most popular tag: action"
    assert extractive(task("LaMP_2M"), history("LaMP_2M", tag=[" "])) == "most popular tag: none"


@pytest.mark.parametrize(
    ("scores", "positive", "negative"),
    [
        (["5", "4", "4", "3", "3", "3", "1", "2", "2"], "4", "2"),
        (["5", "4", "3"], "4", "none"),
        (["3", "1"], "none", "1"),
        (["3", "good", ""], "none", "none"),
    ],
)
def test_the_commonest_scores(scores, positive, negative):
    assert extractive(task("LaMP_3"), history("LaMP_3", score=scores)) == (
        f"most common positive score: {positive}, most common negative score: {negative}"
    )


def test_headlines_by_length_shape_and_words():
    titles = ["Trump’s Tax Plan: What Now?", "The Tax Bill, Explained", "Why Donald Trump Is Wrong"]
    assert extractive(task("LaMP_4"), history("LaMP_4", title=titles)) == (
        "headlines of about 5 words; Title Case, often with a colon, often a question; typical words: trump, tax"
    )


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("SO GOOD", "UPPER CASE"),
        ("so good", "lower case"),
        ("So good today", "Sentence case"),
        ("so Good today", "mixed case"),
        ("12 + 3", "no words, often with numbers"),
        ("So good! #monday", "Sentence case, often exclaiming, often with hashtags"),
        ("So good https://t.co/a?b=1 @Bob2", "Sentence case"),
    ],
)
def test_shapes(text, shape):
    assert f"; {shape}; " in extractive(task("LaMP_7"), history("LaMP_7", text=[text]))


def test_a_sign_needs_more_than_three_in_ten():
    def profile(n):
        return extractive(task("LaMP_7"), history("LaMP_7", text=["so good?"] * n + ["so good"] * (10 - n)))

    assert "question" not in profile(3)
    assert "often a question" in profile(4)


def test_words_are_those_that_most_items_use():
    texts = ["Beta beta beta the", "alpha &amp; gamma", "gamma http://delta.org delta", "it's @delta alpha"]
    found = extractive(task("LaMP_7"), history("LaMP_7", text=texts)).split("words: ")[1]
    assert found == "alpha, gamma", "seen in two items; ties by first appearance"
    assert extractive(task("LaMP_7"), history("LaMP_7", text=["one beta alpha"])).endswith(": beta, alpha")
    assert extractive(task("LaMP_7"), history("LaMP_7", text=["", ""])) == (
        "tweets of about 0 words; none; typical words: none"
    )
    many = " ".join("abcdefghij"[n] * 3 for n in range(10))
    assert extractive(task("LaMP_7"), history("LaMP_7", text=[many])).count(",") == 7, "eight words"


@pytest.mark.parametrize("name", tasks())
def test_no_history_has_no_profile(name):
    assert extractive(task(name), []) == ""


def test_the_researchers_topics_come_from_titles_and_abstracts():
    papers = history("LaMP_1", title=["Graph parsing", "Parsing trees"], abstract=["We parse graph data.", "Trees."])
    assert extractive(task("LaMP_1"), papers) == "research interests and topics: parsing"


@pytest.mark.parametrize("name", TASKS)
def test_every_user_of_the_sample_has_a_profile_of_one_line(name):
    for user in users(name, "dev"):
        profile = extractive(task(name), user.history)
        assert profile == extractive(task(name), user.history)
        assert "\n" not in profile
        assert "none" not in profile


def test_profiles_import_nothing_heavy():
    code = "import oppu.profiles, sys; print([m for m in ('torch', 'sklearn', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
