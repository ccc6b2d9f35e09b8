"""One optimiser step: what it computes, however the batch is cut, and what leaves no trace."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same
from torch import nn

from tinylab.data.loader import Batch
from tinylab.model import build_model
from tinylab.recipe import Recipe
from tinylab.recipes import accurate, published, speedrun
from tinylab.run.environment import Compute, choose
from tinylab.training import step as step_module
from tinylab.training.step import (
    TrainState,
    inference,
    new_state,
    out_of_memory,
    relative_cost,
    seconds_per_image,
    shapes,
    train_step,
    warm_up,
)

CLASSES = 6


@pytest.fixture(scope="module")
def compute() -> Compute:
    return choose("cpu", "fp32")


@pytest.fixture
def wide(narrow: Recipe) -> Recipe:
    """A batched recipe with everything in it, on a narrow network."""
    shape = {"name": "wide", "epochs": 4, "batch_size": 8, "width": 16}
    return replace(accurate(), **shape, max_learning_rate=0.05, ema_decay=0.5)


def made_batch(count: int = 8, seed: int = 0, mixed: bool = False) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, generator=rng)
    labels, partners = torch.randint(0, CLASSES, (2, count), generator=rng)
    return Batch(images, labels, partners, 0.7) if mixed else Batch(images, labels)


def state_of(recipe: Recipe, compute: Compute, **options) -> TrainState:
    state = new_state(recipe, CLASSES, seed=0, steps_per_epoch=3, compute=compute, **options)
    state.model.train()
    return state


def gradients(state: TrainState) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in state.model.parameters()]


def everything(state: TrainState) -> dict:
    return copy.deepcopy(state.to_checkpoint())


# --- The loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_mixed_smoothed_batch_is_the_one_written_out(
    compute: Compute, wide: Recipe
) -> None:
    """Soft targets: 0.7 of one label, 0.3 of the other, 15 % of it all spread evenly."""
    state, batch = state_of(wide, compute), made_batch(mixed=True)
    with torch.no_grad():
        probe = copy.deepcopy(state.model)
        logits = probe(step_module.normalise(batch.images, wide)).double()
    targets = 0.7 * F.one_hot(batch.labels, CLASSES) + 0.3 * F.one_hot(batch.partners, CLASSES)
    targets = 0.85 * targets + 0.15 / CLASSES
    train_step(state, wide, compute, batch)
    loss = -(targets * logits.log_softmax(dim=1)).sum()
    assert state.totals[0].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("share", [0.7, 0.3])
def test_a_hit_on_a_mixed_image_is_a_hit_on_the_heavier_label(
    compute: Compute, wide: Recipe, share: float
) -> None:
    state, batch = state_of(wide, compute), made_batch(mixed=True)
    with torch.no_grad():
        guesses = copy.deepcopy(state.model)(step_module.normalise(batch.images, wide)).argmax(
            dim=1
        )
    labels, partners = (
        (guesses, (guesses + 1) % CLASSES) if share > 0.5 else ((guesses + 1) % CLASSES, guesses)
    )
    train_step(state, wide, compute, batch._replace(labels=labels, partners=partners, share=share))
    assert state.totals[1].item() == 8


def test_the_network_sees_the_resolution_of_its_epoch(compute: Compute, wide: Recipe) -> None:
    state = state_of(replace(wide, ramp=((16, 0.25), (32, 0.5))), compute)
    seen = []
    state.model.conv1.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].shape[-2:])
    )
    for epoch in (1, 2, 3, 4):
        state.epoch = epoch
        train_step(state, replace(wide, ramp=((16, 0.25), (32, 0.5))), compute, made_batch())
    assert seen == [(16, 16), (32, 32), (32, 32), (64, 64)]


def test_a_test_is_at_its_own_resolution(compute: Compute, wide: Recipe) -> None:
    model, seen = build_model(wide, CLASSES, seed=0), []
    model.conv1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[-1]))
    for resolution in (64, 72):
        with torch.no_grad():
            inference(model, replace(wide, test_resolution=resolution, resolution=32), compute)(
                made_batch().images
            )
    assert seen == [64, 72]


# --- Cut into pieces --------------------------------------------------------------------------------------------------


class WithoutBatchNorm(nn.Module):
    """A network whose output for an image does not depend on the others of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.adaptive_avg_pool2d(x, 4).flatten(1))


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 7, 8, 100])
@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_do_not_depend_on_how_a_batch_is_cut(
    compute: Compute, wide: Recipe, micro_batch: int, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "build_model", lambda *_: _seeded(WithoutBatchNorm))
    monkeypatch.setattr(step_module, "make_average", lambda *_: None)
    batch, results = made_batch(mixed=mixed), []
    for size in (None, micro_batch):
        state, recipe = state_of(wide, compute), replace(wide, micro_batch=size)
        train_step(state, recipe, compute, batch)
        results.append((gradients(state), state.totals))
    (whole, totals), (cut, cut_totals) = results
    for first, second in zip(whole, cut, strict=True):
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-7)
    assert torch.allclose(totals, cut_totals, rtol=1e-5)
    assert max(gradient.abs().max() for gradient in whole) > 1e-3


