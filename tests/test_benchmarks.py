"""The benchmarks run, say what they measure, and write JSON of one shape. What they measure is no matter of a test."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from oppu.rows import Chunk
from oppu.tasks import task

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
import common  # noqa: E402

SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def measured(folder: Path, script: str, *arguments: str) -> dict:
    """The JSON of a run, every figure of it checked."""
    path = folder / "out.json"
    run(script, *arguments, "--json", str(path))
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"machine", "options", "seconds", "ratios"} <= set(result)
    assert {"cpu", "cores", "python", "torch", "transformers", "peft"} <= set(result["machine"])
    for figure in (*result["seconds"].values(), *result["ratios"].values()):
        assert list(figure) == ["min", "median", "max"]
        assert 0 < figure["min"] <= figure["median"] <= figure["max"]
    return result


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_a_help_that_shows_its_command(script):
    text = run(script, "--help")
    assert f"python benchmarks/{script}" in text


def test_retrieve(tmp_path):
    result = measured(tmp_path, "retrieve.py", "--items", "5", "40", "--repeats", "2")
    assert set(result["ratios"]) == {"rank_bm25/ours", "rank_bm25/ours at 5", "rank_bm25/ours at 40"}
    assert result["ratios"]["rank_bm25/ours"] == result["ratios"]["rank_bm25/ours at 40"]
    assert [(size["items"], size["same_scores"], size["same_order"]) for size in result["sizes"]] == [
        (5, True, True),
        (40, True, True),
    ]


def test_generate(tmp_path):
    """All ways give the same tokens, some answers ending before others."""
    arguments = ("--users", "3", "--queries-per-user", "2", "--mean-answer", "4", "--each", "--repeats", "1")
    result = measured(tmp_path, "generate.py", *arguments, "--device", "cpu", "--threads", "1")
    ways = {"one-by-one", "adapter_names", "ours, no prefix", "ours, no loop"}
    assert set(result["ratios"]) == {f"{way}/ours" for way in ways}
    assert result["answers_that_differ"] == dict.fromkeys(ways, 0)
    assert 6 < result["tokens"]["answer"] < 6 * 8


def test_scale(tmp_path):
    result = measured(tmp_path, "scale.py", "--users", "1", "2", "4", "--items", "2", "--repeats", "1")
    assert set(result["ratios"]) == {"cost-per-user-1/2", "cost-per-user-4/2"}
    assert set(result["seconds"]) == {f"per user, {n} together" for n in (1, 2, 4)}
    assert set(result["peak_mib"]) == {"1", "2", "4"}
    assert all(mib > 0 for mib in result["peak_mib"].values())


def test_workflow(tmp_path):
    result = measured(
        tmp_path, "workflow.py", "--tasks", "LaMP_2N", "--columns", "k1", "--users", "3", "--items", "4", "--repeats=1"
    )
    assert {"dry_run", "no_change", "one_user", "check_all_cells"} <= set(result["seconds"])
    done = result["done"]
    assert done["no_change"] == {"jobs": 0, "trained": 0, "predicted": 0}
    assert done["one_user"] == {"jobs": 2, "trained": 1, "predicted": 2}, "one user, without and with an adapter"
    assert done["check_all_cells"] == {"jobs": 2, "trained": 0, "predicted": 0}


def test_sides_are_timed_in_turn_and_compared_pair_by_pair():
    order: list[str] = []
    seconds = common.interleaved({name: lambda name=name: order.append(name) for name in "AB"}, 3)
    assert "".join(order) == "AB" + "ABABAB", "once untimed, then in turn"
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert common.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}


def test_made_up_histories_have_table_5s_means_and_the_tasks_shared_instruction():
    users = common.histories("LaMP_2M", 400, 0, 8192, factor=2.0)
    examples = [example for user in users for example in user]
    assert statistics.mean(map(len, users)) == pytest.approx(55.6, rel=0.1)
    assert statistics.mean(len(e.prompt) for e in examples) == pytest.approx(2 * 92.6, rel=0.05)
    assert statistics.mean(len(e.target) for e in examples) == pytest.approx(2 * 2.0 + 1, rel=0.1)
    words = len(task("LaMP_2M").prompt.partition("{")[0].split())
    assert Chunk(0, tuple(examples)).prefix == 1 + 2 * words, "and the token that begins a text"


def test_a_made_up_user_depends_on_nobody_else():
    assert common.histories("LaMP_4", 2, 0, 100, items=3) == common.histories("LaMP_4", 5, 0, 100, items=3)[:2]
    assert common.histories("LaMP_4", 2, 0, 100, items=3) != common.histories("LaMP_4", 2, 1, 100, items=3)


def test_made_up_examples_fit_the_longest_length():
    long = [e for user in common.histories("LaMP_3", 5, 0, 100, items=50, max_length=200) for e in user]
    assert max(map(len, long)) == 200


def test_train(tmp_path):
    sides = ["--without", "batching", "packing", "prefix", "head", "attention", "--with", "checkpointing", "bfloat16"]
    result = measured(tmp_path, "train.py", "--users", "2", "--items", "2", "--repeats", "1", "--threads", "1", *sides)
    assert {"authors/ours", "trainer/ours", "plain/ours"} < set(result["ratios"])
    assert set(result["ratios"]) == {f"{name}/ours" for name in set(result["seconds"]) - {"ours"}}
    assert len(result["ratios"]) == 10
    assert result["plain_to_ours"] < 1e-4
