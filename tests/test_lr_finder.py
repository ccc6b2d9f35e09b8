"""The range test: a curve whose suggestion is known, and a state that is as before."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_same

from tinylab.data.loader import Batch
from tinylab.data.split import make_split
from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.recipes import smoke
from tinylab.run.environment import Compute
from tinylab.training import lr_finder
from tinylab.training.lr_finder import RangeTest, find_lr, range_test, suggest
from tinylab.training.step import TrainState, new_state, train_step

RATES = np.geomspace(1e-5, 10, 100)


def made_batches(count: int, seed: int = 0) -> Iterator[Batch]:
    """Batches of four images told apart by their brightness."""
    rng = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(0, 3, (4,), generator=rng)
        images = torch.randint(0, 80, (4, 64, 64, 3), dtype=torch.uint8, generator=rng)
        yield Batch(images + (80 * labels).to(torch.uint8)[:, None, None, None], labels)


def curve(lowest: float = 1e-2) -> np.ndarray:
    """2.3 nats that fall by 0.4 over a decade and a half up to the rate `lowest`, then rise."""
    decades = np.log10(RATES / lowest)
    return 1.9 + 0.4 * np.clip(-decades / 1.5, 0, 1) + np.clip(decades, 0, None)


def state_of(recipe: Recipe, compute: Compute) -> TrainState:
    return new_state(recipe, 3, seed=0, steps_per_epoch=3, compute=compute)


@pytest.mark.parametrize("lowest", [3e-3, 1e-2, 0.3])
def test_the_suggestion_is_where_the_loss_is_lowest(lowest) -> None:
    rate, reason = suggest(RATES, curve(lowest))
    assert 0.5 * lowest < rate < lowest
    assert f"at a learning rate of {rate:.2g}, from 2.30 in the first decade" in reason


def test_chance_moves_the_suggestion_little_and_is_no_fall_itself() -> None:
    chance = np.random.default_rng(0).normal(0, 0.1, (200, 100))
    rates = [suggest(RATES, curve() + each)[0] for each in chance]
    assert np.quantile(rates, 0.95) / np.quantile(rates, 0.05) < 2.5
    assert sum(suggest(RATES, 2.3 + each)[0] is not None for each in chance) <= 6


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        (np.log10(RATES) + 9, "start lower"),
        (9 - np.log10(RATES), "go on to a higher one"),
        (np.full(100, 2.0), ""),
        (np.array([]), "not finite"),
    ],
)
def test_a_curve_without_a_minimum_suggests_nothing(losses, why) -> None:
    rate, reason = suggest(RATES[: len(losses)], losses)
    assert rate is None
    assert why in reason


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        (curve().tolist(), 100),
        # The mean of five exceeds 4 x 2.0 with the second of 20; one outlier does not end it.
        ([2.0] * 20 + [15.0] + [2.0] * 9 + [20.0] * 30, 32),
        ([2.0] * 20 + [math.nan] + [2.0] * 9, 20),
        ([math.nan] * 20, 0),
    ],
)
def test_losses_that_are_known(narrow, compute, monkeypatch, losses, kept) -> None:
    recipe = replace(narrow, optimizer="muon", muon_learning_rate=0.05)  # of others it is 0.02
    state, left, seen = state_of(recipe, compute), iter(losses), []

    def step(*_, **__) -> None:
        state.totals += torch.tensor([4 * next(left), 0, 0, 4])
        seen.append([(group["lr"], group["momentum"]) for group in state.optimizer.param_groups])

    monkeypatch.setattr(lr_finder, "train_step", step)
    result = range_test(state, recipe, compute, made_batches(100), steps=len(losses))
    np.testing.assert_allclose(result.losses, losses[:kept], rtol=1e-6)
    assert len(result.learning_rates) == len(result.smoothed) == kept
    if kept == 100:
        assert 0.005 < result.suggestion < 0.01
        for rate, groups in zip(RATES, seen, strict=True):
            assert [lr for lr, _ in groups] == pytest.approx([rate, 2.5 * rate])
            assert {momentum for _, momentum in groups} == {recipe.base_momentum}


def test_it_learns_as_training_does(narrow, compute) -> None:
    """The losses are those of plain steps at the same learning rates."""
    recipe = replace(narrow, epochs=4, base_momentum=0.9, max_momentum=0.9)
    state, losses = state_of(recipe, compute), []
    options = {"start": 0.001, "stop": 0.1, "steps": 10}
    result = range_test(state_of(recipe, compute), recipe, compute, made_batches(10), **options)
    for rate, batch in zip(np.geomspace(0.001, 0.1, 10), made_batches(10), strict=True):
        for group in state.optimizer.param_groups:
            group["lr"] = float(rate)
        state.totals.zero_()
        train_step(state, recipe, compute, batch)
        losses.append(state.totals[0].item() / 4)
    assert result.losses.tolist() == losses


def test_the_state_is_as_before(narrow, compute) -> None:
    """However the test ends; and the run goes on as if there had been none."""
    recipe = replace(narrow, epochs=4, optimizer="muon", ema_decay=0.6)
    states = [state_of(recipe, compute), state_of(recipe, compute)]

    def interrupted() -> Iterator[Batch]:
        yield from made_batches(4)
        raise KeyboardInterrupt

    for batches in (made_batches(4), interrupted()):
        for state in states:
            state.model.train()
            for batch in made_batches(2, seed=2):
                train_step(state, recipe, compute, batch)
        before = copy.deepcopy(states[0].to_checkpoint())
        assert_same(before, states[1].to_checkpoint())
        with contextlib.suppress(KeyboardInterrupt):
            range_test(states[0], recipe, compute, batches, start=0.1, steps=10)
        assert_same(states[0].to_checkpoint(), before)


@pytest.fixture
def find(tiny_dataset, tmp_path, monkeypatch) -> Callable[..., RangeTest]:
    """`find_lr` on the CPU, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    fixed = {"split": "official", "device": "cpu", "precision": "fp32", "quiet": True}
    return lambda recipe, **options: find_lr(recipe, tiny_dataset, **fixed | options)


def test_it_sees_training_images_only(find, tiny_dataset, narrow, tmp_path, monkeypatch) -> None:
    make_loader, seen = lr_finder.make_loader, []

    def made(*how, **more):
        seen.append(how[1])
        return make_loader(*how, **more)

    monkeypatch.setattr(lr_finder, "make_loader", made)
    first, again, other = (find(narrow, steps=10, seed=seed).losses for seed in (0, 0, 1))
    np.testing.assert_array_equal(seen[0], make_split(tiny_dataset, "official").train)
    np.testing.assert_array_equal(first, again)
    assert first[0] != other[0]
    assert list(tmp_path.iterdir()) == list(tiny_dataset.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"start": 0.0}, "has to grow"),
        ({"start": 1.0, "stop": 1.0}, "has to grow"),
        ({"stop": math.inf}, "has to grow"),
        ({"steps": 9}, "10 to 2,000"),
        ({"recipe": replace(smoke(), batch_size=16)}, "batch-size 16 is more than the 15"),
    ],
)
def test_what_cannot_be_is_refused(find, narrow, monkeypatch, options, why) -> None:
    with pytest.raises(UserError, match=why):
        find(**{"recipe": narrow} | options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        find(narrow)
