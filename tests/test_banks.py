"""(IA)3 and prompt tuning in a bank, against plain PEFT: training, files, generation (LoRA's tests: test_bank.py)."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, PreTrainedModel, PreTrainedTokenizerFast

from oppu.attention import attention_over
from oppu.bank import Bank, load_adapter, save_adapter
from oppu.banks import bank_for
from oppu.config import Generation
from oppu.generation import generate
from oppu.models import head_at, ia3_targets
from oppu.packing import assemble
from oppu.records import InputError
from oppu.rows import Chunk, Example, passes, plan, virtual
from oppu.training import train
from oppu.training_settings import PromptTraining, Training
from tests.oracle import distance, peft_config, train_alone
from tests.test_generation import some_prompts
from tests.test_generation import tokenizer as tokenizer
from tests.tiny_models import CONFIGS, EOS, KINDS, settings_of, some_examples, tiny_llama, with_virtual

NEW = ("ia3", "prompt")
BOUND = {torch.float64: 1e-12, torch.float32: 1e-4}
COUNTS = [9, 5, 0, 13, 4]
LAYERS = {"gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"])}
"""What (IA)3 scales where the layers have other names."""


def randomised(bank: Bank) -> Bank:
    """Other parameters for each user; float32 numbers, since PEFT loads virtual tokens as such into any model."""
    noise = torch.randn(bank.weights.shape, generator=torch.Generator().manual_seed(1))
    bank.weights.copy_(bank.weights.float() + 0.3 * noise)
    return bank


def cohort(model: PreTrainedModel, lora: Training, users: list[int]) -> dict[int, dict[str, Tensor]]:
    """Train these users of the fixed five together; adapters by user."""
    everyone = with_virtual(some_examples(1, COUNTS), lora)
    bank = bank_for(model, lora, len(users), seed=3)
    plans = [plan(len(everyone[u]), 2, 4, f"0 LaMP_x user {u}") for u in users]
    results = train(model, bank, [everyone[u] for u in users], plans, lora, Accelerator(cpu=True))
    bank.close()
    assert [r.steps for r in results] == list(map(len, plans))
    return {user: bank.state_dict(place) for place, user in enumerate(users)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", NEW)
def test_a_cohort_equals_peft_one_user_at_a_time(kind: str, dtype: torch.dtype) -> None:
    """Steps are ragged, one user has none; narrow passes cut steps into pieces, each with the user's virtual tokens."""
    model, lora = tiny_llama(dtype), settings_of(kind)
    start = bank_for(model, lora, 1, seed=3).state_dict(0)
    examples = some_examples(1, COUNTS)
    together = cohort(model, lora, [0, 1, 2, 3, 4])
    apart = cohort(model, settings_of(kind, tokens_per_batch=30), [3, 0])
    for user, count in enumerate(COUNTS):
        alone = train_alone(model, start, examples[user], plan(count, 2, 4, f"0 LaMP_x user {user}"), lora)
        assert distance(together[user], alone) < BOUND[dtype]
        assert user not in apart or distance(apart[user], alone) < BOUND[dtype]
        assert (distance(alone, start) > 1e-2) == bool(count)


@pytest.mark.parametrize("name", ["gpt2", "qwen2-window", "gemma3-window"])
@pytest.mark.parametrize("kind", NEW)
def test_other_architectures_equal_peft_too(kind: str, name: str) -> None:
    """Other names, Conv1D, learned and rotary positions, sliding windows, scaled embeddings."""
    targets, feedforward = LAYERS.get(name, (["k_proj", "v_proj", "down_proj"], ["down_proj"]))
    named = {"target_modules": targets, "feedforward_modules": feedforward} if kind == "ia3" else {}
    model, lora = tiny_llama(torch.float64, config=CONFIGS[name]), settings_of(kind, batch_size=3, **named)
    examples = some_examples(1, [6, 4, 3])
    plans = [plan(len(e), 2, 3, str(user)) for user, e in enumerate(examples)]
    bank = bank_for(model, settings_of(kind, batch_size=3), 3, seed=3)  # it finds the layers itself
    start = bank.state_dict(0)
    train(model, bank, with_virtual(examples, lora), plans, lora, Accelerator(cpu=True))
    bank.close()
    for user, steps in enumerate(plans):
        alone = train_alone(model, start, examples[user], steps, lora)
        assert distance(bank.state_dict(user), alone) < 1e-12
        assert distance(alone, start) > 1e-2


