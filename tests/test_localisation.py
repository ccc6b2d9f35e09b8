"""Do the maps look at the object: the sample, the groups, the intervals, on networks whose maps are
known."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Exact
from torch import nn

from tinylab.data.augment import normalise
from tinylab.data.dataset import Dataset
from tinylab.data.synthetic import draw_numbered
from tinylab.exceptions import UserError
from tinylab.explain.boxes import energy, hits
from tinylab.explain.gradcam import gradcam
from tinylab.explain.localisation import COLUMNS, GROUPS, MEASURES, Localisation, localise
from tinylab.recipes import smoke


class ColourNetwork(nn.Module):
    """Its logits are the mean red, green and blue, so a class's map is where its colour is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.AvgPool2d(1), nn.AvgPool2d(2)
        self.layer3, self.layer4 = nn.AvgPool2d(2), nn.AvgPool2d(2)
        self.fc = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(images)))).mean(dim=(2, 3)))


LARGE, SMALL = (0, 8, 55, 63), (40, 0, 55, 47)


def dataset_of(images: np.ndarray, labels: np.ndarray, boxes: np.ndarray) -> Dataset:
    return Dataset(Path(), images, labels, boxes, (), (), len(labels), "0" * 64)


def painted(repeat: int = 1) -> dict:
    """Eight images: in the box red, the class; elsewhere blue. Of the last four the network says
    blue: it is wrong."""
    boxes = np.array([LARGE, SMALL, SMALL, (7, 7, 7, 9), LARGE, SMALL, LARGE, SMALL], np.uint8)
    images = np.zeros((8, 64, 64, 3), np.uint8)
    images[..., 2] = 200
    for image, (x0, y0, x1, y1) in zip(images, boxes.tolist(), strict=True):
        image[y0 : y1 + 1, x0 : x1 + 1] = (250, 0, 0)
    logits = np.zeros((8, 3), np.float16)
    logits[:4, 0], logits[4:, 2] = 3, 3
    images, labels, boxes, logits = (
        np.repeat(each, repeat, axis=0) for each in (images, np.zeros(8, np.int16), boxes, logits)
    )
    return {
        "dataset": dataset_of(images, labels, boxes),
        "rows": np.arange(8 * repeat),
        "logits": logits,
        "normalise": lambda images: images.permute(0, 3, 1, 2).float() / 255,
    }


def groups(found: Localisation) -> dict[tuple, dict]:
    return {
        (group["boxes"], group["answers"], group["class"]): group
        for group in found.summary["groups"]
    }


def test_maps_of_the_object_score_one_and_maps_of_the_rest_nothing() -> None:
    found = localise(ColourNetwork(), **painted(), stage="layer1")
    said = groups(found)
    assert [(g["boxes"], g["answers"], g["class"]) for g in found.summary["groups"]] == [
        (boxes, *group) for boxes in ("all", "below half") for group in GROUPS
    ]
    counts = {key: group["images"] for key, group in said.items()}
    assert [counts["all", answers, which] for answers, which in GROUPS] == [7, 7, 3, 4, 4]
    assert [counts["below half", answers, which] for answers, which in GROUPS] == [4, 4, 2, 2, 2]
    for boxes in ("all", "below half"):
        for answers, which, truth in (
            ("right", "both", 1),
            ("wrong", "predicted", 0),
            ("wrong", "actual", 1),
        ):
            group = said[boxes, answers, which]
            for measure in ("hit", "energy"):
                assert group[measure] == {"mean": truth, "low": truth, "high": truth}, (
                    boxes,
                    answers,
                    which,
                )
    assert said["all", "all", "predicted"]["hit"]["mean"] == pytest.approx(3 / 7)
    assert said["all", "all", "actual"]["hit"]["mean"] == 1
    area = (3 * 56 * 56 + 4 * 16 * 48) / 7 / 4096
    assert said["all", "all", "actual"]["uniform"]["mean"] == pytest.approx(area)
    assert said["all", "all", "actual"]["centre_hit"]["mean"] == pytest.approx(3 / 7)
    assert said["all", "all", "actual"]["energy_minus_uniform"]["mean"] == pytest.approx(1 - area)
    assert said["below half", "wrong", "actual"]["hit_minus_centre"]["mean"] == 1
    told = {
        name: found.summary[name]
        for name in ("sampled", "degenerate", "scored", "empty_maps", "native_size")
    }
    assert told == {
        "sampled": 8,
        "degenerate": 1,
        "scored": 7,
        "empty_maps": 0,
        "native_size": [64, 64],
    }


