"""Runs that something happens to at a chosen moment, in forks of this process or as commands."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch
from conftest import assert_equal_runs, assert_same, without_seconds

from tinylab import files
from tinylab.recipe import Recipe
from tinylab.run import checkpoint
from tinylab.run.environment import Compute
from tinylab.run.folder import Run
from tinylab.training import step as step_module
from tinylab.training.average import WeightAverage

train_module = importlib.import_module("tinylab.training.train")

PATIENCE = 120
"""Seconds after which what should have happened counts as hanging."""
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
ON_DISK = ("half", "sync", "rename", "renamed")
"""Moments of a file that is written: half of it is, all is and has yet to reach the disk, it gets
its name (for a checkpoint after the one before has moved), it has it."""


# --- Moments --------------------------------------------------------------------------------------


def moments(patched: pytest.MonkeyPatch, hook: Callable[[str], None]) -> None:
    """Call `hook` with its name at every moment of a run, which saves after every step.

    Before a step, in its forward pass, between the update of the weights and of their average,
    after it; before each batch of a test (its title); and those `ON_DISK`.
    """

    def before(home: object, function: str, moment: str, after: str | None = None) -> None:
        real = getattr(home, function)

        def call(*arguments, **options) -> object:
            hook(moment)
            result = real(*arguments, **options)
            if after:
                hook(after)
            return result

        patched.setattr(home, function, call)

    def hooked_batches(batches, title, *rest):
        for batch in watched(batches, title, *rest):
            hook(title)
            yield batch

    @contextlib.contextmanager
    def opened(path, mode):
        with open(path, mode) as file:
            write = file.write

            class Halved:
                fileno, flush = file.fileno, file.flush

                def write(self, data) -> None:
                    half = len(data) // 2
                    write(data[:half])
                    file.flush()
                    hook("half")
                    write(data[half:])

            yield Halved()

    watched = train_module.watched
    patched.setattr(train_module, "SAVE_SECONDS", 0)
    patched.setattr(train_module, "watched", hooked_batches)
    patched.setattr(files, "open", opened, raising=False)
    before(train_module, "train_step", "step", "stepped")
    before(step_module, "batch_loss", "forward")
    before(WeightAverage, "update_parameters", "updated")
    before(os, "fsync", "sync")
    before(os, "replace", "rename", "renamed")


def at(number: int, act: Callable[[], None], only: str | None = None) -> Callable[[str], None]:
    """Return a hook that acts at the moment of that number, from 0, of all or of one name."""
    left = iter(range(number + 1))

    def hook(name: str) -> None:
        if only in (None, name) and next(left, None) == number:
            act()

    return hook


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- Runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A short run on a data set in memory: plan(folder) trains it, in this process."""

    train: Callable[..., Run]
    recipe: Recipe
    workers: int = 0
    loss_scale: bool = False
    """Loss scaling, as for fp16, and the first epoch's second step overflows."""

    def __call__(self, folder: Path, hook: Callable[[str], None] | None = None) -> Run:
        with pytest.MonkeyPatch.context() as patched:
            if self.loss_scale:
                patched.setattr(Compute, "grad_scaler", lambda _: torch.amp.GradScaler("cpu"))
                patched.setattr(train_module, "train_step", overflowing)
            if hook:
                moments(patched, hook)
            return self.train(folder, self.recipe, workers=self.workers)


def overflowing(state, *arguments, **options) -> None:
    """Do one optimiser step; the second one's gradients are not finite."""
    overflows = (state.epoch, state.step) == (1, 1)
    change = (lambda gradient: gradient * torch.inf) if overflows else (lambda gradient: None)
    hook = state.model.fc.weight.register_hook(change)
    step_module.train_step(state, *arguments, **options)
    hook.remove()


def plans(train_tiny: Callable[..., Run], rich: Recipe, narrow: Recipe) -> dict[str, Plan]:
    """Return a run of each kind: both optimisers, ways of augmentation, numbers of workers."""
    small = {"width": 4, "resolution": 32, "test_resolution": 32}
    rich = replace(rich, ramp=((16, 0.5),), **small)
    plain = replace(narrow, ema_decay=0.6, ema_bn_batches=2, **small)
    return {
        "sgd": Plan(train_tiny, rich),
        "muon": Plan(train_tiny, replace(rich, optimizer="muon")),
        "no workers": Plan(train_tiny, plain),
        "two workers": Plan(train_tiny, plain, workers=2),
        "loss scale": Plan(train_tiny, rich, loss_scale=True),
    }


def assert_same_end(run: Run, reference: Run) -> None:
    """What the runs have left is equal in every bit, the optimiser's state, too; clocks aside."""
    assert_equal_runs(run, reference)
    ours, theirs = (last_state(each) for each in (run, reference))
    assert_same(ours, theirs)


def last_state(run: Run) -> dict:
    """Return the newest checkpoint without clocks."""
    state, note = checkpoint.load(run.checkpoints)
    assert note is None
    del state["environment"]  # the commit, which a developer may have changed meanwhile
    history = [without_seconds(row) for row in state["history"]]
    return without_seconds(state) | {"history": history}


# --- Processes ------------------------------------------------------------------------------------


def start_fork(body: Callable[[], object]) -> psutil.Process:
    """Start a fork of this process that does `body`, in a session of its own."""
    pid = os.fork()
    if pid:
        return psutil.Process(pid)
    status = 1
    try:
        os.setsid()
        body()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def status_of(process: psutil.Process) -> int:
    """Wait for a fork and what it has started; return its status, negative after a signal."""
    try:
        status = process.wait(PATIENCE)
    except psutil.TimeoutExpired:
        process.kill()
        raise
    assert_ended([each for each in psutil.process_iter() if session_of(each) == process.pid])
    return int(status)


def session_of(process: psutil.Process) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(process.pid)
    return 0


def forked(body: Callable[[], object]) -> int:
    return status_of(start_fork(body))


def command(arguments: list[str], log: Path) -> None:
    """Do what `python -m tinylab` does, in a fork: `log`.out and `log`.err get its output."""
    from tinylab.cli import main

    for number, name in ((1, "out"), (2, "err")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(log.with_suffix(f".{name}"), flags), number)
    sys.stdout, sys.stderr = (open(number, "w", 1, closefd=False) for number in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os._exit(main(arguments))


def start_process(
    arguments: list[str], env: dict[str, str], module: str = "tinylab"
) -> subprocess.Popen:
    """Start `python -m` with these arguments, in a group of its own, Ctrl-C not ignored."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments], env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def train_arguments(data: Path, folder: Path, **options: object) -> list[str]:
    """Return a command that trains `smoke` on the CPU."""
    given = {"data": data, "run-folder": folder, "device": "cpu", "precision": "fp32"} | options
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in given.items())
    return ["train", "smoke", *(part for pair in pairs for part in pair)]


def assert_one_line(err: str, start: str = "") -> None:
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"tinylab: {start}"), err


def wait_until(condition: Callable[[], object], still: Callable[[], bool] = lambda: True) -> None:
    """Wait for the condition as long as `still` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert still(), "ended too early"
        assert time.monotonic() < deadline, "a process hangs"
        time.sleep(0.01)


def assert_ended(processes: list[psutil.Process]) -> None:
    """None of them is left, but for zombies of another parent."""
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
