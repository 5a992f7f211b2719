"""Which users' last job failed, and why: {setting}/failed/{user}.json, gone again when a job succeeds for the user.

`oppu status` reads it. Nothing depends on it: whether a cell is made again is told by its key and files alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from oppu.files import read_json, sweep, write_json
from oppu.records import InputError

FOLDER = "failed"


class UsersFailed(InputError):
    """Some users of a job failed; `users` says why each did. The others' cells are kept."""

    def __init__(self, problems: list[str], users: dict[str, str]) -> None:
        self.users = users
        super().__init__(problems)


@contextmanager
def recorded(setting: Path, users: Sequence[str]) -> Iterator[None]:
    """Record which of these users the block fails for: those of UsersFailed, all for any other error."""
    failed: dict[str, str] = {}
    sweep(*(setting / FOLDER / f"{user}.json" for user in users))
    try:
        yield
    except UsersFailed as error:
        failed = error.users
        raise
    except Exception as error:
        failed = dict.fromkeys(
            users, str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        )
        raise
    except BaseException:  # stopped, by a signal: no news of any user
        users = []
        raise
    finally:
        with suppress(OSError):  # on a full disk the error itself is the news
            for user in users:
                path = setting / FOLDER / f"{user}.json"
                if user in failed:
                    write_json(path, {"user": user, "why": failed[user]})
                else:
                    path.unlink(missing_ok=True)


def of_setting(setting: Path) -> dict[str, str]:
    """Why each user of a setting whose last job failed did."""
    found = {}
    with suppress(OSError):
        for name in sorted(os.listdir(setting / FOLDER)):  # noqa: PTH208
            if name.startswith("u-"):
                with suppress(OSError, ValueError, KeyError, TypeError):
                    found[name.removesuffix(".json")] = str(read_json(setting / FOLDER / name)["why"])
    return found
