"""How fast is a full training step, by number format, layout, compilation, batch and resolution?

A step is the one of `accurate` on one batch that is on the device already: forward, loss, backward, optimiser,
schedule, running average. Each row says which share of the measured peak of matrix products in its format the step
reaches, at 13.33 GFLOP per image of 64 x 64 pixels, less by area for smaller ones.

    fp32, tf32         32-bit; the second lets an NVIDIA GPU round the factors of products to 10 bits
    bf16, fp16         under autocast; fp16 with loss scaling
    NHWC, NCHW         layout of images and weights: channels last, as everywhere in this project, or first (eager only:
                       a compiler may choose another layout inside)
    reduce-overhead    compiled, and replayed as CUDA graphs

A GPU is asked the most telling questions first, about twenty; `--full` asks all 144 combinations.
`--csv FILE` keeps each row as it is measured and measures no row twice.

    python benchmarks/bench_throughput.py --csv results/throughput.csv
"""

import contextlib
import csv
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bench_loader import conditions, make_parser, print_conditions
from bench_step import STEPS, TRAINING_FLOP, images_per_second, matmul_peak

from tinylab.data.loader import Batch
from tinylab.exceptions import UserError
from tinylab.files import as_csv, write_atomically
from tinylab.recipe import SIZE
from tinylab.recipes import accurate
from tinylab.run.environment import Compute, choose, device_name, fastest_convolutions
from tinylab.run.folder import describe_environment
from tinylab.training.step import TrainState, new_state, train_step

CLASSES = 200
THROUGHPUT = (
    "gpu", "torch", "commit", "date", "precision", "layout", "compiled", "batch", "resolution",
    "images_per_second", "share_of_peak", "peak_tflops", "status",
)  # fmt: skip
"""Columns of results/throughput.csv. status: "ok", or why there is no number."""


class Setting(NamedTuple):
    """One row's question."""

    precision: str = "fp16"
    layout: str = "NHWC"
    compiled: str = "no"
    batch: int = 512
    resolution: int = SIZE


def settings(compute: Compute, full: bool = False, quick: bool = False) -> list[Setting]:
    """The rows for this device, most telling first. quick: two of them, on few and small images."""
    chosen = _gpu_settings(full) if compute.device.type == "cuda" else _cpu_settings(compute)
    return [setting._replace(batch=2, resolution=32) for setting in chosen[:2]] if quick else chosen


def _cpu_settings(compute: Compute) -> list[Setting]:
    formats = ["fp32", "bf16"] if compute.precision == "bf16" else ["fp32"]
    rows = [
        Setting(precision, layout, batch=32) for precision in formats for layout in ("NHWC", "NCHW")
    ]
    rows += [Setting(formats[-1], batch=32, resolution=side) for side in (48, 40)]
    return [*rows, Setting(formats[-1], compiled="yes", batch=32)]


def _gpu_settings(full: bool) -> list[Setting]:
    eager, best = Setting(), Setting("bf16", compiled="yes")
    chosen = [eager, best, best._replace(precision="fp16"), eager._replace(layout="NCHW")]
    chosen += [eager._replace(precision=precision) for precision in ("bf16", "tf32")]
    chosen += [
        Setting("fp32", "NCHW", batch=256),
        best._replace(batch=1024),
    ]  # the former is the published way
    chosen += [best._replace(batch=256), best._replace(compiled="reduce-overhead")]
    chosen += [best._replace(resolution=side) for side in (48, 40)]
    chosen += [eager._replace(batch=batch) for batch in (256, 1024)]
    chosen += [eager._replace(resolution=side) for side in (48, 40)]
    chosen += [Setting(precision, "NCHW") for precision in ("bf16", "tf32")]
    chosen.append(best._replace(batch=256, compiled="reduce-overhead"))
    if full:
        grid = (
            ("fp16", "bf16", "tf32", "fp32"),
            ("NHWC", "NCHW"),
            ("no", "yes", "reduce-overhead"),
            (512, 256, 1024),
        )
        every = [Setting(*values) for values in itertools.product(*grid, (SIZE, 48, 40))]
        chosen += [
            setting for setting in every if setting.layout == "NHWC" or setting.compiled == "no"
        ]
    return list(dict.fromkeys(chosen))


# --- One row ----------------------------------------------------------------------------------------------------------


def measure(
    setting: Setting, device: str, width: int = 64, seconds: float = 2.0, rounds: int = 3
) -> float:
    """Images/s: the median of `rounds` measurements of about `seconds` each, after warming up."""
    format_ = "fp32" if setting.precision == "tf32" else setting.precision
    compute = choose(device, format_, compiled=setting.compiled != "no")
    with fastest_convolutions(compute), _tf32(setting.precision == "tf32"):
        step = _step(setting, compute, width)
        for _ in range(5):  # compiles, and lets cuDNN choose
            step()
        once = setting.batch / images_per_second(step, compute, setting.batch, 1)
        steps = max(1, round(seconds / once))
        return statistics.median(
            images_per_second(step, compute, setting.batch, steps) for _ in range(rounds)
        )


