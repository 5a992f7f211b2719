"""A plan's numbers against what really runs: the trainer's tokens, torch's FLOP counter, a saved adapter's bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from oppu import training
from oppu.bank import LoraBank, save_adapter
from oppu.banks import bank_for
from oppu.config import Config, load
from oppu.config_files import read_config
from oppu.examples import Context, history_examples
from oppu.models import load_tokenizer
from oppu.plan import gpu_named, make_plan
from oppu.plan_counts import Task
from oppu.plan_data import data_of, tokenizer_of
from oppu.plan_text import text_of
from oppu.records import InputError
from oppu.rows import plan
from oppu.seeds import seed_text
from oppu.shape import known, llama_like, shape_of
from oppu.tasks import task
from oppu.training_settings import Lora
from tests.lamp_files import write_task
from tests.tiny_models import CONFIGS, settings_of, tiny_config, tiny_llama

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "data/models/oppu-tiny")
H100 = gpu_named("h100", 0.4, "bfloat16")


def small(folder: Path, **values: object) -> Config:
    """Four test users with histories of 3 to 30 items and three base users, as files."""
    write_task(folder, "LaMP_2N", {"ann": 3, "bob": 30, "cy": 11, "dee": 0}, queries=2)
    write_task(folder, "LaMP_2N", {"eve": 2, "fay": 5, "gil": 1}, source="train")
    defaults = {"data": str(folder), "tasks": ["LaMP_2N"], "augmentations": ["k0"], "split": {"test_users": "dev"}}
    return load(defaults | {"model": {"path": TINY, "max_length": 256}} | values)


def counted(config: Config, limit: int = 10**6) -> Task:
    tokenizer, per_token, _ = tokenizer_of(config)
    data = data_of(config, "LaMP_2N")
    assert data is not None
    return Task(config, "LaMP_2N", data, tokenizer, per_token, limit)


@pytest.mark.parametrize("max_items", [None, 7])
def test_tokens_are_those_that_the_trainer_runs_on(tmp_path, monkeypatch, max_items):
    config = small(tmp_path, personal={"max_items": max_items, "tokens_per_batch": 700, "batch_size": 4, "epochs": 2})
    planned = counted(config)
    seen: Counter[str] = Counter()
    assemble = training.assemble

    def watched(chunks, rows):
        packed = assemble(chunks, rows)
        seen["packed"] += packed.input_ids.numel()
        seen["labels"] += len(packed.targets)
        seen["pairs"] += int((packed.spans[:, 1] * (packed.spans[:, 1] + packed.spans[:, 3])).sum())
        return packed

    monkeypatch.setattr(training, "assemble", watched)
    lora, tokenizer = config.lora("LaMP_2N"), load_tokenizer(TINY)
    context = Context(task("LaMP_2N"), planned._context("k0").augmentation, tokenizer, tokenizer.eos_token_id, 256, 0)
    users = planned.data.test
    examples = [history_examples(context, user, None, Counter(), max_items) for user in users]
    orders = [seed_text(0, "LaMP_2N", user.key, "data order") for user in users]
    plans = [plan(len(own), 2, 4, order) for own, order in zip(examples, orders, strict=True)]
    model = tiny_llama(config=tiny_config(vocab_size=8192))
    training.train(model, LoraBank(model, lora, len(users), 0), examples, plans, lora, Accelerator())

    work = planned.personal("k0")
    assert work.examples == 2 * sum(min(len(user.history), max_items or 99) for user in users)
    assert work.tokens == 2 * sum(len(example) for own in examples for example in own)
    assert {name: getattr(work, name) for name in seen} == seen
    assert work.packed < work.tokens  # LaMP_2N's instruction is shared


@pytest.mark.parametrize("name", ["k0", "k1"])
def test_a_part_stands_for_the_whole(name):
    config = load(yaml.safe_load((ROOT / "config/config.yaml").read_text()) | {"data": str(ROOT / "data/sample/lamp")})
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": TINY})})
    for step in (Task.base, Task.personal, Task.prompts):
        whole, part = (step(counted(config, limit), name) for limit in (10**6, 200))
        assert part.examples == pytest.approx(whole.examples)
        assert part.tokens == pytest.approx(whole.tokens, rel=0.1)
        assert part.packed == pytest.approx(whole.packed, rel=0.2)


def test_forward_flops_are_those_that_torch_counts():
    model = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="eager")
    shape = llama_like(tiny_config().to_dict())
    rows, width = 3, 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(rows, width, dtype=torch.long))
    found = shape.forward(rows * width, rows * width**2, rows * width)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_training_flops_are_those_that_torch_counts():
    model = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=6), attn_implementation="eager")
    model.requires_grad_(False)
    shape = llama_like(tiny_config(num_hidden_layers=6).to_dict())
    rows, width = 3, 64
    embedded = model.get_input_embeddings()(torch.ones(rows, width, dtype=torch.long)).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    found = shape.training(rows * width, rows * width**2, rows * width, adapter=0)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=16),
        Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97),
        LlamaConfig(**known()["models"]["meta-llama/Llama-2-7b-hf"]),
    ],
    ids=["llama", "llama-biased", "qwen2", "llama-2-7b"],
)
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert llama_like(config.to_dict()).parameters == sum(p.numel() for p in model.parameters())


def test_other_architectures_are_built_without_weights(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64)
    config.save_pretrained(tmp_path)
    shape, _ = shape_of(str(tmp_path))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert shape is not None and shape.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(2, 64, dtype=torch.long))
    assert shape.forward(128, 2 * 64**2, 128) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"], ["model.layers.1.self_attn.o_proj"]])
def test_adapter_bytes_are_those_of_a_saved_adapter(tmp_path, targets):
    lora = Lora(rank=4, target_modules=targets)
    bank = LoraBank(tiny_llama(), lora, 1, 0)
    save_adapter(tmp_path, bank, 0, "base")
    saved = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    assert llama_like(tiny_config().to_dict()).adapter(lora) * 4 == saved


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("kind", ["ia3", "prompt"])
def test_bytes_of_the_other_kinds_are_those_of_a_saved_adapter(tmp_path, kind, name):
    CONFIGS[name].save_pretrained(tmp_path)
    shape, _ = shape_of(str(tmp_path))
    model = tiny_llama(config=CONFIGS[name])
    bank = bank_for(model, settings_of(kind), 1, 0)
    save_adapter(tmp_path, bank, 0, "base")
    saved = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    assert shape is not None and shape.adapter(settings_of(kind)) * 4 == saved


def test_figure_6s_shares_of_llama_2_7b():
    """The paper's text has LoRA .01 % and (IA)3 .06 %: by these counts the two are swapped (docs/paper.md)."""
    paper = load({"model": {"path": "meta-llama/Llama-2-7b-hf"}})
    shape, _ = shape_of(paper.model.path)
    assert shape is not None
    shares = {
        p: 100 * shape.adapter(paper.training(p, "LaMP_2M")) / shape.parameters for p in ("lora", "ia3", "prompt")
    }
    assert shares == pytest.approx({"lora": 0.0622, "ia3": 0.00912, "prompt": 0.00122}, rel=0.01)


