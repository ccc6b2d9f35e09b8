"""A save that is cut short at any moment, by an error, a signal or a kill, leaves a whole
checkpoint."""

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tinylab.exceptions import UserError
from tinylab.run import checkpoint
from tinylab.run.checkpoint import NEWEST, PREVIOUS, clean, load, save

pytestmark = pytest.mark.promise("saving")


def state(number: int) -> dict:
    return {"epoch": number, "step": 0, "weight": torch.full((5_000,), float(number))}


def epoch_of(folder: Path) -> int:
    """The epoch of the checkpoint that a run would continue from, all of it there."""
    loaded, _ = load(folder)
    assert loaded is not None
    assert torch.equal(loaded["weight"], state(loaded["epoch"])["weight"])
    return loaded["epoch"]


class Calls:
    """Counts every write, flush, fsync and rename of `checkpoint`, and lets one of them fail:
    before it is done, or (writes) after half of it."""

    def __init__(
        self, patched: pytest.MonkeyPatch, fail_at: int, error: Callable[[], BaseException]
    ) -> None:
        self.count, self.fail_at, self.error = 0, fail_at, error
        calls = self

        class File(io.FileIO):
            def write(self, data: bytes) -> int:
                if calls.now():
                    super().write(memoryview(data)[: len(data) // 2])
                    raise calls.error()
                return super().write(data)

            def flush(self) -> None:
                calls.check()
                super().flush()

        def opened(path: Path, mode: str) -> io.FileIO:
            calls.check()
            return File(path, mode)

        patched.setattr(checkpoint, "open", opened, raising=False)
        for name in ("fsync", "replace"):
            patched.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, real: Callable) -> Callable:
        def call(*arguments: object) -> object:
            self.check()
            return real(*arguments)

        return call

    def now(self) -> bool:
        self.count += 1
        return self.count == self.fail_at

    def check(self) -> None:
        if self.now():
            raise self.error()


def points() -> int:
    """How many such calls a save makes."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        save(Path(folder), state(1))
        calls = Calls(patched, 0, OSError)
        save(Path(folder), state(2))
        return calls.count


POINTS = range(1, points() + 1)
ERRORS = {
    "disk": lambda: OSError(28, "No space left on device"),
    "ctrl-c": KeyboardInterrupt,
    "memory": MemoryError,
}


def test_a_save_writes_flushes_syncs_and_renames() -> None:
    """Opening, two writes, flushing by hand and on closing, fsync, two renames, the folder's
    fsync."""
    assert len(POINTS) >= 8


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("point", POINTS)
def test_a_save_that_fails_anywhere_leaves_a_whole_checkpoint(
    tmp_path: Path, tally: Callable, point: int, error: str
) -> None:
    for number in (1, 2):
        save(tmp_path, state(number))
    with pytest.MonkeyPatch.context() as patched:
        calls = Calls(patched, point, ERRORS[error])
        expected = UserError if error == "disk" else ERRORS[error]
        with contextlib.suppress(expected):
            save(tmp_path, state(3))
        assert calls.count >= point
    # Only where the new one is already in place may it count.
    assert epoch_of(tmp_path) in ((2,) if point < POINTS[-1] - 1 else (2, 3))
    assert not list(tmp_path.glob("*.tmp"))
    save(tmp_path, state(4))
    assert epoch_of(tmp_path) == 4
    tally(injected=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed in a fork of this one")
@pytest.mark.parametrize("point", POINTS)
def test_a_process_killed_at_any_point_leaves_a_whole_checkpoint(
    tmp_path: Path, tally: Callable, point: int
) -> None:
    for number in (1, 2):
        save(tmp_path, state(number))
    child = os.fork()
    if child == 0:
        try:
            Calls(pytest.MonkeyPatch(), point, lambda: os._exit(9))
            save(tmp_path, state(3))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert epoch_of(tmp_path) in ((2,) if point < POINTS[-1] else (2, 3))
    clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {NEWEST, PREVIOUS}
    assert epoch_of(tmp_path) >= 2
    tally(killed_at_a_point=1)


SAVING = """
import sys, torch
from pathlib import Path
from tinylab.run.checkpoint import clean, load, save

folder = Path(sys.argv[1])
clean(folder)
found = load(folder)[0]
number = found["epoch"] if found else 0
print("ready", flush=True)
try:
    while True:
        number += 1
        save(folder, {"epoch": number, "step": 0, "weight": torch.full((11_500_000,),
        float(number))})
        print(number, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.fixture
def saving(
    subprocess_environment: dict[str, str], tmp_path: Path
) -> Iterator[Callable[[], subprocess.Popen]]:
    """A function that starts a process which saves 46 MB after 46 MB, and waits until it has done
    so once."""
    started = []

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", SAVING, str(tmp_path)]
        started.append(
            subprocess.Popen(command, env=subprocess_environment, stdout=subprocess.PIPE, text=True)
        )
        assert started[-1].stdout.readline() == "ready\n"
        assert started[-1].stdout.readline().strip().isdecimal()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "quick", "most"), [(signal.SIGKILL, 1, 30), (signal.SIGINT, 1, 12)]
)
def test_real_signals_while_46_mb_are_saved(
    saving: Callable,
    tmp_path: Path,
    full: bool,
    tally: Callable,
    number: int,
    quick: int,
    most: int,
) -> None:
    rng, seen = random.Random(int(number)), 0
    for _ in range(most if full else quick):
        process = saving()
        time.sleep(rng.uniform(0, 0.15))  # a save takes about as long: any moment of it
        out = None
        while out is None:
            process.send_signal(number)
            # Inside torch's writer, C++ that calls Python, a Ctrl-C may be swallowed; a person
            # would repeat it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, _ = process.communicate(timeout=2)
        finished = [int(line) for line in out.split() if line.isdecimal()]
        loaded, _ = load(tmp_path)
        assert loaded is not None
        assert torch.equal(loaded["weight"], torch.full((11_500_000,), float(loaded["epoch"])))
        assert loaded["epoch"] >= max(finished, default=seen) >= seen
        seen = loaded["epoch"]
        tally(**{f"{signal.Signals(number).name}_while_46_MB_are_saved": 1})
    clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {NEWEST, PREVIOUS}
