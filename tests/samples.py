"""Users of the committed sample, read without the split that other tests are about."""

from functools import cache
from pathlib import Path

from oppu import lamp
from oppu.records import Query, User
from oppu.tasks import task

FOLDER = Path(__file__).parents[1] / "data" / "sample" / "lamp"
TASKS = ("LaMP_2N", "LaMP_4", "LaMP_5")


@cache
def users(name: str, source: str) -> list[User]:
    """The users of one file of a task; all of a user's questions share one history (data/sample/README.md)."""
    own = {}
    for question in lamp.read(FOLDER, task(name)):
        if question.source == source:
            own.setdefault(question.user_id, []).append(question)
    return [
        User(id_, id_, questions[0].history, tuple(Query(q.id, q.input, q.gold) for q in questions))
        for id_, questions in own.items()
    ]
