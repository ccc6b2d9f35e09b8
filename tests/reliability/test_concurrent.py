"""Eight processes that prepare the same folder at once, some of them killed: one whole data set, built once."""

import hashlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reliability.archives import (
    group_members,
    leftovers,
    made_up,
    needs_proc,
    run,
    wait_until_gone,
    write_zip,
)
from tinylab.data import dataset
from tinylab.data.dataset import open_dataset, prepare

pytestmark = [pytest.mark.promise("concurrent"), needs_proc]

PROCESSES = 8

# Forks the processes once tinylab is imported, and lets all of them start at once. A builder notes when it begins and
# when its folder is in place, and is slow enough to be killed in between.
PREPARE_AT_ONCE = """
import hashlib, os, sys, time
from pathlib import Path
from tinylab.data import dataset

folder, count, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

def note(text):
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, f"{text} {os.getpid()}\\n".encode())
    os.close(log)

build, write = dataset._build, dataset._write_images
def noted_build(*arguments):
    note("begin")
    build(*arguments)
    note("end")
def slow_write(*arguments):
    result = write(*arguments)
    note("half")
    time.sleep(pause)
    return result
dataset._build, dataset._write_images = noted_build, slow_write

gate, opener = os.pipe()
for _ in range(count):
    if os.fork() == 0:
        os.close(opener)
        os.read(gate, 1)
        made = dataset.prepare(folder / "made.zip", folder / "ds", workers=1, progress=False)
        note("sum " + hashlib.sha256(made.images.tobytes() + made.labels.tobytes() + made.boxes.tobytes()).hexdigest())
        os._exit(0)
os.close(opener)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


def noted(folder: Path, word: str) -> list[str]:
    """What stands behind `word` in the processes' log, in order."""
    log = (folder / "log").read_text() if (folder / "log").exists() else ""
    return [
        line.removeprefix(f"{word} ") for line in log.splitlines() if line.startswith(f"{word} ")
    ]


def kill_builders(
    folder: Path, process: subprocess.Popen, kills: int, chance: random.Random
) -> None:
    """Kills one builder after the other, each when half its work is done."""
    deadline = time.monotonic() + 30
    for kill in range(kills):
        while len(noted(folder, "half")) <= kill:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        assert not (folder / "ds").exists()
        os.kill(int(noted(folder, "half")[-1]), signal.SIGKILL)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("expected")
    made = prepare(
        write_zip(folder / "made.zip", made_up()), folder / "ds", workers=1, progress=False
    )
    return hashlib.sha256(
        made.images.tobytes() + made.labels.tobytes() + made.boxes.tobytes()
    ).hexdigest()


def trials(full: bool) -> list[int]:
    """How many builders to kill, by trial."""
    return [0, 1, 2, 0, 1, 3, 0, 7, 1, 0, 1, 2] if full else [0, 1]


def test_processes_that_prepare_at_once_build_once(tmp_path, expected, full, tally):
    chance = random.Random(0)
    for trial, kills in enumerate(trials(full)):
        folder = tmp_path / f"{trial}"
        folder.mkdir()
        write_zip(folder / "made.zip", made_up())
        process = run(PREPARE_AT_ONCE, str(folder), str(PROCESSES), "1.0" if kills else "0.2")
        kill_builders(folder, process, kills, chance)
        _, errors = process.communicate(timeout=60)
        assert not errors.replace(
            f"another process is preparing {folder / 'ds'}; waiting for it", ""
        ).strip()
        sums = [line.split()[0] for line in noted(folder, "sum")]
        assert sums == [expected] * (PROCESSES - kills)
        assert len(noted(folder, "begin")) == kills + 1
        assert len(noted(folder, "end")) == 1
        assert leftovers(folder) == {"ds", "log"}
        tally(processes=PROCESSES, builders_killed=kills, right=len(sums), whole_builds=1)


def test_a_second_look_after_waiting(tmp_path, monkeypatch, tally):
    """The data set that another process finished while this one waited for the lock is opened, not built again."""
    write_zip(tmp_path / "made.zip", made_up())
    prepare(tmp_path / "made.zip", tmp_path / "other", workers=1, progress=False)
    locked = dataset.archive.locked

    def slow_lock(path: Path, waiting: str = ""):
        (tmp_path / "other").rename(tmp_path / "ds")
        return locked(path, waiting)

    monkeypatch.setattr(dataset.archive, "locked", slow_lock)
    monkeypatch.setattr(dataset, "_build", lambda *_: pytest.fail("built again"))
    assert len(prepare(tmp_path / "made.zip", tmp_path / "ds", workers=1, progress=False)) == 18
    tally(processes=2, right=2)


# --- One builder with workers of its own ------------------------------------------------------------------------------


@pytest.fixture
def builder(tmp_path) -> Iterator[subprocess.Popen]:
    """A process that prepares with two workers, so slowly that it is still at it when the test stops it."""
    zipped = write_zip(tmp_path / "made.zip", made_up())
    process = run(f"""
        import time
        from tinylab.data import dataset
        decode = dataset._decode
        dataset._decode = lambda *arguments: (time.sleep(0.2), decode(*arguments))[1]
        dataset._CHUNK_IMAGES = 2
        dataset.prepare({str(zipped)!r}, {str(tmp_path / "ds")!r}, workers=2)
    """)
    deadline = time.monotonic() + 30
    while len(group_members(process.pid)) < 3 or not list(
        tmp_path.glob("ds.building-*/images.npy")
    ):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)  # the workers are decoding
    yield process
    for pid in group_members(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_ctrl_c_ends_all_processes_and_leaves_nothing(tmp_path, builder):
    os.killpg(builder.pid, signal.SIGINT)
    errors = builder.communicate(timeout=20)[1]
    assert builder.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1
    wait_until_gone(builder.pid)
    assert leftovers(tmp_path) == set()


def test_after_a_killed_builder_nothing_runs_on_and_the_next_one_tidies_up(
    tmp_path, builder, tally
):
    os.kill(builder.pid, signal.SIGKILL)
    wait_until_gone(builder.pid)
    assert len(leftovers(tmp_path)) == 1
    assert not (tmp_path / "ds").exists()
    assert len(prepare(tmp_path / "made.zip", tmp_path / "ds", progress=False)) == 18
    assert leftovers(tmp_path) == {"ds"}
    tally(builders_killed=1, whole_builds=1)


def test_a_killed_worker_is_one_line(tmp_path, builder):
    worker = max(group_members(builder.pid))
    os.kill(worker, signal.SIGKILL)
    errors = builder.communicate(timeout=20)[1]
    assert "UserError: a worker process was killed" in errors
    assert leftovers(tmp_path) == set()


def test_the_next_one_opens_what_a_builder_left_whole(tmp_path):
    """A builder killed right after the renaming has left nothing to do but to open it."""
    write_zip(tmp_path / "made.zip", made_up())
    prepare(tmp_path / "made.zip", tmp_path / "ds", workers=1, progress=False)
    (tmp_path / "made.zip").unlink()
    assert (
        len(open_dataset(tmp_path / "ds"))
        == len(prepare("nowhere", tmp_path / "ds", progress=False))
        == 18
    )
