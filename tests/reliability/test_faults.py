"""The kill test can fail: each of these faults in the code, put into the children, makes a killed run end otherwise.

None of them shows without a kill: what a killed run is compared to is an undisturbed one with the same fault.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reliability.harness import (
    Children,
    Event,
    Kill,
    Plan,
    Tale,
    children_of,
    differing,
    reference,
    rich_recipe,
)
from tinylab.data import loader
from tinylab.data.dataset import Dataset
from tinylab.data.loader import Batch, BatchedLoader
from tinylab.run import checkpoint
from tinylab.training.step import TrainState

pytestmark = [
    pytest.mark.promise("faults"),
    pytest.mark.skipif(
        sys.platform != "linux", reason="children are forked from a server, and killed by SIGKILL"
    ),
]

MOST_KILLS = 8


# --- The faults: each replaces one function ---------------------------------------------------------------------------


def _changed_when_loaded(change: Callable[[dict], None]) -> None:
    """What a checkpoint holds is changed before it is put back: so it is if it was not saved, or is not restored."""
    real = checkpoint.load

    def load(*arguments: object, **options: object) -> tuple:
        found = real(*arguments, **options)
        if found[0] is not None:
            change(found[0])
        return found

    checkpoint.load = load


def written_in_place() -> None:
    """The checkpoint goes straight to its final name."""

    def save(folder: Path, state: dict) -> object:
        folder.mkdir(parents=True, exist_ok=True)
        answer = real_save(folder / "aside", state)
        data = (folder / "aside" / checkpoint.NEWEST).read_bytes()
        with checkpoint.open(folder / checkpoint.NEWEST, "wb") as file:
            file.write(data)
        return answer

    real_save = checkpoint.save
    checkpoint.save = save


def learning_rate_overwritten() -> None:
    """The schedule is made after the optimiser was restored, whose learning rate it sets to that of the first step."""

    def change(saved: dict) -> None:
        for group in saved["optimizer"]["param_groups"]:
            group["lr"] = group["initial_lr"]

    _changed_when_loaded(change)


def schedule_not_restored() -> None:
    _changed_when_loaded(lambda saved: saved.update(scheduler_step=0))


def average_not_saved() -> None:
    """The average begins anew from the weights of that moment."""

    def change(saved: dict) -> None:
        saved["average"]["n_averaged"].zero_()
        for name, value in saved["model"].items():
            saved["average"][f"module.{name}"] = value.clone()

    _changed_when_loaded(change)


def optimizer_not_restored() -> None:
    def change(saved: dict) -> None:
        for values in saved["optimizer"]["state"].values():
            for name, value in values.items():
                values[name] = torch.zeros_like(value) if isinstance(value, torch.Tensor) else value

    _changed_when_loaded(change)


def scaler_not_restored() -> None:
    _changed_when_loaded(
        lambda saved: saved.update(scaler=torch.amp.GradScaler("cpu").state_dict())
    )


def history_not_restored() -> None:
    _changed_when_loaded(lambda saved: saved.update(history=[]))


def batch_norm_not_restored() -> None:
    def change(saved: dict) -> None:
        for name, value in saved["model"].items():
            if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                value.fill_(float(name.endswith("running_var")))

    _changed_when_loaded(change)


def epoch_begun_again() -> None:
    """The epoch that was cut off is trained from its first step on top of what it had done."""
    real = TrainState.load_checkpoint

    def load_checkpoint(self: TrainState, saved: dict) -> None:
        real(self, saved)
        self.scheduler.last_epoch -= (
            self.step
        )  # else the schedule ends too early, which is no silent fault
        self.step = 0
        self.totals.zero_()

    TrainState.load_checkpoint = load_checkpoint


def batches_off_by_one() -> None:
    """After a resume within an epoch each step trains on the next one's batch."""

    def epoch(self: BatchedLoader, number: int, start_step: int = 0) -> Iterator[Batch]:
        shift = 1 if start_step else 0
        return self._batches(
            number, [min(step + shift, self.steps - 1) for step in range(start_step, self.steps)]
        )

    BatchedLoader.epoch = epoch


def randomness_of_the_process() -> None:
    """All random numbers come from one generator, which begins anew with the process."""
    everybody = np.random.default_rng(0)
    loader.generator = lambda *_: everybody


