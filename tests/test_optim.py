"""SGD and Muon against loops written by hand, who decays and who does not, and the schedule's steps."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.flop_counter import FlopCounterMode

from tinylab.exceptions import UserError
from tinylab.model import ResNet18, build_model
from tinylab.recipe import Recipe
from tinylab.recipes import accurate, official, published, speedrun
from tinylab.training.optim import Muon, make_optimizer, muon_petaflop, orthogonalise, schedule

STEPS = 8
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def model() -> ResNet18:
    """A narrow network whose parameters are all random, and none of them 0 or 1 as the first ones are."""
    network = ResNet18(classes=3, width=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return network


def with_gradients(model: nn.Module, seed: int) -> None:
    """Random gradients in the memory format of each parameter, as backward passes leave them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(
            torch.randn(parameter.shape, generator=generator) / 10
        )


def walk(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: OneCycleLR, steps: range
) -> None:
    for step in steps:
        with_gradients(model, seed=step)
        optimizer.step()
        scheduler.step()


def assert_equal_weights(ours: nn.Module, theirs: nn.Module) -> None:
    different = [
        name
        for (name, first), second in zip(ours.named_parameters(), theirs.parameters(), strict=True)
        if not torch.equal(first, second)
    ]
    assert not different


def muon(**changes: object) -> Recipe:
    """The rate of the convolutions is a twentieth of the others'."""
    return replace(accurate(), optimizer="muon", muon_learning_rate=0.05, **changes)


def shapes(group: dict) -> set[int]:
    return {parameter.ndim for parameter in group["params"]}


# --- SGD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [(0.85, 0.95, True), (0.9, 0.9, False), (0.0, 0.0, False)])
def test_the_published_updates_are_pytorchs_bit_for_bit(
    model: ResNet18, momentum: tuple[float, float, bool]
) -> None:
    base, most, nesterov = momentum
    recipe = replace(
        published(), base_momentum=base, max_momentum=most, nesterov=nesterov, weight_decay=0.01
    )
    plain = copy.deepcopy(model)
    theirs = torch.optim.SGD(
        plain.parameters(), lr=0.02, momentum=most, nesterov=nesterov, weight_decay=0.01
    )
    their_schedule = OneCycleLR(
        theirs,
        max_lr=0.02,
        total_steps=STEPS,
        pct_start=1 / 3,
        anneal_strategy="linear",
        base_momentum=base,
        max_momentum=most,
        div_factor=10,
        final_div_factor=10,
    )
    ours, our_schedule = make_optimizer(model, recipe, STEPS)
    before = copy.deepcopy(model)
    walk(plain, theirs, their_schedule, range(STEPS - 1))
    walk(model, ours, our_schedule, range(STEPS - 1))
    assert_equal_weights(model, plain)
    assert not any(
        torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )


def test_the_published_optimizer_has_one_group_in_the_networks_order(model: ResNet18) -> None:
    optimizer, _ = make_optimizer(model, published(), STEPS)
    (group,) = optimizer.param_groups
    assert [id(each) for each in group["params"]] == [id(each) for each in model.parameters()]
    assert type(optimizer) is torch.optim.SGD


@pytest.mark.parametrize("kind", ["sgd", "muon"])
@pytest.mark.parametrize("decay_1d", [False, True])
def test_every_parameter_is_in_one_group(model: ResNet18, kind: str, decay_1d: bool) -> None:
    optimizer, _ = make_optimizer(
        model, replace(accurate(), optimizer=kind, decay_1d=decay_1d), STEPS
    )
    found = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())
    assert all(group["params"] for group in optimizer.param_groups)


