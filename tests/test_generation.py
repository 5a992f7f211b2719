from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from oppu.bank import LoraBank
from oppu.config import Generation
from oppu.decoding import batches
from oppu.generation import SeededSampling, generate
from tests.tiny_models import EOS, VOCAB, settings, tiny_llama


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
