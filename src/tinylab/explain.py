"""Why the network was wrong: misclassified test images, and Grad-CAM of its four stages for the class it chose.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) weighs the channels of a stage by the mean gradient of a class's
logit and adds them up; what is left above zero is where the stage speaks for that class. The maps come from the
pytorch-grad-cam library (Gildenblat et al.).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional

from tinylab.recipe import UserError

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""The four stages of the network, in the order in which an image passes through them."""

METHODS: dict[str, type[BaseCAM]] = {
    "gradcam": GradCAM,
    "gradcam++": GradCAMPlusPlus,
    "hirescam": HiResCAM,
    "layercam": LayerCAM,
}
"""Ways to turn activations and gradients into a map. One forward and one backward pass serve all stages."""


@dataclass(frozen=True)
class Explanation:
    """The chosen images, their maps, and what `explain.json` says about them; all empty if no answer was wrong."""

    images: np.ndarray
    """uint8 (n, 64, 64, 3)."""
    maps: dict[str, np.ndarray]
    """float32 (n, h, w) in 0..1 for each stage, for the predicted class (see `gradcam`)."""
    entries: list[dict]
    """One JSON-ready dict per image (see `explain`)."""
    tested: int
    """Test images that the choice was made from."""
    wrong: int
    """How many of them the network got wrong."""
    seed: int
    """Seed of the choice."""
    method: str
    """Key of `METHODS`."""

    def to_json(self) -> dict:
        """The contents of `explain.json`: how the images were chosen and explained, and one object for each."""
        return {
            "tested": self.tested,
            "wrong": self.wrong,
            "seed": self.seed,
            "method": self.method,
            "explained_class": "predicted",
            "images": self.entries,
        }


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64 (N, C), of logits (N, C) of any float type."""
    # In double precision: the exponentials of stored float16 logits would round to three digits.
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def misclassified(logits: np.ndarray, labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Indices, int64 (at most `count`,), of images whose largest logit is not the label's: a fair draw, nothing picked.

    `logits` is (N, C), `labels` integer (N,). The images are shuffled by `seed` and the first wrong ones taken, in
    shuffled order: every class can occur, the same predictions always give the same images, and a larger `count`
    begins with the images of a smaller one. Raises `UserError` for a negative count.
    """
    if count < 0:
        raise UserError(f"count must be 0 or more, not {count}: it is the number of images to explain")
    assert len(logits) == len(labels), f"{len(logits)} rows of logits for {len(labels)} labels"
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    wrong = logits.argmax(axis=1) != labels
    return shuffled[wrong[shuffled]][:count]


def gradcam(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    stages: Sequence[str] = STAGES,
    batch_size: int = 32,
    method: str = "gradcam",
) -> dict[str, np.ndarray]:
    """Class activation maps, float32 (B, h, w) in 0..1, of each stage at its own size (64, 32, 16 and 8 pixels a side).

    `inputs` is float32 (B, 3, H, W), at least one image, normalised as in training; `targets` is integer (B,), the
    class that each image's map speaks for. Each map is scaled to itself, from its smallest value to its largest, so
    brightness cannot be compared between images, stages or classes; one that is 0 everywhere found nothing.

    Works in float32 on a copy (45 MB for ResNet-18) in evaluation mode: the model keeps its mode, gradients and hooks,
    may be compiled or wrapped, and the caller may be inside `no_grad`, `inference_mode` or autocast.
    Raises `UserError` for an unknown stage or method, `ValueError` for targets that do not fit the images.
    """
    for stage in stages:
        if stage not in STAGES:
            raise UserError(f"unknown stage '{stage}'; there are: {', '.join(STAGES)}")
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'; there are: {', '.join(METHODS)}")
    network = _unwrapped(model)
    # The library gives an image without a target a map of zeros, and prints and swallows an index out of range.
    if targets.shape != inputs.shape[:1]:
        raise ValueError(f"one target for each image, please: {tuple(targets.shape)} for {len(inputs)} images")
    if targets.min() < 0 or targets.max() >= network.fc.out_features:
        raise ValueError(f"targets must lie in 0..{network.fc.out_features - 1}")

    # The library matches layers to activations by the order of execution, so it has to get them in that order.
    ordered = [stage for stage in STAGES if stage in stages]
    device = next(network.parameters()).device
    batches: list[list[np.ndarray]] = []
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        network = copy.deepcopy(network).float().eval().requires_grad_(False)
        with _at_native_size(METHODS[method])(network, [getattr(network, stage) for stage in ordered]) as cam:
            for images, classes in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
                # The weights of the copy ask for no gradient, so the image has to.
                pixels = images.to(device, torch.float32, copy=True).requires_grad_()
                batches.append(cam(pixels, [ClassifierOutputTarget(index) for index in classes.tolist()]))
    return {stage: _to_full_scale([maps[i] for maps in batches]) for i, stage in enumerate(ordered)}


