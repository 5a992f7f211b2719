"""The configuration: one closed schema that both pydantic and Snakemake use. config/README.md lists every key."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from oppu.records import InputError
from oppu.setting import AUGMENTATION, AUGMENTATIONS, parse_augmentation
from oppu.tasks import Closed, tasks
from oppu.training_settings import TRAININGS, Base, Ia3, Personal, Positive, Training, VirtualPrompt


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
    convert: bool = Field(
        False,
        description="weights that exist only as pickled .bin files are read once (torch.load, weights_only) and written"
        " as safetensors; false: refused",
    )
    quantization: Literal["8bit", "4bit", "fp8"] | None = Field(
        None,
        description="load the frozen base in 8 or 4 bits (needs the extra `quantization`: bitsandbytes); fp8: 8-bit"
        " floats, computed with as such (CUDA from compute capability 8.9 on)",
    )


class Generation(Closed):
    """How answers are generated."""

    labels: Literal["generate", "score"] = Field(
        "generate",
        description="a task with a closed set of labels: generate the answer as any other (the paper), or score: the"
        " label of the highest probability, end of text included (its sum of log-probabilities), in one pass; the other"
        " keys then count for tasks without labels only",
    )
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
    query: Literal["prompt", "text"] = Field(
        "prompt",
        description="what is searched for: phi_t, the whole base prompt (the paper), or the query's own text, without"
        " instruction and labels (the released code)",
    )
    encoder: str | None = Field(
        None, description="local folder of a Hugging Face encoder; needed by the augmentations dense-k1, …"
    )


class Profiles(Closed):
    """The textual profiles s_u of profile-k0, profile-k1, … (App. J). A person's own text always goes first."""

    backend: Literal["extractive", "llm"] = Field(
        "extractive", description="count words and labels (no model), or ask an instruction-tuned model (App. J)"
    )
    path: str | None = Field(None, description="llm: Hugging Face id or local folder of the instruction-tuned model")
    revision: str | None = Field(None, description="llm: commit of the model on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="llm: dtype it runs in")
    convert: bool = Field(False, description="llm: as model.convert (Vicuna v1.5 has no safetensors)")
    chat_template: str | None = Field(
        None,
        description="llm: the text around {prompt}; null: the tokenizer's own chat template, or none if it has none",
    )
    items: Positive | None = Field(None, description="llm: at most so many items, drawn at random; null: what has room")
    item_words: Positive | None = Field(None, description="llm: each item is cut to so many words; null: not cut")
    history_tokens: Positive = Field(
        1500, description="llm: room for the history in the prompt; items are drawn to fit"
    )
    max_new_tokens: Positive = Field(200, description="llm: longest profile")
    tokens_per_batch: Positive = Field(16384, description="llm: prompt tokens of one batch; does not change results")
    own: str = Field(
        "data/profiles",
        description="folder of profiles people wrote themselves: {task}/{user key}.txt, used as they are",
    )


class Tune(Closed):
    """The grid of `snakemake tune` (held-out base users; never test users)."""

    peft: Literal["lora", "ia3", "prompt"] = Field("lora", description="the kind of adapter that is tried")
    lr: list[float] = Field([], description="personal learning rates to try")
    epochs: list[int] = Field([], description="personal epochs to try")


class Config(Closed):
    """Everything that decides results, but for what belongs to a Snakemake profile (threads, memory)."""

    results: str = Field("results", description="folder of all outputs")
    data: str = Field(
        "data/raw", description="folder with LaMP's files: {task}/{train,dev}_{questions,outputs}.json[.gz]"
    )
    task_data: dict[str, str] = Field(
        {}, description="per task: another folder than `data`; `fixtures` stands for made-up users (`oppu fixtures`)"
    )
    tasks: list[str] = Field(
        [name for name in tasks() if name.startswith("LaMP_")], min_length=1, description="tasks to run"
    )
    augmentations: list[str] = Field(
        ["k0", "random", "k1", "k2", "k4", "profile-k0", "profile-k1"],
        min_length=1,
        description="what the prompt carries: k0, k1, k2, … items retrieved by BM25; random; profile-k0, profile-k1;"
        " recency-k1, … (the newest items); dense-k1, … (by retrieval.encoder)",
    )
    peft: list[Literal["none", "lora", "ia3", "prompt", "pooled", "swapped"]] = Field(
        ["none", "lora"],
        min_length=1,
        description="kinds of personal adapter (`ia3` and `prompt`, prompt tuning, as in Figure 6); controls: `pooled`"
        " (one LoRA on all test users' histories), `swapped` (another user's adapter; needs lora). `random` is run"
        " without an adapter only",
    )
    benchmark: bool = Field(
        False, description="the data are a public benchmark's: allows `pooled`, which mixes users by construction"
    )
    history: list[Literal["full"]] = Field(["full"], min_length=1, description="history variants")
    seed: int = Field(
        0, ge=0, description="run seed; every random draw comes from it, the task, the user and the purpose"
    )
    training_seeds: Positive = Field(
        1, description="repeat every base and adapter with the run seeds seed, seed + 1, …; the spread is in seeds.csv"
    )
    users_per_job: Positive = Field(100, description="cohort size: users trained together by one job")
    split: Split = Split()
    model: Model = Model()
    base: Base = Base(rank=64, lr=1e-4, epochs=3, batch_size=16, weight_decay=0.0)
    personal: Personal = Field(Personal(), description="null values come from the task table (Table 4)")
    ia3: Ia3 = Ia3()
    prompt: VirtualPrompt = VirtualPrompt()
    task_base: dict[str, dict[str, Any]] = Field({}, description="per task: overrides of `base`")
    task_personal: dict[str, dict[str, Any]] = Field({}, description="per task: overrides of `personal`")
    profiles: Profiles = Profiles()
    retrieval: Retrieval = Retrieval()
    generation: Generation = Generation()
    bootstrap: Positive = Field(2000, description="resamples of users behind every interval")
    significance: Literal["bootstrap", "permutation"] = Field(
        "bootstrap", description="the paired test over users behind p-values and stars"
    )
    tune: Tune = Tune()

    @model_validator(mode="after")
    def _known(self) -> Config:
        problems = [f"tasks: no task {t!r}; there are {', '.join(tasks())}" for t in self.tasks if t not in tasks()]
        for part in ("task_data", "task_base", "task_personal"):
            problems += [f"{part}: no task {t!r}" for t in getattr(self, part) if t not in tasks()]
        wrong = [a for a in self.augmentations if not AUGMENTATION.fullmatch(a)]
        problems += [f"augmentations: {a!r} is none of {AUGMENTATIONS}" for a in wrong]
        problems += self._problems_of_settings() if not wrong else []
        base = [k for k in ("rank", "lr", "epochs", "batch_size", "weight_decay") if getattr(self.base, k) is None]
        problems += [f"base.{k}: needs a value" for k in base]
        for part, read in (("task_base", self.base_lora), ("task_personal", self.lora)):
            for name in set(getattr(self, part)) & set(tasks()):
                try:
                    read(name)
                except ValidationError as error:
                    problems.append(f"{part}.{name}: {error}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems_of_settings(self) -> list[str]:
        wanted = [parse_augmentation(a) for a in self.augmentations]
        problems = []
        if any(a.retriever == "dense" for a in wanted) and self.retrieval.encoder is None:
            problems.append("augmentations: dense-k… needs retrieval.encoder, a local folder of an encoder")
        if any(a.profile for a in wanted) and self.profiles.backend == "llm" and self.profiles.path is None:
            problems.append("profiles.path: the backend llm needs an instruction-tuned model")
        if self.profiles.chat_template is not None and "{prompt}" not in self.profiles.chat_template:
            problems.append("profiles.chat_template: must hold {prompt}, where the prompt goes")
        if "pooled" in self.peft and not self.benchmark:
            problems.append("peft: pooled trains on all test users' texts together; it needs `benchmark: true`")
        starts = {self.task_personal.get(task, {}).get("start", self.personal.start) for task in self.tasks}
        if "pooled" in starts and not self.benchmark:
            problems.append(
                "personal.start: pooled begins at an adapter trained on all test users' texts together; it needs"
                " `benchmark: true`"
            )
        if self.personal.replay and "previous" not in starts:
            problems.append("personal.replay: old items are learned again with `start: previous` only")
        if "swapped" in self.peft and "lora" not in self.peft:
            problems.append("peft: swapped takes the adapters of lora; list lora too")
        layers, inputs = self.ia3.target_modules, self.ia3.feedforward_modules
        if layers is not None and (other := sorted(set(inputs or []) - set(layers))):
            problems.append(f"ia3.feedforward_modules: {', '.join(other)} must stand in ia3.target_modules too")
        if not self.settings:
            problems.append("peft: random is run without an adapter only; list none")
        return problems

    @property
    def settings(self) -> list[tuple[str, str, str]]:
        """Every (augmentation, PEFT kind, history variant) to run: all combinations, but `random` with none only.

        Further training seeds are settings of their own, `k0-s1` after `k0` (see `setting.seeded`).
        """
        return [
            (a + (f"-s{n}" if n else ""), p, h)
            for n in range(self.training_seeds)
            for a in self.augmentations
            for p in self.peft
            for h in self.history
            if a != "random" or p == "none"
        ]

    def folder(self, task: str) -> str:
        """Where a task's LaMP files lie, in a folder of the task's name."""
        folder = self.task_data.get(task, self.data)
        return f"{self.results}/fixtures" if folder == "fixtures" else folder

    def base_lora(self, task: str) -> Base:
        """Base training of a task: its overrides, then `base`."""
        return Base(**self.base.model_dump() | self.task_base.get(task, {}))

    def lora(self, task: str) -> Personal:
        """Personal training of a task: its overrides, then `personal`, then Table 4; alpha defaults to the rank."""
        table = tasks()[task].personal.model_dump()
        values = self.personal.model_dump() | self.task_personal.get(task, {})
        values |= {name: value for name, value in table.items() if values.get(name) is None}
        return Personal(**values)

    def training(self, peft: str, task: str) -> Training:
        """Personal training of a task with adapters of a kind: `ia3` or `prompt` stand over what LoRA trains with."""
        lora = self.lora(task)
        if peft not in ("ia3", "prompt"):
            return lora
        own = {name: value for name, value in getattr(self, peft).model_dump().items() if value is not None}
        return TRAININGS[peft](**lora.model_dump(include=set(Training.model_fields)) | own)


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
