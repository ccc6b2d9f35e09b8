"""What is handed over of a finished run: the weights, the list of their classes, and a model card that says how good
they are and how that was measured (Mitchell et al., "Model Cards for Model Reporting", 2019).

The card has the form that model hubs read: metadata in YAML, then Markdown.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

from tinylab.data.archive import CONTENT_SHA256
from tinylab.exceptions import UserError
from tinylab.files import as_csv, write_atomically
from tinylab.run.folder import METHOD_NAMES, Run, plain_text

MARK = "<!-- model card written by tinylab -->"
"""Stands in every card, so that no other README is ever replaced."""
FILES = ("model.safetensors", "classes.csv", "README.md")

NOT_MEASURED = "not measured"

_PROTOCOLS = {
    "merged": "training and validation images pooled, 70 % / 30 % of every class",
    "official": "the data set's own training and validation images",
    "select": "held-out training images, on which settings may be chosen: not a final number",
}

_TORCHVISION = """\
Without tinylab, in torchvision's `resnet18`, whose stem is replaced by the small one:

```python
import json, safetensors, torch, torchvision

with safetensors.safe_open("model.safetensors", "pt") as file:
    weights, names = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["names"])
model = torchvision.models.resnet18(num_classes=len(names))
model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
model.load_state_dict(weights)
model.eval()
```
"""

_LICENCE = """\
## Licence

tinylab, which trained this network, is under the MIT licence. Tiny ImageNet states no licence and is for \
non-commercial research and teaching, as is ImageNet, from which it was made; whether that binds weights that were \
learned from it is not settled. Whoever publishes these weights says under which terms."""


def write_hand_over(run: Run, about: dict, folder: Path) -> list[Path]:
    """Writes model.safetensors, classes.csv (index, wnid, name, in the order of the logits) and README.md, the model
    card, to `folder`; returns their paths. `about` is what `predict.load` says of the weights.

    Raises `UserError` if the run is not finished, if its weights are not those that its summary names, if the folder
    holds files of these names that no earlier call wrote, or if it cannot be written.
    """
    refuse_others_files(folder)
    card = model_card(run, run.explanation, about["names"])
    try:
        weights = run.weights.read_bytes()
        if hashlib.sha256(weights).hexdigest() != run.summary["model_sha256"]:
            raise UserError(
                f"{run.weights} is damaged: it is not the file that the run's summary names"
            )
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot copy {run.weights} to {folder}: {error.strerror or error}"
        ) from error
    # The card comes first: with it a later call knows the others for its own, also if this one is cut short.
    contents = {
        "README.md": card.encode(),
        "model.safetensors": weights,
        "classes.csv": _classes_csv(about),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in FILES]


def refuse_others_files(folder: Path) -> None:
    """Raises `UserError` if the folder holds files of `FILES`' names that `write_hand_over` did not write."""
    card = folder / "README.md"
    try:
        ours = card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")
        taken = [] if ours else [name for name in FILES if (folder / name).exists()]
    except OSError as error:
        raise UserError(f"cannot read {error.filename or card}: {error.strerror}") from error
    if taken:
        raise UserError(f"{folder} holds another {taken[0]}: choose an empty folder")


def _classes_csv(about: dict) -> bytes:
    texts = zip(about["wnids"], about["names"], strict=True)
    return as_csv(
        [("index", "wnid", "name"), *((index, *both) for index, both in enumerate(texts))]
    )


def model_card(run: Run, extra: dict | None = None, names: Iterable[str] = ()) -> str:
    """The model card of a finished run, Markdown with a YAML head. What was not measured is said not to be.

    extra: what explain.json holds, or None if the run has not been explained. names: of the classes, in the order of
    the logits. Raises `UserError` if the run is not finished or its records are not sound.
    """
    parts = [_head(run), f"# {_title(run)}", MARK, _introduction(run), _result(run)]
    parts += [_answers(extra), _calibration(extra), _boxes(extra)]
    parts += [_use(run), _training(run), _limits(run), _classes(names), _LICENCE]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- What was measured ------------------------------------------------------------------------------------------------