def test_other_kinds_have_steps_and_longer_prompts(tmp_path):
    """Of the same examples: prompt tuning adds its tokens to each, once per shared beginning."""
    plan = make_plan(small(tmp_path, peft=["none", "lora", "ia3", "prompt"], prompt={"virtual_tokens": 11}), H100)
    steps = {(step.step, step.setting.split("/")[1]): step for step in plan.steps if step.step != "base"}
    lora, ia3, prompt = (steps["personal", kind] for kind in ("lora", "ia3", "prompt"))
    assert lora.tokens == ia3.tokens and lora.packed == ia3.packed
    assert prompt.tokens == lora.tokens + 11 * lora.examples
    assert lora.packed < prompt.packed < lora.packed + 11 * lora.examples
    assert 0 < (ia3.disk or 0) < (lora.disk or 0) and (prompt.disk or 0) == 4 * 11 * 192 * 4
    none, asked = steps["prediction", "none"], steps["prediction", "prompt"]
    assert asked.tokens == none.tokens + 11 * none.examples == steps["prediction", "ia3"].tokens + 11 * none.examples


def test_a_target_that_the_model_lacks_is_refused():
    with pytest.raises(InputError, match=r"'out_proj' matches no layer; there are down_proj.*q_proj"):
        llama_like(tiny_config().to_dict()).adapter(Lora(rank=4, target_modules=["out_proj"]))


def test_every_setting_has_its_steps_and_controls_train_what_they_train(tmp_path):
    config = small(
        tmp_path,
        augmentations=["k0", "random", "profile-k1"],
        peft=["none", "lora", "pooled", "swapped"],
        benchmark=True,
        training_seeds=2,
        users_per_job=3,
    )
    plan = make_plan(config, H100)
    steps = {(step.step, step.setting): step for step in plan.steps}
    predicted = {setting for kind, setting in steps if kind == "prediction"}
    assert predicted == {"/".join(setting) for setting in config.settings}
    trained = {setting for kind, setting in steps if kind == "personal"}
    assert trained == {s for s in predicted if s.split("/")[1] in ("lora", "pooled")}
    bases = {setting for kind, setting in steps if kind == "base"}
    assert bases == {a + s for a in config.augmentations for s in ("", "-s1")}
    lora, pooled = steps["personal", "k0/lora/full"], steps["personal", "k0/pooled/full"]
    assert (lora.jobs, pooled.jobs, lora.disk, pooled.disk) == (2, 1, 4 * (pooled.disk or 0), pooled.disk)
    assert lora.tokens == pooled.tokens
    assert steps["personal", "k0-s1/lora/full"].flops == lora.flops
    assert plan.totals["personal_adapter_bytes"] == 4 * 5 * (pooled.disk or 0)  # 2 augmentations, 2 seeds, 4 + 1
    assert steps["prediction", "random/none/full"].tokens > steps["prediction", "k0/none/full"].tokens


