"""What a run says while it goes on, and how it is asked to stop."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from tqdm import tqdm

from tinylab.data.dataset import Dataset
from tinylab.data.split import Split
from tinylab.files import interactive
from tinylab.recipe import SIZE, Recipe
from tinylab.recipes import RECIPES, named
from tinylab.run.environment import Compute, device_name
from tinylab.training.step import TrainState

LINE_SECONDS = 60  # between two lines about an epoch or a test, where no bar is shown
LOOK_SECONDS = 0.5  # between two looks at the loss, for which a GPU has to be waited for

Item = TypeVar("Item")
Say = Callable[[str], None]


def print_line(line: str) -> None:
    """Print a line at once; training goes on though nobody reads any more."""
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def silent(_line: str) -> None:
    """Say nothing."""


@contextlib.contextmanager
def stop_signal(say: Say, patient: bool) -> Iterator[list[int]]:
    """Give a list into which SIGINT and SIGTERM go; the loop stops after its step.

    A second signal takes its usual effect at once, unless `patient`: torchrun forwards a signal
    that each process has received already.
    """
    received, before = [], {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        received.append(number)
        if len(received) == 1:
            with contextlib.suppress(RuntimeError):  # the signal came in the middle of a print
                say("stopping after this step")
        if not patient:
            restore()

    if threading.current_thread() is threading.main_thread():  # handlers are allowed only there
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


class Progress:
    """An epoch's clock and its bar, or a line a minute; once, what the rest of the run takes."""

    def __init__(
        self, state: TrainState, recipe: Recipe, steps: int, images: tuple[int, int],
        tested: set[int], say: Say, forecast: bool,
    ) -> None:  # fmt: skip
        self.state, self.recipe, self.steps, self.images = state, recipe, steps, images
        self.say, self.tested, self.forecast = say, tested, forecast
        self.second_step: tuple[float, float] | None = None

    def begin(self) -> None:
        """Begin the state's epoch, or what is left of it."""
        self.title = f"epoch {self.state.epoch}/{self.recipe.epochs}"
        self.bar = make_bar(self.say, self.title, self.steps, self.state.step, "step")
        self.clocks, self.since_saved = (time.perf_counter(), time.process_time()), 0.0
        self.looked = self.clocks[0]
        self.line = (self.looked, self.state.step, self.left())

    def tick(self) -> float:
        """Add the time since the last tick to the epoch's, and return what the clock says."""
        before, cpu_before = self.clocks
        now, cpu = self.clocks = time.perf_counter(), time.process_time()
        self.state.epoch_seconds += now - before
        self.state.epoch_cpu_seconds += cpu - cpu_before
        self.since_saved += now - before
        return now

    def step(self) -> None:
        """Show that a step is done. Raise `RecipeFailed` if the loss is not finite."""
        self.bar.update()
        now, step = self.tick(), self.state.step

        # ---- once: what the run takes, from the steps after the second ----
        if self.forecast and self.second_step is None and step >= 2:
            self.second_step = (now, self.left())
        elif self.forecast and self.second_step and now - self.second_step[0] >= 10:
            self.forecast = False
            rate = (self.second_step[1] - self.left()) / (now - self.second_step[0])
            rest = self.left() / rate
            self.say(f"this CPU trains {rate:,.0f} images/s of 64 x 64 pixels: {duration(rest)}")
            if rest > 600:
                self.say("less with a GPU, --limit-classes, --epochs or --width")

        # ---- the loss ----
        if now - self.looked <= min(LOOK_SECONDS, LINE_SECONDS):
            return
        self.looked = now
        self.state.require_finite()
        loss, top1, _ = means(self.state.totals)
        self.bar.set_postfix_str(f"loss {loss:.4f}, accuracy {top1:.2f} %", refresh=False)
        since, step_then, left_then = self.line
        if self.bar.disable and now - since > LINE_SECONDS:
            left = self.left()
            self.line = (now, step, left)
            rate = (step - step_then) * self.recipe.batch_size / (now - since)
            rest = duration(left * (now - since) / (left_then - left))
            done = f"{self.title}, step {step}/{self.steps}"
            self.say(f"  {done}: loss {loss:.4f}, {rate:.0f} images/s, {rest} left")

    def left(self) -> float:
        """Return what is left to compute, in training images of 64 x 64 pixels."""
        recipe, state, (train_images, test_images) = self.recipe, self.state, self.images
        epochs = range(state.epoch, recipe.epochs + 1)
        areas = [(recipe.resolution_at(epoch) / SIZE) ** 2 for epoch in epochs]
        trained = sum(areas) * train_images - areas[0] * state.step * recipe.batch_size
        statistics = 0 if state.average is None else recipe.ema_bn_batches * recipe.batch_size
        tests = sum(epoch in self.tested for epoch in epochs)
        # And the mirror images at the end. A forward pass is a third of a step.
        forward = tests * (test_images + min(statistics, train_images)) + test_images
        return trained + (recipe.test_resolution / SIZE) ** 2 * forward / 3


