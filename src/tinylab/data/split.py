"""Which images train and which test: three protocols, the same on every machine and for ever.

`merged`   training and validation images pooled, 70 % / 30 % of every class: the published
protocol, made repeatable. `official` the data set's own training and validation images. `select`
the training images of `merged` split again, one in eleven held out: every hyper-parameter is chosen
on
           these, so that the test images of the other two are only ever used for final numbers.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from tinylab.data.dataset import Dataset
from tinylab.exceptions import UserError

PROTOCOLS = ("merged", "official", "select")


@dataclass(frozen=True)
class Split:
    """Row numbers into the data set, in canonical order, of the first `classes` classes.

    train, test: int64, ascending, disjoint. sha256: hex digest over protocol, classes and both
    lists of rows.
    """

    protocol: str
    classes: int
    train: np.ndarray
    test: np.ndarray
    sha256: str


def make_split(dataset: Dataset, protocol: str, limit_classes: int | None = None) -> Split:
    """The split of `dataset` by `protocol`, of its first `limit_classes` classes (by sorted wnid)
    or of all.

    Each class is split by itself, from its wnid alone, so fewer classes give a part of the full
    split, never another one. Membership follows SHA-256 ranks rather than a random generator's
    stream, which libraries may change. Raises `UserError` for an unknown protocol, an impossible
    number of classes, or a class too small to split.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown split '{protocol}'; there are: {', '.join(PROTOCOLS)}")
    classes = len(dataset.wnids) if limit_classes is None else limit_classes
    if not 2 <= classes <= len(dataset.wnids):
        raise UserError(
            f"limit-classes must be from 2 to {len(dataset.wnids)}, the classes of this data set, "
            f"not {classes}"
        )
    train, test = [], []
    for label in range(classes):
        rows = np.flatnonzero(dataset.labels == label)
        class_train, class_test = _split_class(rows, dataset, protocol, dataset.wnids[label])
        if len(class_train) == 0 or len(class_test) == 0:
            raise UserError(
                f"class {dataset.wnids[label]} has {len(rows)} images, too few for the split "
                f"'{protocol}'"
            )
        train.append(class_train)
        test.append(class_test)
    train_rows, test_rows = (
        np.sort(np.concatenate(parts)).astype(np.int64) for parts in (train, test)
    )
    return Split(
        protocol, classes, train_rows, test_rows, _digest(protocol, classes, train_rows, test_rows)
    )


def _split_class(
    rows: np.ndarray, dataset: Dataset, protocol: str, wnid: str
) -> tuple[np.ndarray, np.ndarray]:
    if protocol == "official":
        return rows[rows < dataset.train_count], rows[rows >= dataset.train_count]
    ranked = rows[_ranks(len(rows), "merged", wnid)]
    n_train = round(len(rows) * 0.7)  # 385 of 550
    train, test = ranked[:n_train], ranked[n_train:]
    if protocol == "merged":
        return train, test
    train = np.sort(train)
    ranked = train[_ranks(len(train), "select", wnid)]
    held_out = round(len(train) / 11)  # 35 of 385
    return ranked[held_out:], ranked[:held_out]


def _ranks(count: int, purpose: str, wnid: str) -> list[int]:
    """The numbers 0..count-1 in an order that looks random and is fixed by purpose and class."""

    def digest(position: int) -> bytes:
        return hashlib.sha256(f"tinylab {purpose} v1 {wnid} {position}".encode()).digest()

    return sorted(range(count), key=digest)


def _digest(protocol: str, classes: int, train: np.ndarray, test: np.ndarray) -> str:
    digest = hashlib.sha256(
        f"tinylab split v1 {protocol} {classes} {len(train)} {len(test)}\n".encode()
    )
    for rows in (train, test):
        digest.update(rows.astype("<i8").tobytes())
    return digest.hexdigest()
