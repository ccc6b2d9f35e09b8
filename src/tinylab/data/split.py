"""Which images train and which test: three protocols, the same on every machine and for ever.

merged    training and validation images pooled, 70 % / 30 % of every class: the published protocol,
          made repeatable
official  the data set's own training and validation images
select    the training images of `merged` split again, one in eleven held out: hyper-parameters are
          chosen on these, so that the other two's test images only serve for final numbers
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from tinylab.data.dataset import Dataset
from tinylab.exceptions import UserError

PROTOCOLS = ("merged", "official", "select")


@dataclass(frozen=True)
class Split:
    """Row numbers of the data set, of the first `classes` classes."""

    protocol: str
    classes: int
    train: np.ndarray  # int64, ascending
    test: np.ndarray  # the same, disjoint from `train`
    sha256: str  # over all of the above


def make_split(dataset: Dataset, protocol: str, limit_classes: int | None = None) -> Split:
    """Split the first `limit_classes` classes, by sorted wnid, or all.

    Each class is split by itself, from its wnid alone: fewer classes give a part of the full split.
    Raise `UserError` for an impossible protocol or number of classes, or a class that is too small.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown split '{protocol}'; there are: {', '.join(PROTOCOLS)}")
    most = len(dataset.wnids)
    classes = most if limit_classes is None else limit_classes
    if most < 2:
        raise UserError("the data set has a single class: there is nothing to tell apart")
    if not 2 <= classes <= most:
        raise UserError(f"limit-classes must be from 2 to {most} (all classes), not {classes}")
    if protocol == "official" and dataset.train_count == len(dataset.labels):
        raise UserError("without validation images (val/) there is no split 'official'")

    parts = []
    for label, wnid in enumerate(dataset.wnids[:classes]):
        rows = np.flatnonzero(dataset.labels == label)
        if protocol == "official":
            train, test = rows[rows < dataset.train_count], rows[rows >= dataset.train_count]
        else:
            train, test = np.split(rows[ranks(len(rows), "merged", wnid)], [round(len(rows) * 0.7)])
        if protocol == "select":
            train = np.sort(train)[ranks(len(train), "select", wnid)]
            test, train = np.split(train, [round(len(train) / 11)])
        if not (len(train) and len(test)):
            few = f"{len(train)} to train on, {len(test)} to test on: too few"
            raise UserError(f"class {wnid} has {len(rows)} images, in split '{protocol}' {few}")
        parts.append((train, test))

    train, test = (np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))
    header = f"tinylab split v1 {protocol} {classes} {len(train)} {len(test)}\n".encode()
    digest = hashlib.sha256(header + train.astype("<i8").tobytes() + test.astype("<i8").tobytes())
    return Split(protocol, classes, train, test, digest.hexdigest())


def ranks(count: int, purpose: str, wnid: str) -> list[int]:
    """Return 0..count - 1 in the order of their SHA-256: no library can change it."""
    name = f"tinylab {purpose} v1 {wnid}"
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{name} {i}".encode()).digest())
