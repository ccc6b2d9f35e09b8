"""A running average of the weights, tested in place of the last ones, and batch norm to go with it.

Morales-Brotons, Vogels, Hendrikx, "Exponential Moving Average of Weights in Deep Learning:
Dynamics and Benefits", TMLR 2024: on Tiny ImageNet both together gain about two points.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from tinylab.recipe import Recipe


class WeightAverage(AveragedModel):
    """A running average of a network's weights; `module` is a network like it.

    After n updates it is a mean of the last 1 / (1 - decay), or, early on, of the last ninth: a
    constant decay would leave the first weights in a short run's average (the rising one is
    TensorFlow's and timm's). PyTorch's own update waits for the GPU.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of `model`, the first ones as they are, and copy its buffers."""
        updates = int(self.n_averaged)  # on the CPU
        kept = min(self.decay, (1 + updates) / (10 + updates))
        averaged, current = list(self.module.parameters()), list(model.parameters())
        if updates == 0:
            torch._foreach_copy_(averaged, current)
        else:
            torch._foreach_lerp_(averaged, current, 1 - kept)
        self.n_averaged += 1
        for floating in (True, False):  # one kernel copies tensors of one type only
            buffers = [
                [each for each in network.buffers() if each.is_floating_point() == floating]
                for network in (self.module, model)
            ]
            if buffers[0]:
                torch._foreach_copy_(*buffers)


def make_average(model: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """Return the running average of the weights of `model`, or None if the recipe has none."""
    return None if recipe.ema_decay is None else WeightAverage(model, recipe.ema_decay)


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[torch.Tensor], forward: Callable | None = None
) -> None:
    """Replace batch-norm statistics by the plain means over batches, and change nothing else.

    forward: puts a batch through the model; None: the model itself. PyTorch's `update_bn` does the
    same, but waits for the GPU in every layer. Raise `ValueError` if there is no batch.
    """
    layers = [each for each in model.modules() if isinstance(each, _BatchNorm)]
    settings = [(layer.training, layer.momentum) for layer in layers]
    count = 0
    try:
        for layer in layers:
            layer.train()
            layer.reset_running_stats()
        with torch.no_grad():
            for count, images in enumerate(batches, start=1):
                for layer in layers:
                    layer.momentum = 1 / count  # the k-th value enters a mean with weight 1 / k
                (forward or model)(images)
    finally:
        for layer, (training, momentum) in zip(layers, settings, strict=True):
            layer.train(training)
            layer.momentum = momentum
    if count == 0:
        raise ValueError("no batches to estimate batch-norm statistics from")
