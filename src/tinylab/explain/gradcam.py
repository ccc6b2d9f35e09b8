"""Why the network was wrong: misclassified test images, and Grad-CAM for both classes.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) weighs the channels of a stage by the mean
gradient of a class's logit: what of their sum is above zero is where the stage speaks for it.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from tinylab.data.dataset import Dataset
from tinylab.exceptions import UserError
from tinylab.explain.boxes import box_area, energy, usable
from tinylab.explain.mistakes import answers
from tinylab.explain.sampling import sample

STAGES = ("layer1", "layer2", "layer3", "layer4")  # in the order of execution


@dataclass(frozen=True)
class Explanation:
    """The chosen images, their maps and entries (see `explain`); all empty if none was wrong."""

    images: np.ndarray  # uint8 (n, 64, 64, 3)
    maps: dict[str, np.ndarray]  # of each stage, for the predicted class (see `gradcam`)
    actual_maps: np.ndarray  # of the last stage, for the actual class
    entries: list[dict]
    tested: int
    wrong: int
    seed: int

    def to_json(self) -> dict:
        """Return how the images were chosen and explained, and an object for each."""
        return {
            "tested": self.tested, "wrong": self.wrong, "seed": self.seed, "method": "gradcam",
            "explained_class": "predicted", "images": self.entries,
        }  # fmt: skip


def misclassified(logits: np.ndarray, labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Draw at most `count` wrongly answered images, int64 indices; more begin with the same."""
    shuffled = sample(len(labels), None, seed)
    return shuffled[(logits.argmax(axis=1) != labels)[shuffled]][:count]


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
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    stages: Sequence[str] = STAGES,
    batch_size: int = 32,
) -> dict[str, np.ndarray]:
    """Return maps float32 (B, h, w) in 0..1 of each stage at its own size (64, 32, 16, 8 a side).

    inputs: float32 (B, 3, H, W), normalised. targets: integer (B,), the class of each map. Each map
    is scaled by its own peak; one that is 0 everywhere found nothing. In fp32, on a copy.
    """
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise UserError(f"unknown layer '{unknown[0]}'; there are: {', '.join(STAGES)}")
    network, device = frozen_copy(model), next(model.parameters()).device
    last = network.fc.out_features - 1
    # The library gives an image without a target zeros, and swallows an index out of range.
    if targets.shape != inputs.shape[:1] or targets.min() < 0 or targets.max() > last:
        raise ValueError(f"one target for each image in 0..{last}, please, not {targets.tolist()}")

    # The library matches layers to activations by the order of execution.
    ordered = [stage for stage in STAGES if stage in stages]
    layers = [getattr(network, stage) for stage in ordered]
    # The copy's weights ask for no gradient; the first stage's output does.
    layers[0].register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    batches = []
    with torch.autocast(device.type, enabled=False), NativeGradCAM(network, layers) as cam:
        for images, wanted in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
            pixels = images.to(device, torch.float32, copy=True)
            batches.append(cam(pixels, [ClassifierOutputTarget(each) for each in wanted.tolist()]))
            cam.outputs = None  # else the graph is kept during the next batch's forward pass
    return dict(zip(ordered, map(np.concatenate, zip(*batches, strict=True)), strict=True))


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a frozen float32 copy in eval mode, without torch.compile's and other wrappers."""
    while inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None):
        model = inner
    return copy.deepcopy(model).float().eval().requires_grad_(False)


def explain(
    model: nn.Module | None,
    dataset: Dataset,
    *,
    rows: np.ndarray,
    logits: np.ndarray,
    normalise: Callable[[Tensor], Tensor],
    count: int = 10,
    seed: int = 0,
) -> Explanation:
    """Draw `count` misclassified test images, with what spoke for each of their two classes.

    rows (N,): the test images. logits (N, C): the answers. normalise: from uint8 (n, 64, 64, 3) to
    the network's input. An entry holds what `answers` says, its box, and how each map meets it.
    """
    labels = dataset.labels[rows].astype(np.int64)
    drawn = misclassified(logits, labels, count, seed)
    images, boxes = (each[rows[drawn]] for each in (dataset.images, dataset.boxes))
    maps, actual_maps = {}, np.empty((0, 8, 8), np.float32)
    if len(drawn):
        inputs = normalise(torch.from_numpy(images))
        maps = gradcam(model, inputs, torch.from_numpy(logits[drawn].argmax(axis=1)))
        actual_maps = gradcam(model, inputs, torch.from_numpy(labels[drawn]), ("layer4",))["layer4"]

    def against_box(i: int, maps: np.ndarray) -> dict:
        one, box = maps[i : i + 1], boxes[i : i + 1]
        share = round(energy(one, box).item(), 4) if usable(box)[0] and one.any() else None
        size, mean = list(one.shape[1:]), round(one.mean().item(), 4)
        return {"size": size, "mean": mean, "energy_in_box": share}

    entries = answers(rows[drawn], logits[drawn], dataset)
    for i, (entry, area) in enumerate(zip(entries, box_area(boxes).tolist(), strict=True)):
        for answer in (entry["predicted"], entry["actual"]):
            answer["probability"] = round(answer["probability"], 6)
        entry |= {"box": boxes[i].tolist(), "box_area": round(area, 4)}
        entry["stages"] = {stage: against_box(i, each) for stage, each in maps.items()}
        entry["actual_map"] = against_box(i, actual_maps)
    wrong = int((logits.argmax(axis=1) != labels).sum())
    return Explanation(images, maps, actual_maps, entries, len(rows), wrong, seed)
