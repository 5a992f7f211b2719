from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTNeoConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from oppu.bank import LoraBank
from oppu.cache import PADDING, Rows
from oppu.config import Generation
from oppu.decoding import Asked, batches, decode
from oppu.generation import SeededSampling, generate
from tests.tiny_models import CONFIGS, EOS, VOCAB, settings, tiny_llama


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": EOS} | {f"w{n}": n for n in range(3, VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def some_prompts(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[1, *(draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 20)))] for _ in range(count)]


def shared_prompts(count: int, users: int) -> list[list[int]]:
    """Prompts of users in turn: each begins with 9 tokens that are the same for all, and 5 of the user's own."""
    draw = random.Random(3)
    tokens = [[draw.randrange(3, VOCAB) for _ in range(5)] for _ in range(users)]
    rest = [[draw.randrange(3, VOCAB) for _ in range(draw.randrange(1, 16))] for _ in range(count)]
    return [[1, *range(10, 18), *tokens[n % users], *rest[n]] for n in range(count)]


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[int]]:
    """The number of token places that each forward pass of the block computes, in passes that keep keys and values."""
    passes: list[int] = []

    def note(_: torch.nn.Module, __: object, given: dict[str, torch.Tensor]) -> None:
        if given["past_key_values"] is not None:
            passes.append(given["position_ids"].numel())

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    yield passes
    handle.remove()


def bank_of(model: object, users: int) -> LoraBank:
    bank = LoraBank(model, settings(), users, 0)  # type: ignore[arg-type]
    bank.weights.copy_(torch.randn(bank.weights.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return bank


@pytest.mark.parametrize("sample", [False, True])
def test_an_answer_does_not_depend_on_the_batch(tokenizer: PreTrainedTokenizerFast, sample: bool) -> None:
    model = tiny_llama()
    bank, prompts, users = bank_of(model, 4), some_prompts(14), [n % 4 for n in range(14)]
    chosen = Generation(sample=sample, temperature=1.0, tokens_per_batch=64)
    together = generate(model, tokenizer, prompts, chosen, 8, bank, users, list(range(14)))
    alone = [
        generate(model, tokenizer, [p], chosen, 8, bank, [u], [n])[0]
        for n, (p, u) in enumerate(zip(prompts, users, strict=True))
    ]
    wide = Generation(sample=sample, temperature=1.0, tokens_per_batch=10_000)
    back = generate(model, tokenizer, prompts[::-1], wide, 8, bank, users[::-1], list(range(14))[::-1])
    assert together == alone == back[::-1]
    assert len(set(together)) > 5


def test_greedy_answers_are_those_of_the_adapters_own_model(tokenizer: PreTrainedTokenizerFast) -> None:
    """Against a plain argmax loop without cache, one prompt at a time."""
    model = tiny_llama()
    bank, prompts, users = bank_of(model, 3), some_prompts(6), [2, 0, 1, 2, 0, 1]
    expected = []
    for prompt, user in zip(prompts, users, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad(), bank.use(torch.tensor([user])):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    assert generate(model, tokenizer, prompts, Generation(), 6, bank, users) == expected
    assert generate(model, tokenizer, prompts, Generation(), 6) != expected


def test_a_models_own_defaults_change_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    model, prompts = tiny_llama(), some_prompts(4)
    before = generate(model, tokenizer, prompts, Generation(), 6)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 9.0
    assert generate(model, tokenizer, prompts, Generation(), 6) == before


def test_an_answer_may_repeat_its_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    model.lm_head = torch.nn.Linear(32, VOCAB)
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data.zero_()[5] = 1.0
    answers = generate(model, tokenizer, [[5, 5], [7]], Generation(), 3)
    assert [answer.count("w5") for answer in answers] == [3, 3]
    model.lm_head.bias.data[EOS] = 2.0
    assert generate(model, tokenizer, [[5, 5], [7]], Generation(), 3) == ["", ""]
    assert generate(model, tokenizer, [], Generation(), 3) == []


def test_samples_follow_the_distribution_that_transformers_warps_to() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, 1.5, -3.0, 0.9]])
    chosen = Generation(sample=True, temperature=0.8, top_k=5, top_p=0.9)
    warped = scores
    for warper in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(5), TopPLogitsWarper(0.9)):
        warped = warper(torch.zeros(1, 1, dtype=torch.long), warped)
    expected = warped.softmax(-1)[0]
    sampling = SeededSampling(chosen, range(4000))
    drawn = Counter(sampling(torch.zeros(1, 1), scores.repeat(4000, 1)).argmax(-1).tolist())
    assert set(drawn) == set(expected.nonzero().flatten().tolist())
    for token, count in drawn.items():
        assert count / 4000 == pytest.approx(expected[token].item(), abs=0.03)