def _seeded(network: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network()


@pytest.mark.parametrize("micro_batch", [3, 4])
def test_pieces_are_no_larger_than_asked_for(
    compute: Compute, wide: Recipe, micro_batch: int
) -> None:
    state, seen = state_of(wide, compute), []
    state.model.conv1.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    train_step(state, replace(wide, micro_batch=micro_batch), compute, made_batch())
    assert sum(seen) == 8
    assert max(seen) <= micro_batch
    assert len(seen) == math.ceil(8 / micro_batch)


def test_a_cut_batch_is_one_step_of_optimiser_schedule_and_average(
    compute: Compute, wide: Recipe
) -> None:
    state = state_of(wide, compute)
    before = state.scheduler.last_epoch
    train_step(state, replace(wide, micro_batch=2), compute, made_batch())
    assert state.scheduler.last_epoch == before + 1
    assert state.step == 1
    assert int(state.average.n_averaged) == 1
    assert state.totals[3].item() == 8


# --- Averages ---------------------------------------------------------------------------------------------------------


def test_the_average_follows_the_weights(compute: Compute, wide: Recipe) -> None:
    state, expected = state_of(replace(wide, ema_decay=0.15), compute), None
    for number in range(4):
        train_step(state, wide, compute, made_batch(seed=number))
        now = state.model.fc.weight.detach().clone()
        expected = now if expected is None else 0.15 * expected + 0.85 * now
    assert torch.allclose(state.tested.fc.weight, expected, atol=1e-6)
    assert not torch.allclose(state.model.fc.weight, expected, atol=1e-6)


def test_without_an_average_the_network_itself_is_tested(compute: Compute, narrow: Recipe) -> None:
    state = state_of(narrow, compute)
    assert state.tested is state.model
    assert state.average is None


# --- Rehearsals leave no trace ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("rehearse", ["warm_up", "seconds_per_image"])
def test_a_rehearsal_changes_nothing(
    compute: Compute, wide: Recipe, steps: int, rehearse: str, optimizer: str
) -> None:
    """In the middle of a run as at its start; and the run goes on as if there had been none."""
    recipe = replace(wide, ramp=((32, 0.5),), optimizer=optimizer)
    state, other = state_of(recipe, compute), state_of(recipe, compute)
    for number in range(steps):
        for each in (state, other):
            train_step(each, recipe, compute, made_batch(seed=number))
    before, generators = everything(state), (torch.get_rng_state(), np.random.get_state()[1].copy())
    rehearsals: dict[str, Callable] = {
        "warm_up": lambda: warm_up(state, recipe, compute, train_images=21, test_images=7),
        "seconds_per_image": lambda: seconds_per_image(state, recipe, compute),
    }
    rehearsals[rehearse]()
    assert_same(everything(state), before)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])
    for each in (state, other):
        each.model.train()
        train_step(each, recipe, compute, made_batch(seed=9))
    assert_same(everything(state), everything(other))


def test_a_warm_up_meets_every_shape_of_the_run(compute: Compute, wide: Recipe) -> None:
    recipe = replace(wide, ramp=((32, 0.5),), drop_last=False)
    state, trained, tested = state_of(recipe, compute), set(), set()
    for network in (state.model, state.tested):
        network.conv1.register_forward_pre_hook(
            lambda module, inputs, network=network: (trained if network.training else tested).add(
                (len(inputs[0]), inputs[0].shape[-1])
            )
        )
    warm_up(state, recipe, compute, train_images=21, test_images=507)
    assert trained == {(8, 32), (8, 64), (5, 32), (5, 64)}
    assert tested == {(32, 64), (27, 64)}  # of 507 images, on a CPU
    assert shapes(recipe, 21) == 4
    assert shapes(replace(recipe, drop_last=True), 21) == 2


# --- Memory and cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
            ),
            True,
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes."),
            True,
        ),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            True,
        ),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, is_memory: bool) -> None:
    assert out_of_memory(error) is is_memory


def test_the_cost_of_an_image_goes_by_area() -> None:
    recipe = speedrun()
    assert [round(relative_cost(recipe, epoch), 3) for epoch in (1, 4, 12)] == [0.391, 0.562, 1.0]
    assert relative_cost(published(), 1) == 1


def test_the_measured_cost_is_that_of_a_step(compute: Compute, narrow: Recipe) -> None:
    seconds = seconds_per_image(state_of(narrow, compute), narrow, compute)
    assert 1e-6 < seconds < 1
