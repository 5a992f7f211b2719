import gzip
import json

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error
from typer.testing import CliRunner

from oppu.cli import app
from oppu.files import jsonl, write_json
from oppu.records import InputError
from oppu.scores import score, submission
from oppu.submissions import score_files
from oppu.tasks import task

NEWS, RATING, TITLES = task("LaMP_2N"), task("LaMP_3"), task("LaMP_5")
WORDS = ["parsing", "of", "verbs", "with", "neural", "models", "tagged", "tagging"]


def drawn(of, seed, count=60):
    """Golds and predictions by id."""
    rng = np.random.default_rng(seed)

    def text():
        return str(rng.choice(of.labels)) if of.labels else " ".join(rng.choice(WORDS, rng.integers(1, 9)))

    return [{str(i): text() for i in range(count)} for _ in range(2)]


def listed(texts, name="output"):
    return [{"id": id_, name: text} for id_, text in texts.items()]


@pytest.fixture
def written(tmp_path):
    def write(golds, given, of=NEWS):
        paths = tmp_path / "given.json", tmp_path / "outputs.json"
        for path, texts in zip(paths, (given, golds), strict=True):
            path.write_text(json.dumps({"task": of.name, "golds": texts}))
        return paths

    return write


def sklearn_scores(of, golds, given):
    """The metrics by their own libraries, on the texts alone."""
    pairs = [(gold, given[id_]) for id_, gold in golds.items()]
    left, right = zip(*pairs, strict=True)
    if of is NEWS:
        macro = f1_score(left, right, labels=of.labels, average="macro", zero_division=0)
        return {"accuracy": accuracy_score(left, right), "f1": macro}
    if of is RATING:
        left, right = ([float(x) for x in side] for side in (left, right))
        return {"MAE": mean_absolute_error(left, right), "RMSE": root_mean_squared_error(left, right)}
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    found = [scorer.score(gold, text) for gold, text in pairs]
    return {f"rouge-{n}": np.mean([f[f"rouge{n}"].fmeasure for f in found]) for n in ("1", "L")}


@pytest.mark.parametrize("of", [NEWS, RATING, TITLES], ids=lambda of: of.name)
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_scikit_learn_and_rouge_score(written, of, seed):
    golds, given = drawn(of, seed)
    paths = written(listed(golds), listed(given)[::-1], of)
    result = CliRunner().invoke(app, ["score", *map(str, paths), "--task", of.name, "--json"])
    found = json.loads(result.stdout)
    expected = sklearn_scores(of, golds, given)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["n_queries"] == 60 and "n_users" not in found


def test_every_form_of_a_file_gives_the_same(written, tmp_path):
    golds, given = drawn(NEWS, 0)
    plain, outputs = written(listed(golds), listed(given))
    expected = score_files(plain, outputs, NEWS)
    lines = "".join(json.dumps(record) + "\n" for record in listed(given, "prediction"))
    (tmp_path / "cell.jsonl").write_text(lines + "\n")
    (tmp_path / "cell.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "list.json").write_text(json.dumps([r | {"id": int(r["id"])} for r in listed(given)]))
    (tmp_path / "outputs.json.gz").write_bytes(gzip.compress(outputs.read_bytes()))
    (tmp_path / "q.jsonl").write_bytes(jsonl({"user": "u", "id": i, "gold": gold} for i, gold in golds.items()))
    for name in ("cell.jsonl", "cell.jsonl.gz", "list.json"):
        assert score_files(tmp_path / name, outputs, NEWS) == expected
    for name in ("outputs.json.gz", "q.jsonl"):
        assert score_files(plain, tmp_path / name, NEWS) == expected


def test_a_settings_submission_scores_as_its_scores_json(tmp_path):
    golds, given = drawn(NEWS, 5)
    users = [f"u-{int(id_) % 7}" for id_ in golds]
    queries = [{"user": u, "id": i, "gold": gold} for u, (i, gold) in zip(users, golds.items(), strict=True)]
    cells = {u: [{"id": i, "prediction": given[i]} for i, v in zip(golds, users, strict=True) if u == v] for u in users}
    scores = score(NEWS, queries, cells).metrics
    write_json(tmp_path / "submission.json", submission(NEWS, cells))
    (tmp_path / "queries.jsonl").write_bytes(jsonl(queries))
    found = score_files(tmp_path / "submission.json", tmp_path / "queries.jsonl", NEWS)
    assert found == {name: value for name, value in scores.items() if name != "n_users"}


GOOD = [{"id": "1", "output": "crime"}, {"id": "2", "output": "women"}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (GOOD[:1], "given.json: id 2: no prediction, but"),
        ([*GOOD, {"id": "x9", "output": "crime"}], "given.json: id x9: no such gold in"),
        ([*GOOD, GOOD[0]], "given.json: id 1: stands 2 times"),
        ([GOOD[0], {"id": "2", "output": None}], "given.json: id 2: the answer is missing or null; needed is text"),
        ([GOOD[0], {"id": "2"}], "given.json: id 2: needs either 'output' or 'prediction', found 0"),
        ([GOOD[0], GOOD[1] | {"prediction": "crime"}], "given.json: id 2: needs either .* found 2"),
        ([*GOOD, "crime"], "given.json: record 2: is not an object"),
        ([], "given.json: needs a list of records"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(written, given, message):
    with pytest.raises(InputError, match=message):
        score_files(*written(GOOD, given), NEWS)


def test_all_problems_are_named_at_once(written):
    with pytest.raises(InputError) as caught:
        score_files(*written(GOOD, [{"id": "3", "output": "crime"}] * 2), NEWS)
    assert len(caught.value.problems) == 4  # 3 stands twice, 1 and 2 are missing, 3 is surplus


def test_files_of_another_task_and_unknown_golds_are_refused(written, tmp_path):
    with pytest.raises(InputError, match=r"given.json: is of LaMP_3, not of LaMP_2N"):
        score_files(*written(GOOD, GOOD, RATING), NEWS)
    with pytest.raises(InputError, match=r"outputs.json: .*id 1: the gold is not among the labels"):
        score_files(*written([{"id": "1", "output": "gardening"}], GOOD[:1]), NEWS)
    (tmp_path / "bad.jsonl").write_text('{"id": "1", "output": "crime"}\n{"id": \n')
    with pytest.raises(InputError, match=r"bad.jsonl: line 2: is not JSON"):
        score_files(tmp_path / "bad.jsonl", written(GOOD, GOOD)[1], NEWS)
