"""The range test: a curve whose suggestion is known, a state that is as before, and nothing left behind."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_same

from tinylab.data.dataset import Dataset
from tinylab.data.loader import Batch
from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.recipes import smoke
from tinylab.run.environment import Compute, choose
from tinylab.training import lr_finder as module
from tinylab.training.lr_finder import RangeTest, find_lr, range_test, smooth, suggest
from tinylab.training.step import TrainState, new_state, train_step

CLASSES = 3
RATES = np.geomspace(1e-5, 10, 100)


@pytest.fixture(scope="module")
def compute() -> Compute:
    return choose("cpu", "fp32")


def made_batches(count: int | None = None, seed: int = 0) -> Iterator[Batch]:
    """Batches of four images told apart by their brightness; without `count`, without end."""
    rng = torch.Generator().manual_seed(seed)
    while count is None or count > 0:
        labels = torch.randint(0, CLASSES, (4,), generator=rng)
        images = torch.randint(0, 80, (4, 64, 64, 3), dtype=torch.uint8, generator=rng)
        yield Batch(images + (80 * labels).to(torch.uint8)[:, None, None, None], labels)
        count = None if count is None else count - 1


def curve(lowest: float = 1e-2, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """2.3 nats that fall by 0.4 over a decade and a half up to the learning rate `lowest`, then rise."""
    decades = np.log10(RATES / lowest)
    return (
        1.9
        + 0.4 * np.clip(-decades / 1.5, 0, 1)
        + np.clip(decades, 0, None)
        + noise_of(noise, seed)
    )


def noise_of(size: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, len(RATES))


# --- The suggestion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowest", [3e-3, 1e-2, 0.3])
def test_the_suggestion_is_where_the_loss_is_lowest(lowest: float) -> None:
    found, reason = suggest(RATES, curve(lowest))
    assert 0.5 * lowest < found < lowest
    assert f"at a learning rate of {found:.2g}" in reason
    assert "from 2.30 in the first decade" in reason


def test_noise_moves_the_suggestion_little() -> None:
    found = [suggest(RATES, curve(noise=0.1, seed=seed))[0] for seed in range(100)]
    assert all(found)
    assert np.quantile(found, 0.95) / np.quantile(found, 0.05) < 2.5


@pytest.mark.parametrize("rises", [False, True])
def test_chance_is_no_fall(rises: bool) -> None:
    rising = np.clip(np.log10(RATES) + 2, 0, None) / 2 if rises else 0
    found = [suggest(RATES, 2.3 + rising + noise_of(0.1, seed)) for seed in range(200)]
    assert sum(each[0] is not None for each in found) <= 6
    assert (
        sum(
            "chance" in each[1] or "no fall" in each[1] or "to the end" in each[1] for each in found
        )
        >= 194
    )


def test_a_curve_that_only_rises_or_only_falls_suggests_nothing() -> None:
    decades = np.log10(RATES)
    assert suggest(RATES, decades + 9)[0] is None
    assert "start lower" in suggest(RATES, decades + 9)[1]
    assert suggest(RATES, 9 - decades)[0] is None
    assert "go on to a higher one" in suggest(RATES, 9 - decades)[1]
    assert suggest(RATES, np.full(100, 2.0))[0] is None


@pytest.mark.parametrize("seed", range(5))
def test_of_a_plateau_its_beginning_is_suggested(seed: int) -> None:
    """A network that has learned its few images by heart has no loss left, whatever the learning rate."""
    falling = 2.3 * np.clip(-np.log10(RATES / 1e-2), 0, 1)
    assert 0.003 < suggest(RATES, falling + np.abs(noise_of(1e-4, seed)))[0] < 0.03


def test_no_loss_at_all_suggests_nothing() -> None:
    found, reason = suggest(RATES[:0], np.array([]))
    assert found is None
    assert "not finite" in reason


def test_smoothing_keeps_a_constant_and_averages_noise() -> None:
    assert smooth(RATES, np.full(100, 2.3)) == pytest.approx(np.full(100, 2.3))
    assert 0.2 < smooth(RATES, noise_of(1, 0)).std() < 0.5
    spike = np.zeros(100)
    spike[50] = 1
    smoothed = smooth(RATES, spike)
    assert smoothed.argmax() == 50
    assert smoothed[49] == pytest.approx(smoothed[51], rel=1e-6)
    # Half as high after 0.15 sqrt(2 ln 2) decades, of which a step has 6 / 99.
    assert smoothed[53] / smoothed[50] == pytest.approx(
        math.exp(-((3 * 6 / 99 / 0.15) ** 2) / 2), rel=1e-3
    )


# --- What the steps are -----------------------------------------------------------------------------------------------


def state_of(recipe: Recipe, compute: Compute) -> TrainState:
    return new_state(recipe, CLASSES, seed=0, steps_per_epoch=3, compute=compute)


def run_on(
    losses: list[float], recipe: Recipe, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> tuple:
    """A range test whose steps have these losses, NaN for one that is skipped; and what each step saw."""
    seen = []

    def step(state: TrainState, _recipe: Recipe, _place: Compute, batch: Batch) -> None:
        loss = losses[len(seen)]
        seen.append([(group["lr"], group["momentum"]) for group in state.optimizer.param_groups])
        if math.isfinite(loss):
            state.totals += torch.tensor([4 * loss, 0, 0, 4])
        state.scheduler.step()

    monkeypatch.setattr(module, "train_step", step)
    found = range_test(
        state_of(recipe, compute), recipe, compute, made_batches(len(losses)), steps=len(losses)
    )
    return found, seen


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_known_curve_gives_the_known_suggestion(
    narrow: Recipe, compute: Compute, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    recipe = replace(narrow, optimizer=optimizer, decay_1d=False)
    if optimizer == "muon":
        recipe = replace(recipe, muon_learning_rate=0.05)  # of the first group it is 0.02
    found, seen = run_on(curve().tolist(), recipe, compute, monkeypatch)
    assert 0.005 < found.suggestion < 0.01
    np.testing.assert_allclose(found.learning_rates, RATES)
    np.testing.assert_allclose(found.losses, curve(), rtol=1e-6)
    np.testing.assert_array_equal(found.smoothed, smooth(found.learning_rates, found.losses))
    assert [groups[0][0] for groups in seen] == pytest.approx(RATES.tolist())
    assert len(seen[0]) == {"sgd": 2, "muon": 3}[optimizer]
    for groups in seen:
        assert {momentum for _, momentum in groups} == {recipe.base_momentum}
        if optimizer == "muon":
            assert groups[2][0] / groups[0][0] == pytest.approx(2.5)


def test_it_ends_when_the_loss_explodes(
    narrow: Recipe, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of five exceeds 4 x 2.0 with the second of these; a single outlier of 15 does not end it."""
    losses = [2.0] * 20 + [15.0] + [2.0] * 9 + [20.0] * 30
    found, seen = run_on(losses, narrow, compute, monkeypatch)
    assert len(seen) == len(found.losses) == len(found.learning_rates) == len(found.smoothed) == 32


