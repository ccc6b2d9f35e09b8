"""From a network and test images to logits, and from logits to the numbers that are reported."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tinylab.data.augment import normalise, resize
from tinylab.data.dataset import Dataset
from tinylab.data.loader import Images, evaluation_batch_size, evaluation_batches, share
from tinylab.exceptions import RecipeFailed
from tinylab.recipe import Recipe
from tinylab.run.environment import Compute
from tinylab.training.distributed import ALONE, Ranks
from tinylab.training.progress import watched

# From images uint8 (B, 64, 64, 3) to logits fp32 (B, classes).
Forward = Callable[[torch.Tensor], torch.Tensor]


def make_forward(network: nn.Module, recipe: Recipe, compute: Compute) -> Forward:
    """Return the network, put in eval mode, from images to logits."""
    network.eval()

    def forward(images: torch.Tensor) -> torch.Tensor:
        with compute.autocast():
            return network(normalise(resize(images, recipe.test_resolution), recipe)).float()

    return forward


def mirrored(forward: Forward) -> Forward:
    """Return the logits of each image's mirror image."""
    return lambda images: forward(images.flip(2))  # (B, height, width, 3)


def with_flip(forward: Forward) -> Forward:
    """Return the mean of the logits of each image and its mirror image."""
    return lambda images: (forward(images) + mirrored(forward)(images)) / 2


def test_logits(
    network: nn.Module, dataset: Dataset, rows: np.ndarray, recipe: Recipe, compute: Compute, *,
    view: Callable[[Forward], Forward] | None = None, images: Images | None = None,
    ranks: Ranks = ALONE, watch: Callable = watched, title: str = "test",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return logits fp32 (N, classes) and labels int64 (N,) of the images `rows`.

    Each of several processes tests its share of the batches, and all of them get everything.
    view: `mirrored` or `with_flip`. watch: wraps the batches, for a bar.
    """
    size = evaluation_batch_size(compute.device, recipe.micro_batch)
    forward = make_forward(network, recipe, compute)
    forward = view(forward) if view else forward
    mine = share(math.ceil(len(rows) / size), ranks.rank, ranks.size)
    part = rows[mine.start * size : mine.stop * size]
    batches = evaluation_batches(dataset, part, compute.device, size, images)
    batches = watch(batches, title, len(mine))
    parts = ranks.gather(compute_logits(forward, batches, len(part)) if len(mine) else ())
    both = zip(*filter(None, parts), strict=True)
    return tuple(torch.cat([each.to(compute.device) for each in one]) for one in both)


def compute_logits(
    forward: Forward, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits fp32 (count, classes) and labels int64 (count,) of all batches, in order."""
    done = 0
    with torch.inference_mode():
        for images, own in batches:
            outputs, end = forward(images), done + len(images)
            if done == 0:  # at once: small results between large temporaries would hold memory
                logits = outputs.new_empty((count, outputs.shape[1]), dtype=torch.float32)
                labels = own.new_empty(count)
            logits[done:end], labels[done:end], done = outputs, own, end
    if done != count:
        raise ValueError(f"{done} images in the batches, not {count}")
    return logits, labels


@dataclass(frozen=True)
class Evaluation:
    """Counts over all test images, from the logits as they are stored, rounded to float16."""

    logits: np.ndarray  # float16 (N, classes)
    labels: np.ndarray  # int64 (N,)
    loss: float  # nats per image
    correct: int
    correct_top5: int

    def numbers(self) -> dict:
        """Return what metrics.jsonl holds."""
        total = len(self.labels)
        return {
            "test_loss": self.loss,
            "test_top1": 100 * self.correct / total,
            "test_top5": 100 * self.correct_top5 / total,
            "test_correct": self.correct,
            "test_total": total,
        }


def score(logits: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    """Count hits in logits (N, classes) with labels int64 (N,). Equal logits rank by class number.

    Raise `RecipeFailed` if a logit is not a finite float16 number.
    """
    stored = logits.half()
    if not torch.isfinite(stored).all():
        raise RecipeFailed("the network's outputs are not finite: lower max-learning-rate")
    logits = stored.float()
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=labels.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    correct, correct_top5 = int((rank == 0).sum()), int((rank < 5).sum())
    loss = F.cross_entropy(logits, labels).item()
    return Evaluation(stored.cpu().numpy(), labels.cpu().numpy(), loss, correct, correct_top5)
