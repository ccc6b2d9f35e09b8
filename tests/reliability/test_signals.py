"""SIGTERM, Ctrl-C and a notebook's stop button: the run is saved, ends within five seconds, and says so in one line."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import assert_equal_runs, without_seconds

from reliability.harness import (
    PATIENCE,
    Board,
    Children,
    Event,
    Kill,
    Plan,
    children_of,
    differing,
    plain_recipe,
    reference,
    rich_recipe,
    train_plan,
)
from tinylab.cli import main
from tinylab.data.dataset import Dataset
from tinylab.recipes import accurate, published, smoke
from tinylab.run import checkpoint
from tinylab.run.folder import Run
from tinylab.training.train import train

pytestmark = [
    pytest.mark.promise("signals"),
    pytest.mark.skipif(sys.platform != "linux", reason="children are forked from a server"),
]

AT_MOST = 5
"""Seconds from the signal to the end of the process."""
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    with children_of() as children:
        yield children


# --- The command line in children that tell where they are ------------------------------------------------------------


def arguments(plan: Plan, folder: Path) -> list[str]:
    """The command that trains the plan."""
    given = [
        "train",
        plan.recipe.name,
        "--data",
        str(plan.data),
        "--run",
        str(folder),
        "--device",
        "cpu",
    ]
    given += ["--precision", plan.precision]
    base = {"accurate": accurate, "smoke": smoke, "published": published}[plan.recipe.name]()
    for name in (
        "epochs",
        "batch_size",
        "width",
        "resolution",
        "test_resolution",
        "ema_decay",
        "ema_bn_batches",
    ):
        if getattr(plan.recipe, name) != getattr(base, name):
            given += [f"--{name.replace('_', '-')}", str(getattr(plan.recipe, name))]
    return given


def command_line(plan: Plan, folder: Path) -> None:
    """What `python -m tinylab` does, its standard error in a file."""
    os.dup2(os.open(folder.with_name("stderr"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(arguments(plan, folder)))


@dataclass(frozen=True)
class Ended:
    """How a child that got a signal has ended."""

    status: int
    stderr: str
    seconds: float
    steps: int
    """Whole steps of it before the signal."""


def signalled(
    children: Children,
    plan: Plan,
    folder: Path,
    when: Kill,
    number: int,
    patience: float = PATIENCE,
) -> Ended:
    """A child that gets a signal then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"board-{number}-{time.monotonic_ns()}")
    board = Board(path)
    process = children.start(plan, folder, path, command_line)
    assert not children.wait(process, board, when, patience), folder.with_name("stderr").read_text()
    steps, sent = board.count(Event.STEPPED), time.monotonic()
    os.kill(process.pid, number)
    process.join(PATIENCE)
    return Ended(
        process.exitcode, folder.with_name("stderr").read_text(), time.monotonic() - sent, steps
    )


def assert_stopped(ended: Ended, folder: Path, number: int) -> None:
    assert ended.status == STATUS[number], ended.stderr
    assert ended.seconds <= AT_MOST
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith("tinylab: stopped" if ended.steps else "tinylab: ")
    saved, notice = checkpoint.load(folder / "checkpoints")
    assert notice is None
    if ended.steps:
        assert saved is not None


def named_plans(dataset: Dataset) -> list[Plan]:
    """Two small runs whose recipes the command line knows."""
    rich = replace(accurate(), **sizes(rich_recipe()), ema_decay=0.6, ema_bn_batches=2)
    plain = replace(smoke(), **sizes(plain_recipe()), ema_decay=0.6, ema_bn_batches=2)
    return [Plan(rich, dataset.folder), Plan(plain, dataset.folder)]


def sizes(recipe: object) -> dict:
    return {
        name: getattr(recipe, name)
        for name in ("epochs", "batch_size", "width", "resolution", "test_resolution")
    }


@pytest.mark.slow
def test_a_signal_anywhere_saves_and_the_run_ends_the_same(
    children: Children, small_dataset: Dataset, tmp_path: Path, full: bool, tally: Callable
) -> None:
    rng, slowest = random.Random(0), 0.0
    places = [
        Event.STEP,
        Event.TEST,
        Event.SAVE,
        Event.WRITE,
        Event.RENAME,
        Event.STEPPED,
        Event.SAVED,
        Event.LOADED,
    ]
    for number, plan in enumerate(named_plans(small_dataset)):
        folder = tmp_path / str(number) / "run"
        for which in range(10 if full else 3):
            # Every signal costs at least the step under way, so that the run comes forward by few.
            event = places[which % 3] if not full else places[which % len(places)]
            when = Kill(event, 1 if which or event == Event.TEST else 2, delay=rng.uniform(0, 0.01))
            if Run(folder).finished:
                break
            kind = rng.choice([signal.SIGINT, signal.SIGTERM])
            ended = signalled(children, plan, folder, when, kind)
            tally(signals=1)
            if ended.status == 0:  # the last test was over
                break
            assert_stopped(ended, folder, kind)
            slowest = max(slowest, ended.seconds)
        train_plan(plan, folder)
        assert differing(folder, reference(children, plan)) == []
    assert slowest <= AT_MOST


