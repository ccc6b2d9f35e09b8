"""What a network gets wrong, from its logits alone: classes, confused pairs, calibration, identical
images.

Everything here is computed from predictions as they are stored, so that it needs no network, no GPU
and no second pass. Equal logits rank by class number, as in `evaluate.score`.
"""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinylab.exceptions import UserError
from tinylab.files import as_csv, write_atomically
from tinylab.training.evaluate import per_class

COLDEST, HOTTEST = 0.05, 20.0
"""Temperatures between which the best one is looked for."""

MOST_PAIRS = 1000
"""So many pairs of identical images are listed at most (there are 27 in Tiny ImageNet): pictures of
one colour, many times over, would make as many as the square of their number."""


@dataclass(frozen=True)
class Errors:
    """Where a network's answers to N test images of C classes are wrong."""

    classes: list[dict]
    """One per class, in canonical order: index, wnid, name, images (tested), top1 and top5
    (percent; None without images), mistaken_for (wnid, name and count of the most frequent wrong
    answer; None if there is none)."""
    matrix: np.ndarray
    """int64 (C, C), see `confusion_matrix`."""
    order: np.ndarray
    """int64 (C,), see `block_order`."""
    pairs: list[dict]
    """Unordered pairs of classes, most confused first: one and other (index, wnid, name and images
    each), one_as_other and other_as_one (images), count (their sum, at least 1)."""
    confident_mistakes: np.ndarray
    """int64: positions among the N images of wrong answers, the most probable one first."""
    hesitant_hits: np.ndarray
    """int64: positions among the N images of right answers, the least probable one first."""
    calibration: dict
    """See `calibration`."""

    def to_json(self) -> dict:
        """Plain values: the best and the worst classes (ten each, or half of those tested), best
        and worst first; the pairs, the calibration, all classes."""
        tested = [each for each in self.classes if each["images"]]
        ranked = sorted(tested, key=lambda each: (-each["top1"], -each["top5"]))
        half = len(ranked) // 2  # so that no class is among both
        return {
            "best": ranked[: min(10, len(ranked) - half)],
            "worst": ranked[::-1][: min(10, half)],
            "pairs": self.pairs,
            "calibration": self.calibration,
            "classes": self.classes,
        }

    def write_tables(self, folder: Path) -> list[Path]:
        """Writes classes.csv, a line per class, and confusion.csv, a line of counts per actual
        class and a column per predicted one, each under its wnid, in canonical order. Returns their
        paths; raises `UserError` if that fails.
        """
        wnids = [each["wnid"] for each in self.classes]
        columns = ("index", "wnid", "name", "images", "top1", "top5")
        lines = []
        for each in self.classes:
            mistaken = each["mistaken_for"] or {}
            answer = [mistaken.get(name) for name in ("wnid", "name", "count")]
            lines.append([*(each[name] for name in columns), *answer])
        header = [*columns, "mistaken_for_wnid", "mistaken_for_name", "mistaken_for_count"]
        confusion = ([wnid, *row] for wnid, row in zip(wnids, self.matrix.tolist(), strict=True))
        tables = {
            "classes.csv": [header, *lines],
            "confusion.csv": [["actual", *wnids], *confusion],
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error
        for name, rows in tables.items():
            write_atomically(folder / name, as_csv(rows))
        return [folder / name for name in tables]


def analyse(
    logits: np.ndarray,
    labels: np.ndarray,
    wnids: Sequence[str],
    names: Sequence[str],
    pairs: int = 20,
    extremes: int = 10,
    seed: int = 0,
) -> Errors:
    """Everything that the logits (N, C) of images with `labels`, integer (N,), say about the
    errors.

    pairs, extremes: most pairs of classes, mistakes and hits to list. seed: of the halves in
    `calibration`. Raises `UserError` if logits and labels do not fit together, or are not those of
    a network (see `calibration`).
    """
    _check(logits, labels)
    assert logits.shape[1] == len(wnids) == len(names), (
        f"{logits.shape[1]} logits for {len(wnids)} classes"
    )
    matrix = confusion_matrix(logits, labels)
    confidence = softmax(logits).max(axis=1)
    hit = logits.argmax(axis=1) == labels
    mistakes, hits = np.flatnonzero(~hit), np.flatnonzero(hit)
    classes = _classes(logits, labels, matrix, wnids, names)
    return Errors(
        classes=classes,
        matrix=matrix,
        order=block_order(matrix),
        pairs=_pairs(matrix, classes, pairs),
        confident_mistakes=mistakes[np.argsort(-confidence[mistakes], kind="stable")][:extremes],
        hesitant_hits=hits[np.argsort(confidence[hits], kind="stable")][:extremes],
        calibration=calibration(logits, labels, seed=seed),
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, float64 (N, C), of logits (N, C) of any float type."""
    # In double precision: the exponentials of stored float16 logits would round to three digits.
    exponentials = np.exp(_below_largest(logits))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


# --- Classes --------------------------------------------------------------------------------------


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How often images of each class were answered by each class: int64 (C, C) [actual, predicted],
    of logits (N, C) and integer labels (N,)."""
    _check(logits, labels)
    classes = logits.shape[1]
    cells = labels.astype(np.int64) * classes + logits.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def block_order(matrix: np.ndarray) -> np.ndarray:
    """An order of the classes, int64 (C,), in which those that are confused with each other stand
    together, of counts (C, C) [actual, predicted].

    Two classes are as similar as the mean of the shares of each that are taken for the other.
    Average linkage over the similarities, whose tree is then turned so that neighbours are as
    similar as it allows (Bar-Joseph et al., "Fast optimal leaf ordering for hierarchical
    clustering", 2001). Classes that are never confused follow at the end.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    similarity = (shares + shares.T) / 2
    np.fill_diagonal(similarity, 0)
    confused = np.flatnonzero(similarity.any(axis=1))
    if len(confused) == 0:
        return np.arange(len(matrix))
    similarity = similarity[np.ix_(confused, confused)]
    distance = 1 - similarity / similarity.max()
    np.fill_diagonal(distance, 0)
    leaves = confused[leaves_list(linkage(squareform(distance), "average", optimal_ordering=True))]
    if leaves[0] > leaves[-1]:  # an order and its reverse are equally good
        leaves = leaves[::-1]
    return np.concatenate([leaves, np.setdiff1d(np.arange(len(matrix)), confused)])


def _classes(
    logits: np.ndarray,
    labels: np.ndarray,
    matrix: np.ndarray,
    wnids: Sequence[str],
    names: Sequence[str],
) -> list[dict]:
    right, images = per_class(logits, labels)
    among_five = np.bincount(labels[_rank(logits, labels) < 5], minlength=len(matrix))
    mistakes = matrix.copy()
    np.fill_diagonal(mistakes, 0)
    entries = []
    for index, answer in enumerate(mistakes.argmax(axis=1).tolist()):
        total, count = int(images[index]), int(mistakes[index, answer])
        entries.append(
            {
                "index": index,
                "wnid": wnids[index],
                "name": names[index],
                "images": total,
                "top1": 100 * int(right[index]) / total if total else None,
                "top5": 100 * int(among_five[index]) / total if total else None,
                "mistaken_for": {"wnid": wnids[answer], "name": names[answer], "count": count}
                if count
                else None,
            }
        )
    return entries


def _rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the label's: int64 (N,)."""
    logits = logits.astype(np.float64)
    own = logits[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(axis=1)


def _pairs(matrix: np.ndarray, classes: list[dict], most: int) -> list[dict]:
    both = np.triu(matrix + matrix.T, k=1)
    first, second = np.nonzero(both)
    ranked = np.argsort(-both[first, second], kind="stable")[
        :most
    ]  # equal counts in the order of the classes
    entries = []
    for i, j in zip(first[ranked].tolist(), second[ranked].tolist(), strict=True):
        one, other = (
            {name: classes[k][name] for name in ("index", "wnid", "name", "images")} for k in (i, j)
        )
        there, back = int(matrix[i, j]), int(matrix[j, i])
        entries.append(
            {
                "one": one,
                "other": other,
                "one_as_other": there,
                "other_as_one": back,
                "count": there + back,
            }
        )
    return entries


# --- Calibration ----------------------------------------------------------------------------------


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int = 15, seed: int = 0) -> dict:
    """How far the probability of the answer is from being right so often, before and after
    temperature scaling (Guo et al., "On calibration of modern neural networks", 2017), of logits
    (N, C) and integer labels (N,).

    The temperature is what divides the logits so that their mean cross-entropy is least. It is
    fitted on one half of the images, drawn by `seed` class by class, and applied to the other, both
    ways: no image is judged with a temperature that it helped to fit. `temperatures` are those
    fitted on the first and on the second half, `temperature` is their mean; `note` says so if 1 had
    to be taken, as none between 0.05 and 20 is best (all answers right, for instance), and is None
    otherwise.

    `before` and `after` hold `ece`, the expected calibration error: the mean over images of the
    distance between mean confidence and accuracy in their bin, of `bins` equally wide ones that
    include their upper ends; `nll`, in nats; `mean_confidence`; `accuracy_overall`; and by bin
    `confidence` and `accuracy` (None where it is empty) and `count`. All are shares, from 0 to 1.
    Raises `UserError` if logits and labels do not fit together.
    """
    _check(logits, labels)
    assert bins >= 1, f"{bins} bins"
    shifted = _below_largest(logits)
    hit = logits.argmax(axis=1) == labels
    half = _halves(labels, seed)
    fitted = [
        _fit_temperature(shifted[half == number], labels[half == number]) for number in (0, 1)
    ]
    temperatures = [1.0 if each is None else each for each in fitted]
    note = None
    if None in fitted:
        which = "either half" if fitted == [None, None] else "one half"
        note = (
            f"no temperature from {COLDEST} to {HOTTEST} is best for {which} of the images: 1 was "
            "taken there"
        )
    applied = np.array(temperatures)[1 - half]
    return {
        "bins": bins,
        "folds": 2,
        "temperature": sum(temperatures) / 2,
        "temperatures": temperatures,
        "note": note,
        "before": _reliability(shifted, labels, hit, bins),
        "after": _reliability(shifted / applied[:, None], labels, hit, bins),
    }


def _halves(labels: np.ndarray, seed: int) -> np.ndarray:
    """0 or 1 for each image, int64 (N,): as many of either in all and in each class, or one
    more."""
    half = np.empty(len(labels), dtype=np.int64)
    shuffled = np.random.default_rng(seed).random(len(labels))
    half[np.lexsort((shuffled, labels))] = np.arange(len(labels)) % 2
    return half


def _fit_temperature(shifted: np.ndarray, labels: np.ndarray) -> float | None:
    """The temperature that minimises the mean cross-entropy, or None if there is none in the
    range."""
    from scipy.optimize import brentq

    if len(labels) == 0:
        return None
    own = shifted[np.arange(len(labels)), labels]

    def slope(log_inverse: float) -> float:
        """Derivative of the mean cross-entropy by the inverse temperature, in which it is
        convex."""
        weights = shifted * np.exp(log_inverse)
        np.exp(weights, out=weights)
        return float((np.einsum("nc,nc->n", weights, shifted) / weights.sum(axis=1) - own).mean())

    low, high = np.log(1 / HOTTEST), np.log(1 / COLDEST)
    if not slope(low) < 0 < slope(high):
        return None
    return float(np.exp(-brentq(slope, low, high, xtol=1e-9)))


def _reliability(shifted: np.ndarray, labels: np.ndarray, hit: np.ndarray, bins: int) -> dict:
    total = np.exp(shifted).sum(axis=1)
    confidence = 1 / total  # the answer's logit is 0
    losses = np.log(total) - shifted[np.arange(len(labels)), labels]
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    confidences, hits = (
        np.bincount(which, weights=values, minlength=bins) for values in (confidence, hit)
    )

    def means(sums: np.ndarray) -> list[float | None]:
        return [
            float(value / number) if number else None
            for value, number in zip(sums, count, strict=True)
        ]

    return {
        "ece": float(np.abs(hits - confidences).sum() / len(labels)),
        "nll": float(losses.mean()),
        "mean_confidence": float(confidence.mean()),
        "accuracy_overall": float(hit.mean()),
        "confidence": means(confidences),
        "accuracy": means(hits),
        "count": count.tolist(),
    }


# --- Identical images -----------------------------------------------------------------------------


def identical_images(images: np.ndarray, rows: Iterable[int] | None = None) -> list[list[int]]:
    """Groups of rows whose images, uint8 (M, 64, 64, 3), are equal in every byte: each ascending
    and of two or more, by their first rows. `rows`: only among these; None: among all.
    Memory-mapped images are read one by one."""
    # A few lines from the middle tell almost all images apart, and only the others are read as a
    # whole.
    middle = images.shape[1] // 2
    alike = _alike(images[:, middle : middle + 8], range(len(images)) if rows is None else rows)
    return sorted(sorted(group) for some in alike for group in _alike(images, some))


def _alike(images: np.ndarray, rows: Iterable[int]) -> list[list[int]]:
    """Groups of two or more of `rows` that have the same bytes, by SHA-256."""
    groups: dict[bytes, list[int]] = {}
    for row in rows:
        groups.setdefault(hashlib.sha256(np.ascontiguousarray(images[row])).digest(), []).append(
            int(row)
        )
    return [group for group in groups.values() if len(group) > 1]


def label_conflicts(
    images: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    logits: np.ndarray,
    names: Sequence[str],
) -> dict:
    """Identical images with different labels, and what share of the errors they can explain.

    `images` uint8 (M, 64, 64, 3), `labels` integer (M,) and the classes' `names` are the whole data
    set's; `rows` (N,) says which of them were tested, `logits` (N, C) what the network answered. A
    network of the first C classes may have a twin's label to learn or not: the label of an image
    that has one is in doubt all the same.

    `pairs`: rows, ascending, names (the labels') and tested (whether each is a test image) of each
    two, 1000 at most; `found`: how many pairs there are. `tested`: test images that have such a
    twin; `wrong`: those of them that were answered wrong; `answered_as_twin`: those of them
    answered by a twin's label; `wrong_in_all`: wrong answers to any test image; `share_of_error`:
    the share of these that `wrong` makes, None if there are none.
    """
    _check(logits, labels[rows])
    answers = dict(zip(rows.tolist(), logits.argmax(axis=1).tolist(), strict=True))
    pairs: list[dict] = []
    found = tested = wrong = as_twin = 0
    for group in identical_images(images):
        own = {row: int(labels[row]) for row in group}
        counts = np.unique(list(own.values()), return_counts=True)[1]
        found += (len(group) ** 2 - int((counts**2).sum())) // 2
        differing = (
            ((a, b) for a, b in itertools.combinations(group, 2) if own[a] != own[b])
            if len(counts) > 1
            else ()
        )
        for two in itertools.islice(differing, MOST_PAIRS - len(pairs)):
            said = {
                "names": [names[own[row]] for row in two],
                "tested": [row in answers for row in two],
            }
            pairs.append({"rows": list(two), **said})
        for row in group if len(counts) > 1 else ():
            if row in answers:
                tested += 1
                wrong += answers[row] != own[row]
                as_twin += answers[row] != own[row] and answers[row] in own.values()
    wrong_in_all = int((logits.argmax(axis=1) != labels[rows]).sum())
    return {
        "pairs": pairs,
        "found": found,
        "tested": tested,
        "wrong": wrong,
        "answered_as_twin": as_twin,
        "wrong_in_all": wrong_in_all,
        "share_of_error": wrong / wrong_in_all if wrong_in_all else None,
    }


# --- Small parts ----------------------------------------------------------------------------------


def _check(logits: np.ndarray, labels: np.ndarray) -> None:
    """Raises `UserError` for predictions that no network made; they come from a file that anybody
    may have written."""
    problem = None
    if logits.ndim != 2 or 0 in logits.shape or not np.issubdtype(logits.dtype, np.floating):
        problem = f"logits are {logits.dtype} {logits.shape}"
    elif labels.shape != logits.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        problem = f"labels are {labels.dtype} {labels.shape} for {len(logits)} images"
    elif labels.min() < 0 or labels.max() >= logits.shape[1]:
        problem = f"labels are from {labels.min()} to {labels.max()} with {logits.shape[1]} classes"
    elif not np.isfinite(logits).all():
        problem = "logits are not finite"
    if problem:
        raise UserError(f"these are no predictions of a network: {problem}; train the run again")


def _below_largest(logits: np.ndarray) -> np.ndarray:
    """The logits less each image's largest: float64 (N, C)."""
    logits = logits.astype(np.float64)
    return logits - logits.max(axis=1, keepdims=True)
