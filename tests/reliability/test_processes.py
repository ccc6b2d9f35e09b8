"""Two processes train one run: whichever is killed, or told to stop, none is left, and the run ends the same."""

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import assert_equal_runs

from reliability.harness import (
    PATIENCE,
    Board,
    Event,
    launch,
    launch_run,
    undisturbed_run_of_two,
    wait_until,
)
from tinylab.data.dataset import Dataset
from tinylab.run import checkpoint
from tinylab.run.folder import Run

pytestmark = [
    pytest.mark.promise("processes"),
    pytest.mark.skipif(
        sys.platform != "linux", reason="elsewhere processes are not told that their parent is gone"
    ),
]

AT_MOST = 15
"""Seconds after which all processes must have ended."""

WAITING = """
import os, sys, time
from pathlib import Path
import torch
from tinylab.training.distributed import highest, join

with join(torch.device("cpu")) as world:
    (Path(sys.argv[1]) / f"{world.rank}.pid").write_text(str(os.getpid()))
    for step in range(10_000):
        highest(world, 0)
        time.sleep(0.01)
"""


@pytest.fixture
def group() -> Iterator[list[psutil.Process]]:
    """Processes that are killed at the end, should they still run."""
    processes = []
    yield processes
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="module")
def run_of_two(
    small_dataset: Dataset, subprocess_environment: dict, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A run of two processes that nothing disturbed. Read only."""
    return undisturbed_run_of_two(
        small_dataset, subprocess_environment, lambda: tmp_path_factory.mktemp("two")
    )


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    def lives(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [each for each in processes if lives(each)]


def assert_all_end(
    launcher: subprocess.Popen, processes: list[psutil.Process], since: float
) -> str:
    """None hangs, none is left; returns what they wrote to standard error."""
    _, err = launcher.communicate(timeout=max(0.1, since + AT_MOST - time.monotonic()))
    wait_until(lambda: not alive(processes), max(0.1, since + AT_MOST - time.monotonic()))
    return err


def disturb(launcher: subprocess.Popen, ranks: dict[int, psutil.Process], what: str) -> None:
    if what == "launcher killed":
        launcher.kill()
    elif what == "launcher told":
        launcher.send_signal(signal.SIGTERM)
    else:
        ranks[int(what[-1])].kill()


def ranks_of(launcher: subprocess.Popen) -> dict[int, psutil.Process]:
    """The launcher's processes by rank."""
    children = psutil.Process(launcher.pid).children()
    return {int(each.environ()["RANK"]): each for each in children if "RANK" in each.environ()}


INCIDENTS = ("rank 1", "launcher told", "launcher killed", "rank 0")


@pytest.mark.slow
def test_two_processes_disturbed_again_and_again_end_the_same(
    run_of_two: Run,
    small_dataset: Dataset,
    subprocess_environment: dict[str, str],
    group: list,
    tmp_path: Path,
    full: bool,
    tally: Callable,
) -> None:
    """In each run one incident after the other, within a step or a save, after at least one more step was saved."""
    rng = random.Random(0)
    for number, incidents in enumerate(
        [INCIDENTS, INCIDENTS, INCIDENTS[:2]] if full else [INCIDENTS[:2]]
    ):
        folder, resumed = tmp_path / str(number) / "run", []
        folder.parent.mkdir()
        for which, what in enumerate([*incidents, None]):
            boards = tmp_path / f"boards{number}-{which}"
            boards.mkdir()
            board = Board(boards / "0")
            launcher = launch_run(small_dataset, folder, subprocess_environment, boards)
            group.append(psutil.Process(launcher.pid))
            if what is None:
                _, err = launcher.communicate(timeout=2 * PATIENCE)
                assert launcher.returncode == 0, err
                resumed.append(board.resumed)
                continue
            event, count = rng.choice([(Event.STEP, 2), (Event.WRITE, 2), (Event.SYNC, 3)])
            wait_until(
                lambda board=board, event=event, count=count: board.count(event) >= count,
                2 * PATIENCE,
            )
            ranks = ranks_of(launcher)
            assert sorted(ranks) == [0, 1]
            group += ranks.values()
            since = time.monotonic()
            disturb(launcher, ranks, what)
            err = assert_all_end(launcher, list(ranks.values()), since)
            assert launcher.returncode != 0
            if what == "launcher told":
                assert err.count("tinylab: stopped in epoch") == 1, err
            assert not Run(folder).finished
            assert checkpoint.load(folder / "checkpoints")[0] is not None
            resumed.append(board.resumed)
            tally(incidents=1)
        assert resumed[0] == 0 < resumed[1]
        assert resumed == sorted(resumed)
        assert_equal_runs(Run(folder), run_of_two)


def test_killing_the_launcher_leaves_no_process(
    tmp_path: Path, subprocess_environment: dict[str, str], group: list, tally: Callable
) -> None:
    """However idle its processes are."""
    (tmp_path / "script.py").write_text(WAITING)
    launcher = launch("script.py", str(tmp_path), environment=subprocess_environment, cwd=tmp_path)
    group.append(psutil.Process(launcher.pid))
    files = [tmp_path / f"{rank}.pid" for rank in range(2)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    processes = [psutil.Process(int(file.read_text())) for file in files]
    group += processes
    assert len(alive(processes)) == 2
    launcher.kill()
    assert_all_end(launcher, processes, time.monotonic())
    tally(incidents=1)
