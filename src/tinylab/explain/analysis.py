"""All that `tinylab explain` finds out about a finished run: what it gets wrong, and where it
looks, as numbers, tables and figures.

Errors and calibration come from the stored predictions alone; only the maps need the network.
"""

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
from tinylab.explain.gradcam import Explanation, explain, gradcam
from tinylab.explain.localisation import Localisation, localise
from tinylab.explain.mistakes import Errors, analyse, label_conflicts, softmax
from tinylab.explain.road import faithfulness
from tinylab.files import interactive
from tinylab.run.folder import Run, note_figures, published_history
from tinylab.run.weights import normalised
from tinylab.training.evaluate import per_class
from tinylab.training.optim import schedule

SHOWN_OF_A_PAIR = 3


@dataclass(frozen=True)
class Analysis:
    """What was found out about one run."""

    explanation: Explanation
    errors: Errors
    conflicts: dict
    localisation: Localisation | None
    """None: no image was asked for."""
    faithfulness: dict | None
    figures: dict[str, plots.Figure]
    """By file name, without ".png"."""

    def to_json(self, run: Run) -> dict:
        """The contents of `explain.json`; the weights' hash says of which training it speaks."""
        return {
            "model_sha256": run.summary["model_sha256"],
            **self.explanation.to_json(),
            "errors": self.errors.to_json(),
            "label_conflicts": self.conflicts,
            "localisation": None if self.localisation is None else self.localisation.to_json(),
            "faithfulness": self.faithfulness,
            "figures": sorted(self.figures),
        }

    def save(self, run: Run, figures: Path | None = None) -> Iterator[Path]:
        """Write figures, tables and, last, explain.json into the run folder; yield their paths.

        figures: a folder that gets the figures, too, and a note of which run they show.
        """
        for target in filter(None, (run.figures, figures)):
            for name, figure in self.figures.items():
                try:
                    yield plots.save(figure, target / f"{name}.png")
                except OSError as error:
                    reason = error.strerror or error
                    raise UserError(f"cannot write figures to {target}: {reason}") from error
        # What an earlier analysis made and this one did not would be taken for this one's.
        for name in ("misclassified", "class_maps", "gradcam", "localisation", "faithfulness"):
            if name not in self.figures:
                (run.figures / f"{name}.png").unlink(missing_ok=True)
        if self.localisation is None:
            (run.folder / "localisation.csv").unlink(missing_ok=True)
        else:
            yield self.localisation.write_table(run.folder / "localisation.csv")
        yield from self.errors.write_tables(run.folder)
        run.write("explain.json", self.to_json(run))
        yield run.folder / "explain.json"
        if figures:
            note_figures(run, figures)

    def in_words(self) -> str:
        """Return the result in a line or two."""
        counts = f"{self.explanation.wrong:,} of {self.explanation.tested:,} test images are wrong"
        return f"{self.localisation.in_words()}\n{counts}" if self.localisation else counts


def analyse_run(
    run: Run,
    dataset: Dataset,
    rows: Split,
    model: nn.Module | None,
    *,
    count: int = 10,
    stage: str = "layer4",
    sample: int | None = 2000,
    faithful: int = 0,
    progress: bool = False,
) -> Analysis:
    """Return numbers and figures of a finished run.

    model: its network; None: no map is asked for. count: misclassified images to explain one by
    one. sample: test images for the box metric, None: all, 0: none. faithful: test images for ROAD.
    """
    predictions, recipe = run.predictions, run.recipe
    logits = predictions["logits"]
    if not np.array_equal(predictions["rows"], rows.test):
        raise UserError(f"{run.folder}/predictions.npz does not fit the run: train it again")
    names, wnids = dataset.names[: rows.classes], dataset.wnids[: rows.classes]
    what = {
        "images": dataset.images,
        "rows": rows.test,
        "logits": logits,
        "normalise": network_input(recipe),
    }
    seen = {"labels": dataset.labels, "boxes": dataset.boxes}
    explanation = explain(model, **what, **seen, wnids=wnids, names=names, count=count)
    errors = analyse(logits, dataset.labels[rows.test], wnids, names)
    conflicts = label_conflicts(dataset.images, dataset.labels, rows.test, logits, dataset.names)
    choice = {"stage": stage, "progress": progress and interactive()}
    located = localise(model, **what, **seen, count=sample, **choice) if sample != 0 else None
    faith = faithfulness(model, **what, count=faithful, **choice) if faithful else None
    figures = figures_of_training(run, dataset, rows)
    figures |= figures_of_errors(errors, conflicts, dataset, rows, logits)
    figures |= figures_of_maps(explanation)
    if located is not None:
        figures["localisation"] = plots.localisation(located.summary | {"method": "Grad-CAM"})
    if faith is not None:
        figures["faithfulness"] = plots.faithfulness(faith | {"method": "Grad-CAM"})
    return Analysis(explanation, errors, conflicts, located, faith, figures)


