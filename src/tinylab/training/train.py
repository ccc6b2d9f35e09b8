"""The experiment: a recipe and a data set go in, a finished run folder comes out.

`train` reads from top to bottom; one optimiser step is `step.train_step`.
"""

import contextlib
import dataclasses
import itertools
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tinylab.custom import customise, fit_line
from tinylab.data.dataset import Dataset, refuse_inside
from tinylab.data.loader import Images, make_loader, statistics_batches
from tinylab.data.split import make_split
from tinylab.exceptions import Stopped, UserError
from tinylab.files import lock
from tinylab.recipe import Recipe
from tinylab.run import checkpoint, environment
from tinylab.run.folder import Run, default_folder, enter_run, hashes
from tinylab.training.average import reestimate_batch_norm
from tinylab.training.distributed import join
from tinylab.training.evaluate import make_forward, mirrored, score, test_logits

from tinylab.training.progress import (  # isort: skip
    Progress, heading, log_lines, print_line, silent, stop_signal, watched,
)  # fmt: skip
from tinylab.training.record import epoch_row, finish, identity_of, restore
from tinylab.training.step import new_state, require_batches, train_step
from tinylab.training.track import Kind, start
from tinylab.training.warm_up import memory_hint, warm_up

SAVE_SECONDS = 300  # an epoch that takes longer is saved within, too
_RUNS = itertools.count()  # only a process's first run has a cold clock


