"""The weights file: safetensors with the class list in its metadata."""

import dataclasses
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from tinylab.exceptions import UserError
from tinylab.model import ResNet18
from tinylab.recipe import Recipe


def weights_file(
    model: nn.Module,
    recipe: Recipe,
    wnids: tuple[str, ...],
    names: tuple[str, ...],
    metrics: dict,
    content_sha256: str,
) -> bytes:
    """A safetensors file that can be used without this project: weights, and as JSON in its metadata the classes in the
    order of the logits (wnids and names), the normalisation, the recipe, the final metrics and the data set's hash."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    values = {
        "wnids": wnids,
        "names": names,
        "mean": recipe.mean,
        "std": recipe.std,
        "recipe": dataclasses.asdict(recipe),
        "metrics": metrics,
        "content_sha256": content_sha256,
    }
    metadata = {"format": "pt", "architecture": "ResNet-18, 3x3 stem, no max-pool"}
    return safetensors.torch.save(
        tensors, metadata | {key: json.dumps(value) for key, value in values.items()}
    )


def load_weights(path: Path, wnids: tuple[str, ...] | None = None) -> tuple[ResNet18, dict]:
    """The network of a `weights_file`, on the CPU in eval mode, and its metadata with the JSON decoded.

    Raises `UserError` if the file is missing or is something else, or if `wnids` are given and are not its classes.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file")  # a pipe would be waited for
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        decoded = {
            key: json.loads(metadata[key])
            for key in ("wnids", "names", "recipe", "mean", "std", "metrics")
        }
        _require_fit(decoded, tensors)
        model = ResNet18(len(decoded["wnids"]), decoded["recipe"]["width"])
        model.load_state_dict(tensors)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the run is not finished") from error
    except (
        OSError,
        safetensors.SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} does not hold weights that tinylab wrote: {reason}") from error
    if wnids is not None and tuple(decoded["wnids"]) != tuple(wnids):
        raise UserError(
            f"{path} was trained on other classes, or in another order, than this data set has"
        )
    return model.eval(), decoded


def _require_fit(about: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Raises `ValueError` unless the tensors are those of the network that the metadata tell of. Before it is made: a
    file of a few bytes can claim a network of a terabyte."""
    wnids, names, width = about["wnids"], about["names"], about["recipe"]["width"]
    for texts in (wnids, names):
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise ValueError("its classes are no list of names")
    if len(names) != len(wnids) or not 1 <= len(wnids) <= 100_000:
        raise ValueError(f"it has {len(wnids):,} classes and {len(names):,} names")
    if type(width) is not int or not 1 <= width <= 1024:
        raise ValueError(f"a width of {width}")
    with torch.device("meta"):
        expected = ResNet18(len(wnids), width).state_dict()
    for name in expected.keys() | tensors.keys():
        wanted, found = expected.get(name), tensors.get(name)
        if (
            wanted is None
            or found is None
            or (wanted.shape, wanted.dtype) != (found.shape, found.dtype)
        ):
            raise ValueError(
                f"{name} is not that of a network of width {width} with {len(wnids)} classes"
            )
        if not torch.isfinite(found).all():
            raise ValueError(f"{name} has numbers that are not finite")
