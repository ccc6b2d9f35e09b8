"""The experiment: a recipe and a data set go in, a finished run folder comes out.

`train` reads from top to bottom; one optimiser step is `step.train_step`. Inside an epoch nothing waits for the device
but the progress bar, a few times a second.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from tinylab.data.archive import class_order_sha256
from tinylab.data.augment import normalise, resize
from tinylab.data.dataset import Dataset, interactive, refuse_inside
from tinylab.data.loader import (
    BatchedLoader,
    Images,
    TrainingLoader,
    evaluation_batch_size,
    evaluation_batches,
    make_loader,
    statistics_batches,
)
from tinylab.data.split import Split, make_split
from tinylab.exceptions import RecipeFailed, Stopped, UserError
from tinylab.files import lock
from tinylab.recipe import SIZE, Recipe, training_petaflop
from tinylab.run import checkpoint
from tinylab.run.environment import Compute, choose, fastest_convolutions
from tinylab.run.folder import (
    Run,
    compile_cache,
    default_folder,
    describe_environment,
    enter_run,
    hashes,
    refuse_another,
    refuse_foreign,
    relative_to_here,
    write_checksums,
)
from tinylab.run.mirror import Mirror
from tinylab.run.weights import weights_file
from tinylab.training.average import reestimate_batch_norm
from tinylab.training.distributed import (
    RankError,
    World,
    agree,
    from_rank_0,
    gather_rows,
    highest,
    join,
    share,
    sum_over_ranks,
)
from tinylab.training.evaluate import Evaluation, compute_logits, mirrored, score
from tinylab.training.finite import all_finite
from tinylab.training.optim import muon_petaflop
from tinylab.training.optim import schedule as schedule  # also under this name, beside `train`
from tinylab.training.step import (
    TrainState,
    inference,
    new_state,
    out_of_memory,
    relative_cost,
    seconds_per_image,
    shapes,
    train_step,
    warm_up,
)
from tinylab.training.stop import Abandoned, StopRequest, abandon_when
from tinylab.training.track import Tracker

SAVE_SECONDS = 300  # an epoch that takes longer is saved within, too
LINE_SECONDS = 60  # between two lines about an epoch or a test, where no bar is shown
MOST_GRAPHS = 8  # torch.compile's own limit, beyond which it silently does without
_RUNS = itertools.count()  # how many runs this process has begun: only the first has a cold clock

Item = TypeVar("Item")


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
    compiled: bool = False,
    workers: int | None = None,
    mirror: Path | None = None,
    test_every: int = 1,
    track: Literal["tensorboard"] | None = None,
    quiet: bool = False,
) -> Run:
    """Trains by `recipe`, tests now and then, and returns the finished run. A run that was stopped continues.

    split: "merged", "official" or "select". folder: the run folder; None: runs/<recipe>-<protocol>-s<seed>.
    limit_classes: only the first so many classes. compiled: the step runs under torch.compile. workers: processes that
    run albumentations; they do not change the result. mirror: a folder of this run's own in which its newest two
    checkpoints are kept, too; the run continues from the newest whole one of both. test_every: test after every so many
    epochs, and after the last one; it does not change the weights. track: "tensorboard" also writes each epoch's
    numbers to the run folder's tensorboard/. quiet: no log, no bar.
    Started by torchrun, every process calls this and trains its share; the first one writes the run.
    Raises `UserError` if the run cannot be made or its numbers are no longer finite, `Stopped` after SIGINT or SIGTERM.
    """
    started, begun = time.perf_counter(), _circumstances()
    compute = choose(device, precision, compiled=compiled)
    rows = make_split(dataset, split, limit_classes)
    run = Run(Path(folder or default_folder(recipe, split, seed)))
    refuse_inside(dataset, run.folder, "run")
    with join(compute.device) as world, fastest_convolutions(compute):
        compute = replace(compute, device=world.device(compute.device))
        _check(recipe, rows, world, compiled, test_every)
        images = Images(dataset.images, dataset.labels, compute.device)
        loader = make_loader(
            dataset, rows.train, recipe, seed, compute.device, workers, world, images
        )
        say = _silent if quiet or not world.writes else _say
        stop = StopRequest(patient=world.several)
        second = _mirror(dataset, run, mirror, say)
        tracker = _tracker(run, track, world)
        job = _Job(
            recipe, dataset, images, rows, seed, compute, world, run, loader, stop, say, second, tracker, begun,
            test_every,
        )  # fmt: skip
        with contextlib.closing(loader), _one_writer(job), _memory_hint(recipe, compute, world):
            state = new_state(recipe, rows.classes, seed, loader.steps, compute, world, compiled)
            saved, notice = from_rank_0(world, lambda: _newest_checkpoint(job))
            state.run = dataclasses.asdict(recipe) | _identity(job, compiled)
            if _begin(job, state, saved, notice, compiled):
                return run
            state.set_up_seconds += time.perf_counter() - started
            if compute.device.type == "cpu" and not compiled and not world.several:
                for network in {state.model, state.tested}:
                    abandon_when(lambda: stop.received is not None, network)
            copying = job.mirror if job.mirror and world.writes else contextlib.nullcontext()
            tracking = contextlib.closing(tracker) if tracker else contextlib.nullcontext()
            with (
                copying,
                tracking,
                stop,
            ):  # until here a signal ends the run at once: there is nothing to save
                _train(job, state)
    return run


@dataclass(frozen=True)
class _Job:
    """What stays the same while a run is trained."""

    recipe: Recipe
    dataset: Dataset
    images: Images
    rows: Split
    seed: int
    compute: Compute
    world: World
    run: Run
    loader: TrainingLoader | BatchedLoader
    stop: StopRequest
    say: Callable[[str], None]
    mirror: Mirror | None
    tracker: Tracker | None
    circumstances: dict
    """What its clocks depend on, and no bit of the result: of environment.json, but not of a checkpoint."""
    test_every: int

    def is_tested(self, epoch: int) -> bool:
        return epoch % self.test_every == 0 or epoch == self.recipe.epochs


def _train(job: _Job, state: TrainState) -> None:
    """All epochs that are left, each with its test and its checkpoint, then the final records."""
    logits = labels = None
    if job.tracker:
        job.tracker.up_to(state.history)
    while state.epoch <= job.recipe.epochs:
        _train_epoch(job, state)
        row = _training_row(job, state)
        if job.is_tested(state.epoch):
            started = time.perf_counter()
            with _saved_when_abandoned(job, state):
                logits, labels = _test(job, state)
            row |= _scored(state, logits, labels).numbers() | {
                "eval_seconds": round(time.perf_counter() - started, 3)
            }
        state.history.append(row)
        state.next_epoch()
        _save(job, state)
        if job.world.writes:
            job.run.write_history(state.history)
        if job.tracker:
            job.tracker.epoch(state.history[-1])
        job.say(log_lines(state.history[-1], job.recipe.epochs))
    with _saved_when_abandoned(job, state):
        if logits is None:  # stopped after the last epoch was saved, before the run was finished
            logits, labels = _logits(
                job, state, "test"
            )  # the averaged network has its statistics already
        of_mirror_images, _ = _logits(job, state, "test of mirror images", mirrored)
    if job.world.writes:
        _finish(job, state, score(logits, labels), score((logits + of_mirror_images) / 2, labels))


def _circumstances() -> dict:
    """Runs that this process began before, and whether torch.compile finds what it compiled earlier."""
    return {"earlier_runs": next(_RUNS), "compile_cache": compile_cache()}


# --- Before the first step --------------------------------------------------------------------------------------------


def _check(recipe: Recipe, rows: Split, world: World, compiled: bool, test_every: int) -> None:
    """Raises `UserError` for what cannot be trained, before anything is made."""
    if test_every < 1:
        raise UserError(f"test-every must be at least 1, not {test_every}")
    images = len(rows.train)
    if recipe.batch_size > images:
        raise UserError(
            f"batch-size {recipe.batch_size} is more than the {images} training images of this split; lower it"
        )
    smallest = min(
        recipe.batch_size,
        (0 if recipe.drop_last else images % recipe.batch_size) or recipe.batch_size,
    )
    if world.size > smallest:
        raise UserError(
            f"{world.size} processes, but the smallest batch of an epoch has {smallest} images: "
            "start fewer, or choose another --batch-size or --drop-last"
        )
    if compiled and world.several:
        raise UserError(
            "--compile serves a single process: batch norm over several processes does not compile"
        )
    if compiled and shapes(recipe, images) > MOST_GRAPHS:
        raise UserError(
            f"--compile serves at most {MOST_GRAPHS} shapes of batches: use a shorter ramp or --drop-last"
        )


def _mirror(
    dataset: Dataset, run: Run, folder: Path | None, say: Callable[[str], None]
) -> Mirror | None:
    if folder is None:
        return None
    refuse_inside(dataset, Path(folder), "mirror")
    if Path(folder).resolve() in (run.folder.resolve(), run.checkpoints.resolve()):
        raise UserError(
            f"the mirror {folder} is where the run itself is kept: choose another folder for --mirror"
        )
    return Mirror(Path(folder), say)


def _tracker(run: Run, track: str | None, world: World) -> Tracker | None:
    """The writer's tracker. Made in every process, so that all of them stop if tensorboard is missing."""
    tracker = Tracker(run.folder) if track else None
    return tracker if world.writes else None


