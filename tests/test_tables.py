import csv
import gzip
import json
import statistics
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from oppu import table1 as t1
from oppu.boards import Bootstrap, Setting, boards
from oppu.metrics import columns
from oppu.records import InputError, Item, User
from oppu.scores import score_texts
from oppu.table1_page import html, markdown
from oppu.tables import (
    mixed_users,
    read_csv,
    references_table,
    scores_table,
    versus_table,
    write_tables,
)
from oppu.tasks import task, tasks
from tests.synthetic import HOW, NEWS, RATING, TITLES, both, reference, setting

PAPER = Path(__file__).parents[1] / "data" / "paper"


def only(table, **where):
    found = table.filter(**where).rows(named=True)
    assert len(found) == 1
    return found[0]


def test_scores_csv_has_the_fixed_columns(tmp_path):
    write_tables(tmp_path, both(NEWS), {"LaMP_2N": {"user-majority": reference(NEWS, 0.6)}}, {}, HOW)
    heads = {p.name: p.read_text().splitlines()[0] for p in tmp_path.glob("*.csv")}
    assert heads["scores.csv"] == (
        "task,augmentation,peft,history,metric,value,ci_low,ci_high,user_mean,diff,diff_low,diff_high,"
        "n_users,n_queries,p_value,significant,p_holm,significant_holm,test"
    )
    assert heads["references.csv"] == "task,reference,metric,value,ci_low,ci_high"
    assert heads["versus.csv"] == (
        "task,users,augmentation,peft,metric,against,value,other,diff,diff_low,diff_high,n_users,n_queries,"
        "p_value,significant,test"
    )
    assert heads["seeds.csv"] == ("task,augmentation,peft,history,metric,n_seeds,mean,sd,min,max,diff_mean,diff_sd")
    assert heads["table1.csv"] == (PAPER / "table1.csv").read_text().splitlines()[0]


def test_scores_rows():
    table = scores_table(boards(both(NEWS), {}, HOW))
    assert len(table) == 4
    none, lora = (only(table, peft=peft, metric="accuracy") for peft in ("none", "lora"))
    assert none["diff"] is None and none["p_value"] is None and none["significant"] is None
    assert lora["diff"] == pytest.approx(lora["value"] - none["value"])
    assert lora["significant"] and lora["diff_low"] > 0
    assert (lora["n_users"], lora["n_queries"]) == (20, 100)
    assert lora["user_mean"] == pytest.approx(lora["value"])  # every user has five queries
    assert lora["ci_low"] < lora["value"] < lora["ci_high"]


def test_without_a_counterpart_the_difference_is_blank():
    table = scores_table(boards([setting(NEWS, "k1", "lora", 0.8)], {}, HOW))
    assert table["diff"].null_count() == 2
    assert table["value"].null_count() == 0


def test_counterparts_share_history_and_k0_has_one_for_all():
    found = boards(
        [
            setting(NEWS, "k0", "none", 0.4),
            setting(NEWS, "k1", "none", 0.4),
            setting(NEWS, "k0", "lora", 0.8, history="irrelevant"),
            setting(NEWS, "k1", "lora", 0.8, history="irrelevant"),
        ],
        {},
        HOW,
    )
    table = scores_table(found)
    assert only(table, augmentation="k0", peft="lora", metric="f1")["diff"] is not None
    assert only(table, augmentation="k1", peft="lora", metric="f1")["diff"] is None
    assert len(versus_table(found, {}, HOW)) == 0  # versus.csv is about the full history


def test_settings_on_other_queries_are_refused():
    with pytest.raises(InputError, match=r"LaMP_2N/k0/lora/full: 5 queries differ .* first user u-19, query 19-0"):
        boards([setting(NEWS, "k0", "none", 0.4), setting(NEWS, "k0", "lora", 0.8, users=19)], {}, HOW)
    with pytest.raises(InputError, match="LaMP_2N/k0/none/full: given twice"):
        boards([setting(NEWS, "k0", "none", 0.4)] * 2, {}, HOW)


