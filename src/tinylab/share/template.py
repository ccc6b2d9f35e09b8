"""Texts from the jinja2 templates of this folder."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jinja2

from tinylab.exceptions import UserError
from tinylab.files import printable


def render(template: str, filters: Mapping[str, Callable], values: Mapping, **options) -> str:
    """Return the text. Raise `UserError` if explain.json lacks what the template shows."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, **options,
    )  # fmt: skip
    environment.filters |= filters
    try:
        return environment.get_template(template).render(values)
    except (jinja2.UndefinedError, KeyError, TypeError, ValueError) as error:
        reason = f"explain.json is not what this version of tinylab writes ({printable(error)})"
        raise UserError(f"{reason}: `tinylab explain` makes it anew") from error
