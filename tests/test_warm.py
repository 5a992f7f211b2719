"""Warm starts: what counts as an appended history, what is learned then, and that it is what plain PEFT would learn."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from oppu import config, recipe
from oppu.bank import LoraBank, load_adapter, save_adapter
from oppu.cells import Cell, open_cell
from oppu.files import read_json
from oppu.keys import adapter_key
from oppu.records import InputError, Item, Query, User
from oppu.rows import plan
from oppu.training import train
from oppu.warm import Link, anew, lesson_of
from tests.oracle import distance, train_alone
from tests.tiny_models import settings, some_examples, tiny_llama

MANIFEST = {"key": "k", "files": {}, "model": {}}


def a_recipe(**personal: object) -> dict:
    shipped = config.load({"tasks": ["LaMP_2N"], "benchmark": True, "personal": personal})
    return recipe.cell_recipe(shipped, "LaMP_2N", "k0", "lora", "full")


def person(count: int, key: str = "u-0123456789ab") -> User:
    items = tuple(Item(str(n), None, {"text": f"text {n}", "category": "world"}) for n in range(count))
    return User(key, "someone", items, (Query("q", "what?"),))


def cell_of(folder: Path, user: User, how: dict, lent: str | None = None) -> Cell:
    return open_cell(folder / user.key, user, how, MANIFEST, None, folder / user.key, lent)


def trained(cell: Cell) -> Cell:
    """The cell after its training, which here only writes a file."""
    (cell.folder / "adapter").mkdir(parents=True, exist_ok=True)
    (cell.folder / "adapter/adapter_model.safetensors").write_text(cell.keys["adapter"])
    cell.note("adapter")
    return cell


def learned(tmp_path: Path, how: dict, *counts: int) -> Cell:
    """A cell that was trained each time its history had grown to so many items."""
    for count in counts:
        cell = trained(cell_of(tmp_path, person(count), how))
    return cell


PREVIOUS = a_recipe(start="previous", replay=0.5)


def test_nothing_changes_for_those_who_begin_at_the_start() -> None:
    plain = a_recipe()
    assert "start" not in plain and "start" not in plain["training"] and "replay" not in plain["training"]
    assert {name: value for name, value in PREVIOUS.items() if name != "start"} == plain
    one = adapter_key(plain, MANIFEST, person(5), None, None)
    assert one == adapter_key(PREVIOUS, MANIFEST, person(5), None, None), "the first link of any chain"


def test_every_own_kind_may_go_on_and_only_lora_begins_at_the_pooled_lora() -> None:
    for start, there in (("previous", {"lora", "ia3", "prompt"}), ("pooled", {"lora"}), ("initial", set())):
        shipped = config.load({"tasks": ["LaMP_2N"], "benchmark": True, "personal": {"start": start}})
        kinds = ("none", "lora", "ia3", "prompt", "pooled", "swapped")
        assert {k for k in kinds if "start" in recipe.cell_recipe(shipped, "LaMP_2N", "k0", k, "full")} == there


def test_appended_items_are_learned_alone_with_a_share_of_old_ones(tmp_path: Path) -> None:
    first = learned(tmp_path, PREVIOUS, 10)
    assert first.record["trained_on"] == [
        {"start": "initial", "items": 10, "history": first.lesson.links[0]["history"], "replayed": 0}
    ]
    cell = cell_of(tmp_path, person(13), PREVIOUS)
    assert "adapter" in cell.stale and cell.lesson.warm and cell.lesson.after == 10
    old, new = cell.lesson.items[:-3], cell.lesson.items[-3:]
    assert new == (10, 11, 12)
    assert len(old) == 2 and set(old) < set(range(10)), "half of three, rounded up"
    trained(cell)
    assert [
        (link["start"], link["items"], link["replayed"]) for link in read_json(cell.folder / "cell.json")["trained_on"]
    ] == [
        ("initial", 10, 0),
        ("previous", 13, 2),
    ]
    again = cell_of(tmp_path, person(13), PREVIOUS)
    assert again.fresh("adapter") and again.keys["adapter"] == cell.keys["adapter"]
    assert cell.keys["adapter"] != anew_key(13), "another adapter than one that learned all at once"
    third = trained(cell_of(tmp_path, person(14), PREVIOUS))
    assert [link["items"] for link in third.lesson.links] == [10, 13, 14]
    assert cell_of(tmp_path, person(14), PREVIOUS).fresh("adapter")


def anew_key(count: int, how: dict = PREVIOUS) -> str:
    return adapter_key(how, MANIFEST, person(count), None, None)


def edited(user: User, place: int) -> User:
    items = list(user.history)
    items[place] = replace(items[place], fields=items[place].fields | {"text": "other"})
    return replace(user, history=tuple(items))


@pytest.mark.parametrize("counts", [(10,), (6, 10), (3, 6, 10)])
@pytest.mark.parametrize(
    "user",
    [
        edited(person(12), 0),
        edited(person(12), 9),
        edited(person(10), 7),
        person(9),
        replace(person(12), history=person(12).history[1:]),
    ],
    ids=["first edited", "last old one edited", "edited only", "removed", "first removed"],
)
def test_any_other_change_trains_anew(tmp_path: Path, counts: tuple[int, ...], user: User) -> None:
    learned(tmp_path, PREVIOUS, *counts)
    cell = cell_of(tmp_path, user, PREVIOUS)
    assert "adapter" in cell.stale and not cell.lesson.warm
    assert cell.lesson.items == tuple(range(len(user.history)))
    assert [link["start"] for link in cell.lesson.links] == ["initial"]


def test_other_settings_base_or_profile_train_anew(tmp_path: Path) -> None:
    for change in ({"lr": 0.5}, {"replay": 0.25}):
        learned(tmp_path, PREVIOUS, 5, 8)
        how = a_recipe(**({"start": "previous", "replay": 0.5} | change))
        assert not cell_of(tmp_path, person(9), how).lesson.warm
        assert [link["items"] for link in cell_of(tmp_path, person(8), how).lesson.links] == [8]
    base = MANIFEST | {"key": "another"}
    folder = tmp_path / person(8).key
    assert not open_cell(folder, person(9), PREVIOUS, base, None, folder, None).lesson.warm
    record = read_json(folder / "cell.json")
    key = record["artefacts"]["adapter"]["key"]
    for profile, warm in ((None, True), ("a profile", False)):
        key_of = lambda user, profile=profile: adapter_key(PREVIOUS, MANIFEST, user, profile, None)  # noqa: E731
        assert lesson_of(PREVIOUS, person(9), key_of, record["trained_on"], key).warm == warm


def test_a_lost_or_damaged_adapter_is_trained_anew_in_one_link(tmp_path: Path) -> None:
    cell = learned(tmp_path, PREVIOUS, 5, 8)
    (cell.folder / "adapter/adapter_model.safetensors").write_text("damaged")
    for count in (8, 9):
        lost = cell_of(tmp_path, person(count), PREVIOUS)
        assert "adapter" in lost.stale and lost.keys["adapter"] == anew_key(count)
        assert [link["items"] for link in lost.lesson.links] == [count]


def test_a_forged_chain_is_not_believed(tmp_path: Path) -> None:
    cell = learned(tmp_path, PREVIOUS, 5, 8)
    for places in ([8], [5, 7], [3, 8], [8, 5], [5, 5, 8], [0, 5, 8], [5, 8, 20]):
        chain: list[Link] = [{"items": n} for n in places]
        key_of = lambda user: adapter_key(PREVIOUS, MANIFEST, user, None, None)  # noqa: E731
        lesson = lesson_of(PREVIOUS, person(8), key_of, chain, cell.keys["adapter"])
        assert lesson.key == anew_key(8) and not lesson.warm


def test_cells_from_before_there_was_a_choice_are_gone_on_from_and_back(tmp_path: Path) -> None:
    cell = learned(tmp_path, a_recipe(), 10)
    record = cell.folder / "cell.json"
    record.write_text(json.dumps({k: v for k, v in read_json(record).items() if k != "trained_on"}))
    assert cell_of(tmp_path, person(10), PREVIOUS).fresh("adapter"), "to switch trains nothing"
    assert cell_of(tmp_path, person(11), PREVIOUS).lesson.warm
    trained(cell_of(tmp_path, person(11), PREVIOUS))
    back = cell_of(tmp_path, person(11), a_recipe())
    assert "adapter" in back.stale and back.keys["adapter"] == anew_key(11), "from the start means from the start"


def test_max_items_holds_for_the_new_items_too(tmp_path: Path) -> None:
    how = a_recipe(start="previous", replay=1.0, max_items=4)
    assert cell_of(tmp_path, person(10), how).lesson.items == (6, 7, 8, 9)
    learned(tmp_path, how, 10)
    items = cell_of(tmp_path, person(16), how).lesson.items
    assert items[-4:] == (12, 13, 14, 15) and len(items) == 8 and max(items[:4]) < 10


def test_replay_depends_on_seed_task_user_and_what_was_learned_alone(tmp_path: Path) -> None:
    def replayed(user: User, how: dict, before: int = 40) -> tuple[int, ...]:
        key_of = lambda one: adapter_key(how, MANIFEST, one, None, None)  # noqa: E731
        first = anew(how, replace(user, history=user.history[:before]), key_of)
        new = len(user.history) - before
        return lesson_of(how, user, key_of, first.links, first.key).items[:-new]

    how = a_recipe(start="previous", replay=1.0)
    mine = replayed(person(60), how)
    assert len(mine) == len(set(mine)) == 20 and mine == replayed(edited(person(60), 50), how)
    assert mine == tuple(sorted(mine))
    others = [replayed(person(60, "u-000000000000"), how), replayed(person(60), how | {"seed": 1})]
    others.append(replayed(person(60), how | {"task": how["task"] | {"name": "LaMP_4"}}))
    assert all(mine != other for other in others)
    random.seed(7)
    assert mine == replayed(person(60), how)
    assert replayed(person(60), a_recipe(start="previous")) == ()
    assert len(replayed(person(60), how, 3)) == 3, "no more than there are"


def test_the_key_holds_the_pooled_adapter_that_others_begin_at(tmp_path: Path) -> None:
    how = a_recipe(start="pooled")
    one, other, plain = (
        cell_of(tmp_path, person(5), h, lent) for h, lent in ((how, "a"), (how, "b"), (a_recipe(), None))
    )
    assert len({cell.keys["adapter"] for cell in (one, other, plain)}) == 3
    assert one.lesson.links[0]["start"] == "pooled a" and not one.lesson.warm
    assert len({cell.keys["predictions"] for cell in (one, other, plain)}) == 3


@pytest.mark.parametrize(
    ("personal", "said"),
    [({"start": "pooled"}, "benchmark: true"), ({"replay": 0.5}, "start: previous"), ({"replay": 1.5}, "replay")],
)
def test_starts_that_cannot_be_are_refused(personal: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        config.load({"personal": personal})
    if "start" in personal:
        with pytest.raises(InputError, match=said):
            config.load({"task_personal": {"LaMP_3": personal}})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_going_on_is_what_peft_does_with_a_loaded_adapter(tmp_path: Path, dtype: torch.dtype) -> None:
    """Two users go on together, a third begins: as PEFT alone with the loaded adapter, a new AdamW and schedule."""
    model, lora = tiny_llama(dtype), settings()
    examples = some_examples(1, [9, 7, 5])
    before, after = [4, 3, 0], [[4, 5, 6, 7, 8, 1], [3, 4, 5, 6], list(range(5))]
    first = [plan(n, 2, 4, f"first {user}") for user, n in enumerate(before)]
    bank = LoraBank(model, lora, 3, seed=3)
    start = bank.state_dict(2)
    train(model, bank, examples, first, lora, Accelerator(cpu=True))
    for user in range(3):
        save_adapter(tmp_path / str(user), bank, user, "base")
    bank.close()
    bank = LoraBank(model, lora, 3, seed=3)
    for user in (0, 1):
        bank.load(user, load_adapter(tmp_path / str(user), bank))
    new = [[several[n] for n in chosen] for several, chosen in zip(examples, after, strict=True)]
    plans = [plan(len(some), 2, 4, f"second {user}") for user, some in enumerate(new)]
    train(model, bank, new, plans, lora, Accelerator(cpu=True))
    found = [bank.state_dict(user) for user in range(3)]
    bank.close()
    for user in range(3):
        loaded = load_adapter(tmp_path / str(user)) if user < 2 else start
        alone = train_alone(model, loaded, new[user], plans[user], lora)
        assert distance(found[user], alone) < (1e-12 if dtype == torch.float64 else 1e-4)
        assert distance(found[user], loaded) > 1e-3
