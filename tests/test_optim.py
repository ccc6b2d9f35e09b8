"""SGD and Muon against loops written by hand, who decays and who does not, and the schedule."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.flop_counter import FlopCounterMode

from tinylab.exceptions import UserError
from tinylab.model import ResNet18
from tinylab.recipe import Recipe
from tinylab.recipes import accurate, official, published, speedrun
from tinylab.training.optim import make_optimizer, orthogonalise, schedule
from tinylab.training.record import muon_petaflop

STEPS = 8


@pytest.fixture
def model() -> ResNet18:
    """A narrow network whose parameters are all random, none of them 0 or 1 as the first are."""
    network = ResNet18(classes=3, width=4)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.25, generator=torch.Generator().manual_seed(0))
    return network


def set_gradients(model: nn.Module, seed: int) -> None:
    """Make random gradients in the memory format of each parameter, as backward passes do."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator) / 10
        parameter.grad = torch.empty_like(parameter).copy_(values)


def walk(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: OneCycleLR) -> None:
    for step in range(STEPS - 1):
        set_gradients(model, seed=step)
        optimizer.step()
        scheduler.step()


def muon(**changes: object) -> Recipe:
    """The rate of the convolutions is a twentieth of the others'."""
    return replace(accurate(), optimizer="muon", muon_learning_rate=0.05, **changes)


@pytest.mark.parametrize("momentum", [(0.85, 0.95, True), (0.9, 0.9, False), (0.0, 0.0, False)])
def test_the_published_updates_are_pytorchs_bit_for_bit(model, momentum) -> None:
    base, most, nesterov = momentum
    changes = {"base_momentum": base, "max_momentum": most, "nesterov": nesterov}
    plain = copy.deepcopy(model)
    theirs = torch.optim.SGD(
        plain.parameters(), lr=0.02, momentum=most, nesterov=nesterov, weight_decay=0.01
    )
    their_schedule = OneCycleLR(
        theirs, max_lr=0.02, total_steps=STEPS, pct_start=1 / 3, anneal_strategy="linear",
        base_momentum=base, max_momentum=most, div_factor=10, final_div_factor=10,
    )  # fmt: skip
    walk(plain, theirs, their_schedule)
    walk(model, *make_optimizer(model, replace(published(), weight_decay=0.01, **changes), STEPS))
    for ours, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("kind", ["sgd", "muon"])
