"""Several processes prepare one data set at once, and some are killed: one whole data set."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reliability.archives import leftovers, made_up, run, write_zip
from tinylab.data.dataset import prepare

pytestmark = pytest.mark.promise("concurrent")

BUILDER = """
import sys, time
from tinylab.data import dataset
decode = dataset.decode
def slow(*arguments):
    print("decoding", flush=True)
    time.sleep(float(sys.argv[3]))
    return decode(*arguments)
dataset.decode = slow
made = dataset.prepare(sys.argv[1], sys.argv[2], workers=1, progress=False)
print("rows", len(made), made.content_sha256, flush=True)
"""


def test_processes_that_prepare_at_once_build_once(
    tmp_path: Path, full: bool, tally: Callable
) -> None:
    zipped = write_zip(tmp_path / "made.zip", made_up())
    expected = prepare(zipped, tmp_path / "expected", progress=False).content_sha256
    for trial in range(6 if full else 1):
        folder = tmp_path / f"ds-{trial}"
        processes = [run(BUILDER, str(zipped), str(folder), "0.02") for _ in range(3)]
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert all(f"rows 18 {expected}" in output for output in outputs)
        assert sum("decoding" in output for output in outputs) == 1
        tally(processes=3, right=3, whole_builds=1)


def test_a_killed_builder_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, tally: Callable
) -> None:
    zipped, folder = write_zip(tmp_path / "made.zip", made_up()), tmp_path / "ds"
    builder = run(BUILDER, str(zipped), str(folder), "0.5")
    assert builder.stdout.readline() == "decoding\n"
    waiting = run(BUILDER, str(zipped), str(folder), "0")
    time.sleep(0.1)
    os.kill(builder.pid, signal.SIGKILL)
    builder.communicate()
    assert "rows 18" in waiting.communicate(timeout=60)[0]
    assert leftovers(tmp_path) == {"ds"}
    tally(processes=2, builders_killed=1, right=1, whole_builds=1)


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    zipped = write_zip(tmp_path / "made.zip", made_up())
    builder = run(BUILDER, str(zipped), str(tmp_path / "ds"), "0.5")
    assert builder.stdout.readline() == "decoding\n"
    os.kill(builder.pid, signal.SIGINT)
    builder.communicate(timeout=60)
    assert leftovers(tmp_path) == set()
