"""From a network and test images to logits, and from logits to the numbers that are reported."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tinylab.data.dataset import Dataset
from tinylab.data.loader import Images, evaluation_batch_size, evaluation_batches, share
from tinylab.exceptions import RecipeFailed
from tinylab.recipe import Recipe
from tinylab.run.environment import Compute
from tinylab.training.distributed import ALONE, Ranks
from tinylab.training.progress import watched
from tinylab.training.step import make_forward

Forward = Callable[[torch.Tensor], torch.Tensor]
"""From images uint8 (B, 64, 64, 3) to logits fp32 (B, classes)."""


@dataclass(frozen=True)
class Evaluation:
    """Counts over all test images.

    logits: float16 (N, classes), labels: int64 (N,), as they are stored; every number comes from
    the rounded logits, so that it can be had again from the file. loss: nats per image.
    """

    logits: np.ndarray
    labels: np.ndarray
    loss: float
    correct: int
    correct_top5: int

    @property
    def top1(self) -> float:
        """Percent of images whose highest logit is the true class."""
        return 100 * self.correct / len(self.labels)

    @property
    def top5(self) -> float:
        """Percent of images whose true class is among the five highest logits."""
        return 100 * self.correct_top5 / len(self.labels)

    def numbers(self) -> dict:
        """Return what metrics.jsonl holds."""
        return {
            "test_loss": self.loss,
            "test_top1": self.top1,
            "test_top5": self.top5,
            "test_correct": self.correct,
            "test_total": len(self.labels),
        }


def mirrored(forward: Forward) -> Forward:
    """Return the logits of each image's mirror image."""
    return lambda images: forward(images.flip(2))  # (B, height, width, 3)


def with_flip(forward: Forward) -> Forward:
    """Return the mean of the logits of each image and its mirror image."""
    return lambda images: (forward(images) + mirrored(forward)(images)) / 2


def test_logits(
    network: nn.Module,
    dataset: Dataset,
    rows: np.ndarray,
    recipe: Recipe,
    compute: Compute,
    *,
    view: Callable[[Forward], Forward] | None = None,
    images: Images | None = None,
    ranks: Ranks = ALONE,
    watch: Callable = watched,
    title: str = "test",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits fp32 (N, classes) and labels int64 (N,) of the images `rows`.

    Each of several processes tests its share of the batches, and all of them get everything.
    view: `mirrored` or `with_flip`. watch: wraps the batches, for a bar.
    """
    size = evaluation_batch_size(compute.device, recipe.micro_batch)
    forward = make_forward(network, recipe, compute)
    mine = share(-(-len(rows) // size), ranks.rank, ranks.size)
    part = rows[mine.start * size : mine.stop * size]
    batches = evaluation_batches(dataset, part, compute.device, size, images)
    batches = watch(batches, title, len(mine))
    own = (
        compute_logits(view(forward) if view else forward, batches, len(part)) if len(mine) else ()
    )
    parts = [each for each in ranks.gather(own) if each]
    logits, labels = (torch.cat([each[i].to(compute.device) for each in parts]) for i in (0, 1))
    return logits, labels


test_logits.__test__ = False  # pytest takes the name for a test's


def compute_logits(
    forward: Forward, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits fp32 (N, classes) and labels int64 (N,) of all batches, on their device.

    count: N, the images of all batches. Nothing waits for the device.
    """
    logits = labels = None
    done = 0
    with torch.inference_mode():
        for images, batch_labels in batches:
            outputs = forward(images)
            if logits is None:
                # Made at once: small results kept between large temporaries would keep the
                # latter's memory from being given back.
                logits = outputs.new_empty((count, outputs.shape[1]), dtype=torch.float32)
                labels = batch_labels.new_empty(count)
            logits[done : done + len(images)] = outputs
            labels[done : done + len(images)] = batch_labels
            done += len(images)
    if done != count:
        raise ValueError(f"{done} images in the batches, not {count}")
    return logits, labels


def score(logits: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    """Count hits in logits (N, classes) with labels int64 (N,). Equal logits rank by class number.

    Raise `RecipeFailed` if a logit is not a finite float16 number.
    """
    stored = logits.half()
    if not torch.isfinite(stored).all():
        raise RecipeFailed("the network's outputs are not finite: lower max-learning-rate")
    logits = stored.float()
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=labels.device)[None, :] < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    return Evaluation(
        logits=stored.cpu().numpy(),
        labels=labels.cpu().numpy(),
        loss=F.cross_entropy(logits, labels).item(),
        correct=int((rank == 0).sum()),
        correct_top5=int((rank < 5).sum()),
    )


def per_class(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hits and the images of each class: int64 (classes,) each."""
    classes = logits.shape[1]
    hit = logits.argmax(axis=1) == labels
    return np.bincount(labels[hit], minlength=classes), np.bincount(labels, minlength=classes)