def test_scales_shifts_and_biases_do_not_decay(model: ResNet18) -> None:
    """Also those of a shortcut's batch norm, whose name has no "bn" in it."""
    optimizer, scheduler = make_optimizer(model, accurate(), STEPS)
    decaying, flat = optimizer.param_groups
    assert (decaying["weight_decay"], flat["weight_decay"]) == (5e-4, 0)
    assert shapes(decaying) == {2, 4}
    assert shapes(flat) == {1}
    assert any(each is model.layer2[0].downsample[1].weight for each in flat["params"])
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(STEPS - 1):
        optimizer.step()
        scheduler.step()
    for first, now in zip(before.parameters(), model.parameters(), strict=True):
        if now.ndim == 1:
            assert torch.equal(now, first)
        else:
            assert 0.9 < now.norm() / first.norm() < 0.9999


@pytest.mark.parametrize(
    "recipe", [published(), accurate(), muon()], ids=["published", "accurate", "muon"]
)
def test_momentum_starts_at_zero_and_is_there(model: ResNet18, recipe: Recipe) -> None:
    optimizer, _ = make_optimizer(model, recipe, STEPS)
    for parameter in model.parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert momentum.shape == parameter.shape
        assert momentum.stride() == parameter.stride()
        assert not momentum.any()


# --- Muon -------------------------------------------------------------------------------------------------------------


def test_muon_takes_the_convolutions_at_its_own_rate(model: ResNet18) -> None:
    recipe = muon(epochs=1, muon_weight_decay=0.2)
    optimizer, scheduler = make_optimizer(model, recipe, STEPS)
    others, flat, convolutions = optimizer.param_groups
    assert [group["orthogonal"] for group in optimizer.param_groups] == [False, False, True]
    assert [shapes(group) for group in optimizer.param_groups] == [{2}, {1}, {4}]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0, 0.2]
    expected, peaks = list(schedule(recipe, STEPS * recipe.batch_size)), []
    for _, learning_rate, momentum in expected:
        assert [group["lr"] for group in (others, flat)] == [learning_rate, learning_rate]
        assert convolutions["lr"] == pytest.approx(0.05 * learning_rate, rel=1e-9)  # of a peak of 1
        assert {group["momentum"] for group in optimizer.param_groups} == {momentum}
        peaks.append(convolutions["lr"])
        optimizer.step()
        if len(peaks) < STEPS:
            scheduler.step()
    assert 0.045 < max(peaks) <= 0.05


def test_all_else_moves_as_sgd_moves_it(model: ResNet18) -> None:
    plain = copy.deepcopy(model)
    recipe = muon(base_momentum=0.7, max_momentum=0.95, weight_decay=0.01)
    walk(
        plain,
        *make_optimizer(plain, replace(recipe, optimizer="sgd", muon_learning_rate=0.02), STEPS),
        range(STEPS - 1),
    )
    walk(model, *make_optimizer(model, recipe, STEPS), range(STEPS - 1))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (ours.ndim != 4)


def nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The Newton-Schulz iteration on one float64 matrix, by the singular values that it is a polynomial of."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / (values.norm() + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return u @ values.diag() @ v


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_convolutions_move_as_written_by_hand(nesterov: bool, channels_last: bool) -> None:
    """Wide, tall and square matrices; two of one shape."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
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
        with_gradients(model, seed=step)
        (group,) = optimizer.param_groups
        for number, parameter in enumerate(model):
            gradient, (rows, columns) = parameter.grad.double().flatten(1), expected[number].shape
            momenta[number] = group["momentum"] * momenta[number] + gradient
            move = gradient + group["momentum"] * momenta[number] if nesterov else momenta[number]
            larger = max(1, rows / columns) ** 0.5
            expected[number] = expected[number] * (1 - group["lr"] * 0.5)
            expected[number] = expected[number] - group["lr"] * larger * nearest_orthogonal(move)
        optimizer.step()
        scheduler.step()
    for parameter, matrix in zip(model, expected, strict=True):
        assert torch.allclose(parameter.double().flatten(1), matrix, atol=2e-5)


@pytest.mark.parametrize(
    "shape", [(3, 8, 8), (2, 16, 50), (2, 50, 16), (1, 64, 576), (1, 1, 9), (1, 1, 1)]
)
def test_singular_values_become_about_one_and_vectors_stay(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    matrices = torch.randn(shape, generator=generator) * 1e-3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ orthogonalise(matrices) @ v.mT
    values = rotated.diagonal(dim1=1, dim2=2)
    assert torch.allclose(rotated, torch.diag_embed(values), atol=1e-3)
    assert values.max() < 1.25
    assert values.median() > 0.65
    if shape[1] != shape[2]:  # a square random matrix has values near zero, which take more steps
        assert values.min() > 0.65


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """The iteration as Jordan writes it, on the matrix itself, in float64."""
    x = matrix.double() / (torch.linalg.matrix_norm(matrix.double()) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize(
    "shape", [(64, 27), (64, 576), (576, 64), (512, 4608), (256, 256), (16, 27)]
)
def test_the_small_square_matrix_gives_the_same(shape: tuple[int, int], condition: float) -> None:
    """Wide, tall and square, well and badly conditioned: singular values evenly spread, or one or all but one small."""
    generator = torch.Generator().manual_seed(3)
    rank = min(shape)
    u, v = (
        torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]
        for size in shape
    )
    spread = condition ** -torch.linspace(0, 1, rank, dtype=torch.float64)
    one_small, all_but_one_small = torch.ones(rank), torch.full((rank,), 1 / condition)
    one_small[-1], all_but_one_small[0] = 1 / condition, 1
    for values in (spread, one_small, all_but_one_small):
        matrix = ((u * values) @ v.mT).float()
        expected = newton_schulz(matrix)
        error = torch.linalg.matrix_norm(
            orthogonalise(matrix[None])[0] - expected
        ) / torch.linalg.matrix_norm(expected)
        assert error < 2e-3


def test_the_arithmetic_of_muon_is_what_its_products_take(model: ResNet18) -> None:
    with FlopCounterMode(display=False) as counter:
        for parameter in model.parameters():
            if parameter.ndim == 4:
                orthogonalise(parameter.detach().flatten(1)[None])
    assert muon_petaflop(model, steps=1000) == pytest.approx(
        counter.get_total_flops() * 1000 / 1e15, rel=1e-3
    )


def test_matrices_of_zeros_and_tiny_ones_do_not_explode() -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, 4, 9)), torch.zeros(2, 4, 9))
    assert orthogonalise(torch.full((1, 4, 9), 1e-30)).abs().max() < 1e-6
    assert torch.isfinite(orthogonalise(torch.full((1, 4, 9), 1e15))).all()
    assert orthogonalise(torch.ones(1, 4, 9, dtype=torch.float64)).dtype == torch.float64


def test_a_layer_without_gradient_decays_and_stays_finite(model: ResNet18) -> None:
    """The first step of a block whose last scale starts at zero."""
    before = copy.deepcopy(model)
    with_gradients(model, seed=0)
    model.layer1[0].conv1.weight.grad.zero_()
    model.layer1[0].conv2.weight.grad = None
    optimizer, _ = make_optimizer(model, muon(muon_weight_decay=0.5), STEPS)
    kept = 1 - optimizer.param_groups[-1]["lr"] * 0.5
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert torch.allclose(
        model.layer1[0].conv1.weight, before.layer1[0].conv1.weight * kept, rtol=1e-6
    )
    assert torch.equal(model.layer1[0].conv2.weight, before.layer1[0].conv2.weight)
    assert not torch.allclose(
        model.layer1[1].conv1.weight, before.layer1[1].conv1.weight, rtol=1e-2
    )


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
@pytest.mark.parametrize("shape", [(16, 64, 1, 1), (64, 16, 1, 1), (16, 16, 3, 3)])
def test_pytorchs_own_muon_moves_the_same_matrix_alike(shape: tuple[int, ...]) -> None:
    """Theirs iterates in bf16, hence the tolerance: 4 % of how far the weights went."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)
    ours = nn.ParameterList([nn.Parameter(start.clone())])
    matrix = nn.Parameter(start.flatten(1).clone())
    recipe = muon(muon_weight_decay=0.3, base_momentum=0.9, max_momentum=0.9)
    optimizer, _ = make_optimizer(ours, recipe, STEPS)
    rate = optimizer.param_groups[0]["lr"]
    theirs = torch.optim.Muon([matrix], lr=rate, weight_decay=0.3, momentum=0.9, nesterov=True)
    for step in range(6):
        with_gradients(ours, seed=step)
        matrix.grad = ours[0].grad.flatten(1).clone()
        optimizer.step()
        theirs.step()
    went = (matrix - start.flatten(1)).norm()
    assert (ours[0].flatten(1) - matrix).norm() < 0.04 * went
    assert went > 0.05