def test_the_summary_can_be_computed_again_from_the_table(tmp_path: Path) -> None:
    """By another program: the CSV, plain Python, and a bootstrap of its own, whose ends agree
    within their noise."""
    rng = np.random.default_rng(5)
    data = painted(repeat=40)
    images = data["dataset"].images
    images[:] = np.clip(images + rng.integers(-60, 60, images.shape), 0, 255)
    found = localise(ColourNetwork(), **data, count=None)
    lines = list(csv.DictReader(open(found.write_table(tmp_path / "t.csv"), newline="")))  # noqa: SIM115
    assert tuple(lines[0]) == COLUMNS
    assert len(lines) == found.summary["scored"] == 280
    for group in found.summary["groups"]:
        kind = "actual" if group["class"] == "actual" else "predicted"
        chosen = []
        for line in lines:
            right = line["predicted"] == line["actual"]
            assert line["right"] == str(right)
            fits = group["answers"] == "all" or right == (group["answers"] == "right")
            if fits and (group["boxes"] == "all" or float(line["box_area"]) < 0.5):
                chosen.append((float(line[f"hit_{kind}"]), float(line[f"energy_{kind}"]),
                               float(line["centre"]), float(line["box_area"])))  # fmt: skip
        assert group["images"] == len(chosen) > 0
        values = np.array(chosen).T
        columns = dict(
            zip(MEASURES, (*values, values[0] - values[2], values[1] - values[3]), strict=True)
        )
        for measure, each in columns.items():
            assert group[measure]["mean"] == pytest.approx(each.mean())
            half = (
                1.96 * each.std() / len(each) ** 0.5
            )  # the normal approximation of the same interval
            assert group[measure]["low"] == pytest.approx(
                each.mean() - half, abs=0.35 * half + 1e-9
            )
            assert group[measure]["high"] == pytest.approx(
                each.mean() + half, abs=0.35 * half + 1e-9
            )


def test_the_table_s_lines_are_the_images_own() -> None:
    found = localise(ColourNetwork(), **painted())
    data = painted()
    for line in found.table:
        row = line["row"]
        inputs = data["normalise"](torch.from_numpy(data["dataset"].images[[row]]))
        for which in ("predicted", "actual"):
            maps = gradcam(ColourNetwork(), inputs, torch.tensor([line[which]]), ("layer4",))[
                "layer4"
            ]
            assert line[f"hit_{which}"] == pytest.approx(
                hits(maps, data["dataset"].boxes[[row]])[0]
            )
            assert line[f"energy_{which}"] == pytest.approx(
                energy(maps, data["dataset"].boxes[[row]])[0]
            )
    assert [line["row"] for line in found.table] != sorted(line["row"] for line in found.table)
    assert {line["row"] for line in found.table} == {0, 1, 2, 4, 5, 6, 7}


def test_the_sample_is_fixed_and_a_larger_one_begins_with_a_smaller() -> None:
    three, again, all_of_them = (
        [line["row"] for line in localise(ColourNetwork(), **painted(), count=count).table]
        for count in (3, 3, None)
    )
    assert three == again == all_of_them[: len(three)]
    other = [
        line["row"] for line in localise(ColourNetwork(), **painted(), count=None, seed=1).table
    ]
    assert other != all_of_them
    assert sorted(other) == sorted(all_of_them)


def test_what_is_left_of_nothing() -> None:
    data = painted()
    data["dataset"].boxes[:] = 0
    found = localise(ColourNetwork(), **data)
    assert (found.summary["scored"], found.summary["degenerate"], found.table) == (0, 8, [])
    assert all(group["images"] == 0 and group["hit"] is None for group in found.summary["groups"])
    assert "no box" in found.in_words()
    assert json.loads(json.dumps(found.summary, allow_nan=False)) == found.summary