def test_pieces_of_a_cut_step_have_the_virtual_tokens_each() -> None:
    """The case that the equality above rests on: five of them, once per piece, none per item."""
    (own,) = with_virtual(some_examples(1, [9]), settings_of("prompt"))
    chunks = [Chunk(0, tuple(own))]
    packed = assemble(chunks, [piece for pieces in passes(chunks, 30) for piece in pieces])
    assert len(packed.users) > 2
    assert int((packed.input_ids < 0).sum()) == 5 * len(packed.users)
    heads = packed.position_ids[packed.input_ids < 0].view(-1, 5)
    assert heads.tolist() == [list(range(5))] * len(packed.users)
    with pytest.raises(ValueError, match="at least one prompt token"):
        Example(virtual(5), (1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", NEW)
def test_a_saved_adapter_loaded_by_peft_gives_the_banks_logits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, lora = tiny_llama(dtype), settings_of(kind)
    bank = randomised(bank_for(model, lora, 3, 0))
    real = torch.arange(3, 27).view(2, 12)
    lead = torch.tensor([virtual(5)] * 2) if isinstance(lora, PromptTraining) else real[:, :0]
    ids, width = torch.cat([lead, real], 1), lead.shape[1] + 12
    with torch.no_grad(), bank.use(torch.tensor([2, 1])):
        rows = model(ids).logits[:, -12:]
    with torch.no_grad(), bank.use(torch.tensor([2, 1]), torch.tensor([width, 2 * width], dtype=torch.int32)):
        packed = model(ids).logits[:, -12:]
    bank.close()
    for row, user in enumerate([2, 1]):
        save_adapter(tmp_path / str(user), bank, user, "base-of-the-task")
        peft = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / str(user)))
        with torch.no_grad():
            expected = peft(input_ids=real[row : row + 1]).logits[0, -12:]
        assert (rows[row] - expected).abs().max() < BOUND[dtype]
        assert (packed[row] - expected).abs().max() < BOUND[dtype]
    with torch.no_grad():
        assert (model(real).logits - rows).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_that_peft_itself_writes(kind: str, tmp_path: Path) -> None:
    """The same names and shapes of tensors, and the same settings but for what a file says of the base."""
    model, lora = tiny_llama(), settings_of(kind)
    peft = get_peft_model(copy.deepcopy(model), peft_config(lora))
    peft.save_pretrained(str(tmp_path / "peft"))
    save_adapter(tmp_path / "ours", bank := bank_for(model, lora, 1, 0), 0, "base")
    shapes = {name: t.shape for name, t in get_peft_model_state_dict(peft).items()}
    assert {name: t.shape for name, t in load_adapter(tmp_path / "ours", bank).items()} == shapes
    theirs, ours = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in ("peft", "ours"))
    about_the_base = {"base_model_name_or_path", "revision", "auto_mapping"}
    differ = {k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k)} - about_the_base
    differ -= {k for k in differ if isinstance(ours[k], list) and set(ours[k]) == set(theirs[k])}
    assert not differ, {k: (theirs.get(k), ours.get(k)) for k in differ}


