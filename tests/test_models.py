"""Every architecture against plain PEFT: training, saved adapters, merging, generation."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    Gemma3ForCausalLM,
    GPTNeoConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3NextConfig,
)

from oppu.attention import takes_blocks, windows
from oppu.bank import LoraBank, load_adapter, save_adapter
from oppu.config import Generation
from oppu.generation import generate
from oppu.models import default_targets, load_base, load_model, load_tokenizer, merge
from oppu.records import InputError
from oppu.rows import Example, plan
from oppu.training import train
from tests.oracle import distance, train_alone
from tests.test_generation import some_prompts
from tests.test_generation import tokenizer as tokenizer
from tests.tiny_models import CONFIGS, EOS, VOCAB, WINDOW, settings, some_examples, tiny_llama

TARGETS = {"gpt2": ["c_attn"]}
EAGER = ("gemma2-window",)  # its attention takes the softmax in float32, whatever the model's dtype


def randomised(bank: LoraBank) -> LoraBank:
    bank.weights.copy_(torch.randn(bank.weights.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return bank


@pytest.mark.parametrize("name", CONFIGS)
def test_training_together_equals_peft_one_by_one(name: str) -> None:
    model, lora = tiny_llama(torch.float64, config=CONFIGS[name]), settings(batch_size=3)
    examples = some_examples(1, [6, 4, 3])
    plans = [plan(len(e), 2, 3, str(user)) for user, e in enumerate(examples)]
    bank = LoraBank(model, lora, 3, seed=3)
    assert bank.target_modules == TARGETS.get(name, ["q_proj", "v_proj"])
    start = bank.state_dict(0)
    results = train(model, bank, examples, plans, lora, Accelerator(cpu=True))
    bank.close()
    assert all(r.error is None for r in results)
    for user, steps in enumerate(plans):
        alone = train_alone(model, start, examples[user], steps, lora)
        assert distance(bank.state_dict(user), alone) < (1e-4 if name in EAGER else 1e-12)
        assert distance(alone, start) > 1e-3


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.endswith("window")])
def test_the_window_is_what_these_examples_need(name: str) -> None:
    """Without it the same training gives other adapters, far beyond the bounds above."""
    wide = copy.deepcopy(CONFIGS[name])
    wide.sliding_window = 1000
    lora, (examples, *_) = settings(), some_examples(1, [4])
    assert max(map(len, examples)) > 2 * WINDOW
    adapters = []
    for config in (CONFIGS[name], wide):
        model = tiny_llama(torch.float64, config=config)
        bank = LoraBank(model, lora, 1, seed=3)
        train(model, bank, [examples], [[[0, 1], [2, 3]]], lora, Accelerator(cpu=True))
        adapters.append(bank.state_dict(0))
    assert distance(*adapters) > 5e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_adapters_are_pefts_and_merging_is_pefts(name: str, tmp_path: Path) -> None:
    model = tiny_llama(config=CONFIGS[name])
    model.save_pretrained(tmp_path / "raw")
    model = load_model(str(tmp_path / "raw"))
    bank = randomised(LoraBank(model, settings(), 2, 0))
    save_adapter(tmp_path / "one", bank, 1, "base")
    save_adapter(tmp_path / "two", bank, 1, "base")
    assert all((tmp_path / "two" / f.name).read_bytes() == f.read_bytes() for f in (tmp_path / "one").iterdir())
    assert json.loads((tmp_path / "one/adapter_config.json").read_text())["fan_in_fan_out"] == (name == "gpt2")
    load_adapter(tmp_path / "one", bank)
    ids = torch.arange(3, 23).view(1, 20)
    with torch.no_grad():
        with bank.use(torch.tensor([1])):
            ours = model(ids).logits
        bank.close()
        peft = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "one"))
        assert (peft(ids).logits - ours).abs().max() < 1e-4
        merged = load_base(str(tmp_path / "raw"), task_adapter=tmp_path / "one")
        assert (merged(ids).logits - ours).abs().max() < 1e-3
        assert (model(ids).logits - ours).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-window"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_merged_in_float32_from_what_is_stored_then_cast(name: str, stored: torch.dtype, tmp_path: Path) -> None:
    tiny_llama(stored, config=CONFIGS[name]).save_pretrained(tmp_path / "raw")
    whole = load_model(str(tmp_path / "raw"), dtype="float32")
    torch.manual_seed(3)
    lora = LoraConfig(
        r=4, target_modules=default_targets(whole), init_lora_weights=False, fan_in_fan_out=name == "gpt2"
    )
    get_peft_model(copy.deepcopy(whole), lora).save_pretrained(str(tmp_path / "task"))
    merged = PeftModel.from_pretrained(whole, str(tmp_path / "task")).merge_and_unload()
    half = load_base(str(tmp_path / "raw"), dtype="bfloat16", task_adapter=tmp_path / "task")
    expected = merged.state_dict()
    for key, weight in half.state_dict().items():
        assert weight.dtype == torch.bfloat16, key
        assert torch.equal(weight, expected[key].bfloat16()), key
    frequencies = {n: b.dtype for n, b in half.named_buffers() if "inv_freq" in n}
    assert set(frequencies.values()) <= {torch.float32}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_only_the_layers_to_merge_keep_what_is_stored(stored: torch.dtype, tmp_path: Path) -> None:
    """So a model stored and run in 16 bits never takes more than that, but for the one layer being merged."""
    tiny_llama(stored).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="bfloat16", exact=["q_proj", "v_proj"])
    found = {name: p.dtype for name, p in model.named_parameters()}
    exact = {f"model.layers.{n}.self_attn.{x}_proj.weight" for n in (0, 1) for x in "qv"}
    assert {found.pop(name) for name in exact} == {stored}
    assert set(found.values()) == {torch.bfloat16}
    whole = load_model(str(tmp_path), dtype="float64", exact=["q_proj"])
    assert {p.dtype for p in whole.parameters()} == {torch.float64}


def test_one_layer_at_a_time_is_wide_while_merging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(torch.float16).save_pretrained(tmp_path / "raw")
    whole = load_model(str(tmp_path / "raw"))
    get_peft_model(whole, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(str(tmp_path / "task"))
    wide: list[int] = []
    plain = LoraLinear.merge

    def counting(self: LoraLinear) -> None:
        plain(self)
        layers = [m for m in loaded[0].modules() if isinstance(m, LoraLinear)]
        wide.append(sum(m.get_base_layer().weight.dtype == torch.float32 for m in layers))

    loaded = [load_model(str(tmp_path / "raw"), dtype="bfloat16", exact=["q_proj", "v_proj"])]
    monkeypatch.setattr(LoraLinear, "merge", counting)
    merge(loaded[0], tmp_path / "task", torch.bfloat16)
    assert wide == [1] * 4


def test_loading_leaves_no_hook_behind(tmp_path: Path) -> None:
    """A device map may; they would slow every forward pass down."""
    tiny_llama().save_pretrained(tmp_path)
    for module in load_model(str(tmp_path), device=torch.device("cpu")).modules():
        assert not hasattr(module, "_hf_hook")
        assert not (module._forward_hooks or module._forward_pre_hooks)
        assert "forward" not in vars(module)


@pytest.mark.parametrize("name", ["gpt2", "gemma3-window", "qwen3"])
def test_generation_equals_pefts(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = tiny_llama(config=CONFIGS[name])
    bank = randomised(LoraBank(model, settings(), 2, 0))
    prompts, users = some_prompts(4), [0, 1, 1, 0]
    ours = generate(model, tokenizer, prompts, Generation(), 6, bank, users)
    bank.close()
    for user in (0, 1):
        save_adapter(tmp_path / str(user), bank, user, "base")
    for prompt, user, answer in zip(prompts, users, ours, strict=True):
        peft = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / str(user)))
        ids = torch.tensor([prompt])
        out = peft.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == answer


class OneMask(Gemma3ForCausalLM):
    """Written as models were before transformers 4.53: one mask for all layers."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None, **more: bool
    ) -> object:
        return super().forward(input_ids, attention_mask.expand(-1, -1, -1, -1), position_ids, **more)


