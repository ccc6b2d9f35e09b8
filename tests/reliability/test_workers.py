"""A worker process that dies ends its run in one line; the same command continues it."""

import sys

import psutil
import pytest

from reliability.harness import (
    assert_one_line,
    assert_same_end,
    at,
    command,
    forked,
    moments,
    train_arguments,
)
from tinylab.run.folder import Run

pytestmark = [
    pytest.mark.promise("workers"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks of this process"),
]


def test_a_worker_that_dies_ends_the_run_in_one_line(small_dataset, tmp_path, tally) -> None:
    """Killed as the system does when memory runs out."""

    def kill_worker() -> None:
        psutil.Process().children()[0].kill()

    options = {"epochs": 2, "width": 4, "batch_size": 7, "workers": 2}
    run, log = Run(tmp_path / "run"), tmp_path / "log"
    arguments = train_arguments(small_dataset.folder, run.folder, **options)
    undisturbed = train_arguments(small_dataset.folder, tmp_path / "undisturbed", **options)

    def disturbed() -> None:
        moments(pytest.MonkeyPatch(), at(5, kill_worker, "step"))
        command(arguments, log)

    assert forked(disturbed) == 2
    assert_one_line(log.with_suffix(".err").read_text(), "a worker process has died")
    assert not run.finished
    assert forked(lambda: command(arguments, log)) == 0
    assert run.summary["stops"] == 1
    assert forked(lambda: command(undisturbed, log)) == 0
    assert_same_end(run, Run(tmp_path / "undisturbed"))
    tally(workers_killed=1)
