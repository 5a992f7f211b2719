"""The tiny language model: what it may read, its lessons and rows, and the committed folder."""

import gzip
import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from oppu import lamp
from oppu.config import Split
from oppu.files import folder_digests, read_json
from oppu.prompts import Prompt
from oppu.records import Item
from oppu.split import split
from oppu.tasks import task
from oppu.tiny_lm import DRAWS, TinyLM, batch_loss, label_tokens, train_tiny_lm
from oppu.tiny_lm_examples import Exchange, Lessons, neighbours
from oppu.tiny_lm_rows import Row, Weights, block, collate
from oppu.tiny_lm_texts import (
    SAMPLE_TASKS,
    Document,
    authors,
    forbidden_texts,
    is_forbidden,
    normalised,
    training_texts,
    validation_authors,
)

ROOT = Path(__file__).parents[1]
CORPUS, DATA, MODEL = ROOT / "data/corpus.jsonl.gz", ROOT / "data/sample", ROOT / "data/models/oppu-tiny"


@pytest.fixture(scope="module")
def forbidden() -> set[str]:
    return forbidden_texts(DATA)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return training_texts(CORPUS, DATA)


def test_forbidden_texts_are_those_of_all_dev_and_validation_users(forbidden):
    assert len(forbidden) > 10_000
    for name in SAMPLE_TASKS:
        dev, base = authors(DATA, name, "dev"), validation_authors(DATA, name)
        assert len(dev) >= 24 and len(base) == 20
        assert {a.id for a in base} <= {a.id for a in authors(DATA, name, "train")}
        for author in [*dev, *base]:
            assert {normalised(i.fields["title"]) for i in author.history} - {""} <= forbidden
            asked = [next(iter(task(name).query_fields(q.input).values())) for q in author.queries]
            assert {normalised(text) for text in asked} - {""} <= forbidden
    assert "politics" not in forbidden


def test_nothing_forbidden_is_read(documents, forbidden):
    assert len(documents) > 9000
    assert [d for d in documents if {normalised(d.title), normalised(d.text)} & forbidden] == []


def test_the_check_finds_a_planted_text(forbidden):
    text = authors(DATA, "LaMP_2N", "dev")[0].history[0].fields["text"]
    assert is_forbidden(Document("news", "", f"  “{text.upper()}” —\n"), forbidden)
    assert is_forbidden(Document("news", text, "some other text"), forbidden)
    assert not is_forbidden(Document("news", "", "nobody wrote this one line"), forbidden)


def test_train_files_alone_would_have_leaked(forbidden):
    """The drop is needed: train users' items of one task are dev users' texts of another."""
    items = [i for name in SAMPLE_TASKS for a in authors(DATA, name, "train") for i in a.history]
    assert any(normalised(i.fields["title"]) in forbidden for i in items)


def test_documents_are_read_once(documents):
    keys = [normalised(d.text) for d in documents]
    assert len(set(keys)) == len(keys)


@pytest.fixture(scope="module")
def few(documents) -> list[Document]:
    news = [d for d in documents if d.category and d.title][:80]
    papers = [d for d in documents if d.source == "acl"][:40]
    return [*news, *papers]


@pytest.fixture(scope="module")
def lessons(few) -> Lessons:
    return Lessons(few, seed=0)


def test_lessons_end_as_the_prompts_do(lessons):
    """Every lesson's prompt ends with its format's own ending, so that the answer follows as in the workflow."""
    endings = ("category:", "headline:", "title:", "answer:", "tag:", "score:", "tweet:")
    for name in DRAWS:
        for exchange in itertools.chain.from_iterable(
            getattr(lessons, name)(np.random.default_rng(seed)) for seed in range(5)
        ):
            assert exchange.answer
            if not name.startswith("plain"):
                assert exchange.prompt.endswith(endings)


def test_a_category_lesson_is_the_prompt_of_the_task(lessons):
    exchange = lessons.category(np.random.default_rng(3))[0]
    article = exchange.prompt.rpartition("\narticle: ")[2].removesuffix(" category:")
    assert exchange.prompt == str(Prompt(task("LaMP_2N"), {"article": article}))
    assert exchange.target is not None and exchange.target.sum() == pytest.approx(1, abs=1e-5)


def test_context_moves_the_target(lessons):
    variant, rng = lessons.variants[0][0], np.random.default_rng(0)
    item = Item("", None, {"text": "any", "title": "", "category": "politics"})
    plain = lessons._ask(variant, None, (), None, rng)
    told = lessons._ask(variant, None, (item,), "politics", rng)
    place = task("LaMP_2N").labels.index("politics")
    assert told.target[place] > plain.target[place]
    assert told.prompt.startswith("most popular category: politics\narticle: any category: politics\n")