def test_muon_has_no_fused_form(model: ResNet18) -> None:
    optimizer, _ = make_optimizer(model, muon(), STEPS, fused=True)
    assert not any(group["fused"] for group in optimizer.param_groups)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


def test_a_closure_is_called_once_and_its_gradients_count(model: ResNet18) -> None:
    calls, twin = [], copy.deepcopy(model)

    def closure() -> torch.Tensor:
        with_gradients(model, seed=0)
        calls.append(torch.is_grad_enabled())
        return torch.tensor(1.5)

    optimizer, _ = make_optimizer(model, muon(), STEPS)
    assert optimizer.step(closure) == 1.5
    assert calls == [True]
    walk(twin, *make_optimizer(twin, muon(), STEPS), range(1))
    assert_equal_weights(model, twin)


# --- What both can do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [published(), accurate(), muon()], ids=["published", "accurate", "muon"]
)
def test_a_saved_optimizer_continues_bit_for_bit(model: ResNet18, recipe: Recipe) -> None:
    twin = copy.deepcopy(model)
    walk(twin, *make_optimizer(twin, recipe, STEPS), range(STEPS - 1))

    optimizer, scheduler = make_optimizer(model, recipe, STEPS)
    walk(model, optimizer, scheduler, range(3))
    file = io.BytesIO()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": scheduler.last_epoch,
        },
        file,
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    continued = ResNet18(classes=3, width=4)
    continued.load_state_dict(saved["model"])
    optimizer, scheduler = make_optimizer(continued, recipe, STEPS)
    scheduler.last_epoch = saved["step"]
    optimizer.load_state_dict(saved["optimizer"])
    walk(continued, optimizer, scheduler, range(3, STEPS - 1))
    assert_equal_weights(continued, twin)


@pytest.mark.parametrize("recipe", [accurate(), muon()], ids=["sgd", "muon"])
def test_loss_scaling_changes_nothing_but_skips_what_overflowed(
    model: ResNet18, recipe: Recipe
) -> None:
    """The scale is a power of two: what it multiplies and divides keeps its digits."""
    twin = copy.deepcopy(model)
    walk(twin, *make_optimizer(twin, recipe, STEPS), range(2))

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    scaler.scale(torch.ones(1))  # makes the scale a tensor, as the loss of a step does
    optimizer, scheduler = make_optimizer(model, recipe, STEPS)
    for step, overflowed in ((7, True), (0, False), (1, False)):
        before, momenta = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
        with_gradients(model, seed=step)
        for parameter in model.parameters():
            parameter.grad *= scaler.get_scale()
        if overflowed:
            model.layer3[1].conv1.weight.grad[0, 0, 0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if overflowed:
            assert_equal_weights(model, before)
            for number, state in optimizer.state_dict()["state"].items():
                assert torch.equal(state["momentum_buffer"], momenta[number]["momentum_buffer"])
        else:
            scheduler.step()
    assert_equal_weights(model, twin)


@pytest.mark.parametrize("kind", ["sgd", "muon"])
def test_a_network_learns_to_tell_two_colours(kind: str, narrow: Recipe) -> None:
    """The whole of it: initialisation, groups, schedule, a forward and a backward pass."""
    recipe = replace(
        accurate(), optimizer=kind, width=narrow.width, max_learning_rate=0.1, label_smoothing=0.0
    )
    network = build_model(recipe, classes=2, seed=0)
    optimizer, scheduler = make_optimizer(network, recipe, 12)
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(8) % 2
    losses = []
    for _ in range(11):
        images = torch.randn(8, 3, 16, 16, generator=generator)
        images[labels == 1, 0] += 1.0
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- The schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [accurate(), speedrun(), official()], ids=["accurate", "speedrun", "official"]
)
def test_the_target_schedules_rise_and_fall_as_the_study_has_it(recipe: Recipe) -> None:
    images, warm, first, last = {
        "accurate": (77_000, 3.0, 0.1, 0.01),
        "speedrun": (77_000, 1.5, 0.1, 0.02),
        "official": (100_000, 5.0, 0.1, 1e-4),
    }[recipe.name]
    steps = list(schedule(recipe, images))
    rates = [learning_rate / recipe.max_learning_rate for _, learning_rate, _ in steps]
    per_epoch = images // recipe.batch_size
    assert len(steps) == recipe.epochs * per_epoch
    assert rates.index(max(rates)) == pytest.approx(warm * per_epoch, abs=1)
    assert (rates[0], max(rates), rates[-1]) == (
        pytest.approx(first),
        pytest.approx(1, abs=1e-3),
        pytest.approx(last),
    )
    assert {momentum for _, _, momentum in steps} == {0.9}


