"""What the benchmarks share: their options, fair timing, the machine's name, made-up histories and random models.

Every script prints a table and, with --json FILE, writes `machine`, `options`, `seconds` and `ratios`; each figure is
{min, median, max} over its repeats. torch is imported only where a model is made.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from oppu.rows import Example
from oppu.tasks import task as task_named

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {},  # data/models/oppu-tiny
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
BOS, EOS = 1, 2
FACTOR = 1.3
"""Tokens per whitespace word: what Llama's tokenizer needs for English, roughly. Table 5 counts words."""
CV = 0.8
"""Standard deviation over mean, of items per user and of lengths; the paper gives means alone."""

Spread = dict[str, float]
Seconds = dict[str, list[float]]


def parser(doc: str | None, repeats: int = 3) -> argparse.ArgumentParser:
    """A script's parser with the options that all have: --repeats and --json."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=_repeats, default=repeats, help=f"timed runs of each side ({repeats})")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    return made


def _repeats(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1; below 3 min, median and max say little")
    return number


def spread(values: Sequence[float]) -> Spread:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def interleaved(sides: Mapping[str, Callable[[], object]], repeats: int, warm: bool = True) -> Seconds:
    """Seconds of each side's runs, taken in turn (A B A B ...), so that a slow moment of the machine meets all alike.

    Each runs once untimed before (`warm`). The garbage collector is off while the clock runs.
    """
    seconds: Seconds = {name: [] for name in sides}
    for run in sides.values() if warm else ():
        timed(run)
    for _ in range(repeats):
        for name, run in sides.items():
            seconds[name].append(timed(run))
    return seconds


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run, until the device has nothing left to do."""
    gc.collect()
    gc.disable()
    try:
        _wait()
        start = time.perf_counter()
        run()
        _wait()
        return time.perf_counter() - start
    finally:
        gc.enable()


def _wait() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The ratio of each pair of runs that were taken in turn."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, threads, GPU and versions; torch is asked only if it is loaded."""
    torch = sys.modules.get("torch")
    names = ("torch", "transformers", "peft", "numpy")
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads() if torch is not None else None,
        "gpu": _gpu(),
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in names}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    if torch is not None:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0] if found else None


def show(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, first column to the left, the others to the right; floats with three digits."""
    cells = [list(headers), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *others = (f"{cell:{'<' if n == 0 else '>'}{widths[n]}}" for n, cell in enumerate(row))
        sys.stdout.write("  ".join([first, *others]).rstrip() + "\n")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def finish(
    options: argparse.Namespace, seconds: Mapping[str, Spread], ratios: Mapping[str, Spread], **more: object
) -> None:
    """Print seconds, ratios and the machine; write them to --json. `more` stands in the JSON beside them."""
    about = machine()
    rows = [[f"{name} (s)", *figure.values()] for name, figure in seconds.items()]
    rows += [[name, *figure.values()] for name, figure in ratios.items()]
    show(["", "min", "median", "max"], rows)
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in about.items() if value is not None) + "\n")
    if options.json:
        given = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items() if name != "json"}
        result = {"machine": about, "options": given, "seconds": seconds, "ratios": ratios, **more}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def histories(
    task: str,
    users: int,
    seed: int,
    vocabulary: int,
    factor: float = FACTOR,
    items: float | None = None,
    max_length: int = 2048,
) -> list[list[Example]]:
    """Made-up users of a task, as tokens, with Table 5's mean lengths (words times `factor`) and log-normal sizes.

    Every prompt begins with the task's instruction (its words times `factor`, the same tokens for all users); what
    comes behind it, the target and the number of items vary. `items` takes the place of Table 5's mean number of
    items. A user's history depends on (seed, task, number of the user) alone. Lengths are cut at `max_length`.
    """
    row = _table5()[task]
    instruction = task_named(task).prompt.partition("{")[0].split()
    shared = round(factor * len(instruction))
    source = f"{task} {seed}".encode()
    ids = np.arange(vocabulary, dtype=object)  # one object per token id, not one per token
    prefix = (BOS, *ids[_draw(source, -1).integers(EOS + 1, vocabulary, shared)])
    own = max(factor * row["personal_in_tokens"] - shared, 1.0)
    made = []
    for user in range(users):
        draw = _draw(source, user)
        count = int(_sizes(draw, row["personal_history"] if items is None else items, 1)[0])
        targets = _sizes(draw, factor * row["personal_out_tokens"], count).clip(max=max_length // 2)
        rests = _sizes(draw, own, count).clip(max=max_length - len(prefix) - targets - 1)
        tokens = [tuple(ids[draw.integers(EOS + 1, vocabulary, size)]) for size in (*rests, *targets)]
        pairs = zip(tokens[:count], tokens[count:], strict=True)
        made.append([Example((*prefix, *rest), (*target, EOS)) for rest, target in pairs])
    return made


def _table5() -> dict[str, dict[str, float]]:
    with (ROOT / "data/paper/table5.csv").open(encoding="utf-8") as f:
        return {row.pop("task"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(f)}


def _draw(source: bytes, user: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(source), user + 1])


def _sizes(draw: np.random.Generator, mean: float, count: int) -> np.ndarray:
    """Whole numbers of at least 1 from the log-normal distribution with this mean and the coefficient CV."""
    sigma = np.log(1 + CV**2) ** 0.5
    return np.maximum(np.rint(draw.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)), 1).astype(int)


def config_of(shape: str) -> PretrainedConfig:
    """The configuration of a shape: oppu-tiny's own, or a Llama's with Llama 2's vocabulary."""
    from transformers import AutoConfig, LlamaConfig

    if shape == "tiny":
        return AutoConfig.from_pretrained(ROOT / "data/models/oppu-tiny")
    sizes = {"vocab_size": 32000, "max_position_embeddings": 4096}
    return LlamaConfig(**SHAPES[shape], **sizes, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0)


def model_of(shape: str, dtype: str, device: str) -> PreTrainedModel:
    """A frozen model of a shape (SHAPES) with random weights, the same each time, made on the device in the dtype."""
    import torch
    from transformers import AutoModelForCausalLM

    from oppu.models import freeze

    torch.manual_seed(0)
    with torch.device(device):
        return freeze(AutoModelForCausalLM.from_config(config_of(shape), dtype=getattr(torch, dtype)))