def _begin(
    job: _Job, state: TrainState, saved: dict | None, notice: str | None, compiled: bool
) -> bool:
    """Everything up to the first step: whose folder it is, where the run stands (`saved` is its newest checkpoint, with
    a line about it), what it will cost. Whether the run is finished already; then its log is shown, and no more."""
    run, world, say = job.run, job.world, job.say
    begun, finished = from_rank_0(world, lambda: (run.begun, run.finished))
    from_rank_0(world, lambda: _refuse_others(job, state.run, saved))
    state.environment = describe_environment(job.compute) | {"processes": world.size}
    if not begun:
        _warm_up(
            job, state, compiled
        )  # what fails on this machine fails before the folder is this run's
    for line in from_rank_0(world, lambda: _enter(job, state, saved)):
        say(f"note: {line}")
    if finished:
        say(f"{run.folder} is finished; this is its log")
        for row in run.history if world.writes else ():
            say(log_lines(row, job.recipe.epochs))
        if job.tracker:
            job.tracker.up_to(run.history)
            job.tracker.close()
        return True
    if begun:
        _warm_up(job, state, compiled)
    if notice:
        say(f"note: {notice}")
    if saved is not None:
        _continue(job, state, saved)
    if job.compute.device.type == "cpu" and state.epoch <= job.recipe.epochs:
        say(_cost(job, state))
    return False


