"""One optimiser step, and all state of a run. Inside `train_step` nothing waits for the device."""

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel

from tinylab.custom import Loss, build_custom, fitting
from tinylab.data.augment import normalise, resize
from tinylab.data.loader import Batch
from tinylab.exceptions import RecipeFailed, UserError
from tinylab.model import build_model
from tinylab.recipe import Recipe
from tinylab.run.environment import Compute
from tinylab.training.average import make_average
from tinylab.training.distributed import ALONE, Ranks, wrap
from tinylab.training.optim import make_optimizer


@dataclass
class TrainState:
    """All state of a run; a checkpoint stores exactly this.

    No generator's state: random draws depend on (seed, epoch, position) alone.
    totals: float32 (4,), of the epoch so far in this process: sum of losses in nats, top-1 hits,
    top-5 hits, images. skipped: int64 (), the epoch's steps that loss scaling skipped.
    """

    model: nn.Module
    network: Callable[[torch.Tensor], torch.Tensor]  # what training calls: compiled or wrapped
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scheduler: OneCycleLR
    scaler: torch.amp.GradScaler
    totals: torch.Tensor
    skipped: torch.Tensor
    epoch: int = 1
    step: int = 0  # optimiser steps done in the epoch
    epoch_learning_rate: float = 0.0  # of the epoch's first step
    epoch_seconds: float = 0.0
    epoch_cpu_seconds: float = 0.0  # of all cores together, without worker processes
    set_up_seconds: float = 0.0
    stops: int = 0  # how often the run was continued
    history: list[dict] = field(default_factory=list)
    run: dict = field(default_factory=dict)  # all that decides the result: whose checkpoint it is
    environment: dict = field(default_factory=dict)  # what the last bits depend on

    @property
    def tested(self) -> nn.Module:
        """The network that is tested and saved: the average if there is one."""
        return self.model if self.average is None else self.average.module

    def next_epoch(self) -> None:
        """Begin the next epoch's counts."""
        self.epoch, self.step = self.epoch + 1, 0
        self.epoch_seconds = self.epoch_cpu_seconds = 0.0
        self.totals.zero_()
        self.skipped.zero_()

    def to_checkpoint(self) -> dict:
        """Return tensors and plain values. The schedule is its step count."""
        saved = {"scheduler_step": self.scheduler.last_epoch}
        for name, value in vars(self).items():
            if name not in ("network", "scheduler"):
                saved[name] = value.state_dict() if hasattr(value, "state_dict") else value
        return saved

    def load_checkpoint(self, saved: dict) -> None:
        """Put everything back but `run` and `environment`, which are those of now."""
        # Older checkpoints hold a row of totals for each process, count three kinds of skipped
        # steps, and no processor time.
        self.totals.copy_(saved["totals"].reshape(-1, 4).sum(dim=0))
        self.skipped.copy_(saved["skipped"] if "skipped" in saved else saved["skips"][0])
        saved = {"epoch_cpu_seconds": math.nan} | saved
        self.scheduler.last_epoch = saved["scheduler_step"]
        for name, value in vars(self).items():
            if isinstance(value, int | float | list):
                setattr(self, name, saved[name])
            elif name in ("model", "average", "optimizer", "scaler") and value is not None:
                value.load_state_dict(saved[name])

    def require_finite(self, weights: bool = False) -> None:
        """Wait for the loss; raise `RecipeFailed` if it, or a weight if asked, is not finite."""
        scaled = self.scaler.is_enabled()
        finite = self.totals[0].isfinite() and not (scaled and self.scaler.get_scale() < 1)
        if weights and finite:
            both = (self.model.state_dict(), self.tested.state_dict())
            finite = all_finite([tensor for state in both for tensor in state.values()])
        if not finite:
            raise RecipeFailed(
                f"loss or weights are not finite in epoch {self.epoch}, up to "
                f"step {self.step}: the run has diverged; what is saved is finite; start another "
                f"run with a lower max-learning-rate{' or --precision fp32' if scaled else ''}"
            )


def require_batches(recipe: Recipe, images: int, ranks: Ranks = ALONE) -> None:
    """Raise `UserError` if a batch has more images than there are, or too few for the processes."""
    if recipe.batch_size > images:
        few = f"the {images} training images of this split"
        raise UserError(f"batch-size {recipe.batch_size} is more than {few}; lower it")
    smallest = (0 if recipe.drop_last else images % recipe.batch_size) or recipe.batch_size
    if smallest < ranks.size:
        few = f"an epoch's smallest batch has {smallest} images"
        raise UserError(f"{ranks.size} processes, but {few}: choose another batch-size")