def explain_answers(
    model: nn.Module, metadata: dict, pictures: np.ndarray, answers: Sequence[list[dict]]
) -> np.ndarray:
    """Return what spoke for the first answer to each picture, float32 (n, h, w) in 0..1.

    pictures: uint8 (n, 64, 64, 3). answers: as `predict` gives them. metadata: of the weights.
    """
    classes = torch.tensor([metadata["wnids"].index(answer[0]["wnid"]) for answer in answers])
    inputs = normalised(metadata)(torch.from_numpy(pictures))
    return gradcam(model, inputs, classes, ("layer4",))["layer4"]


def figures_of_training(run: Run, dataset: Dataset, rows: Split) -> dict[str, plots.Figure]:
    """Figures by file name: sample images, augmentation, schedule, curves, accuracy per class."""
    recipe, names = run.recipe, dataset.names[: rows.classes]
    on_cpu = torch.device("cpu")
    loader = make_loader(dataset, rows.train, recipe, run.identity["seed"], on_cpu)
    first = loader.rows_at(1, 0)[:16]
    images, titles = dataset.images[first], [names[label] for label in dataset.labels[first]]
    _, learning_rates, momenta = zip(*schedule(recipe, len(rows.train)), strict=True)
    correct, total = per_class(run.predictions["logits"], run.predictions["labels"])
    return {
        "samples": plots.image_grid(images, titles, dataset.boxes[first]),
        "augmentation": plots.before_after(images, loader.batch(1, 0).images[:16].numpy(), titles),
        "learning_rate": plots.learning_rate_curve(
            learning_rates, momenta, recipe.steps_per_epoch(len(rows.train))
        ),
        "curves": plots.accuracy_and_loss(run.history, published_history(), title=run.title),
        "classes": plots.class_accuracy(names, 100 * correct / total.clip(1), total),
    }


def figures_of_errors(
    errors: Errors, conflicts: dict, dataset: Dataset, rows: Split, logits: np.ndarray
) -> dict[str, plots.Figure]:
    """Figures by file name: confusions, the pairs most often confused, the surest mistakes and the
    least sure hits, calibration, and identical images with different labels."""
    names = dataset.names[: rows.classes]
    doubtful = conflicts["pairs"]
    return {
        "confusion": plots.confusion(errors.matrix, names, errors.order),
        "confused_pairs": plots.confused_pairs(
            errors.pairs, thumbnails(errors.pairs, dataset, rows, logits)
        ),
        "confident_mistakes": _confident(
            errors.confident_mistakes, dataset, rows, logits, "The surest mistakes"
        ),
        "hesitant_hits": _confident(
            errors.hesitant_hits, dataset, rows, logits, "The least sure right answers"
        ),
        "reliability": plots.reliability(errors.calibration),
        "label_conflicts": plots.label_conflicts(
            dataset.images[[pair["rows"][0] for pair in doubtful]], doubtful
        ),
    }


def figures_of_maps(explanation: Explanation) -> dict[str, plots.Figure]:
    """Figures by file name: the mistakes, their four stages for the predicted class, the last one
    for both classes."""
    images, entries = explanation.images, explanation.entries
    if explanation.wrong and not entries:
        return {}  # none was asked for; a figure would say that there is none
    method = "Grad-CAM"
    last = explanation.maps.get("layer4", explanation.actual_maps)
    return {
        "misclassified": plots.misclassified(images, entries),
        "class_maps": plots.class_maps(
            images, last, explanation.actual_maps, entries, method=method
        ),
        "gradcam": plots.gradcam_stages(images, explanation.maps, entries, method=method),
    }


def thumbnails(
    pairs: Sequence[dict], dataset: Dataset, rows: Split, logits: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each pair the first test images of `one` answered as `other`, and the reverse: uint8 (k,
    64, 64, 3) each."""
    labels, answers = dataset.labels[rows.test], logits.argmax(axis=1)

    def confused(actual: int, predicted: int) -> np.ndarray:
        found = rows.test[(labels == actual) & (answers == predicted)]
        return dataset.images[found[:SHOWN_OF_A_PAIR]]

    both = [(pair["one"]["index"], pair["other"]["index"]) for pair in pairs]
    return [(confused(one, other), confused(other, one)) for one, other in both]


def entries_of(
    positions: np.ndarray, dataset: Dataset, rows: Split, logits: np.ndarray
) -> list[dict]:
    """What the figures say of tested images: predicted and actual class, each with wnid, name and
    probability."""
    entries = []
    for row, scores in zip(rows.test[positions].tolist(), softmax(logits[positions]), strict=True):
        answers = {"predicted": int(scores.argmax()), "actual": int(dataset.labels[row])}
        entries.append(
            {"row": row}
            | {
                kind: {
                    "wnid": dataset.wnids[index],
                    "name": dataset.names[index],
                    "probability": float(scores[index]),
                }
                for kind, index in answers.items()
            }
        )
    return entries


def _confident(
    positions: np.ndarray, dataset: Dataset, rows: Split, logits: np.ndarray, title: str
) -> plots.Figure:
    return plots.confident(
        dataset.images[rows.test[positions]],
        entries_of(positions, dataset, rows, logits),
        title=title,
    )
