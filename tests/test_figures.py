"""Figures: what they show, that they bear any text, and that they leave nothing behind."""

import io
import itertools
import math
import os
import subprocess
import sys
import warnings
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from tinylab import figures as plots
from tinylab.exceptions import UserError
from tinylab.figures import style

PLAIN = ["one", "two", "three", "four"]
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
MAPS = {
    f"layer{i + 1}": np.random.default_rng(i).random((4, side, side), dtype=np.float32)
    for i, side in enumerate((64, 32, 16, 8))
}


def entries(names: list[str]) -> list[dict]:
    answers = [{"name": name, "probability": 0.625} for name in names]
    return [
        {"predicted": answer, "actual": answer | {"probability": 0.0625}, "box": [8, 16, 31, 47]}
        for answer in answers
    ]


def history(epochs: int) -> list[dict]:
    return [
        {
            "epoch": epoch,
            "learning_rate": 0.01,
            "train_loss": 4.0 / epoch,
            "train_top1": 60 - 50 / epoch,
            "train_top5": 80 - 50 / epoch,
            "test_loss": 4.2 / epoch,
            "test_top1": 50 - 45 / epoch,
            "test_top5": 75 - 45 / epoch,
        }
        for epoch in range(1, epochs + 1)
    ]


REFERENCE = [
    {
        "epoch": str(epoch),
        "last_batch_loss": "2.5",
        "train_accuracy_pct": "70.5",
        "test_loss_as_printed": "0.0100",
        "test_accuracy_pct": "55.25",
    }
    for epoch in range(1, 31)
]


def square(classes: int) -> np.ndarray:
    """A confusion matrix: class i of 100 images is right in 60 and taken for its neighbour, 30, and
    for all, 10."""
    matrix = np.full((classes, classes), 0) + 60 * np.eye(classes, dtype=int)
    for i in range(classes):
        matrix[i, i ^ 1 if i ^ 1 < classes else i] += 30
        matrix[i] += np.bincount(np.arange(10) % classes, minlength=classes)
    return matrix


def pairs(names: list[str]) -> list[dict]:
    one, other = (
        {"index": i, "wnid": f"n{i}", "name": name, "images": 165}
        for i, name in enumerate(names[:2])
    )
    pair = {"one": one, "other": other, "one_as_other": 12, "other_as_one": 0, "count": 12}
    return [pair, pair | {"one_as_other": 0, "other_as_one": 7, "count": 7}]


def calibration(counts: list[int], note: str | None = None) -> dict:
    """Bins that are 20 points surer than right, before, and right as often as sure, after."""
    bins = len(counts)
    middles = [(i + 0.5) / bins if count else None for i, count in enumerate(counts)]
    shared = {
        "nll": 1.0,
        "mean_confidence": 0.75,
        "accuracy_overall": 0.5,
        "confidence": middles,
        "count": counts,
    }
    below = [None if middle is None else max(middle - 0.2, 0) for middle in middles]
    before, after = (
        shared | {"ece": 0.2, "accuracy": below},
        shared | {"ece": 0.0, "accuracy": middles},
    )
    return {
        "bins": bins,
        "folds": 2,
        "temperature": 1.5,
        "note": note,
        "before": before,
        "after": after,
    }


def located(method: str = "gradcam") -> dict:
    """As `tinylab.explain.localisation` sums it up; of the wrong answers with small boxes there is
    none."""
    groups = []
    for boxes, shift in (("all", 0.0), ("below half", -0.25)):
        for answers, kind in (
            ("all", "predicted"),
            ("all", "actual"),
            ("right", "both"),
            ("wrong", "predicted"),
            ("wrong", "actual"),
        ):
            images = 0 if (boxes, answers) == ("below half", "wrong") else 1234
            values = {"hit": 0.8, "energy": 0.6, "centre_hit": 0.7, "uniform": 0.5}
            values = {key: value + shift for key, value in values.items()}
            values |= {"hit_minus_centre": 0.1, "energy_minus_uniform": -0.03}
            estimates = {
                key: {"mean": v, "low": v - 0.02, "high": v + 0.02} if images else None
                for key, v in values.items()
            }
            groups.append(
                {"boxes": boxes, "answers": answers, "class": kind, "images": images} | estimates
            )
    return {
        "method": method,
        "stage": "layer4",
        "native_size": [4, 8],
        "scored": 1234,
        "groups": groups,
    }


def road(method: str = "gradcam") -> dict:
    estimate = {"mean": 0.07, "low": -0.01, "high": 0.15}
    return {
        "images": 200,
        "method": method,
        "stage": "layer4",
        "percentiles": [20, 90, 50],
        "map": {
            "most_relevant_first": [-0.4, -0.2, -0.3],
            "least_relevant_first": [None, 0.01, -0.1],
        },
        "random": {
            "most_relevant_first": [-0.4, -0.1, -0.2],
            "least_relevant_first": [-0.4, -0.1, -0.2],
        },
        "combined": estimate,
        "random_combined": {"mean": None, "low": None, "high": None},
        "difference": estimate,
    }


