"""Maps against boxes: how much of what a map points at lies in the box around the object.

Two measures: the pointing game (Zhang et al. 2016, arXiv:1608.00507) asks whether a map's highest
point lies in the box, the energy-based one (Wang et al. 2020, arXiv:1910.01279) which share of the
map does. boxes are integer (N, 4), x0 y0 x1 y1 in pixels of the 64 x 64 image, both ends included;
maps are float (N, h, w), not negative, enlarged to 64 x 64 bilinearly; results are (N,).
"""

import numpy as np
import torch
from torch.nn import functional

from tinylab.recipe import SIZE


def usable(boxes: np.ndarray) -> np.ndarray:
    """Return which boxes have an inside, which some of the published ones do not."""
    return (boxes[:, 2:] > boxes[:, :2]).all(axis=1)


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Return the share of the image that each box covers."""
    return inside(boxes).mean(axis=(1, 2))


def centre_hits(boxes: np.ndarray) -> np.ndarray:
    """Return the share of the image's four middle pixels in each box: 0, 1/4, 1/2 or 1."""
    middle = slice(SIZE // 2 - 1, SIZE // 2 + 1)
    return inside(boxes)[:, middle, middle].mean(axis=(1, 2))


def hits(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the pointing game: the share of a map's highest pixels that lies in the box.

    Those within a millionth of the highest count: no corner is preferred, and a map that is the
    same everywhere, or 0, scores its box's area.
    """
    large = enlarged(maps)
    return energy(large >= large.max(axis=(1, 2), keepdims=True) * (1 - 1e-6), boxes)


def energy(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the share of each map that lies in its box; of a map that is 0, the box's area."""
    large = enlarged(maps)
    large[~large.any(axis=(1, 2))] = 1
    return (large * inside(boxes)).sum(axis=(1, 2)) / large.sum(axis=(1, 2))


def inside(boxes: np.ndarray) -> np.ndarray:
    """Return which pixels lie in each box: bool (N, 64, 64) [y, x]."""
    x0, y0, x1, y1 = boxes.T[:, :, None]
    pixel = np.arange(SIZE)
    columns, lines = (x0 <= pixel) & (pixel <= x1), (y0 <= pixel) & (pixel <= y1)
    return lines[:, :, None] & columns[:, None, :]


def enlarged(maps: np.ndarray) -> np.ndarray:
    """Return the maps at the size of the images, float64 (N, 64, 64)."""
    tensor = torch.from_numpy(np.ascontiguousarray(maps, np.float64))[:, None]
    return functional.interpolate(tensor, size=(SIZE, SIZE), mode="bilinear")[:, 0].numpy()