def explain(
    model: nn.Module,
    *,
    images: np.ndarray,
    labels: np.ndarray,
    boxes: np.ndarray,
    rows: np.ndarray,
    logits: np.ndarray,
    wnids: Sequence[str],
    names: Sequence[str],
    normalise: Callable[[Tensor], Tensor],
    count: int = 10,
    seed: int = 0,
    method: str = "gradcam",
) -> Explanation:
    """Draws `count` misclassified test images and shows, for each, what spoke for the class the network predicted.

    `images` uint8 (M, 64, 64, 3), `labels` (M,) and `boxes` (M, 4) are the whole data set's, in canonical order, and
    may be memory-mapped: only the drawn rows are read. `rows` (N,) says which of them were tested, `logits` (N, C) what
    the network answered. `normalise` turns uint8 (n, 64, 64, 3) into the network's float32 (n, 3, 64, 64).

    An entry holds `row`; `predicted` and `actual`, each with wnid, name and probability; `box`, the actual object's x0
    y0 x1 y1, inclusive; `box_area`, its share of the image; and for each stage the map's `size`, its `mean` and
    `energy_in_box`, the share of the map that lies in the box. A map that knows nothing would score `box_area`; None
    stands where the box is degenerate or the map is 0. Raises `UserError` as `misclassified` and `gradcam` do.
    """
    assert logits.shape == (len(rows), len(wnids)), f"logits {logits.shape}: {len(rows)} rows, {len(wnids)} classes"
    drawn = misclassified(logits, labels[rows], count, seed)
    wrong = int((logits.argmax(axis=1) != labels[rows]).sum())
    maps: dict[str, np.ndarray] = {}
    if len(drawn):
        inputs = normalise(torch.from_numpy(images[rows[drawn]]))
        maps = gradcam(model, inputs, torch.from_numpy(logits[drawn].argmax(axis=1)), method=method)

    probabilities = softmax(logits[drawn])
    entries = []
    for i, row in enumerate(rows[drawn].tolist()):
        answers = {"predicted": int(logits[drawn[i]].argmax()), "actual": int(labels[row])}
        entry: dict = {"row": row}
        for answer, index in answers.items():
            probability = round(float(probabilities[i, index]), 6)
            entry[answer] = {"wnid": wnids[index], "name": names[index], "probability": probability}
        entry |= _box_figures(boxes[row].tolist(), {stage: stage_maps[i] for stage, stage_maps in maps.items()})
        entries.append(entry)
    return Explanation(images[rows[drawn]], maps, entries, len(rows), wrong, seed, method)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, without the wrappers of torch.compile, DistributedDataParallel and AveragedModel."""
    while inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None):
        model = inner
    return model


def _at_native_size(method: type[BaseCAM]) -> type[BaseCAM]:
    """The library's method, made to return a list of one (B, h, w) array per layer: neither enlarged nor averaged."""

    class NativeSize(method):
        def get_target_width_height(self, input_tensor: Tensor) -> None:
            return None

        def aggregate_multi_layers(self, cam_per_target_layer: list[np.ndarray]) -> list[np.ndarray]:
            return [maps[:, 0] for maps in cam_per_target_layer]

    return NativeSize


def _to_full_scale(batches: list[np.ndarray]) -> np.ndarray:
    """One array whose maps peak at exactly 1: the library adds 1e-7 to its divisor, which dims weak maps."""
    maps = np.concatenate(batches)
    peak = maps.max(axis=(1, 2), keepdims=True)
    return maps / np.where(peak > 0, peak, 1)


def _box_figures(box: list[int], maps: dict[str, np.ndarray]) -> dict:
    """The entries `box`, `box_area` and `stages` of one image, whose maps are (h, w); see `explain`."""
    x0, y0, x1, y1 = box
    side = 64  # of the images; the maps are enlarged to it, so that a box can cut through a coarse map's pixels
    stages = {}
    for stage, small in maps.items():
        tensor = torch.from_numpy(small)[None, None]
        large = functional.interpolate(tensor, size=(side, side), mode="bilinear").numpy()[0, 0]
        known = x1 > x0 and y1 > y0 and large.sum() > 0
        share = float(large[y0 : y1 + 1, x0 : x1 + 1].sum() / large.sum()) if known else None
        stages[stage] = {
            "size": list(small.shape),
            "mean": round(float(small.mean()), 4),
            "energy_in_box": None if share is None else round(share, 4),
        }
    area = max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0) / side**2
    return {"box": box, "box_area": round(area, 4), "stages": stages}