def _head(run: Run) -> str:
    """The YAML that hubs read. JSON's strings and numbers are YAML's, too, and quote whatever they hold."""
    summary = run.summary
    known = _is_tiny_imagenet(run)
    accuracies = []
    for name, value in (("top-1", summary["test_top1"]), ("top-5", summary["test_top5"])):
        said = f"{name} in percent, last epoch, one network, no test-time augmentation"
        accuracies += [
            "          - type: accuracy",
            f"            name: {said}",
            f"            value: {value:.2f}",
        ]
    split = _yaml(f"{summary['protocol']}, test images, {summary['classes']} classes")
    return "\n".join(
        [
            "---",
            "license: other",
            "license_name: see-the-last-section",
            "library_name: pytorch",
            "pipeline_tag: image-classification",
            f"tags: [image-classification, resnet18, safetensors{', tiny-imagenet' if known else ''}]",
            "model-index:",
            f"  - name: {_yaml(_title(run))}",
            "    results:",
            "      - task: {type: image-classification}",
            f"        dataset: {{name: {_yaml(_data_set(run))}, type: {'tiny-imagenet' if known else 'other'}, "
            f"split: {split}}}",
            "        metrics:",
            *accuracies,
            "---",
        ]
    )


def _yaml(text: str) -> str:
    """`text` in YAML's double quotes, on one line, without characters that YAML has no way to write."""
    return json.dumps("".join(character for character in text if character.isprintable())[:200])


def _is_tiny_imagenet(run: Run) -> bool:
    return run.identity["content_sha256"] == CONTENT_SHA256


def _data_set(run: Run) -> str:
    return (
        "Tiny ImageNet"
        if _is_tiny_imagenet(run)
        else "another data set than the published Tiny ImageNet"
    )


def _title(run: Run) -> str:
    classes = run.summary["classes"]
    which = f"first {classes} classes of " if _is_tiny_imagenet(run) and classes < 200 else ""
    return f"ResNet-18, {which}{_data_set(run)}, recipe {run.recipe.name}"


def _introduction(run: Run) -> str:
    summary, recipe = run.summary, run.recipe
    parameters = summary.get("parameters")
    size = f"{parameters:,} parameters" if isinstance(parameters, int) else "parameters not counted"
    width = (
        "" if recipe.width == 64 else f", {recipe.width} channels in its first stage instead of 64"
    )
    return (
        f"A ResNet-18 for images of 64 x 64 pixels (3 x 3 stem with stride 1, no max-pooling; {size}{width}), trained "
        f"from scratch on {_data_set(run)}: {summary['train_images']:,} images of {summary['classes']} classes, "
        f"{recipe.epochs} epochs. No other data and no pretrained weights were used."
    )


def _result(run: Run) -> str:
    summary, identity, protocol = run.summary, run.identity, run.summary["protocol"]
    share, images = summary["test_top1"] / 100, summary["test_images"]
    error = 100 * math.sqrt(max(share * (1 - share), 0) / max(images, 1))
    lines = [
        "## Result",
        "",
        "| | |",
        "|---|---|",
        f"| top-1 accuracy | **{summary['test_top1']:.2f} %** |",
        f"| top-5 accuracy | {summary['test_top5']:.2f} % |",
        f"| mean cross-entropy | {_shown(summary.get('test_loss'), '{:.3f}')} |",
        f"| test images | {images:,} |",
        f"| split | {plain_text(protocol)}: {_PROTOCOLS.get(protocol, 'unknown to this version of tinylab')} |",
        f"| split, sha256 | {plain_text(identity['split_sha256'])} |",
        f"| data, sha256 of the content | {plain_text(identity['content_sha256'])} |",
        f"| top-1 with flip test-time augmentation (apart) | {_shown(summary.get('flip_tta_top1'), _PERCENT)} |",
        f"| other seeds, other splits, other data | {NOT_MEASURED} |",
        "",
        f"After the last epoch, never the best one; one network, seed {summary['seed']}; no test-time augmentation; "
        f"computed in {plain_text(run.environment.get('precision'))}. On {images:,} images the accuracy has a sampling "
        f"error of {error:.2f} points (one standard deviation); to that comes the luck of the seed.",
    ]
    if _is_tiny_imagenet(run) and summary["classes"] < 200:
        lines.append(
            f"{summary['classes']} classes are another task than all 200: their results do not compare."
        )
    if protocol == "merged":
        lines.append(
            "This split has other test images than the official one, and fewer for training: do not compare."
        )
    return "\n".join(lines)


