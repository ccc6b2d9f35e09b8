"""How fast is a full training step, by number format, layout, compilation, batch and resolution?

A step is the one of `accurate` on one batch that is on the device already. Each row says which
share of the measured peak of matrix products in its format the step reaches, at 13.33 GFLOP per
image of 64 x 64 pixels, less by area for smaller ones.

    fp32, tf32         32-bit; the second lets an NVIDIA GPU round factors of products to 10 bits
    bf16, fp16         under autocast; fp16 with loss scaling
    NHWC, NCHW         channels last, as everywhere in this project, or first (eager only: a
                       compiler may choose another layout inside)
    reduce-overhead    compiled, and replayed as CUDA graphs

`--csv FILE` keeps each row as it is measured and measures no row twice.

    python benchmarks/bench_throughput.py --csv results/throughput.csv
"""

import csv
import gc
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from measuring import (
    CLASSES,
    STEPS,
    conditions,
    make_parser,
    matmul_peak,
    print_conditions,
    seconds,
)

from tinylab.data.loader import Batch
from tinylab.exceptions import UserError
from tinylab.files import as_csv, write_atomically
from tinylab.recipe import GFLOP_PER_IMAGE, SIZE
from tinylab.recipes import accurate
from tinylab.run.environment import Compute, choose, describe_environment, fastest_convolutions
from tinylab.training.step import TrainState, new_state, train_step

COLUMNS = (
    "gpu", "torch", "commit", "date", "precision", "layout", "compiled", "batch", "resolution",
    "images_per_second", "share_of_peak", "peak_tflops", "status",
)  # fmt: skip
"""Of results/throughput.csv. status: "ok", or why there is no number."""


class Setting(NamedTuple):
    """One row's question."""

    precision: str = "fp16"
    layout: str = "NHWC"
    compiled: str = "no"
    batch: int = 512
    resolution: int = SIZE


def settings(compute: Compute, quick: bool = False) -> list[Setting]:
    """Return the rows for this device, the most telling first. quick: two small ones."""
    if compute.device.type == "cuda":
        eager, best = Setting(), Setting("bf16", compiled="yes")
        chosen = [eager, best, best._replace(precision="fp16"), eager._replace(layout="NCHW")]
        chosen += [eager._replace(precision=precision) for precision in ("bf16", "tf32")]
        chosen.append(Setting("fp32", "NCHW", batch=256))  # the published way
        chosen += [best._replace(batch=batch) for batch in (1024, 256)]
        chosen.append(best._replace(compiled="reduce-overhead"))
        for row in (best, eager):
            chosen += [row._replace(resolution=side) for side in (48, 40)]
        chosen += [eager._replace(batch=batch) for batch in (256, 1024)]
    else:
        formats = ["fp32", "bf16"] if compute.precision == "bf16" else ["fp32"]
        chosen = [
            Setting(name, layout, batch=32) for name in formats for layout in ("NHWC", "NCHW")
        ]
        chosen += [Setting(formats[-1], batch=32, resolution=side) for side in (48, 40)]
    return [row._replace(batch=2, resolution=32) for row in chosen[:2]] if quick else chosen


def make_channels_first(state: TrainState) -> None:
    """Turn the new state's networks and momenta to NCHW; the input follows the network."""
    for network in (state.model, state.average.module):
        network.memory_format = torch.contiguous_format
        network.to(memory_format=torch.contiguous_format)
    for parameter, kept in state.optimizer.state.items():  # a fused one wants one layout for both
        kept["momentum_buffer"] = torch.zeros_like(parameter)


