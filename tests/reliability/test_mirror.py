"""The second home of checkpoints: whatever happens to it, training goes on, and the newest whole checkpoint counts."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_equal_runs

from tinylab.data.dataset import Dataset
from tinylab.exceptions import UserError
from tinylab.files import lock
from tinylab.recipe import Recipe
from tinylab.run import checkpoint
from tinylab.run import mirror as mirror_module
from tinylab.run.checkpoint import NEWEST, PREVIOUS, find, save
from tinylab.run.folder import Run
from tinylab.run.mirror import Mirror, copy
from tinylab.training import train as train_module
from tinylab.training.step import TrainState
from tinylab.training.train import Stopped

pytestmark = pytest.mark.promise("mirror")

TrainTiny = Callable[..., Run]


def state(number: int) -> dict:
    return {"epoch": number, "step": 0, "weight": torch.full((5_000,), float(number))}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A function: the next run is told to stop after that step of that epoch."""
    real = train_module.train_step

    def install(epoch: int, step: int) -> None:
        def stopping_step(state: TrainState, *arguments: object) -> None:
            real(state, *arguments)
            if (state.epoch, state.step) == (epoch, step):
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(train_module, "train_step", stopping_step)

    return install


# --- A run with a second home -----------------------------------------------------------------------------------------


def test_a_run_whose_machine_is_gone_continues_from_the_mirror_to_the_same_bits(
    train_tiny: TrainTiny,
    finished_run: Run,
    tmp_path: Path,
    stopping: Callable,
    tally: Callable,
    capsys,
) -> None:
    home, mirror = tmp_path / "run", tmp_path / "drive" / "run"
    for epoch, step in ((1, 2), (2, 1), (2, 3)):
        stopping(epoch, step)
        with pytest.raises(Stopped):
            train_tiny(home, mirror=mirror)
        assert files(mirror) <= {NEWEST, PREVIOUS}
        assert find(mirror).progress == (epoch, step)
        shutil.rmtree(home)
        tally(homes_lost=1)
    run = train_tiny(home, mirror=mirror, quiet=False)
    assert f"note: continuing from the mirror's {mirror / NEWEST}" in capsys.readouterr().out
    assert run.summary["stops"] == 3
    assert_equal_runs(run, finished_run)
    assert files(mirror) == {NEWEST, PREVIOUS}


def test_a_finished_run_can_be_had_again_from_its_mirror(
    train_tiny: TrainTiny, finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tiny(tmp_path / "run", mirror=tmp_path / "mirror")
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(train_module, "train_step", None)  # not a single step is needed
    assert_equal_runs(train_tiny(tmp_path / "run", mirror=tmp_path / "mirror"), finished_run)


@pytest.mark.parametrize("newer", ["home", "mirror"])
def test_the_newer_of_both_counts(
    train_tiny: TrainTiny,
    finished_run: Run,
    tmp_path: Path,
    stopping: Callable,
    newer: str,
    tally: Callable,
) -> None:
    home, mirror = tmp_path / "run", tmp_path / "mirror"
    stopping(1, 2)
    with pytest.raises(Stopped):
        train_tiny(home, mirror=mirror)
    older = tmp_path / "older"
    shutil.copytree(home / "checkpoints" if newer == "mirror" else mirror, older)
    stopping(2, 2)
    with pytest.raises(Stopped):
        train_tiny(home, mirror=mirror)
    compute = home / "checkpoints" if newer == "mirror" else mirror
    shutil.rmtree(compute)
    older.rename(compute)
    seen = []
    real = train_module._continue
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            train_module,
            "_continue",
            lambda job, state, saved: (seen.append(saved), real(job, state, saved)),
        )
        run = train_tiny(home, mirror=mirror)
    assert [(saved["epoch"], saved["step"]) for saved in seen] == [(2, 2)]
    assert_equal_runs(run, finished_run)
    tally(resumed_from_the_newer=1)


