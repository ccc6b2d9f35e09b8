"""Two processes that torchrun started: if one of them is killed all end, and the run continues."""

import os
import sys

import psutil
import pytest

from reliability.harness import assert_ended, start_process, train_arguments, wait_until
from tinylab.run.folder import Run

pytestmark = [
    pytest.mark.promise("processes"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads other processes' environment"),
]


def ranks_of(launcher: psutil.Process) -> dict[str, psutil.Process]:
    """Return torchrun's processes by rank."""
    environments = ((child, child.environ()) for child in launcher.children())
    return {each["RANK"]: child for child, each in environments if "RANK" in each}


@pytest.mark.slow
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
    assert out.count(f"continuing {os.path.relpath(run.folder)}") + out.count("continuing /") == 1
    assert (run.summary["stops"], len(run.history)) == (1, 8)