@pytest.fixture(scope="module")
def drawn_masks(sample_dataset: Dataset) -> np.ndarray:
    """The true masks of the made-up images, float32 (600, 64, 64), in canonical order: found by
    drawing all again and taking, of the drawings of the class that have the row's box, the one most
    like the picture (a JPEG, some grey)."""
    masks = np.zeros((len(sample_dataset), 64, 64), np.float32)
    by_box: dict[tuple, list[tuple]] = {}
    for label in range(10):
        for number in range(60):
            drawing = draw_numbered(label, number)
            by_box.setdefault((label, *drawing[2]), []).append(drawing)
    grey = sample_dataset.images.mean(axis=3)
    for row, (label, box) in enumerate(
        zip(sample_dataset.labels.tolist(), sample_dataset.boxes.tolist(), strict=True)
    ):
        candidates = by_box[label, *box]
        apart = [np.abs(each[0].mean(axis=2) - grey[row]).mean() for each in candidates]
        masks[row] = candidates[int(np.argmin(apart))][1]
    return masks


def with_maps(monkeypatch: pytest.MonkeyPatch, maps: np.ndarray) -> None:
    """Makes `localise` take these maps, (M, h, w), for the rows that it asks for; inputs (n,) are
    then the rows."""
    monkeypatch.setattr(
        "tinylab.explain.localisation.gradcam",
        lambda _, inputs, *rest, **options: {"layer4": maps[inputs.numpy()]},
    )


def scored(dataset: Dataset, **options) -> Localisation:
    """All of the data set, half of it answered rightly, where images are row numbers and maps come
    from `with_maps`."""
    rows = np.random.default_rng(2).permutation(len(dataset))
    logits = np.eye(10, dtype=np.float16)[(dataset.labels[rows] + rows % 2) % 10]
    numbered = dataset_of(np.arange(len(dataset)), dataset.labels, dataset.boxes)
    every = {"normalise": lambda images: images, "count": None} | options
    every.setdefault("stage", "layer4")
    return localise(nn.Identity(), numbered, rows=rows, logits=logits, **every)


def test_on_the_sample_data_the_true_masks_score_one(
    monkeypatch: pytest.MonkeyPatch, sample_dataset: Dataset, drawn_masks: np.ndarray
) -> None:
    with_maps(monkeypatch, drawn_masks)
    found = scored(sample_dataset)
    assert (found.summary["scored"], found.summary["degenerate"], found.summary["native_size"]) == (
        600,
        0,
        [64, 64],
    )
    assert [group["images"] for group in found.summary["groups"][:5]] == [600, 600, 300, 300, 300]
    for group in found.summary["groups"]:
        assert group["hit"] == group["energy"] == {"mean": 1, "low": 1, "high": 1}
        assert group["energy_minus_uniform"]["mean"] == pytest.approx(1 - group["uniform"]["mean"])
    for line in found.table:
        row = line["row"]
        assert line["actual"] == sample_dataset.labels[row]
        assert line["right"] == (row % 2 == 0)
        assert line["predicted"] == (line["actual"] + row % 2) % 10
        x0, y0, x1, y1 = sample_dataset.boxes[row].tolist()
        assert line["box_area"] == (x1 - x0 + 1) * (y1 - y0 + 1) / 4096
        assert (
            line["centre"]
            == sum(x0 <= x <= x1 and y0 <= y <= y1 for x in (31, 32) for y in (31, 32)) / 4
        )


