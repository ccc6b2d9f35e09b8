"""Is preparing the data set about as fast as unpacking the archive?

Alternately, `--repeat` times: `unzip -q` of the archive into a new folder, and `tinylab prepare` into a new folder,
each in a process of its own. Then the medians: seconds of both and their ratio (run it on an idle machine: prepare uses
all cores, unzip one; the processor seconds beside them depend less on what else is running), the largest resident
memory of a preparing process, and the seconds of a second start, which opens the result. `unzip` leaves 110,000 small
JPEG files, `prepare` arrays that training maps into memory. The last line of stdout is one JSON object.

    python benchmarks/bench_prepare.py --archive data/tiny-imagenet-200.zip
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREPARE = """
import json, resource, sys
from tinylab.data.dataset import prepare
prepare(sys.argv[1], sys.argv[2])
peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps(peak * (1 if sys.platform == "darwin" else 1024)))
"""
REOPEN = """
import json, sys, time
start = time.perf_counter()
from tinylab.data.dataset import prepare
dataset = prepare(sys.argv[1], sys.argv[2])
dataset.images[0].sum(), dataset.images[-1].sum()
print(json.dumps([time.perf_counter() - start, dataset.is_tiny_imagenet, len(dataset)]))
"""


def timed(command: list[str]) -> tuple[float, float, str]:
    """Wall-clock and processor seconds of the command, and its standard output."""
    before, start = os.times(), time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    wall, after = time.perf_counter() - start, os.times()
    used = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return wall, used, output


def measure(archive: Path, scratch: Path, repeat: int) -> dict[str, object]:
    """Alternates both commands; `scratch` must have room for one unpacked archive (0.6 GB) or one data set (1.4 GB)."""
    unzip, prepare, reopen, peaks = [], [], [], []
    for round_number in range(repeat):
        unzip.append(timed(["unzip", "-q", str(archive), "-d", str(scratch / "unzipped")])[:2])
        shutil.rmtree(scratch / "unzipped")
        os.sync()  # neither pays for the other's unwritten pages
        *took, peak = timed(
            [sys.executable, "-c", PREPARE, str(archive), str(scratch / "prepared")]
        )
        prepare.append(took)
        peaks.append(json.loads(peak))
        opening, published, images = json.loads(
            timed([sys.executable, "-c", REOPEN, str(archive), str(scratch / "prepared")])[2]
        )
        reopen.append(opening)
        shutil.rmtree(scratch / "prepared")
        os.sync()
        print(
            f"round {round_number + 1}: unzip {unzip[-1][0]:.2f} s, prepare {prepare[-1][0]:.2f} s",
            flush=True,
        )
    unzip_seconds, unzip_cpu = map(statistics.median, zip(*unzip, strict=True))
    prepare_seconds, prepare_cpu = map(statistics.median, zip(*prepare, strict=True))
    return {
        "images": images,
        "is_tiny_imagenet": published,
        "unzip_seconds": round(unzip_seconds, 3),
        "unzip_cpu_seconds": round(unzip_cpu, 3),
        "prepare_seconds": round(prepare_seconds, 3),
        "prepare_cpu_seconds": round(prepare_cpu, 3),
        "ratio": round(prepare_seconds / unzip_seconds, 3),
        "peak_process_bytes": max(peaks),
        "second_start_seconds": round(statistics.median(reopen), 3),
        "repeat": repeat,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--archive", type=Path, default=Path("data/tiny-imagenet-200.zip"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--scratch",
        type=Path,
        help="folder for the results, removed afterwards (default: the system's)",
    )
    arguments = parser.parse_args()
    if not arguments.archive.is_file():
        parser.error(f"no archive at {arguments.archive}")
    if shutil.which("unzip") is None:
        parser.error("this comparison needs the program unzip")
    with tempfile.TemporaryDirectory(prefix="bench-prepare-", dir=arguments.scratch) as scratch:
        result = measure(arguments.archive.resolve(), Path(scratch), arguments.repeat)
    rows = (
        ("unzip -q", f"{result['unzip_seconds']:.2f} s"),
        ("  processor time", f"{result['unzip_cpu_seconds']:.2f} s"),
        ("tinylab prepare", f"{result['prepare_seconds']:.2f} s"),
        ("  processor time", f"{result['prepare_cpu_seconds']:.2f} s"),
        ("ratio", f"{result['ratio']:.2f}"),
        ("largest process", f"{result['peak_process_bytes'] / 1e6:.0f} MB"),
        ("second start, imports included", f"{result['second_start_seconds']:.2f} s"),
    )
    print(f"median of {result['repeat']} on {result['cores']} cores")
    for name, value in rows:
        print(f"  {name:32}{value:>10}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
