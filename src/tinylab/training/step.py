"""One optimiser step, and everything that changes while training.

`train_step` is the step; inside it nothing waits for the device. `TrainState` is what a checkpoint holds.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel

from tinylab.data.augment import normalise, resize
from tinylab.data.loader import Batch, evaluation_batch_size
from tinylab.exceptions import RecipeFailed
from tinylab.model import build_model
from tinylab.recipe import SIZE, Recipe
from tinylab.run.environment import Compute
from tinylab.training.average import make_average, reestimate_batch_norm
from tinylab.training.distributed import ALONE, World, any_rank, share, synchronise_batch_norm, wrap
from tinylab.training.finite import MOST_IN_A_ROW, Statistics, all_finite, guarded_step
from tinylab.training.optim import make_optimizer
from tinylab.training.stop import Abandoned


@dataclass
class TrainState:
    """Everything that changes while training, and so everything a checkpoint holds. Randomness is not among it."""

    model: nn.Module
    """The network whose weights the optimiser moves."""
    network: Callable[[torch.Tensor], torch.Tensor]
    """What training calls: the same network, compiled or with its gradients averaged over processes if so asked."""
    average: AveragedModel | None
    """The running average of the weights, if the recipe has one."""
    optimizer: torch.optim.Optimizer
    scheduler: OneCycleLR
    scaler: torch.amp.GradScaler
    totals: torch.Tensor
    """float32 (4,), on the device, over the epoch so far, of this process's images: sum of losses, top-1 hits, top-5
    hits, images. Losses that are not finite, and their images, are left out."""
    skips: torch.Tensor
    """int64 (3,), on the device: steps skipped in the epoch so far; in a row until now; the longest such row."""
    statistics: Statistics
    """The network's batch-norm statistics before the step."""
    world: World = ALONE
    epoch: int = 1
    """The epoch being trained, from 1."""
    step: int = 0
    """Optimiser steps done in it."""
    epoch_learning_rate: float = 0.0
    """Learning rate of its first step."""
    epoch_seconds: float = 0.0
    epoch_cpu_seconds: float = 0.0
    """Of all cores together, without worker processes."""
    set_up_seconds: float = 0.0
    stops: int = 0
    """How often the run was continued after a stop."""
    history: list[dict] = field(default_factory=list)
    run: dict = field(default_factory=dict)
    """What decides the result, recipe and all: a checkpoint says whose it is."""
    environment: dict = field(default_factory=dict)
    """What the last bits depend on."""

    @property
    def tested(self) -> nn.Module:
        """The network that is tested and saved: the average if there is one."""
        return self.model if self.average is None else self.average.module

    def next_epoch(self) -> None:
        self.epoch, self.step, self.epoch_seconds, self.epoch_cpu_seconds = (
            self.epoch + 1,
            0,
            0.0,
            0.0,
        )
        self.totals.zero_()
        self.skips[0] = 0

    def to_checkpoint(self) -> dict:
        """Tensors and plain values. The schedule is its step count: everything else follows from the recipe."""
        numbers = (
            "epoch", "step", "epoch_learning_rate", "epoch_seconds", "epoch_cpu_seconds", "set_up_seconds", "stops",
            "history",
        )  # fmt: skip
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler_step": self.scheduler.last_epoch,
            "scaler": self.scaler.state_dict(),
            "totals": self.totals,
            "skips": self.skips,
            "run": self.run,
            "environment": self.environment,
            **{name: getattr(self, name) for name in numbers},
        }

    def load_checkpoint(self, saved: dict) -> None:
        """Puts everything back; the optimiser last: a schedule touched later would overwrite its learning rate."""
        saved = {"epoch_cpu_seconds": math.nan} | saved  # an older version did not count them
        saved = {name: value for name, value in saved.items() if name not in ("run", "environment")}
        self.model.load_state_dict(saved.pop("model"))
        average = saved.pop("average", None)
        if self.average is not None:
            self.average.load_state_dict(average)
        self.scheduler.last_epoch = saved.pop("scheduler_step")
        self.scaler.load_state_dict(saved.pop("scaler"))
        self.totals.copy_(saved.pop("totals"))
        self.skips.copy_(saved.pop("skips"))
        if int(self.skips[2]) >= MOST_IN_A_ROW:
            self.skips[1:] = 0  # it was stopped for them; whoever starts it again wants another try
        self.optimizer.load_state_dict(saved.pop("optimizer"))
        for name, value in saved.items():
            setattr(self, name, value)

    def trouble(self) -> RecipeFailed | None:
        """What is wrong with the run, if its numbers are no longer finite. Waits for the device."""
        if int(self.skips[2]) >= MOST_IN_A_ROW:
            return RecipeFailed(
                f"loss or gradients are not finite in {MOST_IN_A_ROW} steps in a row, up to epoch {self.epoch}, step "
                f"{self.step}: the run has diverged; what is saved is finite; start another run with a lower "
                f"max-learning-rate{' or --precision fp32' if self.scaler.is_enabled() else ''}"
            )
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            return RecipeFailed(
                f"the gradients are not finite in epoch {self.epoch}, step {self.step}, however small the loss is "
                "scaled: start another run with --precision fp32"
            )
        return None


