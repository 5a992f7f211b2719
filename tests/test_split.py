import json
import stat
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oppu import split as module
from oppu.config import Split
from oppu.files import read_base, read_jsonl, read_user, read_users
from oppu.lamp import read
from oppu.records import InputError, Item, Query, User
from oppu.split import (
    SplitResult,
    common_history,
    queries_of,
    run,
    split,
    user_key,
    write,
)
from oppu.tasks import task, tasks
from tests.lamp_files import item, question, write_raw, write_task
from tests.test_lamp import HOSTILE

SAMPLE = Path(__file__).parents[1] / "data/sample/lamp"
NEWS = "LaMP_2N"


def made(folder, name=NEWS, **settings):
    return split(read(folder, task(name)), task(name), Split(**settings))


def ids(users):
    return sorted(user.id for user in users)


def everything(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# who is tested


def test_the_longest_histories_are_tested_with_all_their_questions_and_ties_go_by_id(tmp_path):
    write_task(tmp_path, NEWS, {"a": 3, "d": 5, "10": 4}, source="train", queries=2)
    write_task(tmp_path, NEWS, {"c": 5, "9": 4, "z": 1}, source="dev")
    result = made(tmp_path, test_users=3)
    assert ids(result.test) == ["10", "c", "d"]
    assert ids(result.base) == ["9", "a", "z"]
    assert {u.id: [q.id for q in u.queries] for u in result.test} == {
        "10": ["10-q0", "10-q1"],
        "c": ["c-q0"],
        "d": ["d-q0", "d-q1"],
    }


def test_users_of_train_and_dev_are_pooled_and_dev_wins(tmp_path):
    write_raw(tmp_path, NEWS, [question(NEWS, f"t-{u}", u, [item(NEWS, 0, u)]) for u in "ab"], source="train")
    write_task(tmp_path, NEWS, {"b": 1, "c": 1}, source="dev")
    result = made(tmp_path, test_users="dev")
    assert (ids(result.test), ids(result.base)) == (["b", "c"], ["a"])
    assert [q.id for u in result.test if u.id == "b" for q in u.queries] == ["t-b", "b-q0"]
    assert result.counts == {"users_in_train_and_dev": 1}


@pytest.mark.parametrize(("name", "dev", "train"), [("LaMP_2N", 40, 92), ("LaMP_4", 39, 122), ("LaMP_5", 24, 60)])
def test_the_sample_splits_by_its_files(name, dev, train):
    result = made(SAMPLE, name, test_users="dev")
    assert (len(result.test), len(result.base)) == (dev, train)


def test_more_test_users_than_users_is_refused_with_both_numbers(tmp_path):
    write_task(tmp_path, NEWS, {"a": 3, "b": 1})
    with pytest.raises(InputError, match="test_users is 3, but only 2 users"):
        made(tmp_path, test_users=3)
    assert len(made(tmp_path, test_users=2).test) == 2


def test_dev_without_dev_files_is_refused(tmp_path):
    write_task(tmp_path, NEWS, {"a": 3}, source="train")
    with pytest.raises(InputError, match="no user has a question in the dev files"):
        made(tmp_path, test_users="dev")


def test_excluded_users_are_nowhere_and_nobody_takes_their_place(tmp_path):
    write_task(tmp_path, NEWS, {"a": 5, "b": 4, "c": 3, "d": 2})
    whole = made(tmp_path, test_users=2)
    result = made(tmp_path, test_users=2, exclude=[user_key("a"), user_key("d"), "u-000000000000"])
    assert (ids(result.test), ids(result.base)) == (["b"], ["c"])
    assert result.counts == {"excluded_users": 2, "unknown_excluded_keys": 1}
    assert [u for u in whole.test if u.id == "b"] == result.test
    with pytest.raises(InputError, match="no test user is left"):
        made(tmp_path, test_users=1, exclude=[user_key("a")])


def test_test_users_without_a_history_are_kept_and_counted(tmp_path):
    write_task(tmp_path, NEWS, {"a": 0, "b": 1})
    result = made(tmp_path, test_users=2)
    assert ids(result.test) == ["a", "b"]
    assert result.counts == {"empty_histories": 1}


def test_keys_are_safe_and_a_collision_is_refused(tmp_path, monkeypatch):
    # printf ann | sha256sum
    assert user_key("ann") == "u-49915e0d7d4b"
    write_task(tmp_path, NEWS, {"a": 1, "b": 1})
    monkeypatch.setattr(module, "user_key", lambda _: "u-000000000000")
    with pytest.raises(InputError, match="users 'a' and 'b' share the key"):
        made(tmp_path, test_users=1)


# what a history is


def test_items_after_the_first_question_are_dropped_and_counted(tmp_path):
    items = [item(NEWS, n, "ann") for n in range(5)]
    write_raw(tmp_path, NEWS, [question(NEWS, "q2", "ann", items), question(NEWS, "q1", "ann", items[:3])])
    (ann,) = made(tmp_path, test_users=1).test
    assert [i.id for i in ann.history] == ["ann-0", "ann-1", "ann-2"]
    assert made(tmp_path, test_users=1).counts == {"later_items": 2}


def test_items_that_are_numbered_anew_for_each_question_are_the_same_items(tmp_path):
    histories = [[item(NEWS, n, "ann", id=f"{q}{n}") for n in range(3)] for q in range(2)]
    write_raw(tmp_path, NEWS, [question(NEWS, f"q{q}", "ann", h) for q, h in enumerate(histories)])
    (ann,) = made(tmp_path, test_users=1).test
    assert [i.id for i in ann.history] == ["00", "01", "02"]


small = st.lists(st.integers(0, 4), max_size=8)


@given(st.lists(small, min_size=1, max_size=4))
def test_the_common_history_is_the_multiset_that_every_question_has(histories):
    pools = [tuple(Item("", None, {"text": str(n)}) for n in sorted(numbers)) for numbers in histories]
    common, later = common_history(pools)
    kept = [int(i.fields["text"]) for i in common]
    wanted = {n: min(h.count(n) for h in histories) for n in range(5)}
    most = {n: max(h.count(n) for h in histories) for n in range(5)}
    assert Counter(kept) == Counter({n: c for n, c in wanted.items() if c})
    assert kept == sorted(kept)
    assert later == sum(most.values()) - sum(wanted.values())


def test_items_that_are_the_users_own_queries_are_dropped_and_counted(tmp_path):
    items = [item(NEWS, 0, text="the  asked\narticle "), item(NEWS, 1, text="another"), item(NEWS, 2, text="Another")]
    write_raw(
        tmp_path,
        NEWS,
        [
            question(NEWS, "q0", "ann", items, "the asked article"),
            question(NEWS, "q1", "ann", items, "another"),
            question(NEWS, "q2", "bob", [item(NEWS, 1, text="the asked article")], "new"),
        ],
    )
    result = made(tmp_path, test_users=1)
    assert [i.fields["text"] for i in result.test[0].history] == ["Another"]
    assert len(result.base[0].history) == 1
    assert result.counts == {"items_of_own_queries": 2}


@pytest.mark.parametrize("name", tasks())
def test_own_queries_are_found_in_every_task(tmp_path, name):
    source = task(name).x.values() or [n for n in ("title", "text") if n in task(name).history][:1]
    own = item(name, 0, "ann", **dict.fromkeys(source, "asked"))
    write_raw(tmp_path, name, [question(name, "q", "ann", [own, item(name, 1, "ann")], "asked")])
    (ann,) = made(tmp_path, name, test_users=1).test
    assert [i.id for i in ann.history] == ["ann-1"]


def test_a_tweet_behind_its_own_paraphrase_is_dropped(tmp_path):
    items = [item("LaMP_7", 0, text="the tweet"), item("LaMP_7", 1, text="other")]
    write_raw(tmp_path, "LaMP_7", [question("LaMP_7", "q", "ann", items)], [{"id": "q", "output": "the tweet"}])
    assert [i.fields["text"] for i in made(tmp_path, "LaMP_7", test_users=1).test[0].history] == ["other"]


# held-out users


def test_held_out_users_are_base_users_asked_about_their_last_items(tmp_path):
    write_task(tmp_path, NEWS, {"dev": 30}, source="dev")
    write_task(tmp_path, NEWS, {"a": 6, "b": 3, "c": 9}, source="train")
    result = made(tmp_path, test_users="dev", heldout_queries=2)
    assert (ids(result.test), ids(result.base)) == (["a", "c"], ["b"])
    (a,) = [u for u in result.test if u.id == "a"]
    assert [i.id for i in a.history] == ["a-0", "a-1", "a-2", "a-3"]
    assert [task(NEWS).read(q.input)["article"] for q in a.queries] == ["text 4 of a", "text 5 of a"]
    assert [q.gold for q in a.queries] == task(NEWS).labels[4:6]


def test_a_copy_of_a_held_out_query_leaves_the_history(tmp_path):
    write_task(tmp_path, NEWS, {"dev": 1}, source="dev")
    items = [item(NEWS, n, "a") for n in range(4)]
    items[1]["text"] = items[3]["text"]
    write_task(tmp_path, NEWS, {"a": items}, source="train")
    result = made(tmp_path, test_users="dev", heldout_queries=1)
    assert [i.id for i in result.test[0].history] == ["a-0", "a-2"]
    assert result.counts == {"items_of_own_queries": 1}


@pytest.mark.parametrize("settings", [{"test_users": "dev"}, {"test_users": 30}])
def test_held_out_mode_never_holds_a_test_user(settings):
    plain = made(SAMPLE, **settings)
    held = made(SAMPLE, **settings, heldout_queries=4)
    tested = {u.key for u in plain.test}
    assert len(held.test) == module.HELDOUT_USERS
    assert not tested & {u.key for u in (*held.test, *held.base)}
    assert {u.key for u in (*held.test, *held.base)} == {u.key for u in plain.base}
    assert not {u.key for u in held.test} & {u.key for u in held.base}
    asked = {q.input for u in plain.test for q in u.queries}
    assert not asked & {q.input for u in held.test for q in u.queries}


def test_held_out_mode_needs_pairs_and_long_enough_histories(tmp_path):
    write_task(tmp_path, "LaMP_7", {"a": 9, "b": 4})
    with pytest.raises(InputError, match="LaMP_7 has plain histories"):
        made(tmp_path, "LaMP_7", test_users=1, heldout_queries=1)
    write_task(tmp_path, NEWS, {"a": 9, "b": 4})
    with pytest.raises(InputError, match="no test user is left"):
        made(tmp_path, test_users=1, heldout_queries=3)


# the files


def test_what_is_written_reads_back(tmp_path):
    write_task(tmp_path / "data", NEWS, {"a": 4, "b": 3, "c": 2, "d": 0}, queries=2)
    out = tmp_path / "results/LaMP_2N/split/users.json"
    run(tmp_path / "data", NEWS, Split(test_users=2), out)
    result = made(tmp_path / "data", test_users=2)
    assert read_users(out) == sorted(map(user_key, "ab"))
    assert read_base(out.parent / "base.jsonl") == result.base
    for user in result.test:
        loaded = read_user(out.parent / "histories" / f"{user.key}.json")
        assert (loaded.id, loaded.history) == (user.id, user.history)
        assert [(q.id, q.input, q.gold) for q in loaded.queries] == [(q.id, q.input, None) for q in user.queries]
    assert read_jsonl(out.parent / "queries.jsonl") == queries_of(result.test)
    summary = json.loads(out.read_text())
    assert (summary["task"], summary["base_users"], summary["queries"], summary["counts"]) == (NEWS, 2, 4, {})


def test_files_are_private_and_golds_are_not_in_histories(tmp_path):
    write_raw(tmp_path, "LaMP_4", [question("LaMP_4", "q", "a", [])], [{"id": "q", "output": "golden"}])
    out = tmp_path / "split/users.json"
    run(tmp_path, "LaMP_4", Split(test_users=1), out)
    files = [path for path in out.parent.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert b"golden" not in (out.parent / "histories" / f"{user_key('a')}.json").read_bytes()


def test_only_what_changed_is_rewritten_and_stale_histories_go(tmp_path):
    write_task(tmp_path, NEWS, {"a": 4, "b": 3, "c": 2, "d": 1})
    out = tmp_path / "split/users.json"
    run(tmp_path, NEWS, Split(test_users=3), out)
    before = {p: p.stat().st_mtime_ns for p in out.parent.rglob("*") if p.is_file()}
    run(tmp_path, NEWS, Split(test_users=3), out)
    assert {p: p.stat().st_mtime_ns for p in out.parent.rglob("*") if p.is_file()} == before
    new = [item(NEWS, n, "b") for n in range(2)] + [item(NEWS, 2, "b", text="changed")]
    write_task(tmp_path, NEWS, {"a": 4, "b": new, "c": 1, "d": 2})
    run(tmp_path, NEWS, Split(test_users=3), out)
    histories = out.parent / "histories"
    names = {path.name for path in histories.iterdir()}
    assert names == {f"{user_key(user)}.json" for user in "abd"}
    a, b = (histories / f"{user_key(user)}.json" for user in "ab")
    assert a.stat().st_mtime_ns == before[a]
    assert b.stat().st_mtime_ns != before[b]


def test_two_runs_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        run(SAMPLE, NEWS, Split(test_users=10), tmp_path / name / "users.json")
    assert everything(tmp_path / "one") == everything(tmp_path / "two")


def test_a_failing_run_leaves_the_old_files(tmp_path):
    path = write_task(tmp_path / "data", NEWS, {"a": 4, "b": 3})
    out = tmp_path / "split/users.json"
    run(tmp_path / "data", NEWS, Split(test_users=1), out)
    before = everything(out.parent)
    with pytest.raises(InputError):
        run(tmp_path / "data", NEWS, Split(test_users=9), out)
    path.write_text("[")
    with pytest.raises(InputError):
        run(tmp_path / "data", NEWS, Split(test_users=1), out)
    bad = User("u-" + "0" * 12, "a", (), (Query("q", "\ud800", "x"),))
    with pytest.raises(UnicodeEncodeError):
        write(SplitResult([bad], [], {}), task(NEWS), out)
    with pytest.raises(ValueError, match="not a user key"):
        write(SplitResult([User("../x", "a", (), ())], [], {}), task(NEWS), out)
    assert everything(out.parent) == before


def test_users_json_comes_last(tmp_path, monkeypatch):
    write_task(tmp_path, NEWS, {"a": 4, "b": 3})
    written = []
    monkeypatch.setattr(module, "write_if_changed", lambda path, data: written.append(path.name))
    run(tmp_path, NEWS, Split(test_users=1), tmp_path / "split/users.json")
    assert written[-1] == "users.json"
    assert len(written) == 4


@pytest.mark.parametrize("hostile", ["../../x;touch y", "/etc/x", "a\nb", "", "u-$(touch y)", "\x00"])
def test_a_hostile_user_id_writes_nothing_outside_its_folder(tmp_path, hostile):
    hostile = hostile or " "
    write_task(tmp_path / "data", NEWS, {hostile: 2, "b": 1})
    out = tmp_path / "results/split/users.json"
    run(tmp_path / "data", NEWS, Split(test_users=2), out)
    names = {name for name in everything(tmp_path) if not name.startswith("data/")}
    histories = {f"results/split/histories/{user_key(user)}.json" for user in (hostile, "b")}
    assert names == histories | {f"results/split/{name}" for name in ("users.json", "base.jsonl", "queries.jsonl")}
    assert read_user(out.parent / "histories" / f"{user_key(hostile)}.json").id == hostile


text = st.text(max_size=30) | st.just(HOSTILE)


@given(st.lists(st.tuples(text, text), max_size=4), text)
def test_any_text_survives_the_files(tmp_path_factory, pairs, asked):
    folder = tmp_path_factory.mktemp("split")
    items = tuple(Item(x[:5], None, {"text": x, "category": y}) for x, y in pairs)
    users = [User(user_key(name), asked, items, (Query("q", asked, asked),)) for name in "ab"]
    write(SplitResult(users[:1], users[1:], {}), task(NEWS), folder / "users.json")
    loaded = read_user(folder / "histories" / f"{users[0].key}.json")
    assert loaded.history == items
    assert read_base(folder / "base.jsonl") == users[1:]
    assert read_jsonl(folder / "queries.jsonl") == [{"user": users[0].key, "id": "q", "input": asked, "gold": asked}]


def test_nobody_left_for_the_base_still_writes_readable_files(tmp_path, caplog):
    write_task(tmp_path, NEWS, {"secret-name": 2})
    run(tmp_path, NEWS, Split(test_users=1), tmp_path / "split/users.json")
    assert read_base(tmp_path / "split/base.jsonl") == []
    assert "nobody is left to train the base" in caplog.text
    assert "secret" not in caplog.text
