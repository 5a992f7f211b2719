"""The hub without a network: a filled cache, an empty one, and a server on this machine that asks for a licence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tests.tiny_models import tiny_llama

TINY = Path(__file__).resolve().parents[1] / "data/models/oppu-tiny"
COMMIT = "01c7f73d771dfac7d292323805ebc428287df4f9"
TOKEN = "hf_secretsecretsecretsecret"


def run(script: str, cache: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's settings are read when it is imported."""
    known = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(sys.path), "HF_HOME": str(cache)}
    head = (
        "import logging, os; logging.basicConfig(level=0)\n"
        "from oppu.models import *; from oppu.records import InputError\n"
        "LOADS = (load_model, load_tokenizer, lambda path: load_model(path, convert=True))\n"
    )
    return subprocess.run([sys.executable, "-c", head + script], env=known | env, capture_output=True, text=True)


def filled_cache(home: Path, repo: str, model: Path) -> None:
    """The hub's cache as a download leaves it."""
    folder = home / "hub" / ("models--" + repo.replace("/", "--"))
    shutil.copytree(model, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


def test_offline_what_is_in_the_cache_loads_and_the_rest_says_what_to_do(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old/pytorch_model.bin")
    filled_cache(tmp_path, "someone/old", tmp_path / "old")
    filled_cache(tmp_path, "someone/tiny", TINY)
    script = (
        f"print(load_model('someone/tiny', {COMMIT!r}).num_parameters(), len(load_tokenizer('someone/tiny')))\n"
        "print(load_model('someone/old', convert=True).num_parameters())\n"
        "for load in LOADS:\n"
        "    try: load('someone/absent')\n"
        "    except InputError as error: print(error)\n"
    )
    done = run(script, tmp_path, HF_HUB_OFFLINE="1", OPPU_CACHE=str(tmp_path / "converted"))
    assert done.returncode == 0, done.stderr
    tiny, old, *absent = done.stdout.splitlines()
    assert int(tiny.split()[0]) > 1_000_000
    assert int(old) == model.num_parameters()
    assert "".join(absent).count("run `hf download someone/absent`") == 3, absent


class Gate(BaseHTTPRequestHandler):
    """Answers as the hub does for a gated model."""

    seen: ClassVar[set[tuple[str, str | None]]] = set()

    def do_GET(self) -> None:
        self.seen.add((self.path, self.headers.get("Authorization")))
        closed, code = ("private" not in self.path), ("GatedRepo" if "private" not in self.path else "RepoNotFound")
        self.send_response(403 if closed and self.headers.get("Authorization") else 401)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_gated_and_private_models_ask_for_the_token_which_nobody_sees(tmp_path: Path, server: str) -> None:
    script = (
        "def attempt(*names):\n"
        "    for load in LOADS:\n"
        "        for name in names:\n"
        "            try: load(f'someone/{name}')\n"
        "            except InputError as error: print(error)\n"
        "attempt('gated', 'private')\n"
        f"os.environ['HF_TOKEN'] = {TOKEN!r}\n"
        "attempt('gated-2', 'private-2')\n"
    )
    (tmp_path / "token").write_text("hf_storedstoredstored")  # another program's login is not used
    done = run(script, tmp_path, HF_ENDPOINT=server, no_proxy="*")
    text = done.stdout + done.stderr
    for name in ("gated", "gated-2"):
        assert text.count(f"https://huggingface.co/someone/{name}, then set HF_TOKEN") == 3, text
    assert text.count("if it is private, set HF_TOKEN") == 6, text
    assert TOKEN not in text
    assert {sent for path, sent in Gate.seen if "-2" not in path} == {None}
    assert {sent for path, sent in Gate.seen if "-2" in path} - {None} == {f"Bearer {TOKEN}"}
