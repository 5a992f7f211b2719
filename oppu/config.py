"""The configuration: one closed schema that both pydantic and Snakemake use. config/README.md lists every key."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from oppu.records import InputError
from oppu.tasks import Closed, tasks

AUGMENTATION = re.compile(r"(profile-)?k(\d+)|random")
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Augmentation:
    """What a prompt carries: a profile or not, and k items of the history, or one random item (then k is 1)."""

    profile: bool
    k: int
    random: bool = False


def parse_augmentation(name: str) -> Augmentation:
    """`k0`, `k4`, `profile-k1`, `random` as a record; InputError for any other name."""
    match = AUGMENTATION.fullmatch(name)
    if match is None:
        raise InputError([f"augmentation {name!r} is none of k0, k1, …, random, profile-k0, profile-k1"])
    profile, k = match.groups()
    return Augmentation(False, 1, random=True) if k is None else Augmentation(profile is not None, int(k))


class Split(Closed):
    """Who is a test user (section 4)."""

    test_users: Positive | Literal["dev"] = Field(
        100, description="the N users with the longest histories, or 'dev': the users of the dev files"
    )
    exclude: list[str] = Field(
        [],
        description="user keys (u-…) left out, after the ranking, of split, base, profiles and personal training",
    )
    heldout_queries: int = Field(
        0,
        ge=0,
        description="above 0: leave the test users out whole; of the base users, the 20 with the longest histories"
        " become the users under test, their last so many history items the queries (to choose hyperparameters)",
    )


class Model(Closed):
    """The language model that everything starts from."""

    path: str = Field("data/models/oppu-tiny", description="Hugging Face id or local folder of a causal LM")
    revision: str | None = Field(None, description="commit of the model on the hub; pin it for results that last")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field("float32", description="dtype it runs in")
    max_length: Positive = Field(2048, description="prompt and answer together, in tokens")


class Lora(Closed):
    """Settings of one LoRA training."""

    rank: Positive | None = Field(None, description="r; null: the task's own (Table 4)")
    alpha: float | None = Field(None, description="LoRA's alpha; null: the rank, so a scale of 1")
    dropout: Rate = Field(0.0, description="dropout on the LoRA branch")
    target_modules: list[str] = Field(["q_proj", "v_proj"], min_length=1, description="Linear layers it is added to")
    epochs: Positive | None = Field(None, description="passes over the examples; null: the task's own")
    lr: float | None = Field(None, gt=0, description="peak learning rate; null: the task's own")
    weight_decay: float | None = Field(None, ge=0, description="AdamW's weight decay ('R2 reg.'); null: the task's own")
    batch_size: Positive | None = Field(None, description="examples per optimiser step; null: the task's own")
    max_items: Positive | None = Field(
        None, description="learn from at most this many of a user's newest history items (retrieval sees all)"
    )
    warmup: Rate = Field(
        0.1, description="share of the steps over which the learning rate rises; then it falls linearly"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm, per user")
    tokens_per_batch: Positive = Field(8192, description="tokens of one forward pass; does not change results")


class Base(Lora):
    """Task adaption of the base model (section 2.2)."""

    examples: Literal["queries", "queries+history"] = Field(
        "queries", description="what the base learns from: base users' queries (the paper), or their histories too"
    )


class Generation(Closed):
    """How answers are generated."""

    sample: bool = Field(False, description="sample (the released code) instead of greedy decoding")
    temperature: float = Field(0.1, gt=0, description="only with sample")
    top_k: Positive = Field(10, description="only with sample")
    top_p: float = Field(0.9, gt=0, le=1, description="only with sample")
    max_new_tokens: Positive | None = Field(None, description="longest answer; null: the task's own")
    tokens_per_batch: Positive = Field(16384, description="prompt tokens of one batch; does not change results")


class Retrieval(Closed):
    """How history items are retrieved."""

    random: Literal["base", "own"] = Field(
        "base", description="augmentation 'random': an item of a base-training user (App. D), or of the user's own"
    )


class Tune(Closed):
    """The grid of `snakemake tune` (held-out base users; never test users)."""

    lr: list[float] = Field([], description="personal learning rates to try")
    epochs: list[int] = Field([], description="personal epochs to try")


class Config(Closed):
    """Everything that decides results, but for what belongs to a Snakemake profile (threads, memory)."""

    results: str = Field("results", description="folder of all outputs")
    data: str = Field(
        "data/raw", description="folder with LaMP's files: {task}/{train,dev}_{questions,outputs}.json[.gz]"
    )
    tasks: list[str] = Field(list(tasks()), min_length=1, description="tasks to run")
    augmentations: list[str] = Field(
        ["k0", "random", "k1", "k2", "k4", "profile-k0", "profile-k1"],
        min_length=1,
        description="what the prompt carries: k0, k1, k2, … retrieved items; random; profile-k0, profile-k1",
    )
    peft: list[Literal["none", "lora"]] = Field(["none", "lora"], min_length=1, description="kinds of personal adapter")
    history: list[Literal["full"]] = Field(["full"], min_length=1, description="history variants")
    seed: int = Field(
        0, ge=0, description="run seed; every random draw comes from it, the task, the user and the purpose"
    )
    users_per_job: Positive = Field(100, description="cohort size: users trained together by one job")
    split: Split = Split()
    model: Model = Model()
    base: Base = Base(rank=64, lr=1e-4, epochs=3, batch_size=16, weight_decay=0.0)
    personal: Lora = Field(Lora(), description="null values come from the task table (Table 4)")
    task_personal: dict[str, dict[str, Any]] = Field({}, description="per task: overrides of `personal`")
    retrieval: Retrieval = Retrieval()
    generation: Generation = Generation()
    bootstrap: Positive = Field(2000, description="resamples of users behind every interval")
    tune: Tune = Tune()

    @model_validator(mode="after")
    def _known(self) -> Config:
        problems = [f"tasks: no task {t!r}; there are {', '.join(tasks())}" for t in self.tasks if t not in tasks()]
        problems += [f"task_personal: no task {t!r}" for t in self.task_personal if t not in tasks()]
        problems += [
            f"augmentations: {a!r} is none of k0, k1, …, random, profile-k0, profile-k1"
            for a in self.augmentations
            if not AUGMENTATION.fullmatch(a)
        ]
        base = [k for k in ("rank", "lr", "epochs", "batch_size", "weight_decay") if getattr(self.base, k) is None]
        problems += [f"base.{k}: needs a value" for k in base]
        for name in self.task_personal:
            try:
                self.lora(name) if name in tasks() else None
            except ValidationError as error:
                problems.append(f"task_personal.{name}: {error}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def lora(self, task: str) -> Lora:
        """Personal training of a task: its overrides, then `personal`, then Table 4; alpha defaults to the rank."""
        table = tasks()[task].personal.model_dump()
        values = self.personal.model_dump() | self.task_personal.get(task, {})
        values |= {name: value for name, value in table.items() if values.get(name) is None}
        return Lora(**values)


def load(values: dict[str, Any]) -> Config:
    """Check a configuration; InputError lists every problem at once."""
    try:
        return Config(**values)
    except ValidationError as error:
        lines = [f"config: {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in error.errors()]
        raise InputError(lines) from None


def schema() -> dict[str, Any]:
    """The JSON schema that Snakemake's `validate` uses (workflow/schemas/config.schema.yaml is generated from it)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def describe() -> str:
    """config/README.md: every key with its default and meaning, from the schema itself."""
    return "\n".join([_HEAD, *_rows(Config, "")]) + "\n"


