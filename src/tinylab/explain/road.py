"""Does the network need what a map points at? ROAD removes pixels in the order of the map.

Rong et al. 2022, "A Consistent and Efficient Evaluation Strategy for Attribution Methods"
(arXiv:2202.00449), as the pytorch-grad-cam library has it: removed pixels are filled in from their
neighbours with a little noise. If a map is faithful, the probability of the answer falls fast when
its highest pixels go first, and stays when its lowest do.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from pytorch_grad_cam.metrics.road import ROADLeastRelevantFirst, ROADMostRelevantFirst
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from torch import Tensor, nn
from torch.nn import functional

from tinylab.data.dataset import Dataset
from tinylab.explain.gradcam import frozen_copy, gradcam, stages_of
from tinylab.explain.sampling import bootstrap, sample
from tinylab.training.progress import print_line, silent, watched

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)  # at 80, a fifth of all pixels goes
ORDERS = {
    "most_relevant_first": ROADMostRelevantFirst, "least_relevant_first": ROADLeastRelevantFirst,
}  # fmt: skip
BATCH = 32  # images that are held as float32 at a time, and fit a CPU's cache


@torch.inference_mode(False)
@torch.no_grad()
def faithfulness(
    model: nn.Module,
    dataset: Dataset,
    *,
    rows: np.ndarray,
    logits: np.ndarray,
    normalise: Callable[[Tensor], Tensor],
    stage: str | None = None,
    count: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> dict:
    """Return ROAD of the maps for the predicted class, and of random maps as coarse and smooth.

    The arguments are those of `mistakes.explain`. `map` and `random` hold for each of `ORDERS` the
    mean change of the answer's probability at each percentile; `combined` and `random_combined`
    half the difference of the two orders (higher is better); then their `difference`.
    """
    started, stage = time.perf_counter(), stage or stages_of(model)[-1]
    chosen = sample(len(rows), count, seed)
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    batches = [np.empty((2, len(ORDERS), len(PERCENTILES), 0))]
    starts, say = range(0, len(chosen), BATCH), print_line if progress else silent
    with torch.autocast(device.type, enabled=False), torch.random.fork_rng(devices=()):
        network = frozen_copy(model)
        for first in watched(starts, "ROAD", len(starts), say):
            some = chosen[first : first + BATCH]
            images = torch.from_numpy(dataset.images[rows[some]])
            inputs = normalise(images).to(device, torch.float32)
            classes = torch.from_numpy(logits[some].argmax(axis=1))
            maps = torch.from_numpy(gradcam(network, inputs, classes, (stage,))[stage])
            noise = torch.rand(maps.shape, generator=generator)
            both = [changes(network, inputs, classes, x, noise, seed) for x in (maps, noise)]
            batches.append(np.array(both))

    found = {"images": len(chosen), "method": "gradcam", "stage": stage, "seed": seed}
    found["percentiles"] = list(PERCENTILES)
    ours, theirs = np.concatenate(batches, axis=-1)
    for kind, curves in (("map", ours), ("random", theirs)):
        means = curves.mean(axis=2).tolist() if len(chosen) else [[None] * len(PERCENTILES)] * 2
        found[kind] = dict(zip(ORDERS, means, strict=True))
    combined, random = ((least - most).mean(axis=0) / 2 for most, least in (ours, theirs))
    measures = {"combined": combined, "random_combined": random, "difference": combined - random}
    found |= bootstrap(measures, seed)
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def changes(
    network: nn.Module, inputs: Tensor, classes: Tensor, maps: Tensor, ties: Tensor, seed: int
) -> np.ndarray:
    """Return the change of the classes' probabilities, float64 (orders, percentiles, B).

    Pixels go in the order of maps (B, h, w) and, where equal, of ties.
    """
    both = torch.stack([maps, ties])
    order = ranks(*functional.interpolate(both, inputs.shape[2:], mode="bilinear").numpy())
    targets = [ClassifierOutputSoftmaxTarget(index) for index in classes.tolist()]
    before = network(inputs).softmax(dim=1).cpu()[torch.arange(len(classes)), classes].numpy()
    # The library fills in with noise: the same for maps and random maps, on whatever device.
    torch.default_generator.manual_seed(seed)
    # Without the library's own difference, which would ask about the whole images each time.
    after = [
        [road(each)(inputs, order, targets, network, return_diff=False) for each in PERCENTILES]
        for road in ORDERS.values()
    ]
    return np.array(after, np.float64) - before


def ranks(maps: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Return the rank of each pixel within its map, float32 (B, H, W) in 0..1.

    The library removes whatever is not below a percentile: of a map that is 0 in most pixels, all.
    Equal pixels therefore go in the order of `ties`.
    """
    order = np.lexsort((ties.reshape(len(ties), -1), maps.reshape(len(maps), -1)))
    places = order.argsort(axis=1).astype(np.float32) / order.shape[1]
    return places.reshape(maps.shape)