def train(
    recipe: Recipe, dataset: Dataset, *, split: str | None = None, folder: Path | None = None,
    seed: int = 0, limit_classes: int | None = None, device: str = "auto", precision: str = "auto",
    compiled: bool = False, workers: int | None = None, mirror: Path | None = None,
    test_every: int = 1, continue_anyway: bool = False, track: Kind | None = None,
    transform: Callable | None = None, model: Callable | None = None, loss: Callable | None = None,
    init: Path | None = None, quiet: bool = False,
) -> Run:  # fmt: skip
    """Train `recipe` and return the finished run. A stopped run continues bit for bit.

    split: None is the recipe's. folder: None is runs/<recipe>-<split>-s<seed>. limit_classes: only
    the first so many. workers: processes that run albumentations; they change no bit. mirror: a
    folder of this run's own that gets each checkpoint, too; the run continues from the newest whole
    one of both. test_every: epochs; the last one is always tested. continue_anyway: though the
    code has changed. transform, model, loss, init: see `custom.customise`. quiet: no log, no bar.
    Under torchrun every process calls this and trains its share; the first one writes.
    Raise `UserError` if the run cannot be made, `RecipeFailed` if its loss is no longer finite,
    `Stopped` after SIGINT or SIGTERM.
    """
    # ---- check ----
    started = time.perf_counter()
    timing = {"earlier_runs": next(_RUNS), "compile_cache": environment.compile_cache()}
    compute = environment.choose(device, precision, compiled=compiled)
    recipe = dataclasses.replace(recipe, split=split or recipe.split)
    rows = make_split(dataset, recipe.split, limit_classes)
    counts = (len(rows.train), len(rows.test))
    run = Run(Path(folder or default_folder(recipe, seed)))
    refuse_inside(dataset, run.folder, "run")
    if mirror is not None:
        refuse_inside(dataset, mirror, "mirror")
        if mirror.resolve() in (run.folder.resolve(), run.checkpoints.resolve()):
            raise UserError(f"the mirror {mirror} is the run's own folder: choose another --mirror")
    if test_every < 1:
        raise UserError(f"test-every must be at least 1, not {test_every}")
    tracker = start(track, run) if track else None
    custom = customise(transform, model, loss, init, rows.classes, compute.device)

    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(join(compute.device))
        writes, several = ranks.rank == 0, ranks.size > 1
        say = silent if quiet or not writes else print_line
        if compiled and several:
            raise UserError("--compile serves a single process")
        require_batches(recipe, counts[0], ranks)
        stack.enter_context(environment.fastest_convolutions(compute))
        stack.enter_context(memory_hint(recipe, compute))

        # ---- set up: everything slow, before the clock starts ----
        images = Images(dataset.images, dataset.labels, compute.device)
        how = {"images": images, "transform": custom.transform}
        how |= {"rank": ranks.rank, "ranks": ranks.size}
        loader = make_loader(dataset, rows.train, recipe, seed, compute.device, workers, **how)
        stack.enter_context(contextlib.closing(loader))
        if writes:
            stack.enter_context(run.lock())
        if writes and mirror:
            stack.enter_context(lock(mirror))
        how = (compute, ranks, compiled, model, custom.init)
        state = new_state(recipe, rows.classes, seed, loader.steps, *how)
        identity = identity_of(dataset, rows, seed, compute, compiled) | custom.identity
        state.run = dataclasses.asdict(recipe) | identity
        state.environment = environment.describe_environment(compute, ranks.size) | hashes(identity)
        found = restore(run, mirror, state, continue_anyway) if writes else None
        finished, saved, note = ranks.gather(found)[0]
        if not finished:
            say(heading(compute, compiled, dataset, recipe, rows, loader.steps))
            if custom.init:
                say(fit_line(custom.init, state.model))
            if compiled or (compute.device.type == "cuda" and not several):
                say("warming up")
                warm_up(state, recipe, compute, counts, loss)  # before the folder is this run's
        if saved:
            state.load_checkpoint(saved)
            state.totals *= writes  # saved as the sum over all processes
            state.stops += 1
        history = run.history if finished else state.history
        if writes:
            here, elsewhere = state.environment | timing, saved and saved.get("environment")
            for line in enter_run(run, recipe, identity, here, elsewhere):
                say(line)
            if not finished:
                run.sweep()
                checkpoint.clean(run.checkpoints)
            if tracker:
                tracker.up_to(history)
                stack.enter_context(contextlib.closing(tracker))
        if finished or note:
            say(f"{run.folder} is finished; this is its log" if finished else f"note: {note}")
        for row in history:
            say(log_lines(row, recipe.epochs))
        if finished:
            return run
        if saved:
            say(f"continuing {run.folder} in epoch {state.epoch} after {state.step} of its steps")
            if writes:
                run.write_history(history)  # without a line whose checkpoint was lost
        stops = stack.enter_context(stop_signal(say, patient=several))
        state.set_up_seconds += time.perf_counter() - started

        # ---- what the loop below does in several places ----
        def save() -> None:
            state.require_finite(weights=True)
            content = state.to_checkpoint() | {"totals": ranks.sum(state.totals)}
            if writes:
                checkpoint.save(run.checkpoints, content, mirror, say)
            progress.since_saved = 0.0

        def stop_if_asked() -> None:
            if ranks.any(bool(stops)):
                save()
                text = f"stopped in epoch {state.epoch} after {state.step} steps; the same command"
                raise Stopped(f"{text} continues {run.folder}", [*stops, signal.SIGTERM][0])

        def watch(batches, title, total=None):
            for batch in watched(batches, title, total, say):
                if not several:  # processes have different numbers of batches
                    stop_if_asked()
                yield batch

        how = {"images": images, "ranks": ranks, "watch": watch}
        test = partial(test_logits, state.tested, dataset, rows.test, recipe, compute, **how)
        tested = {*range(test_every, recipe.epochs, test_every), recipe.epochs}
        forecast = compute.device.type == "cpu" and not several
        progress = Progress(state, recipe, loader.steps, counts, tested, say, forecast)
        logits = None

        while state.epoch <= recipe.epochs:
            # ---- train ----
            state.model.train()
            if state.step == 0:
                state.epoch_learning_rate = state.optimizer.param_groups[0]["lr"]
            compute.synchronise()
            progress.begin()
            with progress.bar, contextlib.closing(loader.epoch(state.epoch, state.step)) as batches:
                for batch in batches:
                    custom.seed_step(seed, state.epoch, state.step, ranks.rank)
                    train_step(state, recipe, compute, batch, ranks, loss)
                    progress.step()
                    stop_if_asked()
                    if ranks.any(progress.since_saved > SAVE_SECONDS):
                        save()
            compute.synchronise()
            progress.tick()
            state.require_finite()
            ranks.copy_buffers(state.model)
            row = epoch_row(state, ranks.sum(state.totals))

            # ---- test: the average, with batch-norm statistics of its own ----
            if state.epoch in tested:
                save()  # a test that runs out of memory costs no epoch
                began = time.perf_counter()
                if state.average is not None:
                    plain = statistics_batches(images, rows.train, recipe, seed, state.epoch)
                    plain = watch(plain, "batch-norm statistics")
                    forward = make_forward(state.tested, recipe, compute)
                    reestimate_batch_norm(state.tested, plain, forward)
                logits, labels = test()
                row |= score(logits, labels).numbers()
                row["eval_seconds"] = round(time.perf_counter() - began, 3)

            # ---- record ----
            state.history.append(row)
            state.next_epoch()
            save()
            if writes:
                run.write_history(state.history)
                if tracker:
                    tracker.epoch(row)
            say(log_lines(row, recipe.epochs))

        # ---- finish ----
        if logits is None:  # stopped after the last epoch was saved, its statistics with it
            logits, labels = test()
        flipped, _ = test(title="test of mirror images", view=mirrored)
        if writes:
            finish(run, state, recipe, dataset, rows, loader.steps, logits, flipped, labels)
    return run
