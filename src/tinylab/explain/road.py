"""Does the network need what a map points at? ROAD: pixels are removed in the order of the map, and
the answer watched.

Rong et al. 2022, "A Consistent and Efficient Evaluation Strategy for Attribution Methods"
(arXiv:2202.00449), as the pytorch-grad-cam library has it: removed pixels are filled in from their
neighbours with a little noise, so that neither their absence nor a hard edge tells what was there.
If a map is faithful, the probability of the answer falls fast when its highest pixels go first, and
stays when its lowest do.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from pytorch_grad_cam.metrics.road import ROADLeastRelevantFirst, ROADMostRelevantFirst
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from tinylab.explain.gradcam import bootstrap, frozen_copy, gradcam, require_known, sample

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
"""The library's: at 80, the fifth of all pixels goes in which the map is highest (or lowest)."""
ORDERS = {
    "most_relevant_first": ROADMostRelevantFirst,
    "least_relevant_first": ROADLeastRelevantFirst,
}
BATCH = 32
"""Images that are held as float32 at a time, and fit a CPU's cache."""


def faithfulness(
    model: nn.Module,
    *,
    images: np.ndarray,
    rows: np.ndarray,
    logits: np.ndarray,
    normalise: Callable[[Tensor], Tensor],
    stage: str = "layer4",
    count: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """Return ROAD of the maps for the predicted class, and of random maps as coarse and smooth.

    The arguments are those of `gradcam.explain`. About a second per image on one core. The result
    holds images, method, stage, seed, seconds, percentiles; `map` and `random`, each with
    `most_relevant_first` and `least_relevant_first`, the mean change of the answer's probability
    for every percentile; `combined` and `random_combined`, mean, low and high of half the
    difference of the two orders (higher is better, about 0 is what knows nothing); `difference`.
    """
    require_known((stage,))
    started = time.perf_counter()
    chosen = sample(len(rows), count, seed)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    changes = [np.empty((2, len(ORDERS), len(PERCENTILES), 0))]
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=()),
        tqdm(
            total=len(chosen), desc="ROAD", unit="image", leave=False, disable=not progress
        ) as bar,
    ):
        network = frozen_copy(model)
        for some in np.split(chosen, range(BATCH, len(chosen), BATCH)) if len(chosen) else ():
            inputs = normalise(torch.from_numpy(images[rows[some]])).to(device, torch.float32)
            classes = torch.from_numpy(logits[some].argmax(axis=1))
            maps = torch.from_numpy(gradcam(network, inputs, classes, (stage,))[stage])
            noise = torch.rand(maps.shape, generator=generator)
            kinds = ((maps, noise), (noise, noise))
            changes.append(
                np.array([_changes(network, inputs, classes, *each, seed) for each in kinds])
            )
            bar.update(len(some))
    found = {
        "images": len(chosen),
        "method": "gradcam",
        "stage": stage,
        "seed": seed,
        "percentiles": list(PERCENTILES),
    }
    found |= _summarised(*np.concatenate(changes, axis=-1), seed)
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def _changes(
    network: nn.Module, inputs: Tensor, classes: Tensor, maps: Tensor, ties: Tensor, seed: int
) -> np.ndarray:
    """Return the change of the classes' probabilities, float64 (2, percentiles, B).

    Pixels of inputs (B, 3, H, W) go in the order of maps (B, h, w), most and least relevant first;
    of equal pixels `ties` (B, h, w) decides.
    """
    large, decides = (
        functional.interpolate(each[:, None], size=inputs.shape[2:], mode="bilinear")[:, 0]
        for each in (maps, ties)
    )
    ranks = _ranks(large, decides).numpy()
    targets = [ClassifierOutputSoftmaxTarget(index) for index in classes.tolist()]
    before = network(inputs).softmax(dim=1).cpu()[torch.arange(len(classes)), classes].numpy()
    # What the library fills in is noisy: the same noise for maps and random maps. On the CPU,
    # whatever the device.
    torch.default_generator.manual_seed(seed)

    def after(road: type, percentile: int) -> np.ndarray:
        # Without the library's own difference, for which it would ask the network about the whole
        # images each time.
        return road(percentile)(inputs, ranks, targets, network, return_diff=False)

    tried = [[after(road, percentile) for percentile in PERCENTILES] for road in ORDERS.values()]
    return np.array(tried, np.float64) - before


def _ranks(maps: Tensor, ties: Tensor) -> Tensor:
    """Return the rank of each pixel within its map, float32 (B, H, W) in 0..1.

    The library removes whatever is not below a percentile, and many maps are 0 in most of their
    pixels: asked for nine tenths it would remove everything. Such pixels go in the order of `ties`.
    """
    order = ties.flatten(1).argsort(dim=1, stable=True)
    flat = maps.flatten(1)
    order = order.gather(1, flat.gather(1, order).argsort(dim=1, stable=True))
    places = torch.arange(flat.shape[1], dtype=torch.float32).expand_as(flat)
    return (torch.empty_like(flat).scatter_(1, order, places) / flat.shape[1]).view_as(maps)


def _summarised(ours: np.ndarray, theirs: np.ndarray, seed: int) -> dict:
    """What `faithfulness` returns of the changes, (2, percentiles, N) each, of the maps and of
    random ones."""
    curves = {
        kind: {order: _means(change) for order, change in zip(ORDERS, changes, strict=True)}
        for kind, changes in (("map", ours), ("random", theirs))
    }
    combined, random = ((least - most).mean(axis=0) / 2 for most, least in (ours, theirs))
    measures = {"combined": combined, "random_combined": random, "difference": combined - random}
    return curves | bootstrap(measures, seed)


def _means(changes: np.ndarray) -> list[float | None]:
    """Of changes (percentiles, N) the mean for each percentile; None without images."""
    return changes.mean(axis=1).tolist() if changes.size else [None] * len(changes)
