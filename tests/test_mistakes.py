"""Tables, pairs, calibration and twins against scikit-learn, plain loops and a grid, and the
corners."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.special import softmax as reference_softmax
from sklearn import metrics

from tinylab.data.dataset import Dataset
from tinylab.data.split import make_split
from tinylab.exceptions import UserError
from tinylab.explain import mistakes as errors
from tinylab.explain.mistakes import (
    Errors,
    analyse,
    block_order,
    calibration,
    identical_images,
    label_conflicts,
    softmax,
)
from tinylab.training.evaluate import score

CLASSES = 12
WNIDS = tuple(f"n{index:08d}" for index in range(CLASSES))
NAMES = tuple(f"name {index}" for index in range(CLASSES))


def made_up(images: int = 600, seed: int = 0, step: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Float16 logits on a grid of `step`, so that many are equal, right about half of the time; the
    last class has no images."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES - 1, images)
    logits = rng.normal(0, 2, (images, CLASSES))
    logits[np.arange(images), labels] += 3
    return (np.round(logits / step) * step).astype(np.float16), labels


@pytest.fixture(scope="module")
def found() -> Errors:
    return analyse(*made_up(), WNIDS, NAMES)


# --- Classes --------------------------------------------------------------------------------------


def test_probabilities_are_exact_and_do_not_overflow() -> None:
    logits = np.array([[60000, 59999, -60000], [0, 0, 0], [1, 2, 3]], dtype=np.float16)
    found = softmax(logits)
    assert found.dtype == np.float64
    np.testing.assert_allclose(
        found, reference_softmax(logits.astype(np.float64), axis=1), rtol=1e-12
    )


def test_precision_recall_and_f1_are_those_of_plain_loops(found: Errors) -> None:
    logits, labels = made_up()
    answers = logits.argmax(axis=1)
    matrix, sums = [[0] * CLASSES for _ in range(CLASSES)], np.zeros(3)
    for actual, answer in zip(labels, answers, strict=True):
        matrix[actual][answer] += 1
    assert found.matrix.tolist() == matrix
    for each in found.classes[:-1]:
        i = each["index"]
        hits, answered = matrix[i][i], sum(row[i] for row in matrix)
        precision, recall = 100 * hits / answered, 100 * hits / sum(matrix[i])
        expected = [precision, recall, 2 * precision * recall / (precision + recall)]
        assert [each[name] for name in ("precision", "recall", "f1")] == pytest.approx(expected)
        assert recall == pytest.approx(each["top1"])
        sums += expected
    macro = [found.macro[name] for name in ("precision", "recall", "f1")]
    assert macro == pytest.approx(sums / (CLASSES - 1)), "the class without images does not count"
    theirs = metrics.f1_score(labels, answers, labels=range(CLASSES - 1), average="macro")
    assert found.macro["f1"] == pytest.approx(100 * theirs)


def test_a_class_that_is_never_answered_has_a_precision_of_0() -> None:
    labels = np.array([0, 0, 1])
    found = analyse(np.eye(2, dtype=np.float16)[[0, 0, 0]], labels, WNIDS[:2], NAMES[:2])
    measured = [[each[name] for name in errors.MEASURES[2:]] for each in found.classes]
    assert measured == [pytest.approx([200 / 3, 100, 80]), [0, 0, 0]]


def test_accuracies_per_class_are_those_of_the_evaluation_and_of_scikit_learn(
    found: Errors,
) -> None:
    logits, labels = made_up()
    assert (
        np.sort(logits)[:, -5] == np.sort(logits)[:, -6]
    ).mean() > 0.1  # ties at the fifth place
    whole = score(torch.from_numpy(logits).float(), torch.from_numpy(labels))
    for top, hits in (("top1", whole.correct), ("top5", whole.correct_top5)):
        per_class = [each[top] / 100 * each["images"] for each in found.classes if each["images"]]
        assert sum(per_class) == pytest.approx(hits)
    exact = logits.astype(np.float64) - 1e-6 * np.arange(
        CLASSES
    )  # without ties, as the class number decides them
    for each in found.classes[:-1]:
        mine = labels == each["index"]
        for top, k in (("top1", 1), ("top5", 5)):
            expected = metrics.top_k_accuracy_score(
                labels[mine], exact[mine], k=k, labels=np.arange(CLASSES)
            )
            assert each[top] == pytest.approx(100 * expected)
        assert each["images"] == mine.sum()
        assert 0 < each["top1"] < each["top5"] <= 100


def test_a_class_without_images_has_no_accuracy(found: Errors) -> None:
    last = {"index": 11, "wnid": WNIDS[11], "name": NAMES[11], "images": 0, "mistaken_for": None}
    assert found.classes[11] == last | dict.fromkeys(errors.MEASURES)


def test_what_a_class_is_mistaken_for() -> None:
    """Class 0 is once taken for 2 and twice for 1, class 1 once each for 0 and 2, class 2 never for
    another."""
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    logits = np.eye(3, dtype=np.float16)[[0, 2, 1, 1, 2, 0, 2]]
    found = analyse(logits, labels, WNIDS[:3], NAMES[:3])
    mistaken = [each["mistaken_for"] for each in found.classes]
    assert mistaken[0] == {"wnid": WNIDS[1], "name": NAMES[1], "count": 2}
    assert mistaken[1] == {"wnid": WNIDS[0], "name": NAMES[0], "count": 1}
    assert mistaken[2] is None
    assert [
        (p["one"]["index"], p["other"]["index"], p["one_as_other"], p["other_as_one"])
        for p in found.pairs
    ] == [(0, 1, 2, 1), (0, 2, 1, 0), (1, 2, 1, 0)]
    assert found.pairs[0]["one"] == {"index": 0, "wnid": WNIDS[0], "name": NAMES[0], "images": 4}
    assert [p["count"] for p in found.pairs] == [3, 1, 1]


def test_pairs_are_the_most_confused_ones(found: Errors) -> None:
    logits, labels = made_up()
    answers = logits.argmax(axis=1)
    counts = {}
    for actual, answer in zip(labels.tolist(), answers.tolist(), strict=True):
        if actual != answer:
            key = (min(actual, answer), max(actual, answer))
            counts[key] = counts.get(key, 0) + 1
    expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    assert [
        ((p["one"]["index"], p["other"]["index"]), p["count"]) for p in found.pairs
    ] == expected[:20]
    for pair in found.pairs:
        assert (
            pair["one_as_other"]
            == ((labels == pair["one"]["index"]) & (answers == pair["other"]["index"])).sum()
        )
        assert pair["one_as_other"] + pair["other_as_one"] == pair["count"]


def test_the_most_confident_mistakes_and_the_least_confident_hits(found: Errors) -> None:
    logits, labels = made_up()
    confidence, hit = softmax(logits).max(axis=1), logits.argmax(axis=1) == labels
    mistakes, hits = found.confident_mistakes, found.hesitant_hits
    assert len(mistakes) == len(hits) == 10
    assert not hit[mistakes].any()
    assert hit[hits].all()
    assert confidence[mistakes].tolist() == sorted(confidence[~hit], reverse=True)[:10]
    assert confidence[hits].tolist() == sorted(confidence[hit])[:10]
    assert mistakes.dtype == hits.dtype == np.int64


def test_nothing_wrong_and_nothing_right() -> None:
    labels = np.arange(6) % 3
    right = analyse(np.eye(3, dtype=np.float16)[labels] * 9, labels, WNIDS[:3], NAMES[:3])
    assert (right.pairs, len(right.confident_mistakes), len(right.hesitant_hits)) == ([], 0, 6)
    wrong = analyse(np.eye(3, dtype=np.float16)[(labels + 1) % 3] * 9, labels, WNIDS[:3], NAMES[:3])
    assert (len(wrong.pairs), len(wrong.confident_mistakes), len(wrong.hesitant_hits)) == (3, 6, 0)
    for each in (right, wrong):
        json.dumps(each.to_json(), allow_nan=False)


# --- The order of the matrix ----------------------------------------------------------------------


def test_the_order_puts_blocks_together() -> None:
    """Eight blocks of five classes, which are confused within a block, in every other row a little
    and a little everywhere else, shuffled."""
    rng = np.random.default_rng(0)
    block = rng.permutation(np.repeat(np.arange(8), 5))
    same = block[:, None] == block[None, :]
    matrix = rng.poisson(np.where(same, 6, 0.3)) + np.diag(np.full(40, 80))
    ordered = block[block_order(matrix)]
    assert (np.diff(ordered) != 0).sum() == 7
    assert sorted(block_order(matrix)) == list(range(40))


def test_the_order_is_one_of_shares() -> None:
    """Class 0 is the most similar to both others, by the share of its few images; counts would put
    1 in the middle."""
    matrix = np.array([[3, 4, 3], [0, 940, 60], [0, 60, 940]])
    assert block_order(matrix).tolist() == [1, 0, 2]


def test_of_an_order_and_its_reverse_one_is_taken() -> None:
    rng = np.random.default_rng(0)
    for order in [block_order(rng.integers(0, 9, (6, 6))) for _ in range(10)]:
        assert order[0] < order[-1]


def test_neighbours_within_a_block_are_the_most_similar() -> None:
    """A chain: every class is confused with the next one. A tree that isn't turned breaks it."""
    shuffled = np.random.default_rng(1).permutation(12)
    matrix = np.zeros((12, 12), dtype=np.int64)
    for first in range(11):
        matrix[shuffled[first], shuffled[first + 1]] = 10 + first
    matrix[np.diag_indices(12)] = 100
    places = np.argsort(block_order(matrix))[shuffled]
    assert (np.abs(np.diff(places)) == 1).sum() >= 9