def _newest_checkpoint(job: _Job) -> tuple[dict | None, str | None]:
    """The checkpoint to continue from, at home or in the mirror, if there is one, and a line for the user about it."""
    if job.run.finished:
        return None, None
    mirror = (job.mirror.folder, job.mirror.leave_alone) if job.mirror else ()
    return checkpoint.load(job.run.checkpoints, *mirror)


def _refuse_others(job: _Job, now: dict, saved: dict | None) -> None:
    """Raises `UserError` if the folder or the checkpoint is another run's than the one that `now` describes."""
    if job.run.begun:
        refuse_another(job.run, now)  # says more than a checkpoint does
    else:
        refuse_foreign(job.run)
    if saved is not None:
        refuse_another(job.run, now, saved.get("run", {}))


def _identity(job: _Job, compiled: bool) -> dict:
    """What decides the result besides the recipe; a run folder belongs to one such set."""
    return {
        "protocol": job.rows.protocol,
        "classes": job.rows.classes,
        "seed": job.seed,
        "precision": job.compute.precision,
        "device": job.compute.device.type,
        **({"compiled": True} if compiled else {}),
        "content_sha256": job.dataset.content_sha256,
        "split_sha256": job.rows.sha256,
        "class_order_sha256": class_order_sha256(job.dataset.wnids[: job.rows.classes]),
        "data_folder": relative_to_here(job.dataset.folder),
    }


