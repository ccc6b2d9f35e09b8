"""Numbers that are not finite, put in anywhere: weights, momenta, averages and statistics never see them."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_equal_runs
from tinylab.training.finite import MOST_IN_A_ROW, Statistics, all_finite, guarded_step

from tinylab.data.dataset import Dataset
from tinylab.data.loader import Batch
from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.recipes import accurate
from tinylab.run import checkpoint
from tinylab.run.environment import Compute
from tinylab.run.folder import Run
from tinylab.training import train as train_module
from tinylab.training.step import TrainState, new_state, train_step

pytestmark = pytest.mark.promise("non-finite")

CLASSES = 6
PLACES = {
    name: Compute(torch.device("cpu"), name, "for a test") for name in ("fp32", "bf16", "fp16")
}


@pytest.fixture
def recipe() -> Recipe:
    """Everything in it: averaged weights, mixing, jitter; a narrow network at 16 pixels."""
    small = {
        "name": "small",
        "epochs": 4,
        "batch_size": 8,
        "width": 16,
        "resolution": 16,
        "test_resolution": 16,
    }
    return replace(accurate(), **small, max_learning_rate=0.05, ema_decay=0.5)


def made_batch(seed: int) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, generator=rng)
    labels, partners = torch.randint(0, CLASSES, (2, 8), generator=rng)
    return Batch(images, labels, partners, 0.7)


def made_state(recipe: Recipe, compute: Compute, steps: int = 0) -> TrainState:
    state = new_state(recipe, CLASSES, seed=0, steps_per_epoch=20, compute=compute)
    state.model.train()
    if compute.precision == "fp16":
        state.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for number in range(steps):
        train_step(state, recipe, compute, made_batch(number))
    assert int(state.skips[0]) == 0
    return state


# --- What goes wrong --------------------------------------------------------------------------------------------------


@contextmanager
def forward_hook(module: torch.nn.Module, change: Callable) -> Iterator[None]:
    handle = module.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def in_images(value: float) -> Callable:
    """One pixel of one image, after normalisation."""

    def change(_module: torch.nn.Module, inputs: tuple) -> tuple:
        images = inputs[0].clone()
        images[3, 1, 5, 5] = value
        return (images,)

    @contextmanager
    def inject(state: TrainState, _patched: pytest.MonkeyPatch) -> Iterator[None]:
        handle = state.model.register_forward_pre_hook(change)
        try:
            yield
        finally:
            handle.remove()

    return inject


def in_features(layer: str, value: float) -> Callable:
    """One value of what a layer returns."""

    def change(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[(0,) * changed.ndim] = value
        return changed

    return lambda state, _patched: forward_hook(state.model.get_submodule(layer), change)


def in_gradient(layer: str, value: float) -> Callable:
    """One value of a weight's gradient; the loss is fine."""

    @contextmanager
    def inject(state: TrainState, _patched: pytest.MonkeyPatch) -> Iterator[None]:
        def change(gradient: torch.Tensor) -> torch.Tensor:
            changed = gradient.clone()
            changed[(0,) * changed.ndim] = value
            return changed

        handle = state.model.get_submodule(layer).weight.register_hook(change)
        try:
            yield
        finally:
            handle.remove()

    return inject


def in_loss(value: float) -> Callable:
    """The loss's value only: its gradients are fine."""

    @contextmanager
    def inject(_state: TrainState, patched: pytest.MonkeyPatch) -> Iterator[None]:
        from tinylab.training import step as step_module

        real = step_module._loss
        with patched.context() as inner:
            inner.setattr(step_module, "_loss", lambda *given: real(*given) + torch.tensor(value))
            yield

    return inject


@contextmanager
def in_statistics(state: TrainState, _patched: pytest.MonkeyPatch) -> Iterator[None]:
    """A running variance overflows, from values whose loss and gradients are finite."""

    def change(module: torch.nn.Module, _inputs: tuple, _output: torch.Tensor) -> None:
        module.running_var.data[2] = float("inf")

    with forward_hook(state.model.layer2[0].bn1, change):
        yield


INJECTIONS = {
    "NaN in an image": in_images(float("nan")),
    "infinity in an image": in_images(float("inf")),
    "NaN after the stem": in_features("conv1", float("nan")),
    "infinity before a batch norm": in_features("layer1.0.conv1", float("inf")),
    "-infinity in a late layer": in_features("layer4.1.conv2", -float("inf")),
    "NaN in a logit": in_features("fc", float("nan")),
    "infinity in a logit": in_features("fc", float("inf")),
    "NaN in an early gradient": in_gradient("conv1", float("nan")),
    "infinity in a late gradient": in_gradient("fc", float("inf")),
    "NaN as the loss": in_loss(float("nan")),
    "infinity as the loss": in_loss(float("inf")),
    "infinity in the statistics": in_statistics,
}


def moved(state: TrainState) -> dict[str, torch.Tensor]:
    """What a skipped step may not touch: weights, momenta, statistics."""
    found = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    for number, held in enumerate(state.optimizer.state.values()):
        found[f"momentum {number}"] = held["momentum_buffer"].clone()
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


