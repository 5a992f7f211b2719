"""Made-up scored settings and references, shared by the tests of what is built on them."""

import numpy as np

from oppu.boards import Bootstrap, Setting
from oppu.scores import score_texts
from oppu.tasks import task

HOW = Bootstrap(resamples=200, seed=0)
NEWS, RATING, TITLES = task("LaMP_2N"), task("LaMP_3"), task("LaMP_5")


def answers(of, users, right, seed):
    """Queries of users, and an answer to each that is right with the given chance."""
    rng = np.random.default_rng(seed)
    pool = of.labels or ["a study of parsing", "tagging for everyone", "on words", "a corpus of verbs"]
    keys = [(f"u-{u:02}", f"{u}-{q}") for u in range(users) for q in range(5)]
    golds = [pool[i] for i in np.random.default_rng(99).integers(len(pool), size=len(keys))]
    given = {k: g if rng.random() < right else pool[0] for k, g in zip(keys, golds, strict=True)}
    queries = [{"user": user, "id": id_, "gold": gold} for (user, id_), gold in zip(keys, golds, strict=True)]
    return queries, given


def setting(of, augmentation, peft, right, seed=0, history="full", users=20, repeat=0):
    queries, given = answers(of, users, right, seed)
    return Setting(of, augmentation, peft, history, score_texts(of, queries, given).scored, repeat)


def both(of, augmentation="k0"):
    return [setting(of, augmentation, "none", 0.4), setting(of, augmentation, "lora", 0.8, seed=1)]


def reference(of, right, seed=7):
    return setting(of, "k0", "none", right, seed).scored
