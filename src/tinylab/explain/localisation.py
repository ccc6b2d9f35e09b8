"""Do the maps look at the object? Class activation maps against the boxes of Tiny ImageNet.

The two measures of `boxes` stand beside what needs no network, as many boxes are large and most are
in the middle: the image's centre, and a map that is the same everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tinylab.data.dataset import Dataset
from tinylab.explain.boxes import box_area, centre_hits, energy, hits, usable
from tinylab.explain.gradcam import gradcam, stages_of
from tinylab.explain.sampling import RESAMPLES, bootstrap, sample
from tinylab.files import as_csv, write_atomically
from tinylab.training.progress import print_line, silent, watched

BATCH = 256  # images that are held as float32 at a time

COLUMNS = (
    "row", "predicted", "actual", "right", "box_area", "centre", "hit_predicted",
    "energy_predicted", "empty_predicted", "hit_actual", "energy_actual", "empty_actual",
)  # fmt: skip
MEASURES = ("hit", "energy", "centre_hit", "uniform", "hit_minus_centre", "energy_minus_uniform")
GROUPS = (
    ("all", "predicted"), ("all", "actual"), ("right", "both"), ("wrong", "predicted"),
    ("wrong", "actual"),
)  # fmt: skip
"""Whose answers, and for which class the maps speak; for a right answer the two classes are one."""


@dataclass(frozen=True)
class Localisation:
    """How well the maps of a sample of test images meet the boxes.

    summary: native_size is the height and width of the maps, degenerate counts boxes without an
    inside, which are left out. A group has boxes ("all", or "below half" of the image's area),
    answers, class (see `GROUPS`), images, and each of `MEASURES` as `bootstrap` gives it.
    table: `COLUMNS` of each scored image; centre is `boxes.centre_hits`, empty: the map is 0.
    """

    summary: dict
    table: list[dict]

    def in_words(self) -> str:
        """Return the main figures in one line."""
        said = []
        # The first group, of all answers, is there for boxes of any size and for small ones.
        small, groups = "where it covers less than half", self.summary["groups"][:: len(GROUPS)]
        for where, group in zip(("in the box", small), groups, strict=True):
            if group["images"]:
                hit, centre = (100 * group[name]["mean"] for name in ("hit", "centre_hit"))
                said.append(f"{hit:.1f} % {where} (the image's centre: {centre:.1f} %)")
        scored = f"{self.summary['scored']:,} maps of the predicted class"
        return f"highest point of {scored}: {', '.join(said) or 'no box to compare with'}"

    def write_table(self, path: Path) -> Path:
        """Write the table as CSV, every number in full, and return its path."""
        write_atomically(path, as_csv([COLUMNS, *(line.values() for line in self.table)]))
        return path


def localise(
    model: nn.Module,
    dataset: Dataset,
    *,
    rows: np.ndarray,
    logits: np.ndarray,
    normalise: Callable[[Tensor], Tensor],
    stage: str | None = None,
    count: int | None = 2000,
    seed: int = 0,
    progress: bool = False,
) -> Localisation:
    """Score the maps of `count` test images, drawn by `seed`; None: of all.

    The arguments are those of `mistakes.explain`. stage: the layer; None: the last of `stages_of`.
    A wrong answer has two maps, of the predicted and of the actual class.
    """
    stage = stage or stages_of(model)[-1]
    order = sample(len(rows), count, seed)
    good = order[usable(dataset.boxes[rows[order]])]
    table, size = [], []
    starts, say = range(0, len(good), BATCH), print_line if progress else silent
    for first in watched(starts, "maps", len(starts), say):
        chosen = good[first : first + BATCH]
        own, boxes = rows[chosen], dataset.boxes[rows[chosen]]
        predicted, actual = logits[chosen].argmax(axis=1), dataset.labels[own].astype(np.int64)
        inputs = normalise(torch.from_numpy(dataset.images[own]))
        maps = gradcam(model, inputs, torch.from_numpy(predicted), (stage,))[stage]
        others, wrong = maps.copy(), predicted != actual
        if wrong.any():
            asked = inputs[torch.from_numpy(wrong)], torch.from_numpy(actual[wrong])
            others[wrong] = gradcam(model, *asked, (stage,))[stage]
        size = list(maps.shape[1:])
        columns = [own, predicted, actual, ~wrong, box_area(boxes), centre_hits(boxes)]
        for each in (maps, others):
            columns += [hits(each, boxes), energy(each, boxes), ~each.any(axis=(1, 2))]
        lines = zip(*(values.tolist() for values in columns), strict=True)
        table += [dict(zip(COLUMNS, line, strict=True)) for line in lines]

    # ---- the groups ----
    groups = []
    for sizes in ("all", "below half"):
        small = [line for line in table if sizes == "all" or line["box_area"] < 0.5]
        for answers, which in GROUPS:
            lines = [x for x in small if answers == "all" or x["right"] == (answers == "right")]
            kind = "actual" if which == "actual" else "predicted"
            names = (f"hit_{kind}", f"energy_{kind}", "centre", "box_area")
            hit, share, centre, area = (np.array([x[name] for x in lines], float) for name in names)
            values = (hit, share, centre, area, hit - centre, share - area)
            measured = bootstrap(dict(zip(MEASURES, values, strict=True)), seed)
            group = {"boxes": sizes, "answers": answers, "class": which, "images": len(lines)}
            groups.append(group | measured)
    empty = sum(line["empty_predicted"] or line["empty_actual"] for line in table)
    summary = {
        "stage": stage, "method": "gradcam", "native_size": size, "sampled": len(order),
        "degenerate": len(order) - len(good), "scored": len(good), "empty_maps": empty,
        "seed": seed, "resamples": RESAMPLES, "groups": groups,
    }  # fmt: skip
    return Localisation(summary, table)
