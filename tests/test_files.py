"""Files at the edge: what killed writers leave, and who may delete it."""

from __future__ import annotations

from pathlib import Path

import pytest

from oppu.files import TEMPORARY, new_folder, sweep, write_bytes


def killed(path: Path, folder: bool = False) -> Path:
    """What a writer of this file or folder leaves when it is killed, by the name that a real writer gives it."""
    names: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, _: names.append(self.name))
        patch.setattr(Path, "rename", lambda self, _: names.append(self.name))
        if folder:
            with new_folder(path) as new:
                write_bytes(new / "half", b"")
        else:
            write_bytes(path, b"half")
    left = path.parent / names[-1]
    assert left.exists() and not path.exists() and TEMPORARY.fullmatch(left.name)
    return left


def test_what_writers_of_a_file_left_is_deleted_and_nothing_of_its_neighbours(tmp_path: Path) -> None:
    table, record, adapter = (killed(tmp_path / name, name == "adapter") for name in ("t.csv", "t.csv.json", "adapter"))
    own = [tmp_path / name for name in (".lock", ".t.csv", ".t.csv.swp", "t.csv.abcdefgh")]
    for path in own:
        path.touch()
    sweep(tmp_path / "t.csv")
    assert not table.exists() and record.exists() and adapter.exists()
    sweep(tmp_path / "t.csv.json", tmp_path / "adapter", tmp_path / "elsewhere" / "*")
    assert sorted(tmp_path.iterdir()) == sorted(own)


def test_all_of_a_folder_but_not_below_it_is_deleted_for_its_only_writer(tmp_path: Path) -> None:
    (tmp_path / "users").mkdir()
    left = [killed(tmp_path / "t.csv"), killed(tmp_path / "adapter", folder=True)]
    below = killed(tmp_path / "users" / "t.csv")
    sweep(tmp_path / "*")
    assert not any(path.exists() for path in left) and below.exists()


def test_a_folders_next_writer_deletes_what_the_last_one_left(tmp_path: Path) -> None:
    left, other = killed(tmp_path / "adapter", folder=True), killed(tmp_path / "adapters", folder=True)
    with new_folder(tmp_path / "adapter"):
        pass
    assert not left.exists() and other.exists() and (tmp_path / "adapter").is_dir()