@pytest.mark.parametrize("kind", NEW)
def test_adapter_files_have_the_same_bytes_in_every_process(kind: str, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from oppu.bank import *; from oppu.banks import *; from tests.tiny_models import *\n"
        f"save_adapter(Path(sys.argv[1]), bank_for(tiny_llama(), settings_of({kind!r}), 2, 0), 1, 'base')\n"
    )
    for run in ("1", "2"):
        environment = {"PYTHONHASHSEED": run, "PYTHONPATH": ":".join(sys.path)}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / run)], check=True, env=environment)
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()
    assert json.loads((tmp_path / "1/adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_an_adapter_of_another_kind_or_size_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    banks = {kind: bank_for(model, settings_of(kind), 2, 0) for kind in KINDS}
    for kind, bank in banks.items():
        save_adapter(tmp_path / kind, randomised(bank), 1, "base")
        bank.load(0, load_adapter(tmp_path / kind, bank))
        assert torch.equal(bank.weights[0], bank.weights[1])
    for kind, bank in banks.items():
        for other in set(KINDS) - {kind}:
            with pytest.raises(InputError, match=f"is an adapter of kind {banks[other].kind}, not {bank.kind}"):
                load_adapter(tmp_path / other, bank)
    with pytest.raises(InputError, match=r"prompt_embeddings is \(5, 32\), not \(6, 32\)"):
        load_adapter(tmp_path / "prompt", bank_for(model, settings_of("prompt", virtual_tokens=6), 1, 0))
    one = settings_of("ia3", target_modules=["k_proj"])
    with pytest.raises(InputError, match="has no layer"):
        load_adapter(tmp_path / "ia3", bank_for(model, one, 1, 0))


@pytest.mark.parametrize("kind", NEW)
def test_the_gradient_of_ones_loss_for_anothers_adapter_is_exactly_zero(kind: str) -> None:
    model, lora = tiny_llama(), settings_of(kind)
    bank = randomised(bank_for(model, lora, 3, 0))
    chunks = [Chunk(u, tuple(e)) for u, e in enumerate(with_virtual(some_examples(0, [3, 3, 3]), lora))]
    packed = assemble(chunks, passes(chunks, 10_000)[0])
    assert len(packed.users) == 3, "the three are to share a pass"
    users = bank.use(packed.users, packed.ends)
    with users, head_at(model, packed.positions), attention_over(model, packed, blocks=True) as mask:
        logits = model(packed.input_ids, mask, packed.position_ids).logits
        logits[packed.chunks == 1].square().sum().backward()
    assert bank.grads[1].abs().max() > 0
    assert not bank.grads[0].any()
    assert not bank.grads[2].any()


@pytest.mark.parametrize("kind", NEW)
def test_all_users_begin_alike(kind: str) -> None:
    model = tiny_llama()
    bank = bank_for(model, settings_of(kind), 3, seed=7)
    assert torch.equal(bank.weights[0], bank.weights[2])
    assert torch.equal(bank.weights[0], bank_for(model, settings_of(kind), 1, seed=7).weights[0])
    same = torch.equal(bank.weights[0], bank_for(model, settings_of(kind), 1, seed=8).weights[0])
    assert same == (kind == "ia3"), "(IA)3 begins with ones, and so at the base model"


def test_virtual_tokens_begin_as_pefts_or_as_tokens_of_the_vocabulary() -> None:
    model = tiny_llama()
    noise = bank_for(model, settings_of("prompt", virtual_tokens=200), 1, 0).weights
    assert (noise.mean().abs(), noise.std()) < (0.05, 1.05)
    assert noise.std() > 0.95
    words = bank_for(model, settings_of("prompt", init="vocabulary"), 1, 0).weights.view(5, -1)
    known = model.get_input_embeddings().weight
    assert all(any(torch.equal(word, row) for row in known) for word in words)


def test_layers_of_ia3_are_found_per_architecture() -> None:
    for name, config in CONFIGS.items():
        expected = LAYERS.get(name, (["down_proj", "k_proj", "v_proj"], ["down_proj"]))
        assert ia3_targets(tiny_llama(config=config)) == expected
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))
    assert ia3_targets(bloom) == (["mlp.dense_4h_to_h", "query_key_value"], ["mlp.dense_4h_to_h"])
    assert ia3_targets(tiny_llama(), ["q_proj", "down_proj"]) == (["down_proj", "q_proj"], ["down_proj"])
    with pytest.raises(InputError, match="up_proj must stand in target_modules too"):
        ia3_targets(tiny_llama(), ["k_proj"], ["up_proj"])
    bloom.config.model_type = "unheard-of"
    with pytest.raises(InputError, match="of a unheard-of are not known; name some of"):
        ia3_targets(bloom)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-window"])
@pytest.mark.parametrize("kind", NEW)
def test_answers_equal_pefts_one_by_one(
    kind: str, name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, lora = tiny_llama(config=CONFIGS[name]), settings_of(kind)
    bank = randomised(bank_for(model, lora, 2, 0))
    prompts, users = some_prompts(6), [0, 1, 1, 0, 1, 0]
    lead = virtual(5) if isinstance(lora, PromptTraining) else ()
    ours = generate(model, tokenizer, [[*lead, *p] for p in prompts], Generation(), 6, bank, users)
    bank.close()
    for user in (0, 1):
        save_adapter(tmp_path / str(user), bank, user, "base")
        peft = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / str(user)))
        for prompt, answer in ((p, a) for p, a, u in zip(prompts, ours, users, strict=True) if u == user):
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            out = peft.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=EOS, pad_token_id=0
            )
            assert tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip() == answer
    assert ours != generate(model, tokenizer, prompts, Generation(), 6)


@pytest.mark.parametrize("kind", NEW)
def test_a_bfloat16_model_trains_float32_parameters(kind: str) -> None:
    """Close to what float32 finds."""
    lora = settings_of(kind)
    exact, half = (cohort(tiny_llama(dtype), lora, [0, 1]) for dtype in (torch.float32, torch.bfloat16))
    start = bank_for(tiny_llama(), lora, 1, seed=3).state_dict(0)
    assert all(t.dtype == torch.float32 for t in half[0].values())
    assert 1e-5 < distance(half[0], exact[0]) < distance(exact[0], start)


def test_scales_are_not_rounded_to_the_models_dtype() -> None:
    """As by PEFT: bfloat16 has no number between 1 and 1.0078, so small steps would change no answer."""
    model, ids = tiny_llama(torch.bfloat16), torch.arange(3, 15).view(1, 12)
    bank = bank_for(model, settings_of("ia3"), 1, 0)
    with torch.no_grad(), bank.use(torch.tensor([0])):
        before = model(ids).logits
    bank.weights.mul_(1.002)
    with torch.no_grad(), bank.use(torch.tensor([0])):
        assert (model(ids).logits - before).abs().max() > 1e-2
