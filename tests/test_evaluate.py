"""Counts and losses against plain sorting, and the corners: ties, numbers that are none."""

import numpy as np
import pytest
import torch

from tinylab.exceptions import RecipeFailed
from tinylab.training.evaluate import compute_logits, score, with_flip


def test_scores_against_plain_sorting() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (500, 20)).astype(np.float16).astype(np.float64)
    logits += np.arange(20) * 2**-12  # far smaller than float16 can hold: rounded away again
    labels = rng.integers(0, 20, 500)
    result = score(torch.from_numpy(logits).float(), torch.from_numpy(labels))
    stored = result.logits.astype(np.float64)
    ranking = np.argsort(-stored, axis=1, kind="stable")  # equal logits in the order of classes
    top1, top5 = ((ranking[:, :k] == labels[:, None]).any(axis=1) for k in (1, 5))
    losses = np.log(np.exp(stored).sum(axis=1)) - stored[np.arange(500), labels]
    assert result.numbers() == {
        "test_loss": pytest.approx(losses.mean(), rel=1e-5),
        "test_top1": pytest.approx(100 * top1.mean()),
        "test_top5": pytest.approx(100 * top5.mean()),
        "test_correct": top1.sum(),
        "test_total": 500,
    }
    assert 0 < result.correct < result.correct_top5 < 500
    assert (result.logits.dtype, result.labels.dtype) == (np.float16, np.int64)
    again = score(torch.from_numpy(result.logits).float(), torch.from_numpy(result.labels))
    assert again.numbers() == result.numbers()


def test_ties_rank_by_class_number() -> None:
    """A network that answers nothing at all must not be right by luck, nor by a sort's order."""
    result = score(torch.zeros(12, 12), torch.arange(12))
    assert (result.correct, result.correct_top5) == (1, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e5])
def test_outputs_that_are_not_finite_in_float16_are_refused(value) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    with pytest.raises(RecipeFailed, match=r"not finite.*max-learning-rate"):
        score(logits, torch.zeros(3, dtype=torch.int64))


def test_logits_of_all_batches_in_order_without_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)
    batches = [(torch.full((n, 1), float(n)), torch.full((n,), n)) for n in (2, 3, 1)]
    logits, labels = compute_logits(lambda images: (images * weight).bfloat16(), batches, 6)
    assert logits.flatten().tolist() == labels.tolist() == [2, 2, 3, 3, 3, 1]
    assert (logits.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert not logits.requires_grad
    with pytest.raises(ValueError, match="6 images in the batches, not 7"):
        compute_logits(lambda images: images, batches, 7)


def test_flip_mirrors_left_and_right_and_takes_the_mean() -> None:
    images = torch.zeros(1, 64, 64, 3)
    images[0, 10, 5, 1] = 1  # in the upper left

    def forward(batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([batch[:, :32].sum(), 4 * batch[:, :, :32].sum()])[None]

    assert with_flip(forward)(images).tolist() == [[1.0, 2.0]]