def measure(setting: Setting, device: str, quick: bool) -> tuple[float, float]:
    """Return images/s, the median of three measurements of about 2 s, and the peak in FLOP/s."""
    tf32 = setting.precision == "tf32"
    compute = choose(device, "fp32" if tf32 else setting.precision)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    recipe = replace(accurate(), batch_size=setting.batch, resolution=setting.resolution)
    recipe = replace(recipe, width=16) if quick else recipe
    torch.compiler.reset()
    state = new_state(recipe, CLASSES, 0, STEPS, compute)
    if setting.layout == "NCHW":
        make_channels_first(state)
    if setting.compiled != "no":
        # mode="reduce-overhead" would fall back without a word where it cannot make CUDA graphs.
        graphs = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
        options = graphs if setting.compiled == "reduce-overhead" else None
        state.network = torch.compile(state.model, dynamic=False, options=options)
    state.model.train()
    rng, size = np.random.default_rng(0), (setting.batch, SIZE, SIZE, 3)
    images = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, CLASSES, setting.batch))
    batch = Batch(images.to(compute.device), labels.to(compute.device))

    def steps(count: int) -> float:
        work = [train_step] * count
        return seconds(lambda: [each(state, recipe, compute, batch) for each in work], compute)

    with fastest_convolutions(compute):
        steps(5)  # compiles, and lets cuDNN choose
        count = 1 if quick else max(1, round(2.0 / steps(1)))
        took = statistics.median(steps(count) for _ in range(1 if quick else 3))
        return setting.batch * count / took, matmul_peak(compute, quick)


def row_of(setting: Setting, device: str, quick: bool) -> dict:
    """Return the measured row; what fails is a row, too, whose status says why."""
    row = setting._asdict() | {"status": "ok"}
    try:
        rate, peak = measure(setting, device, quick)
    except torch.OutOfMemoryError:
        return row | {"status": "out of memory"}
    except Exception as error:  # a table of twenty rows is not given up for one
        if "CUDA error" in str(error):
            raise  # the device is lost to this process
        return row | {"status": f"{type(error).__name__}: {error}".splitlines()[0][:100]}
    finally:
        torch.compiler.reset()  # its graphs hold memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    share = rate * GFLOP_PER_IMAGE * 1e9 * (setting.resolution / SIZE) ** 2 / peak
    row |= {"images_per_second": round(rate, 1), "peak_tflops": round(peak / 1e12, 4)}
    return row | ({} if quick else {"share_of_peak": round(share, 4)})


def print_row(row: dict) -> None:
    print("{precision:<5}{layout:<5}compiled: {compiled:<16}".format(**row), end="")
    print("batch {batch:>5}  {resolution:>3} px  ".format(**row), end="")
    rate, share = row.get("images_per_second"), row.get("share_of_peak")
    print(f"{rate:>10,.1f} images/s" if rate else row["status"], end="")
    print(f"{share:>8.1%} of peak" if share else "", flush=True)


def main() -> None:
    parser = make_parser(__doc__, repeat=3)
    parser.add_argument("--csv", type=Path, help="keep the rows here; measure no row twice")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no row after so many")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    try:
        compute = choose(arguments.device)
    except UserError as error:
        parser.error(str(error))
    found = conditions(compute, "one resident batch")
    print_conditions(found)
    environment = describe_environment(compute)
    place = {name: environment[name] for name in ("torch", "commit", "date")}
    place["gpu"] = environment["device"]
    known = arguments.csv is not None and arguments.csv.exists()
    rows = list(csv.DictReader(arguments.csv.read_text().splitlines())) if known else []
    here = [row for row in rows if all(row[name] == place[name] for name in ("gpu", "torch"))]
    done = {tuple(row[name] for name in Setting._fields) for row in here}
    wanted = settings(compute, arguments.quick)
    for setting in [each for each in wanted if tuple(map(str, each)) not in done]:
        if time.monotonic() > until:
            break
        here.append(place | row_of(setting, arguments.device, arguments.quick))
        rows.append(here[-1])
        print_row(rows[-1])
        if arguments.csv:
            table = [COLUMNS, *([row.get(name) for name in COLUMNS] for row in rows)]
            write_atomically(arguments.csv, as_csv(table))
    result = {"benchmark": "throughput", **found, "complete": len(here) >= len(wanted)}
    print(json.dumps(result | {"rows": here}))


if __name__ == "__main__":
    main()