def test_the_pooled_adapter_that_others_begin_at_is_planned_once(tmp_path):
    for peft in (["lora"], ["lora", "pooled"]):
        config = small(tmp_path, augmentations=["k0"], peft=peft, benchmark=True, personal={"start": "pooled"})
        trained = sorted(step.setting for step in make_plan(config, H100).steps if step.step == "personal")
        assert trained == ["k0/lora/full", "k0/pooled/full"]


def test_longer_prompts_batches_and_epochs_cost_more(tmp_path):
    def cost(**values: object) -> float:
        found = make_plan(small(tmp_path, **values), H100)
        return sum(step.flops or 0 for step in found.steps if step.step == "personal")

    assert cost() < cost(augmentations=["k1"]) < cost(augmentations=["k4"])
    assert cost(personal={"epochs": 6}) == pytest.approx(2 * cost(personal={"epochs": 3}), rel=0.02)
    assert cost(personal={"max_items": 2}) < cost() / 2


def test_without_files_table_5_is_taken_and_said(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load({"data": str(tmp_path), "tasks": ["LaMP_7"], "augmentations": ["k0"], "model": {"path": TINY}})
    plan = make_plan(config, H100)
    (base,) = (step for step in plan.steps if step.step == "base")
    (personal,) = (step for step in plan.steps if step.step == "personal")
    assert (round(base.examples), round(personal.examples)) == (3 * 14826, 2 * 100 * 121)
    assert "Table 5's counts and mean lengths" in text_of(plan)
    monkeypatch.chdir(tmp_path)
    missing = make_plan(config, H100)
    assert not missing.steps and "LaMP_7: UNKNOWN" in " ".join(text_of(missing).split())


def test_without_tokenizer_words_are_counted_and_without_shape_nothing_is_guessed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    exact = make_plan(small(tmp_path), H100)
    plan = make_plan(small(tmp_path, model={"path": "someone/some-model", "max_length": 256}), H100)
    text = " ".join(text_of(plan).split())
    assert "unknown: no config.json of someone/some-model" in text and "words * 1.35" in text
    assert plan.totals["hours"] is None and "unknown hours on one H100" in text
    tokens = [sum(step.tokens for step in p.steps if step.step == "personal") for p in (plan, exact)]
    assert tokens[0] == pytest.approx(tokens[1], rel=0.5)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("augmentation: [k0]", "augmentation: Extra inputs"),
        ("tasks: [LaMP_6]", "no task 'LaMP_6'; there are LaMP_1"),
        ("- k0", "holds no keys and values"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_mistake_in_the_config_is_refused(tmp_path, text, problem):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=problem.replace("[", r"\[")):
        read_config([tmp_path / "x.yaml"])
    with pytest.raises(InputError, match=r"nowhere.yaml: cannot be read: No such file"):
        read_config([tmp_path / "nowhere.yaml"])


def test_later_files_stand_over_earlier_ones():
    first, second = ROOT / "config/config.yaml", ROOT / "config/tune.yaml"
    merged = read_config([first, second])
    assert merged.split.test_users == "dev" and merged.split.heldout_queries == 6
    assert merged.augmentations == yaml.safe_load(second.read_text())["augmentations"]


def test_gpus_are_named_or_refused():
    with pytest.raises(InputError, match=r"no GPU 'T4'; there are H200, H100"):
        gpu_named("T4", 0.4, "bfloat16")
    with pytest.raises(InputError, match="utilisation"):
        gpu_named("H100", 1.4, "bfloat16")
    assert gpu_named("H100", 0.2, "bfloat16").hours(1e18) == 2 * H100.hours(1e18)
    assert H100.hours(989e12 * 0.4 * 3600) == pytest.approx(1)


def test_the_command_prints_the_plan_and_imports_no_torch(tmp_path):
    small(tmp_path)
    values = {"data": str(tmp_path), "tasks": ["LaMP_2N"], "model": {"path": TINY, "max_length": 256}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "b.yaml").write_text("split: {test_users: dev}\naugmentations: [k0, k1]")
    command = f"""
import sys
from oppu.cli import app
try:
    app(["plan", "--config", {str(tmp_path / "a.yaml")!r}, {str(tmp_path / "b.yaml")!r}, "--json", "--gpu", "V100"])
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["gpu"]["name"] == "V100"
    assert {step["setting"] for step in found["steps"] if step["step"] == "base"} == {"k0", "k1"}
