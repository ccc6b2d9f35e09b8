"""What a run records: whose it is, the numbers of an epoch, the files of a finished run."""

import hashlib
import math
from pathlib import Path

import torch
from torch import nn

from tinylab.custom import gflop_per_image
from tinylab.data.archive import class_order_sha256
from tinylab.data.dataset import Dataset
from tinylab.data.split import Split
from tinylab.exceptions import UserError
from tinylab.files import write_atomically
from tinylab.recipe import Recipe, training_petaflop
from tinylab.run import checkpoint
from tinylab.run.environment import Compute
from tinylab.run.folder import Run, refuse_another, refuse_foreign, relative_to_here  # fmt: skip
from tinylab.run.verify import write_checksums
from tinylab.run.weights import weights_file
from tinylab.training.evaluate import score
from tinylab.training.optim import NEWTON_SCHULZ_STEPS
from tinylab.training.progress import means
from tinylab.training.step import TrainState


def identity_of(dataset: Dataset, rows: Split, seed: int, compute: Compute, compiled: bool) -> dict:
    """Return what decides a run's result besides its recipe: the contents of run.json."""
    title = "made-up shapes" if dataset.made_up else dataset.title
    return {
        "protocol": rows.protocol,
        "classes": rows.classes,
        "seed": seed,
        "precision": compute.precision,
        "device": compute.device.type,
        **({"compiled": True} if compiled else {}),
        "content_sha256": dataset.content_sha256,
        "split_sha256": rows.sha256,
        "class_order_sha256": class_order_sha256(dataset.wnids[: rows.classes]),
        "data_folder": relative_to_here(dataset.folder),
        **({"data_title": title} if title else {}),
    }


def restore(
    run: Run, mirror: Path | None, state: TrainState, continue_anyway: bool
) -> tuple[bool, dict | None, str | None]:
    """Return whether the run is finished, its newest checkpoint, and a line for the user.

    state: of the run that is to be. Raise `UserError` if the folder or the checkpoint is another
    run's, or was begun with other code.
    """
    finished = run.finished
    saved, note = (None, None) if finished else checkpoint.load(run.checkpoints, mirror)
    if run.begun:
        refuse_another(run, state.run)  # says more than a checkpoint does
    else:
        refuse_foreign(run)
    if saved:
        refuse_another(run, state.run, saved.get("run", {}))
        begun = run.environment if run.begun else saved.get("environment", {})
        before, now = begun.get("source_sha256"), state.environment["source_sha256"]
        if before and before != now and not continue_anyway:
            raise UserError(
                f"{run.folder} was begun with other code ({before[:12]} -> {now[:12]}): choose "
                "another --run, or continue it with --continue-anyway (in the notebook: RUN, "
                "CONTINUE_ANYWAY)"
            )
    return finished, saved, note


def epoch_row(state: TrainState, totals: torch.Tensor) -> dict:
    """Return a line of metrics.jsonl without the test's part: percent, nats per image, seconds.

    totals: of all processes, as `TrainState.totals`.
    """
    loss, top1, top5 = means(totals)
    row = {
        "epoch": state.epoch,
        "learning_rate": state.epoch_learning_rate,
        "train_loss": loss,
        "train_top1": top1,
        "train_top5": top5,
        "train_seconds": round(state.epoch_seconds, 3),
        "train_cpu_seconds": round(state.epoch_cpu_seconds, 3),
        "eval_seconds": 0.0,
        "images_per_second": round(totals[3].item() / state.epoch_seconds, 1),
        "skipped_steps": int(state.skipped),
    }
    if math.isnan(state.epoch_cpu_seconds):  # an older version did not count them
        del row["train_cpu_seconds"]
    return row


def muon_petaflop(model: nn.Module, steps: int) -> float:
    """Return PFLOP of orthogonalising the convolution weights of `model` in `steps` steps."""
    flop, square_products = 0, NEWTON_SCHULZ_STEPS + 3 * (NEWTON_SCHULZ_STEPS - 1)
    for each in (parameter for parameter in model.parameters() if parameter.ndim == 4):
        short, long = sorted((each.shape[0], each[0].numel()))
        flop += 2 * short**2 * (2 * long + square_products * short)
    return float(f"{flop * steps / 1e15:.4g}")


def finish(
    run: Run, state: TrainState, recipe: Recipe, dataset: Dataset, rows: Split, steps: int,
    logits: torch.Tensor, of_mirror_images: torch.Tensor, labels: torch.Tensor,
) -> None:  # fmt: skip
    """Write predictions, weights, checksums and, last, the summary that says the run is finished.

    steps: of an epoch. logits, of_mirror_images: fp32 (N, classes). Time to accuracy is all
    training and the one last test, warm; cold has the set-up, too.
    """
    # ---- predictions ----
    final, flipped = score(logits, labels), score((logits + of_mirror_images) / 2, labels)
    run.write_predictions(rows=rows.test, labels=final.labels, logits=final.logits)

    # ---- the numbers ----
    last = state.history[-1]
    train_seconds = sum(row["train_seconds"] for row in state.history)
    cpu_seconds = sum(row.get("train_cpu_seconds", math.nan) for row in state.history)
    images = min(len(rows.train), steps * recipe.batch_size)
    warm = train_seconds + last["eval_seconds"]
    gflop = gflop_per_image(state.model) if "model" in state.run else None
    muon = muon_petaflop(state.model, steps * recipe.epochs)
    tested = ("train_loss", "train_top1", "test_loss", "test_top1", "test_top5", "test_correct")
    summary = {
        "recipe": recipe.name,
        "protocol": rows.protocol,
        "classes": rows.classes,
        "seed": state.run["seed"],
        "epochs": recipe.epochs,
        "train_images": len(rows.train),
        "test_images": len(rows.test),
        **{name: last[name] for name in tested},
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "set_up_seconds": round(state.set_up_seconds, 3),
        "train_petaflop": training_petaflop(recipe, len(rows.train), gflop),
        "muon_petaflop": muon if recipe.optimizer == "muon" else None,
        "train_seconds": round(train_seconds, 3),
        "train_cpu_seconds": None if math.isnan(cpu_seconds) else round(cpu_seconds, 3),
        "eval_seconds": round(sum(row["eval_seconds"] for row in state.history), 3),
        "time_to_accuracy_seconds": round(warm, 3),
        "cold_time_to_accuracy_seconds": round(warm + state.set_up_seconds, 3),
        "images_per_second": round(images * recipe.epochs / train_seconds, 1),
        "skipped_steps": sum(row["skipped_steps"] for row in state.history),
        "stops": state.stops,
        "flip_tta_top1": flipped.numbers()["test_top1"],
    }

    # ---- weights, and what says that all is there ----
    classes = (dataset.wnids[: rows.classes], dataset.names[: rows.classes])
    source = state.run.get("model")
    weights = weights_file(state.tested, recipe, *classes, summary, dataset.content_sha256, source)
    write_atomically(run.weights, weights)
    summary["model_sha256"] = hashlib.sha256(weights).hexdigest()
    write_checksums(run, summary)
    run.write("summary.json", summary)