DAMAGES = {
    "newest in the mirror": ("mirror", [NEWEST]),
    "both in the mirror": ("mirror", [NEWEST, PREVIOUS]),
    "newest at home": ("home", [NEWEST]),
    "both at home": ("home", [NEWEST, PREVIOUS]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_in_one_home_is_passed_over_with_one_line(
    train_tiny: TrainTiny,
    finished_run: Run,
    tmp_path: Path,
    stopping: Callable,
    case: str,
    tally: Callable,
    capsys,
) -> None:
    home, mirror = tmp_path / "run", tmp_path / "mirror"
    stopping(2, 1)
    with pytest.raises(Stopped):
        train_tiny(home, mirror=mirror)
    where, names = DAMAGES[case]
    for name in names:
        path = (mirror if where == "mirror" else home / "checkpoints") / name
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    run = train_tiny(home, mirror=mirror, quiet=False)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert "is damaged; continuing from" in notes[0]
    assert_equal_runs(run, finished_run)
    tally(damaged_homes=1)


def test_without_a_whole_checkpoint_in_either_home_nothing_starts_anew_by_itself(
    train_tiny: TrainTiny, tmp_path: Path, stopping: Callable
) -> None:
    home, mirror = tmp_path / "run", tmp_path / "mirror"
    stopping(1, 2)
    with pytest.raises(Stopped):
        train_tiny(home, mirror=mirror)
    for path in (*mirror.iterdir(), *(home / "checkpoints").iterdir()):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        train_tiny(home, mirror=mirror)


# --- Which folder -----------------------------------------------------------------------------------------------------


def test_the_mirror_of_another_run_is_refused_naming_what_differs(
    train_tiny: TrainTiny, narrow: Recipe, tmp_path: Path, tally: Callable
) -> None:
    train_tiny(tmp_path / "run", mirror=tmp_path / "mirror")
    before = {path.name: path.read_bytes() for path in (tmp_path / "mirror").iterdir()}
    for recipe, options, said in (
        (narrow, {"seed": 1}, "seed 0 -> 1"),
        (replace(narrow, epochs=3), {}, "epochs 2 -> 3"),
        (narrow, {"precision": "bf16"}, "precision fp32 -> bf16"),
        (
            narrow,
            {"limit_classes": 2},
            "class_order_sha256 [0-9a-f]{12} -> [0-9a-f]{12}, classes 3 -> 2",
        ),
    ):
        with pytest.raises(
            UserError, match=rf"the checkpoint is of another run \(.*{said}.*choose another"
        ):
            train_tiny(tmp_path / "other", recipe, mirror=tmp_path / "mirror", **options)
        assert files(tmp_path / "other") == set()
        tally(foreign_mirrors_refused=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "mirror").iterdir()} == before


@pytest.mark.parametrize("below", [".", "checkpoints"])
def test_the_run_s_own_folder_is_no_mirror(
    train_tiny: TrainTiny, tmp_path: Path, below: str
) -> None:
    with pytest.raises(UserError, match="is where the run itself is kept"):
        train_tiny(tmp_path / "run", mirror=tmp_path / "run" / below)


def test_one_process_writes_a_mirror(train_tiny: TrainTiny, tmp_path: Path) -> None:
    with (
        lock(tmp_path / "mirror"),
        pytest.raises(UserError, match=r"another process is writing .*mirror"),
    ):
        train_tiny(tmp_path / "run", mirror=tmp_path / "mirror")


def test_a_new_machine_keeps_the_micro_batch_and_tells_of_its_environment(
    train_tiny: TrainTiny,
    narrow: Recipe,
    tmp_path: Path,
    stopping: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    """Batch norm sees the pieces, so another number of images would be another run."""
    recipe, mirror = replace(narrow, batch_size=6, micro_batch=2), tmp_path / "mirror"
    undisturbed = train_tiny(tmp_path / "undisturbed", recipe)
    stopping(1, 2)
    with pytest.raises(Stopped):
        train_tiny(tmp_path / "first", recipe, mirror=mirror)
    monkeypatch.undo()
    for other in (3, None):
        with pytest.raises(UserError, match="micro_batch 2 -> "):
            train_tiny(tmp_path / "other", replace(recipe, micro_batch=other), mirror=mirror)
    real = train_module.describe_environment
    monkeypatch.setattr(
        train_module, "describe_environment", lambda compute: real(compute) | {"threads": 64}
    )
    run = train_tiny(tmp_path / "second", recipe, mirror=mirror, quiet=False)
    notes = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("note: the environment")
    ]
    assert len(notes) == 1
    assert "threads 1 -> 64" in notes[0]
    assert run.environment["earlier"][0]["threads"] == 1
    assert_equal_runs(run, undisturbed)


# --- A mirror that fails ----------------------------------------------------------------------------------------------


def broken(kind: str, compute: Path) -> None:
    """Makes the mirror at `place` fail."""
    if kind == "is a file":
        compute.write_bytes(b"mine")
    elif kind == "lies below a file":
        compute.parent.mkdir(parents=True, exist_ok=True)
        compute.write_bytes(b"mine")
    elif kind == "a folder has the file's name":
        (compute / f"{NEWEST}.tmp" / "x").mkdir(parents=True)


@pytest.mark.parametrize("kind", ["is a file", "lies below a file", "a folder has the file's name"])
def test_a_mirror_that_cannot_be_written_warns_once_and_training_goes_on(
    train_tiny: TrainTiny, finished_run: Run, tmp_path: Path, kind: str, tally: Callable, capsys
) -> None:
    mirror = tmp_path / "mirror"
    broken(kind, mirror)
    where = mirror / "below" if kind == "lies below a file" else mirror
    run = train_tiny(tmp_path / "run", mirror=where, quiet=False)
    out, err = capsys.readouterr()
    told = [line for line in out.splitlines() if "mirror" in line]
    assert len(told) == 1
    assert told[0].startswith(f"note: the mirror {where} fails (")
    assert err == ""
    assert_equal_runs(run, finished_run)
    tally(failing_mirrors=1)


FAULTS = {
    "open": lambda patched, fail: patched.setattr(mirror_module, "open", fail, raising=False),
    "fsync": lambda patched, fail: patched.setattr(mirror_module.os, "fsync", fail),
    "read again": lambda patched, fail: patched.setattr(mirror_module.hashlib, "file_digest", fail),
}


@pytest.mark.parametrize("place", FAULTS)
@pytest.mark.parametrize(
    "error", [OSError(107, "Transport endpoint is not connected"), RuntimeError("of any kind")]
)
def test_an_error_in_the_copy_warns_once_and_leaves_the_newest_copy_whole(
    tmp_path: Path, compute: str, error: Exception, tally: Callable
) -> None:
    said = []

    def fail(*_: object, **__: object) -> None:
        raise error

    with Mirror(tmp_path / "mirror", said.append) as mirror:
        for number in (1, 2):
            mirror.update(save(tmp_path / "home", state(number)))
            assert mirror.wait(10)
        with pytest.MonkeyPatch.context() as patched:
            for number in (3, 4, 5):
                content = save(tmp_path / "home", state(number))
                FAULTS[compute](patched, fail)
                mirror.update(content)
                assert mirror.wait(10)
                patched.undo()
        assert find(tmp_path / "mirror").state["epoch"] == 2
        assert files(tmp_path / "mirror") <= {NEWEST, PREVIOUS}
        mirror.update(save(tmp_path / "home", state(6)))  # the drive is back
        assert mirror.wait(10)
    assert find(tmp_path / "mirror").state["epoch"] == 6
    assert len(said) == 1
    assert str(error.args[-1]) in said[0]
    assert "training goes on" in said[0]
    tally(failing_copies=3)


def test_a_mirror_that_cannot_be_read_at_the_start_is_left_alone(
    train_tiny: TrainTiny,
    finished_run: Run,
    tmp_path: Path,
    stopping: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys,
) -> None:
    """It may hold what is further than anything here: a run that begins anew must not write over it."""
    mirror = tmp_path / "mirror"
    stopping(2, 2)
    with pytest.raises(Stopped):
        train_tiny(tmp_path / "first", mirror=mirror)
    monkeypatch.undo()
    before, real = {path.name: path.read_bytes() for path in mirror.iterdir()}, checkpoint.read

    def unreadable(path: Path) -> dict | None:
        if path.parent == mirror:
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoint, "read", unreadable)
    run = train_tiny(tmp_path / "second", mirror=mirror, quiet=False)
    assert (
        capsys.readouterr().out.count("fails (Input/output error); training goes on without it")
        == 1
    )
    assert_equal_runs(run, finished_run)
    assert {path.name: path.read_bytes() for path in mirror.iterdir()} == before