def new_state(
    recipe: Recipe,
    classes: int,
    seed: int,
    steps_per_epoch: int,
    compute: Compute,
    world: World = ALONE,
    compiled: bool = False,
) -> TrainState:
    """The state before the first step: weights from `seed`, schedule over all steps of the run."""
    if compiled:
        torch.compiler.reset()  # the graphs of an earlier run in this process would count against the limit
    model = build_model(recipe, classes, seed)
    average = make_average(model, recipe)
    model = synchronise_batch_norm(model, world).to(compute.device)
    if average is not None:
        average.module = synchronise_batch_norm(average.module, world).to(compute.device)
    fused = compute.device.type == "cuda"
    optimizer, scheduler = make_optimizer(model, recipe, recipe.epochs * steps_per_epoch, fused)
    return TrainState(
        model=model,
        # One graph per shape: a graph for any shape is slower, and a run has few.
        network=torch.compile(model, dynamic=False) if compiled else wrap(model, world),
        average=average,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=compute.grad_scaler(),
        totals=torch.zeros(4, device=compute.device),
        skips=torch.zeros(3, dtype=torch.int64, device=compute.device),
        statistics=Statistics(model),
        world=world,
    )


def train_step(state: TrainState, recipe: Recipe, compute: Compute, batch: Batch) -> None:
    """One optimiser update, one step of the schedule and of the average; adds to the epoch's totals.

    If loss or gradients are not finite, weights, momenta and batch-norm statistics stay as they were; schedule and
    average go on. Raises `Abandoned` if the run is asked to stop meanwhile; all of the state is as it was then.
    """
    _update(state, recipe, compute, batch, recipe.resolution_at(state.epoch))
    state.scheduler.step()
    state.step += 1


def _update(
    state: TrainState, recipe: Recipe, compute: Compute, batch: Batch, resolution: int
) -> None:
    """Gradients of the mean loss over the whole batch, however it is cut, and the weights moved by them."""
    state.statistics.keep()
    totals = state.totals.clone()
    try:
        losses = _gradients(state, recipe, compute, batch, resolution)
    except Abandoned:
        always = torch.ones((), dtype=torch.bool, device=compute.device)
        state.statistics.put_back(always, state.statistics.values())
        state.totals.copy_(totals)
        state.optimizer.zero_grad(set_to_none=True)
        raise
    gradients = [
        parameter.grad for parameter in state.model.parameters() if parameter.grad is not None
    ]
    statistics = state.statistics.values()
    bad = any_rank(state.world, ~all_finite([*gradients, *losses, *statistics]))
    guarded_step(state.optimizer, state.scaler, bad)
    state.statistics.put_back(bad, statistics)
    _count_skip(state.skips, bad)
    if state.average is not None:
        state.average.update_parameters(state.model)


def _gradients(
    state: TrainState, recipe: Recipe, compute: Compute, batch: Batch, resolution: int
) -> list[torch.Tensor]:
    """Leaves the gradients in the parameters; returns the sum of losses (), in nats, of each piece of the batch."""
    state.optimizer.zero_grad(set_to_none=True)
    parts, losses = list(_parts(batch, recipe.micro_batch, state.world)), []
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with (
            contextlib.nullcontext() if last or not state.world.several else state.network.no_sync()
        ):
            with compute.autocast():
                logits = state.network(normalise(resize(part.images, resolution), recipe))
            logits = logits.float()
            loss = _loss(logits, part, recipe.label_smoothing)
            # Gradients of several processes are averaged, not added: `size` makes the average a sum again.
            state.scaler.scale(loss * (state.world.size / batch.size)).backward()
        losses.append(loss.detach())
        _count(state.totals, loss.detach(), logits.detach(), part)
    return losses


def _parts(batch: Batch, micro_batch: int | None, world: World) -> Iterator[Batch]:
    """The batch in pieces of at most `micro_batch` images; as many in every process, whose batch norms wait for
    each other."""
    largest = math.ceil(batch.size / world.size)
    pieces = 1 if micro_batch is None else math.ceil(largest / micro_batch)
    if pieces == 1:
        yield batch
        return
    tensors = (batch.images, batch.labels, batch.partners)
    cut = [[None] * pieces if tensor is None else tensor.tensor_split(pieces) for tensor in tensors]
    for images, labels, partners in zip(*cut, strict=True):
        yield Batch(images, labels, partners, batch.share, batch.size)


def _loss(logits: torch.Tensor, batch: Batch, label_smoothing: float) -> torch.Tensor:
    """Sum over images of the cross-entropy, in nats; of a mixed batch, its two labels' by their weights."""

    def against(labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)

    if batch.partners is None:
        return against(batch.labels)
    return batch.share * against(batch.labels) + (1 - batch.share) * against(batch.partners)


