"""The experiment: a recipe and a data set go in, a finished run folder comes out.

`train` reads from top to bottom and one optimiser step is `train_step`. Inside an epoch nothing waits for the device
but the progress bar, a few times a second.
"""

import contextlib
import hashlib
import io
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from tinylab import checkpoint
from tinylab.augment import normalise
from tinylab.dataset import Dataset, interactive
from tinylab.device import Placement, choose
from tinylab.evaluate import Evaluation, compute_logits, score
from tinylab.loader import TrainingLoader, evaluation_batches
from tinylab.model import build_model, weights_file
from tinylab.recipe import Recipe, UserError
from tinylab.record import Run, default_folder, describe_environment, enter_run, relative_to_here
from tinylab.split import Split, make_split

SAVE_SECONDS = 300  # an epoch that takes longer is saved within, too


def train(
    recipe: Recipe,
    dataset: Dataset,
    *,
    split: str = "merged",
    folder: Path | None = None,
    seed: int = 0,
    limit_classes: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
) -> Run:
    """Trains by `recipe`, tests after every epoch, and returns the finished run. A run that was stopped continues.

    split: "merged", "official" or "select". folder: the run folder; None: runs/<recipe>-<protocol>-s<seed>.
    limit_classes: only the first so many classes. workers: processes that augment; they do not change the result.
    quiet: no log, no progress bar.
    Raises `UserError` if the run cannot be made or its loss is no longer finite, `Stopped` after SIGINT or SIGTERM.
    """
    clock = time.perf_counter()
    say = _silent if quiet else _say
    place = choose(device, precision)
    rows = make_split(dataset, split, limit_classes)
    loader = TrainingLoader(dataset, rows.train, recipe, seed, place.device, workers)
    run = Run(Path(folder or default_folder(recipe, split, seed)))
    with run.lock(), contextlib.closing(loader), StopRequest() as stop:
        identity = _identity(dataset, rows, seed, place)
        for notice in enter_run(run, recipe, identity, describe_environment(place)):
            say(f"note: {notice}")
        if run.finished:
            say(f"{run.folder} is finished; this is its log")
            for row in run.history:
                say(log_lines(row, recipe.epochs))
            return run

        state = _new_state(recipe, rows.classes, seed, loader.steps, place)
        _continue(state, run, say)
        state.set_up_seconds += time.perf_counter() - clock
        say(f"device: {place}")
        counts = f"{len(rows.train):,} training and {len(rows.test):,} test images, {rows.classes} classes"
        say(f"{counts}, {loader.steps} steps an epoch")

        evaluation = None
        while state.epoch <= recipe.epochs:
            _train_epoch(state, recipe, loader, place, run, stop, say)
            evaluation, seconds = _evaluate(state, recipe, dataset, rows, place, run, stop)
            state.history.append(_history_row(state, evaluation, seconds, len(rows.train)))
            state.next_epoch()
            checkpoint.save(run.checkpoints, state.to_checkpoint())
            run.write_history(state.history)
            say(log_lines(state.history[-1], recipe.epochs))
        if evaluation is None:  # stopped after the last epoch was saved, before the run was finished
            evaluation, _ = _evaluate(state, recipe, dataset, rows, place, run, stop)
        _finish(run, state, recipe, dataset, rows, evaluation)
    return run


def make_optimizer(
    parameters: list[nn.Parameter], recipe: Recipe, total_steps: int, fused: bool = False
) -> tuple[torch.optim.SGD, OneCycleLR]:
    """SGD and its one-cycle schedule over `total_steps` optimiser steps (Smith, Topin, "Super-Convergence", 2018).

    fused: one kernel for all parameters, which on CUDA also spares loss scaling a wait for the device in every step.
    """
    optimizer = torch.optim.SGD(
        parameters,
        lr=recipe.max_learning_rate,  # the schedule sets the real one
        momentum=recipe.max_momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )
    for parameter in parameters:
        # A fused step that loss scaling skips would leave the first momentum uninitialised; zero is where it starts.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    warmup_share = recipe.warmup_share
    if warmup_share * total_steps == 1:  # the one length of a run for which OneCycleLR divides by zero
        warmup_share *= 1 + 1e-9
    scheduler = OneCycleLR(
        optimizer,
        max_lr=recipe.max_learning_rate,
        total_steps=total_steps,
        pct_start=warmup_share,
        anneal_strategy=recipe.anneal,
        cycle_momentum=True,
        base_momentum=recipe.base_momentum,
        max_momentum=recipe.max_momentum,
        div_factor=recipe.start_divisor,
        final_div_factor=recipe.final_divisor,
    )
    return optimizer, scheduler


