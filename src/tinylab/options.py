"""What the commands with a recipe say of their options: in groups, the common ones first."""

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

from tinylab.exceptions import UserError
from tinylab.recipe import BATCHED_ONLY, Recipe

GROUPS = {
    "schedule and optimiser": (
        "epochs", "batch_size", "max_learning_rate", "warmup_share", "anneal", "start_divisor",
        "final_divisor", "base_momentum", "max_momentum", "nesterov", "weight_decay", "decay_1d",
        "label_smoothing", "optimizer", "muon_learning_rate", "muon_weight_decay", "micro_batch",
        "drop_last",
    ),
    "network": ("width", "initialisation", "zero_init_residual", "bn_momentum"),
    "images": ("split", "resolution", "ramp", "test_resolution", "mean", "std"),
    "augmentation": (
        "augmentation", "flip_probability", "pad_to", "hole_size", "hole_probability",
    ),
    "augmentation, batched only": BATCHED_ONLY,
    "averaged weights": ("ema_decay", "ema_bn_batches"),
    "name": ("name",),
}  # fmt: skip
"""Every field of a recipe."""
COMMON = ("epochs", "batch_size", "max_learning_rate", "weight_decay", "width", "split")
NAMES = {"run_folder": "run", "compiled": "compile"}
"""Options that are called otherwise than their fields."""
MEANT = {
    "lr": "max-learning-rate", "learning-rate": "max-learning-rate", "wd": "weight-decay",
    "bs": "batch-size", "classes": "limit-classes", "momentum": "max-momentum",
}  # fmt: skip


def describe(command: type, prog: str, recipe: Recipe, everything: bool) -> str:
    """Return the help text of a command whose field `recipe` has these defaults."""
    own = [field for field in dataclasses.fields(command) if field.name != "recipe"]
    groups = {"run": {field.name: field.default for field in own}}
    if everything:
        groups |= {
            group: {name: getattr(recipe, name) for name in names}
            for group, names in GROUPS.items()
        }
    else:
        groups["recipe, the rest by --help-all"] = {name: getattr(recipe, name) for name in COMMON}
    known = {name: (hint, doc) for each in (Recipe, command) for name, hint, doc in fields(each)}
    lines = [f"usage: {prog} [options]", "", inspect.cleandoc(command.__doc__)]
    for group, defaults in groups.items():
        lines += ["", f"{group}:"]
        for name, default in defaults.items():
            hint, doc = known[name]
            lines += entry(name, hint, doc, default)
    return "\n".join(lines)


def fields(kind: type) -> Iterator[tuple[str, object, str]]:
    """Yield the fields of a dataclass and of its bases: name, type, the docstring below it."""
    hints = get_type_hints(kind)
    for each in kind.__mro__[:-1]:
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0].body
        for field, below in itertools.pairwise([*body, ast.Pass()]):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(below, ast.Expr)
                text = ast.literal_eval(below.value) if documented else ""
                yield field.target.id, hints[field.target.id], " ".join(text.split())


def entry(name: str, hint: object, doc: str, default: object) -> list[str]:
    """Return the lines of one option: its name and what it takes, then what it does."""
    option = NAMES.get(name, name).replace("_", "-")
    if get_origin(hint) in (Union, types.UnionType):  # "or none"
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        takes = "|".join(get_args(hint))
    else:
        takes = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: ""}.get(hint, "X ...")
    if hint is bool:
        option, default = f"[no-]{option}", "yes" if default else "no"
    shown = "none" if default is None else default
    head = f"  --{option} {takes}".rstrip()
    text = textwrap.wrap(f"{doc} [{shown}]", 53)
    if len(head) <= 24:
        return [f"{head:<26}{text[0]}", *(" " * 26 + line for line in text[1:])]
    return [head, *(" " * 26 + line for line in text)]


def refuse_unknown(arguments: Sequence[str], command: type, with_recipe: bool) -> None:
    """Raise `UserError` for an option that the command lacks, and name the nearest there is."""
    names = [name for kind in (command, *with_recipe * (Recipe,)) for name, _, _ in fields(kind)]
    known = {NAMES.get(name, name).replace("_", "-") for name in names} | {"run-folder", "layer"}
    for argument in arguments:
        option = argument.partition("=")[0].removeprefix("--").replace("_", "-")
        if not argument.startswith("--") or option in known | {"", "help"}:
            continue
        if option.removeprefix("no-") in known:
            continue
        near = difflib.get_close_matches(option, known, 1)
        best = MEANT[option] if MEANT.get(option) in known else near[0] if near else None
        raise UserError(
            f"unknown option --{option}" + (f": did you mean --{best}?" if best else "")
        )