def test_a_damaged_newest_copy_is_not_kept_in_place_of_the_whole_one(tmp_path: Path) -> None:
    """A copy goes over the oldest file, which here is the only whole one."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for number in (1, 2):
        copy(save(tmp_path / "home", state(number)), mirror)
    (mirror / NEWEST).write_bytes(b"damaged")
    with Mirror(mirror, print) as second, pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            mirror_module.os, "posix_fadvise", fails_with(OSError(28, "No space left on device"))
        )
        second.update(save(tmp_path / "home", state(3)))
        assert second.wait(10)
    assert find(mirror).state["epoch"] == 1
    assert find(mirror).damaged == []


def test_a_mirror_of_another_version_is_left_alone_where_there_is_a_checkpoint_at_home(
    train_tiny: TrainTiny,
    finished_run: Run,
    tmp_path: Path,
    stopping: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirror = tmp_path / "mirror"
    stopping(1, 2)
    with pytest.raises(Stopped):
        train_tiny(tmp_path / "run", mirror=mirror)
    monkeypatch.undo()
    (mirror / NEWEST).write_bytes(b"tinylab checkpoint 1\n" + bytes(100))
    with pytest.raises(UserError, match="another version of tinylab wrote"):
        train_tiny(tmp_path / "empty", mirror=mirror)
    assert_equal_runs(train_tiny(tmp_path / "run", mirror=mirror), finished_run)
    assert (mirror / NEWEST).read_bytes().startswith(b"tinylab checkpoint 1")


def test_a_copy_that_takes_for_ever_is_told_of_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, busy, said = threading.Event(), threading.Event(), []

    def hanging(*_: object) -> None:
        busy.set()
        released.wait(60)

    monkeypatch.setattr(mirror_module, "copy", hanging)
    monkeypatch.setattr(mirror_module, "HANGS", 0.0)
    with Mirror(tmp_path / "mirror", said.append, patience=10) as mirror:
        mirror.update(save(tmp_path / "home", state(1)))
        assert busy.wait(10)
        mirror.update(save(tmp_path / "home", state(2)))
        assert len(said) == 1
        assert "a copy has taken more than" in said[0]
        released.set()
    assert len(said) == 1


def fails_with(error: Exception) -> Callable:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_copy_that_reads_back_differently_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable
) -> None:
    """A drive that loses what it was given and says nothing."""
    (tmp_path / "mirror").mkdir()
    copy(save(tmp_path / "home", state(1)), tmp_path / "mirror")
    content, real = save(tmp_path / "home", state(2)), os.fsync

    def losing(handle: int) -> None:
        real(handle)
        os.pwrite(handle, b"\0" * 512, 4096)

    monkeypatch.setattr(mirror_module.os, "fsync", losing)
    with pytest.raises(OSError, match="not what had been written"):
        copy(content, tmp_path / "mirror")
    assert find(tmp_path / "mirror").state["epoch"] == 1
    assert files(tmp_path / "mirror") == {NEWEST}
    tally(lying_copies=1)


def test_a_drive_that_is_gone_gets_no_folder_in_its_place(tmp_path: Path) -> None:
    """Where nothing is mounted any more, a new folder would lie on the very disk that is to be lost."""
    said = []
    with Mirror(tmp_path / "drive" / "run", said.append) as mirror:
        shutil.rmtree(tmp_path / "drive")
        mirror.update(save(tmp_path / "home", state(1)))
        assert mirror.wait(10)
    assert not (tmp_path / "drive").exists()
    assert len(said) == 1
    assert "is not there" in said[0]


def test_a_drive_that_hangs_holds_up_neither_training_nor_its_end(
    train_tiny: TrainTiny,
    finished_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Callable,
    capsys,
) -> None:
    released = threading.Event()
    monkeypatch.setattr(mirror_module, "copy", lambda *_: released.wait(60))
    real = mirror_module.Mirror
    monkeypatch.setattr(train_module, "Mirror", lambda folder, say: real(folder, say, patience=0.2))
    try:
        run = train_tiny(tmp_path / "run", mirror=tmp_path / "mirror", quiet=False)
    finally:
        released.set()
    assert (
        capsys.readouterr().out.count(
            f"note: the last checkpoint was not copied to the mirror {tmp_path}"
        )
        == 1
    )
    assert_equal_runs(run, finished_run)
    tally(hanging_mirrors=1)


def test_of_checkpoints_that_come_faster_than_they_are_copied_the_newest_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, released, copied = threading.Event(), threading.Event(), []

    def slow(content: tuple, folder: Path) -> None:
        busy.set()
        released.wait(10)
        copied.append(content)

    monkeypatch.setattr(mirror_module, "copy", slow)
    with Mirror(tmp_path / "mirror", print) as mirror:
        contents = [save(tmp_path / "home", state(number)) for number in range(1, 6)]
        mirror.update(contents[0])
        busy.wait(10)
        for content in contents[1:]:
            mirror.update(content)
        released.set()
    assert [content[0] for content in copied] == [contents[0][0], contents[4][0]]


# --- Never more than two files, one of them whole ---------------------------------------------------------------------


def test_there_are_two_files_at_the_most_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable
) -> None:
    """Looked at from inside every call that changes a file, also after a copy was killed at each of them."""
    mirror, seen = tmp_path / "mirror", []
    mirror.mkdir()
    real_replace, real_fsync, fail_at, count = os.replace, os.fsync, 0, 0

    def watched(real: Callable) -> Callable:
        def call(*arguments: object) -> None:
            nonlocal count
            seen.append(len(files(mirror)))
            count += 1
            if count == fail_at:
                raise SystemExit  # as if killed: nothing else is done
            real(*arguments)
            seen.append(len(files(mirror)))

        return call

    contents = [save(tmp_path / "home", state(number)) for number in range(1, 30)]
    monkeypatch.setattr(mirror_module.os, "replace", watched(real_replace))
    monkeypatch.setattr(mirror_module.os, "fsync", watched(real_fsync))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process tidies nothing up
    newest = 0
    for content in contents:
        fail_at, count = fail_at % 6 + 1, 0
        try:
            copy(content, mirror)
        except SystemExit:
            tally(copies_cut_short=1)
        assert len(files(mirror)) <= 2
        found = find(mirror)
        if newest:
            assert found.state is not None
            assert found.state["epoch"] >= newest
        newest = found.state["epoch"] if found.state else 0
    assert newest >= 25
    assert max(seen) <= 2


KILLED = """
import sys, torch
from pathlib import Path
from tinylab.run.checkpoint import save
from tinylab.run.mirror import Mirror

