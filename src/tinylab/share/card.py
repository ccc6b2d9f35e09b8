"""What is handed over of a finished run: weights, class list, and a model card.

The card says how good the network is and how that was measured (Mitchell et al., "Model Cards for
Model Reporting", 2019). Its text is card.md.j2: metadata in YAML, which hubs read, then Markdown.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path

from tinylab.exceptions import UserError
from tinylab.files import as_csv, plain_text, printable, write_atomically
from tinylab.run.folder import Run
from tinylab.run.weights import read_weights
from tinylab.share.template import render

MARK = "<!-- model card written by tinylab -->"  # so that no other README is ever replaced
FILES = ("model.safetensors", "classes.csv", "README.md")


def write_hand_over(run: Run, folder: Path) -> list[Path]:
    """Write model.safetensors, classes.csv and README.md, the model card, to `folder`.

    Raise `UserError` if the weights are not those that the summary names, or if the folder holds
    files of these names that no earlier call wrote.
    """
    refuse_others_files(folder)
    _, metadata = read_weights(run.weights, run.summary["model_sha256"])
    classes = enumerate(zip(metadata["wnids"], metadata["names"], strict=True))
    # The card first: with it a later call knows the others for its own.
    contents = {
        "README.md": model_card(run, run.explanation, metadata["names"]).encode(),
        "model.safetensors": run.weights.read_bytes(),
        "classes.csv": as_csv([("index", "wnid", "name"), *((i, *both) for i, both in classes)]),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in FILES]


def refuse_others_files(folder: Path) -> None:
    """Raise `UserError` if the folder holds files that `write_hand_over` would replace."""
    card = folder / "README.md"
    ours = card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")
    if not ours and (taken := [name for name in FILES if (folder / name).exists()]):
        raise UserError(f"{folder} holds another {taken[0]}: choose an empty folder")


def model_card(run: Run, explanation: dict | None = None, names: Iterable[str] = ()) -> str:
    """Return the model card of a finished run. What was not measured is said not to be.

    explanation: what explain.json holds. names: of the classes, in the order of the logits.
    """
    explanation, recipe = explanation or {}, run.recipe
    errors = explanation.get("errors")
    share = run.summary["test_top1"] / 100
    filters = {
        "plain": plain_text, "yaml": lambda text: json.dumps(printable(text)),
        "numbers": lambda values: ", ".join(f"{value:g}" for value in values),
    }  # fmt: skip
    values = {
        "mark": MARK, "data": run.data, "identity": run.identity, "environment": run.environment,
        "summary": {"parameters": None, "test_loss": None, "flip_tta_top1": None} | run.summary,
        "recipe": recipe, "recipe_json": json.dumps(dataclasses.asdict(recipe), indent=1),
        "error": 100 * math.sqrt(share * (1 - share) / run.summary["test_images"]),
        "names": list(names), "errors": errors, "conflicts": explanation.get("label_conflicts"),
        "calibration": errors and errors.get("calibration"),
        "boxes": explanation.get("localisation"), "boxed": explanation.get("boxed", True),
    }  # fmt: skip
    return render("card.md.j2", filters, values, keep_trailing_newline=True)