@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_without_confusion_the_order_is_the_classes(classes: int) -> None:
    assert block_order(np.eye(classes, dtype=np.int64) * 7).tolist() == list(range(classes))
    assert block_order(np.zeros((classes, classes), dtype=np.int64)).tolist() == list(
        range(classes)
    )


def test_what_is_never_confused_stands_at_the_end() -> None:
    matrix = np.diag([5, 5, 5, 5])
    matrix[1, 3] = 2
    assert block_order(matrix).tolist() == [1, 3, 0, 2]
    assert block_order(np.array([[1, 2], [0, 3]])).tolist() == [0, 1]


# --- Calibration ----------------------------------------------------------------------------------


def sharpened(
    images: int = 4000, temperature: float = 2.5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right as often as they say once they are divided by `temperature`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (images, CLASSES))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return (logits * temperature).astype(np.float16), labels


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Written out: Guo et al. 2017, equation 3."""
    probabilities = reference_softmax(logits.astype(np.float64), axis=1)
    answers, confidences, total = probabilities.argmax(axis=1), probabilities.max(axis=1), 0.0
    for number in range(bins):
        inside = [i for i, c in enumerate(confidences) if number / bins < c <= (number + 1) / bins]
        if inside:
            accuracy = sum(answers[i] == labels[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_the_calibration_error_is_the_one_written_out(bins: int) -> None:
    logits, labels = sharpened()
    before = calibration(logits, labels, bins)["before"]
    assert before["ece"] == pytest.approx(
        expected_calibration_error(logits, labels, bins), rel=1e-9
    )
    assert before["ece"] > 0.1 or bins == 1
    losses = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
    assert before["nll"] == pytest.approx(losses.mean(), rel=1e-9)
    assert before["accuracy_overall"] == (logits.argmax(axis=1) == labels).mean()
    assert before["mean_confidence"] == pytest.approx(
        reference_softmax(logits.astype(float), axis=1).max(1).mean()
    )
    assert sum(before["count"]) == len(labels)
    assert len(before["count"]) == len(before["confidence"]) == len(before["accuracy"]) == bins


def test_temperature_scaling_finds_what_was_put_in() -> None:
    logits, labels = sharpened(temperature=2.5)
    found = calibration(logits, labels)
    assert found["temperatures"] == pytest.approx([2.5, 2.5], rel=0.06)
    assert found["temperature"] == pytest.approx(np.mean(found["temperatures"]))
    assert found["after"]["ece"] < 0.03 < 0.2 < found["before"]["ece"]
    assert found["after"]["nll"] < found["before"]["nll"]
    assert found["after"]["accuracy_overall"] == found["before"]["accuracy_overall"]
    assert (found["bins"], found["folds"], found["note"]) == (15, 2, None)


def test_each_half_is_judged_with_the_other_s_temperature() -> None:
    """The best temperature of each half by a search over a grid, applied to the other one, by
    hand."""
    logits, labels = sharpened(images=100, seed=1)
    found = calibration(logits, labels)
    half = errors.halves(labels, seed=0)
    grid = np.geomspace(0.5, 10, 4001)
    best = []
    for number in (0, 1):
        mine = np.flatnonzero(half == number)
        rows = np.arange(len(mine))
        scaled = (
            log_softmax(logits[mine].astype(float) / t, axis=1)[rows, labels[mine]].mean()
            for t in grid
        )
        best.append(grid[np.argmax(list(scaled))])
    assert abs(best[0] - best[1]) > 0.1
    assert found["temperatures"] == pytest.approx(best, rel=2e-3)
    by_the_other = (
        logits / np.where(half == 0, found["temperatures"][1], found["temperatures"][0])[:, None]
    )
    assert found["after"]["ece"] == pytest.approx(
        expected_calibration_error(by_the_other, labels, 15), rel=1e-9
    )


def test_the_halves_are_alike_in_every_class() -> None:
    labels = np.random.default_rng(0).integers(0, 9, 301)
    half, other = errors.halves(labels, seed=0), errors.halves(labels, seed=1)
    counts = np.array([np.bincount(labels[half == number], minlength=9) for number in (0, 1)])
    assert np.abs(counts[0] - counts[1]).max() == 1
    assert np.abs(counts.sum(axis=1)).tolist() == [151, 150]
    assert (half != other).any()
    np.testing.assert_array_equal(half, errors.halves(labels, seed=0))
    assert (half != np.arange(301) % 2).any()


def test_bins_hold_their_upper_ends_and_empty_ones_nothing() -> None:
    """Probabilities of exactly 1/2, twice, and of 1: the second of four bins and the last one."""
    logits = np.array([[0, 0], [0, 0], [900, 0]], dtype=np.float16)
    before = calibration(logits, np.array([0, 1, 1]), bins=4)["before"]
    assert before["count"] == [0, 2, 0, 1]
    assert before["confidence"] == [None, 0.5, None, 1.0]
    assert before["accuracy"] == [None, 0.5, None, 0.0]
    assert before["ece"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("logits", "labels", "which"),
    [
        ([[2, 0]], [0], "either half"),
        (
            [[2, 0], [0, 2], [3, 0], [0, 3]],
            [0, 1, 0, 1],
            "either half",
        ),  # all right: the colder the better
        (
            [[2, 0], [0, 2], [3, 0], [0, 3]],
            [1, 0, 1, 0],
            "either half",
        ),  # all wrong: the hotter the better
        ([[0, 0], [0, 0], [0, 0], [0, 0]], [0, 1, 0, 1], "either half"),  # no difference
        ([[1], [2], [3]], [0, 0, 0], "either half"),  # a single class
    ],
)
def test_where_no_temperature_is_best_it_is_1_and_that_is_said(
    logits: list, labels: list, which: str
) -> None:
    found = calibration(np.array(logits, dtype=np.float16), np.array(labels))
    assert found["temperatures"] == [1, 1]
    assert which in found["note"]
    assert found["after"] == found["before"]
    json.dumps(found, allow_nan=False)


def test_one_half_alone_may_have_a_temperature() -> None:
    labels = np.zeros(8, dtype=np.int64)
    half = errors.halves(labels, seed=0)
    logits = np.tile(np.array([[3.0, 0.0]], dtype=np.float16), (8, 1))
    logits[np.flatnonzero(half == 1)[0]] = [0, 1]
    found = calibration(logits, labels)
    assert "one half" in found["note"]
    assert found["temperatures"][0] == 1
    assert found["temperatures"][1] != 1


# --- Identical images -----------------------------------------------------------------------------


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def test_identical_images_are_found_by_every_byte(tmp_path: Path) -> None:
    images = pictures(12)
    images[9] = images[5] = images[1]
    images[7] = images[2]
    images[8] = images[3]
    images[8, 0, 0, 0] ^= 1  # all but the first byte
    images[10] = images[3]
    images[10, -1, -1, -1] ^= 1  # all but the last one
    images[11] = images[0]
    images[11, 32, 5, 1] ^= 1  # one in the middle
    assert identical_images(images) == [[1, 5, 9], [2, 7]]
    np.save(tmp_path / "images.npy", images)
    assert identical_images(np.load(tmp_path / "images.npy", mmap_mode="r")) == [[1, 5, 9], [2, 7]]
    assert identical_images(images[:1]) == []
    same_middle = np.zeros((5, 64, 64, 3), dtype=np.uint8)
    same_middle[[1, 3], 0, 0] = 9
    assert identical_images(same_middle) == [[0, 2, 4], [1, 3]]
    images = pictures(5)
    images[3:] = images[0]
    images[3:, 0, 0, 0] ^= 1  # with the first one's middle, and equal to each other
    images[2] = images[1]
    assert identical_images(images) == [[1, 2], [3, 4]]


def conflicts(
    images: np.ndarray, labels: np.ndarray, rows: np.ndarray, logits: np.ndarray, names: tuple
) -> dict:
    boxes = np.empty((len(images), 4), np.uint8)
    dataset = Dataset(Path(), images, labels, boxes, WNIDS[: len(names)], names, 0, "0" * 64)
    return label_conflicts(dataset, rows, logits)


def test_conflicting_labels_and_what_they_explain() -> None:
    """Rows 0/4, 1/5 and 2/6 are twins with other labels, 3/7 with the same one; 4..9 are tested."""
    images = pictures(10)
    images[4:8] = images[0:4]
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 0, 1, 2], dtype=np.int16)
    rows = np.array([9, 8, 7, 6, 5, 4])
    answers = np.array([0, 1, 1, 1, 1, 1])  # wrong: 9, 7, 6 (by another label), 5 (by the twin's)
    found = conflicts(images, labels, rows, np.eye(3, dtype=np.float16)[answers], NAMES[:3])
    assert found == {
        "pairs": [
            {"rows": [0, 4], "names": [NAMES[0], NAMES[1]], "tested": [False, True]},
            {"rows": [1, 5], "names": [NAMES[1], NAMES[2]], "tested": [False, True]},
            {"rows": [2, 6], "names": [NAMES[2], NAMES[0]], "tested": [False, True]},
        ],
        "found": 3,
        "tested": 3,
        "wrong": 2,
        "answered_as_twin": 1,
        "wrong_in_all": 4,
        "share_of_error": 0.5,
    }
    json.dumps(found, allow_nan=False)


def test_twins_of_classes_that_the_network_does_not_have_count() -> None:
    images = pictures(6)
    images[2], images[5] = images[0], images[4]
    labels, rows, logits = (
        np.array([0, 1, 2, 1, 2, 3]),
        np.array([0, 1]),
        np.eye(2, dtype=np.float16)[[1, 1]],
    )
    found = conflicts(images, labels, rows, logits, NAMES[:4])
    assert [pair["rows"] for pair in found["pairs"]] == [[0, 2], [4, 5]]
    assert [pair["tested"] for pair in found["pairs"]] == [[True, False], [False, False]]
    told = [
        found[name]
        for name in (
            "found",
            "tested",
            "wrong",
            "answered_as_twin",
            "wrong_in_all",
            "share_of_error",
        )
    ]
    assert told == [2, 1, 1, 0, 1, 1.0]
    right = conflicts(images, labels, rows, np.eye(2, dtype=np.float16), NAMES[:4])
    assert (right["wrong"], right["share_of_error"]) == (0, None)


def test_larger_groups_count_every_pair_and_list_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven black images of three classes, and three white ones of two."""
    images = np.zeros((10, 64, 64, 3), dtype=np.uint8)
    images[7:] = 255
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 3, 0, 3])
    answers = np.array([0, 1, 3, 1, 0, 2, 3, 3, 3, 3])
    where = (images, labels, np.arange(10), np.eye(4, dtype=np.float16)[answers], NAMES[:4])
    found = conflicts(*where)
    every = [
        (a, b)
        for a in range(10)
        for b in range(a + 1, 10)
        if labels[a] != labels[b] and (a < 7) == (b < 7)
    ]
    assert [tuple(pair["rows"]) for pair in found["pairs"]] == every
    assert found["found"] == len(every) == 3 * 2 + 3 * 2 + 2 * 2 + 2
    assert [found[name] for name in ("tested", "wrong", "answered_as_twin", "wrong_in_all")] == [
        10,
        5,
        3,
        5,
    ]
    monkeypatch.setattr(errors, "MOST_PAIRS", 4)
    assert conflicts(*where) == found | {"pairs": found["pairs"][:4]}


