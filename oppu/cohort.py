"""A cohort at work: users' adapters trained together on one loaded base, and their queries answered (section 3)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from oppu.bank import Bank, load_adapter, save_adapter
from oppu.banks import bank_for
from oppu.checkpoints import Checkpoint
from oppu.config import Generation
from oppu.decoding import Asked
from oppu.encoder import Encoder
from oppu.examples import Context, history_examples, label_targets, query_prompts
from oppu.generation import generate
from oppu.keys import base_digest
from oppu.labels import likeliest
from oppu.models import load_base, load_tokenizer
from oppu.progress import Stage
from oppu.prompts import Prompt
from oppu.recipe import training_of
from oppu.records import Item, Query, User
from oppu.retrieval import Search
from oppu.rows import Example, plan, virtual
from oppu.seeds import seed_of, seed_text
from oppu.setting import parse_augmentation
from oppu.tasks import tasks
from oppu.training import train
from oppu.warm import Lesson

log = logging.getLogger(__name__)


def context_of(
    recipe: dict[str, Any], tokenizer: Any, pool: Sequence[Item] | None, device: str | torch.device = "cpu"
) -> Context:
    """What turns items and queries into prompts, from a recipe."""
    encoder = recipe["runtime"]["encoder"]
    return Context(
        task=tasks()[recipe["task"]["name"]],
        augmentation=parse_augmentation(recipe["augmentation"]),
        tokenizer=tokenizer,
        eos=tokenizer.eos_token_id,
        max_length=recipe["model"]["max_length"],
        seed=recipe["seed"],
        pool=pool,
        search=Search(recipe["query"] or "prompt", Encoder(encoder, device) if encoder else None),
        lead=virtual(recipe["training"]["virtual_tokens"]) if recipe.get("peft") == "prompt" else (),
    )


def loading_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """What `load_base` needs of a recipe besides where the model lies."""
    return {name: recipe["model"][name] for name in ("dtype", "quantization")}


def base_name(manifest: dict[str, Any]) -> str:
    """What a personal adapter calls its base: the merged base it belongs to, never the raw one."""
    return f"oppu-base-{base_digest(manifest)[:16]}"


def log_memory() -> None:
    """Log the most memory that tensors took on the device; nothing without one."""
    if torch.cuda.is_available():
        log.info("peak device memory %.2f GiB", torch.cuda.max_memory_allocated() / 2**30)


def _groups(queries: Mapping[str, int]) -> Iterator[list[str]]:
    """Users, by how many queries each has, in groups that have QUERIES_AT_ONCE, or somewhat more by their last user."""
    group: list[str] = []
    number = 0
    for key, own in queries.items():
        group.append(key)
        number += own
        if number >= QUERIES_AT_ONCE:
            yield group
            group, number = [], 0
    if group:
        yield group


def _row(query: Query, fitted: Prompt, tokens: Sequence[int], answer: str) -> dict[str, Any]:
    """A row of predictions.jsonl."""
    cut = {"cut_query": fitted.cut_query, "cut_history": fitted.cut_history}
    return {"id": query.id, "prediction": answer, "prompt_tokens": len(tokens)} | cut


Answers = list[dict[str, Any]]
"""A user's rows of predictions.jsonl."""
QUERIES_AT_ONCE = 2000
"""So many queries are answered in one pass, to pack batches of like lengths; after each, its users are finished."""
POOLED = "pooled"
"""The name of the one adapter that all users of a `pooled` setting share."""


