import atexit
import gc
import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from contextlib import suppress
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from oppu import config as settings
from oppu import devices, keys, recipe, tasks
from oppu.files import file_digest
from oppu.provenance import note_run
from oppu.records import InputError
from oppu.setting import parse_augmentation, seeded

try:
    CONFIG = settings.load(config)
except InputError as error:
    raise WorkflowError(str(error)) from None
# Stricter about types: `seed: true` is no number. The package's own messages, which name the key, come first.
validate(config, workflow.source_path("../schemas/config.schema.json"), set_default=False)


RESULTS = CONFIG.results
TASKS = CONFIG.tasks
SETTINGS = ["/".join(setting) for setting in CONFIG.settings]
AUGMENTATIONS = sorted({augmentation for augmentation, *_ in CONFIG.settings})

# Jobs that load a model take a GPU each where there are any. As many run at once as there are GPUs here, unless
# `--resources gpu=…` says otherwise, or a cluster runs the jobs.
GPUS = len(devices.visible())
GPU = min(GPUS, 1)
if GPUS and "gpu" not in workflow.global_resources and workflow.nodes is None:
    workflow.register_resource("gpu", GPUS)

# Jobs know their run by this, so that `oppu end-orphans` finds those that outlived it.
os.environ.update(OPPU_RUN=str(os.getpid()))


def date_back(folder):
    """Give what is dated in the future, as after a clock was set back, an old date: beside it, a change would look old.

    Then jobs are listed that only check. What lies in users/ is no job's input.
    """
    latest = time.time() + 60
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("users", "adapter")]
        for file in (os.path.join(path, name) for name in files):
            with suppress(FileNotFoundError):  # a job at work may have taken it away
                if os.lstat(file).st_mtime > latest:
                    os.utime(file, (86400, 86400))


date_back(RESULTS)

# Little of what Snakemake makes is garbage. It is searched for less often while the graph of jobs grows (6 % of a dry
# run of the paper's grid), and not once more at the end (.7 s).
gc.set_threshold(50_000, 20, 100)
atexit.register(gc.freeze)


def choose_quickly(scheduler):
    """What Snakemake 9.27 does whenever it chooses jobs, and what makes no difference here, is left out.

    Under its default limit, 100 jobs in a second, it looks over all ready jobs once more each second for every job that
    has finished; and it measures all input files of all ready jobs, so that large ones start first. With 90 ready jobs
    of 100 users each that took half of its time.
    """

    async def no_sizes(jobs):
        pass

    if getattr(scheduler, "job_rate_limiter", None) is not None and scheduler.job_rate_limiter.timespan == 1:
        scheduler.job_rate_limiter = None
    if hasattr(scheduler, "update_input_sizes") and hasattr(scheduler, "_input_sizes"):
        scheduler.update_input_sizes, scheduler._input_sizes = no_sizes, defaultdict(int)


TASK = f"{RESULTS}/{{task}}"
SPLIT = f"{TASK}/split"
PROFILES = f"{TASK}/profiles"
BASE = f"{TASK}/{{augmentation}}/base"
SETTING = f"{TASK}/{{augmentation}}/{{peft}}/{{history}}"
LOGS = f"{RESULTS}/logs"
BENCHMARKS = f"{RESULTS}/benchmarks"


wildcard_constraints:
    task="|".join(TASKS),
    augmentation=r"((profile-)?((recency|dense)-)?k\d+|random)(-s\d+)?",
    peft="none|lora|ia3|prompt|pooled|swapped",
    history="full",
    user="u-[0-9a-f]{12}",
    cohort="[0-9]{3}[0-9]*|u-[0-9a-f]{12}",


@cache
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


def with_profile(augmentation):
    "Whether the prompts of an augmentation (`profile-k0`, `profile-k0-s1`) carry a profile."
    return parse_augmentation(seeded(augmentation)[0]).profile


def profile_stamp(w, name):
    "One stamp of a task's profiles; none where the prompts of an augmentation carry none."
    return [f"{RESULTS}/{w.task}/profiles/{name}.json"] if with_profile(w.augmentation) else []


def profiles(task, augmentation):
    "Stamps of all the profiles behind an augmentation: none where its prompts carry none."
    if not with_profile(augmentation):
        return []
    return [f"{RESULTS}/{task}/profiles/base.json", *cohorts(task, "profiles")]


def own_texts(task, keys):
    "The profiles that these users wrote themselves."
    paths = [f"{CONFIG.profiles.own}/{task}/{key}.txt" for key in keys]
    return [path for path in paths if os.path.isfile(path)]


def profile_sources(task, augmentation, keys):
    "What these users' profiles are made from, besides histories; nothing where the prompts carry none."
    if not with_profile(augmentation):
        return []
    return [f"{RESULTS}/{task}/profiles/recipe.json", *own_texts(task, keys)]


def mended(stamp):
    """A value that changes when a file that a stamp vouches for is gone, so that a plain run brings its job back.

    The job stores the value in its new stamp, so it stays the same until the next damage. A record (cell.json) that was
    put in the place of the stamp's own since, as `dvc checkout` does, is damage too. (Files with other bytes are found
    by `oppu verify`, and mended by `snakemake -R cells`.)
    """
    try:
        return _mended(stamp, os.stat(stamp).st_mtime_ns)
    except FileNotFoundError:
        return "-"
    except ValueError:
        return "unreadable"