CASES = [
    (precision, *rest) for rest in (("sgd", 2), ("muon", 1), ("sgd", 0)) for precision in PLACES
]
"""Number format, optimiser, good steps before the bad one."""


@pytest.mark.parametrize("number", range(len(INJECTIONS)), ids=list(INJECTIONS))
def test_a_step_whose_numbers_are_not_finite_leaves_no_trace(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, full: bool, tally: Callable, number: int
) -> None:
    """As the first step and later, with SGD and Muon; afterwards training goes on."""
    what = list(INJECTIONS)[number]
    for precision, optimizer, steps in CASES if full else CASES[number % len(CASES) :][:1]:
        compute = PLACES[precision]
        state = made_state(replace(recipe, optimizer=optimizer), compute, steps)
        before, totals, position = moved(state), state.totals.clone(), state.scheduler.last_epoch
        with INJECTIONS[what](state, monkeypatch):
            train_step(state, recipe, compute, made_batch(90))
        assert same(moved(state), before)
        assert state.skips.tolist() == [1, 1, 1]
        assert (state.step, state.scheduler.last_epoch) == (
            steps + 1,
            position + 1,
        )  # the schedule goes on
        assert bool(all_finite(state.average.state_dict().values()))
        assert bool(torch.isfinite(state.totals).all())
        assert state.totals[3] in (totals[3], totals[3] + 8)  # counted only if the loss was finite
        train_step(state, recipe, compute, made_batch(91))
        assert not same(moved(state), before)
        assert state.skips.tolist() == [1, 0, 1]
        assert bool(all_finite(state.model.state_dict().values()))
        tally(injections=1)


def test_without_a_bad_step_nothing_is_skipped_and_nothing_differs(recipe: Recipe) -> None:
    """The guard changes no bit of a step that is good: the optimiser's own step, written out beside it."""
    compute = PLACES["fp32"]
    state, other = made_state(recipe, compute, 2), made_state(recipe, compute, 2)
    train_step(state, recipe, compute, made_batch(5))
    from tinylab.training import step as step_module

    real = step_module.guarded_step
    step_module.guarded_step = lambda optimizer, *_: optimizer.step()
    try:
        train_step(other, recipe, compute, made_batch(5))
    finally:
        step_module.guarded_step = real
    assert same(moved(state), moved(other))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("what", INJECTIONS)
def test_on_a_gpu_the_kernel_skips_without_being_waited_for(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, what: str, precision: str
) -> None:
    compute = Compute(torch.device("cuda"), precision, "for a test")
    state = new_state(recipe, CLASSES, seed=0, steps_per_epoch=20, compute=compute)
    state.model.train()
    batches = [Batch(*[each.cuda() for each in made_batch(seed)[:3]], 0.7) for seed in range(3)]
    for batch in batches[:2]:
        train_step(state, recipe, compute, batch)
    before = moved(state)
    with INJECTIONS[what](state, monkeypatch):
        if not what.endswith("loss"):  # that injection itself copies a number to the GPU
            torch.cuda.set_sync_debug_mode("error")
        try:
            train_step(state, recipe, compute, batches[2])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert same(moved(state), before)
    assert bool(all_finite(state.average.module.state_dict().values()))


# --- A run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[TrainState], bool]], None]:
    """A function: from now on, steps for which its argument says so meet a NaN in the stem's output."""
    real = train_module.train_step

    def install(when: Callable[[TrainState], bool]) -> None:
        def step(state: TrainState, *arguments: object) -> None:
            if not when(state):
                return real(state, *arguments)
            with INJECTIONS["NaN after the stem"](state, monkeypatch):
                return real(state, *arguments)

        monkeypatch.setattr(train_module, "train_step", step)

    return install


@pytest.fixture
def long(narrow: Recipe) -> Recipe:
    """Three epochs of twelve steps, each on one small image."""
    return replace(narrow, epochs=3, batch_size=1, resolution=16, test_resolution=16, ema_decay=0.9)


