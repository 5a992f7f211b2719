import pytest

from oppu.table1 import SETTINGS
from oppu.tables import write_tables
from oppu.tasks import task, tasks
from oppu.terminal import terminal_table
from tests.synthetic import HOW, NEWS, RATING, TITLES, both, reference, setting


@pytest.fixture
def shown(tmp_path):
    def show(settings, references, mixed):
        write_tables(tmp_path, settings, references, mixed, HOW)
        return terminal_table(*(tmp_path / f"{name}.csv" for name in ("scores", "references", "versus", "seeds")))

    return show


def test_differences_references_and_mixed_users_are_shown(shown):
    lines = {"user-majority": reference(NEWS, 0.5), "bag-of-words": reference(NEWS, 0.7)}
    mixed = {"LaMP_2N": {f"u-{i:02}" for i in range(8)}}
    text = shown(both(NEWS), {"LaMP_2N": lines}, mixed)
    first = text.split("\n\n")[0].splitlines()
    assert first[0] == "LaMP_2N personalized news categorization: accuracy (higher is better); 20 users, 100 queries"
    assert first[1].split() == ["prompt", "none", "lora", "lora", "-", "none"]
    assert first[2].startswith("  k0  ") and first[2].endswith(" *")
    assert "user-majority ." in first[3] and "bag-of-words ." in first[3]
    assert any(line.split() == ["lora", "minus", "user-majority", "bag-of-words"] for line in first)
    assert any("8 mixed users, 40 queries" in line for line in first)
    assert any(line.split() == ["lora", "minus", "none", "user-majority", "bag-of-words"] for line in first)


def test_other_kinds_stand_below_lora_with_both_differences(shown):
    every = [*both(NEWS), setting(NEWS, "k0", "ia3", 0.7, seed=2), setting(NEWS, "k0", "prompt", 0.1, seed=3)]
    lines = shown(every, {}, {}).split("\n\n")[0].splitlines()
    heads = [line.split() for line in lines[3::2]]
    assert heads[:2] == [["kind", k, k, "-", "none", "lora", "-", k] for k in ("ia3", "prompt")]
    assert " *" in lines[4] and lines[4].count("[") == 3
    assert "worse" in lines[6]
    assert "puts learned tokens" in shown(every, {}, {}).replace("\n", " ")
    assert "puts learned" not in shown(both(NEWS), {}, {}).replace("\n", " ")


def test_what_is_worse_is_not_starred(shown):
    text = shown([setting(RATING, "k0", "none", 0.9), setting(RATING, "k0", "lora", 0.3, seed=1)], {}, {})
    row = next(line for line in text.splitlines() if line.startswith("  k0"))
    assert row.endswith("worse") and "+" in row


def test_few_users_are_never_marked(shown):
    few = [setting(NEWS, "k0", "none", 0.0, users=4), setting(NEWS, "k0", "lora", 1.0, users=4)]
    rows = [line for line in shown(few, {}, {}).splitlines() if line.startswith("  k0")]
    assert all(row.endswith("]") for row in rows)


def test_a_setting_without_its_pair_leaves_a_dash(shown):
    text = shown([setting(TITLES, "random", "none", 0.4)], {}, {})
    row = next(line for line in text.splitlines() if line.startswith("  random"))
    assert row.split()[-2:] == ["-", "-"]


def test_no_line_is_wider_than_the_terminal(shown):
    every = [setting(of, a, p, 0.5, users=7) for of in tasks().values() for a, p in SETTINGS.values()]
    names = ["global-majority", "user-majority", "last-label", "bag-of-words", "bag-of-words-user-prior", "copy-bm25"]
    lines = {n: [row for row in reference(NEWS, 0.6) if row["user"] < "u-07"] for n in names}
    text = shown(every, {"LaMP_2N": lines}, {"LaMP_2N": {"u-00", "u-01"}})
    assert max(len(line) for line in text.splitlines()) <= 100
    assert all(name in text for name in tasks())
    assert task("LaMP_7").title in text


def test_controls_are_shown_with_their_gain_and_what_lora_adds(shown):
    kinds = {"none": 0.3, "lora": 0.9, "pooled": 0.5, "swapped": 0.3}
    text = shown([setting(NEWS, "k0", kind, right, seed=n) for n, (kind, right) in enumerate(kinds.items())], {}, {})
    first = text.split("\n\n")[0].splitlines()
    at = first.index(next(line for line in first if line.split()[:2] == ["control", "swapped"]))
    assert first[at].split() == ["control", "swapped", "swapped", "-", "none", "lora", "-", "swapped"]
    assert first[at + 1].startswith("  k0  ") and first[at + 1].endswith(" *")
    assert any(line.split()[:2] == ["control", "pooled"] for line in first)
    assert "swapped is another user's adapter" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


def test_spread_over_seeds_is_shown_where_there_are_several(shown):
    kinds = {"none": 0.4, "lora": 0.8}
    repeats = [
        setting(NEWS, "k0", kind, right, seed=10 * n + i, repeat=n)
        for n in range(2)
        for i, (kind, right) in enumerate(kinds.items())
    ]
    first = shown(repeats, {}, {}).split("\n\n")[0].splitlines()
    at = first.index(next(line for line in first if line.startswith("  2 seeds")))
    assert first[at + 1].count("±") == 3 and "+" in first[at + 1]
    assert "seeds" not in shown(repeats[:2], {}, {}).split("\n\n")[0]


def test_the_test_behind_the_marks_is_named(shown):
    assert "paired bootstrap over users" in " ".join(shown(both(NEWS), {}, {}).split())