def watched(
    batches: Iterable[Item], title: str, total: int | None = None, say: Say = print_line
) -> Iterator[Item]:
    """Yield the batches of a test, with a bar or a line a minute."""
    line = time.perf_counter()
    with make_bar(say, title, total) as bar:
        for number, batch in enumerate(batches):
            if bar.disable and time.perf_counter() - line > LINE_SECONDS:
                line = time.perf_counter()
                say(f"  {title}: {number}{f' of {total}' if total else ''} batches")
            yield batch
            bar.update()


def make_bar(say: Say, title: str, total: int | None, done: int = 0, unit: str = "batch") -> tqdm:
    """Return a bar, disabled where nobody watches."""
    hidden = say is silent or not interactive()
    look = {"unit": unit, "leave": False, "mininterval": 0.5, "ncols": 79, "disable": hidden}
    return tqdm(desc=title, total=total, initial=done, **look)


def means(totals: torch.Tensor) -> tuple[float, float, float]:
    """Return mean loss, top-1 and top-5 in percent. totals: as `TrainState.totals`."""
    loss, top1, top5, images = totals.tolist()
    images = max(images, 1.0)  # none yet, if loss scaling has skipped every step
    return loss / images, 100 * top1 / images, 100 * top5 / images


def duration(seconds: float) -> str:
    """Return a time in words."""
    minutes = f"about {max(1, round(seconds / 60))} min"
    return minutes if seconds < 5400 else f"about {seconds / 3600:.1f} hours"


def heading(
    compute: Compute, compiled: bool, dataset: Dataset, recipe: Recipe, rows: Split, steps: int
) -> str:
    """Return what is computed where, on which images."""
    own = named(recipe.name).split if recipe.name in RECIPES else recipe.split
    split = recipe.split if recipe.split == own else f"{recipe.split}; {recipe.name} is for {own}"
    lines = [
        f"device: {device_name(compute.device)}",
        f"precision: {compute.precision}{', compiled' * compiled}: {compute.reason}",
        f"split: {split}",
        f"{len(rows.train):,} training and {len(rows.test):,} test images, "
        f"{rows.classes} classes, {steps} steps an epoch",
    ]
    if dataset.made_up:
        lines.insert(2, "data: made-up shapes, not Tiny ImageNet")
    elif dataset.title:
        lines.insert(2, f"data: {dataset.title}")
    return "\n".join(lines)


def log_lines(row: dict, epochs: int) -> str:
    """Return the course run's two lines of an epoch: training, and the test if there was one."""
    lines = [
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}: lr {row['learning_rate']:.5f}, "
        f"loss {row['train_loss']:.4f}, top-1 {row['train_top1']:.2f} %, "
        f"{row['train_seconds']:.0f} s, {row['images_per_second']:.0f} images/s"
    ]
    if count := row.get("skipped_steps"):
        lines.append(f"  {count} steps skipped by loss scaling")
    if "test_top1" in row:
        lines.append(
            f"  test: average loss {row['test_loss']:.4f}, "
            f"accuracy {row['test_correct']}/{row['test_total']} ({row['test_top1']:.2f} %), "
            f"top-5 {row['test_top5']:.2f} %"
        )
    return "\n".join(lines)
