"""What the tests of reliability share: how much to do, and the table of what was done.

A module names the row of the table that it fills (`pytestmark = pytest.mark.promise("kill")`), and its tests add to it
what they counted. `make test` does the quick amount; `--soak` the full one; `--table FILE` writes the table.
"""

import datetime
import platform
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from publish import replace_between

from tinylab.run.environment import device_name

PROMISES = {
    "kill": "SIGKILL anywhere, resume: the same bits",
    "faults": "seeded faults in the code, each found by the kill test",
    "every-step": "resume at every step of a small run: the same bits",
    "workers": "loader workers 0, 1, 2, 4, persistent or not: the same bits",
    "signals": "SIGTERM and SIGINT at random points: saved within 5 s, exit 143 / 130, the same bits",
    "saving": "a save interrupted at each write, flush, fsync and rename: one whole checkpoint is left",
    "mirror": "a second home that fails, lies or is damaged: training goes on, the newest whole checkpoint counts",
    "damaged-files": "damaged checkpoints, data sets and weights: detected",
    "damaged-archives": "damaged archives: refused or harmless, never silently wrong",
    "hostile": "hostile archives and images: refused in one line, nothing outside, under 200 MB",
    "names": "hostile class names: text in every figure, page, table and file name",
    "concurrent": "eight processes prepare at once, some builders killed: one whole data set",
    "disk-full": "disk full at preparing, saving, drawing: one line, the old state whole",
    "non-finite": "numbers that are not finite: never in weights, averages or statistics",
    "bad-input": "bad input by the command line: exit 2, one line, nothing changed",
    "processes": "two-process training, a rank or torchrun killed: no hang, no orphan, the same bits",
}
"""The table's rows, in its order."""


class Table:
    """Counts, seconds and failures by row."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter] = defaultdict(Counter)
        self.seconds: Counter = Counter()
        self.failed: set[str] = set()
        self.skipped: Counter = Counter()

    def cells(self, row: str) -> list[str]:
        """Promise, what was done, how it ended, seconds."""
        if row not in self.seconds:
            return [PROMISES[row], "not run", "", ""]
        done = ", ".join(f"{count:,} {what}" for what, count in self.counts[row].items())
        outcome = "FAILED" if row in self.failed else "kept"
        if self.skipped[row]:
            outcome += f" ({self.skipped[row]} tests skipped)"
        return [PROMISES[row], done, outcome, f"{self.seconds[row]:.0f} s"]

    def markdown(self, columns: tuple[str, ...]) -> list[str]:
        """The lines of a Markdown table with its first columns."""
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        return lines + [f"| {' | '.join(self.cells(row)[: len(columns)])} |" for row in PROMISES]


TABLE = pytest.StashKey[Table]()


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether the full amount is asked for (`--soak`), not the quick one."""
    return request.config.getoption("--soak")


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function that adds to the row of the test's module: tally(kills=40, different=0). Names are the table's words,
    "_" for a space."""
    counts = _table(request.config).counts[_row(request.node)]

    def add(**more: int) -> None:
        for what, count in more.items():
            counts[what.replace("_", " ")] += int(count)

    return add


def _table(config: pytest.Config) -> Table:
    return config.stash.setdefault(TABLE, Table())


def _row(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("promise")
    if marker is None:
        return None
    assert marker.args[0] in PROMISES, f"no row {marker.args[0]} in PROMISES"
    return marker.args[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    row = _row(item)
    if row is not None:
        table = _table(item.config)
        table.seconds[row] += call.duration
        if report.failed:
            table.failed.add(row)
        if report.skipped:
            table.skipped[row] += 1
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Adds what a worker process of pytest-xdist has counted."""
    counted = getattr(node, "workeroutput", {}).get("promises")
    if counted is None:
        return
    table = _table(node.config)
    for row, counts in counted["counts"].items():
        table.counts[row].update(counts)
    table.seconds.update(counted["seconds"])
    table.skipped.update(counted["skipped"])
    table.failed |= set(counted["failed"])


def pytest_sessionfinish(session: pytest.Session) -> None:
    table = _table(session.config)
    if hasattr(session.config, "workeroutput"):
        counts = {row: dict(counts) for row, counts in table.counts.items()}
        own = {
            "seconds": dict(table.seconds),
            "skipped": dict(table.skipped),
            "failed": sorted(table.failed),
        }
        session.config.workeroutput["promises"] = own | {"counts": counts}
        return
    path = session.config.getoption("--table")
    if path is None:
        return
    amount = "full" if session.config.getoption("--soak") else "quick"
    minutes = sum(table.seconds.values()) / 60
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    lines = [
        "# Reliability",
        "",
        f"Written by `make soak` ({amount} amount, {minutes:.0f} minutes) on {datetime.date.today()}: "
        f"{device_name(torch.device('cpu'))}, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, commit {commit or 'unknown'}. No number here is typed by hand. "
        "What each row does stands in [`tests/reliability/`](../tests/reliability).",
        "",
        *table.markdown(("promise", "done", "outcome", "time")),
        "",
    ]
    Path(path).write_text("\n".join(lines), encoding="utf-8")
    if readme := session.config.getoption("--readme"):
        page, part = (
            Path(readme).read_text(encoding="utf-8"),
            table.markdown(("promise", "put to the test", "outcome")),
        )
        Path(readme).write_text(
            replace_between(page, "reliability", "\n".join(part), Path(readme)), encoding="utf-8"
        )
