"""Why the network was wrong: misclassified test images, and Grad-CAM for the class it chose and for the actual one.

Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) weighs the channels of a stage by the mean gradient of a class's
logit and adds them up; what is left above zero is where the stage speaks for that class. The maps come from the
pytorch-grad-cam library (Gildenblat et al.).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pytorch_grad_cam import EigenCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from tinylab.exceptions import UserError
from tinylab.explain.boxes import box_area, energy, usable
from tinylab.explain.mistakes import softmax

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""The four stages of the network, in the order in which an image passes through them."""


class SignedEigenCAM(EigenCAM):
    """The library's Eigen-CAM (Muhammad and Yeasin 2020, arXiv:2008.00299): the first principal component of a stage's
    activations, here with a definite sign, positive where the stage is more active than on average.

    The sign of a singular vector is chance, so the library's maps are now and then the negative of what they mean. The
    decomposition is the thin one: the library's makes a square matrix of all pixels, 67 MB for one image's layer1.
    """

    def get_cam_image(
        self, input_tensor, target_layer, targets, activations, grads, eigen_smooth=False
    ) -> np.ndarray:
        flat = activations.reshape(*activations.shape[:2], -1)  # (B, C, h * w)
        centred = flat - flat.mean(axis=2, keepdims=True)
        _, strengths, places = np.linalg.svd(centred, full_matrices=False)
        component = strengths[:, :1] * places[:, 0]
        same_way = (component * centred.sum(axis=1)).sum(axis=1, keepdims=True) >= 0
        signed = np.where(same_way, component, -component)
        return signed.reshape(len(activations), *activations.shape[2:])


METHODS: dict[str, type[BaseCAM]] = {
    "gradcam": GradCAM,
    "gradcam++": GradCAMPlusPlus,
    "hirescam": HiResCAM,
    "layercam": LayerCAM,
    "eigencam": SignedEigenCAM,
}
"""Ways to turn activations and gradients into a map. One forward and one backward pass serve all stages. Eigen-CAM
needs no gradients and knows no classes: its maps for the predicted and the actual class are the same."""

RESAMPLES = 2000
"""Bootstrap samples; the ends of an interval then wobble by a few percent of its width."""


@dataclass(frozen=True)
class Explanation:
    """The chosen images, their maps, and what `explain.json` says about them; all empty if no answer was wrong."""

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


def misclassified(logits: np.ndarray, labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Indices, int64 (at most `count`,), of images whose largest logit is not the label's: a fair draw, nothing picked.

    `logits` is (N, C), `labels` integer (N,). The images are shuffled by `seed` and the first wrong ones taken, in
    shuffled order: every class can occur, the same predictions always give the same images, and a larger `count`
    begins with the images of a smaller one. Raises `UserError` for a negative count.
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
    """Which of the tested images are looked at, int64 (at most `count`,): the first of a permutation by `seed`, so that
    a larger sample begins with a smaller one; None: all. Raises `UserError` for a negative count."""
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
    method: str = "gradcam",
) -> dict[str, np.ndarray]:
    """Class activation maps, float32 (B, h, w) in 0..1, of each stage at its own size (64, 32, 16 and 8 pixels a side).

    `inputs` is float32 (B, 3, H, W), at least one image, normalised as in training; `targets` is integer (B,), the
    class that each image's map speaks for. Each map is scaled to itself, from its smallest value to its largest, so
    brightness cannot be compared between images, stages or classes; one that is 0 everywhere found nothing.

    Works in float32 (on GPUs, torch's setting may make TF32 of it in convolutions) on a copy (45 MB for ResNet-18) in
    evaluation mode: the model keeps its mode, gradients and hooks, may be compiled or wrapped, and the caller may be
    inside `no_grad`, `inference_mode` or autocast. Gradients are computed down to the first of `stages` only, so the
    last stage alone costs little more than a forward pass.
    Raises `UserError` for an unknown stage or method, `ValueError` for targets that do not fit the images.
    """
    require_known(method, stages)
    # The library gives an image without a target a map of zeros, and prints and swallows an index out of range.
    if targets.shape != inputs.shape[:1]:
        raise ValueError(
            f"one target for each image, please: {tuple(targets.shape)} for {len(inputs)} images"
        )
    classes = unwrapped(model).fc.out_features
    if targets.min() < 0 or targets.max() >= classes:
        raise ValueError(f"targets must lie in 0..{classes - 1}")

    # The library matches layers to activations by the order of execution, so it has to get them in that order.
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
        # The copy's weights ask for no gradient: the first stage's output does, before the library's hooks see it.
        layers[0].register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
        with _at_native_size(METHODS[method])(network, layers) as cam:
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
    return {stage: _to_full_scale([maps[i] for maps in batches]) for i, stage in enumerate(ordered)}