def test_models_that_packed_rows_would_train_wrong_are_refused() -> None:
    small = {"vocab_size": VOCAB, "hidden_size": 32}
    neo = GPTNeoConfig(**small, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]])
    bloom = BloomConfig(**small, n_layer=1, n_head=2)
    hybrid = Qwen3NextConfig(**small, num_hidden_layers=2, num_attention_heads=2, num_experts=2, intermediate_size=32)
    for config, why in ((neo, "local windows"), (bloom, "place in the row"), (hybrid, "linear_attention")):
        with pytest.raises(InputError, match=why):
            takes_blocks(AutoModelForCausalLM.from_config(config))
    with pytest.raises(InputError, match="OneMask takes no mask per kind of layer"):
        takes_blocks(OneMask(CONFIGS["gemma3-window"]))
    bank = LoraBank(tiny_llama(config=neo), settings(), 1, 0)
    with pytest.raises(InputError, match="GPTNeoForCausalLM counts its local windows"):
        train(tiny_llama(config=neo), bank, [[Example((1,), (2,))]], [[[0]]], settings(), Accelerator(cpu=True))
    codegen = CodeGenConfig(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    assert not takes_blocks(tiny_llama(config=codegen)), "its attention is its own: one mask for the whole line"
    for name, config in CONFIGS.items():
        model = tiny_llama(config=config)
        assert takes_blocks(model)
        assert (WINDOW in windows(model).values()) == name.endswith("window")


def test_unknown_architectures_list_their_layers() -> None:
    codegen = tiny_llama(config=CodeGenConfig(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, rotary_dim=4))
    assert default_targets(codegen) == ["qkv_proj"]
    phi3 = tiny_llama(
        config=Phi3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )
    with pytest.raises(InputError, match=r"of a phi3 are not known; name some of .*o_proj, qkv_proj"):
        LoraBank(phi3, settings(), 1, 0)


def test_files_of_a_gpt2_adapter_have_pefts_shapes(tmp_path: Path) -> None:
    model = tiny_llama(config=CONFIGS["gpt2"])
    save_adapter(tmp_path, LoraBank(model, settings(), 1, 0), 0, "base")
    shapes = {tuple(t.shape) for t in load_file(tmp_path / "adapter_model.safetensors").values()}
    assert shapes == {(4, 32), (96, 4)}


def test_a_tokenizer_that_is_a_sentencepiece_file_alone_is_read_as_sentencepiece_does(tmp_path):
    """Vicuna v1.5 has no tokenizer.json."""
    import sentencepiece

    texts = [f"the {word} voted on law number {n}" for n, word in enumerate(["senate", "house", "court"] * 40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    kind = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind | {"add_bos_token": True, "legacy": False}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_tokenizer(str(tmp_path))
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("the senate voted", "braces {prompt}", "law number 12"):
        assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *own.encode(text)]