def notebook(plan: Plan, folder: Path) -> None:
    """A cell that is interrupted, and run again in the same kernel."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        train_plan(plan, folder)
    except KeyboardInterrupt as interrupt:
        folder.with_name("interrupt").write_text(str(interrupt))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train_plan(plan, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "event", [Event.STEP, Event.SYNC, Event.TEST], ids=lambda event: event.name.lower()
)
def test_a_notebook_cell_interrupted_and_run_again_ends_the_same(
    children: Children, small_dataset: Dataset, tmp_path: Path, tally: Callable, event: Event
) -> None:
    plan, board = named_plans(small_dataset)[0], Board(tmp_path / "board")
    process = children.start(plan, tmp_path / "run", tmp_path / "board", notebook)
    assert not children.wait(process, board, Kill(event, 3 if event == Event.STEP else 2))
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    tally(signals=1)
    assert process.exitcode == 0
    assert "the same command continues" in (tmp_path / "interrupt").read_text()
    assert Run(tmp_path / "run").summary["stops"] == 1
    assert differing(tmp_path / "run", reference(children, plan)) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", STATUS, ids=["ctrl-c", "sigterm"])
def test_a_step_of_many_seconds_does_not_hold_a_signal_up(
    children: Children,
    sample_dataset: Dataset,
    tmp_path: Path,
    full: bool,
    tally: Callable,
    number: int,
) -> None:
    """ResNet-18 in full, 256 images per step, on one thread: the step under way is given up, and leaves no trace."""
    if not full:
        pytest.skip("with --soak only: its steps take many seconds")
    recipe = replace(smoke(), epochs=1, batch_size=256, width=64, resolution=64, test_resolution=64)
    plan = Plan(recipe, sample_dataset.folder, images=420)
    folder = tmp_path / "run"
    began = time.monotonic()
    ended = signalled(children, plan, folder, Kill(Event.STEP, 2, delay=2), number, 8 * PATIENCE)
    tally(signals=1)
    assert time.monotonic() - began > 3 * AT_MOST, "the steps are too short to show anything"
    assert_stopped(ended, folder, number)
    assert ended.steps == 1
    states = [
        checkpoint.read(folder / "checkpoints" / name)
        for name in (checkpoint.NEWEST, checkpoint.PREVIOUS)
    ]
    assert [state["step"] for state in states] == [1, 1]
    for part in ("model", "totals", "skips"):
        ours, before = (state[part] if part == "model" else {part: state[part]} for state in states)
        assert all(torch.equal(ours[name], before[name]) for name in before), part


# --- Processes as a user starts them ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """What is started in the background of a shell ignores Ctrl-C, and would hand that down."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def start(
    small_dataset: Dataset, subprocess_environment: dict[str, str], tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen]]:
    """A function that starts `tinylab train` in a process group of its own; what still runs at the end is killed."""
    started = []

    def call(*options: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "tinylab",
            "train",
            "smoke",
            "--data",
            str(small_dataset.folder),
        ]
        command += [
            "--run",
            str(tmp_path / "run"),
            "--width",
            "16",
            "--precision",
            "fp32",
            "--device",
            "cpu",
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        settings = {"env": subprocess_environment, "start_new_session": True} | pipes
        started.append(subprocess.Popen([*command, *options], **settings))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 2 * PATIENCE
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {path.name} after two minutes"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_process_continues_and_ends_the_same(
    start: Callable,
    small_dataset: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tally: Callable,
) -> None:
    killed = start("--epochs", "6")
    wait_for(tmp_path / "run" / "checkpoints" / checkpoint.PREVIOUS, killed)
    killed.kill()
    killed.communicate()
    tally(processes=1)
    run = Run(tmp_path / "run")
    assert not run.finished
    saved, _ = checkpoint.load(run.checkpoints)
    assert saved["epoch"] > 1

    assert main(killed.args[3:]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert (
        f"continuing {run.folder} in epoch {saved['epoch']} after {saved['step']} of its steps"
        in out
    )
    assert run.summary["stops"] == 1
    options = {"precision": "fp32", "device": "cpu", "quiet": True}
    assert_equal_runs(
        run, train(run.recipe, small_dataset, folder=tmp_path / "unkilled", **options)
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", STATUS, ids=["ctrl-c", "sigterm"])
def test_a_signal_to_the_whole_group_stops_a_process_in_one_line(
    start: Callable, tmp_path: Path, tally: Callable, number: int
) -> None:
    """Ctrl-C in a terminal reaches the worker processes as well."""
    process = start("--epochs", "400", "--workers", "2")
    wait_for(tmp_path / "run" / "checkpoints" / checkpoint.NEWEST, process)
    sent = time.monotonic()
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=PATIENCE)
    tally(processes=1)
    assert time.monotonic() - sent <= AT_MOST
    assert process.returncode == STATUS[number], err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("tinylab: stopped in epoch ")
    assert "Traceback" not in out + err
    saved, notice = checkpoint.load(tmp_path / "run" / "checkpoints")
    assert notice is None
    assert f"in epoch {saved['epoch']} after {saved['step']} steps" in err
    assert without_seconds(Run(tmp_path / "run").history[0])["epoch"] == 1


@pytest.mark.slow
def test_a_signal_during_the_set_up_ends_a_process_in_one_line(
    start: Callable, tmp_path: Path, full: bool, tally: Callable
) -> None:
    """It may come while libraries are imported, too: there is nothing to save, and nothing left half done."""
    rng = random.Random(1)
    for number in [signal.SIGTERM, signal.SIGINT] * (3 if full else 1):
        process = start("--epochs", "400")
        if number == signal.SIGTERM:
            assert process.stdout.readline().startswith("device: ")
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.5, 2))
        sent = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
        tally(processes=1)
        assert time.monotonic() - sent <= AT_MOST
        assert process.returncode == STATUS[number], err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("tinylab: ")
        assert "Traceback" not in out + err
