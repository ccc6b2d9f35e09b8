"""Grad-CAM of every stage, by pytorch-grad-cam.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) weighs the channels of a stage by the mean
gradient of a class's logit: what of their sum is above zero is the evidence for it.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from tinylab.exceptions import UserError

STAGES = ("layer1", "layer2", "layer3", "layer4")  # of a ResNet, in the order of execution


class NativeGradCAM(GradCAM):
    """The library's Grad-CAM as one (B, h, w) array in 0..1 per layer, not enlarged or averaged."""

    def get_target_width_height(self, input_tensor: Tensor) -> None:
        return None

    def aggregate_multi_layers(self, cam_per_target_layer: list[np.ndarray]) -> list[np.ndarray]:
        # The library adds 1e-7 to its divisor, which dims weak maps.
        tiny, layers = np.finfo(np.float32).tiny, [maps[:, 0] for maps in cam_per_target_layer]
        return [maps / maps.max(axis=(1, 2), keepdims=True).clip(tiny) for maps in layers]


@torch.inference_mode(False)
@torch.enable_grad()
def gradcam(
    model: nn.Module, inputs: Tensor, targets: Tensor, stages: Sequence[str] | None = None,
    batch_size: int = 32,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return maps float32 (B, h, w) in 0..1 of each stage at its own size (64, 32, 16, 8 a side).

    inputs: float32 (B, 3, H, W), normalised. targets: integer (B,), the class of each map. stages:
    names of layers; None: `stages_of` the model. Each map is scaled by its own peak; one that is 0
    everywhere found nothing. In fp32, on a copy.
    """
    # The library gives an image without a target zeros.
    if targets.shape != inputs.shape[:1] or targets.min() < 0:
        raise ValueError(f"{len(inputs)} images, targets {targets.tolist()}")
    network, device = frozen_copy(model), next(model.parameters()).device
    stages, known = stages or stages_of(network), dict(network.named_modules())
    if all(stage in known for stage in STAGES):
        known = {stage: known[stage] for stage in STAGES}
    if unknown := [stage for stage in stages if not stage or stage not in known]:
        there = ", ".join(filter(None, known))
        raise UserError(f"unknown layer '{unknown[0]}'; there are: {there}")

    # The library matches layers to activations by the order of execution.
    ordered = [stage for stage in known if stage in stages]
    layers = [known[stage] for stage in ordered]
    # The copy's weights ask for no gradient; the first stage's output does.
    layers[0].register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    batches = []
    with torch.autocast(device.type, enabled=False), NativeGradCAM(network, layers) as cam:
        for images, wanted in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            pixels = images.to(device, torch.float32, copy=True)
            batches.append(cam(pixels, [ClassifierOutputTarget(each) for each in wanted.tolist()]))
            cam.outputs = None  # else the graph is kept during the next batch's forward pass
    if sum(len(each[0]) for each in batches) < len(inputs):  # it swallows an IndexError
        raise ValueError(f"a class that the network does not have, in {targets.tolist()}")
    return dict(zip(ordered, map(np.concatenate, zip(*batches, strict=True)), strict=True))


def stages_of(model: nn.Module) -> tuple[str, ...]:
    """Return the layers whose maps are shown: a ResNet's stages, else the last convolution."""
    names = [name for name, each in model.named_modules() if isinstance(each, nn.Conv2d)]
    if all(hasattr(model, stage) for stage in STAGES):
        return STAGES
    if not names:
        without = "`tinylab explain --count 0 --sample 0` does without maps"
        raise UserError(f"the network has no convolution: {without}")
    return (names[-1],)


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a frozen float32 copy in eval mode, without torch.compile's and other wrappers."""
    while inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None):
        model = inner
    network = copy.deepcopy(model).float().eval().requires_grad_(False)
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # the library keeps activations, which must not change
    return network
