import hashlib
import json
import os
from functools import lru_cache

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from oppu import config as settings
from oppu import recipe
from oppu.records import InputError

validate(config, workflow.source_path("../schemas/config.schema.json"))
try:
    CONFIG = settings.load(config)
except InputError as error:
    raise WorkflowError(str(error)) from None


RESULTS = CONFIG.results
TASKS = CONFIG.tasks
SETTINGS = [f"{a}/{p}/{h}" for a in CONFIG.augmentations for p in CONFIG.peft for h in CONFIG.history]

TASK = RESULTS + "/{task}"
SPLIT = TASK + "/split"
BASE = TASK + "/{augmentation}/base"
SETTING = TASK + "/{augmentation}/{peft}/{history}"
LOGS = RESULTS + "/logs"
BENCHMARKS = RESULTS + "/benchmarks"


wildcard_constraints:
    task="|".join(TASKS),
    augmentation=r"(profile-)?k\d+|random",
    peft="none|lora",
    history="full",
    user="u-[0-9a-f]{12}",
    cohort="[0-9]{3}|u-[0-9a-f]{12}",


@lru_cache
def _users(path, mtime):
    with open(path) as f:
        return json.load(f)["users"]


def users(task):
    "Keys of a task's test users, sorted; they are known once `split` has run."
    path = str(checkpoints.split.get(task=task).output.users)
    return _users(path, os.stat(path).st_mtime_ns)


def histories(task, keys):
    return [f"{RESULTS}/{task}/split/histories/{key}.json" for key in keys]


def cohorts(task, setting):
    "Stamps of all cohorts of a setting."
    count = -(-len(users(task)) // CONFIG.users_per_job)
    return [f"{RESULTS}/{task}/{setting}/cohorts/{number:03d}.json" for number in range(count)]


def mended(stamp):
    """A value that changes when a file that a stamp vouches for is gone, so that a plain run brings its job back.

    The job stores the value in its new stamp, so it stays the same until the next damage. (Files with other bytes are
    found by `oppu verify`, and mended by `snakemake -R cells`.)
    """
    try:
        with open(stamp) as f:
            record = json.load(f)
    except (FileNotFoundError, ValueError):
        return ""
    folder = os.path.dirname(stamp)
    gone = sorted(name for name in record["files"] if not os.path.exists(os.path.join(folder, name)))
    before = record.get("mended", "")
    return hashlib.sha256(json.dumps([before, gone]).encode()).hexdigest()[:16] if gone else before


def as_json(value):
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