def test_batches_hold_every_prompt_once_within_the_budget() -> None:
    lengths = [5, 100, 7, 3, 60, 7]
    made = batches(lengths, 64)
    assert sorted(n for batch in made for n in batch) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[n] for n in b) <= 64 for b in made)


def test_missing_users_and_seeds_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    bank = bank_of(model, 1)
    with pytest.raises(ValueError, match="one user per prompt"):
        generate(model, tokenizer, [[1]], Generation(), 3, bank)
    with pytest.raises(ValueError, match="one seed per prompt"):
        generate(model, tokenizer, [[1]], Generation(sample=True), 3)
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, tokenizer, [[]], Generation(), 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_read_in_pieces_is_what_is_read_at_once(name: str) -> None:
    """Logits of padded rows, read in three pieces, against each row alone in one pass without a cache."""
    model = tiny_llama(torch.float64, config=CONFIGS[name])
    texts = [list(range(3, 23)), list(range(40, 55))]
    with torch.no_grad():
        alone = [model(torch.tensor([text])).logits[0] for text in texts]
        rows = Rows(model, 2, 24)
        for start, stop in ((0, 9), (9, 11), (11, 20)):
            # The second row has 15 tokens: 3 pads before its first token, and 2 more between its fourth and fifth.
            places = [
                n if row == 0 else (PADDING, PADDING, PADDING, 0, 1, 2, 3, PADDING, PADDING, *range(4, 15))[n]
                for row in (0, 1)
                for n in range(start, stop)
            ]
            positions = torch.tensor(places).view(2, -1)
            ids = torch.tensor([[texts[r][p] if p >= 0 else 0 for p in positions[r]] for r in (0, 1)])
            logits = rows.read(ids, positions).view(2, stop - start, -1)
            for row, column in (positions >= 0).nonzero().tolist():
                expected = alone[row][positions[row, column]]
                # Eager attention takes its softmax in float32.
                assert (logits[row, column] - expected).abs().max() < (1e-4 if name.startswith("gemma2") else 1e-12)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sample", [False, True])
def test_a_shared_prefix_changes_no_answer_and_is_read_once_per_user(
    name: str, sample: bool, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(config=CONFIGS[name])
    bank, prompts, users = bank_of(model, 3), shared_prompts(12, 3), [n % 3 for n in range(12)]
    chosen = Generation(sample=sample, temperature=1.0, tokens_per_batch=10_000)
    given = (model, tokenizer, prompts, chosen, 5, bank, users, list(range(12)))
    with watched(model) as passes:
        shared = generate(*given)
    with watched(model) as passes_of_whole_prompts:
        assert generate(*given, share=False) == shared
    assert generate(*given, lean=False) == shared, "transformers' own generate"
    assert len(set(shared)) > 5
    lengths = [len(p) for p in prompts]
    assert passes[:2] == [3 * 14, 12 * (max(lengths) - 14)]
    assert passes_of_whole_prompts[0] == 12 * max(lengths)
    assert sum(passes) < 0.75 * sum(passes_of_whole_prompts)


def test_without_adapters_all_prompts_share_what_they_begin_with(tokenizer: PreTrainedTokenizerFast) -> None:
    model, prompts = tiny_llama(), shared_prompts(8, 4)
    with watched(model) as passes:
        together = generate(model, tokenizer, prompts, Generation(), 5)
    assert passes[0] == 9
    assert together == [generate(model, tokenizer, [p], Generation(), 5)[0] for p in prompts]


def test_a_batch_ends_with_its_last_row_and_finished_rows_are_dropped() -> None:
    """Row n is made to end after n + 1 tokens: no pass after the last, and fewer rows as they finish."""
    model, prompts = tiny_llama(), [[1, n + 3] for n in range(8)]
    made = Counter()

    def choose(numbers: list[int], logits: torch.Tensor) -> torch.Tensor:
        made.update(numbers)
        return torch.tensor([EOS if made[n] > n else 7 for n in numbers])

    with watched(model) as passes, torch.inference_mode():
        answers = decode(Asked(model, prompts), choose, [EOS], 50, 10_000)
    assert answers == [[7] * n + [EOS] for n in range(8)]
    assert passes == [8 * 2, 8, 6, 6, 4, 3, 2, 1]


def test_a_model_that_packed_rows_cannot_serve_is_left_to_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    config = GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    model, prompts = tiny_llama(config=config), some_prompts(5)
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(4):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())
    assert generate(model, tokenizer, prompts, Generation(), 4) == expected
