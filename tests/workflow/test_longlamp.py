"""A task is a record: LongLaMP_abstract, which no line of code names, from its files to its scores."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

from oppu import lamp
from oppu.config import Split, parse_augmentation
from oppu.examples import Context, history_examples, query_prompts
from oppu.models import load_tokenizer
from oppu.references import references
from oppu.scores import score_texts
from oppu.split import queries_of, split
from oppu.tasks import render, task
from tests.workflow.project import ROOT, Project, sample

NAME = "LongLaMP_abstract"


def recast(folder: Path, items: int = 5, words: int = 40) -> None:
    """A few authors of LaMP_5's sample in the form of the task: the title is asked for its abstract, here a short one.

    LaMP_5 asks for the title of an abstract; the answer there is the title here, and its abstract the answer.
    """
    (folder / NAME).mkdir(parents=True)
    for part, users in (("dev", 2), ("train", 4)):
        questions, outputs = sample("LaMP_5", part, "questions"), sample("LaMP_5", part, "outputs")
        titles = {gold["id"]: gold["output"] for gold in outputs["golds"]}
        chosen = sorted({q["user_id"] for q in questions})[:users]
        kept, golds = [], []
        for q in (q for q in questions if q["user_id"] in chosen):
            abstract = q["input"].removeprefix("Generate a title for the following abstract of a paper: ")
            asked = render(task(NAME).input, {"title": titles[q["id"]], "items": f"1. {abstract[:30]}"})
            profile = [p | {"abstract": " ".join(p["abstract"].split()[:words])} for p in q["profile"][:items]]
            kept.append(q | {"input": asked, "profile": profile})
            golds.append({"id": q["id"], "output": " ".join(abstract.split()[:words])})
        (folder / NAME / f"{part}_questions.json").write_text(json.dumps(kept))
        (folder / NAME / f"{part}_outputs.json").write_text(json.dumps({"task": NAME, "golds": golds}))


def test_no_code_names_the_task() -> None:
    code = [*ROOT.glob("oppu/*.py"), *ROOT.glob("workflow/**/*.smk"), ROOT / "Snakefile"]
    assert len(code) > 30 and not [path for path in code if "LongLaMP" in path.read_text(encoding="utf-8")]


def test_the_package_takes_it_from_files_to_scores(tmp_path: Path) -> None:
    recast(tmp_path)
    record = task(NAME)
    found = split(lamp.read(tmp_path, record), record, Split(test_users="dev"))
    assert (len(found.test), len(found.base)) == (2, 4)
    tokenizer = load_tokenizer(str(ROOT / "data/models/oppu-tiny"))
    context = Context(record, parse_augmentation("k1"), tokenizer, tokenizer.eos_token_id, 512, 0)
    for user in found.test:
        for item, example in zip(user.history, history_examples(context, user, None, Counter()), strict=True):
            answer = tokenizer.decode(example.target, skip_special_tokens=True).strip()
            assert " ".join(answer.split()) == " ".join(item.fields["abstract"].split())
        for query, prompt, _ in query_prompts(context, user, None, 100, Counter()):
            title = query.input.split('"')[1]
            assert str(prompt).endswith(f"title: {title} abstract:") and len(prompt.items) == 1
            assert " using the following items" not in str(prompt)
    queries = queries_of(found.test)
    golds = {(user.key, q.id): q.gold or "" for user in found.test for q in user.queries}
    perfect = score_texts(record, queries, golds).metrics
    assert perfect["rouge-1"] == perfect["rouge-L"] == 1
    worse = score_texts(record, queries, references(record, found.test, found.base)["copy-bm25"]).metrics
    assert 0 < worse["rouge-L"] < worse["rouge-1"] < 1


def test_the_workflow_runs_it_end_to_end(tmp_path: Path) -> None:
    project = Project.make(tmp_path / "project", (), augmentations=["k0"], generation={"max_new_tokens": 12})
    project.config["tasks"] = [NAME]
    recast(project.folder / "data/raw")
    project.run()
    with (project.folder / "results/tables/scores.csv").open() as f:
        rows = {(row["task"], row["peft"], row["metric"]): row for row in csv.DictReader(f)}
    assert {(NAME, peft, metric) for peft in ("none", "lora") for metric in ("rouge1", "rougeL")} <= rows.keys()
    adapters = list(project.folder.glob(f"results/{NAME}/k0/lora/full/users/*/adapter/adapter_model.safetensors"))
    assert len(adapters) == 2
    with (project.folder / "results/tables/references.csv").open() as f:
        assert {row["reference"] for row in csv.DictReader(f)} >= {"copy-bm25"}
