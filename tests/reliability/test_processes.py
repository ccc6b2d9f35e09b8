"""One process of several is killed: the run ends, and the same command continues it."""

import sys

import psutil
import pytest

from reliability.harness import (
    assert_ended,
    assert_one_line,
    assert_same_end,
    at,
    command,
    forked,
    moments,
    start_process,
    train_arguments,
    wait_until,
)
from tinylab.run.folder import Run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, processes' environment")


@pytest.mark.promise("workers")
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


def ranks_of(launcher: psutil.Process) -> dict[str, psutil.Process]:
    """Return torchrun's processes by rank."""
    environments = ((child, child.environ()) for child in launcher.children())
    return {each["RANK"]: child for child, each in environments if "RANK" in each}


@pytest.mark.slow
@pytest.mark.promise("processes")
def test_a_process_is_killed_and_the_same_command_continues(
    sample_dataset, subprocess_environment, tmp_path, tally
) -> None:
    run = Run(tmp_path / "run")
    options = {"epochs": 8, "batch_size": 18, "width": 4, "limit_classes": 3, "workers": 0}
    arguments = ["--standalone", "--nproc-per-node=2", "-m", "tinylab"]
    arguments += train_arguments(sample_dataset.folder, run.folder, **options)
    start = (arguments, subprocess_environment, "torch.distributed.run")

    launcher = start_process(*start)
    wait_until(lambda: run.begun and run.history, lambda: launcher.poll() is None)
    ranks = ranks_of(psutil.Process(launcher.pid))
    assert sorted(ranks) == ["0", "1"]
    ranks["1"].kill()
    launcher.communicate()
    assert launcher.returncode != 0
    assert_ended([*ranks.values()])
    assert not run.finished
    assert not list(run.folder.rglob("*.tmp"))
    tally(processes_killed=1)

    launcher = start_process(*start)
    out, err = launcher.communicate()
    assert launcher.returncode == 0, err
    assert out.count(f"continuing {run.folder} in epoch ") == 1
    assert (run.summary["stops"], len(run.history)) == (1, 8)
