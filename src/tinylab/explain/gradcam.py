"""Why the network was wrong: misclassified test images, and Grad-CAM for both classes.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) weighs the channels of a stage by the mean
gradient of a class's logit and adds them up; what is above zero is where the stage speaks for that
class. The maps come from the pytorch-grad-cam library (Gildenblat et al.).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from tinylab.exceptions import UserError
from tinylab.explain.boxes import box_area, energy, usable
from tinylab.explain.mistakes import softmax

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""The four stages of the network, in the order in which an image passes through them."""


RESAMPLES = 2000
"""Bootstrap samples; the ends of an interval then wobble by a few percent of its width."""


@dataclass(frozen=True)
class Explanation:
    """The chosen images, their maps, and what `explain.json` says about them; all empty if no
    answer was wrong."""

    images: np.ndarray
    """uint8 (n, 64, 64, 3)."""
    maps: dict[str, np.ndarray]
    """float32 (n, h, w) in 0..1 for each stage, for the predicted class (see `gradcam`)."""
    actual_maps: np.ndarray
    """float32 (n, h, w) in 0..1: the last stage's, for the actual class."""
    entries: list[dict]
    """One JSON-ready dict per image (see `explain`)."""
    tested: int
    """Test images that the choice was made from."""
    wrong: int
    """How many of them the network got wrong."""
    seed: int
    """Seed of the choice."""

    def to_json(self) -> dict:
        """The contents of `explain.json`: how the images were chosen and explained, and one object
        for each."""
        return {
            "tested": self.tested,
            "wrong": self.wrong,
            "seed": self.seed,
            "method": "gradcam",
            "explained_class": "predicted",
            "images": self.entries,
        }


