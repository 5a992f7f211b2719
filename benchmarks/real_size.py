"""The whole path on a base of real size: task LoRA, personal LoRAs and predictions, with seconds and memory.

    python benchmarks/real_size.py --shape llama-2-7b --dtype bfloat16 --users 4 --json real_size.json

The base has random weights, so nothing is downloaded and no score means anything; what is shown is that the workflow
passes at this size, and what each step takes. The data are the sample's news users; the tokenizer is oppu-tiny's.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from common import ROOT, SHAPES, model_of
from transformers import AutoTokenizer


def random_base(folder: Path, shape: str, dtype: str) -> None:
    model_of(shape, dtype, "cuda" if torch.cuda.is_available() else "cpu").save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data/models/oppu-tiny").save_pretrained(folder)


def configuration(folder: Path, arguments: argparse.Namespace) -> Path:
    data = ROOT / "data/sample/lamp"
    values = {
        "results": str(folder / "results"),
        "data": str(data),
        "tasks": ["LaMP_2N"],
        "augmentations": ["k0"],
        "split": {"test_users": arguments.users},
        "model": {"path": str(folder / "base"), "dtype": arguments.dtype, "max_length": 512},
        "base": {"rank": 64, "lr": 1e-4, "epochs": 1, "batch_size": 16, "weight_decay": 0.0},
        "personal": {"max_items": arguments.items, "epochs": 1},
        "bootstrap": 100,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def measured(folder: Path) -> list[dict[str, object]]:
    rows = []
    for path in sorted((folder / "results/benchmarks").rglob("*.tsv")):
        header, values = (line.split("\t") for line in path.read_text().splitlines()[:2])
        job = path.relative_to(folder / "results/benchmarks").with_suffix("")
        log = (folder / "results/logs" / job).with_suffix(".log").read_text()
        memory = re.findall(r"peak device memory ([\d.]+) GiB", log)
        seconds = float(dict(zip(header, values, strict=True))["s"])
        rows.append({"job": str(job), "seconds": seconds, "device_gib": float(memory[-1]) if memory else None})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="shape of the random base")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--users", type=int, default=4, help="test users; all other users train the base")
    parser.add_argument("--items", type=int, default=16, help="each test user's newest items to learn from")
    parser.add_argument("--folder", type=Path, default=Path("results/real_size"), help="where everything is written")
    parser.add_argument("--json", type=Path, help="write the measurements to this file")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    (folder / "base").mkdir(parents=True, exist_ok=True)
    random_base(folder / "base", arguments.shape, arguments.dtype)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--forceall", "--configfile"]
    subprocess.run([*command, str(configuration(folder, arguments))], cwd=ROOT, check=True)
    rows = measured(folder)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    print(f"{arguments.shape}, {arguments.dtype}, {arguments.users} users, {device}, torch {torch.__version__}")
    for row in rows:
        print(f"{row['job']:40} {row['seconds']:8.1f} s  {row['device_gib'] or '-'} GiB on the device")
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "jobs": rows}, indent=1))


if __name__ == "__main__":
    main()