def _enter(job: _Job, state: TrainState, saved: dict | None) -> list[str]:
    fields = {field.name for field in dataclasses.fields(job.recipe)}
    identity = {name: value for name, value in state.run.items() if name not in fields}
    elsewhere = None if saved is None else saved.get("environment")
    state.environment |= hashes(identity)
    notices = enter_run(
        job.run, job.recipe, identity, state.environment | job.circumstances, elsewhere
    )
    if not job.run.finished:
        job.run.sweep()
        checkpoint.clean(job.run.checkpoints)
    return notices


@contextlib.contextmanager
def _one_writer(job: _Job) -> Iterator[None]:
    """The first process holds the run folder's lock, and the mirror's; a refusal ends all of them."""
    with contextlib.ExitStack() as held:
        from_rank_0(job.world, lambda: held.enter_context(job.run.lock()))
        if job.mirror is not None:
            from_rank_0(job.world, lambda: held.enter_context(lock(job.mirror.folder)))
        yield


@contextlib.contextmanager
def _memory_hint(recipe: Recipe, compute: Compute, world: World) -> Iterator[None]:
    """Says what to do when memory runs out, in place of a traceback from the depths of a library."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        kind = RecipeFailed if world.writes else RankError
        raise kind(
            f"out of memory on {compute.device} with {recipe.micro_batch or recipe.batch_size} images at once: a smaller "
            "--micro-batch trains the same batch in pieces that fit (in another --run); --width makes the network "
            "smaller"
        ) from error


def _warm_up(job: _Job, state: TrainState, compiled: bool) -> None:
    """Says what is to be done, and takes all that is slow only once out of the training's time."""
    several = f", {job.world.size} processes" if job.world.several else ""
    train_images, test_images = len(job.rows.train), len(job.rows.test)
    job.say(f"device: {job.compute}{', compiled' if compiled else ''}{several}")
    counts = (
        f"{train_images:,} training and {test_images:,} test images, {job.rows.classes} classes"
    )
    job.say(f"{counts}, {job.loader.steps} steps an epoch")
    if not compiled and job.compute.device.type != "cuda":
        return
    try:
        warm_up(state, job.recipe, job.compute, train_images, test_images)
    except Exception as error:
        # A compiler that is there may still fail, and its own traceback has a hundred lines.
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"torch.compile fails here ({reason}): leave --compile out") from error


def _continue(job: _Job, state: TrainState, saved: dict) -> None:
    """Puts a checkpoint into `state`, and shows the log so far."""
    state.load_checkpoint(saved | {"totals": _own_totals(saved["totals"], job.world)})
    state.stops += 1
    if job.world.writes:
        job.run.write_history(state.history)  # a line whose checkpoint was lost goes, too
    for row in state.history:
        job.say(log_lines(row, job.recipe.epochs))
    job.say(f"continuing {job.run.folder} in epoch {state.epoch} after {state.step} of its steps")


def _own_totals(saved: torch.Tensor, world: World) -> torch.Tensor:
    """This process's share of a checkpoint's totals: its own, or, if it was written by another number of processes, all
    of them for the first one."""
    rows = saved.reshape(-1, 4)
    if len(rows) == world.size:
        return rows[world.rank]
    return rows.sum(dim=0) * world.writes