def _answers(extra: dict | None) -> str:
    """The classes and the pairs of classes that give most trouble."""
    lines = ["## What it gets wrong", ""]
    errors = _at(extra, "errors")
    if not isinstance(errors, dict):
        return "\n".join([*lines, _missing("the accuracy of each class")])
    for key, which in (("best", "Best"), ("worst", "Worst")):
        classes = [each for each in _list(errors, key) if _is_number(_at(each, "top1"))][:5]
        said = [f"{_text(each, 'name')} {each['top1']:.1f} %" for each in classes]
        lines += [f"* {which} classes (top-1): {', '.join(said) or NOT_MEASURED}."]
    pairs = [each for each in _list(errors, "pairs") if _is_number(_at(each, "count"))][:5]
    said = [
        f"{_text(each, 'one', 'name')} and {_text(each, 'other', 'name')} ({each['count']:,})"
        for each in pairs
    ]
    lines += [
        f"* Most often confused (test images, both ways together): {', '.join(said) or 'no two classes'}."
    ]
    conflicts = _at(extra, "label_conflicts")
    if _is_number(_at(conflicts, "tested")) and _is_number(_at(conflicts, "wrong")):
        lines.append(
            f"* {conflicts['tested']:,} test images have a twin, equal in every byte, with another label; "
            f"{conflicts['wrong']:,} of them are answered wrongly."
        )
    return "\n".join(lines)


def _calibration(extra: dict | None) -> str:
    lines = ["## Are its probabilities right?", ""]
    found = _at(extra, "errors", "calibration")
    before, after, temperature = (
        _at(found, "before", "ece"),
        _at(found, "after", "ece"),
        _at(found, "temperature"),
    )
    if not _is_number(before):
        return "\n".join([*lines, _missing("calibration")])
    confidence = _at(found, "before", "mean_confidence")
    lines.append(
        f"As they come, the probability of the answer is {_shown(confidence, _SHARE)} on average; the expected "
        f"calibration error is {_shown(before, _SHARE)} ({_shown(_at(found, 'bins'), '{:.0f}')} bins). Logits divided "
        f"by a temperature of {_shown(temperature, '{:.3f}')} have {_shown(after, _SHARE)} (fitted on one half of the "
        "test images, measured on the other, both ways)."
    )
    return "\n".join(lines)