def schedule(recipe: Recipe, images: int) -> Iterator[tuple[int, float, float]]:
    """(step from 0, learning rate, momentum) of every optimiser step of a run on `images` training images."""
    total_steps = recipe.epochs * recipe.steps_per_epoch(images)
    optimizer, scheduler = make_optimizer([nn.Parameter(torch.zeros(1))], recipe, total_steps)
    for step in range(total_steps):
        group = optimizer.param_groups[0]
        yield step, group["lr"], group["momentum"]
        optimizer.step()
        scheduler.step()


@dataclass
class TrainState:
    """Everything that changes while training, and so everything a checkpoint holds. Randomness is not among it."""

    model: nn.Module
    optimizer: torch.optim.SGD
    scheduler: OneCycleLR
    scaler: torch.amp.GradScaler
    totals: torch.Tensor
    """float32 (4,), on the device, over the epoch so far: sum of losses, top-1 hits, top-5 hits, images."""
    bad_step: torch.Tensor
    """int64, on the device: first step of the epoch whose loss was not finite, or -1."""
    epoch: int = 1
    """The epoch being trained, from 1."""
    step: int = 0
    """Optimiser steps done in it."""
    epoch_learning_rate: float = 0.0
    """Learning rate of its first step."""
    epoch_seconds: float = 0.0
    set_up_seconds: float = 0.0
    stops: int = 0
    """How often the run was continued after a stop."""
    history: list[dict] = field(default_factory=list)

    def next_epoch(self) -> None:
        self.epoch, self.step, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.totals.zero_()

    def to_checkpoint(self) -> dict:
        """Tensors and plain values. The schedule is its step count: everything else follows from the recipe."""
        numbers = ("epoch", "step", "epoch_learning_rate", "epoch_seconds", "set_up_seconds", "stops", "history")
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler_step": self.scheduler.last_epoch,
            "scaler": self.scaler.state_dict(),
            "totals": self.totals,
            **{name: getattr(self, name) for name in numbers},
        }

    def load_checkpoint(self, saved: dict) -> None:
        """Puts everything back; the optimiser last: a schedule touched later would overwrite its learning rate."""
        self.model.load_state_dict(saved.pop("model"))
        self.scheduler.last_epoch = saved.pop("scheduler_step")
        self.scaler.load_state_dict(saved.pop("scaler"))
        self.totals.copy_(saved.pop("totals"))
        self.optimizer.load_state_dict(saved.pop("optimizer"))
        for name, value in saved.items():
            setattr(self, name, value)
        self.stops += 1


def _new_state(recipe: Recipe, classes: int, seed: int, steps_per_epoch: int, place: Placement) -> TrainState:
    model = build_model(recipe, classes, seed).to(place.device)
    fused = place.device.type == "cuda"
    optimizer, scheduler = make_optimizer(list(model.parameters()), recipe, recipe.epochs * steps_per_epoch, fused)
    return TrainState(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=place.grad_scaler(),
        totals=torch.zeros(4, device=place.device),
        bad_step=torch.tensor(-1, device=place.device),
    )


def _continue(state: TrainState, run: Run, say: Callable[[str], None]) -> None:
    """Puts the newest checkpoint into `state`, if there is one, and shows the log so far."""
    saved, notice = checkpoint.load(run.checkpoints)
    if notice:
        say(f"note: {notice}")
    if saved is None:
        return
    state.load_checkpoint(saved)
    run.write_history(state.history)  # a line whose checkpoint was lost goes, too
    for row in state.history:
        say(log_lines(row, run.recipe.epochs))
    say(f"continuing {run.folder} in epoch {state.epoch} after {state.step} of its steps")


