"""SIGTERM, Ctrl-C and a notebook's stop button: the run is saved, says so in one line, continues.

Nothing here waits for a time: a signal is sent at a line, at a file, or at a moment of the run.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import psutil
import pytest

from reliability.harness import (
    STATUS,
    assert_ended,
    assert_one_line,
    assert_same_end,
    at,
    command,
    forked,
    moments,
    start_fork,
    start_process,
    status_of,
    train_arguments,
    train_module,
    wait_until,
)
from tinylab.exceptions import Stopped
from tinylab.recipes import smoke
from tinylab.run import checkpoint
from tinylab.run.folder import Run
from tinylab.training.train import train

pytestmark = [
    pytest.mark.promise("signals"),
    pytest.mark.skipif(sys.platform != "linux", reason="signals, and forks of this process"),
]
SET_UP = ("make_split", "make_loader", "new_state", "restore", "enter_run", "stop_signal")
"""What the set-up calls, in its order."""


@pytest.mark.parametrize("name", ["sgd", "no workers"])
def test_a_signal_at_any_moment_costs_no_bit(
    runs, undisturbed, tmp_path, full, tally, name
) -> None:
    """As in a notebook: the same process runs the cell again."""
    plan, (reference, names) = runs[name], undisturbed(name)
    for number in range(names.index("step"), len(names), 2 if full else 11):
        run, sent, after = Run(tmp_path / str(number)), list(STATUS)[number // 2 % 2], []
        at_number = at(number, lambda: signal.raise_signal(sent))  # noqa: B023

        def hook(moment: str, at_number=at_number, after=after) -> None:
            after.append(moment)
            at_number(moment)

        handlers, stopped = [signal.getsignal(each) for each in STATUS], None
        try:
            plan(run.folder, hook)
        except Stopped as error:
            stopped = error
        assert [signal.getsignal(each) for each in STATUS] == handlers
        # A step under way ends; a save goes on to the next step; the last files are written.
        assert after[number + 1 :].count("step") <= 1
        if stopped:
            assert stopped.signal == sent
            assert f"; the same command continues {run.folder}" in str(stopped)
        else:
            assert not {"step", "test of mirror images"} & {*after[number + 1 :]}
            assert run.finished
        assert_same_end(plan(run.folder), reference)
        assert run.summary["stops"] == (stopped is not None)
        tally(signals=1)


# --- The command, in forks of this process --------------------------------------------------------


@pytest.fixture
def train_command(small_dataset, tmp_path) -> Callable[[Callable], Callable[[], None]]:
    """What does a short run by the command line after the argument has changed something."""
    options = {"epochs": 2, "width": 4, "batch_size": 9}
    arguments = train_arguments(small_dataset.folder, tmp_path / "run", **options)

    def make(change: Callable[[pytest.MonkeyPatch], None]) -> Callable[[], None]:
        return lambda: (change(pytest.MonkeyPatch()), command(arguments, tmp_path / "log"))

    return make


@pytest.mark.parametrize("number", STATUS, ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize("moment", [*SET_UP, 0, 2, 3, 6])
def test_a_signal_during_the_set_up_ends_at_once(
    train_command, tmp_path, tally, number, moment
) -> None:
    """Whatever is called then, or before and after each of the first files gets its name."""

    def change(patched: pytest.MonkeyPatch) -> None:
        def call(*given, **options) -> object:
            signal.raise_signal(number)
            return real(*given, **options)

        if isinstance(moment, int):
            moments(patched, at(moment, lambda: signal.raise_signal(number)))
        else:
            real = getattr(train_module, moment)
            patched.setattr(train_module, moment, call)

    assert forked(train_command(change)) == STATUS[number]
    assert_one_line((tmp_path / "log.err").read_text())
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert forked(train_command(lambda _: None)) == 0
    assert Run(tmp_path / "run").finished
    tally(signals=1)


@pytest.mark.parametrize("number", STATUS, ids=["ctrl-c", "sigterm"])
def test_a_second_signal_ends_at_once(train_command, tmp_path, tally, number) -> None:
    """In a step that never ends, after one that was saved."""

    def hang() -> None:
        (tmp_path / "hanging").touch()
        while True:
            time.sleep(0.01)

    process = start_fork(train_command(lambda patched: moments(patched, at(1, hang, "step"))))
    wait_until((tmp_path / "hanging").exists, process.is_running)
    os.kill(process.pid, number)
    line = "stopping after this step"
    wait_until(lambda: line in (tmp_path / "log.out").read_text(), process.is_running)
    os.kill(process.pid, number)
    assert status_of(process) == STATUS[number]
    assert_one_line((tmp_path / "log.err").read_text())
    saved, _ = checkpoint.load(tmp_path / "run" / "checkpoints")
    assert (saved["epoch"], saved["step"]) == (1, 1)
    tally(signals=2)


# --- Processes as a user starts them --------------------------------------------------------------

WHILE_IMPORTING = """
import runpy, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            signal.raise_signal({number})

sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "tinylab"
runpy.run_module("tinylab", run_name="__main__")
"""


@pytest.mark.parametrize("number", STATUS, ids=["ctrl-c", "sigterm"])
def test_a_signal_while_libraries_are_imported(
    small_dataset, subprocess_environment, tmp_path, tally, number
) -> None:
    program = WHILE_IMPORTING.format(number=int(number))
    arguments = train_arguments(small_dataset.folder, tmp_path / "run")
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=subprocess_environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == STATUS[number], ended.stderr
    assert_one_line(ended.stderr)
    assert list(tmp_path.iterdir()) == []
    tally(signals=1, processes=1)


@pytest.mark.slow
def test_one_command_again_and_again(
    small_dataset, subprocess_environment, tmp_path, tally
) -> None:
    """SIGTERM and Ctrl-C to all of its processes, as from a terminal; SIGKILL to the first alone,
    whose workers then end by themselves."""
    run, options = Run(tmp_path / "run"), {"epochs": 30, "width": 4, "batch_size": 7}
    options |= {"resolution": 32, "test_resolution": 32}
    arguments = train_arguments(small_dataset.folder, run.folder, workers=2, **options)
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        process = start_process(arguments, subprocess_environment)
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines[0].startswith("device: CPU")
        before = len(run.history) if run.begun else 0
        wait_until(lambda: run.begun and len(run.history) > before, lambda: process.poll() is None)  # noqa: B023
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)
        out, err = process.communicate()
        assert_ended(workers)
        assert not run.finished
        assert f"continuing {run.folder} in epoch" in out or not before
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == STATUS[number], err
            assert_one_line(err, "stopped in epoch ")
            assert "the same command continues" in err
            saved, _ = checkpoint.load(run.checkpoints)
            assert f"in epoch {saved['epoch']} after {saved['step']} steps" in err
        tally(signals=1, processes=1)
    process = start_process(arguments, subprocess_environment)
    assert process.communicate()[1] == ""
    assert (process.returncode, run.summary["stops"]) == (0, 3)
    recipe = replace(smoke(), **options)
    reference = train(
        recipe, small_dataset, folder=tmp_path / "undisturbed",
        device="cpu", precision="fp32", quiet=True,
    )  # fmt: skip
    assert_same_end(run, reference)
