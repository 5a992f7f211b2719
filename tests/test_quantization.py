"""8 and 4 bits, for real where bitsandbytes can be imported (pip install 'oppu[quantization]'), on the CPU too."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model

from oppu.bank import LoraBank
from oppu.models import load_base, load_model
from oppu.records import InputError
from oppu.rows import plan
from oppu.training import train
from tests.oracle import train_alone
from tests.tiny_models import settings, some_examples, tiny_config, tiny_llama

HERE = importlib.util.find_spec("bitsandbytes") is not None
needed = pytest.mark.skipif(not HERE, reason="NOT TESTED: no bitsandbytes; pip install 'oppu[quantization]'")
KINDS = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPPU_CACHE", str(tmp_path / "cache"))
    tiny_llama(config=tiny_config(hidden_size=64, intermediate_size=128)).save_pretrained(tmp_path / "raw")
    return str(tmp_path / "raw")


@pytest.mark.skipif(HERE, reason="bitsandbytes is here")
@pytest.mark.parametrize("quantization", KINDS)
def test_a_missing_bitsandbytes_is_named(raw: str, quantization: str) -> None:
    with pytest.raises(InputError, match=r"needs bitsandbytes: pip install 'oppu\[quantization\]'"):
        load_model(raw, quantization=quantization)


def learned(state: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> torch.Tensor:
    """All that training changed, in one vector."""
    return torch.cat([(state[name] - start[name]).flatten() for name in start])


@needed
@pytest.mark.parametrize("quantization", KINDS)
def test_a_cohort_equals_peft_on_the_quantized_model(raw: str, quantization: str) -> None:
    model, lora = load_model(raw, quantization=quantization), settings()
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == KINDS[quantization]
    assert not any(p.requires_grad for p in model.parameters())
    examples = some_examples(1, [4, 3])
    plans = [plan(len(e), 2, 4, str(user)) for user, e in enumerate(examples)]
    bank = LoraBank(model, lora, 2, seed=3)
    start = bank.state_dict(0)
    train(model, bank, examples, plans, lora, Accelerator(cpu=True))
    bank.close()
    for user, steps in enumerate(plans):
        alone = train_alone(model, start, examples[user], steps, lora)
        ours, theirs = learned(bank.state_dict(user), start), learned(alone, start)
        # 8 bits round activations too, and a last bit in one may move the other by a step of 1/127.
        assert (ours - theirs).norm() < (0.2 if quantization == "8bit" else 1e-4) * theirs.norm()


@needed
@pytest.mark.parametrize("quantization", KINDS)
def test_the_task_lora_is_merged_before_quantizing(raw: str, quantization: str, tmp_path: Path) -> None:
    whole = load_model(raw)
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(copy.deepcopy(whole), lora).save_pretrained(str(tmp_path / "task"))
    base = load_base(raw, task_adapter=tmp_path / "task", quantization=quantization)
    PeftModel.from_pretrained(whole, str(tmp_path / "task")).merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = load_model(str(tmp_path / "merged"), quantization=quantization).state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in base.state_dict().items() if isinstance(t, torch.Tensor))
    assert not list((tmp_path / "cache").iterdir()), "the merged model is not left on the disk"


@needed
def test_float64_is_refused(raw: str) -> None:
    with pytest.raises(InputError, match="bfloat16, float16 or float32"):
        load_model(raw, dtype="float64", quantization="8bit")