class _Constant:
    """A hash that is always the same."""

    def __init__(self, *_: object) -> None:
        self.digest_size = 32

    def digest(self) -> bytes:
        return bytes(32)


def hash_not_checked() -> None:
    checkpoint.hashlib = type("hashlib", (), {"sha256": _Constant})


# --- What finds them --------------------------------------------------------------------------------------------------


def within_epochs(plan: Plan) -> Callable[[int, int], Kill | None]:
    """Two kills, one in the first epoch and one in the last, each after two of its steps."""
    places = (3, plan.steps - plan.steps_per_epoch + 3)

    def choose(done: int, position: int) -> Kill | None:
        return Kill(Event.STEP, places[done] - position, held=True) if done < len(places) else None

    return choose


def half_written(_plan: Plan) -> Callable[[int, int], Kill | None]:
    """One kill, in the midst of the second checkpoint."""
    return lambda done, _position: Kill(Event.WRITE, 2, held=True) if done == 0 else None


def damage(folder: Path) -> None:
    """Turns one bit of every 500th byte of the newest checkpoint's second half over: numbers of tensors."""
    path = folder / "checkpoints" / checkpoint.NEWEST
    data = bytearray(path.read_bytes())
    middle = slice(len(data) // 2, 3 * len(data) // 4, 500)
    data[middle] = bytes(value ^ 8 for value in data[middle])
    path.write_bytes(data)


FAULTS = {
    written_in_place: half_written,
    learning_rate_overwritten: within_epochs,
    schedule_not_restored: within_epochs,
    average_not_saved: within_epochs,
    optimizer_not_restored: within_epochs,
    scaler_not_restored: within_epochs,
    history_not_restored: within_epochs,
    batch_norm_not_restored: within_epochs,
    epoch_begun_again: within_epochs,
    batches_off_by_one: within_epochs,
    randomness_of_the_process: within_epochs,
    hash_not_checked: within_epochs,
}


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    with children_of() as children:
        yield children


def plan_for(fault: Callable[[], None] | None, dataset: Dataset) -> Plan:
    """Two epochs of four steps; with a loss scale only where it counts, as fp16 is slow here."""
    scale = {"precision": "fp16", "overflow": (1, 1)} if fault is scaler_not_restored else {}
    return Plan(rich_recipe(epochs=2, batch_size=7), dataset.folder, fault=fault, **scale)


def kill(
    children: Children,
    plan: Plan,
    folder: Path,
    schedule: Callable,
    after: Callable = lambda _: None,
) -> Tale:
    return children.killed(plan, folder, schedule(plan), after=after)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(
    children: Children,
    small_dataset: Dataset,
    tmp_path: Path,
    tally: Callable,
    fault: Callable[[], None],
) -> None:
    plan = plan_for(fault, small_dataset)
    undisturbed = reference(
        children, plan
    )  # with the fault, which does no harm as long as nothing is killed
    harm = damage if fault is hash_not_checked else lambda _: None
    tale = kill(children, plan, tmp_path / "run", FAULTS[fault], harm)
    assert 0 < tale.kills <= MOST_KILLS
    if fault is written_in_place:
        found = tale.error
        assert "every checkpoint is damaged" in found
    else:
        assert tale.error is None, "a fault that cannot be overlooked proves nothing"
        assert min(tale.resumed) > 0
        found = differing(tale.folder, undisturbed)
    tally(faults=1, found=bool(found), kills=tale.kills)
    assert found


@pytest.mark.parametrize(
    ("precision", "schedule", "harm"),
    [
        ("fp32", within_epochs, damage),
        ("fp32", half_written, lambda _: None),
        ("fp16", within_epochs, lambda _: None),
    ],
    ids=["damaged", "half written", "loss scale"],
)
def test_without_a_fault_nothing_is_found(
    children: Children,
    small_dataset: Dataset,
    tmp_path: Path,
    tally: Callable,
    precision: str,
    schedule: Callable,
    harm: Callable[[Path], None],
) -> None:
    """The same kills, and the same damage."""
    plan = replace(
        plan_for(scaler_not_restored if precision == "fp16" else None, small_dataset), fault=None
    )
    tale = kill(children, plan, tmp_path / "run", schedule, harm)
    assert tale.error is None
    assert tale.kills > 0
    tally(controls=1)
    assert differing(tale.folder, reference(children, plan)) == []