def train_step(state: TrainState, recipe: Recipe, place: Placement, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One optimiser update on images uint8 (B, 64, 64, 3) and labels int64 (B,); adds to the epoch's totals."""
    with place.autocast():
        logits = state.model(normalise(images, recipe))
    logits = logits.float()
    loss = F.cross_entropy(logits, labels)
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.scheduler.step()

    with torch.no_grad():
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        # Filled, not made from a number: copying that to a GPU would wait for it.
        images_seen = torch.full_like(loss, len(labels))
        state.totals += torch.stack([loss * len(labels), hits[:, 0].sum(), hits.sum(), images_seen])
        state.bad_step.masked_fill_((state.bad_step < 0) & ~torch.isfinite(loss), state.step)
    state.step += 1


def _train_epoch(
    state: TrainState,
    recipe: Recipe,
    loader: TrainingLoader,
    place: Placement,
    run: Run,
    stop: "StopRequest",
    say: Callable[[str], None],
) -> None:
    """Trains from the state's step to the end of its epoch. Saves now and then, and when asked to stop."""
    state.model.train()
    if state.step == 0:
        state.epoch_learning_rate = state.optimizer.param_groups[0]["lr"]
    place.synchronise()
    before, started, shown, saved = state.epoch_seconds, time.perf_counter(), 0.0, time.perf_counter()
    bar = tqdm(
        desc=f"epoch {state.epoch}/{recipe.epochs}",
        total=loader.steps,
        initial=state.step,
        unit="step",
        leave=False,
        mininterval=0.5,
        disable=say is _silent or not interactive(),
    )
    with bar, contextlib.closing(loader.epoch(state.epoch, state.step)) as batches:
        for images, labels in batches:
            train_step(state, recipe, place, images, labels)
            bar.update()
            now = time.perf_counter()
            if now - shown > 0.5:
                shown = now
                _check_finite(state)
                loss, top1, _ = _means(state)
                bar.set_postfix_str(f"loss {loss:.4f}, accuracy {top1:.2f} %", refresh=False)
            if stop.received or now - saved > SAVE_SECONDS:
                saved = now
                state.epoch_seconds = before + now - started
                _save_within(state, run, stop)
    _check_finite(state)
    place.synchronise()
    state.epoch_seconds = before + time.perf_counter() - started


def _save_within(state: TrainState, run: Run, stop: "StopRequest") -> None:
    """Saves in the middle of an epoch, and ends the run there if that was asked for."""
    _check_finite(state)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in state.model.parameters()):
        raise UserError(f"weights are not finite in epoch {state.epoch} after step {state.step}: the run has diverged")
    checkpoint.save(run.checkpoints, state.to_checkpoint())
    stop.obey(f"stopped in epoch {state.epoch} after {state.step} steps; the same command continues {run.folder}")


def _check_finite(state: TrainState) -> None:
    bad_step = int(state.bad_step)
    if bad_step >= 0:
        raise UserError(
            f"the loss is not finite in epoch {state.epoch}, step {bad_step}: the run has diverged; "
            "what was saved is from before it; start another run with a lower max-learning-rate"
        )
    if state.scaler.is_enabled() and state.scaler.get_scale() < 1:
        raise UserError(
            f"the gradients are not finite in epoch {state.epoch}, step {state.step}, however small the loss is "
            "scaled: start another run with --precision fp32"
        )


def _means(state: TrainState) -> tuple[float, float, float]:
    """Mean loss, top-1 and top-5 in percent over the epoch so far."""
    loss, top1, top5, images = state.totals.tolist()
    return loss / images, 100 * top1 / images, 100 * top5 / images


def _evaluate(
    state: TrainState, recipe: Recipe, dataset: Dataset, rows: Split, place: Placement, run: Run, stop: "StopRequest"
) -> tuple[Evaluation, float]:
    """The test images' scores, and the seconds that took. A stop asked for meanwhile is obeyed: the epoch is saved."""

    forward = inference(state.model, recipe, place)

    def stoppable(images: torch.Tensor) -> torch.Tensor:
        if stop.received:
            _save_within(state, run, stop)
        return forward(images)

    started = time.perf_counter()
    try:
        evaluation = score(*compute_logits(stoppable, evaluation_batches(dataset, rows.test, place.device)))
    except UserError as error:
        raise UserError(f"after epoch {state.epoch}, step {state.step}: {error}") from error
    return evaluation, time.perf_counter() - started