@pytest.mark.archive
def test_the_twins_of_tiny_imagenet(real_dataset: Dataset) -> None:
    rows = make_split(real_dataset, "official").test
    labels = real_dataset.labels[rows]
    logits = np.eye(200, dtype=np.float16)[labels]
    found = label_conflicts(real_dataset, rows, logits)
    official = [[row < real_dataset.train_count for row in pair["rows"]] for pair in found["pairs"]]
    assert (found["found"], official.count([True, True]), official.count([True, False])) == (
        27,
        20,
        7,
    )
    assert (found["tested"], found["wrong"], found["share_of_error"]) == (7, 0, None)
    assert len(identical_images(real_dataset.images)) == 27  # and none with equal labels


# --- Records --------------------------------------------------------------------------------------


def test_the_best_and_the_worst_are_ten_each_or_half(found: Errors) -> None:
    """Eleven classes have images: the best six and the worst five; with more of them ten each."""
    said = found.to_json()
    accuracies = [[each["top1"] for each in said[name]] for name in ("best", "worst")]
    everything = sorted(each["top1"] for each in found.classes if each["images"])
    assert accuracies == [everything[::-1][:6], everything[:5]]
    assert not {each["index"] for each in said["best"]} & {each["index"] for each in said["worst"]}
    many = replace(found, classes=found.classes[:11] * 3).to_json()
    assert (len(many["best"]), len(many["worst"])) == (10, 10)
    single = replace(found, classes=found.classes[:1]).to_json()
    assert (len(single["best"]), len(single["worst"])) == (1, 0)


