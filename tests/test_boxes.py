"""Maps against boxes, where the truth is known by construction."""

import numpy as np
import pytest

from tinylab.data.dataset import Dataset
from tinylab.explain.boxes import box_area, centre_hits, energy, hits, usable

BOXES = np.array(
    [
        [8, 16, 31, 55],  # higher than wide: exchanged axes would show
        [0, 40, 63, 47],
        [5, 3, 5 + 17, 3 + 6],
        [63, 0, 63, 63],
        [0, 0, 63, 63],
        [32, 32, 32, 32],
    ],
    dtype=np.uint8,
)


def masks(boxes: np.ndarray) -> np.ndarray:
    """Maps that are 1 in the box and 0 elsewhere, made pixel by pixel."""
    maps = np.zeros((len(boxes), 64, 64), np.float32)
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        for y in range(y0, y1 + 1):
            for x in range(x0, x1 + 1):
                maps[i, y, x] = 1
    return maps


def test_a_map_made_of_the_true_mask_scores_one() -> None:
    assert np.array_equal(hits(masks(BOXES), BOXES), np.ones(len(BOXES)))
    assert np.allclose(energy(masks(BOXES), BOXES), 1)


@pytest.mark.parametrize("value", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("side", [1, 8, 64])
def test_a_uniform_map_scores_the_box_s_area(value: float, side: int) -> None:
    maps = np.full((len(BOXES), side, side), value, np.float32)
    area = np.array([24 * 40, 64 * 8, 18 * 7, 64, 64 * 64, 1]) / 64**2
    assert np.allclose(box_area(BOXES), area)
    assert np.allclose(hits(maps, BOXES), area)
    assert np.allclose(energy(maps, BOXES), area)


def test_a_shifted_mask_scores_its_overlap() -> None:
    box = np.array([[8, 16, 31, 55]], np.uint8)
    for dx, dy in ((1, 0), (0, 1), (5, -3), (-8, 8), (24, 0), (0, -16), (32, 8)):
        moved = masks(box + np.array([dx, dy, dx, dy]))
        overlap = max(24 - abs(dx), 0) * max(40 - abs(dy), 0) / (24 * 40)
        assert energy(moved, box)[0] == pytest.approx(overlap), (dx, dy)
        assert hits(moved, box)[0] == pytest.approx(overlap), (
            "every pixel of the mask is a highest one"
        )


@pytest.mark.parametrize(("x", "y", "inside"), [
    (8, 16, True), (31, 55, True), (31, 16, True), (8, 55, True), (7, 16, False), (32, 55, False),
    (8, 15, False),
    (31, 56, False), (16, 8, False), (55, 31, False),
])  # fmt: skip
def test_both_ends_of_a_box_belong_to_it_and_x_goes_to_the_right(
    x: int, y: int, inside: bool
) -> None:
    one_point = np.zeros((1, 64, 64), np.float32)
    one_point[0, y, x] = 1
    assert hits(one_point, BOXES[:1])[0] == inside
    assert energy(one_point, BOXES[:1])[0] == inside


def test_exchanged_axes_would_be_another_score() -> None:
    rng = np.random.default_rng(0)
    maps, boxes = rng.random((40, 8, 8)), BOXES[rng.integers(3, size=40)]
    exchanged = maps.swapaxes(1, 2)
    assert not np.allclose(energy(maps, boxes), energy(exchanged, boxes), atol=0.01)
    assert np.allclose(energy(maps, boxes), energy(exchanged, boxes[:, [1, 0, 3, 2]]))
    assert np.array_equal(hits(maps, boxes), hits(exchanged, boxes[:, [1, 0, 3, 2]]))


def by_hand(small: np.ndarray, box: list[int]) -> tuple[float, float]:
    """Both measures of one map (h, w), enlarged pixel by pixel as bilinear interpolation is
    defined."""
    side = len(small)

    def value(y: int, x: int) -> float:
        total = 0.0
        places = []
        for at in (y, x):
            exact = max((at + 0.5) * side / 64 - 0.5, 0.0)
            low = int(exact)
            places.append(((low, 1 - (exact - low)), (min(low + 1, side - 1), exact - low)))
        for row, vertical in places[0]:
            for column, horizontal in places[1]:
                total += small[row, column] * vertical * horizontal
        return total

    pixels = {(y, x): value(y, x) for y in range(64) for x in range(64)}
    inside = {(y, x) for y, x in pixels if box[0] <= x <= box[2] and box[1] <= y <= box[3]}
    highest = max(pixels.values())
    peaks = {compute for compute, each in pixels.items() if each >= highest * (1 - 1e-6)}
    return len(peaks & inside) / len(peaks), sum(pixels[compute] for compute in inside) / sum(
        pixels.values()
    )


def test_coarse_maps_equal_a_slow_loop() -> None:
    rng = np.random.default_rng(1)
    for side in (2, 8, 16):
        maps = rng.random((3, side, side)).astype(np.float32)
        maps[1, 0, 0] = 5  # highest in a corner, where the enlarged map has a plateau
        expected = [
            by_hand(small.astype(float), box)
            for small, box in zip(maps, BOXES[:3].tolist(), strict=True)
        ]
        assert np.allclose(hits(maps, BOXES[:3]), [hit for hit, _ in expected])
        assert np.allclose(energy(maps, BOXES[:3]), [share for _, share in expected])


def test_a_plateau_in_a_corner_counts_by_its_share() -> None:
    """The highest of 8 x 8 values lies in the corner: 4 x 4 equal pixels, of which a box of three
    columns has 3/4."""
    maps = np.zeros((1, 8, 8), np.float32)
    maps[0, 7, 7] = 1
    assert hits(maps, np.array([[0, 0, 62, 63]], np.uint8))[0] == pytest.approx(0.75)
    assert hits(maps, np.array([[0, 0, 59, 63]], np.uint8))[0] == 0


def test_values_that_differ_by_rounding_only_are_equal() -> None:
    noise = np.random.default_rng(0).random((len(BOXES), 64, 64)) * 1e-7
    assert np.allclose(hits(0.7 + noise, BOXES), box_area(BOXES))
    beside = np.ones((1, 64, 64))
    beside[0, 20, 20] += 1e-5
    assert hits(beside, BOXES[:1])[0] == 1, "a hundred thousandth is a difference"


def test_boxes_without_an_inside_are_known() -> None:
    boxes = np.array(
        [[3, 3, 3, 9], [3, 9, 8, 9], [9, 3, 3, 9], [3, 3, 4, 4], [0, 0, 63, 63], [63, 63, 0, 0]],
        np.uint8,
    )
    assert usable(boxes).tolist() == [False, False, False, True, True, False]
    assert np.allclose(box_area(boxes), np.array([7, 6, 0, 4, 4096, 0]) / 4096)


@pytest.mark.parametrize(("box", "hit"), [
    ((0, 0, 63, 63), 1), ((31, 31, 32, 32), 1), ((0, 0, 31, 63), 0.5), ((32, 0, 63, 63), 0.5),
    ((0, 0, 63, 31), 0.5),
    ((0, 32, 63, 63), 0.5), ((30, 30, 40, 40), 1), ((32, 32, 63, 63), 0.25), ((0, 0, 30, 63), 0),
    ((0, 33, 63, 63), 0),
])  # fmt: skip
def test_the_centre_scores_what_a_map_with_its_peak_there_scores(box: tuple, hit: float) -> None:
    boxes = np.array([box], np.uint8)
    peak = np.zeros((1, 64, 64), np.float32)
    peak[0, 31:33, 31:33] = 1
    assert centre_hits(boxes).tolist() == hits(peak, boxes).tolist() == [hit]


def test_sample_data_have_boxes_around_their_shapes(sample_dataset: Dataset) -> None:
    """The made-up images: what differs from the background most lies in the box, whose maker knows
    where it drew."""
    images, boxes = sample_dataset.images[:200].astype(np.float64), sample_dataset.boxes[:200]
    border = np.concatenate(
        [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1
    )
    contrast = np.abs(images - np.median(border, axis=1)[:, None, None]).sum(axis=3)
    contrast = np.maximum(contrast - np.quantile(contrast, 0.8, axis=(1, 2), keepdims=True), 0)
    good = usable(boxes)
    ours = energy(contrast, boxes)[good]
    exchanged = energy(contrast, boxes[:, [1, 0, 3, 2]])[good]
    assert ours.mean() > box_area(boxes)[good].mean() + 0.2
    assert ours.mean() > exchanged.mean() + 0.05


@pytest.mark.archive
def test_the_published_boxes_have_their_known_figures(real_dataset: Dataset) -> None:
    """Counted independently before: degenerate boxes, and both baselines on validation images."""
    train, validation = real_dataset.boxes[:100_000], real_dataset.boxes[100_000:]
    assert ((~usable(train)).sum(), (~usable(validation)).sum()) == (434, 41)
    good = validation[usable(validation)]
    assert centre_hits(good).mean() == pytest.approx(0.791, abs=0.001)
    assert (centre_hits(good) == 1).mean() == pytest.approx(0.784, abs=0.001), (
        "all four pixels, the stricter count"
    )
    assert box_area(good).mean() == pytest.approx(0.52, abs=0.01)