def new_state(
    recipe: Recipe, classes: int, seed: int, steps_per_epoch: int, compute: Compute,
    ranks: Ranks = ALONE, compiled: bool = False, make: Callable[[int], nn.Module] | None = None,
    init: dict[str, torch.Tensor] | None = None,
) -> TrainState:  # fmt: skip
    """Return the state before the first step: weights from `seed`, schedule over the whole run.

    make: builds another network for so many classes. init: weights that replace those of their name
    and shape.
    """
    model = build_custom(make, classes, seed) if make else build_model(recipe, classes, seed)
    if init:
        model.load_state_dict(fitting(init, model), strict=False)
    model = model.to(compute.device)
    average, scaler = make_average(model, recipe), compute.grad_scaler()
    optimizer, scheduler = make_optimizer(model, recipe, recipe.epochs * steps_per_epoch)
    if compiled:
        torch.compiler.reset()  # an earlier run's graphs would count against the compiler's limit
    # One graph per shape: a graph for any shape is slower, and a run has few.
    network = torch.compile(model, dynamic=False) if compiled else wrap(model, ranks)
    totals = torch.zeros(4, device=compute.device)
    skipped = torch.zeros((), dtype=torch.int64, device=compute.device)
    return TrainState(model, network, average, optimizer, scheduler, scaler, totals, skipped)


def train_step(
    state: TrainState, recipe: Recipe, compute: Compute, batch: Batch, ranks: Ranks = ALONE,
    loss: Loss | None = None,
) -> None:  # fmt: skip
    """Do one optimiser update, one step of the schedule and of the average; add to the totals.

    The gradient is that of the mean loss over the whole batch, however it is cut into pieces.
    loss: in place of the cross-entropy.
    """
    # ---- forward and backward, piece by piece ----
    resolution = recipe.resolution_at(state.epoch)
    state.optimizer.zero_grad()
    pieces = pieces_of(batch, recipe.micro_batch, ranks.size)
    for number, piece in enumerate(pieces, start=1):
        waits = ranks.size > 1 and number < len(pieces)  # gradients are exchanged once a batch
        with state.network.no_sync() if waits else contextlib.nullcontext():
            with compute.autocast():
                logits = state.network(normalise(resize(piece.images, resolution), recipe))
            logits = logits.float()
            nats = batch_loss(logits, piece, recipe.label_smoothing, loss)
            # Gradients of several processes are averaged: `size` makes the average a sum again.
            state.scaler.scale(nats * (ranks.size / batch.size)).backward()
        count(state, nats.detach(), logits.detach(), piece)

    # ---- update ----
    if state.scaler.is_enabled():
        state.skipped += ~all_finite(each.grad for each in state.model.parameters())
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.average is not None:
        state.average.update_parameters(state.model)
    state.scheduler.step()
    state.step += 1


def pieces_of(batch: Batch, micro_batch: int | None, processes: int) -> list[Batch]:
    """Cut the batch into pieces of at most `micro_batch` images, equally many in every process."""
    largest = math.ceil(batch.size / processes)
    pieces = math.ceil(largest / (micro_batch or largest))
    tensors = (batch.images, batch.labels, batch.partners)
    cut = [[None] * pieces if tensor is None else tensor.tensor_split(pieces) for tensor in tensors]
    return [Batch(*parts, batch.share, batch.size) for parts in zip(*cut, strict=True)]


def batch_loss(
    logits: torch.Tensor, batch: Batch, label_smoothing: float, loss: Loss | None = None
) -> torch.Tensor:
    """Return the sum over images of the cross-entropy, in nats; mixed images have two labels.

    loss: another one, of logits (B, classes) and labels (B,), whose mean over the images it is.
    """
    if loss is None:
        loss = partial(F.cross_entropy, reduction="sum", label_smoothing=label_smoothing)
    else:
        mean, loss = loss, lambda *both: len(batch.labels) * mean(*both)
    whole = loss(logits, batch.labels)
    if batch.partners is None:
        return whole
    return batch.share * whole + (1 - batch.share) * loss(logits, batch.partners)


def count(state: TrainState, loss: torch.Tensor, logits: torch.Tensor, batch: Batch) -> None:
    """Add a piece to the totals. A hit on a mixed image is one on the label that weighs more."""
    labels = batch.labels if batch.partners is None or batch.share >= 0.5 else batch.partners
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    images = torch.full_like(loss, len(labels))  # a number's copy to a GPU would wait for it
    counted = torch.stack([loss, hits[:, 0].sum(), hits.sum(), images])
    if state.scaler.is_enabled():  # a step that overflowed is skipped, and so is not counted
        counted = counted.masked_fill(~torch.isfinite(loss), 0)
    state.totals += counted


@torch.no_grad()
def all_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return whether every value of the floating-point tensors is finite: bool () on the device."""
    floating = [each for each in tensors if each.is_floating_point()]
    # Unlike a sum of squares the largest absolute value never overflows by itself.
    return torch.isfinite(torch.stack(torch._foreach_norm(floating, float("inf")))).all()
