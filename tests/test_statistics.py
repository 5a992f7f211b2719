import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from oppu.config import Split
from oppu.lamp import read
from oppu.records import InputError
from oppu.split import run as run_split
from oppu.statistics import model_lengths, run, statistics, table5, write_table5
from oppu.tables import read_csv
from oppu.tasks import task

ROOT = Path(__file__).parents[1]
PAPER = read_csv(ROOT / "data/paper/table5.csv")
MODEL = str(ROOT / "data/models/oppu-tiny")
BASE = [("one two three", "a b"), ("one", "a")]
PERSONAL = [("one  two\nthree four", "a"), ("", None)]


def characters(texts):
    return [len(text) for text in texts]


def test_lengths_are_words_of_raw_texts_and_model_tokens():
    assert statistics(BASE, PERSONAL, [3, 6], characters) == {
        "base_queries": 2,
        "base_in_tokens": 2.0,
        "base_out_tokens": 1.5,
        "base_in_model_tokens": 8.0,
        "base_out_model_tokens": 2.0,
        "personal_queries": 2,
        "personal_history": 4.5,
        "personal_in_tokens": 2.0,
        "personal_out_tokens": 1.0,  # the gold that is not known is left out
        "personal_in_model_tokens": 9.5,
        "personal_out_model_tokens": 1.0,
    }


def test_without_a_base_its_means_are_blank():
    row = statistics([], PERSONAL, [3, 6], characters)
    assert row["base_queries"] == 0 and row["base_in_tokens"] is None
    assert table5([{"task": "LaMP_2N"} | row])["base_in_tokens"].to_list() == [None]


def test_the_sample_is_counted_as_its_raw_files_say(tmp_path):
    """Against LaMP's own JSON and Hugging Face's tokenizer, on the sample's split."""
    run_split(ROOT / "data/sample/lamp", "LaMP_2N", Split(test_users="dev"), tmp_path / "users.json")
    files = sorted((tmp_path / "histories").iterdir())
    run(tmp_path / "s.json", "LaMP_2N", tmp_path / "base.jsonl", tmp_path / "queries.jsonl", files, MODEL, None)
    row = json.loads((tmp_path / "s.json").read_text())
    questions = read(ROOT / "data/sample/lamp", task("LaMP_2N"))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for part, source in (("base", "train"), ("personal", "dev")):
        own = [q for q in questions if q.source == source]
        assert row[f"{part}_queries"] == len(own)
        for side, texts in (("in", [q.input for q in own]), ("out", [q.gold for q in own])):
            words, tokens = ([len(x) for x in f] for f in (map(str.split, texts), map(tokenizer.tokenize, texts)))
            assert row[f"{part}_{side}_tokens"] == pytest.approx(sum(words) / len(own))
            assert row[f"{part}_{side}_model_tokens"] == pytest.approx(sum(tokens) / len(own))
    lengths = {q.user_id: len(q.history) for q in questions if q.source == "dev"}
    assert row["personal_history"] == pytest.approx(sum(lengths.values()) / len(lengths), abs=0.5)  # less own queries


def test_table5_has_the_papers_columns_first_and_the_papers_row_beside(tmp_path):
    row = statistics(BASE, PERSONAL, [3, 6], characters)
    for name in ("LaMP_2N", "mine"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"task": name, "personal_users": 2} | row))
    write_table5(tmp_path / "table5.csv", [tmp_path / "LaMP_2N.json", tmp_path / "mine.json"], PAPER)
    table = read_csv(tmp_path / "table5.csv")
    assert table.columns[: len(PAPER.columns)] == PAPER.columns
    assert table["task"].to_list() == ["LaMP_2N", "mine"]
    assert table["paper_personal_queries"].to_list() == ["6033", None]
    shown = (tmp_path / "table5.md").read_text().splitlines()
    assert [line.split(" |")[0] for line in shown[2:5]] == ["| LaMP_2N", "| LaMP_2N, the paper", "| mine"]
    assert "| 3,662 | 68.2 | 1.3 | 6,033 | 219.9 | 63.5 | 1.1 |" in shown[3]
    assert len({line.count("|") for line in shown[:5]}) == 1


def test_tokens_are_counted_without_torch():
    code = (
        "import sys; from oppu.statistics import model_lengths;"
        f"assert model_lengths({MODEL!r})(['a study of parsing'])[0] > 2; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer: model .* could not be loaded"):
        model_lengths(str(tmp_path))