def test_of_equal_accuracies_top5_decides(found: Errors) -> None:
    first, second = ({**found.classes[0], "top1": 50.0, "top5": top5} for top5 in (70.0, 80.0))
    said = replace(found, classes=[first, second]).to_json()
    assert (said["best"], said["worst"]) == ([second], [first])


def test_the_record_is_plain_json(found: Errors) -> None:
    said = found.to_json()
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert list(said) == ["best", "worst", "pairs", "calibration", "classes", "macro"]


def test_tables_read_back(found: Errors, tmp_path: Path) -> None:
    paths = found.write_tables(tmp_path / "new" / "tables")
    assert [path.name for path in paths] == ["classes.csv", "confusion.csv"]
    assert sorted(paths[0].parent.iterdir()) == paths
    classes, confusion = (list(csv.reader(path.read_text().splitlines())) for path in paths)
    measures = ["top1", "top5", "precision", "recall", "f1"]
    assert classes[0][:9] == ["index", "wnid", "name", "images", *measures]
    assert len(classes) == CLASSES + 2
    first, mistaken = found.classes[0], found.classes[0]["mistaken_for"]
    assert classes[1][:4] == ["0", WNIDS[0], NAMES[0], str(first["images"])]
    assert [float(cell) for cell in classes[1][4:9]] == [first[name] for name in measures]
    assert classes[1][9:] == [mistaken["wnid"], mistaken["name"], str(mistaken["count"])]
    assert classes[12] == ["11", WNIDS[11], NAMES[11], "0", *[""] * 8]
    assert classes[13][:4] == ["", "", "macro", "600"]
    assert [float(cell) for cell in classes[13][4:9]] == [found.macro[name] for name in measures]
    assert confusion[0] == ["actual", *WNIDS]
    assert [row[0] for row in confusion[1:]] == list(WNIDS)
    np.testing.assert_array_equal(
        np.array([row[1:] for row in confusion[1:]], dtype=int), found.matrix
    )


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "＝1"])
def test_names_are_no_formulas(found: Errors, tmp_path: Path, text: str) -> None:
    foreign = [{**each, "name": text, "wnid": text} for each in found.classes]
    foreign[0]["mistaken_for"] = {"wnid": text, "name": text, "count": 1}
    paths = replace(found, classes=foreign).write_tables(tmp_path)
    for path in paths:
        with open(path, newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert f"'{text}" in cells
        assert text not in cells


def test_any_name_can_be_written(found: Errors, tmp_path: Path) -> None:
    names = ['a "quoted", one', "two\nlines", "lone \udc80 surrogate", "é", "\0"]
    foreign = [{**each, "name": name} for each, name in zip(found.classes, names, strict=False)]
    path = replace(found, classes=foreign, matrix=np.zeros((5, 5))).write_tables(tmp_path)[0]
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [row[2] for row in rows[1:-1]] == [*names[:2], "lone \\udc80 surrogate", *names[3:]]


def test_a_folder_that_cannot_be_is_one_line(found: Errors, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*classes\.csv"):
        found.write_tables(tmp_path / "file")
