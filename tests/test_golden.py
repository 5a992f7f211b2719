"""Recipe versions are tied to what they make: whoever changes a text or token step raises its version knowingly.

After a change on purpose: raise the step's number in oppu/keys.py, then run
    python -m tests.test_golden
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

from oppu.config import load
from oppu.examples import Context, history_examples, query_prompts
from oppu.files import digest
from oppu.keys import SCORING, VERSIONS
from oppu.llm_profiles import Writer
from oppu.models import load_tokenizer
from oppu.profiles import extractive
from oppu.recipe import profile_recipe
from oppu.records import Item, Query, User
from oppu.rows import plan
from oppu.scores import score
from oppu.setting import parse_augmentation
from oppu.split import queries_of
from oppu.tasks import fields_of, render, task, tasks

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests/golden/recipes.json"
LLM = {"backend": "llm", "path": str(ROOT / "data/models/oppu-tiny"), "history_tokens": 100, "item_words": 8}
PROMPTS = ROOT / "tests/golden/prompts.txt"
AUGMENTATIONS = ("k0", "random", "k1", "k2", "k4", "profile-k0", "profile-k1", "recency-k1")
"""Those of the main table, and the newest item."""
WORDS = [
    "the",
    "senate",
    "voted",
    "on",
    "a",
    "new",
    "film",
    "about",
    "climate",
    "and",
    "schools",
    "after",
    "long",
    "talks",
    "with",
    "12",
    "singers",
    "in",
    "Paris",
]


def person(name: str) -> User:
    """A made-up user of a task, the same for ever."""
    record = task(name)
    labels = record.labels or ["A Title: In Two Parts", "is this a question?"]

    def text(n: int) -> str:
        return " ".join(WORDS[(n * 5 + i * (n % 3 + 1)) % len(WORDS)] for i in range(6 + n % 4))

    items = tuple(
        Item(
            str(n),
            f"2020-01-{n + 1:02d}",
            {f: labels[n % 2] if f == record.y else text(n + i) for i, f in enumerate(record.history)},
        )
        for n in range(8)
    )
    query = render(record.input, {field: text(20 + i) for i, field in enumerate(fields_of(record.input))})
    return User("u-0123456789ab", "someone", items, (Query("q1", query),))


def scores(name: str) -> dict[str, float]:
    """What scoring makes of one right answer, one wrong one, and one that is no label, rating or like the gold."""
    labels = task(name).labels or ["A Title: In Two Parts", "is this a title?"]
    golds, answers = (labels[0], labels[1], labels[0]), (labels[0], labels[0], "none of them")
    user = User("u-0123456789ab", "someone", (), tuple(Query(str(n), "", gold) for n, gold in enumerate(golds)))
    answered = [{"id": str(n), "prediction": answer} for n, answer in enumerate(answers)]
    metrics = score(task(name), queries_of([user]), {user.key: answered}).metrics
    return {metric: round(value, 9) for metric, value in metrics.items()}


def made() -> dict:
    """Digests of what the text and token steps make of each task's person."""
    tokenizer = load_tokenizer(str(ROOT / "data/models/oppu-tiny"))
    found = {}
    for name in tasks():
        user = person(name)
        profile = extractive(task(name), user.history)
        for augmentation in ("k0", "k2", "random", "profile-k1"):
            context = Context(task(name), parse_augmentation(augmentation), tokenizer, tokenizer.eos_token_id, 256, 0)
            examples = history_examples(context, user, profile, Counter())
            prompts = query_prompts(context, user, profile, 16, Counter())
            found[f"{name}/{augmentation}"] = {
                "tokens": digest([[list(e.prompt), list(e.target)] for e in examples]),
                "prompts": digest([str(prompt) for _, prompt, _ in prompts]),
            }
        recipe = profile_recipe(load({"tasks": [name], "profiles": LLM}), name)
        found[name] = {"profile": profile, "profile prompt": digest(Writer(recipe).prompt(user))}
        found[f"{name} scores"] = scores(name)
    found["plan"] = {"steps": plan(7, 2, 3, "a seed text")}
    return {"versions": VERSIONS | {"scoring": SCORING}, "made": json.loads(json.dumps(found))}


def test_what_the_steps_make_is_what_their_versions_stand_for() -> None:
    golden, now = json.loads(GOLDEN.read_text()), made()
    assert now["versions"] == golden["versions"], "run: python -m tests.test_golden"
    changed = [name for name in now["made"] if now["made"][name] != golden["made"].get(name)]
    assert not changed, f"{changed} changed: raise the step's number in oppu.keys.VERSIONS, or undo the change"


def prompts() -> str:
    """Every task's person's query under every augmentation, to be read."""
    tokenizer = load_tokenizer(str(ROOT / "data/models/oppu-tiny"))
    parts = ["The prompts of one made-up user's query, made by the code: python -m tests.test_golden"]
    for name, augmentation in itertools.product(tasks(), AUGMENTATIONS):
        user, what = person(name), parse_augmentation(augmentation)
        profile = extractive(task(name), user.history) if what.profile else None
        context = Context(task(name), what, tokenizer, tokenizer.eos_token_id, 2048, 0)
        ((_, prompt, _),) = query_prompts(context, user, profile, 16, Counter())
        parts.append(f"== {name} {augmentation}\n{prompt}")
    return "\n\n".join(parts) + "\n"


def test_prompts_are_the_golden_ones() -> None:
    golden, now = (text.split("\n\n== ") for text in (PROMPTS.read_text(encoding="utf-8"), prompts()))
    changed = [new for new in now if new not in golden]
    assert now == golden, f"raise `prompts` in oppu.keys.VERSIONS, or undo the change; now:\n{changed[:1]}"


if __name__ == "__main__":
    PROMPTS.write_text(prompts(), encoding="utf-8")
    GOLDEN.write_text(json.dumps(made(), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
