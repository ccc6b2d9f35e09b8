"""Tables as CSV files that a spreadsheet opens without computing anything."""

import csv
import io
import re
from collections.abc import Iterable, Sequence


def as_csv(rows: Iterable[Sequence[object]]) -> bytes:
    """The rows as UTF-8, comma-separated, one per line. Text that a spreadsheet would take for a formula gets an
    apostrophe in front; what UTF-8 cannot hold becomes an escape."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and re.match(r"\s*[=+@＝＋－＠-]", value) else value