def _step(setting: Setting, compute: Compute, width: int) -> Callable[[], None]:
    recipe = replace(
        accurate(), batch_size=setting.batch, resolution=setting.resolution, width=width
    )
    torch.compiler.reset()
    state = new_state(recipe, CLASSES, 0, STEPS, compute)
    if setting.layout == "NCHW":
        _channels_first(state)
    # Options in place of mode="reduce-overhead", which falls back without a word where it cannot make CUDA graphs.
    graphs = (
        {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
        if compute.device.type == "cuda"
        else None
    )
    if setting.compiled != "no":
        options = graphs if setting.compiled == "reduce-overhead" else None
        state.network = torch.compile(state.model, dynamic=False, options=options)
    state.model.train()
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (setting.batch, SIZE, SIZE, 3), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, CLASSES, setting.batch))
    batch = Batch(images.to(compute.device), labels.to(compute.device))
    return lambda: train_step(state, recipe, compute, batch)


def _channels_first(state: TrainState) -> None:
    """Turns the new state's networks and momenta to NCHW; the network asks its input for the same layout."""
    for network in (state.model, state.average.module):
        network.memory_format = torch.contiguous_format
        network.to(memory_format=torch.contiguous_format)
    for (
        parameter,
        kept,
    ) in state.optimizer.state.items():  # a fused optimiser wants one layout for both
        kept["momentum_buffer"] = torch.zeros_like(parameter)


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Whether 32-bit products may be rounded; torch lets convolutions do so unless told otherwise."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def peak(precision: str, device: str, quick: bool) -> float:
    """Operations per second of large matrix products in that format."""
    compute = choose(device, "fp32" if precision == "tf32" else precision)
    with _tf32(precision == "tf32"):
        return matmul_peak(compute, quick)


def row_of(setting: Setting, device: str, peaks: dict[str, float], quick: bool = False) -> dict:
    """The measured row; what fails is a row, too, whose status says why."""
    width, seconds, rounds = (16, 0.0, 1) if quick else (64, 2.0, 3)
    row = setting._asdict() | {"status": "ok"}
    try:
        if setting.precision not in peaks:
            peaks[setting.precision] = peak(setting.precision, device, quick)
        rate = measure(setting, device, width, seconds, rounds)
    except UserError as error:
        return row | {"status": str(error)}
    except Exception as error:  # a table of twenty rows is not given up for one
        if "CUDA error" in str(error):
            raise  # the device is lost to this process, and so would all other rows be
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        return row | {
            "status": "out of memory"
            if isinstance(error, torch.OutOfMemoryError)
            else f"{type(error).__name__}: {said}"
        }
    finally:
        torch.compiler.reset()  # its graphs hold memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    operations = rate * TRAINING_FLOP * (setting.resolution / SIZE) ** 2
    share = {} if quick else {"share_of_peak": round(operations / peaks[setting.precision], 4)}
    return row | {
        "images_per_second": round(rate, 1),
        "peak_tflops": round(peaks[setting.precision] / 1e12, 4),
        **share,
    }


# --- The table --------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows that were measured before; none if there is no such file. Raises `UserError` if it is another table."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != THROUGHPUT:
            raise UserError(f"{path} is not a table of throughput: move it away")
        return list(reader)


def missing(path: Path, wanted: Iterable[Setting], device: str) -> list[Setting]:
    """The settings that the table at `path` has no row of, for this device and torch."""
    here = (device_name(choose(device).device), str(torch.__version__))
    ours = [row for row in read_rows(path) if (row["gpu"], row["torch"]) == here]
    there = {tuple(row[name] for name in Setting._fields) for row in ours}
    return [setting for setting in wanted if tuple(map(str, setting)) not in there]


def fill(
    path: Path, wanted: Iterable[Setting], device: str, until: float, quick: bool = False
) -> bool:
    """Measures what is missing in the table at `path` for this device, beginning no row after the clock
    `time.monotonic` says `until`; prints each row; whether nothing is missing now."""
    rows, peaks, about = read_rows(path), {}, describe_environment(choose(device))
    where = {
        "gpu": about["device"],
        "torch": about["torch"],
        "commit": about["commit"],
        "date": about["date"],
    }
    for setting in missing(path, wanted, device):
        if time.monotonic() > until:
            return False
        rows.append(where | row_of(setting, device, peaks, quick))
        table = [THROUGHPUT, *([row.get(name) for name in THROUGHPUT] for row in rows)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, as_csv(table))
        print(line_of(rows[-1]), flush=True)
    return True


def line_of(row: dict) -> str:
    """The row for people."""
    rate = (
        f"{float(row['images_per_second']):>10,.1f} images/s"
        if row.get("images_per_second")
        else ""
    )
    share = f"{float(row['share_of_peak']):>8.1%} of peak" if row.get("share_of_peak") else ""
    said = [
        f"{row['precision']:<5}{row['layout']:<5}compiled: {row['compiled']:<16}batch {row['batch']:>5}"
    ]
    return "  ".join([*said, f"{row['resolution']:>3} px", rate or row["status"], share]).rstrip()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--csv", type=Path, help="keep the rows in this file, and measure no row twice"
    )
    parser.add_argument("--full", action="store_true", help="every combination")
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="begin no row after so many seconds"
    )
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    with contextlib.ExitStack() as stack:
        try:
            compute = choose(arguments.device)
            scratch = tempfile.TemporaryDirectory(prefix="bench-throughput-")
            path = arguments.csv or Path(stack.enter_context(scratch)) / "throughput.csv"
            found = conditions(compute, "one resident batch")
            print_conditions(found)
            wanted = settings(compute, arguments.full, arguments.quick)
            done = fill(path, wanted, arguments.device, until, arguments.quick)
            rows = read_rows(path)
        except UserError as error:
            parser.error(str(error))
    print(json.dumps({"benchmark": "throughput", **found, "complete": done, "rows": rows}))


if __name__ == "__main__":
    main()
