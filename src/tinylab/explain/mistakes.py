"""What a network gets wrong, from stored predictions; only `explain` needs the network.

logits are float (N, C), labels integer (N,), of the N test images. Equal logits rank by class
number, as in `evaluate.score`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import scipy.special
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.optimize import brentq
from scipy.spatial.distance import squareform
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from tinylab.data.dataset import Dataset
from tinylab.explain.boxes import box_area, energy, usable
from tinylab.explain.gradcam import gradcam
from tinylab.explain.sampling import sample
from tinylab.files import as_csv, write_atomically

COLDEST, HOTTEST = 0.05, 20.0  # the best temperature is looked for between these
MEASURES = ("top1", "top5", "precision", "recall", "f1")
MOST_PAIRS = 1000  # of identical images: Tiny ImageNet has 27, plain pictures may make millions


@dataclass(frozen=True)
class Errors:
    """Where a network's answers to N test images of C classes are wrong.

    classes: the measures are in percent, None without images, and precision and F1 are 0 of a class
    that is never answered; mistaken_for is the most frequent wrong answer or None. macro: the means
    of the measures over the classes with images. pairs: of classes, at most 20, most confused
    first; counts are of images. confident_mistakes and hesitant_hits: at most ten positions, int64,
    among the images, from the most and from the least probable answer on.
    """

    classes: list[dict]
    macro: dict
    matrix: np.ndarray  # counts, int64 (C, C) [actual, predicted]
    order: np.ndarray  # of `block_order`
    pairs: list[dict]
    confident_mistakes: np.ndarray
    hesitant_hits: np.ndarray
    calibration: dict

    def to_json(self) -> dict:
        """Return plain values, and the best and the worst ten classes, or half of those tested."""
        tested = [each for each in self.classes if each["images"]]
        ranked = sorted(tested, key=lambda each: (-each["top1"], -each["top5"]))
        half = len(ranked) // 2  # so that no class is among both
        found = {"best": ranked[: len(ranked) - half][:10], "worst": ranked[::-1][:half][:10]}
        found |= {"pairs": self.pairs, "calibration": self.calibration, "classes": self.classes}
        return found | {"macro": self.macro}

    def write_tables(self, folder: Path) -> list[Path]:
        """Write classes.csv, its last line the macro averages, and confusion.csv; return the paths.

        A line of confusion.csv is an actual class, a column a predicted one.
        """
        columns = ("index", "wnid", "name", "images", *MEASURES)
        classes = [[*columns, "mistaken_for_wnid", "mistaken_for_name", "mistaken_for_count"]]
        for each in self.classes:
            mistaken = each["mistaken_for"] or dict.fromkeys(("wnid", "name", "count"))
            classes.append([*(each[name] for name in columns), *mistaken.values()])
        images = sum(each["images"] for each in self.classes)
        classes.append([None, None, "macro", images, *self.macro.values(), None, None, None])
        wnids = [each["wnid"] for each in self.classes]
        counts = zip(wnids, self.matrix.tolist(), strict=True)
        confusion = [["actual", *wnids], *([wnid, *row] for wnid, row in counts)]
        tables = {folder / "classes.csv": classes, folder / "confusion.csv": confusion}
        for path, rows in tables.items():
            write_atomically(path, as_csv(rows))
        return [*tables]


def analyse(
    logits: np.ndarray, labels: np.ndarray, wnids: Sequence[str], names: Sequence[str]
) -> Errors:
    """Return all that the logits say about the errors."""
    said, every = logits.argmax(axis=1), np.arange(logits.shape[1])
    matrix = confusion_matrix(labels, said, labels=every)
    images, mistakes = matrix.sum(axis=1), matrix - np.diag(matrix.diagonal())
    five = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    among_five = np.bincount(labels[(five == labels[:, None]).any(axis=1)], minlength=len(every))
    shares = [100 * hits / images.clip(1) for hits in (matrix.diagonal(), among_five)]
    scores = precision_recall_fscore_support(labels, said, labels=every, zero_division=0)[:3]
    values = np.stack([*shares, *(100 * score for score in scores)], axis=1)
    macro = dict(zip(MEASURES, values[images > 0].mean(axis=0).tolist(), strict=True))
    kinds, classes = [], []
    for index, answer in enumerate(mistakes.argmax(axis=1).tolist()):
        total, count = int(images[index]), int(mistakes[index, answer])
        measured = values[index].tolist() if total else [None] * len(MEASURES)
        mistaken = {"wnid": wnids[answer], "name": names[answer], "count": count} if count else None
        kinds.append({"index": index, "wnid": wnids[index], "name": names[index], "images": total})
        measured = dict(zip(MEASURES, measured, strict=True))
        classes.append(kinds[-1] | measured | {"mistaken_for": mistaken})

    both = np.triu(matrix + matrix.T, k=1)
    ranked = np.argsort(-both[both > 0], kind="stable")[:20]  # stable: ties go by class number
    pairs = []
    for i, j in np.argwhere(both)[ranked].tolist():
        counts = {"one_as_other": int(matrix[i, j]), "other_as_one": int(matrix[j, i])}
        pairs.append({"one": kinds[i], "other": kinds[j], **counts, "count": int(both[i, j])})

    confidence, hit = softmax(logits).max(axis=1), said == labels
    wrong = np.flatnonzero(~hit)[np.argsort(-confidence[~hit], kind="stable")[:10]]
    right = np.flatnonzero(hit)[np.argsort(confidence[hit], kind="stable")[:10]]
    order, calibrated = block_order(matrix), calibration(logits, labels)
    return Errors(classes, macro, matrix, order, pairs, wrong, right, calibrated)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities, float64 (N, C): float16 exponentials would round to three digits."""
    return scipy.special.softmax(logits.astype(np.float64), axis=1)