def test_neighbours_are_the_nearest_others():
    texts = [
        "dogs bark loudly",
        "dogs bark softly",
        "cats sleep",
        "cats sleep long",
        *["fish", "bird", "horse", "cow", "pig", "hen"],
    ]
    assert neighbours(texts, 1)[:4, 0].tolist() == [1, 0, 3, 2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[Path]:
    """Two runs of a few steps with the same seed, on a part of the corpus, each on one thread."""
    import torch
    from threadpoolctl import threadpool_limits

    corpus = tmp_path_factory.mktemp("corpus") / "corpus.jsonl.gz"
    with gzip.open(CORPUS, "rt") as whole, gzip.open(corpus, "wt") as part:
        part.writelines(itertools.islice(whole, 300))
    config = TinyLM(vocabulary=2048, width=32, layers=2, heads=2, inner=64, steps=3, batch_tokens=1024, long_every=3)
    folders = [tmp_path_factory.mktemp("tiny") / str(n) for n in range(2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        losses = [train_tiny_lm(corpus, DATA, folder, config=config, card=False)[-1] for folder in folders]
    torch.set_num_threads(threads)
    assert all(row["step"] == 3 and 0 < row["loss"] < 10 for row in losses)
    return folders


def test_training_is_deterministic(tiny):
    first, second = map(folder_digests, tiny)
    assert "model.safetensors" in first
    assert first == second


def test_shared_starts_change_nothing(tiny):
    """The packed loss is the weighted mean of the losses of each exchange alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny[0])
    model = AutoModelForCausalLM.from_pretrained(tiny[0], dtype="float32").eval()
    first = label_tokens(tokenizer)
    target = np.full(15, 1 / 15, dtype=np.float32)
    lesson = [Exchange("a shared start: one", "politics", target), Exchange("a shared start: two", "crime", target)]
    weights = Weights(prompt_share=0.0)

    def loss(rows: list[list[Exchange]]) -> torch.Tensor:
        row, rng = Row(), np.random.default_rng(0)
        for number, exchanges in enumerate(rows):
            row.add(block(tokenizer, exchanges, weights, 200, rng), number)
        return batch_loss(model, collate([row], 200, tokenizer.pad_token_id, first), first)[0]

    with torch.no_grad():
        assert torch.allclose(loss([lesson]), loss([[e] for e in lesson]), atol=1e-5)


committed = pytest.mark.skipif(not MODEL.is_dir(), reason="the model is not in this checkout")


@committed
def test_committed_folder_is_small_and_safe():
    files = [p for p in MODEL.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12 * 2**20
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".md"}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in files}


@committed
def test_committed_model_loads_as_bf16():
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert {str(t.dtype) for t in load_file(MODEL / "model.safetensors").values()} == {"torch.bfloat16"}
    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)
    assert str(model.dtype) == "torch.bfloat16"
    ids = tokenizer("a politician")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] != tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size
    assert "/work" not in (MODEL / "README.md").read_text()


@committed
def test_answers_begin_at_a_token_of_their_own():
    """A prompt's tokens are the first tokens of prompt and answer, whatever the text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    for text in ("plain", "naïve 🙂 “quoted”", "ends with space "):
        prompt = str(Prompt(task("LaMP_2N"), {"article": text}))
        whole = tokenizer(f"{prompt} politics")["input_ids"]
        assert whole[: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]
        assert tokenizer.decode(whole, skip_special_tokens=True) == f"{prompt} politics"


@committed
def test_committed_model_was_made_by_the_defaults():
    assert read_json(MODEL / "training.json")["config"] == json.loads(json.dumps(asdict(TinyLM())))


@committed
def test_committed_model_knows_articles_and_context():
    """What the card says of the validation users: better than the majority, and much better with the user's past."""
    card = (MODEL / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| LaMP_2N accuracy")]
    found = {name.removeprefix("LaMP_2N accuracy "): float(value) for name, value in rows}
    assert found["k0"] > found["global-majority, no model"]
    assert min(found["k1"], found["profile-k0"]) > found["k0"] + 0.1


@pytest.mark.parametrize("name", ["LaMP_2N", "LaMP_4"])
def test_users_that_hyperparameters_are_chosen_on_are_unread_too(name: str) -> None:
    questions = lamp.read(DATA / "lamp", task(name))
    chosen = split(questions, task(name), Split(test_users="dev", heldout_queries=6)).test
    unread = {author.id for author in validation_authors(DATA, name)}
    assert len(chosen) >= 10 and {user.id for user in chosen} <= unread
