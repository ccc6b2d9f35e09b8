"""Maps against boxes: how much of what a map points at lies in the box around the object.

Two measures: the pointing game (Zhang et al. 2016, arXiv:1608.00507) asks whether a map's highest
point lies in the box, the energy-based one (Wang et al. 2020, arXiv:1910.01279) which share of the
map does. Boxes are x0 y0 x1 y1 in pixels of the 64 x 64 image, both ends included.
"""

import numpy as np
import torch
from torch.nn import functional

from tinylab.recipe import SIZE


def usable(boxes: np.ndarray) -> np.ndarray:
    """Which boxes, integer (N, 4) x0 y0 x1 y1, have an inside: bool (N,). Some of the published
    ones have none."""
    x0, y0, x1, y1 = _corners(boxes)
    return (x1 > x0) & (y1 > y0)


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Share of the 64 x 64 image that each box, integer (N, 4), covers, both ends included: float64
    (N,)."""
    x0, y0, x1, y1 = _corners(boxes)
    return np.maximum(x1 - x0 + 1, 0) * np.maximum(y1 - y0 + 1, 0) / SIZE**2


def centre_hits(boxes: np.ndarray) -> np.ndarray:
    """How the image's centre does in the pointing game, for each box (N, 4): float64 (N,). The
    centre are the four pixels in the middle, of which, as in `hits`, the share in the box counts:
    0, 1/4, 1/2 or 1."""
    x0, y0, x1, y1 = _corners(boxes)
    columns, lines = (
        sum(
            ((low <= compute) & (compute <= high)).astype(np.float64)
            for compute in (SIZE // 2 - 1, SIZE // 2)
        )
        / 2
        for low, high in ((x0, x1), (y0, y1))
    )
    return columns * lines


def hits(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The pointing game: float64 (N,), of maps float (N, h, w), not negative, and boxes integer (N,
    4) x0 y0 x1 y1.

    A map is enlarged to 64 x 64 bilinearly. Where several pixels are highest (within a millionth),
    the share of them that lies in the box counts, which is what a choice at random would score on
    average: no corner is preferred, and a map that is the same everywhere, or 0, scores its box's
    area.
    """
    large = _enlarged(maps)
    peaks = large >= large.max(axis=(1, 2), keepdims=True) * (1 - 1e-6)
    return (peaks & _inside(boxes)).sum(axis=(1, 2)) / peaks.sum(axis=(1, 2))


def energy(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The share of each map, float (N, h, w), not negative, enlarged as in `hits`, that lies in its
    box: float64 (N,). A map that is 0 knows nothing and scores as one that is the same everywhere:
    its box's area."""
    large = _enlarged(maps)
    total = large.sum(axis=(1, 2))
    inside = (large * _inside(boxes)).sum(axis=(1, 2))
    return np.where(total > 0, inside / np.where(total > 0, total, 1), box_area(boxes))


def _corners(boxes: np.ndarray) -> np.ndarray:
    return boxes.astype(
        np.int64
    ).T  # unsigned bytes would wrap where one is subtracted from another


def _inside(boxes: np.ndarray) -> np.ndarray:
    """Which pixels lie in each box, both ends included: bool (N, 64, 64) [y, x]."""
    x0, y0, x1, y1 = _corners(boxes)[:, :, None]
    compute = np.arange(SIZE)
    columns, lines = (x0 <= compute) & (compute <= x1), (y0 <= compute) & (compute <= y1)
    return lines[:, :, None] & columns[:, None, :]


def _enlarged(maps: np.ndarray) -> np.ndarray:
    """Maps (N, h, w) at the size of the images, float64 (N, 64, 64)."""
    tensor = torch.from_numpy(np.ascontiguousarray(maps, np.float64))[:, None]
    return functional.interpolate(tensor, size=(SIZE, SIZE), mode="bilinear")[:, 0].numpy()
