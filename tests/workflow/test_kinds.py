"""The paper's other kinds of adapter, (IA)3 and prompt tuning, through the whole workflow."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from oppu import cohort
from oppu.examples import query_prompts
from oppu.files import read_json, read_user
from oppu.models import load_tokenizer
from tests.workflow.project import TEST_USERS, Project

KINDS = ("lora", "ia3", "prompt")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.make(
        tmp_path_factory.mktemp("kinds") / "project",
        peft=["none", *KINDS],
        users_per_job=100,
        ia3={"lr": 3e-2},
        prompt={"virtual_tokens": 6, "init": "vocabulary", "lr": 1e-2},
    )
    project.run()
    return project


def adapter(project: Project, kind: str, user: str, augmentation: str = "k0") -> Path:
    return project.folder / f"results/LaMP_2N/{augmentation}/{kind}/full/users/{user}/adapter"


def test_every_kind_has_its_cells_and_a_second_run_does_nothing(several: Project) -> None:
    made = Counter(tuple(cell.split("/")[1:3]) for cell in several.cells())
    assert made == {(a, p): TEST_USERS for a in ("k0", "k1") for p in ("none", *KINDS)}
    types = {
        kind: json.loads((adapter(several, kind, u) / "adapter_config.json").read_text())["peft_type"]
        for kind in KINDS
        for u in several.users()
    }
    assert types == {"lora": "LORA", "ia3": "IA3", "prompt": "PROMPT_TUNING"}
    for kind, name, shape in (("ia3", "ia3_l", None), ("prompt", "prompt_embeddings", (6, 192))):
        for augmentation in ("k0", "k1"):
            first, second = (
                load_file(adapter(several, kind, user, augmentation) / "adapter_model.safetensors")
                for user in several.users()[:2]
            )
            assert all(name in key for key in first)
            assert shape is None or tuple(first["prompt_embeddings"].shape) == shape
            assert all((first[key] != second[key]).any() for key in first), "each user's own"
    assert "Nothing to be done" in several.run()
    several.forget_logs()
    several.run("--forcerun", "cells")
    assert several.made() == (0, 0)


def test_the_tables_show_them(several: Project) -> None:
    with (several.folder / "results/tables/scores.csv").open() as f:
        rows = {(r["augmentation"], r["peft"]): r for r in csv.DictReader(f) if r["metric"] == "accuracy"}
    assert set(rows) == {(a, p) for a in ("k0", "k1") for p in ("none", *KINDS)}
    for (augmentation, kind), row in rows.items():
        gain = float(row["value"]) - float(rows[augmentation, "none"]["value"])
        assert kind == "none" or float(row["diff"]) == pytest.approx(gain, abs=2e-6)
        assert bool(row["p_holm"]) == (kind != "none")
    with (several.folder / "results/tables/versus.csv").open() as f:
        against = {(r["peft"], r["against"]) for r in csv.DictReader(f)}
    assert {("ia3", "none"), ("prompt", "none"), ("lora", "ia3"), ("lora", "prompt")} <= against
    shown = several.oppu("show")
    assert "lora - ia3" in shown and "prompt - none" in shown and "tokens before the prompt" in shown.replace("\n", " ")


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_them_onto_the_merged_base_and_gives_the_cells_answers(
    several: Project, kind: str, tmp_path: Path
) -> None:
    """The oracle: `oppu merge`, PEFT, and greedy decoding of one prompt at a time."""
    several.oppu("merge", "results/LaMP_2N/k0/base/base.json", str(tmp_path / "merged"))
    recipe = read_json(several.folder / f"results/LaMP_2N/k0/{kind}/full/recipe.json")
    tokenizer = load_tokenizer(str(several.folder / "data/models/oppu-tiny"))
    context = cohort.context_of(recipe, tokenizer, None)
    for user in several.users():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        model = PeftModel.from_pretrained(base, str(adapter(several, kind, user)))
        person = read_user(several.folder / f"results/LaMP_2N/split/histories/{user}.json")
        answers = []
        for *_, tokens in query_prompts(context, person, None, 8, Counter()):
            ids = torch.tensor([[token for token in tokens if token >= 0]])
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
            answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
        lines = (adapter(several, kind, user).parent / "predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["prediction"] for line in lines] == answers


def test_damage_is_mended_and_only_a_kinds_own_settings_stale_it(several: Project, tmp_path: Path) -> None:
    project = several.copy(tmp_path / "project")
    project.forget_logs()
    (adapter(project, "prompt", project.users()[1]) / "adapter_model.safetensors").unlink()
    project.run()
    assert project.made() == (1, 0), "the answers are whole"
    project.forget_logs()
    project.config["ia3"] = {"lr": 2e-2}
    project.run()
    assert project.made() == (2 * TEST_USERS, 2 * TEST_USERS)
    assert {path.parts[-3] for path in project.folder.glob("results/logs/LaMP_2N/*/*/full/000.log")} == {"ia3"}
