"""A run that is killed continues from its newest whole checkpoint, and ends with the bits of one that was not."""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reliability.harness import (
    Children,
    Event,
    Kill,
    Plan,
    children_of,
    differing,
    plans,
    reference,
)
from tinylab.data.dataset import Dataset

pytestmark = [
    pytest.mark.promise("kill"),
    pytest.mark.skipif(
        sys.platform != "linux", reason="children are forked from a server, and killed by SIGKILL"
    ),
]

PLACES_OF_A_SAVE = (
    (Event.SAVE, 1),
    (Event.WRITE, 1),
    (Event.SYNC, 1),
    (Event.RENAME, 1),
    (Event.RENAMED, 1),
    (Event.RENAME, 2),
    (Event.RENAMED, 2),
    (Event.SYNC, 2),
)
"""Begun, half written, written, the newest not yet and already the previous, the new one not yet and already in place,
the folder not yet flushed."""


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    with children_of() as children:
        yield children


@pytest.mark.slow
def test_a_save_killed_at_each_of_its_places_costs_one_step_at_most(
    children: Children, small_dataset: Dataset, tmp_path: Path, tally: Callable
) -> None:
    plan = plans(small_dataset)["sgd"]
    places = iter(PLACES_OF_A_SAVE)

    def next_kill(done: int, _position: int) -> Kill | None:
        event, time = next(places, (None, 0))
        per_save = 2 if event in (Event.SYNC, Event.RENAME, Event.RENAMED) else 1
        save = 2 if done == 0 else 1  # the first of all is left whole
        # The very first save has nothing to keep: one rename less.
        return event and Kill(event, (save - 1) * per_save + time, held=True)

    tale = children.killed(plan, tmp_path / "run", next_kill)
    assert tale.error is None
    assert tale.kills == tale.in_save == len(PLACES_OF_A_SAVE)
    # A save counts once its file has its name.
    assert tale.resumed == [1, 1, 1, 1, 1, 1, 2, 3]
    different = differing(tale.folder, reference(children, plan))
    tally(kills=tale.kills, inside_a_save=tale.in_save, runs_different=bool(different))
    assert not different


@pytest.mark.slow
def test_a_run_killed_anywhere_ends_the_same(
    children: Children, small_dataset: Dataset, tmp_path: Path, full: bool, tally: Callable
) -> None:
    rng = random.Random(0)
    kills = in_save = runs = 0
    resumed, different = [], []
    for name, plan in plans(small_dataset).items():
        wanted = 48 if full else 8
        while wanted > 0:
            tale = children.killed(
                plan, tmp_path / f"{name}{wanted}" / "run", random_kills(rng, plan, min(wanted, 12))
            )
            assert tale.error is None, f"{name}: {tale.error}"
            if parts := differing(tale.folder, reference(children, plan)):
                different.append(f"{name}: {', '.join(parts)}")
            resumed += tale.resumed
            kills, in_save, runs, wanted = (
                kills + tale.kills,
                in_save + tale.in_save,
                runs + 1,
                wanted - tale.kills,
            )
    tally(
        kills=kills,
        inside_a_save=in_save,
        runs=runs,
        resume_steps=len(set(resumed)),
        runs_different=len(different),
    )
    assert not different
    assert kills >= (192 if full else 32)
    assert in_save >= 0.4 * kills
    assert len(resumed) == kills
    assert min(resumed) > 0, "a child began anew"
    assert len(set(resumed)) >= (15 if full else 10)


def random_kills(rng: random.Random, plan: Plan, kills: int) -> Callable[[int, int], Kill | None]:
    """`kills` kills spread over a run, more than half of them inside a save."""

    def choose(done: int, position: int) -> Kill | None:
        if done >= kills:
            return None
        first = 2 if done == 0 else 1  # the first save must be complete
        ahead = 2 * (plan.steps - position) / (kills - done + 1)
        count = rng.randint(first, max(first, round(ahead)))
        kind = rng.random()
        if kind < 0.2:
            return Kill(Event.SAVE, count, delay=rng.uniform(0, 0.03))
        if kind < 0.65:
            event, compute = rng.choice(PLACES_OF_A_SAVE)
            per_save = 2 if event in (Event.SYNC, Event.RENAME, Event.RENAMED) else 1
            return Kill(event, (count - 1) * per_save + compute, held=True)
        if kind < 0.9:
            return Kill(Event.STEP, count, delay=rng.uniform(0, 0.02))
        # The first files of a run, and what it finds on its start, come before there is anything to lose.
        events = [Event.STEPPED, Event.TEST] + ([Event.LOADED, Event.RECORD] if done else [])
        return Kill(rng.choice(events), first, held=True)

    return choose
