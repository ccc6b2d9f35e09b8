"""The three protocols: sizes, disjointness, and that nothing but the data decides who is in which
part."""

from dataclasses import replace

import numpy as np
import pytest

from tinylab.data.dataset import Dataset
from tinylab.data.split import PROTOCOLS, make_split
from tinylab.exceptions import UserError

REAL = {
    "merged": (385, 165, "49abea2b7c71c3c693be5a94dc15ba3f412d39ad5fdd7053ab66bfed55571faa"),
    "official": (500, 50, "e72a27b22fbc22d00e4cfa16594c3812d3a20695be25f76fb216143b21ca500c"),
    "select": (350, 35, "1262bf926ea67092a8cdcb38a0ce2e261a45fd8d76d854c6f646a0c695629b14"),
}
"""Training images per class, test images per class, sha256: on every machine and for ever."""


def fake_dataset(train: int, validation: int, classes: int = 2) -> Dataset:
    """Labels and wnids without images: all that a split looks at."""
    labels = np.concatenate(
        [np.repeat(np.arange(classes), train), np.repeat(np.arange(classes), validation)]
    )
    return Dataset(
        folder=None,
        images=None,
        labels=labels.astype(np.int16),
        boxes=None,
        wnids=tuple(f"n{9_000_000 + i}" for i in range(classes)),
        names=tuple(f"class {i}" for i in range(classes)),
        train_count=train * classes,
        content_sha256="",
    )


@pytest.mark.archive
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_real_split_is_the_one_that_was_always_made(
    real_dataset: Dataset, protocol: str
) -> None:
    train_per_class, test_per_class, sha256 = REAL[protocol]
    split = make_split(real_dataset, protocol)
    assert np.bincount(real_dataset.labels[split.train]).tolist() == [train_per_class] * 200
    assert np.bincount(real_dataset.labels[split.test]).tolist() == [test_per_class] * 200
    assert split.sha256 == sha256


@pytest.mark.archive
def test_the_real_parts_fit_together(real_dataset: Dataset) -> None:
    merged, official, select = (
        make_split(real_dataset, protocol) for protocol in ("merged", "official", "select")
    )
    for split in (merged, official):
        assert np.array_equal(
            np.sort(np.concatenate([split.train, split.test])), np.arange(110_000)
        )
    assert np.array_equal(np.sort(np.concatenate([select.train, select.test])), merged.train)
    assert np.array_equal(official.train, np.arange(100_000))
    # Pooled means pooled: of the 33,000 test images about one in eleven was an official validation
    # image.
    assert 2700 < (merged.test >= 100_000).sum() < 3300


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_parts_are_ascending_and_disjoint(protocol: str) -> None:
    split = make_split(fake_dataset(50, 5, classes=4), protocol)
    for rows in (split.train, split.test):
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
    assert not set(split.train) & set(split.test)
    assert (split.protocol, split.classes) == (protocol, 4)


@pytest.mark.parametrize(
    ("protocol", "sizes"), [("merged", (77, 33)), ("official", (100, 10)), ("select", (70, 7))]
)
def test_every_class_is_split_in_the_same_proportion(protocol: str, sizes: tuple[int, int]) -> None:
    dataset = fake_dataset(100, 10, classes=3)
    split = make_split(dataset, protocol)
    assert np.bincount(dataset.labels[split.train]).tolist() == [sizes[0]] * 3
    assert np.bincount(dataset.labels[split.test]).tolist() == [sizes[1]] * 3


@pytest.mark.parametrize(("images", "train"), [(10, 7), (11, 8), (12, 8), (13, 9), (60, 42)])
def test_the_share_of_training_images_is_rounded(images: int, train: int) -> None:
    split = make_split(fake_dataset(images - 1, 1), "merged")
    assert (len(split.train), len(split.test)) == (2 * train, 2 * (images - train))


def test_select_holds_out_training_images_of_merged_only() -> None:
    dataset = fake_dataset(100, 10)
    merged, select = make_split(dataset, "merged"), make_split(dataset, "select")
    assert set(select.train) | set(select.test) == set(merged.train)


def test_classes_are_not_split_alike() -> None:
    """Positions drawn once for all classes would be a regular pattern of file names."""
    merged = make_split(fake_dataset(100, 10), "merged")
    first, second = ({row for row in merged.train if row // 100 == label} for label in (0, 1))
    assert {row - 100 for row in second} != first


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_fewer_classes_are_a_part_of_the_full_split(protocol: str) -> None:
    dataset = fake_dataset(50, 5, classes=6)
    full, part = make_split(dataset, protocol), make_split(dataset, protocol, limit_classes=2)
    for all_rows, rows in ((full.train, part.train), (full.test, part.test)):
        assert np.array_equal(rows, all_rows[dataset.labels[all_rows] < 2])
    assert part.sha256 != full.sha256
    assert make_split(dataset, protocol, limit_classes=6).sha256 == full.sha256


def test_the_hash_changes_with_membership_protocol_and_classes() -> None:
    dataset = fake_dataset(50, 5, classes=3)
    labels = dataset.labels.copy()
    labels[[0, 149]] = labels[[149, 0]]
    hashes = [make_split(dataset, protocol).sha256 for protocol in PROTOCOLS]
    hashes.append(make_split(dataset, "merged", limit_classes=2).sha256)
    hashes.append(make_split(replace(dataset, labels=labels), "merged").sha256)
    hashes.append(make_split(replace(dataset, wnids=("n1", "n2", "n3")), "merged").sha256)
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("limit", [-1, 0, 1, 201])
def test_an_impossible_number_of_classes_is_refused(limit: int) -> None:
    with pytest.raises(UserError, match=rf"limit-classes.*200.*{limit}"):
        make_split(fake_dataset(2, 1, classes=200), "official", limit_classes=limit)


def test_an_unknown_protocol_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'random'.*merged, official, select"):
        make_split(fake_dataset(10, 1), "random")


def test_a_class_without_test_images_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="without validation images"):
        make_split(fake_dataset(10, 0), "official")
    with pytest.raises(UserError, match=r"n9000000 has 6 images.* 4 to train on, 0 to test on"):
        make_split(fake_dataset(5, 1), "select")
