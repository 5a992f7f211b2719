from __future__ import annotations

import itertools
import os
import socket
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oppu import ranks
from oppu.records import InputError

COSTS = st.dictionaries(st.text(min_size=1, max_size=3), st.floats(1, 1e6), max_size=7)


@given(COSTS, st.integers(1, 4))
def test_everybody_has_one_rank_and_the_order_of_users_does_not_matter(costs: dict[str, float], world: int) -> None:
    shares = ranks.share_out(costs, world)
    assert len(shares) == world
    assert sorted(itertools.chain(*shares)) == sorted(costs)
    assert shares == ranks.share_out(dict(reversed(costs.items())), world)


@given(COSTS.filter(bool), st.integers(1, 3))
def test_no_rank_has_more_than_four_thirds_of_the_best_share(costs: dict[str, float], world: int) -> None:
    """Graham's bound for longest-first, against the best of all ways to share out."""

    def longest(places: tuple[int, ...]) -> float:
        loads = [0.0] * world
        for place, cost in zip(places, costs.values(), strict=True):
            loads[place] += cost
        return max(loads)

    best = min(map(longest, itertools.product(range(world), repeat=len(costs))))
    ours = max(sum(costs[user] for user in share) for share in ranks.share_out(costs, world))
    assert best <= ours * (1 + 1e-9) and ours <= best * (4 / 3 - 1 / (3 * world)) * (1 + 1e-9)


def test_ranks_that_have_work_come_first() -> None:
    assert ranks.share_out({"a": 1.0, "b": 9.0}, 4) == [["b"], ["a"], [], []]


def test_the_launcher_says_who_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.here() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    assert ranks.here() == (0, 1), "a rank of nothing"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks.here() == (3, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="several machines"):
        ranks.here()


def test_users_go_out_and_failures_come_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rank 0 in this thread, rank 1 in another, by the same socket as between processes."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": str(os.getpid())}.items():
        monkeypatch.setenv(name, value)
    done: list[list[str]] = []

    def work(users: list[str]) -> dict[str, str]:
        done.append(users)
        return {"u-b": "too \n \x00 odd"}

    other = threading.Thread(target=ranks.follow, args=(tmp_path / "000.json", work))
    with ranks.leading(tmp_path / "000.json", processes=7) as lead:
        path = ranks._socket(tmp_path / "000.json", ranks._name())
        assert path.stat().st_mode & 0o077 == 0, "nobody else may give users away"
        other.start()
        assert lead.share({"u-a": 3.0, "u-b": 2.0, "u-c": 1.0}) == ["u-a"]
        assert lead.failures() == {"u-b": "too \n \x00 odd"}
        other.join()
    assert done == [["u-b", "u-c"]]
    assert not path.exists()


def test_a_long_temporary_folder_does_no_harm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    short = ranks._socket(tmp_path / "000.json", "x")
    assert short.parent == Path(tempfile.gettempdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 30)))
    path = ranks._socket(tmp_path / "000.json", "x")
    assert path.name == short.name and len(str(path)) < ranks.SOCKET_PATH
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    path.unlink()


def test_a_rank_that_dies_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": str(os.getpid())}.items():
        monkeypatch.setenv(name, value)
    with ranks.leading(tmp_path / "000.json", 1) as lead:
        with socket.socket(socket.AF_UNIX) as dying:
            dying.connect(str(ranks._socket(tmp_path / "000.json", ranks._name())))
            line = ranks.Line(dying)
            line.send(1)
            lead.share({"u-a": 3.0, "u-b": 2.0})
            assert line.receive() == ["u-b"]
            line.reader.close()
        assert lead.failures() == {}
    assert "rank 1 of 2 ended before its users were done" in caplog.text


def test_one_process_needs_no_socket(tmp_path: Path) -> None:
    with ranks.leading(tmp_path / "000.json", 1) as lead:
        assert lead.share({"u-b": 1.0, "u-a": 1.0}) == ["u-a", "u-b"]
        assert lead.failures() == {}


def test_users_with_a_checkpoint_go_to_its_rank() -> None:
    costs = {"a": 9.0, "b": 1.0, "c": 1.0, "d": 1.0}
    assert ranks.share_out(costs, 2) == [["a"], ["b", "c", "d"]]
    assert ranks.share_out(costs, 2, {"b": 0, "a": 1}) == [["b", "c", "d"], ["a"]]
    assert ranks.share_out(costs, 2, {"b": 7}) == ranks.share_out(costs, 2), "a rank that there is no more"