def top(names: list[str]) -> list[dict]:
    return [{"name": name, "probability": 0.5**i} for i, name in enumerate(names)]


def grey(image: np.ndarray) -> np.ndarray:
    """Return uint8 (h, w, 3), its luminance in all channels (ITU-R BT.601)."""
    luminance = 0.299 * image[..., 0] + 0.587 * image[..., 1] + 0.114 * image[..., 2]
    return np.stack(3 * [luminance.astype(np.uint8)], axis=-1)


def thumbnails() -> list[tuple[np.ndarray, np.ndarray]]:
    return [(IMAGES[:3], IMAGES[:0]), (IMAGES[:0], IMAGES[3:])]


def class_maps(names: list[str]) -> Figure:
    return plots.class_maps(
        IMAGES,
        MAPS["layer4"],
        MAPS["layer4"][::-1],
        entries(names),
        method=names[0],
        title=names[0],
    )


LOSSES = [5.0, 5.1, 5.0, 4.0, 3.0, 2.0, 2.5, 4.0, 9.0, math.inf]
RATES = [10.0**power for power in range(-6, 4)]

FIGURES = {
    "curves": lambda names: plots.accuracy_and_loss(history(3), REFERENCE, title=names[0]),
    "schedule": lambda names: plots.learning_rate_curve([0.1, 0.2, 0.1], [0.9, 0.8, 0.9], 1),
    "grid": lambda names: plots.image_grid(IMAGES, names, [[0, 0, 63, 63]] * 4, title=names[0]),
    "augmentation": lambda names: plots.before_after(IMAGES, 255 - IMAGES, names, title=names[0]),
    "classes": lambda names: plots.class_accuracy(names, [0, 40, 70, 100], [50] * 4),
    "mistakes": lambda names: plots.misclassified(IMAGES, entries(names), title=names[0]),
    "gradcam": lambda names: plots.gradcam_stages(
        IMAGES, {"layer4": MAPS["layer4"]}, entries(names), names[0]
    ),
    "confusion": lambda names: plots.confusion(square(4), names, [2, 3, 0, 1]),
    "pairs": lambda names: plots.confused_pairs(pairs(names), thumbnails(), title=names[0]),
    "answers": lambda names: plots.confident(IMAGES, entries(names), title=names[0]),
    "twins": lambda names: plots.label_conflicts(
        IMAGES[:2], [{"names": names[:2], "tested": [True, False]}] * 2
    ),
    "reliability": lambda names: plots.reliability(calibration([0, 3, 5, 0, 9], note=names[0])),
    "class maps": class_maps,
    "localisation": lambda names: plots.localisation(located(names[0])),
    "faithfulness": lambda names: plots.faithfulness(road(names[0])),
    "range test": lambda names: plots.learning_rate_test(RATES, LOSSES, LOSSES, 0.1),
    "prediction": lambda names: plots.prediction(
        IMAGES[0], top(names), MAPS["layer4"][0], title=names[0]
    ),
    "message": lambda names: plots.message(names[0]),
}