def answers(rows: np.ndarray, logits: np.ndarray, dataset: Dataset) -> list[dict]:
    """Return `row`, and `predicted` and `actual` (wnid, name, probability), of each row."""
    found = []
    for row, shares in zip(rows.tolist(), softmax(logits), strict=True):
        entry: dict = {"row": row}
        for kind, index in (("predicted", shares.argmax()), ("actual", dataset.labels[row])):
            answer = {"wnid": dataset.wnids[index], "name": dataset.names[index]}
            entry[kind] = answer | {"probability": float(shares[index])}
        found.append(entry)
    return found


def block_order(matrix: np.ndarray) -> np.ndarray:
    """Return the classes, int64 (C,), so that those confused with each other stand together.

    matrix: counts (C, C) [actual, predicted]. Two classes are as similar as the mean of the shares
    of each that are taken for the other; average linkage, and the best order of its leaves
    (Bar-Joseph et al. 2001). Classes that are never confused follow at the end.
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    similarity = (shares + shares.T) / 2
    np.fill_diagonal(similarity, 0)
    confused = np.flatnonzero(similarity.any(axis=1))
    if len(confused) == 0:
        return np.arange(len(matrix))

    pairs = squareform(similarity[np.ix_(confused, confused)])
    tree = linkage(1 - pairs / pairs.max(), "average", optimal_ordering=True)
    leaves = confused[leaves_list(tree)]
    if leaves[0] > leaves[-1]:  # an order and its reverse are equally good
        leaves = leaves[::-1]
    return np.concatenate([leaves, np.setdiff1d(np.arange(len(matrix)), confused)])


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict:
    """Return how well probabilities tell the accuracy, before and after temperature scaling.

    Guo et al., "On calibration of modern neural networks", 2017. Each half of the images takes the
    other's temperature, so that no image is judged by what it helped to fit. `ece` is the mean
    distance between confidence and accuracy in equally wide bins, which include their upper ends;
    `nll` is in nats; in an empty bin `confidence` and `accuracy` are None.
    """
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    half = halves(labels)
    fitted = [fit_temperature(shifted[half == n], labels[half == n]) for n in (0, 1)]
    temperatures, note = [each or 1.0 for each in fitted], None
    if None in fitted:
        which = f"{'one' if any(fitted) else 'either'} half of the images"
        note = f"no temperature from {COLDEST} to {HOTTEST} is best for {which}: 1 was taken there"
    scaled = shifted / np.array(temperatures)[1 - half][:, None]
    return {
        "bins": bins, "folds": 2, "temperature": sum(temperatures) / 2,
        "temperatures": temperatures, "note": note,
        "before": reliability(shifted, labels, bins), "after": reliability(scaled, labels, bins),
    }  # fmt: skip


def halves(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return 0 or 1 for each image, int64 (N,), each for about half of every class."""
    shuffled = np.random.default_rng(seed).random(len(labels))
    return np.argsort(np.lexsort((shuffled, labels))) % 2


