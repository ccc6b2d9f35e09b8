"""A run that SIGKILL ends at any moment continues, and ends with the bits of one that it spared."""

import random
import signal
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from reliability.harness import ON_DISK, assert_same_end, at, forked, kill_me, start_fork, status_of
from tinylab import files
from tinylab.data import loader
from tinylab.data.loader import DeviceLoader
from tinylab.run import checkpoint
from tinylab.run.folder import Run
from tinylab.training.step import TrainState

pytestmark = [
    pytest.mark.promise("kill"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks of this process are killed"),
]
STRIDES = {"sgd": (19, 2), "muon": (37, 5), "no workers": (37, 5), "two workers": (67, 17)}
"""Every how many moments a run is killed: quick, in full."""


@pytest.mark.parametrize("name", ["sgd", "muon", "no workers", "two workers", "loss scale"])
def test_a_run_killed_at_any_moment_ends_the_same(
    runs, undisturbed, tmp_path, full, tally, name
) -> None:
    plan, (reference, names) = runs[name], undisturbed(name)
    numbers = range(0, len(names), STRIDES.get(name, (67, 7))[full])
    for number in numbers:
        run = Run(tmp_path / str(number))
        assert forked(lambda: plan(run.folder, at(number, kill_me))) == -signal.SIGKILL  # noqa: B023
        if number > names.index("stepped") + 12:
            assert checkpoint.load(run.checkpoints)[0] is not None
        assert_same_end(plan(run.folder), reference)
    of_files = sum(names[number] in ON_DISK for number in numbers)
    tally(kills=len(numbers), while_a_file_is_written=of_files)


def test_a_run_killed_again_and_again_ends_the_same(runs, undisturbed, tmp_path, tally) -> None:
    """Each process does at least one step and saves it, or the test of an epoch."""
    plan, run = runs["no workers"], Run(tmp_path / "run")
    for kills in range(30):
        status = forked(lambda: plan(run.folder, at(15 + kills % 11, kill_me)))  # noqa: B023
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert run.finished, "the run does not come forward"
    assert kills >= 6
    tally(kills=kills)
    assert_same_end(run, undisturbed("no workers")[0])


def test_a_run_killed_from_outside_ends_the_same(runs, undisturbed, tmp_path, full, tally) -> None:
    """At moments that nobody chose: in the midst of a computation, too."""
    rng, plan, (reference, _) = random.Random(0), runs["sgd"], undisturbed("sgd")
    for number in range(8 if full else 2):
        run = Run(tmp_path / str(number))
        for _ in range(4):
            process = start_fork(lambda: plan(run.folder, lambda _: None))  # noqa: B023
            time.sleep(rng.uniform(0.05, 0.6))
            process.kill()
            tally(kills=status_of(process) == -signal.SIGKILL)
        assert_same_end(plan(run.folder), reference)


# --- The kill test can fail: each of these faults in the code is found ----------------------------


def when_loaded(change: Callable[[dict], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a fault: part of a checkpoint is not saved, or not restored."""

    def install(patched: pytest.MonkeyPatch) -> None:
        def load(self, saved: dict) -> None:
            change(saved)
            real(self, saved)

        real = TrainState.load_checkpoint
        patched.setattr(TrainState, "load_checkpoint", load)

    return install


def average_anew(saved: dict) -> None:
    saved["average"]["n_averaged"].zero_()
    for name, value in saved["model"].items():
        saved["average"][f"module.{name}"] = value.clone()


def learning_rate_of_the_first_step(saved: dict) -> None:
    for group in saved["optimizer"]["param_groups"]:
        group["lr"] = group["initial_lr"]


def momentum_anew(saved: dict) -> None:
    for state in saved["optimizer"]["state"].values():
        state["momentum_buffer"].zero_()


def statistics_anew(saved: dict) -> None:
    for name, value in saved["model"].items():
        if "running_" in name:
            value.fill_(float(name.endswith("var")))


def epoch_begun_again(saved: dict) -> None:
    """On top of what it had done; the schedule, which would end too early, is put back."""
    saved["scheduler_step"] -= saved["step"]
    saved["step"] = 0
    saved["totals"].zero_()


def batches_off_by_one(patched: pytest.MonkeyPatch) -> None:
    def epoch(self, number: int, start: int = 0):
        steps = range(start, self.steps)
        return (self.batch(number, min(step + (start > 0), self.steps - 1)) for step in steps)

    patched.setattr(DeviceLoader, "epoch", epoch)


def randomness_of_the_process(patched: pytest.MonkeyPatch) -> None:
    everybody = np.random.default_rng(0)
    patched.setattr(loader, "generator", lambda *_: everybody)


def written_in_place(patched: pytest.MonkeyPatch) -> None:
    def write(path, *parts, keep_as=None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with getattr(files, "open", open)(path, "wb") as file:
            for part in parts:
                file.write(part)

    patched.setattr(checkpoint, "write_atomically", write)


FAULTS = {
    "schedule not restored": when_loaded(lambda saved: saved.update(scheduler_step=0)),
    "learning rate not restored": when_loaded(learning_rate_of_the_first_step),
    "average not restored": when_loaded(average_anew),
    "momentum not restored": when_loaded(momentum_anew),
    "statistics not restored": when_loaded(statistics_anew),
    "history not restored": when_loaded(lambda saved: saved.update(history=[])),
    "loss scale not restored": when_loaded(
        lambda saved: saved.update(scaler=torch.amp.GradScaler("cpu").state_dict())
    ),
    "epoch begun again": when_loaded(epoch_begun_again),
    "batches off by one": batches_off_by_one,
    "randomness of the process": randomness_of_the_process,
    "written in place": written_in_place,
}


@pytest.mark.promise("faults")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_found(runs, tmp_path, tally, fault) -> None:
    """It does no harm as long as nothing is killed."""
    plan = runs["loss scale" if fault == "loss scale not restored" else "sgd"]

    def faulty(folder, hook=lambda _: None) -> None:
        with pytest.MonkeyPatch.context() as patched:
            FAULTS[fault](patched)
            plan(folder, hook)

    run = Run(tmp_path / "run")
    assert forked(lambda: faulty(tmp_path / "undisturbed")) == 0
    # After the second step of either epoch, or while a later checkpoint is written.
    kills = [("half", 4)] if fault == "written in place" else [("stepped", 1), ("stepped", 3)]
    for moment, number in kills:
        hook = at(number, kill_me, moment)
        assert forked(lambda: faulty(run.folder, hook)) == -signal.SIGKILL  # noqa: B023
    status = forked(lambda: faulty(run.folder))
    # A fault that ends the run cannot be overlooked, and proves nothing but for this one.
    assert status == (fault == "written in place")
    if status == 0:
        with pytest.raises(AssertionError):
            assert_same_end(run, Run(tmp_path / "undisturbed"))
    tally(faults=1, found=1, kills=len(kills))
