"""What is handed over of a finished run: weights, class list, and a model card.

The card says how good the network is and how that was measured (Mitchell et al., "Model Cards for
Model Reporting", 2019). Its text is card.md.j2, below the metadata that the Hugging Face Hub reads.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path

from tinylab.exceptions import UserError
from tinylab.files import as_csv, plain_text, printable, write_atomically
from tinylab.run.folder import Run, as_json
from tinylab.run.weights import read_weights
from tinylab.share.template import render

MARK = "<!-- model card written by tinylab -->"  # so that no other README is ever replaced
FILES = ("model.safetensors", "config.json", "classes.csv", "README.md")


def write_hand_over(run: Run, folder: Path) -> list[Path]:
    """Write `FILES` to `folder`; README.md is the model card, `ResNet18.from_pretrained` loads it.

    Raise `UserError` if the weights are not those that the summary names, or if the folder holds
    files of these names that no earlier call wrote.
    """
    refuse_others_files(folder)
    _, metadata = read_weights(run.weights, run.summary["model_sha256"])
    names, width = metadata["names"], metadata["recipe"]["width"]
    config = {"architectures": ["ResNet18"], "classes": len(names), "width": width}
    classes = enumerate(zip(metadata["wnids"], names, strict=True))
    # The card first: with it a later call knows the others for its own.
    contents = {
        "README.md": model_card(run, run.explanation, names).encode(),
        "model.safetensors": run.weights.read_bytes(),
        "config.json": as_json(config | {"id2label": dict(enumerate(names))}),
        "classes.csv": as_csv([("index", "wnid", "name"), *((i, *both) for i, both in classes)]),
    }
    if "model" in run.identity:  # a custom network
        del contents["config.json"]
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in FILES if name in contents]


def push(folder: Path, repository: str) -> str:
    """Upload what `write_hand_over` wrote to the Hugging Face Hub, and return the address.

    repository: "NAME" or "OWNER/NAME", made if there is none. Raise `UserError` if that fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        target = HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(
            repo_id=target.repo_id, folder_path=folder, allow_patterns=[*FILES],
            commit_message="Weights and model card by tinylab",
        )  # fmt: skip
    except (HTTPError, OSError, ValueError) as error:
        advice = "is there a network, and a token (`hf auth login`, or HF_TOKEN)?"
        raise UserError(f"{folder} is not pushed: {printable(error)}: {advice}") from error
    return str(target)


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
    from huggingface_hub import EvalResult, ModelCardData

    explanation, recipe, summary = explanation or {}, run.recipe, run.summary
    errors = explanation.get("errors")
    share = summary["test_top1"] / 100
    known, classes = run.data == "Tiny ImageNet", summary["classes"]
    data_set = "images that are not Tiny ImageNet" if run.data == "other images" else run.data
    first = f"first {classes} classes of " if known and classes < 200 else ""
    network = "Custom network" if "model" in run.identity else "ResNet-18"
    title = f"{network}, {first}{data_set}, recipe {printable(recipe.name)}"
    tested = {
        "task_type": "image-classification", "dataset_name": data_set,
        "dataset_type": "tiny-imagenet" if known else "other",
        "dataset_split": f"{summary['protocol']}, test images, {classes} classes",
    }  # fmt: skip
    how = "in percent, last epoch, one network, no test-time augmentation"
    results = [
        EvalResult(
            **tested, metric_type="accuracy", metric_name=f"top-{k} {how}",
            metric_value=round(summary[f"test_top{k}"], 2),
        )
        for k in (1, 5)
    ]  # fmt: skip
    metadata = ModelCardData(
        license="other", license_name="see-the-last-section", library_name="pytorch",
        pipeline_tag="image-classification", model_name=title, eval_results=results,
        tags=["resnet18", "pytorch_model_hub_mixin"] * ("model" not in run.identity)
        + ["safetensors"] + ["tiny-imagenet"] * known,
    )  # fmt: skip
    filters = {
        "plain": plain_text,
        "numbers": lambda values: ", ".join(f"{value:g}" for value in values),
    }
    values = {
        "metadata": metadata.to_yaml(), "title": title, "data_set": data_set, "known": known,
        "mark": MARK, "data": run.data, "identity": run.identity, "environment": run.environment,
        "summary": {"parameters": None, "test_loss": None, "flip_tta_top1": None} | summary,
        "recipe": recipe, "recipe_json": json.dumps(dataclasses.asdict(recipe), indent=1),
        "error": 100 * math.sqrt(share * (1 - share) / summary["test_images"]),
        "names": list(names), "errors": errors, "conflicts": explanation.get("label_conflicts"),
        "calibration": errors and errors.get("calibration"),
        "boxes": explanation.get("localisation"), "boxed": explanation.get("boxed", True),
    }  # fmt: skip
    return render("card.md.j2", filters, values, keep_trailing_newline=True)
