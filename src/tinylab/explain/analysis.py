"""All that `tinylab explain` finds out about a finished run; only the maps need the network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tinylab import figures as plots
from tinylab.data.augment import network_input
from tinylab.data.dataset import Dataset
from tinylab.data.loader import make_loader
from tinylab.data.split import Split
from tinylab.exceptions import UserError
from tinylab.explain.gradcam import gradcam, stages_of
from tinylab.explain.localisation import Localisation, localise

from tinylab.explain.mistakes import (  # isort: skip
    Errors, Explanation, analyse, answers, explain, label_conflicts,
)  # fmt: skip
from tinylab.explain.road import faithfulness
from tinylab.run.folder import Run, note_figures
from tinylab.run.weights import normalised
from tinylab.training.optim import schedule

WITH_MAPS = (
    "misclassified", "class_maps", "gradcam", "gradcam_short", "localisation", "faithfulness",
)  # fmt: skip
"""Figures that not every analysis makes."""


@dataclass(frozen=True)
class Analysis:
    """What was found out about one run. figures: by file name, without ".png"."""

    explanation: Explanation
    errors: Errors
    conflicts: dict
    localisation: Localisation | None
    faithfulness: dict | None
    figures: dict[str, plots.Figure]
    boxed: bool = True  # whether the test images have boxes

    def save(self, run: Run, figures: Path | None = None) -> Iterator[Path]:
        """Write figures, tables and, last, explain.json into the run folder; yield their paths.

        figures: a folder that gets the figures, too, and a note of which run they show.
        """
        # What an earlier analysis made and this one did not would be taken for this one's.
        table = run.folder / "localisation.csv"
        for stale in (table, *(run.figures / f"{name}.png" for name in WITH_MAPS)):
            stale.unlink(missing_ok=True)
        for target in filter(None, (run.figures, figures)):
            for name, figure in self.figures.items():
                yield plots.save(figure, target / f"{name}.png")
        if self.localisation:
            yield self.localisation.write_table(table)
        yield from self.errors.write_tables(run.folder)

        located = self.localisation and self.localisation.summary
        found = {"model_sha256": run.summary["model_sha256"], **self.explanation.to_json()}
        found |= {"errors": self.errors.to_json(), "label_conflicts": self.conflicts}
        found |= {"localisation": located, "faithfulness": self.faithfulness}
        found |= {} if self.boxed else {"boxed": False}
        run.write("explain.json", found | {"figures": sorted(self.figures)})
        yield run.folder / "explain.json"
        if figures:
            note_figures(run, figures)

    def in_words(self) -> str:
        """Return the result in a line or two."""
        counts = f"{self.explanation.wrong:,} of {self.explanation.tested:,} test images are wrong"
        if not self.boxed:
            return f"the test images have no boxes: maps are not compared with any\n{counts}"
        return f"{self.localisation.in_words()}\n{counts}" if self.localisation else counts


def analyse_run(
    run: Run,
    dataset: Dataset,
    rows: Split,
    model: nn.Module | None,
    *,
    count: int = 10,
    stage: str | None = None,
    sample: int | None = 2000,
    faithful: int = 0,
    progress: bool = False,
) -> Analysis:
    """Return numbers and figures of a finished run.

    model: None if no map is asked for. count: misclassified images to explain one by one. sample:
    test images for the box metric, None: all, 0: none. faithful: test images for ROAD.
    """
    predictions, recipe, test = run.predictions, run.recipe, rows.test
    logits, labels = predictions["logits"], dataset.labels[test]
    fits = logits.shape == (len(test), rows.classes) and np.isfinite(logits).all()
    if not (fits and np.array_equal(predictions["rows"], test)):
        raise UserError(f"{run.folder}/predictions.npz does not fit the run: train it again")
    names, wnids = dataset.names[: rows.classes], dataset.wnids[: rows.classes]

    # ---- numbers ----
    what = {"rows": test, "logits": logits, "normalise": network_input(recipe)}
    explanation = explain(model, dataset, **what, count=count)
    what |= {"stage": stage, "progress": progress}
    boxed = bool(dataset.boxes[test].any())  # somebody's own images have no boxes
    located = localise(model, dataset, **what, count=sample) if boxed and sample != 0 else None
    faith = faithfulness(model, dataset, **what, count=faithful) if faithful else None
    errors = analyse(logits, labels, wnids, names)
    conflicts = label_conflicts(dataset, test, logits)

    # ---- training: sample images, augmentation, schedule, curves, accuracy per class ----
    loader = make_loader(dataset, rows.train, recipe, run.identity["seed"], torch.device("cpu"))
    first = loader.rows_at(1, 0)[:16]
    images, titles = dataset.images[first], [names[label] for label in dataset.labels[first]]
    boxes = dataset.boxes[first] if dataset.boxes[first].any() else None
    _, *rates = zip(*schedule(recipe, len(rows.train)), strict=True)
    steps = recipe.steps_per_epoch(len(rows.train))
    correct, total = errors.matrix.diagonal(), errors.matrix.sum(axis=1)
    figures = {
        "samples": plots.image_grid(images, titles, boxes, title="Training images"),
        "learning_rate": plots.learning_rate_curve(*rates, steps),
        "curves": plots.accuracy_and_loss(run.history, run.course_run, run.title),
        "classes": plots.class_accuracy(names, 100 * correct / total.clip(1), total),
    }

    if "transform" not in run.identity:  # an own one is not run from its record
        augmented = loader.batch(1, 0).images[:16].numpy()
        drawn = images, augmented, titles
        figures["augmentation"] = plots.before_after(*drawn, title="Augmentation")

    # ---- errors: confusions, pairs with images, single images, calibration, twins ----
    def confused(actual: int, predicted: int) -> np.ndarray:
        found = test[(labels == actual) & (logits.argmax(axis=1) == predicted)]
        return dataset.images[found[:3]]

    def single(title: str, positions: np.ndarray) -> plots.Figure:
        told = answers(test[positions], logits[positions], dataset)
        return plots.confident(dataset.images[test[positions]], told, title=title)

    both = [(pair["one"]["index"], pair["other"]["index"]) for pair in errors.pairs[:6]]
    thumbnails = [(confused(one, other), confused(other, one)) for one, other in both]
    twins = dataset.images[[pair["rows"][0] for pair in conflicts["pairs"]]]
    wrong, right = errors.confident_mistakes, errors.hesitant_hits
    figures |= {
        "confusion": plots.confusion(errors.matrix, names, errors.order),
        "confused_pairs": plots.confused_pairs(errors.pairs[:6], thumbnails),
        "confident_mistakes": single("Mistakes with the highest probability", wrong),
        "hesitant_hits": single("Right predictions with the lowest probability", right),
        "reliability": plots.reliability(errors.calibration),
        "label_conflicts": plots.label_conflicts(twins, conflicts["pairs"]),
    }

    # ---- maps: the mistakes, four stages for the predicted class, the last one for both ----
    entries, seen = explanation.entries, explanation.images
    if entries or not explanation.wrong:  # else none was asked for, not that there is none
        own, title = explanation.actual_maps, "Mistakes, drawn at random"
        figures["misclassified"] = plots.misclassified(seen, entries, title=title)
        last, maps = list(explanation.maps.items() or {"": own}.items())[-1]
        how = {"stage": last, "title": "Grad-CAM of both classes"}
        figures["class_maps"] = plots.class_maps(seen, maps, own, entries, **how)
        for name, some in (("gradcam", slice(None)), ("gradcam_short", slice(4))):
            maps = {stage: values[some] for stage, values in explanation.maps.items()}
            drawn = seen[some], maps, entries[some]
            figures[name] = plots.gradcam_stages(*drawn, "Grad-CAM of every stage")
    if located:
        figures["localisation"] = plots.localisation(located.summary | {"method": "Grad-CAM"})
    if faith:
        figures["faithfulness"] = plots.faithfulness(faith | {"method": "Grad-CAM"})
    return Analysis(explanation, errors, conflicts, located, faith, figures, boxed)


def explain_answers(
    model: nn.Module, metadata: dict, pictures: np.ndarray, answers: Sequence[list[dict]]
) -> np.ndarray:
    """Return what spoke for the first answer to each picture, float32 (n, h, w) in 0..1.

    pictures: uint8 (n, 64, 64, 3). answers: as `predict` gives them. metadata: of the weights.
    """
    classes = torch.tensor([metadata["wnids"].index(answer[0]["wnid"]) for answer in answers])
    inputs = normalised(metadata)(torch.from_numpy(pictures))
    last = stages_of(model)[-1]
    return gradcam(model, inputs, classes, (last,))[last]
