"""A run is stopped after each of its steps, and in each of its tests, and ends the same every time."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import assert_equal_runs

from reliability.harness import moments, plain_recipe, rich_recipe, send
from tinylab.data.dataset import Dataset
from tinylab.recipe import Recipe
from tinylab.run import checkpoint
from tinylab.run.folder import Run
from tinylab.training import train as train_module
from tinylab.training.train import Stopped, train

pytestmark = pytest.mark.promise("every-step")

TrainTiny = Callable[..., Run]
MOMENTS = 2 * (3 + 2) + 2
"""Places in a run of `narrow` where a signal may arrive: per epoch 3 steps and, of 3 images each, 2 test batches, and
these once more, mirrored, at the end."""


@pytest.fixture
def at_moment(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Calls a function at each of these moments."""
    return moments(monkeypatch)


@pytest.fixture(scope="module")
def reference(train_tiny: TrainTiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run that tests in small batches, as the disturbed ones do."""
    with pytest.MonkeyPatch.context() as patched:
        moments(patched)
        return train_tiny(tmp_path_factory.mktemp("reference") / "run")


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_run_stopped_anywhere_ends_the_same(
    train_tiny: TrainTiny,
    reference: Run,
    at_moment: Callable,
    tmp_path: Path,
    tally: Callable,
    moment: int,
) -> None:
    number = (signal.SIGINT, signal.SIGTERM)[moment % 2]
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    at_moment(lambda now: send(number) if now == moment else None)
    with pytest.raises(Stopped, match=r"the same command continues") as stopped:
        train_tiny(tmp_path / "run")
    assert stopped.value.signal == number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    saved, _ = checkpoint.load(tmp_path / "run" / "checkpoints")
    assert (saved["epoch"] - 1, saved["step"]) == (
        (2, 0) if moment >= 10 else (moment // 5, min(moment % 5 + 1, 3))
    )

    done = []
    at_moment(done.append)
    run = train_tiny(tmp_path / "run")
    tally(stops=1)
    assert_equal_runs(run, reference)
    assert run.summary["stops"] == 1
    steps_left = 6 - 3 * (saved["epoch"] - 1) - saved["step"]
    tests_left = max(2 - moment // 5, 1) + 1
    assert len(done) == steps_left + 2 * tests_left, "finished work was done again"


def test_a_run_stopped_after_every_step_ends_the_same(
    train_tiny: TrainTiny, reference: Run, at_moment: Callable, tmp_path: Path, tally: Callable
) -> None:
    steps = 0
    for _ in range(20):
        try:
            saved, _ = checkpoint.load(tmp_path / "run" / "checkpoints")
            # An evaluation starts anew each time: let it pass, or it never ends.
            quiet = 2 if saved and saved["step"] == 3 else 0
            quiet = 4 if saved and saved["epoch"] == 2 and saved["step"] == 3 else quiet
            at_moment(lambda now, quiet=quiet: send(signal.SIGINT) if now >= quiet else None)
            run = train_tiny(tmp_path / "run")
            break
        except Stopped:
            steps += 1
    tally(stops=steps)
    assert steps == 6
    assert_equal_runs(run, reference)
    assert run.summary["stops"] == steps


# --- Everything that the target recipes are made of ------------------------------------------------------------------


def stop_after(patched: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM comes after that many steps of this process."""
    real, count = train_module.train_step, iter(range(1, 1_000))

    def stopping(*arguments: object) -> None:
        real(*arguments)
        if next(count) == step:
            send(signal.SIGTERM)

    patched.setattr(train_module, "train_step", stopping)


@pytest.mark.parametrize("step", range(1, 7))
def test_a_rich_run_stopped_after_any_step_ends_the_same(
    train_tiny: TrainTiny,
    rich_reference: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Callable,
    step: int,
) -> None:
    """The average, Muon's momentum, mixing and the ramp continue, too."""
    with monkeypatch.context() as patched:
        stop_after(patched, step)
        with pytest.raises(Stopped):
            train_tiny(tmp_path / "run", rich_reference.recipe)
    run = train_tiny(tmp_path / "run", rich_reference.recipe)
    tally(stops=1)
    assert run.summary["stops"] == 1
    assert_equal_runs(run, rich_reference)


def test_a_rich_run_stopped_in_its_very_last_test_ends_the_same(
    train_tiny: TrainTiny,
    rich_reference: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Callable,
) -> None:
    """The averaged network keeps the statistics that it was tested with."""

    def stopping(forward: Callable) -> Callable:
        send(signal.SIGTERM)
        return forward

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "mirrored", stopping)
        with pytest.raises(Stopped, match="stopped after the last epoch; the same command"):
            train_tiny(tmp_path / "run", rich_reference.recipe)
    tally(stops=1)
    assert_equal_runs(train_tiny(tmp_path / "run", rich_reference.recipe), rich_reference)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "recipe", [rich_recipe(), rich_recipe(optimizer="muon"), plain_recipe()], ids=lambda r: r.name
)
def test_a_longer_run_stopped_after_each_of_its_steps_ends_the_same(
    small_dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full: bool,
    tally: Callable,
    recipe: Recipe,
    precision: str,
) -> None:
    if not full:
        pytest.skip("with --soak only: 126 stops")
    settings = {"device": "cpu", "precision": precision, "quiet": True}
    undisturbed = train(recipe, small_dataset, folder=tmp_path / "undisturbed", **settings)
    for step in range(1, 22):
        folder = tmp_path / str(step)
        with monkeypatch.context() as patched:
            stop_after(patched, step)
            with pytest.raises(Stopped):
                train(recipe, small_dataset, folder=folder, **settings)
        tally(stops=1)
        assert_equal_runs(train(recipe, small_dataset, folder=folder, **settings), undisturbed)
