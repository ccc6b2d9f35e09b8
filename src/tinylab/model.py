"""ResNet-18 for 64 x 64 pixels: a 3 x 3 stem with stride 1 and no max-pooling, so that stage four still sees 8 x 8.

He et al., "Deep Residual Learning for Image Recognition", 2015; the stem for small images is that paper's CIFAR one.
Names follow torchvision's resnet18, so that its state dict fits this one key by key.
"""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from tinylab.recipe import Recipe, UserError


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; (B, C, H, W) -> (B, channels, H / stride, W / stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(out + shortcut)


class ResNet18(nn.Module):
    """Normalised images (B, 3, 64, 64) -> logits (B, classes). `width` is the number of channels of the first stage."""

    def __init__(self, classes: int = 200, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, stride=1)  # (B, 64, 64, 64)
        self.layer2 = self._stage(width, 2 * width, stride=2)  # (B, 128, 32, 32)
        self.layer3 = self._stage(2 * width, 4 * width, stride=2)  # (B, 256, 16, 16)
        self.layer4 = self._stage(4 * width, 8 * width, stride=2)  # (B, 512, 8, 8)
        self.fc = nn.Linear(8 * width, classes)
        # Channels-last is the faster layout, but with fewer channels than a CPU's vectors are wide oneDNN writes past
        # its workspace in the backward pass of the strided 1 x 1 convolution (uxlfoundation/oneDNN#6035) and crashes.
        self.memory_format = torch.channels_last if width >= 16 else torch.contiguous_format
        self.to(memory_format=self.memory_format)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, stride=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=self.memory_format)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.fc(x.mean(dim=(2, 3)))


def build_model(recipe: Recipe, classes: int, seed: int) -> ResNet18:
    """A new network on the CPU, its weights a function of `seed` and the recipe; global generators stay as they are.

    "kaiming" draws convolution weights as He et al. do in "Delving Deep into Rectifiers", 2015, so that the variance of
    gradients is kept from layer to layer; all else starts from PyTorch's own defaults, as in the published run. Batch
    norm's last scales of zero: Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1.
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
    """torchsummary's table of the network for one 64 x 64 image: a row per layer, parameters, memory in MB.

    Made on a network of its own, in eval mode on the CPU: torchsummary feeds random noise, which moves a training
    network's batch-norm statistics, and its default device is a GPU.
    """
    import torchsummary

    text = io.StringIO()
    with contextlib.redirect_stdout(text), torch.random.fork_rng(devices=[]):
        torchsummary.summary(ResNet18(classes, width).eval(), (3, 64, 64), device="cpu")
    return text.getvalue()


def weights_file(
    model: nn.Module, recipe: Recipe, wnids: tuple[str, ...], names: tuple[str, ...], metrics: dict, content_sha256: str
) -> bytes:
    """A safetensors file that can be used without this project: weights, and as JSON in its metadata the classes in the
    order of the logits (wnids and names), the normalisation, the recipe, the final metrics and the data set's hash."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    values = {
        "wnids": wnids,
        "names": names,
        "mean": recipe.mean,
        "std": recipe.std,
        "recipe": dataclasses.asdict(recipe),
        "metrics": metrics,
        "content_sha256": content_sha256,
    }
    metadata = {"format": "pt", "architecture": "ResNet-18, 3x3 stem, no max-pool"}
    return safetensors.torch.save(tensors, metadata | {key: json.dumps(value) for key, value in values.items()})


def load_weights(path: Path, wnids: tuple[str, ...] | None = None) -> tuple[ResNet18, dict]:
    """The network of a `weights_file`, on the CPU in eval mode, and its metadata with the JSON decoded.

    Raises `UserError` if the file is missing or is something else, or if `wnids` are given and are not its classes.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file")  # a pipe would be waited for
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        decoded = {key: json.loads(metadata[key]) for key in ("wnids", "names", "recipe", "mean", "std", "metrics")}
        _require_fit(decoded, tensors)
        model = ResNet18(len(decoded["wnids"]), decoded["recipe"]["width"])
        model.load_state_dict(tensors)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the run is not finished") from error
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} does not hold weights that tinylab wrote: {reason}") from error
    if wnids is not None and tuple(decoded["wnids"]) != tuple(wnids):
        raise UserError(f"{path} was trained on other classes, or in another order, than this data set has")
    return model.eval(), decoded


def _require_fit(about: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Raises `ValueError` unless the tensors are those of the network that the metadata tell of. Before it is made: a
    file of a few bytes can claim a network of a terabyte."""
    wnids, names, width = about["wnids"], about["names"], about["recipe"]["width"]
    for texts in (wnids, names):
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise ValueError("its classes are no list of names")
    if len(names) != len(wnids) or not 1 <= len(wnids) <= 100_000:
        raise ValueError(f"it has {len(wnids):,} classes and {len(names):,} names")
    if type(width) is not int or not 1 <= width <= 1024:
        raise ValueError(f"a width of {width}")
    with torch.device("meta"):
        expected = ResNet18(len(wnids), width).state_dict()
    for name in expected.keys() | tensors.keys():
        wanted, found = expected.get(name), tensors.get(name)
        if wanted is None or found is None or (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
            raise ValueError(f"{name} is not that of a network of width {width} with {len(wnids)} classes")
        if not torch.isfinite(found).all():
            raise ValueError(f"{name} has numbers that are not finite")