folder = Path(sys.argv[1])
with Mirror(folder / "mirror", print) as mirror:
    for number in range(1, 1000):
        weight = torch.full((3_000_000,), float(number))
        mirror.update(save(folder / "home", {"epoch": number, "step": 0, "weight": weight}))
        print(number, flush=True)
"""


def test_kills_while_the_mirror_is_written_leave_it_whole(
    tmp_path: Path, subprocess_environment: dict[str, str], full: bool, tally: Callable
) -> None:
    for trial in range(12 if full else 2):
        folder = tmp_path / str(trial)
        folder.mkdir()
        command = [sys.executable, "-c", KILLED, str(folder)]
        process = subprocess.Popen(
            command, env=subprocess_environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4 + trial % 3):
            assert process.stdout.readline()
        time.sleep(0.013 * trial)
        process.kill()
        process.communicate()
        found = find(folder / "mirror")
        assert found.state is not None
        assert torch.equal(
            found.state["weight"], torch.full((3_000_000,), float(found.state["epoch"]))
        )
        assert len(files(folder / "mirror")) <= 2
        assert (
            checkpoint.load(folder / "home", folder / "mirror")[0]["epoch"] >= found.state["epoch"]
        )
        tally(kills=1)


def test_the_mirror_is_an_option_of_the_command_line(
    small_dataset: Dataset, tmp_path: Path
) -> None:
    from tinylab.cli import main

    options = [
        "--data",
        str(small_dataset.folder),
        "--run",
        str(tmp_path / "run"),
        "--mirror",
        str(tmp_path / "mirror"),
    ]
    assert (
        main(
            [
                "train",
                "smoke",
                *options,
                "--epochs",
                "1",
                "--width",
                "16",
                "--resolution",
                "16",
                "--workers",
                "0",
            ]
        )
        == 0
    )
    assert files(tmp_path / "mirror") == {NEWEST}
    assert main(["verify", str(tmp_path / "mirror")]) == 0
