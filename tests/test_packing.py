from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from oppu.attention import attention_over, layout_of, takes_blocks
from oppu.models import head_at
from oppu.packing import assemble
from oppu.rows import Chunk, Example, passes
from tests.tiny_models import CONFIGS, VOCAB, some_examples, tiny_llama


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
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 400), st.integers(0, 9))
def test_every_label_is_packed_once(counts: list[int], budget: int, seed: int) -> None:
    chunks = chunks_of(counts, seed)
    packed = [assemble(chunks, pieces) for pieces in passes(chunks, budget)]
    for number, chunk in enumerate(chunks):
        got = sorted(
            t for p in packed for t, c in zip(p.targets.tolist(), p.chunks.tolist(), strict=True) if c == number
        )
        assert got == sorted(t for e in chunk.examples for t in e.target)
    total = sum(p.weights.sum().item() for p in packed)
    assert total == pytest.approx(len(chunks))
    for p in packed:
        assert p.input_ids.numel() <= budget or len(p.item.unique()) <= 2  # one example and its prefix
        assert p.spans[:, 1].sum() == p.input_ids.numel()
        assert p.ends[-1] == p.input_ids.numel()
        assert (p.ends.diff() > 0).all()


def test_the_mask_lets_an_item_see_its_prefix_and_itself_only() -> None:
    chunk = Chunk(0, (Example((1, 2, 3), (4,)), Example((1, 2, 5), (6, 7))))
    other = Chunk(1, (Example((8, 9), (4,)),))
    mask = assemble([chunk, other], passes([chunk, other], 100)[0]).mask()[0, 0]
    seen = [set(row.nonzero().flatten().tolist()) for row in mask]
    assert seen[:7] == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 1, 4}, {0, 1, 4, 5}, {0, 1, 4, 5, 6}]
    assert seen[7:10] == [{7}, {7, 8}, {7, 8, 9}]
    assert all(row.any() for row in mask), "a row of the mask that is all False makes NaN"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("blocks", [True, False])
def test_packed_logits_are_those_of_each_example_alone(name: str, blocks: bool) -> None:
    model = tiny_llama(torch.float64, config=CONFIGS[name])
    chunks = chunks_of([6, 4, 7])
    expected = {}
    for number, chunk in enumerate(chunks):
        for example in chunk.examples:
            logits = model(input_ids=torch.tensor([example.prompt + example.target])).logits[0]
            for at, target in enumerate(example.target):
                expected.setdefault((number, target), []).append(logits[len(example.prompt) - 1 + at])
    assert takes_blocks(model)
    (pieces,) = passes(chunks, 10_000)
    packed = assemble(chunks, pieces)
    with head_at(model, packed.positions), attention_over(model, packed, blocks) as mask:
        got = model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, attention_mask=mask, use_cache=False
        ).logits
    assert got.shape == (sum(c.labels for c in chunks), VOCAB)
    bound = 1e-4 if name.startswith("gemma2") else 1e-12  # Gemma 2's softmax is float32
    for logits, target, number in zip(got, packed.targets.tolist(), packed.chunks.tolist(), strict=True):
        assert min((logits - e).abs().max().item() for e in expected[number, target]) < bound


def test_the_last_mlp_runs_at_the_labels_only_unless_an_adapter_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(torch.float64)
    positions, ids = torch.tensor([3, 5]), torch.arange(8)[None]
    rows: list[int] = []
    monkeypatch.setattr(F, "silu", lambda x, silu=F.silu: rows.append(x.shape[-2]) or silu(x))
    whole = model(input_ids=ids).logits[0, positions]
    with head_at(model, positions):
        assert (model(input_ids=ids).logits - whole).abs().max() < 1e-12
    model.base_model.layers[-1].mlp.up_proj.register_forward_hook(lambda _, __, out: out)
    with head_at(model, positions):
        model(input_ids=ids)
    assert rows == [8, 8, 8, 2, 8, 8]


def test_blocks_are_padded_little_and_hold_every_token_once() -> None:
    chunks = chunks_of([30, 4, 17, 1], seed=2)
    spans = assemble(chunks, passes(chunks, 10_000)[0]).spans
    layout = layout_of(spans, "sdpa", torch.device("cpu"))
    tokens = layout.queries
    assert tokens[layout.order].tolist() == list(range(int(spans[:, 1].sum())))
    pairs = sum(block.places.numel() * block.length for block in layout.blocks)
    assert pairs < 2 * int((spans[:, 1] * (spans[:, 1] + spans[:, 3])).sum())
    assert all(block.mask(window).any(-1).all() for block in layout.blocks for window in (None, 3))


def test_dropout_keys_follow_the_example_not_the_packing() -> None:
    chunks = chunks_of([8, 5])

    def keys(budget: int) -> set[tuple[int, ...]]:
        found = set()
        for pieces in passes(chunks, budget):
            packed = assemble(chunks, pieces)
            fields = (packed.users[packed.piece], packed.item, packed.position_ids[0], packed.dropout_keys())
            found |= set(zip(*(f.tolist() for f in fields), strict=True))
        return found

    assert keys(384) == keys(30)
    assert len({k for *_, k in keys(384)}) == len(keys(384)), "keys differ between tokens"