def texts(figure: Figure) -> list[Text]:
    """Every text that is drawn: matplotlib also keeps ticks of hidden axes and beyond the
    limits."""
    undrawn = set()
    for axis in [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        for tick, compute in zip(axis.get_major_ticks(), axis.get_majorticklocs(), strict=False):
            if not axis.axes.axison or not low <= compute <= high:
                undrawn |= {tick.label1, tick.label2}
        undrawn |= set(axis.findobj(Text)) if not axis.axes.axison else set()
    return [
        text for text in figure.findobj(Text) if text.get_text().strip() and text not in undrawn
    ]


def words(figure: Figure) -> str:
    return " ".join(" ".join(text.get_text().split()) for text in texts(figure))


def draw(figure: Figure) -> FigureCanvasAgg:
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.draw()
    return canvas


def image_axes(figure: Figure) -> list:
    return [
        ax for ax in figure.axes if ax.images and ax.images[0].get_array().shape[:2] == (64, 64)
    ]


LONG = ["W" * 300, "$\\frac{$ \ud800 \n\x1b[31m", "金魚 " * 50, ""]
NEW = list(FIGURES)[list(FIGURES).index("confusion") : -1]


@pytest.mark.parametrize("names", [PLAIN, LONG], ids=["plain", "long"])
@pytest.mark.parametrize("name", NEW)
def test_no_text_overlaps_another_or_leaves_the_figure(name: str, names: list[str]) -> None:
    figure = FIGURES[name](names)
    assert_apart(figure)
    assert figure.get_figwidth() == style.WIDTH


def assert_apart(figure: Figure) -> None:
    """No two texts share a pixel, nothing is cut off, no text is read as a formula."""
    renderer, boxes = draw(figure).get_renderer(), []
    for text in filter(Text.get_visible, texts(figure)):
        assert not text.get_parse_math() or "$" not in text.get_text()
        box = text.get_window_extent(renderer)
        assert min(box.x0, box.y0) >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text
        # What is slanted has an extent far wider than its letters.
        boxes += [(box.padded(-0.5), text.get_text())] if text.get_rotation() % 90 == 0 else []
    for (box, text), (other, beside) in combinations(boxes, 2):
        assert not box.overlaps(other), f"{text!r} over {beside!r}"


@pytest.mark.parametrize("name", FIGURES)
def test_settings_of_others_change_nothing_nor_are_changed(name: str, tmp_path: Path) -> None:
    import matplotlib.pyplot as pyplot

    settings, open_figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    plain = plots.save(FIGURES[name](PLAIN), tmp_path / "plain.png", dpi=40).read_bytes()
    assert dict(matplotlib.rcParams) == settings
    assert pyplot.get_fignums() == open_figures

    others = {
        "font.size": 20,
        "savefig.bbox": "tight",
        "axes.facecolor": "black",
        "xtick.labelsize": 30,
        "lines.marker": "x",
    }
    with matplotlib.rc_context(others):
        assert (
            plots.save(FIGURES[name](PLAIN), tmp_path / "styled.png", dpi=40).read_bytes() == plain
        )


def test_saved_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plots.save(plots.message("first"), tmp_path / "new" / "figure.png")
    before = path.read_bytes()

    def full_disk(self: Path, content: bytes) -> None:
        with open(self, "wb") as file:
            file.write(content[:4])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*no space left"):
        plots.save(plots.message("second"), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


def test_saved_file_holds_no_version_or_time(tmp_path: Path) -> None:
    with Image.open(plots.save(plots.message("text"), tmp_path / "figure.png", dpi=50)) as image:
        assert image.size == (450, 60)
        assert set(image.info) <= {"dpi"}


@pytest.mark.parametrize(("backend", "kept"), [("odd", "agg"), ("svg", "svg")])
def test_the_backend_of_another_program_stops_nothing(backend: str, kept: str) -> None:
    code = "from tinylab import figures; import matplotlib; print(matplotlib.get_backend())"
    environment = os.environ | {"MPLBACKEND": backend}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == kept


def test_notebook_shows_a_figure_by_itself() -> None:
    with Image.open(io.BytesIO(plots.message("text")._repr_png_())) as image:
        assert image.size == (900, 120)


def test_curves_show_this_run_and_the_course_run() -> None:
    losses, accuracies = plots.accuracy_and_loss(history(3), REFERENCE).axes
    assert losses.get_title(loc="left") == "Loss (mean cross-entropy)"
    assert accuracies.get_title(loc="left") == "Accuracy (top-1, %)"
    for line, values in zip(losses.lines, ([4, 2, 4 / 3], [4.2, 2.1, 1.4]), strict=True):
        assert np.allclose(line.get_data(), ([1, 2, 3], values))
    drawn = {line.get_label(): line for line in accuracies.lines}
    assert np.allclose(drawn["training"].get_ydata(), [10, 35, 60 - 50 / 3])
    assert np.allclose(drawn["test"].get_ydata(), [5, 27.5, 35])
    for name, value in (("training", 70.5), ("test", 55.25)):
        line = drawn[f"course run, {name}"]
        assert np.allclose(line.get_data(), (range(1, 31), [value] * 30))
        assert line.get_linestyle() != drawn[name].get_linestyle()
    labels = {text.get_text() for text in accuracies.texts}
    assert {"test 35.00 %", "course run, test 55.25 %"} < labels
    # All stand to the right of the longest line, where none of them is drawn over.
    assert {text.xy[0] for text in accuracies.texts} == {30}


def test_one_spike_does_not_flatten_the_losses() -> None:
    rows = history(30)
    whole = plots.accuracy_and_loss(rows).axes[0].get_ylim()[1]
    assert whole > max(row["test_loss"] for row in rows)
    rows[12] |= {"test_loss": 40.0}
    assert plots.accuracy_and_loss(rows).axes[0].get_ylim()[1] == pytest.approx(whole, rel=0.3)


@pytest.mark.parametrize("values", [(50.0, 50.0), (50.0, 50.5), (99.0, 100.0), (0.0, 0.1)])
def test_labels_at_the_ends_never_overlap(values: tuple[float, float]) -> None:
    run = [row | {"train_top1": values[0], "test_top1": values[0]} for row in history(30)]
    reference = [
        row | {"train_accuracy_pct": values[1], "test_accuracy_pct": values[1]} for row in REFERENCE
    ]
    figure = plots.accuracy_and_loss(run, reference)
    renderer = draw(figure).get_renderer()
    for ax in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in ax.texts]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_curves_of_one_epoch_no_epoch_and_gaps() -> None:
    figure = plots.accuracy_and_loss(history(1))
    draw(figure)
    assert "test 5.00 %" in words(figure)
    assert [tick for tick in figure.axes[1].get_xticks() if tick != int(tick)] == []
    assert "No epoch is finished yet" in words(plots.accuracy_and_loss([]))
    unevaluated = history(3)
    unevaluated[2] |= {"test_top1": None, "test_loss": math.nan}
    figure = plots.accuracy_and_loss(unevaluated)
    draw(figure)
    assert "test 27.50 %" in words(figure), "the last value there is"
    seldom = history(5)
    for row in (seldom[1], seldom[2], seldom[3]):
        del row["test_top1"], row["test_loss"]
    _, line = plots.accuracy_and_loss(seldom).axes[1].lines
    assert list(line.get_xdata()) == [1, 5], "a line joins the epochs that were tested"


def test_learning_rate_in_steps_or_epochs() -> None:
    rates = [0.1, 0.2, 0.3, 0.2, 0.1, 0.05]
    figure = plots.learning_rate_curve(rates, steps_per_epoch=2)
    (ax,) = figure.axes
    assert np.allclose(ax.lines[0].get_data(), ([0, 0.5, 1, 1.5, 2, 2.5], rates))
    assert ax.get_xlabel() == "epoch"
    for value in ("0.1", "0.3", "0.05"):
        assert value in [text.get_text() for text in ax.texts]
    lower = plots.learning_rate_curve(rates, [0.9] * 6).axes[1]
    assert lower.get_xlabel() == "step"
    assert np.allclose(lower.lines[0].get_ydata(), 0.9)
    draw(plots.learning_rate_curve([0.1]))
    assert "no steps" in words(plots.learning_rate_curve([]))


def test_grid_shows_the_pixels_and_the_whole_box() -> None:
    figure = plots.image_grid(
        IMAGES[:3], ["one", "two", "three"], np.array([[8, 16, 31, 47]] * 3), columns=2
    )
    axes = image_axes(figure)
    assert np.array_equal([ax.images[0].get_array() for ax in axes], IMAGES[:3])
    assert all(ax.images[0].get_interpolation() == "nearest" for ax in axes)
    (box,) = (patch for patch in axes[0].patches if isinstance(patch, Rectangle))
    assert box.get_bbox().bounds == (7.5, 15.5, 24, 32), (
        "both ends of an inclusive box are inside the frame"
    )
    assert axes[0].get_position().y0 == axes[1].get_position().y0 > axes[2].get_position().y0
    assert "No images" in words(plots.image_grid(IMAGES[:0], []))


def test_before_and_after_stand_above_each_other() -> None:
    figure = plots.before_after(IMAGES[:3], 255 - IMAGES[:3], ["a", "b", "c"], columns=2)
    axes = image_axes(figure)
    for i, (before, after) in enumerate(zip(axes[0::2], axes[1::2], strict=True)):
        assert np.array_equal(before.images[0].get_array(), IMAGES[i])
        assert np.array_equal(after.images[0].get_array(), 255 - IMAGES[i])
        assert before.get_position().x0 == after.get_position().x0
        assert before.get_position().y0 > after.get_position().y1
    assert words(figure).count("before") == 2
    assert "No images" in words(plots.before_after(IMAGES[:0], IMAGES[:0], []))


def test_best_and_worst_classes() -> None:
    names = [f"class{i:02}" for i in range(40)]
    accuracies = [float(2 * i) for i in range(40)]
    figure = plots.class_accuracy(names, accuracies, [50] * 40, best=3, worst=2)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["class39", "class38", "class37", "class01", "class00"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [78, 76, 74, 2, 0]
    assert "Accuracy per class: the 3 best and 2 worst of 40" in words(figure)
    assert "mean of all classes 39.0 %" in words(figure)
    assert "50 test images per class" in words(figure)


def test_few_classes_are_all_shown_and_untested_ones_left_out() -> None:
    figure = plots.class_accuracy(["a", "b", "c"], [20, 0, 80], [10, 0, 1000])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["c", "a"]
    assert "Accuracy per class, all 2" in words(figure)
    assert "10 to 1,000 test images" in words(figure)
    wide, narrow = (line.get_xdata() for line in (figure.axes[0].lines[1], figure.axes[0].lines[0]))
    assert np.allclose(narrow, (77.4, 82.4), atol=0.1), "Wilson's interval for 800 of 1,000"
    assert np.allclose(wide, (5.7, 51.0), atol=0.1), "and for 2 of 10"
    assert "No class has test images" in words(plots.class_accuracy(["a"], [0], [0]))


def test_gallery_names_both_classes() -> None:
    figure = plots.misclassified(IMAGES[:2], entries(["cat", "dog"]))
    assert len(image_axes(figure)) == 2
    for word in ("cat", "dog", "62 %", "6 %", "predicted", "actual"):
        assert word in words(figure)
    assert "every prediction was right" in words(plots.misclassified(IMAGES[:0], []))


def test_gradcam_row_is_image_then_heat_map_and_overlay_of_every_stage() -> None:
    figure = plots.gradcam_stages(
        IMAGES[:3], {stage: maps[:3] for stage, maps in MAPS.items()}, entries(["cat"] * 3)
    )
    assert len(image_axes(figure)) == 27
    rows = [image_axes(figure)[i : i + 9] for i in range(0, 27, 9)]
    for i, (first, *cells) in enumerate(rows):
        assert np.array_equal(first.images[0].get_array(), IMAGES[i])
        assert len(first.images) == 1
        assert [len(cell.images) for cell in cells] == [2] * 8
        for cell, stage in zip(cells, np.repeat(list(MAPS), 2), strict=True):
            picture, heat = cell.images
            assert np.allclose(picture.get_array(), grey(IMAGES[i]), atol=1)
            assert picture.get_interpolation() == "nearest"
            assert np.array_equal(heat.get_array(), MAPS[stage][i])
            assert heat.get_interpolation() == "bilinear"
            assert heat.get_extent() == picture.get_extent()
            assert heat.get_clim() == (0, 1)
        assert all(np.max(cell.images[1].get_alpha()) == 1 for cell in cells[0::2])
        assert all(np.max(cell.images[1].get_alpha()) < 0.9 for cell in cells[1::2])
        lefts = [cell.get_position().x0 for cell in (first, *cells)]
        assert lefts == sorted(lefts)
    shown = words(figure)
    for word in (
        "layer1 (64 × 64)",
        "layer4 (8 × 8)",
        "heat map",
        "overlay",
        "62.5 %",
        "6.2 %",
        "scaled to itself",
    ):
        assert word in shown
    assert shown.count("predicted cat") == 3


def test_gradcam_figure_says_when_there_is_nothing_to_show() -> None:
    assert "there is nothing to explain" in words(plots.gradcam_stages(IMAGES[:0], {}, []))
    nothing = {"layer4": np.zeros((1, 8, 8), np.float32)}
    assert "no evidence for the class" in words(
        plots.gradcam_stages(IMAGES[:1], nothing, entries(["cat"]))
    )


def matrices(figure: Figure) -> tuple[np.ma.MaskedArray, np.ma.MaskedArray]:
    """What the confusion matrix shows of right answers and of mistakes, in percent."""
    (ax,) = (ax for ax in figure.axes if len(ax.images) == 3)
    return tuple(image.get_array() for image in ax.images[1:])


def test_confusions_are_shares_of_the_row_in_the_order_given() -> None:
    matrix = np.array([[30, 10, 0], [1, 4, 0], [0, 0, 0]])
    figure = plots.confusion(matrix, ["cat", "dog", "emu"], [2, 1, 0])
    right, wrong = matrices(figure)
    assert right.mask.tolist() == [[True, True, True], [True, False, True], [True, True, False]], (
        "emu was not tested"
    )
    assert right.diagonal()[1:].tolist() == [80, 75]
    assert (wrong[1, 2], wrong[2, 1], wrong[1, 0]) == (20, 25, 0)
    assert wrong.mask[0].all()
    assert wrong.mask.diagonal().all()
    for word in (
        "80",
        "75",
        "20",
        "25",
        "75.6 % of 45 predictions are right",
        "White rows: no test images",
    ):
        assert word in words(figure)
    upright = {
        t.get_text(): t.get_position()[1]
        for t in texts(figure)
        if t.get_ha() == "right" and not t.get_rotation()
    }
    assert upright["emu"] > upright["dog"] > upright["cat"], "rows from the top"
    slanted = {
        text.get_text(): text.get_position()[0]
        for text in texts(figure)
        if text.get_rotation() == 45
    }
    assert slanted["emu"] < slanted["dog"] < slanted["cat"], "columns from the left"


def test_right_answers_do_not_drown_the_mistakes() -> None:
    figure = plots.confusion(square(200), [f"class {i}" for i in range(200)], range(200))
    (ax,) = (ax for ax in figure.axes if len(ax.images) == 3)
    right, wrong = ax.images[1:]
    assert right.get_clim() == (0, 100)
    assert wrong.get_clim() == (0, 50), "30 % is the most frequent mistake"
    assert wrong.norm(1) > 0.1, "one of a hundred images can be seen"
    position, (width, height) = ax.get_position(), 100 * figure.get_size_inches()
    assert position.width * width == pytest.approx(600), (
        "every cell has the same whole number of pixels"
    )
    assert position.height * height == pytest.approx(600)
    assert position.y0 * height == pytest.approx(round(position.y0 * height))


@pytest.mark.parametrize("classes", [1, 2, 10, 30, 31, 200])
def test_confusions_of_few_and_many_classes(classes: int) -> None:
    names = [f"name {i}{' long' * (i % 9)}" for i in range(classes)]
    figure = plots.confusion(square(classes), names, range(classes))
    assert_apart(figure)
    labels = [text for text in texts(figure) if "name" in text.get_text()]
    assert len(labels) == 2 * classes if classes <= 30 else 20 < len(labels) < 60
    assert f"{classes} class" in words(figure)
    assert ("Named are" in words(figure)) == (classes > 30)


def test_confusion_matrix_of_extremes() -> None:
    assert "No class has test images" in words(
        plots.confusion(np.zeros((3, 3), int), PLAIN[:3], [0, 1, 2])
    )
    figure = plots.confusion(np.diag([5, 10**9]), ["a", "b"], [0, 1])
    assert_apart(figure)
    assert "100.0 % of 1,000,000,005 predictions are right" in words(figure)
    figure = plots.confusion(np.array([[0, 5], [10**6, 1]]), ["a", "b"], [0, 1])
    assert_apart(figure)
    assert "<1" in [text.get_text() for text in texts(figure)], "rare is not never"


def test_confused_pairs_show_counts_and_images_of_either_mistake() -> None:
    figure = plots.confused_pairs(pairs(["cat", "dog"]), thumbnails())
    shown = [ax.images[0].get_array() for ax in image_axes(figure)]
    assert np.array_equal(shown, IMAGES), (
        "three of the first pair's one way, one of the second's other way"
    )
    assert all(ax.images[0].get_interpolation() == "nearest" for ax in image_axes(figure))
    captions = [(text.get_text(), text.get_color()) for text in texts(figure)]
    for name, color, number in (("dog", style.VERMILION, "12"), ("cat", style.BLUE, "of 165")):
        at = captions.index((name, color))
        assert captions[at + 1] == (number, color)
    assert words(figure).count("never") == 2
    unseen = plots.confused_pairs(pairs(["cat", "dog"])[:1], [(IMAGES[:0], IMAGES[:0])])
    assert "no picture" in words(unseen)
    many = plots.confused_pairs(pairs(PLAIN) * 10, [(np.repeat(IMAGES, 3, axis=0), IMAGES)] * 20)
    assert len(image_axes(many)) == 20 * 6, "at most three each way"
    assert_apart(many)
    huge = pairs(["W" * 121, "W" * 121])[0] | {
        "one_as_other": 123_456,
        "other_as_one": 123_456,
        "count": 246_912,
    }
    assert_apart(plots.confused_pairs([huge] * 4, [(IMAGES, IMAGES)] * 4))
    assert "No class was mistaken for another" in words(plots.confused_pairs([], []))


def test_gallery_names_a_right_answer_once() -> None:
    answer = {"name": "cat", "wnid": "n1", "probability": 0.125}
    right = {"predicted": answer, "actual": dict(answer)}
    figure = plots.confident(IMAGES[:2], [right] * 2, "Hesitant")
    assert np.array_equal([ax.images[0].get_array() for ax in image_axes(figure)], IMAGES[:2])
    assert words(figure).count("cat") == words(figure).count("12 %") == 2
    assert "right" in words(figure)
    assert "predicted" not in words(figure)
    mistake = right | {"actual": answer | {"wnid": "n2"}}
    mixed = plots.confident(IMAGES[:2], [right, mistake])
    colors = [text.get_color() for text in texts(mixed) if text.get_text() == "cat"]
    assert colors == [style.INK, style.VERMILION, style.BLUE], (
        "two classes of one name are a mistake"
    )
    for word in ("predicted", "actual", "right"):
        assert word in words(mixed)
    assert "Hesitant: there is none" in words(plots.confident(IMAGES[:0], [], "Hesitant"))
    assert "no such prediction" in words(plots.confident(IMAGES[:0], []))


def test_identical_images_are_shown_once_with_both_labels() -> None:
    twins = np.stack([IMAGES, IMAGES], axis=1)
    said = [{"names": [f"a{i}", f"b{i}"], "tested": [True, False]} for i in range(4)]
    for images in (twins, IMAGES):
        figure = plots.label_conflicts(images, said)
        assert np.array_equal([ax.images[0].get_array() for ax in image_axes(figure)], IMAGES)
        captions = [text.get_text() for text in texts(figure)]
        assert captions[captions.index("b3") - 2 :][:4] == ["a3", "test", "b3", "not tested"]
        assert "4 pairs of identical images with different labels" in words(figure)
    figure = plots.label_conflicts(IMAGES, [{"names": ["a", "b"]}] * 4, most=3)
    assert len(image_axes(figure)) == 3
    assert "the first 3" in words(figure)
    assert "not tested" not in words(figure)
    assert "1 pair of" in words(plots.label_conflicts(IMAGES[:1], said[:1]))
    assert "No two identical images" in words(plots.label_conflicts(IMAGES[:0], []))


def test_reliability_shows_accuracy_against_confidence_in_every_bin() -> None:
    figure = plots.reliability(calibration([0, 3, 0, 1, 400]))
    before, after, counts, _ = figure.axes
    (dots,) = (line for line in before.lines if line.get_marker() == "o")
    assert np.allclose(dots.get_data(), ([30, 70, 90], [10, 50, 70])), "empty bins are left out"
    (dots,) = (line for line in after.lines if line.get_marker() == "o")
    assert np.allclose(dots.get_data(), ([30, 70, 90], [30, 70, 90]))
    assert np.allclose(before.lines[0].get_data(), ([0, 100], [0, 100]))
    intervals = [line.get_ydata() for line in before.lines[1:4]]
    assert np.allclose(intervals[2], (65.3, 74.3), atol=0.1), "Wilson's interval for 280 of 400"
    assert [bar.get_height() for bar in counts.patches] == [0, 3, 0, 1, 400]
    assert np.allclose(
        [bar.get_x() + bar.get_width() / 2 for bar in counts.patches], [10, 30, 50, 70, 90]
    )
    for word in (
        "As trained: ECE 20.0 %",
        "(T = 1.50): ECE 0.0 %",
        "75.0 % confidence on average, 50.0 % right",
    ):
        assert word in words(figure)
    noted = plots.reliability(calibration([1], note="no temperature is best"))
    assert_apart(noted)
    assert "No temperature is best" in words(noted)
    assert "No test images" in words(plots.reliability(calibration([0, 0])))


def test_maps_of_the_predicted_and_the_actual_class_stand_side_by_side() -> None:
    predicted, actual = MAPS["layer4"][:3], MAPS["layer4"][1:]
    figure = plots.class_maps(IMAGES[:3], predicted, actual, entries(["cat", "dog", "emu"]))
    axes = image_axes(figure)
    assert len(axes) == 15
    for i, (first, *cells) in enumerate([axes[i : i + 5] for i in range(0, 15, 5)]):
        assert np.array_equal(first.images[0].get_array(), IMAGES[i])
        assert len(first.patches) == 1, "the box"
        for cell, values in zip(
            cells, (predicted[i], predicted[i], actual[i], actual[i]), strict=True
        ):
            picture, heat = cell.images
            assert np.allclose(picture.get_array(), grey(IMAGES[i]), atol=1)
            assert np.array_equal(heat.get_array(), values)
            assert (picture.get_interpolation(), heat.get_interpolation()) == (
                "nearest",
                "bilinear",
            )
        assert [np.max(cell.images[1].get_alpha()) == 1 for cell in cells] == [
            True,
            False,
            True,
            False,
        ]
        lefts = [cell.get_position().x0 for cell in (first, *cells)]
        assert lefts == sorted(lefts)
    for word in (
        "62.5 %",
        "6.2 %",
        "Grad-CAM of layer4, for either class",
        "scaled to itself",
        "8 × 8",
        "bilinearly",
    ):
        assert word in words(figure)
    colors = [text.get_color() for text in texts(figure) if text.get_text() == "dog"]
    assert colors == [style.VERMILION, style.BLUE]


def test_class_maps_say_what_they_cannot_show() -> None:
    one = entries(["cat"])
    same = plots.class_maps(
        IMAGES[:1], MAPS["layer4"][:1], MAPS["layer4"][:1], one, method="Eigen-CAM"
    )
    assert "Eigen-CAM of layer4, whatever the class" in words(same)
    nothing = np.zeros((1, 8, 8), np.float32)
    assert "no evidence for the class" in words(
        plots.class_maps(IMAGES[:1], MAPS["layer4"][:1], nothing, one)
    )
    del one[0]["box"]
    assert not image_axes(plots.class_maps(IMAGES[:1], MAPS["layer4"][:1], nothing, one))[0].patches
    empty = plots.class_maps(IMAGES[:0], MAPS["layer4"][:0], MAPS["layer4"][:0], [])
    assert "there is nothing to explain" in words(empty)


def test_localisation_shows_both_measures_beside_their_baselines() -> None:
    figure = plots.localisation(located())
    hit, energy, small, _ = figure.axes

    def marked(ax: Axes, marker: str) -> list[float]:
        return [float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == marker]

    assert np.allclose(marked(hit, "o"), [80] * 5)
    assert np.allclose(marked(hit, "D"), [70] * 5)
    assert np.allclose(marked(hit, "|"), [50] * 5)
    assert np.allclose(marked(energy, "o"), [60] * 5)
    assert np.allclose(marked(energy, "|"), [50] * 5)
    assert marked(energy, "D") == [], "a point has no share of a map"
    assert np.allclose(marked(small, "o"), [55] * 3), "two groups have no images"
    intervals = [line.get_xdata() for line in hit.lines if len(line.get_xdata()) == 2]
    assert np.allclose(intervals, [(78, 82)] * 5)
    labels = [label.get_text() for label in hit.get_yticklabels()]
    assert labels[1:3] == ["all, actual class (1,234)", "right (1,234)"]
    shown = words(figure)
    assert shown.count("no images") == 4
    assert shown.count("+10.0 (+8.0 to +12.0)") == 8
    assert shown.count("−3.0 (−5.0 to −1.0)") == 8
    assert "gradcam, layer4 (8 × 4)" in shown, "width before height"
    nobody = located()
    nobody["groups"] = [group | {"images": 0} for group in nobody["groups"]]
    assert "No image was scored" in words(plots.localisation(nobody))


def test_faithfulness_shows_how_many_pixels_are_removed() -> None:
    figure = plots.faithfulness(road())
    most, least = figure.axes
    random, ours = most.lines
    assert np.allclose(ours.get_data(), ([10, 50, 80], [-20, -30, -40])), (
        "above the 90th percentile lie 10 % of pixels"
    )
    assert np.allclose(random.get_data(), ([10, 50, 80], [-10, -20, -40]))
    assert random.get_linestyle() != ours.get_linestyle()
    assert np.allclose(least.lines[1].get_ydata(), [1, -10]), "the third is not known"
    assert most.get_ylim() == least.get_ylim()
    for word in (
        "the maps −40.00",
        "200 test images",
        "maps +7.0 (−1.0 to +15.0)",
        "random unknown",
        "difference +7.0",
    ):
        assert word in words(figure)
    assert "No image was scored" in words(plots.faithfulness(road() | {"images": 0}))


def test_range_test_marks_the_suggestion_and_cuts_what_explodes() -> None:
    raw = [5.0, math.nan, 5.0, 4.0, 3.0, 1.9, 2.5, 4.0, 1e30, math.inf]
    figure = plots.learning_rate_test(RATES, raw, LOSSES, 0.0123)
    (ax,) = figure.axes
    batches, smoothed, suggestion = ax.lines
    assert ax.get_xscale() == "log"
    assert np.allclose(smoothed.get_data(), (RATES[:9], LOSSES[:9]))
    assert len(batches.get_xdata()) == 8
    assert set(suggestion.get_xdata()) == {0.0123}
    assert ax.get_ylim()[0] < 1.9
    assert 5.1 < ax.get_ylim()[1] < 9
    assert_apart(figure)
    assert "suggestion 0.012" in words(figure)
    assert "0.001" in words(figure), "ticks are plain numbers"


@pytest.mark.parametrize(
    "rates", [RATES, [0.01 * 1.05**i for i in range(10)], [0.1] * 10, [1e-300] * 9 + [1e300]]
)
@pytest.mark.parametrize("losses", [LOSSES, [0.0] * 10, [1e-12] * 10, [math.nan] * 9 + [2.0]])
def test_range_test_of_any_curve(rates: list[float], losses: list[float]) -> None:
    figure = plots.learning_rate_test(rates, losses, losses)
    assert_apart(figure)
    assert "no suggestion" in words(figure)


def test_range_test_without_a_finite_loss() -> None:
    for rates, losses in (([], []), ([0.1], [math.nan]), ([0.0], [1.0])):
        assert "No step has a finite loss" in words(plots.learning_rate_test(rates, losses, losses))


def test_prediction_shows_the_image_the_map_and_bars() -> None:
    answers = [{"name": "cat", "probability": 0.75}, {"name": "dog", "probability": 0.0}]
    figure = plots.prediction(IMAGES[0], answers, MAPS["layer4"][0], "mine.png")
    plain, overlay = image_axes(figure)
    assert np.array_equal(plain.images[0].get_array(), IMAGES[0])
    assert len(plain.images) == 1
    assert np.array_equal(overlay.images[1].get_array(), MAPS["layer4"][0])
    widths = [
        patch.get_width()
        for patch in figure.findobj(Rectangle)
        if patch.get_transform() and patch in figure.artists
    ]
    assert np.allclose(np.array(widths)[[1, 3]] / np.array(widths)[[0, 2]], [0.75, 0])
    for word in (
        "mine.png",
        "cat",
        "75.0 %",
        "dog",
        "0.0 %",
        "Grad-CAM for the first prediction",
        "64 × 64 pixels",
        "8 × 8",
    ):
        assert word in words(figure)
    alone = plots.prediction(IMAGES[0], answers, None)
    assert len(image_axes(alone)) == 1
    assert "map" not in words(alone)
    assert_apart(alone)
    silent = plots.prediction(IMAGES[0], answers, np.zeros((8, 8), np.float32))
    assert "no evidence for the first prediction" in words(silent)
    assert_apart(plots.prediction(IMAGES[0], top(["W" * 121] * 10), MAPS["layer4"][0]))
    assert "no prediction" in words(plots.prediction(IMAGES[0], [], None))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name", "plain name"),
        ("a\nb\tc\x00d", "a b c d"),
        ("\ud800", "(no name)"),
        ("", "(no name)"),
        ("x\u202ey", "x y"),
        ("é 雪", "é 雪"),
        ("$x$", "$x$"),
        ("123456789012", "123456789…"),
    ],
)
def test_clean(text: str, shown: str) -> None:
    assert plots.clean(text, 10) == shown