def test_references_and_versus_agree():
    right = reference(NEWS, 0.6)
    found = boards(both(NEWS), {"LaMP_2N": {"user-majority": right}}, HOW)
    line = only(references_table(found), reference="user-majority", metric="accuracy")
    table = versus_table(found, {"LaMP_2N": {"u-00", "u-01", "u-02", "nobody"}}, HOW)
    assert set(table["against"]) == {"none", "user-majority"}
    everyone = only(table, users="all", against="user-majority", metric="accuracy")
    assert everyone["other"] == pytest.approx(line["value"])
    assert everyone["diff"] == pytest.approx(everyone["value"] - everyone["other"])
    assert everyone["diff_low"] <= everyone["diff"] <= everyone["diff_high"]
    mixed = only(table, users="mixed", against="none", metric="accuracy")
    assert (mixed["n_users"], mixed["n_queries"]) == (3, 15)
    three = ("u-00", "u-01", "u-02")
    few = [np.mean([row["correct"] for row in s.scored if row["user"] in three]) for s in both(NEWS)]
    assert (mixed["other"], mixed["value"]) == pytest.approx(tuple(few))


def test_a_reference_that_misses_a_query_is_refused():
    right = [row for row in reference(NEWS, 0.6) if row["id"] != "3-1"]
    with pytest.raises(InputError, match=r"LaMP_2N/user-majority: 1 queries differ .* first user u-03, query 3-1"):
        boards(both(NEWS), {"LaMP_2N": {"user-majority": right}}, HOW)


def user(key, *labels):
    return User(key, key, tuple(Item(str(i), None, {"text": "x", "category": y}) for i, y in enumerate(labels)), ())


def test_mixed_users():
    users = [
        user("u-one", *["crime"] * 9),
        user("u-edge", *["crime"] * 8, "women", "women"),
        user("u-over", *["crime"] * 9, "women", "women"),
        user("u-even", "crime", "women"),
        user("u-none"),
    ]
    assert mixed_users(NEWS, users) == {"u-edge", "u-even"}
    assert mixed_users(NEWS, users, share=0.5) == {"u-even"}
    assert mixed_users(TITLES, users) == set()
    assert mixed_users(task("LaMP_1"), users) == set()


def test_the_sample_gives_what_its_readme_says():
    """40 users and 240 queries, user majority .800; 17 mixed users, 102 queries, user majority .588 (data/sample)."""
    folder = PAPER.parent / "sample" / "lamp" / "LaMP_2N"
    questions, outputs = (
        json.loads(gzip.decompress((folder / f"dev_{name}.json.gz").read_bytes())) for name in ("questions", "outputs")
    )
    golds = {g["id"]: g["output"] for g in outputs["golds"]}
    histories = {q["user_id"]: [item["category"] for item in q["profile"]] for q in questions}
    mixed = mixed_users(NEWS, [user(key, *labels) for key, labels in histories.items()])
    queries = [{"user": q["user_id"], "id": q["id"], "gold": golds[q["id"]]} for q in questions]
    majority = {(q["user_id"], q["id"]): Counter(histories[q["user_id"]]).most_common(1)[0][0] for q in questions}
    scored = score_texts(NEWS, queries, majority).scored
    found = versus_table(
        boards([Setting(NEWS, "k0", "lora", "full", scored)], {"LaMP_2N": {"same": scored}}, HOW),
        {"LaMP_2N": mixed},
        HOW,
    )
    rows = {r["users"]: r for r in found.filter(metric="accuracy").iter_rows(named=True)}
    assert {k: (r["n_users"], r["n_queries"]) for k, r in rows.items()} == {"all": (40, 240), "mixed": (17, 102)}
    assert rows["all"]["value"] == pytest.approx(0.8, abs=0.005)
    assert rows["mixed"]["value"] == pytest.approx(0.588, abs=0.01)  # ties for the majority are broken otherwise here
    assert [rows["all"][name] for name in ("diff", "diff_low", "diff_high")] == [0, 0, 0]