@cache
def _mended(stamp, made):
    with open(stamp) as f:
        record = json.load(f)
    folder, files = os.path.dirname(stamp), record["files"]
    sums = files if isinstance(files, dict) else dict.fromkeys(files)
    gone = sorted(name for name, known in sums.items() if not stands(os.path.join(folder, name), made, known))
    before = record.get("mended", "-")
    return hashlib.sha256(json.dumps([before, gone]).encode()).hexdigest()[:16] if gone else before


def stands(path, made, known):
    "Whether a file is there and, where its sha256 is known and it is newer than its stamp, is still the same."
    try:
        newer = os.stat(path).st_mtime_ns > made
        return not (newer and known) or file_digest(Path(path)) == known
    except OSError:  # gone, or no file
        return False


def as_json(value):
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def fixture_files(task):
    return [
        f"{RESULTS}/fixtures/{task}/{part}_{kind}.json"
        for part in ("train", "dev")
        for kind in ("questions", "outputs")
    ]


def raw_files(task):
    "LaMP's files of a task, as they are: compressed or not, train and dev. Fixtures are made by their rule."
    if CONFIG.task_data.get(task) == "fixtures":
        return fixture_files(task)
    names = [
        f"{part}_{kind}.json{end}"
        for part in ("train", "dev")
        for kind in ("questions", "outputs")
        for end in ("", ".gz")
    ]
    folder = f"{CONFIG.folder(task)}/{task}"
    found = [path for path in (f"{folder}/{name}" for name in names) if os.path.exists(path)]
    # A download that stopped half-way must not pass for a task without train users.
    if not found or (len(found) < 4 and os.path.exists(f"{folder}/sources.json")):
        raise WorkflowError(
            f"{folder}: {len(found)} of the 4 files {{train,dev}}_{{questions,outputs}}.json[.gz] are there. LaMP's are"
            " fetched, or gone on with, by `snakemake --cores all lamp` (with the same --configfile); put others there."
        )
    return found


def to_fetch():
    "The tasks whose files are LaMP's: not made-up users, not the shipped sample, not a task of one's own."
    sample = os.path.realpath("data/sample")
    return [
        task
        for task in TASKS
        if task.startswith("LaMP_")
        and CONFIG.task_data.get(task, CONFIG.data) != "fixtures"
        and not os.path.realpath(CONFIG.folder(task)).startswith(sample + os.sep)
    ]


def model_files(w):
    "The files of the model that everything starts from, and of dense retrieval's encoder, where they are local folders."
    encoder = CONFIG.retrieval.encoder if "dense" in w.augmentation else None
    return files_of_model(CONFIG.model.path) + (files_of_model(encoder) if encoder else [])


def files_of_model(folder):
    "The files of a local model folder; a model on the hub has none here."
    if not os.path.isdir(folder):
        return []
    return sorted(
        os.path.join(folder, name) for name in os.listdir(folder) if name.endswith((".safetensors", ".json", ".bin"))
    )


def profile_model(w):
    "The files of the model that writes profiles, where it is a local folder."
    return files_of_model(CONFIG.profiles.path) if CONFIG.profiles.backend == "llm" else []


def borrowed(w):
    "Adapters that cells answer with or begin at and do not train (oppu/cells.py, source_of and start_of)."
    if w.peft == "swapped":
        return cohorts(w.task, f"{w.augmentation}/lora/{w.history}")
    begun = w.peft == "lora" and CONFIG.lora(w.task).start == "pooled"
    pooled = f"{TASK}/{w.augmentation}/pooled/{w.history}/pooled.json".format(task=w.task)
    return [pooled] if w.peft == "pooled" or begun else []


def base_users(w):
    "Base users' histories and queries; written by `split` without being declared."
    return os.path.join(os.path.dirname(checkpoints.split.get(task=w.task).output.users), "base.jsonl")


def members(w):
    "History files of a cohort; a cohort is a number or, for one cell alone, a user's key."
    everyone = users(w.task)
    if w.cohort in everyone:
        return histories(w.task, [w.cohort])
    if w.cohort.isdigit():
        return histories(
            w.task,
            everyone[int(w.cohort) * CONFIG.users_per_job :][: CONFIG.users_per_job],
        )
    raise WorkflowError(f"{w.task} has no test user {w.cohort}; `oppu users {RESULTS}/{w.task}` lists them")


def sources(w):
    """What changes when a history of a cohort does: its file or, for several users, users.json, which has their sha256.

    A thousand inputs would cost Snakemake seconds whenever it looks what is to be done.
    """
    found = members(w)
    return found if len(found) == 1 else [f"{SPLIT}/users.json".format(task=w.task)]


def paper_table(name):
    "The paper's own table, to stand beside ours; nothing where it is not at hand."
    return [path for path in [f"data/paper/{name}.csv"] if os.path.exists(path)]
