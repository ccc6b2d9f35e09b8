"""A disk that fills up while a run is saved: one line, and what was there before is whole."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import assert_equal_runs

from tinylab.data.dataset import Dataset
from tinylab.run.checkpoint import NEWEST, PREVIOUS, load
from tinylab.run.folder import Run, verify_run

pytestmark = pytest.mark.promise("disk-full")

TRAINING = """
import contextlib, io, json, resource, shutil, sys
from pathlib import Path
from tinylab.cli import main

folder, start, limits, options = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]),
json.loads(sys.argv[4])
for limit in limits:
    if start:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))  # Python itself ignores SIGXFSZ
    with contextlib.redirect_stderr(io.StringIO()) as err,
    contextlib.redirect_stdout(io.StringIO()):
        status = main(["train", "smoke", *options])
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    if start:
        shutil.copytree(folder, folder.with_name(f"after {limit}"))
    print(json.dumps([limit, status, err.getvalue(),
    [str(path) for path in folder.rglob("*.tmp")]]), flush=True)
"""

OPTIONS = [
    "--epochs",
    "3",
    "--width",
    "4",
    "--resolution",
    "16",
    "--test-resolution",
    "16",
    "--precision",
    "fp32",
]


@pytest.fixture
def train_limited(
    small_dataset: Dataset, subprocess_environment: dict[str, str], tmp_path: Path
) -> Callable[[list[int], Path | None], list[list]]:
    """A function: `tinylab train`, once for each limit, in a process that may write no file of more
    than so many bytes (no root is needed), beginning each time with a copy of a folder if one is
    given; limit, status, stderr, leftovers.
    """

    def call(limits: list[int], start: Path | None = None) -> list[list]:
        options = [
            *OPTIONS,
            "--device",
            "cpu",
            "--data",
            str(small_dataset.folder),
            "--run",
            str(tmp_path / "run"),
        ]
        arguments = [
            str(tmp_path / "run"),
            str(start or ""),
            json.dumps(limits),
            json.dumps(options),
        ]
        command = [sys.executable, "-c", TRAINING, *arguments]
        done = subprocess.run(
            command, env=subprocess_environment, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stderr  # no SIGXFSZ, no SIGBUS
        return [json.loads(line) for line in done.stdout.splitlines()]

    return call


def refused(limit: int, status: int, err: str, leftovers: list[str], folder: Path) -> None:
    """Exit status 2 and one line that says where and how much; nothing half-written."""
    assert status == 2, (limit, err)
    assert len(err.splitlines()) == 1, (limit, err)
    if limit >= len("blat"):  # what Python writes to find out which temporary folder it can use
        assert f"cannot write {folder}" in err
        assert "bytes): File too large" in err
    assert not leftovers


@pytest.fixture(scope="module")
def undisturbed(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that there would be with room enough."""
    from tinylab.cli import main

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert (
        main(
            [
                "train",
                "smoke",
                *OPTIONS,
                "--device",
                "cpu",
                "--data",
                str(small_dataset.folder),
                "--run",
                str(folder),
            ]
        )
        == 0
    )
    return Run(folder)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    train_limited: Callable, undisturbed: Run, tmp_path: Path, full: bool, tally: Callable
) -> None:
    """Records, the first checkpoint, the predictions, the weights: each is the first not to fit."""
    sizes = sorted(
        {path.stat().st_size for path in undisturbed.folder.rglob("*") if path.is_file()}
    )
    limits = [0, *[size - 1 for size in sizes]] if full else [100, sizes[-1] // 2, sizes[-1] - 1]
    results = train_limited([*limits, -1])
    folder = tmp_path / "run"
    for result in results[:-1]:
        refused(*result, folder)
        tally(full_disks_while_saving=1)
    assert results[-1][1] == 0, results[-1]
    assert "finished" in verify_run(Run(folder))
    assert_equal_runs(Run(folder), undisturbed)


def test_a_disk_that_fills_up_later_leaves_the_checkpoints_of_before(
    train_limited: Callable, undisturbed: Run, tmp_path: Path, full: bool, tally: Callable
) -> None:
    """The run as it was at the end of its second epoch goes on."""
    start = tmp_path / "start"
    shutil.copytree(undisturbed.folder, start)
    for name in ("summary.json", "SHA256SUMS", "model.safetensors", "predictions.npz"):
        (start / name).unlink()
    checkpoints = start / "checkpoints"
    (checkpoints / NEWEST).unlink()
    before = (checkpoints / PREVIOUS).read_bytes()
    limits = [len(before) * part // 8 for part in ((1, 2, 3, 4, 5, 6, 7) if full else (4,))] + [
        len(before) - 1
    ]
    for result in train_limited(limits, start):
        refused(*result, tmp_path / "run")
        after = tmp_path / f"after {result[0]}" / "checkpoints"
        assert [path.read_bytes() for path in after.iterdir()] == [before]
        assert load(after)[0]["epoch"] == 3
        tally(full_disks_while_saving=1)
    assert train_limited([-1], start)[0][1] == 0
    assert_equal_runs(Run(tmp_path / "run"), undisturbed)