def test_table1_has_the_papers_shape():
    lamp = [of for name, of in tasks().items() if name.startswith("LaMP_")]
    every = [s for of in lamp for a, p in t1.SETTINGS.values() for s in [setting(of, a, p, 0.5, users=7)]]
    table = t1.table1(scores_table(boards(every, {}, Bootstrap(20, 0))))
    with (PAPER / "table1.csv").open() as f:
        paper = list(csv.DictReader(f))
    assert table.columns == list(paper[0])
    keys = ["task", "metric", "better"]
    assert table.select(keys).rows() == [tuple(row[k] for k in keys) for row in paper]
    assert all(cell for row in table.rows() for cell in row)


def test_stars_are_improvements_only_and_columns_not_run_are_blank():
    better, worse = both(RATING), [setting(RATING, "k1", "none", 0.8, seed=1), setting(RATING, "k1", "lora", 0.4)]
    scores = scores_table(boards(better + worse, {}, HOW))
    assert scores.filter(peft="lora")["significant"].all()
    row = only(t1.table1(scores), metric="mae")
    assert row["oppu_k0"].endswith("*") and row["oppu_k0"].startswith(".")
    assert not row["oppu_k1"].endswith("*")
    assert row["rag_k2"] is None and row["pag_oppu_k1"] is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.8031, ".803"),
        (0.9996, "1.000"),
        (1.25, "1.250"),
        (0, ".000"),
        (-0.04, "-.040"),
        (-0.0001, ".000"),
        (10.5, "10.500"),
    ],
)
def test_numbers_are_written_as_in_the_paper(value, text):
    assert t1.number(value) == text


def test_section_5_gains_come_out_of_the_papers_table1():
    gains = t1.gains(read_csv(PAPER / "table1.csv"))
    said = {
        ("LaMP_3", "mae"): 17.38,
        ("LaMP_3", "rmse"): 8.89,
        ("LaMP_2M", "accuracy"): 11.87,
        ("LaMP_2M", "f1"): 7.56,
        ("LaMP_5", "rouge1"): 3.42,
        ("LaMP_5", "rougeL"): 3.87,
        ("LaMP_1", "accuracy"): 3.48,
        ("LaMP_1", "f1"): 3.52,
    }
    assert {key: gains[key] for key in said} == pytest.approx(said, abs=0.05)
    assert len(t1.PAIRS) == 6


def test_markdown_marks_best_and_second_as_the_paper_does():
    lines = {
        tuple(line.split("|")[1:3]): line
        for line in markdown(t1.sheet(read_csv(PAPER / "table1.csv"))).splitlines()[2:16]
    }
    found = {tuple(p.strip(" ↑↓") for p in key): line for key, line in lines.items()}
    marks = {
        ("LaMP_1", "accuracy"): (r"**.797\***", r"<u>.772\*</u>"),
        ("LaMP_2N", "accuracy"): (r"**.838\***", "<u>.834</u>"),
        ("LaMP_2M", "f1"): (r"**.553\***", "<u>.542</u>"),  # the paper underlines .540, though .542 stands in the row
        ("LaMP_3", "mae"): (r"**.143\***", r"<u>.179\*</u>"),
        ("LaMP_3", "rmse"): (r"**.378\***", r"<u>.443\*</u>"),
        ("LaMP_4", "rougeL"): (r"**.180\***", "<u>.178</u>"),
        ("LaMP_5", "rouge1"): (r"**.526\***", r"<u>.525\*</u>"),
        ("LaMP_7", "rougeL"): (r"**.533\***", r"<u>.531\*</u>"),
    }
    for key, (best, second) in marks.items():
        assert best in found[key] and second in found[key]
    assert found["LaMP_7", "rougeL"].count("**") == 4  # two share the best value
    assert found["LaMP_2N", "accuracy"].count("|") == 16