def test_the_schedule_is_the_optimizers(model: ResNet18) -> None:
    recipe = replace(accurate(), epochs=2, batch_size=10)
    optimizer, scheduler = make_optimizer(model, recipe, 6)
    for number, (step, learning_rate, momentum) in enumerate(
        schedule(recipe, 39)
    ):  # 3 batches and 9 images left out
        group = optimizer.param_groups[0]
        assert (step, learning_rate, momentum) == (number, group["lr"], group["momentum"])
        optimizer.step()
        if number < 5:
            scheduler.step()
    assert number == 5


@pytest.mark.parametrize(
    ("warmup_share", "steps"), [(0.1, 10), (0.025, 40), (1 / 3, 3), (0.5, 2), (0.125, 8)]
)
def test_a_rise_of_exactly_one_step_has_a_schedule(warmup_share: float, steps: int) -> None:
    recipe = replace(accurate(), epochs=1, warmup_share=warmup_share, optimizer="muon")
    rows = list(schedule(recipe, 512 * steps))
    assert len(rows) == steps
    assert all(0 < learning_rate <= 1 + 1e-9 for _, learning_rate, _ in rows)


@pytest.mark.parametrize("images", [0, 511])
def test_a_run_without_a_step_is_refused_before_the_first_row(images: int) -> None:
    with pytest.raises(UserError, match=rf"^{images} training images do not fill a batch of 512"):
        schedule(accurate(), images)
    assert len(list(schedule(replace(accurate(), epochs=1), 512))) == 1


def test_global_randomness_is_left_alone(model: ResNet18) -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    list(schedule(muon(epochs=1), 1024))
    walk(model, *make_optimizer(model, muon(), STEPS), range(2))
    assert torch.equal(torch.rand(4), expected)


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recipe", [accurate(), muon()], ids=["sgd", "muon"])
def test_a_gpu_takes_the_same_steps_without_being_waited_for(
    model: ResNet18, recipe: Recipe
) -> None:
    there = copy.deepcopy(model).cuda()
    walk(model, *make_optimizer(model, recipe, STEPS), range(3))
    optimizer, scheduler = make_optimizer(there, recipe, STEPS, fused=True)
    start = copy.deepcopy(there)
    for step in range(3):
        with_gradients(there, seed=step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step allocates
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scheduler.step()
    for ours, theirs, before in zip(
        model.parameters(), there.parameters(), start.parameters(), strict=True
    ):
        went = (theirs - before).norm().item()
        assert (ours - theirs.cpu()).norm() < 0.04 * went + 1e-6
    assert isinstance(optimizer, Muon) == (recipe.optimizer == "muon")
