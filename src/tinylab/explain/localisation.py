"""Do the maps look at the object? Class activation maps against the boxes that Tiny ImageNet gives
for every image.

The two measures of `boxes` stand beside what needs no network, as many boxes are large and most are
in the middle: the image's centre, and a map that is the same everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tinylab.explain.boxes import box_area, centre_hits, energy, hits, usable
from tinylab.explain.gradcam import RESAMPLES, bootstrap, gradcam, require_known, sample
from tinylab.files import as_csv, write_atomically

BATCH = 256
"""Images that are held as float32 at a time."""

COLUMNS = (
    "row", "predicted", "actual", "right", "box_area", "centre",
    "hit_predicted", "energy_predicted", "empty_predicted", "hit_actual", "energy_actual",
    "empty_actual",
)  # fmt: skip
MEASURES = ("hit", "energy", "centre_hit", "uniform", "hit_minus_centre", "energy_minus_uniform")
GROUPS = (
    ("all", "predicted"),
    ("all", "actual"),
    ("right", "both"),
    ("wrong", "predicted"),
    ("wrong", "actual"),
)
"""Whose answers, and for which class the maps speak; for a right answer the two classes are one."""


@dataclass(frozen=True)
class Localisation:
    """How well the maps of a sample of test images meet the boxes."""

    summary: dict
    """stage and method; native_size, height and width of the maps; sampled, degenerate (boxes
    without an inside, left out), scored (the rest), empty_maps (of those that were scored); seed;
    resamples; groups.

    A group has `boxes` ("all", or "below half" of the image's area), `answers` ("all", "right",
    "wrong"), `class` ("predicted", "actual", or "both" where they are one), `images`, and of each
    of `MEASURES` mean, low and high, shares of 1 with the 95 % interval, or None if it has no
    images."""
    table: list[dict]
    """One per scored image: row (of the data set), predicted and actual (class), right, box_area,
    centre (what the image's centre scores, see `boxes.centre_hits`), and for both classes hit_,
    energy_ and empty_ (whether the map is 0)."""

    def to_json(self) -> dict:
        """The summary."""
        return self.summary

    def in_words(self) -> str:
        """The main figures in one line."""
        groups = {
            (group["boxes"], group["answers"], group["class"]): group
            for group in self.summary["groups"]
        }
        said = []
        for boxes, where in (
            ("all", "in the box"),
            ("below half", "where it covers less than half"),
        ):
            group = groups[boxes, "all", "predicted"]
            if group["images"]:
                hit, centre = (
                    f"{100 * group[name]['mean']:.1f} %" for name in ("hit", "centre_hit")
                )
                said.append(f"{hit} {where} (the image's centre: {centre})")
        scored = f"{self.summary['scored']:,} maps of the predicted class"
        return f"highest point of {scored}: {', '.join(said) or 'no box to compare with'}"

    def write_table(self, path: Path) -> Path:
        """Write the table as CSV, every number in full."""
        write_atomically(
            path, as_csv([COLUMNS, *([line[name] for name in COLUMNS] for line in self.table)])
        )
        return path


def localise(
    model: nn.Module,
    *,
    images: np.ndarray,
    labels: np.ndarray,
    boxes: np.ndarray,
    rows: np.ndarray,
    logits: np.ndarray,
    normalise: Callable[[Tensor], Tensor],
    stage: str = "layer4",
    count: int | None = 2000,
    seed: int = 0,
    progress: bool = False,
) -> Localisation:
    """Score the maps of `count` test images, drawn by `seed`; None: of all.

    The arguments are those of `gradcam.explain`. A wrong answer has two maps, of the predicted and
    of the actual class. Intervals are percentiles of 2,000 bootstrap samples of images.
    """
    require_known((stage,))
    order = sample(len(rows), count, seed)
    good = order[usable(boxes[rows[order]])]
    table: list[dict] = []
    size: list[int] = []
    with tqdm(total=len(good), desc="maps", unit="image", leave=False, disable=not progress) as bar:
        for chosen in np.split(good, range(BATCH, len(good), BATCH)) if len(good) else ():
            predicted, actual = logits[chosen].argmax(axis=1), labels[rows[chosen]].astype(np.int64)
            inputs = normalise(torch.from_numpy(images[rows[chosen]]))
            maps = gradcam(model, inputs, torch.from_numpy(predicted), (stage,))[stage]
            others, wrong = maps.copy(), predicted != actual
            if wrong.any():
                asked = inputs[torch.from_numpy(wrong)], torch.from_numpy(actual[wrong])
                others[wrong] = gradcam(model, *asked, (stage,))[stage]
            size = list(maps.shape[1:])
            table += _scored(rows[chosen], predicted, actual, boxes[rows[chosen]], maps, others)
            bar.update(len(chosen))
    summary = {
        "stage": stage,
        "method": "gradcam",
        "native_size": size,
        "sampled": len(order),
        "degenerate": len(order) - len(good),
        "scored": len(good),
        "empty_maps": sum(line["empty_predicted"] or line["empty_actual"] for line in table),
        "seed": seed,
        "resamples": RESAMPLES,
        "groups": [
            _group(table, size_of_box, *group, seed)
            for size_of_box in ("all", "below half")
            for group in GROUPS
        ],
    }
    return Localisation(summary, table)


def _scored(
    rows: np.ndarray,
    predicted: np.ndarray,
    actual: np.ndarray,
    boxes: np.ndarray,
    predicted_maps: np.ndarray,
    actual_maps: np.ndarray,
) -> list[dict]:
    """The table's lines for a batch of images."""
    columns: dict[str, np.ndarray] = {
        "row": rows,
        "predicted": predicted,
        "actual": actual,
        "right": predicted == actual,
        "box_area": box_area(boxes),
        "centre": centre_hits(boxes),
    }
    for which, maps in (("predicted", predicted_maps), ("actual", actual_maps)):
        columns[f"hit_{which}"] = hits(maps, boxes)
        columns[f"energy_{which}"] = energy(maps, boxes)
        columns[f"empty_{which}"] = ~maps.any(axis=(1, 2))
    lists = [values.tolist() for values in columns.values()]
    return [dict(zip(columns, line, strict=True)) for line in zip(*lists, strict=True)]


def _group(table: list[dict], boxes: str, answers: str, which: str, seed: int) -> dict:
    """One group of the summary."""
    lines = [
        line
        for line in table
        if (boxes == "all" or line["box_area"] < 0.5)
        and (answers == "all" or line["right"] == (answers == "right"))
    ]
    kind = "actual" if which == "actual" else "predicted"
    hit, share, centre, area = (
        np.array([line[name] for line in lines], np.float64)
        for name in (f"hit_{kind}", f"energy_{kind}", "centre", "box_area")
    )
    values = (hit, share, centre, area, hit - centre, share - area)
    measured = bootstrap(dict(zip(MEASURES, values, strict=True)), seed)
    return {"boxes": boxes, "answers": answers, "class": which, "images": len(lines), **measured}