def fit_temperature(shifted: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the temperature of the least mean cross-entropy, or None if none in range is."""
    own = shifted[np.arange(len(labels)), labels]

    def slope(log_inverse: float) -> float:
        """Return the derivative by the inverse temperature, in which cross-entropy is convex."""
        weights = np.exp(shifted * np.exp(log_inverse))
        return float((np.einsum("nc,nc->n", weights, shifted) / weights.sum(axis=1) - own).mean())

    low, high = np.log(1 / HOTTEST), np.log(1 / COLDEST)
    if len(labels) == 0 or not slope(low) < 0 < slope(high):
        return None
    return float(np.exp(-brentq(slope, low, high, xtol=1e-9)))


def reliability(shifted: np.ndarray, labels: np.ndarray, bins: int) -> dict:
    """Return `before` or `after` of `calibration`, of logits whose largest are 0."""
    hit = shifted.argmax(axis=1) == labels
    total = np.exp(shifted).sum(axis=1)
    confidence = 1 / total
    losses = np.log(total) - shifted[np.arange(len(labels)), labels]
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    sums = [np.bincount(which, each, minlength=bins) for each in (confidence, hit)]
    means = [np.where(count > 0, each / count.clip(1), None).tolist() for each in sums]
    return {
        "ece": float(np.abs(sums[1] - sums[0]).sum() / len(labels)), "nll": float(losses.mean()),
        "mean_confidence": float(confidence.mean()), "accuracy_overall": float(hit.mean()),
        "confidence": means[0], "accuracy": means[1], "count": count.tolist(),
    }  # fmt: skip


def identical_images(images: np.ndarray) -> list[list[int]]:
    """Return the rows, ascending, of each group of images that are equal in every byte."""
    groups: dict[bytes, list[int]] = {}
    for row, image in enumerate(images):
        groups.setdefault(hashlib.sha256(image).digest(), []).append(row)
    return sorted(group for group in groups.values() if len(group) > 1)


def label_conflicts(dataset: Dataset, rows: np.ndarray, logits: np.ndarray) -> dict:
    """Return identical images with different labels, and what share of the errors they explain.

    rows (N,): the test images. Twins are looked for in all of the data set: a label is in doubt
    even if the network does not have the other's class. `pairs`: at most `MOST_PAIRS` of those
    `found`. `tested`: test images with such a twin; `wrong`: those answered wrong;
    `answered_as_twin`: by a twin's label; `share_of_error`: `wrong` of all wrong answers, or None.
    """
    labels, answers = dataset.labels, np.full(len(dataset), -1)
    answers[rows] = logits.argmax(axis=1)
    tested, wrong = answers >= 0, (answers >= 0) & (answers != labels)
    groups = [each for each in identical_images(dataset.images) if len(set(labels[each])) > 1]
    pairs = (list(two) for group in groups for two in combinations(group, 2))
    different = (two for two in pairs if labels[two[0]] != labels[two[1]])
    listed = []
    for two in islice(different, MOST_PAIRS):
        said = [dataset.names[label] for label in labels[two]]
        listed.append({"rows": two, "names": said, "tested": tested[two].tolist()})
    alike = [np.bincount(labels[group]) for group in groups]
    as_twin = [np.isin(answers[each], labels[each]) & wrong[each] for each in groups]
    missed, total = sum(int(wrong[group].sum()) for group in groups), int(wrong.sum())
    return {
        "pairs": listed, "found": sum(int(n.sum() ** 2 - (n**2).sum()) // 2 for n in alike),
        "tested": sum(int(tested[group].sum()) for group in groups), "wrong": missed,
        "answered_as_twin": sum(int(each.sum()) for each in as_twin),
        "wrong_in_all": total, "share_of_error": missed / total if total else None,
    }  # fmt: skip


# --- Mistakes with their maps ---------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """The chosen images, their maps and entries (see `explain`); all empty if none was wrong."""

    images: np.ndarray  # uint8 (n, 64, 64, 3)
    maps: dict[str, np.ndarray]  # of each stage, for the predicted class (see `gradcam`)
    actual_maps: np.ndarray  # of the last stage, for the actual class
    entries: list[dict]
    tested: int
    wrong: int
    seed: int

    def to_json(self) -> dict:
        """Return how the images were chosen and explained, and an object for each."""
        return {
            "tested": self.tested, "wrong": self.wrong, "seed": self.seed, "method": "gradcam",
            "explained_class": "predicted", "images": self.entries,
        }  # fmt: skip


def misclassified(logits: np.ndarray, labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Draw at most `count` wrongly answered images, int64 indices; more begin with the same."""
    shuffled = sample(len(labels), None, seed)
    return shuffled[(logits.argmax(axis=1) != labels)[shuffled]][:count]


def explain(
    model: torch.nn.Module | None,
    dataset: Dataset,
    *,
    rows: np.ndarray,
    logits: np.ndarray,
    normalise: Callable[[torch.Tensor], torch.Tensor],
    count: int = 10,
    seed: int = 0,
) -> Explanation:
    """Draw `count` misclassified test images, with Grad-CAM of each of their two classes.

    rows (N,): the test images. logits (N, C). normalise: from uint8 (n, 64, 64, 3) to
    the network's input. An entry holds what `answers` says, its box, and how each map meets it.
    """
    labels = dataset.labels[rows].astype(np.int64)
    drawn = misclassified(logits, labels, count, seed)
    images, boxes = (each[rows[drawn]] for each in (dataset.images, dataset.boxes))
    maps, actual_maps = {}, np.empty((0, 8, 8), np.float32)
    if len(drawn):
        inputs = normalise(torch.from_numpy(images))
        maps = gradcam(model, inputs, torch.from_numpy(logits[drawn].argmax(axis=1)))
        last = list(maps)[-1]
        actual_maps = gradcam(model, inputs, torch.from_numpy(labels[drawn]), (last,))[last]

    def against_box(i: int, maps: np.ndarray) -> dict:
        one, box = maps[i : i + 1], boxes[i : i + 1]
        share = round(energy(one, box).item(), 4) if usable(box)[0] and one.any() else None
        size, mean = list(one.shape[1:]), round(one.mean().item(), 4)
        return {"size": size, "mean": mean, "energy_in_box": share}

    entries = answers(rows[drawn], logits[drawn], dataset)
    for i, (entry, area) in enumerate(zip(entries, box_area(boxes).tolist(), strict=True)):
        for answer in (entry["predicted"], entry["actual"]):
            answer["probability"] = round(answer["probability"], 6)
        if boxes[i].any():
            entry |= {"box": boxes[i].tolist(), "box_area": round(area, 4)}
        entry["stages"] = {stage: against_box(i, each) for stage, each in maps.items()}
        entry["actual_map"] = against_box(i, actual_maps)
    wrong = int((logits.argmax(axis=1) != labels).sum())
    return Explanation(images, maps, actual_maps, entries, len(rows), wrong, seed)