_HEAD = """# Configuration

One file is one experiment: `config.yaml` (the default: the shipped sample), or another given by `--configfile`, of
which nothing of the default shines through. The schema is closed: an unknown key is an error. Single values can be set
on the command line: `snakemake --cores all --config seed=1`. Threads, memory and cohort placement belong to Snakemake
profiles (`workflow/profiles/`), not here. YAML reads `1e-4` as text: write `1.0e-4`.

This page is made by `oppu schema --readme`.

| key | default | meaning |
|---|---|---|"""


def _rows(model: type[Closed], prefix: str) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, Closed):
            rows += [f"| **{prefix}{name}** | | {field.description or type(default).__doc__} |"]
            values = default.model_dump()
            inner = _rows(type(default), f"{prefix}{name}.")
            rows += [_with_default(row, f"{prefix}{name}.", values) for row in inner]
        else:
            rows.append(f"| `{prefix}{name}` | `{_plain(default)}` | {field.description} |")
    return rows


def _with_default(row: str, prefix: str, values: dict[str, Any]) -> str:
    """The row with the default that the enclosing part gives, which may differ from the part's own."""
    for name, value in values.items():
        if row.startswith(f"| `{prefix}{name}` |"):
            return f"| `{prefix}{name}` | `{_plain(value)}` |" + row.split("|", 3)[3]
    return row


def _plain(value: Any) -> str:
    return json.dumps(value)
