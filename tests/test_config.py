from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from oppu import config, recipe
from oppu.records import InputError
from oppu.table1 import SETTINGS

ROOT = Path(__file__).resolve().parents[1]


def test_schema_and_key_list_are_those_of_the_code() -> None:
    schema = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text())
    assert schema == json.loads(json.dumps(config.schema())), "run: oppu schema > workflow/schemas/config.schema.json"
    assert (ROOT / "config/README.md").read_text() == config.describe(), "run: oppu schema --readme > config/README.md"


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_loads(path: Path) -> None:
    config.load(yaml.safe_load(path.read_text()))


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


def test_the_main_table_is_run_column_by_column_and_nothing_else() -> None:
    shipped = config.load(yaml.safe_load((ROOT / "config/table1-sample.yaml").read_text()))
    assert {(a, p) for a, p, _ in shipped.settings} == set(SETTINGS.values())
    assert len(shipped.settings) == 13
    assert config.load({}).settings == shipped.settings, "the default of every config: the paper's columns"


def test_repeats_are_settings_of_their_own_and_random_is_run_without_an_adapter() -> None:
    found = config.load({"augmentations": ["k0", "random"], "training_seeds": 3}).settings
    assert [a for a, p, _ in found if p == "lora"] == ["k0", "k0-s1", "k0-s2"]
    assert [a for a, p, _ in found if p == "none"] == ["k0", "random", "k0-s1", "random-s1", "k0-s2", "random-s2"]
    assert [recipe.seeded(a) for a, p, _ in found if p == "lora"] == [("k0", 0), ("k0", 1), ("k0", 2)]
    with pytest.raises(InputError, match="random"):
        config.load({"augmentations": ["random"], "peft": ["lora"]})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft": ["none", "pooled"]}, "benchmark: true"),
        ({"peft": ["none", "swapped"]}, "list lora too"),
        ({"profiles": {"backend": "llm"}}, r"profiles\.path"),
        ({"task_data": {"LaMP_9": "x"}}, "task_data: no task"),
        ({"task_base": {"LaMP_3": {"learning_rate": 1}}}, "learning_rate"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(values: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        config.load(values)
