from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oppu.models import head_at
from oppu.packing import assemble
from oppu.rows import Chunk, Example, fill_rows, micro_batches
from tests.tiny_models import some_examples, tiny_llama


def chunks_of(counts: list[int], seed: int = 0) -> list[Chunk]:
    return [Chunk(u, tuple(e), seed=u) for u, e in enumerate(some_examples(seed, counts)) if e]


def test_an_example_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Example((), (1,))
    with pytest.raises(ValueError, match="at least one"):
        Example((1,), ())


@pytest.mark.parametrize(
    ("prompts", "length"),
    [([(1, 2, 3), (1, 2, 4)], 2), ([(1, 2), (1, 2)], 1), ([(1, 2), (1, 2, 3)], 1), ([(5,), (6,)], 0), ([(1, 2)], 1)],
)
def test_the_prefix_leaves_each_item_a_prompt_token(prompts: list[tuple[int, ...]], length: int) -> None:
    assert Chunk(0, tuple(Example(p, (9,)) for p in prompts)).prefix == length


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 90), st.integers(1, 400), st.integers(0, 9))
def test_every_label_is_packed_once(counts: list[int], width: int, budget: int, seed: int) -> None:
    chunks = chunks_of(counts, seed)
    packed = [assemble(chunks, rows) for rows in micro_batches(fill_rows(chunks, width), budget)]
    for number, chunk in enumerate(chunks):
        got = sorted(
            t for p in packed for t, c in zip(p.targets.tolist(), p.chunks.tolist(), strict=True) if c == number
        )
        assert got == sorted(t for e in chunk.examples for t in e.target)
    total = sum(p.weights.sum().item() for p in packed)
    assert total == pytest.approx(len(chunks))
    for p in packed:
        assert len(p.input_ids) == 1 or p.input_ids.numel() <= budget + 8 * len(p.input_ids)
        assert p.ends[-1] == p.input_ids.numel()
        assert (p.ends.diff() > 0).all()


def test_the_mask_lets_an_item_see_its_prefix_and_itself_only() -> None:
    chunk = Chunk(0, (Example((1, 2, 3), (4,)), Example((1, 2, 5), (6, 7))))
    other = Chunk(1, (Example((8, 9), (4,)),))
    mask = assemble([chunk, other], [[*fill_rows([chunk])[0], fill_rows([chunk, other])[0][-1]]]).mask[0, 0]
    seen = [set(row.nonzero().flatten().tolist()) for row in mask]
    assert seen[:7] == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 4}, {0, 1, 4, 5}, {0, 1, 4, 5, 6}]
    assert seen[7:10] == [{7}, {7, 8}, {7, 8, 9}]
    assert all(row.any() for row in mask), "a row of the mask that is all False makes NaN"


@pytest.mark.parametrize("width", [1, 40, 384])
def test_packed_logits_are_those_of_each_example_alone(width: int) -> None:
    model = tiny_llama(torch.float64)
    chunks = chunks_of([6, 4, 7])
    expected = {}
    for number, chunk in enumerate(chunks):
        for example in chunk.examples:
            logits = model(input_ids=torch.tensor([example.prompt + example.target])).logits[0]
            for at, target in enumerate(example.target):
                expected.setdefault((number, target), []).append(logits[len(example.prompt) - 1 + at])
    rows = fill_rows(chunks, width)
    packed = assemble(chunks, rows)
    with head_at(model, packed.positions):
        got = model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, attention_mask=packed.mask, use_cache=False
        ).logits
    assert got.shape == (sum(c.labels for c in chunks), model.config.vocab_size)
    for logits, target, number in zip(got, packed.targets.tolist(), packed.chunks.tolist(), strict=True):
        assert min((logits - e).abs().max().item() for e in expected[number, target]) < 1e-12


def test_dropout_keys_follow_the_example_not_the_packing() -> None:
    chunks = chunks_of([8, 5])

    def keys(width: int) -> set[tuple[int, ...]]:
        packed = assemble(chunks, fill_rows(chunks, width))
        real = packed.piece.flatten() >= 0
        owner = packed.users[packed.piece.clamp(min=0)].flatten()
        fields = (owner, packed.item.flatten(), packed.position_ids.flatten(), packed.dropout_keys())
        return set(zip(*(f[real].tolist() for f in fields), strict=True))

    assert keys(384) == keys(30)
    assert len({k for *_, k in keys(384)}) == len(keys(384)), "keys differ between tokens"
