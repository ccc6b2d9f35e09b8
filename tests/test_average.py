"""The running average against a loop written by hand, and batch-norm statistics against sums over all batches."""

import copy
import io
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinylab.exceptions import UserError
from tinylab.model import ResNet18, build_model
from tinylab.recipe import Recipe
from tinylab.recipes import accurate, published
from tinylab.training.average import make_average, reestimate_batch_norm

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def averaged(decay: float | None) -> Recipe:
    return replace(published(), ema_decay=decay)


@pytest.fixture
def model() -> ResNet18:
    """A narrow network, in channels-last memory, with scales and shifts as training leaves them."""
    network = build_model(
        replace(accurate(), width=16, zero_init_residual=False), classes=3, seed=0
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(1 + torch.randn(module.weight.shape, generator=generator) / 5)
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator) / 5)
    return network


def move(model: nn.Module, seed: int) -> None:
    """New weights and buffers, as a step would leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 3)


def some_batches(*sizes: int, side: int = 16) -> list[torch.Tensor]:
    """Network inputs (B, 3, side, side), each batch with colours of its own."""
    generator = torch.Generator().manual_seed(2)
    images = [torch.randn(size, 3, side, side, generator=generator) for size in sizes]
    return [batch + torch.randn(1, 3, 1, 1, generator=generator) for batch in images]


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


class _Operations(TorchDispatchMode):
    """Records the names of tensor operations, and from which devices a number was read."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.read_from: set[str] = set()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: tuple,
        args: tuple = (),
        kwargs: dict | None = None,
    ):
        self.names.add(func.name().split(".")[0])
        if func.name() == "aten::_local_scalar_dense":
            self.read_from.add(args[0].device.type)
        return func(*args, **(kwargs or {}))


# --- The average of the weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.997])
def test_the_average_is_the_loop_written_by_hand(decay: float) -> None:
    """Starts as the first weights it sees, not as those it was made from."""
    model = ResNet18(classes=3, width=2).double()
    average, expected = make_average(model, averaged(decay)), None
    for step in range(20):
        move(model, seed=step)
        average.update_parameters(model)
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        if expected is None:
            expected = weights
        else:
            pairs = zip(expected, weights, strict=True)
            kept = min(
                decay, (1 + step) / (10 + step)
            )  # 2/11, 3/12, ..: 0.5 from the ninth update on
            expected = [kept * mean + (1 - kept) * weight for mean, weight in pairs]
        for mean, parameter in zip(expected, average.module.parameters(), strict=True):
            assert torch.allclose(parameter, mean, rtol=1e-12, atol=1e-14)
    assert int(average.n_averaged) == 20


def test_the_first_weights_fade_from_a_short_run() -> None:
    """150 steps of a decay of 0.997: kept from the start, the first weights would make up 64 % of the average."""
    model = ResNet18(classes=3, width=2)
    average = make_average(model, averaged(0.997))
    for step in range(150):
        torch.nn.init.constant_(model.fc.bias, float(step > 0))
        average.update_parameters(model)
    assert 0.999 < average.module.fc.bias[0].item() <= 1


def test_buffers_are_copied_not_averaged() -> None:
    model = ResNet18(classes=3, width=2)
    average = make_average(model, averaged(0.9))
    for step in range(3):
        move(model, seed=step)
        average.update_parameters(model)
        for ours, theirs in zip(average.module.buffers(), model.buffers(), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype


def test_pytorchs_own_average_is_the_same(model: ResNet18) -> None:
    """With a decay that has risen to its end from the second update on."""
    recipe = averaged(0.15)
    ours = make_average(model, recipe)
    theirs = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema_decay)
    )
    for step in range(3):
        move(model, seed=step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert not changed(ours.state_dict(), theirs.state_dict())


def test_averaging_leaves_the_network_as_it_is(model: ResNet18) -> None:
    average = make_average(model, averaged(0.5))
    for step in range(3):
        move(model, seed=step)
        before, random_state = everything(model), torch.get_rng_state()
        average.update_parameters(model)
        assert not changed(before, model.state_dict())
        assert torch.equal(torch.get_rng_state(), random_state)
    assert changed(before, average.module.state_dict())
    assert all(parameter.grad is None for parameter in average.parameters())


def test_the_average_shares_no_memory_with_the_network_and_keeps_its_format(
    model: ResNet18,
) -> None:
    average = make_average(model, averaged(0.5))
    for ours, theirs in zip(average.module.parameters(), model.parameters(), strict=True):
        assert ours.data_ptr() != theirs.data_ptr()
        assert ours.stride() == theirs.stride()
    assert average.module.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert [type(each) for each in average.module.modules()] == [
        type(each) for each in model.modules()
    ]


def test_a_recipe_without_decay_has_no_average(model: ResNet18) -> None:
    assert make_average(model, averaged(None)) is None


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.1, float("nan")])
def test_a_decay_that_averages_nothing_is_impossible(decay: float) -> None:
    with pytest.raises(UserError, match="ema_decay must be"):
        averaged(decay)