def _cost(job: _Job, state: TrainState) -> str:
    """What the rest of the run will cost on this CPU, from one measured step."""
    per_image = seconds_per_image(state, job.recipe, job.compute)
    seconds = _images_left(job, state) * per_image
    advice = "; a GPU is far faster, and --limit-classes, --epochs and --width make it less"
    return f"this CPU trains {1 / per_image:,.0f} images/s: {_about(seconds)}{advice if seconds > 600 else ''}"


def _images_left(job: _Job, state: TrainState) -> float:
    """What is left to compute, steps and tests, in training images of 64 x 64 pixels."""
    recipe, rows, epochs = job.recipe, job.rows, range(state.epoch, job.recipe.epochs + 1)
    trained = sum(relative_cost(recipe, epoch) * len(rows.train) for epoch in epochs)
    trained -= relative_cost(recipe, state.epoch) * state.step * recipe.batch_size
    statistics = (
        min(recipe.ema_bn_batches * recipe.batch_size, len(rows.train))
        if state.average is not None
        else 0
    )
    tests = sum(map(job.is_tested, epochs))
    forward = tests * (len(rows.test) + statistics) + len(
        rows.test
    )  # and the mirror images at the end
    return (
        trained + (recipe.test_resolution / SIZE) ** 2 * forward / 3
    )  # a forward pass is a third of a step


def _about(seconds: float) -> str:
    return (
        f"about {seconds / 3600:.1f} hours"
        if seconds >= 5400
        else f"about {max(1, round(seconds / 60))} min"
    )


# --- An epoch ---------------------------------------------------------------------------------------------------------


class _Wish(IntEnum):
    """What a process wants after a step. All do what the highest wish says, so that they stop at the same step."""

    GO = 0
    SAVE = 1
    STOP = 2
    ABORT = 3


def _train_epoch(job: _Job, state: TrainState) -> None:
    """Trains from the state's step to the end of its epoch. Saves now and then, and when asked to stop."""
    state.model.train()
    if state.step == 0:
        state.epoch_learning_rate = state.optimizer.param_groups[0]["lr"]
    job.compute.synchronise()
    before, before_cpu, images_before = (
        state.epoch_seconds,
        state.epoch_cpu_seconds,
        _images_left(job, state),
    )
    started, started_cpu, shown = time.perf_counter(), time.process_time(), time.perf_counter()
    saved, told = started, (started, images_before, state.step)
    title = f"epoch {state.epoch}/{job.recipe.epochs}"
    bar = _bar(job.say, title, job.loader.steps, state.step, "step")
    with bar, contextlib.closing(job.loader.epoch(state.epoch, state.step)) as batches:
        for batch in batches:
            with contextlib.suppress(Abandoned):  # the wish is to stop, then
                train_step(state, job.recipe, job.compute, batch)
                bar.update()
            now, trouble = time.perf_counter(), None
            look = now - shown > min(0.5, LINE_SECONDS)
            if look or job.compute.device.type == "cpu":  # a GPU would be waited for
                trouble = state.trouble()
            if look:
                shown = now
                loss, top1, _ = _means(state.totals)
                bar.set_postfix_str(f"loss {loss:.4f}, accuracy {top1:.2f} %", refresh=False)
                if bar.disable and now - told[0] > LINE_SECONDS and state.step > told[2]:
                    left = _images_left(job, state)
                    rate = (state.step - told[2]) * job.recipe.batch_size / (now - told[0])
                    seconds = left * (now - told[0]) / (told[1] - left)
                    told = (now, left, state.step)
                    job.say(
                        f"  {title}, step {state.step}/{job.loader.steps}: loss {loss:.4f}, {rate:.0f} images/s, "
                        f"{_about(seconds)} left"
                    )
            wish = highest(job.world, _wish(job, trouble, now - saved))
            if wish == _Wish.ABORT:
                _require_finite(job, state)
            if wish:
                saved = now
                state.epoch_seconds = before + now - started
                state.epoch_cpu_seconds = before_cpu + time.process_time() - started_cpu
                _save_within(job, state, stopping=wish == _Wish.STOP)
    no_images = sum_over_ranks(job.world, state.totals)[3] == 0
    _require_finite(job, state, epoch_without_images=bool(no_images))
    job.compute.synchronise()
    state.epoch_seconds = before + time.perf_counter() - started
    state.epoch_cpu_seconds = before_cpu + time.process_time() - started_cpu