def test_a_run_goes_on_over_skipped_steps_and_tells_of_them(
    train_tiny: Callable[..., Run],
    long: Recipe,
    tmp_path: Path,
    poisoned: Callable,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poisoned(lambda state: state.epoch == 2 and state.step in (1, 2, 4))
    run = train_tiny(tmp_path / "run", long, quiet=False)
    assert [row["skipped_steps"] for row in run.history] == [0, 3, 0]
    assert run.summary["skipped_steps"] == 3
    assert "3 steps skipped: not finite" in capsys.readouterr().out
    assert all(np.isfinite(value) for row in run.history for value in row.values())


def test_nine_in_a_row_go_on_and_ten_stop_the_run_with_a_good_checkpoint(
    train_tiny: Callable[..., Run],
    long: Recipe,
    tmp_path: Path,
    poisoned: Callable,
    tally: Callable,
) -> None:
    """Over the end of an epoch, too."""
    number = iter(range(1000))
    poisoned(lambda _: 7 <= next(number) < 7 + MOST_IN_A_ROW - 1)
    assert train_tiny(tmp_path / "nine", long).summary["skipped_steps"] == MOST_IN_A_ROW - 1
    number = iter(range(1000))
    poisoned(lambda _: 7 <= next(number) < 7 + MOST_IN_A_ROW)
    with pytest.raises(
        UserError, match=r"not finite in 10 steps in a row, up to epoch 2, step 5: .*lower"
    ) as caught:
        train_tiny(tmp_path / "ten", long)
    assert "\n" not in str(caught.value)
    saved, _ = checkpoint.load(tmp_path / "ten" / "checkpoints")
    assert bool(all_finite([*saved["model"].values(), *saved["average"].values()]))
    assert (saved["epoch"], saved["step"]) == (2, 0)  # the last one that was saved anyway
    tally(runs_stopped_after_ten=1)


def test_ten_at_the_very_start_leave_a_checkpoint_too_and_another_try_is_possible(
    train_tiny: Callable[..., Run],
    long: Recipe,
    tmp_path: Path,
    poisoned: Callable,
    tally: Callable,
) -> None:
    poisoned(lambda _: True)
    with pytest.raises(UserError, match="up to epoch 1, step 10"):
        train_tiny(tmp_path / "run", long)
    saved, _ = checkpoint.load(tmp_path / "run" / "checkpoints")
    assert (saved["epoch"], saved["step"]) == (1, 10)
    assert bool(all_finite([*saved["model"].values(), *saved["average"].values()]))
    poisoned(lambda _: False)
    run = train_tiny(tmp_path / "run", long)
    assert run.finished
    assert run.summary["skipped_steps"] == 10
    tally(runs_stopped_after_ten=1)


def test_an_epoch_without_a_finite_loss_is_no_result(
    train_tiny: Callable[..., Run], narrow: Recipe, tmp_path: Path, poisoned: Callable
) -> None:
    poisoned(lambda _: True)  # three steps an epoch: fewer than ten in a row
    with pytest.raises(UserError, match="no step of epoch 1 had a finite loss"):
        train_tiny(tmp_path / "run", narrow)


def test_a_stop_between_skipped_steps_changes_nothing(
    train_tiny: Callable[..., Run],
    long: Recipe,
    tmp_path: Path,
    poisoned: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """How many were skipped in a row is part of what a checkpoint holds."""
    import signal

    from tinylab.training.train import Stopped

    poisoned(lambda state: state.epoch == 2 and 1 <= state.step <= 4)
    reference = train_tiny(tmp_path / "reference", long)
    real = train_module.train_step

    def stopping(state: TrainState, *arguments: object) -> None:
        real(state, *arguments)
        if (state.epoch, state.step) == (2, 3):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "train_step", stopping)
        with pytest.raises(Stopped):
            train_tiny(tmp_path / "run", long)
    saved, _ = checkpoint.load(tmp_path / "run" / "checkpoints")
    assert saved["skips"].tolist() == [2, 2, 2]
    assert_equal_runs(train_tiny(tmp_path / "run", long), reference)


def test_images_of_one_colour_train(narrow: Recipe, tmp_path: Path) -> None:
    """The guard does not stop what is only unusual."""
    images = np.zeros((18, 64, 64, 3), dtype=np.uint8)
    images[6:12], images[12:] = 255, (255, 0, 0)
    labels = np.concatenate([np.repeat(np.arange(3), 5), np.arange(3)]).astype(np.int16)
    boxes = np.tile(np.array([8, 8, 55, 55], dtype=np.uint8), (18, 1))
    dataset = Dataset(
        tmp_path / "data", images, labels, boxes, ("n1", "n2", "n3"), ("a", "b", "c"), 15, "1" * 64
    )
    options = {"device": "cpu", "precision": "fp32", "workers": 0, "quiet": True}
    run = train_module.train(narrow, dataset, folder=tmp_path / "run", **options)
    assert run.summary["skipped_steps"] == 0


# --- The pieces -------------------------------------------------------------------------------------------------------


def test_large_numbers_are_finite() -> None:
    """A sum of squares would overflow; the largest value does not."""
    huge = torch.full((4, 4), 3e38)
    assert bool(all_finite([huge, torch.ones(3)]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not bool(all_finite([huge, torch.tensor([1.0, bad])]))


def test_statistics_are_put_back_only_where_asked() -> None:
    norm = torch.nn.BatchNorm2d(3)
    kept = Statistics(norm)
    before = copy.deepcopy(norm.state_dict())
    norm(torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)))
    after = copy.deepcopy(norm.state_dict())
    kept.put_back(torch.tensor(False), kept.values())
    assert same(norm.state_dict(), after)
    norm.running_mean[0] = float("nan")
    kept.put_back(torch.tensor(True), kept.values())
    assert same(norm.state_dict(), before)
    assert int(norm.num_batches_tracked) == 0


def test_loss_scaling_learns_of_a_bad_loss_too() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for bad, scale in ((True, 4.0), (False, 4.0)):
        optimizer.zero_grad()
        scaler.scale((weight * 2).sum()).backward()
        guarded_step(optimizer, scaler, torch.tensor(bad))
        assert torch.equal(weight, torch.ones(2)) == bad
        assert scaler.get_scale() == scale