def test_equal_results_are_equal_bytes_and_read_back(tmp_path):
    references = {"LaMP_5": {"lead": reference(TITLES, 0.2)}}
    for folder in ("a", "b"):
        write_tables(tmp_path / folder, both(TITLES), references, {}, HOW)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == [
        "references.csv",
        "scores.csv",
        "seeds.csv",
        "table1.csv",
        "table1.html",
        "table1.md",
        "versus.csv",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    scores = read_csv(tmp_path / "a" / "scores.csv")
    assert scores.schema["significant"] == pl.Boolean
    assert set(scores["metric"]) == set(columns(TITLES))


def test_the_papers_other_tables_are_there():
    assert read_csv(PAPER / "table4.csv")["task"].to_list() == [name for name in tasks() if name.startswith("LaMP_")]
    for row in read_csv(PAPER / "table4.csv").iter_rows(named=True):
        personal = task(row["task"]).personal
        paper = [float(row[k]) for k in ("rank", "epochs", "lr", "l2", "batch_size")]
        assert paper == [personal.rank, personal.epochs, personal.lr, personal.weight_decay, personal.batch_size]


def with_controls(of):
    """base < swapped < lora, on two prompts."""
    kinds = {"none": 0.3, "lora": 0.9, "pooled": 0.5, "swapped": 0.5}
    return [setting(of, a, kind, right, seed=n) for a in ("k0", "k1") for n, (kind, right) in enumerate(kinds.items())]


def test_controls_have_differences_and_lora_is_set_against_them():
    found = boards(with_controls(NEWS), {}, HOW)
    scores, versus = scores_table(found), versus_table(found, {}, HOW)
    value = {r["peft"]: r["value"] for r in scores.filter(augmentation="k1", metric="accuracy").iter_rows(named=True)}
    for control in ("pooled", "swapped"):
        row = only(scores, augmentation="k1", peft=control, metric="accuracy")
        assert row["diff"] == pytest.approx(value[control] - value["none"])
        own = only(versus, augmentation="k1", peft="lora", against=control, metric="accuracy")
        assert own["diff"] == pytest.approx(value["lora"] - value[control]) and own["significant"]
        assert own["diff"] == pytest.approx(own["value"] - own["other"])
    assert set(versus.filter(pl.col("peft") != "lora")["against"]) == {"none"}


def test_other_kinds_have_differences_and_are_in_holms_family():
    every = [*both(NEWS), setting(NEWS, "k0", "ia3", 0.7, seed=2), setting(NEWS, "k0", "prompt", 0.5, seed=3)]
    scores, versus = scores_table(found := boards(every, {}, HOW)), versus_table(found, {}, HOW)
    for metric in ("accuracy", "f1"):
        values = {r["peft"]: r for r in scores.filter(metric=metric).iter_rows(named=True)}
        for kind in ("lora", "ia3", "prompt"):
            assert values[kind]["diff"] == pytest.approx(values[kind]["value"] - values["none"]["value"])
    family = scores.filter(pl.col("peft") != "none")
    smallest = family.sort("p_value").row(0, named=True)
    assert smallest["p_holm"] == pytest.approx(min(1, 6 * smallest["p_value"])), "three kinds, two metrics"
    against = versus.filter(metric="accuracy").rows_by_key(["peft", "against"], named=True, unique=True)
    assert set(against) >= {(k, "none") for k in ("lora", "ia3", "prompt")} | {("lora", "ia3"), ("lora", "prompt")}
    pair = against["lora", "ia3"]
    assert pair["diff"] == pytest.approx(pair["value"] - pair["other"])


def test_holm_is_over_all_comparisons_of_lora_against_none():
    scores = scores_table(boards(with_controls(NEWS) + both(RATING) + both(TITLES, "k1"), {}, HOW))
    compared = scores.filter(pl.col("p_value").is_not_null())
    family = compared.filter(peft="lora")
    assert len(family) == 8  # two prompts of one task, one of each other, two metrics
    assert compared.filter(pl.col("peft") != "lora")["p_holm"].null_count() == 8
    smallest = family.sort("p_value").row(0, named=True)
    assert smallest["p_holm"] == pytest.approx(min(1, 8 * smallest["p_value"]))
    assert (family["significant_holm"] == (family["p_holm"] < 0.05)).all()


def test_the_test_is_named_and_changes_p_but_no_interval():
    plain, chance = (
        scores_table(boards(both(NEWS), {}, Bootstrap(200, 0, t)), t) for t in ("bootstrap", "permutation")
    )
    assert set(plain["test"].drop_nulls()) == {"paired bootstrap over users"}
    assert set(chance["test"].drop_nulls()) == {"paired permutation over users"}
    same = ["value", "diff", "diff_low", "diff_high"]
    assert plain.select(same).equals(chance.select(same))
    assert only(chance, peft="lora", metric="accuracy")["significant"]


def repeated(of, seeds=3):
    return [
        setting(of, "k0", kind, right, seed=10 * n + i, repeat=n)
        for n in range(seeds)
        for i, (kind, right) in enumerate({"none": 0.4, "lora": 0.8}.items())
    ]


def test_seeds_csv_is_the_spread_over_repeats(tmp_path):
    settings = repeated(NEWS)
    write_tables(tmp_path, settings, {}, {}, HOW)
    seeds = read_csv(tmp_path / "seeds.csv")
    right = {
        kind: np.array([np.mean([row["correct"] for row in s.scored]) for s in settings if s.peft == kind])
        for kind in ("none", "lora")
    }
    row = only(seeds, peft="lora", metric="accuracy")
    assert row["n_seeds"] == 3
    assert [row[n] for n in ("mean", "sd", "min", "max")] == pytest.approx(
        [statistics.mean(right["lora"]), statistics.stdev(right["lora"]), min(right["lora"]), max(right["lora"])],
        abs=1e-6,
    )
    gain = right["lora"] - right["none"]
    assert (row["diff_mean"], row["diff_sd"]) == pytest.approx((gain.mean(), statistics.stdev(gain)), abs=1e-6)
    assert row["sd"] > 0 and only(seeds, peft="none", metric="accuracy")["diff_mean"] is None
    # the main tables are the first seed's
    write_tables(tmp_path / "first", repeated(NEWS, 1), {}, {}, HOW)
    for name in ("scores.csv", "versus.csv", "table1.csv"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    assert read_csv(tmp_path / "first" / "seeds.csv").is_empty()
    assert f"± {t1.number(row['sd'])}" in (tmp_path / "table1.md").read_text()


def test_repeats_on_other_queries_than_each_other_are_refused(tmp_path):
    odd = [setting(NEWS, "k0", "none", 0.4, repeat=1), setting(NEWS, "k0", "lora", 0.4, users=19, repeat=1)]
    with pytest.raises(InputError, match="LaMP_2N/k0-s1/lora/full: 5 queries differ"):
        write_tables(tmp_path, repeated(NEWS, 1) + odd, {}, {}, HOW)


def test_the_papers_values_stand_beside_ours_where_the_task_is_the_same(tmp_path):
    paper = read_csv(PAPER / "table1.csv")
    write_tables(tmp_path, both(NEWS), {}, {}, HOW, paper)
    first = (tmp_path / "table1.md").read_text().splitlines()[2]
    assert r"(.787) |" in first and r"(.810\*) |" in first and "\u2020" in first
    assert "Llama-2-7B" in (tmp_path / "table1.md").read_text()
    without = markdown(t1.sheet(read_csv(tmp_path / "table1.csv")))
    assert "(.787)" not in without and "Llama" not in without and "\u2020 " not in without.splitlines()[2]


def test_the_page_holds_the_same_cells_and_loads_nothing():
    table, paper = read_csv(PAPER / "table1.csv"), read_csv(PAPER / "table1.csv")
    page = html(t1.sheet(table, paper=paper))
    rows = ET.fromstring(page.split("<div>")[1].split("</div>")[0]).findall("tbody/tr")
    cells = [["".join(td.itertext()) for td in row.findall("td")] for row in rows]
    names = list(t1.SETTINGS)
    assert cells == [[f"{r[n]}({r[n]})" if r[n] else "" for n in names] for r in table.iter_rows(named=True)]
    best = [[td.find("b").text for td in row.findall("td") if td.find("b") is not None] for row in rows]
    assert best[0] == [".797*"] and best[-1] == [".533*", ".533*"]
    assert all(row.find("td/u") is not None for row in rows)
    assert "http" not in page and "<script" not in page
