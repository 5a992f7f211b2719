from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config

from oppu.attention import attention_over
from oppu.bank import LoraBank, grouped, kept, load_adapter, save_adapter
from oppu.models import head_at, load_base, load_model, load_tokenizer, merge, target_linears
from oppu.packing import assemble
from oppu.records import InputError
from oppu.rows import Chunk, Example, passes
from oppu.training import gradients
from tests.tiny_models import VOCAB, settings, some_examples, tiny_config, tiny_llama


def randomised(bank: LoraBank, seed: int = 0) -> LoraBank:
    bank.weights.copy_(torch.randn(bank.weights.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)
    return bank


def test_all_users_begin_alike_and_at_the_base_model() -> None:
    model = tiny_llama()
    ids = torch.arange(3, 13).view(2, 5)
    plain = model(ids).logits
    bank = LoraBank(model, settings(), 3, seed=7)
    assert torch.equal(bank.weights[0], bank.weights[2])
    assert torch.equal(bank.weights[0], LoraBank(model, settings(), 1, seed=7).weights[0])
    assert not torch.equal(bank.weights[0], LoraBank(model, settings(), 1, seed=8).weights[0])
    with bank.use(torch.tensor([0, 2])):
        assert torch.equal(model(ids).logits, plain)
    a = bank.state_dict(0)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert a.abs().max() <= 32**-0.5
    assert a.std() == pytest.approx(32**-0.5 / 3**0.5, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_adapter_loaded_by_peft_gives_the_banks_logits(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_llama(dtype)
    bank = randomised(LoraBank(model, settings(target_modules=["q_proj", "v_proj", "down_proj"]), 3, 0))
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad(), bank.use(torch.tensor([2, 1])):
        rows = model(ids).logits
    with torch.no_grad(), bank.use(torch.tensor([2, 1]), torch.tensor([12, 24], dtype=torch.int32)):
        packed = model(ids).logits
    bank.close()
    bound = 1e-12 if dtype == torch.float64 else 1e-4
    for row, user in enumerate([2, 1]):
        save_adapter(tmp_path / str(user), bank, user, "base-of-the-task")
        peft = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / str(user)))
        with torch.no_grad():
            expected = peft(ids[row : row + 1]).logits[0]
        assert (rows[row] - expected).abs().max() < bound
        assert (packed[row] - expected).abs().max() < bound


def test_adapter_files_have_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from oppu.bank import *; from tests.tiny_models import *\n"
        "bank = LoraBank(tiny_llama(), settings(target_modules=['v_proj', 'q_proj', 'o_proj', 'up_proj']), 2, 0)\n"
        "save_adapter(Path(sys.argv[1]), bank, 1, 'base')\n"
    )
    for run in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / run)],
            check=True,
            env={"PYTHONHASHSEED": run, "PYTHONPATH": ":".join(sys.path)},
        )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    config = json.loads((tmp_path / "1" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["base_model_name_or_path"], config["task_type"], config["inference_mode"]) == (
        "base",
        "CAUSAL_LM",
        True,
    )
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_adapters_come_back_and_foreign_ones_are_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    bank = randomised(LoraBank(model, settings(), 2, 0))
    save_adapter(tmp_path, bank, 1, "base")
    bank.load(0, load_adapter(tmp_path, bank))
    assert torch.equal(bank.weights[0], bank.weights[1])
    for changes in (
        {"rank": 2},
        {"alpha": 16},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "up_proj"]},
    ):
        other = LoraBank(model, settings(**changes), 1, 0)
        with pytest.raises(InputError):
            load_adapter(tmp_path, other)
    with pytest.raises(ValueError, match="missing"):
        bank.load(0, {})
    state = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v[:2] if "lora_A" in k else v for k, v in state.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="says r 4"):
        load_adapter(tmp_path)
    with pytest.raises(InputError, match="not an adapter"):
        load_adapter(tmp_path / "nowhere")


def test_close_and_the_end_of_a_block_give_the_plain_model_back() -> None:
    model = tiny_llama()
    ids = torch.arange(3, 13).view(1, 10)
    plain = model(ids).logits
    bank = randomised(LoraBank(model, settings(), 1, 0))
    with bank.use(torch.tensor([0])):
        assert not torch.allclose(model(ids).logits, plain)
        with pytest.raises(RuntimeError, match="nest"), bank.use(torch.tensor([0])):
            pass
    assert torch.equal(model(ids).logits, plain)
    bank.close()
    assert not any(m._forward_hooks for m in model.modules())


def test_targets_that_peft_would_pass_over_are_refused() -> None:
    with pytest.raises(InputError, match=r"'out_proj' matches no layer; there are .*o_proj.*q_proj"):
        target_linears(tiny_llama(), ["q_proj", "out_proj"])
    assert len(target_linears(tiny_llama(), ["layers.0.self_attn.q_proj", "v_proj"])) == 3
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    for target, kind in (("wte", "Embedding"), ("ln_1", "LayerNorm")):
        with pytest.raises(InputError, match=f"{target}' is a {kind}; only Linear"):
            LoraBank(gpt2, settings(target_modules=[target]), 1, 0)


