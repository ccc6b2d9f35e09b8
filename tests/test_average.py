"""The running average against a loop, and batch-norm statistics against sums over all batches."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from tinylab.model import ResNet18, build_model
from tinylab.recipes import accurate, published
from tinylab.training.average import make_average, reestimate_batch_norm


@pytest.fixture
def model() -> ResNet18:
    return build_model(replace(published(), width=16), classes=3, seed=0)


def layers(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]


def some_batches(*sizes: int) -> list[torch.Tensor]:
    """Network inputs (B, 3, 16, 16), each batch with colours of its own."""
    generator = torch.Generator().manual_seed(2)
    images = [torch.randn(size, 3, 16, 16, generator=generator) for size in sizes]
    return [batch + torch.randn(1, 3, 1, 1, generator=generator) for batch in images]


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.997])
def test_the_average_is_the_loop_written_by_hand(decay) -> None:
    """It starts as the first weights it sees; buffers are copied; the network stays as it is."""
    model = ResNet18(classes=3, width=2).double()
    average, expected = make_average(model, replace(accurate(), ema_decay=decay)), None
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 3)
        before = copy.deepcopy(model.state_dict())
        average.update_parameters(model)
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        kept = min(decay, (1 + step) / (10 + step))  # 2/11, 3/12, ..: 0.5 from the ninth update on
        expected = weights if expected is None else [
            kept * mean + (1 - kept) * weight
            for mean, weight in zip(expected, weights, strict=True)
        ]  # fmt: skip
        for mean, parameter in zip(expected, average.module.parameters(), strict=True):
            assert torch.allclose(parameter, mean, rtol=1e-12, atol=1e-14)
        for ours, theirs in zip(average.module.buffers(), model.buffers(), strict=True):
            assert torch.equal(ours, theirs)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert int(average.n_averaged) == 20
    assert make_average(model, replace(accurate(), ema_decay=None)) is None


@pytest.mark.numerical
@pytest.mark.parametrize("sizes", [(4, 4, 4), (6, 2, 3), (5,)])
def test_statistics_are_plain_means_over_the_batches(model, sizes) -> None:
    """In every layer, whatever the statistics were before."""
    inputs = {layer: [] for layer in layers(model)}
    for layer, seen in inputs.items():
        layer.running_mean.fill_(torch.nan)
        layer.running_var.fill_(torch.inf)
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
    reestimate_batch_norm(model, some_batches(*sizes))
    assert len(inputs) == 20
    for layer, seen in inputs.items():
        flat = [each.transpose(0, 1).flatten(1).double() for each in seen]
        mean = torch.stack([values.mean(1) for values in flat]).mean(0)
        variance = torch.stack([values.var(1, unbiased=True) for values in flat]).mean(0)
        assert torch.allclose(layer.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        assert torch.allclose(layer.running_var.double(), variance, rtol=1e-4, atol=1e-5)
        assert int(layer.num_batches_tracked) == len(sizes)


def test_nothing_but_the_statistics_changes(model) -> None:
    """Also when it is interrupted."""

    def batches() -> Iterator[torch.Tensor]:
        yield from some_batches(3, 3)
        raise KeyboardInterrupt

    model.layer3.eval()
    model.layer2[0].bn1.momentum = 0.7
    modes, momenta = (
        lambda: [module.training for module in model.modules()],
        lambda: [layer.momentum for layer in layers(model)],
    )
    before = copy.deepcopy(model.state_dict()), modes(), momenta()
    with pytest.raises(KeyboardInterrupt):
        reestimate_batch_norm(model, batches())
    after = model.state_dict()
    changed = {name for name, value in before[0].items() if not torch.equal(value, after[name])}
    assert changed == {name for name, _ in model.named_buffers()}
    assert (modes(), momenta()) == before[1:]
    with pytest.raises(ValueError, match="no batches"):
        reestimate_batch_norm(model, iter(()))