@torch.no_grad()
def _count(totals: torch.Tensor, loss: torch.Tensor, logits: torch.Tensor, batch: Batch) -> None:
    """Adds to the totals, if the loss is finite. A hit on a mixed image is a hit on the label that weighs more."""
    labels = batch.labels if batch.partners is None or batch.share >= 0.5 else batch.partners
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    # Filled, not made from a number: copying that to a GPU would wait for it.
    images = torch.full_like(loss, len(labels))
    counted = torch.stack([loss, hits[:, 0].sum(), hits.sum(), images])
    totals += counted.masked_fill(~torch.isfinite(loss), 0)


@torch.no_grad()
def _count_skip(skips: torch.Tensor, bad: torch.Tensor) -> None:
    in_row = (skips[1] + 1).masked_fill(~bad, 0)
    skips.copy_(torch.stack([skips[0] + bad, in_row, torch.maximum(skips[2], in_row)]))


def inference(
    model: nn.Module, recipe: Recipe, compute: Compute
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model, put into eval mode, as a function from images uint8 (B, 64, 64, 3) to logits fp32 (B, classes)."""
    model.eval()

    def forward(images: torch.Tensor) -> torch.Tensor:
        with compute.autocast():
            return model(normalise(resize(images, recipe.test_resolution), recipe)).float()

    return forward


@contextlib.contextmanager
def rehearsal(state: TrainState) -> Iterator[None]:
    """What happens inside leaves the state as it was, to the last bit."""
    saved = copy.deepcopy(state.to_checkpoint())
    state.model.train()
    try:
        yield
    finally:
        state.optimizer.zero_grad(set_to_none=True)
        state.load_checkpoint(saved)


def warm_up(
    state: TrainState, recipe: Recipe, compute: Compute, train_images: int, test_images: int
) -> None:
    """A step and a test of every shape the run will have, on made-up images, before the clock starts: compilation, the
    choice of convolution algorithms, the first allocation of memory. The state is as before afterwards."""
    sizes, largest = (
        _batch_sizes(recipe, train_images),
        evaluation_batch_size(compute.device, recipe.micro_batch),
    )
    with rehearsal(state):
        for resolution in _resolutions(recipe):
            for size in sizes:
                for _ in range(
                    2
                ):  # with the second step come kernels that the first, without momentum, has not met
                    _update(
                        state, recipe, compute, _made_up(size, compute, state.world), resolution
                    )
        if state.average is not None:
            made_up = _made_up(
                min(recipe.batch_size, largest, train_images), compute, state.world
            ).images
            with compute.autocast():
                reestimate_batch_norm(
                    state.tested, [normalise(resize(made_up, recipe.test_resolution), recipe)]
                )
        forward = inference(state.tested, recipe, compute)
        with torch.inference_mode():
            for size in {min(largest, test_images), test_images % largest} - {0}:
                forward(_made_up(size, compute, ALONE).images)
        compute.synchronise()


def _resolutions(recipe: Recipe) -> list[int]:
    return list(dict.fromkeys(recipe.resolution_at(epoch) for epoch in range(1, recipe.epochs + 1)))


def _batch_sizes(recipe: Recipe, train_images: int) -> set[int]:
    """Images per step, as they occur: the recipe's, and what is left over for the last step of an epoch."""
    left = 0 if recipe.drop_last else train_images % recipe.batch_size
    return {recipe.batch_size, left} - {0}


def shapes(recipe: Recipe, train_images: int) -> int:
    """How many shapes of batches, or of pieces of two sizes if they are cut, the run's training has at most; a
    compiled network has a graph for each."""
    cut = recipe.micro_batch is not None
    return len(_resolutions(recipe)) * len(_batch_sizes(recipe, train_images)) * (2 if cut else 1)


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what the error says; on a CPU torch has no type for it."""
    said = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "ALLOC_FAILED",
        "could not create a primitive",
    )
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in said))


def seconds_per_image(state: TrainState, recipe: Recipe, compute: Compute) -> float:
    """Seconds of training per image at 64 x 64 pixels, measured in one step on at most 32 made-up images; not compiled,
    as that would be for a shape which the run may not have."""
    network = state.network
    if not state.world.several:
        state.network = state.model
    batch = _made_up(min(max(32, state.world.size), recipe.batch_size), compute, state.world)
    with rehearsal(state):
        for _ in range(2):  # the first one is slower
            started = time.perf_counter()
            _update(state, recipe, compute, batch, SIZE)
            compute.synchronise()
            seconds = time.perf_counter() - started
    state.network = network
    return seconds / batch.size


def relative_cost(recipe: Recipe, epoch: int) -> float:
    """What an image costs in that epoch, measured by one of 64 x 64 pixels: the network's arithmetic goes by area."""
    return (recipe.resolution_at(epoch) / SIZE) ** 2


def _made_up(images: int, compute: Compute, world: World) -> Batch:
    """This process's share of a batch of made-up images, all with label 0. No generator is touched."""
    mine = len(share(images, world))
    pixels = (
        torch.arange(mine * SIZE * SIZE * 3, device=compute.device).remainder(251).to(torch.uint8)
    )
    labels = torch.zeros(mine, dtype=torch.int64, device=compute.device)
    return Batch(pixels.view(mine, SIZE, SIZE, 3), labels, total=images)