def _bar(say: Callable, title: str, total: int | None, done: int = 0, unit: str = "batch") -> tqdm:
    """A bar where somebody may be watching; it is disabled elsewhere, where a line a minute takes its place."""
    hidden = say is _silent or not interactive()
    return tqdm(
        desc=title,
        total=total,
        initial=done,
        unit=unit,
        leave=False,
        mininterval=0.5,
        ncols=79,
        disable=hidden,
    )


def _wish(job: _Job, trouble: RecipeFailed | None, since_saved: float) -> _Wish:
    if trouble:
        return _Wish.ABORT
    if job.stop.received:
        return _Wish.STOP
    return _Wish.SAVE if since_saved > SAVE_SECONDS else _Wish.GO


def _require_finite(job: _Job, state: TrainState, epoch_without_images: bool = False) -> None:
    """Ends the run if its numbers are not finite, with a checkpoint to continue from: an earlier one if there is any,
    as what has gone wrong since may have been chance."""
    trouble = state.trouble()
    if trouble is None and epoch_without_images:
        lower = "start another run with a lower max-learning-rate"
        trouble = RecipeFailed(f"no step of epoch {state.epoch} had a finite loss: {lower}")
    if highest(job.world, int(trouble is not None)) and not from_rank_0(
        job.world, lambda: job.run.trained
    ):
        _save(job, state)
    agree(job.world, trouble)


@contextlib.contextmanager
def _saved_when_abandoned(job: _Job, state: TrainState) -> Iterator[None]:
    """While entered, a pass that is given up because the run is to stop has it saved and stopped."""
    try:
        yield
    except Abandoned:
        _save_within(job, state, stopping=True)


def _save_within(job: _Job, state: TrainState, stopping: bool) -> None:
    """Saves in the middle of an epoch, and ends the run there if that was asked for."""
    _require_finite(job, state)
    _save(job, state)
    if stopping:
        where = f"stopped in epoch {state.epoch} after {state.step} steps"
        if state.epoch > job.recipe.epochs:
            where = "stopped after the last epoch"
        raise Stopped(
            f"{where}; the same command continues {job.run.folder}",
            job.stop.received or signal.SIGTERM,
        )


def _save(job: _Job, state: TrainState) -> None:
    """Writes a checkpoint, at home and then in the mirror. Raises `UserError` if there is anything in it that is not
    finite: what was saved before is better."""
    networks = [state.model, *([] if state.average is None else [state.average.module])]
    if not all(bool(all_finite(network.state_dict().values())) for network in networks):
        raise RecipeFailed(
            f"weights are not finite in epoch {state.epoch} after step {state.step}: the run has diverged; what was "
            "saved is from before; start another run with a lower max-learning-rate"
        )
    totals = gather_rows(job.world, state.totals[None]).squeeze(
        0
    )  # a row for each of several processes
    if job.world.writes:
        content = checkpoint.save(job.run.checkpoints, state.to_checkpoint() | {"totals": totals})
        if job.mirror is not None:
            job.mirror.update(content)


def _means(totals: torch.Tensor) -> tuple[float, float, float]:
    """Mean loss, top-1 and top-5 in percent over the epoch so far."""
    loss, top1, top5, images = totals.tolist()
    images = max(images, 1.0)  # none yet, if all steps were skipped
    return loss / images, 100 * top1 / images, 100 * top5 / images