def test_it_ends_when_a_loss_is_not_finite(
    narrow: Recipe, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, seen = run_on([2.0] * 20 + [math.nan] + [2.0] * 9, narrow, compute, monkeypatch)
    assert (len(seen), len(found.losses)) == (21, 20)
    assert np.isfinite(found.losses).all()
    found, seen = run_on([math.nan] * 20, narrow, compute, monkeypatch)
    assert (len(seen), len(found.losses), found.suggestion) == (1, 0, None)


def test_it_ends_when_ten_updates_in_a_row_are_not_finite(narrow: Recipe, compute: Compute) -> None:
    state = state_of(narrow, compute)
    state.model.fc.weight.register_hook(lambda gradient: gradient * math.nan)
    found = range_test(state, narrow, compute, made_batches(), steps=30)
    assert len(found.losses) == 9


def test_it_ends_with_the_batches(narrow: Recipe, compute: Compute) -> None:
    found = range_test(state_of(narrow, compute), narrow, compute, made_batches(12), steps=20)
    assert len(found.losses) == 12
    np.testing.assert_allclose(found.learning_rates, np.geomspace(1e-5, 10, 20)[:12])


def test_it_learns_as_training_does(narrow: Recipe, compute: Compute) -> None:
    """The losses are those of plain steps at the same learning rates."""
    recipe = replace(narrow, epochs=4, base_momentum=0.9, max_momentum=0.9)
    found = range_test(
        state_of(recipe, compute), recipe, compute, made_batches(), start=0.001, stop=0.1, steps=10
    )
    state, losses = state_of(recipe, compute), []
    for rate, batch in zip(found.learning_rates, made_batches(10), strict=True):
        for group in state.optimizer.param_groups:
            group["lr"] = float(rate)
        state.totals.zero_()
        train_step(state, recipe, compute, batch)
        losses.append(state.totals[0].item() / 4)
    assert found.losses.tolist() == losses
    assert len({round(loss, 3) for loss in losses}) == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": 0.0}, "has to grow"),
        ({"start": 1.0, "stop": 1.0}, "has to grow"),
        ({"stop": math.inf}, "has to grow"),
        ({"start": math.nan}, "has to grow"),
        ({"steps": 9}, "10 to 2,000"),
        ({"steps": 2001}, "10 to 2,000"),
    ],
)
def test_ranges_that_cannot_be_are_refused(
    narrow: Recipe, compute: Compute, options: dict, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        range_test(state_of(narrow, compute), narrow, compute, made_batches(), **options)


# --- Nothing is left of it --------------------------------------------------------------------------------------------


def everything(state: TrainState) -> dict:
    groups = [
        {name: value for name, value in each.items() if name != "params"}
        for each in state.optimizer.param_groups
    ]
    schedule = {
        name: value for name, value in state.scheduler.state_dict().items() if not callable(value)
    }
    return copy.deepcopy(state.to_checkpoint() | {"groups": groups, "schedule": schedule})


class Trouble(Exception):
    """What a test raises in the middle of a range test."""


def interrupted(error: BaseException | None, after: int = 4) -> Iterator[Batch]:
    yield from made_batches(after)
    if error is not None:
        raise error


def dark(state: TrainState) -> None:
    """From the third step on the loss is not finite."""
    calls = []

    def spoil(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output * (math.nan if len(calls) > 2 else 1)

    state.model.fc.register_forward_hook(spoil)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize(
    ("trouble", "before"),
    [("none", 0), ("none", 2), ("exception", 2), ("interrupt", 2), ("nan", 2)],
)
def test_the_state_is_as_before(
    narrow: Recipe, compute: Compute, optimizer: str, trouble: str, before: int
) -> None:
    """At a run's start and in its middle, however the test ends; and the run goes on as if there had been none."""
    recipe = replace(narrow, epochs=4, optimizer=optimizer, ema_decay=0.6)
    state, other = state_of(recipe, compute), state_of(recipe, compute)
    for each in (state, other):
        each.model.train()
        for batch in made_batches(before, seed=5):
            train_step(each, recipe, compute, batch)
    saved = everything(state)
    error = {"exception": Trouble(), "interrupt": KeyboardInterrupt()}.get(trouble)
    if trouble == "nan":
        dark(state)
    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        found = range_test(state, recipe, compute, interrupted(error), start=0.1, steps=10)
        assert len(found.losses) == {"none": 4, "nan": 2}[trouble]
    assert_same(everything(state), saved)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    state.model.fc._forward_hooks.clear()
    for each in (state, other):
        for batch in made_batches(2, seed=9):
            train_step(each, recipe, compute, batch)
    assert_same(everything(state), everything(other))


# --- From a recipe and a data set -------------------------------------------------------------------------------------


@pytest.fixture
def find(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RangeTest]:
    """`find_lr` on the CPU, in a folder that stays empty."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, **options) -> RangeTest:
        found = find_lr(
            *arguments,
            **{"split": "merged", "device": "cpu", "precision": "fp32", "quiet": True} | options,
        )
        assert list(tmp_path.iterdir()) == []
        return found

    return call


def test_on_three_classes_and_the_same_again(
    find: Callable[..., RangeTest], tiny_dataset: Dataset, narrow: Recipe
) -> None:
    first, again, other = (find(narrow, tiny_dataset, steps=12, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.losses, again.losses)
    assert (first.suggestion, first.reason) == (again.suggestion, again.reason)
    assert first.losses[0] != other.losses[0]
    assert list(tiny_dataset.folder.iterdir()) == []


def test_recipes_with_everything_in_them(
    find: Callable[..., RangeTest], tiny_dataset: Dataset, rich: Recipe
) -> None:
    for recipe in (rich, replace(rich, optimizer="muon")):
        assert len(find(recipe, tiny_dataset, steps=10, stop=1.0).losses) == 10


def test_only_training_images_are_looked_at(
    find: Callable[..., RangeTest],
    tiny_dataset: Dataset,
    narrow: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    make_loader = module.make_loader
    monkeypatch.setattr(
        module,
        "make_loader",
        lambda dataset, rows, *rest: seen.append(rows) or make_loader(dataset, rows, *rest),
    )
    for split in ("merged", "official"):
        find(narrow, tiny_dataset, split=split, steps=10, limit_classes=2)
        expected = module.make_split(tiny_dataset, split, 2).train
        np.testing.assert_array_equal(seen[-1], expected)


def test_on_the_sample_data(find: Callable[..., RangeTest], sample_dataset: Dataset) -> None:
    found = find(smoke(), sample_dataset, steps=10, start=1e-3, stop=0.1)
    assert len(found.losses) == 10
    assert 1.5 < found.losses[0] < 4


def test_what_cannot_be_trained_is_refused(
    find: Callable[..., RangeTest],
    tiny_dataset: Dataset,
    narrow: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserError, match="batch-size 13 is more than the 12"):
        find(replace(narrow, batch_size=13), tiny_dataset)
    with pytest.raises(UserError, match="limit-classes"):
        find(narrow, tiny_dataset, limit_classes=9)
    with pytest.raises(UserError, match="seed"):
        find(narrow, tiny_dataset, seed=-1)
    with pytest.raises(UserError, match="grow"):
        find(narrow, tiny_dataset, start=2, stop=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        find(narrow, tiny_dataset)


def test_running_out_of_memory_is_one_line(
    find: Callable[..., RangeTest],
    tiny_dataset: Dataset,
    narrow: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "train_step", fail)
    with pytest.raises(UserError, match="out of memory on cpu with 5 images per step"):
        find(narrow, tiny_dataset, steps=10)