def mirrored(tokens: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(VOCAB - 1 - t for t in tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nobodys_tokens_touch_anothers_gradient(dtype: torch.dtype) -> None:
    model, lora = tiny_llama(dtype), settings(max_grad_norm=1e9)
    bank = randomised(LoraBank(model, lora, 3, 0))
    examples = some_examples(0, [3, 3, 3])
    # Other tokens in the same layout: kernels then round alike, so that "untouched" can mean the very same bits.
    other = [Example(mirrored(e.prompt), mirrored(e.target)) for e in examples[1]]
    changed = [examples[0], other, examples[2]]
    first, second = (
        gradients(model, bank, [Chunk(u, tuple(e)) for u, e in enumerate(several)], lora, Accelerator(cpu=True))
        for several in (examples, changed)
    )
    assert torch.equal(first[0].grad, second[0].grad)
    assert torch.equal(first[2].grad, second[2].grad)
    assert not torch.equal(first[1].grad, second[1].grad)


def test_the_gradient_of_ones_loss_for_anothers_adapter_is_exactly_zero() -> None:
    model = tiny_llama()
    bank = randomised(LoraBank(model, settings(), 3, 0))
    chunks = [Chunk(u, tuple(e)) for u, e in enumerate(some_examples(0, [3, 3, 3]))]
    packed = assemble(chunks, passes(chunks, 10_000)[0])
    assert len(packed.users) == 3, "the three are to share a pass"
    users = bank.use(packed.users, packed.ends)
    with users, head_at(model, packed.positions), attention_over(model, packed, blocks=True) as mask:
        logits = model(packed.input_ids, mask, packed.position_ids).logits
        logits[packed.chunks == 1].square().sum().backward()
    assert bank.grads[1].abs().max() > 0
    assert not bank.grads[0].any()
    assert not bank.grads[2].any()


@pytest.mark.parametrize("sizes", [(8, 16, 8), (5, 16, 3), (16, 6, 10)])
def test_grouped_is_the_same_with_and_without_the_kernel(sizes: tuple[int, int, int]) -> None:
    groups, inner, outer = sizes
    ends = torch.arange(3, 3 * groups + 1, 3, dtype=torch.int32)
    x, weights = torch.randn(3 * groups, inner), torch.randn(groups, outer, inner).mT
    expected = torch.cat([x[3 * g : 3 * g + 3].double() @ weights[g].double() for g in range(groups)])
    assert (grouped(x, weights, ends) - expected).abs().max() < 1e-5
    assert (grouped(x.double(), weights.double(), ends) - expected).abs().max() < 1e-12


def test_dropout_keeps_the_asked_share_and_its_choices_look_independent() -> None:
    keys = torch.arange(2000) * 12345
    mask = kept(keys, 0, 64, 0.25).double()
    assert mask.mean() == pytest.approx(0.75, abs=0.01)
    assert (mask.mean(0) - 0.75).abs().max() < 0.06
    assert (mask.mean(1) - 0.75).abs().max() < 0.3
    correlation = torch.corrcoef(mask.T) - torch.eye(64)
    assert correlation.abs().max() < 0.12
    assert (mask != kept(keys, 1, 64, 0.25).double()).double().mean() == pytest.approx(2 * 0.75 * 0.25, abs=0.02)


def test_the_base_is_merged_in_float32_and_then_cast(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "raw")
    raw = load_model(str(tmp_path / "raw"))
    assert not any(p.requires_grad for p in raw.parameters())
    assert not raw.training
    torch.manual_seed(3)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft = get_peft_model(copy.deepcopy(raw), lora)
    peft.save_pretrained(str(tmp_path / "task"))
    ids = torch.arange(3, 13).view(1, 10)
    with torch.no_grad():
        base = load_base(str(tmp_path / "raw"), task_adapter=tmp_path / "task")
        assert (base(ids).logits - peft(ids).logits).abs().max() < 1e-4
        assert (base(ids).logits - raw(ids).logits).abs().max() > 1e-2
    half = load_base(str(tmp_path / "raw"), dtype="bfloat16", task_adapter=tmp_path / "task")
    for name, weight in half.state_dict().items():
        assert torch.equal(weight, base.state_dict()[name].bfloat16()), name
    with pytest.raises(ValueError, match="load it in float32"):
        merge(load_model(str(tmp_path / "raw"), dtype="bfloat16"), tmp_path / "task")
    small = tiny_llama(config=tiny_config(num_hidden_layers=1))
    with pytest.raises(InputError, match="does not fit"):
        merge(small, tmp_path / "task")
    with pytest.raises(InputError, match="could not be loaded"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_models_with_biases_and_other_names_work() -> None:
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = tiny_llama(torch.float64, config=config)
    bank = randomised(LoraBank(model, settings(), 2, 0))
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        with bank.use(torch.tensor([0, 1])):
            rows = model(ids).logits
        with bank.use(torch.tensor([0, 1]), torch.tensor([10, 20], dtype=torch.int32)):
            assert (model(ids).logits - rows).abs().max() < 1e-12