def misclassified(logits: np.ndarray, labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Return indices, int64 (at most `count`,), of wrongly answered images: a fair draw by `seed`.

    logits (N, C), labels integer (N,). A larger `count` begins with the images of a smaller one.
    """
    if count < 0:
        raise UserError(
            f"count must be 0 or more, not {count}: it is the number of images to explain"
        )
    assert len(logits) == len(labels), f"{len(logits)} rows of logits for {len(labels)} labels"
    shuffled = sample(len(labels), None, seed)
    wrong = logits.argmax(axis=1) != labels
    return shuffled[wrong[shuffled]][:count]


def sample(tested: int, count: int | None, seed: int = 0) -> np.ndarray:
    """Return the first `count` of a permutation by `seed`, int64; None: all."""
    if count is not None and count < 0:
        raise UserError(
            f"count must be 0 or more, not {count}: it is the number of images to look at"
        )
    return np.random.default_rng(seed).permutation(tested)[:count]


def gradcam(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    stages: Sequence[str] = STAGES,
    batch_size: int = 32,
) -> dict[str, np.ndarray]:
    """Return maps float32 (B, h, w) in 0..1 of each stage at its own size (64, 32, 16, 8 a side).

    inputs: float32 (B, 3, H, W), normalised. targets: integer (B,), the class that each map speaks
    for. Each map is scaled to itself, so brightness cannot be compared; one that is 0 everywhere
    found nothing. In fp32 on a copy in eval mode: the model keeps its mode, gradients and hooks,
    and may be compiled or wrapped. Gradients are computed down to the first of `stages` only.
    """
    require_known(stages)
    # The library gives an image without a target a map of zeros, and prints and swallows an index
    # out of range.
    if targets.shape != inputs.shape[:1]:
        raise ValueError(
            f"one target for each image, please: {tuple(targets.shape)} for {len(inputs)} images"
        )
    classes = unwrapped(model).fc.out_features
    if targets.min() < 0 or targets.max() >= classes:
        raise ValueError(f"targets must lie in 0..{classes - 1}")

    # The library matches layers to activations by the order of execution, so it has to get them in
    # that order.
    ordered = [stage for stage in STAGES if stage in stages]
    device = next(model.parameters()).device
    batches: list[list[np.ndarray]] = []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        network = frozen_copy(model)
        layers = [getattr(network, stage) for stage in ordered]
        # The copy's weights ask for no gradient: the first stage's output does, before the
        # library's hooks see it.
        layers[0].register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
        with NativeGradCAM(network, layers) as cam:
            for images, wanted in zip(
                inputs.split(batch_size), targets.split(batch_size), strict=True
            ):
                pixels = images.to(device, torch.float32, copy=True)
                batches.append(
                    cam(pixels, [ClassifierOutputTarget(index) for index in wanted.tolist()])
                )
                cam.outputs = (
                    None  # or the graph would be kept during the next batch's forward pass
                )
    return {stage: to_full_scale([maps[i] for maps in batches]) for i, stage in enumerate(ordered)}


def require_known(stages: Sequence[str]) -> None:
    """Raise `UserError` unless the stages are of `STAGES`, one or more."""
    for stage in stages or [""]:
        if stage not in STAGES:
            raise UserError(f"unknown layer '{stage}'; there are: {', '.join(STAGES)}")


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
) -> Explanation:
    """Draw `count` misclassified test images, with what spoke for each of their two classes.

    images uint8 (M, 64, 64, 3), labels (M,) and boxes (M, 4) are the whole data set's; rows (N,)
    are those that were tested, logits (N, C) the answers. normalise: uint8 (n, 64, 64, 3) to the
    network's input.
    An entry holds `row`; `predicted` and `actual`, each with wnid, name and probability; `box`, x0
    y0 x1 y1; `box_area`, its share of the image; and for each of `stages`, and for `actual_map`,
    the map's `size`, `mean` and `energy_in_box`. A map that knows nothing would score `box_area`.
    """
    assert logits.shape == (len(rows), len(wnids)), (
        f"logits {logits.shape}: {len(rows)} rows, {len(wnids)} classes"
    )
    drawn = misclassified(logits, labels[rows], count, seed)
    wrong = int((logits.argmax(axis=1) != labels[rows]).sum())
    maps: dict[str, np.ndarray] = {}
    actual = np.empty((0, 8, 8), np.float32)
    if len(drawn):
        inputs = normalise(torch.from_numpy(images[rows[drawn]]))
        maps = gradcam(model, inputs, torch.from_numpy(logits[drawn].argmax(axis=1)))
        labelled = torch.from_numpy(labels[rows[drawn]].astype(np.int64))
        actual = gradcam(model, inputs, labelled, STAGES[-1:])[STAGES[-1]]

    probabilities = softmax(logits[drawn])
    entries = []
    for i, row in enumerate(rows[drawn].tolist()):
        answers = {"predicted": int(logits[drawn[i]].argmax()), "actual": int(labels[row])}
        entry: dict = {"row": row}
        for answer, index in answers.items():
            probability = round(float(probabilities[i, index]), 6)
            entry[answer] = {"wnid": wnids[index], "name": names[index], "probability": probability}
        entry |= box_figures(
            boxes[row], {stage: stage_maps[i] for stage, stage_maps in maps.items()}
        )
        entry["actual_map"] = box_figures(boxes[row], {"": actual[i]})["stages"][""]
        entries.append(entry)
    return Explanation(images[rows[drawn]], maps, actual, entries, len(rows), wrong, seed)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, without the wrappers of torch.compile, DistributedDataParallel and
    AveragedModel."""
    while inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None):
        model = inner
    return model


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the network without its wrappers: float32, in evaluation mode, its weights ask for
    no gradients."""
    return copy.deepcopy(unwrapped(model)).float().eval().requires_grad_(False)


def bootstrap(
    measures: Mapping[str, np.ndarray], seed: int = 0
) -> dict[str, dict[str, float] | None]:
    """Return mean, low and high (95 %) of each measure float (n,); None where there are no values.

    Percentiles of the means of 2,000 samples with replacement (Efron and Tibshirani 1993, section
    13.3). All measures see the same samples, so differences of two belong to the same images.
    """
    values = np.stack(list(measures.values()), axis=1).astype(np.float64)
    count = len(values)
    if count == 0:
        return dict.fromkeys(measures)
    rng = np.random.default_rng(seed)
    # One sample at a time: all samples of 33,000 images would take half a gigabyte.
    drawn = (
        np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(RESAMPLES)
    )
    samples = np.stack([times @ values for times in drawn]) / count
    means = values.mean(axis=0)
    low, high = np.quantile(samples, (0.025, 0.975), axis=0)
    # Of equal values, rounding alone could put the mean outside.
    rows = np.stack([means, np.minimum(low, means), np.maximum(high, means)], axis=1).tolist()
    return {
        name: dict(zip(("mean", "low", "high"), row, strict=True))
        for name, row in zip(measures, rows, strict=True)
    }


class NativeGradCAM(GradCAM):
    """The library's Grad-CAM as a list of one (B, h, w) array per layer: not enlarged, not
    averaged."""

    def get_target_width_height(self, input_tensor: Tensor) -> None:
        return None

    def aggregate_multi_layers(self, cam_per_target_layer: list[np.ndarray]) -> list[np.ndarray]:
        return [maps[:, 0] for maps in cam_per_target_layer]


def to_full_scale(batches: list[np.ndarray]) -> np.ndarray:
    """One array whose maps peak at exactly 1: the library adds 1e-7 to its divisor, which dims weak
    maps."""
    maps = np.concatenate(batches)
    peak = maps.max(axis=(1, 2), keepdims=True)
    return maps / np.where(peak > 0, peak, 1)


def box_figures(box: np.ndarray, maps: dict[str, np.ndarray]) -> dict:
    """The entries `box`, `box_area` and `stages` of one image, whose maps are (h, w); see
    `explain`."""
    boxes = box[None]
    stages = {}
    for stage, small in maps.items():
        known = bool(usable(boxes)[0]) and bool(small.any())
        stages[stage] = {
            "size": list(small.shape),
            "mean": round(float(small.mean()), 4),
            "energy_in_box": round(float(energy(small[None], boxes)[0]), 4) if known else None,
        }
    return {"box": box.tolist(), "box_area": round(float(box_area(boxes)[0]), 4), "stages": stages}