def require_known(method: str, stages: Sequence[str]) -> None:
    """Raises `UserError` unless the method is one of `METHODS` and the stages are of `STAGES`, one or more."""
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'; there are: {', '.join(METHODS)}")
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
    method: str = "gradcam",
) -> Explanation:
    """Draws `count` misclassified test images and shows, for each, what spoke for the class the network predicted, and
    in the last stage what spoke for the actual class.

    `images` uint8 (M, 64, 64, 3), `labels` (M,) and `boxes` (M, 4) are the whole data set's, in canonical order, and
    may be memory-mapped: only the drawn rows are read. `rows` (N,) says which of them were tested, `logits` (N, C) what
    the network answered. `normalise` turns uint8 (n, 64, 64, 3) into the network's float32 (n, 3, 64, 64).

    An entry holds `row`; `predicted` and `actual`, each with wnid, name and probability; `box`, the actual object's x0
    y0 x1 y1, inclusive; `box_area`, its share of the image; and for each of `stages`, and for `actual_map`, the map's
    `size`, its `mean` and `energy_in_box`, the share of the map that lies in the box. A map that knows nothing would
    score `box_area`; None stands where the box is degenerate or the map is 0. Raises `UserError` as `misclassified` and
    `gradcam` do.
    """
    require_known(method, STAGES)
    assert logits.shape == (len(rows), len(wnids)), (
        f"logits {logits.shape}: {len(rows)} rows, {len(wnids)} classes"
    )
    drawn = misclassified(logits, labels[rows], count, seed)
    wrong = int((logits.argmax(axis=1) != labels[rows]).sum())
    maps: dict[str, np.ndarray] = {}
    actual = np.empty((0, 8, 8), np.float32)
    if len(drawn):
        inputs = normalise(torch.from_numpy(images[rows[drawn]]))
        maps = gradcam(model, inputs, torch.from_numpy(logits[drawn].argmax(axis=1)), method=method)
        labelled = torch.from_numpy(labels[rows[drawn]].astype(np.int64))
        actual = gradcam(model, inputs, labelled, STAGES[-1:], method=method)[STAGES[-1]]

    probabilities = softmax(logits[drawn])
    entries = []
    for i, row in enumerate(rows[drawn].tolist()):
        answers = {"predicted": int(logits[drawn[i]].argmax()), "actual": int(labels[row])}
        entry: dict = {"row": row}
        for answer, index in answers.items():
            probability = round(float(probabilities[i, index]), 6)
            entry[answer] = {"wnid": wnids[index], "name": names[index], "probability": probability}
        entry |= _box_figures(
            boxes[row], {stage: stage_maps[i] for stage, stage_maps in maps.items()}
        )
        entry["actual_map"] = _box_figures(boxes[row], {"": actual[i]})["stages"][""]
        entries.append(entry)
    return Explanation(images[rows[drawn]], maps, actual, entries, len(rows), wrong, seed, method)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, without the wrappers of torch.compile, DistributedDataParallel and AveragedModel."""
    while inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None):
        model = inner
    return model


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the network without its wrappers: float32, in evaluation mode, its weights ask for no gradients."""
    return copy.deepcopy(unwrapped(model)).float().eval().requires_grad_(False)


def bootstrap(
    measures: Mapping[str, np.ndarray], seed: int = 0
) -> dict[str, dict[str, float] | None]:
    """Of each measure, float (n,), one value per image: its mean and its 95 % interval, as mean, low and high; None
    where there are no values.

    Percentiles of the means of 2,000 samples of n images, drawn with replacement (Efron and Tibshirani 1993, section
    13.3). All measures see the same samples, so that a difference of two belongs to the same images. `seed` decides
    which samples.
    """
    values = np.stack(list(measures.values()), axis=1).astype(np.float64)
    count = len(values)
    if count == 0:
        return dict.fromkeys(measures)
    rng = np.random.default_rng(seed)
    # How often each image was drawn, one sample at a time: all samples of 33,000 images would take half a gigabyte.
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


def _at_native_size(method: type[BaseCAM]) -> type[BaseCAM]:
    """The library's method, made to return a list of one (B, h, w) array per layer: neither enlarged nor averaged."""

    class NativeSize(method):
        def get_target_width_height(self, input_tensor: Tensor) -> None:
            return None

        def aggregate_multi_layers(
            self, cam_per_target_layer: list[np.ndarray]
        ) -> list[np.ndarray]:
            return [maps[:, 0] for maps in cam_per_target_layer]

    return NativeSize


def _to_full_scale(batches: list[np.ndarray]) -> np.ndarray:
    """One array whose maps peak at exactly 1: the library adds 1e-7 to its divisor, which dims weak maps."""
    maps = np.concatenate(batches)
    peak = maps.max(axis=(1, 2), keepdims=True)
    return maps / np.where(peak > 0, peak, 1)


def _box_figures(box: np.ndarray, maps: dict[str, np.ndarray]) -> dict:
    """The entries `box`, `box_area` and `stages` of one image, whose maps are (h, w); see `explain`."""
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
