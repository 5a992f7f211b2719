"""The control `pooled`: one LoRA trained on all test users' histories together, answering for each of them.

It mixes users by construction, so it is refused outside a benchmark (config: `benchmark`), lies in the setting's folder
and never in a user's, and nobody's cell holds it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from oppu import devices
from oppu.cells import damage, profile_of, read_record
from oppu.checkpoints import Checkpoint, checkpoint_of
from oppu.files import digest, file_digest, folder_digests, lock, new_folder, read_json, read_user, sweep, write_json
from oppu.keys import adapter_key
from oppu.records import InputError

log = logging.getLogger(__name__)


def run(
    out: Path, recipe: Path, base: Path, histories: Sequence[Path], mended: str = "-", profiles: Path | None = None
) -> None:
    """Bring the shared adapter up to date, then write the stamp `out`; the command of rule `pooled`.

    Beside `out`: `adapter/`, a PEFT folder, and `cell.json`, written last. Raises InputError when training failed.
    """
    values, manifest = read_json(recipe), read_json(base)
    setting = out.parent
    users = [read_user(path) for path in sorted(histories)]
    people = [(user, profile_of(values, user, profiles), Counter[str]()) for user in users]
    key = digest([adapter_key(values, manifest, user, profile, None) for user, profile, _ in people])
    with lock(setting / ".pooled.lock", f"pooled adapter {setting}"):
        entry = read_record(setting).get("artefacts", {}).get("adapter")
        if entry is None or entry["key"] != key or damage(setting, {"adapter": entry}):
            devices.take()
            from oppu.cohort import Cohort  # torch: seconds, so only when something is stale

            sweep(setting / "*")
            cohort = Cohort(values, manifest, base.parent, None, people)
            checkpoint = Checkpoint(checkpoint_of(out), [key])

            def finished(adapter: str) -> None:
                with new_folder(setting / "adapter") as folder:
                    cohort.save(adapter, folder)

            log.info("%s: one adapter for %d users", setting, len(people))
            if failed := cohort.train([user.key for user in users], finished, checkpoint=checkpoint):
                raise InputError([f"{setting}: {name}: {why}" for name, why in sorted(failed.items())])
            files = {f"adapter/{n}": known for n, known in folder_digests(setting / "adapter").items()}
            entry = {"key": key, "files": files}
            write_json(setting / "cell.json", {"users": len(people), "artefacts": {"adapter": entry}})
            checkpoint.delete()
        vouched = dict.fromkeys(entry["files"]) | {"cell.json": file_digest(setting / "cell.json")}
        write_json(out, {"files": vouched, "key": key, "mended": mended})
