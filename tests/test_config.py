from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from oppu import config, recipe
from oppu.config_page import describe
from oppu.records import InputError
from oppu.setting import seeded
from oppu.table1 import SETTINGS

ROOT = Path(__file__).resolve().parents[1]


def test_schema_and_key_list_are_those_of_the_code() -> None:
    schema = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text())
    assert schema == json.loads(json.dumps(config.schema())), "run: oppu schema > workflow/schemas/config.schema.json"
    assert (ROOT / "config/README.md").read_text() == describe(), "run: oppu schema --readme > config/README.md"


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path: Path) -> None:
    loaded = config.load(yaml.safe_load(path.read_text()))
    lines = path.read_text().splitlines()
    launched = [line for line in lines[:6] if "snakemake --cores all" in line and path.name in line]
    assert launched or path.name == "config.yaml", "the launch line stands on top"
    for task in loaded.tasks:
        for augmentation, peft, history in loaded.settings:
            base = recipe.base_recipe(loaded, task, augmentation)
            cell = recipe.cell_recipe(loaded, task, augmentation, peft, history)
            assert json.loads(json.dumps([base, cell])) == [base, cell]
            assert base["runtime"]["model"] == loaded.model.model_dump(include={"path", "revision", "convert"})
            assert recipe.lora_of(base).alpha
            if peft in ("none", "ia3", "prompt"):
                assert peft == "none" or recipe.training_of(cell) == loaded.training(peft, task)
            else:
                assert recipe.lora_of(cell).alpha == cell["training"]["rank"]


def test_the_papers_preset_is_table_4() -> None:
    paper = config.load(yaml.safe_load((ROOT / "config/paper.yaml").read_text()))
    with (ROOT / "data/paper/table4.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [row["task"] for row in rows] == paper.tasks
    for row in rows:
        lora = recipe.lora_of(recipe.cell_recipe(paper, row["task"], "k1", "lora", "full"))
        found = (lora.rank, lora.epochs, lora.lr, lora.weight_decay, lora.batch_size)
        assert found == tuple(float(row[name]) for name in ("rank", "epochs", "lr", "l2", "batch_size"))
        assert (lora.alpha, lora.dropout, lora.target_modules) == (8, 0, ["q_proj", "v_proj"])
    assert len(paper.settings) == 2 * 7 - 1, "all columns of Table 1, and random without an adapter only"


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(InputError) as error:
        config.load({"tasks": ["LaMP_6"], "peft": ["adapterfusion"], "seeds": 1, "personal": {"lr": "1e-4x"}})
    text = str(error.value)
    assert all(word in text for word in ("peft", "seeds", "personal.lr"))


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="no task 'LaMP_6'; there are LaMP_1"):
        config.load({"tasks": ["LaMP_6"]})
    with pytest.raises(InputError, match="k-1"):
        config.load({"augmentations": ["k-1"]})
    with pytest.raises(InputError, match="learning_rate"):
        config.load({"task_personal": {"LaMP_3": {"learning_rate": 1}}})


def test_personal_settings_come_from_table_4_where_nothing_else_is_said() -> None:
    shipped = config.load({"task_personal": {"LaMP_4": {"lr": 1e-3}}, "personal": {"batch_size": 5}})
    lora = shipped.lora("LaMP_4")
    assert (lora.rank, lora.epochs, lora.lr, lora.weight_decay, lora.batch_size) == (8, 2, 1e-3, 1e-1, 5)
    assert shipped.lora("LaMP_3").lr == 1e-5


def test_other_kinds_have_settings_of_their_own_over_the_personal_ones() -> None:
    values = {
        "personal": {"rank": 16, "epochs": 5, "max_items": 7, "warmup": 0.2},
        "task_personal": {"LaMP_4": {"lr": 1e-3, "batch_size": 9}},
        "ia3": {"lr": 5e-3, "target_modules": ["v_proj"]},
        "prompt": {"virtual_tokens": 8, "epochs": 6},
    }
    loaded = config.load(values | {"peft": ["lora", "ia3", "prompt"], "augmentations": ["k0"]})
    ia3, prompt = loaded.training("ia3", "LaMP_4"), loaded.training("prompt", "LaMP_4")
    assert (ia3.lr, ia3.weight_decay, ia3.epochs, ia3.batch_size, ia3.target_modules) == (5e-3, 0, 5, 9, ["v_proj"])
    assert (prompt.lr, prompt.epochs, prompt.max_items, prompt.warmup, prompt.virtual_tokens) == (3e-2, 6, 7, 0.2, 8)
    keys = {p: set(recipe.cell_recipe(loaded, "LaMP_4", "k0", p, "full")["training"]) for p in loaded.peft}
    shared = keys["ia3"] & keys["prompt"]
    assert shared == keys["lora"] - {"rank", "alpha", "dropout", "target_modules"}
    assert keys["ia3"] - shared == {"target_modules", "feedforward_modules"}
    assert keys["prompt"] - shared == {"virtual_tokens", "init"}


def test_the_main_table_is_run_column_by_column_and_nothing_else() -> None:
    shipped = config.load(yaml.safe_load((ROOT / "config/table1-sample.yaml").read_text()))
    assert {(a, p) for a, p, _ in shipped.settings} == set(SETTINGS.values())
    assert len(shipped.settings) == 13
    assert config.load({}).settings == shipped.settings, "the default of every config: the paper's columns"


def test_repeats_are_settings_of_their_own_and_random_is_run_without_an_adapter() -> None:
    found = config.load({"augmentations": ["k0", "random"], "training_seeds": 3}).settings
    assert [a for a, p, _ in found if p == "lora"] == ["k0", "k0-s1", "k0-s2"]
    assert [a for a, p, _ in found if p == "none"] == ["k0", "random", "k0-s1", "random-s1", "k0-s2", "random-s2"]
    assert [seeded(a) for a, p, _ in found if p == "lora"] == [("k0", 0), ("k0", 1), ("k0", 2)]
    with pytest.raises(InputError, match="random"):
        config.load({"augmentations": ["random"], "peft": ["lora"]})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft": ["none", "pooled"]}, "benchmark: true"),
        ({"peft": ["none", "swapped"]}, "list lora too"),
        ({"profiles": {"backend": "llm"}}, r"profiles\.path"),
        (
            {"ia3": {"target_modules": ["k_proj"], "feedforward_modules": ["up_proj"]}},
            "up_proj must stand in ia3.target",
        ),
        ({"prompt": {"rank": 8}}, "prompt.rank"),
        ({"task_data": {"LaMP_9": "x"}}, "task_data: no task"),
        ({"task_base": {"LaMP_3": {"learning_rate": 1}}}, "learning_rate"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(values: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        config.load(values)