def inference(model: nn.Module, recipe: Recipe, place: Placement) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model, put into eval mode, as a function from images uint8 (B, 64, 64, 3) to logits fp32 (B, classes)."""
    model.eval()

    def forward(images: torch.Tensor) -> torch.Tensor:
        with place.autocast():
            return model(normalise(images, recipe)).float()

    return forward


def _history_row(state: TrainState, evaluation: Evaluation, eval_seconds: float, train_images: int) -> dict:
    """One line of metrics.jsonl: accuracies in percent, losses in nats per image."""
    loss, top1, top5 = _means(state)
    return {
        "epoch": state.epoch,
        "learning_rate": state.epoch_learning_rate,
        "train_loss": loss,
        "train_top1": top1,
        "train_top5": top5,
        **evaluation.numbers(),
        "train_seconds": round(state.epoch_seconds, 3),
        "eval_seconds": round(eval_seconds, 3),
        "images_per_second": round(train_images / state.epoch_seconds, 1),
    }


def log_lines(row: dict, epochs: int) -> str:
    """The published run's two lines per epoch: training, then test with mean loss and correct / total."""
    filled = round(row["train_top1"] / 5)
    bar = "#" * filled + "." * (20 - filled)
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  learning rate {row['learning_rate']:.6f}  "
        f"loss {row['train_loss']:.4f}  accuracy {row['train_top1']:5.2f} % [{bar}]  "
        f"{row['train_seconds']:.0f} s, {row['images_per_second']:.0f} images/s\n"
        f"  test: average loss {row['test_loss']:.4f}, accuracy {row['test_correct']}/{row['test_total']} "
        f"({row['test_top1']:.2f} %), top-5 {row['test_top5']:.2f} %"
    )


def _finish(run: Run, state: TrainState, recipe: Recipe, dataset: Dataset, rows: Split, evaluation: Evaluation) -> None:
    """Writes predictions, weights and, last, the summary that says the run is finished."""
    predictions = io.BytesIO()
    np.savez_compressed(predictions, rows=rows.test, labels=evaluation.labels, logits=evaluation.logits)
    checkpoint.write_atomically(run.folder / "predictions.npz", predictions.getvalue())

    last = state.history[-1]
    train_seconds = sum(row["train_seconds"] for row in state.history)
    summary = {
        "recipe": recipe.name,
        "protocol": rows.protocol,
        "classes": rows.classes,
        "seed": run.identity["seed"],
        "epochs": recipe.epochs,
        "train_images": len(rows.train),
        "test_images": len(rows.test),
        **{
            name: last[name]
            for name in ("train_loss", "train_top1", "test_loss", "test_top1", "test_top5", "test_correct")
        },
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "set_up_seconds": round(state.set_up_seconds, 3),
        "train_seconds": round(train_seconds, 3),
        "eval_seconds": round(sum(row["eval_seconds"] for row in state.history), 3),
        "time_to_accuracy_seconds": round(train_seconds + last["eval_seconds"], 3),
        "images_per_second": round(len(rows.train) * recipe.epochs / train_seconds, 1),
        "stops": state.stops,
    }
    weights = weights_file(
        state.model,
        recipe,
        dataset.wnids[: rows.classes],
        dataset.names[: rows.classes],
        summary,
        dataset.content_sha256,
    )
    checkpoint.write_atomically(run.weights, weights)
    run.write("summary.json", summary | {"model_sha256": hashlib.sha256(weights).hexdigest()})


def _identity(dataset: Dataset, rows: Split, seed: int, place: Placement) -> dict:
    """What decides the result besides the recipe; a run folder belongs to one such set."""
    return {
        "protocol": rows.protocol,
        "classes": rows.classes,
        "seed": seed,
        "precision": place.precision,
        "device": place.device.type,
        "content_sha256": dataset.content_sha256,
        "split_sha256": rows.sha256,
        "data_folder": relative_to_here(dataset.folder),
    }


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; it was saved first. `signal` is the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal = signal_number


class StopRequest:
    """While entered, SIGINT (Ctrl-C, a notebook's stop button) and SIGTERM only leave a note, so that no optimiser step
    is cut in two; the loop obeys between steps. A second signal takes its usual effect at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def obey(self, message: str) -> None:
        """Raises `Stopped` if a signal has come."""
        if self.received is not None:
            raise Stopped(message, self.received)

    def _note(self, number: int, _frame: object) -> None:
        self.received = number
        for each, handler in self._before.items():
            signal.signal(each, handler)


def _say(line: str) -> None:
    print(line, flush=True)


def _silent(_line: str) -> None:
    pass
