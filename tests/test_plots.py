"""Figures: what they show, that they bear any text, and that they leave nothing behind."""

import csv
import io
import math
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from tinylab import plots

PLAIN = ["one", "two", "three", "four"]
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
MAPS = {
    f"layer{i + 1}": np.random.default_rng(i).random((4, side, side), dtype=np.float32)
    for i, side in enumerate((64, 32, 16, 8))
}


def entries(names: list[str]) -> list[dict]:
    answers = [{"name": name, "probability": 0.625} for name in names]
    return [
        {"predicted": answer, "actual": answer | {"probability": 0.0625}, "box": [8, 16, 31, 47]} for answer in answers
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

FIGURES = {
    "curves": lambda names: plots.accuracy_and_loss(history(3), REFERENCE, title=names[0], label=names[0]),
    "schedule": lambda names: plots.learning_rate_curve([0.1, 0.2, 0.1], [0.9, 0.8, 0.9], 1),
    "grid": lambda names: plots.image_grid(IMAGES, names, [[0, 0, 63, 63]] * 4, title=names[0]),
    "augmentation": lambda names: plots.before_after(IMAGES, 255 - IMAGES, names, title=names[0]),
    "classes": lambda names: plots.class_accuracy(names, [0, 40, 70, 100], [50] * 4),
    "mistakes": lambda names: plots.misclassified(IMAGES, entries(names), title=names[0]),
    "gradcam": lambda names: plots.gradcam_stages(IMAGES, {"layer4": MAPS["layer4"]}, entries(names), names[0]),
    "message": lambda names: plots.message(names[0]),
}


def texts(figure: Figure) -> list[Text]:
    """Every text that is drawn: matplotlib also keeps ticks of hidden axes and beyond the limits."""
    undrawn = set()
    for axis in [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        for tick, place in zip(axis.get_major_ticks(), axis.get_majorticklocs(), strict=False):
            if not axis.axes.axison or not low <= place <= high:
                undrawn |= {tick.label1, tick.label2}
        undrawn |= set(axis.findobj(Text)) if not axis.axes.axison else set()
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text not in undrawn]


def words(figure: Figure) -> str:
    return " ".join(" ".join(text.get_text().split()) for text in texts(figure))


def draw(figure: Figure) -> FigureCanvasAgg:
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        canvas.draw()
    return canvas


def image_axes(figure: Figure) -> list:
    return [ax for ax in figure.axes if ax.images and ax.images[0].get_array().shape[:2] == (64, 64)]


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
        assert plots.save(FIGURES[name](PLAIN), tmp_path / "styled.png", dpi=40).read_bytes() == plain


def test_saved_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plots.save(plots.message("first"), tmp_path / "new" / "figure.png")
    before = path.read_bytes()

    def full_disk(self: Figure, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space left"):
        plots.save(plots.message("second"), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


def test_saved_file_holds_no_version_or_time(tmp_path: Path) -> None:
    with Image.open(plots.save(plots.message("text"), tmp_path / "figure.png", dpi=50)) as image:
        assert image.size == (450, 60)
        assert set(image.info) <= {"dpi"}


def test_notebook_shows_a_figure_by_itself() -> None:
    with Image.open(io.BytesIO(plots.message("text")._repr_png_())) as image:
        assert image.size == (900, 120)


def test_curves_show_this_run_and_the_published_one() -> None:
    figure = plots.accuracy_and_loss(history(3), REFERENCE)
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes}
    assert list(panels) == [
        "Training loss",
        "Training accuracy (top-1, %)",
        "Test loss",
        "Test accuracy (top-1, %)",
    ]
    for title, ours, published in (
        ("Training loss", [4, 2, 4 / 3], 2.5),
        ("Training accuracy (top-1, %)", [10, 35, 60 - 50 / 3], 70.5),
        ("Test loss", [4.2, 2.1, 1.4], 0.01 * 33_000 / 129),
        ("Test accuracy (top-1, %)", [5, 27.5, 35], 55.25),
    ):
        reference, run = panels[title].lines
        assert np.allclose(run.get_data(), ([1, 2, 3], ours))
        assert np.allclose(reference.get_data(), (range(1, 31), [published] * 30))
        assert reference.get_linestyle() != run.get_linestyle()
        assert panels[title].get_ylim()[0] == 0
        assert panels[title].get_ylim()[1] > max(*ours, published)
    assert "this run 35.00 %" in words(figure)
    assert "published, 200 classes 55.25 %" in words(figure)
    assert "published, last batch 2.50" in words(figure)


def test_published_test_loss_is_a_mean_cross_entropy() -> None:
    path = Path(__file__).parents[1] / "results" / "reference" / "published_run.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = plots.accuracy_and_loss(history(1), rows)
    losses = figure.axes[2].lines[0].get_ydata()
    # Between a guess among 200 classes and what its accuracy needs at least: half the wrong answers cost ln 2 each.
    assert (losses < math.log(200)).all()
    accuracy = np.array([float(row["test_accuracy_pct"]) for row in rows]) / 100
    assert (losses > (1 - accuracy) * math.log(2)).all()
    assert losses[-1] == pytest.approx(1.79, abs=0.01)


@pytest.mark.parametrize("values", [(50.0, 50.0), (50.0, 50.5), (99.0, 100.0), (0.0, 0.1)])
def test_labels_at_the_ends_never_overlap(values: tuple[float, float]) -> None:
    run = [row | {"train_top1": values[0], "test_top1": values[0]} for row in history(30)]
    reference = [row | {"train_accuracy_pct": values[1], "test_accuracy_pct": values[1]} for row in REFERENCE]
    figure = plots.accuracy_and_loss(run, reference)
    renderer = draw(figure).get_renderer()
    for ax in figure.axes:
        ours, published = (text.get_window_extent(renderer) for text in ax.texts)
        assert not ours.overlaps(published)


def test_curves_of_one_epoch_no_epoch_and_gaps() -> None:
    figure = plots.accuracy_and_loss(history(1))
    draw(figure)
    assert "this run 5.00 %" in words(figure)
    assert [tick for tick in figure.axes[2].get_xticks() if tick != int(tick)] == []
    assert "No epoch is finished yet" in words(plots.accuracy_and_loss([]))
    unevaluated = history(3)
    unevaluated[2] |= {"test_top1": None, "test_loss": math.nan}
    figure = plots.accuracy_and_loss(unevaluated)
    draw(figure)
    assert "this run 27.50 %" in words(figure), "the last value there is"


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
    figure = plots.image_grid(IMAGES[:3], ["one", "two", "three"], np.array([[8, 16, 31, 47]] * 3), columns=2)
    axes = image_axes(figure)
    assert np.array_equal([ax.images[0].get_array() for ax in axes], IMAGES[:3])
    assert all(ax.images[0].get_interpolation() == "nearest" for ax in axes)
    (box,) = (patch for patch in axes[0].patches if isinstance(patch, Rectangle))
    assert box.get_bbox().bounds == (7.5, 15.5, 24, 32), "both ends of an inclusive box are inside the frame"
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
    assert "The 3 best and the 2 worst of 40 classes" in words(figure)
    assert "mean of all classes 39.0 %" in words(figure)
    assert "50 test images per class" in words(figure)


def test_few_classes_are_all_shown_and_untested_ones_left_out() -> None:
    figure = plots.class_accuracy(["a", "b", "c"], [20, 0, 80], [10, 0, 1000])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["c", "a"]
    assert "All 2 classes" in words(figure)
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
    assert "every answer was right" in words(plots.misclassified(IMAGES[:0], []))


def test_gradcam_row_is_image_then_heat_map_and_overlay_of_every_stage() -> None:
    figure = plots.gradcam_stages(IMAGES[:3], {stage: maps[:3] for stage, maps in MAPS.items()}, entries(["cat"] * 3))
    assert len(image_axes(figure)) == 27
    rows = [image_axes(figure)[i : i + 9] for i in range(0, 27, 9)]
    for i, (first, *cells) in enumerate(rows):
        assert np.array_equal(first.images[0].get_array(), IMAGES[i])
        assert len(first.images) == 1
        assert [len(cell.images) for cell in cells] == [2] * 8
        for cell, stage in zip(cells, np.repeat(list(MAPS), 2), strict=True):
            picture, heat = cell.images
            assert np.array_equal(picture.get_array(), IMAGES[i])
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
    for word in ("layer1 (64 × 64)", "layer4 (8 × 8)", "heat map", "overlay", "62.5 %", "6.2 %", "scaled to itself"):
        assert word in shown
    assert shown.count("predicted cat") == 3


def test_gradcam_figure_says_when_there_is_nothing_to_show() -> None:
    assert "there is nothing to explain" in words(plots.gradcam_stages(IMAGES[:0], {}, []))
    nothing = {"layer4": np.zeros((1, 8, 8), np.float32)}
    assert "nothing speaks for the class" in words(plots.gradcam_stages(IMAGES[:1], nothing, entries(["cat"])))


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