def test_a_saved_average_continues_bit_for_bit(model: ResNet18) -> None:
    twin, recipe = copy.deepcopy(model), averaged(0.9)
    undisturbed, average = make_average(twin, recipe), make_average(model, recipe)
    for step in range(5):
        move(twin, seed=step)
        undisturbed.update_parameters(twin)
        if step == 2:
            file = io.BytesIO()
            torch.save(average.state_dict(), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            assert all(isinstance(value, torch.Tensor) for value in saved.values())
            average = make_average(
                build_model(replace(recipe, width=16), classes=3, seed=9), recipe
            )
            average.load_state_dict(saved)
        move(model, seed=step)
        average.update_parameters(model)
    assert not changed(undisturbed.state_dict(), average.state_dict())


def test_an_update_reads_nothing_from_the_device_and_sends_nothing_there(model: ResNet18) -> None:
    """Either would wait for it. "meta" stands for a GPU; PyTorch's own average sends its counter."""
    elsewhere = copy.deepcopy(model).to("meta")
    own = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    sent = {}
    for name, average in (("ours", make_average(model, averaged(0.9))), ("own", own)):
        average.module = average.module.to("meta")
        for _ in range(2):
            with _Operations() as operations:
                average.update_parameters(elsewhere)
        assert operations.read_from <= {"cpu"}
        sent[name] = "aten::_to_copy" in operations.names
        assert int(average.n_averaged) == 2
    assert sent == {"ours": False, "own": True}


# --- Batch-norm statistics --------------------------------------------------------------------------------------------


@pytest.mark.numerical
@pytest.mark.parametrize("sizes", [(4, 4, 4), (6, 2, 3), (5,)])
def test_statistics_are_plain_means_over_the_batches(
    model: ResNet18, sizes: tuple[int, ...]
) -> None:
    """In every layer, whatever the statistics were before."""
    batches, seen, hooks = some_batches(*sizes), {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(torch.nan)
            module.running_var.fill_(torch.inf)
            keep = seen.setdefault(name, []).append
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, inputs, keep=keep: keep(inputs[0].clone())
                )
            )
    reestimate_batch_norm(model, batches)
    assert len(seen) == 20
    for name, inputs in seen.items():
        layer, flat = (
            model.get_submodule(name),
            [each.transpose(0, 1).flatten(1).double() for each in inputs],
        )
        mean = torch.stack([values.mean(1) for values in flat]).mean(0)
        variance = torch.stack([values.var(1, unbiased=True) for values in flat]).mean(0)
        assert torch.allclose(layer.running_mean.double(), mean, rtol=1e-4, atol=1e-5), name
        assert torch.allclose(layer.running_var.double(), variance, rtol=1e-4, atol=1e-5), name
        assert int(layer.num_batches_tracked) == len(sizes)


@pytest.mark.numerical
def test_the_mean_is_that_of_all_images_and_the_variance_that_within_batches() -> None:
    """Against one layer that sees all images at once: the variance lacks that of the batches' means."""
    batches = some_batches(8, 8, 8, 8)
    layer, at_once = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=1.0)
    reestimate_batch_norm(layer, batches)
    at_once(torch.cat(batches))
    assert torch.allclose(layer.running_mean, at_once.running_mean, atol=1e-6)
    between = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).var(0, unbiased=False)
    assert between.min() > 0.1
    assert torch.allclose(layer.running_var + between, at_once.running_var, rtol=2e-3)


def test_pytorchs_own_statistics_are_the_same(model: ResNet18) -> None:
    batches, theirs = some_batches(4, 4, 3), copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, theirs)
    reestimate_batch_norm(model, batches)
    for name, tensor in theirs.state_dict().items():
        assert torch.allclose(
            model.state_dict()[name].float(), tensor.float(), rtol=1e-5, atol=1e-6
        ), name


