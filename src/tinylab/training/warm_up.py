"""What happens around the steps: a rehearsal before the clock starts, and too little memory."""

import contextlib
import copy
from collections.abc import Iterator

import torch

from tinylab.custom import Loss
from tinylab.data.loader import Batch, evaluation_batch_size
from tinylab.exceptions import RecipeFailed, UserError
from tinylab.recipe import SIZE, Recipe
from tinylab.run.environment import Compute
from tinylab.training.average import reestimate_batch_norm
from tinylab.training.evaluate import make_forward
from tinylab.training.step import TrainState, train_step


@contextlib.contextmanager
def rehearsal(state: TrainState) -> Iterator[None]:
    """Leave the state as it was, whatever happens inside."""
    saved = copy.deepcopy(state.to_checkpoint())
    state.model.train()
    try:
        yield
    finally:
        state.optimizer.zero_grad(set_to_none=True)
        state.load_checkpoint(saved)


def warm_up(
    state: TrainState, recipe: Recipe, compute: Compute, images: tuple[int, int],
    loss: Loss | None = None,
) -> None:  # fmt: skip
    """Run every shape of the run once on made-up images, before the clock starts.

    Compilation, the choice of convolution algorithms and the first allocation of memory happen
    here. images: how many there are to train on and to test. The state stays as it was.
    """
    train_images, test_images = images
    last = 0 if recipe.drop_last else train_images % recipe.batch_size
    sizes = [recipe.batch_size, last] if last else [recipe.batch_size]
    largest = evaluation_batch_size(compute.device, recipe.micro_batch)
    epoch_of = {recipe.resolution_at(epoch): epoch for epoch in range(1, recipe.epochs + 1)}

    def made_up(count: int) -> Batch:
        pixels = torch.arange(count * SIZE * SIZE * 3, device=compute.device) % 251
        labels = torch.zeros(count, dtype=torch.int64, device=compute.device)
        return Batch(pixels.to(torch.uint8).view(count, SIZE, SIZE, 3), labels)

    with rehearsal(state):
        for state.epoch in epoch_of.values():
            for size in 2 * sizes:  # the second step has momentum
                train_step(state, recipe, compute, made_up(size), loss=loss)
        forward = make_forward(state.tested, recipe, compute)
        if state.average is not None:
            plain = made_up(min(recipe.batch_size, largest)).images
            reestimate_batch_norm(state.tested, [plain], forward)
        with torch.inference_mode():
            for size in {min(largest, test_images), test_images % largest} - {0}:
                forward(made_up(size).images)
        compute.synchronise()


@contextlib.contextmanager
def memory_hint(recipe: Recipe, compute: Compute) -> Iterator[None]:
    """Turn too little memory, and what fails in workers and compilers, into one line of advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)  # torch has few types
        words = ("out of memory", "can't allocate memory", "not enough memory")
        if "DataLoader timed out" in text:
            raise UserError(
                "the worker processes have stopped sending batches, perhaps as /dev/shm is full: "
                "use --workers 0, or start the container with --shm-size=1g"
            ) from error
        if "DataLoader worker" in text:
            raise UserError(
                "a worker process has died, perhaps for lack of memory: the same command "
                "continues, with fewer --workers, too"
            ) from error
        if isinstance(error, MemoryError) or any(each in text for each in words):
            raise RecipeFailed(
                f"out of memory on {compute.device} with {recipe.micro_batch or recipe.batch_size} "
                "images at once: a smaller --micro-batch trains the same batch in pieces that fit "
                "(in another --run); --width makes the network smaller"
            ) from error
        if type(error).__module__.startswith("torch._"):  # a compiler's text has a hundred lines
            reason = (text.strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"torch.compile fails here ({reason}): leave --compile out") from error
        raise
