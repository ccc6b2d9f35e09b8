"""ResNet-18 (He et al., 2015) for 64 x 64 pixels, with that paper's stem for small images.

The stem is a 3 x 3 convolution with stride 1 and no max-pooling, so that stage four still sees
8 x 8. Names follow torchvision's resnet18: its state dict fits this one key by key.
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

if TYPE_CHECKING:  # this file is all that `ResNet18.from_pretrained` needs
    from tinylab.recipe import Recipe


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: (B, C, H, W) -> (B, channels, H/stride, W/stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(out + shortcut)


class ResNet18(
    nn.Module, PyTorchModelHubMixin, library_name="pytorch", pipeline_tag="image-classification"
):
    """Normalised images (B, 3, 64, 64) -> logits (B, classes). width: channels of stage one.

    `from_pretrained` takes a repository of the Hugging Face Hub, or a folder that `save_pretrained`
    or `tinylab export` made, and returns the network in eval mode.
    """

    def __init__(self, classes: int = 200, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, stride=1)  # (B, 64, 64, 64)
        self.layer2 = self._stage(width, 2 * width, stride=2)  # (B, 128, 32, 32)
        self.layer3 = self._stage(2 * width, 4 * width, stride=2)  # (B, 256, 16, 16)
        self.layer4 = self._stage(4 * width, 8 * width, stride=2)  # (B, 512, 8, 8)
        self.fc = nn.Linear(8 * width, classes)
        # Channels-last is faster, but with fewer channels than a CPU's vectors are wide oneDNN
        # crashes in the backward pass of a strided 1 x 1 convolution (uxlfoundation/oneDNN#6035).
        self.memory_format = torch.channels_last if width >= 16 else torch.contiguous_format
        self.to(memory_format=self.memory_format)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=self.memory_format)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


def build_model(recipe: Recipe, classes: int, seed: int) -> ResNet18:
    """Return a new network on the CPU; its weights are a function of `seed` and the recipe.

    "kaiming": He et al., "Delving Deep into Rectifiers", 2015, keeps the variance of gradients from
    layer to layer. zero_init_residual: Goyal et al., "Accurate, Large Minibatch SGD", 2017, section
    5.1. All else starts from PyTorch's defaults. Global generators stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet18(classes, recipe.width)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and recipe.initialisation == "kaiming":
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = recipe.bn_momentum
            elif isinstance(module, BasicBlock) and recipe.zero_init_residual:
                nn.init.zeros_(module.bn2.weight)
    return model


def summary(classes: int = 200, width: int = 64) -> str:
    """Return torchsummary's table of the network: a row per layer, parameters, memory in MB."""
    import torchsummary

    text = io.StringIO()  # eval mode: torchsummary feeds noise, which would move statistics
    with contextlib.redirect_stdout(text), torch.random.fork_rng(devices=[]):
        torchsummary.summary(ResNet18(classes, width).eval(), (3, 64, 64), device="cpu")
    return text.getvalue()