def test_scales_shifts_and_biases_do_not_decay(model, kind) -> None:
    """Also those of a shortcut's batch norm, whose name has no "bn" in it."""
    optimizer, scheduler = make_optimizer(model, replace(accurate(), optimizer=kind), STEPS)
    grouped = [id(each) for group in optimizer.param_groups for each in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(STEPS - 1):
        optimizer.step()
        scheduler.step()
    for first, now in zip(before.parameters(), model.parameters(), strict=True):
        share = now.norm() / first.norm()
        assert share == 1 if now.ndim == 1 else 0.9 < share < 0.9999


def test_muon_takes_the_convolutions_at_its_own_rate_and_sgd_all_else(model) -> None:
    recipe = muon(epochs=1, base_momentum=0.7, max_momentum=0.95)
    plain, sgd = copy.deepcopy(model), replace(recipe, optimizer="sgd", muon_learning_rate=0.02)
    walk(plain, *make_optimizer(plain, sgd, STEPS))
    optimizer, scheduler = make_optimizer(model, recipe, STEPS)
    others, _, convolutions = optimizer.param_groups
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0, 0.075]
    for step, rate, momentum in list(schedule(recipe, STEPS * recipe.batch_size))[: STEPS - 1]:
        assert (others["lr"], others["momentum"]) == (rate, momentum)
        assert convolutions["lr"] == pytest.approx(0.05 * rate, rel=1e-9)  # of a peak of 1
        set_gradients(model, seed=step)
        optimizer.step()
        scheduler.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (ours.ndim != 4)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Iterate as Jordan writes it, on the matrix itself, in float64."""
    x = matrix.double() / (torch.linalg.matrix_norm(matrix.double()) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.numerical
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_convolutions_move_as_written_by_hand(nesterov, layout) -> None:
    """Wide, tall and square matrices; two of one shape."""
    sizes = [(4, 8, 3, 3), (4, 8, 3, 3), (16, 4, 1, 1), (9, 1, 3, 3)]
    generator = torch.Generator().manual_seed(1)
    model = nn.ParameterList(nn.Parameter(torch.randn(size, generator=generator)) for size in sizes)
    for parameter in model:
        parameter.data = parameter.data.contiguous(memory_format=layout)
    expected = [parameter.detach().double().flatten(1) for parameter in model]
    momenta = [torch.zeros_like(matrix) for matrix in expected]
    recipe = muon(muon_weight_decay=0.5, nesterov=nesterov, base_momentum=0.6, max_momentum=0.9)
    optimizer, scheduler = make_optimizer(model, recipe, STEPS)
    for step in range(STEPS - 1):
        set_gradients(model, seed=step)
        (group,) = optimizer.param_groups
        for number, parameter in enumerate(model):
            gradient, (rows, columns) = parameter.grad.double().flatten(1), expected[number].shape
            momenta[number] = group["momentum"] * momenta[number] + gradient
            move = gradient + group["momentum"] * momenta[number] if nesterov else momenta[number]
            larger = max(1, rows / columns) ** 0.5
            expected[number] = expected[number] * (1 - group["lr"] * 0.5)
            expected[number] = expected[number] - group["lr"] * larger * newton_schulz(move)
        optimizer.step()
        scheduler.step()
    for parameter, matrix in zip(model, expected, strict=True):
        assert torch.allclose(parameter.double().flatten(1), matrix, atol=2e-5)


@pytest.mark.numerical
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6])
@pytest.mark.parametrize("shape", [(64, 27), (27, 64), (128, 1152), (256, 256), (1, 9)])
def test_orthogonalise_against_float64(shape, condition) -> None:
    """Wide, tall and square; singular values evenly spread, or one or all but one small."""
    generator, rank = torch.Generator().manual_seed(3), min(shape)
    u, v = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]
        for size in shape
    )
    spread = condition ** -torch.linspace(0, 1, rank, dtype=torch.float64)
    one_small, all_but_one_small = torch.ones(rank), torch.full((rank,), 1 / condition)
    one_small[-1], all_but_one_small[0] = 1 / condition, 1
    for values in (spread, one_small, all_but_one_small):
        matrix = ((u * values) @ v.mT).float()
        expected, result = newton_schulz(matrix), orthogonalise(matrix[None])[0]
        assert (result - expected).norm() < 2e-3 * expected.norm()
        assert torch.linalg.matrix_norm(result, 2) < 1.25
    assert torch.equal(orthogonalise(torch.zeros(2, *shape)), torch.zeros(2, *shape))


def test_the_arithmetic_of_muon_is_what_its_products_take(model) -> None:
    with FlopCounterMode(display=False) as counter:
        for parameter in model.parameters():
            if parameter.ndim == 4:
                orthogonalise(parameter.detach().flatten(1)[None])
    flop = counter.get_total_flops()
    assert muon_petaflop(model, steps=1000) == pytest.approx(flop * 1000 / 1e15, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "images", "warm", "first", "last"),
    [
        (accurate(), 77_000, 3.0, 0.1, 0.01),
        (speedrun(), 77_000, 1.5, 0.1, 0.02),
        (official(), 100_000, 5.0, 0.1, 1e-4),
    ],
)
def test_the_schedules_rise_and_fall_as_the_recipes_say(recipe, images, warm, first, last) -> None:
    rows = list(schedule(recipe, images))
    rates = [learning_rate / recipe.max_learning_rate for _, learning_rate, _ in rows]
    per_epoch = images // recipe.batch_size
    assert [step for step, *_ in rows] == list(range(recipe.epochs * per_epoch))
    assert rates.index(max(rates)) == pytest.approx(warm * per_epoch, abs=1)
    assert [rates[0], max(rates), rates[-1]] == pytest.approx([first, 1, last], rel=1e-3)
    assert {momentum for _, _, momentum in rows} == {0.9}


@pytest.mark.parametrize(("share", "steps"), [(0.1, 10), (0.025, 40), (1 / 3, 3), (0.5, 2)])
def test_a_rise_of_exactly_one_step_has_a_schedule(share, steps) -> None:
    recipe = replace(accurate(), epochs=1, warmup_share=share, optimizer="muon")
    rows = list(schedule(recipe, 512 * steps))
    assert len(rows) == steps
    assert all(0 < learning_rate <= 1 + 1e-9 for _, learning_rate, _ in rows)
    with pytest.raises(UserError, match=r"^511 training images do not fill a batch of 512"):
        schedule(recipe, 511)