class Cohort:
    """Users of one setting on one loaded base. Users are named by key; each has a profile and counts to add to.

    Adapters are named by their user's key too; in a `pooled` setting there is one, POOLED.
    """

    def __init__(
        self,
        recipe: dict[str, Any],
        manifest: dict[str, Any],
        base: Path,
        pool: Sequence[Item] | None,
        users: Sequence[tuple[User, str | None, Counter[str]]],
    ) -> None:
        self.recipe, self.manifest = recipe, manifest
        self.results = base.parents[2] if base.name == "base" else None
        self.users = {user.key: (user, profile, counts) for user, profile, counts in users}
        self.adapters = [POOLED] if recipe["peft"] == "pooled" else list(self.users)
        self.row = {key: 0 if recipe["peft"] == "pooled" else n for n, key in enumerate(self.users)}
        self.accelerator = Accelerator()
        model = recipe["runtime"]["model"]
        self.tokenizer = load_tokenizer(model["path"], model["revision"])
        self.model = load_base(
            **model, **loading_of(recipe), device=self.accelerator.device, task_adapter=base / "adapter"
        )
        self.context = context_of(recipe, self.tokenizer, pool, self.accelerator.device)
        self.bank: Bank | None = None
        if recipe["peft"] != "none":
            self.lora = training_of(recipe)
            seed = seed_of(recipe["seed"], self.context.task.name, *self._setting, "initial parameters")
            self.bank = bank_for(self.model, self.lora, len(self.adapters), seed)

    @property
    def _setting(self) -> tuple[str, str, str]:
        return self.recipe["augmentation"], self.recipe["peft"], self.recipe["history"]

    def _stage(self, what: str, users: int | None = None, unit: str = "steps") -> Stage:
        return Stage("/".join((self.context.task.name, *self._setting)) + f" {what}", self.results, users, unit)

    def load(self, key: str, folder: Path) -> None:
        """Take a user's adapter as it was trained before: to answer with, or to go on from."""
        assert self.bank is not None
        self.bank.load(self.row[key], load_adapter(folder, self.bank))

    def save(self, adapter: str, folder: Path) -> None:
        """Write an adapter as a plain PEFT folder."""
        assert self.bank is not None
        save_adapter(folder, self.bank, self.adapters.index(adapter), base_name(self.manifest))

    def train(
        self,
        keys: Sequence[str],
        finished: Callable[[str], None],
        lessons: Mapping[str, Lesson] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> dict[str, str]:
        """Train on these users' histories; `finished` is told each adapter as soon as its last step is done.

        Adapters go on from what they are, the initial parameters or what was loaded, or from the checkpoint. `lessons`
        say which items of its history each user learns from; without, the newest `max_items` of them. Returns why each
        failed user or adapter failed.
        """
        assert self.bank is not None
        failed: dict[str, str] = {}
        examples: list[list[Example]] = [[] for _ in self.adapters]
        for key in keys:
            user, profile, counts = self.users[key]
            chosen = lessons[key].items if lessons else None
            try:
                examples[self.row[key]] += history_examples(
                    self.context, user, profile, counts, self.lora.max_items, chosen
                )
            except ValueError as error:
                failed[key] = str(error)
        name = self.context.task.name
        wanted = {self.adapters[self.row[key]] for key in keys if key not in failed}
        plans: list[list[list[int]]] = []
        # A second training draws anew: with the same numbers, dropout would hide the same features again.
        after = {key: [f"after {lesson.after} items"] for key, lesson in (lessons or {}).items() if lesson.after}
        for adapter, own in zip(self.adapters, examples, strict=True):
            order = seed_text(self.recipe["seed"], name, adapter, "data order", *after.get(adapter, []))
            plans.append(plan(len(own), int(self.lora.epochs or 0), int(self.lora.batch_size or 0), order))
            if not own and adapter in wanted:
                finished(adapter)
        seeds = [
            seed_of(self.recipe["seed"], name, adapter, *self._setting, "dropout", *after.get(adapter, []))
            for adapter in self.adapters
        ]
        with self._stage("training", len(wanted)) as stage:

            def done(row: int) -> None:
                finished(self.adapters[row])
                stage.user_done()

            trained = train(
                self.model,
                self.bank,
                examples,
                plans,
                self.lora,
                self.accelerator,
                progress=stage,
                seeds=seeds,
                finished=done,
                checkpoint=checkpoint,
            )
        return failed | {
            adapter: str(one.error) for adapter, one in zip(self.adapters, trained, strict=True) if one.error
        }

    def predict(self, keys: Sequence[str], finished: Callable[[str, Answers], None]) -> dict[str, str]:
        """Answer all queries of these users; returns why each failed user failed.

        `finished` is called with each other user's key and answers, after every QUERIES_AT_ONCE or so. Who is left
        after that would be answered in the same passes, and to the same bytes, by a call that begins there.
        """
        settings = Generation(**self.recipe["generation"] | self.recipe["runtime"]["generation"])
        labels = label_targets(self.context) if settings.labels == "score" else []
        answer_tokens = max([settings.max_new_tokens or self.context.task.output_tokens, *map(len, labels)])
        failed: dict[str, str] = {}
        asked = {}
        for key in keys:
            user, profile, counts = self.users[key]
            try:
                prompts = query_prompts(self.context, user, profile, answer_tokens, counts)
            except ValueError as error:
                failed[key] = str(error)
                continue
            asked[key] = prompts
        total = sum(map(len, asked.values()))
        with self._stage("answers", len(asked), "queries") as stage:
            for group in _groups({key: len(prompts) for key, prompts in asked.items()}):
                whole = [(key, query, tokens) for key in group for query, _, tokens in asked[key]]
                before, _, read = stage.last

                def told(done: int, _: int, tokens: int, before: int = before, read: int = read) -> None:
                    stage(before + done, total, read + tokens)

                answers = iter(self._answers(settings, labels, whole, answer_tokens, told))
                for key in group:
                    finished(key, [_row(*prompt, next(answers)) for prompt in asked[key]])
                    stage.user_done()
        log_memory()
        return failed

    def _answers(
        self,
        settings: Generation,
        labels: list[list[int]],
        asked: Sequence[tuple[str, Query, list[int]]],
        answer_tokens: int,
        told: Callable[[int, int, int], object],
    ) -> list[str]:
        """The answers to tokenised queries of users: by scoring the labels if there are any, else generated."""
        prompts = [tokens for *_, tokens in asked]
        users = [self.row[key] for key, *_ in asked] if self.bank else None
        task = self.context.task
        if labels:
            chosen = likeliest(Asked(self.model, prompts, self.bank, users, told), labels, settings.tokens_per_batch)
            return [(task.labels or [])[n] for n in chosen]
        seeds = [seed_of(self.recipe["seed"], task.name, key, "sampling", query.id) for key, query, _ in asked]
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            settings,
            answer_tokens,
            bank=self.bank,
            users=users,
            seeds=seeds,
            progress=told,
        )
