"""From a network and test images to counts, and from counts to the numbers that are reported."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from tinylab.exceptions import UserError


@dataclass(frozen=True)
class Evaluation:
    """Counts over all test images, and what follows from them.

    logits: float16 (N, classes), labels: int64 (N,), as they are stored: every number here is computed from the rounded
    logits, so whoever reads them again gets the same result. loss: mean cross-entropy over images, in nats.
    """

    logits: np.ndarray
    labels: np.ndarray
    loss: float
    correct: int
    correct_top5: int

    @property
    def total(self) -> int:
        return len(self.labels)

    @property
    def top1(self) -> float:
        """Percent of images whose highest logit is the true class."""
        return 100 * self.correct / self.total

    def numbers(self) -> dict:
        """What is reported, as plain values."""
        return {
            "test_loss": self.loss,
            "test_top1": self.top1,
            "test_top5": self.top5,
            "test_correct": self.correct,
            "test_total": self.total,
        }

    @property
    def top5(self) -> float:
        """Percent of images whose true class is among the five highest logits (all, with five classes or fewer)."""
        return 100 * self.correct_top5 / self.total


def mirrored(
    forward: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The logits of each image's mirror image."""
    return lambda images: forward(images.flip(2))  # (B, height, width, 3): axis 2 is the width


def with_flip(
    forward: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Flip test-time augmentation: the mean of the logits of each image and its mirror image. Reported apart."""
    return lambda images: (forward(images) + mirrored(forward)(images)) / 2


def compute_logits(
    forward: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits fp32 (N, classes) and labels int64 (N,) of all batches, on the batches' device; nothing waits for it.

    forward: images uint8 (B, 64, 64, 3) -> logits (B, classes). count: N, above 0, the images of all batches.
    """
    logits = labels = None
    done = 0
    with torch.inference_mode():
        for images, batch_labels in batches:
            outputs = forward(images)
            if logits is None:
                # Made at once: small results kept between large temporaries would keep the latters' memory from being
                # given back, several times what the results take.
                logits = outputs.new_empty((count, outputs.shape[1]), dtype=torch.float32)
                labels = batch_labels.new_empty(count)
            logits[done : done + len(images)] = outputs
            labels[done : done + len(images)] = batch_labels
            done += len(images)
    if done != count:
        raise ValueError(f"{done} images in the batches, not {count}")
    return logits, labels


def score(logits: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    """Counts from logits (N, classes) and labels int64 (N,). Equal logits rank by class number, so ties are no luck.

    Raises `UserError` if a logit is not a finite float16 number: the network has diverged.
    """
    stored = logits.half()
    if not torch.isfinite(stored).all():
        raise UserError(
            "the network's outputs are not finite: it has diverged; lower max-learning-rate"
        )
    logits = stored.float()
    classes = logits.shape[1]
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(classes, device=labels.device)[None, :] < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    return Evaluation(
        logits=stored.cpu().numpy(),
        labels=labels.cpu().numpy(),
        loss=F.cross_entropy(logits, labels).item(),
        correct=int((rank == 0).sum()),
        correct_top5=int((rank < 5).sum()),
    )


def per_class(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many images of each class are right, and how many there are: int64 (classes,) each, from predictions."""
    classes = logits.shape[1]
    hit = logits.argmax(axis=1) == labels
    return np.bincount(labels[hit], minlength=classes), np.bincount(labels, minlength=classes)
