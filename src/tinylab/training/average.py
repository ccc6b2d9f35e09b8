"""A running average of the weights, tested in place of the last ones, and batch norm to go with it.

Morales-Brotons, Vogels, Hendrikx, "Exponential Moving Average of Weights in Deep Learning:
Dynamics and Benefits", TMLR 2024: on Tiny ImageNet both together gain about two points.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tinylab.recipe import Recipe


class WeightAverage(AveragedModel):
    """AveragedModel whose update never waits for the GPU, so that it can be part of every step.

    The original reads a counter on the GPU. Here the counter stays on the CPU.
    """

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of `model`, the first ones as they are, and copy its buffers."""
        averaged, current = list(self.module.parameters()), list(model.parameters())
        if int(self.n_averaged) == 0:
            torch._foreach_copy_(averaged, current)
        else:
            self.multi_avg_fn(averaged, current, self.n_averaged)
        self.n_averaged += 1
        # One kernel copies tensors of one type only.
        for floating in (True, False):
            buffers = [
                [each for each in network.buffers() if each.is_floating_point() == floating]
                for network in (self.module, model)
            ]
            torch._foreach_copy_(*buffers)


def make_average(model: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """Return the running average of the weights of `model`, or None if the recipe has none.

    After n updates it is a mean of the last 1 / (1 - ema_decay), or, early on, of the last ninth:
    a constant decay would leave the first weights in a short run's average (the rising one is
    TensorFlow's and timm's). `average.module` is a network like `model`.
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
    """Replace batch-norm statistics by the plain means over batches (B, 3, H, W).

    Computes in the caller's autocast, and changes nothing else. torch.optim.swa_utils.update_bn
    does the same, but waits for the GPU in every layer. Raise `ValueError` if there is no batch.
    """
    layers = [each for each in model.modules() if isinstance(each, _BatchNorm)]
    settings = [(layer.training, layer.momentum) for layer in layers]
    count = 0
    try:
        with torch.no_grad():
            for count, images in enumerate(batches, start=1):
                for layer in layers:
                    if count == 1:
                        layer.reset_running_stats()
                    layer.train()
                    layer.momentum = 1 / count  # the k-th value enters a mean with weight 1 / k
                model(images)
    finally:
        for layer, (training, momentum) in zip(layers, settings, strict=True):
            layer.train(training)
            layer.momentum = momentum
    if count == 0:
        raise ValueError("no batches to estimate batch-norm statistics from")
