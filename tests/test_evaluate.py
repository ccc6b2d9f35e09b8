"""Counts and losses against plain sorting, and the corners: ties, few classes, numbers that are none."""

import numpy as np
import pytest
import torch

from tinylab.exceptions import UserError
from tinylab.training.evaluate import compute_logits, per_class, score, with_flip


def test_scores_against_plain_sorting() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (500, 20)).astype(np.float16).astype(np.float64)
    logits += np.arange(20) * 2**-12  # far smaller than float16 can hold: rounded away again
    labels = rng.integers(0, 20, 500)
    result = score(torch.from_numpy(logits).float(), torch.from_numpy(labels))

    stored = result.logits.astype(np.float64)
    ranking = np.argsort(
        -stored, axis=1, kind="stable"
    )  # equal logits in the order of their classes
    top1 = ranking[:, 0] == labels
    top5 = (ranking[:, :5] == labels[:, None]).any(axis=1)
    assert (result.correct, result.correct_top5, result.total) == (top1.sum(), top5.sum(), 500)
    assert result.top1 == pytest.approx(100 * top1.mean())
    assert result.top5 == pytest.approx(100 * top5.mean())
    negative_log_likelihoods = np.log(np.exp(stored).sum(axis=1)) - stored[np.arange(500), labels]
    assert result.loss == pytest.approx(negative_log_likelihoods.mean(), rel=1e-5)
    assert 0 < result.correct < result.correct_top5 < 500


def test_stored_logits_give_the_same_numbers_again() -> None:
    logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)) * 5
    labels = torch.arange(200) % 10
    first = score(logits, labels)
    assert first.logits.dtype == np.float16
    assert first.labels.dtype == np.int64
    again = score(torch.from_numpy(first.logits).float(), torch.from_numpy(first.labels))
    assert again.numbers() == first.numbers()


def test_the_mean_loss_is_over_images_not_batches() -> None:
    """The published run divided a sum of batch means by the number of images."""
    batches = [
        (torch.zeros(size, 64, 64, 3), torch.zeros(size, dtype=torch.int64)) for size in (3, 1)
    ]
    logits = {3: torch.tensor([[2.0, 0.0]] * 3), 1: torch.tensor([[0.0, 2.0]])}
    result = score(*compute_logits(lambda images: logits[len(images)], batches, 4))
    losses = [np.log(1 + np.exp(-2))] * 3 + [np.log(1 + np.exp(2))]
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert (result.correct, result.total) == (3, 4)


def test_reported_numbers_have_their_names() -> None:
    result = score(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    expected = {
        "test_top1": 75.0,
        "test_top5": 100.0,
        "test_correct": 3,
        "test_total": 4,
        "test_loss": result.loss,
    }
    assert result.numbers() == expected


def test_ties_rank_by_class_number() -> None:
    """A network that answers nothing at all must not be right by luck, nor by the order of a sort."""
    logits = torch.zeros(12, 12)
    result = score(logits, torch.arange(12))
    assert (result.correct, result.correct_top5) == (1, 5)
    correct, _ = per_class(result.logits, result.labels)
    assert correct.tolist() == [1] + [0] * 11


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_with_five_classes_or_fewer_top5_is_everything(classes: int) -> None:
    logits = torch.randn(20, classes, generator=torch.Generator().manual_seed(0))
    assert score(logits, torch.arange(20) % classes).top5 == 100


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e5])
def test_outputs_that_are_not_finite_in_float16_are_refused(value: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    with pytest.raises(UserError, match=r"not finite.*max-learning-rate"):
        score(logits, torch.zeros(3, dtype=torch.int64))


def test_logits_of_all_batches_in_order_without_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)
    batches = [
        (torch.full((size, 1), float(size)), torch.full((size,), size)) for size in (2, 3, 1)
    ]
    logits, labels = compute_logits(lambda images: (images * weight).bfloat16(), batches, 6)
    assert logits.flatten().tolist() == labels.tolist() == [2, 2, 3, 3, 3, 1]
    assert (logits.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert not logits.requires_grad
    with pytest.raises(ValueError, match="6 images in the batches, not 7"):
        compute_logits(lambda images: images, batches, 7)


def test_flip_mirrors_left_and_right_and_takes_the_mean() -> None:
    images = torch.zeros(1, 64, 64, 3)
    images[0, 10, 5, 1] = 1

    def forward(batch: torch.Tensor) -> torch.Tensor:
        """Logits that say where the one bright pixel is: top, left, first channel."""
        sides = batch[:, :32].sum(), batch[:, :, :32].sum(), batch[..., 0].sum()
        return torch.stack(sides)[None] * torch.tensor([1.0, 4.0, 1.0])

    assert with_flip(forward)(images).tolist() == [[1.0, 2.0, 0.0]]


def test_counts_per_class() -> None:
    logits = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0]], dtype=np.float16)
    correct, total = per_class(logits, np.array([0, 1, 0, 0]))
    assert correct.tolist() == [2, 1, 0]
    assert total.tolist() == [3, 1, 0]