def test_statistics_are_estimated_without_reading_a_number(model: ResNet18) -> None:
    """On a GPU that would wait for it, in every layer, as PyTorch's own update_bn does."""
    with _Operations() as ours:
        reestimate_batch_norm(model, some_batches(3, 3))
    with _Operations() as own:
        torch.optim.swa_utils.update_bn(some_batches(3, 3), model)
    assert (ours.read_from, own.read_from) == (set(), {"cpu"})


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_the_statistics_changes(model: ResNet18, training: bool) -> None:
    model.train(training)
    model.layer3.eval()
    model.layer2[0].bn1.momentum = 0.7
    model.layer2[0].bn2.momentum = None
    modes = {name: module.training for name, module in model.named_modules()}
    momenta = [each.momentum for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    before, random_state = everything(model), torch.get_rng_state()
    reestimate_batch_norm(model, some_batches(3, 3))
    assert changed(before, model.state_dict()) == set(before) - {
        name for name, _ in model.named_parameters()
    }
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert [
        each.momentum for each in model.modules() if isinstance(each, nn.BatchNorm2d)
    ] == momenta
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )


def test_only_batch_norm_is_in_training_mode_meanwhile() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3)).eval()
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append([each.training for each in model]))
    reestimate_batch_norm(model, some_batches(3, 3))
    assert seen == [[True, False, True]] * 2


def test_an_interruption_leaves_modes_and_momentum_as_they_were(model: ResNet18) -> None:
    def interrupted() -> Iterator[torch.Tensor]:
        yield from some_batches(3)
        raise KeyboardInterrupt

    model.eval()
    with pytest.raises(KeyboardInterrupt):
        reestimate_batch_norm(model, interrupted())
    layers = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    assert {layer.training for layer in layers} == {False}
    assert {layer.momentum for layer in layers} == {0.1}


def test_no_batches_are_an_error_and_change_nothing(model: ResNet18) -> None:
    model(some_batches(4)[0])
    before = everything(model)
    with pytest.raises(ValueError, match="no batches"):
        reestimate_batch_norm(model, iter(()))
    assert not changed(before, model.state_dict())


def test_no_gradients_are_recorded(model: ResNet18) -> None:
    enabled = []
    model.fc.register_forward_hook(
        lambda _module, _inputs, output: enabled.append(output.requires_grad)
    )
    reestimate_batch_norm(model, some_batches(3, 3))
    assert enabled == [False, False]
    assert torch.is_grad_enabled()


def test_the_callers_autocast_holds(model: ResNet18) -> None:
    seen = set()
    model.layer1[0].conv2.register_forward_hook(
        lambda _module, _inputs, output: seen.add(output.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        reestimate_batch_norm(model, some_batches(3, 3))
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in model.buffers()} == {torch.float32, torch.int64}


class _OtherBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm by another class, as the synchronised ones are."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        assert input.ndim == 4


def test_other_kinds_of_batch_norm_are_found_and_those_without_statistics_passed_over() -> None:
    batches = some_batches(4, 4)
    other, reference = _OtherBatchNorm(3), nn.BatchNorm2d(3)
    reestimate_batch_norm(
        nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), other), batches
    )
    reestimate_batch_norm(nn.Sequential(nn.BatchNorm2d(3, affine=False), reference), batches)
    assert torch.allclose(other.running_var, reference.running_var)
    assert torch.allclose(other.running_mean, reference.running_mean, atol=1e-6)
    assert int(other.num_batches_tracked) == 2


@pytest.mark.numerical
def test_an_averaged_network_works_with_its_own_statistics_only(model: ResNet18) -> None:
    """In eval mode the outputs on a batch are those of training mode if the statistics are that batch's."""
    average = make_average(model, averaged(0.5))
    for step in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(
                    0.3
                    * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
                )
        average.update_parameters(model)
    (images,) = some_batches(8, side=32)
    network = average.module
    with torch.no_grad():
        expected = network.train()(images)
        network.load_state_dict(
            network.state_dict() | {k: v for k, v in model.state_dict().items() if "running" in k}
        )
        assert not torch.allclose(network.eval()(images), expected, rtol=0.1)
        reestimate_batch_norm(network, [images])
        assert torch.allclose(
            network(images), expected, rtol=0.02, atol=0.02 * expected.abs().max().item()
        )


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
def test_averages_and_statistics_on_a_gpu_are_the_same_and_not_waited_for(model: ResNet18) -> None:
    average, batches = make_average(model, averaged(0.9)), some_batches(4, 4, side=32)
    there = make_average(model, averaged(0.9))
    there.module = there.module.cuda()
    for step in range(3):
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        average.update_parameters(model)
        moved = copy.deepcopy(model).cuda()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first call allocates
        try:
            there.update_parameters(moved)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    reestimate_batch_norm(average.module, batches)
    on_gpu = [batch.cuda() for batch in batches]
    for waits in ("default", "error"):
        torch.cuda.set_sync_debug_mode(waits)
        try:
            reestimate_batch_norm(there.module, on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name, tensor in there.state_dict().items():
        assert torch.allclose(
            tensor.cpu().float(), average.state_dict()[name].float(), rtol=1e-2, atol=1e-3
        ), name