@pytest.mark.parametrize(("dx", "dy"), [(7, 0), (0, 7), (-1, 2)])
def test_on_the_sample_data_shifted_masks_score_their_overlap(
    monkeypatch: pytest.MonkeyPatch,
    sample_dataset: Dataset,
    drawn_masks: np.ndarray,
    dx: int,
    dy: int,
) -> None:
    moved = np.roll(drawn_masks, (dy, dx), axis=(1, 2))
    with_maps(monkeypatch, moved)
    expected = {}
    for row, (x0, y0, x1, y1) in enumerate(sample_dataset.boxes.tolist()):
        pixels = [(y, x) for y, x in np.argwhere(moved[row]).tolist()]
        expected[row] = sum(y0 <= y <= y1 and x0 <= x <= x1 for y, x in pixels) / len(pixels)
    found = scored(sample_dataset)
    assert {line["row"]: line["energy_predicted"] for line in found.table} == pytest.approx(
        expected
    )
    assert {line["row"]: line["hit_actual"] for line in found.table} == pytest.approx(expected)
    assert found.summary["groups"][0]["energy"]["mean"] == pytest.approx(
        np.mean(list(expected.values()))
    )
    assert found.summary["groups"][0]["energy"]["high"] < 1


def test_on_the_sample_data_exchanged_axes_score_less(
    monkeypatch: pytest.MonkeyPatch, sample_dataset: Dataset, drawn_masks: np.ndarray
) -> None:
    with_maps(monkeypatch, drawn_masks.swapaxes(1, 2))
    assert scored(sample_dataset).summary["groups"][0]["energy"]["high"] < 0.9


def test_on_the_sample_data_uniform_maps_score_the_area(
    monkeypatch: pytest.MonkeyPatch, sample_dataset: Dataset
) -> None:
    with_maps(monkeypatch, np.ones((600, 8, 8), np.float32))
    found = scored(sample_dataset, count=100)
    assert found.summary["sampled"] == len(found.table) == 100
    for line in found.table:
        assert line["hit_predicted"] == pytest.approx(line["box_area"])
        assert line["energy_actual"] == pytest.approx(line["box_area"])
    nothing = found.summary["groups"][0]["energy_minus_uniform"]
    assert max(map(abs, nothing.values())) < 1e-12


def test_few_images_are_held_as_floats(
    monkeypatch: pytest.MonkeyPatch, sample_dataset: Dataset
) -> None:
    with_maps(monkeypatch, np.ones((600, 8, 8), np.float32))
    asked = []
    scored(sample_dataset, normalise=lambda images: asked.append(len(images)) or images)
    assert sum(asked) == 600
    assert max(asked) <= 256


def test_right_answers_have_one_map_and_wrong_ones_two(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(
        network: nn.Module, inputs: torch.Tensor, classes: torch.Tensor, *rest, **options
    ) -> dict:
        asked.extend(classes.tolist())
        return gradcam(network, inputs, classes, *rest, **options)

    monkeypatch.setattr("tinylab.explain.localisation.gradcam", counted)
    localise(ColourNetwork(), **painted())
    assert sorted(asked) == [0] * 7 + [2] * 4


def test_empty_maps_are_counted_and_score_their_box_s_area() -> None:
    data = painted()
    data["logits"][:] = (0, 3, 0)  # green, of which there is none
    found = localise(ColourNetwork(), **data)
    assert found.summary["empty_maps"] == found.summary["scored"] == 7
    for line in found.table:
        assert line["empty_predicted"]
        assert line["hit_predicted"] == line["energy_predicted"] == line["box_area"]
        assert not line["empty_actual"]


@pytest.mark.numerical
def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch, sample_dataset: Dataset) -> None:
    torch.manual_seed(0)
    model = Exact(10, width=4).eval()
    rows = np.arange(0, 600, 17)
    logits = np.random.default_rng(0).normal(size=(len(rows), 10)).astype(np.float16)
    what = {"dataset": sample_dataset, "rows": rows, "logits": logits}
    what["normalise"] = lambda images: normalise(images, smoke())
    whole = localise(model, **what, stage="layer3")
    monkeypatch.setattr("tinylab.explain.localisation.BATCH", 7)
    pieces = localise(model, **what, stage="layer3")
    assert pieces.summary["native_size"] == [16, 16]
    for one, other in zip(whole.table, pieces.table, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_unknown_layers_and_methods_are_refused() -> None:
    with pytest.raises(
        UserError, match="unknown layer 'layer5'; there are: layer1, layer2, layer3, layer4"
    ):
        localise(ColourNetwork(), **painted(), stage="layer5")
    with pytest.raises(UserError, match="count must be 0 or more, not -3"):
        localise(ColourNetwork(), **painted(), count=-3)