def _test(job: _Job, state: TrainState) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the test images, averaged weights with new batch-norm statistics."""
    if state.average is not None:
        plain = statistics_batches(
            job.images, job.rows.train, job.recipe, job.seed, state.epoch, job.world
        )
        network_input = (
            normalise(resize(images, job.recipe.test_resolution), job.recipe) for images in plain
        )
        with job.compute.autocast():
            reestimate_batch_norm(
                state.average.module, _watched(job, state, network_input, "batch-norm statistics")
            )
    return _logits(job, state, "test")


def _logits(
    job: _Job, state: TrainState, title: str, view: Callable = lambda forward: forward
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits fp32 (N, classes) and labels int64 (N,) of the test images, of the network as `view` makes it see them.
    With several processes each tests its share of the batches, of which no image is counted twice, and all get all."""
    rows, world, size = (
        job.rows.test,
        job.world,
        evaluation_batch_size(job.compute.device, job.recipe.micro_batch),
    )
    mine = share(-(-len(rows) // size), world)
    rows = rows[mine.start * size : mine.stop * size]
    batches = evaluation_batches(job.dataset, rows, job.compute.device, size, job.images)
    forward = view(inference(state.tested, job.recipe, job.compute))
    if len(rows):
        logits, labels = compute_logits(
            forward, _watched(job, state, batches, title, len(mine)), len(rows)
        )
    else:  # more processes than batches
        logits = torch.empty(0, job.rows.classes, device=job.compute.device)
        labels = torch.empty(0, dtype=torch.int64, device=job.compute.device)
    if world.several:
        logits, labels = gather_rows(world, logits), gather_rows(world, labels)
    return logits, labels


def _watched(
    job: _Job, state: TrainState, batches: Iterable[Item], title: str, total: int | None = None
) -> Iterator[Item]:
    """The batches, shown. A stop asked for meanwhile is obeyed at once: the state is as it was after the last step.
    (Several processes have different numbers of batches; they stop after the next step.)"""
    for batch in shown(batches, title, total, job.say):
        if job.stop.received and not job.world.several:
            _save_within(job, state, stopping=True)
        yield batch


def shown(
    batches: Iterable[Item],
    title: str,
    total: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[Item]:
    """The batches of a test, with a bar or a line a minute."""
    say, said = say or _say, time.perf_counter()
    with _bar(say, title, total) as bar:
        for number, batch in enumerate(batches):
            if bar.disable and time.perf_counter() - said > LINE_SECONDS:
                said = time.perf_counter()
                say(f"  {title}: {number}{f' of {total}' if total else ''} batches")
            yield batch
            bar.update()


def _scored(state: TrainState, logits: torch.Tensor, labels: torch.Tensor) -> Evaluation:
    try:
        return score(logits, labels)
    except UserError as error:
        raise RecipeFailed(f"after epoch {state.epoch}, step {state.step}: {error}") from error


# --- Records ----------------------------------------------------------------------------------------------------------


def _training_row(job: _Job, state: TrainState) -> dict:
    """One line of metrics.jsonl, without what a test adds: accuracies in percent, losses in nats per image."""
    totals = sum_over_ranks(job.world, state.totals)
    loss, top1, top5 = _means(totals)
    return {
        "epoch": state.epoch,
        "learning_rate": state.epoch_learning_rate,
        "train_loss": loss,
        "train_top1": top1,
        "train_top5": top5,
        "train_seconds": round(state.epoch_seconds, 3),
        **(
            {}
            if math.isnan(state.epoch_cpu_seconds)
            else {"train_cpu_seconds": round(state.epoch_cpu_seconds, 3)}
        ),
        "eval_seconds": 0.0,
        "images_per_second": round(totals[3].item() / state.epoch_seconds, 1),
        "skipped_steps": int(state.skips[0]),
    }


def log_lines(row: dict, epochs: int) -> str:
    """The published run's two lines per epoch: training, then, if it was tested, mean loss and correct / total."""
    filled = round(row["train_top1"] / 5)
    bar = "#" * filled + "." * (20 - filled)
    skipped = (
        f", {row['skipped_steps']} steps skipped: not finite" if row.get("skipped_steps") else ""
    )
    training = (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  learning rate {row['learning_rate']:.6f}  "
        f"loss {row['train_loss']:.4f}  accuracy {row['train_top1']:5.2f} % [{bar}]  "
        f"{row['train_seconds']:.0f} s, {row['images_per_second']:.0f} images/s{skipped}"
    )
    if "test_top1" not in row:
        return training
    return (
        f"{training}\n  test: average loss {row['test_loss']:.4f}, accuracy {row['test_correct']}/{row['test_total']} "
        f"({row['test_top1']:.2f} %), top-5 {row['test_top5']:.2f} %"
    )


def _finish(job: _Job, state: TrainState, evaluation: Evaluation, flipped: Evaluation) -> None:
    """Writes predictions, weights and, last, the summary that says the run is finished."""
    recipe, dataset, rows, run = job.recipe, job.dataset, job.rows, job.run
    predictions = io.BytesIO()
    np.savez_compressed(
        predictions, rows=rows.test, labels=evaluation.labels, logits=evaluation.logits
    )
    checkpoint.write_atomically(run.folder / "predictions.npz", predictions.getvalue())

    summary = _summary(job, state) | {"flip_tta_top1": flipped.top1}
    weights = weights_file(
        state.tested,
        recipe,
        dataset.wnids[: rows.classes],
        dataset.names[: rows.classes],
        summary,
        dataset.content_sha256,
    )
    checkpoint.write_atomically(run.weights, weights)
    summary |= {"model_sha256": hashlib.sha256(weights).hexdigest()}
    write_checksums(run, summary)
    run.write("summary.json", summary)


def _summary(job: _Job, state: TrainState) -> dict:
    """The final numbers. Time to accuracy is all training and the one last test, warm; cold has the set-up, too."""
    last, rows, recipe = state.history[-1], job.rows, job.recipe
    train_seconds, cpu_seconds = (
        sum(row.get(clock, math.nan) for row in state.history)
        for clock in ("train_seconds", "train_cpu_seconds")
    )
    images = min(len(rows.train), job.loader.steps * recipe.batch_size)
    steps = job.loader.steps * recipe.epochs
    warm = train_seconds + last["eval_seconds"]
    tested = ("train_loss", "train_top1", "test_loss", "test_top1", "test_top5", "test_correct")
    return {
        "recipe": recipe.name,
        "protocol": rows.protocol,
        "classes": rows.classes,
        "seed": job.seed,
        "epochs": recipe.epochs,
        "train_images": len(rows.train),
        "test_images": len(rows.test),
        **{name: last[name] for name in tested},
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "set_up_seconds": round(state.set_up_seconds, 3),
        "train_petaflop": training_petaflop(recipe, len(rows.train)),
        "muon_petaflop": muon_petaflop(state.model, steps) if recipe.optimizer == "muon" else None,
        "train_seconds": round(train_seconds, 3),
        "train_cpu_seconds": None
        if math.isnan(cpu_seconds)
        else round(cpu_seconds, 3),  # older epochs lack it
        "eval_seconds": round(sum(row["eval_seconds"] for row in state.history), 3),
        "time_to_accuracy_seconds": round(warm, 3),
        "cold_time_to_accuracy_seconds": round(warm + state.set_up_seconds, 3),
        "images_per_second": round(images * recipe.epochs / train_seconds, 1),
        "skipped_steps": sum(row["skipped_steps"] for row in state.history),
        "stops": state.stops,
    }


def _say(line: str) -> None:
    print(line, flush=True)


def _silent(_line: str) -> None:
    pass
