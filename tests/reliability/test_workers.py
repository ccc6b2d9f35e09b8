"""Worker processes help and do not decide: whatever their number, and whether they live on, the bits are the same."""

import contextlib
import random
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
from conftest import assert_equal_runs

from reliability.harness import (
    Children,
    Event,
    Kill,
    Plan,
    children_of,
    differing,
    plain_recipe,
    reference,
    send,
)
from tinylab.data import loader
from tinylab.data.dataset import Dataset
from tinylab.recipe import Recipe
from tinylab.run.folder import Run
from tinylab.training import train as train_module
from tinylab.training.train import Stopped, train

pytestmark = pytest.mark.promise("workers")

ORPHANS_END = 10
"""Seconds in which workers whose process was killed must have ended; torch's look for it every five."""


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Two epochs of four steps."""
    return plain_recipe(epochs=2, batch_size=7)


def run(recipe: Recipe, dataset: Dataset, folder: Path, workers: int) -> Run:
    settings = {"device": "cpu", "precision": "fp32", "quiet": True}
    return train(recipe, dataset, folder=folder, workers=workers, **settings)


@pytest.fixture(scope="module")
def alone(recipe: Recipe, small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run without workers."""
    return run(recipe, small_dataset, tmp_path_factory.mktemp("alone") / "run", workers=0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Workers of the loaders that runs have made, and whether they live on from epoch to epoch."""
    loaders, real = [], loader.DataLoader

    def watched(*arguments: object, **options: object) -> torch.utils.data.DataLoader:
        loaders.append((options["num_workers"], options["persistent_workers"]))
        return real(*arguments, **options)

    monkeypatch.setattr(loader, "DataLoader", watched)
    return loaders


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "anew"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_do_not_change_a_bit(
    recipe: Recipe,
    small_dataset: Dataset,
    alone: Run,
    made: list[tuple[int, bool]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tally: Callable,
    workers: int,
    persistent: bool,
) -> None:
    if not persistent:
        watched = loader.DataLoader
        options = {"persistent_workers": False}
        monkeypatch.setattr(
            loader, "DataLoader", lambda *args, **given: watched(*args, **(given | options))
        )
    before = set(psutil.Process().children())
    helped = run(recipe, small_dataset, tmp_path / "run", workers)
    assert made == [(workers, persistent)]
    tally(runs=1)
    assert_equal_runs(helped, alone)
    assert set(psutil.Process().children()) <= before, "a worker has outlived its run"


def test_another_number_of_workers_continues_a_run(
    recipe: Recipe,
    small_dataset: Dataset,
    alone: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tally: Callable,
) -> None:
    """Stopped in the midst of either epoch, with batches that workers have prepared ahead."""
    real, count = train_module.train_step, iter(range(1, 100))

    def stopping(*arguments: object) -> None:
        real(*arguments)
        if next(count) in (2, 5):
            send(signal.SIGTERM)

    monkeypatch.setattr(train_module, "train_step", stopping)
    for workers in (2, 0):
        with pytest.raises(Stopped):
            run(recipe, small_dataset, tmp_path / "run", workers)
    tally(resumes=2)
    assert_equal_runs(run(recipe, small_dataset, tmp_path / "run", 1), alone)


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    with children_of() as children:
        yield children


@pytest.fixture
def workers() -> Iterator[list[psutil.Process]]:
    """Worker processes, killed at the end should they still run."""
    processes = []
    yield processes
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="children are forked from a server, and killed by SIGKILL"
)
def test_a_killed_run_leaves_no_worker_and_ends_the_same(
    children: Children,
    workers: list[psutil.Process],
    recipe: Recipe,
    small_dataset: Dataset,
    tmp_path: Path,
    full: bool,
    tally: Callable,
) -> None:
    if not full:
        pytest.skip("with --soak only: workers of a killed process take five seconds to see it")
    rng, plan = random.Random(0), Plan(recipe, small_dataset.folder, workers=2)

    def next_kill(done: int, position: int) -> Kill | None:
        if done >= 4:
            return None
        count = 1 if done else 2
        count = rng.randint(count, max(count, (plan.steps - position) // 3))
        return rng.choice(
            [
                Kill(Event.STEP, count, delay=rng.uniform(0, 0.01)),
                Kill(Event.SAVE, count, held=True),
            ]
        )

    def note_workers(_folder: Path, process: BaseProcess) -> None:
        workers[:] = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2  # and what Python itself has started

    def wait_for_workers(_folder: Path) -> None:
        _, alive = psutil.wait_procs(workers, timeout=ORPHANS_END)
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE], (
            "workers have outlived their run"
        )

    kills = 0
    while kills < 16:
        tale = children.killed(
            plan, tmp_path / str(kills) / "run", next_kill, note_workers, wait_for_workers
        )
        assert tale.error is None
        assert min(tale.resumed) > 0
        kills += tale.kills
        tally(kills=tale.kills)
        assert differing(tale.folder, reference(children, plan)) == []
