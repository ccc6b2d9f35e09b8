"""A running average of the weights, which is tested in place of the last ones, and batch-norm statistics to go with it.

Morales-Brotons, Vogels, Hendrikx, "Exponential Moving Average of Weights in Deep Learning: Dynamics and Benefits",
TMLR 2024: on Tiny ImageNet both together gain about two points.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tinylab.recipe import Recipe


class WeightAverage(AveragedModel):
    """AveragedModel whose update never waits for the GPU, so that it can be part of every step.

    The original's does in each call, wherever its counter lives: it reads a counter on the GPU, and copies one on the
    CPU there. Here the counter stays on the CPU and goes nowhere: move `module` to a device, not the whole.
    """

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes in the weights of `model`, on the same device: the first ones as they are, later ones by the decay.
        Its buffers are copied."""
        averaged, current = list(self.module.parameters()), list(model.parameters())
        if int(self.n_averaged) == 0:
            torch._foreach_copy_(averaged, current)
        else:
            self.multi_avg_fn(averaged, current, self.n_averaged)
        self.n_averaged += 1
        by_type: dict[
            torch.dtype, tuple[list, list]
        ] = {}  # one kernel copies tensors of one type only
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            targets, sources = by_type.setdefault(ours.dtype, ([], []))
            targets.append(ours)
            sources.append(theirs)
        for targets, sources in by_type.values():
            torch._foreach_copy_(targets, sources)


def make_average(model: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """The running average of the weights of `model`, on its device and in its memory format, or None if the recipe has
    none. `average.module` is a network like `model`; after n updates its weights are a mean of the last
    1 / (1 - ema_decay), if n is several times as many, and before that of about the last ninth of all: a constant decay
    would leave the first weights in a short run's average (the rising one is TensorFlow's and timm's).

    Its state dict holds the averaged network under "module." and the number of updates: tensors only.
    """
    if recipe.ema_decay is None:
        return None

    def follow(
        averaged: list[torch.Tensor], current: list[torch.Tensor], updates: torch.Tensor
    ) -> None:
        rising = (1 + int(updates)) / (10 + int(updates))
        get_ema_multi_avg_fn(min(recipe.ema_decay, rising))(averaged, current, updates)

    return WeightAverage(model, multi_avg_fn=follow)


def reestimate_batch_norm(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """New batch-norm statistics from network inputs (B, 3, H, W): the running mean and variance of each layer become
    the plain means, over the batches, of each batch's mean and unbiased variance. The network computes in the caller's
    autocast and no gradients; nothing but the statistics is changed, also if `batches` or the network raise.

    The mean of variances is smaller than the variance over all images by the variance of the batches' means, which
    next to B x H x W values per channel is nothing. Batches count alike, whatever their sizes.

    torch.optim.swa_utils.update_bn computes the same, but waits for the GPU in every layer and stays half done if
    interrupted. Raises `ValueError` if there is no batch.
    """
    layers = [each for each in model.modules() if isinstance(each, _BatchNorm)]
    count = 0
    with torch.no_grad(), _settings_kept(layers):
        for count, images in enumerate(batches, start=1):
            for layer in layers:
                if count == 1:
                    layer.reset_running_stats()
                layer.train()
                layer.momentum = 1 / count  # the k-th value enters a plain mean with weight 1 / k
            model(images)
    if count == 0:
        raise ValueError("no batches to estimate batch-norm statistics from")


@contextlib.contextmanager
def _settings_kept(layers: list[_BatchNorm]) -> Iterator[None]:
    """Afterwards each layer has its own mode and momentum again."""
    settings = [(layer, layer.training, layer.momentum) for layer in layers]
    try:
        yield
    finally:
        for layer, training, momentum in settings:
            layer.train(training)
            layer.momentum = momentum