def _boxes(extra: dict | None) -> str:
    lines = ["## Do its maps show the object?", ""]
    found = _at(extra, "localisation")
    groups = [each for each in _list(found, "groups") if _is_number(_at(each, "images"))]
    if not groups:
        return "\n".join(
            [*lines, _missing("the agreement of its class activation maps with the boxes")]
        )
    method = METHOD_NAMES.get(str(_at(found, "method")), _text(found, "method"))
    lines += [
        f"{method} at {_text(found, 'stage')}, {_shown(_at(found, 'scored'), '{:,}')} test images, "
        "95 % bootstrap intervals. Hit: the map's largest value lies in the object's box. Energy: share of the map "
        "inside it. Only what exceeds the baselines says anything: boxes are large and mostly in the middle.",
        "",
        "| boxes | answers | map of class | images | hit | hit of the centre | energy | energy of a uniform map |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in groups:
        cells = [
            _text(group, "boxes"),
            _text(group, "answers"),
            _text(group, "class"),
            f"{group['images']:,}",
        ]
        cells += [_interval(group.get(name)) for name in ("hit", "centre_hit", "energy", "uniform")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _missing(what: str) -> str:
    return f"Not measured: {what}. (`tinylab explain` does, before `tinylab export`.)"


_PERCENT, _SHARE = "{:.2f} %", "{:.1%}"


def _shown(value: object, pattern: str) -> str:
    return pattern.format(value) if _is_number(value) else NOT_MEASURED


def _interval(value: object) -> str:
    ends = [_at(value, name) for name in ("mean", "low", "high")]
    if not all(map(_is_number, ends)):
        return "none"
    mean, low, high = (100 * end for end in ends)
    return f"{mean:.1f} % ({low:.1f} to {high:.1f})"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at(value: object, *keys: str) -> object:
    """What lies below `keys` in JSON that may be anybody's; None if there is no such thing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _list(value: object, key: str) -> list:
    found = _at(value, key)
    return found if isinstance(found, list) else []


def _text(value: object, *keys: str) -> str:
    return plain_text(_at(value, *keys))


# --- How it was made, and how to use it -------------------------------------------------------------------------------


def _use(run: Run) -> str:
    recipe = run.recipe
    side = recipe.test_resolution
    plain = _TORCHVISION
    if recipe.width != 64:
        plain = f"torchvision's `resnet18` has another width than this network's {recipe.width}: it cannot load it.\n"
    return f"""## How to use it

`model.safetensors` holds the weights and, as JSON in its metadata, the classes in the order of the logits (`wnids`, \
`names`), `mean`, `std`, the recipe and the metrics. With tinylab, from this folder:

    tinylab predict . picture.jpg

```python
from tinylab.share.predict import load, predict, read_image

model, about = load(".")
answers = predict(model, about, read_image("picture.jpg")[None])
```

{plain}
Its input is RGB, {side} x {side} pixels, scaled to 0..1, less mean {_numbers(recipe.mean)}, divided by std \
{_numbers(recipe.std)}. tinylab turns a picture upright, cuts out the middle square and scales it by area to 64 x 64."""


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _training(run: Run) -> str:
    environment, summary = run.environment, run.summary
    rows = [
        (
            "time of training",
            f"{summary['train_seconds'] / 60:.1f} min, set-up and tests not counted",
        )
    ]
    for key, what in _ENVIRONMENT.items():
        value = environment.get(key)
        rows.append((what, "not recorded" if value is None else plain_text(value)))
    recipe = json.dumps(dataclasses.asdict(run.recipe), indent=1)
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return (
        f"## How it was trained\n\nRecipe `{run.recipe.name}`, seed {summary['seed']}.\n\n| | |\n|---|---|\n{table}\n\n"
        f"<details><summary>Every field of the recipe</summary>\n\n```json\n{recipe}\n```\n\n</details>"
    )


_ENVIRONMENT = {
    "device": "device",
    "precision": "number format",
    "torch": "torch",
    "torchvision": "torchvision",
    "platform": "platform",
    "commit": "commit of tinylab",
    "date": "date",
}


def _limits(run: Run) -> str:
    classes = run.summary["classes"]
    origin = (
        "It learned from other data than the published Tiny ImageNet: made-up pictures, perhaps."
    )
    if _is_tiny_imagenet(run):
        origin = "It learned from web photographs, some of which have wrong labels, in training as in the test."
    return f"""## Limits

* It knows {classes} classes and answers with one of them whatever the picture shows, often with high probability.
* It sees 64 x 64 pixels of the middle square. Small things, text and what lies at the rim are lost.
* {origin}
* How it does on other kinds of pictures, with noise, under attack, or for different groups and regions: {NOT_MEASURED}.
* It is for teaching and research, not for decisions about people or their safety."""


def _classes(names: Iterable[str]) -> str:
    listed = ", ".join(f"{index} {plain_text(name)}" for index, name in enumerate(names))
    if not listed:
        return ""
    return f"<details><summary>Its classes, in the order of the logits</summary>\n\n{listed}\n\n</details>"
